"""Dask: the answer of one machine, to the bit, whatever the chunks, the workers and what happens to them."""

import functools
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from knnbench import METRICS, BackendUnavailableError, InvalidInputError, KNNClassifier, UnsupportedError, knn
from knnbench.backends import get_backend, registry
from knnbench.backends.numba import NumbaBackend
from knnbench.blocking import slices
from knnbench.settings import setting

from ._checks import assert_identical
from .conftest import REQUIRED

if "dask" not in REQUIRED:
    pytest.importorskip("dask.array", reason="dask is not installed; pip install 'knnbench[distributed]'")
    pytest.importorskip("distributed", reason="distributed is not installed; pip install 'knnbench[distributed]'")

import dask
import dask.array as da
from dask.callbacks import Callback

from knnbench import distributed

N_QUERIES, N_CORPUS, N_FEATURES, K = 31, 700, 10, 6
SEVEN = (1, 200, 49, 150, 250, 2, 48)


def make(rng, dtype, n_corpus=N_CORPUS):
    queries, corpus = (rng.integers(0, 5, (n, N_FEATURES)).astype(dtype) for n in (N_QUERIES, n_corpus))
    queries[:, 0] = corpus[:, 0] = 1
    return queries, corpus


def assert_same(answer, expected):
    assert_identical(np.asarray(answer.distances), expected.distances)
    assert_identical(np.asarray(answer.indices), expected.indices)


# Otherwise a cluster leaves variables in this process that hold OpenBLAS at one thread from the next fork on.
SETTINGS = {"distributed.worker.daemon": True, "distributed.nanny.pre-spawn-environ": {}}


@pytest.fixture(scope="module")
def client():
    """Two processes of one thread, for all tests here."""
    with (
        dask.config.set(SETTINGS),
        dask_distributed().LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=None,
            silence_logs=50,  # of those that are killed
        ) as cluster,
        dask_distributed().Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def dask_distributed():
    import distributed as package

    return package


# ---- in this process


@pytest.mark.parametrize("chunks", [N_CORPUS, SEVEN, 100])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_chunks_change_no_bit(dtype, metric, chunks, rng):
    queries, corpus = make(rng, dtype)
    # One backend: "auto" may take another for a chunk than for the whole.
    expected = knn(queries, corpus, K, metric, backend="numba")
    shards = da.from_array(corpus, chunks=(chunks, 4))
    answer = distributed.knn(queries, shards, K, metric, backend="numba")
    assert_same(answer, expected)
    blocks = da.from_array(queries, chunks=(7, 3))
    lazy = distributed.knn(blocks, shards, K, metric, backend="numba", compute=False)
    assert isinstance(lazy.distances, da.Array)
    assert lazy.distances.shape == lazy.indices.shape == (N_QUERIES, K)
    assert (lazy.distances.dtype, lazy.indices.dtype) == (expected.distances.dtype, np.int64)
    assert_same(lazy, expected)


@pytest.mark.parametrize("chunks", [N_CORPUS, SEVEN])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_neighbours_of_floats(dtype, metric, chunks, rng):
    queries, corpus = (rows / np.dtype(dtype).type(7) for rows in make(rng, dtype))
    expected = knn(queries, corpus, K, metric, backend="numpy", accuracy="exact")
    shards = da.from_array(corpus, chunks=(chunks, 4))
    for backend in ("auto", "numba"):
        answer = distributed.knn(queries, shards, K, metric, backend=backend, accuracy="exact")
        assert_same(answer, expected)
    lazy = distributed.knn(da.from_array(queries, chunks=(7, 3)), shards, K, metric, accuracy="exact", compute=False)
    assert_same(lazy, expected)


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_schedulers(scheduler, backend, rng):
    queries, corpus = make(rng, "uint8")
    with dask.config.set(scheduler=scheduler):
        answer = distributed.knn(queries, da.from_array(corpus, chunks=(SEVEN, -1)), K, backend=backend)
    assert answer.backend == backend
    assert_same(answer, knn(queries, corpus, K))


