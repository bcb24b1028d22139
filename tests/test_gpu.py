"""The CUDA backends on a CUDA device: the cases of `tests/gpu_cases.py`, and what takes a device's size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knnbench import interchange, knn, pairwise
from knnbench.dtypes import COMPUTED
from knnbench.metrics import METRICS, Space

from ._checks import assert_distances_close, assert_identical, assert_same_neighbors, assert_ties_by_index, tolerance
from .conftest import available

pytestmark = pytest.mark.gpu

CASES = Path(__file__).with_name("gpu_cases.py")
BACKENDS = ("cupy", "numba-cuda")


@pytest.fixture(params=BACKENDS)
def cuda_backend(request):
    return available(request.param)


@pytest.fixture
def cupy():
    available("cupy")
    return pytest.importorskip("cupy")


def test_the_cases(cuda_backend):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "KNNBENCH_CASES": cuda_backend}
    done = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("k", [1, 10, 3000])
@pytest.mark.parametrize("metric", METRICS)
def test_many_bytes(cuda_backend, metric, k, rng):
    queries, corpus = (rng.integers(0, 8, (n, 100), np.uint8) for n in (500, 20_000))
    expected = knn(queries, corpus, k, metric, backend="numba")
    for budget in (None, 20_000_000):
        got = knn(queries, corpus, k, metric, backend=cuda_backend, memory_budget=budget)
        assert_identical(got.indices, expected.indices)
        assert_identical(got.distances, expected.distances)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0, 1000])
def test_many_floats(cuda_backend, metric, dtype, offset, rng):
    queries, corpus = ((rng.normal(size=(n, 100)) + offset).astype(dtype) for n in (200, 10_000))
    space = Space(METRICS[metric], np.dtype(dtype), 100)
    reference = pairwise(queries.astype(np.float64), corpus.astype(np.float64), metric, backend="numba")
    direct, matrix, selected = (
        tolerance(space, queries, corpus, reference, form, k=5) for form in ("direct", "pairwise", "knn")
    )
    assert_distances_close(pairwise(queries, corpus, metric, backend=cuda_backend), reference, matrix)
    distances, indices = knn(queries, corpus, 5, metric, backend=cuda_backend)
    assert_same_neighbors(distances, indices, reference, 5, direct, selected)
    assert_ties_by_index(distances, indices)


@pytest.mark.parametrize("dtype", COMPUTED)
def test_all_rows_as_neighbors(cuda_backend, dtype, rng):
    queries, corpus = (rng.integers(1, 5, (n, 4)).astype(dtype) for n in (300, 5000))
    got = knn(queries, corpus, len(corpus), "cityblock", backend=cuda_backend)
    expected = knn(queries, corpus, len(corpus), "cityblock", backend="numba")
    assert_identical(got.indices, expected.indices)
    assert_identical(got.distances, expected.distances)


def test_arrays_of_other_libraries(cuda_backend, cupy, rng):
    queries, corpus = (rng.integers(0, 256, (n, 20), np.uint8) for n in (5, 50))
    expected = knn(queries, corpus, 3, backend=cuda_backend)
    from numba import cuda

    for given in (cupy.asarray(queries), cuda.to_device(queries)):
        got = knn(given, cupy.asarray(corpus), 3, backend=cuda_backend)
        assert type(got.distances) is type(got.indices) is type(given)
        assert_identical(interchange.to_host(got.indices), expected.indices)
        assert_identical(interchange.to_host(got.distances), expected.distances)


def test_tensors(cuda_backend, rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA device")
    queries, corpus = (rng.normal(size=(n, 20)).astype(np.float32) for n in (5, 50))
    expected = knn(queries, corpus, 3, backend=cuda_backend)
    got = knn(torch.from_numpy(queries).cuda(), torch.from_numpy(corpus).cuda(), 3, backend=cuda_backend)
    assert got.distances.is_cuda
    assert got.indices.is_cuda
    assert_identical(got.indices.cpu().numpy(), expected.indices)
    assert_identical(got.distances.cpu().numpy(), expected.distances)


@pytest.mark.parametrize("metric", ["cityblock", "sqeuclidean"])
def test_device_memory_stays_in_the_budget(metric, cupy, rng):
    queries, corpus = (cupy.asarray(rng.normal(size=(n, 64)).astype(np.float32)) for n in (4000, 30_000))
    knn(queries[:10], corpus[:100], 5, metric, backend="cupy")  # what kernels and libraries keep for themselves
    pool, budget = cupy.get_default_memory_pool(), 64_000_000
    pool.free_all_blocks()
    before = pool.total_bytes()
    distances, indices = knn(queries, corpus, 5, metric, backend="cupy", memory_budget=budget)
    # Prepared, the corpus is at most copied once; the pool takes whole blocks of 512 bytes.
    allowed = budget + corpus.nbytes + distances.nbytes + 2 * indices.nbytes
    assert pool.total_bytes() - before <= allowed


@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
@pytest.mark.parametrize("k", [1, 5, 31, 32, 100, 1000])
def test_partition_of_cupy(cupy, dtype, k, rng):
    # Its kernel counts on the threads of a warp to stay together, which devices since Volta do not promise.
    values = rng.integers(0, 3000, (256, 4096)).astype(dtype)
    got = cupy.partition(cupy.asarray(values), k - 1, axis=1)[:, k - 1].get()
    assert_identical(got, np.partition(values, k - 1, axis=1)[:, k - 1])
