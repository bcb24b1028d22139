"""The CPU's vector kernels: at every level, on odd sizes, with the machine code they become on CPUs that are not here.

Kernels at the level of this CPU are proved by the tests of all backends. Here the lower ones run too, and, on vectors
of 64 bytes, what AVX-512 would run, with each instruction replaced by its form for every CPU: that checks layouts and
loops. That the instruction itself is there is read off the machine code.
"""

import itertools
import os
import re
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from llvmlite import binding, ir

from knnbench import InvalidInputError, UnsupportedError, knn, pairwise, prepare
from knnbench.backends import get_backend
from knnbench.kernels import cpu_digits, cpu_filters, cpu_probes, cpu_tiles
from knnbench.kernels.cpu_filters import FILTERS, ByteFilter, KeyFilter, filters_of
from knnbench.kernels.cpu_loops import (
    LIST_LANES,
    configure_matrix_unit,
    matrix_sums,
    release_matrix_unit,
    rows_beyond,
    shift_in,
    tile_sums,
)
from knnbench.kernels.cpu_simd import (
    CENTRE,
    LEVELS,
    NARROW,
    OPERATIONS,
    Level,
    Vectors,
    cpu_features,
    dot_product,
    simd_level,
    vectors_of,
)
from knnbench.kernels.cpu_tiles import (
    OPERATION_OF,
    Plan,
    compiled_kernels,
    kept_rows,
    plan_of,
    tile_kernels,
)
from knnbench.metrics import METRICS, Space

from ._checks import assert_identical
from .test_ceilings import ARM, X86, loops

WIDE = Level("wide", 64, 32)

# Levels to run here: those of this CPU below its best, which all other tests run at, and the wide one.
RUN = [level for level in LEVELS.values() if not level.lacks(cpu_features()) and level != simd_level()] + [WIDE]


def expected(queries, corpus, metric, k):
    """Return all distances by the definition, in integers or float64, and the k nearest in the total order."""
    q, c = (rows.astype(np.int64 if rows.dtype == np.uint8 else np.float64) for rows in (queries, corpus))
    if metric == "cosine":
        norms = np.sqrt((q * q).sum(axis=1)[:, None].astype(float) * (c * c).sum(axis=1))
        distances = 1 - (q @ c.T) / norms
    else:
        reduce = {"cityblock": lambda d: abs(d).sum(2), "chebyshev": lambda d: abs(d).max(2)}
        squares = lambda d: (d * d).sum(2)  # noqa: E731
        distances = np.concatenate([reduce.get(metric, squares)(row[None, None] - c[None]) for row in q])
        if metric == "euclidean":
            distances = np.sqrt(distances)
    return distances, np.argsort(distances, axis=1, kind="stable")[:, :k]


def check(queries, corpus, metric, k):
    distances, nearest = expected(queries, corpus, metric, k)
    found = knn(queries, corpus, k, metric, backend="numba")
    everything = pairwise(queries, corpus, metric, backend="numba")
    packed = prepare(corpus, metric, backend="numba")
    assert all(map(np.array_equal, knn(queries, packed, k), found))
    assert_identical(pairwise(queries, packed), everything)
    if queries.dtype == np.uint8:
        assert_identical(found.indices, nearest)
        kept = np.take_along_axis(distances, nearest, axis=1)
        assert_identical(found.distances, kept.astype(found.distances.dtype))
        if metric != "cosine":
            assert_identical(everything, distances.astype(everything.dtype))
        return
    eps = float(np.finfo(queries.dtype).eps)
    allowed = (queries.shape[1] + 8) * eps * distances.max()
    assert np.abs(everything - distances).max() <= allowed
    # A neighbour may be another one if it is as near, but for the rounding of the direct form.
    assert np.abs(np.take_along_axis(distances, found.indices, axis=1) - found.distances).max() <= allowed
    kept = np.take_along_axis(distances, nearest, axis=1)
    assert (found.distances <= kept * (1 + queries.shape[1] * eps) + eps).all()
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert all(len(set(row)) == k for row in found.indices.tolist())


def random_rows(rng, dtype, n, n_features):
    rows = rng.integers(0, 256, (n, n_features))
    rows[:, 0] += rows[:, 0] == 0  # no row of zeros
    return rows.astype(dtype) if dtype == "uint8" else (rows + rng.normal(size=rows.shape)).astype(dtype)


@pytest.fixture
def at_level(monkeypatch):
    """Return a function that makes numba's backend compute at a level."""

    def choose(level):
        monkeypatch.setattr(cpu_tiles, "simd_level", lambda: level)
        monkeypatch.setattr(cpu_tiles, "_chosen", {})

    return choose


SPACES = [(metric, "uint8") for metric in ("cityblock", "euclidean", "chebyshev", "cosine")]
SPACES += [(metric, "float32") for metric in ("cityblock", "euclidean", "chebyshev")]
CASES = [(*space, level) for space in SPACES for level in RUN]
# Every kernel takes seconds to compile, and float64 has the steps of float32.
CASES += [("euclidean", "float64", level) for level in RUN if level != WIDE]
CASES = [pytest.param(*case, id=f"{case[0]} {case[1]} {case[2].name}") for case in CASES]


@pytest.mark.parametrize(("metric", "dtype", "level"), CASES)
def test_every_level_answers_as_the_definition(metric, dtype, level, at_level, rng):
    at_level(level)
    space = Space(METRICS[metric], np.dtype(dtype), 1)
    plan = plan_of(space, level, frozenset())
    width, (height, _) = plan.panels.panel_rows, plan.panels.tile_shape
    vector = max(plan.panels.features, plan.rows.features)
    for n_features in sorted({2, vector - 1, vector, vector + 1, 784, 1000} - {0, 1}):
        for n_queries, n_corpus, k in ((height + 1, 2 * width + 1, 3), (2, width + 1, width), (1, width - 1, 1)):
            queries, corpus = (random_rows(rng, dtype, n, n_features) for n in (n_queries, n_corpus))
            check(queries, corpus, metric, min(k, n_corpus))
    if metric != "cosine":
        check(random_rows(rng, dtype, height, 1), random_rows(rng, dtype, 3 * width, 1), metric, 2)


