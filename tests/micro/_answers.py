"""What every benchmark's answer must be, by the definition of its metric and a full sort."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from knnbench.backends import backend_status, registry
from knnbench.dtypes import Array
from knnbench.metrics import METRICS, Space

from .._checks import (
    assert_distances_close,
    assert_identical,
    assert_same_neighbors,
    assert_well_formed,
    tolerance,
)

# In float64, which holds what uint8 gives exactly.
DEFINITIONS: dict[str, Callable[[Array, Array], Array]] = {
    "cityblock": lambda q, c: np.abs(q - c).sum(axis=-1),
    "euclidean": lambda q, c: np.sqrt(((q - c) ** 2).sum(axis=-1)),
    "chebyshev": lambda q, c: np.abs(q - c).max(axis=-1),
    "cosine": lambda q, c: 1 - (q * c).sum(axis=-1) / np.sqrt((q * q).sum(axis=-1) * (c * c).sum(axis=-1)),
}


def timed(benchmark: Any, call: Callable[[], Any]) -> Any:
    """Return the answer of the last of the timed calls, the first having compiled before them."""
    if benchmark.enabled:
        call()
    return benchmark(call)


def rows(dtype: str, n_queries: int, n_corpus: int, n_features: int) -> tuple[Array, Array]:
    """Return queries and a corpus whose every row comes twice, so that an odd k must part two equal ones."""
    rng = np.random.default_rng([n_queries, n_corpus, n_features])
    shape = (n_queries + n_corpus // 2, n_features)
    values = (rng.integers(0, 256, shape) if dtype == "uint8" else rng.normal(size=shape)).astype(dtype)
    return values[:n_queries], np.concatenate([values[n_queries:]] * 2)


def skip_unclaimed(backend: str, metric: str, dtype: str) -> None:
    capabilities = backend_status(backend).capabilities
    if metric not in capabilities.metrics or dtype not in capabilities.dtypes:
        pytest.skip(f"{backend} does not claim {metric} on {dtype}")


def true_distances(queries: Array, corpus: Array, metric: str) -> Array:
    wide = queries.astype(np.float64)[:, None, :], corpus.astype(np.float64)[None, :, :]
    return DEFINITIONS[metric](*wide)


def assert_pairwise(got: Array, queries: Array, corpus: Array, metric: str, backend: str) -> None:
    reference = true_distances(queries, corpus, metric)
    space = space_of(queries, metric)
    if registry()[backend].peer:
        assert_distances_close(got, reference, peer_tolerance(space, queries, corpus, reference, got))
    elif space.is_integer:
        assert_identical(got, np.maximum(reference, 0).astype(space.output))
    else:
        assert_well_formed(got, reference.shape, space.output)
        assert_distances_close(got, reference, tolerance(space, queries, corpus, reference, "pairwise"))


def assert_neighbors(
    got: tuple[Array, Array], queries: Array, corpus: Array, k: int, metric: str, backend: str
) -> None:
    distances, indices = got
    reference = true_distances(queries, corpus, metric)
    space = space_of(queries, metric)
    if registry()[backend].peer:
        allowed = peer_tolerance(space, queries, corpus, reference, distances)
        assert_same_neighbors(distances, indices, reference, k, allowed, allowed)
    elif space.is_integer:
        nearest = np.argsort(reference, axis=1, kind="stable")[:, :k]
        expected = np.maximum(np.take_along_axis(reference, nearest, axis=1), 0)
        assert_identical(indices, nearest)
        assert_identical(distances, expected.astype(space.output))
    else:
        assert_well_formed(distances, (len(queries), k), space.output)
        direct = tolerance(space, queries, corpus, reference, "direct")
        chosen = tolerance(space, queries, corpus, reference, "knn", k=k)
        assert_same_neighbors(distances, indices, reference, k, direct, chosen)


def space_of(queries: Array, metric: str) -> Space:
    return Space(METRICS[metric], queries.dtype, queries.shape[1])


def peer_tolerance(space: Space, queries: Array, corpus: Array, reference: Array, got: Array) -> Array:
    """Return the tolerance of a peer, which may compute uint8 in float32 or in what it answers in."""
    floats = Space(space.metric, np.dtype(np.float32), space.n_features) if space.is_integer else space
    computed = got.dtype if got.dtype.kind == "f" else np.dtype(np.float32)
    return tolerance(floats, queries, corpus, reference, "peer", dtype=computed)
