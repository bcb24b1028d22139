"""The neighbours of exact arithmetic on floats, proved: ``accuracy="exact"``.

0. Rows so large or small that squares could leave the range are multiplied by a power of two, where that is exact.
1. The backend's fast search gives a few more candidates than are asked for, and a floor that the exact value of no
   other row is below (`knnbench.backends.base.Candidates`).
2. The values of the candidates are computed in float64, each within a known interval of the exact one
   (`knnbench.bounds`). Where the first k intervals are apart from one another and from the next, and all below the
   floor, the answer is proved. That is the rule, and costs little. Nothing is left to prove where the backend's
   arithmetic was exact (`Candidates.is_sure`).
3. Queries of which it is not so are searched again in float64, by the direct form; what its own bound cannot exclude is
   kept.
4. What float64 cannot put in order is put in order by exact arithmetic (`knnbench.exact_values`). Of equal values the
   smaller index comes first.

Of a corpus in blocks, each is searched so, and gives its neighbours with their exact values, by which lists are merged;
but for those that are farther, for certain, than as many as are asked for of the blocks before.

Bad data for a bound only ever send more queries to the slower steps.

References
----------
Filters before exact arithmetic are usual in computational geometry: J. R. Shewchuk, Adaptive precision floating-point
arithmetic and fast robust geometric predicates, Discrete & Computational Geometry 18 (1997), 305-363.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from knnbench import interchange
from knnbench.backends.base import Backend, Native
from knnbench.blocking import block_shape, chunk_rows, slices
from knnbench.bounds import Floats
from knnbench.dtypes import Array
from knnbench.exact_values import Values, degree
from knnbench.metrics import Space
from knnbench.ordering import MISSING
from knnbench.threads import limited_blas
from knnbench.underflow import gradual_underflow

__all__ = ["Certificate", "joined", "search", "search_rows"]

# Bytes held for a candidate: index and value, and both once more while they are sorted.
CANDIDATE_BYTES = 120

# Rows that show how large all may be.
SAMPLE = 256

# Queries that are searched again together, so that a corpus row is read once for all of them.
WIDE_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Certificate:
    """How an exact answer was proved.

    Of a corpus that was searched in blocks, what is counted is the sum over all blocks.

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


def joined(certificates: Iterable[tuple[Certificate, float]]) -> Certificate:
    """Return the certificate of an answer that was found in pieces, each with its share of the queries."""
    pieces, shares = zip(*certificates, strict=True)
    return Certificate(
        pieces[0].filter,
        sum(piece.candidates * share for piece, share in zip(pieces, shares, strict=True)),
        max(piece.bound for piece in pieces),
        sum(piece.searched_again for piece in pieces),
        sum(piece.settled for piece in pieces),
    )


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
    return _search(task, k, Values.distances)


def search_rows(
    engine: Backend, space: Space, queries: Any, rows: Any, k: int, budget: int, reach: Floats
) -> tuple[Array, Array, Certificate]:
    """Return exact values and indices of the k nearest of some rows of a corpus: lists that can be merged.

    Rows that are certain to lie farther than so many of other blocks are left out, and their exact values not made.

    Parameters
    ----------
    engine : Backend
        With `Capabilities.certifies`.
    space : Space
        Of floats.
    queries, rows : (n, n_features) arrays
    k : int
    budget : int
        Bytes.
    reach : (n_queries, wanted) array of float64
        How far the nearest of the blocks before reach at the most, as many as are wanted of all blocks together,
        infinite where there were fewer; changed to those of this block too.

    Returns
    -------
    strings : (n_queries, k) array of bytes
        By `knnbench.exact_values.Values.strings`, which `knnbench.exact_values.distances_of` takes.
    indices : (n_queries, k) array of int64
        `MISSING` in place of a row that is left out.
    certificate : Certificate
    """
    limit, ends, kept = reach.max(axis=1), [], []

    def strings(values: Values, i: Array, j: Array, approximate: Floats) -> Array:
        low, high = values.ends(approximate)
        near = ~(low > limit[i])
        ends.append(high)
        kept.append(near)
        found = values.strings(i[near], j[near])
        result = np.zeros(len(i), found.dtype)
        result[near] = found
        return result

    found, indices, certificate = _search(_Rows(engine, space, queries, _Corpus(rows), budget), k, strings)
    indices[~np.concatenate(kept).reshape(indices.shape)] = MISSING
    wanted, high = reach.shape[1], np.concatenate(ends).reshape(indices.shape)
    reach[:] = np.partition(np.concatenate([reach, high], axis=1), wanted - 1, axis=1)[:, :wanted]
    return found, indices, certificate


