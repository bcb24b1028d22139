"""The CUDA backends on a CUDA device: the cases of `tests/gpu_cases.py`, and what takes a device's size."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knnbench import interchange, knn, pairwise
from knnbench.backends import get_backend, registry, upload
from knnbench.dtypes import COMPUTED
from knnbench.metrics import METRICS, Space

from ._checks import assert_distances_close, assert_identical, assert_same_neighbors, assert_ties_by_index, tolerance
from .conftest import available

pytestmark = pytest.mark.gpu

CASES = Path(__file__).with_name("gpu_cases.py")
BACKENDS = [name for name, line in registry().items() if line.device == "cuda" and not line.peer]

# What CUDA's compute-sanitizer looks for. Races of global memory it does not find.
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Around the edges of every tile that a kernel may have: 8, 16, 32, 64 and 128 of pairs, 4, 16 and 32 of features; and
# one of each.
SIZES = (1, 7, 9, 31, 33, 63, 65, 127, 129)
WIDTHS = (1, 3, 5, 15, 17, 31, 33, 784)

# A small search of all metrics and dtypes, for the sanitizer: numbers are exact in every dtype.
SANITIZED = """
import sys
import numpy as np
from knnbench import knn, pairwise
from knnbench.metrics import METRICS
rng = np.random.default_rng(0)
for n_queries, n_corpus, n_features, k in ((5, 67, 3, 4), (65, 130, 17, 70)):
    rows = [rng.integers(1, 5, (n, n_features), np.uint8) for n in (n_queries, n_corpus)]
    for metric in METRICS:
        for dtype in ("uint8", "float32", "float64"):
            queries, corpus = (array.astype(dtype) for array in rows)
            got = knn(queries, corpus, k, metric, backend=sys.argv[1])
            expected = knn(queries, corpus, k, metric, backend="numpy")
            assert np.allclose(got.distances, expected.distances, rtol=1e-5, atol=1e-6)
            pairwise(queries, corpus, metric, backend=sys.argv[1])
