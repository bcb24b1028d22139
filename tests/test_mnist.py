"""The real data: own backends agree to the bit on it, and the notebook's accuracies come out exactly."""

import functools
import itertools

import numpy as np
import pytest

from knnbench import KNNClassifier, datasets, knn
from knnbench.backends import backend_status, registry
from knnbench.measure.reproduction import FIRST_IMAGES, NOTEBOOK, K
from tests.conftest import available

METRICS = ("cityblock", "euclidean", "sqeuclidean", "chebyshev", "cosine")

# The naive loop would need hours.
COMPILED = tuple(name for name, line in registry().items() if not line.peer and name != "python")


@pytest.fixture(scope="module")
def mnist():
    status = next(status for status in datasets.status() if status.name == "mnist")
    if not status.available:
        pytest.skip(f"MNIST is absent: {status.reason}")
    return datasets.load("mnist")


@functools.cache
def answer(backend, metric, n_queries, n_corpus=60_000):
    data = datasets.load("mnist", n_train=n_corpus, n_test=n_queries)
    return knn(data.X_test, data.X_train, K, metric, backend=backend, accuracy="exact")


def assert_equal_to_the_bit(one, other):
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.distances, other.distances)
    assert one.distances.dtype == other.distances.dtype


@pytest.mark.parametrize("metric", METRICS)
def test_own_backends_give_the_definition_on_a_part(mnist, own_backend, metric):
    assert_equal_to_the_bit(answer(own_backend, metric, 5, 2000), answer("python", metric, 5, 2000))


def pairs_of(n_queries, metric):
    names = [name for name in COMPILED if backend_status(name).ok]
    for one, other in itertools.pairwise(names):
        assert_equal_to_the_bit(answer(one, metric, n_queries), answer(other, metric, n_queries))
    assert len(names) >= 2


@pytest.mark.parametrize("metric", METRICS)
def test_own_backends_agree_on_the_whole_corpus(mnist, metric):
    pairs_of(20, metric)


@pytest.mark.slow
@pytest.mark.parametrize("metric", NOTEBOOK)
def test_own_backends_agree_on_a_thousand_queries(mnist, metric):
    pairs_of(1000, metric)


def first_correct(data, backend, metric):
    classifier = KNNClassifier(K, metric, backend=backend).fit(data.X_train, data.y_train)
    return int((classifier.predict(data.X_test[:FIRST_IMAGES]) == data.y_test[:FIRST_IMAGES]).sum())


@pytest.mark.parametrize("metric", NOTEBOOK)
def test_the_notebook_is_reproduced(mnist, metric):
    assert first_correct(mnist, available("numba"), metric) == NOTEBOOK[metric].first_correct


@pytest.mark.slow
@pytest.mark.parametrize("metric", NOTEBOOK)
@pytest.mark.parametrize("backend", [name for name in COMPILED if name != "numba"])
def test_the_notebook_is_reproduced_by_every_backend(mnist, backend, metric):
    assert first_correct(mnist, available(backend), metric) == NOTEBOOK[metric].first_correct
