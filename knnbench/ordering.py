"""The total order of neighbours, (value, corpus index), and what selects by it.

Equal values are ordered by their index, so the k nearest are one definite list: whatever the block
size, the number of threads or the layout of shards. The functions take ``xp``, the array module of
their arguments (numpy or cupy).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from knnbench.blocking import slices
from knnbench.dtypes import Array

__all__ = ["MISSING", "Selection", "merge_topk", "order_rows", "smallest_k"]

MISSING = -1
"""Index of a column that holds no neighbour, in a list shorter than its width."""

NOWHERE = np.iinfo(np.int64).max
"""Index that stands for `MISSING` while lists are sorted: the last of equal values."""

MERGED_ELEMENTS = 1 << 16
"""Values that are merged together: their copies stay in the second-level cache."""

DENSE = 1 / 8
"""Share of a block's values beyond which `Selection.update` selects within the block first."""


# What `Selection` selects by, on arrays of any library.
Smallest = Callable[[Any, int], tuple[Any, Any]]
Closer = Callable[[Any, Any], tuple[Any, ...]]


def largest(dtype: np.dtype[Any]) -> Any:
    """Return the largest value of `dtype`, infinity for floats."""
    if dtype.kind == "S":
        return b"\xff" * dtype.itemsize
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


def order_rows(xp: Any, values: Any, indices: Any) -> tuple[Any, Any]:
    """Sort each row by (value, index).

    Parameters
    ----------
    xp : module
    values, indices : (n, m) arrays

    Returns
    -------
    values, indices : (n, m) arrays

    Examples
    --------
    >>> order_rows(np, np.array([[2, 1, 1]]), np.array([[5, 9, 3]]))
    (array([[1, 1, 2]]), array([[3, 9, 5]]))
    """
    by_index = xp.argsort(indices, axis=1, kind="stable")
    return take_smallest(
        xp,
        xp.take_along_axis(values, by_index, axis=1),
        xp.take_along_axis(indices, by_index, axis=1),
        values.shape[1],
    )


def take_smallest(xp: Any, values: Any, indices: Any, k: int) -> tuple[Any, Any]:
    """Return the k smallest of each row, whose equal values already stand in ascending order of index."""
    order = xp.argsort(values, axis=1, kind="stable")[:, :k]
    return xp.take_along_axis(values, order, axis=1), xp.take_along_axis(indices, order, axis=1)


def smallest_k(xp: Any, values: Any, k: int) -> tuple[Any, Any]:
    """Select the k smallest of each row under the total order, the column being the index.

    Parameters
    ----------
    xp : module
    values : (n, m) array
        Without NaN.
    k : int
        ``1 <= k <= m``.

    Returns
    -------
    values : (n, k) array
        Ascending.
    indices : (n, k) array of int64
        Columns of `values`; ascending where values are equal.

    Examples
    --------
    >>> smallest_k(np, np.array([[3, 1, 2, 1, 1]]), 2)
    (array([[1, 1]]), array([[1, 3]]))
    """
    n_rows, width = values.shape
    if k == width:
        columns = xp.broadcast_to(xp.arange(width, dtype=np.int64), (n_rows, width))
        return take_smallest(xp, values, columns, k)
    # A partition alone keeps an arbitrary one of the values that equal the k-th.
    kth = xp.partition(values, k - 1, axis=1)[:, k - 1 : k]
    keep = ~(values > kth)
    crowded = xp.nonzero(keep.sum(axis=1) > k)[0]
    if len(crowded):
        rows, limit = values[crowded], kth[crowded]
        below = rows < limit
        ties = keep[crowded] & ~below
        room = k - below.sum(axis=1, keepdims=True)
        keep[crowded] = below | (ties & (xp.cumsum(ties, axis=1) <= room))
    columns = xp.asarray(xp.nonzero(keep)[1].reshape(n_rows, k), dtype=np.int64)
    return take_smallest(xp, xp.take_along_axis(values, columns, axis=1), columns, k)


