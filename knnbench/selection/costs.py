"""What a call costs on this machine, from measurements: a sum of terms, and what the shapes near by took beside it.

The seconds of a call are modelled by non-negative costs of the terms in `TERMS`, fitted so that relative errors count
and single odd measurements do not. What remains, the logarithm of measured over modelled seconds, follows the shape
smoothly (blocks that no longer fit a cache, threads that begin to pay) and is interpolated between the shapes measured
[1]_, which also says how far a prediction may be off: little near them, much far away.

References
----------
.. [1] C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, MIT Press 2006, equations 2.25
   and 2.26.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnbench.dtypes import Array

from .problem import Problem

__all__ = ["ENOUGH", "QUANTITIES", "TERMS", "Cost", "Prediction", "fit_terms", "predict"]

# What each part of a cost is proportional to. `call` is a call with a corpus as it is given, `prepare` prepares a
# corpus, and `prepared` is a call with the result.
_CALL: dict[str, Callable[[Problem], float]] = {
    "call": lambda p: 1.0,
    "query": lambda p: p.n_queries,
    "query feature": lambda p: p.n_queries * p.n_features,
    "corpus feature": lambda p: p.n_corpus * p.n_features,
    "pair": lambda p: p.n_queries * p.n_corpus,
    "pair feature": lambda p: p.work,
    "insertion": lambda p: p.n_queries * p.k * np.log2(1 + p.n_corpus / p.k) if p.k else 0.0,
}
_PREPARE = {name: _CALL[name] for name in ("call", "corpus feature")} | {"corpus row": lambda p: float(p.n_corpus)}
TERMS: dict[str, dict[str, Callable[[Problem], float]]] = {"call": _CALL, "prepared": _CALL, "prepare": _PREPARE}
QUANTITIES = tuple(TERMS)

# From so many measurements on, terms are fitted. Fewer cannot tell one term from another: all is laid to the one that
# grows the most, so that a small shape does not make a large one look cheap. Of the measurement with the best rate, at
# least this share is laid to it in any case: no shape that was measured may have shown it.
ENOUGH = 6
LEAST_SHARE = 1 / 4
DOMINANT = {"call": "pair feature", "prepared": "pair feature", "prepare": "corpus feature"}

# Decades of a size over which a deviation from the terms is believed to be the same.
LENGTH = 0.7

# Of the logarithm of repeated measurements on a shared machine, and the least deviation that is expected elsewhere.
NOISE = 0.08
LEAST_DEVIATION = 0.1

# Standard deviations that a choice counts on top of a prediction. On 30 shapes never measured, 0 gave a geometric mean
# of 1.13 times the best, 0.25 and 0.5 gave 1.05, and 1 gave 1.09 (two cores of Zen 4).
CAUTION = 0.5

# A measurement so far off, as a share of what the terms give, counts half in the next fit.
ODD = 0.3
FITS = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, and the standard deviation of their logarithm."""

    seconds: float
    spread: float

    @property
    def cautious(self) -> float:
        """Seconds by which choices are made: more, the less is known.

        Of many predictions the least is more often one that is too low, and most so among those that vary most.
        """
        return self.seconds * float(np.exp(CAUTION * self.spread))

    def interval(self, width: float = 1.96) -> tuple[float, float]:
        """Return seconds between which 95 % of the outcomes are expected."""
        factor = float(np.exp(width * self.spread))
        return self.seconds / factor, self.seconds * factor


