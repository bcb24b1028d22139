"""The total order (value, index), against Python's sorted."""

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnbench.blocking import slices
from knnbench.ordering import MISSING, Selection, merge_topk, order_rows, smallest_k

from ._checks import assert_identical

DTYPES = ("int32", "int64", "float32", "float64")


def elements(dtype):
    """Few distinct values, so that ties are everywhere, and now and then any value at all."""
    kind = np.dtype(dtype)
    if kind.kind == "i":
        anything = st.integers(0, np.iinfo(kind).max)
        few = [0, 1, 2, np.iinfo(kind).max]
    else:
        anything = st.floats(min_value=0, width=kind.itemsize * 8, allow_nan=False)
        few = [0.0, 1.0, 2.0, np.inf]
    return st.one_of(st.sampled_from(few), anything)


@st.composite
def tables(draw, max_rows=4, max_columns=24):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    return draw(hnp.arrays(dtype, shape, elements=elements(dtype), fill=st.nothing()))


def expected_smallest(values, indices, k):
    """Return the k first of the sorted pairs, by Python."""
    ordered = [sorted(zip(row, index, strict=True))[:k] for row, index in zip(values.tolist(), indices, strict=True)]
    return (
        np.array([[value for value, _ in row] for row in ordered], values.dtype),
        np.array([[index for _, index in row] for row in ordered], np.int64),
    )


def assert_pair(got, expected):
    assert_identical(got[0], expected[0])
    assert_identical(got[1], expected[1])


def columns_of(values):
    return [range(values.shape[1])] * len(values)


@given(tables(), st.data())
def test_smallest_k(values, data):
    k = data.draw(st.integers(1, values.shape[1]))
    before = values.copy()
    assert_pair(smallest_k(np, values, k), expected_smallest(values, columns_of(values), k))
    assert_identical(values, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0, 7, "largest"])
def test_smallest_k_of_equal_values(dtype, value):
    if value == "largest":
        value = np.inf if dtype[0] == "f" else np.iinfo(dtype).max
    values = np.full((3, 50), value, dtype)
    for k in (1, 2, 49, 50):
        got, indices = smallest_k(np, values, k)
        assert (got == value).all()
        assert (indices == np.arange(k)).all()


def test_smallest_k_when_ties_straddle_the_kth():
    values = np.array([[1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]], np.int32)
    assert smallest_k(np, values, 3)[1].tolist() == [[1, 3, 0], [0, 1, 2], [5, 4, 3]]


def test_smallest_k_of_large_rows(rng):
    values = rng.integers(0, 30, (20, 5000)).astype(np.int32)
    for k in (1, 17, 500, 5000):
        assert_pair(smallest_k(np, values, k), expected_smallest(values, columns_of(values), k))


@given(tables(max_columns=40), st.data())
def test_selection_over_blocks_of_any_width(values, data):
    width = values.shape[1]
    k = data.draw(st.integers(1, width))
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=6))) if width > 1 else []
    selection = Selection(np, k)
    for start, stop in itertools.pairwise([0, *cuts, width]):
        selection.update(values[:, start:stop], start)
    assert_pair((selection.values, selection.indices), expected_smallest(values, columns_of(values), k))


@pytest.mark.parametrize("width", [1, 3, 64, 100, 1000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
@pytest.mark.parametrize("k", [1, 5, 130])
def test_selection_over_many_columns(width, order, k, rng):
    # Descending: every block replaces all that is held. Few values enter a wide block: the sparse way.
    values = rng.integers(0, 200, (7, 1000)).astype(np.float32)
    if order == "equal":
        values[:] = 3
    elif order != "random":
        values.sort(axis=1)
        values = np.ascontiguousarray(values[:, ::-1] if order == "descending" else values)
    selection = Selection(np, k)
    for columns in slices(1000, width):
        selection.update(values[:, columns], columns.start)
    assert_pair((selection.values, selection.indices), expected_smallest(values, columns_of(values), k))


def test_selection_keeps_rows_apart(rng):
    # One row takes many of a block, another none.
    values = np.concatenate([np.full((2, 100), 5.0), np.stack([np.full(100, 6.0), np.arange(100) / 100])], axis=1)
    selection = Selection(np, 4)
    for columns in slices(200, 100):
        selection.update(values[:, columns], columns.start)
    assert selection.indices.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103]]


def test_a_block_that_starts_later_counts_from_there():
    selection = Selection(np, 2)
    selection.update(np.array([[3.0, 1.0]]), 10)
    selection.update(np.array([[2.0, 1.0]]), 20)
    assert selection.indices.tolist() == [[11, 21]]


