"""Timing one function: when a call is over, and when there have been enough calls."""

import time
from collections.abc import Callable
from typing import Any

from knnbench.backends.base import Backend
from knnbench.results import median_interval

__all__ = ["is_tight", "settle", "timed"]

# Enough for the rank test of `knnbench.measure.comparison` to tell two such backends apart.
TIGHT_REPEATS = 10

# Half the interval of the median, as a share of it, at which further repeats would say little.
TIGHT = 0.01

# Threads that still spin after a parallel region have stopped when the process takes less than this share of a CPU
# over one look; Intel's OpenMP spins for 0.2 s.
QUIET = 0.05
LOOK_S = 0.02
LONGEST_SETTLE_S = 0.5


def timed(function: Callable[[], Any], backend: Backend) -> tuple[float, float | None, Any]:
    """Time one call until its device is done.

    Returns
    -------
    seconds : float
        By the host's clock.
    device_seconds : float or None
        By the device's; None where that is the host's.
    answer : object
        What the call returned.
    """
    backend.synchronize()
    stop = backend.stopwatch()
    start = time.perf_counter()
    answer = function()
    device_s = stop()
    backend.synchronize()
    return time.perf_counter() - start, device_s, answer


def is_tight(times: list[float]) -> bool:
    """Return whether the median of the times is known well enough."""
    if len(times) < TIGHT_REPEATS:
        return False
    median, low, high = median_interval(times)
    return high - low <= 2 * TIGHT * median


def settle() -> None:
    """Wait until no thread of this process computes or spins, so that it disturbs no other's measurement."""
    end = time.monotonic() + LONGEST_SETTLE_S
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(LOOK_S)
        if time.process_time() - before < QUIET * LOOK_S:
            return
