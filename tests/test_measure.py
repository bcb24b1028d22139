"""The runner, on backends that misbehave in every way it claims to survive; the record; the timer; the reference."""

import json
import math
import os
import sys

import numpy as np
import pytest

from knnbench import measure
from knnbench.backends import ENTRY_POINTS, backend_status, registry
from knnbench.errors import InvalidInputError
from knnbench.measure import machine, memory, process, reference, runner, timer, worker

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

class Segfault(Good):
    def misbehave(self, space):
        if space.metric.name == "cityblock":
            os.kill(os.getpid(), signal.SIGSEGV)

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
"""
NAMES = (
    "Good",
    "Segfault",
    "Exit",
    "ExitsWell",
    "Killed",
    "Hang",
    "Raises",
    "NoMemory",
    "WrongDistance",
    "WrongOrder",
    "SameNeighbour",
)


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
    yield
    registry.cache_clear()
    sys.modules.pop("misbehaving", None)


def cells(name, metrics=("euclidean",), **options):
    plan = measure.Plan(
        [name], list(metrics), "digits", {"n_train": 300, "n_test": 40}, case_s=0.05, threads=1, **options
    )
    return list(measure.measure(plan))


def test_a_good_backend_is_measured_and_checked(misbehaving):
    (cell,) = cells("good", n_queries=30, k=5)
    assert (cell.status, cell.reason) == ("ok", "")
    assert (cell.n_queries, cell.n_corpus, cell.n_features, cell.k) == (30, 300, 64, 5)
    assert not cell.sampled
    assert len(cell.times_s) >= timer.LEAST_REPEATS
    assert cell.low_s <= cell.median_s <= cell.high_s
    assert cell.error < 1e-6
    assert cell.recall == 1.0
    assert cell.n_checked == runner.CHECKED_QUERIES
    assert cell.library == "1.5"
    assert cell.threads == 1
    assert not cell.peer
    assert min(cell.import_s, cell.prepare_s, cell.first_call_s) > 0
    assert cell.seconds_per_pair == pytest.approx(cell.median_s / (30 * 300 * 64))


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("exit", "crashed", "exit code 7: something broke"),
        ("exitswell", "crashed", "before its answer"),
        ("killed", "out-of-memory", "SIGKILL"),
        ("raises", "crashed", "RuntimeError: an odd message"),
        ("nomemory", "out-of-memory", "too large"),
        ("wrongdistance", "wrong", "distances are off by"),
        ("wrongorder", "wrong", "total order"),
        ("sameneighbour", "wrong", "among the nearest"),
        ("cupy", "absent", "To use it: pip install"),
        ("notebook", "unsupported", "lacks metric 'chebyshev'"),
    ],
)
def test_what_goes_wrong_becomes_a_status_with_its_reason(misbehaving, name, status, reason):
    if name == "cupy" and backend_status("cupy").ok:
        pytest.skip("cupy works here")
    (cell,) = cells(name, ["chebyshev" if name == "notebook" else "euclidean"])
    assert cell.status == status
    assert reason in cell.reason
    assert "\n" not in cell.reason


def test_a_crash_loses_no_other_metric(misbehaving):
    first, crashed, last = cells("segfault", ["euclidean", "cityblock", "sqeuclidean"])
    assert (first.status, first.metric) == ("ok", "euclidean")
    assert (crashed.status, crashed.metric) == ("crashed", "cityblock")
    assert "SIGSEGV" in crashed.reason
    assert (last.status, last.metric) == ("ok", "sqeuclidean")


def test_a_backend_that_hangs_and_hears_no_signal_is_ended(misbehaving, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 6.0)
    monkeypatch.setattr(runner, "LIMIT_SHARE", 0)
    (cell,) = cells("hang")
    assert cell.status == "timed-out"


def test_closing_the_run_ends_the_worker(misbehaving):
    import subprocess

    before = subprocess.run(["pgrep", "-fc", "knnbench.measure.worker"], capture_output=True, text=True, check=False)
    run = measure.measure(measure.Plan(["good"], ["euclidean", "cityblock"], "digits", case_s=0.05, threads=1))
    next(run)
    run.close()
    after = subprocess.run(["pgrep", "-fc", "knnbench.measure.worker"], capture_output=True, text=True, check=False)
    assert after.stdout == before.stdout


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


def test_records_survive_a_file_and_a_line_cut_short(tmp_path, misbehaving):
    path = tmp_path / "records.jsonl"
    made = cells("good", ["euclidean", "cityblock"])
    for cell in made:
        measure.append_record(path, cell)
    assert list(measure.read_records(path)) == made
    assert json.loads(path.read_text().splitlines()[0])["schema"] == 1
    whole = path.read_text()
    path.write_text(whole[:-20])  # a crash
    assert list(measure.read_records(path)) == made[:1]
    measure.append_record(path, made[1])  # and the next run
    assert list(measure.read_records(path)) == made
    path.write_text("nonsense\n" + whole)
    with pytest.raises(InvalidInputError, match="line 1 is not"):
        list(measure.read_records(path))


def test_a_later_schema_is_refused_and_a_later_field_is_not(tmp_path, misbehaving):
    path = tmp_path / "records.jsonl"
    (made,) = cells("good")
    data = json.loads(made.to_json())
    path.write_text(json.dumps({**data, "added_later": 1}) + "\n")
    assert list(measure.read_records(path)) == [made]
    path.write_text(json.dumps({**data, "schema": 2}) + "\n")
    with pytest.raises(InvalidInputError, match="schema version 2"):
        list(measure.read_records(path))


def test_every_status_is_documented():
    assert set(measure.STATUSES) == {
        "ok", "absent", "unsupported", "wrong", "over-budget", "out-of-memory", "crashed", "timed-out",
    }  # fmt: skip


@pytest.mark.parametrize("n", [3, 5, 6, 8, 9, 20, 100])
def test_the_interval_of_the_median_covers_it_as_often_as_it_says(n):
    _, low, high = timer.median_interval([float(i) for i in range(n)])
    outside = sum(math.comb(n, i) for i in range(int(low) + 1)) / 2**n * 2
    if n < 6:
        assert (low, high) == (0.0, n - 1.0)
    else:
        assert outside <= 0.05 < outside + 2 * math.comb(n, int(low) + 1) / 2**n


def test_repeats_fill_the_time_and_are_never_fewer_than_three():
    assert len(timer.timed_repeats(lambda: None, lambda: None, 0.0)) == timer.LEAST_REPEATS
    assert len(timer.timed_repeats(lambda: None, lambda: None, 1.0)) == timer.MOST_REPEATS


def test_the_device_is_waited_for_before_and_after_the_clock():
    calls = []
    timer.timed(lambda: calls.append("work"), lambda: calls.append("wait"))
    assert calls == ["wait", "work", "wait"]


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
    rows = np.random.default_rng(0).integers(0, 256, (3000, 64), dtype=np.uint8)
    path_of = {}
    job = worker.Job("python", ["cityblock"], "", {}, "", 3, 1000, 0.05, path_of)
    case = worker._Case(job, "cityblock", rows[:1000], rows)
    assert case.corpus_rows(pairs_per_s=10_000.0) == 100
    assert case.corpus_rows(pairs_per_s=1e9) == 3000
