"""Which dtype a computation runs in, accumulates in and answers in.

==================  ==============  =======================  ===========================
input               computed as     accumulated in           answered as
==================  ==============  =======================  ===========================
uint8               uint8           int32, int64 if needed   exact integers, or float32
float16, float32    float32         float32                  float32
float64             float64         float64                  float64
other real dtypes   float64         float64                  float64
==================  ==============  =======================  ===========================

Unequal dtypes meet at ``numpy.result_type``, which takes uint8 with float32 to float32.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from knnbench.errors import InvalidInputError

__all__ = ["COMPUTED", "common_dtype", "computed_dtype", "finite_mean", "integer_accumulator"]

Array = npt.NDArray[Any]

COMPUTED: tuple[str, ...] = ("uint8", "float32", "float64")
"""The dtypes that kernels exist for; every other input is converted to one of them at the edge."""

LARGEST_SQUARE = 255**2


def computed_dtype(dtype: npt.DTypeLike, name: str = "input") -> np.dtype[Any]:
    """Return the dtype that an input of `dtype` is computed in.

    Parameters
    ----------
    dtype : dtype
        Of the input.
    name : str
        What the error calls the input.

    Returns
    -------
    numpy.dtype
        uint8, float32 or float64, in native byte order.

    Raises
    ------
    InvalidInputError
        If `dtype` is complex, a string, an object or a date.

    Examples
    --------
    >>> computed_dtype("float16"), computed_dtype(">f8"), computed_dtype("int16")
    (dtype('float32'), dtype('float64'), dtype('float64'))
    """
    given = np.dtype(dtype)
    if given.kind not in "buif":
        raise InvalidInputError(
            f"{name} has dtype {given}; expected real numbers (uint8, float32 and float64 are computed "
            f"as they are, float16 as float32, other real dtypes as float64)."
        )
    if given == np.uint8:
        return np.dtype(np.uint8)
    return np.dtype(np.float32 if given.kind == "f" and given.itemsize <= 4 else np.float64)


def common_dtype(queries: npt.DTypeLike, corpus: npt.DTypeLike) -> np.dtype[Any]:
    """Return the dtype in which `queries` and `corpus` of these dtypes meet.

    Examples
    --------
    >>> common_dtype("uint8", "float32"), common_dtype("float32", "float64")
    (dtype('float32'), dtype('float64'))
    """
    return np.result_type(computed_dtype(queries, "queries"), computed_dtype(corpus, "corpus"))


@functools.cache
def integer_accumulator(n_features: int) -> np.dtype[Any]:
    """Return the narrowest signed integer that no uint8 distance of `n_features` can overflow.

    Examples
    --------
    >>> integer_accumulator(784), integer_accumulator(33_026)
    (dtype('int32'), dtype('int64'))
    """
    return np.dtype(np.int32 if n_features * LARGEST_SQUARE <= np.iinfo(np.int32).max else np.int64)


def finite_mean(rows: Array) -> Array:
    """Return the mean of float rows, summed in float64, in their dtype: of those without NaN and infinity, if any have.

    About what is not finite, no row could be centred; 0 where no row is left, or their sum overflows.

    Examples
    --------
    >>> finite_mean(np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0]]))
    array([2., 3.])
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean: Array = rows.mean(axis=0, dtype=np.float64)
        if not np.isfinite(mean).all():
            kept = rows[np.isfinite(rows).all(axis=1)]
            mean = kept.sum(axis=0, dtype=np.float64) / max(1, len(kept))
    return np.where(np.isfinite(mean), mean, 0).astype(rows.dtype)