class Selection:
    """The k smallest of each row so far, over blocks of columns that come in ascending order.

    A column of a later block has a larger index than all before it, so it enters only if it is strictly
    smaller than the k-th value: one comparison a pair, after the first block.

    Parameters
    ----------
    xp : module
    k : int
    smallest : callable, optional
        ``(values, k) -> (values, columns)``, by default `smallest_k`.
    closer : callable, optional
        ``(values, limit) -> (rows, columns)`` of what is smaller than its row's limit, in order of the rows. By default
        a comparison of all.
    """

    def __init__(self, xp: Any, k: int, smallest: Smallest | None = None, closer: Closer | None = None) -> None:
        self._xp = xp
        self._k = k
        self._smallest = smallest or functools.partial(smallest_k, xp)
        self._closer = closer or (lambda values, limit: xp.nonzero(values < limit))
        self.values: Any = None
        self.indices: Any = None

    def update(self, values: Any, start: int) -> None:
        """Take a block in.

        Parameters
        ----------
        values : (n, m) array
            Any m; the first blocks may together be narrower than k.
        start : int
            Corpus index of its first column.
        """
        if self.values is None:
            self.values, self.indices = self._whole_block(values, start)
            return
        if self.values.shape[1] < self._k:
            self._append(*self._whole_block(values, start))
            return
        found = self._closer_columns(values, start)
        if found is None:
            found = self._whole_block(values, start)
        self._append(*found)

    def _closer_columns(self, values: Any, start: int) -> tuple[Any, Any] | None:
        """Return what is closer than the k-th value of its row, None if that is much of the block."""
        xp, (n_rows, width) = self._xp, values.shape
        rows, columns = self._closer(values, self.values[:, -1:])
        if not len(rows):
            return values[:, :0], values[:, :0]
        if len(rows) > n_rows * width * DENSE:
            return None
        # Columns of one row lie together; each is placed by how far it comes after the first of them.
        is_first = xp.full((len(rows),), 1, dtype=np.int64)
        is_first[1:] = rows[1:] != rows[:-1]
        place = xp.arange(len(rows)) - xp.nonzero(is_first)[0][xp.cumsum(is_first, axis=0) - 1]
        widest = int(place.max()) + 1
        if widest > width * DENSE:
            return None
        # Where a row has fewer, its k-th value fills up: it stands right of k values that are not larger.
        few_values = xp.repeat(self.values[:, -1:], widest, axis=1)
        few_indices = xp.full((n_rows, widest), MISSING, dtype=np.int64)
        few_values[rows, place] = values[rows, columns]
        few_indices[rows, place] = columns + start
        return few_values, few_indices

    def _whole_block(self, values: Any, start: int) -> tuple[Any, Any]:
        best, columns = self._smallest(values, min(self._k, values.shape[1]))
        return best, columns + start

    def _append(self, values: Any, indices: Any) -> None:
        if not values.shape[1]:
            return
        # What is held has the smaller indices and stands left, so a stable sort keeps the total order.
        xp = self._xp
        self.values, self.indices = take_smallest(
            xp,
            xp.concatenate([self.values, values], axis=1),
            xp.concatenate([self.indices, indices], axis=1),
            self._k,
        )


def merge_topk(first: tuple[Array, Array], second: tuple[Array, Array], k: int) -> tuple[Array, Array]:
    """Merge two lists of neighbours of the same queries.

    Associative, commutative and idempotent: a neighbour in both lists counts once, so any tree of merges,
    with retries and duplicates, gives the same bits.

    Parameters
    ----------
    first, second : tuple of (n_queries, any) arrays
        Values, numbers or strings of bytes, and int64 corpus indices, index `MISSING` where a list is shorter than its
        width. An index in both lists has the same value in both.
    k : int
        At most this many are kept.

    Returns
    -------
    values, indices : (n_queries, min(k, width of both together)) arrays
        Ascending by (value, index); `MISSING` last.

    Examples
    --------
    >>> merge_topk((np.array([[1.0, 4.0]]), np.array([[7, 2]])), (np.array([[1.0, 4.0]]), np.array([[3, 2]])), 3)
    (array([[1., 1., 4.]]), array([[3, 7, 2]]))
    """
    n_queries, total = len(first[0]), first[0].shape[1] + second[0].shape[1]
    shape = n_queries, min(k, total)
    values, indices = np.empty(shape, np.result_type(first[0], second[0])), np.empty(shape, np.int64)
    for rows in slices(n_queries, max(1, MERGED_ELEMENTS // max(1, total))):
        _merge_rows(*(array[rows] for array in (*first, *second, values, indices)))
    return values, indices


def _merge_rows(
    values: Array, indices: Array, other_values: Array, other_indices: Array, out_values: Array, out_indices: Array
) -> None:
    """Merge some rows of two lists into `out_values` and `out_indices`."""
    k = out_values.shape[1]
    values = np.concatenate([values, other_values], axis=1)
    indices = np.concatenate([indices, other_indices], axis=1)
    absent = indices == MISSING
    has_absent = absent.any()
    if has_absent:
        values[absent], indices[absent] = largest(values.dtype), NOWHERE
    # Sorted lists are runs, which a stable sort of the values joins in linear time. What it leaves of equal values
    # stands in the order of the lists: looked at again, with one column beyond the last, where that is wrong.
    starts = values.shape[1] * np.arange(len(values))[:, None]
    nearest = np.argsort(values, axis=1, kind="stable")[:, : k + 1] + starts
    ordered, columns = values.ravel()[nearest], indices.ravel()[nearest]
    wrong = (ordered[:, 1:] == ordered[:, :-1]) & (columns[:, 1:] <= columns[:, :-1])
    if has_absent:
        wrong &= (columns[:, 1:] != NOWHERE) | (columns[:, :-1] != NOWHERE)
    wrong = wrong.any(axis=1)
    if ordered.shape[1] > k:
        wrong |= ordered[:, k] == ordered[:, k - 1]
    out_values[...], out_indices[...] = ordered[:, :k], columns[:, :k]
    again = np.flatnonzero(wrong)
    if len(again):
        ordered, columns = _each_once(values[again], indices[again])
        out_values[again], out_indices[again] = ordered[:, :k], columns[:, :k]
    out_indices[out_indices == NOWHERE] = MISSING


def _each_once(values: Array, indices: Array) -> tuple[Array, Array]:
    """Sort rows by (value, index), and put what repeats an index last, at `NOWHERE`."""
    by_index = np.argsort(indices, axis=1, kind="stable")
    values = np.take_along_axis(values, by_index, axis=1)
    indices = np.take_along_axis(indices, by_index, axis=1)
    again = indices[:, 1:] == indices[:, :-1]
    values[:, 1:][again], indices[:, 1:][again] = largest(values.dtype), NOWHERE
    return order_rows(np, values, indices)
