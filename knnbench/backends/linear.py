"""Losses of linear models, which the random search asks for: what they are, and how numpy and modules like it do."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from knnbench.blocking import slices
from knnbench.dtypes import Array

__all__ = ["DEVICE_ELEMENTS", "HOST_ELEMENTS", "ArrayLoss", "ChunkedLoss", "LinearLoss"]

# Elements of X widened together: the product of a few hundred rows takes longer to hand to the threads of a BLAS than
# to compute (0.06 s for MNIST, against 1.4 s in chunks sixteen times smaller, on two busy cores). A device has more to
# fill, and each chunk ends in a sum that the host waits for.
HOST_ELEMENTS = 1 << 22
DEVICE_ELEMENTS = 1 << 26


class LinearLoss(ABC):
    """The summed cross-entropy of linear models over the samples it was made for.

    Attributes
    ----------
    operations : Counter of str
        What has been done so far, by the names of `knnbench.measure.ceilings`; empty where that is not told.
    pass_cost : float
        What a call costs beyond its models, in models.
    spares_host : bool
        Whether the host's threads are free while it computes.
    """

    pass_cost = 0.4  # numba's on MNIST
    spares_host = False

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()

    @abstractmethod
    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model.

        Parameters
        ----------
        W : (n_models, n_features, n_classes) array
            Of the dtype that the function was made for.
        b : (n_models, n_classes) array
            Of the same dtype.
        limit : float
            A model whose loss is above it need not be computed to the end.

        Returns
        -------
        (n_models,) array of float64
            Infinite for a loss above the limit, or not finite. Otherwise that of a model is the same, to the bit,
            whatever models are computed with it.
        """


class ChunkedLoss(LinearLoss):
    """Losses by a library's matrix product.

    Samples are taken in chunks, so X is never widened as a whole, and a chunk is multiplied by one model at a time: a
    BLAS may round a product with other numbers of columns otherwise.

    Parameters
    ----------
    shape : tuple of int
        Of X.
    elements : int
        Of a chunk.
    probe : str
        Of `knnbench.measure.ceilings`, for the product.
    """

    def __init__(self, shape: tuple[int, ...], elements: int, probe: str) -> None:
        super().__init__()
        self._chunks, self._probe = list(slices(shape[0], max(1, elements // shape[1]))), probe

    @abstractmethod
    def settings(self) -> AbstractContextManager[Any]:
        """Return what holds the library's switches during a call."""

    @abstractmethod
    def models(self, W: Array, b: Array) -> list[tuple[Any, Any]]:
        """Return the weights, and the intercepts in float64, of each model as native arrays."""

    @abstractmethod
    def widened(self, rows: slice) -> Any:
        """Return some samples in the dtype of the weights."""

    @abstractmethod
    def loss(self, samples: Any, rows: slice, W: Any, b: Any) -> float:
        """Return the summed loss of a model over some samples, which are given widened."""

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        totals = np.zeros(len(W))
        with self.settings():
            models = self.models(W, b)
            for rows in self._chunks:
                samples = self.widened(rows)
                # Rounding is monotone: a sum that is above the limit stays there.
                for m in np.flatnonzero(totals <= limit):
                    totals[m] += self.loss(samples, rows, *models[m])
                    self.operations[self._probe] += (rows.stop - rows.start) * W[m].size
        return np.where(totals <= limit, totals, math.inf)


class ArrayLoss(ChunkedLoss):
    """Losses on arrays of numpy, or of a module like it.

    Parameters
    ----------
    xp : module
    X, labels, sample_weight : (n, n_features), (n,) and (n,) arrays of `xp`
    dtype : numpy.dtype
        Of the weights.
    elements, probe
        As of `ChunkedLoss`.
    """

    def __init__(
        self, xp: Any, X: Any, labels: Any, sample_weight: Any, dtype: np.dtype[Any], elements: int, probe: str
    ) -> None:
        super().__init__(X.shape, elements, probe)
        self.spares_host = xp is not np
        self._xp, self._X, self._labels, self._weight, self._dtype = xp, X, labels[:, None], sample_weight, dtype

    def settings(self) -> AbstractContextManager[Any]:
        """Return a context that holds nothing."""
        return nullcontext()

    def models(self, W: Array, b: Array) -> list[tuple[Any, Any]]:
        """Return the arrays of each model."""
        return [(self._xp.asarray(w), self._xp.asarray(c.astype(np.float64))) for w, c in zip(W, b, strict=True)]

    def widened(self, rows: slice) -> Any:
        """Return some samples in the dtype of the weights."""
        return self._X[rows].astype(self._dtype, copy=False)

    def loss(self, samples: Any, rows: slice, W: Any, b: Any) -> float:
        """Return the summed loss of a model over some samples."""
        logits = self._xp.matmul(samples, W).astype(np.float64) + b
        largest = logits.max(axis=1)
        exponentials = self._xp.exp(logits - largest[:, None]).sum(axis=1)
        right = self._xp.take_along_axis(logits, self._labels[rows], axis=1)[:, 0]
        return float(((self._xp.log(exponentials) + (largest - right)) * self._weight[rows]).sum())
