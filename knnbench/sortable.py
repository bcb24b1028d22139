"""Exact numbers as strings of bytes that sort as the numbers do: what lists of exact neighbours are merged by.

A string holds all of its number, so that lists found anywhere, of any blocks, are in one order without another look at
the rows. Zero bytes at its end say nothing, as numpy has it for its arrays of bytes. Numbers are not negative.

A number with an end in binary is the exponent of its first digit and then all digits. Any other fraction is its
continued fraction: of two, the first partial quotient that differs decides, the larger one being the larger number at
an even place and the smaller one at an odd place, and a fraction that ends there counts as infinite (A. Ya. Khinchin,
Continued Fractions, University of Chicago Press 1964, section 3).
"""

import numpy as np

from knnbench.double_double import Double, two_sum
from knnbench.dtypes import Array

__all__ = ["binary_from", "binary_string", "binary_strings", "doubles_from", "fraction_from", "fraction_string"]

# Added to exponents, of which that of the least square of float64 is some -2150: they are then positive, and so is the
# first byte of each number but 0.
BIAS = 1 << 14

# A partial quotient below this is one byte; a larger one this, its length in two bytes, and its digits.
LONG, ENDS = 0xFE, 0xFF

# Bytes at odd places, where the order is the other way round.
FLIPPED = bytes(range(0xFF, -1, -1))

# Of numbers in arrays of float64: digits, in bytes, to which strings are made, and read, six at a time; and a power of
# two so far from the ends of the range that no shift by so many digits reaches them.
MADE, READ, HALF = 16, 12, 6
FAR = 500

# Zero bytes that may have been cut from the end: more than all digits of what the squares of float64's squares give.
ZEROS = 1 << 12


