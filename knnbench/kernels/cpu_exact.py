"""Values of single pairs in float64, and exactly: what certifies the answers of faster kernels.

`wide_kernels` are float64 values by the direct form, in vectors: `knnbench.bounds` says how far off.

`expand` gives a value as an expansion: a few float64 numbers whose sum is the value, the largest first. Differences and
products of two numbers are exact as pairs of numbers (`knnbench.kernels.expansions`), and a number is added to an
expansion by passing what each addition rounds off to the next component (J. R. Shewchuk, Adaptive precision floating-
point arithmetic and fast robust geometric predicates, Discrete & Computational Geometry 18, 1997). What falls out at
the end is counted: where that is nothing, the value is exact. With two components this is the compensated sum of T.
Ogita, S. M. Rump and S. Oishi (Accurate sum and dot product, SIAM Journal on Scientific Computing 26, 2005).

The naive form is `knnbench.exact.whole_values`, in Python's integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from knnbench.dtypes import Array
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_loops import row_values
from knnbench.kernels.cpu_simd import Vectors, cpu_features, simd_level
from knnbench.kernels.cpu_tiles import plan_of
from knnbench.kernels.expansions import two_product, two_sum
from knnbench.metrics import Space, add_absolute, add_product, add_square, keep_largest

__all__ = ["WideKernels", "equal_rows", "expansion_kernel", "squared_norms", "wide_kernels", "workspace"]

# Corpus rows that a query meets at once: in float64 they stay in the first-level cache.
ROWS = 4

# Below this the rounding of a product may itself be rounded; what then is lost is less than `LOST`.
SMALL_PRODUCT = 2.0**-900
LOST = 2.0**-1070


class WideKernels(NamedTuple):
    """Values in float64; all kernels release the interpreter lock.

    Attributes
    ----------
    pairs : callable
        ``(queries, corpus, i, j, query_scales, corpus_scales, *workspace, start, stop, out)`` fills
        ``out[start:stop]`` with the values of rows ``queries[i] * query_scales`` and ``corpus[j] * corpus_scales``; all
        but the rows are arrays of a number a pair.
    block : callable
        ``(queries, corpus, scales, *workspace, start, stop, out)`` fills ``out[:, start:stop]`` with the values of all
        queries, which are float64, and corpus rows ``corpus[j] * scales[j]``.
    """

    pairs: Callable[..., None]
    block: Callable[..., None]


def workspace(n_features: int) -> tuple[Array, Array, Array]:
    """Return what a thread holds for `WideKernels`: a query and some corpus rows in float64, and their values."""
    return np.empty((1, n_features)), np.zeros((ROWS, n_features)), np.empty(ROWS)


def wide_kernels(space: Space) -> WideKernels:
    """Return the kernels of a metric, for rows of float32 or float64, compiled when they are first called."""
    wide = Space(space.metric, np.dtype(np.float64), space.n_features)
    return _wide_kernels(wide.form.accumulate, plan_of(wide, simd_level(), cpu_features()).rows)


@functools.cache
def _wide_kernels(accumulate_scalar: Callable[..., Any], vectors: Vectors) -> WideKernels:
    accumulate, name, least_features = register_jitable(accumulate_scalar), vectors.name, vectors.features

    @register_jitable
    def widen(rows: Any, i: Any, scale: Any, out: Any, r: Any) -> None:
        """Fill row r of a float64 array."""
        for f in range(rows.shape[1]):
            out[r, f] = np.float64(rows[i, f]) * scale

    @register_jitable
    def values(one: Any, i: Any, others: Any, count: Any, out: Any) -> None:
        """Fill `out` with the values of a row and the first others."""
        n_features = one.shape[1]
        if n_features >= least_features:
            if count == 1:
                row_values(name, 1, one, i, others, 0, n_features, out)
            else:
                row_values(name, ROWS, one, i, others, 0, n_features, out)
            return
        for r in range(count):
            out[r] = 0.0
            for f in range(n_features):
                out[r] = accumulate(out[r], one[i, f], others[r, f])

    @compile_cached(nogil=True, error_model="numpy")
    def pairs(
        queries: Any,
        corpus: Any,
        i: Any,
        j: Any,
        query_scales: Any,
        corpus_scales: Any,
        query: Any,
        rows: Any,
        found: Any,
        start: Any,
        stop: Any,
        out: Any,
    ) -> None:
        for p in range(start, stop):
            if p == start or i[p] != i[p - 1]:
                widen(queries, i[p], query_scales[p], query, 0)
            widen(corpus, j[p], corpus_scales[p], rows, 0)
            values(query, 0, rows, 1, found)
            out[p] = found[0]

    @compile_cached(nogil=True, error_model="numpy")
    def block(
        queries: Any, corpus: Any, scales: Any, query: Any, rows: Any, found: Any, start: Any, stop: Any, out: Any
    ) -> None:
        for j in range(start, stop, ROWS):
            count = min(ROWS, stop - j)
            for r in range(count):
                widen(corpus, j + r, scales[j + r], rows, r)
            for i in range(len(queries)):
                values(queries, i, rows, count, found)
                for r in range(count):
                    out[i, j + r] = found[r]

    return WideKernels(pairs, block)


@compile_cached(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def squared_norms(rows: Any, index: Any, start: Any, stop: Any, out: Any) -> None:
    """Fill ``out[start:stop]`` with the squared norms of rows ``index[start:stop]``, in float64."""
    for p in range(start, stop):
        i, total = index[p], 0.0
        for f in range(rows.shape[1]):
            value = np.float64(rows[i, f])
            total += value * value
        out[p] = total


@compile_cached(nogil=True, error_model="numpy")
def equal_rows(rows: Any, i: Any, j: Any, start: Any, stop: Any, out: Any) -> None:
    """Fill ``out[start:stop]`` with whether rows `i` and rows `j` have the same values."""
    for p in range(start, stop):
        a, b, same = i[p], j[p], True
        for f in range(rows.shape[1]):
            same &= rows[a, f] == rows[b, f]
        out[p] = same


# No compiler may reorder what follows.


@register_jitable
def grow(acc: Any, p: Any, term: Any) -> Any:
    """Add a number to expansion p, and return the magnitude of what it has no room for."""
    for c in range(acc.shape[1]):
        if term == 0:
            return 0.0
        acc[p, c], term = two_sum(acc[p, c], term)
    return abs(term)


@register_jitable
def grow_product(acc: Any, p: Any, a: Any, b: Any) -> Any:
    """Add a product to expansion p, and return a bound of what is lost."""
    if a == 0 or b == 0:
        return 0.0
    product, rest = two_product(a, b)
    lost = grow(acc, p, product) + grow(acc, p, rest)
    return lost if abs(product) > SMALL_PRODUCT else lost + LOST


@register_jitable
def take_square(acc: Any, p: Any, a: Any, b: Any) -> Any:
    """Add the squared difference of one feature."""
    high, low = two_sum(a, -b)
    lost = grow_product(acc, p, high, high)
    if low != 0:
        lost += grow_product(acc, p, 2 * high, low) + grow_product(acc, p, low, low)
    return lost


@register_jitable
def take_absolute(acc: Any, p: Any, a: Any, b: Any) -> Any:
    """Add the absolute difference of one feature."""
    high, low = two_sum(a, -b)
    if high < 0:
        high, low = -high, -low
    return grow(acc, p, high) + grow(acc, p, low)


@register_jitable
def take_largest(acc: Any, p: Any, a: Any, b: Any) -> Any:
    """Keep the largest absolute difference; of equal roundings the rests decide."""
    high, low = two_sum(a, -b)
    if high < 0:
        high, low = -high, -low
    if high > acc[p, 0] or (high == acc[p, 0] and low > acc[p, 1]):
        acc[p, 0], acc[p, 1] = high, low
    return 0.0 if high - high == 0 else high  # an overflow is lost


# By the scalar function of a metric.
TAKE: dict[Callable[..., Any], Callable[..., Any]] = {
    add_square: take_square,
    add_absolute: take_absolute,
    keep_largest: take_largest,
    add_product: grow_product,
}


@functools.cache
def expansion_kernel(accumulate_scalar: Callable[..., Any]) -> Callable[..., None]:
    """Return the kernel that gives values of pairs as expansions.

    Returns
    -------
    callable
        ``(queries, corpus, i, j, start, stop, out, lost)`` adds to ``out[start:stop]``, zeros of shape (n_pairs,
        n_components), at least two, the values of rows ``queries[i]`` and ``corpus[j]``, and to ``lost[start:stop]``
        bounds of what is missing. The first component is the sum of the first two, rounded. NaN or infinity is lost.
    """
    take = TAKE[accumulate_scalar]

    @compile_cached(nogil=True, error_model="numpy")
    def expand(queries: Any, corpus: Any, i: Any, j: Any, start: Any, stop: Any, out: Any, lost: Any) -> None:
        for p in range(start, stop):
            a, b = i[p], j[p]
            total = 0.0
            for f in range(queries.shape[1]):
                total += take(out, p, np.float64(queries[a, f]), np.float64(corpus[b, f]))
            out[p, 0], out[p, 1] = two_sum(out[p, 0], out[p, 1])
            # Of a term that was counted, a rounding at the most is not in the count.
            lost[p] += 2 * total

    return expand
