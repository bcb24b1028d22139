"""`fastest_backend`: which backend is the fastest for a computation, within bounds of accuracy and memory."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from knnbench.api import check_accuracy, check_count, check_k
from knnbench.backends import backends, registry
from knnbench.blocking import check_budget
from knnbench.dtypes import computed_dtype
from knnbench.errors import InvalidInputError, UnknownBackendError, UnsupportedError
from knnbench.metrics import get_metric
from knnbench.threads import kept_apart

from .auto import forget_choices
from .candidates import Constraints, errors_of, sieve
from .costs import Forecast, Prediction, forecast
from .measurement import Clock, Search, is_started, measure
from .problem import OPS, Problem
from .wisdom import Sample, backend_version, wisdom

__all__ = ["Choice", "Effort", "fastest_backend"]

Effort = Literal["estimate", "measure", "exhaustive"]
DataOn = Literal["host", "device"]

# Backends within this share of the fastest cannot be told from it: the same program varies as much between two runs.
ALIKE = 0.05

# Backends that are estimated to take so many times the least are not measured; nor are those that were measured so.
HOPELESS = 4.0

# Seconds of one call at the most, as a share of the time for measuring: larger computations are measured on fewer rows.
CALL_SHARE = 1 / 12
SLICE_BYTES = 64 << 20

# Seconds to wake the threads of a backend that was just started.
WAKE_S = 0.2

# Features of pairs a second, of backends of which nothing is known: a slow one's.
UNKNOWN_RATE = 5e7

# Rounds after which more would say little, and seconds of a backend's turn in each, at the least: of what takes less, a
# single call says more of what the one before it left in the caches.
ROUNDS = 9
TURN_S = 0.002

MOST_CALLS = 1 << 40


@dataclass(frozen=True)
class Choice:
    """The fastest backend for a computation, and what is known of the others.

    Attributes
    ----------
    backend : str
        The one to take.
    seconds : dict of str to float
        What all calls together are predicted to take, by backend: first what would be taken first, which is the least
        but for predictions that little is known of (`Prediction.cautious`).
    intervals : dict of str to (float, float)
        Between which 95 % of the outcomes are expected.
    indistinguishable : tuple of str
        The backends that cannot be told from the fastest. Of these `backend` is the one with the smallest error; of
        equal ones an own backend, which keeps the memory budget, before a peer, and one that needs no further library.
    passed_over : dict of str to str
        The candidates that cannot do it, and why.
    errors : dict of str to float
        The larger of the errors on ordinary and adversarial data.
    crossover_calls : int or None
        From how many calls with one corpus on another backend is the fastest; None if none is.
    provenance : dict of str to str
        Where the prediction of each backend comes from.
    problem : str
        What was asked.
    calls : int
    """

    backend: str
    seconds: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    indistinguishable: tuple[str, ...]
    passed_over: dict[str, str]
    errors: dict[str, float]
    crossover_calls: int | None
    provenance: dict[str, str]
    problem: str
    calls: int = 1
    _crossing: str = field(default="", repr=False)

    def __str__(self) -> str:
        lines = [f"{self.backend} for {self.problem}{f', {self.calls:,} calls' if self.calls > 1 else ''}"]
        width = max(len(name) for name in (*self.seconds, *self.passed_over))
        for name, _, interval, ratio, error, source in self._rows():
            mark = "=" if name in self.indistinguishable else " "
            lines.append(f"  {name:<{width}} {mark} {interval:>20} {ratio:>7} x  error {error:<8} {source}")
        lines += [f"  {name:<{width}}   {reason}" for name, reason in self.passed_over.items()]
        if self.crossover_calls is not None:
            lines.append(f"  from {self.crossover_calls:,} calls on: {self._crossing}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        from html import escape

        def row(cells: Iterable[str], tag: str = "td") -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = [row(("backend", "seconds", "95 %", "x least", "error", "from"), "th")]
        body += [row((f"{name} ✓" if name == self.backend else name, *rest)) for name, *rest in self._rows()]
        body += [row((name, "", "", "", "", reason)) for name, reason in self.passed_over.items()]
        return f"<table><caption>{escape(self.problem)}</caption>{''.join(body)}</table>"

    def _rows(self) -> list[tuple[str, str, str, str, str, str]]:
        from knnbench.report.table import format_seconds

        least = min(self.seconds.values())
        return [
            (
                name,
                format_seconds(seconds),
                " to ".join(format_seconds(bound) for bound in self.intervals[name]),
                f"{seconds / least:.3g}",
                f"{self.errors[name]:.1e}",
                self.provenance[name],
            )
            for name, seconds in self.seconds.items()
        ]


def fastest_backend(
    op: str = "knn",
    *,
    n_queries: int,
    n_corpus: int,
    n_features: int,
    k: int | None = None,
    metric: str = "euclidean",
    dtype: Any = "float32",
    accuracy: str = "fast",
    max_error: float | None = None,
    calls: int = 1,
    data_on: str = "host",
    memory_budget: int | None = None,
    candidates: Sequence[str] | None = None,
    effort: str = "measure",
    time_budget: float = 1.0,
    clock: Clock = time.perf_counter,
) -> Choice:
    """Choose the backend that is the fastest on this machine, of those that are accurate enough and fit the memory.

    Parameters
    ----------
    op : {"knn", "pairwise"}
    n_queries, n_corpus, n_features : int
        The shape.
    k : int, optional
        Neighbours of each query, for ``"knn"``; default 1.
    metric : str
        As for `knnbench.knn`.
    dtype : dtype
        Of the data; what is computed as another (float16, integers) is asked for as that.
    accuracy : {"fast", "exact"}
        As for `knnbench.knn`. What proving takes is that of ordinary data; ties by the thousand, or rows far from the
        origin in clusters, can take more.
    max_error : float, optional
        The largest error allowed, max |d - d_ref| / max d_ref, on ordinary data and on data far from the origin.
    calls : int
        With one corpus, which is then prepared if that pays. What a backend needs to start, to be loaded and compiled,
        is counted once, unless it has done this kind of computation in this process.
    data_on : {"host", "device"}
        Where the arrays lie.
    memory_budget : int, optional
        Bytes; default as for `knnbench.knn`.
    candidates : sequence of str, optional
        Names to choose from; default all, peers too.
    effort : {"estimate", "measure", "exhaustive"}
        ``"estimate"`` predicts from what was measured before (``knnbench calibrate``) and measures no time;
        ``"measure"`` also measures those that may be the fastest, in turns, on a part of the shape, and keeps what it
        measured; ``"exhaustive"`` measures all, each several times, however long it takes.
    time_budget : float
        Seconds that ``"measure"`` may take, beside starting backends.
    clock : callable
        Gives seconds, for measuring.

    Returns
    -------
    Choice

    Raises
    ------
    InvalidInputError
        For a value that no computation can have.
    UnknownBackendError
        For a candidate that is not registered.
    UnsupportedError
        If no candidate can do it; the text has the reason of each.

    Examples
    --------
    >>> choice = fastest_backend(n_queries=10, n_corpus=500, n_features=16, k=3, effort="estimate",
    ...                          candidates=["numpy", "python"])
    >>> choice.backend
    'numpy'
    """
    problem = _problem(op, n_queries, n_corpus, n_features, k, metric, dtype, data_on, accuracy)
    calls = check_count("calls", calls)
    if effort not in get_args(Effort):
        raise InvalidInputError(f"effort is {effort!r}; expected one of: {', '.join(get_args(Effort))}.")
    _check_positive("time_budget", time_budget)
    if max_error is not None:
        _check_positive("max_error", max_error)
    constraints = Constraints(max_error, check_budget(memory_budget))
    names, passed_over = sieve(_names(candidates), problem, constraints)
    measured: dict[str, list[float]] = {}
    if effort != "estimate":
        budget = time_budget if effort == "measure" else math.inf
        names, reasons, measured = _measured(names, problem, calls, budget, clock)
        passed_over |= reasons
    for name in [name for name in names if not wisdom().costs((name, *problem.group))]:
        passed_over[name] = "never measured, and no default; `knnbench calibrate`, or effort='measure'"
        names.remove(name)
    if not names:
        every = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise UnsupportedError(f"no backend can do {problem} as asked: {every}.")
    return _decide(names, passed_over, problem, calls, measured)


def _problem(
    op: str, n_queries: int, n_corpus: int, n_features: int, k: int | None, metric: str, dtype: Any, data_on: str,
    accuracy: str,
) -> Problem:  # fmt: skip
    for name, value, known in (("op", op, OPS), ("data_on", data_on, get_args(DataOn))):
        if value not in known:
            raise InvalidInputError(f"{name} is {value!r}; expected one of: {', '.join(known)}.")
    try:
        given = np.dtype(dtype)
    except TypeError:
        raise InvalidInputError(f"dtype is {dtype!r}; expected a dtype such as 'uint8' or 'float32'.") from None
    n_queries, n_corpus, n_features = (
        check_count(name, value)
        for name, value in (("n_queries", n_queries), ("n_corpus", n_corpus), ("n_features", n_features))
    )
    if op == "pairwise" and k is not None:
        raise InvalidInputError(f"k is {k!r} and op is 'pairwise', which has none; leave k out.")
    kept = check_k(1 if k is None else k, n_corpus) if op == "knn" else 0
    name = get_metric(metric).name
    computed = computed_dtype(given).name
    return Problem(op, n_queries, n_corpus, n_features, kept, name, computed, data_on, check_accuracy(accuracy))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InvalidInputError(f"{name} is {value!r}; expected a number above 0.")


def _names(candidates: Sequence[str] | None) -> list[str]:
    if candidates is None:
        return [status.name for status in backends()]
    if isinstance(candidates, str) or not candidates:
        raise InvalidInputError(f"candidates is {candidates!r}; expected a sequence of names, or None for all.")
    for name in candidates:
        if name not in registry():
            raise UnknownBackendError(f"candidate {name!r} is unknown; expected one of: {', '.join(registry())}.")
    return list(dict.fromkeys(candidates))


def _forecast(name: str, problem: Problem) -> Forecast:
    group = (name, *problem.group)
    start = 0.0 if is_started(name, problem) else wisdom().start(group)
    return forecast(wisdom().costs(group), problem, start)


def _measured(
    names: list[str], problem: Problem, calls: int, seconds: float, clock: Clock
) -> tuple[list[str], dict[str, str], dict[str, list[float]]]:
    """Measure what may be the fastest, in turns; return what is left, what failed, and seconds on the whole shape."""
    known = {name: _forecast(name, problem).of(calls) for name in names if wisdom().costs((name, *problem.group))}
    least = min(known.values(), key=lambda prediction: prediction.seconds, default=None)
    rivals = [
        name for name in names
        if math.isinf(seconds) or name not in known or not least
        or known[name].interval()[0] <= HOPELESS * least.seconds
    ]  # fmt: skip
    rivals.sort(key=lambda name: known[name].seconds if name in known else math.inf)
    sliced = _slice(problem, least, calls, seconds)
    race = _Race(sliced, seconds, clock)
    race.start(rivals)
    race.run()
    samples = [
        Sample(name, backend_version(name), sliced, {"call": float(np.median(times))})
        for name, times in race.times.items() if times
    ]  # fmt: skip
    if math.isinf(seconds) or calls > 1:  # preparing pays, or is asked for
        samples = [measure(s.backend, sliced, seconds=min(0.5, seconds / 8), clock=clock) for s in samples]
    wisdom().add(samples)
    forget_choices()
    on_whole = {}
    for sample in samples if calls == 1 else ():
        cost = wisdom().costs((sample.backend, *problem.group))["call"]
        scale = cost.predict(problem).seconds / cost.predict(sliced).seconds
        on_whole[sample.backend] = [scale * t for t in race.times[sample.backend]]
    return [name for name in names if name not in race.failed], race.failed, on_whole


class _Race:
    """Backends that are measured in turns, of which the slower half is left out after each round.

    Attributes
    ----------
    times : dict of str to list of float
        Seconds of a call of each backend in each of its turns, and of a long first call that started nothing.
    failed : dict of str to str
        What could not compute, and why.
    """

    def __init__(self, problem: Problem, seconds: float, clock: Clock) -> None:
        self.times: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}
        self._problem, self._seconds, self._clock = problem, seconds, clock
        self._searches: dict[str, Search] = {}
        self._end = clock() + seconds

    def start(self, names: list[str]) -> None:
        """Call each backend once, while half of the time is left; what is not reached has its estimate."""
        for name in names:
            if self._searches and self._clock() > self._end - self._seconds / 2:
                return
            was_started = is_started(name, self._problem)
            try:
                search = Search(name, self._problem, self._clock)
                first = search.call()
            except Exception as error:  # whatever a library raises: it cannot be the fastest
                self.failed[name] = f"failed as it was measured: {type(error).__name__}: {error}"
                continue
            self._searches[name] = search
            self.times[name] = [first] if was_started and first >= TURN_S else []
            if not was_started:  # starting is no measuring
                begun = self._clock()
                search.wake(min(WAKE_S, self._seconds / 4))
                self._end += first + self._clock() - begun

    def _turn(self, name: str) -> float:
        """Return the median seconds of as many calls as fill a turn."""
        search = self._searches[name]
        times: list[float] = []
        if self.times[name] and self.times[name][-1] < TURN_S:  # others had the CPUs meanwhile
            with kept_apart():
                search.call()
        while not times or sum(times) < TURN_S:
            times.append(max(search.call(), 1e-9))
        return float(np.median(times))

    def run(self) -> None:
        """Measure in rounds until the time is spent; each backend is measured once at the least."""
        going = list(self._searches)
        for _ in range(ROUNDS):
            for name in going:
                if self._clock() > self._end and all(self.times[other] for other in going):
                    return
                self.times[name].append(self._turn(name))
            medians = {name: float(np.median(self.times[name])) for name in going}
            ahead = sorted(going, key=lambda name: medians[name])
            if self._seconds < math.inf:
                alike = (1 + 2 * ALIKE) * min(medians.values(), default=0.0)
                half = -(-len(ahead) // 2)
                going = [name for i, name in enumerate(ahead) if i < half or medians[name] <= alike]


def _slice(problem: Problem, best: Prediction | None, calls: int, seconds: float) -> Problem:
    """Return a computation like another one, on fewer rows where it would take too long or too much memory."""
    if math.isinf(seconds):
        return problem
    row_bytes = problem.n_features * np.dtype(problem.dtype).itemsize
    n_corpus = max(problem.k, min(problem.n_corpus, SLICE_BYTES // row_bytes))
    each = best.seconds / calls * n_corpus / problem.n_corpus if best else problem.work / UNKNOWN_RATE
    share = seconds * CALL_SHARE / max(each, 1e-9)
    n_queries = max(1, min(problem.n_queries, int(problem.n_queries * share), SLICE_BYTES // row_bytes))
    if share * problem.n_queries < 1:  # one query takes too long on the whole corpus
        n_corpus = max(problem.k, int(n_corpus * share * problem.n_queries), 1)
    return replace(problem, n_queries=n_queries, n_corpus=n_corpus)


def _decide(
    names: list[str], passed_over: dict[str, str], problem: Problem, calls: int, measured: dict[str, list[float]]
) -> Choice:
    forecasts = {name: _forecast(name, problem) for name in names}
    predictions = {name: found.of(calls) for name, found in forecasts.items()}
    for name, times in measured.items():
        if name in predictions and len(times) > 1:
            spread = float(np.std(np.log(times)) / np.sqrt(len(times)))
            predictions[name] = Prediction(float(np.median(times)), max(spread, 0.01))
    ranked = sorted(predictions, key=lambda name: predictions[name].cautious)
    least = predictions[ranked[0]].cautious
    alike = tuple(name for name in ranked if predictions[name].cautious <= (1 + ALIKE) * least)
    errors = {name: _largest_error(name, problem) for name in ranked}

    def place(name: str) -> tuple[float, bool, bool]:
        return _decade(errors[name]), registry()[name].peer, bool(registry()[name].install)

    backend = min(alike, key=place)
    calls_from, other = _crossover(backend, forecasts, calls)
    return Choice(
        backend=backend,
        seconds={name: predictions[name].seconds for name in ranked},
        intervals={name: predictions[name].interval() for name in ranked},
        indistinguishable=alike,
        passed_over=passed_over,
        errors=errors,
        crossover_calls=calls_from,
        provenance={
            name: f"measured now, {len(measured[name])} times" if name in measured
            else wisdom().source((name, *problem.group))
            for name in ranked
        },
        problem=str(problem),
        calls=calls,
        _crossing=other,
    )  # fmt: skip


def _largest_error(name: str, problem: Problem) -> float:
    found = errors_of(name, problem.metric, problem.dtype)
    return float(max(found["ordinary"], found["adversarial"]))


def _decade(error: float) -> float:
    return math.floor(math.log10(error)) if 0 < error < math.inf else error


def _crossover(backend: str, forecasts: dict[str, Forecast], calls: int) -> tuple[int | None, str]:
    """Return from how many calls on another backend is clearly the fastest, and which; None if none is."""

    def overtaking(n: int) -> str:
        seconds = {name: found.of(n).cautious for name, found in forecasts.items()}
        best = min(seconds, key=lambda name: seconds[name])
        return best if seconds[best] * (1 + ALIKE) < seconds[backend] else ""

    high = calls
    while not overtaking(high):
        high *= 2
        if high > MOST_CALLS:
            return None, ""
    low = max(calls, high // 2)
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if overtaking(middle) else (middle, high)
    return high, overtaking(high)
