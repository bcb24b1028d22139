"""Lists of the k smallest (value, index) pairs, for the kernels of both targets.

Arrays hold a list a row: a slice of one would count its references, which several threads do slowly.
"""

from typing import Any

from numba.extending import register_jitable

__all__ = ["comes_before", "keep_smallest", "make_heap", "sift_down", "sort_heap", "sort_nearly"]


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
def make_heap(values: Any, indices: Any, i: Any, size: Any) -> None:
    """Turn the first pairs of list i into a heap, in place."""
    for root in range(size // 2 - 1, -1, -1):
        sift_down(values, indices, i, root, size)


@register_jitable
def sort_heap(values: Any, indices: Any, i: Any, size: Any) -> None:
    """Turn heap i of some size into an ascending list, in place."""
    for last in range(size - 1, 0, -1):
        swap(values, indices, i, 0, last)
        sift_down(values, indices, i, 0, last)


@register_jitable
def sort_nearly(values: Any, indices: Any, i: Any, size: Any) -> None:
    """Sort the first pairs of list i by insertion, in place: quick where few are out of order."""
    for last in range(1, size):
        value, index, place = values[i, last], indices[i, last], last
        while place > 0 and comes_before(value, index, values[i, place - 1], indices[i, place - 1]):
            values[i, place], indices[i, place] = values[i, place - 1], indices[i, place - 1]
            place -= 1
        values[i, place], indices[i, place] = value, index


@register_jitable
def swap(values: Any, indices: Any, i: Any, a: Any, b: Any) -> None:
    """Exchange two pairs of list i."""
    value, index = values[i, a], indices[i, a]
    values[i, a], indices[i, a] = values[i, b], indices[i, b]
    values[i, b], indices[i, b] = value, index


@register_jitable
def keep_smallest(values: Any, indices: Any, i: Any, size: Any, k: Any) -> None:
    """Bring the k smallest of the first `size` pairs of list i, k less than `size`, before the others, in place.

    The largest of them then stands first. By C. A. R. Hoare's FIND (Communications of the ACM 4, 1961), with the median
    of three as the pivot; no comparison is trusted to stop a loop, because NaN answers none.
    """
    low, high = 0, size - 1
    while low < high:
        middle = low + (high - low) // 2
        if comes_before(values[i, middle], indices[i, middle], values[i, low], indices[i, low]):
            swap(values, indices, i, middle, low)
        if comes_before(values[i, high], indices[i, high], values[i, low], indices[i, low]):
            swap(values, indices, i, high, low)
        if comes_before(values[i, middle], indices[i, middle], values[i, high], indices[i, high]):
            swap(values, indices, i, middle, high)
        value, index, place = values[i, high], indices[i, high], low
        for j in range(low, high):
            if comes_before(values[i, j], indices[i, j], value, index):
                swap(values, indices, i, j, place)
                place += 1
        swap(values, indices, i, place, high)
        if place >= k:
            high = place - 1
        if place <= k - 1:
            low = place + 1
    largest = 0
    for j in range(1, k):
        if comes_before(values[i, largest], indices[i, largest], values[i, j], indices[i, j]):
            largest = j
    swap(values, indices, i, 0, largest)
