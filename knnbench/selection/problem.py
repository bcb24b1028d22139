"""A computation whose fastest backend is asked for."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from knnbench.metrics import Space, get_metric

__all__ = ["GROUP", "OPS", "Problem"]

OPS = ("knn", "pairwise")

# What a cost is known for, beside the backend. Sizes are what it is predicted from.
GROUP = ("op", "metric", "dtype", "data_on", "accuracy")


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes and kind of a computation.

    Attributes
    ----------
    op : {"knn", "pairwise"}
    n_queries, n_corpus, n_features : int
    k : int
        0 for ``"pairwise"``.
    metric : str
        Canonical name.
    dtype : {"uint8", "float32", "float64"}
    data_on : {"host", "device"}
    accuracy : {"fast", "exact"}
    """

    op: str
    n_queries: int
    n_corpus: int
    n_features: int
    k: int
    metric: str
    dtype: str
    data_on: str = "host"
    accuracy: Literal["fast", "exact"] = "fast"

    @property
    def space(self) -> Space:
        """The metric on rows of this dtype and length."""
        return Space(get_metric(self.metric), np.dtype(self.dtype), self.n_features)

    @property
    def group(self) -> tuple[str, ...]:
        """The values of `GROUP`; a squared distance costs what its root does, and exact integers what fast ones do."""
        metric = "euclidean" if self.metric == "sqeuclidean" else self.metric
        return self.op, metric, self.dtype, self.data_on, "exact" if self.is_proved else "fast"

    @property
    def is_proved(self) -> bool:
        """Whether the neighbours are proved after a fast search: those of floats, where exact ones are asked for."""
        return self.accuracy == "exact" and self.op == "knn" and self.dtype != "uint8"

    @property
    def work(self) -> int:
        """Features of all pairs."""
        return self.n_queries * self.n_corpus * self.n_features

    def __str__(self) -> str:
        k = f", k={self.k}" if self.k else ""
        exact = ", exact" if self.is_proved else ""
        shape = f"{self.n_queries:,} x {self.n_corpus:,} x {self.n_features:,}"
        return f"{self.op} {self.metric} {self.dtype}, {shape}{k}{exact}"
