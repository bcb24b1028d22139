"""Measuring backends on a shape, in this process."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from knnbench.api import knn, pairwise, prepare
from knnbench.backends import get_backend
from knnbench.dtypes import Array
from knnbench.threads import kept_apart

from .problem import Problem
from .wisdom import Sample, backend_version

__all__ = ["Clock", "Search", "measure", "rows_of"]

Clock = Callable[[], float]

# Values that rows are made from again and again: drawing new ones would take longer than searching. A prime, so that
# the same values fall on other features: rows that are alike tie, and then exact searches take longer.
POOL = (1 << 20) - 3

# To wake threads, where calls take no time.
MOST_CALLS = 10_000

# Of kinds of computation that ran in this process: they will not have to be started again.
_started: set[tuple[str, ...]] = set()


def rows_of(n_rows: int, n_features: int, dtype: str, seed: int) -> Array:
    """Return random rows: bytes from 1 to 255, or normal values; a row repeats only where there are very many."""
    rows: Array = np.resize(_pool(dtype, seed), n_rows * n_features).reshape(n_rows, n_features)
    return rows


@functools.cache
def _pool(dtype: str, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 256, POOL) if dtype == "uint8" else rng.standard_normal(POOL)
    return values.astype(dtype)


def is_started(backend: str, problem: Problem) -> bool:
    """Return whether a backend has done this kind of computation in this process."""
    return (backend, *problem.group) in _started


class Search:
    """A computation on generated rows, to be called again and again.

    Parameters
    ----------
    backend : str
    problem : Problem
    clock : callable
        Gives seconds.
    """

    def __init__(self, backend: str, problem: Problem, clock: Clock = time.perf_counter) -> None:
        self._backend, self._problem, self._clock = backend, problem, clock
        self._engine = get_backend(backend)
        self.queries: Any = rows_of(problem.n_queries, problem.n_features, problem.dtype, 1)
        self.corpus: Any = rows_of(problem.n_corpus, problem.n_features, problem.dtype, 2)
        if problem.data_on == "device":
            dtype = np.dtype(problem.dtype)
            self.queries = self._engine.to_native(self.queries, dtype)
            self.corpus = self._engine.to_native(self.corpus, dtype)

    def call(self, corpus: Any = None) -> float:
        """Return the seconds of one call, with the corpus as it is or prepared; `answer` is what it gave."""
        problem, corpus = self._problem, self.corpus if corpus is None else corpus
        self._engine.synchronize()
        begin = self._clock()
        if problem.op == "knn":
            self.answer = knn(
                self.queries, corpus, problem.k, problem.metric, backend=self._backend, accuracy=problem.accuracy
            )
        else:
            self.answer = pairwise(self.queries, corpus, problem.metric, backend=self._backend)
        self._engine.synchronize()
        _started.add((self._backend, *problem.group))
        return self._clock() - begin

    def wake(self, seconds: float) -> None:
        """Call again and again for some seconds: threads that were just started share a CPU until the system sees it.

        On two CPUs that made the first calls of OpenMP's and OpenBLAS's pools take ten times as long as later ones.
        """
        spent, n_calls = self.call(), 1  # which starts what is not there
        with kept_apart():
            while spent < seconds and n_calls < MOST_CALLS:
                spent, n_calls = spent + self.call(), n_calls + 1

    def prepare(self) -> tuple[float, Any]:
        """Return the seconds to prepare the corpus, and the result."""
        problem, begin = self._problem, self._clock()
        prepared = prepare(self.corpus, problem.metric, backend=self._backend, accuracy=problem.accuracy)
        self._engine.synchronize()
        return self._clock() - begin, prepared


def measure(
    backend: str, problem: Problem, *, seconds: float, with_prepared: bool = True, clock: Clock = time.perf_counter
) -> Sample:
    """Measure a call, preparing, and a prepared call: the least of as many as some seconds allow, two at the least.

    The least, because what others take of a shared machine is only ever added; a prediction is no result to report.

    Parameters
    ----------
    backend : str
    problem : Problem
    seconds : float
        For each of the three.
    with_prepared : bool
        Whether to measure more than the call.
    clock : callable
        Gives seconds.
    """
    was_started = is_started(backend, problem)
    search = Search(backend, problem, clock)
    call, start = _least(search.call, seconds)
    found, starting = {"call": call}, start
    if with_prepared:
        found["prepare"], of_prepare = _least(lambda: search.prepare()[0], seconds / 2)
        prepared = search.prepare()[1]
        found["prepared"], of_prepared = _least(lambda: search.call(prepared), seconds)
        starting += of_prepare + of_prepared
    found = {quantity: max(least, 1e-9) for quantity, least in found.items()}
    return Sample(backend, backend_version(backend), problem, found, 0.0 if was_started else starting)


def _least(function: Callable[[], float], seconds: float) -> tuple[float, float]:
    """Return the least of calls until they fill some seconds, or are 9; and what the first took beyond the least."""
    first = function()
    with kept_apart():
        times = [function()]
    while sum(times) < seconds and len(times) < 9:
        times.append(function())
    least = min(first, *times)
    return least, first - least
