"""Every form of every metric says the same."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from knnbench.dtypes import COMPUTED, common_dtype, computed_dtype, integer_accumulator
from knnbench.errors import InvalidInputError
from knnbench.metrics import METRICS, Space, cosine_from_dot, get_metric, ranked_cosine_from_dot

from ._checks import assert_distances_close, assert_identical, direct_tolerance

CASES = [(name, dtype) for name in METRICS for dtype in COMPUTED]
N_FEATURES = 23
# Exact as long as they are integers, whatever the order of summation: forms can be compared with ==.
FLOATS = st.floats(min_value=0, allow_nan=False, allow_infinity=True)


def whole_rows(rng, n, dtype):
    """Return rows of small whole numbers, of which sums of squares are exact in every dtype."""
    low = 0 if dtype == "uint8" else -200
    return rng.integers(low, 255, (n, N_FEATURES)).astype(dtype)


def by_scalars(form, accumulator, a, b):
    """Accumulate one pair with the scalar function, in the accumulator's own type."""
    acc = accumulator.type(0)
    for x, y in zip(a.astype(accumulator), b.astype(accumulator), strict=True):
        acc = form.accumulate(acc, x, y)
    return acc


def all_by_scalars(space, queries, corpus):
    return np.array([[by_scalars(space.form, space.accumulator, q, c) for c in corpus] for q in queries])


def all_by_steps(space, queries, corpus):
    acc = np.zeros((len(queries), len(corpus)), space.accumulator)
    for feature in range(space.n_features):
        difference = np.subtract(queries[:, None, feature], corpus[None, :, feature], dtype=space.accumulator)
        assert space.form.step(np, acc, difference) is None
    return acc


def integer_norms(rows):
    return (rows.astype(np.int64) ** 2).sum(axis=1)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_scalars_steps_and_products_agree_exactly(name, dtype, rng):
    space = Space(METRICS[name], np.dtype(dtype), N_FEATURES)
    queries, corpus = whole_rows(rng, 4, dtype), whole_rows(rng, 6, dtype)
    scalar = all_by_scalars(space, queries, corpus)
    assert scalar.dtype == space.accumulator
    wide_q, wide_c = queries.astype(np.int64), corpus.astype(np.int64)
    reduced = [[space.form.reduce(map(space.form.accumulate, [0] * N_FEATURES, q, c)) for c in wide_c.tolist()]
               for q in wide_q.tolist()]  # fmt: skip
    assert (scalar == np.array(reduced)).all()
    assert space.form.step is not None or space.form.from_dot is not None
    if space.form.step is not None:
        assert_identical(all_by_steps(space, queries, corpus), scalar)
    if space.form.from_dot is not None:
        norms = integer_norms(queries)[:, None], integer_norms(corpus)[None, :]
        assert (space.form.from_dot(wide_q @ wide_c.T, *norms) == scalar).all()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_prepare_accumulate_rank_finish_is_what_scipy_says(name, dtype, rng):
    space = Space(METRICS[name], np.dtype(dtype), N_FEATURES)
    queries, corpus = whole_rows(rng, 4, dtype), whole_rows(rng, 6, dtype)
    expected = cdist(queries.astype(np.float64), corpus.astype(np.float64), name)
    rows = (queries, corpus) if space.is_integer else [space.metric.prepare_rows(np, x) for x in (queries, corpus)]
    accumulated = all_by_scalars(space, *rows)
    nq, nc = integer_norms(queries), integer_norms(corpus)
    scalar = [[space.form.rank(accumulated[i, j], nq[i], nc[j]) for j in range(6)] for i in range(4)]
    norms = nq[:, None].astype(np.float64), nc[None, :].astype(np.float64)
    ranked = space.form.rank_arrays(np, accumulated, *norms)
    assert_identical(ranked.astype(space.ranked), np.array(scalar, space.ranked))
    distances = space.finish(ranked)
    assert distances.dtype == space.output
    if space.is_integer and space.form.keeps_integers:
        assert_identical(distances, expected.astype(space.output))
        return
    eps = float(np.finfo(space.output).eps)
    # scipy takes 1 - cos in float64, which is off by eps of 1 and not of the distance.
    scipys = (N_FEATURES + 8) * float(np.finfo(np.float64).eps) * np.maximum(expected, 1)
    own = direct_tolerance(space, expected) if not space.is_integer else 2 * eps * expected
    assert_distances_close(distances, expected, own + scipys)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@given(data=st.data())
