"""What a CUDA backend of our own must do, at sizes around the edges of its tiles.

These tests run in processes of their own, started by `tests/test_cuda_simulator.py` (numba-cuda without a GPU),
`tests/test_cuda_source.py` (cupy without a GPU) and `tests/test_gpu.py` (both with one); $KNNBENCH_CASES names the
backend.
"""

import importlib
import os

import numpy as np
import pytest

from knnbench import (
    BackendUnavailableError,
    InvalidInputError,
    RandomSearchClassifier,
    interchange,
    knn,
    pairwise,
    prepare,
)
from knnbench.backends import backend_status, get_backend, upload
from knnbench.blocking import DEFAULT_BUDGET, block_shape
from knnbench.dtypes import COMPUTED
from knnbench.measure import make_cases, worker
from knnbench.measure.ceilings import PROBES
from knnbench.measure.reference import reference_distances
from knnbench.metrics import METRICS, Space

from ._checks import assert_distances_close, assert_identical, assert_same_neighbors, tolerance

BACKEND = os.environ.get("KNNBENCH_CASES", "")
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

# Pairs along a side of a tile, and bytes of a row that pass through shared memory at a time.
TILES = {"numba-cuda": (16, 16) if SIMULATED else (128, 32)}
EDGE, FEATURES = TILES.get(BACKEND, (64, 16))
# Rows where tiles do not matter: the simulator takes a tenth of a second for each tile.
SOME = 24 if SIMULATED else 6 * EDGE
# Where a backend asks for its blocks, and a budget that makes them smaller on both sides than what is passed here.
BLOCKED_IN = {
    "numba-cuda": ["knnbench.backends.numba_cuda"],
    "cupy": ["knnbench.backends.cupy", "knnbench.backends.blockwise"],
    "torch-cuda": ["knnbench.backends.torch", "knnbench.backends.blockwise"],
}
BLOCK_BUDGET = {"numba-cuda": 400 if SIMULATED else 600, "cupy": 90_000, "torch-cuda": 90_000}

SHAPES = [(1, 1, 1), (EDGE - 1, EDGE + 1, FEATURES + 1), (EDGE + 1, 2 * EDGE + 1, FEATURES)]


def rows_of(rng, dtype, *shape, high=256):
    rows = rng.integers(1, high, shape).astype(dtype)
    return rows if dtype == "uint8" else rows + rng.normal(size=shape).astype(dtype)


def on_device(rows):
    return get_backend(BACKEND).to_native(rows, rows.dtype)


def to_host(array):
    return get_backend(BACKEND).to_numpy(array)


def check(queries, corpus, metric, k, **options):
    """Compare both operations with the python backend."""
    space = Space(METRICS[metric], queries.dtype, queries.shape[1])
    got = pairwise(queries, corpus, metric, backend=BACKEND, **options)
    distances, indices = knn(queries, corpus, k, metric, backend=BACKEND, **options)
    if space.is_integer:
        assert_identical(got, pairwise(queries, corpus, metric, backend="python"))
        expected = knn(queries, corpus, k, metric, backend="python")
        assert_identical(distances, expected.distances)
        assert_identical(indices, expected.indices)
        return
    reference = pairwise(queries.astype(np.float64), corpus.astype(np.float64), metric, backend="python")
    direct, matrix, selected = (
        tolerance(space, queries, corpus, reference, form, k=k) for form in ("direct", "pairwise", "knn")
    )
    assert got.dtype == distances.dtype == space.output
    assert_distances_close(got, reference, matrix)
    assert_same_neighbors(distances, indices, reference, k, direct, selected)


def test_it_is_this_backend_that_works():
    status = backend_status(BACKEND)
    assert status.ok, status.reason
    assert status.device == "cuda"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", METRICS)
