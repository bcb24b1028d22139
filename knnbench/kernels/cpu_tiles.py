"""Search kernels for the CPU: tiles of queries and corpus rows, with the k nearest selected as they are computed.

A task is a block of queries against a range of the corpus. `PanelKernels.knn` packs the queries once and one panel of
the corpus at a time, which stays in the first-level cache while all queries pass over it; the sums of a tile stay in
registers, are compared there with each query's k-th value so far, and are looked at one by one only if some are
smaller. No matrix of distances is written.

Squared distances are ranked by ``|c|^2 - 2 q.c``, a product. On uint8 that is exact. On floats it is a filter: a few
more rows than k are kept by it and computed once more by the direct form, and its declared error (`Space.gram_error`)
tells whether a row that was not kept could be among the k nearest. Queries for which it could are searched again by the
direct form, so that neighbours and distances are always those of the direct form. City block distances of floats have a
filter too, because

    sum(|q - c|) = 2 sum(max(q, c)) - sum(q) - sum(c)

takes two operations a feature where the direct form takes three; its error is `Space.larger_error`.

Largest differences of floats can be ranked exactly (`Plan.is_exact`): rounding to nearest never reverses the order of
two numbers, so that a row whose rounded value is above that of the k-th nearest is farther. The others, which are ties
mostly, are compared once more in float64, where a difference of two numbers is exact or is seen not to be; and so on:
what is left out is not below the k-th value in float64.

Faster filters are tried before these: `knnbench.kernels.cpu_bytes` and `knnbench.kernels.cpu_digits`.

Few queries are compared with rows as they lie (`PanelKernels.knn_rows`), because packing would cost more than it saves.

The naive form of all kernels is `knnbench.backends.python`.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import register_jitable

from knnbench.dtypes import Array, finite_mean
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_digits import digit_kernels, scratch_elements
from knnbench.kernels.cpu_lists import MANY, insert, list_room
from knnbench.kernels.cpu_loops import (
    column_dtype,
    move,
    move_square,
    row_values,
    rows_beyond,
    set_up,
    tear_down,
    tile,
    trailing_zeros,
)
from knnbench.kernels.cpu_simd import (
    CENTRE,
    LEVEL_VARIABLE,
    LEVELS,
    NARROW,
    OPERATIONS,
    Level,
    Vectors,
    cpu_features,
    simd_level,
    vectors_of,
)
from knnbench.kernels.expansions import two_sum
from knnbench.kernels.heap import keep_smallest, make_heap, sort_heap, sort_nearly
from knnbench.metrics import METRICS, Space, add_absolute, add_product, add_square, keep_largest
from knnbench.settings import setting

__all__ = [
    "Filter",
    "Packing",
    "Plan",
    "TileKernels",
    "Workspace",
    "kept_rows",
    "level_in_use",
    "neighbours_of",
    "plan_of",
    "tile_kernels",
]

# The first word of the names of operations, by the scalar function of a metric.
OPERATION_OF: dict[Callable[..., Any], str] = {
    add_absolute: "absolute",
    add_square: "square",
    add_product: "product",
    keep_largest: "largest",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """Keys that tell which rows of floats to look at.

    Attributes
    ----------
    operation : str
        The first word of its name.
    key : str
        Of `cpu_loops.KEYS`, or ``"digits"``.
    error, exact_error : callable
        ``(space) -> float``: the declared error, as a factor of the norms of a query and a row: from values by the
        direct form, and from exact ones.
    """

    operation: str
    key: str
    error: Callable[[Space], float]
    exact_error: Callable[[Space], float]


# Bytes of a panel that a row fills before the next row does: they stay in the first-level cache until all rows did,
# and memory gives more to one long stream than to many short ones.
PACKED_BYTES = 16 * 1024

# What the float filter keeps beside k rows: so many, and one for each so many of k, because the more there are, the
# closer do they lie to each other. Without any, the least error of the filter would leave the k-th row in doubt.
SPARE = 3
SPARE_SHARE = 8

# float32 keys of cosine on uint8 are off by three roundings at the most; rows within this of the limit are looked at.
COSINE_SLACK = 1e-6

ALIGNMENT = 64

# Corpus rows whose mean stands for the corpus's: differences do not depend on it, only the filter's sharpness does.
CENTRE_ROWS = 64

# Queries that a corpus row meets at once where rows are compared as they lie.
ROWS = 8

# The last features that left out a row, kept for each query, which leave out most others too: of MNIST's ties, all but
# one in thirty.
WITNESSES = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """Which operations compute a space.

    Attributes
    ----------
    panels, rows : Vectors
        On panels, and on rows as they lie. Both give the accumulated value, or `key` says what of it.
    norms : Vectors
        The product of a row with itself.
    key : {"value", "gram", "larger", "cosine", "digits"}
        How a panel's accumulators are ranked, as in `cpu_loops.KEYS`; or that they are those of `cpu_digits`.
    is_filter : bool
        Whether panels tell only which rows to look at: then they are centred.
    is_exact : bool
        Whether neighbours are those of exact arithmetic, ranked in float64.
    """

    panels: Vectors
    rows: Vectors
    norms: Vectors
    key: str
    is_filter: bool = False
    is_exact: bool = False

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that the form of a packed corpus depends on."""
        return self.panels, self.key, self.is_filter


