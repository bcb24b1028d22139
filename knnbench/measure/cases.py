"""What is measured: an operation on a data set, with everything that its time depends on but the backend."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knnbench import datasets
from knnbench.dtypes import Array
from knnbench.results import OPS, RANDOM_SEARCH, case_name

__all__ = ["OPS", "Case", "load_rows", "make_cases"]

# What the random search lowers stands where other operations have their metric.
LOSS = "cross-entropy"

# At the most, where no number is given.
MOST_QUERIES = 10_000
MOST_ITERATIONS = 1_000


@dataclass(frozen=True, slots=True)
class Case:
    """One case, for every backend.

    Attributes
    ----------
    op : str
        One of `OPS`.
    metric : str
        Canonical name.
    dataset, options : str, dict
        For `knnbench.datasets.load`; ``"synthetic:KIND"`` is that kind of synthetic data.
    dtype : str
        Rows are converted to it.
    k : int or None
        None where the operation has none.
    n_queries, n_corpus, n_features : int
        Slower backends are measured on fewer rows, to stay within the time. The queries of a random search are its
        iterations, and its corpus the training samples.
    """

    op: str
    metric: str
    dataset: str
    dtype: str
    k: int | None
    n_queries: int
    n_corpus: int
    n_features: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the case, as in `knnbench.results.Record.case`."""
        return case_name(
            self.op, self.metric, self.dataset, self.dtype, (self.n_queries, self.n_corpus, self.n_features), self.k
        )

    def load(self) -> tuple[Array, Array]:
        """Return the queries and the corpus."""
        queries, corpus = load_rows(self.dataset, self.options, self.dtype)
        return queries[: self.n_queries], corpus

    def load_samples(self) -> tuple[Array, Array]:
        """Return the training samples, and the numbers of their classes from 0 on."""
        data = _load(self.dataset, self.options, self.dtype)
        return data.X_train.astype(self.dtype, copy=False), np.unique(data.y_train, return_inverse=True)[1]


def load_rows(dataset: str, options: dict[str, Any], dtype: str) -> tuple[Array, Array]:
    """Return the queries and the corpus of a data set, its test and its training rows, as `dtype` or as they are."""
    data = _load(dataset, options, dtype)
    if not dtype:
        return data.X_test, data.X_train
    return data.X_test.astype(dtype), data.X_train.astype(dtype)


def _load(dataset: str, options: dict[str, Any], dtype: str) -> datasets.Dataset:
    name, _, kind = dataset.partition(":")
    if kind:  # which values break a kernel depends on their dtype
        options = {"kind": kind, "dtype": dtype or "float32", **options}
    return datasets.load(name, **options)


def make_cases(
    dataset: str,
    metrics: Sequence[str],
    *,
    ops: Sequence[str] = ("knn",),
    dtypes: Sequence[str] = ("",),
    k: int = 3,
    n_queries: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[Case]:
    """Return every case of some operations, metrics and dtypes on one data set.

    Parameters
    ----------
    dataset : str
    metrics, ops, dtypes : sequence of str
        A dtype of ``""`` is the data's own. The random search has no metric.
    k : int
        Neighbours, where the operation has them.
    n_queries : int, optional
        Queries at the most, or iterations; default 10,000 and 1,000.
    options : dict, optional
        Of `knnbench.datasets.load`.

    Examples
    --------
    >>> [case.name for case in make_cases("digits", ["cosine"], ops=["knn", "pairwise"], n_queries=100)]
    ['knn/cosine/digits/uint8/100x1438x64/k3', 'pairwise/cosine/digits/uint8/100x1438x64']
    """
    queries, corpus = load_rows(dataset, options or {}, "")
    (n_test, n_features), n_corpus = queries.shape, len(corpus)
    counts = dict.fromkeys(OPS, min(n_queries or MOST_QUERIES, n_test))
    counts[RANDOM_SEARCH] = n_queries or MOST_ITERATIONS
    return [
        Case(
            op=op,
            metric=metric,
            dataset=dataset,
            dtype=dtype or str(corpus.dtype),
            k=k if op == "knn" else None,
            n_queries=counts[op],
            n_corpus=n_corpus,
            n_features=n_features,
            options=options or {},
        )
        for op in ops
        for dtype in dtypes
        for metric in ([LOSS] if op == RANDOM_SEARCH else metrics)
    ]
