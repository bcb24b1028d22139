"""Timing one function, and saying how sure the figure is."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["median_interval", "timed", "timed_repeats"]

LEAST_REPEATS = 3
MOST_REPEATS = 100

CONFIDENCE = 0.95


def timed(function: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[float, Any]:
    """Return the seconds that a call took until its device was done, and what it returned."""
    synchronize()
    start = time.perf_counter()
    answer = function()
    synchronize()
    return time.perf_counter() - start, answer


def timed_repeats(function: Callable[[], Any], synchronize: Callable[[], None], budget_s: float) -> list[float]:
    """Return the seconds of each of some calls, from 3 to 100 of them, that together fill `budget_s`."""
    times: list[float] = []
    while len(times) < LEAST_REPEATS or (sum(times) < budget_s and len(times) < MOST_REPEATS):
        times.append(timed(function, synchronize)[0])
    return times


def median_interval(times: list[float]) -> tuple[float, float, float]:
    """Return the median and an interval for it.

    The interval lies between the (i + 1)-th smallest and the (i + 1)-th largest time, with the largest i for
    which it covers the median with at least 95 % confidence, whatever the distribution. Fewer than six times
    cannot give that: then it is their whole range.

    References
    ----------
    W. J. Conover, Practical Nonparametric Statistics, 3rd ed., Wiley 1999, section 3.2.

    Examples
    --------
    >>> median_interval([3.0, 1.0, 2.0])
    (2.0, 1.0, 3.0)
    >>> median_interval([float(i) for i in range(9)])
    (4.0, 1.0, 7.0)
    """
    ordered, n, outside, i = sorted(times), len(times), 0, -1
    while 2 * (outside := outside + math.comb(n, i + 1)) <= (1 - CONFIDENCE) * 2**n:
        i += 1
    return statistics.median(ordered), ordered[max(i, 0)], ordered[-1 - max(i, 0)]
