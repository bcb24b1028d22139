"""Strings of bytes in the order of the numbers that they hold, against fractions."""

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knnbench.double_double import Double, two_sum
from knnbench.sortable import (
    binary_from,
    binary_string,
    binary_strings,
    doubles_from,
    fraction_from,
    fraction_string,
)

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


PARTS = st.sampled_from([0.0, 1.0, 2.0, 255.0, 256.0, 2.0**-52, 1e300, 1e-300, 5e-324]) | st.floats(0, 2.0**60)
BELOW = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 2.0**-70, -(2.0**-70), 2.0**-300]) | st.floats(-1, 1)


@given(st.lists(st.tuples(PARTS, BELOW), min_size=1, max_size=8), st.integers(-300, 300))
def test_arrays_of_binary_numbers(parts, exponent):
    high, low = np.array(parts).T
    numbers = two_sum(high, low * high * 2.0**-52)
    strings, is_whole = binary_strings(numbers, exponent)
    found, exponents, was_read = doubles_from(strings)
    for p, (first, second) in enumerate(zip(*numbers, strict=True)):
        exact = Fraction(first) + Fraction(second)
        value, power = exact.numerator, 1 - exact.denominator.bit_length()
        if is_whole[p]:
            assert strings[p] == binary_string(value, power + exponent)
        else:  # it has many digits, or is far from 1
            assert len(binary_string(value, power)) > 18 or not 2.0**-500 < first < 2.0**500
        if is_whole[p] and was_read[p]:
            read = (Fraction(found.high[p]) + Fraction(found.low[p])) * Fraction(2) ** int(exponents[p])
            assert read == exact * Fraction(2) ** exponent
            assert found.high[p] == float(Fraction(found.high[p]) + Fraction(found.low[p]))
        elif is_whole[p]:
            assert len(strings[p]) > 14


def test_most_numbers_are_made_and_read_as_arrays():
    rng = np.random.default_rng(0)
    differences = (rng.random((1000, 50), np.float32) - rng.random((1000, 50), np.float32)).astype(np.float64)
    sums = [Fraction(sum(map(Fraction, row**2))) for row in differences]
    high = np.array([float(number) for number in sums])
    numbers = Double(
        high, np.array([float(number - Fraction(first)) for number, first in zip(sums, high, strict=True)])
    )
    strings, is_whole = binary_strings(numbers, 0)
    assert is_whole.all()
    assert doubles_from(strings)[2].all()


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