def plan_of(
    space: Space, level: Level, features: frozenset[str], *, found: Filter | None = None, exact: bool = False
) -> Plan:
    """Return how a space is computed.

    Parameters
    ----------
    space : Space
    level : Level
    features : frozenset of str
        Of the CPU.
    found : Filter, optional
        For floats: what is to tell which rows to look at.
    exact : bool
        For largest differences of floats: whether they are to be ranked exactly.
    """
    kind = OPERATION_OF[space.form.accumulate]
    vectors = functools.partial(vectors_of, level=level, features=features)
    if not space.is_integer:
        dtype = space.dtype.name
        product, rows = vectors(f"product-{dtype}"), vectors(f"{kind}-{dtype}")
        if found is None:
            return Plan(rows, rows, product, "value", is_exact=exact)
        return Plan(vectors(f"{found.operation}-{dtype}"), rows, product, found.key, is_filter=True)
    wide = "int64" if space.accumulator == np.int64 else "int16"
    product = vectors(f"product-{wide}")

    def fastest(family: str, otherwise: Vectors) -> Vectors:
        known = (vectors(name) for name in NARROW.get(family, ()) if level.has_matrix or not OPERATIONS[name].is_matrix)
        fitting = (form for form in known if form.operation.accumulator == "int64" or wide == "int16")
        return next((form for form in fitting if form.instruction), otherwise)

    if space.form.from_dot is None:
        direct = fastest(kind, vectors(f"{kind}-uint8"))
        return Plan(direct, direct, product, "value")
    return Plan(
        fastest("product", product), vectors(f"{kind}-{wide}"), product, "cosine" if kind == "product" else "gram"
    )


class Workspace(NamedTuple):
    """What a task holds beside its rows and its answer, as the kernels take it.

    Attributes
    ----------
    centre : (n_features,) array
        What to take from all rows before they are filtered, or empty.
    is_packed : int
        1 if the panels are those of the whole corpus, packed; 0 if there is one, to be packed again and again.
    queries : (elements,) array
        The packed queries of the task.
    panels : (n_panels, elements) array
        Packed rows of the corpus.
    columns : (n_panels, panel rows) array
        A number for each row of a panel, for the key.
    corpus_norms, query_norms : (n_panels, panel rows) and (n_queries,) arrays
        Squared norms, or sums of absolute values for the key ``"larger"``.
    shifts : (n_panels, panel rows) array
        What centring took from the products of each row of a panel.
    sums : (n_queries,) array
        Sums of features, for the key ``"larger"``; of an exact plan, not 0 for a query of which a value was rounded
        that may decide. For the key ``"digits"``, see `cpu_digits.digit_kernels`.
    limits : (n_queries,) array
        Below which a query's keys are of interest.
    out : array
        The accumulators of a tile.
    hits : array of int64
        Which of them are of interest.
    witnesses : array of int64
        Of an exact plan, `WITNESSES` features for each query.
    values : array
        Those of some rows.
    """

    centre: Array
    is_packed: int
    queries: Array
    panels: Array
    columns: Array
    corpus_norms: Array
    query_norms: Array
    shifts: Array
    sums: Array
    limits: Array
    out: Array
    hits: Array
    witnesses: Array
    values: Array


class Packing(NamedTuple):
    """A corpus packed for many searches: fields of `Workspace`."""

    centre: Array
    is_packed: int
    panels: Array
    columns: Array
    corpus_norms: Array
    shifts: Array


class Parts(NamedTuple):
    """Functions of kernels, for kernels of others.

    Attributes
    ----------
    pack_queries : callable
        ``(queries, workspace.queries, workspace.query_norms, workspace.sums, workspace.centre, workspace.values)``.
    pack_panel : callable
        ``(corpus, start, count, panel, its columns, its norms, its shifts, centre, workspace.values)``.
    pair : callable
        ``(queries, i, corpus, j, workspace.values)`` returns the accumulated value of one pair, always summed in the
        same order.
    """

    pack_queries: Callable[..., None]
    pack_panel: Callable[..., None]
    pair: Callable[..., Any]


