"""Whether other processes took the CPUs that a measurement needed.

A thread pool that spins while its last thread waits for a CPU can take 42 times as long with two busy processes
beside it, and looks like a slow library.
"""

import os
import time
from pathlib import Path

from knnbench.threads import available_cpus

__all__ = ["CONTENDED", "CpuMeter"]

CONTENDED = 0.1
"""Share of the CPUs that a computation was kept from, from which on its times are called contended."""

_STAT = Path("/proc/stat")

# Columns of a CPU's line in /proc/stat: user, nice, system, irq, softirq, and what a hypervisor gave to others.
BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)


class CpuMeter:
    """What other processes took of this process's CPUs while the meter was running.

    Parameters
    ----------
    threads : int
        That the computation uses.

    Attributes
    ----------
    wall_s, taken_s : float
        Seconds that the meter ran, and CPU seconds that others took beyond what `threads` left free.
    """

    def __init__(self, threads: int) -> None:
        self.wall_s = 0.0
        self.taken_s = 0.0
        self._threads = min(threads, available_cpus())
        self._free = available_cpus() - self._threads

    @property
    def contention(self) -> float | None:
        """What was taken as a share of the time of the CPUs; None where the system does not tell."""
        if not self.wall_s or not _STAT.exists():
            return None
        return min(1.0, self.taken_s / (self._threads * self.wall_s))

    def __enter__(self) -> "CpuMeter":
        self._start = _now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (after - before for before, after in zip(self._start, _now(), strict=True))
        self.wall_s += wall
        self.taken_s += max(0.0, busy - own - self._free * wall)


def _now() -> tuple[float, float, float]:
    """Return the clock, the CPU seconds used by all on the CPUs of the affinity mask, and by this process."""
    return time.monotonic(), _busy_s(), time.process_time()


def _busy_s() -> float:
    if not _STAT.exists():
        return 0.0
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in _STAT.read_text(encoding="ascii").splitlines():
        name, *columns = line.split()
        if name in names:
            ticks += sum(int(columns[i]) for i in BUSY_COLUMNS)
    return float(ticks / os.sysconf("SC_CLK_TCK"))
