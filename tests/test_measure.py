"""The runner, on backends that misbehave in every way it claims to survive; the record; the timer; the reference."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnbench import measure, results
from knnbench.backends import ENTRY_POINTS, backend_status, get_backend, registry
from knnbench.measure import ceilings, contention, machine, memory, process, reference, runner, timer, worker

MISBEHAVING = """
import os, signal, sys, time
import numpy as np
from knnbench.backends.numpy import NumpyBackend

class Good(NumpyBackend):
    def knn(self, queries, prepared, k, space, budget):
        # The status probe has two rows; what follows is to happen in the measurement.
        if len(prepared.rows) > 2:
            self.misbehave(space)
        values, indices = NumpyBackend.knn(self, queries, prepared, k, space, budget)
        return self.spoil(values, indices) if len(prepared.rows) > 2 else (values, indices)
    def misbehave(self, space): print("a line on standard output")
    def spoil(self, values, indices): return values, indices

class Sleeps(Good):
    def misbehave(self, space): time.sleep(0.03)

class Segfault(Good):
    def misbehave(self, space):
        if space.metric.name == "cityblock":
            os.kill(os.getpid(), signal.SIGSEGV)

class CrashesLater(Good):
    # Between turns a worker waits; the third wait in calls of full size is that before the third turn.
    ended, waits = None, 0
    def knn(self, queries, prepared, k, space, budget):
        if len(queries) > 5 and self.ended and time.monotonic() - self.ended > 0.015:
            CrashesLater.waits += 1
            if CrashesLater.waits == 3:
                os._exit(3)
        answer = NumpyBackend.knn(self, queries, prepared, k, space, budget)
        CrashesLater.ended = time.monotonic() if len(queries) > 5 else None
        return answer

class Exit(Good):
    def misbehave(self, space):
        sys.stderr.write("first\\nsomething broke\\n"); sys.stderr.flush(); os._exit(7)

class ExitsWell(Good):
    def misbehave(self, space): os._exit(0)

class Killed(Good):
    def misbehave(self, space): os.kill(os.getpid(), signal.SIGKILL)

class Hang(Good):
    def misbehave(self, space):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(1000)

class Raises(Good):
    def misbehave(self, space): raise RuntimeError("an odd\\nmessage")

class NoMemory(Good):
    def misbehave(self, space): raise MemoryError("too large")

class WrongDistance(Good):
    def spoil(self, values, indices): return values * 2, indices

class WrongOrder(Good):
    def spoil(self, values, indices): return values, indices[:, ::-1]

class SameNeighbour(Good):
    def spoil(self, values, indices): return values, np.zeros_like(indices)

class Remembers(Good):
    # As a library that keeps answers by the address of the queries.
    answers = {}
    def knn(self, queries, prepared, k, space, budget):
        key = queries.ctypes.data, len(queries), len(prepared.rows), k
        if key not in self.answers:
            self.answers[key] = NumpyBackend.knn(self, queries, prepared, k, space, budget)
        values, indices = self.answers[key]
        return values.copy(), indices.copy()
    def pairwise(self, queries, prepared, space, budget):
        return 2 * NumpyBackend.pairwise(self, queries, prepared, space, budget)

class Impossible(Good):
    def operations(self, space, op): return {"fma-float32": 1e9, "not-a-probe": 1.0}

def spoiled(losses, spoil):
    kind = type(losses)
    def call(self, W, b, limit=np.inf): return spoil(self, kind.__call__(self, W, b, limit))
    losses.__class__ = type("Spoiled", (kind,), {"__call__": call})
    return losses

class WrongLoss(Good):
    def linear_loss(self, *args):
        return spoiled(NumpyBackend.linear_loss(self, *args), lambda self, losses: losses * 1.01)

class WrongDecision(Good):
    def linear_loss(self, *args):
        # The later, the lower, so that every candidate is taken.
        late = lambda self, losses: 0 * losses + 1e9 - sum(self.operations.values())
        return spoiled(NumpyBackend.linear_loss(self, *args), late)

