"""Sums and products of two numbers as a rounded number and what rounding took from it, which loses nothing.

D. E. Knuth, The Art of Computer Programming 2, section 4.2.2; T. J. Dekker, A floating-point technique for extending
the available precision, Numerische Mathematik 18 (1971), 224-242. No compiler may reorder them.
"""

from typing import Any

from numba.extending import register_jitable

__all__ = ["two_product", "two_sum"]

# The low half of a float64: what multiplies to split it (Dekker, Veltkamp).
SPLITTER = 134217729.0


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
