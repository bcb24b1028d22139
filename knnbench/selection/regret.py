"""Regret: how much longer what was chosen takes than what would have been best, on shapes that were never measured."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from knnbench.backends import backend_status, registry
from knnbench.measure.timer import settle

from .calibration import shapes
from .candidates import Constraints, sieve
from .choice import fastest_backend
from .measurement import Clock, Search
from .problem import Problem

__all__ = ["Outcome", "Summary", "outcomes", "problems", "summaries"]

FIXED = ("numpy", "numba", "sklearn", "faiss", "torch")

# Not measured where they would take thousands of times as long, so no rule to compare with.
LOOPS = ("python", "notebook")

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
            ratios.append(scores[backend] / scores[min(names, key=lambda name: names[name])])
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
    for n_queries, n_corpus, n_features, k in shapes("knn", 8 * n_problems, seed=1_000_003 + seed):
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
    for problem in asked:
        names, _ = sieve(usable, problem, Constraints("fast", None, BUDGET))
        searches = {name: Search(name, problem, clock) for name in names if not _loops(name, problem)}
        for search in searches.values():  # warm before the choice, which counts the start of what is not
            search.call()
        efforts = {"estimate": 1.0} | ({"measure": time_budget} if time_budget else {})
        chosen, alike = {}, {}
        for effort, seconds in efforts.items():
            choice = fastest_backend(
                problem.op, n_queries=problem.n_queries, n_corpus=problem.n_corpus, n_features=problem.n_features,
                k=problem.k, metric=problem.metric, dtype=problem.dtype, candidates=list(searches),
                effort=effort, time_budget=seconds, clock=clock,
            )  # fmt: skip
            chosen[effort], alike[effort] = choice.backend, choice.indistinguishable
        outcome = Outcome(problem, chosen, alike)
        for _ in range(ROUNDS):
            order = list(searches)
            rng.shuffle(order)
            best = min((np.median(times) for times in outcome.times.values()), default=np.inf)
            for name in order:
                known = outcome.times.get(name)
                if known and np.median(known) > HOPELESS * best and name not in chosen.values():
                    continue
                settle()
                outcome.times.setdefault(name, []).append(_sample(searches[name]))
        yield outcome


def _loops(name: str, problem: Problem) -> bool:
    """Return whether a backend is a loop in Python, thousands of times slower, and the problem large."""
    return name in LOOPS and problem.work > 1e6


def _sample(search: Search) -> float:
    """Return the mean seconds of as many calls as fill a sample, after one that wakes what sleeps."""
    once = search.call()
    if once >= SAMPLE_S:
        return once
    n_calls = max(1, int(np.ceil(SAMPLE_S / once)))
    return sum(search.call() for _ in range(n_calls)) / n_calls


def summaries(found: Sequence[Outcome]) -> list[Summary]:
    """Return the regrets of the ways of choosing, of the fixed rules, of the best single backend, and of an oracle."""
    ways = {effort: [o.regret(o.chosen[effort]) for o in found] for effort in found[0].chosen}
    every = {name for o in found for name in o.times} - set(LOOPS)
    single = {name: [o.regret(name) for o in found] for name in sorted(every)}
    ways |= {f"always {name}": single[name] for name in FIXED if name in single}
    best = min(single, key=lambda name: _mean(single[name]))
    ways[f"best single in hindsight ({best})"] = single[best]
    ways["oracle"] = [o.regret(min(o.times, key=lambda n: float(np.median(o.times[n])))) for o in found]
    return [_summary(name, regrets) for name, regrets in ways.items()]


def _mean(regrets: list[float]) -> float:
    return float(np.exp(np.mean(np.log(regrets))))


def _summary(name: str, regrets: list[float]) -> Summary:
    share = float(np.mean([regret <= 1.02 for regret in regrets]))
    return Summary(name, _mean(regrets), float(np.percentile(regrets, 95)), max(regrets), share)
