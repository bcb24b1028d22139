"""The CUDA C++ source of the losses of linear models, compiled as C++ for the host (`tests.cuda_emulator`)."""

import numpy as np
import pytest
from scipy.special import logsumexp

from knnbench.kernels.cuda_linear_source import CHUNK, MOST_MODELS, UNIT, loss_kernel, row_chunks

from . import cuda_emulator
from ._checks import assert_identical
from .conftest import REQUIRED


@pytest.fixture
def compiled():
    if cuda_emulator.compiler() is None:
        (pytest.fail if "gpu-check" in REQUIRED else pytest.skip)("there is no C++ compiler to test the source with")
    return cuda_emulator.compiled


def problem(rng, element, n_samples, n_features, n_classes, n_models):
    """Return samples with zeros at the edges of rows, labels, their weights, and models."""
    X = rng.integers(0, 256, (n_samples, n_features))
    X[:, : n_features // 3] = 0
    X = X.astype(element) if element == "uint8" else (X + (X > 0) * rng.random(X.shape)).astype(element)
    real = np.result_type(element, np.float32)
    W = (1e-2 * rng.normal(size=(n_models, n_features, n_classes))).astype(real)
    b = rng.normal(size=(n_models, n_classes)).astype(real)
    return X, rng.integers(0, n_classes, n_samples), rng.random(n_samples), W, b


def launched(compiled, X, y, weight, W, b, faulty=None):
    """Return the losses of units of samples, as the backend starts the kernel."""
    n_models, n_features, n_classes = W.shape
    kernel = loss_kernel(X.dtype, W.dtype, n_features, n_classes, n_models)
    chunks = row_chunks(n_features, X.dtype)
    rows = np.zeros((len(X), chunks * CHUNK // X.itemsize), X.dtype)
    rows[:, :n_features] = X
    n_parts, all_features, n_columns = kernel.weight_shape
    packed = np.zeros((n_models, *kernel.weight_shape), W.dtype)
    for part in range(n_parts):
        some = W[:, :, part * n_columns : (part + 1) * n_columns]
        packed[:, part, :n_features, : some.shape[2]] = some
    assert all_features == rows.shape[1]
    sums = np.full((n_models, -(-len(X) // UNIT)), np.nan)
    source = kernel.source
    if faulty:
        correct, wrong = faulty
        assert source.count(correct) == 1
        source = source.replace(correct, wrong)
    grid = -(-len(X) // kernel.samples), -(-n_models // kernel.models)
    sizes = np.uint64(len(X)), *map(np.uint32, (chunks, n_classes, n_models))
    compiled(source).launch("losses", grid, (kernel.threads,), (rows, y, weight, packed, b, sums, *sizes),
                            kernel.shared_bytes)  # fmt: skip
    return sums


def expected(X, y, weight, W, b):
    """Return the same in float64."""
    logits = np.einsum("if,mfc->mic", X.astype(np.float64), W.astype(np.float64), optimize=True) + b[:, None]
    losses = weight * (logsumexp(logits, axis=2) - np.take_along_axis(logits, y[None, :, None], axis=2)[..., 0])
    return np.add.reduceat(losses, range(0, len(X), UNIT), axis=1)


# Every dtype with classes in one part and in several; what else there is to sizes, with bytes.
CASES = [
    *(("uint8", shape) for shape in [(1, 1, 1, 1), (257, 17, 11, 3), (131, 784, 10, 5), (300, 70, 37, 9)]),
    *((element, shape) for element in ("float32", "float64") for shape in [(257, 17, 11, 5), (131, 133, 10, 4)]),
]


@pytest.mark.parametrize(("element", "shape"), CASES, ids=str)
def test_losses(element, shape, rng, compiled):
    given = problem(rng, element, *shape)
    found = launched(compiled, *given)
    np.testing.assert_allclose(found, expected(*given), rtol=1e-5 if element != "float64" else 1e-12, atol=1e-12)
    X, y, weight, W, b = given
    # The same to the bit, however many models there are.
    assert_identical(found[:1], launched(compiled, X, y, weight, W[:1], b[:1]))
    assert_identical(found[-2:], launched(compiled, X, y, weight, W[-2:], b[-2:]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_classes", [3, 13])
def test_weights_that_are_not_finite_tell_where_features_are_zero(n_classes, value, rng, compiled):
    X, y, weight, W, b = problem(rng, "uint8", 200, 30, n_classes, 3)
    X[:, :8] = 0
    W[1, 2, 1], b[2, 0] = value, np.nan
    assert np.isfinite(launched(compiled, X, y, weight, W, b)).all(axis=1).tolist() == [True, False, False]


def test_logits_far_apart(rng, compiled):
    X, y, weight, W, b = problem(rng, "float32", 150, 20, 14, 2)
    W *= 1e4
    np.testing.assert_allclose(launched(compiled, X, y, weight, W, b), expected(X, y, weight, W, b), rtol=1e-5)


@pytest.mark.parametrize(
    "faulty",
    [
        ("wait_for_all_but<n_stages - 2>();\n            __syncthreads();", "__syncthreads();"),
        ("wait_for_all_but<n_stages - 2>();\n            __syncthreads();", "wait_for_all_but<n_stages - 2>();"),
        ("if (!any_of_warp(some != 0))", "if (any_of_warp(some != 0))"),
        ("(row < n_left ? row : 0)", "row"),
        ("below *= exp(before - largest);", ";"),
        ("r * 32 + lane < n_left", "true"),
        ("m * n_parts", "m"),
    ],
    ids=["wait", "barrier", "skip", "samples past the end", "rescaling", "labels past the end", "parts"],
)
def test_planted_faults_show(faulty, rng, compiled):
    given = problem(rng, "uint8", 200, 90, 13, MOST_MODELS + 1)
    try:
        found = launched(compiled, *given, faulty=faulty)
    except AssertionError:
        return
    assert not np.allclose(found, expected(*given), rtol=1e-5)
