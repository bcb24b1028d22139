"""Losses of linear models by digits of their weights: as a matrix unit computes them, and without its instruction."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp

from knnbench.backends import get_backend
from knnbench.kernels.cpu_linear import (
    LARGEST_NUMBER,
    LEAST_FEATURES,
    SUMMED_FEATURES,
    LinearKernels,
    kernels_of,
    linear_kernels,
)
from knnbench.kernels.cpu_simd import OPERATIONS, Vectors

FLOAT = np.dtype(np.float32)
SHAPES = [(1, 1, 1), (33, 65, 10), (95, 130, 11), (64, 64, 26), (40, 200, 100), (500, 5, 2)]


def emulated() -> LinearKernels:
    return kernels_of(Vectors(OPERATIONS["product-digits-matrix"], 64, 32))


def instructed() -> LinearKernels:
    kernels = linear_kernels(np.uint8, FLOAT, 64, 10)
    if not kernels.form.operation.is_matrix:
        pytest.skip("this CPU has no matrix unit, or $KNNBENCH_SIMD is a level without one")
    return kernels


def losses_by(
    kernels: LinearKernels, monkeypatch: pytest.MonkeyPatch, X: np.ndarray, y: np.ndarray, weight: np.ndarray
) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("knnbench.backends.numba"), "linear_kernels", lambda *given: kernels)
        return get_backend("numba").linear_loss(X, y, weight, FLOAT)


def rounded(W: np.ndarray) -> np.ndarray:
    """The multiples of a power of two that stand for the weights of a class, of which the largest has 22 or 23 bits."""
    largest = np.abs(W).astype(np.float64).max(axis=-2, keepdims=True)
    unit = np.ldexp(1.0, np.frexp(largest)[1] - 23)
    unit = np.where(np.rint(largest / unit) > LARGEST_NUMBER, 2 * unit, unit)
    return np.rint(W / unit) * unit


def expected(X: np.ndarray, y: np.ndarray, weight: np.ndarray, W: np.ndarray, b: np.ndarray) -> np.ndarray:
    logits = X.astype(np.float64) @ W + b[:, None].astype(np.float64)
    return (logsumexp(logits, axis=2) - logits[:, np.arange(len(y)), y]) @ weight


def case(n_samples: int, n_features: int, n_classes: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(n_features)
    X = rng.integers(0, 256, (n_samples, n_features), np.uint8) * (rng.random((n_samples, n_features)) < 0.4)
    W, b = (rng.standard_normal((3, *shape)).astype(FLOAT) for shape in ((n_features, n_classes), (n_classes,)))
    y = rng.integers(0, n_classes, n_samples)
    y[0] = n_classes - 1
    return X.astype(np.uint8), y, rng.random(n_samples), W / np.float32(64), b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("made", [emulated, instructed])
def test_losses_are_those_of_weights_rounded_to_a_multiple(
    monkeypatch: pytest.MonkeyPatch, made: Any, shape: tuple[int, int, int]
) -> None:
    X, y, weight, W, b = case(*shape)
    losses = losses_by(made(), monkeypatch, X, y, weight)
    found = losses(W, b)
    np.testing.assert_allclose(found, expected(X, y, weight, rounded(W), b), rtol=1e-13, atol=1e-300)
    # What rounding changes is bounded, and is not nothing.
    assert (np.abs(rounded(W) - W) <= np.abs(W).max(axis=1, keepdims=True) / LARGEST_NUMBER).all()
    assert shape == (1, 1, 1) or (rounded(W) != W).any()
    np.testing.assert_array_equal(found, [losses(W[m : m + 1], b[m : m + 1])[0] for m in range(3)])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_instruction_gives_what_the_form_without_it_gives(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    X, y, weight, W, b = case(*shape)
    one, other = (losses_by(kernels, monkeypatch, X, y, weight)(W, b) for kernels in (emulated(), instructed()))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("made", [emulated, instructed])
def test_the_largest_sums_fit(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    """All samples are 255, and all digits the largest, or -128, which one more feature would not leave room for."""
    X, y = np.full((33, SUMMED_FEATURES), 255, np.uint8), np.arange(33) % 3
    W = np.zeros((1, SUMMED_FEATURES, 3), FLOAT)
    W[..., 0], W[..., 1] = LARGEST_NUMBER * 2.0**-40, (127 * 2**16 - 128 * 2**8 - 128) * 2.0**-41
    W[..., 2] = -W[..., 0]
    assert (rounded(W) == W).all()
    assert 255 * 128 * (SUMMED_FEATURES + 1) >= 2**31
    found = losses_by(made(), monkeypatch, X, y, np.ones(33))(W, np.zeros((1, 3), FLOAT))
    logits = 255.0 * SUMMED_FEATURES * W[0, 0].astype(np.float64)
    np.testing.assert_allclose(found, 11 * (3 * logsumexp(logits) - logits.sum()), rtol=1e-14)


def test_few_features_and_more_than_32_bits_can_sum_are_left_to_floats() -> None:
    instructed()
    for stored, dtype, n_features in (
        ("u1", "f4", SUMMED_FEATURES + 1),
        ("u1", "f4", LEAST_FEATURES - 1),
        ("f4", "f4", 9),
        ("f8", "f8", 9),
    ):
        assert not linear_kernels(np.dtype(stored), np.dtype(dtype), n_features, 10).form.operation.is_matrix


@pytest.mark.parametrize("made", [emulated, instructed])
def test_classes_have_units_of_their_own(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    X, y, weight, W, b = case(70, 90, 6)
    W = W * np.float32([1e-30, 1e-10, 1, 1e-3, 0, 1e-44])
    found = losses_by(made(), monkeypatch, X, y, weight)(W, b)
    np.testing.assert_allclose(found, expected(X, y, weight, rounded(W), b), rtol=1e-13)
    # A power of two is the largest number of no digits.
    W = np.sign(W) * np.float32([2.0**-126, 1, 2, 0.5, 1e-3, 2.0**100])
    found = losses_by(made(), monkeypatch, X, y, weight)(W, b)
    np.testing.assert_allclose(found, expected(X, y, weight, W.astype(np.float64), b), rtol=1e-13)


@pytest.mark.parametrize("made", [emulated, instructed])
def test_nothing_but_zeros(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    X, y = np.zeros((40, 70), np.uint8), np.arange(40) % 4
    losses = losses_by(made(), monkeypatch, X, y, np.ones(40))
    assert losses(np.ones((1, 70, 4), FLOAT), np.zeros((1, 4), FLOAT))[0] == pytest.approx(40 * math.log(4), rel=1e-14)
    losses = losses_by(made(), monkeypatch, np.zeros((40, 70), np.uint8), np.zeros(40, np.int64), np.ones(40))
    assert losses(np.ones((1, 70, 1), FLOAT), np.ones((1, 1), FLOAT))[0] == 0.0


@pytest.mark.parametrize("made", [emulated, instructed])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_the_loss_infinite(monkeypatch: pytest.MonkeyPatch, made: Any, value: float) -> None:
    X, y, weight, W, b = case(70, 90, 6)
    X[:, 17] = 1
    losses = losses_by(made(), monkeypatch, X, y, weight)
    right = losses(W, b)
    spoiled, intercepts = W.copy(), b.copy()
    spoiled[0, 17, 2] = value
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(losses(spoiled, b), [math.inf, *right[1:]])
        if value != -np.inf:  # of a class that is then impossible
            intercepts[1, 3] = value
            np.testing.assert_array_equal(losses(W, intercepts), [right[0], math.inf, right[2]])


@pytest.mark.parametrize("made", [emulated, instructed])
def test_threads_and_chunks_change_nothing_to_the_bit(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    module = importlib.import_module("knnbench.backends.numba")
    monkeypatch.setattr(module, "SMALL_LOSS", 1)
    monkeypatch.setattr(module, "LOSS_PANELS", 3)
    X, y, weight, W, b = case(700, 100, 10)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("KNNBENCH_THREADS", threads)
        losses = losses_by(made(), monkeypatch, X, y, weight)
        found += [losses(W, b), losses(W, b)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    np.testing.assert_allclose(found[0], expected(X, y, weight, rounded(W), b), rtol=1e-13)
