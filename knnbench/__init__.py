"""Exact distance kernels and brute-force k-nearest neighbours, on interchangeable backends.

>>> import knnbench
>>> distances, indices = knnbench.knn([[0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]], k=1, backend="numpy")
>>> indices
array([[0]])
"""

from .api import Neighbors, Prepared, knn, pairwise, prepare
from .backends import Status, backends
from .errors import (
    BackendUnavailableError,
    DatasetError,
    InvalidInputError,
    KnnbenchError,
    OverBudgetError,
    UnknownBackendError,
    UnsupportedError,
)
from .metrics import METRICS

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "BackendUnavailableError",
    "DatasetError",
    "InvalidInputError",
    "KnnbenchError",
    "Neighbors",
    "OverBudgetError",
    "Prepared",
    "Status",
    "UnknownBackendError",
    "UnsupportedError",
    "__version__",
    "backends",
    "knn",
    "pairwise",
    "prepare",
]
