"""Arithmetic on arrays of numbers that are unevaluated sums of two float64: about 106 bits.

By T. J. Dekker, A floating-point technique for extending the available precision, Numerische Mathematik 18 (1971),
224-242. Numbers must be so far from the ends of the range that no product leaves it.
"""

from typing import NamedTuple

import numpy as np

from knnbench.bounds import Floats

__all__ = ["ERROR", "Double", "one_minus_cosine", "root"]

# Of one product, sum, root or quotient below, relative to the operands, with room to spare: Dekker's are some 2**-103.
ERROR = 2.0**-98

SPLITTER = 134217729.0


class Double(NamedTuple):
    """The sum of two arrays, of which the first is that sum rounded."""

    high: Floats
    low: Floats


def two_sum(a: Floats, b: Floats) -> Double:
    """Return a sum, and what rounding took from it."""
    total = a + b
    part = total - a
    return Double(total, (a - (total - part)) + (b - part))


def two_product(a: Floats, b: Floats) -> Double:
    """Return a product, and what rounding took from it."""
    product = a * b
    (high_a, low_a), (high_b, low_b) = _halves(a), _halves(b)
    return Double(product, low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b))


def _halves(a: Floats) -> tuple[Floats, Floats]:
    scaled = SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def add(a: Double, b: Double) -> Double:
    """Return a sum."""
    high, low = two_sum(a.high, b.high), two_sum(a.low, b.low)
    first = two_sum(high.high, high.low + low.high)
    return two_sum(first.high, first.low + low.low)


def negative(a: Double) -> Double:
    """Return the number with the other sign."""
    return Double(-a.high, -a.low)


def multiply(a: Double, b: Double) -> Double:
    """Return a product."""
    product = two_product(a.high, b.high)
    return two_sum(product.high, product.low + (a.high * b.low + a.low * b.high))


def divide(a: Double, b: Double) -> Double:
    """Return a quotient; the first digits, and those of what is left."""
    first = a.high / b.high
    rest = add(a, negative(multiply(Double(first, np.zeros_like(first)), b)))
    second = rest.high / b.high
    third = add(rest, negative(multiply(Double(second, np.zeros_like(second)), b)))
    total = two_sum(first, second)
    return two_sum(total.high, total.low + third.high / b.high)


def root(a: Double) -> Double:
    """Return a root: the rounded one, and one step of Newton's method; 0 for 0.

    Examples
    --------
    >>> found = root(Double(np.array([2.0]), np.array([0.0])))
    >>> found.high, abs(2 - multiply(found, found).high) < 1e-30
    (array([1.41421356]), array([ True]))
    """
    first = np.sqrt(a.high)
    rest = add(a, negative(two_product(first, first)))
    step = np.zeros_like(first)
    np.divide(rest.high, 2 * first, out=step, where=first > 0)
    return two_sum(first, step)


def one_minus_cosine(dot: Double, first: Double, second: Double) -> tuple[Double, Floats, Floats]:
    """Return ``1 - dot / sqrt(first * second)``.

    Parameters
    ----------
    dot, first, second : Double
        Of a dot product, and of both squared norms.

    Returns
    -------
    result : Double
    share : array of float64
        How much of the operands' digits is left of it: their relative error, divided by it, is that of the result.
    length : array of float64
        The root.

    Notes
    -----
    For a positive product it is ``(first second - dot^2) / (r (r + dot))``, r the root.
    """
    norms = multiply(first, second)
    length = root(norms)
    difference = add(norms, negative(multiply(dot, dot)))
    near = divide(difference, multiply(length, add(length, dot)))
    far = divide(add(length, negative(dot)), length)
    is_near = dot.high > 0
    share = np.where(is_near, difference.high / norms.high / 8, 1 / 8)
    result = Double(np.where(is_near, near.high, far.high), np.where(is_near, near.low, far.low))
    return result, share, length.high