@pytest.mark.parametrize(("metric", "dtype", "level"), CASES)
def test_thousands_of_ties_come_in_the_order_of_their_index(metric, dtype, level, at_level, rng):
    at_level(level)
    corpus = rng.integers(1, 3, (3000, 3)).astype(dtype)
    queries = rng.integers(1, 3, (5, 3)).astype(dtype)
    for k in (1, 700, 3000):
        distances, nearest = knn(queries, corpus, k, metric, backend="numba")
        assert (np.lexsort((nearest, distances), axis=1) == np.arange(k)).all()
        assert_identical(nearest, expected(queries, corpus, metric, k)[1])


@pytest.mark.parametrize("k", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257])
def test_k_at_the_borders_of_panels(k, rng):
    for dtype in ("uint8", "float32"):
        queries, corpus = (random_rows(rng, dtype, n, 40) for n in (9, 257))
        check(queries, corpus, "cityblock", k)
        check(queries, corpus, "euclidean", k)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
@pytest.mark.parametrize("k", [1, 127, 128, 1000, 2999, 3000])
def test_many_neighbours(k, order, rng):
    values = {"random": rng.permutation(3000), "ascending": np.arange(3000), "descending": np.arange(3000)[::-1]}
    column = values.get(order, np.full(3000, 7))
    corpus = np.stack([column % 256, column // 256], axis=1).astype(np.uint8)
    queries = np.array([[0, 0], [255, 11], [100, 3]], np.uint8)
    found = knn(queries, corpus, k, "cityblock", backend="numba")
    distances, nearest = expected(queries, corpus, "cityblock", k)
    assert_identical(found.indices, nearest)
    assert_identical(found.distances, np.take_along_axis(distances, nearest, axis=1).astype(np.int32))


def test_not_a_number_ends_the_search_all_the_same(rng):
    corpus = rng.normal(size=(3000, 20)).astype(np.float32)
    corpus[rng.random(corpus.shape) < 0.3] = np.nan
    for k in (3, 500, 3000):
        indices = knn(corpus[:9], corpus, k, "cityblock", backend="numba", check_finite=False).indices
        assert indices.shape == (9, k)
        assert ((indices >= 0) & (indices < 3000)).all()


# --- products of unsigned with signed bytes, which only some CPUs have an instruction for


@pytest.mark.parametrize("operation", NARROW["product"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n_features", [1, 3, 4, 5, 63, 64, 65, 784])
def test_products_of_bytes(metric, n_features, operation, rng):
    space = Space(METRICS[metric], np.dtype(np.uint8), n_features)
    quads = Vectors(OPERATIONS[operation], WIDE.width, WIDE.registers)
    plan = plan_of(space, WIDE, frozenset())
    kernels = compiled_kernels(Plan(quads, plan.rows, plan.norms, plan.key), space)
    queries, corpus = (random_rows(rng, "uint8", n, n_features) for n in (37, 100))
    queries[0], corpus[0], corpus[1] = 255, 255, 1
    values, indices = np.empty((37, 7), space.ranked), np.empty((37, 7), np.int64)
    everything = np.empty((37, 100), space.ranked)
    work = kernels.workspace(37, n_features)
    lists = kernels.lists(37, 7, 100)
    assert kernels.knn(queries, corpus, 0, 100, *work, 7, *lists)
    kernels.order(queries, corpus, work.values, 7, *lists, values, indices)
    kernels.pairwise(queries, corpus, 0, 100, *work, everything)
    distances, nearest = expected(queries, corpus, "cosine" if metric == "cosine" else "sqeuclidean", 7)
    if metric == "euclidean":
        assert_identical(indices, nearest)
        assert_identical(everything, distances.astype(space.ranked))
    else:
        assert np.abs(everything - distances).max() <= 4 * np.finfo(float).eps
    assert_identical(values, np.take_along_axis(everything, indices, axis=1))
    assert (np.lexsort((indices, values), axis=1) == np.arange(7)).all()


@pytest.mark.parametrize("n_features", [1, 3, 4, 5, 64, 65, 784])
def test_sums_of_differences_as_products_with_one(n_features, rng):
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), n_features)
    quads = Vectors(OPERATIONS["absolute-uint8-dot"], 16, 32)
    kernels = compiled_kernels(Plan(quads, quads, plan_of(space, WIDE, frozenset()).norms, "value"), space)
    queries, corpus = (random_rows(rng, "uint8", n, n_features) for n in (13, 50))
    queries[0], corpus[0], corpus[1] = 255, 0, 255
    distances, nearest = expected(queries, corpus, "cityblock", 7)
    for few in (False, True):
        if few and n_features < quads.features:
            continue
        lists = kernels.lists(13, 7, 50)
        values, indices = np.empty((13, 7), space.ranked), np.empty((13, 7), np.int64)
        work = kernels.workspace(13, n_features)
        if few:
            kernels.knn_rows(queries, corpus, 0, 50, *kernels.few(13), 7, *lists)
        else:
            kernels.knn(queries, corpus, 0, 50, *work, 7, *lists)
        kernels.order(queries, corpus, work.values, 7, *lists, values, indices)
        assert_identical(indices, nearest)
        assert_identical(values, np.take_along_axis(distances, nearest, axis=1).astype(space.ranked))


def test_what_centring_takes_away_is_given_back(rng, monkeypatch):
    monkeypatch.setattr(cpu_tiles, "CENTRE", CENTRE - 1)
    cpu_tiles._compiled.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_products_of_bytes("euclidean", 5, "product-uint8", rng)
    finally:
        cpu_tiles._compiled.cache_clear()


# --- the filter of floats


HAS_MATRIX_UNIT = not LEVELS["amx"].lacks(cpu_features()) and LEVELS["amx"].is_allowed()

FILTERED = [
    "sqeuclidean product",
    "sqeuclidean digits emulated",
    pytest.param("sqeuclidean digits", marks=pytest.mark.skipif(not HAS_MATRIX_UNIT, reason="no matrix unit (AMX)")),
    "cityblock larger",
]


def filter_named(name):
    """Return the metric and the filter of one of `FILTERED`."""
    metric, key = name.split()[:2]
    kind = OPERATION_OF[METRICS[metric].floating.accumulate]
    return metric, next(found for found in FILTERS[kind] if isinstance(found, KeyFilter) and found.operation == key)


def filtering(name, dtype, n_features):
    """Return the space and the kernels of a filter."""
    metric, found = filter_named(name)
    space = Space(METRICS[metric], np.dtype(dtype), n_features)
    level = LEVELS["amx"] if found.key == "digits" else simd_level()
    features = frozenset() if "emulated" in name else cpu_features()
    return space, compiled_kernels(plan_of(space, level, features, found=found), space)


def filtered(queries, corpus, k, name, centre, error):
    """Return which queries the filtering kernels leave in doubt, and the lists of the others; None if it gave up."""
    space, kernels = filtering(name, queries.dtype, queries.shape[1])
    work, kept = kernels.workspace(len(queries), space.n_features, centre), kept_rows(k, len(corpus))
    values, indices = np.empty((len(queries), k), space.ranked), np.empty((len(queries), k), np.int64)
    lists, in_doubt = kernels.lists(len(queries), kept, len(corpus)), np.empty(len(queries), bool)
    if not kernels.knn(queries, corpus, 0, len(corpus), *work, kept, *lists):
        return None
    kernels.prove(
        queries, corpus, len(corpus), error, work.query_norms, work.sums, work.values, k, kept, *lists, values, indices,
        in_doubt,
    )  # fmt: skip
    return in_doubt, values[~in_doubt], indices[~in_doubt]


def declared(name, dtype, n_features):
    metric, found = filter_named(name)
    return found.error(Space(METRICS[metric], np.dtype(dtype), n_features))


def direct(queries, corpus, k, metric):
    """Return the values and indices of the direct form, of which the filter keeps all."""
    space = Space(METRICS[metric], queries.dtype, queries.shape[1])
    kernels = compiled_kernels(plan_of(space, simd_level(), cpu_features()), space)
    values, indices = np.empty((len(queries), k), space.ranked), np.empty((len(queries), k), np.int64)
    lists = kernels.lists(len(queries), len(corpus), len(corpus))
    kernels.knn(queries, corpus, 0, len(corpus), *kernels.workspace(len(queries), 64), len(corpus), *lists)
    everything = np.empty((len(queries), len(corpus)), space.ranked), np.empty((len(queries), len(corpus)), np.int64)
    kernels.order(queries, corpus, np.empty(8, space.dtype), len(corpus), *lists, *everything)
    values[:], indices[:] = everything[0][:, :k], everything[1][:, :k]
    return values, indices


def close_together(rng, dtype):
    """Return rows whose distances differ by less than the filter's rounding, far from the centre 0."""
    corpus = (1000 + rng.normal(size=(4000, 64)) * 1e-3).astype(dtype)
    return corpus[:5] + dtype(1e-3), corpus


@pytest.mark.parametrize("k", [1, 3, 40, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FILTERED)
def test_what_the_filter_proves_is_what_the_direct_form_gives(name, dtype, k, rng):
    queries, corpus = rng.normal(size=(9, 64)).astype(dtype), rng.normal(size=(4000, 64)).astype(dtype)
    corpus[1000:2000] = corpus[:1000]  # ties
    in_doubt, values, indices = filtered(queries, corpus, k, name, corpus[:50].mean(axis=0), declared(name, dtype, 64))
    assert in_doubt.mean() < 0.5
    expected_values, expected_indices = direct(queries[~in_doubt], corpus, k, name.split()[0])
    assert_identical(values, expected_values)
    assert_identical(indices, expected_indices)


@pytest.mark.parametrize("name", ["sqeuclidean product", "cityblock larger"])
def test_without_its_error_the_filter_would_lose_neighbours(name, rng):
    # The filter rounds by about as much as the distances of the nearest differ.
    offset = 10 if "product" in name else 100
    corpus = (offset + rng.normal(size=(2000, 64)) * 0.3).astype(np.float32)
    queries, centre = (offset + rng.normal(size=(500, 64)) * 0.3).astype(np.float32), np.zeros(64, np.float32)
    for error, loses in ((0.0, True), (declared(name, np.float32, 64), False)):
        in_doubt, values, indices = filtered(queries, corpus, 3, name, centre, error)
        assert in_doubt.mean() < 0.5
        best, nearest = direct(queries[~in_doubt], corpus, 3, name.split()[0])
        assert (values != best).any() == (indices != nearest).any() == loses


@pytest.mark.parametrize("name", FILTERED)
def test_a_filter_that_is_of_no_use_says_so(name, rng):
    queries, corpus = close_together(rng, np.float32)
    in_doubt, _, _ = filtered(queries, corpus, 3, name, np.zeros(64, np.float32), declared(name, np.float32, 64))
    assert in_doubt.all()


def test_more_equal_rows_than_are_kept_leave_doubt(rng):
    corpus = np.repeat(rng.normal(size=(100, 64)).astype(np.float32), 40, axis=0)
    in_doubt, _, _ = filtered(corpus[:2], corpus, 3, "cityblock larger", np.zeros(64, np.float32), 1e-6)
    assert in_doubt.all()
    assert (
        knn(corpus[::400], corpus, 3, "cityblock", backend="numba").indices
        == np.arange(0, 4000, 400)[:, None] + range(3)
    ).all()


@pytest.mark.parametrize("name", FILTERED)
def test_a_filter_gives_up_where_norms_overflow(name, rng):
    metric = name.split()[0]
    scale = 1e19 if metric == "sqeuclidean" else 1e37
    corpus = ((10 + rng.normal(size=(2000, 64)) * 1e-3) * scale).astype(np.float32)
    assert filtered(corpus[:8], corpus, 3, name, np.zeros(64, np.float32), 1e-6) is None
    # The search as a whole goes on by the direct form.
    distances, indices = knn(corpus[:8], prepare(corpus, metric, backend="numba"), 1)
    assert (distances == 0).all()
    assert (indices[:, 0] == range(8)).all()


def backend_module():
    """Return the module of numba's backend, which is loaded when it is first asked for."""
    return sys.modules[type(get_backend("numba")).__module__]


@pytest.fixture(params=["bytes", "keys"])
def filters(request, monkeypatch):
    """Search by all filters, and without bytes that stand for rows."""
    if request.param == "keys":
        without_bytes(monkeypatch)
    return request.param


def without_bytes(monkeypatch):
    keys = {kind: tuple(one for one in known if isinstance(one, KeyFilter)) for kind, known in FILTERS.items()}
    monkeypatch.setattr(cpu_filters, "FILTERS", keys)


def searched_directly(monkeypatch):
    """Return a list of how many queries each task of a search takes that no filter settled."""
    module, counts = backend_module(), []
    search = module._Direct.__call__

    def counted(self, prepared, rows, block, *args):
        counts.append(len(block))
        return search(self, prepared, rows, block, *args)

    monkeypatch.setattr(module._Direct, "__call__", counted)
    return counts


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", [simd_level(), *RUN])
def test_rows_that_one_feature_shows_to_be_farther(level, dtype, rng):
    form = vectors_of(f"largest-{np.dtype(dtype)}", level, frozenset())
    name, width = form.name, form.panel_rows

    @numba.njit
    def beyond(value, panel, first, most):
        return rows_beyond(name, value, panel, first, most)

    # Small whole numbers, which are often as far as `most`, and differences that float64 has to round.
    panel = rng.integers(-3, 4, (5, width)).astype(dtype)
    panel[3:] += np.array(2.0**-70, dtype) * (panel[3:] == 0)
    for f, value, most in itertools.product(range(5), range(-3, 4), (0.0, 1.0, 2.0, 2.5, 3.0, np.inf)):
        expected = 0
        for r in range(width):
            exact = abs(Fraction(value) - Fraction(float(panel[f, r])))
            is_exact = Fraction(float(exact)) == exact
            expected |= (float(exact) > most or (float(exact) == most and is_exact)) << r
        found = beyond(dtype(value), panel.ravel(), f * width, most)
        assert found & (2**width - 1) == expected


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_searched_alone(bad, metric, filters, rng, monkeypatch):
    corpus, queries = (rng.normal(size=(n, 64)).astype(np.float32) for n in (4000, 300))
    expected = knn(queries, corpus, 3, metric, backend="numba")
    queries[7, 3] = bad
    searched = searched_directly(monkeypatch)
    found = knn(queries, corpus, 3, metric, backend="numba", check_finite=False)
    assert searched == [1]
    for one, other in zip(found, expected, strict=True):
        assert_identical(np.delete(one, 7, axis=0), np.delete(other, 7, axis=0))


@pytest.mark.parametrize("share", [0.02, 0.9])
def test_queries_in_doubt_are_searched_again(share, rng, monkeypatch):
    without_bytes(monkeypatch)
    module = backend_module()
    monkeypatch.setattr(module, "TASK_QUERIES", 64)
    searched = searched_directly(monkeypatch)
    corpus = rng.normal(size=(4000, 64)).astype(np.float32)
    corpus[:60] = corpus[0]  # more equal rows than are kept
    queries = rng.normal(size=(500, 64)).astype(np.float32)
    queries[rng.random(500) < share] = corpus[0]
    distances, indices = knn(queries, prepare(corpus, "sqeuclidean", backend="numba"), 3)
    expected_values, expected_indices = direct(queries, corpus, 3, "sqeuclidean")
    assert_identical(distances, expected_values)
    assert_identical(indices, expected_indices)
    n_equal = int((queries == corpus[0]).all(axis=1).sum())
    assert n_equal <= sum(searched) < (2 * n_equal if share < 0.5 else 501)
    assert max(searched) < 64 if share < 0.5 else max(searched) == 64


@pytest.mark.parametrize("name", [name for name in FILTERED if name != "cityblock larger"])
def test_a_filter_knows_what_underflows(name, rng):
    scale = np.float32(5e-23)  # of which squares are a few of the smallest numbers
    queries, corpus = (rng.normal(size=(n, 64)).astype(np.float32) * scale for n in (200, 6000))
    in_doubt, values, indices = filtered(
        queries, corpus, 5, name, np.zeros(64, np.float32), declared(name, np.float32, 64)
    )
    expected_values, expected_indices = direct(queries[~in_doubt], corpus, 5, "sqeuclidean")
    assert_identical(values, expected_values)
    assert_identical(indices, expected_indices)


@pytest.mark.parametrize("level", [level for level in LEVELS.values() if level in RUN or level == simd_level()])
def test_operations_are_those_of_the_first_filter(level, at_level, monkeypatch):
    at_level(level)
    numba_backend = get_backend("numba")
    for metric, operation in (("euclidean", "product"), ("cityblock", "larger")):
        space = Space(METRICS[metric], np.dtype(np.float32), 128)
        narrow = Space(METRICS[metric], np.dtype(np.uint8), 128)
        if tile_kernels(narrow).plan.panels.instruction:
            assert isinstance(filters_of(space)[0], ByteFilter)
            assert numba_backend.operations(space, "knn") == numba_backend.operations(narrow, "knn") != {}
        with monkeypatch.context() as patched:
            without_bytes(patched)
            first = filters_of(space)[0]
            has_digits = metric == "euclidean" and level.has_matrix
            expected = "digits" if has_digits else operation
            assert first.kernels(space).plan.panels.operation.name == f"{expected}-float32"
            assert numba_backend.operations(space, "knn") == ({"matrix-uint8": 3} if has_digits else {"fma-float32": 1})
        assert numba_backend.operations(space, "pairwise") == {"add-float32": 1, "fma-float32": 1}


# --- rows as two digits


DIGITS = [name for name in FILTERED if "digits" in str(name)]


def keys_of_all(name, queries, corpus, centre):
    """Return the keys of all pairs, less than 128 corpus rows, and the squared norms of the queries."""
    space, kernels = filtering(name, queries.dtype, queries.shape[1])
    n = len(corpus)
    work, (values, indices, counts) = (
        kernels.workspace(len(queries), space.n_features, centre),
        kernels.lists(len(queries), n, n),
    )
    assert kernels.knn(queries, corpus, 0, n, *work, n, values, indices, counts)
    keys = np.empty((len(queries), n))
    np.put_along_axis(keys, indices[:, :n], values[:, :n], axis=1)
    return keys, work.query_norms[: len(queries)].astype(float)


def exact_squares(queries, corpus):
    """Return squared distances without an error: of floats as rationals, rounded to float64 once."""
    rows = [[[Fraction(float(x)) for x in row] for row in given] for given in (queries, corpus)]
    return np.array([[float(sum((a - b) ** 2 for a, b in zip(q, c, strict=True))) for c in rows[1]] for q in rows[0]])


def digit_data(kind, dtype, n_features, rng):
    """Return queries, corpus rows and a centre on which the digits of a row are put to the test."""
    queries, corpus = (rng.normal(size=(n, n_features)) for n in (9, 35))
    centre = np.zeros(n_features)
    if kind == "far":
        queries, corpus, centre = queries + 1000, corpus + 1000, np.full(n_features, 1000.0)
    elif kind == "sparse":
        queries, corpus = queries * (rng.random(queries.shape) < 0.1), corpus * (rng.random(corpus.shape) < 0.1)
        corpus[3] = 0
        queries[2] = 0
    elif kind == "spike":
        # One feature sets the power of two, all others are low digits only, and largest ones: what is left out most.
        queries[:], corpus[:] = 127, 127 * np.sign(rng.normal(size=(35, 1)))
        queries[:, 0] = corpus[:, 1] = 127 * 256
    elif kind == "halves":
        # All features lie between two whole numbers of the last digit.
        queries[:], corpus[:] = 0.5, 0.5 * np.sign(rng.normal(size=(35, 1)))
        queries[:, 0] = corpus[:, 1] = 127 * 256
    elif kind in ALONG:
        # Neither a rest nor low digits; rests that lie along it; low digits that do. One query is unlike the others.
        whole, rest, low = (np.full((35, n_features), x) for x in (127 * 256.0, 0.5, 127.0))
        rest[:, 0] = low[:, 0] = 127 * 256
        queries, corpus = {
            "rest of rows": (whole, rest),
            "rest of queries": (rest, whole),
            "rest of one query": (np.concatenate([rest[:1], whole]), whole),
            "low digits of one query": (np.concatenate([low[:1], whole]), low),
        }[kind]
        queries = queries[:9]
    elif kind == "scales":
        queries *= 2.0 ** rng.integers(-20, 20, (9, 1))
        corpus *= 2.0 ** rng.integers(-20, 20, (35, 1))
    return queries.astype(dtype), corpus.astype(dtype), centre.astype(dtype)


ALONG = ["rest of rows", "rest of queries", "rest of one query", "low digits of one query"]

DIGIT_KINDS = [*ALONG, "normal", "far", "sparse", "spike", "halves", "scales"]


def excess(name, kind, dtype, n_features, rng):
    """Return by how much keys are above exact values, and below them, in what is declared, at the most."""
    queries, corpus, centre = digit_data(kind, dtype, n_features, rng)
    keys, norms = keys_of_all(name, queries, corpus, centre)
    _, found = filter_named(name)
    space = Space(METRICS["sqeuclidean"], np.dtype(dtype), n_features)
    lengths = [((rows.astype(float) - centre) ** 2).sum(axis=1) for rows in (queries, corpus)]
    sums = lengths[0][:, None] + lengths[1]
    off = keys + norms[:, None] - exact_squares(queries, corpus)
    unit = np.maximum(sums, np.finfo(float).tiny)
    return (off / unit).max() / found.exact_error(space), (-off / unit).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", DIGIT_KINDS)
@pytest.mark.parametrize("name", DIGITS)
def test_no_exact_value_is_below_a_key_of_digits(name, kind, dtype, rng):
    for n_features in (64, 65, 127, 300):
        above, below = excess(name, kind, dtype, n_features, rng)
        assert above <= 1
        # And a key is of use: within a few thousandths of the squared lengths, but for rows of low digits only.
        assert below <= (2 if kind in ("spike", "halves", *ALONG) else 0.01)


@pytest.mark.parametrize("kind", ["spike", "halves", *ALONG])
def test_keys_without_their_bound_would_be_above_exact_values(kind, rng, monkeypatch):
    monkeypatch.setattr(cpu_digits, "SLACK", 0.0)
    caches = cpu_digits.digit_kernels, cpu_tiles._compiled
    for cache in caches:
        cache.cache_clear()
    try:
        assert excess("sqeuclidean digits emulated", kind, np.float32, 300, rng)[0] > 1
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("name", DIGITS)
def test_a_norm_that_rounds_to_the_largest_is_either_refused_or_has_digits(name, rng):
    largest = float(np.finfo(np.float32).max) / 16
    corpus, queries = rng.normal(size=(40, 64)), rng.normal(size=(8, 64))
    corpus[20] = np.sqrt(largest / 64) * (1 + 2**-27)
    keys, norms = keys_of_all(name, queries, corpus, np.zeros(64))
    exact = exact_squares(queries, corpus)
    assert (keys + norms[:, None] <= exact * (1 + 1e-6)).all()
    assert (keys[:, 20] > largest / 2).all()


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize("length", [1e-160, 1e-100, 1e-40, 1e-30])
def test_queries_very_close_to_the_centre_have_keys(name, length, rng):
    queries, corpus = rng.normal(size=(8, 64)), rng.normal(size=(40, 64))
    queries[:4] *= length
    keys, norms = keys_of_all(name, queries, corpus, np.zeros(64))
    exact = exact_squares(queries, corpus)
    assert (keys + norms[:, None] <= exact * (1 + 1e-6)).all()
    assert (keys + norms[:, None] >= exact * 0.99).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_where_the_filter_proves_nothing_the_direct_form_does(share, dtype, filters, rng):
    # Two tight clusters far from the centre, and from each other, beside rows that are easy.
    sides = np.where(rng.random((6000, 1)) < 0.5, -1e3, 1e3)
    corpus = (rng.normal(size=(6000, 64)) + sides).astype(dtype)
    queries = (rng.normal(size=(400, 64)) + sides[:400]).astype(dtype)
    corpus[3000:] = rng.normal(size=(3000, 64))
    queries[int(400 * share) :] = rng.normal(size=(400 - int(400 * share), 64))
    found = knn(queries, corpus, 3, backend="numba", accuracy="exact")
    assert found.certificate.searched_again <= 4
    assert_identical(found.indices, expected(queries, corpus, "euclidean", 3)[1])


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_candidates_are_rows_whatever_the_queries_hold(bad, rng, monkeypatch):
    without_bytes(monkeypatch)
    engine, module = get_backend("numba"), backend_module()
    values_of = module.values_of

    def checked(queries, prepared, nearest, space):
        assert ((nearest >= 0) & (nearest < len(prepared))).all()
        return values_of(queries, prepared, nearest, space)

    monkeypatch.setattr(module, "values_of", checked)
    # As uninitialised memory may be.
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 1 << 20, dtype))
    corpus, queries = (rng.normal(size=(n, 64)).astype(np.float32) for n in (4000, 300))
    queries[7, 3] = bad
    space = Space(METRICS["sqeuclidean"], np.dtype(np.float32), 64)
    for rows in (queries, queries[5:15]):
        found = engine.candidates(rows, engine.prepare(corpus, space), 8, space, 1 << 24)
        assert ((found.indices >= 0) & (found.indices < 4000)).all()
        assert all(len(set(row)) == 8 for row in found.indices.tolist())


@pytest.mark.parametrize(("share", "k"), [(0.3, 150), (1.0, 100)])
def test_queries_in_doubt_keep_to_the_budget(share, k, filters, rng):
    corpus = rng.normal(size=(6000, 64)).astype(np.float32)
    corpus[:400] = corpus[0]
    queries = rng.normal(size=(3000, 64)).astype(np.float32)
    queries[rng.random(3000) < share] = corpus[0]
    budget = 1 << 19
    knn(queries, corpus, k, "sqeuclidean", backend="numba", memory_budget=budget)  # compiled, which takes memory too
    tracemalloc.start()
    found = knn(queries, corpus, k, "sqeuclidean", backend="numba", memory_budget=budget)
    held = tracemalloc.get_traced_memory()[1] - sum(array.nbytes for array in found)
    tracemalloc.stop()
    assert held <= 1.3 * budget


@pytest.mark.skipif(not HAS_MATRIX_UNIT, reason="no matrix unit (AMX)")
@pytest.mark.parametrize("n_features", [64, 65, 784])
def test_the_matrix_unit_gives_the_keys_of_its_emulation(n_features, rng):
    queries, corpus, centre = digit_data("normal", np.float32, n_features, rng)
    queries = np.tile(queries, (8, 1))
    found, norms = keys_of_all("sqeuclidean digits", queries, corpus, centre)
    expected_keys, expected_norms = keys_of_all("sqeuclidean digits emulated", queries, corpus, centre)
    assert_identical(found, expected_keys)
    assert_identical(norms, expected_norms)


@pytest.mark.parametrize("name", DIGITS)
def test_digits_that_were_packed_before_give_the_same(name, rng):
    queries, corpus = (rng.normal(size=(n, 100)).astype(np.float32) for n in (70, 1001))
    _, kernels = filtering(name, np.float32, 100)
    packing = kernels.packing(len(corpus), 100, np.zeros(100, np.float32))
    kernels.pack(corpus, 0, len(packing.panels), *packing)
    answers = []
    for work in (kernels.workspace(70, 100, packing.centre), kernels.workspace(70, 100, packing=packing)):
        lists = kernels.lists(70, 6, len(corpus))
        assert kernels.knn(queries, corpus, 0, len(corpus), *work, 6, *lists)
        answers.append([array[:, :6] for array in lists[:2]])
    assert all(map(np.array_equal, *answers))


# --- lists of the nearest


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 127])
def test_a_pair_is_shifted_into_its_place(dtype, k, rng):
    @numba.njit
    def kept(given, values, indices):
        for index in range(len(given)):
            if index < k or given[index] < values[0, k - 1]:
                place = min(index, k - 1) // LIST_LANES * LIST_LANES
                while place > 0 and shift_in(0, values, indices, 0, place, index, given[index], index):
                    place -= LIST_LANES
                if place == 0:
                    shift_in(1, values, indices, 0, 0, index, given[index], index)

    given = rng.integers(0, 50, 300).astype(dtype)  # with many ties
    if given.dtype.kind == "f":
        given[:20] = np.inf
    room = -(-k // LIST_LANES) * LIST_LANES
    values, indices = np.full((1, room), 0, dtype), np.zeros((1, room), np.int64)
    kept(given, values, indices)
    order = np.argsort(given, kind="stable")[:k]
    assert_identical(indices[0, :k], order)
    assert_identical(values[0, :k], given[order])


# --- machine code for CPUs that are not here


def test_linux_tells_which_processors_of_arm_have_products_of_bytes(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nFeatures\t: fp asimd crc32 asimddp ssbs\nCPU part\t: 0xd0c\n")
    assert dot_product("neoverse-n1", told) == {"dotprod"}
    assert not dot_product("generic", told)  # for which LLVM would refuse the instruction
    told.write_text("processor\t: 0\nFeatures\t: fp asimd crc32 asimdhp\n")
    assert not dot_product("cortex-a72", told)
    assert not dot_product("cortex-a72", tmp_path / "absent")


CPUS = {
    "avx2": (X86, "haswell", LEVELS["avx2"], frozenset({"avx2", "fma"}), r"%ymm"),
    "avx-vnni": (X86, "alderlake", LEVELS["avx2"], frozenset({"avx2", "fma", "avxvnni"}), r"%ymm"),
    "avx512": (X86, "skylake-avx512", LEVELS["avx512"], LEVELS["avx512"].needs, r"%zmm"),
    "vnni": (X86, "icelake-server", LEVELS["avx512"], LEVELS["avx512"].needs | {"avx512vnni"}, r"%zmm"),
    "sse": (X86, "nehalem", Level("generic", 16, 16), frozenset(), r"%xmm"),
    "arm": (ARM, "neoverse-v1", Level("generic", 16, 32), frozenset(), r"\bv\d+\."),
    "arm-dot": (ARM, "neoverse-n1", Level("generic", 16, 32), frozenset({"dotprod"}), r"\bv\d+\."),
}
# LLVM joins VPMADDWD and the addition where a CPU can do both at once.
INSTRUCTIONS = {"absolute-uint8": r"psadbw", "product-int16": r"pmaddwd|vpdpwssd", "product-uint8": r"vpdpbusd"}
ON_ARM = {"product-uint8-dot": r"\budot\b", "absolute-uint8-dot": r"\budot\b"}


def assembled(triple, cpu, emit, *, optimised):
    """Return the assembly, for a CPU that need not be this one, of what `emit` emits, its vectors stored.

    It is given a builder, and the arguments: addresses of queries and of a panel, groups, and an address for results.
    """
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    byte = ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte, ir.IntType(64), byte]), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    place = function.args[3]
    for value in emit(builder, *function.args):
        place = builder.bitcast(place, value.type.as_pointer())
        builder.store(value, place, align=1)
        place = builder.gep(place, [ir.IntType(64)(1)])
    builder.ret_void()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    parsed = binding.parse_assembly(str(module))
    if optimised:
        options = binding.create_pipeline_tuning_options(speed_level=3)
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def tile_loop(operation, cpu, shape=None):
    """Return the form of an operation on a CPU, and the loop of its tile in assembly."""
    triple, name, level, features, _ = CPUS[cpu]
    form = vectors_of(operation, level, features)
    if shape:
        kept = ("operation", "width", "lanes", "elements", "accumulators", "step")
        form = SimpleNamespace(**{key: getattr(form, key) for key in kept}, tile_shape=shape)
    asm = assembled(triple, name, lambda builder, *given: tile_sums(builder, form, *given[:3]), optimised=True)
    found = [lines for lines in loops(asm) if len(lines) > 8]
    assert found
    return form, max(found, key=len)