def binary_string(value: int, exponent: int) -> bytes:
    """Return the string of ``value * 2**exponent``.

    Examples
    --------
    >>> binary_string(3, 0) < binary_string(49, -4) < binary_string(1, 2)
    True
    >>> binary_string(0, 0), binary_string(3, 0) == binary_string(12, -2)
    (b'', True)
    """
    if not value:
        return b""
    n_bits = value.bit_length()
    digits = (value << -n_bits % 8).to_bytes(-(-n_bits // 8), "big")
    return ((n_bits + exponent + BIAS).to_bytes(2, "big") + digits).rstrip(b"\0")


def binary_strings(numbers: Double, exponent: int) -> tuple[Array, Array]:
    """Return the strings of numbers times ``2**exponent``, as `binary_string` has them, and which are whole.

    Parameters
    ----------
    numbers : Double
        The first component is the sum rounded; not negative.
    exponent : int

    Returns
    -------
    strings : (n,) array of bytes
    is_whole : (n,) array of bool
        False for numbers of more digits than are looked for, or far from 1.

    Examples
    --------
    >>> binary_strings(Double(np.array([3.0, 0.0]), np.array([-(2.0**-60), 0.0])), 0)[0][0] == binary_string(
    ...     3 * 2**60 - 1, -60
    ... )
    True
    """
    high, low = numbers
    is_zero = high == 0
    is_whole = (high > 2.0**-FAR) & (high < 2.0**FAR) & ((low == 0) | (np.abs(low) > high * 2.0**-FAR)) | is_zero
    first, power = np.frexp(np.where(is_whole, high, 0.0))
    power -= (first == 0.5) & (low < 0)
    leading = np.where(is_zero, 0, power + (exponent + BIAS))
    text = np.zeros((len(high), 2 + MADE), np.uint8)
    text[:, 0], text[:, 1] = leading >> 8, leading & 0xFF
    rest = Double(np.ldexp(np.where(is_whole, high, 0.0), -power), np.ldexp(np.where(is_whole, low, 0.0), -power))
    column = 2
    while column < 2 + MADE and rest.high.any():
        high, low = 256 * rest.high, 256 * rest.low
        digit = np.floor(high)
        digit -= (digit == high) & (low < 0)
        text[:, column] = digit
        rest, column = two_sum(high - digit, low), column + 1
    return np.ascontiguousarray(text[:, :column]).view(f"S{column}")[:, 0], is_whole & (rest.high == 0)


def doubles_from(strings: Array) -> tuple[Double, Array, Array]:
    """Return what strings of `binary_string` hold as arrays of float64.

    Parameters
    ----------
    strings : (n,) array of bytes

    Returns
    -------
    numbers : Double
        From 1/2 to 1, or 0.
    exponents : (n,) array of int64
        Of the powers of two that these are to be multiplied by.
    is_whole : (n,) array of bool
        False for strings of more digits.

    Examples
    --------
    >>> numbers, exponents, _ = doubles_from(np.array([binary_string(49, -4)]))
    >>> np.ldexp(numbers.high, exponents)
    array([3.0625])
    """
    text = np.ascontiguousarray(strings).view(np.uint8).reshape(len(strings), -1).astype(np.int64)
    text = np.pad(text, ((0, 0), (0, max(0, 2 + READ - text.shape[1]))))
    places = 256 ** np.arange(HALF)[::-1]
    halves = [(text[:, start : start + HALF] @ places).astype(np.float64) for start in range(2, 2 + READ, HALF)]
    numbers = two_sum(halves[0] * 256.0**-HALF, halves[1] * 256.0**-READ)
    return numbers, text[:, 0] * 256 + text[:, 1] - BIAS, (text[:, 2 + READ :] == 0).all(axis=1)


def binary_from(string: bytes) -> tuple[int, int]:
    """Return the whole number and the exponent of a string of `binary_string`.

    Examples
    --------
    >>> value, exponent = binary_from(binary_string(49, -4))
    >>> value * 2.0**exponent
    3.0625
    """
    if not string:
        return 0, 0
    digits = string[2:]
    return int.from_bytes(digits, "big"), int.from_bytes(string[:2], "big") - BIAS - 8 * len(digits)


def fraction_string(numerator: int, denominator: int) -> bytes:
    """Return the string of ``numerator / denominator``.

    Examples
    --------
    >>> fraction_string(1, 3) < fraction_string(34, 101) < fraction_string(1, 2) < fraction_string(2, 1)
    True
    >>> fraction_string(2, 6) == fraction_string(1, 3)
    True
    """
    both = numerator | denominator
    shift = (both & -both).bit_length() - 1  # a power of two in both would make each step long
    numerator, denominator = numerator >> shift, denominator >> shift
    string, flip = bytearray(), 0
    while denominator:
        term, rest = divmod(numerator, denominator)
        if term < LONG:
            string.append(term ^ flip)
        else:
            size = -(-term.bit_length() // 8)
            digits = bytes((LONG, *size.to_bytes(2, "big"), *term.to_bytes(size, "big")))
            string += digits.translate(FLIPPED) if flip else digits
        numerator, denominator, flip = denominator, rest, flip ^ 0xFF
    string.append(ENDS ^ flip)
    return bytes(string).rstrip(b"\0")


def fraction_from(string: bytes) -> tuple[int, int]:
    """Return the numerator and the denominator of a string of `fraction_string`, in lowest terms.

    Examples
    --------
    >>> fraction_from(fraction_string(34, 102)), fraction_from(fraction_string(10**9, 3))
    ((1, 3), (1000000000, 3))
    """
    string, place, flip = string + bytes(ZEROS), 0, 0
    (before, below), (numerator, denominator) = (0, 1), (1, 0)
    while (term := string[place] ^ flip) != ENDS:
        place += 1
        if term == LONG:
            digits = string if not flip else string.translate(FLIPPED)
            start = place + 2
            place = start + int.from_bytes(digits[place:start], "big")
            term = int.from_bytes(digits[start:place], "big")
        before, numerator = numerator, term * numerator + before
        below, denominator = denominator, term * denominator + below
        flip ^= 0xFF
    return numerator, denominator
