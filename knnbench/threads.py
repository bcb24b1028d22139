"""How many threads a computation may use."""

import ctypes
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from knnbench.errors import InvalidInputError
from knnbench.settings import THREADS_VARIABLE, setting

__all__ = [
    "THREADS_VARIABLE",
    "SharedSetting",
    "available_cpus",
    "kept_apart",
    "leave_cpu",
    "limited_blas",
    "pinned_environment",
    "run_tasks",
    "thread_count",
]

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


# Threads that wait for tasks: starting one takes 0.15 ms, and it may begin on a busy CPU. Waiting takes no time, and a
# process that is forked from this one, which has none of them, starts its own.
NAME = "knnbench"
_waiting: ThreadPoolExecutor | None = None
_making = threading.Lock()


def _forget_threads() -> None:
    global _waiting, _making, _moving
    _waiting, _making, _moving = None, threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@functools.cache
def _cpu_asker() -> Callable[[], int] | None:
    """Return the C library's function that tells which CPU a thread runs on, if there is one."""
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


# Held while the CPUs of threads are changed, which is to be taken back before another change.
_moving = threading.RLock()


def leave_cpu(busy: int) -> None:
    """Move this thread to another CPU of its mask if it runs on one that is busy.

    A thread that is woken begins where it ran last. On a virtual machine that tells nothing of caches that CPUs share,
    Linux does not look for an idle one, and both threads took turns on one CPU for seconds.
    """
    ask = _cpu_asker()
    if ask is None or ask() != busy or not _moving.acquire(blocking=False):
        return
    try:
        with suppress(OSError):  # it is only a hint
            allowed = os.sched_getaffinity(0)
            if len(allowed) > 1:
                os.sched_setaffinity(0, allowed - {busy})
                os.sched_setaffinity(0, allowed)
    finally:
        _moving.release()


@contextmanager
def kept_apart() -> Iterator[None]:
    """Keep the threads of libraries, and those that wait for tasks, off the CPU of this one, if there is another.

    They begin elsewhere then for a while, which those that measure want: where Linux does not look for an idle CPU
    (`leave_cpu`), threads of OpenMP's pools that begin on this one's made calls of 0.06 ms take 8 ms, for seconds.
    Other threads of Python are left alone, and nothing is done while another thread is inside.
    """
    ask, held = _cpu_asker(), {}
    if ask is None or not _moving.acquire(blocking=False):
        yield
        return
    try:
        busy = ask()
        others = {thread.native_id for thread in threading.enumerate() if not thread.name.startswith(NAME)}
        with suppress(OSError):
            for thread in {*map(int, os.listdir("/proc/self/task"))} - others - {threading.get_native_id()}:
                with suppress(OSError):  # one that has ended
                    allowed = os.sched_getaffinity(thread)
                    if len(allowed) > 1:
                        held[thread] = allowed
                        os.sched_setaffinity(thread, allowed - {busy})
        yield
    finally:
        for thread, allowed in held.items():
            with suppress(OSError):
                os.sched_setaffinity(thread, allowed)
        _moving.release()


def _hand_out(work: Callable[[], None], threads: int) -> None:
    """Give `work` to so many waiting threads, as far as there are or can be: none is started while Python ends."""
    global _waiting
    with _making, suppress(RuntimeError):
        if _waiting is None:
            _waiting = ThreadPoolExecutor(os.cpu_count(), NAME)
        for _ in range(threads):
            _waiting.submit(work)


def run_tasks(task: Callable[[Any], Any], pieces: Iterable[Any], threads: int) -> None:
    """Run `task` on all pieces, on some threads, of which this is one: it does not wait for another to begin.

    Nothing runs any more when this returns or raises.

    Parameters
    ----------
    task : callable
        Its first error is raised, and no more pieces are begun.
    pieces : iterable
    threads : int
    """
    # A thread that begins only later holds what is left till then: nothing, and so not the answers of this task.
    left = deque(functools.partial(task, piece) for piece in pieces)

    def work() -> None:
        while True:
            try:
                run = left.popleft()
            except IndexError:
                return
            try:
                run()
            except BaseException:
                left.clear()  # of Ctrl-C too: what runs ends, nothing more is started
                raise

    others = min(threads, len(left)) - 1
    if others < 1:
        work()
        return
    # Counted here and not by what the pool says: it may run what it could not promise to.
    calm, running, is_over, errors = threading.Condition(), 0, False, []
    ask = _cpu_asker()
    busy = ask() if ask else -1

    def elsewhere() -> None:
        nonlocal running
        with calm:
            if is_over:
                return
            running += 1
        try:
            leave_cpu(busy)
            work()
        except BaseException as error:  # raised where the call is
            errors.append(error)
        finally:
            with calm:
                running -= 1
                calm.notify_all()

    try:
        _hand_out(elsewhere, others)
        work()
    except BaseException as error:
        left.clear()
        errors.append(error)
    while True:
        try:
            with calm:
                is_over = True
                calm.wait_for(lambda: not running)
            break
        except KeyboardInterrupt as error:
            left.clear()
            errors.append(error)
    if errors:
        raise errors[0]


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
