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
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numba
import numpy as np
import platformdirs
from numba.core import serialize

__all__ = ["CacheFiles", "cache_directory", "cached_on_disk", "compile_cached", "described"]

COMPILERS = ("numba", "llvmlite", "numba-cuda", "numpy")

# Values that are the same if their texts are.
PLAIN = (bool, int, float, str, type(None))

_config: Any = numba.config  # filled in at run time, so no type checker knows its names
_serialize: Any = serialize  # without annotations

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


def compile_cached(*, allocates: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``numba.njit`` with these options and the cache above, as a decorator.

    Functions do without numba's counts of references unless they allocate arrays. Where a function is not made part of
    its caller, each call counts the references of its arrays up and down by atomic additions, which took ten times as
    long as putting a pair into a list; and threads that share an array wait for each other.

    numba finds a function's code by a pickle of what the function closes over, which is another one in each process.
    Here what `described` says finds it, in a file of its own. A hash of that is in the function's name, too: numba
    numbers functions, from one in each process, and a process that loads two of the same name and number runs one for
    the other.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        given = {name: sorted(value) if isinstance(value, set) else value for name, value in options.items()}
        key = hashlib.sha256(repr((described(function), allocates, given)).encode()).hexdigest()[:32]
        _rename(function, key)
        with cached_on_disk() as cache:
            chosen: dict[str, Any] = {"cache": cache, "_nrt": allocates, **options}
            compiled: Any = numba.njit(**chosen)(function)
            if cache:
                compiled._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), key)
                compiled._cache._cache_file = CacheFiles(function.__name__)
        return cast("Callable[..., Any]", compiled)

    return decorate


def described(value: Any) -> Any:
    """Return what tells a value that a kernel closes over from all others, the sources being the same.

    Raises
    ------
    TypeError
        For one of a kind whose text may not tell.
    """
    if isinstance(value, FunctionType):
        code, known = value.__code__, value.__globals__
        constants: list[Any] = [value for value in code.co_consts if isinstance(value, PLAIN)]
        constants += [(name, known[name]) for name in code.co_names if isinstance(known.get(name, known), PLAIN)]
        cells = [(name, described(cell)) for name, cell in _closure(value).items()]
        return value.__module__, code.co_qualname, code.co_firstlineno, code.co_code, constants, cells
    if isinstance(value, (*PLAIN, numba.types.Type, np.dtype)):
        return repr(value)
    raise TypeError(f"a kernel that is kept on disk closes over {value!r}")


def _closure(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _rename(function: Any, key: str) -> None:
    """Add the key to the names of a function and of those it closes over that were made for it alone."""
    if "<locals>" in function.__qualname__:
        function.__qualname__ = f"{function.__code__.co_qualname}_{key}"
        for value in _closure(function).values():
            if isinstance(value, FunctionType):
                _rename(value, key)


class CacheFiles:
    """What numba keeps of a function: a file for each key, put in place in one step.

    numba's own files, which this stands for, have an index that two processes can write at once, each for code of its
    own.
    """

    def __init__(self, name: str, dumps: Callable[[Any], bytes] = _serialize.dumps) -> None:
        self._name, self._dumps = name, dumps

    def _path(self, key: Any) -> Path:
        return cache_directory() / f"{self._name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.code"

    def load(self, key: Any) -> Any:
        """Return what was saved, or None."""
        try:
            return pickle.loads(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def save(self, key: Any, data: Any) -> None:
        """Keep the data."""
        path = self._path(key)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        unfinished.write_bytes(self._dumps(data))
        unfinished.replace(path)
