"""Exact distance kernels and brute-force k-nearest neighbours, on interchangeable backends.

>>> import knnbench
>>> distances, indices = knnbench.knn([[0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]], k=1, backend="numpy")
>>> indices
array([[0]])
"""

from typing import TYPE_CHECKING, Any

from .api import Neighbors, Prepared, knn, pairwise, prepare
from .backends import Status
from .errors import (
    BackendUnavailableError,
    CheckpointError,
    DatasetError,
    InvalidInputError,
    KnnbenchError,
    MissingLibraryError,
    OverBudgetError,
    UnknownBackendError,
    UnsupportedError,
)
from .metrics import METRICS
from .selection.choice import Choice, fastest_backend

if TYPE_CHECKING:
    from .backends import backends
    from .classifiers import KNNClassifier, RandomSearchClassifier
else:
    from . import backends  # the package, which is called like its function

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "BackendUnavailableError",
    "CheckpointError",
    "Choice",
    "DatasetError",
    "InvalidInputError",
    "KNNClassifier",
    "KnnbenchError",
    "MissingLibraryError",
    "Neighbors",
    "OverBudgetError",
    "Prepared",
    "RandomSearchClassifier",
    "Status",
    "UnknownBackendError",
    "UnsupportedError",
    "__version__",
    "backends",
    "fastest_backend",
    "knn",
    "pairwise",
    "prepare",
]


def __getattr__(name: str) -> Any:
    # The classifiers load scikit-learn, which takes longer than all the rest together.
    if name in ("KNNClassifier", "RandomSearchClassifier"):
        from . import classifiers

        return getattr(classifiers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