def uses_stack(lines):
    # A constant may be taken from memory; what is on the stack was pushed out of a register.
    return any(re.search(r"\(%rsp|\(%rbp|\[sp\b", line) for line in lines)


FLOATS = ["absolute-float32", "square-float32", "larger-float32", "product-float32", "largest-float32"]
FLOATS += ["product-float64", "largest-float64"]
IN_REGISTERS = [(operation, cpu) for operation in [*FLOATS, "largest-uint8"] for cpu in CPUS]
OF_BYTES = [(operation, cpu) for operation in INSTRUCTIONS for cpu in ("avx2", "avx-vnni", "avx512", "vnni")]
OF_BYTES += [(operation, "arm-dot") for operation in ON_ARM]
IN_REGISTERS += OF_BYTES


@pytest.mark.parametrize(("operation", "cpu"), IN_REGISTERS, ids=str)
def test_the_sums_of_a_tile_stay_in_registers(operation, cpu):
    form, lines = tile_loop(operation, cpu)
    if operation in INSTRUCTIONS and not form.instruction:
        pytest.skip("this CPU has no instruction of its own for it")
    assert not uses_stack(lines)
    assert any(re.search(CPUS[cpu][4], line) for line in lines)


@pytest.mark.parametrize(("operation", "cpu"), OF_BYTES, ids=str)
def test_each_pair_of_vectors_takes_one_instruction(operation, cpu):
    form, lines = tile_loop(operation, cpu)
    count = sum(bool(re.search((INSTRUCTIONS | ON_ARM)[operation], line)) for line in lines)
    height, width = form.tile_shape
    if form.instruction:
        # The compiler may repeat the loop's body.
        assert count in [times * height * width for times in (1, 2, 4)]
    else:
        assert count == 0
        assert (operation, cpu) in {("product-uint8", "avx2"), ("product-uint8", "avx512")}


