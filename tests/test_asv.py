"""The asv benchmarks: they time right answers, cover the registry, and tell absent from broken. The export to asv."""

import ast
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import knnbench
from knnbench.backends import backend_status, registry
from knnbench.backends.linear import ChunkedLoss
from knnbench.backends.numpy import NumpyBackend
from knnbench.dtypes import COMPUTED
from knnbench.errors import BackendUnavailableError, InvalidInputError
from knnbench.report.asv import PARAMETERS, UNIT, export, machine_name
from knnbench.results import Record
from knnbench.selection.choice import Effort
from knnbench.threads import POOL_VARIABLES, pinned_environment

from .conftest import available

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_"))
KINDS = ("time_", "track_", "peakmem_")

CONF = json.loads(re.sub(r"^\s*//.*$", "", (ROOT / "asv.conf.json").read_text(encoding="utf-8"), flags=re.MULTILINE))


def load_benchmarks():
    """Import the suite as asv does, as the package ``benchmarks``."""
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # The suite pins the threads of its process, which must not become those of all other tests.
        for variable, threads in pinned_environment(1).items():
            patch.setenv(variable, threads)
        spec.loader.exec_module(package)
        return {name: importlib.import_module(f"benchmarks.{name}") for name in MODULES}


SUITE = load_benchmarks()
common = SUITE["common"]
CLASSES = [
    value
    for module in SUITE.values()
    for value in vars(module).values()
    if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "params")
]
METHODS = [(kind, name) for kind in CLASSES for name in dir(kind) if name.startswith(KINDS)]
CELLS = [
    pytest.param(kind, name, values, id=f"{kind.__name__}.{name}({','.join(values)})")
    for kind, name in METHODS
    for values in itertools.product(*kind.params)
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shrink the workloads, and forget earlier searches."""
    small = {name: common.Workload(5, 40, 6, workload.k) for name, workload in common.WORKLOADS.items()}
    monkeypatch.setattr(common, "WORKLOADS", small)
    monkeypatch.setattr(SUITE["choosing"], "N_PROBLEMS", 2)
    monkeypatch.setattr(SUITE["choosing"], "WORK", 1e6)
    monkeypatch.delenv("KNNBENCH_REQUIRE", raising=False)
    forget()
    yield
    forget()


def forget():
    for module in SUITE.values():
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()


def naive_distances(queries, corpus, metric):
    step = {"euclidean": lambda a, b: (a - b) ** 2, "cityblock": lambda a, b: abs(a - b)}[metric]
    finish = {"euclidean": math.sqrt, "cityblock": float}[metric]
    return np.array(
        [
            [finish(sum(step(float(a), float(b)) for a, b in zip(query, row, strict=True))) for row in corpus]
            for query in queries
        ]
    )


def naive_neighbors(queries, corpus, metric, k):
    distances = naive_distances(queries, corpus, metric)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


def check_time_knn(bench, answer, backend, metric, dtype, workload):
    data = bench.search.data
    distances, order = naive_neighbors(data.queries, data.corpus, metric, data.k)
    np.testing.assert_allclose(answer[0], distances, rtol=1e-4)
    np.testing.assert_array_equal(
        np.sort(naive_distances(data.queries, data.corpus, metric)[np.arange(5)[:, None], answer[1]], axis=1), distances
    )
    assert {str(data.queries.dtype), str(data.corpus.dtype)} == {dtype}
    assert order.shape == answer[1].shape


def check_time_pairwise(bench, answer, backend, metric, dtype, workload):
    data = bench.search.data
    np.testing.assert_allclose(answer, naive_distances(data.queries, data.corpus, metric), rtol=1e-4)


def check_time_predict(bench, answer, backend, workload):
    data = common.problem(common.WORKLOADS[workload], "float32")
    order = naive_neighbors(bench.queries, data.corpus, "euclidean", data.k)[1]
    votes = [np.bincount(data.labels[row]).argmax() for row in order]
    assert answer.tolist() == votes


def check_time_fit(bench, answer, backend, workload):
    scores = [
        [float(x @ w) + b for w, b in zip(answer.coef_, answer.intercept_, strict=True)] for x in bench.data.corpus
    ]
    losses = [
        math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(scores, bench.data.labels, strict=True)
    ]
    assert answer.best_loss_ == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert answer.backend == backend


def check_track_knn_seconds_per_1e9(bench, answer, backend, workload):
    # 5 x 40 x 6 features of pairs, in between a nanosecond and ten seconds.
    assert 1e-9 < answer * 1200 / 1e9 < 10


def check_track_error(bench, answer, backend, dataset):
    assert 0 <= answer < (1e-5 if dataset == "near" else 1)


def check_track_device_bytes(bench, answer, backend, workload):
    assert answer >= 0


def check_track_regret(bench, answer, effort):
    assert 0.5 < answer < 100


def check_peakmem_baseline(bench, answer, backend, workload):
    assert answer is None


def check_peakmem_knn(bench, answer, backend, workload):
    data = bench.search.data
    np.testing.assert_allclose(answer[0], naive_neighbors(data.queries, data.corpus, "euclidean", data.k)[0], rtol=1e-4)


@pytest.mark.parametrize(("kind", "name", "values"), CELLS)
def test_a_benchmark_runs_and_its_answer_is_right_or_it_is_skipped_with_the_reason(kind, name, values):
    bench, of_backend = kind(), kind.param_names[0] == "backend"
    status = backend_status(values[0]) if of_backend else None
    if status is not None and not status.ok:
        # A failure of a backend that this run promises is for the tests of backends to report.
        with pytest.raises(NotImplementedError, match=re.escape(status.reason)):
            bench.setup(*values)
        return
    given = dict(zip(kind.param_names, values, strict=True))
    if status is not None and given.get("metric", "euclidean") not in status.capabilities.metrics:
        with pytest.raises(NotImplementedError, match="lacks metric"):
            bench.setup(*values)
        return
    bench.setup(*values)
    bench.setup(*values)  # as asv does before every sample
    answer = getattr(bench, name)(*values)
    globals()[f"check_{name}"](bench, answer, *values)
    getattr(bench, "teardown", lambda *_: None)(*values)


def test_every_kind_of_benchmark_is_there():
    assert {name for _, name in METHODS} == {name[len("check_") :] for name in globals() if name.startswith("check_")}
    assert len(CELLS) < 200
    assert len({cell.id for cell in CELLS}) == len(CELLS)


def test_setup_prepares_once():
    bench = SUITE["search"].Knn()
    values = "numpy", "euclidean", "float32", "images"
    bench.setup(*values)
    first = bench.search
    bench.setup(*values)
    assert bench.search is first


# --- the literals ------------------------------------------------------------------------------------------


def test_the_lists_of_backends_are_those_of_the_registry():
    ours = {name: line for name, line in registry().items() if line.target.startswith("knnbench.")}
    assert sorted(common.BACKENDS + common.LOOPING_BACKENDS) == sorted(ours)
    assert [name for name, line in ours.items() if line.device == "cuda"] == common.CUDA_BACKENDS


def test_the_lists_are_written_out():
    tree = ast.parse((ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8"))
    literals = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List)
    }
    assert literals.keys() == {"BACKENDS", "LOOPING_BACKENDS", "CUDA_BACKENDS", "METRICS", "DTYPES"}
    for name, values in literals.items():
        assert getattr(common, name) == values


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_parameters_are_known(kind):
    known = {
        "backend": set(registry()),
        "metric": set(knnbench.METRICS),
        "dtype": set(COMPUTED),
        "workload": set(common.WORKLOADS),
        "dataset": set(SUITE["accuracy"].DATASETS),
        "effort": set(get_args(Effort)),
    }
    assert len(kind.params) == len(kind.param_names)
    for name, values in zip(kind.param_names, kind.params, strict=True):
        assert set(values) <= known[name]
        assert all(isinstance(value, str) for value in values)


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_a_benchmark_has_a_version_a_timeout_and_samples_enough(kind, name):
    assert isinstance(kind.version, str)
    assert kind.timeout >= 60
    if name.startswith("time_"):
        least, most, seconds = kind.repeat
        # Processes differ by more than calls do.
        assert kind.rounds >= 5
        assert 2 <= least <= most
        # 6 samples a side are asv's blind spot.
        assert kind.rounds * least >= 10
        assert seconds < kind.timeout / 10
        # What asv_runner 0.3 makes of 0 where there is a setup; so that both series are one.
        assert kind.number == 1
    if name.startswith("track_"):
        assert kind.unit


def test_the_releases_are_pinned():
    requirements = CONF["matrix"]["req"]
    assert "pip+asv_runner" in requirements
    for name, versions in requirements.items():
        assert len(versions) == 1, name
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", versions[0]), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert f"torch=={requirements['pip+torch'][0]}" in extras["test"]
    assert f"faiss-cpu=={requirements['pip+faiss-cpu'][0]}" in extras["test"]


def test_the_configuration_fits_the_repository():
    assert CONF["launch_method"] == "spawn"
    assert CONF["environment_type"] == "virtualenv"
    assert CONF["branches"] == ["main"]
    assert CONF["default_benchmark_timeout"] >= 60
    assert (ROOT / CONF["benchmark_dir"] / "__init__.py").exists()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for key in ("env_dir", "results_dir", "html_dir"):
        assert f"/{Path(CONF[key]).parts[0]}/" in ignored


@pytest.mark.parametrize(
    ("runner", "given", "expected"),
    [("asv_runner", "", "1"), ("asv_runner", "3", "3"), ("json", "", "None"), ("json", "3", "3")],
)
def test_threads_are_pinned_before_numpy_is_loaded(runner, given, expected, monkeypatch):
    assert sys.modules["benchmarks"].POOLS == POOL_VARIABLES
    script = (
        f"import os, sys; sys.modules.setdefault({runner!r}, sys); import benchmarks; "
        "assert 'numpy' not in sys.modules; "
        "print(*{os.environ.get(name) for name in (*benchmarks.POOLS, 'KNNBENCH_THREADS')})"
    )
    for name in (*POOL_VARIABLES, "KNNBENCH_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("KNNBENCH_THREADS", given)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


# --- what is wrong fails, what is absent does not ----------------------------------------------------------


def spoiled(change):
    def knn(self, queries, prepared, k, space, budget, original=NumpyBackend.knn):
        values, indices = original(self, queries, prepared, k, space, budget)
        # The probe of the status has two rows.
        return (values, indices) if len(queries) == 2 else change(values.copy(), indices.copy())

    return knn


def far_away(values, indices):
    return values, (indices + 20) % 40


def repeated(values, indices):
    return values, np.repeat(indices[:, :1], indices.shape[1], axis=1)


def not_a_number(values, indices):
    values[2, 0] = np.nan
    return values, indices


WRONG = {
    "distances": lambda values, indices: (values * 1.1, indices),
    "neighbours": far_away,
    "repeated": repeated,
    "outside": lambda values, indices: (values, indices + 1000),
    "NaN": not_a_number,
    "shape": lambda values, indices: (values[:, :-1], indices[:, :-1]),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_neighbours_fail(change, monkeypatch):
    monkeypatch.setattr(NumpyBackend, "knn", spoiled(change))
    with pytest.raises(common.WrongAnswerError):
        SUITE["search"].Knn().setup("numpy", "euclidean", "float32", "images")
    with pytest.raises(common.WrongAnswerError):
        SUITE["search"].Shapes().setup("numpy", "narrow")
    bench = SUITE["memory"].PeakMemory()
    bench.setup("numpy", "tall")
    bench.peakmem_knn("numpy", "tall")
    with pytest.raises(common.WrongAnswerError):
        bench.teardown("numpy", "tall")


def test_wrong_distances_fail(monkeypatch):
    original = NumpyBackend.pairwise
    monkeypatch.setattr(NumpyBackend, "pairwise", lambda self, *args: original(self, *args) * 1.01)
    with pytest.raises(common.WrongAnswerError):
        SUITE["search"].Pairwise().setup("numpy", "euclidean", "float32", "square")
    bench = SUITE["accuracy"].Accuracy()
    bench.setup("numpy", "near")
    with pytest.raises(common.WrongAnswerError):
        bench.track_error("numpy", "near")
    bench.setup("numpy", "far")
    assert bench.track_error("numpy", "far") == pytest.approx(0.01, rel=1e-3)


def test_wrong_labels_and_losses_fail(monkeypatch):
    classifiers = SUITE["classifiers"]
    predict = knnbench.KNNClassifier.predict
    monkeypatch.setattr(knnbench.KNNClassifier, "predict", lambda self, X: predict(self, X)[::-1])
    with pytest.raises(common.WrongAnswerError):
        classifiers.Predict().setup("numpy", "images")
    losses = ChunkedLoss.__call__
    monkeypatch.setattr(ChunkedLoss, "__call__", lambda self, W, b, limit: losses(self, W, b) * 1.01)
    with pytest.raises(common.WrongAnswerError):
        classifiers.RandomSearch().setup("numpy", "images")


def test_a_backend_whose_probe_is_wrong_fails_and_is_not_absent(monkeypatch):
    original = NumpyBackend.knn
    monkeypatch.setattr(NumpyBackend, "knn", lambda *args: original(*args)[::-1])
    backend_status.cache_clear()
    try:
        with pytest.raises(common.WrongAnswerError, match="2 x 2"):
            SUITE["search"].Knn().setup("numpy", "euclidean", "float32", "images")
    finally:
        backend_status.cache_clear()


def test_what_a_commit_lacks_is_skipped_with_the_reason(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"nonesuch.*unknown"):
        SUITE["search"].Knn().setup("nonesuch", "euclidean", "float32", "images")
    available("notebook")
    with pytest.raises(NotImplementedError, match=r"notebook.*chebyshev"):
        SUITE["search"].Knn().setup("notebook", "chebyshev", "float32", "tiny")
    monkeypatch.setattr(knnbench, "__all__", ["knn"])
    with pytest.raises(NotImplementedError, match="this commit has no KNNClassifier"):
        SUITE["classifiers"].Predict().setup("numpy", "images")


def test_a_promised_backend_may_not_be_absent(monkeypatch):
    absent = next((name for name in common.CUDA_BACKENDS if not backend_status(name).ok), None)
    if absent is None:
        pytest.skip("every CUDA backend works here")
    monkeypatch.setenv("KNNBENCH_REQUIRE", f"numpy,{absent}")
    with pytest.raises(BackendUnavailableError):
        SUITE["search"].Knn().setup(absent, "euclidean", "float32", "images")


def test_the_peak_of_the_device_is_the_most_seen_beyond_the_first(monkeypatch):
    used = iter([100, 90, 400, 250])
    last = []

    def tell(device, memory):
        memory._obj.used = last[0] if last else next(used)
        if memory._obj.used == 250:
            last[:] = [250]

    def count(number):
        number._obj.value = 1

    nvml = types.SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetCount_v2=count,
        nvmlDeviceGetHandleByIndex_v2=lambda index, device: 0,
        nvmlDeviceGetMemoryInfo=tell,
    )
    memory = SUITE["memory"]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: nvml)
    with memory.DevicePeak() as peak:
        while not last:
            pass
    assert peak.bytes == 300


def test_a_driver_that_tells_nothing_is_a_skip(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(SUITE["memory"].ctypes, "CDLL", absent)
    with pytest.raises(NotImplementedError, match="libnvidia-ml"):
        SUITE["memory"].DevicePeak()


# --- the export --------------------------------------------------------------------------------------------

MACHINE = {
    "cpu": "Some CPU @ 2.0GHz",
    "cpus": 4,
    "memory_bytes": 2**34,
    "os": "Linux",
    "arch": "x86_64",
    "python": "3.11.7",
    "gpus": [],
}
NAME = "Some-CPU-2.0GHz-4cpus"


def git(repository, *command):
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", repository, *settings, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with two commits."""
    path = tmp_path_factory.mktemp("repository")
    git(path, "init", "--quiet", "--initial-branch=main")
    for subject in ("first", "second"):
        git(path, "commit", "--quiet", "--allow-empty", "-m", subject)
    return path


@pytest.fixture
def commit(repository):
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def record(commit):
    return Record(
        op="knn",
        backend="numba",
        metric="cityblock",
        dataset="synthetic",
        dtype="float32",
        k=3,
        n_queries=1000,
        n_corpus=10_000,
        n_features=100,
        status="ok",
        measured_queries=10,
        measured_corpus=10_000,
        phases={"prepare": [0.5], "call": [0.01 * i for i in range(1, 12)]},
        threads=2,
        commit=commit[:12],
        run="a",
        started="2026-01-02T03:04:05+00:00",
        machine=MACHINE,
    )


def results_of(directory, name="runner.time_knn"):
    """Return the cells of a benchmark in the only result file."""
    (path,) = directory.glob("*/*-runner-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    row = dict(zip(data["result_columns"], data["results"][name], strict=False))
    cells = list(itertools.product(*row["params"]))
    assert len(cells) == len(row["result"])
    return data, row, dict(zip(cells, range(len(cells)), strict=True))


def cell(backend="numba", shape="1000x10000x100", k=3, threads=2):
    return tuple(map(repr, (backend, "cityblock", "synthetic", "float32", shape, k, threads)))


def test_a_record_becomes_a_result_of_asv(record, repository, commit, tmp_path):
    paths, refused = export([record], tmp_path, repository=repository)
    assert not refused
    assert {str(path.relative_to(tmp_path)) for path in paths} == {
        "benchmarks.json",
        f"{NAME}/machine.json",
        f"{NAME}/{commit[:8]}-runner-py3.11.json",
    }
    data, row, cells = results_of(tmp_path)
    assert data["commit_hash"] == commit
    assert data["version"] == 2
    assert data["env_name"] == "runner-py3.11"
    assert data["date"] == 1000 * int(git(repository, "show", "-s", "--format=%at", "HEAD"))
    assert data["params"]["machine"] == NAME
    assert data["params"]["python"] == data["python"] == "3.11"
    assert list(cells) == [cell()]
    # 10 x 10,000 x 100 features of pairs in 0.06 s.
    assert row["result"] == [pytest.approx(6.0)]
    assert row["samples"][0] == pytest.approx(list(range(1, 12)))
    assert (row["stats_q_25"][0], row["stats_q_75"][0]) == pytest.approx((3.5, 8.5))
    # 11 samples: with i = 1, 2 * (1 + 11) / 2^11 = 1.2 % would be outside.
    assert (row["stats_ci_99_a"][0], row["stats_ci_99_b"][0]) == pytest.approx((1.0, 11.0))
    assert (row["stats_repeat"], row["stats_number"]) == ([11], [1])
    assert row["started_at"] == 1767323045000
    assert row["duration"] == pytest.approx(0.5 + 0.66)
    listing = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert listing["version"] == 2
    entry = listing["runner.time_knn"]
    assert entry["unit"] == UNIT
    assert entry["version"] == row["version"]
    assert entry["param_names"] == list(PARAMETERS)
    assert entry["params"] == row["params"]


def test_what_was_not_measured_is_nan(record, repository, tmp_path):
    export([record, replace(record, backend="numpy", k=5)], tmp_path, repository=repository)
    _, row, cells = results_of(tmp_path)
    assert len(cells) == 4
    measured = {cell(), cell("numpy", k=5)}
    for name, i in cells.items():
        assert math.isnan(row["result"][i]) == (name not in measured)
        assert (row["samples"][i] is None) == (name not in measured)


def test_values_of_a_parameter_come_in_the_order_of_their_numbers(record, repository, tmp_path):
    records = [replace(record, k=k, n_corpus=n) for k, n in ((10, 900), (3, 10_000))]
    export(records, tmp_path, repository=repository)
    _, row, _ = results_of(tmp_path)
    params = dict(zip(PARAMETERS, row["params"], strict=True))
    assert params["k"] == ["3", "10"]
    assert params["shape"] == ["'1000x900x100'", "'1000x10000x100'"]


def test_samples_of_several_records_of_a_cell_are_pooled(record, repository, tmp_path):
    later = replace(record, phases={"call": [1.0]}, run="b", started="2026-01-03T00:00:00+00:00")
    export([later, record], tmp_path, repository=repository)
    _, row, _ = results_of(tmp_path)
    assert row["samples"][0] == pytest.approx([*range(1, 12), 100])


def test_few_samples_have_no_interval(record, repository, tmp_path):
    export([replace(record, phases={"call": [0.01, 0.02]})], tmp_path, repository=repository)
    _, row, _ = results_of(tmp_path)
    assert (row["stats_ci_99_a"], row["stats_ci_99_b"]) == ([-math.inf], [math.inf])
    export([replace(record, phases={"call": [0.01]})], tmp_path, repository=repository)
    _, row, _ = results_of(tmp_path)
    assert row["result"] == row["stats_q_25"] == row["stats_q_75"] == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    "change",
    [{"status": "wrong"}, {"complete": False}, {"twin": True}, {"phases": {}}],
    ids=["wrong", "incomplete", "twin", "untimed"],
)
def test_only_finished_right_answers_are_exported(change, record, repository, tmp_path):
    assert export([replace(record, **change)], tmp_path, repository=repository) == ([], [])
    assert not list(tmp_path.iterdir())


def test_records_of_no_commit_are_refused_and_the_others_go_on(record, repository, tmp_path):
    paths, refused = export(
        [replace(record, dirty=True), replace(record, backend="torch", commit=""), record],
        tmp_path,
        repository=repository,
    )
    assert len(paths) == 3
    case = "knn/cityblock/synthetic/float32/1000x10000x100/k3"
    assert refused == [
        (f"numba on {case}", f"its sources differed from commit {record.commit}"),
        (f"torch on {case}", "its sources were not in a git checkout, so no commit is known"),
    ]


@pytest.mark.parametrize("name", ["0123456789ab", "HEAD", "--all", "main"])
def test_an_unknown_commit_is_an_error(name, record, repository, tmp_path):
    with pytest.raises(InvalidInputError, match=r"cannot be found in .*expected a clone"):
        export([replace(record, commit=name)], tmp_path / "results", repository=repository)
    assert not list(tmp_path.iterdir())


def test_exporting_again_changes_nothing(record, repository, tmp_path):
    records = [record, replace(record, backend="numpy", k=None, op="pairwise")]
    paths, _ = export(records, tmp_path, repository=repository)
    before = {path: path.read_bytes() for path in paths}
    assert export(records, tmp_path, repository=repository).paths == paths
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == paths


def test_other_results_stay(record, repository, commit, tmp_path):
    export([record], tmp_path, repository=repository)
    (path,) = tmp_path.glob("*/*-runner-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["results"]["other"] = [[1.0], [], "v"]
    path.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "benchmarks.json").write_text('{"search.Knn.time_knn": {"name": "x"}, "version": 2}', encoding="utf-8")
    export([replace(record, backend="numpy", n_corpus=20_000)], tmp_path, repository=repository)
    data, row, cells = results_of(tmp_path)
    assert data["results"]["other"] == [[1.0], [], "v"]
    assert row["result"][cells[cell()]] == pytest.approx(6.0)
    assert row["samples"][cells[cell()]] == pytest.approx(list(range(1, 12)))
    assert row["result"][cells[cell("numpy", "1000x20000x100")]] == pytest.approx(6.0)
    listing = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert listing.keys() == {"search.Knn.time_knn", "runner.time_knn", "version"}


def test_the_listing_covers_earlier_exports_that_asv_run_has_dropped_from_it(record, repository, tmp_path):
    first = git(repository, "rev-parse", "--short=12", "HEAD^")
    export([replace(record, commit=first)], tmp_path, repository=repository)
    (tmp_path / "benchmarks.json").write_text('{"version": 2}', encoding="utf-8")
    export([replace(record, backend="numpy")], tmp_path, repository=repository)
    listing = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert sorted(listing["runner.time_knn"]["params"][0]) == ["'numba'", "'numpy'"]


def test_results_of_another_version_are_replaced(record, repository, tmp_path):
    export([record], tmp_path, repository=repository)
    (path,) = tmp_path.glob("*/*-runner-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["results"]["runner.time_knn"][data["result_columns"].index("version")] = "0"
    path.write_text(json.dumps(data), encoding="utf-8")
    export([replace(record, backend="numpy")], tmp_path, repository=repository)
    assert list(results_of(tmp_path)[2]) == [cell("numpy")]


def test_what_asv_knows_of_a_machine_stays(record, repository, tmp_path):
    facts = {"machine": "box", "os": "o", "arch": "a", "cpu": "c", "num_cpu": "1", "ram": "2", "version": 1}
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "machine.json").write_text(json.dumps(facts), encoding="utf-8")
    export([record], tmp_path, "box", repository=repository)
    assert json.loads((tmp_path / "box" / "machine.json").read_text(encoding="utf-8")) == facts
    data, _, _ = results_of(tmp_path)
    assert data["params"] == {**{key: facts[key] for key in facts if key != "version"}, "python": "3.11"}


def test_machines_are_kept_apart(record, repository, tmp_path):
    other = replace(record, machine={**MACHINE, "gpus": [{"name": "GPU X"}, {"name": "GPU X"}]})
    export([record, other], tmp_path, repository=repository)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f"{NAME}-2xGPU-X", "benchmarks.json"}
    with pytest.raises(InvalidInputError, match=r"of 2 machines.*2xGPU-X"):
        export([record, other], tmp_path, "box", repository=repository)
    assert machine_name({}) == "unknown-0cpus"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_a_machine_name_must_be_fit_for_a_directory(name, record, repository, tmp_path):
    with pytest.raises(InvalidInputError, match="can be a directory"):
        export([record], tmp_path, name, repository=repository)


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"version": 1}'])
def test_files_that_are_not_asv_s_are_not_overwritten(text, record, repository, tmp_path):
    (tmp_path / "benchmarks.json").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"benchmarks\.json"):
        export([record], tmp_path, repository=repository)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks.json"]
    assert (tmp_path / "benchmarks.json").read_text(encoding="utf-8") == text


