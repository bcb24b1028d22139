"""What knnbench raises.

::

    KnnbenchError
    ├── UnknownBackendError      (ValueError)    no backend of that name is registered
    ├── BackendUnavailableError  (RuntimeError)  registered, but it cannot compute here
    ├── UnsupportedError         (ValueError)    this backend lacks this metric, dtype, k or accuracy
    ├── InvalidInputError        (ValueError)    the arguments break a rule of the interface
    ├── OverBudgetError          (MemoryError)   the memory allowed, or left, cannot hold the answer
    ├── CheckpointError          (RuntimeError)  a checkpoint is damaged, of another job or cannot be written
    ├── DatasetError             (RuntimeError)  a data set is absent, damaged or could not be fetched
    └── MissingLibraryError      (ImportError)   what was asked for needs an optional library that is not installed

Every text gives the value, what was expected and what to do about it.
"""

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "DatasetError",
    "InvalidInputError",
    "KnnbenchError",
    "MissingLibraryError",
    "OverBudgetError",
    "UnknownBackendError",
    "UnsupportedError",
]


class KnnbenchError(Exception):
    """Base of all errors that knnbench raises on purpose."""


class UnknownBackendError(KnnbenchError, ValueError):
    """No backend of that name is registered."""


class BackendUnavailableError(KnnbenchError, RuntimeError):
    """The backend is registered, but its library or device does not work here."""


class UnsupportedError(KnnbenchError, ValueError):
    """The backend lacks this metric, dtype, k or accuracy."""


class InvalidInputError(KnnbenchError, ValueError):
    """The arguments break a rule of the interface."""


class OverBudgetError(KnnbenchError, MemoryError):
    """The memory allowed by the budget, or left on the machine, cannot hold the computation."""


class CheckpointError(KnnbenchError, RuntimeError):
    """A checkpoint is damaged, of another job, or cannot be written."""


class DatasetError(KnnbenchError, RuntimeError):
    """A data set is absent, damaged or could not be fetched."""


class MissingLibraryError(KnnbenchError, ImportError):
    """What was asked for needs an optional library that is not installed."""
