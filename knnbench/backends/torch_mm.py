"""PyTorch's fastest idiom for Euclidean distances: norms and one matrix product, then ``topk``.

On a GPU this, and not ``torch.cdist``, is what a search has to beat: faiss#3621 and cuvs#277 report that it beat their
libraries. Its squares cancel as those of every Gram form: nothing is centred, and nothing computed once more.
"""

from typing import ClassVar

import torch

from knnbench.metrics import Space

from .base import Capabilities, Native, PeerSearch
from .torch import TorchArrays
from .torch_cdist import as_floats

__all__ = ["TorchMmBackend", "TorchMmCudaBackend"]

METRICS = frozenset({"euclidean", "sqeuclidean"})


class TorchMm(TorchArrays, PeerSearch):
    """All distances of a block of queries, under torch's own switches as they are found."""

    def prepare(self, corpus: Native, space: Space) -> Native:
        """Return the rows as floats."""
        return as_floats(corpus)

    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Count a query's squares with what ``topk`` may take of them, and the norms of the corpus with its squares."""
        size = max(4, space.dtype.itemsize)
        return 2 * n_corpus * size + 2 * space.n_features * size + 4 * k * (
            size + 8
        ), n_corpus * space.n_features * size

    def distances(self, queries: Native, prepared: Native, space: Space) -> Native:
        """Return roots of what `squares` gives, or these."""
        return finished(self.squares(queries, prepared), space)

    def neighbors(self, queries: Native, prepared: Native, k: int, space: Space) -> tuple[Native, Native]:
        """Return what ``topk`` chooses; only its roots are taken."""
        values, indices = self.squares(queries, prepared).topk(k, dim=1, largest=False)
        return finished(values, space), indices

    def squares(self, queries: Native, prepared: Native) -> Native:
        """Return ``|q|^2 + |c|^2 - 2 q.c``, of which rounding can make some negative."""
        rows = as_floats(queries)
        norms = prepared.square().sum(dim=1)
        return torch.addmm(norms, rows, prepared.T, alpha=-2).add_(rows.square().sum(dim=1, keepdim=True))

    def empty_rows(self, n_rows: int, like: Native) -> Native:
        """Return a tensor."""
        return like.new_empty((n_rows, *like.shape[1:]))


class TorchMmBackend(TorchMm):
    """On the CPU."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cpu", metrics=METRICS, total_order=False, exact_integers=False
    )


class TorchMmCudaBackend(TorchMm):
    """On the current CUDA device."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        device="cuda", metrics=METRICS, total_order=False, exact_integers=False
    )


def finished(squares: Native, space: Space) -> Native:
    """Return the distances of squares, in place."""
    squares.clamp_(min=0)
    return squares.sqrt_() if space.metric.name == "euclidean" else squares
