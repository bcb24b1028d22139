"""The k smallest pairs of a query so far, as the search kernels of the CPU keep them.

They are an ascending list, into which `cpu_loops.shift_in` puts a pair without a branch that could be guessed wrong; of
many, candidates are collected and the k smallest selected from time to time.
"""

from typing import Any

from numba.extending import register_jitable

from knnbench.kernels.cpu_loops import LIST_LANES, shift_in
from knnbench.kernels.heap import keep_smallest

__all__ = ["MANY", "insert", "list_room"]

# From so many neighbours on, candidates are collected before the k smallest of them are kept: putting a pair into its
# place costs a share of k.
MANY = 128


def list_room(k: int, n_rows: int) -> int:
    """Return how many pairs a list of the k smallest of some rows has room for."""
    return -(-k // LIST_LANES) * LIST_LANES if k < MANY else min(2 * k, n_rows)


@register_jitable
def insert(k: Any, values: Any, indices: Any, counts: Any, i: Any, seen: Any, value: Any, index: Any) -> None:
    """Take a row, after `seen` others with smaller indices, into list i.

    The pairs of a list are in ascending order. One of many is filled before the k smallest are kept, which is
    cheaper; the k-th smallest then stands first.
    """
    if k < MANY:
        if seen >= k and not value < values[i, k - 1]:  # one that equals the k-th value comes after it
            return
        start, place = i * values.shape[1], min(seen, k - 1) // LIST_LANES * LIST_LANES
        while place > 0:
            if not shift_in(0, values, indices, start, place, seen, value, index):
                break
            place -= LIST_LANES
        if place == 0:
            shift_in(1, values, indices, start, 0, seen, value, index)
        counts[i] = min(seen + 1, k)
        return
    room = values.shape[1]
    if seen >= room and not value < values[i, 0]:
        return
    values[i, counts[i]], indices[i, counts[i]] = value, index
    counts[i] += 1
    if counts[i] == room and k < room:
        keep_smallest(values, indices, i, room, k)
        counts[i] = k
