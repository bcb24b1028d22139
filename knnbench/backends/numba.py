"""numba on the CPU: vector instructions in tiles that fit the registers, on all cores."""

import functools
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from knnbench.blocking import block_shape, chunk_rows, slices
from knnbench.bounds import gram_floor
from knnbench.dtypes import Array
from knnbench.kernels.cpu_bytes import ByteKernels
from knnbench.kernels.cpu_filters import ByteFilter, KeyFilter, filters_of
from knnbench.kernels.cpu_linear import LinearKernels, Panels, linear_kernels
from knnbench.kernels.cpu_lists import MANY, list_room
from knnbench.kernels.cpu_rows import unit_rows
from knnbench.kernels.cpu_simd import LEVELS, cpu_features, simd_level
from knnbench.kernels.cpu_tiles import (
    Packing,
    TileKernels,
    Workspace,
    kept_rows,
    neighbours_of,
    tile_kernels,
)
from knnbench.metrics import Space
from knnbench.ordering import merge_topk
from knnbench.settings import LEVEL_VARIABLE, setting
from knnbench.threads import run_tasks, thread_count

from .base import Candidates, Capabilities, HostBackend, Native
from .linear import LinearLoss

__all__ = ["NumbaBackend"]

# If more than one in so many queries cannot be proved by what a filter keeps, another search for these takes less than
# float64 would.
DOUBTFUL_SHARE = 32

# Candidates of a proof beyond those that another filter keeps, where each takes several rows to be looked at: five more
# cost a tenth of a search, and with two fewer twice as many queries are searched again where rows are far from 0.
ROUNDED_SPARE = 2

# Queries a task at the most: so many that packing a corpus row is little against comparing it with all of them, and
# that the last task of a call, for which the other threads wait, is short.
TASK_QUERIES = 480

# From so many blocks of queries on, the corpus is packed once for all of them, and not by each: fewer do not make up
# for the memory, which has to be written and read, unless it stays in a cache.
SHARED_BLOCKS = 4
SHARED_BYTES = 1 << 20

# Searches that go without a filter at the most, once it settled nothing.
LONGEST_PAUSE = 63

# Up to so many queries, corpus rows are compared as they lie: packing a row takes as long as comparing it with a few.
FEW_QUERIES = 4

# What a feature of a pair takes of the ceilings of `knnbench.measure.ceilings`, by operation.
CEILINGS_OF: dict[str, dict[str, float]] = {
    "absolute-uint8": {"sad-uint8": 1},
    "absolute-uint8-dot": {"sad-uint8": 1},
    "product-int16": {"madd-int16": 1},
    "product-uint8": {"dot-uint8": 1},
    "product-uint8-dot": {"dot-uint8": 1},
    "product-uint8-matrix": {"matrix-uint8": 1},
    "digits-float32": {"matrix-uint8": 3},
    "digits-float64": {"matrix-uint8": 3},
}
for _dtype in ("float32", "float64"):
    CEILINGS_OF[f"product-{_dtype}"] = CEILINGS_OF[f"larger-{_dtype}"] = {f"fma-{_dtype}": 1}
    CEILINGS_OF[f"absolute-{_dtype}"] = CEILINGS_OF[f"square-{_dtype}"] = {f"add-{_dtype}": 1, f"fma-{_dtype}": 1}
    CEILINGS_OF[f"largest-{_dtype}"] = {f"add-{_dtype}": 1}

# What putting a pair into a list takes, in features of pairs that are computed meanwhile, and in features of corpus
# rows that are packed.
LIST_WORK = 1700
LIST_PACKED = 75

# What reading a byte of the corpus from memory takes, in the same.
READ_WORK = 3

# Features of all pairs of float32, below which a call ends before a second thread would have begun; those of uint8 take
# a fourth of the time, and those of float64 twice.
SMALL = 1 << 25

# The same for features of samples, times models and classes.
SMALL_LOSS = 1 << 23

# Tasks for each thread, where each does not have to pack the corpus: the fewer, the longer may all wait for the last.
TASKS = 2
LEAST_QUERIES = 64

# What a call costs beyond its models, in models, without and with a matrix unit (measured on MNIST).
PASS_COSTS = 0.4, 1.5

