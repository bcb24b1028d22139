"""The reference that every other backend is compared with, against scipy and by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from knnbench import knn, pairwise
from knnbench.metrics import METRICS

from ._checks import assert_distances_close, assert_identical, assert_well_formed

BY_HAND = {
    "euclidean": 5.0,
    "sqeuclidean": 25.0,
    "cityblock": 7.0,
    "chebyshev": 4.0,
}
EPS = float(np.finfo(np.float64).eps)


@pytest.mark.parametrize(("metric", "expected"), BY_HAND.items())
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_by_hand(metric, expected, dtype):
    queries, corpus = np.array([[1, 7]], dtype), np.array([[4, 3], [1, 7]], dtype)
    assert pairwise(queries, corpus, metric, backend="python").tolist() == [[expected, 0]]


def test_cosine_by_hand():
    queries, corpus = [[3.0, 4.0]], [[4.0, 3.0], [-3.0, -4.0], [30.0, 40.0], [-4.0, 3.0]]
    got = pairwise(queries, corpus, "cosine", backend="python")
    assert_distances_close(got, np.array([[1 - 24 / 25, 2.0, 0.0, 1.0]]), 4 * EPS)
    assert got[0, 2] == 0
    got = pairwise(np.uint8([[3, 4]]), np.uint8([[4, 3], [6, 8], [0, 9]]), "cosine", backend="python")
    assert_identical(got, np.array([[1 - 24 / 25, 0.0, 1 - 36 / 45]], np.float32))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_features", [1, 2, 7, 64, 1025])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equals_scipy(metric, n_features, scale, rng):
    queries, corpus = scale * rng.normal(size=(3, n_features)), scale * rng.normal(size=(5, n_features))
    expected = cdist(queries, corpus, metric)
    # scipy accumulates in float64 in order, and takes 1 - cos for cosine.
    allowed = (n_features + 8) * EPS * (np.ones_like(expected) if metric == "cosine" else expected)
    assert_distances_close(pairwise(queries, corpus, metric, backend="python"), expected, allowed)


@pytest.mark.parametrize("metric", METRICS)
def test_equals_scipy_on_uint8(metric, rng):
    queries, corpus = rng.integers(0, 256, (4, 31), np.uint8), rng.integers(0, 256, (6, 31), np.uint8)
    expected = cdist(queries.astype(float), corpus.astype(float), metric)
    got = pairwise(queries, corpus, metric, backend="python")
    if metric in ("euclidean", "cosine"):
        assert_distances_close(got, expected, 2 * float(np.finfo(np.float32).eps) * expected)
    else:
        assert_identical(got, expected.astype(np.int32))


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_a_sum_is_rounded_once(metric, rng):
    # Terms of which a running sum in float64 loses all but the first.
    queries = np.array([[2.0**27, *rng.choice([0.5, 0.25], 40)]])
    corpus = np.zeros_like(queries)
    power = 2 if metric == "sqeuclidean" else 1
    exact = sum(Fraction(x) ** power for x in queries[0].tolist())
    assert pairwise(queries, corpus, metric, backend="python")[0, 0] == float(exact)


def test_float32_is_computed_in_float64(rng):
    queries, corpus = rng.normal(size=(3, 50)).astype(np.float32), rng.normal(size=(4, 50)).astype(np.float32)
    exact = [[sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(q, c, strict=True)) for c in corpus.tolist()]
             for q in queries.tolist()]  # fmt: skip
    got = pairwise(queries, corpus, "sqeuclidean", backend="python")
    assert_well_formed(got, (3, 4), np.float32)
    # A difference of two float32 need not be a float64; its square is rounded there once more.
    expected = np.array(exact, float)
    assert_distances_close(got, expected, (0.5 + 1e-6) * np.finfo(np.float32).eps * expected)


def test_integers_of_any_length():
    n_features = 40_000
    queries, corpus = np.full((1, n_features), 255, np.uint8), np.zeros((1, n_features), np.uint8)
    got = pairwise(queries, corpus, "sqeuclidean", backend="python")
    assert_identical(got, np.array([[n_features * 255**2]], np.int64))
    got = pairwise(queries, corpus, "euclidean", backend="python")
    assert_identical(got, np.array([[math.sqrt(n_features) * 255]], np.float32))


def test_ties_go_to_the_smaller_index():
    corpus = np.uint8([[5], [3], [1], [3], [1]])
    distances, indices = knn(np.uint8([[2]]), corpus, 5, "cityblock", backend="python")
    assert indices.tolist() == [[1, 2, 3, 4, 0]]
    assert distances.tolist() == [[1, 1, 1, 1, 3]]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_neighbors_are_the_sorted_distances(metric, dtype, rng):
    queries, corpus = (rng.integers(0, 4, (n, 3)).astype(dtype) + 1 for n in (4, 20))
    queries, corpus = queries.astype(dtype), corpus.astype(dtype)
    reference = pairwise(queries, corpus, metric, backend="python")
    distances, indices = knn(queries, corpus, 20, metric, backend="python")
    assert_identical(distances, np.sort(reference, axis=1))
    assert_identical(np.sort(indices, axis=1), np.tile(np.arange(20), (4, 1)))
    assert_identical(np.take_along_axis(reference, indices, axis=1), distances)
