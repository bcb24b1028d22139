"""From a budget of bytes to block sizes, for every backend.

The budget bounds what a computation holds beyond its inputs, the prepared corpus and its outputs, on the
host and on a device each.
"""

import operator
import os
from collections.abc import Iterator
from pathlib import Path

from knnbench.errors import InvalidInputError, OverBudgetError

__all__ = [
    "BUDGET_VARIABLE",
    "DEFAULT_BUDGET",
    "available_memory",
    "block_shape",
    "check_budget",
    "chunk_rows",
    "require_memory",
    "slices",
]

BUDGET_VARIABLE = "KNNBENCH_MEMORY_BUDGET"
DEFAULT_BUDGET = 1 << 30

# Blocks of this shape keep a float32 tile within the second-level and third-level caches of current
# processors; a larger budget than they need buys nothing.
MAX_QUERIES = 1024
MAX_CORPUS = 4096

# Elements that are looked at, converted or scaled together.
CHUNK_ELEMENTS = 1 << 18


def check_budget(memory_budget: int | None = None) -> int:
    """Return the budget in bytes: the one given, else $KNNBENCH_MEMORY_BUDGET, else 1 GiB.

    Parameters
    ----------
    memory_budget : int or None
        Bytes.

    Raises
    ------
    InvalidInputError
        If it is not a positive whole number.

    Examples
    --------
    >>> check_budget(1_000_000)
    1000000
    """
    source = "memory_budget"
    value: object = memory_budget
    if value is None:
        source, value = f"${BUDGET_VARIABLE}", os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET)
    try:
        budget = int(value) if isinstance(value, str) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        budget = 0
    if budget < 1 or isinstance(value, bool):
        raise InvalidInputError(
            f"{source} is {value!r}; expected a positive whole number of bytes, such as {DEFAULT_BUDGET}."
        )
    return int(budget)


def block_shape(
    n_queries: int,
    n_corpus: int,
    *,
    budget: int,
    per_pair: int,
    per_query: int = 0,
    per_corpus: int = 0,
    max_queries: int = MAX_QUERIES,
    max_corpus: int = MAX_CORPUS,
) -> tuple[int, int]:
    """Return the largest useful block that fits a budget.

    Parameters
    ----------
    n_queries, n_corpus : int
        Rows to be blocked.
    budget : int
        Bytes.
    per_pair, per_query, per_corpus : int
        Bytes held for each pair of a block, for each of its queries and for each of its corpus rows.
    max_queries, max_corpus : int
        Rows beyond which a larger block is not faster.

    Returns
    -------
    (int, int)
        Queries and corpus rows a block, at least one each.

    Raises
    ------
    OverBudgetError
        If not even a block of one pair fits.

    Examples
    --------
    >>> block_shape(10_000, 60_000, budget=1 << 20, per_pair=8)
    (512, 256)
    """
    queries, corpus = min(n_queries, max_queries), min(n_corpus, max_corpus)

    def needed() -> int:
        return queries * corpus * per_pair + queries * per_query + corpus * per_corpus

    while needed() > budget and queries * corpus > 1:
        # What halving saves of the pairs is the same on both sides; the rest decides.
        if ((queries * per_query, queries) > (corpus * per_corpus, corpus) and queries > 1) or corpus == 1:
            queries = (queries + 1) // 2
        else:
            corpus = (corpus + 1) // 2
    if needed() > budget:
        raise OverBudgetError(
            f"the {budget:,} bytes that the memory budget leaves for a step cannot hold its smallest piece, which "
            f"needs {needed():,}; raise memory_budget (or ${BUDGET_VARIABLE})."
        )
    return queries, corpus


def slices(n: int, step: int) -> Iterator[slice]:
    """Yield the slices of at most `step` that cover ``range(n)``.

    Examples
    --------
    >>> list(slices(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def chunk_rows(n_features: int) -> int:
    """Return how many rows make a chunk whose temporary copies, of any dtype, stay at a few MiB.

    Examples
    --------
    >>> chunk_rows(1024)
    256
    """
    return max(1, CHUNK_ELEMENTS // n_features)


def available_memory() -> int | None:
    """Return the bytes of host memory that this process can still take, None if it cannot be told.

    The least of what Linux says is available, and of what the control group of its container leaves, where pages
    of files that nobody uses count as free.
    """
    known = []
    try:
        known.append(1024 * _field("/proc/meminfo", "MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file")
            known.append(int(limit) - used)
    except (OSError, StopIteration):  # not Linux, or no control group
        pass
    return min(known, default=None)


def _field(path: str | Path, name: str) -> int:
    """Return the number after a name in one of the kernel's files."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.split()[0] == name)


def require_memory(n_bytes: int, what: str) -> None:
    """Raise `OverBudgetError` if the host has no room for `n_bytes` of `what`."""
    left = available_memory()
    if left is not None and n_bytes > left:
        raise OverBudgetError(
            f"{what} needs {n_bytes / 1e9:,.2f} GB and {left / 1e9:,.2f} GB of memory are available; "
            f"use knn(), which never holds all distances, or pass the queries in parts."
        )
