"""What a search on a cluster will take: the plan's arithmetic, and its command."""

import json

import pytest
from typer.testing import CliRunner

from knnbench import InvalidInputError, UnsupportedError, scaling
from knnbench.cli import app
from knnbench.selection import Problem
from knnbench.selection.wisdom import Sample, backend_version, forget, wisdom

SHAPE = {"n_queries": 20_000, "n_corpus": 10**7, "n_features": 64, "k": 10, "backend": "numba"}


def plan(**options):
    return scaling.plan(**(SHAPE | options))


SIZES = [(q, c, f) for q in (100, 1000, 10_000) for c in (1000, 10**6) for f in (16, 64, 256)]


def measured(seconds, sizes=SIZES):
    """Keep measurements of searches that take so many seconds for a feature of a pair."""
    problems = [Problem("knn", *size, 10, "cityblock", "float32") for size in sizes]
    wisdom().add([Sample("numba", backend_version("numba"), p, {"call": seconds * p.work}) for p in problems], fit=True)


@pytest.fixture
def known_costs(monkeypatch, tmp_path):
    """Measurements of a machine on which a feature of a pair takes a nanosecond."""
    monkeypatch.setenv("KNNBENCH_WISDOM", str(tmp_path))
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    forget()
    measured(1e-9)
    yield
    forget()


def test_searching_takes_what_the_cost_model_says(known_costs):
    work = SHAPE["n_queries"] * SHAPE["n_corpus"] * SHAPE["n_features"]
    for workers, threads in ((1, 1), (4, 1), (4, 8)):
        found = plan(metric="cityblock", workers=workers, threads=threads)
        assert found.compute_s == pytest.approx(1e-9 * work / (workers * threads), rel=0.25)
        low, high = found.interval()
        assert low < found.seconds < high
        assert found.source == "18 measurements here, 18 of its backend"


def test_threads_of_the_measurements_are_counted(known_costs, monkeypatch, tmp_path_factory):
    one = plan(metric="cityblock").compute_s
    monkeypatch.setenv("KNNBENCH_THREADS", "4")
    monkeypatch.setenv("KNNBENCH_WISDOM", str(tmp_path_factory.mktemp("other")))  # without searches of one thread
    measured(1e-9)
    assert plan(metric="cityblock").compute_s == pytest.approx(4 * one)


@pytest.mark.parametrize(("alone", "times"), [(1.1e-9, (1.1, 2.1, 4)), (4e-9, (4, 4, 4)), (9e-9, (4, 4, 4))])
def test_a_thread_is_faster_where_others_are_idle(known_costs, monkeypatch, alone, times):
    monkeypatch.setenv("KNNBENCH_THREADS", "4")
    measured(1e-9)
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    measured(alone)
    measured(1e-9, [(1, rows, 16) for rows in range(100, 140)])  # which no threads share
    monkeypatch.setenv("KNNBENCH_THREADS", "4")
    work = SHAPE["n_queries"] * SHAPE["n_corpus"] * SHAPE["n_features"]
    for busy, factor in zip((1, 2, 4), times, strict=True):
        found = plan(metric="cityblock", threads=busy)
        assert found.compute_s == pytest.approx(factor * 1e-9 * work / busy, rel=0.05)
        assert plan(metric="cityblock", workers=busy).compute_s == pytest.approx(found.compute_s)
    most = plan(metric="cityblock", workers=40)
    assert most.compute_s == pytest.approx(4e-9 * work / 40, rel=0.05)


def test_the_bytes_add_up():
    found = plan(workers=4, shard_rows=100_000)
    assert (found.n_shards, found.shard_rows) == (100, 100_000)
    queries, lists = 20_000 * 64 * 4, 100 * 20_000 * 10 * 12
    assert found.moved_bytes == 4 * queries + lists * 3 // 4 + 20_000 * 10 * 12
    assert found.corpus_bytes == 10**7 * 64 * 4 // 4
    assert found.worker_bytes > found.corpus_bytes + queries
    assert plan(workers=1, shard_rows=100_000).moved_bytes == queries + 20_000 * 10 * 12
    slow = plan(workers=4, shard_rows=100_000, network_rate=1e6)
    assert slow.transfer_s == pytest.approx(found.transfer_s * 1250)


