"""Double-double arithmetic against fractions."""

from fractions import Fraction

import numpy as np
import pytest

from knnbench.double_double import ERROR, Double, add, divide, multiply, negative, one_minus_cosine, root

N = 200


def numbers(rng, *, positive=False):
    """Return numbers of all sizes, some of which nearly cancel."""
    high = rng.normal(size=N) * 10.0 ** rng.uniform(-40, 40, N)
    high = np.abs(high) if positive else high
    return Double(high, high * 2.0**-54 * rng.uniform(-1, 1, N))


def fractions(number):
    return [Fraction(a) + Fraction(b) for a, b in zip(number.high.tolist(), number.low.tolist(), strict=True)]


@pytest.mark.parametrize("name", ["multiply", "divide", "add", "subtract nearly equal", "root"])
def test_operations_keep_their_error(name, rng):
    a, b = numbers(rng, positive=name == "root"), numbers(rng)
    if name == "subtract nearly equal":
        b = negative(Double(a.high, a.low + a.high * 2.0**-70))
    x, y = fractions(a), fractions(b)
    if name == "root":
        got = fractions(root(a))
        for found, exact in zip(got, x, strict=True):
            assert abs(found**2 - exact) <= 2 * ERROR * exact
        return
    operation, exactly, scale = {
        "multiply": (multiply, lambda p, q: p * q, lambda p, q: abs(p * q)),
        "divide": (divide, lambda p, q: p / q, lambda p, q: abs(p / q)),
    }.get(name, (add, lambda p, q: p + q, lambda p, q: abs(p) + abs(q)))
    worst = Fraction(0)
    for found, p, q in zip(fractions(operation(a, b)), x, y, strict=True):
        worst = max(worst, abs(found - exactly(p, q)) / scale(p, q))
    assert worst <= ERROR
    assert worst > ERROR / 2**12 or "subtract" in name  # or it would not be these digits that are compared


def test_a_cosine_is_as_near_as_its_share_says(rng):
    first, second = numbers(rng, positive=True), numbers(rng, positive=True)
    length = root(multiply(first, second)).high
    angle = 1 - 10.0 ** rng.uniform(-20, 0.3, N)
    dot = Double(length * angle, length * 2.0**-55)
    got, share, _ = one_minus_cosine(dot, first, second)
    for found, part, d, p, q in zip(fractions(got), share.tolist(), *map(fractions, (dot, first, second)), strict=True):
        if part < 2.0**-40:
            continue
        # |1 - c - found| <= e means that c^2 lies between two squares.
        allowed = found * Fraction(ERROR) / Fraction(part)
        low, high = 1 - found - allowed, 1 - found + allowed
        square, sign = d * d / (p * q), 1 if d > 0 else -1
        assert low * abs(low) <= sign * square <= high * abs(high)
