"""Distance and selection kernels for CUDA, generic in a metric's scalar functions and compiled by numba.

A block of threads computes a square tile of pairs. Both sides' rows pass through shared memory, `FEATURES` at
a time, and each thread keeps `PER_THREAD` x `PER_THREAD` accumulators in registers, so that what it reads from
shared memory serves `PER_THREAD` pairs. Selection is a second kernel with one thread a query, which reads the
tile's values, with the queries side by side, and keeps a heap of k in global memory.

A distance is symmetric, so one tile kernel serves both layouts: queries down and corpus across for `pairwise`,
corpus down and queries across for selection. The naive form of all is `knnbench.backends.python`.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numba.cuda
from numba import float64, int32, int64
from numba.extending import register_jitable

from knnbench.kernels import cuda_scalars
from knnbench.kernels.compilation import cached_on_disk
from knnbench.kernels.heap import comes_before, sift_down, sort_heap
from knnbench.metrics import Space, unchanged

__all__ = [
    "convert",
    "distance_tile",
    "find_rows",
    "finish_values",
    "launch_rows",
    "launch_tile",
    "ranked_tile",
    "sort_lists",
    "squared_norms",
    "start_lists",
    "unit_rows",
    "update_lists",
]

# A tile is computed by THREADS x THREADS threads.
THREADS = 16
PER_THREAD = 4
FEATURES = 16

# Threads a block where each has a row, a list or an element to itself.
ROW_THREADS = 128

# What fills the lists before they hold neighbours; every corpus row comes before it.
NO_INDEX = (1 << 63) - 1

# The simulator swaps a global of this module that is `numba.cuda`, which is filled in at run time, so that no type
# checker knows its names.
cuda: Any = numba.cuda

Kernel = Any


def compiled(function: Callable[..., None]) -> Kernel:
    """Return a kernel, compiled when it is first started and kept on disk."""
    with cached_on_disk() as cache:
        return cuda.jit(cache=cache)(function)


def launch_tile(kernel: Kernel, *args: Any) -> None:
    """Start a tile kernel on all of its last argument, the array that it fills."""
    edge = THREADS * PER_THREAD
    down, across = args[-1].shape
    launch(kernel, (-(-across // edge), -(-down // edge)), (THREADS, THREADS), *args)


def launch_rows(kernel: Kernel, count: int, *args: Any) -> None:
    """Start a kernel with a thread for each of `count` rows, lists or elements."""
    launch(kernel, (-(-count // ROW_THREADS), 1), (ROW_THREADS, 1), *args)


def launch(kernel: Kernel, grid: tuple[int, int], block: tuple[int, int], *args: Any) -> None:
    """Start a kernel."""
    with warnings.catch_warnings():
        # numba warns of a small grid, which is what a small problem makes.
        warnings.filterwarnings("ignore", message="Grid size")
        configured = kernel[grid, block]
    configured(*args)


def ranked_tile(space: Space) -> Kernel:
    """Return the kernel of the values to rank.

    ``(rows, columns, row_norms, column_norms, first, out)`` fills out (n, n_columns) with the values of
    ``rows[first : first + n]`` against all `columns`. Norms are float64, and read only if the ranking uses them.
    """
    ranked = numba.from_dtype(space.ranked)
    return _tile(space.form.accumulate, space.form.rank, space.form.rank_uses_norms, unchanged,
                 *_accumulated_as(space), ranked, ranked)  # fmt: skip


def distance_tile(space: Space) -> Kernel:
    """Return the kernel of the distances; arguments as for `ranked_tile`."""
    return _tile(space.form.accumulate, space.form.rank, space.form.rank_uses_norms, space.form.finish,
                 *_accumulated_as(space), *_finished_as(space))  # fmt: skip


def finish_values(space: Space) -> Kernel:
    """Return the kernel ``(ranked, out)`` that finishes ranked values; both (n, k), a thread for each value."""
    return _finisher(space.form.finish, *_finished_as(space))


def _accumulated_as(space: Space) -> tuple[Any, Any]:
    """Return the types of a feature in arithmetic and of an accumulator."""
    # numba takes uint8 to unsigned 64-bit integers, whose differences wrap.
    loaded = int32 if space.is_integer else numba.from_dtype(space.dtype)
    return loaded, numba.from_dtype(space.accumulator)


def _finished_as(space: Space) -> tuple[Any, Any]:
    """Return the types of a value that `Space.finish` takes and of the distance that it gives."""
    is_rounded = space.is_integer and not space.form.keeps_integers
    return float64 if is_rounded else numba.from_dtype(space.ranked), numba.from_dtype(space.output)


@functools.cache
def _tile(
    accumulate_scalar: Callable[..., Any],
    rank_scalar: Callable[..., Any],
    uses_norms: bool,
    finish_scalar: Callable[..., Any],
    loaded: Any,
    accumulator: Any,
    ranked: Any,
    output: Any,
) -> Kernel:
    accumulate, rank, finish = map(register_jitable, (accumulate_scalar, rank_scalar, finish_scalar))
    threads, per_thread, features = THREADS, PER_THREAD, FEATURES
    edge = threads * per_thread
    # A column more than is used: the threads that store one row's features side by side then meet different
    # banks of shared memory.
    padded = edge + 1

    @register_jitable
    def feature(array: Any, i: Any, f: Any) -> Any:
        # Two zeros past the ends add nothing, under any metric.
        if i < array.shape[0] and f < array.shape[1]:
            return loaded(array[i, f])
        return loaded(0)

    @compiled
    def tile(rows: Any, columns: Any, row_norms: Any, column_norms: Any, first: Any, out: Any) -> None:
        # The simulator wants each shared array on a line of its own.
        row_tile = cuda.shared.array((features, padded), loaded)
        column_tile = cuda.shared.array((features, padded), loaded)
        acc = cuda.local.array((per_thread, per_thread), accumulator)
        for r in range(per_thread):
            for c in range(per_thread):
                acc[r, c] = accumulator(0)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        down, across = cuda.blockIdx.y * edge, cuda.blockIdx.x * edge
        for start in range(0, rows.shape[1], features):
            for element in range(y * threads + x, edge * features, threads * threads):
                i, f = element // features, element % features
                row_tile[f, i] = feature(rows, first + down + i, start + f)
                column_tile[f, i] = feature(columns, across + i, start + f)
            cuda.syncthreads()
            for f in range(features):
                for r in range(per_thread):
                    for c in range(per_thread):
                        acc[r, c] = accumulate(acc[r, c], row_tile[f, y + r * threads], column_tile[f, x + c * threads])
            cuda.syncthreads()
        for r in range(per_thread):
            i = down + y + r * threads
            for c in range(per_thread):
                j = across + x + c * threads
                if i < out.shape[0] and j < out.shape[1]:
                    if uses_norms:
                        value = ranked(rank(acc[r, c], row_norms[first + i], column_norms[j]))
                    else:
                        value = ranked(rank(acc[r, c], 0, 0))
                    out[i, j] = output(finish(cuda_scalars, value))

    return tile


@functools.cache
def _finisher(finish_scalar: Callable[..., Any], ranked: Any, output: Any) -> Kernel:
    finish = register_jitable(finish_scalar)

    @compiled
    def finish_all(values: Any, out: Any) -> None:
        element = cuda.grid(1)
        i, j = element // out.shape[1], element % out.shape[1]
        if i < out.shape[0]:
            out[i, j] = output(finish(cuda_scalars, ranked(values[i, j])))

    return finish_all


@compiled
def start_lists(values: Any, indices: Any, largest: Any) -> None:
    """Fill (n, k) lists, a thread for each, with what every pair (value, index) precedes."""
    i = cuda.grid(1)
    if i < values.shape[0]:
        for j in range(values.shape[1]):
            values[i, j] = largest
            indices[i, j] = NO_INDEX


@compiled
def update_lists(tile: Any, first: Any, values: Any, indices: Any) -> None:
    """Take a tile (m, n) of the values of corpus rows from `first` on into n heaps of k, a thread for each."""
    i = cuda.grid(1)
    if i < values.shape[0]:
        for j in range(tile.shape[0]):
            if comes_before(tile[j, i], first + j, values[i, 0], indices[i, 0]):
                values[i, 0], indices[i, 0] = tile[j, i], first + j
                sift_down(values, indices, i, 0, values.shape[1])


@compiled
def sort_lists(values: Any, indices: Any) -> None:
    """Turn heaps into ascending lists, a thread for each."""
    i = cuda.grid(1)
    if i < values.shape[0]:
        sort_heap(values, indices, i, values.shape[1])


@compiled
def squared_norms(rows: Any, norms: Any) -> None:
    """Fill `norms` with the squared norms of uint8 rows, a thread for each."""
    i = cuda.grid(1)
    if i < rows.shape[0]:
        total = int64(0)
        for f in range(rows.shape[1]):
            total += int64(rows[i, f]) * int64(rows[i, f])
        norms[i] = total


@compiled
def unit_rows(rows: Any, out: Any) -> None:
    """Fill `out` with float rows brought to unit length in float64, a thread for each; as `Metric.prepare_rows`."""
    i = cuda.grid(1)
    if i < rows.shape[0]:
        largest = float64(0)
        for f in range(rows.shape[1]):
            largest = max(largest, abs(float64(rows[i, f])))
        total = float64(0)
        for f in range(rows.shape[1]):
            # Of at most 1, so that no square overflows, and only those that do not matter underflow.
            scaled = float64(rows[i, f]) / largest
            total += scaled * scaled
        norm = math.sqrt(total)
        for f in range(rows.shape[1]):
            out[i, f] = float64(rows[i, f]) / largest / norm


@compiled
def find_rows(rows: Any, found: Any) -> None:
    """Lower found[0] to the first row that is not finite and found[1] to the first of zeros, a thread for each."""
    i = cuda.grid(1)
    if i < rows.shape[0]:
        is_finite, is_zero = True, True
        for f in range(rows.shape[1]):
            is_finite = is_finite and math.isfinite(rows[i, f])
            is_zero = is_zero and rows[i, f] == 0
        if not is_finite:
            cuda.atomic.min(found, 0, i)
        if is_zero:
            cuda.atomic.min(found, 1, i)


@compiled
def convert(source: Any, out: Any) -> None:
    """Copy an array (n, m) of any layout and dtype, a thread for each element."""
    element = cuda.grid(1)
    i, j = element // out.shape[1], element % out.shape[1]
    if i < out.shape[0]:
        out[i, j] = source[i, j]
