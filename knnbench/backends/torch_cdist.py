"""PyTorch as its users write it: ``torch.cdist``, then ``topk``."""

import math
from typing import ClassVar

import torch

from knnbench.metrics import Space

from .base import Capabilities, Native, PeerSearch
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

    def empty_rows(self, n_rows: int, like: Native) -> Native:
        """Return a tensor."""
        return like.new_empty((n_rows, *like.shape[1:]))


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
