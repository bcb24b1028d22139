"""scikit-learn: ``NearestNeighbors(algorithm="brute")``, and ``pairwise_distances``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from knnbench.dtypes import Array
from knnbench.metrics import Space
from knnbench.threads import available_cpus

from .base import Capabilities, HostPeer, Native

__all__ = ["SklearnBackend"]

# Metrics that its search computes and selects in chunks of this many rows; for others it holds all distances.
REDUCED = frozenset({"euclidean", "sqeuclidean", "cityblock", "chebyshev"})
CHUNK = 256


@dataclass(frozen=True, slots=True)
class SklearnCorpus:
    """The rows, and the search that was fitted to them."""

    rows: Array
    search: Any

    def __len__(self) -> int:
        return len(self.rows)


class SklearnBackend(HostPeer):
    """The exhaustive search that scikit-learn's own estimators run.

    Notes
    -----
    float32 is its fastest dtype, into which uint8 is converted. ``working_memory`` is left alone: blocks of
    queries that fit the budget leave nothing for scikit-learn to split. For cityblock and chebyshev its
    ``pairwise_distances`` copies both sides to float64 in every call.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu",
        metrics=REDUCED | {"cosine"},
        total_order=False,
        exact_integers=False,
    )

    def prepare(self, corpus: Native, space: Space) -> SklearnCorpus:
        """Fit the search."""
        rows = taken(corpus, space)
        return SklearnCorpus(rows, NearestNeighbors(algorithm="brute", metric=space.metric.name).fit(rows))

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count the chunks of its threads; for cosine all distances, their copy and partition, and a unit corpus."""
        size = 8 if space.dtype == np.float64 else 4
        row, lists = space.n_features * size, 16 * k
        if space.metric.name not in REDUCED:
            return n_corpus * (2 * size + 8) + 2 * row + 4 * lists, n_corpus * row
        queries, corpus = min(n_queries, CHUNK), min(n_corpus, CHUNK)
        chunks = 8 * queries * corpus + 2 * CHUNK * 8 * space.n_features + queries * lists
        return row + 2 * lists + 8, available_cpus() * chunks + 8 * n_corpus

    def distances(self, queries: Native, prepared: SklearnCorpus, space: Space) -> Native:
        """Return what ``pairwise_distances`` gives."""
        return pairwise_distances(taken(queries, space), prepared.rows, metric=space.metric.name)

    def neighbors(self, queries: Native, prepared: SklearnCorpus, k: int, space: Space) -> tuple[Native, Native]:
        """Return what the search finds; it hands out in float64 what it computed in float32."""
        values, indices = prepared.search.kneighbors(taken(queries, space), n_neighbors=k)
        return values.astype(prepared.rows.dtype, copy=False), indices.astype(np.int64, copy=False)


def taken(rows: Array, space: Space) -> Array:
    """Return rows in the dtype that scikit-learn is given."""
    return rows.astype(np.float32) if space.is_integer else rows