def test_around_the_edges_of_a_tile(metric, dtype, shape, rng):
    n_queries, n_corpus, n_features = shape
    queries, corpus = rows_of(rng, dtype, n_queries, n_features), rows_of(rng, dtype, n_corpus, n_features)
    check(queries, corpus, metric, n_corpus // 2 + 1)


@pytest.mark.parametrize("dtype", COMPUTED)
def test_ties_go_to_the_smaller_index(dtype, rng):
    # Small whole numbers are exact in every dtype, and so are their distances.
    queries, corpus = (rng.integers(1, 3, (n, 2)).astype(dtype) for n in (3, 2 * EDGE + 1))
    for k in (1, EDGE + 1, len(corpus)):
        got = knn(queries, corpus, k, "cityblock", backend=BACKEND)
        expected = knn(queries, corpus, k, "cityblock", backend="python")
        assert_identical(got.indices, expected.indices)
        assert_identical(got.distances, expected.distances)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 6])
def test_few_queries_and_many_rows(metric, k, rng):
    # The device is then shared out among parts of the corpus, whose lists are merged; many rows are as far as others.
    queries, corpus = (rng.integers(1, 4, (n, 3)).astype(np.uint8) for n in (1, 4 * EDGE + 1))
    check(queries, corpus, metric, k)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_is_near_nothing(dtype, rng):
    queries, corpus = (rng.integers(1, 9, (n, 3)).astype(dtype) for n in (3, EDGE + 3))
    expected = knn(queries, corpus[1:], 2, "cityblock", backend="python")
    corpus[0] = np.nan
    got = knn(queries, corpus, 2, "cityblock", backend=BACKEND, check_finite=False)
    assert_identical(got.indices, expected.indices + 1)
    assert_identical(got.distances, expected.distances)


@pytest.mark.filterwarnings("ignore:.*overflow encountered")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distances_that_overflow(dtype, rng):
    queries, corpus = (rng.integers(1, 3, (n, 2)).astype(dtype) for n in (2, EDGE + 3))
    corpus[1::2] *= np.finfo(dtype).max / 2
    with np.errstate(over="ignore"):
        expected = np.abs(queries[:, None] - corpus).sum(axis=2)
    order = np.argsort(expected, axis=1, kind="stable")
    assert np.isinf(expected).any()
    for k in (1, EDGE, len(corpus)):
        got = knn(queries, corpus, k, "cityblock", backend=BACKEND)
        assert_identical(got.indices, order[:, :k])
        assert_identical(got.distances, np.take_along_axis(expected, order[:, :k], axis=1))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_blocks_do_not_show(metric, dtype, rng, monkeypatch):
    shapes = []

    def recorded(*args, **kwargs):
        shapes.append(block_shape(*args, **kwargs))
        return shapes[-1]

    n_features = FEATURES + 1
    queries, corpus = rows_of(rng, dtype, EDGE, n_features, high=5), rows_of(rng, dtype, 3 * EDGE, n_features, high=5)
    engine, space = get_backend(BACKEND), Space(METRICS[metric], queries.dtype, n_features)
    for module in BLOCKED_IN[BACKEND]:
        monkeypatch.setattr(importlib.import_module(module), "block_shape", recorded)
    native, prepared = on_device(queries), engine.prepare(on_device(corpus), space)

    def answers(budget):
        found = *engine.knn(native, prepared, 2, space, budget), engine.pairwise(native, prepared, space, budget)
        return [to_host(array) for array in found]

    whole, parts = answers(DEFAULT_BUDGET), answers(BLOCK_BUDGET[BACKEND])
    # numba-cuda's kernel passes over the whole corpus.
    assert (EDGE, 1 if BACKEND == "numba-cuda" else 3 * EDGE) in shapes[:2]
    assert shapes[2][0] < EDGE
    assert BACKEND == "numba-cuda" or any(1 < n_corpus < 3 * EDGE for _, n_corpus in shapes[2:])
    assert_identical(parts[1], whole[1])
    if space.is_integer or BACKEND == "numba-cuda":
        assert_identical(parts[0], whole[0])
        assert_identical(parts[2], whole[2])


