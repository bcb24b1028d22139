"""Floats searched by bytes that stand for them: answers are those of the direct form, to the bit, whatever the data."""

import sys
from fractions import Fraction

import numpy as np
import pytest

from knnbench import knn, prepare
from knnbench.backends import get_backend
from knnbench.bounds import direct_error
from knnbench.kernels import cpu_bytes
from knnbench.kernels.cpu_bytes import LANES, LARGEST_LIMIT, MOST_FEATURES, SCRATCH, byte_rows, narrow_space
from knnbench.kernels.cpu_filters import ByteFilter, filters_of
from knnbench.kernels.cpu_simd import LEVELS, cpu_features, simd_level
from knnbench.kernels.cpu_tiles import compiled_kernels, plan_of, tile_kernels
from knnbench.metrics import METRICS, Space

from ._checks import assert_identical

FORMS = ["this CPU", "generic", "matrix emulated"]


def space_of(metric, dtype, n_features):
    return Space(METRICS[metric], np.dtype(dtype), n_features)


def kernels_of(space, form="this CPU"):
    """Return kernels whose bytes are compared as this CPU does, as any does, or in tiles as of a matrix unit."""
    level = {"this CPU": simd_level(), "generic": LEVELS["generic"], "matrix emulated": LEVELS["amx"]}[form]
    features = cpu_features() if form == "this CPU" else frozenset()
    narrow = narrow_space(space)
    direct = compiled_kernels(plan_of(space, simd_level(), cpu_features()), space)
    return cpu_bytes._compiled(
        narrow.metric.name, compiled_kernels(plan_of(narrow, level, features), narrow), direct
    ), direct  # fmt: skip


def searched(kernels, queries, corpus, k, *, packed=False, part=slice(None), grid=None):
    """Return the values and indices of the k nearest in a part by bytes; None if the search gave up."""
    n_features, (first, stop, _) = queries.shape[1], part.indices(len(corpus))
    grid = grid or kernels.reference(corpus)
    packing = None
    if packed:
        packing = kernels.packing(len(corpus), n_features, grid)
        kernels.pack(corpus, 0, len(packing.panels), *packing)
    lists = kernels.lists(len(queries), k, stop - first)
    work = kernels.workspace(len(queries), n_features, None if packed else grid, packing)
    # Nothing may rest on what room happens to hold: of floats it is NaN here.
    given = {"offsets", "numbers", "is_packed", *(packing._fields if packed else ("panels", "shifts"))}
    for room in (*lists[:2], *(getattr(work, name) for name in work._fields if name not in given)):
        room.view(np.uint8)[...] = 255
    if not kernels.knn(queries, corpus, first, stop, *work, k, *lists):
        return None
    answer = np.empty((len(queries), k), kernels.ranked), np.empty((len(queries), k), np.int64)
    kernels.order(queries, corpus, work.scratch, k, *lists, *answer)
    return answer


def searched_directly(kernels, queries, corpus, k, *, part=slice(None)):
    """Return those of all pairs by the direct form, which `knn` alone would select by sums in another order."""
    rows = np.arange(len(corpus))[part]
    n = len(rows)
    values, indices = np.zeros((len(queries), n), kernels.ranked), np.tile(rows, (len(queries), 1))
    counts, answer = np.full(len(queries), n), (np.empty_like(values), np.empty_like(indices))
    row = kernels.workspace(1, queries.shape[1]).values
    kernels.order(queries, corpus, row, n, values, indices, counts, *answer)
    return answer[0][:, :k], answer[1][:, :k]