def test_a_tile_too_large_for_the_registers_is_found():
    assert uses_stack(tile_loop("product-float32", "avx2", shape=(6, 3))[1])


def assembled_matrix(cpu):
    """Return the assembly of a tile of a matrix unit, with its set-up and its release."""
    form = Vectors(OPERATIONS["product-uint8-matrix"], 64, 32, "llvm.x86.tdpbuud")

    def emit(builder, *given):
        configure_matrix_unit(builder)
        values = matrix_sums(builder, form, *given)
        release_matrix_unit(builder)
        return values

    return assembled(X86, cpu, emit, optimised=False)


def test_a_matrix_unit_multiplies_two_tiles_by_two():
    asm = assembled_matrix("sapphirerapids")
    names = re.findall(r"^\s+(ldtilecfg|tilezero|tileloadd|tdpbuud|tilestored|tilerelease)\b", asm, flags=re.MULTILINE)
    assert names == (
        ["ldtilecfg"] + ["tilezero"] * 4 + ["tileloadd"] * 4 + ["tdpbuud"] * 4 + ["tilestored"] * 4 + ["tilerelease"]
    )
    (loop,) = (lines for lines in loops(asm) if any("tdpbuud" in line for line in lines))
    products = [re.findall(r"%tmm(\d)", line) for line in loop if "tdpbuud" in line]
    assert products == [["6", "4", "0"], ["7", "4", "1"], ["6", "5", "2"], ["7", "5", "3"]]


