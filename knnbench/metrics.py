"""The one place where a metric exists.

A distance is computed in three steps::

    prepare_rows      once per row         cosine on floats: rows of unit length
    accumulate        once per feature     acc = accumulate(acc, a, b), starting from 0
    rank, finish      once per pair kept   accumulated value -> value ranked -> distance

`accumulate` is plain Python on scalars. The naive backend calls it, numba compiles the same function
for the CPU and for CUDA, and every faster form (the Gram form, the array forms) is tested against it.
`finish` never decreases, so k-nearest-neighbour search ranks by the value before it and finishes only
the k columns that it returns.

To add a metric, add one record to `METRICS`; CONTRIBUTING.md says what is then tested by itself.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knnbench.blocking import chunk_rows, slices
from knnbench.dtypes import Array, integer_accumulator
from knnbench.errors import InvalidInputError

__all__ = ["METRICS", "Form", "Metric", "Space", "get_metric"]

# Scalars and arrays of any library share these functions, which no annotation short of Any describes.
Number = Any


# Scalar steps: compiled by numba for both of its targets, so they use nothing but arithmetic.


def add_square(acc: Number, a: Number, b: Number) -> Number:
    """Add the squared difference of one feature."""
    difference = a - b
    return acc + difference * difference


def add_absolute(acc: Number, a: Number, b: Number) -> Number:
    """Add the absolute difference of one feature."""
    return acc + abs(a - b)


def keep_largest(acc: Number, a: Number, b: Number) -> Number:
    """Keep the largest absolute difference seen so far."""
    return max(acc, abs(a - b))


def add_product(acc: Number, a: Number, b: Number) -> Number:
    """Add the product of one feature."""
    return acc + a * b


def as_accumulated(acc: Number, query_norm: Number, corpus_norm: Number) -> Number:
    """Rank by the accumulated value itself."""
    return acc


def cosine_from_dot(acc: Number, query_norm: Number, corpus_norm: Number) -> Number:
    """Return ``1 - dot / sqrt(|q|^2 |c|^2)`` in float64.

    The norms are integers below 2**53, so their product is rounded once whether it is taken in
    integers or in float64, and in float64 it cannot overflow.
    """
    return 1.0 - acc / math.sqrt(float(query_norm) * float(corpus_norm))


# The same steps on arrays; `xp` is numpy, cupy or any module with these functions.


def ranked_as_accumulated(xp: Any, acc: Number, query_norms: Number, corpus_norms: Number) -> Number:
    """Array form of `as_accumulated`."""
    return acc


def ranked_cosine_from_dot(xp: Any, acc: Number, query_norms: Number, corpus_norms: Number) -> Number:
    """Array form of `cosine_from_dot`; norms are float64 columns and rows that broadcast."""
    return 1.0 - acc / xp.sqrt(query_norms * corpus_norms)


def step_squares(xp: Any, acc: Number, difference: Number) -> None:
    """Take one feature into `acc` in place as `add_square` does; `difference` is overwritten."""
    xp.multiply(difference, difference, out=difference)
    xp.add(acc, difference, out=acc)


def step_absolutes(xp: Any, acc: Number, difference: Number) -> None:
    """Take one feature into `acc` in place as `add_absolute` does; `difference` is overwritten."""
    xp.abs(difference, out=difference)
    xp.add(acc, difference, out=acc)


def step_largest(xp: Any, acc: Number, difference: Number) -> None:
    """Take one feature into `acc` in place as `keep_largest` does; `difference` is overwritten."""
    xp.abs(difference, out=difference)
    xp.maximum(acc, difference, out=acc)


def squares_from_dot(dot: Number, query_norms: Number, corpus_norms: Number) -> Number:
    """Return ``|q|^2 + |c|^2 - 2 q.c``, the Gram form of the squared distance."""
    return query_norms + corpus_norms - 2 * dot


def dot_itself(dot: Number, query_norms: Number, corpus_norms: Number) -> Number:
    """Return the dot product, which is what cosine on uint8 accumulates."""
    return dot


def unchanged(xp: Any, values: Number) -> Number:
    """Finish nothing: the ranked value is the distance."""
    return values


def square_root(xp: Any, values: Number) -> Number:
    """Finish a squared distance."""
    return xp.sqrt(values)


def half(xp: Any, values: Number) -> Number:
    """Finish the squared difference of unit rows: ``|q - c|^2 / 2 = 1 - q.c``."""
    return values / 2


def at_least_zero(xp: Any, values: Number) -> Number:
    """Finish ``1 - cosine``, which rounding can take below 0 by one unit in the last place."""
    return xp.maximum(values, 0)


@dataclass(frozen=True, slots=True)
class Form:
    """How a metric is computed on one family of dtypes.

    Attributes
    ----------
    accumulate : callable
        Scalar ``(acc, a, b) -> acc``.
    reduce : callable
        Takes the iterable of single terms ``accumulate(0, a, b)`` to the accumulated value, rounded
        once; the oracle's form of `accumulate`.
    step : callable or None
        Array form of `accumulate`: ``(xp, acc, difference)`` takes one feature of many pairs into `acc`,
        in place. None if the metric does not work on differences; it then has `from_dot`.
    from_dot : callable or None
        ``(dot, |q|^2, |c|^2) -> accumulated``: the Gram form, a matrix product. On uint8 it is
        exact; on floats it cancels, see `Space.gram_error`.
    rank, rank_arrays : callable
        The value that is ranked, from the accumulated value and the squared norms; scalar and arrays.
    rank_uses_norms : bool
        Whether they look at the norms. Such values are float64.
    finish : callable
        ``(xp, ranked) -> distances``; never decreases.
    keeps_integers : bool
        On uint8: whether distances are exact integers; otherwise they come back as float32.
    operations : dict of str to float
        How many additions (``add``) and fused multiply-adds (``fma``) `accumulate` needs at the least. What
        takes a sign away or keeps the larger counts nothing: other units of a processor do it meanwhile.
    """

    accumulate: Callable[[Number, Number, Number], Number]
    reduce: Callable[[Iterable[Number]], Number]
    step: Callable[[Any, Number, Number], None] | None
    from_dot: Callable[[Number, Number, Number], Number] | None = None
    rank: Callable[[Number, Number, Number], Number] = as_accumulated
    rank_arrays: Callable[[Any, Number, Number, Number], Number] = ranked_as_accumulated
    rank_uses_norms: bool = False
    finish: Callable[[Any, Number], Number] = unchanged
    keeps_integers: bool = True
    operations: Mapping[str, float] = field(default_factory=lambda: {"add": 1, "fma": 1})


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its names, its formula and its forms.

    Attributes
    ----------
    name : str
        Canonical name, scipy's.
    aliases : tuple of str
        Other names that users type.
    formula : str
        What is computed.
    floating, integer : Form
        How, on float32 and float64, and on uint8.
    unit_rows : bool
        Whether float rows are brought to unit length first (`prepare_rows`); rows of zeros, which
        have no direction, are then refused for every dtype.
    """

    name: str
    aliases: tuple[str, ...]
    formula: str
    floating: Form
    integer: Form
    unit_rows: bool = False

    def prepare_rows(self, xp: Any, rows: Number) -> Number:
        """Return float `rows` as this metric accumulates them.

        Parameters
        ----------
        xp : module
            numpy, cupy.
        rows : (n, n_features) array of float32 or float64

        Returns
        -------
        (n, n_features) array of the same dtype
            `rows` itself, or for cosine a copy whose rows have unit length (`unit_rows`).
        """
        if not self.unit_rows:
            return rows
        result = xp.empty_like(rows)
        for chunk in slices(len(rows), chunk_rows(rows.shape[1])):
            result[chunk] = unit_rows(xp, rows[chunk])
        return result


