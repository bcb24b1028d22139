"""Thread counts, and settings that overlapping calls hold together."""

import ctypes
import os
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from knnbench import InvalidInputError, knn
from knnbench import threads as module
from knnbench.threads import (
    THREADS_VARIABLE,
    SharedSetting,
    available_cpus,
    kept_apart,
    leave_cpu,
    limited_blas,
    run_tasks,
    thread_count,
)


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_variable_decides_and_the_affinity_mask_without_it(monkeypatch):
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    assert thread_count() == available_cpus() >= 1
    monkeypatch.setenv(THREADS_VARIABLE, "3")
    assert thread_count() == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_variable_that_is_no_number_of_threads(monkeypatch, text):
    monkeypatch.setenv(THREADS_VARIABLE, text)
    with pytest.raises(InvalidInputError, match=THREADS_VARIABLE):
        thread_count()


def test_blas_is_limited_inside_and_left_as_found(monkeypatch):
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    with threadpool_limits(2, user_api="blas"):
        with limited_blas():
            assert blas_threads() == {1}
            with limited_blas():
                pass
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_the_last_of_overlapping_calls_takes_the_limit_back_on_any_thread(monkeypatch):
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    names = ("first_is_in", "first_may_leave", "first_is_out", "last_is_in", "last_may_leave", "last_is_out", "end")
    events = {name: threading.Event() for name in names}

    def hold(which):
        with limited_blas():
            events[f"{which}_is_in"].set()
            events[f"{which}_may_leave"].wait(10)
        events[f"{which}_is_out"].set()
        events["end"].wait(10)  # a thread of a pool lives on

    threads = {which: threading.Thread(target=hold, args=(which,)) for which in ("first", "last")}
    with threadpool_limits(2, user_api="blas"):
        for which, thread in threads.items():
            thread.start()
            events[f"{which}_is_in"].wait(10)
        for which, expected in (("first", {1}), ("last", {2})):
            events[f"{which}_may_leave"].set()
            events[f"{which}_is_out"].wait(10)
            # An OpenBLAS on OpenMP, as faiss brings, has a limit for each thread.
            shared = [pool for pool in threadpool_info() if pool.get("threading_layer") == "pthreads"]
            assert {pool["num_threads"] for pool in shared} == (expected if shared else set())
        events["end"].set()
        for thread in threads.values():
            thread.join()


def test_overlapping_holders_make_a_setting_once_and_the_last_takes_it_back():
    events = []

    @contextmanager
    def hold():
        events.append("made")
        yield
        events.append("taken back")

    setting, first_is_in, first_may_leave = SharedSetting(hold), threading.Event(), threading.Event()

    def first():
        with setting():
            first_is_in.set()
            first_may_leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with setting():
        first_may_leave.set()
        thread.join()
        assert events == ["made"]
    assert events == ["made", "taken back"]
    with setting():
        assert events == ["made", "taken back", "made"]


def test_calls_from_many_threads_agree(own_backend, rng):
    if own_backend == "python":
        pytest.skip("the naive loop has nothing to share")
    queries, corpus = (rng.integers(0, 256, (n, 30), dtype=np.uint8) for n in (50, 300))
    expected = knn(queries, corpus, 4, backend=own_backend)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(knn(queries, corpus, 4, backend=own_backend))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for answer in found:
        np.testing.assert_array_equal(answer.indices, expected.indices)
        np.testing.assert_array_equal(answer.distances, expected.distances)


def test_tasks_run_once_each_on_several_threads():
    done, both = [], threading.Barrier(2, timeout=10)

    def task(piece):
        if piece < 2:
            both.wait()  # two threads are inside, or this fails
        done.append(piece)

    run_tasks(task, range(50), 2)
    assert sorted(done) == list(range(50))


def test_the_first_error_of_a_task_ends_all():
    begun = []

    def task(piece):
        begun.append(piece)
        if piece == 3:
            raise ZeroDivisionError(piece)

    for n_threads in (1, 4):
        begun.clear()
        with pytest.raises(ZeroDivisionError):
            run_tasks(task, range(1000), n_threads)
        assert len(begun) < 1000
        run_tasks(begun.append, range(3), n_threads)  # and the threads are there for others


