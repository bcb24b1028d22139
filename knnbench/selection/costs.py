"""What a call costs on this machine, from measurements: a sum of terms, and what the shapes near by took beside it.

The seconds of a call are modelled by non-negative costs of terms, fitted so that relative errors count and single odd
measurements do not. All metrics and dtypes of a backend share `TERMS`: what a call, a query or a neighbour costs hardly
depends on them. What a feature of a pair costs does, so each kind has a rate of its own (`RATED`). An exact search of
floats is a fast one and its proof, which has terms of its own: some time for a call, and for each candidate and each of
its features (`PROVED`), whatever the size of the corpus.

What remains, the logarithm of measured over modelled seconds, follows the shape smoothly (blocks that no longer fit a
cache, threads that begin to pay) and is interpolated between the shapes measured [1]_, which also says how far a
prediction may be off: little near them, much far away. Measurements of another metric or dtype tell something, too.

References
----------
.. [1] C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, MIT Press 2006, equations 2.25
   and 2.26.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from knnbench.backends.base import SPARE
from knnbench.dtypes import Array

from .problem import Problem

__all__ = [
    "ENOUGH",
    "PROVED",
    "QUANTITIES",
    "RATED",
    "TERMS",
    "Cost",
    "Forecast",
    "Prediction",
    "fit_terms",
    "forecast",
    "proof_of",
    "rates_of",
]


def _candidates(problem: Problem) -> float:
    """Return how many candidates a proof looks at, about; 0 where nothing is proved."""
    return problem.n_queries * (problem.k + SPARE) if problem.is_proved else 0.0


def proof_of(problem: Problem) -> float:
    """Return the features of all candidates that a proof looks at, about; 0 where nothing is proved."""
    return _candidates(problem) * problem.n_features


# What each part of a cost is proportional to. `call` is a call with a corpus as it is given, `prepare` prepares a
# corpus, and `prepared` is a call with the result.
Size = Callable[[Problem], float]
_CALL: dict[str, Size] = {
    "call": lambda p: 1.0,
    "query": lambda p: p.n_queries,
    "query feature": lambda p: p.n_queries * p.n_features,
    "corpus feature": lambda p: p.n_corpus * p.n_features,
    "pair": lambda p: p.n_queries * p.n_corpus,
    "insertion": lambda p: p.n_queries * p.k * np.log2(1 + p.n_corpus / p.k) if p.k else 0.0,
    "proof": lambda p: float(p.is_proved),
    "candidate": _candidates,
}
_PREPARE: dict[str, Size] = {"call": lambda p: 1.0, "corpus row": lambda p: float(p.n_corpus)}
TERMS: dict[str, dict[str, Size]] = {"call": _CALL, "prepared": _CALL, "prepare": _PREPARE}
QUANTITIES = tuple(TERMS)

# What grows the most, and costs each metric and dtype something else.
RATED: dict[str, tuple[str, Size]] = {
    "call": ("pair feature", lambda p: p.work),
    "prepared": ("pair feature", lambda p: p.work),
    "prepare": ("corpus feature", lambda p: p.n_corpus * p.n_features),
}

# What grows the most of a proof, and costs each dtype something else: float64 is proved by more exact arithmetic.
PROVED = "candidate feature"

# From so many measurements on, terms are fitted. Fewer cannot tell one term from another: all is laid to what grows the
# most, so that a small shape does not make a large one look cheap. Of the measurement with the best rate of its kind,
# at least this share is laid to it in any case: no shape that was measured may have shown it.
ENOUGH = 6
LEAST_SHARE = 1 / 4

# Decades of a size over which a deviation from the terms is believed to be the same, and how much of it is of another
# metric, of another dtype, or of searches that are proved where these are not. Of 0.5, 0.7 and 1 decade, 1 chose best
# on 60 shapes never measured; 0.5 to 0.95 of the relation made no difference (two cores of Zen 5).
LENGTH = 1.0
RELATED = (0.8, 0.8, 0.8)

# Of the logarithm of repeated measurements on a shared machine, and the least deviation that is expected elsewhere.
NOISE = 0.08
LEAST_DEVIATION = 0.1

# Standard deviations that a choice counts on top of a prediction. On 30 shapes never measured, 0 gave a geometric mean
# of 1.13 times the best, 0.25 and 0.5 gave 1.05, and 1 gave 1.09 (two cores of Zen 4).
CAUTION = 0.5

# A measurement so far off, as a share of what the terms give, counts half in the next fit.
ODD = 0.3
FITS = 5

# What holds costs down that the measurements say nothing of, as a share of one of them.
HELD = 1e-3


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


def rates_of(quantity: str, problem: Problem) -> dict[str, float]:
    """Return what the rates of a problem's kind are proportional to, by their names, the one that grows the most first.

    Examples
    --------
    >>> rates_of("call", Problem("knn", 10, 100, 4, 2, "cosine", "float32"))
    {'pair feature cosine float32': 4000}
    """
    name, size = RATED[quantity]
    rates = {f"{name} {problem.group[1]} {problem.dtype}": size(problem)}
    if problem.is_proved and quantity != "prepare":
        rates[f"{PROVED} {problem.dtype}"] = proof_of(problem)
    return rates


def fit_terms(quantity: str, problems: list[Problem], seconds: Array) -> dict[str, float]:
    """Return the costs of terms and rates that fit measured seconds best, in seconds, each at least 0.

    Parameters
    ----------
    quantity : {"call", "prepared", "prepare"}
    problems : list of Problem
        Of one backend.
    seconds : (n,) array of float64

    Returns
    -------
    dict of str to float
        By the names of `TERMS`, and of `rates_of` for each kind that there is.
    """
    from scipy.optimize import nnls

    of_problems = [list(rates_of(quantity, problem)) for problem in problems]
    first = {rates[0] for rates in of_problems}
    names = [*TERMS[quantity], *dict.fromkeys(name for rates in of_problems for name in rates)]
    # Divided by what was measured: a microsecond counts on a small shape as a second does on a large one.
    matrix = _terms(quantity, problems, names) / seconds[:, None]
    is_first = np.array([name in first for name in names])
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1.0
    best = is_first / scale
    if len(seconds) < ENOUGH:
        return dict(zip(names, map(float, best), strict=True))
    least = LEAST_SHARE * best
    goal, held = 1 - matrix @ least, HELD * np.eye(len(names))
    weights = np.ones(len(seconds))
    for _ in range(FITS):
        weighted = np.concatenate([matrix / scale * weights[:, None], held])
        costs, _ = nnls(weighted, np.concatenate([goal * weights, np.zeros(len(names))]))
        off = matrix / scale @ costs - goal
        weights = 1 / np.sqrt(1 + (off / ODD) ** 2)
    return dict(zip(names, map(float, costs / scale + least), strict=True))


class Cost:
    """The seconds of one quantity of one backend.

    Parameters
    ----------
    quantity : {"call", "prepared", "prepare"}
    costs : mapping of str to float
        From `fit_terms`.
    problems : list of Problem
        That were measured, of kinds that have a rate.
    seconds : (n,) array of float64
        What they took.
    factor : float
        What all of it is multiplied by: another machine's measurements on this one.
    """

    def __init__(
        self, quantity: str, costs: Mapping[str, float], problems: list[Problem], seconds: Array, factor: float = 1.0
    ) -> None:
        self._quantity, self._costs, self._factor = quantity, costs, factor
        self._places, self._kinds = _places(problems), _kinds(problems)
        left = np.log(seconds / np.maximum(self._modelled(problems), 1e-12))
        self._deviation = max(LEAST_DEVIATION, float(np.sqrt(np.mean(left**2))) if len(left) else 0.0)
        covariance = self._covariance(self._places, self._kinds) + NOISE**2 * np.eye(len(left))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ left

    def knows(self, problem: Problem) -> bool:
        """Return whether the kind of a problem has all its rates."""
        return self._costs.keys() >= rates_of(self._quantity, problem).keys()

    def predict(self, problem: Problem) -> Prediction:
        """Return what a computation takes, of a kind that is known."""
        near = self._covariance(_places([problem]), _kinds([problem]))[0]
        spread = self._deviation**2 - float(near @ self._inverse @ near)
        modelled = float(self._modelled([problem])[0])
        seconds = max(modelled, 1e-9) * float(np.exp(near @ self._weights)) * self._factor
        return Prediction(seconds, float(np.sqrt(max(spread, 0.0) + NOISE**2)))

    def _modelled(self, problems: list[Problem]) -> Array:
        costs = np.array(list(self._costs.values()))
        found: Array = _terms(self._quantity, problems, list(self._costs)) @ costs
        return found

    def _covariance(self, places: Array, kinds: Array) -> Array:
        """Return the covariances of some problems with those that were measured."""
        squares = ((places[:, None] - self._places[None]) ** 2).sum(axis=2)
        related = np.where(kinds[:, None] == self._kinds[None], 1.0, RELATED).prod(axis=2)
        found: Array = self._deviation**2 * related * np.exp(-squares / (2 * LENGTH**2))
        return found


@dataclass(frozen=True, slots=True)
class Forecast:
    """What calls with one corpus take of one backend.

    Attributes
    ----------
    call : Prediction
        Of a call with the corpus as it is given.
    prepare, prepared : Prediction or None
        Of preparing the corpus, and of a call with the result.
    start : float
        Seconds that come on top once: to load and compile what was not used yet.
    """

    call: Prediction
    prepare: Prediction | None
    prepared: Prediction | None
    start: float

    def of(self, calls: int) -> Prediction:
        """Return what so many calls take: with the corpus prepared once, or not at all where that is faster."""
        best = Prediction(calls * self.call.seconds, self.call.spread)
        if calls > 1 and self.prepare and self.prepared:
            seconds = self.prepare.seconds + calls * self.prepared.seconds
            prepared = Prediction(seconds, max(self.prepare.spread, self.prepared.spread))
            best = min(best, prepared, key=lambda prediction: prediction.seconds)
        return Prediction(self.start + best.seconds, best.spread)


def forecast(costs: Mapping[str, Cost], problem: Problem, start: float) -> Forecast:
    """Return what a problem takes, from costs by the quantity, of which ``"call"`` is there."""
    found = {quantity: cost.predict(problem) for quantity, cost in costs.items()}
    return Forecast(found["call"], found.get("prepare"), found.get("prepared"), start)


def _terms(quantity: str, problems: list[Problem], names: list[str]) -> Array:
    """Return what each named cost of each problem is proportional to, (n_problems, n_names)."""
    terms, rows = TERMS[quantity], list[list[float]]()
    for problem in problems:
        rates = rates_of(quantity, problem)
        rows.append([terms[n](problem) if n in terms else rates.get(n, 0.0) for n in names])
    return np.array(rows, np.float64).reshape(len(problems), len(names))


def _places(problems: list[Problem]) -> Array:
    """Return where problems lie: the decimal logarithms of their sizes."""
    sizes = [(p.n_queries, p.n_corpus, p.n_features, 1 + p.k) for p in problems]
    return np.log10(np.array(sizes, np.float64).reshape(len(problems), 4))


def _kinds(problems: list[Problem]) -> Array:
    """Return metrics, dtypes and accuracies of problems."""
    kinds = [(metric, dtype, accuracy) for _, metric, dtype, _, accuracy in (problem.group for problem in problems)]
    return np.array(kinds).reshape(len(problems), 3)
