"""The errors that filters of floats declare are never exceeded, against exact arithmetic: that of the Gram form, and
that of the sum of the larger.

Floats are integers after scaling by a power of two, so the reference is computed in Python's own integers.
"""

from fractions import Fraction

import numpy as np
import pytest

from knnbench.backends import get_backend
from knnbench.bounds import halves_error
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


def in_turn(values):
    """Return the sums over the last axis, one term after the other, in the values' dtype."""
    return np.add.accumulate(values, axis=-1)[..., -1]


def larger_form(queries, corpus, centre):
    """Return sum(|q - c|) by the larger of each two, of centred rows, and the sums of absolute values."""
    q, c = queries - centre, corpus - centre
    sums = 2 * in_turn(np.maximum(q[:, None], c[None])) - in_turn(c)[None]
    # What a key is compared with, a sum of three, is rounded as often as this.
    return sums - in_turn(q)[:, None], [in_turn(abs(rows).astype(np.float64)) for rows in (q, c)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_features", [1, 2, 3, 17, 128, 2000])
def test_the_error_of_the_larger_form_is_never_exceeded(kind, n_features, dtype, rng):
    queries, corpus = adversarial(kind, n_features, dtype, rng)
    space = Space(METRICS["cityblock"], np.dtype(dtype), n_features)
    got, norms = larger_form(queries, corpus, corpus.mean(axis=0, dtype=np.float64).astype(dtype))
    bits = 149 if dtype == "float32" else 1074
    exact = [
        [sum(abs(a - b) for a, b in zip(q, c, strict=True)) for c in whole(corpus, bits)] for q in whole(queries, bits)
    ]
    for i in range(N_QUERIES):
        for j in range(N_CORPUS):
            error = abs(Fraction(float(got[i, j])) - Fraction(exact[i][j], 1 << bits))
            allowed = space.larger_error * (norms[0][i] + norms[1][j])
            assert error <= Fraction(allowed), (i, j, float(error), allowed)


def test_a_larger_error_is_found():
    # All roundings go the same way: far more than a hundredth of what is declared.
    n_features = 20_000
    queries, corpus = np.full((1, n_features), 0.1, np.float32), np.full((1, n_features), 0.3, np.float32)
    space = Space(METRICS["cityblock"], queries.dtype, n_features)
    got, norms = larger_form(queries, corpus, np.zeros(n_features, np.float32))
    (q,), (c,) = whole(queries[:, :1], 149)[0], whole(corpus[:, :1], 149)[0]
    error = abs(Fraction(float(got[0, 0])) - Fraction(n_features * abs(q - c), 1 << 149))
    allowed = space.larger_error * (norms[0][0] + norms[1][0])
    assert Fraction(allowed) / 100 < error <= Fraction(allowed)


@pytest.mark.parametrize("name", WITH_GRAM)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_declared_error_is_not_far_from_reached(name, dtype):
    # A bound that nothing comes near would send every row to the slow form: u n / 2 is reached by sums that
    # are all rounded the same way.
    space = Space(METRICS[name], np.dtype(dtype), 784)
    eps = float(np.finfo(dtype).eps)
    assert 784 * eps / 4 < space.gram_error < 10 * 784 * eps
    assert Space(METRICS[name], np.dtype(dtype), 1).gram_error < 20 * eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_features", [1, 2, 3, 17, 128, 2000])
@pytest.mark.parametrize("exponent", [-20, 0, 12])
def test_the_error_of_products_of_halves_is_never_exceeded(kind, n_features, exponent, rng):
    # What CUDA kernels do, in numpy: rows are centred, scaled and rounded, and their products summed in float32.
    queries, corpus = adversarial(kind, n_features, "float32", rng)
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float32), n_features)
    centre = corpus.mean(axis=0, dtype=np.float64).astype(np.float32)
    _, largest = np.frexp(np.abs(corpus - centre).max())
    scale = np.ldexp(np.float32(1), exponent - largest)
    scaled = [(rows - centre) * scale for rows in (queries, corpus)]
    with np.errstate(over="ignore"):
        halves = [rows.astype(np.float16).astype(np.float32) for rows in scaled]
        norms = [(rows * rows).sum(axis=1) for rows in scaled]
        dots = np.add.accumulate(halves[0][:, None] * halves[1], axis=2)[..., -1]
        got = norms[0][:, None] + (norms[1][None, :] - 2 * dots)
    lengths = [np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1)) for rows in scaled]
    losses = [np.sqrt(((a - b.astype(np.float64)) ** 2).sum(axis=1)) for a, b in zip(scaled, halves, strict=True)]
    allowed = halves_error(space, lengths[0][:, None], lengths[1][None, :], losses[0][:, None], losses[1].max())
    exact = exact_squares(whole(queries, 149), whole(corpus, 149), 149)
    for i in range(N_QUERIES):
        for j in range(N_CORPUS):
            if np.isfinite(got[i, j]):
                error = abs(Fraction(float(got[i, j])) - Fraction(exact[i][j], 1 << 298) * Fraction(float(scale)) ** 2)
                assert error <= Fraction(float(allowed[i, j])) + n_features * Fraction(1, 1 << 120), (
                    i,
                    j,
                    float(error),
                )
            else:
                assert not np.isfinite(losses[0][i])


def test_an_error_that_leaves_out_what_rounding_took_is_exceeded(rng):
    queries, corpus = adversarial("normal", 17, "float32", rng)
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float32), 17)
    halves = [rows.astype(np.float16).astype(np.float64) for rows in (queries, corpus)]
    exact, got = (((q[:, None] - c) ** 2).sum(axis=2) for q, c in ((queries.astype(np.float64), corpus), halves))
    lengths = [np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1)) for rows in (queries, corpus)]
    assert (np.abs(got - exact) > halves_error(space, lengths[0][:, None], lengths[1], 0, 0)).any()