@pytest.mark.skipif(SIMULATED, reason="the simulator would take minutes")
@pytest.mark.parametrize(
    ("dtype", "k", "spread", "budget"),
    [("float32", 3, 1e-3, 22_000), ("float32", 1030, 1e-3, 80_000), ("float64", 100, 1e-6, 12_500)],
)
def test_products_that_cancel_are_computed_again(dtype, k, spread, budget, rng):
    # Rows too near each other for products, as some lie far away; in blocks whose lists together are long.
    corpus = 1000 * np.where(rng.random((1200, 1)) < 0.95, 1, -1) + spread * rng.normal(size=(1200, 5))
    queries = 1000 + spread * rng.normal(size=(9, 5))
    queries, corpus = queries.astype(dtype), corpus.astype(dtype)
    space = Space(METRICS["sqeuclidean"], queries.dtype, 5)
    engine = get_backend(BACKEND)
    native, prepared = on_device(queries), engine.prepare(on_device(corpus), space)
    # torch's selection holds more for each query.
    found = engine.knn(native, prepared, k, space, budget * (4 if BACKEND == "torch-cuda" else 1))
    expected = knn(queries, corpus, k, "sqeuclidean", backend="python")
    assert_identical(to_host(found[1]), expected.indices)
    assert_distances_close(to_host(found[0]), expected.distances, 1e-6 * expected.distances)


def test_a_small_budget_of_the_caller(rng):
    # Queries and corpus then come to the device in parts, and lists of parts are merged.
    queries, corpus = rows_of(rng, "uint8", EDGE + 1, 5, high=4), rows_of(rng, "uint8", 5 * EDGE, 5, high=4)
    check(queries, corpus, "cosine", 3, memory_budget=1_500 if SIMULATED else 30_000)


def test_a_corpus_that_fits_is_searched_whole(rng, monkeypatch):
    engine, calls = type(get_backend(BACKEND)), []
    search = engine.knn
    monkeypatch.setattr(engine, "knn", lambda *args: calls.append(args) or search(*args))
    knn(rows_of(rng, "uint8", 2, 3), rows_of(rng, "uint8", 5, 3), 2, backend=BACKEND)
    assert len(calls) == 1


def test_rows_pass_through_page_locked_buffers(rng, monkeypatch):
    monkeypatch.setattr(upload, "BUFFER_BYTES", 200)
    uploader = type(get_backend(BACKEND).uploader())(get_backend(BACKEND).uploader()._lane)
    for rows in (rows_of(rng, "float32", 31, 9), rows_of(rng, "uint8", 7, 70), rows_of(rng, "uint8", 10, 9)[:, ::2]):
        for given in (rows, uploader.page_locked(rows)):
            assert_identical(to_host(uploader.upload(given, rows.dtype)), np.ascontiguousarray(rows))
            doubles = uploader.upload(given, np.dtype(np.float64))
            assert_identical(to_host(doubles), rows.astype(np.float64))


def planted_error():
    """Return what the backend's library raises when the device has no memory left."""
    if BACKEND == "torch-cuda":
        import torch

        return torch.cuda.OutOfMemoryError("CUDA out of memory (planted)")
    if BACKEND == "cupy":
        import cupy

        return cupy.cuda.memory.OutOfMemoryError(1 << 40, 1 << 30, 0)
    if SIMULATED:
        return type("CudaAPIError", (RuntimeError,), {"code": 2})("[2] planted")
    from numba.cuda.cudadrv.driver import CudaAPIError

    return CudaAPIError(2, "planted")


