"""Arrays of other libraries at the edge, recognised without importing those libraries.

Arrays on a CUDA device are told by ``__cuda_array_interface__``, which CuPy, PyTorch (for CUDA tensors
only) and numba's device arrays share, and are handed from one to another by it without a copy.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from knnbench.dtypes import Array
from knnbench.errors import InvalidInputError

__all__ = ["dtype_of", "in_kind", "on_device", "to_host"]

# How each library takes another's device array as its own, and gives one to the host.
_WRAP: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "cupy": ("cupy", lambda cupy, array: cupy.asarray(array)),
    "torch": ("torch", lambda torch, array: torch.as_tensor(array, device="cuda")),
    "numba": ("numba.cuda", lambda cuda, array: cuda.as_cuda_array(array)),
}
_COPY_TO_HOST: dict[str, Callable[[Any], Any]] = {
    "cupy": lambda array: array.get(),
    "torch": lambda array: array.cpu().numpy(),
    "numba": lambda array: array.copy_to_host(),
}


def on_device(array: Any) -> bool:
    """Return whether `array` lives on a CUDA device.

    Raises
    ------
    InvalidInputError
        If its library will not give it away, as torch does with a tensor that requires its gradient.
    """
    try:
        return hasattr(array, "__cuda_array_interface__")
    except RuntimeError as error:
        raise InvalidInputError(f"an array on a CUDA device is not given away by its library: {error}") from None


def dtype_of(array: Any) -> np.dtype[Any]:
    """Return the numpy dtype of an array of any library."""
    if on_device(array):
        dtype: np.dtype[Any] = np.dtype(array.__cuda_array_interface__["typestr"])
    else:
        dtype = np.dtype(array.dtype)
    return dtype


def to_host(array: Any) -> Array:
    """Return `array` as a numpy array, copied if it lives on a device."""
    if not on_device(array):
        return np.asarray(array)
    library = _library(array)
    if library not in _COPY_TO_HOST:
        return np.asarray(_take("cupy", array).get())
    return np.asarray(_COPY_TO_HOST[library](array))


def in_kind(array: Any, like: Any) -> Any:
    """Return a device array as an array of the library of `like`; unchanged if that is not known."""
    library = _library(like)
    return _take(library, array) if library in _WRAP and library != _library(array) else array


def _take(library: str, array: Any) -> Any:
    module, wrap = _WRAP[library]
    return wrap(importlib.import_module(module), array)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]
