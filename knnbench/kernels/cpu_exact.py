"""Values of single pairs in float64, and exactly: what certifies the answers of faster kernels.

`wide_kernels` are sums in float64 by the direct form, in whatever order is fast: `knnbench.bounds` says how far off. The
scalar function is the metric's own.

`expand` gives a value as an expansion: a few float64 numbers whose sum is the value, the largest first. Differences and
products of two numbers are exact as pairs of numbers (T. J. Dekker, A floating-point technique for extending the
available precision, Numerische Mathematik 18, 1971; D. E. Knuth, The Art of Computer Programming 2, section 4.2.2), and a
number is added to an expansion by passing what each addition rounds off to the next component (J. R. Shewchuk, Adaptive
precision floating-point arithmetic and fast robust geometric predicates, Discrete & Computational Geometry 18, 1997). What
falls out at the end is counted: where that is nothing, the value is exact. With two components this is the compensated sum
of T. Ogita, S. M. Rump and S. Oishi (Accurate sum and dot product, SIAM Journal on Scientific Computing 26, 2005).

The naive form is `knnbench.exact.whole_values`, in Python's integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from knnbench.kernels.compilation import compile_cached
from knnbench.metrics import add_absolute, add_product, add_square, keep_largest

__all__ = ["QUERIES", "WideKernels", "equal_rows", "expansion_kernel", "squared_norms", "wide_kernels"]

# Queries that a corpus row meets at once.
QUERIES = 4

# Any order of additions is as good to the bound; infinity is a value, NaN is none.
SUMS = {"reassoc", "contract", "nnan", "nsz"}

# The low half of a float64: what multiplies to split it (Dekker, Veltkamp).
SPLITTER = 134217729.0

# Below this the rounding of a product may itself be rounded; what then is lost is less than `LOST`.
SMALL_PRODUCT = 2.0**-900
LOST = 2.0**-1070


class WideKernels(NamedTuple):
    """Float64 sums; all release the interpreter lock.

    Attributes
    ----------
    pairs : callable
        ``(queries, corpus, i, j, query_scales, corpus_scales, start, stop, out)`` fills ``out[start:stop]`` with the values
        of rows ``queries[i] * query_scales`` and ``corpus[j] * corpus_scales``, all of them arrays with a number a pair.
    block : callable
        ``(queries, corpus, scales, start, stop, out)`` fills ``out[start:stop]`` with the values of the corpus rows
        ``corpus[j] * scales[j]`` and all float64 queries, whose number is a multiple of `QUERIES`.
    """

    pairs: Callable[..., None]
    block: Callable[..., None]


@functools.cache
def wide_kernels(accumulate_scalar: Callable[..., Any]) -> WideKernels:
    """Return the kernels of a metric's scalar step, compiled when they are first called."""
    accumulate = register_jitable(accumulate_scalar)

    @compile_cached(nogil=True, error_model="numpy", fastmath=SUMS)
    def pairs(
        queries: Any, corpus: Any, i: Any, j: Any, query_scales: Any, corpus_scales: Any, start: Any, stop: Any, out: Any
    ) -> None:
        for p in range(start, stop):
            a, b, of_a, of_b = i[p], j[p], query_scales[p], corpus_scales[p]
            acc = 0.0
            for f in range(queries.shape[1]):
                acc = accumulate(acc, np.float64(queries[a, f]) * of_a, np.float64(corpus[b, f]) * of_b)
            out[p] = acc

    @compile_cached(nogil=True, error_model="numpy", fastmath=SUMS)
    def block(queries: Any, corpus: Any, scales: Any, start: Any, stop: Any, out: Any) -> None:
        for j in range(start, stop):
            scale = scales[j]
            for i in range(0, len(queries), QUERIES):
                first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
                for f in range(queries.shape[1]):
                    value = np.float64(corpus[j, f]) * scale
                    first = accumulate(first, queries[i, f], value)
                    second = accumulate(second, queries[i + 1, f], value)
                    third = accumulate(third, queries[i + 2, f], value)
                    fourth = accumulate(fourth, queries[i + 3, f], value)
                out[j, i], out[j, i + 1], out[j, i + 2], out[j, i + 3] = first, second, third, fourth

    return WideKernels(pairs, block)


@compile_cached(nogil=True, error_model="numpy", fastmath=SUMS)
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
def two_sum(a: Any, b: Any) -> Any:
    """Return the sum of two numbers, and what rounding took from it."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@register_jitable
def two_product(a: Any, b: Any) -> Any:
    """Return the product of two numbers, and what rounding took from it."""
    product = a * b
    c, d = SPLITTER * a, SPLITTER * b
    high_a, high_b = c - (c - a), d - (d - b)
    low_a, low_b = a - high_a, b - high_b
    return product, low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)


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
        ``(queries, corpus, i, j, scale, start, stop, out, lost)`` adds to ``out[start:stop]``, zeros of shape (n_pairs,
        n_components), at least two, the values of rows ``queries[i] * scale`` and ``corpus[j] * scale``, scale being a power
        of two, and to ``lost[start:stop]`` bounds of what is missing. The first component is the sum of the first two,
        rounded. NaN or infinity is lost.
    """
    take = TAKE[accumulate_scalar]

    @compile_cached(nogil=True, error_model="numpy")
    def expand(
        queries: Any, corpus: Any, i: Any, j: Any, scale: Any, start: Any, stop: Any, out: Any, lost: Any
    ) -> None:
        for p in range(start, stop):
            a, b = i[p], j[p]
            total = 0.0
            for f in range(queries.shape[1]):
                total += take(out, p, np.float64(queries[a, f]) * scale, np.float64(corpus[b, f]) * scale)
            out[p, 0], out[p, 1] = two_sum(out[p, 0], out[p, 1])
            # Of a term that was counted, a rounding at the most is not in the count.
            lost[p] += 2 * total

    return expand
