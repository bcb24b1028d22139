"""Naive loops over `knnbench.metrics`: the executable definition of every answer, and the tests' oracle."""

from typing import Any, ClassVar

import numpy as np

from knnbench.dtypes import Array
from knnbench.metrics import Space

from .base import Capabilities, HostBackend, Native

__all__ = ["PythonBackend"]


class PythonBackend(HostBackend):
    """One pair after the other, in Python's own integers and floats.

    A sum of floats is rounded once (`math.fsum`), so that on float64 the answer is as good as that dtype
    can give it: this is the reference that errors are measured against.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(device="cpu", certifies=True)

    def prepare(self, corpus: Native, space: Space) -> Any:
        """Return the prepared rows."""
        return prepared_rows(corpus, space)

    def pairwise(self, queries: Native, prepared: Any, space: Space, budget: int) -> Native:
        """Return all distances."""
        result = np.empty((len(queries), len(prepared)), space.output)
        for i, query in enumerate(prepared_rows(queries, space)):
            result[i] = space.finish(ranked_values(query, prepared, space)[None])[0]
        return result

    def knn(self, queries: Native, prepared: Any, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the first k of the pairs (value, index), sorted."""
        values = np.empty((len(queries), k), space.ranked)
        indices = np.empty((len(queries), k), np.int64)
        for i, query in enumerate(prepared_rows(queries, space)):
            ranked = ranked_values(query, prepared, space).tolist()
            nearest = sorted(zip(ranked, range(len(ranked)), strict=True))[:k]
            values[i], indices[i] = zip(*nearest, strict=True)
        return values, indices


def prepared_rows(rows: Array, space: Space) -> Array:
    """Return float rows as the metric wants them, in float64."""
    return rows if space.is_integer else space.metric.prepare_rows(np, rows.astype(np.float64))


def ranked_values(query: Array, corpus: Array, space: Space) -> Array:
    """Return the value that each corpus row is ranked by, shape (n_corpus,)."""
    form = space.form
    a = query.tolist()
    values = []
    for row in corpus:
        b = row.tolist()
        acc = form.reduce(map(form.accumulate, [0] * len(a), a, b))
        norms = (sum(x * x for x in a), sum(x * x for x in b)) if form.rank_uses_norms else (0, 0)
        values.append(form.rank(acc, *norms))
    return np.array(values, space.ranked)
