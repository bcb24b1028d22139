"""Calibrating: measuring all backends on shapes that span what people use, so that estimates hold on this machine."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from knnbench.backends import backend_status, get_backend, registry
from knnbench.measure.timer import settle
from knnbench.settings import THREADS_VARIABLE, held
from knnbench.threads import thread_count

from .auto import forget_choices
from .candidates import errors_of, lacks
from .costs import proof_of
from .measurement import Clock, Search, measure
from .problem import Problem
from .wisdom import wisdom

__all__ = ["FULL", "QUICK", "Level", "Progress", "calibrate", "shapes"]

METRICS = ("euclidean", "cityblock", "chebyshev", "cosine")
DTYPES = ("float32", "uint8", "float64")

# The ranges of the sizes: queries, corpus rows, features, neighbours.
RANGES = ((1, 20_000), (100, 200_000), (2, 1500), (1, 100))

BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Level:
    """How much is measured.

    Attributes
    ----------
    seconds : float
        In all, beside starting backends: what is not reached keeps its default.
    n_shapes : int
        For each kind of computation.
    sample_s : float
        For each of the medians of a shape.
    longest_s : float
        Of one call: what a backend would take longer for is left out.
    most_work : float
        Features of all pairs of a shape.
    """

    seconds: float
    n_shapes: int
    sample_s: float
    longest_s: float
    most_work: float


# Seconds to wake the threads of a backend, and what they do meanwhile: enough work for all of them.
WAKE_S = 0.5
WAKING = ("knn", 64, 2000, 64, 3)

# Searches of a backend that are measured with one thread: those that take longest with all, which share the work.
ALONE = 8

# Of the longest call that a level measures, what one of these may take with one thread.
ALONE_CALLS = 4

# Features of candidates a second that a proof looks at, about: that of float64, which takes longest.
PROOF_RATE = 5e7

QUICK = Level(seconds=45, n_shapes=8, sample_s=0.003, longest_s=0.015, most_work=5e8)
FULL = Level(seconds=1800, n_shapes=28, sample_s=0.04, longest_s=0.6, most_work=5e10)


@dataclass(frozen=True, slots=True)
class Progress:
    """What is being measured, and the share of the time or of the shapes that is done."""

    what: str
    done: float


def shapes(op: str, n_shapes: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Return shapes that span `RANGES` evenly in their logarithms, any first ones of them too.

    Parameters
    ----------
    op : {"knn", "pairwise"}
    n_shapes : int
    seed : int
        Of a scrambled Halton sequence.

    Returns
    -------
    list of (n_queries, n_corpus, n_features, k)

    Examples
    --------
    >>> shapes("pairwise", 1, 0)[0][3]
    0
    """
    from scipy.stats import qmc

    points = qmc.Halton(4, seed=seed).random(n_shapes)
    low, high = np.log(np.array(RANGES, np.float64)).T
    sizes = np.rint(np.exp(low + points * (high - low))).astype(int)
    sizes[:, 3] = np.minimum(sizes[:, 3], sizes[:, 1]) if op == "knn" else 0
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in sizes]


def calibrate(
    level: Level = QUICK, backends: Sequence[str] | None = None, *, clock: Clock = time.perf_counter
) -> Iterator[Progress]:
    """Measure backends on this machine and keep it as wisdom, a share at a time; what was kept stays if it is stopped.

    Every kind of computation has its smallest shapes measured before any has larger ones.

    Parameters
    ----------
    level : Level
    backends : sequence of str, optional
        Default all that work.
    clock : callable
        Gives seconds.

    Yields
    ------
    Progress
    """
    names = [name for name in backends or registry() if backend_status(name).ok and _kinds(name)]
    rates: dict[tuple[str, str], float] = {}
    spent, done = 0.0, 0.0
    for half in (0, 1):  # the second sees another minute of a shared machine
        for name in names:
            begun, done = done, done + 1 / (2 * len(names))
            samples = []
            metric, dtype = _kinds(name)[0]
            Search(name, Problem(*WAKING, metric, dtype), clock).wake(WAKE_S)
            try:
                for problem, with_prepared in _problems(name, level, half):
                    if spent > done * level.seconds:
                        break
                    # A small shape says little of what a large one takes, so the best rate counts.
                    rate = rates.get((name, problem.metric), math.inf)
                    if problem.work > rate * level.longest_s or not _fits(problem):
                        continue
                    if proof_of(problem) > PROOF_RATE * level.longest_s:
                        continue
                    begin = clock()
                    sample = measure(name, problem, seconds=level.sample_s, with_prepared=with_prepared, clock=clock)
                    spent += clock() - begin - sample.start  # starting, which compiles, is no measuring
                    samples.append(sample)
                    reached = problem.work / sample.seconds["call"]
                    rates[name, problem.metric] = max(reached, rates.get((name, problem.metric), 0.0))
                    yield Progress(f"{name}: {problem}", max(begun, min(done, spent / level.seconds)))
            finally:  # after Ctrl-C too
                wisdom().add(samples, fit=half == 1)
            settle()
    for name in names:
        _measure_alone(name, level, clock)
    for name in names:
        for metric, dtype in _kinds(name):
            errors_of(name, metric, dtype)
    forget_choices()