def test_out_of_memory_asks_for_less(rng, monkeypatch):
    queries, corpus = rows_of(rng, "uint8", 5, 4, high=4), rows_of(rng, "uint8", 4 * EDGE, 4, high=4)
    expected = knn(queries, corpus, 3, "cityblock", backend=BACKEND)
    engine, budgets, sizes = type(get_backend(BACKEND)), [], []
    search, pack = engine.knn, engine.prepare

    def packed(self, rows, *args):
        sizes.append(len(rows))
        if len(rows) > EDGE:
            raise planted_error()
        return pack(self, rows, *args)

    def searched(self, queries, prepared, k, space, budget):
        budgets.append(budget)
        if len(budgets) < 3:
            raise planted_error()
        return search(self, queries, prepared, k, space, budget)

    monkeypatch.setattr(engine, "prepare", packed)
    monkeypatch.setattr(engine, "knn", searched)
    got = knn(queries, corpus, 3, "cityblock", backend=BACKEND)
    assert_identical(got.indices, expected.indices)
    assert_identical(got.distances, expected.distances)
    assert sizes[0] == 4 * EDGE
    assert [n_rows for n_rows in sizes if n_rows <= EDGE] == [EDGE] * 4
    assert budgets[1] == budgets[0] // 2
    assert budgets[2:] == [budgets[0] // 4] * 4


@pytest.mark.parametrize("dtype", COMPUTED)
def test_an_answer_in_kind(dtype, rng):
    queries, corpus = rows_of(rng, dtype, 3, 4), rows_of(rng, dtype, 6, 4)
    expected = knn(queries, corpus, 2, "cityblock", backend=BACKEND)
    given = on_device(queries)
    for other in (corpus, on_device(corpus), prepare(on_device(corpus), "cityblock", backend=BACKEND)):
        got = knn(given, other, 2, "cityblock", backend=BACKEND)
        assert type(got.distances) is type(got.indices) is type(given)
        assert_identical(to_host(got.distances), expected.distances)
        assert_identical(to_host(got.indices), expected.indices)
        all_distances = pairwise(given, other, "cityblock", backend=BACKEND)
        assert type(all_distances) is type(given)
        assert_identical(to_host(all_distances), pairwise(queries, corpus, "cityblock", backend=BACKEND))
    assert isinstance(knn(queries, on_device(corpus), 2, "cityblock", backend=BACKEND).indices, np.ndarray)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_neighbours(metric, dtype, rng):
    for high, spread in ((3, 0), (200, 1e-6)):  # ties; and what the filter cannot tell apart
        queries, corpus = (rng.integers(1, high, (n, 4)).astype(dtype) for n in (3, SOME))
        corpus += (spread * rng.normal(size=corpus.shape)).astype(dtype)
        expected = knn(queries, corpus, 4, metric, backend="python", accuracy="exact")
        for arrays in ((queries, corpus), (on_device(queries), corpus), (on_device(queries), on_device(corpus))):
            got = knn(*arrays, 4, metric, backend=BACKEND, accuracy="exact")
            assert type(got.indices) is type(arrays[0])
            on_host = map(interchange.to_host, got)
            for found, right in zip(on_host, expected, strict=True):
                assert_identical(found, right)


@pytest.mark.filterwarnings("ignore:.*Grid size")  # of numba's own transposition
@pytest.mark.parametrize("given", ["float16", "int64", "bool", "float64"])
def test_device_arrays_of_other_dtypes(given, rng):
    engine, rows = get_backend(BACKEND), rng.integers(0, 2, (5, 4)).astype(given)
    for array, expected in ((on_device(rows), rows), (on_device(rows)[1:4], rows[1:4]), (on_device(rows).T, rows.T)):
        assert interchange.on_device(array)
        native = engine.to_native(array, np.dtype(np.float32))
        assert_identical(to_host(native), np.ascontiguousarray(expected, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bad_rows_are_found(dtype, rng):
    corpus = rows_of(rng, dtype, 3 * EDGE, 3)
    for value in (np.nan, -np.inf):
        bad = corpus.copy()
        bad[EDGE + 1, 2] = bad[EDGE + 2, 0] = value
        with pytest.raises(InvalidInputError, match=f"corpus row {EDGE + 1} holds NaN or infinity"):
            knn(corpus[:1], on_device(bad), 1, backend=BACKEND)
    bad = corpus.copy()
    bad[EDGE + 1] = bad[EDGE + 2] = 0
    with pytest.raises(InvalidInputError, match=f"queries row {EDGE + 1} is all zeros"):
        knn(on_device(bad), corpus, 1, "cosine", backend=BACKEND)
    assert knn(on_device(bad), corpus, 1, "euclidean", backend=BACKEND).indices.shape == (len(bad), 1)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1e-30), ("float32", 1e30), ("float64", 1e-300), ("float64", 1e300)]
)
def test_cosine_of_rows_whose_squares_are_out_of_range(dtype, scale, rng):
    queries, corpus = (rng.normal(size=(n, 5)) for n in (2, 6))
    check((queries * scale).astype(dtype), (corpus * scale).astype(dtype), "cosine", 3)