@given(tables(), st.data())
def test_order_rows(values, data):
    n, m = values.shape
    indices = np.array([data.draw(st.permutations(range(10, 10 + m))) for _ in range(n)], np.int64)
    assert_pair(order_rows(np, values, indices), expected_smallest(values, indices.tolist(), m))


@st.composite
def neighbor_lists(draw, count):
    """Lists of neighbours of the same queries: with duplicates across lists, ties and padding."""
    dtype = draw(st.sampled_from(DTYPES))
    n_queries, n_corpus = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    table = draw(hnp.arrays(dtype, (n_queries, n_corpus), elements=elements(dtype), fill=st.nothing()))
    padding = np.inf if table.dtype.kind == "f" else np.iinfo(table.dtype).max
    lists = []
    for _ in range(count):
        width = draw(st.integers(1, n_corpus + 2))
        values = np.full((n_queries, width), padding, table.dtype)
        indices = np.full((n_queries, width), MISSING, np.int64)
        for i in range(n_queries):
            chosen = draw(st.lists(st.integers(0, n_corpus - 1), unique=True, max_size=width))
            pairs = sorted((table[i, j].item(), j) for j in chosen)
            for column, (value, j) in enumerate(pairs):
                values[i, column], indices[i, column] = value, j
        lists.append((values, indices))
    return table, lists


def union(table, lists, k):
    """Return the merge of all lists by Python: each index once, the first k by (value, index)."""
    result = []
    for i in range(len(table)):
        known = {int(j) for _, indices in lists for j in indices[i] if j != MISSING}
        result.append(sorted((table[i, j].item(), j) for j in known)[:k])
    return result


def present(merged):
    """Return the lists of pairs in a merge, padding left out; it must stand last."""
    result = []
    for values, indices in zip(*merged, strict=True):
        held = int((indices != MISSING).sum())
        assert (indices[held:] == MISSING).all()
        result.append(list(zip(values[:held].tolist(), indices[:held].tolist(), strict=True)))
    return result


@given(neighbor_lists(2), st.integers(1, 30))
def test_merge_is_the_union(drawn, k):
    table, (first, second) = drawn
    before = [array.copy() for array in (*first, *second)]
    merged = merge_topk(first, second, k)
    assert present(merged) == union(table, (first, second), k)
    width = min(k, first[0].shape[1] + second[0].shape[1])
    assert merged[0].shape == merged[1].shape == (len(table), width)
    assert merged[0].dtype == table.dtype
    assert merged[1].dtype == np.int64
    for array, old in zip((*first, *second), before, strict=True):
        assert_identical(array, old)


@given(neighbor_lists(2), st.integers(1, 30))
def test_merge_is_commutative(drawn, k):
    _, (first, second) = drawn
    assert_pair(merge_topk(first, second, k), merge_topk(second, first, k))


@given(neighbor_lists(3), st.integers(1, 30))
def test_merge_is_associative(drawn, k):
    _, (a, b, c) = drawn
    left = merge_topk(merge_topk(a, b, k), c, k)
    right = merge_topk(a, merge_topk(b, c, k), k)
    assert present(left) == present(right)


@given(neighbor_lists(2), st.integers(1, 30))
def test_merge_is_idempotent(drawn, k):
    _, (a, b) = drawn
    once = merge_topk(a, b, k)
    for again in (merge_topk(once, once, k), merge_topk(once, a, k), merge_topk(b, once, k)):
        assert present(again) == present(once)


def test_merge_keeps_a_neighbor_at_infinity_before_padding():
    first = np.array([[np.inf]]), np.array([[4]])
    second = np.array([[np.inf]]), np.array([[MISSING]])
    for merged in (merge_topk(first, second, 2), merge_topk(second, first, 2)):
        assert merged[1].tolist() == [[4, MISSING]]
    first = np.array([[np.iinfo(np.int32).max]], np.int32), np.array([[4]])
    second = np.array([[0]], np.int32), np.array([[MISSING]])
    assert merge_topk(second, first, 2)[1].tolist() == [[4, MISSING]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_nan_does_not_crash(k, rng):
    values = rng.random((5, 6))
    values[rng.random((5, 6)) < 0.5] = np.nan
    values[0] = np.nan
    _, indices = smallest_k(np, values, k)
    assert indices.shape == (5, k)
    assert all(len(set(row)) == k for row in indices.tolist())
    selection = Selection(np, k)
    for columns in slices(6, 2):
        selection.update(values[:, columns], columns.start)
    assert selection.indices.shape == (5, k)
    order_rows(np, values, np.tile(np.arange(6), (5, 1)))
    some = values[:, :3], np.tile(np.arange(3), (5, 1))
    merge_topk(some, some, k)
