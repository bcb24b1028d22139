"""Heaps of the k smallest (value, index) pairs whose largest stands first, for the kernels of both targets.

Arrays hold a list a row, (n_lists, k): a slice of one would count its references, which several threads do slowly.
"""

from typing import Any

from numba.extending import register_jitable

__all__ = ["comes_before", "make_heap", "sift_down", "sort_heap"]


@register_jitable
def comes_before(value: Any, index: Any, other_value: Any, other_index: Any) -> Any:
    """Return whether (value, index) precedes another in the total order."""
    return value < other_value or (value == other_value and index < other_index)


@register_jitable
def sift_down(values: Any, indices: Any, i: Any, root: Any, size: Any) -> None:
    """Restore heap i of some size after its root, or that of a part of it, was replaced."""
    value, index = values[i, root], indices[i, root]
    while True:
        child = 2 * root + 1
        if child >= size:
            break
        right = child + 1
        if right < size and comes_before(
            values[i, child], indices[i, child], values[i, right], indices[i, right]
        ):  # fmt: skip
            child = right
        if not comes_before(value, index, values[i, child], indices[i, child]):
            break
        values[i, root], indices[i, root] = values[i, child], indices[i, child]
        root = child
    values[i, root], indices[i, root] = value, index


@register_jitable
def make_heap(values: Any, indices: Any, i: Any) -> None:
    """Turn list i into a heap, in place."""
    k = values.shape[1]
    for root in range(k // 2 - 1, -1, -1):
        sift_down(values, indices, i, root, k)


@register_jitable
def sort_heap(values: Any, indices: Any, i: Any) -> None:
    """Turn heap i into an ascending list, in place."""
    for last in range(values.shape[1] - 1, 0, -1):
        value, index = values[i, 0], indices[i, 0]
        values[i, 0], indices[i, 0] = values[i, last], indices[i, last]
        values[i, last], indices[i, last] = value, index
        sift_down(values, indices, i, 0, last)
