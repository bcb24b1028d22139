"""The error that the float Gram form declares is never exceeded, against exact arithmetic.

Floats are integers after scaling by a power of two, so the reference is computed in Python's own integers.
"""

from fractions import Fraction

import numpy as np
import pytest

from knnbench.backends import get_backend
from knnbench.metrics import METRICS, Space

WITH_GRAM = [name for name, metric in METRICS.items() if metric.floating.from_dot is not None]
N_QUERIES, N_CORPUS = 3, 5


def whole(rows, bits):
    """Return rows scaled by ``2**bits`` as lists of Python integers, exactly."""
    result = []
    for row in rows.tolist():
        numbers = [Fraction(x) * (1 << bits) for x in row]
        assert all(x.denominator == 1 for x in numbers)
        result.append([int(x) for x in numbers])
    return result


def exact_squares(queries, corpus, bits):
    return [[sum((a - b) ** 2 for a, b in zip(q, c, strict=True)) for c in corpus] for q in queries]


def adversarial(kind, n_features, dtype, rng):
    """Return queries and a corpus on which a Gram form loses most."""
    rows = rng.normal(size=(N_QUERIES + N_CORPUS, n_features))
    if kind == "far":
        rows += 1e4
    elif kind == "constant":
        rows = np.broadcast_to(rng.normal(size=(N_QUERIES + N_CORPUS, 1)) + 3, rows.shape)
    elif kind == "one feature":
        rows[:, 0] *= 1e6
    elif kind == "one row":
        rows[-1] *= 1e4
    elif kind == "opposed":
        rows = np.abs(rows) * np.array([1, -1] * (len(rows) // 2))[:, None]
    elif kind == "near":
        rows = rows[:1] + 1e-5 * rows
    elif kind == "equal":
        rows = np.repeat(rows[:1], len(rows), axis=0)
    elif kind == "mixed":
        rows *= 10.0 ** rng.uniform(-6, 6, n_features)
    rows = np.ascontiguousarray(rows, dtype)
    return rows[:N_QUERIES], rows[N_QUERIES:]


KINDS = ["normal", "far", "constant", "one feature", "one row", "opposed", "near", "equal", "mixed"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_features", [1, 2, 3, 17, 128, 2000])
def test_the_declared_error_is_never_exceeded(kind, n_features, dtype, rng):
    queries, corpus = adversarial(kind, n_features, dtype, rng)
    space = Space(METRICS["sqeuclidean"], np.dtype(dtype), n_features)
    backend = get_backend("numpy")
    prepared = backend.prepare(corpus, space)
    block = backend._take_queries(queries, prepared, space)
    got = backend._block(block, prepared, space, slice(0, N_CORPUS))
    bits = 149 if dtype == "float32" else 1074
    exact = exact_squares(whole(queries, bits), whole(corpus, bits), bits)
    centre = prepared.centre.astype(np.float64)
    norms = [((rows.astype(np.float64) - centre) ** 2).sum(axis=1) for rows in (queries, corpus)]
    allowed = space.gram_error * (norms[0][:, None] + norms[1][None, :])
    for i in range(N_QUERIES):
        for j in range(N_CORPUS):
            error = abs(Fraction(float(got[i, j])) - Fraction(exact[i][j], 1 << 2 * bits))
            underflow = 4 * n_features * Fraction(float(np.finfo(dtype).smallest_subnormal))
            assert error <= Fraction(float(allowed[i, j])) + underflow, (i, j, float(error), allowed[i, j])


@pytest.mark.parametrize("name", WITH_GRAM)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_declared_error_is_not_far_from_reached(name, dtype):
    # A bound that nothing comes near would send every row to the slow form: u n / 2 is reached by sums that
    # are all rounded the same way.
    space = Space(METRICS[name], np.dtype(dtype), 784)
    eps = float(np.finfo(dtype).eps)
    assert 784 * eps / 4 < space.gram_error < 10 * 784 * eps
    assert Space(METRICS[name], np.dtype(dtype), 1).gram_error < 20 * eps
