"""Search and pairwise distances on CUDA devices: tiles of pairs in registers, with the k nearest selected as they come.

A block of threads computes a square tile of pairs. Rows of both sides pass through shared memory, some words at a time,
in two buffers: while one is computed from, the next words are on their way. A thread has the sums of `PIECES` pieces
of rows by as many of columns, a piece being what one load of 16 bytes takes from shared memory; each word that it loads
serves 8 pairs, so that arithmetic is what takes the time. Four bytes are a word, for which there are instructions.

The search passes its tile of queries over a part of the corpus. Of each query it keeps the k-th value so far in shared
memory, and what is below goes into a small buffer there; after the tile, one thread a query takes that into a heap of
k under the total order. No matrix of values is written. Where queries are few, several blocks have a part of the corpus
each for the same queries, and `order_lists` merges what they found.

The naive form of all is `knnbench.backends.python`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numba.cuda
import numpy as np
from numba import float32, float64, int32, int64, uint32

from knnbench.kernels import cuda_scalars
from knnbench.kernels.cuda_intrinsics import (
    VECTOR_BYTES,
    add_absolute_differences,
    add_products,
    anew,
    filled,
    folded,
    gathered,
    inverse_root,
    larger_differences,
    largest_difference,
    outer,
    vectors_of,
)
from knnbench.kernels.cuda_launch import BLOCKS_EACH, Kernel, compiled, inlined, launch, launch_rows, multiprocessors
from knnbench.kernels.heap import comes_before, sift_down, sort_heap
from knnbench.metrics import Space, add_absolute, cosine_from_dot, keep_largest
from knnbench.ordering import largest

__all__ = ["Parameters", "Tile", "distances", "finish", "order", "parameters_of", "parts_of", "search"]

# Threads of a tile: lanes of a warp, and warps of a block, across and down; both sides have as many. Lanes in a square
# load from shared memory what neighbours load too.
LANES_ACROSS, LANES_DOWN = 8, 4
WARPS_ACROSS, WARPS_DOWN = 2, 4

# Pieces of 16 bytes that a thread has along each side, if sums are as wide as words; 64 sums of 32 bits then leave half
# of the 128 registers that two blocks on a multiprocessor allow.
PIECES = 2

# Candidates that a query has room for in shared memory.
ROOM = 16

# Threads that merge the lists of a query.
MERGING_THREADS = 32

# A part of the corpus begins with empty lists, which let everything pass: an estimate of what that takes, in tiles.
START_TILES = 2

# What fills the lists before they hold neighbours; every corpus row comes before it.
NO_INDEX = (1 << 63) - 1

# float32 keys and limits of cosine are off by 7e-7 of the query's length at the most: four roundings of 6e-8, and twice
# what `inverse_root` is off by. What is within this of the limit is looked at.
COSINE_SLACK = 2e-6

# The simulator swaps a global of this module that is `numba.cuda`, which is filled in at run time, so that no type
# checker knows its names.
cuda: Any = numba.cuda


class Bytes(NamedTuple):
    """How a metric takes four bytes at once.

    Attributes
    ----------
    step : callable
        ``(total, a, b) -> total``, int32.
    settled : callable
        What the total says in the end.
    is_sum : bool
        Whether the total is a sum, which may need 64 bits.
    """

    step: Callable[..., Any]
    settled: Callable[..., Any]
    is_sum: bool = True


@inlined
def itself(given: Any) -> Any:
    """Return what is given."""
    return given


# By the scalar function of a metric. One that is not here has its bytes taken one by one, or has products for them.
BYTES: dict[Callable[..., Any], Bytes] = {
    add_absolute: Bytes(add_absolute_differences, itself),
    keep_largest: Bytes(larger_differences, largest_difference, is_sum=False),
}
PRODUCTS = Bytes(add_products, itself)


class Parameters(NamedTuple):
    """What tells the kernels of a space from those of others: metrics share them.

    Attributes
    ----------
    accumulate, rank : callable
        Those of `Form`.
    from_dot : callable or None
        `Form.from_dot`, where products are as exact as differences: on uint8.
    uses_norms : bool
        `Form.rank_uses_norms`.
    element, accumulator, ranked : numpy.dtype
        Of the rows, and `Space.accumulator` and `Space.ranked`.
    """

    accumulate: Callable[..., Any]
    rank: Callable[..., Any]
    from_dot: Callable[..., Any] | None
    uses_norms: bool
    element: np.dtype[Any]
    accumulator: np.dtype[Any]
    ranked: np.dtype[Any]

    @property
    def norms(self) -> np.dtype[Any] | None:
        """Dtype of the squared norms of rows that are wanted; None if none are."""
        if self.uses_norms:
            return np.dtype(np.float64)
        return self.accumulator if self.from_dot is not None else None

    @property
    def bytes(self) -> Bytes | None:
        """How bytes are taken four at once, None if they are not."""
        if self.element.kind != "u":
            return None
        return PRODUCTS if self.from_dot is not None else BYTES.get(self.accumulate)

    @property
    def total(self) -> np.dtype[Any]:
        """Dtype of what is summed in registers."""
        fits = self.bytes is not None and not self.bytes.is_sum
        return np.dtype(np.int32) if fits else self.accumulator

    @property
    def tile(self) -> "Tile":
        """The tile that registers have room for."""
        word = max(4, self.element.itemsize)
        return Tile(VECTOR_BYTES // word, max(1, PIECES * word // self.total.itemsize))

    @property
    def row_multiple(self) -> int:
        """Elements of which a row has a whole multiple, the last of them zeros: those of a vector."""
        return VECTOR_BYTES // self.element.itemsize


def parameters_of(space: Space) -> Parameters:
    """Return the parameters of a space."""
    form = space.form
    from_dot = form.from_dot if space.is_integer else None
    dtypes = space.dtype, space.accumulator, space.ranked
    return Parameters(form.accumulate, form.rank, from_dot, form.rank_uses_norms, *dtypes)


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of a tile.

    Attributes
    ----------
    vector : int
        Words of a vector, the 16 bytes that are loaded at once.
    pieces : int
        Vectors that a thread has along each side.
    """

    vector: int
    pieces: int

    @property
    def side(self) -> int:
        """Threads along each side."""
        return LANES_ACROSS * WARPS_ACROSS

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return self.side * self.side

    @property
    def each(self) -> int:
        """Rows, and columns, of a thread."""
        return self.pieces * self.vector

    @property
    def edge(self) -> int:
        """Rows, and columns, of the tile."""
        return self.side * self.each

    @property
    def depth(self) -> int:
        """Vectors of a row that are in shared memory at a time: each thread then brings one, if they are enough."""
        return max(1, self.threads // self.edge)

    @property
    def loads(self) -> int:
        """Vectors of each side that a thread brings at a time."""
        return self.edge * self.depth // self.threads

    @property
    def stride(self) -> int:
        """Vectors from the words of one feature to those of the next in shared memory.

        One is left unused: what a row's vector is spread to then meets different banks.
        """
        return self.edge // self.vector + 1

    @property
    def buffer(self) -> int:
        """Vectors of a buffer in shared memory."""
        return self.depth * self.vector * self.stride


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What kernels compute with: numba types, and functions of scalars.

    Attributes
    ----------
    word, total, ranked, limit_type : numba types
    step : callable
        ``(total, a, b) -> total`` of two words.
    value : callable
        ``(total, row norm, column norm) -> ranked``.
    column_term : callable
        ``(norm) -> term``: what `key` wants to know of a column.
    key : callable
        ``(total, column term)``: among the columns of a row, a smaller value never has a larger key.
    limit : callable
        ``(k-th value, whether there are k, row norm)``: keys that are not at least that are looked at.
    norm_at : callable
        ``(norms, i)``: one of them, or zero where they are not wanted.
    """

    word: Any
    total: Any
    ranked: Any
    limit_type: Any
    step: Callable[..., Any]
    value: Callable[..., Any]
    column_term: Callable[..., Any]
    key: Callable[..., Any]
    limit: Callable[..., Any]
    norm_at: Callable[..., Any]


@functools.cache
def arithmetic_of(parameters: Parameters) -> Arithmetic:
    """Return what kernels with these parameters compute with."""
    total, ranked = (numba.from_dtype(dtype) for dtype in (parameters.total, parameters.ranked))
    accumulator = numba.from_dtype(parameters.accumulator)
    is_integer, nan = parameters.element.kind == "u", float("nan")
    word = uint32 if is_integer else numba.from_dtype(parameters.element)
    step, settled = _step(parameters, total), parameters.bytes.settled if parameters.bytes else itself
    if parameters.uses_norms and is_integer:
        settled = anew  # or all totals are converted to float64 beforehand, which takes twice their registers
    from_dot, rank = inlined(parameters.from_dot) if parameters.from_dot else first_of, inlined(parameters.rank)
    norm_at = _norm if parameters.norms else _no_norm

    @inlined
    def value(given: Any, row_norm: Any, column_norm: Any) -> Any:
        accumulated = accumulator(from_dot(accumulator(settled(given)), row_norm, column_norm))
        return ranked(rank(accumulated, row_norm, column_norm))

    if parameters.rank is cosine_from_dot:
        cosine = _inverse_root, _cosine_key, _cosine_limit
        return Arithmetic(word, total, ranked, float32, step, value, *cosine, norm_at)

    # Products and norms enter a sum, so what the norm of the row adds can as well be taken from the limit.
    @inlined
    def key(given: Any, column_norm: Any) -> Any:
        return value(given, 0, column_norm)

    # No tie passes, because columns come in the order of their index: of equal values the first are kept. What fills
    # the lists lets all pass, also infinity, which may be a distance. Of a rank by norms that is not known, all do.
    passes_all, are_integers = parameters.uses_norms, parameters.ranked.kind == "i"

    @inlined
    def limit(kth: Any, is_full: Any, row_norm: Any) -> Any:
        if are_integers or (is_full and not passes_all):
            return ranked(kth - from_dot(0, row_norm, 0))
        return ranked(nan)

    return Arithmetic(word, total, ranked, ranked, step, value, itself, key, limit, norm_at)


def _step(parameters: Parameters, total: Any) -> Callable[..., Any]:
    """Return what takes two words."""
    accumulate, four = inlined(parameters.accumulate), parameters.bytes
    if parameters.element.kind != "u":
        return accumulate
    if four is not None and total is int32:
        return four.step
    if four is not None:
        step = four.step

        @inlined
        def wide(given: Any, a: Any, b: Any) -> Any:
            return given + int64(step(int32(0), a, b))

        return wide

    @inlined
    def singly(given: Any, a: Any, b: Any) -> Any:
        for shift in range(0, 32, 8):
            given = total(accumulate(given, int32((a >> shift) & 255), int32((b >> shift) & 255)))
        return given

    return singly


@inlined
def first_of(given: Any, row_norm: Any, column_norm: Any) -> Any:
    """Return what is accumulated by differences."""
    return given


@inlined
def _norm(norms: Any, i: Any) -> Any:
    return norms[i]


@inlined
def _no_norm(norms: Any, i: Any) -> Any:
    return 0


@inlined
def _inverse_root(norm: Any) -> Any:
    return inverse_root(float32(norm))


@inlined
def _cosine_key(given: Any, term: Any) -> Any:
    return -float32(anew(given)) * term


@inlined
def _cosine_limit(kth: Any, is_full: Any, row_norm: Any) -> Any:
    length = float32(row_norm) * inverse_root(float32(row_norm))
    return float32(kth - 1.0 + COSINE_SLACK) * length


@inlined
def placed(thread: Any) -> Any:
    """Return where in its tile a thread is, across and down."""
    lane, warp = thread % (LANES_ACROSS * LANES_DOWN), thread // (LANES_ACROSS * LANES_DOWN)
    x = warp % WARPS_ACROSS * LANES_ACROSS + lane % LANES_ACROSS
    y = warp // WARPS_ACROSS * LANES_DOWN + lane // LANES_ACROSS
    return int32(x), int32(y)


@dataclass(frozen=True, slots=True)
class Tiling:
    """What the kernels have in common.

    Attributes
    ----------
    accumulated : callable
        ``(rows, columns, down, across, thread, row_tile, column_tile)`` returns the totals of the thread in the tile at
        row `down` and column `across`, a tuple of each row's. Rows past the end repeat the last one.
    offset : callable
        ``(number, at)``: which of the tile's rows, or columns, is so many-th of the threads that are there.
    """

    accumulated: Callable[..., Any]
    offset: Callable[..., Any]


def tiling_of(parameters: Parameters, arithmetic: Arithmetic, tile: Tile) -> Tiling:
    """Return what the kernels with these parameters have in common."""
    threads, side, vector, depth, stride = tile.threads, tile.side, tile.vector, tile.depth, tile.stride
    buffer, elements = tile.buffer, parameters.row_multiple
    words_of, zeros = vectors_of(arithmetic.word), filled(arithmetic.total, tile.each**2)
    no_words, step = filled(arithmetic.word, vector), outer(arithmetic.step)

    @inlined
    def fetch(number: Any, array: Any, first: Any, start: Any, thread: Any) -> Any:
        element = number * threads + thread
        row, at, n_vectors = first + element // depth, start + element % depth, array.shape[1] // elements
        if at < n_vectors:
            return words_of(array, min(row, array.shape[0] - 1) * n_vectors + at)
        return no_words()

    @inlined
    def spread(state: Any, number: Any, word: Any, array: Any, half: Any, thread: Any) -> Any:
        element = number // vector * threads + thread
        row, f = element // depth, element % depth * vector + number % vector
        array[uint32((half + f * stride) * vector + row)] = word
        return state

    @inlined
    def piece(number: Any, array: Any, at: Any) -> Any:
        return words_of(array, at + number * side)

    fetched, store, pieces = gathered(fetch, tile.loads), folded(spread), gathered(piece, tile.pieces)

    @inlined
    def accumulated(
        rows: Any, columns: Any, down: Any, across: Any, thread: Any, row_tile: Any, column_tile: Any
    ) -> Any:
        x, y = placed(thread)
        n_vectors = int32(rows.shape[1] // elements)
        totals, half = zeros(), int32(0)
        a, b = fetched((rows, down, int32(0), thread)), fetched((columns, across, int32(0), thread))
        for start in range(int32(0), n_vectors, int32(depth)):
            store(0, a, (row_tile, half, thread))
            store(0, b, (column_tile, half, thread))
            # One barrier is enough: what is written next is the buffer that all have left before they came here.
            cuda.syncthreads()
            a = fetched((rows, down, start + depth, thread))
            b = fetched((columns, across, start + depth, thread))
            at = half
            for _ in range(int32(0), int32(min(depth, n_vectors - start) * vector), int32(2)):
                totals = step(totals, pieces((row_tile, at + y)), pieces((column_tile, at + x)))
                at = int32(at + stride)
                totals = step(totals, pieces((row_tile, at + y)), pieces((column_tile, at + x)))
                at = int32(at + stride)
            half = int32(buffer - half)
        return totals

    @inlined
    def offset(number: Any, at: Any) -> Any:
        return uint32(uint32(number // vector * (side * vector) + number % vector) + uint32(at * vector))

    return Tiling(accumulated, offset)


@functools.cache
def search_kernel(parameters: Parameters) -> Kernel:
    """Return the kernel that selects.

    ``(rows, columns, row_norms, column_norms, tiles, values, indices)`` on a grid of tiles of rows by parts of the
    columns, of so many tiles each, fills heaps of `values` and `indices`, shape (n_parts * n_rows, k), those of the
    first part first.
    """
    arithmetic, tile = arithmetic_of(parameters), parameters.tile
    tiling = tiling_of(parameters, arithmetic, tile)
    total, ranked, word, limit_type = arithmetic.total, arithmetic.ranked, arithmetic.word, arithmetic.limit_type
    value, key, limit, norm_at = arithmetic.value, arithmetic.key, arithmetic.limit, arithmetic.norm_at
    column_term = arithmetic.column_term
    accumulated, offset = tiling.accumulated, tiling.offset
    threads, edge, each, room = tile.threads, tile.edge, tile.each, ROOM
    words, most = 2 * tile.buffer * tile.vector, room * edge
    last = largest(parameters.ranked)
    none = -math.inf if parameters.ranked.kind == "f" else int(np.iinfo(parameters.ranked).min)

    @inlined
    def column_term_at(number: Any, norms: Any, first: Any, at: Any, n_rows: Any) -> Any:
        return column_term(norm_at(norms, min(first + offset(number, at), n_rows - 1)))

    @inlined
    def limit_at(number: Any, limits: Any, at: Any) -> Any:
        return limits[offset(number, at)]

    @inlined
    def append(
        is_over: Any, number: Any, given: Any, limits: Any, terms: Any, x: Any, y: Any, first: Any, n_columns: Any,
        counts: Any, found: Any, found_columns: Any,
    ) -> Any:  # fmt: skip
        if not key(given, terms[number % each]) >= limits[number // each]:
            row, column = offset(number // each, y), offset(number % each, x)
            if uint32(column - first) < n_columns:
                place = cuda.atomic.add(counts, row, 1)
                if place < room:
                    at = uint32(row * room + uint32(place))
                    found[at], found_columns[at] = given, column
                else:
                    is_over = int32(1)
        return is_over

    terms_of, limits_at, collect = gathered(column_term_at, each), gathered(limit_at, each), folded(append)

    @compiled(*parameters, tile.pieces, launch_bounds=(threads, BLOCKS_EACH))
    def search(
        rows: Any, columns: Any, row_norms: Any, column_norms: Any, tiles: Any, values: Any, indices: Any
    ) -> None:
        # The simulator wants each shared array on a line of its own.
        row_tile = cuda.shared.array(words, word, alignment=16)
        column_tile = cuda.shared.array(words, word, alignment=16)
        found = cuda.shared.array(most, total)
        found_columns = cuda.shared.array(most, int32)
        counts = cuda.shared.array(edge, int32)
        limits = cuda.shared.array(edge, limit_type)
        thread = int32(cuda.threadIdx.x)
        n_rows, n_columns, k = rows.shape[0], columns.shape[0], values.shape[1]
        down, lists = int64(cuda.blockIdx.x) * edge, int64(cuda.blockIdx.y) * n_rows
        across = int64(cuda.blockIdx.y) * tiles * edge
        stop = min(across + tiles * edge, n_columns)
        for row in range(thread, edge, threads):
            counts[row], limits[row] = 0, none
            if down + row < n_rows:
                for j in range(k):
                    values[lists + down + row, j], indices[lists + down + row, j] = last, NO_INDEX
                limits[row] = limit(ranked(last), False, norm_at(row_norms, down + row))
        while across < stop:
            thread = anew(thread)
            totals = accumulated(rows, columns, down, across, thread, row_tile, column_tile)
            # All columns at once; if that is too many for some row, again, as many at a time as there is room for.
            first, left, width = int32(0), int32(min(edge, n_columns - across)), int32(edge)
            while first < left:
                x, y = placed(anew(thread))
                terms, count = terms_of((column_norms, across, x, n_columns)), uint32(min(width, left - first))
                args = limits_at((limits, y)), terms, x, y, first, count, counts, found, found_columns
                is_over = cuda.syncthreads_or(collect(int32(0), totals, args))
                for row in range(thread, edge, threads):
                    i = lists + down + row
                    # NaN is not at least a limit, not even that of a row past the end.
                    if counts[row] > 0 and down + row < n_rows and not is_over:
                        norm = norm_at(row_norms, down + row)
                        place, end = int32(row * room), int32(row * room + counts[row])
                        while place < end:
                            j = across + found_columns[place]
                            candidate = value(found[place], norm, norm_at(column_norms, j))
                            if comes_before(candidate, j, values[i, 0], indices[i, 0]):
                                values[i, 0], indices[i, 0] = candidate, j
                                sift_down(values, indices, i, 0, k)
                            place = anew(int32(place + 1))  # or it is unrolled, though it seldom has a second turn
                        limits[row] = limit(values[i, 0], indices[i, 0] != NO_INDEX, norm)
                    counts[row] = 0
                if is_over:
                    width = int32(room)
                else:
                    first = int32(first + width)
                cuda.syncthreads()
            across += edge

    return search


@functools.cache
def distance_kernel(parameters: Parameters, finish: Callable[..., Any], finished: Any, output: Any) -> Kernel:
    """Return the kernel ``(rows, columns, row_norms, column_norms, out)`` of (n_rows, n_columns) distances."""
    arithmetic, tile = arithmetic_of(parameters), parameters.tile
    tiling = tiling_of(parameters, arithmetic, tile)
    word, value, norm_at, finish_one = arithmetic.word, arithmetic.value, arithmetic.norm_at, inlined(finish)
    accumulated, offset = tiling.accumulated, tiling.offset
    threads, edge, each, words = tile.threads, tile.edge, tile.each, 2 * tile.buffer * tile.vector

    @inlined
    def put(
        state: Any, number: Any, given: Any, down: Any, across: Any, row_norms: Any, column_norms: Any, x: Any, y: Any,
        out: Any,
    ) -> Any:  # fmt: skip
        i, j = down + offset(number // each, y), across + offset(number % each, x)
        if i < out.shape[0] and j < out.shape[1]:
            ranked = value(given, norm_at(row_norms, i), norm_at(column_norms, j))
            out[i, j] = output(finish_one(cuda_scalars, finished(ranked)))
        return state

    put_all = folded(put)

    @compiled(*parameters, finish, finished, output, tile.pieces, launch_bounds=(threads, BLOCKS_EACH))
    def distance_tile(rows: Any, columns: Any, row_norms: Any, column_norms: Any, out: Any) -> None:
        row_tile = cuda.shared.array(words, word, alignment=16)
        column_tile = cuda.shared.array(words, word, alignment=16)
        thread = int32(cuda.threadIdx.x)
        x, y = placed(thread)
        down, across = int64(cuda.blockIdx.y) * edge, int64(cuda.blockIdx.x) * edge
        totals = accumulated(rows, columns, down, across, thread, row_tile, column_tile)
        put_all(0, totals, (down, across, row_norms, column_norms, x, y, out))

    return distance_tile


@functools.cache
def finish_kernel(finish: Callable[..., Any], finished: Any, output: Any) -> Kernel:
    """Return the kernel ``(ranked, out)`` that finishes ranked values; both (n, k), a thread for each value."""
    finish_one = inlined(finish)

    @compiled(finish, finished, output)
    def finish_all(values: Any, out: Any) -> None:
        element = cuda.grid(1)
        i, j = element // out.shape[1], element % out.shape[1]
        if i < out.shape[0]:
            out[i, j] = output(finish_one(cuda_scalars, finished(values[i, j])))

    return finish_all


@compiled()
def order_lists(values: Any, indices: Any, ranked: Any, nearest: Any) -> None:
    """Fill (n_rows, k) ascending lists from the heaps of all parts, (n_parts * n_rows, k); a block for each row."""
    thread, n_threads = cuda.threadIdx.x, cuda.blockDim.x
    i, n_rows, k = cuda.blockIdx.x, ranked.shape[0], ranked.shape[1]
    left = values.shape[0] // n_rows
    while left > 1:
        half = (left + 1) // 2
        for part in range(thread, left - half, n_threads):
            into, other = part * n_rows + i, (part + half) * n_rows + i
            for j in range(k):
                if comes_before(values[other, j], indices[other, j], values[into, 0], indices[into, 0]):
                    values[into, 0], indices[into, 0] = values[other, j], indices[other, j]
                    sift_down(values, indices, into, 0, k)
        cuda.syncthreads()
        left = half
    if thread == 0:
        sort_heap(values, indices, i, k)
    cuda.syncthreads()
    for j in range(thread, k, n_threads):
        ranked[i, j], nearest[i, j] = values[i, j], indices[i, j]


def parts_of(n_rows: int, n_columns: int, k: int, parameters: Parameters) -> tuple[int, int]:
    """Return in how many parts a search of k neighbours takes the columns, and of how many tiles.

    So many that all multiprocessors are busy, and about as long.
    """
    edge, slots = parameters.tile.edge, BLOCKS_EACH * multiprocessors()
    down, across = -(-n_rows // edge), -(-n_columns // edge)
    most = max(1, min(across, 4 * slots // down, n_columns // (8 * k)))

    def duration(parts: int) -> int:
        return -(-down * parts // slots) * (-(-across // parts) + START_TILES)

    tiles = -(-across // min(range(1, most + 1), key=duration))
    return -(-across // tiles), tiles


def search(parameters: Parameters, rows: Any, columns: Any, norms: tuple[Any, Any], tiles: int, lists: Any) -> None:
    """Fill heaps, a pair of arrays as `search_kernel` takes them, from parts of so many tiles."""
    tile = parameters.tile
    grid = -(-len(rows) // tile.edge), -(-len(columns) // (tile.edge * tiles))
    launch(search_kernel(parameters), grid, tile.threads, rows, columns, *norms, tiles, *lists)


def order(lists: Any, ranked: Any, nearest: Any) -> None:
    """Fill ascending lists from heaps."""
    launch(order_lists, (len(ranked), 1), MERGING_THREADS, *lists, ranked, nearest)


def distances(space: Space, rows: Any, columns: Any, norms: tuple[Any, Any], out: Any) -> None:
    """Fill `out` with all distances."""
    parameters = parameters_of(space)
    tile, kernel = parameters.tile, distance_kernel(parameters, space.form.finish, *_finished_as(space))
    grid = -(-len(columns) // tile.edge), -(-len(rows) // tile.edge)
    launch(kernel, grid, tile.threads, rows, columns, *norms, out)


def finish(space: Space, ranked: Any, out: Any) -> None:
    """Fill `out` with the distances of ranked values; both (n, k)."""
    launch_rows(finish_kernel(space.form.finish, *_finished_as(space)), out.size, ranked, out)


def _finished_as(space: Space) -> tuple[Any, Any]:
    """Return the types of a value that `Space.finish` takes and of the distance that it gives."""
    is_rounded = space.is_integer and not space.form.keeps_integers
    return float64 if is_rounded else numba.from_dtype(space.ranked), numba.from_dtype(space.output)