def test_chunks_that_are_empty_or_smaller_than_k(rng):
    queries, corpus = make(rng, "uint8")
    shards = da.from_array(corpus, chunks=((0, 1, 2, 0, 697), -1))
    assert_same(distributed.knn(queries, shards, K), knn(queries, corpus, K))
    assert_same(distributed.knn(queries[:2], shards[:3], 3), knn(queries[:2], corpus[:3], 3))
    answer = distributed.knn(queries.astype(np.float32), shards.astype(np.float32), K, accuracy="exact")
    assert_same(answer, knn(queries.astype(np.float32), corpus.astype(np.float32), K, accuracy="exact"))


def test_queries_of_another_dtype(rng):
    queries, corpus = make(rng, "uint8")
    answer = distributed.knn(queries.astype(np.float32), da.from_array(corpus, chunks=(SEVEN, -1)), K, backend="numba")
    assert_same(answer, knn(queries.astype(np.float32), corpus, K, backend="numba"))


@pytest.mark.parametrize("compute", [True, False])
def test_steps_of_a_chunk_are_one_task(compute, rng):
    queries, corpus = make(rng, "uint8")
    shards, blocks = (
        da.from_array(rows, chunks=(size, -1)).map_blocks(np.negative).astype(np.float32) / 8
        for rows, size in ((corpus, 100), (queries, 16))
    )
    ran = []
    with Callback(pretask=lambda key, *rest: ran.append(key)), dask.config.set(scheduler="synchronous"):
        answer = distributed.knn(blocks, shards, K, backend="numpy", compute=compute)
        distances, indices = dask.compute(*answer)
    steps = [key for key in ran if len(key) > 1 and key[0].split("-")[0] in ("negative", "astype", "truediv")]
    if compute:
        assert len(steps) == len(set(steps)) == 7 + 2
        assert all(key[0].startswith("truediv") for key in steps)
    else:  # Dask's own
        assert not [key for key in steps if not key[0].startswith("truediv")]
    expected = knn(*((-rows).astype(np.float32) / 8 for rows in (queries, corpus)), K, backend="numpy")
    assert_identical(distances, expected.distances)
    assert_identical(indices, expected.indices)


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
@pytest.mark.parametrize("chunks", [SEVEN, 30])
def test_small_lists_are_finished_here(chunks, accuracy, rng, monkeypatch):
    monkeypatch.setattr(distributed, "QUERY_ROWS", 8)
    queries, corpus = make(rng, "float32")
    shards, ran = da.from_array(corpus, chunks=(chunks, -1)), []
    expected = knn(queries, corpus, K, backend="numpy", accuracy=accuracy)
    for room in (1 << 20, 0):
        monkeypatch.setattr(distributed, "FINISHED_BYTES", room)
        ran.clear()
        with Callback(pretask=lambda key, *rest: ran.append(str(key))), dask.config.set(scheduler="synchronous"):
            assert_same(distributed.knn(queries, shards, K, backend="numpy", accuracy=accuracy), expected)
        assert sum("knnbench-finish" in key for key in ran) == (0 if room else 4)


def test_many_blocks_of_queries(rng, monkeypatch):
    monkeypatch.setattr(distributed, "QUERY_ROWS", 8)
    queries, corpus = make(rng, "float32")
    answer = distributed.knn(queries, da.from_array(corpus, chunks=(SEVEN, -1)), K, backend="numba")
    assert_same(answer, knn(queries, corpus, K, backend="numba"))


def job_of(queries, corpus, backend="numpy", metric="euclidean", k=K, accuracy="fast"):
    shards = da.from_array(corpus, chunks=(SEVEN, -1))
    return distributed._job(
        da.from_array(queries), shards, k, metric, backend, accuracy, None, True, 1, distributed._Cluster(None)
    )