# Panels of samples whose losses are summed together: enough to hand them to a thread, few enough for all threads to end
# together.
LOSS_PANELS = 64

# Pairs of a block whose distances are finished while they are in the cache.
FINISHED_PAIRS = 1 << 17


@dataclass
class Pause:
    """How many searches do without a filter that settled nothing: twice as many each time, until it does."""

    length: int = 0
    left: int = 0

    def note(self, is_of_use: bool) -> None:
        """Take down how a search went."""
        self.length = 0 if is_of_use else min(LONGEST_PAUSE, max(1, 2 * self.length))
        self.left = self.length

    def is_over(self) -> bool:
        """Return whether the next search is to try, which is then told of it."""
        self.left -= 1
        return self.left < 0


@dataclass(frozen=True)
class TileCorpus:
    """Rows as the metric accumulates them, and packed for some kernels if they are kept for many calls."""

    rows: Array
    packing: Packing | None = None
    packed_for: TileKernels | None = None
    about: Array | None = None  # the centre, where it is not that of these rows
    _references: dict[Any, Any] = field(default_factory=dict)
    _pauses: dict[Any, Pause] = field(default_factory=lambda: defaultdict(Pause))

    def __len__(self) -> int:
        return len(self.rows)

    def pause(self, kernels: TileKernels) -> Pause:
        """Return that of a filter, on these rows."""
        return self._pauses[kernels.plan.layout]

    def has_reference(self, kernels: TileKernels) -> bool:
        """Return whether there is what these kernels pack rows relative to, if they need that."""
        return not isinstance(kernels, ByteKernels) or self.reference(kernels) is not None

    def packed(self, kernels: TileKernels) -> Packing | None:
        """Return the panels that these kernels take, if they are there."""
        return self.packing if self.packed_for and self.packed_for.plan.layout == kernels.plan.layout else None

    def reference(self, kernels: TileKernels) -> Any:
        """Return what rows are packed relative to, for some kernels."""
        layout = kernels.plan.layout
        if layout not in self._references:
            self._references[layout] = kernels.reference(self.rows, self.about)
        return self._references[layout]


AnyFilter = ByteFilter | KeyFilter


