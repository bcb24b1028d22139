"""The k smallest of each row of a tensor under the total order, with one pass over the tensor.

``torch.topk`` reads a row once for every digit of a radix on CUDA, then once more for what it takes, and does not say
which of equal values that is. Here neighbouring columns form groups, and one reduction takes the minimum of each. The
k groups first by (minimum, place) hold the k columns first by (value, column): of any other group each of these k
comes before it, and the first smallest column of each before any of its columns. What is chosen among is then a few
groups of each row.
"""

import math
from dataclasses import dataclass

import torch

from .base import Native

__all__ = ["Minima", "group_columns"]

# Columns of the smallest groups: what a warp of CUDA, or a few vectors of a CPU, reduce at once.
LEAST_GROUP = 32


def group_columns(width: int, k: int) -> int:
    """Return the columns of a group, a power of two, with which minima and the columns of k groups are fewest together.

    Examples
    --------
    >>> group_columns(60_000, 3)
    128
    """
    return max(LEAST_GROUP, 1 << round(math.log2(max(1.0, width / k)) / 2))


@dataclass(frozen=True, slots=True)
class Minima:
    """What `knnbench.ordering.Selection` selects by, through minima of groups of columns.

    Attributes
    ----------
    k : int
    short : int
        Columns of rows that are sorted as fast as their k-th value is found.
    finite : bool
        Whether no value is NaN, or what is selected does not matter then. A reduction would take NaN for the minimum
        of its group.
    """

    k: int
    short: int
    finite: bool

    def smallest(self, values: Native, k: int) -> tuple[Native, Native]:
        """Return the k smallest of each row and their columns, as `knnbench.ordering.smallest_k` does; NaN is last."""
        width = values.shape[1]
        size = group_columns(width, k)
        n_groups = width // size
        if 4 * (n_groups + k * size) > width:
            columns = first_columns(values, k, self.short)
            return values.gather(1, columns), columns
        minima = self.minima(values, n_groups, size)
        groups = first_columns(minima, k, self.short).sort(dim=1).values
        inside = torch.arange(size, device=values.device)
        columns = (groups[:, :, None] * size + inside).flatten(1)
        if n_groups * size < width:
            rest = torch.arange(n_groups * size, width, device=values.device)
            columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
        candidates = values.gather(1, columns)
        places = first_columns(candidates, k, self.short)
        return candidates.gather(1, places), columns.gather(1, places)

    def closer(self, values: Native, limit: Native) -> tuple[Native, ...]:
        """Return the rows, in order, and columns of what is smaller than its row's limit."""
        width = values.shape[1]
        size = group_columns(width, self.k)
        n_groups = width // size
        if not self.finite:
            limit = limit.nan_to_num(nan=math.inf, posinf=math.inf)
        rows, groups = torch.nonzero(self.minima(values, n_groups, size) < limit, as_tuple=True)
        if 2 * len(rows) * size > values.numel():
            return torch.nonzero(values < limit, as_tuple=True)
        inside = values[:, : n_groups * size].unflatten(1, (n_groups, size))[rows, groups]
        found, places = torch.nonzero(inside < limit[rows], as_tuple=True)
        rows, columns = rows[found], groups[found] * size + places
        if n_groups * size < width:
            others, rest = torch.nonzero(values[:, n_groups * size :] < limit, as_tuple=True)
            rows, order = torch.cat([rows, others]).sort(stable=True)
            columns = torch.cat([columns, rest + n_groups * size])[order]
        return rows, columns

    def minima(self, values: Native, n_groups: int, size: int) -> Native:
        """Return the minimum of each of the first groups of a row, shape (n_rows, n_groups)."""
        groups = values[:, : n_groups * size].unflatten(1, (n_groups, size))
        minima = groups.amin(dim=2)
        if not self.finite and bool(minima.isnan().any()):
            minima = groups.nan_to_num(nan=math.inf, posinf=math.inf).amin(dim=2)
        return minima


def first_columns(values: Native, k: int, short: int) -> Native:
    """Return the columns of the k smallest of each row, in the order of (value, column); NaN is last.

    Parameters
    ----------
    values : (n, m) tensor
    k : int
        At most m.
    short : int
        Rows of at most so many columns are sorted.
    """
    width = values.shape[1]
    if width <= max(short, 2 * k):
        return values.sort(dim=1, stable=True).indices[:, :k]
    # Of values that equal the k-th topk takes any, which matters where the next one does. Written so that NaN counts.
    smallest, columns = values.topk(k + 1, dim=1, largest=False)
    kth, columns = smallest[:, k - 1 : k], columns[:, :k]
    crowded = torch.nonzero(~(smallest[:, k:] > kth))[:, 0]
    if len(crowded):
        columns[crowded] = first_of_equals(values[crowded], kth[crowded], k)
    columns = columns.sort(dim=1).values
    return columns.gather(1, values.gather(1, columns).sort(dim=1, stable=True).indices)


def first_of_equals(values: Native, kth: Native, k: int) -> Native:
    """Return the columns of the k smallest of each row, the first of those that equal the k-th value, in no order."""
    width = values.shape[1]
    # Columns are numbered from what is smaller on, to what is equal, to what is larger: no two of these are equal.
    kth = kth.nan_to_num(nan=math.inf, posinf=math.inf)
    numbers = torch.lt(values, kth).to(torch.int32).add_(values <= kth).mul_(-width)
    numbers += torch.arange(width, dtype=torch.int32, device=values.device)
    return numbers.topk(k, dim=1, largest=False).values.remainder_(width).to(torch.int64)