def unit_rows(xp: Any, rows: Number) -> Number:
    """Return float rows divided by their length, which neither overflows nor underflows.

    Each is first scaled to a largest element of about 1, by a power of two, which is exact.
    """
    _, exponents = xp.frexp(xp.abs(rows).max(axis=1))
    # In two steps: the power of two that lifts the smallest subnormals is itself out of range.
    first = exponents // 2
    scaled = xp.ldexp(xp.ldexp(rows, -first[:, None]), -(exponents - first)[:, None])
    norms = xp.sqrt(xp.einsum("nf,nf->n", scaled, scaled, dtype=np.float64))
    return (scaled / norms[:, None]).astype(rows.dtype)


@dataclass(frozen=True, slots=True)
class Space:
    """A metric on rows of one dtype and length: every dtype that follows is decided here.

    Attributes
    ----------
    metric : Metric
    dtype : numpy.dtype
        uint8, float32 or float64: what the rows are stored and computed in.
    n_features : int
    """

    metric: Metric
    dtype: np.dtype[Any]
    n_features: int

    @property
    def is_integer(self) -> bool:
        """Whether rows are uint8, and the accumulation therefore exact."""
        return self.dtype.kind == "u"

    @property
    def form(self) -> Form:
        """How the metric is computed on this dtype."""
        return self.metric.integer if self.is_integer else self.metric.floating

    @property
    def accumulator(self) -> np.dtype[Any]:
        """Dtype of the accumulated value."""
        return integer_accumulator(self.n_features) if self.is_integer else self.dtype

    @property
    def ranked(self) -> np.dtype[Any]:
        """Dtype of the value that neighbours are ranked by."""
        return np.dtype(np.float64) if self.form.rank_uses_norms else self.accumulator

    @property
    def output(self) -> np.dtype[Any]:
        """Dtype of the distances returned."""
        if not self.is_integer:
            return self.dtype
        return self.accumulator if self.form.keeps_integers else np.dtype(np.float32)

    @property
    def gram_error(self) -> float:
        """The declared error of the float Gram form, as a factor of ``|q|^2 + |c|^2`` of centred rows.

        Notes
        -----
        With u = eps / 2, a dot product of n terms is off by at most ``n u |q| |c|`` and a squared norm by ``n u |q|^2``
        in any order of summation [1]_, the two additions that join them by ``3 u (|q|^2 + |c|^2)``, or ``4 u`` where
        |q|^2 comes last, as on CUDA devices, and subtracting the centre moves a squared distance by at most ``4.1 u
        (|q|^2 + |c|^2)``: together less than ``(2 n + 9) u (|q|^2 + |c|^2)``. The norms themselves are known to ``n u``
        of their size, which the factor ``1 + n eps`` covers. What is left of ``7 u`` is for those who evaluate the
        bound, and for a filter that rounds its limit once: numba's
        takes ``limit = kth - |q|^2 + G (|q|^2 + (|q| + sqrt(kth))^2 + kth)`` and leaves out what has ``|c|^2 - 2 q.c``
        above it, so that the exact value of what it leaves out is at least `kth`. Underflow comes on top, see
        `knnbench.bounds`.

        References
        ----------
        .. [1] C.-P. Jeannerod and S. M. Rump, Improved error bounds for inner products in floating-point arithmetic,
           SIAM Journal on Matrix Analysis and Applications 34 (2013), 338-344; N. J. Higham, Accuracy and Stability of
           Numerical Algorithms, 2nd ed., SIAM 2002, section 3.1.
        """
        eps = float(np.finfo(self.dtype).eps)
        return (self.n_features + 8) * eps * (1 + self.n_features * eps)

    @property
    def larger_error(self) -> float:
        """The declared error of ``2 sum(max(q, c)) - sum(q) - sum(c)`` on floats, as a factor of ``|q|_1 + |c|_1``.

        With u = eps / 2, a sum of n terms is off by at most ``n u`` times the sum of their absolute values in any order
        [1]_: the three sums, of which one is doubled, together by ``3 n u (|q|_1 + |c|_1)``; their combination and
        subtracting the centre add at most ``6 u (|q|_1 + |c|_1)``. The direct form that this is compared with may be
        off by ``(n + 2) u`` times the distance. Together less than ``(2 n + 16) eps (|q|_1 + |c|_1)``.

        References
        ----------
        .. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, section 4.2.
        """
        return (2 * self.n_features + 16) * float(np.finfo(self.dtype).eps)

    def operations(self, dtype: str, *, product: bool) -> dict[str, float]:
        """Return the operations that one feature of one pair takes at the least, computed in `dtype`.

        Parameters
        ----------
        dtype : {"float32", "float64"}
        product : bool
            Whether by a matrix product, where the metric has that form.

        Returns
        -------
        dict of str to float
            By names such as ``"fma-float32"``, those of `knnbench.measure.ceilings`.
        """
        counts = {"fma": 1} if product and self.form.from_dot is not None else self.form.operations
        return {f"{kind}-{dtype}": count for kind, count in counts.items()}

    def finish(self, ranked: Array) -> Array:
        """Return the distances of `ranked` values, an array of any shape, as `output`."""
        if self.form.finish is unchanged and ranked.dtype == self.output:
            return ranked
        result = np.empty(ranked.shape, self.output)
        for rows in slices(len(ranked), chunk_rows(max(1, ranked[0].size)) if ranked.size else 1):
            # float64 for integers: their roots are then rounded the same way by every backend.
            values = ranked[rows].astype(np.float64) if self.is_integer else ranked[rows]
            result[rows] = self.form.finish(np, values)
        return result


