"""The neighbours of exact arithmetic on floats, proved: ``accuracy="exact"``.

1. The backend's fast search gives a few more candidates than are asked for, and a floor that the exact value of no
   other row is below (`knnbench.backends.base.Candidates`).
2. The values of the candidates are computed in float64, each within a known interval of the exact one
   (`knnbench.bounds`). Where the first k intervals are apart from one another and from the next, and all below the
   floor, the answer is proved. That is the rule, and costs little.
3. Queries of which it is not so are searched again in float64, by the direct form; what its own bound cannot exclude is
   kept.
4. What float64 cannot put in order is put in order by exact arithmetic (`knnbench.exact_values`). Of equal values the
   smaller index comes first.

Bad data for a bound only ever send more queries to the slower steps.

References
----------
Filters before exact arithmetic are usual in computational geometry: J. R. Shewchuk, Adaptive precision floating-point
arithmetic and fast robust geometric predicates, Discrete & Computational Geometry 18 (1997), 305-363.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from knnbench.backends.base import Backend, Native
from knnbench.blocking import block_shape, slices
from knnbench.bounds import Floats
from knnbench.dtypes import Array
from knnbench.exact_values import Values
from knnbench.metrics import Space
from knnbench.threads import limited_blas
from knnbench.underflow import gradual_underflow

__all__ = ["Certificate", "search"]

# Candidates beyond k, and for so many of k one more. On ordinary data the last of them lies farther from the k-th than
# any bound; the queries for which it does not are searched again.
SPARE, SPARE_SHARE = 8, 8

# Bytes held for a candidate: index and value, and both once more while they are sorted.
CANDIDATE_BYTES = 120

# Queries that are searched again together, so that a corpus row is read once for all of them.
WIDE_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Certificate:
    """How an exact answer was proved.

    Attributes
    ----------
    filter : str
        The arithmetic that chose the candidates: of what the proof depends on, the only part that may round.
    candidates : float
        Rows whose value was looked at once more, for each query on average.
    bound : float
        The largest error that the filter's bound allowed for, over all queries: by so much the exact value of a row
        that was left out may be below the largest that was selected. In the unit of what is accumulated, which for
        euclidean is a squared distance; infinite where the bound said nothing.
    searched_again : int
        Queries that this did not settle, and that float64 searched.
    settled : int
        Queries whose neighbours float64 could not put in order, and exact arithmetic did.
    """

    filter: str
    candidates: float
    bound: float = 0.0
    searched_again: int = 0
    settled: int = 0


class Task(Protocol):
    """A call that was checked, as `knnbench.api` has it."""

    engine: Backend
    space: Space
    queries: Any
    prepared: Any
    budget_left: int

    def query_blocks(self, answer_bytes: int) -> list[slice]:
        """Return the blocks of queries to be taken one by one."""

    def corpus_parts(self) -> list[slice]:
        """Return the parts of the corpus to be searched one by one."""

    def native(self, block: slice) -> Native:
        """Return a block of queries as the backend's own array."""

    def packed(self, part: slice) -> Any:
        """Return a part of the corpus in the backend's own form."""


def search(task: Task, k: int) -> tuple[Array, Array, Certificate]:
    """Return distances and indices of the k nearest, on the host, and how they were proved.

    Parameters
    ----------
    task : Task
        On floats, of a backend with `Capabilities.certifies`.
    k : int

    Returns
    -------
    distances : (n_queries, k) array of `Space.output`
    indices : (n_queries, k) array of int64
    certificate : Certificate

    Notes
    -----
    Rows on a device are copied to the host as a whole, beyond the memory budget.
    """
    with gradual_underflow() as was_flushed:
        # Other threads may go on flushing. All bounds hold for that, except of unit length: scaling loses what was
        # flushed.
        return _search(task, k, trusts_filter=not (was_flushed and task.space.metric.unit_rows))