@pytest.mark.parametrize("seed", range(20))
def test_lost_repeated_and_reordered_tasks(seed, rng):
    queries, corpus = make(rng, "uint8" if seed % 2 else "float32")
    accuracy = "exact" if seed % 4 else "fast"
    job = pickle.loads(pickle.dumps(job_of(queries, corpus, accuracy=accuracy)))
    rows = np.random.default_rng(seed).permutation(list(slices(N_CORPUS, 60)))
    chosen = random.Random(seed)
    lists = []
    for part in rows:
        for _ in range(chosen.choice([1, 1, 2, 3])):  # a retry, or a task that ran twice
            lists += [job.search(queries, corpus[part], part, "chunk")]
    chosen.shuffle(lists)
    while len(lists) > 3:
        width = min(len(lists), chosen.randint(2, 5))
        lists = [job.merge(lists[:width]), *lists[width:]]
        chosen.shuffle(lists)
    distances, indices = job.finish(lists)
    expected = knn(queries, corpus, K, backend="numpy", accuracy=accuracy)
    assert_identical(distances, expected.distances)
    assert_identical(indices, expected.indices)


# ---- who computes must not matter


def test_a_float_job_pins_what_could_differ(rng):
    queries, corpus = make(rng, "float32")
    job = job_of(queries, corpus, "auto")
    assert job.backend in registry()
    assert job.settings["KNNBENCH_THREADS"] == "1"
    if job.backend == "numba":
        assert job.settings["KNNBENCH_SIMD"] == NumbaBackend().levels()[0]
    for rows, accuracy in ((np.uint8, "fast"), (np.float32, "exact")):
        exact = job_of(queries.astype(rows), corpus.astype(rows), "auto", accuracy=accuracy)
        assert exact.backend == "auto"
        assert "KNNBENCH_SIMD" not in exact.settings


def test_the_level_is_the_best_that_all_workers_have(rng, monkeypatch):
    queries, corpus = make(rng, "float32")
    workers = [("amx", "avx512", "avx2", "generic"), ("avx2", "generic"), ("avx512", "avx2", "generic")]
    monkeypatch.setattr(distributed._Cluster, "each", lambda self, function, *args: list(workers))
    assert job_of(queries, corpus, "numba").settings["KNNBENCH_SIMD"] == "avx2"
    workers.append(("generic",))
    assert job_of(queries, corpus, "numba").settings["KNNBENCH_SIMD"] == "generic"
    workers.append(("sve",))
    with pytest.raises(BackendUnavailableError, match="share no level"):
        job_of(queries, corpus, "numba")


def test_the_level_asked_for_here_is_that_of_the_job(rng, monkeypatch):
    monkeypatch.setenv("KNNBENCH_SIMD", "generic")
    assert job_of(*make(rng, "float32"), "numba").settings["KNNBENCH_SIMD"] == "generic"


def test_tasks_hold_the_settings(rng, monkeypatch):
    queries, corpus = make(rng, "float32")
    seen = []
    search = type(get_backend("numpy")).knn

    def spy(self, *args):
        seen.append(setting("KNNBENCH_THREADS"))
        return search(self, *args)

    monkeypatch.setattr(type(get_backend("numpy")), "knn", spy)
    distributed.knn(queries, da.from_array(corpus, chunks=(100, -1)), K, backend="numpy", threads=3)
    assert seen == ["3"] * 7