@dataclass(frozen=True)
class TileKernels:
    """The compiled kernels of a plan; all release the interpreter lock.

    Attributes
    ----------
    plan : Plan
    ranked : numpy.dtype
        Of the values that are ranked.
    knn : callable
        ``(queries, corpus, first, stop, *workspace, k, *lists) -> bool`` takes corpus rows from `first` on into the
        lists; on a packed corpus, that is the first row of a panel. A filter takes its keys, and gives up, with False,
        where they could overflow.
    knn_rows : callable
        ``(queries, corpus, first, stop, workspace.query_norms, workspace.values, k, *lists)`` takes all rows from
        `first` on as they lie; they have at least `plan.rows.features` features.
    order : callable
        ``(queries, corpus, workspace.values, k, *lists, ranked, nearest)`` fills (n_queries, k) arrays with the k
        smallest in ascending order; floats are computed once more, so that they do not depend on how they were found.
    prove : callable
        ``(queries, corpus, n_rows, error, workspace.query_norms, workspace.sums, workspace.values, k, kept, *lists,
        ranked, nearest, in_doubt)`` does it for a filter, of whose keys the lists hold the smallest `kept` of `n_rows`
        rows, and sets in_doubt (n_queries,) where other rows could be among the k nearest.
    pairwise : callable
        ``(queries, corpus, start, stop, *workspace, out)`` fills (n_queries, stop - start) values to rank.
    pack : callable
        ``(corpus, start, stop, *packing)`` packs panels `start` to `stop` of a corpus.
    parts : Parts
    """

    plan: Plan
    ranked: np.dtype[Any]
    knn: Callable[..., bool]
    knn_rows: Callable[..., None]
    order: Callable[..., None]
    prove: Callable[..., None]
    pairwise: Callable[..., None]
    pack: Callable[..., None]
    parts: Parts

    @functools.cached_property
    def _dtypes(self) -> tuple[np.dtype[Any], ...]:
        operation, of_rows = self.plan.panels.operation, self.plan.rows.operation.accumulator
        of_columns = column_dtype(self.plan.key, operation.accumulator)
        of_norms = operation.accumulator if operation.accumulator.startswith("float") else "int64"
        names = operation.element, operation.accumulator, of_columns, of_norms, of_rows, "int64"
        return tuple(np.dtype(name) for name in names)

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        vectors = self.plan.panels
        return vectors.tile_shape[0], vectors.panel_rows, vectors.depth

    @property
    def key_dtype(self) -> np.dtype[Any]:
        """Dtype that keys of panels are computed in."""
        return np.dtype(self.plan.panels.operation.accumulator)

    @property
    def _has_digits(self) -> bool:
        return self.plan.key == "digits"

    def _row_elements(self, n_features: int) -> int:
        """Return the elements of a row in a panel."""
        vectors = self.plan.panels
        return -(-n_features // vectors.depth) * vectors.row_elements

    def reference(self, rows: Array, about: Array | None = None) -> Any:
        """Return what rows are packed relative to: of a filter, the given point, or one amid the rows."""
        if not self.plan.is_filter:
            return None
        return finite_mean(rows[:: max(1, len(rows) // CENTRE_ROWS)]) if about is None else about

    def workspace(self, n_queries: int, n_features: int, reference: Any = None, packing: Any = None) -> Any:
        """Return the arrays for a task of so many queries, on a corpus that is packed, or is not, by a reference."""
        (height, width, _), (element, accumulator, column, norm, row, word) = self._shape, self._dtypes
        padded, of_row, has_digits = -(-n_queries // height) * height, self._row_elements(n_features), self._has_digits
        sizes = (
            (padded * of_row, element),
            (padded, norm),
            (2 * padded if has_digits else padded, column),
            (padded, column),
            ((2 * height + 1 if has_digits else height) * width, accumulator),
            (height, word),
            (padded * WITNESSES if self.plan.is_exact else 0, word),
            (scratch_elements(n_features) if has_digits else ROWS, row),
        )
        panel_sizes = () if packing else self._panel_sizes(1, n_features)
        queries, query_norms, sums, limits, out, hits, witnesses, values, *room = carved(*sizes, *panel_sizes)
        centre, is_packed, panels, columns, norms, shifts = packing or self._packing(0, room, 1, reference)
        return Workspace(
            centre, is_packed, queries, panels, columns, norms, query_norms, shifts, sums, limits, out, hits, witnesses,
            values,
        )  # fmt: skip

    def few(self, n_queries: int) -> tuple[Array, Array]:
        """Return `Workspace.query_norms` and `Workspace.values`, all that few queries take."""
        (*_, norm, row, _) = self._dtypes
        return np.empty(n_queries, norm), np.empty(ROWS, row)

    def packing(self, n_corpus: int, n_features: int, reference: Any = None) -> Any:
        """Return room for the panels of a corpus, which `pack` fills."""
        n_panels = -(-n_corpus // self.plan.panels.panel_rows)
        return self._packing(1, carved(*self._panel_sizes(n_panels, n_features)), n_panels, reference)

    def _panel_sizes(self, n_panels: int, n_features: int) -> tuple[tuple[int, np.dtype[Any]], ...]:
        (_, width, _), (element, accumulator, column, norm, _, _) = self._shape, self._dtypes
        n_rows, elements = n_panels * width, n_panels * width * self._row_elements(n_features)
        return (elements, element), (n_rows, column), (n_rows, norm), (n_rows, accumulator)

    def _packing(self, is_packed: int, room: list[Array], n_panels: int, centre: Array | None) -> Packing:
        panels, columns, norms, shifts = (array.reshape(n_panels, -1) for array in room)
        centre = np.empty(0, self._dtypes[4]) if centre is None else centre
        return Packing(centre, is_packed, panels, columns, norms, shifts)

    def packing_bytes(self, n_corpus: int, n_features: int) -> int:
        """Return what `packing` takes, about."""
        width, row = self._shape[1], self._row_elements(n_features) * self._dtypes[0].itemsize
        return -(-n_corpus // width) * width * (row + 24)

    def lists(self, n_queries: int, k: int, n_rows: int) -> tuple[Array, Array, Array]:
        """Return values, indices and counts of the k smallest of some rows, and of those that may be among them."""
        room = list_room(k, n_rows)
        shape = n_queries, room
        return np.empty(shape, self.ranked), np.empty(shape, np.int64), np.zeros(n_queries, np.int64)

    def workspace_bytes(self, n_features: int) -> tuple[int, int]:
        """Return what `workspace` takes for a tile of queries, or a part of one, and besides."""
        (height, width, _), row = self._shape, self._row_elements(n_features) * self._dtypes[0].itemsize
        return height * (row + 24 + (8 * WITNESSES if self.plan.is_exact else 0)), width * (
            row + 24 + 8 * height
        ) + 13 * ALIGNMENT + (8 * scratch_elements(n_features) if self._has_digits else 0)


def kept_rows(k: int, n_rows: int) -> int:
    """Return how many of some rows a filter keeps for k neighbours."""
    return min(n_rows, k + SPARE + k // SPARE_SHARE)


def neighbours_of(kept: int) -> int:
    """Return for how many neighbours a filter keeps so many rows of a large corpus."""
    return max(1, kept - SPARE - (kept - SPARE) // (SPARE_SHARE + 1))


def carved(*sizes: tuple[int, np.dtype[Any]]) -> list[Array]:
    """Return arrays of zeros, of so many elements of a dtype, each at a multiple of the widest vector."""
    room = [-(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT for count, dtype in sizes]
    raw = np.zeros(sum(room) + ALIGNMENT, np.uint8)
    starts = itertools.accumulate(room, initial=-raw.__array_interface__["data"][0] % ALIGNMENT)
    return [np.frombuffer(raw, dtype, count, at) for (count, dtype), at in zip(sizes, starts, strict=False)]


def level_in_use() -> Level:
    """Return the level of this CPU, without a matrix unit that gives wrong products."""
    level = simd_level()
    return LEVELS["avx512"] if level.has_matrix and not matrix_unit_is_exact(level) else level


def tile_kernels(space: Space, found: Filter | None = None, *, exact: bool = False) -> TileKernels:
    """Return the kernels of a space on this CPU, compiled when they are first called.

    Parameters
    ----------
    space : Space
    found : Filter, optional
        For floats: what is to tell which rows to look at, of `filters_of`.
    exact : bool
        For largest differences of floats: whether they are to be ranked exactly.
    """
    form = space.form
    # All that follows from the space; found again in microseconds, which a small search takes itself.
    key = form.accumulate, form.rank, space.dtype, space.accumulator, found, exact, setting(LEVEL_VARIABLE)
    if key not in _chosen:
        plan = plan_of(space, level_in_use(), cpu_features(), found=found, exact=exact)
        _chosen[key] = compiled_kernels(plan, space)
    return _chosen[key]


@functools.cache
def matrix_unit_is_exact(level: Level) -> bool:
    """Return whether a level's matrix unit gives the products that integers give; warn if it does not.

    No test can run it where there is none, and a wrong product would be a wrong neighbour.
    """
    space = Space(METRICS["sqeuclidean"], np.dtype(np.uint8), 100)
    is_exact = computes_squares(plan_of(space, level, cpu_features()), space)
    if not is_exact:
        warnings.warn("this CPU's matrix unit gives wrong products and is not used", RuntimeWarning, stacklevel=2)
    return is_exact


def computes_squares(plan: Plan, space: Space) -> bool:
    """Return whether a plan gives the squared distances of some rows of uint8."""
    rng = np.random.default_rng(0)
    queries, corpus = (rng.integers(0, 256, (n, space.n_features), np.uint8) for n in (35, 70))
    queries[0], corpus[0], corpus[1] = 255, 255, 0
    kernels, found = compiled_kernels(plan, space), np.empty((35, 70), space.ranked)
    kernels.pairwise(queries, corpus, 0, 70, *kernels.workspace(35, space.n_features), found)
    differences = queries[:, None].astype(np.int64) - corpus[None]
    return bool((found == (differences**2).sum(axis=2)).all())


_chosen: dict[Any, TileKernels] = {}


def compiled_kernels(plan: Plan, space: Space) -> TileKernels:
    """Return the kernels of a plan for a space."""
    form = space.form
    # The type that a feature takes in scalar arithmetic: numba would take uint8 to unsigned 64-bit integers, whose
    # differences wrap.
    loaded = space.dtype if not space.is_integer else space.accumulator
    return _compiled(
        plan, form.accumulate, form.rank, numba.from_dtype(loaded), numba.from_dtype(space.accumulator),
        numba.float64 if plan.is_exact else numba.from_dtype(space.ranked),
    )  # fmt: skip


@functools.cache
def _compiled(
    plan: Plan,
    accumulate_scalar: Callable[..., Any],
    rank_scalar: Callable[..., Any],
    loaded: Any,
    accumulator: Any,
    ranked: Any,
) -> TileKernels:
    # Closures over register_jitable functions and constants, because numba caches those on disk and refuses functions
    # that are arguments.
    accumulate, product = register_jitable(accumulate_scalar), register_jitable(add_product)
    rank = register_jitable(rank_scalar)
    key, is_float, has_digits = plan.key, plan.panels.operation.accumulator.startswith("float"), plan.key == "digits"
    tiles, rows, squares = plan.panels.name, plan.rows.name, plan.norms.name
    group, depth, is_centred = plan.panels.operation.group, plan.panels.depth, plan.panels.operation.centred
    (height, _), width = plan.panels.tile_shape, plan.panels.panel_rows
    row_features, square_features = plan.rows.features, plan.norms.features
    square, row_dtype = plan.panels.square, np.dtype(plan.rows.operation.accumulator)
    chunk = PACKED_BYTES // (plan.panels.tile_shape[1] * plan.panels.width) // square * square
    needs_norms, is_filtered, is_larger = key != "value", plan.is_filter, key == "larger"
    # Of larger norms the sums could overflow.
    largest_norm = float(np.finfo(plan.panels.operation.accumulator).max) / 16 if is_float else 0.0
    info: Any = np.finfo(plan.panels.operation.accumulator) if is_float else None
    # Of digits, what products and sums that underflow add too.
    smallest = float(info.tiny if has_digits else info.smallest_subnormal) if is_float else 0.0
    rank_uses_norms, is_exact = key == "cosine", plan.is_exact

    @register_jitable
    def pair(queries: Any, i: Any, corpus: Any, j: Any, values: Any) -> Any:
        """Return the accumulated value of one pair, always summed in the same order."""
        n_features = queries.shape[1]
        if n_features >= row_features:
            row_values(rows, 1, queries, i, corpus, j, n_features, values)
            return accumulator(values[0])
        acc = accumulator(0)
        for f in range(n_features):
            acc = accumulator(accumulate(acc, loaded(queries[i, f]), loaded(corpus[j, f])))
        return acc

    @register_jitable
    def norm(rows: Any, i: Any, values: Any) -> Any:
        """Return the squared norm of an integer row."""
        n_features = rows.shape[1]
        if n_features >= square_features:
            row_values(squares, 1, rows, i, rows, i, n_features, values)
            return np.int64(values[0])
        acc = np.int64(0)
        for f in range(n_features):
            acc = product(acc, np.int64(rows[i, f]), np.int64(rows[i, f]))
        return acc

    def filler(is_query: int, lanes: int, group: int) -> Callable[..., None]:
        """Return a function that packs features of rows into a panel of `lanes` rows, from its element `offset` on."""

        @register_jitable
        def fill(rows: Any, i: Any, count: Any, begin: Any, end: Any, panel: Any, offset: Any, first: Any) -> None:
            """Pack groups from `begin` to `end` of `count` rows from row `i` on; they become rows from `first` on."""
            n_features = rows.shape[1]
            whole = n_features // group
            for r in range(count):
                at = (i + r) * n_features + begin * group
                to = offset + (begin * lanes + first + r) * group
                for _ in range(begin, min(end, whole)):
                    move(tiles, group, is_query, rows, at, panel, to)
                    at += group
                    to += lanes * group
                for f in range(max(begin, whole) * group, min(end * group, n_features)):
                    to = offset + (whole * lanes + first + r) * group + f - whole * group
                    move(tiles, 1, is_query, rows, (i + r) * n_features + f, panel, to)

        return fill

    fill_queries, fill_corpus = filler(1, height, depth), filler(0, width, group)

    @register_jitable
    def centre_rows(
        panel: Any, offset: Any, lanes: Any, first: Any, count: Any, begin: Any, end: Any, centre: Any, norms: Any,
        sums: Any, i: Any,
    ) -> None:  # fmt: skip
        """Take the centre from features of packed float rows, and add what they add to the norms from row i on."""
        for f in range(begin, end):
            for r in range(first, first + count):
                value = panel[offset + f * lanes + r] - centre[f]
                panel[offset + f * lanes + r] = value
                norms[i + r] += abs(value) if is_larger else value * value
                if is_larger:
                    sums[i + r] += value

    @register_jitable
    def pack_queries(queries: Any, packed: Any, norms: Any, sums: Any, centre: Any, values: Any) -> None:
        n_queries, n_features = queries.shape
        n_steps = (n_features + depth - 1) // depth
        packed[:] = 0
        norms[:] = 0
        sums[:] = 0
        for i in range(0, n_queries, height):
            count, offset = min(height, n_queries - i), i * n_steps * depth
            fill_queries(queries, i, count, 0, n_steps, packed, offset, 0)
            if is_filtered:
                centre_rows(packed, offset, height, 0, count, 0, n_features, centre, norms, sums, i)
            elif needs_norms:
                for t in range(count):
                    norms[i + t] = norm(queries, i + t, values)

    @register_jitable
    def pack_panel(
        corpus: Any, start: Any, count: Any, panel: Any, columns: Any, norms: Any, shifts: Any, centre: Any, values: Any
    ) -> None:
        n_features = corpus.shape[1]
        n_groups = (n_features + depth - 1) // depth * (depth // group)
        in_squares, step = n_features // (square * group) * square, width * group
        if count < width or n_features % depth:
            panel[:] = 0
        norms[:] = 0
        if is_larger:
            columns[:] = 0
        for begin in range(0, in_squares, chunk):
            end = min(begin + chunk, in_squares)
            for r in range(0, count - square + 1, square):
                for g in range(begin, end, square):
                    at, to = (start + r) * n_features + g * group, (g * width + r) * group
                    if is_larger:
                        move_square(tiles, corpus, at, n_features, panel, to, step, centre, g, norms, columns, r)
                    elif is_filtered:
                        move_square(tiles, corpus, at, n_features, panel, to, step, centre, g, norms, None, r)
                    else:
                        move_square(tiles, corpus, at, n_features, panel, to, step, None, 0, None, None, 0)
        # What is left of the features, and then of the rows.
        whole = count // square * square
        fill_corpus(corpus, start, whole, in_squares, n_groups, panel, 0, 0)
        fill_corpus(corpus, start + whole, count - whole, 0, n_groups, panel, 0, whole)
        if is_filtered:
            centre_rows(panel, 0, width, 0, whole, in_squares, n_features, centre, norms, columns, 0)
            centre_rows(panel, 0, width, whole, count - whole, 0, n_features, centre, norms, columns, 0)
        if needs_norms and not is_larger:
            for r in range(count):
                if not is_filtered:
                    norms[r] = norm(corpus, start + r, values)
                columns[r] = -1 / math.sqrt(norms[r]) if rank_uses_norms else norms[r]
        if is_centred:
            for r in range(count):
                total = np.int64(0)
                for f in range(n_features):
                    total += corpus[start + r, f]
                shifts[r] = CENTRE * total

    @register_jitable
    def are_summable(norms: Any, count: Any) -> Any:
        """Return whether the first norms are finite and no sum of two of them can overflow."""
        are = True
        for i in range(count):
            are &= norms[i] <= largest_norm
        return are

    @register_jitable
    def largest_difference(queries: Any, i: Any, corpus: Any, j: Any, acc: Any, most: Any) -> Any:
        """Return the largest difference of a pair in float64, whether it is exact, and a feature that has it.

        One that is not below `most` will do. `acc` is the largest one as it was rounded, which it comes from.
        """
        n_features, first, count = queries.shape[1], queries.shape[1], 0
        for f in range(n_features):  # in vectors, which a loop that may end before would not be
            is_near = abs(queries[i, f] - corpus[j, f]) >= acc
            count += is_near
            first = min(first, f if is_near else n_features)
        best, is_exact_value, place = 0.0, count > 0, 0  # NaN is near nothing
        for f in range(first, n_features):
            if abs(queries[i, f] - corpus[j, f]) >= acc:
                value, rest = two_sum(np.float64(queries[i, f]), -np.float64(corpus[j, f]))
                if abs(value) >= best:
                    is_exact_value = rest == 0 and (is_exact_value or abs(value) > best)
                    best, place = abs(value), f
                count -= 1
                if count == 0 or best >= most:
                    break
        return best, is_exact_value, place

    @register_jitable
    def is_farther(packed: Any, query: Any, panel: Any, r: Any, most: Any, witnesses: Any, first: Any) -> Any:
        """Return whether one of a query's witnesses shows that a pair's largest difference is not below `most`."""
        found = 0
        for s in range(WITNESSES):  # all of them: which one it will be, no processor would guess
            f = np.uint64(witnesses[first + s])  # unsigned: numba does not ask whether it counts from the end
            a, b = packed[query + f * np.uint64(height)], panel[r + f * np.uint64(width)]
            value, rest = two_sum(np.float64(a), -np.float64(b))
            found |= (abs(value) > most) | ((abs(value) == most) & (rest == 0))
        return found != 0

    @register_jitable
    def exact_value(
        queries: Any, i: Any, corpus: Any, j: Any, acc: Any, most: Any, witnesses: Any, first: Any, sums: Any
    ) -> Any:
        """Return the largest difference of a pair in float64, or one that is not below `most`, and tell in `sums` if
        rounding may decide which it is."""
        value, is_exact_value, at = largest_difference(queries, i, corpus, j, acc, most)
        if not is_exact_value and value <= most:
            sums[i] = 1
        if not value < most:
            for s in range(WITNESSES - 1, 0, -1):
                witnesses[first + s] = witnesses[first + s - 1]
            witnesses[first] = at
        return value

    @register_jitable
    def limit(largest: Any, query_norm: Any, total: Any, error: Any, lost: Any) -> Any:
        """Return below which keys a row may have a value less than the largest that is given."""
        if is_exact:
            return np.nextafter(accumulator(largest), accumulator(np.inf))  # what is equal is looked at
        if key == "value":
            return largest
        if is_larger:
            # A row at most kth from a query has a norm that is at most that much larger.
            kth = np.float64(largest)
            return kth + total + error * 2 * (np.float64(query_norm) + kth)
        if key == "cosine":
            return -(1.0 - largest) * math.sqrt(query_norm) * (1.0 - COSINE_SLACK)
        if not is_float:
            return largest - query_norm
        # A row at most sqrt(kth) from a query is at most that much longer, which bounds its norm.
        kth, length = np.float64(largest), math.sqrt(np.float64(query_norm))
        return kth - query_norm + error * (query_norm + (length + math.sqrt(kth)) ** 2 + kth) + lost

    @register_jitable
    def key_of(acc: Any, column: Any) -> Any:
        """Return what `tile` compares with a limit, of a filter."""
        return (acc + acc) - column if is_larger else column - (acc + acc)

    @register_jitable
    def value_of(acc: Any, query_norm: Any, corpus_norm: Any) -> Any:
        """Return the value to rank of an accumulator of a panel."""
        if key == "gram":
            return ranked(query_norm + corpus_norm - 2 * np.int64(acc))
        return ranked(rank(acc, query_norm, corpus_norm))

    @compile_cached(nogil=True, error_model="numpy")
    def knn(
        queries: Any, corpus: Any, first: Any, stop: Any, centre: Any, is_packed: Any, packed: Any, panels: Any,
        columns: Any, corpus_norms: Any, query_norms: Any, shifts: Any, sums: Any, limits: Any, out: Any, hits: Any,
        witnesses: Any, row: Any, k: Any, values: Any, indices: Any, counts: Any,
    ) -> Any:  # fmt: skip
        n_queries, n_features = queries.shape
        n_groups = (n_features + depth - 1) // depth * (depth // group)
        # From so many rows on, each list knows its k-th value, which stands here.
        filled, kth = (k, k - 1) if k < MANY else (values.shape[1], 0)
        pack_queries(queries, packed, query_norms, sums, centre, row)
        if is_filtered and not are_summable(query_norms, n_queries):
            return False
        set_up(tiles)
        for begin in range(first, stop, width):
            count, at = min(width, stop - begin), begin // width if is_packed else 0
            panel, column, norms, shift = panels[at], columns[at], corpus_norms[at], shifts[at]
            if not is_packed:
                pack_panel(corpus, begin, count, panel, column, norms, shift, centre, row)
            if is_filtered and not are_summable(norms, count):
                return False  # no filter has a set-up to tear down
            is_filling = begin - first < filled
            present = (np.int64(1) << count) - 1 if count < 64 else np.int64(-1)
            for i in range(0, n_queries, height):
                always = np.int64(is_filling)
                if not tile(tiles, key, packed, i, panel, n_groups, column, shift, limits, always, out, hits):
                    continue
                for t in range(min(height, n_queries - i)):
                    left = present if is_filling else hits[t] & present
                    if not left:
                        continue
                    query_norm = query_norms[i + t]
                    several = left & (left - 1)
                    if is_exact and not is_filling and several & (several - 1):
                        query, mine = np.uint64(i * n_groups + t), (i + t) * WITNESSES
                        for s in range(WITNESSES):
                            f = np.uint64(witnesses[mine + s])
                            value = packed[query + f * np.uint64(height)]
                            left &= ~rows_beyond(tiles, value, panel, np.int64(f) * width, values[i + t, kth])
                            if not left:
                                break
                    while left:
                        r = trailing_zeros(left)
                        left &= left - 1
                        acc, seen = out[t * width + r], begin + r - first
                        if is_exact:
                            most, mine = values[i + t, kth] if seen >= filled else np.inf, (i + t) * WITNESSES
                            query = np.uint64(i * n_groups + t)
                            if is_farther(packed, query, panel, np.uint64(r), most, witnesses, mine):
                                continue
                            value = exact_value(queries, i + t, corpus, begin + r, acc, most, witnesses, mine, sums)
                            if seen >= filled and not value < most:
                                continue
                        elif is_filtered:
                            value = key_of(acc, column[r])
                        else:
                            value = value_of(acc, query_norm, norms[r])
                        insert(k, values, indices, counts, i + t, seen, value, begin + r)
                    largest = values[i + t, kth]
                    limits[i + t] = largest if is_filtered else limit(largest, query_norm, 0, 0.0, 0.0)
        tear_down(tiles)
        return True

    @compile_cached(nogil=True, error_model="numpy")
    def knn_rows(
        queries: Any, corpus: Any, first: Any, stop: Any, query_norms: Any, row: Any, k: Any, values: Any,
        indices: Any, counts: Any,
    ) -> None:  # fmt: skip
        n_queries, n_features = queries.shape
        filled, kth = (k, k - 1) if k < MANY else (values.shape[1], 0)
        if rank_uses_norms:
            for i in range(n_queries):
                query_norms[i] = norm(queries, i, row)
        # One corpus row after the other: several at a time are several streams, of which memory gives less.
        for j in range(first, stop):
            if rank_uses_norms:
                corpus_norm = norm(corpus, j, row)
            for i in range(0, n_queries, ROWS):
                count = min(ROWS, n_queries - i)
                if count == ROWS:
                    row_values(rows, ROWS, corpus, j, queries, i, n_features, row)
                for t in range(count):
                    if count < ROWS:
                        row_values(rows, 1, corpus, j, queries, i + t, n_features, row)
                    acc = row[t] if count == ROWS else row[0]
                    value = ranked(rank(acc, query_norms[i + t], corpus_norm)) if rank_uses_norms else acc
                    # Looked at here too, because a call for every row would take as long as the row.
                    if j - first < filled or value < values[i + t, kth]:
                        insert(k, values, indices, counts, i + t, j - first, value, j)

    @register_jitable
    def sort(values: Any, indices: Any, i: Any, size: Any) -> None:
        """Sort the first pairs of list i, which are nearly in order unless they are many."""
        if size < MANY:
            sort_nearly(values, indices, i, size)
        else:
            make_heap(values, indices, i, size)
            sort_heap(values, indices, i, size)

    @compile_cached(nogil=True, error_model="numpy")
    def order(
        queries: Any, corpus: Any, row: Any, k: Any, values: Any, indices: Any, counts: Any, ranked: Any, nearest: Any
    ) -> None:
        for i in range(len(values)):
            if counts[i] > k:
                keep_smallest(values, indices, i, counts[i], k)
            if is_float and not is_exact:
                for t in range(k):
                    values[i, t] = pair(queries, i, corpus, indices[i, t], row)
            sort(values, indices, i, k)
            for t in range(k):
                ranked[i, t], nearest[i, t] = values[i, t], indices[i, t]

    @compile_cached(nogil=True, error_model="numpy")
    def prove(
        queries: Any, corpus: Any, n_rows: Any, error: Any, query_norms: Any, sums: Any, row: Any, k: Any, kept: Any,
        values: Any, indices: Any, counts: Any, ranked: Any, nearest: Any, in_doubt: Any,
    ) -> None:  # fmt: skip
        lost = 4 * queries.shape[1] * smallest  # what products and squares that underflow add to the error
        for i in range(len(values)):
            held = counts[i]
            if held > kept:
                keep_smallest(values, indices, i, held, kept)
                held = kept
            if held >= MANY:
                sort(values, indices, i, held)
            # The largest value of the first k, below which none that was left out may be.
            largest, bound, n_computed, in_doubt[i] = -np.inf, 0.0, held, held < n_rows
            for t in range(held):
                if t >= k and not values[i, t] < bound:
                    n_computed, in_doubt[i] = t, False
                    break
                values[i, t] = pair(queries, i, corpus, indices[i, t], row)
                if t < k:
                    largest = max(largest, values[i, t])
                    bound = limit(largest, query_norms[i], sums[i], error, lost)
            if in_doubt[i]:
                continue
            sort(values, indices, i, n_computed)
            for t in range(k):
                ranked[i, t], nearest[i, t] = values[i, t], indices[i, t]

    @compile_cached(nogil=True, error_model="numpy")
    def pairwise(
        queries: Any, corpus: Any, start: Any, stop: Any, centre: Any, is_packed: Any, packed: Any, panels: Any,
        columns: Any, corpus_norms: Any, query_norms: Any, shifts: Any, sums: Any, limits: Any, out: Any, hits: Any,
        witnesses: Any, row: Any, result: Any,
    ) -> None:  # fmt: skip
        n_queries, n_features = queries.shape
        n_groups = (n_features + depth - 1) // depth * (depth // group)
        set_up(tiles)
        pack_queries(queries, packed, query_norms, sums, centre, row)
        for begin in range(start, stop, width):
            count, at = min(width, stop - begin), begin // width if is_packed else 0
            panel, column, norms, shift = panels[at], columns[at], corpus_norms[at], shifts[at]
            if not is_packed:
                pack_panel(corpus, begin, count, panel, column, norms, shift, centre, row)
            for i in range(0, n_queries, height):
                tile(tiles, key, packed, i, panel, n_groups, column, shift, limits, np.int64(1), out, hits)
                for t in range(min(height, n_queries - i)):
                    for r in range(count):
                        value = value_of(out[t * width + r], query_norms[i + t], norms[r])
                        result[i + t, begin - start + r] = value
        tear_down(tiles)

    @compile_cached(allocates=True, nogil=True, error_model="numpy")
    def pack(
        corpus: Any, start: Any, stop: Any, centre: Any, is_packed: Any, panels: Any, columns: Any, norms: Any,
        shifts: Any,
    ) -> None:  # fmt: skip
        row = np.zeros(1, row_dtype)
        for p in range(start, stop):
            count = min(width, len(corpus) - p * width)
            pack_panel(corpus, p * width, count, panels[p], columns[p], norms[p], shifts[p], centre, row)

    if has_digits:
        knn, pack = digit_kernels(tiles, largest_norm)
    parts = Parts(pack_queries, pack_panel, pair)
    return TileKernels(plan, np.dtype(ranked.name), knn, knn_rows, order, prove, pairwise, pack, parts)
