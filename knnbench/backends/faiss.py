"""Faiss on the CPU: ``faiss.knn`` and ``faiss.pairwise_distances``, without an index."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from knnbench.dtypes import Array
from knnbench.metrics import Space

from .base import Capabilities, HostPeer, Native

with warnings.catch_warnings():
    # Of types that SWIG makes, on import under Python 3.12 and later.
    warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
    import faiss

__all__ = ["FaissBackend"]

# Rows of the block of products that faiss holds; its own settings, read when it computes.
QUERY_BLOCK = 4096
CORPUS_BLOCK = 1024


def unchanged(rows: Array) -> Array:
    """Return the rows themselves."""
    return rows


def unit_rows(rows: Array) -> Array:
    """Return a copy of the rows with unit length, by faiss's own means."""
    rows = rows.copy()
    faiss.normalize_L2(rows)
    return rows


def roots(squares: Array) -> Array:
    """Return the roots in place. faiss clamps at 0 what its search returns, but not all distances."""
    return np.sqrt(np.maximum(squares, 0, out=squares), out=squares)


def one_minus(cosines: Array) -> Array:
    """Return the distances of cosines, in place."""
    return np.subtract(1, cosines, out=cosines)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How faiss computes a metric: what rows are given as, its own metric, and what its values become."""

    metric: int
    given: Callable[[Array], Array] = unchanged
    finish: Callable[[Array], Array] = unchanged


RECIPES = {
    "euclidean": Recipe(faiss.METRIC_L2, finish=roots),
    "sqeuclidean": Recipe(faiss.METRIC_L2),
    "cityblock": Recipe(faiss.METRIC_L1),
    "chebyshev": Recipe(faiss.METRIC_Linf),
    # As its documentation tells users: the inner product of normalised rows.
    "cosine": Recipe(faiss.METRIC_INNER_PRODUCT, given=unit_rows, finish=one_minus),
}


class FaissBackend(HostPeer):
    """Faiss computes in float32 alone: uint8 is converted, and float64 is not claimed."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu",
        metrics=frozenset(RECIPES),
        dtypes=frozenset({"uint8", "float32"}),
        total_order=False,
        exact_integers=False,
    )

    def prepare(self, corpus: Native, space: Space) -> Array:
        """Return the rows in float32, for cosine normalised."""
        return RECIPES[space.metric.name].given(np.asarray(corpus, np.float32))

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count a query in float32 and its lists, which are longer while they fill, and the block of products."""
        products = 4 * min(n_queries, QUERY_BLOCK) * min(n_corpus, CORPUS_BLOCK)
        return 2 * 4 * space.n_features + 3 * 12 * k + 4, products + 4 * n_corpus

    def distances(self, queries: Native, prepared: Array, space: Space) -> Native:
        """Return what ``faiss.pairwise_distances`` gives, finished."""
        recipe = RECIPES[space.metric.name]
        given = recipe.given(np.asarray(queries, np.float32))
        return recipe.finish(faiss.pairwise_distances(given, prepared, recipe.metric))

    def neighbors(self, queries: Native, prepared: Array, k: int, space: Space) -> tuple[Native, Native]:
        """Return what ``faiss.knn`` finds, finished."""
        recipe = RECIPES[space.metric.name]
        values, indices = faiss.knn(recipe.given(np.asarray(queries, np.float32)), prepared, k, recipe.metric)
        return recipe.finish(values), indices