@pytest.mark.skipif(SIMULATED, reason="the simulator has no clock")
def test_the_device_has_a_clock_of_its_own(rng):
    engine, rows = get_backend(BACKEND), rows_of(rng, "float32", 3 * EDGE, 3)
    stop = engine.stopwatch()
    knn(rows, rows, 2, backend=BACKEND)
    assert 0 < stop() < 60


# Samples and classes of a block of the kernel of losses, and around them.
LOSSES = (4, 2) if SIMULATED else (256, 10)


@pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning")  # of infinities, as they must be
@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("shape", [(1, 1, 1), (LOSSES[0], 3, LOSSES[1]), (2 * LOSSES[0] + 1, 7, LOSSES[1] + 1)])
def test_losses_of_linear_models(dtype, shape, rng):
    n_samples, n_features, n_classes = shape
    X, y = rows_of(rng, dtype, n_samples, n_features), rng.integers(0, n_classes, n_samples)
    weight, real = rng.random(n_samples), np.result_type(dtype, np.float32)
    W = (1e-2 * rng.normal(size=(3, n_features, n_classes))).astype(real)
    b = rng.normal(size=(3, n_classes)).astype(real)
    losses = get_backend(BACKEND).linear_loss(X, y, weight, real)
    found = losses(W, b)
    expected = get_backend("numpy").linear_loss(X, y, weight, real)(W, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if real == np.float32 else 1e-12, atol=1e-12)
    assert_identical(found, np.concatenate([losses(W[m : m + 1], b[m : m + 1]) for m in range(3)]))
    limit = float(np.median(found))
    assert_identical(losses(W, b, limit), np.where(found <= limit, found, np.inf))
    assert sum(losses.operations.values()) == 9 * n_samples * n_features * n_classes
    W[1, 0, 0], b[2, 0] = np.nan, np.inf
    assert np.isfinite(losses(W, b)).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_a_random_search_decides_as_on_the_host(dtype, rng):
    X, y = rows_of(rng, dtype, LOSSES[0] + 3, 5), rng.integers(0, 3, LOSSES[0] + 3)
    found, expected = (
        RandomSearchClassifier(12, backend=name, random_state=0).fit(X, y) for name in (BACKEND, "numpy")
    )
    assert found.accepted_iterations_.tolist() == expected.accepted_iterations_.tolist()
    np.testing.assert_array_equal(found.coef_, expected.coef_)


@pytest.mark.skipif(SIMULATED, reason="the simulator has no clock")
@pytest.mark.parametrize("op", ["knn", "pairwise"])
def test_a_case_is_measured_with_its_copies_apart(op, tmp_path):
    options = {"n_train": 60, "n_test": 20, "n_features": 4}
    (case,) = make_cases("synthetic", ["cityblock"], ops=[op], dtypes=["uint8"], options=options)
    queries, corpus = case.load()
    paths = [str(tmp_path / name) for name in ("first.npy", "changed.npy")]
    for path, rows in zip(paths, (queries[:8], corpus[-8:]), strict=True):
        np.save(path, reference_distances(rows, corpus, "cityblock"))
    measured = worker._Distances(BACKEND, worker.Opening(case, 0.05, *paths, sizes=(8, 60)))
    opened = measured.open()
    assert (opened["status"], opened["reason"]) == ("ok", "")
    copies = {"copy_in", "copy_out", "from_pageable", "from_pinned"}
    assert opened["phases"].keys() == {"prepare", "first_call", *copies}
    assert min(min(samples) for samples in opened["phases"].values()) > 0
    turn = measured.turn(0.01)
    assert turn["times_s"]
    # Of each call from the host, one on the device.
    assert turn["phases"].keys() == {"compute", "device"}
    assert {len(samples) for samples in turn["phases"].values()} == {len(turn["times_s"])}
    assert min(min(samples) for samples in turn["phases"].values()) > 0
    assert turn["peak_device_bytes"] is None or turn["peak_device_bytes"] >= 0
    closed = measured.close()
    assert (closed["status"], closed["n_checked"]) == ("ok", 16)


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", METRICS)
def test_operations_are_those_of_known_ceilings_of_a_device(metric, dtype):
    found = get_backend(BACKEND).operations(Space(METRICS[metric], np.dtype(dtype), 20), "knn")
    assert all(PROBES[name].device == "cuda" and count > 0 for name, count in found.items())
    if dtype == "uint8" and METRICS[metric].integer.from_dot:
        products = {"numba-cuda": "cuda-dot-uint8", "cupy": "cuda-matrix-int8", "torch-cuda": "cuda-gemm-int8"}
        if os.environ.get("KNNBENCH_HIDDEN"):  # a build of torch without them
            products["torch-cuda"] = "cuda-fma-float32"
        assert found == {products[BACKEND]: 1}
    elif dtype == "uint8" and metric == "cityblock" and BACKEND != "torch-cuda":
        assert found == {"cuda-sad-uint8": 1}