def test_one_centre_for_all_tasks_of_a_block_of_queries(rng, monkeypatch):
    queries, corpus = make(rng, "float32")
    seen = []
    search = distributed.search_block

    def spy(*args, centre, **options):
        seen.append(centre)
        return search(*args, centre=centre, **options)

    monkeypatch.setattr(distributed, "search_block", spy)
    distributed.knn(queries, da.from_array(corpus, chunks=(SEVEN, -1)), K, backend="numpy")
    assert len(seen) == 7
    for centre in seen:
        np.testing.assert_allclose(centre, queries.mean(axis=0), rtol=1e-6)
        assert_identical(centre, seen[0])
    seen.clear()
    integers = da.from_array(corpus.astype(np.uint8), chunks=(SEVEN, -1))
    distributed.knn(queries.astype(np.uint8), integers, K, backend="numpy")
    assert seen == [None] * 7


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
def test_a_query_that_is_not_finite_does_not_move_the_centre(metric, value, rng, monkeypatch):
    queries, corpus = (rng.random((n, 70), np.float32) for n in (200, 1000))
    bad = queries.copy()
    bad[7, 5] = value
    shards, seen, search = da.from_array(corpus, chunks=(300, -1)), [], distributed.search_block
    monkeypatch.setattr(
        distributed, "search_block", lambda *args, **options: seen.append(options["centre"]) or search(*args, **options)
    )
    expected = distributed.knn(queries, shards, K, metric, backend="numba")
    seen.clear()
    answer = distributed.knn(bad, shards, K, metric, backend="numba", check_finite=False)
    others = np.arange(200) != 7
    for centre in seen:
        np.testing.assert_allclose(centre, queries[others].mean(axis=0), rtol=1e-5)
    assert_identical(answer.distances[others], expected.distances[others])
    assert_identical(answer.indices[others], expected.indices[others])


# ---- several processes


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_cluster_of_processes(client, dtype, rng):
    queries, corpus = make(rng, dtype)
    shards = da.from_array(corpus, chunks=(SEVEN, -1))
    expected = knn(queries, corpus, K, backend="numba")
    backend = "auto" if dtype == "uint8" else "numba"
    assert_same(distributed.knn(queries, shards, K, backend=backend, client=client), expected)
    with client.as_current():
        assert_same(distributed.knn(queries, client.persist(shards), K, backend=backend), expected)
        assert_same(distributed.knn(queries, shards, K, backend=backend, compute=False), expected)


def test_a_client_that_knows_only_an_address(client, rng):
    queries, corpus = make(rng, "uint8")
    shards = da.from_array(corpus, chunks=(SEVEN, -1))
    with dask_distributed().Client(client.scheduler.address, set_as_default=False) as remote:
        assert_same(distributed.knn(queries, shards, K, client=remote), knn(queries, corpus, K))
        assert_same(distributed.knn(queries, remote.persist(shards), K, client=remote), knn(queries, corpus, K))


@pytest.mark.parametrize("large", ["corpus", "queries"])
def test_what_is_large_stays_and_what_is_small_travels(client, large, rng):
    few, many = (rng.integers(0, 9, (n, 500), dtype=np.uint8) for n in (20, 20_000))
    queries, corpus = (few, many) if large == "corpus" else (many, few)
    addresses = sorted(client.scheduler_info()["workers"])
    there = [client.scatter(rows, workers=address) for rows, address in zip((queries, corpus), addresses, strict=True)]
    lazy = [da.from_delayed(one, rows.shape, np.uint8) for one, rows in zip(there, (queries, corpus), strict=True)]
    answer = distributed.knn(*lazy, 3, "cityblock", backend="numba", client=client)
    assert_same(answer, knn(queries, corpus, 3, "cityblock"))
    place = large == "corpus"
    assert list(client.who_has(there[place])[there[place].key]) == [addresses[place]]


def test_an_error_of_a_worker_is_told_here(client, rng):
    queries, corpus = make(rng, "float32")
    corpus[260] = np.nan
    with pytest.raises(
        InvalidInputError, match=r"in chunk 3, whose first row is 250 of the corpus: corpus row 10 holds"
    ):
        distributed.knn(queries, da.from_array(corpus, chunks=(SEVEN, -1)), K, client=client)