# Takes values, queries, corpus rows and the values in float64, and gives what is answered for these pairs.
Answer = Callable[[Values, Array, Array, Floats], Array]


def _search(task: Task, k: int, answer: Answer) -> tuple[Array, Array, Certificate]:
    with gradual_underflow() as was_flushed:
        # Other threads may go on flushing. All bounds hold for that, except of unit length: scaling loses what was
        # flushed.
        return _nearest(task, k, answer, trusts_filter=not (was_flushed and task.space.metric.unit_rows))


def _nearest(task: Task, k: int, answer: Answer, *, trusts_filter: bool) -> tuple[Array, Array, Certificate]:
    n_queries, n_corpus = len(task.queries), task.prepared.shape[0]
    count = min(k + task.engine.spare(k, n_queries, task.space), n_corpus)
    blocks, parts = task.query_blocks(16 * count), task.corpus_parts()
    task, exponent = _in_range(task)
    share = task.budget_left // 4
    task.budget_left -= share
    step, _ = block_shape(n_queries, 1, budget=share // 2, per_pair=CANDIDATE_BYTES * count, max_queries=n_queries)
    values = Values(task.space, task.queries, task.prepared.rows, share // 2, exponent)
    answers, indices, facts = [], np.empty((n_queries, k), np.int64), []
    for block in slices(n_queries, step):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # where it happens, nothing is proved by it
            selected = _select(task, block, blocks[0].stop, parts, count, values)
        if not trusts_filter:
            selected.floor[:] = -np.inf
        indices[block], approximate, fact = _prove(selected, block, k, values)
        owners = np.repeat(np.arange(block.start, block.stop), k)
        answers.append(answer(values, owners, indices[block].ravel(), approximate.ravel()))
        facts.append((fact, 1 / n_queries))
    return np.concatenate(answers).reshape(-1, k), indices, joined(facts)


@dataclass(slots=True)
class _Corpus:
    rows: Any

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and their length."""
        return len(self.rows), self.rows.shape[1]


@dataclass(slots=True)
class _Rows:
    """A task on rows that are packed for it."""

    engine: Backend
    space: Space
    queries: Any
    prepared: _Corpus
    budget_left: int

    def query_blocks(self, answer_bytes: int) -> list[slice]:
        """Return one block."""
        return [slice(0, len(self.queries))]

    def corpus_parts(self) -> list[slice]:
        """Return one part."""
        return [slice(0, len(self.prepared.rows))]

    def native(self, block: slice) -> Native:
        """Return a block of queries as the backend's own array."""
        return self.engine.to_native(self.queries[block], self.space.dtype)

    def packed(self, part: slice) -> Any:
        """Return a part of the corpus in the backend's own form."""
        return self.engine.prepare(self.engine.to_native(self.prepared.rows[part], self.space.dtype), self.space)


def _in_range(task: Task) -> tuple[Task, int]:
    """Return a task on rows so scaled that no square leaves the range of the dtype, and the power of two by which its
    values are those of the rows as given; the same task where scaling changes nothing.

    The power of two is chosen by some rows; if it is not exact for all, or the budget too small for the copies, the
    task is left to the slower steps.
    """
    limit = int(np.finfo(task.space.dtype).maxexp) // 3
    given = task.queries, task.prepared.rows
    largest = max(float(np.abs(interchange.to_host(rows[:SAMPLE]).astype(task.space.dtype)).max()) for rows in given)
    exponent = math.frexp(largest)[1]
    n_bytes = sum(len(rows) for rows in given) * task.space.n_features * task.space.dtype.itemsize
    is_needed = abs(exponent) > limit and 0 < largest < math.inf and not task.space.metric.unit_rows
    if not is_needed or n_bytes > task.budget_left // 2:
        return task, 0
    # A power of two above the range would be needed for the smallest numbers; a smaller one will do.
    power = max(-3 * limit + 8, min(3 * limit - 8, -exponent))
    queries, corpus = (_times(rows, math.ldexp(1.0, power), 2.0**limit, task.space) for rows in given)
    if queries is None or corpus is None:
        return task, 0
    scaled = _Rows(task.engine, task.space, queries, _Corpus(corpus), task.budget_left - n_bytes)
    return scaled, -power * degree(task.space.form.accumulate)


def _times(rows: Any, scale: float, most: float, space: Space) -> Array | None:
    """Return rows on the host multiplied by a power of two, None if that is not exact or one becomes too large."""
    host, factor = interchange.to_host(rows), space.dtype.type(scale)
    result: Array = np.empty(host.shape, space.dtype)
    for part in slices(len(host), chunk_rows(space.n_features)):
        with np.errstate(over="ignore", under="ignore"):
            given = host[part].astype(space.dtype, copy=False)
            np.multiply(given, factor, out=result[part])
            # What is lifted keeps all its digits.
            is_exact = scale > 1 or bool((result[part] / factor == given).all())
        if not is_exact or not np.abs(result[part]).max() <= most:
            return None
    return result


@dataclass(slots=True)
class _Selected:
    """Candidates of a block of queries, ascending by their float64 values, and what is known of all other rows."""

    indices: Array
    values: Floats
    floor: Floats
    is_sure: Array
    bound: float = 0.0
    form: str = ""


def _select(task: Task, block: slice, step: int, parts: list[slice], count: int, values: Values) -> _Selected:
    """Return the candidates of a block of queries from all parts of the corpus."""
    n_queries = block.stop - block.start
    best = _Selected(
        np.empty((n_queries, 0), np.int64),
        np.empty((n_queries, 0)),
        np.full(n_queries, np.inf),
        np.ones(n_queries, bool),
    )
    for part in parts:
        packed, n_rows = task.packed(part), part.stop - part.start
        indices, floor = np.empty((n_queries, min(count, n_rows)), np.int64), np.full(n_queries, np.inf)
        for some in slices(n_queries, step):
            rows = slice(block.start + some.start, block.start + some.stop)
            with limited_blas(task.engine.calls_blas):
                found = task.engine.candidates(
                    task.native(rows), packed, indices.shape[1], task.space, task.budget_left
                )
            indices[some], best.form = task.engine.to_numpy(found.indices), found.form
            best.is_sure[some] &= False if found.is_sure is None else found.is_sure
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
    # Most are in order already where there is one part: only what the backend rounded is not.
    rows = np.nonzero(~(approximate[:, 1:] > approximate[:, :-1]).all(axis=1))[0]
    order = np.lexsort((indices[rows], approximate[rows]))
    for array in (indices, approximate):
        array[rows] = np.take_along_axis(array[rows], order, axis=1)
    best.floor = np.minimum(best.floor, floor)
    if indices.shape[1] > count:  # what is dropped here was left out as well
        best.floor = np.minimum(best.floor, values.interval(approximate[:, count:])[0].min(axis=1))
    best.indices, best.values = indices[:, :count], approximate[:, :count]


def _prove(selected: _Selected, block: slice, k: int, values: Values) -> tuple[Array, Floats, Certificate]:
    """Return the k nearest of a block of queries, their values in float64, and how they were proved."""
    indices, approximate = selected.indices[:, :k].copy(), selected.values[:, :k].copy()
    low, high = values.interval(selected.values)
    # Both written so that NaN proves nothing.
    is_whole = (high[:, k - 1] < selected.floor) & ~np.isnan(selected.values).any(axis=1) | selected.is_sure
    is_apart = (high[:, : min(k, high.shape[1] - 1)] < low[:, 1 : k + 1]).all(axis=1) | selected.is_sure
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
