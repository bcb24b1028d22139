"""Whether the processor takes subnormal numbers as zero, and arithmetic in which it does not.

Some libraries set their thread's processor to flush them, for speed: ``torch.set_flush_denormal(True)`` does, and so
did whatever was compiled by older GCC with ``-ffast-math``, when it was loaded. Not even float32 can then be widened
exactly.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from knnbench.errors import UnsupportedError

__all__ = ["flushes_subnormals", "gradual_underflow"]

# Larger than fenv_t of any platform.
ENVIRONMENT_BYTES = 512

# FE_DFL_ENV of glibc: the floating-point environment that a program starts with.
DEFAULT_ENVIRONMENT = -1


def flushes_subnormals() -> bool:
    """Return whether this thread takes subnormal numbers as zero."""
    return bool(np.float32(1e-40) * np.float32(1) == 0)


@contextmanager
def gradual_underflow() -> Iterator[bool]:
    """Hold this thread, and those that it starts, at IEEE 754's arithmetic, and leave the processor as found.

    Yields
    ------
    bool
        Whether subnormal numbers were taken as zero before, as other threads may still do.

    Raises
    ------
    UnsupportedError
        If they are, and it cannot be changed here.
    """
    if not flushes_subnormals():
        yield False
        return
    before = ctypes.create_string_buffer(ENVIRONMENT_BYTES)
    library = _library()
    if library is not None:
        library.fegetenv(before)
        library.fesetenv(ctypes.c_void_p(DEFAULT_ENVIRONMENT))
    try:
        if flushes_subnormals():
            raise UnsupportedError(
                "accuracy='exact' needs subnormal numbers, which this thread takes as zero; switch that off "
                "(torch.set_flush_denormal(False)), or use accuracy='fast'."
            )
        yield True
    finally:
        if library is not None:
            library.fesetenv(before)


@functools.cache
def _library() -> Any:
    """Return the C library's functions for it, None where it has another form of them."""
    library: Any = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
