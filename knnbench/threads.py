"""How many threads a computation may use."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from knnbench.errors import InvalidInputError
from knnbench.settings import THREADS_VARIABLE, setting

__all__ = ["THREADS_VARIABLE", "SharedSetting", "available_cpus", "limited_blas", "pinned_environment", "thread_count"]

# Read by each library once, when it is loaded.
POOL_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def available_cpus() -> int:
    """Return the number of CPUs in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_count() -> int:
    """Return $KNNBENCH_THREADS, or all CPUs of the affinity mask.

    Raises
    ------
    InvalidInputError
        If the variable is set to anything but a positive whole number.
    """
    text = setting(THREADS_VARIABLE)
    if not text:
        return available_cpus()
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInputError(
            f"${THREADS_VARIABLE} is {text!r}; expected a positive whole number of threads, or unset for "
            f"all {available_cpus()} CPUs."
        )
    return int(text)


def pinned_environment(threads: int) -> dict[str, str]:
    """Return the environment variables that hold every thread pool of a new process at `threads`.

    They work only if they are set before numpy is loaded: its BLAS reads them once.
    """
    return dict.fromkeys((THREADS_VARIABLE, *POOL_VARIABLES), str(threads))


class SharedSetting:
    """A global setting that overlapping calls hold together: the first makes it, the last takes it back.

    Parameters
    ----------
    hold : callable
        Returns the context manager that makes the setting and restores what was there.
    """

    def __init__(self, hold: Callable[[], AbstractContextManager[Any]]) -> None:
        self._hold = hold
        self._lock = threading.Lock()
        self._holders = 0
        self._held = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the setting."""
        with self._lock:
            if not self._holders:
                self._held.enter_context(self._hold())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._held.close()


@contextmanager
def _limit_blas() -> Iterator[None]:
    from threadpoolctl import OpenBLASController, threadpool_limits

    # Only the thread that controls OpenBLAS sets its threads; what others ask for is silently left undone. The last of
    # overlapping calls, which takes the limit back, may be on another thread than the first, which set it.
    OpenBLASController.clear_controlling_thread(force=True)
    limits = threadpool_limits(thread_count(), user_api="blas")
    try:
        yield
    finally:
        OpenBLASController.clear_controlling_thread(force=True)
        limits.restore_original_limits()
        OpenBLASController.clear_controlling_thread(force=True)


_limited_blas = SharedSetting(_limit_blas)


@contextmanager
def limited_blas(is_called: bool = True) -> Iterator[None]:
    """Hold numpy's BLAS, if it is called at all, at $KNNBENCH_THREADS, and leave it as found.

    Nothing is done without the variable, nor in a process that was started with `pinned_environment`: asking
    threadpoolctl which libraries are loaded costs milliseconds a call.
    """
    threads = setting(THREADS_VARIABLE)
    if not is_called or not threads or all(os.environ.get(variable) == threads for variable in POOL_VARIABLES):
        yield
        return
    with _limited_blas():
        yield
