"""That peers are measured as they are: their library's own answers, from blocks of queries that fit the budget."""

import os
import subprocess
import sys

import numpy as np
import pytest

import knnbench
from knnbench import OverBudgetError, UnsupportedError, knn, pairwise
from knnbench.backends import backend_status, get_backend, registry
from knnbench.metrics import METRICS, Space

from ._checks import assert_identical
from .conftest import as_parameter, available

PEERS = [name for name, line in registry().items() if line.peer]
K = 4


@pytest.fixture(params=[as_parameter(name) for name in PEERS])
def peer(request):
    return available(request.param)


@pytest.fixture(params=[name for name in PEERS if not name.endswith("-cuda")])
def host_peer(request):
    return available(request.param)


def problem(dtype, n_queries=9, n_corpus=40, n_features=11):
    rng = np.random.default_rng(3)
    if dtype == "uint8":
        return tuple(rng.integers(1, 256, (n, n_features), np.uint8) for n in (n_queries, n_corpus))
    return tuple(rng.normal(size=(n, n_features)).astype(dtype) for n in (n_queries, n_corpus))


def by_notebook(queries, corpus, metric):
    expressions = {
        "cityblock": lambda a, b: np.sum(np.abs(a - b)),
        "euclidean": lambda a, b: np.sqrt(np.sum((a - b) ** 2)),
    }
    q, c = queries.astype(np.float32), corpus.astype(np.float32)
    everything = np.array([[expressions[metric](a, b) for b in c] for a in q])
    indices = np.argsort(everything, axis=1)[:, :K]
    return everything, np.take_along_axis(everything, indices, axis=1), indices


def by_torch(queries, corpus, metric):
    import torch

    q, c = (torch.from_numpy(x.astype(np.result_type(x, np.float32))) for x in (queries, corpus))
    everything = torch.cdist(q, c, p={"euclidean": 2, "cityblock": 1, "chebyshev": np.inf}[metric])
    return (everything.numpy(), *(found.numpy() for found in everything.topk(K, largest=False)))


def by_torch_mm(queries, corpus, metric):
    import torch

    q, c = (torch.from_numpy(x.astype(np.result_type(x, np.float32))) for x in (queries, corpus))
    squares = torch.addmm((c * c).sum(1), q, c.T, alpha=-2) + (q * q).sum(1)[:, None]
    nearest, indices = squares.topk(K, largest=False)
    finish = {"euclidean": torch.sqrt, "sqeuclidean": lambda x: x}[metric]
    return (*(finish(found.clamp(min=0)).numpy() for found in (squares, nearest)), indices.numpy())


def by_scipy(queries, corpus, metric):
    from scipy.spatial.distance import cdist

    everything = cdist(queries, corpus, metric)
    nearest = np.argpartition(everything, K - 1, axis=1)[:, :K]
    order = np.argsort(np.take_along_axis(everything, nearest, axis=1), axis=1)
    indices = np.take_along_axis(nearest, order, axis=1)
    return everything, np.take_along_axis(everything, indices, axis=1), indices


def by_sklearn(queries, corpus, metric):
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors

    q, c = (x.astype(np.result_type(x, np.float32)) for x in (queries, corpus))
    search = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=metric).fit(c)
    distances, indices = search.kneighbors(q)
    return pairwise_distances(q, c, metric=metric), distances.astype(q.dtype), indices


def by_faiss(queries, corpus, metric):
    from knnbench.backends.faiss import faiss

    q, c = queries.astype(np.float32), corpus.astype(np.float32)
    if metric == "cosine":
        faiss.normalize_L2(q)
        faiss.normalize_L2(c)
    kind = {
        "euclidean": faiss.METRIC_L2,
        "sqeuclidean": faiss.METRIC_L2,
        "cityblock": faiss.METRIC_L1,
        "chebyshev": faiss.METRIC_Linf,
        "cosine": faiss.METRIC_INNER_PRODUCT,
    }[metric]
    finish = {"euclidean": np.sqrt, "cosine": lambda x: 1 - x}.get(metric, lambda x: x)
    distances, indices = faiss.knn(q, c, K, kind)
    return finish(faiss.pairwise_distances(q, c, kind)), finish(distances), indices


BY_HAND = {
    "notebook": by_notebook,
    "torch-cdist": by_torch,
    "torch-mm": by_torch_mm,
    "scipy": by_scipy,
    "sklearn": by_sklearn,
    "faiss": by_faiss,
}


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_peer_answers_what_its_library_answers(host_peer, metric, dtype):
    capabilities = backend_status(host_peer).capabilities
    if metric not in capabilities.metrics or dtype not in capabilities.dtypes:
        pytest.skip("not claimed")
    queries, corpus = problem(dtype)
    everything, distances, indices = BY_HAND[host_peer](queries, corpus, metric)
    assert_identical(pairwise(queries, corpus, metric, backend=host_peer), everything)
    found = knn(queries, corpus, K, metric, backend=host_peer)
    assert_identical(found.distances, distances)
    assert_identical(found.indices, indices)