@pytest.mark.skipif(BACKEND != "cupy", reason="of CuPy only")
@pytest.mark.parametrize("dtype", COMPUTED)
def test_a_device_without_the_shared_memory(dtype, rng, monkeypatch):
    from knnbench.backends import cupy as module

    started = []
    monkeypatch.setattr(module, "start", lambda *args: started.append(args))
    monkeypatch.setattr(module, "device_limits", lambda device: (3, 48 << 10))
    check(rows_of(rng, dtype, 3, 5), rows_of(rng, dtype, 30, 5), "sqeuclidean", 2)
    assert not started
    monkeypatch.setattr(module, "device_limits", lambda device: (3, 0))
    losses = get_backend(BACKEND).linear_loss(rows_of(rng, "uint8", 9, 5), np.arange(9) % 3, np.ones(9), np.dtype("f4"))
    assert type(losses).__name__ == "ArrayLoss"


@pytest.mark.skipif(BACKEND != "cupy", reason="of CuPy only")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_by_products_of_halves_are_proved_or_searched_again(metric, rng, monkeypatch):
    backend, again = type(get_backend(BACKEND)), []
    search = backend._search_again

    def recorded(self, rows, *args):
        again.append(len(rows))
        return search(self, rows, *args)

    monkeypatch.setattr(backend, "_search_again", recorded)
    corpus, queries = (rng.normal(size=(n, 24)).astype(np.float32) for n in (300, 9))
    check(queries, corpus, metric, 3)
    assert not again
    # Rows that float16 does not tell apart; and queries whose elements it does not hold.
    close = (1 + 1e-4 * rng.normal(size=(300, 24))).astype(np.float32)
    close[0] = -1
    check(close[:9] + np.float32(1e-5), close, metric, 3)
    assert again == [9] if metric == "euclidean" else again
    if metric == "euclidean":
        del again[:]
        check(1e6 * queries, corpus, metric, 3)
        assert again == [9]
        # Rows so small beside two others that even the squares of what rounding took from them underflow.
        tiny = (2.0**-26 * corpus).astype(np.float32)
        tiny[:2] = np.array([[1], [-1]]) * 2.0**60
        check(tiny[2:9], tiny, metric, 3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_stream_of_blocks_about_a_centre(metric, rng):
    queries, corpus = (rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 60))
    expected = knn(queries, corpus, 3, metric, backend="python")
    got = knn(queries, iter([corpus[:25], corpus[25:]]), 3, metric, backend=BACKEND)
    assert_identical(got.indices, expected.indices)
    np.testing.assert_allclose(got.distances, expected.distances, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(BACKEND != "cupy", reason="of CuPy only")
def test_products_are_not_rounded_to_11_bits(monkeypatch):
    backend = type(get_backend(BACKEND))
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(BackendUnavailableError, match="CUPY_TF32"):
        backend()


@pytest.mark.skipif(SIMULATED, reason="the simulator has Python's integers, and would take minutes")
@pytest.mark.parametrize("metric", METRICS)
def test_more_features_than_32_bits_can_sum(metric):
    queries, corpus = np.full((1, 33_100), 255, np.uint8), np.ones((2, 33_100), np.uint8)
    check(queries, corpus, metric, 2)