def _search(task: Task, k: int, *, trusts_filter: bool) -> tuple[Array, Array, Certificate]:
    n_queries, n_corpus = len(task.queries), task.prepared.shape[0]
    count = min(k + SPARE + k // SPARE_SHARE, n_corpus)
    blocks, parts = task.query_blocks(16 * count), task.corpus_parts()
    share = task.budget_left // 4
    task.budget_left -= share
    step, _ = block_shape(n_queries, 1, budget=share // 2, per_pair=CANDIDATE_BYTES * count, max_queries=n_queries)
    values = Values(task.space, task.queries, task.prepared.rows, share // 2)
    distances, indices = np.empty((n_queries, k), task.space.output), np.empty((n_queries, k), np.int64)
    facts = []
    for block in slices(n_queries, step):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # where it happens, nothing is proved by it
            selected = _select(task, block, blocks[0].stop, parts, count, values)
        if not trusts_filter:
            selected.floor[:] = -np.inf
        indices[block], approximate, fact = _prove(selected, block, k, values)
        owners = np.repeat(np.arange(block.start, block.stop), k)
        distances[block] = values.distances(owners, indices[block].ravel(), approximate.ravel()).reshape(-1, k)
        facts.append(fact)
    certificate = Certificate(
        facts[0].filter,
        sum(fact.candidates for fact in facts) / n_queries,
        max(fact.bound for fact in facts),
        sum(fact.searched_again for fact in facts),
        sum(fact.settled for fact in facts),
    )
    return distances, indices, certificate


@dataclass(slots=True)
class _Selected:
    """Candidates of a block of queries, ascending by their float64 values, and what is known of all other rows."""

    indices: Array
    values: Floats
    floor: Floats
    bound: float = 0.0
    form: str = ""


def _select(task: Task, block: slice, step: int, parts: list[slice], count: int, values: Values) -> _Selected:
    """Return the candidates of a block of queries from all parts of the corpus."""
    n_queries = block.stop - block.start
    best = _Selected(np.empty((n_queries, 0), np.int64), np.empty((n_queries, 0)), np.full(n_queries, np.inf))
    for part in parts:
        packed, n_rows = task.packed(part), part.stop - part.start
        indices, floor = np.empty((n_queries, min(count, n_rows)), np.int64), np.full(n_queries, np.inf)
        for some in slices(n_queries, step):
            rows = slice(block.start + some.start, block.start + some.stop)
            with limited_blas():
                found = task.engine.candidates(
                    task.native(rows), packed, indices.shape[1], task.space, task.budget_left
                )
            indices[some], best.form = task.engine.to_numpy(found.indices), found.form
            if indices.shape[1] < n_rows:
                floor[some] = found.floor
                error = float((found.last - found.floor).max())
                best.bound = max(best.bound, error if error >= 0 else math.inf)
        indices += part.start
        owners = np.repeat(np.arange(block.start, block.stop), indices.shape[1])
        _merge(best, indices, values.approximate(owners, indices.ravel()).reshape(indices.shape), floor, count, values)
    return best


def _merge(best: _Selected, indices: Array, approximate: Floats, floor: Floats, count: int, values: Values) -> None:
    """Take the candidates of one part of the corpus to those of the parts before it."""
    indices = np.concatenate([best.indices, indices], axis=1)
    approximate = np.concatenate([best.values, approximate], axis=1)
    order = np.lexsort((indices, approximate))
    indices, approximate = np.take_along_axis(indices, order, axis=1), np.take_along_axis(approximate, order, axis=1)
    best.floor = np.minimum(best.floor, floor)
    if indices.shape[1] > count:  # what is dropped here was left out as well
        best.floor = np.minimum(best.floor, values.interval(approximate[:, count:])[0].min(axis=1))
    best.indices, best.values = indices[:, :count], approximate[:, :count]


def _prove(selected: _Selected, block: slice, k: int, values: Values) -> tuple[Array, Floats, Certificate]:
    """Return the k nearest of a block of queries, their values in float64, and how they were proved."""
    indices, approximate = selected.indices[:, :k].copy(), selected.values[:, :k].copy()
    low, high = values.interval(selected.values)
    # Both written so that NaN proves nothing.
    is_whole = (high[:, k - 1] < selected.floor) & ~np.isnan(selected.values).any(axis=1)
    is_apart = (high[:, : min(k, high.shape[1] - 1)] < low[:, 1 : k + 1]).all(axis=1)
    n_candidates, n_settled = selected.indices.size, 0

    def settle(rows: Array, lists: list[Array], of_lists: list[Floats]) -> int:
        indices[rows], approximate[rows], n = values.first(rows + block.start, lists, of_lists, k)
        return n

    close = np.nonzero(is_whole & ~is_apart)[0]
    if len(close):
        near = low[close] <= high[close, k - 1 : k]
        lists = [selected.indices[row][kept] for row, kept in zip(close, near, strict=True)]
        of_lists = [selected.values[row][kept] for row, kept in zip(close, near, strict=True)]
        n_settled += settle(close, lists, of_lists)
    again = np.nonzero(~is_whole)[0]
    for some in slices(len(again), min(WIDE_QUERIES, values.group)):
        lists, of_lists = values.nearest(again[some] + block.start, k, selected.values[again[some], k - 1])
        n_settled += settle(again[some], lists, of_lists)
        n_candidates += sum(map(len, lists))
    return indices, approximate, Certificate(selected.form, n_candidates, selected.bound, len(again), n_settled)
