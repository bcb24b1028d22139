"""Exact numbers as strings of bytes that sort as the numbers do: what lists of exact neighbours are merged by.

A string holds all of its number, so that lists found anywhere, of any blocks, are in one order without another look at
the rows. Zero bytes at its end say nothing, as numpy has it for its arrays of bytes. Numbers are not negative.

A number with an end in binary is the exponent of its first digit and then all digits. Any other fraction is its
continued fraction: of two, the first partial quotient that differs decides, the larger one being the larger number at
an even place and the smaller one at an odd place, and a fraction that ends there counts as infinite (A. Ya. Khinchin,
Continued Fractions, University of Chicago Press 1964, section 3).
"""

__all__ = ["binary_from", "binary_string", "fraction_from", "fraction_string"]

# Added to exponents, of which that of the least square of float64 is some -2150: they are then positive, and so is the
# first byte of each number but 0.
BIAS = 1 << 14

# A partial quotient below this is one byte; a larger one this, its length in two bytes, and its digits.
LONG, ENDS = 0xFE, 0xFF

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
            string += bytes(byte ^ flip for byte in (LONG, *size.to_bytes(2, "big"), *term.to_bytes(size, "big")))
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
            digits = string[place:] if not flip else bytes(byte ^ 0xFF for byte in string[place:])
            size = int.from_bytes(digits[:2], "big")
            term = int.from_bytes(digits[2 : 2 + size], "big")
            place += 2 + size
        before, numerator = numerator, term * numerator + before
        below, denominator = denominator, term * denominator + below
        flip ^= 0xFF
    return numerator, denominator