def test_a_matrix_unit_multiplies_digits():
    form = Vectors(OPERATIONS["digits-float32"], 64, 32, "llvm.x86.tdpbssd")

    def emit(builder, queries, panel, n_steps, out):
        cpu_digits.products(builder, form, queries, panel, n_steps, out)
        return []

    asm = assembled(X86, "sapphirerapids", emit, optimised=False)
    (loop,) = (lines for lines in loops(asm) if any("tdpbssd" in line for line in lines))
    assert sum("tileloadd" in line for line in loop) == 6
    products = [re.findall(r"%tmm(\d)", line) for line in loop if "tdpbssd" in line]
    # High by high into 0 and 1; high by low, and low by high, into 2 and 3.
    assert [product[2] for product in products] == ["0", "1", "2", "3", "2", "3"]


def test_a_wrong_product_is_found_before_it_is_used(monkeypatch):
    space = Space(METRICS["sqeuclidean"], np.dtype(np.uint8), 100)
    plan = plan_of(space, WIDE, frozenset())
    right = Plan(Vectors(OPERATIONS["product-uint8-matrix"], 64, 32), plan.rows, plan.norms, "gram")
    assert cpu_tiles.computes_squares(right, space)
    wrong = Plan(plan_of(Space(METRICS["cityblock"], np.dtype(np.uint8), 100), WIDE, frozenset()).panels,
                 plan.rows, plan.norms, "gram")  # fmt: skip
    assert not cpu_tiles.computes_squares(wrong, space)
    monkeypatch.setattr(cpu_tiles, "computes_squares", lambda *given: False)
    with pytest.warns(RuntimeWarning, match="matrix unit gives wrong products"):
        assert not cpu_tiles.matrix_unit_is_exact.__wrapped__(LEVELS["avx2"])


