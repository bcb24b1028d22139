"""Strings of bytes in the order of the numbers that they hold, against fractions."""

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knnbench.sortable import binary_from, binary_string, fraction_from, fraction_string

WHOLE = st.sampled_from([0, 1, 2, 3, 253, 254, 255, 256, 257, 511, 2**16, 2**64]) | st.integers(0, 2**300)
# Of squares of float64: from those of subnormal numbers to those of the largest.
BINARY = st.tuples(WHOLE, st.integers(-2148, 1900))
FRACTIONS = st.builds(Fraction, WHOLE, WHOLE.filter(bool))


def as_arrays_have_it(string):
    """Return a string that was in an array, where zero bytes at the end are lost."""
    return np.array([string, string + b"more"])[:1].tolist()[0]


def assert_in_order(numbers, strings):
    order = np.argsort(np.array(strings), kind="stable")
    assert [numbers[place] for place in order] == sorted(numbers)
    for a, b in itertools.pairwise(order):
        assert (strings[a] == strings[b]) == (numbers[a] == numbers[b])


@given(st.lists(BINARY, min_size=1, max_size=8), st.integers(0, 90))
def test_binary_numbers(given_numbers, shift):
    numbers = [value * Fraction(2) ** exponent for value, exponent in given_numbers]
    numbers += [numbers[0] + Fraction(2) ** (given_numbers[0][1] - 70), numbers[0]]
    strings = [binary_string(value, exponent) for value, exponent in given_numbers]
    value, exponent = given_numbers[0]
    strings += [binary_string((value << 70) + 1, exponent - 70), binary_string(value << shift, exponent - shift)]
    assert_in_order(numbers, strings)
    for number, string in zip(numbers, strings, strict=True):
        value, exponent = binary_from(as_arrays_have_it(string))
        assert value * Fraction(2) ** exponent == number


@given(st.lists(FRACTIONS, min_size=1, max_size=8), st.integers(1, 2**70))
def test_fractions(numbers, factor):
    # As near to the first as a fraction of such a denominator can be, on both sides.
    near = Fraction(1, numbers[0].denominator ** 2 + 1)
    numbers = [*numbers, numbers[0] + near, abs(numbers[0] - near), numbers[0]]
    strings = [fraction_string(number.numerator * factor, number.denominator * factor) for number in numbers]
    assert_in_order(numbers, strings)
    for number, string in zip(numbers, strings, strict=True):
        assert fraction_from(as_arrays_have_it(string)) == (number.numerator, number.denominator)


def test_partial_quotients_of_all_lengths():
    terms = [1, 2, 252, 253, 254, 255, 256, 2**8 - 1, 2**16, 2**24 - 1, 2**2000, 2**2000 + 1, 2**4000 - 1]
    numbers = sorted({Fraction(n) + (Fraction(1, m) if m else 0) for n in (0, *terms) for m in (0, *terms)})
    strings = [fraction_string(number.numerator, number.denominator) for number in numbers]
    assert_in_order(numbers, strings)
    assert [Fraction(*fraction_from(as_arrays_have_it(string))) for string in strings] == numbers
