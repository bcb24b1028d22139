"""Where compiled kernels are kept between processes.

numba decides by the file of a kernel alone whether its cached machine code is still good: it does not
notice that a function which the kernel calls was edited, and would run, and let us measure, the old one.
So the cache lies in a directory named by a hash of every source that machine code is made from, and of the
versions of the compilers.
"""

import functools
import hashlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import platformdirs

__all__ = ["cache_directory", "cached_on_disk", "compile_cached"]

COMPILERS = ("numba", "llvmlite", "numba-cuda", "numpy")

_config: Any = numba.config  # filled in at run time, so no type checker knows its names

# numba reads its directory from a global when a function is decorated.
_decorating = threading.RLock()


@functools.cache
def cache_directory() -> Path:
    """Return the directory for the machine code of this version of the sources.

    It lies under $KNNBENCH_CACHE, or the user's cache directory.
    """
    root = os.environ.get("KNNBENCH_CACHE") or platformdirs.user_cache_path("knnbench")
    return Path(root) / "compiled" / source_key(sources())


def sources() -> list[Path]:
    """Return the files that kernels are made from: this folder, and the metrics that it compiles."""
    package = Path(__file__).parents[1]
    return [*sorted((package / "kernels").glob("*.py")), package / "dtypes.py", package / "metrics.py"]


def source_key(files: list[Path]) -> str:
    """Return a hash of the contents of `files` and of the versions of Python and the compilers."""
    digest = hashlib.sha256(sys.version.encode())
    for name in COMPILERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"{name} absent\n".encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def cached_on_disk() -> Iterator[bool]:
    """Let numba keep what is decorated inside in `cache_directory`, and leave its setting as found.

    Yields
    ------
    bool
        What to give as the decorator's ``cache``: False where no directory can be written, so that a
        read-only machine compiles in every process instead of failing.
    """
    with _decorating:
        before = _config.CACHE_DIR
        try:
            cache_directory().mkdir(parents=True, exist_ok=True)
        except OSError:
            yield False
            return
        _config.CACHE_DIR = str(cache_directory())
        try:
            yield os.access(cache_directory(), os.W_OK)
        finally:
            _config.CACHE_DIR = before


def compile_cached(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``numba.njit`` with these options and the cache above, as a decorator."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        with cached_on_disk() as cache:
            compiled: Callable[..., Any] = numba.njit(cache=cache, **options)(function)
        return compiled

    return decorate
