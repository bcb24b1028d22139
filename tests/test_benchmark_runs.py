"""What `benchmarks.runs` takes for a run of this machine, and what ``python -m benchmarks.kernels`` shows of it."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu, kernels, runs
from knnbench.measure import Journal, Plan, Update, make_cases, measure
from knnbench.measure.ceilings import Ceilings
from knnbench.measure.machine import describe_machine
from knnbench.results import append_record, read_records

from .test_measure import fake_run

ROOT = Path(__file__).parents[1]
ZEN5 = {"cpu": "AMD EPYC 9B45 (Zen 5)", "cpus": 2, "features": ["avx2"], "gpus": []}


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(Ceilings, "_run", fake_run(itertools.repeat(1e12)))
    options = {"n_train": 1000, "n_features": 64}
    cases = make_cases("synthetic", ["cityblock"], dtypes=["uint8"], n_queries=10, options=options)
    return Plan(["numpy"], cases, case_s=0.1, threads=1, twins=False)


def run(plan, path):
    return runs.run(plan, path, Ceilings(1), lambda text, done: None)


def foreign(record, **fields):
    return replace(record, machine=ZEN5, started="2100-01-01T00:00:00+00:00", **fields)


def test_a_file_of_another_machine_is_measured_again_here(plan, tmp_path):
    path = tmp_path / "results" / "kernels.jsonl"
    (first,) = run(plan, path)
    path.unlink()
    append_record(path, foreign(first, run="there"))
    (own,) = run(plan, path)
    assert own.machine["cpu"] == describe_machine()["cpu"]
    assert own.run != "there"
    assert [record.run for record in read_records(path)] == ["there", own.run]
    run(plan, path)  # a run that is over is not gone on with either
    assert len(read_records(path)) == 3


def interrupted(plan, path, change):
    """Leave a run that was interrupted after its case, its record and what its header says changed."""
    with Journal(path, plan) as journal:
        for update in measure(plan):
            journal.take(update.records)
    partial = path.with_name(path.name + ".partial")
    header, record = json.loads(partial.read_text()), change(read_records(path)[0])
    path.unlink()
    append_record(path, record)
    header["unfinished"]["machine"]["cpu"] = record.machine["cpu"]
    partial.write_text(json.dumps(header) + "\n")
    return record


def test_only_an_interrupted_run_of_this_machine_is_gone_on_with(plan, tmp_path):
    left = interrupted(plan, tmp_path / "here.jsonl", lambda record: record)
    assert [record.to_json() for record in run(plan, tmp_path / "here.jsonl")] == [left.to_json()]
    left = interrupted(plan, tmp_path / "there.jsonl", foreign)
    (found,) = run(plan, tmp_path / "there.jsonl")
    assert found.machine["cpu"] == describe_machine()["cpu"] != left.machine["cpu"]


def test_the_newest_run_is_of_one_machine(plan, tmp_path):
    (record,) = run(plan, tmp_path / "a.jsonl")
    assert runs.newest([record, foreign(record)]) == [foreign(record)]  # of the same name, by chance
    later_clock = replace(record, machine={**record.machine, "clock_mhz": 1.0})
    assert runs.newest([record, later_clock]) == [record, later_clock]
    assert runs.newest([]) == []


def test_a_table_says_what_machine_it_is_of_and_takes_its_ceilings(plan, tmp_path):
    (case,) = (case for case in kernels.cases() if (case.n_queries, case.metric) == (1, "cityblock"))
    sizes = {"n_queries": 1, "n_corpus": case.n_corpus, "n_features": case.n_features}
    (record,) = run(plan, tmp_path / "a.jsonl")
    record = replace(record, backend="numba", dataset="mnist", k=case.k, measured_queries=1,
                     measured_corpus=case.n_corpus, floor_s=None, phases={"call": [1e-3] * 9},
                     ceilings={"read": case.n_corpus * case.n_features / 0.5e-3}, **sizes)  # fmt: skip
    assert record.case == case.name
    path = tmp_path / "zen5.jsonl"
    for each in (record, foreign(record, run="zen5")):
        append_record(path, each)
    command = [sys.executable, "-m", "benchmarks.kernels", "--show", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    assert "AMD EPYC 9B45 (Zen 5)" in shown
    assert f"{describe_machine()['cpu']}," not in shown  # of which the other's name may be longer
    assert f"{case.name} │ 1 ± 0%" in shown
    assert "50% of read" in shown  # half of what that machine reads, whatever this one does
    assert "not measured" in shown  # the other cases


@pytest.mark.parametrize("path", [runs.RESULTS / "kernels.jsonl", gpu.file_of("NVIDIA H900")])
def test_git_ignores_what_the_commands_write(path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


def test_what_comes_of_a_run_is_returned(plan, tmp_path, monkeypatch):
    (record,) = run(plan, tmp_path / "a.jsonl")
    said, ceilings = [], Ceilings(1)

    def measured(given, earlier, known):
        assert (given, known) == (plan, ceilings)
        yield Update("half", 0.5, [replace(record, complete=False)])
        yield Update("whole", 1.0, [record])

    monkeypatch.setattr(runs, "measure", measured)
    path = tmp_path / "results" / "b.jsonl"
    found = runs.run(plan, path, ceilings, lambda text, done: said.append((text, done)))
    assert found == [record] == list(read_records(path))
    assert said == [("half", 0.5), ("whole", 1.0)]
