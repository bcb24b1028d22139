"""How an answer is compared with its reference.

Every tolerance is derived from what was computed (dtype, number of features, form), never chosen for a
backend, and every comparison is written so that NaN fails it: ``not (error <= tolerance)``.

With ``u = eps / 2``, a difference, its square and n - 1 additions are each rounded once, so a sum of n
non-negative terms by the direct form is off by less than ``(n + 8) eps`` of itself; below the normal range a
product loses at most one subnormal step. The Gram form adds `Space.gram_error` times the squared norms, as
long as that is less than `GRAM_SHARE` of the value that it competes with; beyond, own backends use the direct
form. Peers do not centre, and are held to the same bound about the origin.
"""

from typing import Any, Literal

import numpy as np

from knnbench.dtypes import Array
from knnbench.metrics import Space

__all__ = [
    "assert_distances_close",
    "assert_identical",
    "assert_same_neighbors",
    "assert_well_formed",
    "direct_tolerance",
    "tolerance",
]

GRAM_SHARE = 1e-3
"""Share of a distance squared beyond which a Gram form must give way to the direct form (the L2 rule)."""

Form = Literal["direct", "pairwise", "knn", "peer"]


def _accumulated(space: Space, distances: Array) -> Array:
    """Return the accumulated values that finish as `distances`."""
    if space.metric.name == "euclidean":
        return distances**2
    return 2 * distances if space.metric.name == "cosine" else distances


def _finished_error(space: Space, distances: Array, error: Array, info: Any) -> Array:
    """Return the error of distances from that of their accumulated values."""
    rounding = float(info.eps) * distances + float(info.smallest_subnormal)
    if space.metric.name == "euclidean":
        # |sqrt(s + e) - sqrt(s)| is at most sqrt(e), and at most e / sqrt(s).
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rooted = np.where(distances > 0, error / distances, np.inf)
        return np.minimum(np.sqrt(error), rooted) + rounding
    return (error / 2 if space.metric.name == "cosine" else error) + rounding


def direct_error(space: Space, accumulated: Array, info: Any) -> Array:
    """Return the error of values accumulated by the direct form in the dtype of `info`."""
    n, eps = space.n_features, float(info.eps)
    terms = 0 if space.metric.name == "chebyshev" else n
    error = (terms + 8) * eps * accumulated + n * float(info.smallest_subnormal)
    if space.metric.unit_rows:
        # Rounding moves each unit row by eps / 2, and its float64 norm is off by n roundings of its own.
        shift = 2 * eps + (n + 8) * float(np.finfo(np.float64).eps)
        error = error + 2 * np.sqrt(accumulated) * shift + shift**2
    return error


def gram_bound(space: Space, queries: Array, corpus: Array, info: Any, *, centred: bool) -> Array:
    """Return the declared error of the Gram form for each pair, of shape (n_queries, n_corpus)."""
    q, c = np.asarray(queries, np.float64), np.asarray(corpus, np.float64)
    if space.metric.unit_rows:
        q, c = (x / np.abs(x).max(axis=1, keepdims=True) for x in (q, c))
        q, c = (x / np.sqrt((x**2).sum(axis=1, keepdims=True)) for x in (q, c))
    if centred:
        centre = c.mean(axis=0)
        q, c = q - centre, c - centre
    norms = (q**2).sum(axis=1)[:, None] + (c**2).sum(axis=1)[None, :]
    n = space.n_features
    return np.asarray((n + 8) * float(info.eps) * norms + 4 * n * float(info.smallest_subnormal))


def tolerance(
    space: Space, queries: Array, corpus: Array, reference: Array, form: Form, *, k: int = 1, dtype: Any = None
) -> Array:
    """Return how far each distance of a float computation may be from its reference.

    Parameters
    ----------
    space : Space
    queries, corpus : arrays of `space.dtype`
    reference : (n_queries, n_corpus) array of float64
    form : {"direct", "pairwise", "knn", "peer"}
        ``"direct"`` also bounds the distances that `knn` returns; ``"knn"`` bounds the values among which it
        chose.
    k : int
        For ``"knn"``.
    dtype : dtype, optional
        Computed in; by default `space.dtype`.
    """
    reference = np.asarray(reference, np.float64)
    info = np.finfo(np.dtype(dtype or space.dtype))
    values = _accumulated(space, reference)
    error = direct_error(space, values, info)
    if form != "direct" and space.form.from_dot is not None:
        gram = gram_bound(space, queries, corpus, info, centred=form != "peer")
        if form == "pairwise":
            gram = np.minimum(gram, GRAM_SHARE * np.maximum(np.median(values, axis=1, keepdims=True), values))
        if form == "knn":
            gram = np.minimum(gram, GRAM_SHARE * np.sort(values, axis=1)[:, k - 1 : k])
        error = error + gram
    return _finished_error(space, reference, error, info)


