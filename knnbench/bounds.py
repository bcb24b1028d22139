"""How far computed values can be from exact ones: bounds known before anything is computed.

They are what ``accuracy="exact"`` rests on, so none of them is an estimate. Notation: ``u = eps / 2`` is the unit
roundoff of the dtype that is computed in, n the number of features, ``tiny`` the smallest normal number, x and y rows,
``e`` the exact accumulated value of a pair (a squared distance, a sum or a largest of absolute differences), ``v`` the
computed one. Operations are IEEE 754's, rounded to nearest: ``fl(a op b) = (a op b)(1 + d)``, ``|d| <= u``.

**Sums.** A sum of n terms, or a dot product, is off by at most ``n u`` times that of the magnitudes, in whatever order
it is added, with fused multiply-adds or without [2]_, [1]_ (section 3.1): no blocking, vector width or number of
threads matters. A bound here uses ``g(m) = m u / (1 - m u)``, which also covers products of m factors ``1 + d``.

**Underflow.** Each operation may in addition be off by `tiny`, absolutely: that holds for gradual underflow, where it
is much less, and for processors and libraries that take subnormal numbers as zero.

**Direct form.** A difference, its square and the sum are rounded, so that ``|v - e| <= g(n + 12) e + 8 n tiny``: 3
roundings for a term, n - 1 of additions, 4 where a library takes the root of the sum and squares it again, the rest for
evaluating the bound. A largest difference has no additions.

**Gram form**, `Space.gram_error`, which has the derivation: ``|v - e| <= G (|x|^2 + |y|^2)`` of centred rows.

**Rows of unit length**, for cosine. Let a and b be the exact unit rows, which differ by ``sqrt(e)``, and a', b' those
computed, each within `unit_shift` of it. Then ``|sqrt(e') - sqrt(e)| <= 2 unit_shift`` by the triangle inequality.

**What a search guarantees** about the rows that it did not return. Let it select by values v with ``|v - e| <= w e +
t``. For a row c that it left out and a row r that it returned, ``v(c) >= v(r)``, hence ``e(c) >= (e(r)(1 - w) - 2 t) /
(1 + w)``; `direct_floor` and `gram_floor` evaluate this.

References
----------
.. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002.
.. [2] C.-P. Jeannerod and S. M. Rump, Improved error bounds for inner products in floating-point arithmetic, SIAM
   Journal on Matrix Analysis and Applications 34 (2013), 338-344.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from knnbench.dtypes import Array
from knnbench.metrics import Space

__all__ = ["Floats", "direct_error", "direct_floor", "gram_floor", "halves_error", "interval", "unit_shift"]

Floats = npt.NDArray[np.float64]

# Relative errors beyond this would make the second-order terms that bounds leave out matter.
LARGEST = 0.01

DOUBLE = np.finfo(np.float64)


def direct_error(space: Space, dtype: npt.DTypeLike | None = None) -> tuple[float, float]:
    """Return the relative and the absolute error of accumulated values by the direct form.

    Parameters
    ----------
    space : Space
        Of floats.
    dtype : dtype, optional
        Computed in; by default that of the rows.

    Returns
    -------
    (float, float)
        ``|v - e| <= relative * e + absolute``. For cosine, of the rows that were computed: see `unit_shift`. Infinite
        where there are so many features that the bound says nothing.

    Examples
    --------
    >>> from knnbench.metrics import METRICS
    >>> relative, absolute = direct_error(Space(METRICS["sqeuclidean"], np.dtype("f4"), 784))
    >>> relative < 5e-5, absolute < 1e-34
    (True, True)
    """
    info = np.finfo(space.dtype if dtype is None else dtype)
    additions = 0 if space.form.reduce is max else space.n_features
    steps = (additions + 12) * float(info.eps) / 2
    relative = steps / (1 - steps) if steps < LARGEST else np.inf
    return relative, 8 * space.n_features * float(info.tiny)


def unit_shift(space: Space, dtype: npt.DTypeLike | None = None) -> float:
    """Return how far a row of unit length as it is computed is from the exact one, at the most.

    Parameters
    ----------
    space : Space
        Of floats; 0 is returned for a metric that takes rows as they are.
    dtype : dtype, optional
        Rows are stored in; by default their own.

    Notes
    -----
    A row is divided by its length, which is accumulated in float64 after scaling by a power of two: the length is off
    by ``(n / 2 + 2) u`` of itself, u of float64, the quotient by one rounding in float64 and one to the dtype. The
    elements that scaling takes below the normal range lose less than `tiny` each. Returned is about twice that.
    """
    if not space.metric.unit_rows:
        return 0.0
    info = np.finfo(space.dtype if dtype is None else dtype)
    return 2 * float(info.eps) + (space.n_features + 12) * float(DOUBLE.eps) + 2 * space.n_features * float(info.tiny)


def direct_floor(space: Space, last: Array) -> Floats:
    """Return below which value no row can be that a search by the direct form left out.

    Parameters
    ----------
    space : Space
        Of floats.
    last : (n_queries,) array
        The largest value returned, by the direct form, though maybe added in another order than where it was selected.

    Returns
    -------
    (n_queries,) array of float64
        Minus infinity where nothing is known.

    Notes
    -----
    With w and t the relative and absolute error, ``e(r) >= (last - t) / (1 + w)``, so that
    ``e(c) >= ((last - t)(1 - w) / (1 + w) - 2 t) / (1 + w) >= last (1 - 4 w) - 4 t``. Where `last` overflowed, so did
    the values of all that was left out, or they are at most a rounding below.
    """
    relative, absolute = direct_error(space)
    values = np.asarray(last, np.float64)
    with np.errstate(invalid="ignore"):
        below = np.minimum(values, float(np.finfo(space.dtype).max)) * (1 - 4 * relative) - 4 * absolute
    return _of_exact_rows(space, below if np.isfinite(relative) else np.full(values.shape, -np.inf))


def gram_floor(
    space: Space,
    last: Array,
    query_norms: Array,
    largest_norm: float,
    error: float | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Floats:
    """Return below which value no row can be that a selection by the Gram form left out.

    Parameters
    ----------
    space : Space
        Of floats.
    last : (n_queries,) array
        The largest value selected, by the Gram form.
    query_norms : (n_queries,) array
        Squared norms of the centred queries, computed in the dtype.
    largest_norm : float
        That of the corpus rows.
    error : float, optional
        The declared error, by default `Space.gram_error`.
    dtype : dtype, optional
        Computed in; by default that of the rows.

    Returns
    -------
    (n_queries,) array of float64
        Minus infinity where nothing is known: norms so large that a sum may have overflowed.

    Notes
    -----
    Of a row c that was left out, ``v(c) >= last`` and ``e(c) >= last - G (|q|^2 + |c|^2)``. If ``e(c) < last`` then
    ``|c| <= |q| + sqrt(last)``, which needs no look at the row.
    """
    error, info = space.gram_error if error is None else error, np.finfo(space.dtype if dtype is None else dtype)
    values = np.maximum(np.asarray(last, np.float64), 0)
    norms = np.asarray(query_norms, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        spread = norms + (np.sqrt(norms) + np.sqrt(values)) ** 2
        below = values - error * spread - 8 * space.n_features * float(info.tiny)
        # A comparison with NaN is false.
        known = (norms + largest_norm <= float(info.max) / 4) & (error < LARGEST)
    return _of_exact_rows(space, np.where(known, below, -np.inf))


def halves_error(space: Space, length: Any, other: Any, own_loss: Any, loss: Any) -> Any:
    """Return the error of squared distances by products of rows rounded to float16, on tensor cores.

    Parameters
    ----------
    space : Space
        Of float32.
    length, other : arrays, or numbers
        Lengths of a centred query, and of the longest row of the corpus that counts.
    own_loss, loss : arrays, or numbers
        Lengths of what rounding took from the query, and at the most from a row of the corpus.

    Returns
    -------
    array, or number

    Notes
    -----
    With x' and y' as rounded, ``|x.y - x'.y'| <= |x| |y - y'| + |x - x'| |y'|`` (Cauchy and Schwarz), and ``|y'|``
    exceeds ``|y|`` by at most `loss`. Products of two float16 are exact in float32. How tensor cores add them is not
    published, but was measured: 4 to 16 at a time are added to a sum, what lies below the last of 23 to 25 bits of the
    largest being cut off [1]_, which is at most 17 units of ``2**-23`` of ``|x'| |y'|`` for 16 features, as no sum of
    magnitudes exceeds that. Twice as much is allowed for. All else is done in float32, as by products in float32, whose
    error covers it (`Space.gram_error`). The factor 1.001 is for the roundings of the lengths. Squares that underflow
    are allowed for in `own_loss` and `loss`, by the smallest normal number for each feature.

    It rests on measurements, so searches of accuracy "exact" do without.

    References
    ----------
    .. [1] M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
       Science 7 (2021), e330.
    """
    adding = 2 * 17 * 2.0**-23 * -(-space.n_features // 16)
    products = length * loss + own_loss * (other + loss) + adding * (length + own_loss) * (other + loss)
    return space.gram_error * (length**2 + other**2) + 2 * 1.001 * products


def interval(space: Space, values: Floats, *, shift: float | None = None) -> tuple[Floats, Floats]:
    """Return between which values the exact ones lie that were computed in float64 by the direct form.

    Parameters
    ----------
    space : Space
        Of floats.
    values : array of float64
    shift : float, optional
        By default `unit_shift` of rows that are float64.

    Returns
    -------
    low, high : arrays of float64
        Of NaN, 0 and infinity. Both grow with the value.
    """
    relative, absolute = direct_error(space, np.float64)
    shift = unit_shift(space, np.float64) if shift is None else shift
    if not np.isfinite(relative):
        return np.zeros_like(values), np.full_like(values, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        # What overflowed is at least the largest number, but for roundings.
        low = np.minimum(values, float(DOUBLE.max)) * (1 - 2 * relative) - absolute
        high = values * (1 + 2 * relative) + absolute
        if shift:
            root = np.maximum(np.sqrt(np.maximum(low, 0)) - 2 * shift, 0)
            low, high = root**2 * (1 - 1e-15), (np.sqrt(high) + 2 * shift) ** 2 * (1 + 1e-15)
    return np.where(np.isnan(values), 0.0, low), np.where(np.isnan(values), np.inf, high)


def _of_exact_rows(space: Space, below: Any) -> Floats:
    """Return a floor for exact rows from one for rows of unit length as they were computed."""
    shift = unit_shift(space)
    if not shift:
        return np.asarray(below, np.float64)
    root = np.maximum(np.sqrt(np.maximum(below, 0)) - 2 * shift, 0)
    return np.where(np.isneginf(below), -np.inf, root**2 * (1 - 1e-15))
