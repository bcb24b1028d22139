"""Regret: how much longer what was chosen takes than what would have been best, on shapes that were never measured."""

import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from knnbench.backends import backend_status, registry
from knnbench.measure.timer import settle
from knnbench.threads import kept_apart

from .calibration import shapes, work_of
from .candidates import Constraints, sieve
from .choice import Choice, fastest_backend
from .measurement import Clock, Search
from .problem import Problem

__all__ = ["Outcome", "Summary", "outcomes", "problems", "summaries"]

FIXED = ("numpy", "numba", "sklearn", "faiss", "torch")

# Not measured where they would take thousands of times as long, so no rule to compare with.
LOOPS = ("python", "notebook")

# What scikit-learn takes by itself, a tree where rows have few features: no backend, and never the best.
RULE = "scikit-learn's rule"

# A fixed rule that lacks what is asked for must take something.
FALLBACK = "numpy"

# Truth: samples of so many seconds at the least, in shuffled rounds, of which half name the best and half score it.
SAMPLE_S = 0.02
ROUNDS = 6

# A backend that is this much slower than the best so far is not measured again.
HOPELESS = 6.0

BUDGET = 1 << 30


@dataclass(slots=True)
class Outcome:
    """What was chosen for a problem, and what each backend took.

    Attributes
    ----------
    problem : Problem
    chosen : dict of str to str
        The backend, by the way of choosing.
    alike : dict of str to tuple of str
        What it could not be told from.
    times : dict of str to list of float
        Seconds of a call, by backend, one for each round.
    """

    problem: Problem
    chosen: dict[str, str]
    alike: dict[str, tuple[str, ...]]
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        """What was measured of those that there are to choose from."""
        return [name for name in self.times if name != RULE]

    def halves(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return medians of the rounds with even and odd numbers."""
        return tuple(  # type: ignore[return-value]
            {name: float(np.median(times[half::2] or times)) for name, times in self.times.items()} for half in (0, 1)
        )

    def regret(self, backend: str) -> float:
        """Return the time of a backend over that of the best: named by one half of the rounds, scored by the other."""
        first, second = self.halves()
        backend = backend if backend in self.times else FALLBACK
        ratios = []
        for names, scores in ((first, second), (second, first)):
            ratios.append(scores[backend] / scores[min(self.backends, key=lambda name: names[name])])
        return float(np.sqrt(ratios[0] * ratios[1]))


@dataclass(frozen=True, slots=True)
class Summary:
    """Regrets of one way of choosing.

    Attributes
    ----------
    name : str
    geometric_mean, percentile_95, worst : float
    best_share : float
        Of the problems for which it chose the best, or one within 2 % of it.
    """

    name: str
    geometric_mean: float
    percentile_95: float
    worst: float
    best_share: float


def problems(n_problems: int, seed: int, work: float = 2e9) -> list[Problem]:
    """Return problems on shapes that calibration never used, within so much work, over metrics and dtypes.

    Parameters
    ----------
    n_problems : int
    seed : int
    work : float
        Features of all pairs at the most.
    """
    rng = random.Random(seed)
    found: list[Problem] = []
    sizes = shapes("knn", 8 * n_problems, seed=1_000_003 + seed)
    for n_queries, n_corpus, n_features, k in sorted(sizes, key=work_of):
        metric = rng.choice(("euclidean", "cityblock", "chebyshev", "cosine", "sqeuclidean"))
        dtype = rng.choice(("float32", "float32", "uint8", "float64"))
        problem = Problem("knn", n_queries, n_corpus, n_features, k, metric, dtype)
        if problem.work <= work and (n_queries + n_corpus) * n_features <= 5e7:
            found.append(problem)
    rng.shuffle(found)
    return found[:n_problems]


def outcomes(
    asked: Sequence[Problem],
    time_budget: float,
    seed: int = 0,
    *,
    candidates: Sequence[str] | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[Outcome]:
    """Choose a backend for each problem, by estimate and by measuring, and measure the truth.

    Parameters
    ----------
    asked : sequence of Problem
    time_budget : float
        Seconds of ``effort="measure"``; 0 to leave it out.
    seed : int
        Of the order of the rounds.
    candidates : sequence of str, optional
        Default all that work.
    clock : callable
        Gives seconds.
    """
    rng = random.Random(seed)
    usable = [name for name in candidates or registry() if backend_status(name).ok]
    # All estimates come before anything is measured, which estimates would learn from.
    estimates = [_choose(problem, _started(usable, problem, clock), "estimate", 1.0, clock) for problem in asked]
    for problem, estimate in zip(asked, estimates, strict=True):
        searches = _started(usable, problem, clock)
        choices = {"estimate": estimate}
        if time_budget:
            choices["measure"] = _choose(problem, searches, "measure", time_budget, clock)
        chosen = {effort: choice.backend for effort, choice in choices.items()}
        alike = {effort: choice.indistinguishable for effort, choice in choices.items()}
        outcome = Outcome(problem, chosen, alike)
        rivals: dict[str, Callable[[], float]] = {name: search.call for name, search in searches.items()}
        rivals[RULE] = _Rule(next(iter(searches.values())), problem, clock).call
        for _ in range(ROUNDS):
            order = list(rivals)
            rng.shuffle(order)
            best = min((np.median(times) for times in outcome.times.values()), default=np.inf)
            for name in order:
                known = outcome.times.get(name)
                if known and np.median(known) > HOPELESS * best and name not in chosen.values():
                    continue
                settle()
                outcome.times.setdefault(name, []).append(_sample(rivals[name]))
        yield outcome


def _started(usable: Sequence[str], problem: Problem, clock: Clock) -> dict[str, Search]:
    """Return the backends that can do a problem, each called once: a choice counts the start of what has not been."""
    names, _ = sieve(usable, problem, Constraints(None, BUDGET))
    searches = {name: Search(name, problem, clock) for name in names if not _loops(name, problem)}
    for search in searches.values():
        search.call()
    return searches


def _choose(problem: Problem, searches: Mapping[str, Search], effort: str, seconds: float, clock: Clock) -> Choice:
    return fastest_backend(
        problem.op, n_queries=problem.n_queries, n_corpus=problem.n_corpus, n_features=problem.n_features,
        k=problem.k, metric=problem.metric, dtype=problem.dtype, accuracy=problem.accuracy,
        candidates=list(searches), effort=effort, time_budget=seconds, clock=clock,
    )  # fmt: skip


class _Rule:
    """What scikit-learn takes by itself, a tree or brute force, on the rows of a search."""

    def __init__(self, search: Search, problem: Problem, clock: Clock) -> None:
        from sklearn.neighbors import NearestNeighbors

        self._rows, self._clock = search, clock
        self._make = functools.partial(NearestNeighbors, n_neighbors=problem.k, metric=problem.metric, n_jobs=-1)

    def call(self) -> float:
        """Return the seconds to fit and to search."""
        begin = self._clock()
        self._make().fit(self._rows.corpus).kneighbors(self._rows.queries)
        return self._clock() - begin


def _loops(name: str, problem: Problem) -> bool:
    """Return whether a backend is a loop in Python, thousands of times slower, and the problem large."""
    return name in LOOPS and problem.work > 1e6


def _sample(call: Callable[[], float]) -> float:
    """Return the mean seconds of as many calls as fill a sample, after as many that wake what sleeps."""
    spent = once = call()
    with kept_apart():
        while spent < SAMPLE_S:
            once = call()
            spent += max(once, 1e-7)
    if once > 2 * SAMPLE_S:
        return once
    n_calls = int(np.ceil(SAMPLE_S / max(once, 1e-7)))
    return sum(call() for _ in range(n_calls)) / n_calls


def summaries(found: Sequence[Outcome]) -> list[Summary]:
    """Return the regrets of the ways of choosing, of the fixed rules, of the best single backend, and of an oracle."""
    ways = {effort: [o.regret(o.chosen[effort]) for o in found] for effort in found[0].chosen}
    every = {name for o in found for name in o.backends} - set(LOOPS)
    single = {name: [o.regret(name) for o in found] for name in sorted(every)}
    ways |= {f"always {name}": single[name] for name in FIXED if name in single}
    ways[RULE] = [o.regret(RULE) for o in found]
    best = min(single, key=lambda name: _mean(single[name]))
    ways[f"best single in hindsight ({best})"] = single[best]
    ways["oracle"] = [o.regret(min(o.backends, key=lambda n: float(np.median(o.times[n])))) for o in found]
    return [_summary(name, regrets) for name, regrets in ways.items()]


def _mean(regrets: list[float]) -> float:
    return float(np.exp(np.mean(np.log(regrets))))


def _summary(name: str, regrets: list[float]) -> Summary:
    share = float(np.mean([regret <= 1.02 for regret in regrets]))
    return Summary(name, _mean(regrets), float(np.percentile(regrets, 95)), max(regrets), share)