# --- levels


def test_the_level_can_be_chosen(monkeypatch):
    monkeypatch.delenv("KNNBENCH_SIMD", raising=False)
    best = simd_level()
    for level in LEVELS.values():
        monkeypatch.setenv("KNNBENCH_SIMD", level.name)
        if level.lacks(cpu_features()):
            with pytest.raises(UnsupportedError, match=f"'{level.name}' and this CPU lacks "):
                simd_level()
        else:
            assert simd_level() == level
    assert best in LEVELS.values()
    monkeypatch.setenv("KNNBENCH_SIMD", "mmx")
    with pytest.raises(InvalidInputError, match=r"KNNBENCH_SIMD is 'mmx'; expected one of: amx, avx512, avx2, generic"):
        simd_level()


def test_a_process_keeps_to_the_level_it_is_told():
    code = """
import numpy as np
from knnbench import knn
from knnbench.kernels import cpu_tiles
rows = np.arange(40, dtype=np.uint8).reshape(10, 4)
print(knn(rows, rows, 2, "cityblock", backend="numba").indices[:, 1].tolist())
print({kernels.plan.panels.width for kernels in cpu_tiles._chosen.values()})
"""
    environment = {**os.environ, "KNNBENCH_SIMD": "generic"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[1, 0, 1, 2, 3, 4, 5, 6, 7, 8]", "{16}"]


def test_every_metric_has_operations():
    forms = [form for metric in METRICS.values() for form in (metric.floating, metric.integer)]
    assert {form.accumulate for form in forms} == OPERATION_OF.keys()


# --- probes


@pytest.mark.parametrize("operation", INSTRUCTIONS)
def test_probes_execute_nothing_but_the_instruction(operation):
    try:
        vectors = cpu_probes.instruction_vectors(operation)
    except UnsupportedError:
        assert operation == "product-uint8"
        pytest.skip("this CPU has no instruction of its own for it")
    chains = cpu_probes.instruction_chains(vectors).py_func
    fresh = numba.njit(chains)
    fresh(3, 1)
    (asm,) = fresh.inspect_asm().values()
    found = [[bool(re.search(INSTRUCTIONS[operation], line)) for line in lines] for lines in loops(asm)]
    assert any(map(any, found))
    for is_instruction in filter(any, found):
        assert sum(is_instruction) % cpu_probes.accumulators() == 0
        # Counting and jumping apart.
        assert is_instruction.count(False) <= 4


def test_probes_count_what_they_do():
    vectors = Vectors(OPERATIONS["absolute-uint8"], 32, 16, "llvm.x86.avx2.psad.bw")
    assert cpu_probes.instruction_operations(vectors) == cpu_probes.accumulators() * 32


def test_prepare_packs_within_the_budget_and_kernels_take_what_it_packed(monkeypatch, rng):
    corpus = random_rows(rng, "uint8", 3000, 100)
    queries = random_rows(rng, "uint8", 700, 100)
    nearest = knn(queries, corpus, 3, "cityblock", backend="numba").indices
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), 100)
    ready = prepare(corpus, "cityblock", backend="numba")
    assert_identical(knn(queries, ready, 3).indices, nearest)
    ready.packed(space.dtype).packing.panels[:] = 0  # what is wrong there must show
    assert not np.array_equal(knn(queries, ready, 3).indices, nearest)

    monkeypatch.setenv("KNNBENCH_MEMORY_BUDGET", str(2 * corpus.nbytes))
    ready = prepare(corpus, "cityblock", backend="numba")
    assert ready.packed(space.dtype).packing is None
    assert_identical(knn(queries, ready, 3).indices, nearest)