def test_queries_of_megabytes_go_without_a_warning(client, rng):
    queries = rng.integers(0, 9, (40_000, 300), dtype=np.uint8)  # 12 MB
    corpus = queries[:50]
    answer = distributed.knn(queries, da.from_array(corpus, chunks=(20, -1)), 1, "cityblock", client=client)
    np.testing.assert_array_equal(answer.indices[:50, 0], np.arange(50))


def slow_rows(block, block_id=None, mark=""):
    """Return the block later, when its task says that it runs."""
    open(f"{mark}-{block_id[0]}-{os.getpid()}-{time.monotonic_ns()}", "w").close()
    time.sleep(0.25)
    return block


@pytest.mark.parametrize(("dtype", "accuracy"), [("uint8", "fast"), ("float32", "fast"), ("float32", "exact")])
def test_a_worker_that_is_killed_in_the_middle(dtype, accuracy, client, rng, tmp_path):
    queries, corpus = make(rng, dtype)
    expected = knn(queries, corpus, K, backend="numba", accuracy=accuracy)
    mark = str(tmp_path / "ran")
    shards = da.from_array(corpus, chunks=(SEVEN, -1)).map_blocks(slow_rows, dtype=corpus.dtype, mark=mark)
    lazy = distributed.knn(queries, shards, K, backend="numba", accuracy=accuracy, compute=False, client=client)
    before = client.run(os.getpid)
    futures = client.compute(list(lazy))
    while len(os.listdir(tmp_path)) < 3:
        time.sleep(0.02)
    os.kill(int(os.listdir(tmp_path)[0].split("-")[2]), signal.SIGKILL)  # one that holds something
    distances, indices = client.gather(futures)
    client.wait_for_workers(2, timeout=60)
    workers = client.run(os.getpid)
    assert len(set(before.values()) & set(workers.values())) == 1  # it is gone, and another came
    ran = [name.split("-")[1] for name in os.listdir(tmp_path)]
    assert len(set(ran)) == 7
    assert len(ran) > 7  # some shard was made once more
    assert_identical(distances, expected.distances)
    assert_identical(indices, expected.indices)


# ---- what is refused


def test_what_is_refused(rng):
    queries, corpus = make(rng, "float32")
    shards = da.from_array(corpus, chunks=(100, -1))
    for call, text in (
        (lambda: distributed.knn(queries, corpus, K), "corpus is a ndarray; expected a Dask array"),
        (lambda: distributed.knn(queries, shards[:, 0], K), "corpus has shape (700,)"),
        (lambda: distributed.knn(queries, shards[shards[:, 1] > 2], K), "unknown size"),
        (lambda: distributed.knn(queries, shards.astype(complex), K), "corpus has dtype complex128"),
        (lambda: distributed.knn(queries[:, 1:], shards, K), "queries has 9 features and corpus has 10"),
        (lambda: distributed.knn(queries, shards, 701), "k=701 exceeds n_corpus=700"),
        (lambda: distributed.knn(queries, shards, 0), "k is 0"),
        (lambda: distributed.knn(queries, shards, K, threads=0), "threads is 0"),
        (lambda: distributed.knn(queries, shards, K, accuracy="good"), "accuracy is 'good'"),
        (lambda: distributed.knn(queries, shards, K, "nearby"), "metric 'nearby'"),
        (lambda: distributed.knn(da.from_array(queries)[0], shards, K), "queries has shape (10,)"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert text in str(caught.value)
    with pytest.raises(UnsupportedError, match="lacks accuracy='exact' for float32"):
        distributed.knn(queries, shards, K, backend="faiss", accuracy="exact")
    with pytest.raises(UnsupportedError, match="total order"):
        distributed.knn(queries, shards, K, backend="scipy")


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: rows[:7], "it has shape (7, 10) and uint8"),
        (lambda rows: np.concatenate([rows, rows]), "it has shape (300, 10) and uint8"),
        (lambda rows: rows[:0], "it has shape (0, 10) and uint8"),
        (lambda rows: rows + np.float32(0.5), "it has shape (150, 10) and float32 for queries of uint8"),
        (lambda rows: rows[:, :4], "it has shape (150, 4) and uint8 for queries of uint8; expected shape (150, 10)"),
        (lambda rows: rows[:, 0], "it has shape (150,)"),
        (lambda rows: rows[None], "it has shape (1, 150, 10)"),
        (lambda rows: rows[0, 0], "it has shape ()"),
    ],
)
def test_a_chunk_that_is_not_what_its_array_says_is_named(change, text, accuracy, rng):
    queries, corpus = make(rng, "uint8")
    shards = da.from_array(corpus, chunks=(SEVEN, -1)).map_blocks(
        lambda rows, block_id: change(rows) if block_id[0] == 3 else rows, dtype=corpus.dtype, meta=corpus[:0]
    )
    with pytest.raises(InvalidInputError, match="in chunk 3, whose first row is 250 of the corpus: ") as caught:
        distributed.knn(queries, shards, K, accuracy=accuracy)
    assert text in str(caught.value)