def test_an_error_in_another_thread_is_raised():
    caller, inside = threading.get_ident(), threading.Event()

    def task(piece):
        if threading.get_ident() == caller:
            assert inside.wait(10)
        else:
            inside.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tasks(task, range(2), 2)


def test_tasks_inside_tasks_end():
    done = []
    run_tasks(lambda _: run_tasks(done.append, range(5), 4), range(8), 4)
    assert sorted(done) == sorted([*range(5)] * 8)


def test_a_thread_that_cannot_be_started_is_done_without(monkeypatch):
    class Broken(module.ThreadPoolExecutor):
        n_given = 0

        def submit(self, function):
            Broken.n_given += 1
            if Broken.n_given > 1:
                super().submit(function)  # which may run it all the same
                raise RuntimeError("can't start new thread")
            return super().submit(function)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Broken)
    monkeypatch.setattr(module, "_waiting", None)
    done = []
    run_tasks(lambda piece: (time.sleep(0.01), done.append(piece)), range(20), 4)
    assert sorted(done) == list(range(20))


def test_nothing_runs_after_ctrl_c(monkeypatch):
    running, caller = [], threading.get_ident()
    inside = threading.Event()

    def task(piece):
        if threading.get_ident() == caller:
            assert inside.wait(10)
            raise KeyboardInterrupt
        running.append(piece)
        inside.set()
        time.sleep(0.2)
        running.remove(piece)

    with pytest.raises(KeyboardInterrupt):
        run_tasks(task, range(10), 2)
    assert not running


def test_a_hint_that_is_refused_is_no_error(monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    monkeypatch.setattr(module, "_cpu_asker", lambda: lambda: 0)
    done = []
    run_tasks(done.append, range(8), 2)
    with kept_apart():
        pass
    assert sorted(done) == list(range(8))


@pytest.mark.skipif(sys.platform != "linux" or available_cpus() < 2, reason="needs two CPUs of Linux")
def test_threads_of_libraries_are_kept_apart_for_a_while():
    run_tasks(lambda _: time.sleep(0.01), range(4), 2)  # a thread that waits for tasks
    waiting = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("knnbench")]
    allowed, other = os.sched_getaffinity(0), threading.Thread(target=time.sleep, args=(1,))
    other.start()
    with kept_apart():
        assert all(len(os.sched_getaffinity(thread)) == len(allowed) - 1 for thread in waiting)
        assert os.sched_getaffinity(other.native_id) == os.sched_getaffinity(0) == allowed
        with kept_apart():
            pass
    assert waiting
    assert all(os.sched_getaffinity(thread) == allowed for thread in waiting)
    other.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    run_tasks(lambda _: None, range(8), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process of several threads forks
        child = os.fork()
    if not child:
        both = threading.Barrier(2, timeout=10)
        try:
            run_tasks(lambda _: both.wait(), range(2), 2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(sys.platform != "linux" or available_cpus() < 2, reason="needs two CPUs of Linux")
def test_a_thread_leaves_a_busy_cpu():
    allowed, ask, left = os.sched_getaffinity(0), ctypes.PyDLL(None).sched_getcpu, []

    def body():
        for cpu in sorted(allowed) * 10:
            os.sched_setaffinity(0, {cpu})
            leave_cpu(cpu)  # nowhere to go
            assert os.sched_getaffinity(0) == {cpu}
            os.sched_setaffinity(0, allowed)
            leave_cpu(cpu)
            left.append(ask() != cpu)
            assert os.sched_getaffinity(0) == allowed

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert len(left) == 10 * len(allowed)
    assert sum(left) > len(left) / 2  # the system may bring one back at once


def test_a_thread_that_does_not_begin_holds_nothing_of_the_task(monkeypatch):
    waiting = []
    monkeypatch.setattr(module, "_hand_out", lambda work, threads: waiting.append(work))

    def task_on(answer):
        return lambda piece: answer.fill(piece)

    answer = np.zeros(3)
    held = weakref.ref(answer)
    run_tasks(task_on(answer), range(3), 2)
    assert (answer == 2).all()
    assert waiting
    del answer
    assert held() is None
