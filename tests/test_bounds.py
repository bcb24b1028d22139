"""No computed value is farther from the exact one than declared, against whole numbers; and not much less far."""

from fractions import Fraction

import numpy as np
import pytest

from knnbench import METRICS
from knnbench.backends import get_backend
from knnbench.blocking import DEFAULT_BUDGET
from knnbench.bounds import direct_error, gram_floor, interval, unit_shift
from knnbench.exact_values import Values
from knnbench.metrics import Space, unit_rows

from .exact_cases import FLOATS, KINDS, data, exact_values, root, whole

N_FEATURES = (1, 2, 17, 128, 784)
BACKENDS = ("numpy", "numba", "torch")
ORDERED = {kind for kind in KINDS if kind not in ("huge", "big", "all exponents")}


def unit_squares(queries, corpus):
    """Return the exact squared differences of rows brought to unit length."""
    numbers, _ = whole(np.concatenate([queries, corpus]))
    q, c = numbers[: len(queries)], numbers[len(queries) :]
    squares = {id(a): sum(x * x for x in a) for a in numbers}
    dots = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in c] for a in q]
    return [
        [
            max(Fraction(0), 2 - 2 * dot / root(Fraction(squares[id(a)] * squares[id(b)])))
            for dot, b in zip(row, c, strict=True)
        ]
        for row, a in zip(dots, q, strict=True)
    ]


def values_of(queries, corpus, metric):
    return unit_squares(queries, corpus) if METRICS[metric].unit_rows else exact_values(queries, corpus, metric)


def direct_excess(kind, dtype, metric, n_features, backend, rng):
    """Return the largest error of a backend's direct form as a share of what is declared, without underflow."""
    queries, corpus = data(kind, dtype, 2, 5, n_features, rng)
    space = Space(METRICS[metric], np.dtype(dtype), n_features)
    engine = get_backend(backend)
    native = engine.to_native(queries, space.dtype)
    with np.errstate(all="ignore"):
        prepared = engine.prepare(engine.to_native(corpus, space.dtype), space)
        found = engine.knn(native, prepared, 5, space, DEFAULT_BUDGET)
    got, indices = map(engine.to_numpy, found)
    expected, (relative, absolute), worst = exact_values(queries, corpus, metric), direct_error(space), 0.0
    for i in range(2):
        for value, j in zip(got[i].tolist(), indices[i].tolist(), strict=True):
            if np.isfinite(value) and expected[i][j]:
                allowed = Fraction(relative) * expected[i][j] + Fraction(absolute)
                worst = max(worst, float(abs(Fraction(value) - expected[i][j]) / allowed))
    return worst


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "chebyshev"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_direct_form_keeps_its_bound(dtype, metric, backend, rng):
    for n_features in N_FEATURES:
        for kind in KINDS:
            assert direct_excess(kind, dtype, metric, n_features, backend, rng) <= 1, (kind, n_features)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "chebyshev"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_thousandth_of_the_direct_bound_is_exceeded(dtype, metric, rng):
    worst = max(direct_excess(kind, dtype, metric, n, "numba", rng) for n in N_FEATURES for kind in ("normal", "far"))
    assert 1e-3 < worst < 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unit_length_are_as_near_as_declared(kind, dtype, rng):
    for n_features in N_FEATURES:
        rows = data(kind, dtype, 0, 5, n_features, rng)[1]
        numbers, _ = whole(rows)
        allowed = Fraction(unit_shift(Space(METRICS["cosine"], np.dtype(dtype), n_features)))
        for form in (lambda x: unit_rows(np, x), by_torch, by_numba):
            for got, row in zip(form(rows).tolist(), numbers, strict=True):
                length = root(Fraction(sum(x * x for x in row)))
                off = sum((Fraction(g) - x / length) ** 2 for g, x in zip(got, row, strict=True))
                assert off <= allowed**2, (kind, n_features)
                if (kind, dtype, n_features) == ("normal", "float32", 784):
                    assert off > (allowed / 1000) ** 2


def by_torch(rows):
    torch = pytest.importorskip("torch")
    from knnbench.backends.torch import unit_length

    return unit_length(torch.from_numpy(rows)).numpy()


def by_numba(rows):
    from knnbench.kernels.cpu_rows import unit_rows

    out = np.empty_like(rows)
    unit_rows(rows, out)
    return out


