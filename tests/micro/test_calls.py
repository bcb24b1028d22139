"""What a call costs when there is next to nothing to compute."""

import numpy as np
import pytest

from knnbench import knn, prepare

from ._answers import assert_neighbors, skip_unclaimed, timed

QUERIES = np.array([[0, 0]], np.float32)
CORPUS = np.array([[3, 4], [1, 0], [0, 2], [5, 5]], np.float32)


@pytest.mark.parametrize("case", ["call, corpus prepared", "call, corpus plain"])
def test_call(backend, benchmark, case):
    skip_unclaimed(backend, "cityblock", "float32")
    corpus = prepare(CORPUS, "cityblock", backend=backend) if case.endswith("prepared") else CORPUS
    answer = timed(benchmark, lambda: knn(QUERIES, corpus, 2, "cityblock", backend=backend))
    assert answer.backend == backend
    assert_neighbors(answer, QUERIES, CORPUS, 2, "cityblock", backend)
