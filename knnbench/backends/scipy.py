"""SciPy: ``scipy.spatial.distance.cdist``, then the k smallest by numpy."""

from typing import ClassVar

import numpy as np
from scipy.spatial.distance import cdist

from knnbench.dtypes import Array
from knnbench.metrics import Space

from .base import Capabilities, HostPeer, Native, float_operations

__all__ = ["ScipyBackend"]


class ScipyBackend(HostPeer):
    """All distances of a block of queries in float64, on one thread; SciPy itself has no exhaustive search."""

    # The canonical names of the metrics are SciPy's.
    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu",
        metrics=frozenset({"euclidean", "sqeuclidean", "cityblock", "chebyshev", "cosine"}),
        total_order=False,
        exact_integers=False,
    )

    def prepare(self, corpus: Native, space: Space) -> Array:
        """Return the rows in float64, to which ``cdist`` would convert them in every call."""
        return np.asarray(corpus, np.float64)

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count a query in float64, its distances and their partition."""
        return 8 * space.n_features + n_corpus * (8 + 8) + 5 * k * (8 + 8), 0

    def distances(self, queries: Native, prepared: Array, space: Space) -> Native:
        """Return what ``cdist`` gives."""
        return cdist(queries, prepared, space.metric.name)

    def neighbors(self, queries: Native, prepared: Array, k: int, space: Space) -> tuple[Native, Native]:
        """Return the k smallest of all distances, sorted."""
        values = self.distances(queries, prepared, space)
        nearest = np.argpartition(values, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(values, nearest, axis=1), axis=1)
        indices = np.take_along_axis(nearest, order, axis=1)
        return np.take_along_axis(values, indices, axis=1), indices.astype(np.int64, copy=False)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the direct form in float64, and for cosine of a dot product."""
        return float_operations("cpu", space, product=space.metric.unit_rows, dtype="float64")
