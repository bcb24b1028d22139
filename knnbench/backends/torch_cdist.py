"""PyTorch as its users write it: ``torch.cdist``, then ``topk``; for a linear model a product and ``cross_entropy``."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from knnbench.dtypes import Array
from knnbench.metrics import Space

from .base import Capabilities, Native, PeerSearch
from .linear import LinearLoss
from .torch import TorchArrays

__all__ = ["TorchCdistBackend", "TorchCdistCudaBackend"]

# The p of torch.cdist.
ORDERS = {"euclidean": 2.0, "cityblock": 1.0, "chebyshev": math.inf}


class TorchCdist(TorchArrays, PeerSearch):
    """All distances of a block of queries, under torch's own switches as they are found."""

    def prepare(self, corpus: Native, space: Space) -> Native:
        """Return the rows as floats, the only dtypes that ``cdist`` takes."""
        return as_floats(corpus)

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count a query's distances, and for the matrix product of the Euclidean distance a copy of both sides."""
        size = max(4, space.dtype.itemsize)
        copied = (space.n_features + 2) * size if space.metric.name == "euclidean" else 0
        return n_corpus * size + space.n_features * size + copied + 4 * k * (size + 8), n_corpus * copied

    def distances(self, queries: Native, prepared: Native, space: Space) -> Native:
        """Return what ``cdist`` gives."""
        return torch.cdist(as_floats(queries), prepared, p=ORDERS[space.metric.name])

    def neighbors(self, queries: Native, prepared: Native, k: int, space: Space) -> tuple[Native, Native]:
        """Return what ``topk`` chooses."""
        values, indices = self.distances(queries, prepared, space).topk(k, dim=1, largest=False)
        return values, indices

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return losses by one product over all samples, held as floats."""
        return FullBatchLoss(self, X, y, sample_weight, dtype)

    def empty_rows(self, n_rows: int, like: Native) -> Native:
        """Return a tensor."""
        return like.new_empty((n_rows, *like.shape[1:]))


class FullBatchLoss(LinearLoss):
    """A model at a time, over all samples at once.

    Parameters
    ----------
    backend : TorchCdist
    X, y, sample_weight, dtype
        As of `Backend.linear_loss`.
    """

    def __init__(self, backend: TorchCdist, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._backend, self._dtype = backend, dtype
        self._X = backend.to_native(X, X.dtype).to(getattr(torch, dtype.name))
        self._labels, self._weight = (backend.to_native(array, array.dtype) for array in (y, sample_weight))

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        with torch.inference_mode():
            losses = [
                self._loss(*(self._backend.to_native(a, self._dtype) for a in model))
                for model in zip(W, b, strict=True)
            ]
        return np.where(np.array(losses) <= limit, losses, math.inf)

    def _loss(self, W: Native, b: Native) -> float:
        return float(cross_entropy(self._X @ W + b, self._labels, reduction="none").to(torch.float64) @ self._weight)


class TorchCdistBackend(TorchCdist):
    """On the CPU."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu", metrics=frozenset(ORDERS), total_order=False, exact_integers=False
    )


class TorchCdistCudaBackend(TorchCdist):
    """On the current CUDA device."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cuda", metrics=frozenset(ORDERS), total_order=False, exact_integers=False
    )


def as_floats(rows: Native) -> Native:
    """Return uint8 rows as float32, floats as they are."""
    return rows if rows.is_floating_point() else rows.to(torch.float32)