def test_finish_never_decreases(name, dtype, data):
    space = Space(METRICS[name], np.dtype(dtype), 100)
    if space.ranked.kind == "i":
        values = st.integers(0, np.iinfo(space.ranked).max)
    else:
        # 1 - cos is rounded, and can come out below 0.
        low, high = (-1e-6, 1) if space.form.rank_uses_norms else (0, None)
        values = st.floats(low, high, width=space.ranked.itemsize * 8 if high is None else 64, allow_nan=False)
    pair = sorted((data.draw(values), data.draw(values)))
    low, high = space.finish(np.array(pair, space.ranked))
    assert low <= high
    assert low >= 0
    assert space.finish(np.array([[[pair[0]]]], space.ranked)).shape == (1, 1, 1)


def test_finish_never_decreases_between_neighbouring_values():
    for name, dtype in CASES:
        space = Space(METRICS[name], np.dtype(dtype), 33_026 if dtype == "uint8" else 8)
        if space.ranked.kind == "i":
            values = np.concatenate([np.arange(1000), 2**24 + np.arange(1000), 33_026 * 255**2 - np.arange(1000)[::-1]])
        else:
            starts = np.array([0, 1e-30, 0.3, 1, 1.5], space.ranked)
            steps = [starts]
            for _ in range(200):
                steps.append(np.nextafter(steps[-1], space.ranked.type(2)))
            values = np.array(steps).T.ravel()
        distances = space.finish(values.astype(space.ranked))
        assert (np.diff(distances.astype(np.float64)) >= 0).all(), (name, dtype)


@pytest.mark.parametrize("n_features", [784, 33_026])
def test_roots_of_integers_are_rounded_from_float64(n_features):
    # Beyond 2**24 float32 does not hold the integer itself, and its root would be rounded twice.
    space = Space(METRICS["euclidean"], np.dtype(np.uint8), n_features)
    largest = n_features * 255**2
    values = np.unique(np.concatenate([np.arange(2**24, 2**24 + 5000), np.linspace(0, largest, 5000).astype(np.int64)]))
    expected = np.array([np.float32(math.sqrt(value)) for value in values.tolist()], np.float32)
    assert_identical(space.finish(values.astype(space.ranked)), expected)
    assert (expected != np.sqrt(values.astype(np.float32))).any(), "the test cannot tell the two apart"


@given(
    dot=st.integers(0, 2**53),
    norms=st.tuples(st.integers(1, 2**53 - 1), st.integers(1, 2**53 - 1)),
)
def test_both_forms_of_the_cosine_rank_have_the_same_bits(dot, norms):
    scalar = cosine_from_dot(dot, *norms)
    array = ranked_cosine_from_dot(np, np.array([dot]), np.float64([norms[0]]), np.float64([norms[1]]))
    assert array.dtype == np.float64
    assert array[0] == scalar
    assert cosine_from_dot(np.int64(dot), np.float64(norms[0]), np.float64(norms[1])) == scalar


def test_both_forms_of_the_cosine_rank_on_many_rows(rng):
    norms = rng.integers(1, 784 * 255**2, (2, 2000))
    dots = (np.sqrt(norms[0].astype(float) * norms[1]) * rng.random(2000)).astype(np.int64)
    array = ranked_cosine_from_dot(np, dots.astype(np.int32), norms[0].astype(float), norms[1].astype(float))
    scalar = [cosine_from_dot(int(d), int(q), int(c)) for d, q, c in zip(dots, *norms, strict=True)]
    assert array.tolist() == scalar


def test_names_and_aliases_are_unique():
    names = [name for metric in METRICS.values() for name in (metric.name, *metric.aliases)]
    assert len(names) == len(set(names))
    assert [metric.name for metric in METRICS.values()] == list(METRICS)
    for metric in METRICS.values():
        assert all(get_metric(name) is metric for name in (metric.name, *metric.aliases))
        assert metric.formula


@pytest.mark.parametrize("name", ["", "Euclidean", "l3", None, 2, ["l2"]])
def test_an_unknown_metric_is_named(name):
    with pytest.raises(InvalidInputError, match="expected one of: euclidean"):
        get_metric(name)


UNIT = [metric for metric in METRICS.values() if metric.unit_rows]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_rows_are_only_changed_by_metrics_on_unit_rows(metric, rng):
    rows = rng.normal(size=(3, 4))
    before = rows.copy()
    prepared = metric.prepare_rows(np, rows)
    assert (rows == before).all()
    assert metric.unit_rows or prepared is rows


