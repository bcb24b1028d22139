"""Probes of the CPU: how fast it can read, add and multiply at best.

Each function takes the number of threads and the seconds to fill, and returns operations, or bytes, a second.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from knnbench.blocking import available_memory
from knnbench.dtypes import Array
from knnbench.errors import OverBudgetError
from knnbench.kernels import cpu_probes
from knnbench.kernels.cpu_simd import NARROW, OPERATIONS

__all__ = [
    "Rounds",
    "add_float32",
    "add_float64",
    "cache_bytes",
    "copy",
    "dot_uint8",
    "fma_float32",
    "fma_float64",
    "gemm_float32",
    "gemm_float64",
    "growing_products",
    "in_threads",
    "madd_int16",
    "matrix_uint8",
    "read",
    "sad_uint8",
    "stream_bytes",
]

# Seconds of a round: long against starting it, short enough that some round is not disturbed.
ROUND_S = 0.02

# The share of a round for which its threads have a CPU if nobody else wants it; and how many times longer than asked
# for is waited for such a round.
UNDISTURBED = 0.9
PATIENCE = 4.0

# Arrays are so many times as large as the last-level cache, within these bytes.
CACHES = 4
LEAST_BYTES = 1 << 28
MOST_BYTES = 1 << 30

MEMORY_SHARE = 8
"""Of the memory available, the share of it that a probe may take: one part in so many."""

# Where the size of the cache cannot be told.
ASSUMED_CACHE = 1 << 26

LEAST_ROWS = 512
"""Rows and columns of the first matrices that are multiplied."""

MOST_ROWS = 8192


class Rounds:
    """How much to do in each round, and the best rate so far.

    The best, because what else the machine does can only make a round slower, and a ceiling is a maximum.

    Parameters
    ----------
    amount : float
        Operations or bytes of one call.
    seconds : float
        To fill with rounds, from the first on; `PATIENCE` times as long while none has had the CPUs to itself.

    Attributes
    ----------
    calls : int
        Of the next round. It grows until a round is long enough to be timed; those before do not count.
    best : float
        Operations or bytes a second, 0 before the first that counts.
    done : bool
    """

    def __init__(self, amount: float, seconds: float) -> None:
        self.calls, self.best, self.done = 1, 0.0, False
        self._amount, self._left, self._more = amount, seconds, (PATIENCE - 1) * seconds
        self._is_disturbed = True

    def take(self, wall_s: float, busy: float = 1.0) -> None:
        """Add a round that took so many seconds, of which its threads had a CPU for this share."""
        self._left -= wall_s
        if wall_s < ROUND_S:
            self.calls *= max(2, min(16, round(1.2 * ROUND_S / max(wall_s, 1e-9))))
        else:
            self.best = max(self.best, self.calls * self._amount / wall_s)
            self._is_disturbed &= busy < UNDISTURBED
        self.done = self.best > 0 and self._left + (self._more if self._is_disturbed else 0.0) <= 0


def in_threads(prepare: Callable[[], Callable[[int], Any]], amount: float, threads: int, seconds: float) -> float:
    """Return the best rate of calls that are made by some threads at once.

    Parameters
    ----------
    prepare : callable
        Called in each thread; returns what is timed. Memory that it fills therefore lies where its thread runs.
        What it returns takes the number of calls, and releases the interpreter lock.
    amount : float
        Operations or bytes of one call.
    threads : int
    seconds : float

    Returns
    -------
    float
        Operations or bytes a second of all threads, from when the first starts until the last has ended.
    """
    rounds = Rounds(amount * threads, seconds)
    times = [(0.0, 0.0, 0.0)] * threads

    def take() -> None:
        starts, stops, on_cpu = zip(*times, strict=True)
        wall_s = max(stops) - min(starts)
        rounds.take(wall_s, sum(on_cpu) / (threads * wall_s))

    ready, ended = threading.Barrier(threads), threading.Barrier(threads, take)

    def run(number: int) -> None:
        try:
            call = prepare()
            call(1)
            ready.wait()
            while not rounds.done:
                start, on_cpu = time.perf_counter(), time.thread_time()
                call(rounds.calls)
                times[number] = start, time.perf_counter(), time.thread_time() - on_cpu
                ended.wait()
        except BaseException:
            ready.abort()
            ended.abort()
            raise

    with ThreadPoolExecutor(threads) as pool:
        errors = [future.exception() for future in [pool.submit(run, number) for number in range(threads)]]
    # One that fails makes the others fail at the barrier.
    failed = [error for error in errors if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return rounds.best


def _chains(kernel: Any, dtype: type[np.floating[Any]], constants: tuple[float, ...], threads: int, s: float) -> float:
    """Return the best rate of a kernel of independent chains, with vectors of each width worth trying."""
    given = tuple(dtype(value) for value in constants)
    best = 0.0
    widths = cpu_probes.vector_bytes()
    for width in widths:
        starts = cpu_probes.starts(dtype, width)
        kernel(1, starts, *given)  # compiled, or loaded, before threads wait for each other

        def prepare(starts: tuple[Any, ...] = starts) -> Callable[[int], Any]:
            return lambda n: kernel(n, starts, *given)

        operations = cpu_probes.chain_operations(len(starts))
        best = max(best, in_threads(prepare, operations, threads, s / len(widths)))
    return best


def add_float32(threads: int, seconds: float) -> float:
    """Return additions of float32 a second."""
    return _chains(cpu_probes.add_chains, np.float32, (1e-3,), threads, seconds)


def add_float64(threads: int, seconds: float) -> float:
    """Return additions of float64 a second."""
    return _chains(cpu_probes.add_chains, np.float64, (1e-3,), threads, seconds)


def fma_float32(threads: int, seconds: float) -> float:
    """Return fused multiply-adds of float32 a second, each counted as one."""
    cpu_probes.require_fma()
    return _chains(cpu_probes.fma_chains, np.float32, (0.5, 0.5), threads, seconds)


def fma_float64(threads: int, seconds: float) -> float:
    """Return fused multiply-adds of float64 a second, each counted as one."""
    cpu_probes.require_fma()
    return _chains(cpu_probes.fma_chains, np.float64, (0.5, 0.5), threads, seconds)


def _instructions(operations: tuple[str, ...], threads: int, seconds: float) -> float:
    """Return the best rate of the instruction of the first operation that has one, in features a second."""
    vectors = cpu_probes.instruction_vectors(*operations)
    kernel = cpu_probes.instruction_chains(vectors)
    kernel(1, 1)  # compiled, or loaded, before threads wait for each other
    return in_threads(
        lambda: lambda n: kernel(n, 1), cpu_probes.instruction_operations(vectors), threads, seconds
    )  # fmt: skip


def sad_uint8(threads: int, seconds: float) -> float:
    """Return absolute differences of uint8 a second, by the instruction that sums eight, or four of them times 1."""
    return _instructions(NARROW["absolute"], threads, seconds)


def madd_int16(threads: int, seconds: float) -> float:
    """Return multiply-adds of int16 a second, by the instruction that sums two of them."""
    return _instructions(("product-int16",), threads, seconds)


def dot_uint8(threads: int, seconds: float) -> float:
    """Return multiply-adds of uint8 with int8 or uint8 a second, by the instruction that sums four of them."""
    on_vectors = tuple(name for name in NARROW["product"] if not OPERATIONS[name].is_matrix)
    return _instructions(on_vectors, threads, seconds)


def matrix_uint8(threads: int, seconds: float) -> float:
    """Return multiply-adds of uint8 a second, by the instruction of a matrix unit."""
    return _instructions(("product-uint8-matrix",), threads, seconds)


def cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the bytes of the last-level caches of all CPUs together, an assumption where it cannot be told."""
    found: dict[tuple[int, str], int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = ((folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            found[int(level), shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or ASSUMED_CACHE


def stream_bytes(cache: int, available: int | None) -> int:
    """Return how large arrays have to be together, so that reading them means reading memory.

    Raises
    ------
    OverBudgetError
        If the memory left does not allow that.
    """
    size = min(max(CACHES * cache, LEAST_BYTES), MOST_BYTES)
    if available is not None and available // MEMORY_SHARE < size:
        size = available // MEMORY_SHARE
        if size < 2 * cache:
            raise OverBudgetError(
                f"to read past the {cache:,} bytes of cache takes {2 * cache * MEMORY_SHARE:,} bytes of available "
                f"memory, and there are {available:,}."
            )
    return size


def aligned(n_bytes: int) -> Array:
    """Return an array of int64 that starts at a multiple of a cache line, written once so that it has memory."""
    spare = cpu_probes.ALIGNMENT // 8
    array = np.empty(n_bytes // 8 + spare, np.int64)
    start = -array.ctypes.data % cpu_probes.ALIGNMENT // 8
    result = array[start : start + n_bytes // 8]
    result[:] = 1
    return result


def _part(threads: int, arrays: int) -> int:
    """Return the bytes of one array of a thread."""
    total = stream_bytes(cache_bytes(), available_memory())
    chunk = cpu_probes.CHUNK_BYTES
    return max(1, total // (threads * arrays * chunk)) * chunk


def read(threads: int, seconds: float) -> float:
    """Return bytes a second read from memory."""
    part = _part(threads, 1)
    cpu_probes.read_words(1, aligned(cpu_probes.CHUNK_BYTES))

    def prepare() -> Callable[[int], Any]:
        source = aligned(part)
        return lambda n: cpu_probes.read_words(n, source)

    return in_threads(prepare, part, threads, seconds)


def copy(threads: int, seconds: float) -> float:
    """Return bytes a second read from memory and written to it, both counted."""
    part = _part(threads, 2)
    cpu_probes.copy_words(1, aligned(cpu_probes.CHUNK_BYTES), aligned(cpu_probes.CHUNK_BYTES))

    def prepare() -> Callable[[int], Any]:
        source, target = aligned(part), aligned(part)
        return lambda n: cpu_probes.copy_words(n, source, target)

    return in_threads(prepare, 2 * part, threads, seconds)


def growing_products(best_rate: Callable[[int], tuple[float, float]], seconds: float, most: int) -> float:
    """Return the best rate of matrix products that grow until one fills its share of the time.

    Parameters
    ----------
    best_rate : callable
        Of n, returns the best rate of products of n x n matrices, and the seconds of one.
    seconds : float
    most : int
        Of n.
    """
    n, best = LEAST_ROWS, 0.0
    while True:
        rate, product_s = best_rate(n)
        best = max(best, rate)
        # The next takes eight times as long.
        if 2 * n > most or 8 * product_s > seconds:
            return best
        n *= 2


def _gemm(dtype: type[np.floating[Any]], threads: int, seconds: float) -> float:
    available = available_memory()
    budget = MOST_BYTES if available is None else min(MOST_BYTES, available // MEMORY_SHARE)
    most = min(MOST_ROWS, int((budget / (3 * np.dtype(dtype).itemsize)) ** 0.5))

    def best_rate(n: int) -> tuple[float, float]:
        a, b, out = np.ones((n, n), dtype), np.ones((n, n), dtype), np.empty((n, n), dtype)
        np.matmul(a, b, out=out)
        rounds = Rounds(float(n) ** 3, seconds / 2)
        while not rounds.done:
            start, on_cpu = time.perf_counter(), time.process_time()
            for _ in range(rounds.calls):
                np.matmul(a, b, out=out)
            wall_s = time.perf_counter() - start
            rounds.take(wall_s, (time.process_time() - on_cpu) / (threads * wall_s))
        return rounds.best, n**3 / rounds.best

    with threadpool_limits(threads, user_api="blas"):
        return growing_products(best_rate, seconds, most)


def gemm_float32(threads: int, seconds: float) -> float:
    """Return multiply-adds of float32 a second in a matrix product of numpy."""
    return _gemm(np.float32, threads, seconds)


def gemm_float64(threads: int, seconds: float) -> float:
    """Return multiply-adds of float64 a second in a matrix product of numpy."""
    return _gemm(np.float64, threads, seconds)