def lowest_left_out(kind, dtype, metric, n_features, backend, rng, n_corpus=60):
    """Return, of each query, the floor of a backend, the exact value of the lowest row left out, and the largest
    kept."""
    queries, corpus = data(kind, dtype, 4, n_corpus, n_features, rng)
    space = Space(METRICS[metric], np.dtype(dtype), n_features)
    engine = get_backend(backend)
    native, rows = (engine.to_native(x, space.dtype) for x in (queries, corpus))
    with np.errstate(all="ignore"):
        found = engine.candidates(native, engine.prepare(rows, space), 7, space, DEFAULT_BUDGET)
    kept = engine.to_numpy(found.indices)
    assert all(len(set(row)) == 7 for row in kept.tolist())
    for i, values in enumerate(values_of(queries, corpus, metric)):
        yield found.floor[i], min(v for j, v in enumerate(values) if j not in kept[i]), max(values[j] for j in kept[i])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_left_out_lies_below_the_floor(kind, dtype, metric, compared_backend, rng):
    for n_features in (2, 40):
        for floor, lowest, _ in lowest_left_out(kind, dtype, metric, n_features, compared_backend, rng):
            assert not np.isnan(floor)
            assert np.isneginf(floor) or Fraction(float(floor)) <= lowest, (n_features, floor, float(lowest))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_floor_is_near_what_was_left_out(backend, metric, rng):
    # A floor of nothing would be true, and send every query to the slow road.
    for floor, _, largest in lowest_left_out("normal", "float32", metric, 40, backend, rng):
        assert 0.99 * float(largest) < floor <= float(largest) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_thousandth_of_the_gram_bound_is_exceeded(dtype, rng):
    # Far from each other, so that no centre is near: values are lost, and with them what is below a floor.
    space = Space(METRICS["sqeuclidean"], np.dtype(dtype), 200)
    engine, exceeded = get_backend("numpy"), False
    for _ in range(5):
        queries, corpus = data("far apart", dtype, 4, 60, 200, rng)
        prepared = engine.prepare(corpus, space)
        block = engine._take_queries(queries, prepared, space)
        got = engine._block(block, prepared, space, slice(0, 60)).astype(np.float64)
        norms = block.norms.astype(np.float64)[:, None] + prepared.norms.astype(np.float64)[None]
        rows = zip(got.tolist(), exact_values(queries, corpus, "sqeuclidean"), strict=True)
        errors = np.array([[float(abs(Fraction(g) - e)) for g, e in zip(*row, strict=True)] for row in rows])
        assert (errors <= space.gram_error * norms).all()
        exceeded |= bool((errors > space.gram_error * norms / 1000).any())
    assert exceeded


def test_an_overflow_proves_nothing():
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float32), 3)
    floors = gram_floor(space, np.array([1.0, 1.0, np.nan]), np.array([1e38, np.inf, 1.0]), 1e38)
    assert np.isneginf(floors[:2]).all()
    assert not floors[2] > 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_values_lie_in_their_float64_interval(kind, dtype, metric, rng):
    for n_features in (1, 9, 130):
        queries, corpus = data(kind, dtype, 3, 7, n_features, rng)
        space = Space(METRICS[metric], np.dtype(dtype), n_features)
        i, j = (axis.ravel() for axis in np.indices((3, 7)))
        values = Values(space, queries, corpus, 1 << 20)
        low, high = values.interval(values.approximate(i, j))
        exact = values_of(queries, corpus, metric)
        lists, of_lists = values.nearest(np.arange(3), 2, np.full(3, np.nan))
        for p in range(len(i)):
            assert Fraction(float(low[p])) <= exact[i[p]][j[p]]
            assert high[p] == np.inf or exact[i[p]][j[p]] <= Fraction(float(high[p]))
        for q in range(3):
            low, high = values.interval(of_lists[q])
            for at, row in enumerate(lists[q]):
                assert Fraction(float(low[at])) <= exact[q][row]
                assert high[at] == np.inf or exact[q][row] <= Fraction(float(high[at]))
            assert set(sorted(range(7), key=lambda row: (exact[q][row], row))[:2]) <= set(lists[q].tolist())


def test_an_interval_a_thousand_times_too_small_would_be_noticed(rng):
    queries, corpus = data("normal", "float64", 3, 50, 784, rng)
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float64), 784)
    values = Values(space, queries, corpus, 1 << 20)
    i, j = (axis.ravel() for axis in np.indices((3, 50)))
    got = values.approximate(i, j)
    low, high = interval(space, got)
    exact = exact_values(queries, corpus, "sqeuclidean")
    off = np.array([float(abs(Fraction(g) - exact[a][b])) for g, a, b in zip(got.tolist(), i, j, strict=True)])
    assert (off > (high - low) / 2000).any()


def test_too_many_features_for_a_bound_prove_nothing():
    relative, _ = direct_error(Space(METRICS["sqeuclidean"], np.dtype(np.float32), 10**7))
    assert relative == np.inf
    assert direct_error(Space(METRICS["chebyshev"], np.dtype(np.float32), 10**7))[0] < 1e-5