def test_two_commits_with_the_same_eight_digits_are_not_mixed(record, repository, tmp_path):
    export([record], tmp_path, repository=repository)
    (path,) = tmp_path.glob("*/*-runner-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "commit_hash": "f" * 40}), encoding="utf-8")
    with pytest.raises(InvalidInputError, match="eight digits"):
        export([record], tmp_path, repository=repository)


def test_asv_reads_what_was_exported(record, repository, commit, tmp_path):
    asv_results = pytest.importorskip("asv.results", reason="asv is not installed: pip install 'knnbench[bench]'")
    from asv.benchmarks import Benchmarks

    export([record, replace(record, backend="numpy", k=5)], tmp_path, repository=repository)
    (loaded,) = asv_results.iter_results(str(tmp_path))
    conf = types.SimpleNamespace(results_dir=str(tmp_path), benchmark_dir="benchmarks")
    benchmarks = Benchmarks.load(conf)
    assert loaded.commit_hash == commit
    assert loaded.get_result_keys(benchmarks) == {"runner.time_knn"}
    params = benchmarks["runner.time_knn"]["params"]
    values = dict(zip(itertools.product(*params), loaded.get_result_value("runner.time_knn", params), strict=True))
    assert values[cell()] == pytest.approx(6.0)
    assert math.isnan(values[cell("numpy")])
    stats = loaded.get_result_stats("runner.time_knn", params)
    assert stats[0]["repeat"] == 11