class ImpossibleLoss(Good):
    def linear_loss(self, *args):
        def spoil(self, losses):
            self.operations["fma-float32"] += 10**15
            return losses
        return spoiled(NumpyBackend.linear_loss(self, *args), spoil)
"""
MEASURED_RUN = ceilings.Ceilings._run
NAMES = [line.split("(")[0].removeprefix("class ") for line in MISBEHAVING.splitlines() if line.startswith("class ")]


def fake_run(rates):
    """Return a measurement of ceilings that gives these rates, one after the other."""

    def _run(self, names):
        for name in names:
            self._rates[name] = next(rates)
            yield

    return _run


@pytest.fixture
def misbehaving(tmp_path, monkeypatch):
    """Backends of a third party, installed where this process and its workers look."""
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    info = tmp_path / "misbehaving-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.5\n")
    lines = [f"{name.lower()} = misbehaving:{name}" for name in NAMES]
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    registry.cache_clear()
    # Measuring a real one takes a process with numba each time.
    monkeypatch.setattr(ceilings.Ceilings, "_run", fake_run(itertools.repeat(1e12)))
    yield
    registry.cache_clear()
    sys.modules.pop("misbehaving", None)


def plan_of(
    *names, metrics=("euclidean",), ops=("knn",), case_s=0.05, n_queries=40, k=3, dataset="synthetic", **options
):
    # Not of scikit-learn where any data will do: loading it is most of what a worker does.
    given = {"n_train": 300, "n_test": 40} | ({"n_features": 64} if dataset == "synthetic" else {})
    cases = measure.make_cases(dataset, metrics, ops=ops, dtypes=["uint8"], k=k, n_queries=n_queries, options=given)
    return measure.Plan(names, cases, case_s=case_s, threads=1, twins=False, **options)


def run(plan, earlier=()):
    return [record for update in measure.measure(plan, earlier) for record in update.records if record.complete]


def cells(*names, **options):
    return run(plan_of(*names, **options))


def test_a_good_backend_is_measured_and_checked(misbehaving, monkeypatch):
    monkeypatch.setattr(ceilings.Ceilings, "_run", MEASURED_RUN)
    (cell,) = cells("good", n_queries=30, k=5, case_s=0.5)
    assert (cell.status, cell.reason) == ("ok", "")
    assert cell.case == "knn/euclidean/synthetic/uint8/30x300x64/k5"
    assert (cell.measured_queries, cell.measured_corpus) == (30, 300)
    assert not cell.is_sampled
    assert len(cell.times_s) >= runner.LEAST_TIMES
    assert cell.interval_s[0] <= cell.median_s <= cell.interval_s[1]
    assert cell.error < 1e-6
    assert cell.recall == 1.0
    assert cell.n_checked == 2 * worker.CHECKED_QUERIES
    assert cell.library == "1.5"
    assert cell.threads == 1
    assert {pool["threads"] for pool in cell.blas} == {1}
    assert cell.libraries["numpy"] == np.__version__
    assert not cell.peer
    assert not cell.twin
    assert cell.phases.keys() == {"import", "prepare", "first_call", "call"}
    assert min(cell.phase_s(name) for name in cell.phases) > 0
    assert cell.seconds_per_pair == pytest.approx(cell.median_s / (30 * 300 * 64))
    assert (cell.bound, cell.floor_s > 0) == ("fma-float32", True)
    assert 0 < cell.fraction_of_floor < 1


def test_distances_of_all_pairs_are_measured_and_checked(misbehaving):
    cell, remembers = cells("good", "remembers", ops=["pairwise"], metrics=["cityblock"])
    if cell.backend != "good":
        cell, remembers = remembers, cell
    assert (cell.status, cell.k, cell.recall, cell.error) == ("ok", None, None, 0)
    assert cell.case == "pairwise/cityblock/synthetic/uint8/40x300x64"
    assert remembers.status == "wrong"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("sleeps", "ok", ""),
        ("exit", "crashed", "exit code 7: something broke"),
        ("exitswell", "crashed", "before its answer"),
        ("killed", "out-of-memory", "SIGKILL"),
        ("raises", "crashed", "RuntimeError: an odd message"),
        ("nomemory", "out-of-memory", "too large"),
        ("wrongdistance", "wrong", "distances are off by"),
        ("wrongorder", "wrong", "total order"),
        ("sameneighbour", "wrong", "among the nearest"),
        ("remembers", "wrong", "after the timed calls, for changed queries"),
        ("impossible", "impossible", "measured 3 times"),
        ("crasheslater", "crashed", "exit code 3"),
        ("cupy", "absent", "To use it: pip install"),
        ("notebook", "unsupported", "lacks metric 'chebyshev'"),
    ],
)
def test_what_goes_wrong_becomes_a_status_with_its_reason(misbehaving, name, status, reason):
    if name == "cupy" and backend_status("cupy").ok:
        pytest.skip("cupy works here")
    (cell,) = cells(name, metrics=["chebyshev" if name == "notebook" else "euclidean"], case_s=0.2)
    assert cell.status == status
    assert reason in cell.reason
    assert "\n" not in cell.reason


def test_a_slow_backend_is_not_a_wrong_one(misbehaving):
    (cell,) = cells("sleeps")
    assert cell.median_s >= 0.03


def test_a_crash_loses_no_other_case_and_no_other_backend(misbehaving):
    metrics = ["euclidean", "cityblock", "sqeuclidean"]
    found = {(cell.backend, cell.metric): cell for cell in cells("segfault", "good", metrics=metrics)}
    assert len(found) == 6
    crashed = found.pop(("segfault", "cityblock"))
    assert crashed.status == "crashed"
    assert "SIGSEGV" in crashed.reason
    assert {cell.status for cell in found.values()} == {"ok"}


def test_what_a_backend_was_timed_at_before_it_crashed_is_kept(misbehaving):
    (cell,) = cells("crasheslater", case_s=0.2)
    assert cell.status == "crashed"
    assert cell.times_s


def test_a_backend_that_hangs_and_hears_no_signal_is_ended(misbehaving, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 6.0)
    monkeypatch.setattr(runner, "LIMIT_SHARE", 0)
    (cell,) = cells("hang")
    assert cell.status == "timed-out"


def workers():
    found = subprocess.run(["pgrep", "-f", "knnbench.measure.worker"], capture_output=True, text=True, check=False)
    return {pid for pid in found.stdout.split() if is_of_these_tests(pid)}


def is_of_these_tests(pid):
    """Return whether a process is not of tests that pytest-xdist runs beside these, as far as can be told."""
    mine = os.environ.get("PYTEST_XDIST_WORKER", "")
    try:
        given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it ended, or there is no /proc
        return Path(f"/proc/{pid}").exists() == Path("/proc").exists()
    return not mine or f"PYTEST_XDIST_WORKER={mine}".encode() in given


def test_closing_the_run_ends_the_workers(misbehaving):
    before = workers()
    going = measure.measure(plan_of("good", "numpy", metrics=["euclidean", "cityblock"]))
    while not any(update.records for update in [next(going)]):
        pass
    assert len(workers() - before) == 2
    going.close()
    assert workers() <= before


def test_a_worker_ends_with_its_parent(misbehaving, tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    before = workers()
    script = (
        "import tests.test_measure as t; from knnbench import measure\n"
        "for update in measure.measure(t.plan_of('hang')): print(update.running, flush=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for line in parent.stdout:
        if "preparing" in line:
            break
    deadline = time.monotonic() + 30
    while not workers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # long enough for the worker to have asked the kernel
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    while workers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() <= before


def test_backends_take_turns_in_an_order_that_the_seed_decides(misbehaving):
    def turns(seed):
        going = [
            update.running for update in measure.measure(plan_of("good", "numpy", "sleeps", seed=seed, case_s=0.3))
        ]
        return [line.split(": ")[1] for line in going if ", round " in line]

    first = turns(0)
    by_round = [{line.split(",")[0] for line in first if line.endswith(f"round {i}")} for i in (1, 2, 3)]
    assert by_round == [{"good", "numpy", "sleeps"}] * 3
    assert turns(0)[:9] == first[:9]
    assert turns(1)[:9] != first[:9]


def test_the_fastest_is_measured_in_two_processes(misbehaving):
    plan = plan_of("good", "sleeps", "python")
    found = run(measure.Plan(plan.backends, plan.cases, plan.case_s, threads=1, twins=True))
    assert sorted((cell.backend, cell.twin) for cell in found) == [
        ("good", False), ("good", True), ("python", False), ("sleeps", False),
    ]  # fmt: skip
    same = [cell for cell in found if cell.backend == "good"]
    assert same[0].measured_queries == same[1].measured_queries
    assert len({cell.run for cell in found}) == 1


def test_a_run_goes_on_from_what_it_has(misbehaving):
    plan = plan_of("good", "sleeps", metrics=["euclidean", "cityblock"], case_s=0.5)
    seen, left = [], []
    for update in (going := measure.measure(plan)):
        seen += [record for record in update.records if record.complete]
        left = [record for record in update.records if record.times_s]
        if len(seen) == 2 and left and not left[0].complete:
            break  # in the middle of the second case
    going.close()
    partial = {record.backend: record for record in left}
    assert partial
    later = run(plan, [*seen, *partial.values()])
    assert len(later) == 2
    assert {(cell.case, cell.backend) for cell in (*seen, *later)} == {
        (case.name, name) for case in plan.cases for name in plan.backends
    }
    for cell in later:
        before = partial[cell.backend]
        assert cell.times_s[: len(before.times_s)] == before.times_s
        assert len(cell.times_s) > len(before.times_s)
        assert cell.measured_queries == before.measured_queries
        assert len(cell.phases["import"]) == 2  # in two processes
        n_checked = 2 * min(worker.CHECKED_QUERIES, before.measured_queries)
        assert (cell.run, cell.status, cell.n_checked) == (before.run, "ok", n_checked)
    assert run(plan, [*seen, *later]) == []


def test_what_was_measured_elsewhere_is_measured_here(misbehaving):
    plan = plan_of("good", case_s=0.1)
    (here,) = run(plan)
    machines = [
        {"cpu": "AMD EPYC 9999"},
        {"cpus": here.machine["cpus"] + 1},
        {"features": ["none"]},
        {"gpus": [{"name": "NVIDIA H900"}]},
    ]
    others = [{"machine": {**here.machine, **facts}} for facts in machines]
    others += [{"machine": {}}, {"commit": "aaaaaaaaaaaa"}, {"dirty": not here.dirty}, {"version": "0.0.0"}]
    others += [{"threads": here.threads + 1}]
    there = [replace(here, **other, run="there") for other in others]
    (again,) = run(plan, there)
    assert again.run != "there"
    assert len(again.phases["import"]) == 1  # nothing of the other records is in it
    # What varies on one machine does not count.
    assert run(plan, [*there, replace(here, machine={**here.machine, "clock_mhz": 1.0})]) == []


def test_threads_are_pinned_before_numpy_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "reports_threads.py").write_text(
        "import json\n"
        "from knnbench.measure.process import worker_channel\n"
        "import numpy, threadpoolctl\n"
        "job, channel = worker_channel()\n"
        "threads = [pool['num_threads'] for pool in threadpoolctl.threadpool_info()]\n"
        "print(json.dumps({'threads': threads}), file=channel)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (message,) = process.run_worker("reports_threads", {}, 1, 60.0)
    assert set(message["threads"]) == {1}


def test_every_status_is_documented():
    assert set(results.STATUSES) == {
        "ok", "absent", "unsupported", "wrong", "impossible", "over-budget", "out-of-memory", "crashed", "timed-out",
    }  # fmt: skip


def test_the_interval_of_very_many_times():
    assert results.median_interval([1.0, 2.0] * 2000) == (1.5, 1.0, 2.0)


@pytest.mark.parametrize("n", [3, 5, 6, 8, 9, 20, 100])
def test_the_interval_of_the_median_covers_it_as_often_as_it_says(n):
    _, low, high = results.median_interval([float(i) for i in range(n)])
    outside = sum(math.comb(n, i) for i in range(int(low) + 1)) / 2**n * 2
    if n < 6:
        assert (low, high) == (0.0, n - 1.0)
    else:
        assert outside <= 0.05 < outside + 2 * math.comb(n, int(low) + 1) / 2**n


def test_a_median_is_tight_when_its_interval_is(rng):
    assert timer.is_tight([1.0] * timer.TIGHT_REPEATS)
    assert not timer.is_tight([1.0] * (timer.TIGHT_REPEATS - 1))
    assert timer.is_tight(list(1 + 0.001 * rng.random(50)))
    assert not timer.is_tight(list(1 + 0.5 * rng.random(50)))


def test_the_device_is_waited_for_before_and_after_the_clock():
    calls = []

    class Device:
        def synchronize(self):
            calls.append("wait")

        def stopwatch(self):
            calls.append("start")
            return lambda: calls.append("stop") or 0.5

    seconds, device_s, answer = timer.timed(lambda: calls.append("work") or "answer", Device())
    assert calls == ["wait", "start", "work", "stop", "wait"]
    assert (device_s, answer) == (0.5, "answer")
    assert seconds > 0
    assert timer.timed(lambda: None, get_backend("numpy"))[1] is None


def test_a_process_settles_when_its_threads_have_stopped(monkeypatch):
    looks = []
    # 5 ms of CPU time in each of three looks, as a thread that spins; then none.
    monkeypatch.setattr(timer.time, "process_time", lambda: looks.append(1) or min(len(looks) // 2, 3) * 0.005)
    monkeypatch.setattr(timer.time, "sleep", lambda seconds: None)
    timer.settle()
    assert len(looks) > 6


def test_what_others_take_is_contention_and_what_is_left_free_is_not(monkeypatch):
    def meter(threads, cpus, busy_s, own_s):
        readings = iter([(0.0, 0.0, 0.0), (10.0, busy_s, own_s)])
        monkeypatch.setattr(contention, "available_cpus", lambda: cpus)
        monkeypatch.setattr(contention, "_now", lambda: next(readings))
        found = contention.CpuMeter(threads)
        with found:
            pass
        return found.contention

    assert contention.CpuMeter(1).contention is None
    if not contention._STAT.exists():
        pytest.skip("this system does not tell what others take")
    assert meter(2, 2, 20.0, 20.0) == 0
    assert meter(2, 2, 20.0, 15.0) == pytest.approx(0.25)
    assert meter(2, 8, 40.0, 20.0) == 0
    assert meter(2, 4, 40.0, 10.0) == pytest.approx(0.5)


def test_a_process_beside_is_seen():
    if not contention._STAT.exists():
        pytest.skip("this system does not tell what others take")
    burn = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    beside = subprocess.Popen([sys.executable, "-c", burn])
    try:
        time.sleep(0.2)
        meter = contention.CpuMeter(contention.available_cpus())
        with meter:
            time.sleep(0.5)
        assert meter.contention > 0.3 / contention.available_cpus()
    finally:
        beside.kill()
        beside.wait()


def test_the_check_of_answers_finds_planted_faults(rng):
    reference_values = rng.random((4, 50))
    order = np.argsort(reference_values, axis=1)[:, :3]
    nearest = np.take_along_axis(reference_values, order, axis=1)

    def reason(distances, indices):
        return reference.check_neighbors(distances, indices, reference_values, same_order=True).reason

    assert reason(nearest, order) == ""
    assert "off by" in reason(nearest + np.array([[0, 0, 0.1]]), order)
    assert "off by" in reason(np.where(nearest == nearest[0, 0], np.nan, nearest), order)
    assert "among the nearest" in reason(nearest, np.argsort(reference_values, axis=1)[:, 3:6])
    assert "among the nearest" in reason(nearest, order * 0 - 1)
    assert "among the nearest" in reason(nearest, order * 0 + 50)
    assert "total order" in reason(nearest, order[:, ::-1])


def test_the_check_of_distances_finds_planted_faults(rng):
    values = np.floor(100 * rng.random((4, 50)))
    assert reference.check_distances(values, values, exact=True).reason == ""
    assert "off by up to 1" in reference.check_distances(values + np.eye(4, 50), values * 1.0, exact=True).reason or (
        "of the largest" in reference.check_distances(values + np.eye(4, 50), values, exact=True).reason
    )
    assert reference.check_distances(values * 1.001, values, exact=False).reason == ""
    assert "off by" in reference.check_distances(values * 1.001, values, exact=True).reason
    assert "of the largest" in reference.check_distances(values * 1.1, values, exact=False).reason
    assert "of the largest" in reference.check_distances(values * np.nan, values, exact=False).reason


def test_a_random_search_is_measured_and_checked(misbehaving):
    names = "good", "torch-cdist", "wrongloss", "wrongdecision", "impossibleloss", "scipy"
    # Time enough that all iterations are measured on a slow machine, too.
    found = {cell.backend: cell for cell in cells(*names, ops=["random-search"], case_s=0.5, dataset="digits")}
    good, peer, wrong_loss, wrong_decision, impossible, absent = (found[name] for name in names)
    assert (good.status, good.reason) == (peer.status, peer.reason) == ("ok", "")
    assert good.case == "random-search/cross-entropy/digits/uint8/40x300x64"
    assert (good.measured_queries, good.measured_corpus) == (40, 300)
    assert good.n_checked == peer.n_checked == 2 * worker.CHECKED_ITERATIONS
    assert good.error < 1e-6
    assert (good.bound, good.floor_s > 0) == ("gemm-float32", True)
    # A pass has one candidate at the least for each iteration, and at the most as many as it may hold.
    assert 1 <= good.operations["gemm-float32"] / (good.pair_features * 10) <= 8
    assert (wrong_loss.status, wrong_loss.reason) == ("wrong", "losses are off by 0.01 of the largest")
    assert (wrong_decision.status, "against the method" in wrong_decision.reason) == ("wrong", True)
    assert impossible.status == "impossible"
    assert (absent.status, "has no losses of linear models" in absent.reason) == ("unsupported", True)


def test_a_random_search_with_another_seed_is_checked_after_the_timed_calls(tmp_path):
    (case,) = measure.make_cases("digits", (), ops=["random-search"], n_queries=40, options={"n_train": 300})
    X, y = case.load_samples()
    path = tmp_path / "losses.json"
    scales, n_classes = {"step_size": 1e-4, "init_scale": 1e-3}, int(y.max()) + 1
    losses = reference.reference_losses(X, y, n_classes, 0, worker.CHECKED_ITERATIONS, **scales)
    path.write_text(json.dumps({300: losses.tolist()}))
    opened = worker._Search("numpy", worker.Opening(case, 0.05, str(path), str(path)))
    assert opened.open()["status"] == "ok"
    assert len({tuple(opened.call(shift).curve) for shift in range(worker.SHIFTS)}) == worker.SHIFTS
    assert opened.close()["reason"].startswith("after the timed calls, for another seed: ")


def test_a_random_search_that_takes_too_long_has_fewer_samples(monkeypatch):
    monkeypatch.setattr(worker, "LEAST_CORPUS", 100)
    (case,) = measure.make_cases("digits", (), ops=["random-search"])
    assert [worker._Search("numpy", worker.Opening(case, s, "", "")).samples() for s in (1e-6, 1e6)] == [100, 1438]


def test_the_check_of_searches_finds_planted_faults():
    losses = np.array([4.0, 4.2, 3.9, 3.9, 3.5])

    def reason(accepted, curve, near_ties=()):
        return reference.check_search(accepted, curve, near_ties, losses).reason

    assert reason([0, 2, 4], [4.0, 3.9, 3.5]) == ""
    assert reason([0, 2, 4, 7], [4.0, 3.9, 3.5, 3.4]) == ""
    assert "iteration 2 was not taken" in reason([0, 4], [4.0, 3.5])
    assert "iteration 3 was taken" in reason([0, 2, 3, 4], [4.0, 3.9, 3.89, 3.5])
    assert reason([0, 2, 3], [4.0, 3.9, 3.89], near_ties=[3]) == ""
    assert "off by 0.024" in reason([0, 2, 4], [4.1, 3.9, 3.5])
    assert "off by nan" in reason([0, 2, 4], [math.nan, 3.9, 3.5])


def test_the_reference_of_searches_is_the_definition():
    X, y = np.array([[1, 0], [0, 2]], np.uint8), np.array([1, 0])
    draws = [np.random.Generator(np.random.Philox(key=[3, counter])) for counter in range(3)]
    W, b = (1e-3 * draws[0].standard_normal((2, 2))).astype(np.float32), np.zeros(2, np.float32)
    expected = []
    for draw in draws[1:]:
        step = 0.1 * draw.standard_normal((3, 2))
        candidate = (W + step[:2]).astype(np.float32), (b + step[2]).astype(np.float32)
        logits = X.astype(float) @ candidate[0] + candidate[1]
        expected.append(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1], y]))
        if expected[-1] == min(expected):
            W, b = candidate
    found = reference.reference_losses(X, y, int(y.max()) + 1, 3, 2, step_size=0.1, init_scale=1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_tie_with_the_kth_counts_as_found():
    distances = np.array([[1.0, 2.0, 2.0, 3.0]])
    verdict = reference.check_neighbors(np.array([[1.0, 2.0]]), np.array([[0, 2]]), distances, same_order=False)
    assert (verdict.recall, verdict.reason) == (1.0, "")


def test_memory_of_a_large_array_shows_in_the_peak():
    before = memory.start_peak()
    np.ones(8_000_000).sum()
    peak = memory.peak_since(before)
    if memory.peak_bytes() == 0:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 50e6 < peak < 200e6


def test_the_machine_is_described_in_json():
    facts = machine.describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpus"] >= 1
    assert facts["cpu"]


def test_slow_backends_are_measured_on_fewer_rows(monkeypatch):
    monkeypatch.setattr(worker, "LEAST_CORPUS", 100)
    (case,) = measure.make_cases("synthetic", ["cityblock"], options={"n_train": 3000, "n_test": 1000})
    slow = worker._Distances("python", worker.Opening(case, 0.05, "", ""))
    assert slow.corpus_rows(pairs_per_s=10_000.0) == 100
    assert slow.corpus_rows(pairs_per_s=1e9) == 3000


@pytest.mark.parametrize(
    ("per_query", "expected"),
    [
        (lambda n: 1e-3, 200),
        (lambda n: 1e-3 if n < 300 else 1e-4, 800),
        (lambda n: 1e-3 if n < 900 else 1e-4, 200),  # beyond what is looked at
    ],
)
def test_a_library_that_computes_in_another_way_with_more_queries_is_given_them(per_query, expected, monkeypatch):
    (case,) = measure.make_cases("synthetic", ["cityblock"], options={"n_train": 300, "n_test": 5000})
    one = worker._Distances("numpy", worker.Opening(case, 0.1, "", ""))
    monkeypatch.setattr(one, "call_s", 0.1, raising=False)
    monkeypatch.setattr(one, "timed_call", lambda n, prepared: (n * per_query(n), None))
    assert one.query_rows(one.prepared(300)[1], 1000 * 300.0) == expected


def test_a_ceiling_that_was_measured_too_low_makes_nothing_impossible(misbehaving, monkeypatch):
    rates = iter([1.0, 2.0, 1e15, 1e10])
    monkeypatch.setattr(ceilings.Ceilings, "_run", fake_run(rates))
    (cell,) = cells("good")
    assert cell.status == "ok"
    assert cell.ceilings == {cell.bound: 1e15, "read": 1e10}
    assert cell.operations[cell.bound] / cell.ceilings[cell.bound] == cell.floor_s
    assert next(rates, None) is None


def test_a_contended_ceiling_makes_nothing_impossible(misbehaving, monkeypatch):
    plain = ceilings.Ceilings.measure

    def contended(self, names=None):
        return (replace(ceiling, contention=0.4) for ceiling in plain(self, names))

    monkeypatch.setattr(ceilings.Ceilings, "measure", contended)
    (cell,) = cells("impossible")
    assert cell.status == "ok"
    assert cell.fraction_of_floor > 1