def rows_of(kind, n, n_features, rng):
    """Return queries and corpus rows as float64, on which the bounds are put to the test."""
    queries, corpus = (rng.normal(size=(size, n_features)) for size in (19, n))
    if kind == "grid":
        queries, corpus = (rng.integers(0, 256, rows.shape) / 255 for rows in (queries, corpus))
    elif kind == "whole":
        queries, corpus = (rng.integers(-3, 4, rows.shape).astype(float) for rows in (queries, corpus))
    elif kind == "outliers":
        queries[3, 4], corpus[17, 1], corpus[18:25] = 1e3, -1e5, 1e4
        corpus[60] = queries[3]
    elif kind == "cells":
        # Near rows differ by less than a step of the grid, which a few rows far away make wide.
        queries, corpus = queries * 0.1, corpus * 0.1
        corpus[::7] += rng.normal(size=(len(corpus[::7]), 1)) * 5
    elif kind == "features":
        scale, shift = np.exp(rng.normal(size=(2, n_features)) * 1.5)
        queries, corpus = queries * scale + 300 * shift, corpus * scale + 300 * shift
    elif kind == "far":
        queries, corpus = queries + 1e4, corpus + 1e4
    elif kind == "tails":
        queries, corpus = np.exp(2 * queries), np.exp(2 * corpus)
    corpus[n // 2 : n // 2 + 30] = corpus[:30]  # ties
    queries[0] = corpus[5]
    return queries, corpus


def assert_nearest(kernels, direct, queries, corpus, k, *, part=slice(None), **options):
    """Search by bytes, and compare with the direct form."""
    found = searched(kernels, queries, corpus, k, part=part, **options)
    assert found is not None
    for one, other in zip(found, searched_directly(direct, queries, corpus, k, part=part), strict=True):
        assert_identical(one, other)


KINDS = ["normal", "grid", "whole", "outliers", "cells", "features", "far", "tails"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_find_what_the_direct_form_finds(kind, metric, dtype, rng, monkeypatch):
    for n_features in (5, 16, 67, 784):
        queries, corpus = (rows.astype(dtype) for rows in rows_of(kind, 1501, n_features, rng))
        space = space_of(metric, dtype, n_features)
        kernels, direct = kernels_of(space)
        for k in (1, 3, 40, 200):
            found, expected = searched(kernels, queries, corpus, k), searched_directly(direct, queries, corpus, k)
            if found is None:  # which is allowed where rows lie within a cell, and for hardly more than their number
                assert kind in ("cells", "features", "far", "tails", "outliers")
                continue
            for one, other in zip(found, expected, strict=True):
                assert_identical(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_every_form_of_the_bytes_and_packed_rows_give_the_same(metric, form, rng):
    for n_features, n in ((1, 70), (100, 1003)):
        queries, corpus = (rows.astype(np.float32) for rows in rows_of("normal", n, n_features, rng))
        kernels, direct = kernels_of(space_of(metric, np.float32, n_features), form)
        expected = searched_directly(direct, queries, corpus, 4)
        for packed in (False, True):
            for one, other in zip(searched(kernels, queries, corpus, 4, packed=packed), expected, strict=True):
                assert_identical(one, other)


def broken_kernels(space, monkeypatch, **constants):
    """Return kernels by bytes with other constants."""
    for name, value in constants.items():
        monkeypatch.setattr(cpu_bytes, name, value)
    narrow = narrow_space(space)
    narrow, direct = (compiled_kernels(plan_of(s, simd_level(), cpu_features()), s) for s in (narrow, space))
    return cpu_bytes._compiled.__wrapped__(narrow_space(space).metric.name, narrow, direct), direct


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_the_comparison_sees_rests_that_are_left_out(metric, rng, monkeypatch):
    queries, corpus = (rows.astype(np.float32) for rows in rows_of("cells", 1501, 67, rng))
    kernels, direct = broken_kernels(space_of(metric, np.float32, 67), monkeypatch, REST_SLACK=0.0, STEP_SLACK=0.0)
    found, expected = searched(kernels, queries, corpus, 3), searched_directly(direct, queries, corpus, 3)
    assert not np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_farther_from_its_bytes_than_its_rest_says(kind, metric, dtype, rng):
    n_features = 37
    kernels, _ = kernels_of(space_of(metric, dtype, n_features))
    for shift in (0, 0.1):  # of numbers on a grid, what rounding takes as the offset is taken away is all the rest
        _, corpus = rows_of(kind, 400, n_features, rng)
        corpus = ((corpus + shift) * 2.0 ** rng.integers(-10, 10)).astype(dtype)
        grid = kernels.reference(corpus)
        packing = kernels.packing(len(corpus), n_features, grid)
        kernels.pack(corpus, 0, len(packing.panels), *packing)
        rests, step = packing.rests.ravel(), Fraction(float(grid.numbers[0]))
        for i in range(0, 400, 3):
            exact = [Fraction(float(x)) - Fraction(float(o)) for x, o in zip(corpus[i], grid.offsets, strict=False)]
            inside = [min(255 * step, max(0, x)) for x in exact]
            least = [abs(x - step * round(x / step)) for x in inside]
            norm = float(sum(least)) if metric == "cityblock" else float(sum(rest**2 for rest in least)) ** 0.5
            assert norm * (1 - 1e-12) <= rests[i]
            # And not much more, or all rows would be looked at.
            assert rests[i] <= 1.01 * norm + 0.02 * float(step) * n_features


def test_the_grid_is_that_of_the_numbers(rng):
    kernels, _ = kernels_of(space_of("sqeuclidean", np.float32, 64))
    pixels = rng.integers(0, 256, (1000, 64))
    pixels[:2, 0] = 0, 255
    grid = kernels.reference(pixels.astype(np.float32))
    assert grid.numbers[0] == 1
    assert (grid.offsets == 0).all()
    grid = kernels.reference((pixels // 2 + 7).astype(np.float32))
    assert grid.numbers[0] == 1  # though they would fill the bytes with half of it
    assert (grid.offsets == 7).all()
    grid = kernels.reference((pixels / 255).astype(np.float32))
    assert grid.numbers[0] == pytest.approx(1 / 255, rel=1e-6)
    shifted = pixels / 255 + np.arange(64)
    grid = kernels.reference(shifted.astype(np.float32))
    assert grid.numbers[0] == pytest.approx(1 / 255, rel=1e-3)  # not that of all features together
    assert grid.offsets == pytest.approx(np.arange(64), abs=0.02)


@pytest.mark.parametrize("corpus", [np.full((500, 64), 0.3), np.full((500, 64), 1e-30) * np.arange(500)[:, None]])
def test_there_is_no_grid_of_equal_rows_or_of_steps_that_underflow(corpus):
    kernels, _ = kernels_of(space_of("sqeuclidean", np.float64, 64))
    assert kernels.reference(corpus) is None
    found = knn(corpus[:9], prepare(corpus, "sqeuclidean", backend="numba"), 3)
    assert (found.indices == range(3)).all() if corpus[0, 0] else (found.indices[:, 0] == range(9)).all()


def test_there_is_no_grid_where_no_bound_of_the_direct_form_is_known(rng):
    corpus = rng.random((5, 200_000), np.float32)  # so many features that roundings may add up to more than a share
    kernels, _ = kernels_of(space_of("cityblock", np.float32, corpus.shape[1]))
    assert kernels.reference(corpus) is None
    assert kernels.reference(np.ascontiguousarray(corpus[:, :1000])) is not None


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_a_search_gives_up_where_bytes_tell_nothing(metric, rng):
    corpus = (rng.normal(size=(6000, 64)) * 1e-4).astype(np.float32)
    corpus[:: len(corpus) // 256] += 10 * rng.random((len(corpus[:: len(corpus) // 256]), 1), np.float32)
    kernels, _ = kernels_of(space_of(metric, np.float32, 64))
    queries = corpus[1:200:3]
    assert searched(kernels, queries, corpus, 3) is None
    found = knn(queries, prepare(corpus, metric, backend="numba"), 1)
    assert (found.indices[:, 0] == np.arange(1, 200, 3)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("where", ["queries", "corpus"])
def test_rows_that_are_not_finite_end_the_search_by_bytes(where, bad, rng):
    queries, corpus = (rng.normal(size=(n, 64)).astype(np.float32) for n in (20, 2000))
    (queries if where == "queries" else corpus)[11, 7] = bad
    kernels, direct = kernels_of(space_of("sqeuclidean", np.float32, 64))
    found = searched(kernels, queries, corpus, 3)
    if bad == 3e38 and found is not None:
        expected = searched_directly(direct, queries, corpus, 3)
        for one, other in zip(found, expected, strict=True):
            assert_identical(one, other)
    else:
        assert found is None


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("n_queries", [1, 3, 70])
def test_queries_of_a_prepared_corpus_meet_its_bytes(metric, n_queries, rng, monkeypatch):
    queries, corpus = (rng.normal(size=(n, 80)).astype(np.float32) for n in (n_queries, 5000))
    expected = knn(queries, corpus, 5, metric, backend="numpy")
    prepared, searched = prepare(corpus, metric, backend="numba"), []
    module = sys.modules[type(get_backend("numba")).__module__]
    by_bytes = module._Rounded._found

    def noted(self, prepared, block, *given):
        searched.append(len(block))
        return by_bytes(self, prepared, block, *given)

    monkeypatch.setattr(module._Rounded, "_found", noted)
    found = knn(queries, prepared, 5)
    assert (found.indices == expected.indices).all()
    assert sum(searched) >= n_queries


def test_few_of_many_neighbours_do_not_pay():
    one = ByteFilter(256)
    assert one.pays(3, 20_000)
    assert not one.pays(5, 2000)
    assert not one.pays(1000, 60_000)


def test_room_behind_the_last_row_of_bytes():
    rows = byte_rows(3, 5)
    assert rows.shape == (3, 5)
    assert rows.base is not None
    assert SCRATCH >= 3 * LANES


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_parts_of_a_corpus(metric, rng):
    for n_features in (19, 64):
        queries, corpus = (rows.astype(np.float32) for rows in rows_of("normal", 700, n_features, rng))
        corpus[350:360] = corpus.min(axis=0)  # all bytes 0, as those of rows that a last panel lacks
        queries[:2] = corpus[350]
        corpus[670:] = queries[3]  # where a part ends before
        kernels, direct = kernels_of(space_of(metric, np.float32, n_features))
        width = kernels.plan.panels.panel_rows
        for packed in (False, True):
            for first, stop in ((0, 30), (0, 351), (width, 3 * width), (2 * width, 700), (5 * width, 5 * width + 130)):
                # Packed panels are whole, but for the last.
                stop = 700 if packed and stop % width else stop
                for k in (1, 20, 129):
                    if k <= stop - first:
                        assert_nearest(kernels, direct, queries, corpus, k, packed=packed, part=slice(first, stop))


def whole_rows(n, rng, *near):
    """Return rows of whole numbers, of which those that are given come last; no other is within 30 of 0."""
    rows = rng.integers(30, 100, (n, len(near[0]))) * rng.choice([-1, 1], (n, len(near[0])))
    return np.concatenate([rows[: n - len(near)], near], dtype=np.float32)


@pytest.mark.parametrize(
    ("metric", "query", "first", "nearest"),
    [("cityblock", (0.4, 0.3), (-5, 5), (5, 5)), ("sqeuclidean", (0.4, 0.3), (2, -4), (4, 3))],
)
def test_a_row_as_near_as_its_rest_allows(metric, query, first, nearest, rng):
    # The rest of the query points from it to the nearest row, whose bytes are that much farther.
    corpus = whole_rows(400, rng, nearest)
    corpus[60] = first
    kernels, direct = kernels_of(space_of(metric, np.float32, 2))
    assert_nearest(kernels, direct, np.array([query], np.float32), corpus, 1)
    assert searched(kernels, np.array([query], np.float32), corpus, 1)[1] == 399


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_a_row_with_a_larger_rest_than_those_of_the_sample(metric, packed, rng):
    # Its bytes are one off in each feature, itself it is hardly more than half of that; the row before is 0.75 off.
    n_features = 16
    query, before = np.zeros((1, n_features), np.float32), np.zeros(n_features)
    before[: 12 if metric == "cityblock" else 9] = 1
    corpus = whole_rows(400, rng, np.full(n_features, 0.51))
    corpus[60] = before
    kernels, direct = kernels_of(space_of(metric, np.float32, n_features))
    grid = kernels.reference(corpus[:-1])
    assert grid.numbers[0] == 1 > grid.numbers[1]
    assert searched(kernels, query, corpus, 1, packed=packed, grid=grid)[1] == 399
    assert_nearest(kernels, direct, query, corpus, 1, packed=packed, grid=grid)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_queries_so_far_away_that_no_integer_holds_a_limit(metric, rng):
    queries, corpus = (rows.astype(np.float32) for rows in rows_of("normal", 300, 64, rng))
    kernels, direct = kernels_of(space_of(metric, np.float32, 64))
    for away in (*range(10_000, 100_000, 6000), 1e9, 1e18):  # a limit cut to 32 bits has either sign
        assert_nearest(kernels, direct, queries + np.float32(away), corpus, 3)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_the_error_of_the_direct_form_widens_what_is_looked_at(metric, rng):
    queries, corpus = (rows.astype(np.float32) for rows in rows_of("normal", 3000, 64, rng))
    kernels, _ = kernels_of(space_of(metric, np.float32, 64))
    assert searched(kernels, queries, corpus, 1) is not None
    for place, error in ((2, 0.999), (3, 1e6)):
        grid = kernels.reference(corpus)
        grid.numbers[place] = error
        assert searched(kernels, queries, corpus, 1, grid=grid) is None


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_outliers_are_left_out_by_the_bytes_at_the_ends_of_the_grid(metric, rng, monkeypatch):
    queries, corpus = (rows.astype(np.float32) for rows in rows_of("normal", 12_000, 64, rng))
    corpus[rng.random(12_000) < 0.03] *= 30
    # So few are looked at before it gives up that the outliers are not among them.
    kernels, direct = broken_kernels(space_of(metric, np.float32, 64), monkeypatch, LOOKED_SHARE=1 << 20)
    assert_nearest(kernels, direct, queries, corpus, 1)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock"])
def test_no_row_past_the_last_is_packed(metric, rng):
    rows = rng.normal(size=(200, 37)).astype(np.float32)
    kernels, _ = kernels_of(space_of(metric, np.float32, 37))
    packing = kernels.packing(100, 37, kernels.reference(rows))
    packing.rests[...] = -1
    kernels.pack(rows[:100], 0, len(packing.panels), *packing)
    assert (packing.rests.ravel()[:100] > 0).all()
    assert (packing.rests.ravel()[100:] == -1).all()


def test_rests_of_the_longest_rows(rng):
    # Sums of so many equal numbers are rounded the same way most of the time.
    n_features = MOST_FEATURES
    kernels, _ = kernels_of(space_of("cityblock", np.float32, n_features))
    rows = np.repeat(np.float32([0.0, 255.0, *(100.4 + 0.09 * rng.random(20))])[:, None], n_features, axis=1)
    grid = kernels.reference(rows[:2])
    packing = kernels.packing(len(rows), n_features, grid)
    kernels.pack(rows, 0, len(packing.panels), *packing)
    exact = [n_features * abs(Fraction(float(x)) - round(x)) for x in rows[:, 0]]
    assert all(rest >= least for rest, least in zip(packing.rests.ravel(), exact, strict=False))


def test_rows_that_are_too_long_for_proofs_are_not_searched_by_bytes():
    one, longest = ByteFilter(128), space_of("cityblock", np.float32, MOST_FEATURES)
    assert one.serves(longest) == bool(tile_kernels(narrow_space(longest)).plan.panels.instruction)
    assert not one.serves(space_of("cityblock", np.float32, MOST_FEATURES + 1))
    assert direct_error(longest)[0] < 1
    assert 255 * MOST_FEATURES < LARGEST_LIMIT
    squares = space_of("sqeuclidean", np.float32, MOST_FEATURES)
    assert not one.serves(squares)  # of whose bytes the sums need not fit a limit


@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
def test_bytes_that_settle_nothing_are_left_out_for_some_searches(metric, rng, monkeypatch):
    corpus = (rng.normal(size=(6000, 64)) * 1e-4).astype(np.float32)
    corpus[:: len(corpus) // 256] += 10 * rng.random((len(corpus[:: len(corpus) // 256]), 1), np.float32)
    queries, prepared, tries = corpus[1:200:3], prepare(corpus, metric, backend="numba"), []
    module = sys.modules[type(get_backend("numba")).__module__]
    by_bytes = module._Rounded._found

    def noted(self, *given):
        found = by_bytes(self, *given)
        tries.append(found is not None)
        return found

    monkeypatch.setattr(module._Rounded, "_found", noted)

    def searches_that_try(queries, n):
        found = []
        for number in range(n):
            tries.clear()
            assert (knn(queries, prepared, 1).distances == 0).all()
            found += [number] * any(tries) if all(tries) else [(number, "in vain")]
        return found

    assert searches_that_try(queries, 12) == [(0, "in vain"), (2, "in vain"), (5, "in vain"), (10, "in vain")]
    # Queries of which bytes tell enough bring them back.
    easy = corpus[:: len(corpus) // 256][:100]
    assert searches_that_try(easy, 10) == [7, 8, 9]


def test_rows_without_a_grid_are_packed_for_the_next_filter(rng):
    corpus = (rng.normal(size=(3000, 80)) * 1e-20).astype(np.float64)
    space, backend = space_of("euclidean", np.float64, 80), get_backend("numba")
    kept = backend.keep(backend.prepare(corpus, space), space, 1 << 30)
    following = [one for one in filters_of(space) if not isinstance(one, ByteFilter)]
    assert kept.packed(following[0].kernels(space)) is not None
