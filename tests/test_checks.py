"""The helpers that judge every other test must be able to fail."""

import numpy as np
import pytest

from knnbench.backends import registry
from knnbench.metrics import METRICS, Space

from ._checks import (
    assert_distances_close,
    assert_identical,
    assert_same_neighbors,
    assert_ties_by_index,
    assert_well_formed,
    direct_tolerance,
    tolerance,
)
from .conftest import OTHER_PROMISES, as_parameter, available, required_backends

K = 3
REFERENCE = np.array([[0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0, 0.0]])
INDICES = np.array([[0, 1, 2], [4, 3, 2]])
DISTANCES = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
TOLERANCE = 1e-6


def changed(array, where, value):
    """Return a copy with one element replaced."""
    result = array.copy()
    result[where] = value
    return result


def check(distances=DISTANCES, indices=INDICES, reference=REFERENCE, k=K):
    assert_same_neighbors(distances, indices, reference, k, TOLERANCE, TOLERANCE)


def test_right_answers_pass():
    check()
    check(DISTANCES.astype(np.float32))
    assert_distances_close(REFERENCE + 1e-7, REFERENCE, TOLERANCE)
    assert_identical(INDICES.copy(), INDICES)
    assert_well_formed(DISTANCES, (2, 3), np.float64)


def test_either_of_two_neighbors_that_rounding_cannot_separate_passes():
    reference = np.array([[1.0, 2.0, 2.0 + 1e-7]])
    for second in (1, 2):
        assert_same_neighbors(np.array([[1.0, 2.0]]), np.array([[0, second]]), reference, 2, TOLERANCE, TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"distances": changed(DISTANCES, (1, 2), np.nan)}, "ascending"),
        ({"distances": changed(DISTANCES, (0, 0), np.nan)}, "ascending"),
        ({"distances": changed(DISTANCES, (1, 2), np.inf)}, "off"),
        ({"distances": np.full((2, 3), np.nan)}, "ascending"),
        ({"distances": changed(DISTANCES, (1, 2), 2.00001)}, "off"),
        ({"distances": DISTANCES**2}, "off"),
        ({"distances": DISTANCES.tolist()}, "not an array"),
        ({"distances": DISTANCES[:, :2]}, "shape"),
        ({"indices": changed(INDICES, (0, 2), 3)}, "off"),
        ({"indices": INDICES[:, ::-1]}, "off"),
        ({"indices": changed(INDICES, (0, 2), 1)}, "twice"),
        ({"indices": changed(INDICES, (0, 2), 5)}, "out of range"),
        ({"indices": changed(INDICES, (0, 2), -1)}, "out of range"),
        ({"indices": INDICES.astype(np.int32)}, "dtype"),
        ({"indices": INDICES.astype(np.float64)}, "dtype"),
        ({"indices": INDICES[:, :2]}, "shape"),
        ({"distances": DISTANCES[:, ::-1].copy(), "indices": INDICES[:, ::-1].copy()}, "ascending"),
        # the farthest three, rightly measured and sorted
        ({"distances": DISTANCES + 2, "indices": np.array([[2, 3, 4], [2, 1, 0]])}, "lacks row"),
        # the nearest skipped: off by one
        ({"distances": DISTANCES + 1, "indices": np.array([[1, 2, 3], [3, 2, 1]])}, "lacks row"),
        ({"k": 2}, "shape"),
        ({"distances": DISTANCES[:, :2], "indices": INDICES[:, :2]}, "shape"),
    ],
)
def test_wrong_neighbors_fail(arguments, text):
    with pytest.raises(AssertionError, match=text):
        check(**arguments)


def test_swapped_roles_fail():
    # Neighbours of the corpus among the queries, where the two have equally many rows.
    reference = np.array([[0.0, 1.0], [5.0, 2.0]])
    good = np.array([[0.0], [2.0]]), np.array([[0], [1]])
    assert_same_neighbors(*good, reference, 1, TOLERANCE, TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_neighbors(np.array([[0.0], [1.0]]), np.array([[0], [0]]), reference, 1, TOLERANCE, TOLERANCE)
    with pytest.raises(AssertionError, match="off"):
        assert_distances_close(reference.T.copy(), reference, TOLERANCE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.00001])
