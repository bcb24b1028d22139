"""The command line as a user meets it: what it prints, what it keeps, how it exits."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import knnbench
from knnbench import cli, datasets
from knnbench.backends import backend_status, registry
from knnbench.measure import read_records, reproduction
from knnbench.measure.process import WorkerEnded
from knnbench.measure.reproduction import NOTEBOOK, Progress


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run a command line in this process, in an empty folder, and return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.out, "_width", 200)
    monkeypatch.setattr(cli.err, "_width", 200)

    def call(*arguments):
        result = CliRunner().invoke(cli.app, arguments)
        if isinstance(result.exception, knnbench.KnnbenchError):
            # `main` turns these into a line and an exit code; a process of its own shows it below.
            return cli.INVALID, result.stdout, str(result.exception)
        return result.exit_code, result.stdout, result.stderr

    return call


def in_process_of_its_own(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "knnbench", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_run_shows_and_keeps_what_it_measured(invoke, tmp_path):
    code, shown, _ = invoke("run", "--backends", "numpy,python", "--dataset", "digits", "--time", "0.4", "-k", "2")
    assert code == 0
    records = list(read_records(tmp_path / cli.OUTPUT))
    assert [(record.metric, record.backend, record.status) for record in records] == [
        ("cityblock", "numpy", "ok"),
        ("euclidean", "numpy", "ok"),
        ("cityblock", "python", "ok"),
        ("euclidean", "python", "ok"),
    ]
    assert {record.k for record in records} == {2}
    for text in ("cityblock, digits uint8, k=2, 1,438 x 64", "ms/query", "x numpy", "Gpair/s", "error"):
        assert text in shown
    invoke("run", "--backends", "numpy", "--metrics", "l1", "--dataset", "digits", "--time", "0.1", "--n-queries", "7")
    records = list(read_records(tmp_path / cli.OUTPUT))
    assert len(records) == 5  # appended, not replaced
    assert (records[-1].metric, records[-1].n_queries) == ("cityblock", 7)


def test_run_prints_json_lines(invoke, tmp_path):
    arguments = "--backends", "numpy", "--metrics", "cosine", "--dataset", "synthetic", "--dtype", "float64"
    code, shown, _ = invoke("run", *arguments, "--time", "0.1", "--threads", "1", "--json", "-o", "other.jsonl")
    assert code == 0
    (record,) = [json.loads(line) for line in shown.splitlines()]
    assert (record["dtype"], record["threads"], record["status"]) == ("float64", 1, "ok")
    assert (tmp_path / "other.jsonl").read_text() == shown


def test_a_backend_that_was_named_and_does_not_work_fails_the_run(invoke):
    absent = next((name for name in registry() if not backend_status(name).ok), None)
    if absent is None:
        pytest.skip("every backend works here")
    code, shown, _ = invoke("run", "--backends", f"numpy,{absent}", "--dataset", "digits", "--time", "0.1")
    assert code == cli.FAILED
    assert "Absent" in shown
    assert absent in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backends", "nope"], "backend 'nope' is unknown"),
        (["--metrics", "nope"], "metric 'nope' is unknown"),
        (["--metrics", ","], "--metrics is ','"),
        (["--backends", ","], "--backends is ','"),
        (["--dataset", "nope"], "data set 'nope' is unknown"),
        (["--dataset", "digits", "--dtype", "int8"], "dtype 'int8'"),
        (["--dataset", "digits", "-k", "1439"], "exceeds n_corpus=1438"),
        (["--dataset", "digits", "-o", "no/such/folder"], "no/such/folder"),
        (["-k", "0"], "'--k'"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_measured(invoke, tmp_path, arguments, text):
    code, _, errors = invoke("run", *arguments)
    assert code == cli.INVALID
    assert text in errors
    assert not (tmp_path / cli.OUTPUT).exists()


def test_an_error_is_a_line_and_an_exit_code(tmp_path):
    done = in_process_of_its_own("run", "--backends", "nope", cwd=tmp_path)
    assert done.returncode == cli.INVALID
    assert done.stderr.startswith("knnbench: backend 'nope' is unknown")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_absent_mnist_says_how_to_get_it(tmp_path):
    for arguments in (["run", "--dataset", "mnist"], ["reproduce"]):
        done = in_process_of_its_own(
            *arguments, cwd=tmp_path, KNNBENCH_DATA=str(tmp_path), KNNBENCH_CACHE=str(tmp_path / "cache")
        )
        assert done.returncode == cli.INVALID
        assert "knnbench data fetch mnist" in " ".join(done.stderr.split())


def test_ctrl_c_shows_and_keeps_what_was_measured(tmp_path):
    output = tmp_path / "records.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "knnbench", "run", "--backends", "numpy,python", "--dataset", "digits", "--time", "6",
         "-o", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not output.exists() or not output.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert "Traceback" not in errors
    kept = list(read_records(output))
    assert 1 <= len(kept) < 4
    assert "cityblock, digits" in shown


def test_without_a_command_it_runs(invoke, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "run", lambda: called.append("run"))
    assert invoke()[0] == 0
    assert called == ["run"]
    assert invoke("--version")[1] == f"knnbench {knnbench.__version__}\n"


def test_backends_lists_every_one_with_its_reason(invoke):
    code, shown, _ = invoke("backends")
    assert code == 0
    for name in registry():
        status = backend_status(name)
        assert name in shown
        if not status.ok and status.install:
            assert status.install.split()[0] in shown


def test_data_info_and_fetch(invoke):
    code, shown, _ = invoke("data", "info")
    assert code == 0
    for name in datasets.DATASETS:
        assert name in shown
    code, _, errors = invoke("data", "fetch", "digits")
    assert code == cli.INVALID
    assert "expected mnist" in errors


@pytest.fixture
def classified(monkeypatch):
    """Let `reproduce` get these results, by metric, instead of classifying MNIST."""

    def give(results):
        def classify(backend, metric, threads):
            for result in results[metric]:
                if isinstance(result, Exception):
                    raise result
                yield result

        monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: None)
        monkeypatch.setattr(reproduction, "classify", classify)

    return give


def complete(metric, first=0, whole=0):
    theirs = NOTEBOOK[metric]
    return Progress(10_000, theirs.all_correct + whole, theirs.first_correct + first, 2.0, 0.1)


def test_reproduce_is_right_only_with_the_exact_accuracies(invoke, classified):
    classified({metric: [complete(metric)] for metric in NOTEBOOK})
    code, shown, _ = invoke("reproduce", "--no-search", "--backends", "numpy")
    assert code == 0
    for text in ("952", "9,633", "961", "9,705", "CUDA 23"):
        assert text in shown
    for wrong in ({"first": 1}, {"whole": -1}):
        classified({"cityblock": [complete("cityblock")], "euclidean": [complete("euclidean", **wrong)]})
        code, shown, _ = invoke("reproduce", "--no-search", "--backends", "numpy")
        assert code == cli.FAILED
        assert "differs from the notebook" in shown


def test_reproduce_says_why_a_backend_did_not_finish(invoke, classified):
    stopped = Progress(0, 0, 0, 0.0, 0.1, "all test images would take about 28 hours")
    classified({"cityblock": [stopped], "euclidean": [WorkerEnded("crashed", "exit code 1")]})
    code, shown, _ = invoke("reproduce", "--no-search", "--backends", "python")
    assert code == cli.FAILED
    assert "28 hours" in shown
    assert "exit code 1" in shown