@pytest.mark.parametrize("metric", UNIT, ids=lambda metric: metric.name)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", s) for s in (1e-45, 3e-45, 1e-39, 1.2e-38, 1.0, 1e38, 3.4e38)]
    + [("float64", s) for s in (5e-324, 1e-320, 2.3e-308, 1.0, 1e300, 1.7e308)],
)
def test_unit_rows_of_extreme_magnitude(metric, dtype, scale):
    # Multiples of the scale that even the smallest subnormal has exactly.
    rows = np.array([[1, 0], [0, -1], [1, 1], [-1, 1]], dtype) * np.dtype(dtype).type(scale)
    got = metric.prepare_rows(np, rows)
    half = math.sqrt(0.5)
    expected = np.array([[1, 0], [0, -1], [half, half], [-half, half]])
    assert got.dtype == np.dtype(dtype)
    assert_distances_close(got, expected, 2 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("metric", UNIT, ids=lambda metric: metric.name)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scaling_by_a_power_of_two_changes_no_bit(metric, dtype, rng):
    info = np.finfo(dtype)
    rows = rng.uniform(1, 2, (5, 9)).astype(dtype) * rng.choice([-1, 1], (5, 9)).astype(dtype)
    expected = metric.prepare_rows(np, rows)
    for power in (info.minexp, info.minexp // 2, -1, 1, info.maxexp // 2, info.maxexp - 2):
        assert_identical(metric.prepare_rows(np, np.ldexp(rows, power)), expected)


@pytest.mark.parametrize("metric", UNIT, ids=lambda metric: metric.name)
@given(
    rows=hnp.arrays(np.float32, (2, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)).filter(
        lambda rows: rows.any(axis=1).all()
    )
)
def test_any_row_becomes_a_unit_row(metric, rows):
    got = metric.prepare_rows(np, rows).astype(np.float64)
    assert_distances_close((got**2).sum(axis=1), np.ones(2), 4 * float(np.finfo(np.float32).eps))
    assert (np.sign(got) * np.sign(rows) >= 0).all()


@pytest.mark.parametrize("n_features", [1, 784, 33_025, 33_026, 10**6])
def test_no_distance_overflows_its_accumulator(n_features):
    dtype = integer_accumulator(n_features)
    assert n_features * 255**2 <= np.iinfo(dtype).max
    assert dtype == (np.int32 if n_features <= 33_025 else np.int64)


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        ("uint8", "uint8"), ("bool", "float64"), ("int8", "float64"), ("uint16", "float64"), ("int64", "float64"),
        ("float16", "float32"), ("float32", "float32"), (">f4", "float32"), ("float64", "float64"),
        (">f8", "float64"), ("longdouble", "float64"),
    ],
)  # fmt: skip
def test_computed_dtypes(given_dtype, computed):
    assert computed_dtype(given_dtype) == computed
    assert computed_dtype(given_dtype).isnative


@pytest.mark.parametrize("dtype", ["complex64", "S3", "U3", "object", "datetime64[s]", "timedelta64[s]", "V3", "f4,f4"])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(InvalidInputError, match="things has dtype"):
        computed_dtype(dtype, "things")


@pytest.mark.parametrize(
    ("queries", "corpus", "expected"),
    [
        ("uint8", "uint8", "uint8"), ("uint8", "float32", "float32"), ("float16", "uint8", "float32"),
        ("uint8", "float64", "float64"), ("float32", "float64", "float64"), ("int8", "float32", "float64"),
        ("bool", "uint8", "float64"), ("float16", "float16", "float32"),
    ],
)  # fmt: skip
def test_common_dtypes(queries, corpus, expected):
    assert common_dtype(queries, corpus) == expected
    assert common_dtype(corpus, queries) == expected


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("n_features", [1, 33_025, 33_026])
def test_dtypes_of_a_space(name, dtype, n_features):
    space = Space(METRICS[name], np.dtype(dtype), n_features)
    if dtype != "uint8":
        assert space.accumulator == space.ranked == space.output == dtype
        return
    wide = "int32" if n_features <= 33_025 else "int64"
    assert space.accumulator == wide
    assert space.ranked == ("float64" if name == "cosine" else wide)
    assert space.output == ("float32" if name in ("euclidean", "cosine") else wide)
