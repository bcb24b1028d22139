"""How CUDA kernels are compiled, kept and started: the one place for each.

Kernels are compiled when they are first started. The tests let this module compile for devices that are not there, and
run kernels without any.
"""

import hashlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numba.cuda

from knnbench.kernels.compilation import CacheFiles, cached_on_disk, described

__all__ = ["BLOCKS_EACH", "ROW_THREADS", "Kernel", "compiled", "inlined", "launch", "launch_rows", "multiprocessors"]

# Threads a block where each has a row, a list or an element to itself.
ROW_THREADS = 128

BLOCKS_EACH = 2
"""Blocks of a tile kernel that a multiprocessor has room for: while one waits, the other computes."""

cuda: Any = numba.cuda  # filled in at run time, so no type checker knows its names
Kernel = Any


def compiled(*made_of: Any, **options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Return a decorator for kernels, which are kept on disk.

    Parameters
    ----------
    *made_of : object
        What tells the kernel from others that the same function makes, as `compilation.described` takes it.
    **options
        Those of ``numba.cuda.jit``.

    Notes
    -----
    numba finds a kernel's code by a pickle of what it closes over, and intrinsics have another one in each process.
    """

    def decorate(function: Callable[..., None]) -> Kernel:
        with cached_on_disk() as cache:
            # Linked from PTX, as the tests do that look at the machine code.
            kernel = cuda.jit(cache=cache, lto=False, **options)(function)
        if cache:
            code = function.__module__, function.__code__.co_qualname, [described(value) for value in made_of]
            key = hashlib.sha256(repr((*code, sorted(options.items()))).encode()).hexdigest()
            kernel._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), key)
            dumps = importlib.import_module("numba.cuda.serialize").dumps  # not to be had in numba's simulator
            kernel._cache._cache_file = CacheFiles(function.__name__, dumps)
        return kernel

    return decorate


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for kernels whose code goes where it is called, so that constants and registers stay."""
    result: Callable[..., Any] = cuda.jit(device=True, forceinline=True)(function)
    return result


def launch(kernel: Kernel, grid: tuple[int, int], block: int, *args: Any) -> None:
    """Start a kernel on the default stream."""
    with warnings.catch_warnings():
        # numba warns of a small grid, which is what a small problem makes; on a terminal in colour.
        warnings.filterwarnings("ignore", message=".*Grid size")
        configured = kernel[grid, block]
    configured(*args)


def launch_rows(kernel: Kernel, count: int, *args: Any) -> None:
    """Start a kernel with a thread for each of `count` rows, lists or elements."""
    launch(kernel, (-(-count // ROW_THREADS), 1), ROW_THREADS, *args)


def multiprocessors() -> int:
    """Return how many multiprocessors the current device has."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
