"""The answer that measured answers are checked against: float64, by the direct form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnbench.dtypes import Array

__all__ = [
    "Verdict",
    "check_distances",
    "check_neighbors",
    "check_search",
    "reference_distances",
    "reference_losses",
]

# A peer's cancellation on ordinary data stays far below the first; a wrong algorithm far above it.
LARGEST_ERROR = 1e-2
LEAST_RECALL = 0.99

# Of losses; products in float32 stay far below it.
LARGEST_LOSS_ERROR = 1e-4

# Neighbours as far as the k-th, to this share of it, count as found: which of them is returned is chance.
TIE = 1e-3

CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far an answer is from the reference.

    Attributes
    ----------
    error : float or None
        max |d - d_ref| / max d_ref, of distances or of losses; None where that is not finite.
    recall : float or None
        Share of the neighbours whose reference distance is at most the k-th, ties included; None for distances
        without neighbours.
    reason : str
        Why the answer is wrong; empty if it is right.
    """

    error: float | None
    recall: float | None
    reason: str


def reference_distances(queries: Array, corpus: Array, metric: str) -> Array:
    """Return the distances of a few queries to a whole corpus.

    Parameters
    ----------
    queries, corpus : (n, n_features) arrays
        Converted to float64 in chunks.
    metric : str
        Canonical name, which is scipy's.

    Returns
    -------
    (n_queries, n_corpus) array of float64

    Notes
    -----
    scipy's ``cdist`` takes differences in float64 one pair at a time, and none of knnbench's code is in it.
    """
    from scipy.spatial.distance import cdist

    rows = max(1, CHUNK_BYTES // (8 * corpus.shape[1]))
    wide = queries.astype(np.float64)
    parts = [cdist(wide, corpus[i : i + rows].astype(np.float64), metric) for i in range(0, len(corpus), rows)]
    return np.concatenate(parts, axis=1)


def check_neighbors(distances: Array, indices: Array, reference: Array, *, same_order: bool) -> Verdict:
    """Check an answer against reference distances.

    Parameters
    ----------
    distances, indices : (n, k) arrays
        The answer.
    reference : (n, n_corpus) array of float64
    same_order : bool
        Whether the indices must be those of the total order, as own backends give them for integers.
    """
    k = distances.shape[1]
    order = np.argsort(reference, axis=1, kind="stable")[:, :k]
    nearest = np.take_along_axis(reference, order, axis=1)
    scale = float(nearest.max()) or 1.0
    error = float(np.abs(distances.astype(np.float64) - nearest).max()) / scale
    inside = (indices >= 0) & (indices < reference.shape[1])
    found = np.take_along_axis(reference, np.where(inside, indices, 0), axis=1)
    repeated = np.diff(np.sort(indices, axis=1), axis=1, prepend=-1) == 0
    recall = float((inside & ~repeated & (found <= nearest[:, -1:] * (1 + TIE))).mean())
    reason = _too_far(error)
    if not reason and not recall >= LEAST_RECALL:
        reason = f"only {recall:.1%} of the neighbours are among the nearest"
    if not reason and same_order and not np.array_equal(indices, order):
        reason = "the neighbours are not those of the total order (distance, index)"
    return Verdict(error if np.isfinite(error) else None, recall, reason)


def check_distances(distances: Array, reference: Array, *, exact: bool) -> Verdict:
    """Check distances of all pairs against reference distances.

    Parameters
    ----------
    distances : (n, n_corpus) array
        The answer.
    reference : (n, n_corpus) array of float64
    exact : bool
        Whether they must be equal, as own backends' integers are.
    """
    difference = float(np.abs(distances.astype(np.float64) - reference).max())
    error = difference / (float(reference.max()) or 1.0)
    reason = _too_far(error)
    if not reason and exact and difference:
        reason = f"integer distances are off by up to {difference:g}"
    return Verdict(error if np.isfinite(error) else None, None, reason)


def reference_losses(
    X: Array, y: Array, n_classes: int, seed: int, n_iterations: int, *, step_size: float, init_scale: float
) -> Array:
    """Return the mean losses of the candidates of a sequential random search, one after the other.

    Parameters
    ----------
    X : (n_samples, n_features) array
        Converted to float64 in chunks.
    y : (n_samples,) array of int64
        Classes from 0 on.
    n_classes : int
        Of all samples, of which these may be some.
    seed, n_iterations : int
    step_size, init_scale : float
        As of `knnbench.RandomSearchClassifier`, whose notes define what is drawn.

    Returns
    -------
    (n_iterations,) array of float64
    """
    from scipy.special import logsumexp

    shape, dtype = (X.shape[1], n_classes), np.result_type(X.dtype, np.float32)
    rows = max(1, CHUNK_BYTES // (8 * X.shape[1]))

    def draw(counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([seed, counter], np.uint64)))

    W, b, best = (init_scale * draw(0).standard_normal(shape)).astype(dtype), np.zeros(shape[1], dtype), math.inf
    losses = []
    for iteration in range(n_iterations):
        step = draw(1 + iteration)
        W_new = (W + step_size * step.standard_normal(shape)).astype(dtype)
        b_new = (b + step_size * step.standard_normal(shape[1])).astype(dtype)
        total = 0.0
        for start in range(0, len(X), rows):
            logits = X[start : start + rows].astype(np.float64) @ W_new.astype(np.float64) + b_new
            right = np.take_along_axis(logits, y[start : start + rows, None], axis=1)[:, 0]
            total += float((logsumexp(logits, axis=1) - right).sum())
        losses.append(total / len(X))
        if losses[-1] < best:
            W, b, best = W_new, b_new, losses[-1]
    return np.array(losses)


def check_search(
    accepted: Sequence[int], curve: Sequence[float], near_ties: Sequence[int], reference: Array
) -> Verdict:
    """Check the first iterations of a random search.

    Parameters
    ----------
    accepted, curve, near_ties
        As of `knnbench.RandomSearchClassifier`. From an iteration on that is near a tie and decided otherwise, the
        search is another one.
    reference : (n_iterations,) array of float64
        Of `reference_losses`.
    """
    best, error, taken = math.inf, 0.0, dict(zip(accepted, curve, strict=True))
    for iteration, loss in enumerate(reference.tolist()):
        if (iteration in taken) != (loss < best):
            if iteration in near_ties:
                break
            decision = "taken" if iteration in taken else "not taken"
            return Verdict(error, None, f"the candidate of iteration {iteration} was {decision}, against the method")
        if loss < best:
            # NaN is not close to anything, and stays.
            error = float(np.maximum(error, abs(taken[iteration] - loss) / reference.max()))
            best = loss
    reason = "" if error <= LARGEST_LOSS_ERROR else f"losses are off by {error:.2g} of the largest"
    return Verdict(error if np.isfinite(error) else None, None, reason)


def _too_far(error: float) -> str:
    if error <= LARGEST_ERROR:  # false for NaN
        return ""
    return f"distances are off by {error:.2g} of the largest; at most {LARGEST_ERROR:g} is allowed"