_SQUARES = Form(add_square, math.fsum, step_squares, squares_from_dot)
_SQUARES_ROOTED = Form(add_square, math.fsum, step_squares, squares_from_dot, finish=square_root, keeps_integers=False)
_ABSOLUTES = Form(add_absolute, math.fsum, step_absolutes, operations={"add": 2})
_LARGEST = Form(keep_largest, max, step_largest, operations={"add": 1})
_UNIT_SQUARES = Form(add_square, math.fsum, step_squares, squares_from_dot, finish=half)
_DOT = Form(
    add_product,
    sum,
    None,
    dot_itself,
    rank=cosine_from_dot,
    rank_arrays=ranked_cosine_from_dot,
    rank_uses_norms=True,
    finish=at_least_zero,
    keeps_integers=False,
    operations={"fma": 1},
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("euclidean", ("l2",), "sqrt(sum((q - c)^2))", _SQUARES_ROOTED, _SQUARES_ROOTED),
        Metric("sqeuclidean", (), "sum((q - c)^2)", _SQUARES, _SQUARES),
        Metric("cityblock", ("l1", "manhattan"), "sum(|q - c|)", _ABSOLUTES, _ABSOLUTES),
        Metric("chebyshev", ("linf",), "max(|q - c|)", _LARGEST, _LARGEST),
        Metric("cosine", (), "1 - q.c / (|q| |c|)", _UNIT_SQUARES, _DOT, unit_rows=True),
    )
}
"""Every metric by its canonical name."""

_BY_ANY_NAME = {name: metric for metric in METRICS.values() for name in (metric.name, *metric.aliases)}


def get_metric(name: str) -> Metric:
    """Return the metric of that name or alias.

    Parameters
    ----------
    name : str

    Returns
    -------
    Metric

    Raises
    ------
    InvalidInputError
        If there is none.

    Examples
    --------
    >>> get_metric("manhattan").name
    'cityblock'
    """
    try:
        return _BY_ANY_NAME[name]
    except (KeyError, TypeError):
        raise InvalidInputError(f"metric {name!r} is unknown; expected one of: {', '.join(_BY_ANY_NAME)}.") from None
