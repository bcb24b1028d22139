"""Distance kernels for the CPU, generic in a metric's scalar functions and compiled by numba.

A task is a block of queries against the whole corpus. Inside it a tile of `TILE_QUERIES` queries meets one
corpus row at a time, so that each feature of the row is loaded once for all of them, and LLVM makes vector
instructions of the loop over features. Neighbours are selected while distances are computed: only a heap of
k a query is held.

The naive form of both kernels is `knnbench.backends.python`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable

from knnbench.dtypes import Array
from knnbench.kernels.compilation import compile_cached
from knnbench.metrics import Space

__all__ = ["TileKernels", "tile_kernels"]

TILE_QUERIES = 4

# Bytes of corpus rows that are kept in the second-level cache while the queries of a task pass over them.
CORPUS_TILE_BYTES = 128 * 1024

# Sums may be taken in another order than written, which is what vector instructions need. Nothing is assumed
# about NaN and infinity, which overflow can produce.
REORDERED = {"reassoc", "contract", "nsz"}


@dataclass(frozen=True, slots=True)
class TileKernels:
    """The compiled kernels of one space; both release the interpreter lock.

    Attributes
    ----------
    pairwise : callable
        ``(queries, corpus, query_norms, corpus_norms, out)`` fills out (n_queries, n_corpus) with the values
        to rank.
    knn : callable
        ``(queries, corpus, query_norms, corpus_norms, values, indices)`` fills (n_queries, k) arrays with the
        k smallest values and their corpus rows, in the total order (value, index).
    """

    pairwise: Callable[..., None]
    knn: Callable[..., None]


@register_jitable
def comes_before(value: Any, index: Any, other_value: Any, other_index: Any) -> Any:
    """Return whether (value, index) precedes another in the total order."""
    return value < other_value or (value == other_value and index < other_index)


@register_jitable
def sift_down(values: Any, indices: Any, root: Any, size: Any) -> None:
    """Restore the heap whose largest pair stands first, after its root was replaced."""
    value, index = values[root], indices[root]
    while True:
        child = 2 * root + 1
        if child >= size:
            break
        right = child + 1
        if right < size and comes_before(values[child], indices[child], values[right], indices[right]):
            child = right
        if not comes_before(value, index, values[child], indices[child]):
            break
        values[root], indices[root] = values[child], indices[child]
        root = child
    values[root], indices[root] = value, index


@register_jitable
def sort_heap(values: Any, indices: Any) -> None:
    """Turn a heap into an ascending list, in place."""
    for last in range(len(values) - 1, 0, -1):
        value, index = values[0], indices[0]
        values[0], indices[0] = values[last], indices[last]
        values[last], indices[last] = value, index
        sift_down(values, indices, 0, last)


def tile_kernels(space: Space) -> TileKernels:
    """Return the kernels of a space, compiled when they are first called.

    Parameters
    ----------
    space : Space

    Returns
    -------
    TileKernels
    """
    # The type that a feature takes in arithmetic: numba would take uint8 to unsigned 64-bit integers,
    # whose differences wrap, and signed 32-bit ones to 64 bits, of which a vector holds half as many.
    loaded = space.dtype if not space.is_integer else space.accumulator
    form = space.form
    return _compiled(
        form.accumulate,
        form.rank,
        form.rank_uses_norms,
        numba.from_dtype(loaded),
        numba.from_dtype(space.accumulator),
        numba.from_dtype(space.ranked),
    )


@functools.cache
def _compiled(
    accumulate_scalar: Callable[..., Any],
    rank_scalar: Callable[..., Any],
    uses_norms: bool,
    loaded: Any,
    accumulator: Any,
    ranked: Any,
) -> TileKernels:
    # Closures over register_jitable functions, because numba caches those on disk and refuses functions
    # that are arguments.
    accumulate = register_jitable(accumulate_scalar)
    rank = register_jitable(rank_scalar)

    @register_jitable
    def add(acc: Any, a: Any, b: Any) -> Any:
        return accumulator(accumulate(acc, a, b))

    @register_jitable
    def tile(queries: Any, corpus: Any, i: Any, j: Any) -> Any:
        """Return the accumulated values of queries i to i + 3 and corpus row j; past the end, of the last query."""
        last = queries.shape[0] - 1
        row0, row1 = queries[i], queries[min(i + 1, last)]
        row2, row3 = queries[min(i + 2, last)], queries[min(i + 3, last)]
        point = corpus[j]
        acc0 = acc1 = acc2 = acc3 = accumulator(0)
        for f in range(point.shape[0]):
            b = loaded(point[f])
            acc0 = add(acc0, loaded(row0[f]), b)
            acc1 = add(acc1, loaded(row1[f]), b)
            acc2 = add(acc2, loaded(row2[f]), b)
            acc3 = add(acc3, loaded(row3[f]), b)
        return acc0, acc1, acc2, acc3

    @register_jitable
    def ranked_value(acc: Any, query_norms: Any, corpus_norms: Any, i: Any, j: Any) -> Any:
        if uses_norms:
            return ranked(rank(acc, query_norms[i], corpus_norms[j]))
        return ranked(rank(acc, 0, 0))

    @compile_cached(nogil=True, fastmath=REORDERED, error_model="numpy")
    def pairwise(queries: Any, corpus: Any, query_norms: Any, corpus_norms: Any, out: Any) -> None:
        n_queries, n_corpus = queries.shape[0], corpus.shape[0]
        step = max(1, CORPUS_TILE_BYTES // (corpus.shape[1] * corpus.itemsize))
        for start in range(0, n_corpus, step):
            for i in range(0, n_queries, TILE_QUERIES):
                for j in range(start, min(start + step, n_corpus)):
                    accs = tile(queries, corpus, i, j)
                    for t in range(min(TILE_QUERIES, n_queries - i)):
                        out[i + t, j] = ranked_value(accs[t], query_norms, corpus_norms, i + t, j)

    @compile_cached(nogil=True, fastmath=REORDERED, error_model="numpy")
    def knn(queries: Any, corpus: Any, query_norms: Any, corpus_norms: Any, values: Any, indices: Any) -> None:
        n_queries, n_corpus, k = queries.shape[0], corpus.shape[0], values.shape[1]
        step = max(1, CORPUS_TILE_BYTES // (corpus.shape[1] * corpus.itemsize))
        for start in range(0, n_corpus, step):
            for i in range(0, n_queries, TILE_QUERIES):
                for j in range(start, min(start + step, n_corpus)):
                    accs = tile(queries, corpus, i, j)
                    for t in range(min(TILE_QUERIES, n_queries - i)):
                        value = ranked_value(accs[t], query_norms, corpus_norms, i + t, j)
                        heap, rows = values[i + t], indices[i + t]
                        if j < k:
                            heap[j], rows[j] = value, j
                            if j == k - 1:
                                for root in range(k // 2 - 1, -1, -1):
                                    sift_down(heap, rows, root, k)
                        elif value < heap[0]:
                            # Rows come in ascending order, so one that equals the k-th value comes after it.
                            heap[0], rows[0] = value, j
                            sift_down(heap, rows, 0, k)
        for i in range(n_queries):
            sort_heap(values[i], indices[i])

    return TileKernels(pairwise, knn)


def no_norms() -> Array:
    """Return the norms to give where the ranking does not look at them."""
    return np.zeros(0, np.float64)
