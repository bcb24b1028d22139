"""Selecting and merging neighbours, on numpy arrays."""

import functools

import numpy as np
import pytest

from knnbench.blocking import slices
from knnbench.ordering import Selection, merge_topk, smallest_k

from .._checks import assert_identical
from ._answers import timed

N_QUERIES, WIDTH = 64, 4096


def ordinary(rng):
    return rng.normal(size=(N_QUERIES, WIDTH)).astype(np.float32)


def few_values(rng):
    return rng.integers(0, 8, (N_QUERIES, WIDTH)).astype(np.int32)


def ever_closer(rng):
    return -np.sort(ordinary(rng), axis=1)


def first_k(values, indices, k):
    """Return the k smallest by (value, index), the indices ascending within each row."""
    order = np.argsort(values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(indices, order, axis=1)


def assert_first_k(got, values, k):
    columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    for answer, expected in zip(got, first_k(values, columns, k), strict=True):
        assert_identical(answer, expected)


SELECT = {
    "select k=1": (ordinary, 1),
    "select k=10": (ordinary, 10),
    "select k=100": (ordinary, 100),
    "select k=1, ties": (few_values, 1),
    "select k=100, ties": (few_values, 100),
}


@pytest.mark.parametrize("case", SELECT)
def test_smallest_k(benchmark, rng, case):
    make, k = SELECT[case]
    values = make(rng)
    assert_first_k(timed(benchmark, lambda: smallest_k(np, values, k)), values, k)


STREAM = {
    "stream k=10": (ordinary, 10),
    "stream k=100": (ordinary, 100),
    "stream k=10, ties": (few_values, 10),
    "stream k=10, ever closer": (ever_closer, 10),
}


@pytest.mark.parametrize("case", STREAM)
def test_selection(benchmark, rng, case):
    make, k = STREAM[case]
    values = make(rng)

    def select():
        selection = Selection(np, k)
        for block in slices(WIDTH, WIDTH // 8):
            selection.update(values[:, block], block.start)
        return selection.values, selection.indices

    assert_first_k(timed(benchmark, select), values, k)


MERGE = {"merge 2 lists": 2, "merge 8 lists": 8}


@pytest.mark.parametrize("case", MERGE)
def test_merge(benchmark, rng, case):
    n_lists, k = MERGE[case], 10
    # Enough values that both they and their ties decide who is among the k nearest.
    values = rng.integers(0, WIDTH, (N_QUERIES, WIDTH)).astype(np.int32)
    columns = np.broadcast_to(np.arange(WIDTH), values.shape)
    step = WIDTH // n_lists
    # Shards that overlap, as retries make them, and in descending order, in which no tie falls right by itself.
    parts = [slice(start, start + step * 3 // 2) for start in range(0, WIDTH, step)][::-1]
    lists = [first_k(values[:, part], columns[:, part], k) for part in parts]
    merge = functools.partial(merge_topk, k=k)
    assert_first_k(timed(benchmark, lambda: functools.reduce(merge, lists)), values, k)
