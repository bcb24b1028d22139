"""NumPy: matrix products where a metric has a Gram form, otherwise one feature of many pairs at a time."""

from typing import Any, ClassVar

import numpy as np

from knnbench.blocking import slices
from knnbench.metrics import Space

from .base import Capabilities, HostBackend, Native
from .blockwise import BlockwiseBackend

__all__ = ["NumpyBackend"]

# Queries of a tile of the direct form: with 4,096 corpus rows its three arrays stay in the second-level cache.
TILE_QUERIES = 8


class NumpyBackend(HostBackend, BlockwiseBackend):
    """The blockwise search on numpy arrays."""

    capabilities: ClassVar[Capabilities] = Capabilities(device="cpu", certifies=True)

    @property
    def xp(self) -> Any:
        """numpy itself."""
        return np

    def direct_block(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the accumulated values of all pairs, a feature at a time."""
        step = space.form.step
        assert step is not None
        result = np.zeros((len(queries), len(corpus)), space.accumulator)
        # Transposed, so that a feature of all rows lies together.
        a = np.ascontiguousarray(queries.T, dtype=space.accumulator)
        b = np.ascontiguousarray(corpus.T, dtype=space.accumulator)
        difference = np.empty((TILE_QUERIES, len(corpus)), space.accumulator)
        for rows in slices(len(queries), TILE_QUERIES):
            tile = difference[: rows.stop - rows.start]
            for feature in range(space.n_features):
                np.subtract(a[feature, rows, None], b[feature], out=tile)
                step(np, result[rows], tile)
        return result

    def _pairs(self, queries: Native, corpus: Native, i: Native, j: Native, space: Space, elements: int) -> Native:
        step = space.form.step
        assert step is not None
        result = np.zeros(len(i), space.accumulator)
        for part in slices(len(i), max(1, elements // space.n_features)):
            difference = queries[i[part]] - corpus[j[part]]
            for feature in range(space.n_features):
                step(np, result[part], difference[:, feature])
        return result