# ---- the classifier


def test_the_classifier_votes_as_that_of_one_machine(rng):
    queries, corpus = make(rng, "uint8")
    labels = np.array(["a", "b", "c"])[corpus[:, 1] % 3]
    X = da.from_array(corpus, chunks=(SEVEN, -1))
    for weights in ("uniform", "distance"):
        whole = KNNClassifier(5, weights=weights).fit(corpus, labels)
        classifier = distributed.DistributedKNNClassifier(5, weights=weights).fit(X, da.from_array(labels, chunks=100))
        np.testing.assert_array_equal(classifier.classes_, whole.classes_)
        for given in (queries, da.from_array(queries, chunks=(9, -1))):
            np.testing.assert_array_equal(classifier.predict_proba(given), whole.predict_proba(queries))
            np.testing.assert_array_equal(classifier.predict(given), whole.predict(queries))
        for found, expected in zip(classifier.kneighbors(), whole.kneighbors(), strict=True):
            assert_identical(found, expected)
        assert classifier.score_k(ks=(1, 4)) == whole.score_k(ks=(1, 4))
        assert classifier.score(queries, labels[:N_QUERIES]) == whole.score(queries, labels[:N_QUERIES])


def test_the_classifier_on_processes(client, rng):
    queries, corpus = make(rng, "float32")
    labels = corpus[:, 1].astype(int)
    with client.as_current():
        classifier = distributed.DistributedKNNClassifier(3, backend="numba")
        found = classifier.fit(da.from_array(corpus, chunks=(SEVEN, -1)), labels).predict(queries)
    np.testing.assert_array_equal(found, KNNClassifier(3, backend="numba").fit(corpus, labels).predict(queries))


def test_the_classifier_is_an_estimator(rng):
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError

    _, corpus = make(rng, "uint8")
    classifier = distributed.DistributedKNNClassifier(5, "l1", threads=2)
    assert clone(classifier).get_params() == classifier.get_params()
    with pytest.raises(NotFittedError):
        classifier.predict(corpus)
    with pytest.raises(InvalidInputError, match="expected a Dask array"):
        classifier.fit(corpus, corpus[:, 1])
    with pytest.raises(ValueError, match="inconsistent"):
        classifier.fit(da.from_array(corpus), corpus[1:, 1])


def test_dask_is_loaded_on_use_only():
    code = "import sys, knnbench, knnbench.distributed; print('dask' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr


def test_the_merge_of_a_tree_is_that_of_a_chain(rng):
    queries, corpus = make(rng, "uint8")
    job = job_of(queries, corpus)
    lists = [job.search(queries, corpus[p], p, "chunk") for p in slices(N_CORPUS, 50)]
    chain = functools.reduce(lambda a, b: job.merge([b, a]), lists)
    tree = job.merge([job.merge(lists[:5]), job.merge(lists[5:])])
    for one, other in zip(chain, tree, strict=True):
        assert_identical(one, other)
