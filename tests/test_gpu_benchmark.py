"""What ``python -m benchmarks.gpu`` prints and keeps, from records made up here; no time in them is one of a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu
from knnbench import cli
from knnbench.backends import backend_status, backends_on, registry
from knnbench.errors import BackendUnavailableError
from knnbench.measure.ceilings import PROBES
from knnbench.results import PHASES, Record, append_record, read_records

ROOT = Path(__file__).parents[1]


def record_of(case, backend, status="ok", queries=None, run="now", **phases):
    return Record(
        op=case.op, backend=backend, metric=case.metric, dataset=case.dataset, dtype=case.dtype, k=case.k,
        n_queries=case.n_queries, n_corpus=case.n_corpus, n_features=case.n_features, status=status,
        reason="" if status == "ok" else "planted", measured_queries=queries or case.n_queries,
        measured_corpus=case.n_corpus, peer=registry()[backend].peer, run=run, started=run,
        phases={"call": [9.0], **{name: [seconds] for name, seconds in phases.items()}},
    )  # fmt: skip


@pytest.fixture
def lines():
    return gpu.targets()


def rows_of(lines, records, **rates):
    return [dict(zip(HEADINGS, row, strict=False)) for row in gpu.rows(lines, records, rates)]


HEADINGS = ("case", "phase", "backend", "ms", "floor", "share", "at most", "met", "mm", "cdist")


def test_the_lines_are_those_of_the_issue(lines):
    assert [(line.case.name.removeprefix("knn/"), line.phase, line.seconds, line.of_product) for line in lines] == [
        ("cityblock/mnist/uint8/10000x60000x784/k3", "device", 11e-3, None),
        ("cityblock/mnist/float32/10000x60000x784/k3", "device", 42e-3, None),
        ("euclidean/mnist/uint8/10000x60000x784/k3", "device", 2.5e-3, None),
        ("euclidean/mnist/float32/10000x60000x784/k3", "device", 20e-3, 0.7),
        ("euclidean/mnist/uint8/10000x60000x784/k3", "from_pinned", 6e-3, None),
        ("euclidean/mnist/uint8/10000x60000x784/k3", "from_pageable", 10e-3, None),
        ("euclidean/synthetic/float32/10000x1000000x128/k10", "device", None, 0.7),
    ]
    assert {line.phase for line in lines} <= PHASES.keys()
    assert {PROBES[line.floor[0]].device for line in lines} == {"cuda"}
    assert {registry()[name].device for name in gpu.BASELINES} == {"cuda"}


def test_floors_follow_from_the_ceilings(lines):
    # 132 multiprocessors at 1.98 GHz, 64 lanes of 4: the floors of the issue's table.
    rates = {"cuda-sad-uint8": 132 * 64 * 4 * 1.98e9, "cuda-add-float32": 132 * 128 * 1.98e9,
             "cuda-gemm-int8": 1978.9e12 / 2, "cuda-gemm-float16": 989.4e12 / 2, "copy-in": 55e9}  # fmt: skip
    floors = [1e3 * line.floor_s(rates) for line in lines]
    assert floors[:5] == pytest.approx([7.03, 28.1, 0.475, 0.95, 1.0], rel=1e-2)
    assert 1e3 * lines[0].at_most_s(rates, None) == pytest.approx(10.9, rel=1e-2)
    half = {**rates, "cuda-sad-uint8": rates["cuda-sad-uint8"] / 2}
    assert 1e3 * lines[0].at_most_s(half, None) == pytest.approx(21.8, rel=1e-2)
    assert lines[0].at_most_s({}, None) == 11e-3
    # The less of both limits.
    assert lines[3].at_most_s(rates, 15e-3) == pytest.approx(10.5e-3)
    assert lines[3].at_most_s(rates, 40e-3) == 20e-3
    assert lines[6].at_most_s(rates, None) is None


def test_rows_show_own_backends_with_their_ratios(lines):
    wide = lines[3].case
    records = [
        record_of(wide, "cupy", device=12e-3, compute=1.0),
        record_of(wide, "torch-cuda", device=9e-3),
        record_of(wide, "torch-mm-cuda", device=20e-3),
        record_of(wide, "torch-cdist-cuda", queries=5_000, device=30e-3),  # of half of the queries
        record_of(wide, "numba-cuda", status="wrong", device=1e-3),
    ]
    first, second = rows_of(lines[3:4], records, **{"cuda-gemm-float16": 470.4e9 / 6e-3})
    assert (first["backend"], first["ms"], first["floor"]) == ("torch-cuda", "9 ± 0%", "6")
    assert (first["share"], first["at most"], first["met"]) == ("67% of cuda-gemm-float16", "14", "yes")
    assert (first["mm"], first["cdist"]) == ("0.45", "0.15")
    assert (second["backend"], second["met"], second["mm"]) == ("cupy", "yes", "0.6")
    (slow,) = rows_of(lines[3:4], [*records[2:4], record_of(wide, "cupy", device=15e-3)])
    assert (slow["met"], slow["floor"], slow["share"]) == ("no", "", "")


def test_what_was_not_measured_says_why(lines):
    case = lines[0].case
    (row,) = rows_of(lines[:1], [record_of(case, "cupy", status="absent"), record_of(case, "torch-cuda", "crashed")])
    assert row["backend"] == "cupy: absent, planted; torch-cuda: crashed, planted"
    assert rows_of(lines[:1], [])[0]["backend"] == "not measured"
    # A time of fewer queries is none of all.
    assert "ms" not in rows_of(lines[:1], [record_of(case, "cupy", queries=10, device=1e-3)])[0]


def test_the_newest_run_of_a_file_is_shown(lines, tmp_path):
    path = tmp_path / "gpu.jsonl"
    for run, seconds in (("2026-01", 5e-3), ("2026-02", 7e-3), ("2026-01", 6e-3)):
        append_record(path, record_of(lines[0].case, "cupy", run=run, device=seconds))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--show", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "7 ± 0%" in done.stdout
    assert "not measured" in done.stdout


@pytest.mark.parametrize(("main", "arguments"), [(gpu.main, []), (cli.main, ["run", "--device", "cuda"])])
def test_without_a_device_it_says_why(main, arguments, monkeypatch, capsys):
    # In this process, which has every library by now: another takes seconds to load them.
    if any(backend_status(name).ok for name, line in registry().items() if line.device == "cuda"):
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr("signal.signal", lambda *given: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    # What Python prints of one that ends with a text is that.
    text = " ".join(f"{capsys.readouterr().err} {ended.value.code}".split())
    assert "no backend computes on device 'cuda' here" in text
    assert " ".join(f"torch-cuda: {backend_status('torch-cuda').reason}".split()) in text


def test_backends_of_a_device():
    assert "numpy" in backends_on("cpu")
    assert "torch-cuda" not in backends_on("cpu")
    with pytest.raises(BackendUnavailableError, match="no backend computes on device 'tpu'"):
        backends_on("tpu")


def test_a_whole_run_on_a_pretended_device(tmp_path):
    # Of torch's backends, in processes that pretend from their start; its times are those of a CPU.
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (tmp_path / "sitecustomize.py").write_text("from tests.fake_torch_cuda import install\ninstall()\n")
    path, names = tmp_path / "run.jsonl", ("torch-cuda", *gpu.BASELINES)
    command = [sys.executable, "-m", "knnbench", "run", "--device", "cuda", "--backends", ",".join(names), "--metrics",
               "euclidean", "--dataset", "synthetic", "--dtype", "uint8", "--n-queries", "359", "--n-corpus", "1438",
               "--n-features", "64", "--time", "0.5", "--no-twins", "--output", str(path)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {record.backend: record for record in read_records(path)}
    assert records.keys() == set(names)
    phases = {"import", "prepare", "first_call", "call", "compute", "device", "copy_in", "copy_out"}
    for record in records.values():
        assert (record.status, record.reason) == ("ok", "")
        assert record.phases.keys() == {*phases, "from_pageable", "from_pinned"}
        assert len(record.phases["device"]) == len(record.phases["compute"]) == len(record.times_s)
    assert {record.run for record in records.values()} == {records["torch-cuda"].run}
    # What is shown of them, had all queries been measured in so short a time: the ratios of one run.
    records = {name: replace(record, measured_queries=record.n_queries) for name, record in records.items()}
    case = gpu.Case("knn", "euclidean", "synthetic", "uint8", 3, 359, 1438, 64)
    assert case.name == records["torch-cuda"].case
    line = gpu.Target(case, "device", ("cuda-gemm-int8", 1), of_product=0.7)
    (row,) = rows_of([line], list(records.values()))
    ratio = records["torch-cuda"].phase_s("device") / records["torch-mm-cuda"].phase_s("device")
    assert row["mm"] == f"{ratio:.3g}"
    assert row["met"] == ("yes" if ratio <= 0.7 else "no")