def fit_terms(quantity: str, problems: list[Problem], seconds: Array) -> list[float]:
    """Return the costs of the terms that fit measured seconds best, each at least 0.

    Parameters
    ----------
    quantity : {"call", "prepared", "prepare"}
    problems : list of Problem
    seconds : (n,) array of float64
    """
    from scipy.optimize import nnls

    # Divided by what was measured: a microsecond counts on a small shape as a second does on a large one.
    matrix = _terms(quantity, problems) / seconds[:, None]
    is_dominant = np.array([name == DOMINANT[quantity] for name in TERMS[quantity]])
    dominant = is_dominant / matrix[:, is_dominant].max()
    if len(seconds) < ENOUGH:
        return [float(cost) for cost in dominant]
    least = LEAST_SHARE * dominant
    goal = 1 - matrix @ least
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1.0
    weights = np.ones(len(seconds))
    for _ in range(FITS):
        costs, _ = nnls(matrix / scale * weights[:, None], goal * weights)
        off = matrix / scale @ costs - goal
        weights = 1 / np.sqrt(1 + (off / ODD) ** 2)
    return [float(cost) for cost in costs / scale + least]


class Cost:
    """The seconds of one quantity of one backend, for one kind of computation.

    Parameters
    ----------
    quantity : {"call", "prepared", "prepare"}
    costs : sequence of float
        Of the terms, in seconds.
    problems : list of Problem
        That were measured.
    seconds : (n,) array of float64
        What they took.
    factor : float
        What all of it is multiplied by: another machine's measurements on this one.
    """

    def __init__(
        self, quantity: str, costs: Iterable[float], problems: list[Problem], seconds: Array, factor: float = 1.0
    ) -> None:
        self._quantity, self._costs, self._factor = quantity, np.array(list(costs)), factor
        self._places = _places(problems)
        left = np.log(seconds / np.maximum(_terms(quantity, problems) @ self._costs, 1e-12))
        self._deviation = max(LEAST_DEVIATION, float(np.sqrt(np.mean(left**2))) if len(left) else 0.0)
        covariance = self._covariance(self._places, self._places) + NOISE**2 * np.eye(len(left))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ left

    def predict(self, problem: Problem) -> Prediction:
        """Return what a computation takes."""
        near = self._covariance(_places([problem]), self._places)[0]
        modelled = float(_terms(self._quantity, [problem])[0] @ self._costs)
        spread = self._deviation**2 - float(near @ self._inverse @ near)
        seconds = max(modelled, 1e-9) * float(np.exp(near @ self._weights)) * self._factor
        return Prediction(seconds, float(np.sqrt(max(spread, 0.0) + NOISE**2)))

    def _covariance(self, first: Array, second: Array) -> Array:
        squares: Array = ((first[:, None] - second[None]) ** 2).sum(axis=2)
        return self._deviation**2 * np.exp(-squares / (2 * LENGTH**2))


def predict(costs: Mapping[str, Cost], problem: Problem, calls: int, start: float) -> Prediction:
    """Return what so many calls with one corpus take: prepared once, or not at all where that is faster.

    Parameters
    ----------
    costs : mapping of str to Cost
        By the quantity.
    problem : Problem
    calls : int
    start : float
        Seconds that come on top once: to load and compile what was not used yet.
    """
    each = costs["call"].predict(problem)
    best = Prediction(calls * each.seconds, each.spread)
    if calls > 1 and {"prepare", "prepared"} <= set(costs):
        once, then = costs["prepare"].predict(problem), costs["prepared"].predict(problem)
        prepared = Prediction(once.seconds + calls * then.seconds, max(once.spread, then.spread))
        best = min(best, prepared, key=lambda prediction: prediction.seconds)
    return Prediction(start + best.seconds, best.spread)


def _terms(quantity: str, problems: list[Problem]) -> Array:
    rows: list[Any] = [[term(problem) for term in TERMS[quantity].values()] for problem in problems]
    return np.array(rows, np.float64).reshape(len(problems), len(TERMS[quantity]))


def _places(problems: list[Problem]) -> Array:
    """Return where problems lie: the decimal logarithms of their sizes."""
    sizes = [(p.n_queries, p.n_corpus, p.n_features, 1 + p.k) for p in problems]
    return np.log10(np.array(sizes, np.float64).reshape(len(problems), 4))
