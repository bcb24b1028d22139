"""What the benchmarks share: parameters, data, and the check that an answer is right."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import knnbench

# asv tells results apart by these literals: a list taken from the registry of the commit that is measured would
# change with it, and earlier results would be left out of the graphs. tests/test_asv.py compares them with it.
BACKENDS = [
    "numpy",
    "numba",
    "numba-cuda",
    "cupy",
    "torch",
    "torch-cuda",
    "torch-cdist",
    "torch-cdist-cuda",
    "torch-mm",
    "torch-mm-cuda",
    "scipy",
    "sklearn",
    "faiss",
]
# Python loops over pairs or features, thousands of times slower: they have workloads of their own.
LOOPING_BACKENDS = ["python", "notebook"]
CUDA_BACKENDS = ["numba-cuda", "cupy", "torch-cuda", "torch-cdist-cuda", "torch-mm-cuda"]
METRICS = ["euclidean", "cityblock"]
DTYPES = ["float32", "uint8"]

# Each round is a process, and where its memory lies moves its times by more than a call does: with two rounds, a
# commit without a change was slower by 1.3. asv also has a blind spot at 6 samples a side.
ROUNDS = 5
REPEAT = (4, 4, 5.0)


class Workload(NamedTuple):
    """Sizes of a search."""

    n_queries: int
    n_corpus: int
    n_features: int
    k: int = 3


# Who changes a workload raises `version` in the classes that use it.
WORKLOADS = {
    "images": Workload(64, 2048, 784),  # products or differences decide
    "narrow": Workload(512, 4096, 16, k=10),  # the selection does
    "single": Workload(1, 65_536, 64),  # reading the corpus does
    "square": Workload(512, 1024, 128),
    "tall": Workload(512, 16_384, 16),  # all its distances take 32 MiB in float32
    "tiny": Workload(4, 256, 64),
}

CLASSES = 10


class Problem(NamedTuple):
    """Data of a workload; `labels` is the class of each corpus row."""

    queries: Any
    corpus: Any
    labels: Any
    k: int


# Of the largest distance. float32 rounds by 1e-6 on this data; a wrong algorithm is off by far more.
TOLERANCE = 1e-3

# Reference distances are computed for so many of the queries.
N_CHECKED = 16


class WrongAnswerError(AssertionError):
    """A backend gave an answer that is not right."""


def problem(workload: Workload, dtype: str, offset: float = 0.0) -> Problem:
    """Return clusters of points with values around 128, in the range of pixels; floats are moved by `offset`."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(64, 192, (CLASSES, workload.n_features))

    def rows(n: int) -> tuple[Any, Any]:
        labels = rng.integers(0, CLASSES, n)
        values = centres[labels] + 12 * rng.standard_normal((n, workload.n_features))
        rounded = np.clip(np.rint(values), 1, 255) if dtype == "uint8" else values + offset
        return rounded.astype(dtype), labels

    corpus, labels = rows(workload.n_corpus)
    return Problem(rows(workload.n_queries)[0], corpus, labels, workload.k)


ABSENT = (knnbench.UnknownBackendError, knnbench.BackendUnavailableError, knnbench.UnsupportedError)


@contextlib.contextmanager
def applicable(backend: str) -> Iterator[None]:
    """Tell asv n/a, with the reason, where the backend is absent or lacks what the block asks for."""
    try:
        yield
    except ABSENT as error:
        # A backend computes a small answer before it counts as available: a wrong one is not an absence.
        if "wrong answer" in str(error):
            raise WrongAnswerError(str(error)) from error
        promised = os.environ.get("KNNBENCH_REQUIRE", "").split(",")
        if backend in promised and isinstance(error, knnbench.BackendUnavailableError):
            raise
        raise NotImplementedError(str(error)) from error


class Search(NamedTuple):
    """A backend ready to answer a problem."""

    data: Problem
    prepared: Any

    def knn(self) -> Any:
        """Return the neighbours."""
        return knnbench.knn(self.data.queries, self.prepared, self.data.k)

    def pairwise(self) -> Any:
        """Return all distances."""
        return knnbench.pairwise(self.data.queries, self.prepared)


def prepared_search(backend: str, metric: str, dtype: str, workload: Workload, offset: float = 0.0) -> Search:
    """Return a search that has answered for two queries, and so is compiled."""
    data = problem(workload, dtype, offset)
    with applicable(backend):
        search = Search(data, knnbench.prepare(data.corpus, metric, backend=backend))
        search._replace(data=data._replace(queries=data.queries[:2])).knn()
    return search


# asv runs `setup` before every timed call: only the first is to compile, warm up and check.
@functools.lru_cache(maxsize=1)
def checked_knn(backend: str, metric: str, dtype: str, workload: Workload) -> Search:
    """Return a search whose neighbours have been checked."""
    search = prepared_search(backend, metric, dtype, workload)
    check_neighbors(*search.knn(), search.data, metric)
    return search


@functools.lru_cache(maxsize=1)
def checked_pairwise(backend: str, metric: str, dtype: str, workload: Workload) -> Search:
    """Return a search whose distances have been checked."""
    search = prepared_search(backend, metric, dtype, workload)
    error = relative_error(search.pairwise(), search.data, metric)
    if not error <= TOLERANCE:
        raise WrongAnswerError(f"distances are off by {error:.2g} of the largest; at most {TOLERANCE:g} is allowed")
    return search


def reference(queries: Any, corpus: Any, metric: str) -> Any:
    """Return distances in float64 by the direct form, without knnbench."""
    # Here, because the memory that scipy takes would hide some of what a backend takes.
    from scipy.spatial.distance import cdist

    return cdist(queries.astype(np.float64), corpus.astype(np.float64), metric)


def check_neighbors(distances: Any, indices: Any, data: Problem, metric: str) -> None:
    """Raise `WrongAnswerError` unless these are nearest neighbours; among nearly equal ones any will do."""
    n_queries = len(data.queries)
    if distances.shape != (n_queries, data.k) or indices.shape != (n_queries, data.k):
        raise WrongAnswerError(f"shapes {distances.shape}, {indices.shape}; expected {(n_queries, data.k)} twice")
    if indices.min() < 0 or indices.max() >= len(data.corpus) or not np.diff(np.sort(indices, axis=1)).all():
        raise WrongAnswerError("an index is outside the corpus, or twice among the neighbours of a query")
    some = np.unique(np.linspace(0, n_queries - 1, N_CHECKED).astype(int))
    expected = reference(data.queries[some], data.corpus, metric)
    nearest = np.sort(expected, axis=1)[:, : data.k]
    found = np.take_along_axis(expected, indices[some], axis=1)
    for what, values in ("distances", distances[some]), ("neighbours", found):
        error = float(np.abs(values.astype(np.float64) - nearest).max() / nearest.max())
        if not error <= TOLERANCE:
            raise WrongAnswerError(f"{what} are off by {error:.2g} of the largest; at most {TOLERANCE:g} is allowed")


def relative_error(distances: Any, data: Problem, metric: str) -> float:
    """Return max |d - d_ref| / max d_ref; infinity for a wrong shape or values that are not finite."""
    expected = reference(data.queries, data.corpus, metric)
    if distances.shape != expected.shape:
        return math.inf
    error = float(np.abs(distances.astype(np.float64) - expected).max() / expected.max())
    return error if math.isfinite(error) else math.inf