"""


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


@pytest.mark.parametrize("n_features", WIDTHS)
@pytest.mark.parametrize("metric", METRICS)
def test_odd_shapes_of_bytes_are_those_of_the_oracle(cuda_backend, metric, n_features, rng):
    for n_queries, n_corpus in zip(SIZES, reversed(SIZES), strict=True):
        queries, corpus = (rng.integers(1, 256, (n, n_features), np.uint8) for n in (n_queries, n_corpus))
        for k in {1, min(n_corpus, 10), n_corpus}:
            got = knn(queries, corpus, k, metric, backend=cuda_backend)
            expected = knn(queries, corpus, k, metric, backend="numpy")
            assert_identical(got.indices, expected.indices)
            assert_identical(got.distances, expected.distances)
        all_distances = pairwise(queries, corpus, metric, backend="numpy")
        assert_identical(pairwise(queries, corpus, metric, backend=cuda_backend), all_distances)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_features", WIDTHS)
@pytest.mark.parametrize("metric", METRICS)
def test_odd_shapes_of_floats_are_those_of_the_oracle(cuda_backend, metric, n_features, dtype, rng):
    for n_queries, n_corpus in zip(SIZES, reversed(SIZES), strict=True):
        queries, corpus = (rng.normal(size=(n, n_features)).astype(dtype) for n in (n_queries, n_corpus))
        space, k = Space(METRICS[metric], np.dtype(dtype), n_features), min(n_corpus, 10)
        reference = pairwise(queries.astype(np.float64), corpus.astype(np.float64), metric, backend="numba")
        direct, matrix, selected = (
            tolerance(space, queries, corpus, reference, form, k=k) for form in ("direct", "pairwise", "knn")
        )
        assert_distances_close(pairwise(queries, corpus, metric, backend=cuda_backend), reference, matrix)
        distances, indices = knn(queries, corpus, k, metric, backend=cuda_backend)
        assert_same_neighbors(distances, indices, reference, k, direct, selected)


@pytest.mark.parametrize("tool", SANITIZERS)
def test_the_sanitizer_finds_nothing(cuda_backend, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the path")
    # Libraries allocate more than they write, and read it in whole words: what they do is not judged here.
    ours = ["--kernel-name-exclude", "regex=(cublas|cutlass|gemm|2at6native|3cub|cupy_)"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *ours]
    done = subprocess.run(
        [*command, sys.executable, "-c", SANITIZED, cuda_backend],
        cwd=CASES.parents[1], capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("n_queries", "k"), [(500, 1), (500, 10), (3, 1000), (500, 1000), (500, 3000)])
@pytest.mark.parametrize("metric", METRICS)
def test_many_bytes(cuda_backend, metric, n_queries, k, rng):
    queries, corpus = (rng.integers(0, 8, (n, 100), np.uint8) for n in (n_queries, 20_000))
    expected = knn(queries, corpus, k, metric, backend="numpy")
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
    expected = knn(queries, corpus, len(corpus), "cityblock", backend="numpy")
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


@pytest.mark.parametrize("dtype", COMPUTED)
def test_large_rows_arrive_from_any_memory(cuda_backend, dtype, rng):
    engine = get_backend(cuda_backend)
    rows = rng.integers(0, 256, (3 * upload.BUFFER_BYTES // 700 + 1, 700)).astype(dtype)
    for given in (rows, np.asfortranarray(rows), rows[::-1], engine.uploader().page_locked(rows)):
        assert_identical(engine.to_numpy(engine.to_native(given, rows.dtype)), np.ascontiguousarray(given))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_work_on_a_stream_of_the_caller_is_waited_for(cuda_backend, library, rng):
    # The rows are written late, on a stream that nothing else waits for, over others.
    module = pytest.importorskip(library)
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA device")
    queries, corpus = (rng.integers(0, 256, (n, 64), np.uint8) for n in (64, 4096))
    expected = knn(queries, corpus, 3, "cityblock", backend=cuda_backend)
    for _ in range(10):
        if library == "cupy":
            given, right = module.zeros(corpus.shape, np.uint8), module.asarray(corpus)
            busy = module.ones((4096, 4096), np.float32)
            module.cuda.Device().synchronize()
            with module.cuda.Stream(non_blocking=True):
                module.matmul(busy, busy)
                given[...] = right
                got = knn(module.asarray(queries), given, 3, "cityblock", backend=cuda_backend)
                found = got.indices.get(), got.distances.get()
        else:
            given, right = module.zeros(corpus.shape, dtype=module.uint8, device="cuda"), module.tensor(corpus).cuda()
            busy = module.ones((4096, 4096), device="cuda")
            module.cuda.synchronize()
            with module.cuda.stream(module.cuda.Stream()):
                module.matmul(busy, busy)
                given.copy_(right)
                got = knn(module.tensor(queries).cuda(), given, 3, "cityblock", backend=cuda_backend)
                found = got.indices.cpu().numpy(), got.distances.cpu().numpy()
        assert_identical(found[0], expected.indices)
        assert_identical(found[1], expected.distances)


def test_a_device_without_memory_is_asked_for_less(cupy, cuda_backend, rng):
    # All but a little of the device's memory is taken, and the budget is larger than what is left.
    queries, corpus = (rng.integers(0, 256, (n, 256), np.uint8) for n in (2000, 400_000))
    expected = knn(queries[:50], corpus, 5, "cityblock", backend="numpy")
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.Device().mem_info
    taken = cupy.cuda.alloc(free - (400 << 20))
    try:
        got = knn(queries, corpus, 5, "cityblock", backend=cuda_backend, memory_budget=free)
    finally:
        del taken
        cupy.get_default_memory_pool().free_all_blocks()
    assert_identical(got.indices[:50], expected.indices)
    assert_identical(got.distances[:50], expected.distances)


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