@pytest.mark.parametrize("workers", [1, 3, 64])
@pytest.mark.parametrize("n_corpus", [5, 10**5, 10**9])
def test_shards_cover_the_corpus_and_are_no_larger_than_allowed(workers, n_corpus):
    found = plan(workers=workers, n_corpus=n_corpus, k=5)
    assert (found.n_shards - 1) * found.shard_rows < n_corpus <= found.n_shards * found.shard_rows
    assert found.shard_bytes <= scaling.SHARD_BYTES
    given = plan(workers=workers, n_corpus=n_corpus, k=5, shard_rows=found.shard_rows)
    assert given == found


def test_a_search_that_takes_little_is_cut_into_few_tasks(known_costs):
    short, long = (plan(metric="cityblock", n_queries=n, n_corpus=10**5, workers=2) for n in (50, 20_000))
    assert short.n_shards < 8 <= long.n_shards
    assert short.search_s == pytest.approx(short.compute_s + scaling.JOB_SECONDS, rel=0.1)
    assert short.n_tasks == short.n_shards + 1
    assert short.seconds == pytest.approx(short.search_s + short.start_s)


def test_more_workers_take_less_time_and_less_memory():
    plans = [plan(workers=workers) for workers in (1, 2, 4, 8)]
    assert sorted(plans, key=lambda found: -found.seconds) == plans
    assert sorted(plans, key=lambda found: -found.worker_bytes) == plans


def test_a_plan_reads_well():
    text = str(plan(workers=64, n_corpus=10**9))
    for part in ("knn euclidean float32, 20,000 x 1,000,000,000 x 64, k=10, on 64 workers", "GB", "rechunk((", "numba"):
        assert part in text
    assert max(map(len, text.splitlines())) < 240


def test_auto_names_a_backend():
    assert plan(backend="auto").backend in ("numba", "numpy", "torch")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_corpus": 0}, "n_corpus is 0"),
        ({"n_queries": 1.5}, "n_queries is 1.5"),
        ({"workers": 0}, "workers is 0"),
        ({"k": 10**8}, "exceeds n_corpus"),
        ({"network_rate": 0}, "network_rate is 0"),
        ({"metric": "near"}, "metric 'near'"),
        ({"dtype": "complex64"}, "complex64"),
        ({"shard_rows": 0}, "shard_rows is 0"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(InvalidInputError, match=text):
        plan(**options)


def test_a_backend_that_nobody_measured():
    with pytest.raises(UnsupportedError, match="never been measured"):
        plan(backend="cupy")


def test_the_command():
    run = CliRunner().invoke(
        app,
        ["plan", "--n-corpus", "1e9", "--n-features", "128", "--n-queries", "1e5", "--workers", "64", "--json"],
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert found["problem"]["n_corpus"] == 10**9
    assert found["low_s"] < found["seconds"] < found["high_s"]
    assert found["workers"] == 64
    told = CliRunner().invoke(app, ["plan", "--n-corpus", "60_000", "--n-features", "7", "--n-queries", "9"])
    assert "9 x 60,000 x 7" in told.output
    assert (
        CliRunner().invoke(app, ["plan", "--n-corpus", "2.5", "--n-features", "7", "--n-queries", "9"]).exit_code == 2
    )


def test_the_network_of_a_cluster_is_measured():
    pytest.importorskip("distributed", reason="distributed is not installed; pip install 'knnbench[distributed]'")
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert 1e6 < scaling.network_rate(client) < 1e13


def test_durations_and_sizes():
    assert [scaling._duration(s) for s in (1e-6, 0.05, 5.04, 90, 6000, 90_000)] == [
        "0.001 ms", "50 ms", "5 s", "90 s", "100 min", "25.0 h",
    ]  # fmt: skip
    assert [scaling._size(n) for n in (0, 999, 1e6, 1.5e12)] == ["0 B", "999 B", "1 MB", "1.5 TB"]