def _measure_alone(name: str, level: Level, clock: Clock) -> None:
    """Measure the longest searches of an own CPU backend with one thread: a task of a cluster has no more.

    Of those that take one thread no longer than a call may, many times over, if it is that much slower.
    """
    capabilities = get_backend(name).capabilities
    if thread_count() == 1 or capabilities.device != "cpu" or not capabilities.total_order:
        return
    searches = [
        sample
        for sample in wisdom().fresh
        if (sample.backend, sample.problem.op) == (name, "knn")
        and sample.seconds["call"] * thread_count() <= ALONE_CALLS * level.longest_s
        and _fits(sample.problem)
    ]
    longest, samples = sorted(searches, key=lambda sample: -sample.seconds["call"])[:ALONE], []
    with held({THREADS_VARIABLE: "1"}):
        try:
            for sample in longest:
                taken = measure(name, sample.problem, seconds=level.sample_s, with_prepared=False, clock=clock)
                samples.append(taken)
        finally:
            wisdom().add(samples)


def _kinds(name: str) -> list[tuple[str, str]]:
    """Return the metrics and dtypes that a backend has."""
    capabilities = get_backend(name).capabilities
    has = capabilities.metrics.__contains__, capabilities.dtypes.__contains__
    return [(metric, dtype) for dtype in filter(has[1], DTYPES) for metric in filter(has[0], METRICS)]


def _problems(name: str, level: Level, half: int) -> Iterator[tuple[Problem, bool]]:
    """Return every second problem of a backend, and whether to prepare it, too: those of least work of all kinds first.

    Those of floats that are prepared are searched exactly, too, which tells what a proof takes beside the search. Each
    kind has shapes of its own, the same for all backends, because one tells of the others (`costs.Cost`).
    """
    kinds, capabilities = [(metric, dtype) for dtype in DTYPES for metric in METRICS], get_backend(name).capabilities
    for op, count in (("knn", level.n_shapes), ("pairwise", level.n_shapes // 2)):
        every = [size for size in shapes(op, 8 * count * len(kinds), seed=1) if work_of(size) <= level.most_work]
        own = {
            kind: sorted(every[number * count : (number + 1) * count], key=work_of)[half::2]
            for number, kind in enumerate(kinds)
        }
        for place in range(-(-count // 2)):
            for kind in _kinds(name):
                for size in own[kind][place : place + 1]:
                    problem, is_prepared = Problem(op, *size, *kind), place % 2 == half
                    yield problem, is_prepared
                    proved = replace(problem, accuracy="exact")
                    if proved.is_proved and is_prepared and not lacks(capabilities, proved.space, "exact"):
                        yield proved, True


def work_of(size: tuple[int, int, int, int]) -> int:
    """Return the features of all pairs."""
    return math.prod(size[:3])


def _fits(problem: Problem) -> bool:
    """Return whether the rows and the answer of a problem are small enough to be made."""
    row_bytes = problem.n_features * np.dtype(problem.dtype).itemsize
    answer = problem.n_queries * problem.n_corpus * 8 if problem.op == "pairwise" else 0
    return (problem.n_queries + problem.n_corpus) * row_bytes + answer <= BYTES