def test_wrong_distances_fail(bad):
    with pytest.raises(AssertionError, match="1 of 10"):
        assert_distances_close(changed(REFERENCE, (0, 1), bad), REFERENCE, TOLERANCE)


def test_a_reference_or_a_tolerance_of_nan_fails():
    with pytest.raises(AssertionError):
        assert_distances_close(REFERENCE, changed(REFERENCE, (0, 1), np.nan), TOLERANCE)
    with pytest.raises(AssertionError):
        assert_distances_close(REFERENCE, REFERENCE, np.nan)
    with pytest.raises(AssertionError):
        assert_same_neighbors(DISTANCES, INDICES, REFERENCE, K, TOLERANCE, np.nan)


def test_a_broadcast_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        assert_distances_close(REFERENCE[:, :1], REFERENCE, 100.0)


def test_identical_is_strict():
    for other in (INDICES + 1, INDICES.astype(np.int32), INDICES[:1], INDICES.astype(">i8")):
        with pytest.raises(AssertionError):
            assert_identical(other, INDICES)
    nan = np.array([[np.nan]])
    with pytest.raises(AssertionError):
        assert_identical(nan, nan)


def test_ties_out_of_order_fail():
    assert_ties_by_index(np.array([[1, 1, 2]]), np.array([[3, 7, 0]]))
    for indices in ([[7, 3, 0]], [[3, 3, 0]]):
        with pytest.raises(AssertionError):
            assert_ties_by_index(np.array([[1, 1, 2]]), np.array(indices))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tolerances_are_small_and_grow_with_the_dtype(metric, dtype):
    space = Space(METRICS[metric], np.dtype(dtype), 64)
    reference = np.array([[0.5, 1.0, 2.0]])
    allowed = direct_tolerance(space, reference)
    assert (allowed > 0).all()
    assert (allowed < 200 * np.finfo(dtype).eps * np.maximum(reference, 1)).all()
    rows = np.eye(3, 64)
    own = tolerance(space, rows[:1], rows, reference, "pairwise")
    assert (own >= allowed).all()
    assert (own < 400 * np.finfo(dtype).eps).all()


def test_a_tolerance_at_zero_is_that_of_underflow_alone():
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float32), 7)
    assert direct_tolerance(space, np.zeros((1, 1)))[0, 0] < 2e-44
    space = Space(METRICS["euclidean"], np.dtype(np.float32), 7)
    assert direct_tolerance(space, np.zeros((1, 1)))[0, 0] < 2e-22


def test_a_gram_form_without_centring_would_fail():
    # Points around 1000: the uncentred product in float32 loses what the tolerance of own backends wants.
    rng = np.random.default_rng(0)
    rows = (1000 + rng.normal(size=(20, 8))).astype(np.float32)
    space = Space(METRICS["sqeuclidean"], rows.dtype, 8)
    exact = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(axis=2)
    norms = (rows * rows).sum(axis=1)
    gram = norms[:, None] + norms[None] - 2 * (rows @ rows.T)
    with pytest.raises(AssertionError, match="off"):
        assert_distances_close(gram, exact, tolerance(space, rows, rows, exact, "pairwise"))
    assert_distances_close(gram, exact, tolerance(space, rows, rows, exact, "peer"))


def test_what_is_required_and_unavailable_fails(monkeypatch):
    assert required_backends(" numpy, gpu-check,,") == {"numpy", "gpu-check"}
    with pytest.raises(pytest.UsageError, match="numpyy"):
        required_backends("numpy,numpyy")
    assert not OTHER_PROMISES & registry().keys()
    assert available("numpy", frozenset({"numpy"})) == "numpy"
    broken = type("Broken", (), {"ok": False, "reason": "planted"})
    monkeypatch.setattr("tests.conftest.backend_status", lambda name: broken)
    with pytest.raises(pytest.fail.Exception, match="planted"):
        available("numpy", frozenset({"numpy"}))
    with pytest.raises(pytest.skip.Exception, match="planted"):
        available("numpy", frozenset())


def test_the_gpu_mark_is_on_the_backends_of_a_gpu_alone():
    marked = {name for name in registry() if as_parameter(name).marks}
    assert marked == {"numba-cuda", "cupy", "torch-cuda", "torch-cdist-cuda", "torch-mm-cuda"}
