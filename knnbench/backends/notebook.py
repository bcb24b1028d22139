"""The homework that this project grew out of: one numpy expression for each pair of rows, a loop over a DataLoader."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from knnbench.dtypes import Array
from knnbench.metrics import Space

from .base import Capabilities, HostPeer, Native
from .linear import LinearLoss

__all__ = ["BATCH", "NotebookBackend"]

BATCH = 256
"""Samples of a batch of its linear classifier."""


def l1(a: Array, b: Array) -> Any:
    """Return the sum of absolute differences."""
    return np.sum(np.abs(a - b))


def l2(a: Array, b: Array) -> Any:
    """Return the square root of the sum of squared differences."""
    return np.sqrt(np.sum((a - b) ** 2))


DISTANCES: dict[str, Callable[[Array, Array], Any]] = {"cityblock": l1, "euclidean": l2}


class NotebookBackend(HostPeer):
    """A Python loop over the corpus for each query, then a full sort.

    Notes
    -----
    In float32, as the images there were held; so uint8 is converted, and float64 is not claimed.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu",
        metrics=frozenset(DISTANCES),
        dtypes=frozenset({"uint8", "float32"}),
        total_order=False,
        exact_integers=False,
    )

    def prepare(self, corpus: Native, space: Space) -> Array:
        """Return the rows in float32."""
        return np.asarray(corpus, np.float32)

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count the distances of a query, and their order with the work space of its sort."""
        return n_corpus * (4 + 8 + 8) + k * (4 + 8) + space.n_features * 4, 0

    def distances(self, queries: Native, prepared: Array, space: Space) -> Native:
        """Return the distances, pair after pair."""
        distance = DISTANCES[space.metric.name]
        result = np.empty((len(queries), len(prepared)), np.float32)
        for i, query in enumerate(queries.astype(np.float32, copy=False)):
            for j, row in enumerate(prepared):
                result[i, j] = distance(query, row)
        return result

    def neighbors(self, queries: Native, prepared: Array, k: int, space: Space) -> tuple[Native, Native]:
        """Return the first k of the sorted distances."""
        values = self.distances(queries, prepared, space)
        order = np.argsort(values, axis=1)[:, :k]
        return np.take_along_axis(values, order, axis=1), order.astype(np.int64, copy=False)

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return losses by shuffled batches, or raise ImportError without torch, which the search of rows needs not."""
        return BatchedLoss(X, y, sample_weight, dtype)


class BatchedLoss(LinearLoss):
    """A model at a time, a batch at a time, from a loader that collects the samples of each batch one by one.

    Batches count by their samples: the notebook's last one, of 96, counted as much as the others.

    Parameters
    ----------
    X, y, sample_weight, dtype
        As of `Backend.linear_loss`.
    """

    def __init__(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        super().__init__()
        self._torch = torch
        samples = TensorDataset(*(torch.from_numpy(array) for array in (X.astype(dtype), y, sample_weight)))
        self._loader = DataLoader(samples, batch_size=BATCH, shuffle=True)

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        with self._torch.inference_mode():
            models = zip(map(self._torch.from_numpy, W), map(self._torch.from_numpy, b), strict=True)
            losses = [self._loss(*model) for model in models]
        return np.where(np.array(losses) <= limit, losses, math.inf)

    def _loss(self, W: Any, b: Any) -> float:
        total, cross_entropy = 0.0, self._torch.nn.functional.cross_entropy
        for X, y, weight in self._loader:
            total += (cross_entropy(X @ W + b, y, reduction="none") * weight).sum().item()
        return total
