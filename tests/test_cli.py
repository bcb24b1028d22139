"""The command line as a user meets it: what it prints, what it keeps, how it exits."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import knnbench.measure
import knnbench.results
from knnbench import cli, datasets
from knnbench.backends import backend_status, registry
from knnbench.measure import machine, reproduction
from knnbench.measure.ceilings import PROBES, Ceilings
from knnbench.measure.process import WorkerEnded
from knnbench.measure.reproduction import NOTEBOOK, Progress
from knnbench.results import append_record, read_records
from tests.test_measure import MEASURED_RUN, fake_run
from tests.test_results import FIRST, SECOND


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run a command line in this process, in an empty folder, and return (exit code, stdout, stderr).

    Its ceilings are made up: to measure those of a run takes longer than all else of it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Ceilings, "_run", fake_run(itertools.repeat(1e12)))
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


def test_run_shows_and_keeps_what_it_measured(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(Ceilings, "_run", MEASURED_RUN)
    code, shown, _ = invoke("run", "--backends", "numpy,python", "--dataset", "digits", "--time", "0.4", "-k", "2")
    assert code == 0
    records = read_records(tmp_path / cli.OUTPUT)
    assert sorted((record.metric, record.backend, record.twin, record.status) for record in records) == [
        ("cityblock", "numpy", False, "ok"),
        ("cityblock", "numpy", True, "ok"),
        ("cityblock", "python", False, "ok"),
        ("euclidean", "numpy", False, "ok"),
        ("euclidean", "numpy", True, "ok"),
        ("euclidean", "python", False, "ok"),
    ]
    assert {record.k for record in records} == {2}
    for text in (
        "knn cityblock, digits uint8, k=2, 1,438 x 64", "ms/query", "x numpy", "Gpair/s", "% of limit", "error",
        "one backend in two processes differed by",
    ):  # fmt: skip
        assert text in shown
    arguments = "--backends", "numpy", "--metrics", "l1", "--dataset", "digits", "--time", "0.1", "--n-queries", "7"
    invoke("run", *arguments, "--no-twins")
    records = read_records(tmp_path / cli.OUTPUT)
    assert len(records) == 7  # appended, not replaced
    assert (records[-1].metric, records[-1].n_queries) == ("cityblock", 7)
    assert not (tmp_path / (cli.OUTPUT.name + ".partial")).exists()


def test_run_prints_json_lines(invoke, tmp_path):
    arguments = "--backends", "numpy", "--metrics", "cosine", "--dataset", "synthetic", "--dtype", "float64"
    code, shown, _ = invoke(
        "run", *arguments, "--time", "0.1", "--threads", "1", "--json", "--no-twins", "-o", "other.jsonl"
    )
    assert code == 0
    (record,) = [json.loads(line) for line in shown.splitlines()]
    assert (record["dtype"], record["threads"], record["status"]) == ("float64", 1, "ok")
    assert (tmp_path / "other.jsonl").read_text() == shown


def test_cases_are_listed_and_chosen_by_name(invoke, tmp_path):
    grid = "run", *DATA, "--metrics", "all", "--dtype", "uint8,float32", "--op", "knn,pairwise"
    code, shown, _ = invoke(*grid, "--list")
    assert (code, len(shown.splitlines())) == (0, 20)
    code, shown, _ = invoke(*grid, "--only", "pairwise/cosine/*", "--list")
    assert shown.splitlines() == [f"pairwise/cosine/synthetic/{dtype}/300x1000x64" for dtype in ("uint8", "float32")]
    code, shown, _ = invoke(*grid, "--only", "pairwise/cityblock/*/uint8/*", "--backends", "numpy", "--time", "0.1")
    assert code == 0
    assert "pairwise cityblock, synthetic uint8, 1,000 x 64" in shown
    assert {record.case for record in read_records(tmp_path / cli.OUTPUT)} == {
        "pairwise/cityblock/synthetic/uint8/300x1000x64"
    }


def test_a_backend_that_was_named_and_does_not_work_fails_the_run(invoke):
    absent = next((name for name in registry() if not backend_status(name).ok), None)
    if absent is None:
        pytest.skip("every backend works here")
    code, shown, _ = invoke("run", *SMALL, "--backends", f"numpy,{absent}", "--no-twins")
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
        (["--dataset", "digits", "--dtype", "int8"], "'int8' is not measured"),
        (
            ["--dataset", "digits", "--op", "sort"],
            "'sort' is not measured; expected one of: knn, pairwise, random-search",
        ),
        (["--dataset", "digits", "--dtype", ","], "--dtype is ','"),
        (["--dataset", "digits", "--only", "*/l1/*"], "no case matches '*/l1/*'; there are: knn/cityblock/digits"),
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


# Without euclidean, whose products have a ceiling that takes seconds to measure, and without the digits, for which each
# process would load scikit-learn.
METRICS = "cityblock,chebyshev"
DATA = "--dataset", "synthetic", "--n-queries", "300", "--n-corpus", "1000", "--n-features", "64"
SMALL = "--backends", "numpy,python", *DATA, "--metrics", METRICS, "--time", "0.4"
# Long enough to be stopped in the middle. The last two say where to.
GRID = *SMALL[:-1], "2", "-o", "records.jsonl"


def started(cwd):
    arguments = [sys.executable, "-m", "knnbench", "run", *GRID]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def wait_until(condition):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    assert condition()


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_ctrl_c_shows_and_keeps_what_was_measured_and_a_rerun_goes_on(tmp_path):
    process = started(tmp_path)
    partial = tmp_path / "records.jsonl.partial"
    wait_until(lambda: lines(partial) > 1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert "Traceback" not in errors
    assert "interrupted after" in shown
    assert "the same command goes on" in errors
    first = json.loads(partial.read_text().splitlines()[1])
    again = in_process_of_its_own("run", *GRID, cwd=tmp_path)
    assert again.returncode == 0
    assert "going on with the run of" in again.stderr
    assert not partial.exists()
    records = read_records(tmp_path / "records.jsonl")
    (same,) = [
        record for record in records
        if (record.case, record.backend, record.twin) == (cell_name(first), first["backend"], first["twin"])
    ]  # fmt: skip
    assert same.times_s[: len(first["phases"]["call"])] == first["phases"]["call"]


def cell_name(data):
    return knnbench.results.Record(**data).case


def test_a_killed_run_is_finished_by_a_rerun_without_repeating(tmp_path):
    path = tmp_path / "records.jsonl"
    process = started(tmp_path)
    wait_until(lambda: lines(path) >= 3)  # one case is over, another is not
    process.kill()
    process.communicate()
    before = path.read_bytes()
    again = in_process_of_its_own("run", *GRID, cwd=tmp_path)
    assert again.returncode == 0
    assert path.read_bytes().startswith(before)
    records = read_records(path)
    keys = [(record.case, record.backend, record.twin) for record in records]
    assert len(keys) == len(set(keys)) == 6
    assert len({record.run for record in records}) == 1
    assert {record.status for record in records} == {"ok"}
    assert all(metric in again.stdout for metric in METRICS.split(","))


def test_two_runs_do_not_write_to_one_file(tmp_path):
    process = started(tmp_path)
    wait_until(lambda: (tmp_path / "records.jsonl").exists())
    second = in_process_of_its_own("run", *GRID, cwd=tmp_path)
    process.kill()
    process.communicate()
    assert second.returncode == cli.INVALID
    assert "another run is writing to records.jsonl" in " ".join(second.stderr.split())


@pytest.fixture
def interrupted(invoke, tmp_path, monkeypatch):
    """Leave what a run that was killed in its first round leaves."""

    def stopped(journal, records):
        original(journal, records)
        if journal.partial:
            raise KeyboardInterrupt

    original = knnbench.measure.Journal.take
    with monkeypatch.context() as patch:
        patch.setattr(knnbench.measure.Journal, "take", stopped)
        assert invoke("run", *SMALL, "--no-twins", "-o", "records.jsonl")[0] == cli.INTERRUPTED
    return tmp_path / "records.jsonl", tmp_path / "records.jsonl.partial"


def test_another_plan_starts_anew_and_keeps_what_was_measured(interrupted, invoke):
    path, partial = interrupted
    left = partial.read_text().splitlines()[1:]
    assert left
    code, _, errors = invoke("run", *SMALL, "--no-twins", "-o", "records.jsonl", "--metrics", "chebyshev")
    assert (code, "going on" in errors) == (0, False)
    records = read_records(path)
    assert [record.to_json() for record in records[: len(left)]] == left
    assert [record.metric for record in records if record.complete] == ["chebyshev", "chebyshev"]
    assert not partial.exists()


def test_fresh_starts_anew(interrupted, invoke):
    path, _ = interrupted
    code, _, errors = invoke("run", *SMALL, "--no-twins", "-o", "records.jsonl", "--fresh")
    assert (code, "going on" in errors) == (0, False)
    runs = [record.run for record in read_records(path)]
    assert len(set(runs)) == 2
    assert len(runs) > 4


def test_a_file_of_something_else_is_not_appended_to(invoke, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    code, _, errors = invoke("run", *GRID[:-1], "notes.txt")
    assert code == cli.INVALID
    assert "notes.txt line 1 is not a knnbench record" in errors
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_a_full_disk_loses_nothing(invoke, monkeypatch):
    def full(path, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("knnbench.measure.journal.append_record", full)
    code, shown, errors = invoke("run", *SMALL, "--metrics", "cityblock", "--no-twins")
    assert code == cli.FAILED
    assert "No space left on device; they were printed" in " ".join(errors.split())
    records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert [record["metric"] for record in records]
    assert "Traceback" not in errors


def test_compare_exits_with_one_on_a_regression(invoke, tmp_path):
    def saved(name, factor, **fields):
        times = [factor * (1 + 0.001 * i) for i in range(12)]
        append_record(tmp_path / name, replace(FIRST, phases={"call": times}, **fields))

    saved("a.jsonl", 1.0)
    saved("b.jsonl", 2.0)
    code, shown, _ = invoke("compare", "a.jsonl", "b.jsonl")
    assert code == cli.FAILED
    assert "slower" in shown
    code, shown, _ = invoke("compare", "b.jsonl", "a.jsonl")
    assert code == 0
    assert "faster" in shown
    saved(cli.OUTPUT.name, 1.0)
    saved(cli.OUTPUT.name, 3.0, backend="scipy")
    assert invoke("compare", "backend=numpy", "backend=scipy")[0] == cli.FAILED
    code, _, errors = invoke("compare", "a.jsonl", "nowhere.jsonl")
    assert code == cli.INVALID
    assert "nowhere.jsonl" in errors


def test_backends_of_a_device_alone(invoke):
    # Both are there on any machine.
    code, _, errors = invoke("run", "--device", "cpu", "--backends", "numpy,torch-cuda", "--list")
    assert code == 0
    code, _, errors = invoke("run", "--device", "cpu", "--backends", "numpy,torch-cuda")
    assert code == cli.INVALID
    assert "not of device cpu: torch-cuda" in errors
    for device in ("gpu", "cpu,cuda"):
        code, _, errors = invoke("run", "--device", device)
        assert code == cli.INVALID
        assert f"--device is '{device}'; expected one of: cpu, cuda" in errors


def test_the_ceilings_of_a_device_are_measured_first(invoke, monkeypatch):
    log = []

    class Known(cli.Ceilings):
        def measure(self, names=None):
            log.extend(names)
            return iter(())

    def measure(plan, earlier, ceilings):
        log.append((plan.backends, type(ceilings)))
        return iter(())

    monkeypatch.setattr(cli, "Ceilings", Known)
    monkeypatch.setattr(cli, "measure", lambda *given: (_ for _ in measure(*given)))
    monkeypatch.setattr(cli, "backends_on", lambda device: ["cupy", "torch-cuda"])
    invoke("run", "--device", "cuda", "--dataset", "digits")
    assert log == [*(name for name, probe in PROBES.items() if probe.device == "cuda"), (["cupy", "torch-cuda"], Known)]


def test_machine_shows_what_it_is_and_what_it_can_do(invoke, monkeypatch):
    monkeypatch.setattr(Ceilings, "_run", MEASURED_RUN)
    code, shown, _ = invoke("machine", "--probes", "gemm-float32", "--threads", "1")
    assert code == 0
    assert machine.describe_machine()["cpu"] in shown
    assert "gemm-float32" in shown
    assert "G" in shown
    code, shown, _ = invoke("machine", "--probes", "gemm-float32,cuda-read", "--json")
    found = json.loads(shown)["ceilings"]
    assert found["gemm-float32"]["rate"] > 1e8
    assert found["cuda-read"]["rate"] or found["cuda-read"]["reason"]
    code, _, errors = invoke("machine", "--probes", "nope")
    assert code == cli.INVALID
    assert "probe 'nope' is unknown" in errors


def test_export_asv_says_what_it_leaves_out(invoke, tmp_path):
    append_record(tmp_path / "a.jsonl", FIRST)
    append_record(tmp_path / "a.jsonl", SECOND)
    code, _, errors = invoke("export-asv", "a.jsonl")
    assert code == cli.INVALID
    assert "nothing was exported" in errors


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


def test_reproduce_shows_ten_searches_beside_the_notebook(invoke, classified, monkeypatch):
    classified({metric: [complete(metric)] for metric in NOTEBOOK})

    def random_search(seeds, threads):
        for seed in seeds:
            yield {"seed": seed, "loss": 300.0 + 20 * seed, "accuracy": 0.5, "iterations": 700 + seed, "seconds": 1.0}

    monkeypatch.setattr(reproduction, "random_search", random_search)
    code, shown, _ = invoke("reproduce", "--backends", "numpy", "--seed", "3")
    assert code == 0
    for text in ("383.48", "52.55%", "seed 3 ", "seed 12", "360.00 to 540.00", "703 to 712"):
        assert text in shown
    (verdict,) = (line for line in shown.splitlines() if "the notebook is" in line)
    assert [word for word in verdict.split() if "side" in word] == ["inside", "outside", "outside"]


def test_reproduce_says_why_the_search_ended(invoke, classified, monkeypatch):
    classified({metric: [complete(metric)] for metric in NOTEBOOK})

    def random_search(seeds, threads):
        yield {"seed": 0, "loss": 300.0, "accuracy": 0.5, "iterations": 700, "seconds": 1.0}
        raise WorkerEnded("crashed", "exit code 1")

    monkeypatch.setattr(reproduction, "random_search", random_search)
    code, shown, errors = invoke("reproduce", "--backends", "numpy")
    assert code == cli.FAILED
    assert "300.00" in shown
    assert "exit code 1" in errors


def test_sizes_may_be_several(invoke):
    sizes = "--n-corpus", "100", "--n-corpus", "200", "--n-features", "8", "--n-queries", "20", "-k", "1", "-k", "5"
    code, shown, _ = invoke(
        "run", "--dataset", "synthetic", "--metrics", "cosine", "--op", "knn,pairwise", *sizes, "--list"
    )
    assert code == 0
    assert sorted(shown.split()) == [
        "knn/cosine/synthetic/float32/20x100x8/k1",
        "knn/cosine/synthetic/float32/20x100x8/k5",
        "knn/cosine/synthetic/float32/20x200x8/k1",
        "knn/cosine/synthetic/float32/20x200x8/k5",
        "pairwise/cosine/synthetic/float32/20x100x8",
        "pairwise/cosine/synthetic/float32/20x200x8",
    ]


def test_kinds_of_synthetic_data_are_data_sets(invoke, tmp_path):
    kinds = "run", "--dataset", "synthetic:clusters,synthetic:far", "--metrics", "euclidean", "--dtype", "float64"
    code, _, _ = invoke(*kinds, "--backends", "numpy", "--n-queries", "20", "--time", "0.2", "--no-twins")
    assert code == 0
    records = read_records(tmp_path / cli.OUTPUT)
    assert {(record.dataset, record.dtype, record.n_queries, record.status) for record in records} == {
        ("synthetic:clusters", "float64", 20, "ok"),
        ("synthetic:far", "float64", 20, "ok"),
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dataset", "synthetic:nope"], "kind='nope' is no kind of synthetic data"),
        (["--dataset", "digits:far"], "data set 'digits:far' is unknown"),
        (["--dataset", "synthetic:denormals", "--dtype", "uint8"], "synthetic:denormals cannot be uint8"),
        (["--dataset", "digits", "--n-features", "3"], "digits has features of its own"),
        (["--dataset", "digits", "--n-corpus", "99999"], "n_train=99999 must be an integer from 1 to 1438"),
        (["--dataset", "digits", "--n-corpus", "10", "-k", "11"], "k=11 exceeds n_corpus=10"),
        (["--n-corpus", "0"], "--n-corpus"),
    ],
)
def test_sizes_and_kinds_that_cannot_be_are_refused(invoke, arguments, text):
    code, _, errors = invoke("run", *arguments)
    assert code == cli.INVALID
    assert text in errors