def test_no_peer_claims_the_rules_of_own_backends(peer):
    capabilities = backend_status(peer).capabilities
    assert not capabilities.total_order
    assert not capabilities.exact_integers
    assert not capabilities.certifies


def test_blocks_of_queries_are_put_together(peer):
    queries, corpus = problem("float32")
    engine = get_backend(peer)
    metric = "cityblock" if "cityblock" in engine.capabilities.metrics else "euclidean"
    space = Space(METRICS[metric], np.dtype(np.float32), 11)
    native = engine.to_native(queries, queries.dtype)
    prepared = engine.prepare(engine.to_native(corpus, corpus.dtype), space)
    whole = [engine.pairwise(native, prepared, space, 1 << 30), *engine.knn(native, prepared, K, space, 1 << 30)]
    per_query, per_call = engine.held_bytes(len(queries), len(corpus), K, space)
    for n_together in (1, 2, 4):  # the last of them leaves one over
        budget = per_call + n_together * per_query
        assert len(list(engine._query_blocks(9, len(corpus), K, space, budget))) == -(-9 // n_together)
        parts = [engine.pairwise(native, prepared, space, budget), *engine.knn(native, prepared, K, space, budget)]
        for ours, theirs in zip(parts, whole, strict=True):
            ours, theirs = engine.to_numpy(ours), engine.to_numpy(theirs)
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(OverBudgetError, match=r"bytes cannot hold what \w+ needs for one query"):
        engine.knn(native, prepared, K, space, per_call + per_query - 1)


def test_the_corpus_is_converted_once(host_peer):
    queries, corpus = problem("uint8")
    prepared = knnbench.prepare(corpus, backend=host_peer)
    packed = prepared.packed(prepared.dtype)
    knn(queries, prepared, K)
    assert prepared.packed(prepared.dtype) is packed
    assert len(packed) == len(corpus)


def test_faiss_gives_no_root_of_a_negative_square():
    # Its pairwise_distances leaves squares that have cancelled as they are; a warning would fail this.
    available("faiss")
    rows = (np.random.default_rng(0).normal(size=(300, 16)) / 10 + 100).astype(np.float32)
    got = pairwise(rows, rows, "euclidean", backend="faiss")
    assert (got >= 0).all()


# A first, small call has loaded and started all that stays.
RESIDENT = """
import resource, sys
import numpy as np
from knnbench import knn, prepare
backend, metric, dtype, budget, n_queries, n_corpus, n_features = (*sys.argv[1:4], *map(int, sys.argv[4:]))
rng = np.random.default_rng(0)
rows = lambda n: rng.integers(1, 256, (n, n_features), dtype=np.uint8).astype(dtype)
queries, prepared = rows(n_queries), prepare(rows(n_corpus), metric, backend=backend)
small = prepare(rows(50), metric, backend=backend)
knn(queries[:50], small, 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
knn(queries, prepared, 5, memory_budget=budget)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("metric", "dtype"), [("euclidean", "float32"), ("cosine", "float32"), ("cityblock", "uint8")])
def test_the_resident_set_stays_within_the_budget(host_peer, metric, dtype):
    if metric not in backend_status(host_peer).capabilities.metrics:
        pytest.skip("not claimed")
    if host_peer == "notebook":
        pytest.skip("too slow for a search that would notice")
    budget = 64 << 20  # all distances at once would take 190 MB or more
    arguments = (host_peer, metric, dtype, budget, 1200, 40_000, 30)
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # Allocators and thread pools keep some for themselves.
    assert int(run.stdout) <= budget + (32 << 20)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_losses_of_linear_models_are_the_librarys_or_refused(peer, dtype):
    rng = np.random.default_rng(0)
    X, y, weight = rng.integers(0, 256, (600, 11)).astype(dtype), rng.integers(0, 4, 600), rng.random(600)
    kind = np.result_type(dtype, np.float32)
    W, b = (1e-3 * rng.standard_normal((3, 11, 4))).astype(kind), rng.standard_normal((3, 4)).astype(kind)
    engine = get_backend(peer)
    if peer in ("scipy", "sklearn", "faiss", "torch-mm"):
        with pytest.raises(UnsupportedError, match="has no losses of linear models; take an own backend"):
            engine.linear_loss(X, y, weight, kind)
        return
    expected = get_backend("numpy").linear_loss(X, y, weight, kind)(W, b)
    losses = engine.linear_loss(X, y, weight, kind)
    np.testing.assert_allclose(losses(W, b), expected, rtol=1e-5)
    assert np.isinf(losses(W, b, expected.min() * 1.0001)).sum() == 2
    if kind == np.float64:
        np.testing.assert_allclose(losses(W, b), expected, rtol=1e-12)
