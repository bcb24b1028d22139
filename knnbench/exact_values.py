"""Values of pairs of queries and corpus rows on the host: in float64 within known bounds, and exactly.

A value is what a metric accumulates, of the rows as they are given; for cosine, the squared difference of the rows
brought to unit length, ``2 - 2 cos``. What is exact is either an expansion of float64 numbers that lost nothing
(`knnbench.kernels.cpu_exact`) or a whole number, which Python holds at any size: floats are whole numbers of a small
enough power of two.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from knnbench import double_double, interchange
from knnbench.blocking import slices
from knnbench.bounds import Floats, interval
from knnbench.dtypes import Array
from knnbench.errors import InvalidInputError
from knnbench.metrics import Space, add_product, square_root
from knnbench.sortable import (
    binary_from,
    binary_string,
    binary_strings,
    doubles_from,
    fraction_from,
    fraction_string,
)
from knnbench.threads import run_tasks, thread_count

__all__ = ["Values", "distances_of", "whole_values"]

# Elements of rows that are converted at once, where kernels cannot read them as they lie.
PIECE_ELEMENTS = 1 << 20

# Features of pairs that a thread takes at once, and below which a second thread is not worth starting.
TASK_ELEMENTS, SMALL = 1 << 17, 1 << 20

# Pairs whose exact values are held at once, at the most, and the bytes that one takes, of all that may be nearest too:
# whole numbers of a thousand bits and more, and what they are made from.
EXACT_PAIRS, PAIR_BYTES = 1 << 17, 640

# Rows for which there is room, at the least, of all that may be nearest to one of several queries.
LEAST_ROOM = 1 << 12

# Strings that become distances together.
DISTANCES = 1 << 12

# Components of an expansion: two hold most sums of float32, eight nearly anything.
FEW_COMPONENTS, MANY_COMPONENTS = 2, 8

# Squared lengths, and values, of which neither overflow nor underflow took a digit.
SMALLEST, LARGEST = 2.0**-800, 2.0**1000

# Rows that show how all may be, and queries from which it pays to look at all.
SAMPLE, MANY_QUERIES = 256, 16

# A cosine distance that is not as near as this to the exact one is computed from whole numbers.
NEAR = 2.0**-60

SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)


class Rows:
    """Rows on the host, for kernels that read them C-contiguous and of one dtype: as they lie, or copied in pieces."""

    def __init__(self, rows: Any, dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype = interchange.to_host(rows), dtype
        flags = self._rows.flags
        is_plain = self._rows.dtype == dtype and flags.c_contiguous and flags.aligned
        self.n_features = self._rows.shape[1]
        self.piece = len(self._rows) if is_plain else max(1, PIECE_ELEMENTS // self.n_features)
        self._is_plain = is_plain

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: Array) -> tuple[Array, Array]:
        """Return an array, and where in it the rows are that `index` names."""
        if self._is_plain:
            return self._rows, index
        unique, places = np.unique(index, return_inverse=True)
        return self._converted(self._rows[unique]), places

    def taken(self, index: Array) -> Array:
        """Return a copy of the rows that `index` names."""
        rows, places = self.at(index)
        return rows[places]

    def part(self, rows: slice) -> Array:
        """Return rows that lie together."""
        return self._rows[rows] if self._is_plain else self._converted(self._rows[rows])

    def _converted(self, rows: Array) -> Array:
        with np.errstate(over="ignore"):  # of a long double; what cannot be converted was refused at the edge
            return np.ascontiguousarray(rows, dtype=self._dtype)


class Values:
    """Values of pairs.

    Parameters
    ----------
    space : Space
        Of floats.
    queries, corpus : (n, n_features) arrays
        As they were given.
    budget : int
        Bytes to be held at the most.
    exponent : int
        What distances and strings are of is the value times two to this power: of rows that were scaled.

    Attributes
    ----------
    group : int
        Queries that `nearest` may be asked for together.
    """

    def __init__(self, space: Space, queries: Any, corpus: Any, budget: int, exponent: int = 0) -> None:
        self._space, self._budget, self._exponent = space, budget, exponent
        self._queries, self._corpus = Rows(queries, space.dtype), Rows(corpus, space.dtype)
        self._is_exact = False  # whether float64 values are
        self._was_searched = False
        self._pairs = max(1, min(EXACT_PAIRS, budget // PAIR_BYTES))
        self.group = max(1, budget // (2 * PAIR_BYTES * min(len(self._corpus), LEAST_ROOM)))

    def interval(self, values: Floats) -> tuple[Floats, Floats]:
        """Return between which values the exact ones lie of which float64 has these."""
        return (values, values) if self._is_exact else interval(self._space, values)

    def ends(self, values: Floats) -> tuple[Floats, Floats]:
        """Return between which numbers the exact values lie of the rows as they were before they were scaled.

        Infinite at the upper end where float64 does not tell.
        """
        low, high = self.interval(values)
        with np.errstate(over="ignore", under="ignore"):
            low, high = np.ldexp(low, self._exponent), np.nextafter(np.ldexp(high, self._exponent), np.inf)
        return low, np.where(np.isnan(high), np.inf, high)

    def approximate(self, i: Array, j: Array) -> Floats:
        """Return the values of pairs in float64; NaN for rows whose length float64 cannot work with.

        Parameters
        ----------
        i, j : (n_pairs,) arrays of int64
            Queries and corpus rows.
        """
        from knnbench.kernels.cpu_exact import wide_kernels, workspace

        kernel, result = wide_kernels(self._space).pairs, np.empty(len(i))
        for some in slices(len(i), self._piece(len(i))):
            queries, rows = self._queries.at(i[some])
            corpus, columns = self._corpus.at(j[some])
            scales, found = (self._scales(queries, rows), self._scales(corpus, columns)), result[some]
            self._run(kernel, len(rows), (queries, corpus, rows, columns, *scales), (found,), room=workspace)
            found[(scales[0] == 0) | (scales[1] == 0)] = np.nan
        return result

    def nearest(self, i: Array, k: int, known: Floats) -> tuple[list[Array], list[Floats]]:
        """Return for each of some queries the corpus rows that may be among the k nearest, and their values in float64.

        All rows are looked at; those whose interval begins above the k-th smallest end of one are left out. Where too
        many are left, the k nearest of them are kept.

        Parameters
        ----------
        i : (n,) array of int64
            Queries.
        k : int
        known : (n,) array of float64
            Values by `approximate` that at least k rows do not exceed; NaN where none is known.
        """
        from knnbench.kernels.cpu_exact import wide_kernels, workspace

        self._look(len(i))
        kernel, n_queries = wide_kernels(self._space).block, len(i)
        rows, places = self._queries.at(i)
        scales = self._scales(rows, places)
        queries = rows[places].astype(np.float64) * scales[:, None]
        lists, kept = [np.empty(0, np.int64) for _ in i], [np.empty(0) for _ in i]
        most = self.interval(known)[1]
        room = max(2 * k, self._budget // (2 * PAIR_BYTES * n_queries))
        step = max(1, min(self._corpus.piece, room, self._budget // (8 * (n_queries + 12))))
        for part in slices(len(self._corpus), step):
            corpus, width = self._corpus.part(part), part.stop - part.start
            of_corpus, values = self._scales(corpus, np.arange(width)), np.empty((n_queries, width))
            self._run(kernel, width, (queries, corpus, of_corpus), (values,), pairs=n_queries, room=workspace)
            values[:, of_corpus == 0] = np.nan
            values[scales == 0] = np.nan
            for q in range(n_queries):
                found = self._not_above(values[q], most[q])
                lists[q], kept[q] = self._smallest(
                    np.concatenate([lists[q], found + part.start]), np.concatenate([kept[q], values[q, found]]), k
                )
                if len(lists[q]) > room:
                    (nearest,), (of_nearest,), _ = self.first(i[q : q + 1], lists[q : q + 1], kept[q : q + 1], k)
                    order = np.argsort(nearest)
                    lists[q], kept[q] = nearest[order], of_nearest[order]
        return lists, kept

    def _not_above(self, values: Floats, limit: float) -> Array:
        """Return the places of all values whose interval may begin at a limit or below, and of some others."""
        # Intervals grow with their values, so that one looked at is enough to leave out all above it.
        most = limit * (1 + 1e-9) + SMALLEST
        if np.isfinite(most) and self.interval(np.array([most]))[0][0] > limit:
            return np.nonzero(~(values >= most))[0]
        return np.arange(len(values))

    def _smallest(self, indices: Array, values: Floats, k: int) -> tuple[Array, Floats]:
        """Return those of some rows, in ascending order of indices, that may be among the k smallest."""
        if len(values) <= k:
            return indices, values
        low, high = self.interval(values)
        near = np.nonzero(low <= np.partition(high, k - 1)[k - 1])[0]
        if self._is_exact and len(near) > k:  # of equals the first are kept
            near = np.sort(near[np.argsort(values[near], kind="stable")[:k]])
        return indices[near], values[near]

    def first(self, i: Array, lists: list[Array], values: list[Floats], k: int) -> tuple[Array, Floats, int]:
        """Return the k nearest among some rows, in exact order.

        Parameters
        ----------
        i : (n,) array
            Queries.
        lists, values : lists of n arrays
            At least k different rows for each query, and their values in float64.
        k : int

        Returns
        -------
        nearest : (n, k) array of int64
        values : (n, k) array of float64
        n_settled : int
            Queries that were put in order by exact arithmetic.
        """
        nearest, found, close = np.empty((len(i), k), np.int64), np.empty((len(i), k)), []
        for q, (indices, approximate) in enumerate(zip(lists, values, strict=True)):
            order = np.lexsort((indices, approximate))
            low, high = self.interval(approximate[order])
            is_apart = bool((high[: min(k, len(order) - 1)] < low[1 : k + 1]).all())
            if self._is_exact or (is_apart and not np.isnan(approximate).any()):
                nearest[q], found[q] = indices[order[:k]], approximate[order[:k]]
            else:
                close.append(q)
        for some in in_groups(close, [len(lists[q]) for q in close], self._pairs):
            ranks = self._ranks(i[some], [lists[q] for q in some], [values[q] for q in some])
            for q, rank in zip(some, ranks, strict=True):
                order = np.lexsort((lists[q], rank))[:k]
                nearest[q], found[q] = lists[q][order], values[q][order]
        return nearest, found, len(close)

    def distances(self, i: Array, j: Array, values: Floats) -> Array:
        """Return the distances of pairs whose values in float64 are given.

        The exact distance is rounded to float64 and, if that is the dtype of the answer, to float32: it is the same
        however it was found.

        Parameters
        ----------
        i, j : (n_pairs,) arrays of int64
        values : (n_pairs,) array of float64
        """
        result = np.empty(len(i), self._space.output)
        for some in slices(len(i), self._pairs):
            result[some] = self._distances(i[some], j[some], values[some])
        return result

    # What follows is exact.

    def _ranks(self, i: Array, lists: list[Array], values: list[Floats]) -> Iterator[Array]:
        """Yield for each query the ranks of its rows by exact values, equal for equal values."""
        # Rows that are equal have the same value, whatever that is: only one of them is computed.
        heads = [self._heads(indices, approximate) for indices, approximate in zip(lists, values, strict=True)]
        distinct = [np.unique(places) for places in heads]
        owners = np.repeat(i, [len(places) for places in distinct])
        columns = np.concatenate([indices[places] for indices, places in zip(lists, distinct, strict=True)])
        ends = np.cumsum([len(places) for places in distinct]).tolist()
        parts = [slice(end - len(places), end) for end, places in zip(ends, distinct, strict=True)]
        rank_parts = self._ranks_of_cosines if self._space.metric.unit_rows else self._ranks_of_sums
        for places, unique, ranks in zip(heads, distinct, rank_parts(owners, columns, parts), strict=True):
            yield ranks[np.searchsorted(unique, places)]

    def _heads(self, indices: Array, values: Floats) -> Array:
        """Return for each of some rows the place of the first that equals it, looked for among equal values."""
        from knnbench.kernels.cpu_exact import equal_rows

        heads, order = np.arange(len(indices)), np.lexsort((indices, values))
        is_later = np.zeros(len(order), bool)
        is_later[1:] = values[order[1:]] == values[order[:-1]]
        first = order[np.maximum.accumulate(np.where(is_later, 0, np.arange(len(order))))]
        later = np.nonzero(is_later)[0]
        for some in slices(len(later), self._piece(len(later))):
            rows, head = order[later[some]], first[later[some]]
            corpus, columns = self._corpus.at(np.concatenate([indices[rows], indices[head]]))
            same = np.empty(len(rows), bool)
            self._run(equal_rows, len(rows), (corpus, columns[: len(rows)], columns[len(rows) :]), (same,))
            heads[rows[same]] = head[same]
        return heads

    def _ranks_of_sums(self, i: Array, j: Array, parts: list[slice]) -> Iterator[Array]:
        few, lost = self._expansions(self._queries, i, self._corpus, j, FEW_COMPONENTS, self._space.form.accumulate)
        for part in parts:
            if (lost[part] == 0).all() or are_apart(few[part], lost[part]):
                yield dense_ranks(few[part, 1], few[part, 0])
            else:
                yield ranks_of(self._whole(i[part], j[part])[0])

    def _ranks_of_cosines(self, i: Array, j: Array, parts: list[slice]) -> Iterator[Array]:
        for part in parts:
            products, norms = self._products(
                (self._queries, i[part], self._corpus, j[part]), (self._corpus, j[part], self._corpus, j[part])
            )
            yield ranks_of([Cosine(product, norm) for product, norm in zip(products, norms, strict=True)])

    def _products(self, *pairs: tuple["Rows", Array, "Rows", Array]) -> list[list[int]]:
        """Return the dot products of pairs of rows, each given as (left, i, right, j), in one unit for all."""
        expansions = [self._expansions(*pair, MANY_COMPONENTS, add_product) for pair in pairs]
        if all((lost == 0).all() for _, lost in expansions):
            return [whole_numbers(found) for found, _ in expansions]
        left = np.concatenate([rows.taken(i) for rows, i, _, _ in pairs])
        right = np.concatenate([rows.taken(j) for _, _, rows, j in pairs])
        numbers, _ = whole_values(add_product, left, right)
        return [numbers[part] for part in slices(len(numbers), len(pairs[0][1]))]

    def _whole(self, i: Array, j: Array) -> tuple[list[int], int]:
        """Return the values of pairs as whole numbers, and the exponent of the power of two that they are multiples
        of."""
        accumulate = self._space.form.accumulate
        many, lost = self._expansions(self._queries, i, self._corpus, j, MANY_COMPONENTS, accumulate)
        if (lost == 0).all():
            return whole_numbers(many), UNIT_EXPONENT
        return whole_values(accumulate, self._queries.taken(i), self._corpus.taken(j))

    def _expansions(
        self, left: Rows, i: Array, right: Rows, j: Array, components: int, accumulate: Callable[..., Any]
    ) -> tuple[Floats, Floats]:
        """Return the values of pairs of rows as expansions, and what each lost at the most."""
        from knnbench.kernels.cpu_exact import expansion_kernel

        kernel = expansion_kernel(accumulate)
        result, lost = np.zeros((len(i), components)), np.zeros(len(i))
        for some in slices(len(i), self._piece(len(i))):
            queries, rows = left.at(i[some])
            corpus, columns = right.at(j[some])
            self._run(kernel, len(rows), (queries, corpus, rows, columns), (result[some], lost[some]))
        return result, lost

    def _distances(self, i: Array, j: Array, values: Floats) -> Array:
        result, left = np.empty(len(i), self._space.output), np.arange(len(i))
        from_pairs = self._from_dots if self._space.metric.unit_rows else self._from_expansions
        with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
            if self._space.output == np.float32:
                result, good = self._from_intervals(values)
                left = np.nonzero(~good)[0]
            if len(left):
                found, good = from_pairs(i[left], j[left])
                # Among subnormal numbers a power of two rounds once more.
                good &= (np.abs(found) > SMALLEST_NORMAL) | (found == 0)
                result[left], left = found, left[~good]
            for p in left:
                result[p] = self._exact_distance(i[p : p + 1], j[p : p + 1])
        return result

    def _from_intervals(self, values: Floats) -> tuple[Array, Array]:
        """Return distances in float32 from values in float64, and which are certain."""
        low, high = self.interval(values)
        result, least, most = (
            self._unscaled(self._space.form.finish(np, x)).astype(np.float32) for x in (values, low, high)
        )
        return result, least == most

    def _from_expansions(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Return distances in float64 from two components, and which are certain."""
        few, lost = self._expansions(self._queries, i, self._corpus, j, FEW_COMPONENTS, self._space.form.accumulate)
        value = double_double.Double(few[:, 0], few[:, 1])
        within, is_zero = (value.high >= SMALLEST) & (value.high <= LARGEST), (value.high == 0) & (lost == 0)
        if self._space.form.finish is square_root:
            error = double_double.ERROR + lost / value.high
            value = double_double.root(value)
            lost = value.high * error
        return self._unscaled(value.high), is_zero | (within & is_rounded(value, lost))

    def _from_dots(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Return cosine distances in float64 from two components of the products, and which are certain."""
        dots, lost_dots = self._expansions(self._queries, i, self._corpus, j, FEW_COMPONENTS, add_product)
        of_corpus, lost_corpus = self._expansions(self._corpus, j, self._corpus, j, FEW_COMPONENTS, add_product)
        unique, places = np.unique(i, return_inverse=True)
        of_queries, lost_queries = (
            x[places]
            for x in self._expansions(self._queries, unique, self._queries, unique, FEW_COMPONENTS, add_product)
        )
        dot, queries, corpus = (double_double.Double(x[:, 0], x[:, 1]) for x in (dots, of_queries, of_corpus))
        result, share, length = double_double.one_minus_cosine(dot, queries, corpus)
        lost = lost_queries / queries.high + lost_corpus / corpus.high + 2 * lost_dots / length
        # Their product, too, is to be within the range.
        smaller, larger = np.minimum(queries.high, corpus.high), np.maximum(queries.high, corpus.high)
        within = (smaller >= SMALLEST**0.5) & (larger <= 2.0**500)
        within &= lost + double_double.ERROR <= NEAR * share
        return result.high, within & is_rounded(result, result.high * (lost + double_double.ERROR) / share)

    def _unscaled(self, distances: Any) -> Any:
        """Return distances of the rows before they were scaled."""
        return np.ldexp(distances, self._exponent // (2 if self._space.form.finish is square_root else 1))

    def strings(self, i: Array, j: Array) -> Array:
        """Return the exact values of pairs as strings of bytes, in whose order they are nearest: `distances_of` has
        them as distances.

        Of cosine it is ``1 - c |c|``, c the cosine.

        Parameters
        ----------
        i, j : (n_pairs,) arrays of int64

        Returns
        -------
        (n_pairs,) array of bytes
        """
        found = [self._strings(i[some], j[some]) for some in slices(len(i), self._pairs)]
        return np.concatenate(found) if found else np.empty(0, "S1")

    def _strings(self, i: Array, j: Array) -> Array:
        if self._space.metric.unit_rows:
            return np.array([fraction_string(*fraction) for fraction in self._fractions(i, j)])
        few, lost = self._expansions(self._queries, i, self._corpus, j, FEW_COMPONENTS, self._space.form.accumulate)
        strings, is_whole = binary_strings(double_double.Double(few[:, 0], few[:, 1]), self._exponent)
        left = np.nonzero((lost != 0) | ~is_whole)[0]
        if len(left):
            numbers, exponent = self._whole(i[left], j[left])
            found = np.array([binary_string(number, exponent + self._exponent) for number in numbers])
            strings = strings.astype(np.result_type(strings, found))
            strings[left] = found
        return strings

    def _fractions(self, i: Array, j: Array) -> list[tuple[int, int]]:
        """Return ``1 - c |c|`` for the cosine c of each pair, as numerator and denominator."""
        queries, corpus = (self._queries, i), (self._corpus, j)
        products = self._products((*queries, *corpus), (*queries, *queries), (*corpus, *corpus))
        return [(a * b - dot * abs(dot), a * b) for dot, a, b in zip(*products, strict=True)]

    def _exact_distance(self, i: Array, j: Array) -> float:
        """Return the distance of one pair from whole numbers."""
        if self._space.metric.unit_rows:
            return distance_of(self._space, *self._fractions(i, j)[0])
        (value,), exponent = self._whole(i, j)
        return distance_of(self._space, value, exponent + self._exponent)

    # What kernels need.

    def _scales(self, rows: Array, index: Array) -> Floats:
        """Return what rows are multiplied by: 1 over their lengths for cosine, and 0 where that is out of reach."""
        if not self._space.metric.unit_rows:
            return np.ones(len(index))
        from knnbench.kernels.cpu_exact import squared_norms

        squares = np.empty(len(index))
        self._run(squared_norms, len(index), (rows, index), (squares,))
        within = (squares > SMALLEST) & (squares < LARGEST)
        return np.where(within, 1 / np.sqrt(np.where(within, squares, 1.0)), 0.0)

    def _look(self, n_queries: int) -> None:
        """See whether float64 values are exact; what some rows suggest must hold for all."""
        if self._was_searched or self._space.metric.unit_rows or n_queries < MANY_QUERIES:
            return
        self._was_searched = True
        form, n_features = self._space.form, self._space.n_features
        bits = 0 if form.reduce is max else n_features.bit_length()
        width = 2.0 ** ((53 - bits) // degree(form.accumulate) - 1)
        unit = min(lowest_bit(rows.part(slice(0, min(len(rows), SAMPLE)))) for rows in (self._queries, self._corpus))
        if 2.0**-400 < unit < 2.0**400:
            # Differences are then below twice this many units, their squares and sums whole numbers below 2**53.
            inverse = 1 / unit
            self._is_exact = self._holds(lambda part: is_whole(part.astype(np.float64) * inverse, width))

    def _holds(self, condition: Callable[[Array], Any]) -> bool:
        """Return whether something is so for all rows, a piece at a time."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return all(
                condition(rows.part(part))
                for rows in (self._queries, self._corpus)
                for part in slices(len(rows), max(1, TASK_ELEMENTS // self._space.n_features))
            )

    def _piece(self, n_pairs: int) -> int:
        """Return how many pairs may be taken at once."""
        rows = (self._queries, self._corpus)
        return max(1, min(r.piece if r.piece < len(r) else max(1, n_pairs) for r in rows))

    def _run(
        self,
        kernel: Callable[..., Any],
        n: int,
        given: tuple[Any, ...],
        out: tuple[Any, ...],
        *,
        pairs: int = 1,
        room: Callable[[int], tuple[Array, ...]] | None = None,
    ) -> None:
        """Run a kernel on n pieces of work, on all threads; `room` gives what each piece works in."""
        each = pairs * self._space.n_features
        parts = slices(n, max(1, TASK_ELEMENTS // each))
        threads = thread_count() if n * each >= SMALL else 1

        def task(part: slice) -> None:
            work = room(self._space.n_features) if room else ()
            kernel(*given, *work, part.start, part.stop, *out)

        run_tasks(task, parts if threads > 1 else [slice(0, n)], threads)


class Cosine:
    """The cosine of a query and a row by their dot product and the squared norm of the row; a larger one comes
    first."""

    __slots__ = ("_norm", "_square")

    def __init__(self, product: int, norm: int) -> None:
        self._square, self._norm = product * abs(product), norm

    def __lt__(self, other: "Cosine") -> bool:
        return self._square * other._norm > other._square * self._norm

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cosine) and self._square * other._norm == other._square * self._norm

    __hash__ = None  # type: ignore[assignment]


# The smallest float64 above 0 is this power of two, and all others are multiples of it.
UNIT_EXPONENT = -1074


def whole_numbers(expansions: Floats) -> list[int]:
    """Return the sums of the rows of an array, as multiples of ``2**UNIT_EXPONENT``.

    Examples
    --------
    >>> whole_numbers(np.array([[1.0, 2.0**-60]]))[0] == (2**60 + 1) << 1014
    True
    """
    return [
        sum(numerator << (-UNIT_EXPONENT + 1 - denominator.bit_length()) for numerator, denominator in ratios)
        for ratios in ([number.as_integer_ratio() for number in row] for row in expansions.tolist())
    ]


def whole_values(accumulate: Callable[..., Any], left: Array, right: Array) -> tuple[list[int], int]:
    """Return the exact values of pairs of rows, in Python's integers: the definition, and the last resort.

    Parameters
    ----------
    accumulate : callable
        The scalar step of a metric.
    left, right : (n_pairs, n_features) arrays of floats

    Returns
    -------
    values : list of int
    exponent : int
        The values are multiples of ``2**exponent``.

    Examples
    --------
    >>> from knnbench.metrics import add_square
    >>> values, exponent = whole_values(add_square, np.array([[0.5, 3.0]]), np.array([[0.0, 1.0]]))
    >>> values[0] * 2.0**exponent
    4.25
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise InvalidInputError("NaN or infinity has no exact distance; expected finite values.")
    (of_left, left_exponents), (of_right, right_exponents) = np.frexp(left), np.frexp(right)
    used = np.concatenate([left_exponents[of_left != 0], right_exponents[of_right != 0]])
    unit = int(used.min(initial=0))
    pairs = zip(_wholes(of_left, left_exponents - unit), _wholes(of_right, right_exponents - unit), strict=True)
    sums = [functools.reduce(lambda acc, ab: accumulate(acc, *ab), zip(a, b, strict=True), 0) for a, b in pairs]
    return sums, degree(accumulate) * (unit - 53)


def _wholes(fractions: Array, exponents: Array) -> Iterator[list[int]]:
    wholes = (fractions * 2.0**53).astype(np.int64)
    shifts = np.where(wholes == 0, 0, exponents)
    for row, by in zip(wholes.tolist(), shifts.tolist(), strict=True):
        yield [number << shift for number, shift in zip(row, by, strict=True)]


def degree(accumulate: Callable[..., Any]) -> int:
    """Return the power of a factor of both rows with which the value grows: 2 for squares, 1 for differences."""
    return int(accumulate(0, 4, 2)) // int(accumulate(0, 2, 1)) // 2


def lowest_bit(rows: Array) -> float:
    """Return the largest power of two that all numbers are multiples of, infinity if all are 0.

    Examples
    --------
    >>> lowest_bit(np.array([6.0, 0.0, -0.75]))
    0.25
    """
    fractions, exponents = np.frexp(rows[rows != 0].astype(np.float64))
    wholes = (fractions * 2.0**53).astype(np.int64)
    return float(np.ldexp((wholes & -wholes).astype(np.float64), exponents - 53).min(initial=np.inf))


def is_whole(numbers: Array, limit: float) -> bool:
    """Return whether all are whole and below a limit in magnitude."""
    return bool(((np.rint(numbers) == numbers) & (np.abs(numbers) < limit)).all())


def dense_ranks(*keys: Array) -> Array:
    """Return the ranks of rows of keys, the last key first, as `numpy.lexsort` has it; equal rows have equal ranks.

    Examples
    --------
    >>> dense_ranks(np.array([0.0, 1.0, 0.0]), np.array([7.0, 5.0, 7.0]))
    array([1, 0, 1])
    """
    order = np.lexsort(keys)
    is_new = np.zeros(len(order), bool)
    for key in keys:
        is_new[1:] |= key[order[1:]] != key[order[:-1]]
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.cumsum(is_new)
    return ranks


def ranks_of(values: list[Any]) -> Array:
    """Return the ranks of things that can be compared, equal for equal ones.

    Examples
    --------
    >>> ranks_of([30, 10, 30])
    array([1, 0, 1])
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, rank = np.empty(len(values), np.int64), 0
    for before, place in zip([order[0], *order], order, strict=False):
        rank += values[before] != values[place]
        ranks[place] = rank
    return ranks


def are_apart(few: Floats, lost: Floats) -> bool:
    """Return whether sums of two components, each within what it lost, are in one order for certain."""
    if not np.isfinite(lost).all():
        return False
    order = np.lexsort((few[:, 1], few[:, 0]))
    # The difference of neighbours is rounded, in the second components, by less than a share of what they hold.
    gaps = np.diff(few[order, 0]) + np.diff(few[order, 1])
    doubt = 2 * (lost[order[1:]] + lost[order[:-1]]) + 2.0**-50 * (
        np.abs(few[order[1:], 1]) + np.abs(few[order[:-1], 1])
    )
    return bool((gaps > doubt).all())


def is_rounded(value: double_double.Double, error: Floats) -> Array:
    """Return whether all numbers within an error of the sum of two components round to the first."""
    # The ends are rounded outwards: an error that is too small to move half a unit moves it off the half.
    most = np.where(error > 0, np.nextafter(value.low + error, np.inf), value.low)
    least = np.where(error > 0, np.nextafter(value.low - error, -np.inf), value.low)
    rounded: Array = (value.high + most == value.high) & (value.high + least == value.high)
    return rounded


def in_groups(items: list[int], sizes: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Yield the items in groups whose sizes together stay below a limit, or are one item.

    Examples
    --------
    >>> list(in_groups([5, 6, 7], [2, 2, 9], 4))
    [[5, 6], [7]]
    """
    group: list[int] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def scaled(value: int, exponent: int) -> float:
    """Return ``value * 2**exponent`` rounded to the nearest float64.

    Examples
    --------
    >>> scaled(3, -1), scaled(1, 5000)
    (1.5, inf)
    """
    try:
        return float(value << exponent) if exponent >= 0 else value / (1 << -exponent)
    except OverflowError:
        return math.inf


def root_of(value: int, exponent: int) -> float:
    """Return the root of ``value * 2**exponent`` as a float64.

    Examples
    --------
    >>> root_of(9, -2), root_of(0, 0), root_of(1, 4000)
    (1.5, 0.0, inf)
    """
    # So many bits more that what the whole root leaves out is far below the rounding.
    shift = max(0, 160 - value.bit_length())
    shift += (exponent - shift) % 2
    number = value << shift
    root = math.isqrt(number)
    # A bit more tells which side of a number halfway between two of float64 it is on.
    return scaled(2 * root + (root * root != number), (exponent - shift) // 2 - 1)


def cosine_distance(numerator: int, denominator: int) -> float:
    """Return ``1 - c`` from the fraction ``1 - c |c|``, which is at least 0.

    Notes
    -----
    For p / r, ``|c| = sqrt(|r - p| / r)``; where c is positive it is ``p / (r + sqrt((r - p) r))``, in which nothing
    cancels that is not exact.

    Examples
    --------
    >>> cosine_distance(0, 9), cosine_distance(18, 9), cosine_distance(5, 5), cosine_distance(3, 4)
    (0.0, 2.0, 1.0, 0.5)
    """
    shift = max(0, 320 - 2 * denominator.bit_length()) // 2
    root = math.isqrt(abs(denominator - numerator) * denominator << 2 * shift)
    if numerator >= denominator:
        return ((denominator << shift) + root) / (denominator << shift)
    return (numerator << shift) / ((denominator << shift) + root)


def distance_of(space: Space, value: int, other: int) -> float:
    """Return the distance of an exact value, rounded to float64.

    Parameters
    ----------
    space : Space
        Of floats.
    value, other : int
        The value is ``value * 2**other``, and for cosine ``1 - c |c|`` is ``value / other``.
    """
    if space.metric.unit_rows:
        return cosine_distance(value, other)
    return root_of(value, other) if space.form.finish is square_root else scaled(value, other)


def distances_of(space: Space, strings: Array) -> Array:
    """Return the distances of exact values, as `Values.distances` has them.

    Parameters
    ----------
    space : Space
        Of floats.
    strings : array of bytes
        By `Values.strings`.

    Returns
    -------
    array of `Space.output`, of the same shape
    """
    result = np.empty(strings.size, space.output)
    from_strings = _from_fractions if space.metric.unit_rows else _from_binary
    with np.errstate(over="ignore", under="ignore"):
        for some in slices(strings.size, DISTANCES):
            result[some] = from_strings(space, strings.reshape(-1)[some])
    return result.reshape(strings.shape)


def _from_fractions(space: Space, strings: Array) -> Floats:
    return np.array([distance_of(space, *fraction_from(string)) for string in strings.tolist()])


def _from_binary(space: Space, strings: Array) -> Floats:
    value, exponents, good = doubles_from(strings)
    if space.form.finish is square_root:
        odd = exponents % 2  # of which the root is no power of two
        value = double_double.root(double_double.Double(*(np.ldexp(part, odd) for part in value)))
        exponents = (exponents - odd) // 2
        good &= is_rounded(value, value.high * double_double.ERROR)
    result: Floats = np.ldexp(value.high, exponents)
    good &= (result > SMALLEST_NORMAL) | (value.high == 0)  # among subnormal numbers it was rounded once more
    for p in np.nonzero(~good)[0]:
        result[p] = distance_of(space, *binary_from(strings[p]))
    return result
