"""One block of every kernel, small enough for milliseconds.

numba's tiles stand twice in the group of their case: in their backend, with its threads and the public API around
them, and bare, on one thread.
"""

import numpy as np
import pytest

from knnbench import knn, pairwise, prepare
from knnbench.backends import get_backend, registry
from knnbench.kernels.cpu_tiles import tile_kernels

from ..conftest import as_parameter, available
from ._answers import assert_neighbors, assert_pairwise, rows, skip_unclaimed, space_of, timed

K = 3
BLOCK = (32, 1000, 64)
TINY = (4, 50, 16)

# Loops in Python, pair by pair: such a block takes them up to seconds.
INTERPRETED = ("python", "notebook")
COMPILED = tuple(name for name in registry() if name not in INTERPRETED)

DTYPES = ("uint8", "float32")
KNN = [f"knn {metric} {dtype}" for metric in ("cityblock", "euclidean", "chebyshev", "cosine") for dtype in DTYPES]
TINY_KNN = [f"tiny knn {metric} {dtype}" for metric in ("cityblock", "euclidean") for dtype in DTYPES]
PAIRWISE = [case.replace("knn", "pairwise") for case in KNN]
TINY_PAIRWISE = [case.replace("knn", "pairwise") for case in TINY_KNN]


def over(names, cases):
    """Parametrise a test over backends, each of which may be absent, and cases."""
    backends = pytest.mark.parametrize("backend", [as_parameter(name) for name in names], indirect=True)
    return lambda test: backends(pytest.mark.parametrize("case", cases)(test))


def run_knn(benchmark, backend, case, shape):
    metric, dtype = case.split()[-2:]
    skip_unclaimed(backend, metric, dtype)
    queries, corpus = rows(dtype, *shape)
    prepared = prepare(corpus, metric, backend=backend)
    answer = timed(benchmark, lambda: knn(queries, prepared, K))
    assert answer.backend == backend
    assert_neighbors(answer, queries, corpus, K, metric, backend)


def run_pairwise(benchmark, backend, case, shape):
    metric, dtype = case.split()[-2:]
    skip_unclaimed(backend, metric, dtype)
    queries, corpus = rows(dtype, *shape)
    prepared = prepare(corpus, metric, backend=backend)
    assert_pairwise(timed(benchmark, lambda: pairwise(queries, prepared)), queries, corpus, metric, backend)


@over(COMPILED, KNN)
def test_knn(backend, benchmark, case):
    run_knn(benchmark, backend, case, BLOCK)


@over(INTERPRETED, TINY_KNN)
def test_tiny_knn(backend, benchmark, case):
    run_knn(benchmark, backend, case, TINY)


@over(COMPILED, PAIRWISE)
def test_pairwise(backend, benchmark, case):
    run_pairwise(benchmark, backend, case, BLOCK)


@over(INTERPRETED, TINY_PAIRWISE)
def test_tiny_pairwise(backend, benchmark, case):
    run_pairwise(benchmark, backend, case, TINY)


def tiles(case):
    """Return the kernels of a case, its rows, its space, the rows as the kernels take them, and a workspace."""
    _, metric, dtype = case.split()
    queries, corpus = rows(dtype, *BLOCK)
    space, backend = space_of(queries, metric), get_backend(available("numba"))
    inputs = [backend.prepare(part, space).rows for part in (queries, corpus)]
    kernels = tile_kernels(space)
    return kernels, (queries, corpus), space, inputs, kernels.workspace(len(queries), space.n_features)


@pytest.mark.parametrize("case", KNN)
def test_tiles_knn(benchmark, case):
    kernels, (queries, corpus), space, inputs, workspace = tiles(case)
    values, indices = np.empty((len(queries), K), space.ranked), np.empty((len(queries), K), np.int64)

    def search():
        lists = kernels.lists(len(queries), K, len(corpus))
        kernels.knn(*inputs, 0, len(corpus), *workspace, K, *lists)
        kernels.order(*inputs, workspace.values, K, *lists, values, indices)

    timed(benchmark, search)
    assert_neighbors((space.finish(values), indices), queries, corpus, K, space.metric.name, "numba")


@pytest.mark.parametrize("case", PAIRWISE)
def test_tiles_pairwise(benchmark, case):
    kernels, (queries, corpus), space, inputs, workspace = tiles(case)
    values = np.empty((len(queries), len(corpus)), space.ranked)
    timed(benchmark, lambda: kernels.pairwise(*inputs, 0, len(corpus), *workspace, values))
    assert_pairwise(space.finish(values), queries, corpus, space.metric.name, "numba")