def direct_tolerance(space: Space, reference: Array) -> Array:
    """Return `tolerance` of the direct form, which needs no rows."""
    nothing = np.empty((0, space.n_features))
    return tolerance(space, nothing, nothing, reference, "direct")


def assert_well_formed(array: Array, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Require a numpy array of that shape and, if given, of exactly that dtype."""
    assert isinstance(array, np.ndarray), f"a {type(array).__name__}, not an array"
    assert array.shape == shape, f"shape {array.shape}, expected {shape}"
    if dtype is not None:
        assert array.dtype == np.dtype(dtype), f"dtype {array.dtype}, expected {np.dtype(dtype)}"
        assert array.dtype.isnative, "not in native byte order"


def assert_distances_close(got: Array, reference: Array, allowed: Array | float) -> None:
    """Require ``|got - reference| <= allowed`` everywhere, both finite."""
    reference = np.asarray(reference, np.float64)
    assert_well_formed(got, reference.shape)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - reference)
        bad = ~(error <= allowed)
    if bad.any():
        where = tuple(int(axis[0]) for axis in np.nonzero(bad))
        limit = np.broadcast_to(allowed, reference.shape)[where]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} distances are off; the first at {where}: {got[where]!r}, expected "
            f"{reference[where]!r} to within {limit:.3g}, off by {error[where]:.3g}"
        )


def assert_identical(got: Array, expected: Array) -> None:
    """Require the same dtype, shape and bits (but for the sign of zero)."""
    assert_well_formed(got, expected.shape, expected.dtype)
    bad = ~(got == expected)
    if bad.any():
        where = tuple(int(axis[0]) for axis in np.nonzero(bad))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} values differ; the first at {where}: {got[where]!r}, expected "
            f"{expected[where]!r}"
        )


def assert_same_neighbors(
    distances: Array, indices: Array, reference: Array, k: int, allowed: Array | float, slack: Array | float
) -> None:
    """Require the k nearest neighbours, up to the choice between neighbours that rounding cannot separate.

    Parameters
    ----------
    distances, indices : (n_queries, k) arrays
        The answer.
    reference : (n_queries, n_corpus) array of float64
        All distances.
    k : int
    allowed : array that broadcasts to `reference`
        How far a returned distance may be from that of its index.
    slack : array that broadcasts to `reference`
        How far the values among which was chosen may be from it: no row may be missing that is closer than
        the farthest one returned by more than the slack of both.
    """
    n_queries, n_corpus = reference.shape
    assert_well_formed(distances, (n_queries, k))
    assert_well_formed(indices, (n_queries, k), np.int64)
    outside = ~((indices >= 0) & (indices < n_corpus))
    assert not outside.any(), f"indices out of range: {indices[outside][:5]}"
    twice = np.diff(np.sort(indices, axis=1), axis=1) == 0
    assert not twice.any(), f"query {int(np.nonzero(twice)[0][0])} has an index twice"
    with np.errstate(invalid="ignore"):
        unsorted = ~(distances[:, 1:] >= distances[:, :-1])
    assert not unsorted.any(), f"query {int(np.nonzero(unsorted)[0][0])} is not in ascending order"
    allowed, slack = (np.broadcast_to(np.asarray(x, np.float64), reference.shape) for x in (allowed, slack))
    found = np.take_along_axis(reference, indices, axis=1)
    assert_distances_close(distances, found, np.take_along_axis(allowed, indices, axis=1))
    farthest = found.argmax(axis=1)[:, None]
    limit = np.take_along_axis(found, farthest, axis=1)
    limit = limit - np.take_along_axis(np.take_along_axis(slack, indices, axis=1), farthest, axis=1)
    is_absent = np.ones(reference.shape, dtype=bool)
    np.put_along_axis(is_absent, indices, values=False, axis=1)
    missing = is_absent & ~(reference + slack >= limit)
    if missing.any():
        i, j = (int(axis[0]) for axis in np.nonzero(missing))
        raise AssertionError(f"query {i} lacks row {j} at {reference[i, j]!r}; farthest returned: {found[i].max()!r}")


def assert_ties_by_index(values: Array, indices: Array) -> None:
    """Require ascending indices where ranked values are equal."""
    bad = (values[:, 1:] == values[:, :-1]) & ~(indices[:, 1:] > indices[:, :-1])
    assert not bad.any(), f"query {int(np.nonzero(bad)[0][0])} has equal values out of the order of their indices"
