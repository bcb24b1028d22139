"""Settings by environment variable, which a computation may hold to values of its own.

A job that several processes share must not depend on the environment of each: it says how many threads a task takes and
which vector instructions, and each task holds that while it computes, in its own thread only.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["LEVEL_VARIABLE", "THREADS_VARIABLE", "held", "setting"]

LEVEL_VARIABLE = "KNNBENCH_SIMD"
"""Names the level of vector instructions of the CPU kernels."""

THREADS_VARIABLE = "KNNBENCH_THREADS"
"""Says how many threads a computation takes."""

_held: ContextVar[Mapping[str, str]] = ContextVar("held", default={})  # noqa: B039  # never changed in place


def setting(name: str) -> str:
    """Return what is held for a variable, else its value in the environment, else an empty text.

    Examples
    --------
    >>> with held({"KNNBENCH_THREADS": "1"}):
    ...     setting("KNNBENCH_THREADS")
    '1'
    """
    return _held.get().get(name) or os.environ.get(name, "")


@contextmanager
def held(settings: Mapping[str, str]) -> Iterator[None]:
    """Hold variables at values, for what this thread does meanwhile."""
    token = _held.set({**_held.get(), **settings})
    try:
        yield
    finally:
        _held.reset(token)