class NumbaBackend(HostBackend):
    """Search in tiles of registers, selection fused, a thread for each CPU.

    The kernels release the interpreter lock and run in Python's threads: unlike those of numba's own parallel
    loops, these do not spin, forbid forks or abort on concurrent calls.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(device="cpu", certifies=True)
    calls_blas: ClassVar[bool] = False

    def prepare(self, corpus: Native, space: Space) -> TileCorpus:
        """Return the prepared rows."""
        if not is_scaled(space):
            return TileCorpus(corpus)
        result = np.empty_like(corpus)
        parts = list(slices(len(corpus), chunk_rows(space.n_features)))
        run_tasks(lambda rows: unit_rows(corpus[rows], result[rows]), parts, thread_count())
        return TileCorpus(result)

    def prepare_about(self, corpus: Native, centre: Any, space: Space) -> TileCorpus:
        """Return the prepared rows, to be centred about a given point."""
        return replace(self.prepare(corpus, space), about=centre)

    def prepared_bytes(self, space: Space) -> int:
        """Return what a row of unit length takes; others are compared as they lie."""
        return prepared_bytes(space)

    def levels(self) -> tuple[str, ...]:
        """Return $KNNBENCH_SIMD, or all levels that this CPU has and the operating system allows."""
        best = simd_level()
        if setting(LEVEL_VARIABLE):
            return (best.name,)
        return tuple(n for n, level in LEVELS.items() if not level.lacks(cpu_features()) and level.is_allowed())

    def keep(self, prepared: TileCorpus, space: Space, budget: int) -> TileCorpus:
        """Return the rows with panels of them all, packed for the kernels that most searches take."""
        filters = (one.kernels(space) for one in filters_of(space) if one.pays(1, len(prepared)))
        return packed_within(budget, prepared, next(filter(prepared.has_reference, filters), tile_kernels(space)))

    def pairwise(self, queries: Native, prepared: TileCorpus, space: Space, budget: int) -> Native:
        """Return all distances."""
        kernels, n_corpus = tile_kernels(space), len(prepared)
        width = kernels.plan.panels.panel_rows
        result = np.empty((len(queries), n_corpus), space.output)
        # Values ranked in another dtype than they are answered in need an array between; a root makes two more.
        is_direct = space.ranked == space.output
        tasks = _Tasks(kernels, space, len(queries), n_corpus, budget, per_query=3 * 8)
        columns = max(1, min(n_corpus, FINISHED_PAIRS // tasks.queries, tasks.spare // (3 * 8 * tasks.queries)))
        columns -= columns % width if columns > width else 0
        packing = prepared.packed(kernels) if columns % width == 0 or columns == n_corpus else None

        def task(rows: slice) -> None:
            block = prepared_rows(queries[rows], space)
            work = kernels.workspace(len(block), space.n_features, packing=packing)
            for part in slices(n_corpus, columns):
                target = result[rows, part]
                values = target if is_direct else np.empty(target.shape, space.ranked)
                kernels.pairwise(block, prepared.rows, part.start, part.stop, *work, values)
                finished = space.finish(values)
                if finished is not target:
                    target[...] = finished

        run_tasks(task, tasks.blocks, tasks.threads)
        return result

    def knn(self, queries: Native, prepared: TileCorpus, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest."""
        filters = _filters(queries, prepared, k, space)
        return self._search(queries, prepared, k, space, budget, [*filters, None])

    def spare(self, k: int, n_queries: int, space: Space) -> int:
        """Return one for largest differences that are ranked by float64: the next is farther, or ties exactly; for
        squares as many as their filter has room for; few where several rows are looked at for each."""
        if ranks_exactly(n_queries, space):
            return 1
        first, kept = next(iter(filters_of(space)), None), kept_rows(k, sys.maxsize)
        if isinstance(first, ByteFilter):
            return kept - k + ROUNDED_SPARE
        is_kept = space.form.from_dot is not None and first is not None
        return list_room(kept, sys.maxsize) - k if is_kept else super().spare(k, n_queries, space)

    def candidates(self, queries: Native, prepared: TileCorpus, count: int, space: Space, budget: int) -> Candidates:
        """Return what a filter of squares keeps, and for largest differences the nearest of exact arithmetic, as the
        kernels rank them; otherwise what `knn` proves."""
        if ranks_exactly(len(queries), space):
            search = _Direct(tile_kernels(space, exact=True), space)
            values, indices, is_sure = self._run(queries, prepared, count, space, budget, search)
            last = values[:, -1]
            # Where the kernel's own values overflow they tell nothing apart.
            is_finite = last <= float(np.finfo(space.dtype).max)
            floor = np.where(is_finite, np.nextafter(last, -np.inf), -np.inf)
            return Candidates(indices, floor, last, f"{space.dtype} differences", is_sure & is_finite)
        first = next(iter(_filters(queries, prepared, count, space)), None)
        if not isinstance(first, KeyFilter) or space.form.from_dot is None or count >= MANY:
            return super().candidates(queries, prepared, count, space, budget)
        keeping = _Keeping(first, space, len(queries))
        values, indices, are_known = self._run(queries, prepared, count, space, budget, keeping)
        last = values[:, -1]
        del values
        floor = np.where(are_known, keeping.floor(last), -np.inf)
        # Nothing will be proved where a neighbour's own value is not below the floor.
        reach = values_of(queries, prepared, indices[:, neighbours_of(count) - 1], space)
        doubtful = np.flatnonzero(~(reach < floor))
        if len(doubtful) == len(queries):
            del indices
            return super().candidates(queries, prepared, count, space, budget)
        if DOUBTFUL_SHARE * len(doubtful) > len(queries):
            found = super().candidates(queries[doubtful], prepared, count, space, budget)
            indices[doubtful], floor[doubtful], last[doubtful] = found.indices, found.floor, found.last
        return Candidates(indices, floor, last, keeping.form)

    def _search(
        self, queries: Native, prepared: TileCorpus, k: int, space: Space, budget: int, steps: list[AnyFilter | None]
    ) -> tuple[Array, Array]:
        """Return the k nearest by the first of some filters, of queries that it leaves in doubt by those after it; the
        last is none."""
        search = search_by(steps[0], space)
        values, indices, is_sure = self._run(queries, prepared, k, space, budget, search)
        left: Array = np.flatnonzero(~is_sure)
        prepared.pause(search.kernels).note(len(left) < len(queries))
        if len(left) == len(queries):
            del values, indices
            return self._search(queries, prepared, k, space, budget, steps[1:])
        held = space.n_features * space.dtype.itemsize + k * (values.itemsize + indices.itemsize)
        for some in slices(len(left), max(1, budget // 4 // held)):
            rows = left[some]
            found = self._search(queries[rows], prepared, k, space, budget - budget // 4, steps[1:])
            values[rows], indices[rows] = found
        return values, indices

    def _run(
        self, queries: Native, prepared: TileCorpus, k: int, space: Space, budget: int, search: "_Search"
    ) -> tuple[Array, Array, Array]:
        """Return values to rank and indices of k rows, and of which queries they are sure."""
        kernels, n_queries, n_corpus = search.kernels, len(queries), len(prepared)
        tasks = _Tasks(kernels, space, n_queries, n_corpus, budget, k=k)
        if tasks.share_panels(kernels.packing_bytes(n_corpus, space.n_features)) and not prepared.packed(kernels):
            prepared = packed_within(budget // 2, prepared, kernels)
            if prepared.packed(kernels):
                left = budget - kernels.packing_bytes(n_corpus, space.n_features)
                tasks = _Tasks(kernels, space, n_queries, n_corpus, left, k=k)
        if not prepared.packed(kernels):
            prepared.reference(kernels)  # found once, not by every thread
        shapes = [(n_queries, min(k, part.stop - part.start)) for part in tasks.parts]
        found = [(np.empty(shape, search.ranked), np.empty(shape, np.int64)) for shape in shapes]
        is_sure = np.ones((len(shapes), n_queries), bool)

        def task(piece: tuple[slice, int]) -> None:
            rows, number = piece
            ranked, nearest = found[number]
            block = prepared_rows(queries[rows], space)
            part = tasks.parts[number]
            is_sure[number, rows] = search(prepared, rows, block, part, ranked[rows], nearest[rows])

        run_tasks(task, [(rows, n) for rows in tasks.blocks for n in range(len(found))], tasks.threads)
        values, indices = functools.reduce(lambda a, b: merge_topk(a, b, k), found)
        return values, indices, np.logical_and.reduce(is_sure)

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return the losses of `Backend.linear_loss`, which holds the samples a second time, in `Panels`.

        Bytes are multiplied by float32 on a matrix unit, if there is one: exactly, with weights that are rounded to 22
        bits of the largest of their class.
        """
        return _LinearLoss(X, y, sample_weight, dtype)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return the instruction of the kernel's inner loop, where one is known to bind it."""
        first = next(iter(filters_of(space)), None) if op == "knn" else None
        kernels = first.kernels(space) if first else tile_kernels(space)
        return CEILINGS_OF.get(kernels.plan.panels.operation.name, {})


def _filters(queries: Array, prepared: TileCorpus, k: int, space: Space) -> tuple[AnyFilter, ...]:
    """Return what filters distances, if anything does: not if most rows are wanted anyway, nor for few pairs, unless
    the corpus was packed for it before; nor what told nothing of this corpus lately."""
    n_queries, n_corpus = len(queries), len(prepared)
    is_few, work = are_few(n_queries, space), n_queries * n_corpus * space.n_features

    def serves(one: AnyFilter) -> bool:
        if prepared.packed_for is not None and prepared.packed(one.kernels(space)):
            # Memory brings packed bytes sooner than rows as they lie, by more than a tile wastes that is nearly empty.
            return isinstance(one, ByteFilter) or not is_few
        return not is_few and work >= one.least_work and prepared.has_reference(one.kernels(space))

    found = tuple(one for one in filters_of(space) if one.pays(k, n_corpus) and serves(one))
    return tuple(one for one in found if prepared.pause(one.kernels(space)).is_over())


def values_of(queries: Array, prepared: TileCorpus, nearest: Array, space: Space) -> Array:
    """Return the values by the direct form of queries and one corpus row of each."""
    kernels, n_queries = tile_kernels(space), len(queries)
    values, nearest = np.empty((n_queries, 1), kernels.ranked), np.ascontiguousarray(nearest)[:, None]

    def task(rows: slice) -> None:
        block, lists = prepared_rows(queries[rows], space), (values[rows], nearest[rows], np.ones(n_queries, np.int64))
        kernels.order(block, prepared.rows, kernels.few(1)[1], 1, *lists, values[rows], nearest[rows])

    run_tasks(task, list(slices(n_queries, TASK_QUERIES)), thread_count())
    return values[:, 0]


def are_few(n_queries: int, space: Space) -> bool:
    """Return whether corpus rows are compared with these as they lie."""
    return n_queries <= FEW_QUERIES and space.n_features >= tile_kernels(space).plan.rows.features


class _Search(ABC):
    """Searching a part of a corpus for a block of queries, in any thread.

    Attributes
    ----------
    kernels : TileKernels
    space : Space
    ranked : numpy.dtype
        Of the values that it ranks.
    """

    def __init__(self, kernels: TileKernels, space: Space) -> None:
        self.kernels, self.space, self.ranked = kernels, space, kernels.ranked

    @abstractmethod
    def __call__(
        self, prepared: TileCorpus, rows: slice, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool:
        """Fill (n_queries, k) arrays with values and indices of k rows; return of which queries they are sure.

        `rows` are the numbers of the queries, `block` these as the metric accumulates them.
        """


class _Direct(_Search):
    """By the direct form: the k nearest. Exact kernels are sure of those of which no value was rounded that decides."""

    def __call__(
        self, prepared: TileCorpus, rows: slice, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool:
        kernels, corpus, (n_queries, k) = self.kernels, prepared.rows, ranked.shape
        lists = kernels.lists(n_queries, k, part.stop - part.start)
        if are_few(n_queries, self.space) and not kernels.plan.is_exact:
            norms, row = kernels.few(n_queries)
            kernels.knn_rows(block, corpus, part.start, part.stop, norms, row, k, *lists)
            kernels.order(block, corpus, row, k, *lists, ranked, nearest)
            return True
        work = kernels.workspace(n_queries, self.space.n_features, packing=prepared.packed(kernels))
        kernels.knn(block, corpus, part.start, part.stop, *work, k, *lists)
        kernels.order(block, corpus, work.values, k, *lists, ranked, nearest)
        is_sure: Array = work.sums[:n_queries] == 0
        return is_sure


class _Proving(_Search):
    """By a filter: the k nearest by the direct form, where that is proved."""

    def __init__(self, kernels: TileKernels, space: Space) -> None:
        super().__init__(kernels, space)
        self._gives_up = False

    def __call__(
        self, prepared: TileCorpus, rows: slice, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool:
        if self._gives_up:
            return False
        is_sure = self._found(prepared, block, part, ranked, nearest)
        if is_sure is not None:
            return is_sure
        are_finite = np.isfinite(block).all(axis=1)
        if are_finite.all():
            self._gives_up = True  # for other queries, too
        if are_finite.all() or not are_finite.any():
            return False
        are_sure, some = np.zeros(len(block), bool), (ranked[are_finite], nearest[are_finite])
        are_sure[are_finite] = self(prepared, rows, block[are_finite], part, *some)
        ranked[are_finite], nearest[are_finite] = some
        return are_sure

    @abstractmethod
    def _found(
        self, prepared: TileCorpus, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool | None:
        """Do it; return None where the filter gives up, as it does if a query is not finite."""


class _Filtered(_Proving):
    """By keys whose error is declared."""

    def __init__(self, kernels: TileKernels, space: Space, error: float) -> None:
        super().__init__(kernels, space)
        self._error = error

    def _found(
        self, prepared: TileCorpus, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool | None:
        kernels, (n_queries, k), n_rows = self.kernels, ranked.shape, part.stop - part.start
        found = kept_by(kernels, prepared, block, part, kept_rows(k, n_rows))
        if found is None:
            return None
        work, lists = found
        in_doubt = np.ones(n_queries, np.bool_)
        kernels.prove(
            block, prepared.rows, n_rows, self._error, work.query_norms, work.sums, work.values, k,
            kept_rows(k, n_rows), *lists, ranked, nearest, in_doubt,
        )  # fmt: skip
        # Rows that are so close to each other are so for other queries too.
        self._gives_up |= 2 * np.count_nonzero(in_doubt) > n_queries
        return ~in_doubt


class _Rounded(_Proving):
    """By bytes that stand for rows."""

    def _found(
        self, prepared: TileCorpus, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool | None:
        kernels, (n_queries, k), packing = self.kernels, ranked.shape, prepared.packed(self.kernels)
        grid = None if packing else prepared.reference(kernels)
        lists = kernels.lists(n_queries, k, part.stop - part.start)
        work = kernels.workspace(n_queries, self.space.n_features, grid, packing)
        if not kernels.knn(block, prepared.rows, part.start, part.stop, *work, k, *lists):
            return None
        kernels.order(block, prepared.rows, work.scratch, k, *lists, ranked, nearest)
        return True


def search_by(found: AnyFilter | None, space: Space) -> _Search:
    """Return the search by a filter, or without any."""
    if found is None:
        return _Direct(tile_kernels(space), space)
    if isinstance(found, ByteFilter):
        return _Rounded(found.kernels(space), space)
    return _Filtered(found.kernels(space), space, found.error(space))


class _Keeping(_Search):
    """By a filter of squares: the rows that it keeps, with its own values; sure where no norm overflows."""

    def __init__(self, found: KeyFilter, space: Space, n_queries: int) -> None:
        super().__init__(found.kernels(space), space)
        self.ranked, self._found, self._norms = np.dtype(np.float64), found, np.zeros(n_queries)

    def __call__(
        self, prepared: TileCorpus, rows: slice, block: Array, part: slice, ranked: Array, nearest: Array
    ) -> Array | bool:
        n_queries, k = ranked.shape
        found = kept_by(self.kernels, prepared, block, part, k)
        if found is None:
            ranked[:], nearest[:] = math.inf, part.start + np.arange(k)  # rows that there are
            return False
        work, (keys, indices, _) = found
        self._norms[rows] = norms = work.query_norms[:n_queries]
        np.add(keys[:, :k], norms[:, None], out=ranked, dtype=np.float64)
        nearest[:] = indices[:, :k]
        return True

    @property
    def form(self) -> str:
        """What is computed, for people."""
        return f"{self.space.dtype} products" if self._found.key == "gram" else f"{self.space.dtype} as bytes"

    def floor(self, last: Array) -> Array:
        """Return below which value no row can be that is not kept, from the largest that is."""
        return gram_floor(
            self.space, last, self._norms, 0.0, self._found.exact_error(self.space), self.kernels.key_dtype
        )


def kept_by(
    kernels: TileKernels, prepared: TileCorpus, block: Array, part: slice, kept: int
) -> tuple[Workspace, tuple[Array, Array, Array]] | None:
    """Return the lists of so many rows with the smallest keys, and the workspace; None where norms could overflow."""
    n_queries, panels = len(block), prepared.packed(kernels)
    lists = kernels.lists(n_queries, kept, part.stop - part.start)
    work = kernels.workspace(n_queries, block.shape[1], prepared.reference(kernels) if panels is None else None, panels)
    is_found = kernels.knn(block, prepared.rows, part.start, part.stop, *work, kept, *lists)
    return (work, lists) if is_found else None


class _Tasks:
    """How a call is cut into tasks: blocks of queries, and parts of the corpus.

    Attributes
    ----------
    queries : int
        Of a block at the most.
    blocks, parts : list of slice
    threads : int
    spare : int
        Bytes of the budget that a task leaves.
    """

    def __init__(
        self, kernels: TileKernels, space: Space, n_queries: int, n_corpus: int, budget: int, *, k: int = 0,
        per_query: int = 0,
    ) -> None:  # fmt: skip
        height = kernels.plan.panels.tile_shape[0]
        per_tile, fixed = kernels.workspace_bytes(space.n_features)
        per_query += 16 * list_room(kept_rows(k, n_corpus), n_corpus) + prepared_bytes(space)
        per_tile, fixed = 2 * per_tile + height * per_query, 2 * fixed  # twice: filtered, and direct
        in_lists = k * (1 + math.log(n_corpus / k)) if k else 0.0  # of rows in any order
        n_bytes = n_corpus * space.n_features * space.dtype.itemsize
        work = n_queries * (n_bytes / 4 + LIST_WORK * in_lists) + READ_WORK * n_bytes
        threads = 1 if work < SMALL else max(1, min(thread_count(), budget // (fixed + per_tile)))
        # Threads share the queries, and each packs the whole corpus; or the corpus, and each keeps lists of its own,
        # which are merged, with some copies.
        in_parts = n_queries < 2 * threads * TASK_QUERIES and 8 * k * threads <= n_corpus
        in_parts &= n_queries * k * LIST_PACKED < n_corpus * space.n_features
        in_parts &= 0 < 8 * threads * n_queries * k * 16 <= budget // 2
        step = -(-n_corpus // threads)
        self.parts = list(slices(n_corpus, step + -step % kernels.plan.panels.panel_rows if in_parts else n_corpus))
        share = (budget // 2 if in_parts else budget) // threads
        each = n_queries if in_parts else -(-n_queries // threads)
        if not in_parts and threads > 1:
            each = min(each, max(LEAST_QUERIES, -(-n_queries // (threads * TASKS))))
        tiles, _ = block_shape(
            -(-min(each, TASK_QUERIES) // height),
            1,
            budget=share,
            per_pair=per_tile,
            per_corpus=fixed,
            max_queries=n_queries,
        )
        self.queries, self.threads, self.spare = tiles * height, threads, share - fixed - tiles * per_tile
        self.blocks = list(slices(n_queries, self.queries))

    def share_panels(self, n_bytes: int) -> bool:
        """Return whether blocks should share panels of the whole corpus that take so many bytes."""
        return len(self.blocks) >= (2 if n_bytes <= SHARED_BYTES else SHARED_BLOCKS)


def ranks_exactly(n_queries: int, space: Space) -> bool:
    """Return whether candidates are ranked by float64: largest differences, and more queries than are taken singly."""
    return space.form.reduce is max and n_queries > FEW_QUERIES


class _LinearLoss(LinearLoss):
    """Losses by the fused kernel.

    Pieces of some chunks of panels are tasks of threads. The losses of chunks are added in their order, so that the sum
    is the same whatever threads there are and whatever models are computed together.
    """

    def __init__(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._kernels = kernels = linear_kernels(X.dtype, dtype, X.shape[1], int(y.max()) + 1)
        n_panels = -(-len(X) // kernels.width)
        self._size, chunks = LOSS_PANELS, list(slices(n_panels, LOSS_PANELS))
        self.pass_cost = PASS_COSTS[kernels.form.operation.is_matrix]
        self._work = X.size
        self._rooms: dict[tuple[int, int], list[Any]] = defaultdict(list)
        # Features that are 0 in one sample of a class are more often 0 in the others too, and left out.
        order = np.argsort(y, kind="stable")
        self._panels, self._columns = packed(X, order, kernels)
        # Multiply-adds of a model and a class in each chunk.
        starts, of_row = self._panels.starts, kernels.width * kernels.depth * kernels.parts
        self._products = [int(starts[part.stop] - starts[part.start]) * of_row for part in chunks]
        # Samples past the last have no weight.
        self._labels, self._sample_weight = (
            np.zeros(n_panels * kernels.width, np.int64),
            np.zeros(n_panels * kernels.width),
        )
        self._labels[: len(y)], self._sample_weight[: len(y)] = y[order], sample_weight[order]

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        kernels, (n_models, _, n_classes) = self._kernels, W.shape
        models = kernels.coded(W, b.astype(np.float64), self._columns)
        # The order in which running sums take chunks is that of threads, so they round otherwise than the sum.
        stop = limit * (1 + 4 * len(self._products) * np.finfo(np.float64).eps)
        sums, running, lock = np.zeros((len(self._products), n_models)), np.zeros(n_models), threading.Lock()

        def task(piece: slice) -> None:
            with lock:
                wanted = np.flatnonzero(running <= stop)
            if not len(wanted):
                return
            rooms, part = self._rooms[n_models, n_classes], sums[piece]
            try:
                room = rooms.pop()
            except IndexError:  # of all that there are, another thread uses one
                room = kernels.workspace(n_models, n_classes)
            kernels.losses(
                *self._panels, piece.start, self._size, self._labels, self._sample_weight, *models, wanted, *room, part
            )  # fmt: skip
            rooms.append(room)
            with lock:
                running.__iadd__(part.sum(axis=0))
                self.operations[kernels.operation] += n_classes * len(wanted) * sum(self._products[piece])

        threads = thread_count() if self._work * n_models * n_classes >= SMALL_LOSS else 1
        run_tasks(task, self._pieces(threads), threads)
        # Not numpy's sum, which adds in an order that depends on the shape.
        losses = np.add.accumulate(sums)[-1]
        return np.where((running <= stop) & (losses <= limit), losses, math.inf)

    def _pieces(self, threads: int) -> Iterator[slice]:
        """Return chunks in pieces that become smaller, so that all threads end together."""
        start = 0
        while left := len(self._products) - start:
            stop = start + max(1, left // (2 * threads))
            yield slice(start, stop)
            start = stop


def packed_within(budget: int, prepared: TileCorpus, kernels: TileKernels) -> TileCorpus:
    """Return rows with panels of them all, packed for some kernels; as they are if that takes more than the budget."""
    rows, n_features = prepared.rows, prepared.rows.shape[1]
    if kernels.packing_bytes(len(rows), n_features) > budget:
        return prepared
    packing = kernels.packing(len(rows), n_features, prepared.reference(kernels))
    parts = list(slices(len(packing.panels), chunk_rows(packing.panels.shape[1])))
    run_tasks(lambda part: kernels.pack(rows, part.start, part.stop, *packing), parts, thread_count())
    return replace(prepared, packing=packing, packed_for=kernels)


def packed(X: Array, order: Array, kernels: LinearKernels) -> tuple[Panels, Array]:
    """Return the panels of samples, which are taken in an order of the rows, and the order of their features."""
    n_panels, depth = -(-len(X) // kernels.width), kernels.depth
    threads = thread_count() if X.size >= SMALL_LOSS else 1
    parts = list(slices(n_panels, LOSS_PANELS))
    kept = np.zeros((n_panels, X.shape[1]), np.bool_)
    run_tasks(lambda part: kernels.mark(X, order, part.start, part.stop, kept), parts, threads)
    # Those that most panels need come together, so that steps of them can be left out as well.
    counts = kept.sum(axis=0)
    used = np.argsort(-counts, kind="stable")[: max(1, np.count_nonzero(counts))]
    columns = used if depth > 1 else np.arange(len(counts))
    # What is in excess meets weights of 0.
    taken = np.pad(columns, (0, -len(columns) % depth), mode="edge").astype(np.uint32)
    needed = np.logical_or.reduce(kept[:, taken].reshape(n_panels, -1, depth), axis=2)
    needed[:, 0] = True  # a loop of no steps would need a kernel of its own
    starts = np.concatenate([[0], needed.sum(axis=1).cumsum()])
    steps = np.nonzero(needed)[1].astype(np.uint32)  # numba looks for negative indices of others
    values = kernels.packing(len(steps), X.dtype)
    run_tasks(lambda part: kernels.fill(X, order, taken, part.start, part.stop, values, steps, starts), parts, threads)
    return Panels(values, steps, starts), columns


def is_scaled(space: Space) -> bool:
    """Return whether rows are brought to unit length before they are compared."""
    return space.metric.unit_rows and not space.is_integer


def prepared_rows(rows: Array, space: Space) -> Array:
    """Return rows as the metric accumulates them."""
    if not is_scaled(space):
        return rows
    result = np.empty_like(rows)
    unit_rows(rows, result)
    return result


def prepared_bytes(space: Space) -> int:
    """Return what is held to prepare one row."""
    return space.dtype.itemsize * space.n_features if is_scaled(space) else 0
