"""Arrays of other libraries at the edge, recognised without importing those libraries.

Arrays on a CUDA device are told by ``__cuda_array_interface__``, which CuPy, PyTorch (for CUDA tensors
only) and numba's device arrays share, and are handed from one to another by it without a copy. What takes an array
waits for the stream that the array's library works on in this thread.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnbench.dtypes import Array
from knnbench.errors import InvalidInputError

__all__ = ["dtype_of", "in_kind", "on_device", "take", "to_host"]

# The default stream by the numbers of version 3 of the interface, in which 0 is not allowed.
LEGACY_STREAM = 1


@dataclass(frozen=True, slots=True)
class _Library:
    """How a library gives and takes device arrays.

    Attributes
    ----------
    module : str
    wrap : callable
        ``(module, array) -> array`` of the library, whose current stream comes after the array's.
    to_host : callable
        ``array -> numpy.ndarray``
    stream : callable
        ``module -> int``, the stream that its work goes to in this thread; 0 is the default.
    """

    module: str
    wrap: Callable[[Any, Any], Any]
    to_host: Callable[[Any], Any]
    stream: Callable[[Any], int]


def _wrap_in_torch(torch: Any, array: Any) -> Any:
    """Return a tensor; torch itself looks at no stream."""
    stream = array.__cuda_array_interface__.get("stream")
    if stream is not None:
        # Not known to torch by the number of the interface, and an external stream of handle 0 is any of torch's own.
        is_default = stream == LEGACY_STREAM
        giver = torch.cuda.default_stream() if is_default else torch.cuda.ExternalStream(stream)
        torch.cuda.current_stream().wait_stream(giver)
    return torch.as_tensor(array, device="cuda")


_LIBRARIES: dict[str, _Library] = {
    "cupy": _Library(
        "cupy",
        lambda cupy, array: cupy.asarray(array),
        lambda array: array.get(),
        lambda cupy: int(cupy.cuda.get_current_stream().ptr),
    ),
    "torch": _Library(
        "torch",
        _wrap_in_torch,
        lambda array: array.cpu().numpy(),
        lambda torch: int(torch.cuda.current_stream().cuda_stream),
    ),
    "numba": _Library(
        "numba.cuda",
        lambda cuda, array: cuda.as_cuda_array(array),
        lambda array: array.copy_to_host(),
        lambda cuda: 0,
    ),
}


class _Handed:
    """A device array together with the stream that it is ready on, for who takes it."""

    def __init__(self, array: Any, stream: int) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "version": 3, "stream": stream}
        self._array = array


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
    library = _LIBRARIES.get(_name(array))
    if library is None:
        return np.asarray(take("cupy", array).get())
    return np.asarray(library.to_host(array))


def in_kind(array: Any, like: Any) -> Any:
    """Return a device array as an array of the library of `like`; unchanged if that is not known."""
    library = _name(like)
    return take(library, array) if library in _LIBRARIES else array


def take(library: str, array: Any) -> Any:
    """Return a device array as one of a library, without a copy.

    What that library then does in this thread comes after what was done to the array: on the stream that the array
    names (version 3 of the interface), or else on the one that its own library works on in this thread. The host does
    not wait, unless the library that takes it does so by itself (numba and CuPy wait for that one stream).
    """
    if _name(array) == library:
        return array
    known = _LIBRARIES[library]
    giver = _LIBRARIES.get(_name(array))
    # torch names no stream, and numba not its default one.
    if giver is not None and array.__cuda_array_interface__.get("stream") is None:
        array = _Handed(array, giver.stream(importlib.import_module(giver.module)) or LEGACY_STREAM)
    return known.wrap(importlib.import_module(known.module), array)


def _name(array: Any) -> str:
    return type(array).__module__.partition(".")[0]
