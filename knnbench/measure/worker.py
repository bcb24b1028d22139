"""The process that measures one backend.

Started by `knnbench.measure.runner` with its threads pinned. It is told the backend, and then what to do, a
request at a time, so that backends can take turns on one case:

    open    load the case, find out how much of it fits the time, prepare, compute once, check the answer
    turn    time some calls
    close   check an answer to changed queries

Each answer has the fields of a `knnbench.results.Record` that are then known.
"""

import functools
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from knnbench.api import Neighbors, Prepared, knn, pairwise, prepare
from knnbench.backends import backend_status, get_backend, registry
from knnbench.dtypes import Array
from knnbench.errors import OverBudgetError, UnsupportedError
from knnbench.measure.cases import Case
from knnbench.measure.contention import CpuMeter
from knnbench.measure.machine import loaded_libraries
from knnbench.measure.memory import peak_since, start_peak
from knnbench.measure.process import worker_channel, worker_requests
from knnbench.measure.reference import Verdict, check_distances, check_neighbors, check_search
from knnbench.measure.timer import settle, timed
from knnbench.metrics import Space, get_metric
from knnbench.results import RANDOM_SEARCH
from knnbench.threads import thread_count

__all__ = ["CHECKED_ITERATIONS", "CHECKED_QUERIES", "SEEDS", "Opening", "main", "sampled_corpus"]

# Queries whose answers are checked before the timed calls, and others after them.
CHECKED_QUERIES = 8

# The same of the random search: of the first seed before, of the second after; timed calls have others.
CHECKED_ITERATIONS = 16
SEEDS = (0, 1)

# A first look at a backend's speed, after a call that compiles: small enough for naive loops.
FIRST_LOOKS = 3
FIRST_QUERIES = 2
FIRST_CORPUS = 100

# The least that is measured: of a naive loop's corpus so many rows, and of all others the whole.
LEAST_QUERIES = 5
LEAST_CORPUS = 2000

# Of the time for a case, the share of one call; it may take so many times longer rather than leave corpus rows
# out.
CALL_SHARE = 0.1
LONGEST = 8.0

# Of queries, from one try to the next; and how much faster they must become for another when the time is filled.
MOST_GROWTH = 8.0
CHEAPER = 1.25

# So many times as many queries are tried once before their number is settled: with more a library may compute in
# another way. Those of faiss take six times as long each with 100 as with 500 (its BLAS, two cores of Zen 5).
LOOK = 4

# How much slower a pair may look in the first look than it is, because of the overhead of a call.
OVERHEAD = 50

# Bytes of a matrix of distances that one timed call may return.
MATRIX_BYTES = 512 * 1024 * 1024

# Calls are given the queries from another row on each time, so that no answer can be an earlier one remembered.
SHIFTS = 16

# Calls in one turn at the most, and copies that are timed; bytes of rows that are put into page-locked memory.
TURN_CALLS = 100
COPIES = 5
PINNED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Opening:
    """How a case is opened.

    Attributes
    ----------
    case : Case
    case_s : float
        Seconds for the calls of the case, within which rows are sampled.
    reference, changed_reference : str
        The files with the reference distances of the first queries, and of the last corpus rows as queries; or with the
        losses of `SEEDS`.
    sizes : tuple of int, optional
        Queries and corpus rows of a call, to be as they were before; found if not given.
    """

    case: Case
    case_s: float
    reference: str
    changed_reference: str
    sizes: tuple[int, int] | None = None


def main() -> None:
    """Answer the parent's requests."""
    job, channel = worker_channel()
    print(json.dumps(_introduction(job["backend"])), file=channel)
    opened: _Case | None = None
    for request in worker_requests():
        (action, given), answer = next(iter(request.items())), {"status": "ok", "reason": ""}
        try:
            if action == "open":
                opened = None  # first, so that two cases are never held at once
                opening = Opening(**{**given, "case": Case(**given["case"])})
                opened = (_Search if opening.case.op == RANDOM_SEARCH else _Distances)(job["backend"], opening)
                answer |= opened.open()
            else:
                assert opened is not None
                answer |= opened.turn(given) if action == "turn" else opened.close()
        except Exception as error:  # whatever a library raises is a fact about it
            statuses = {UnsupportedError: "unsupported", OverBudgetError: "over-budget", MemoryError: "out-of-memory"}
            status = next((name for kind, name in statuses.items() if isinstance(error, kind)), "crashed")
            answer = {"status": status, "reason": " ".join(f"{type(error).__name__}: {error}".split())}
        settle()
        print(json.dumps(answer), file=channel)


def _introduction(name: str) -> dict[str, Any]:
    start = time.perf_counter()
    status = backend_status(name)
    import_s = time.perf_counter() - start
    if not status.ok:
        reason = status.reason + (f". To use it: {status.install}" if status.install else "")
        return {"status": "absent", "reason": reason}
    return {"status": "ok", "device": status.device, "import_s": import_s}


class _Case(ABC):
    """One case on one backend.

    Attributes
    ----------
    changed : str
        What `check_changed` asks for.
    """

    changed: ClassVar[str]

    def __init__(self, backend: str, opening: Opening) -> None:
        self.opening, self.case = opening, opening.case
        self.backend_name, self.backend = backend, get_backend(backend)
        self.call_s = CALL_SHARE * opening.case_s
        self.meter = CpuMeter(thread_count())
        self.peak = 0
        self.device_peak: int | None = None
        self.resident: Any = None  # the queries on a device
        self.shifts = itertools.cycle(range(SHIFTS))
        self.checked = 0
        self.verdict = Verdict(None, None, "")

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """Prepare, compute once, and check the answer."""

    @abstractmethod
    def call(self, shift: int) -> Any:
        """Compute what is timed, for one of `SHIFTS` variants."""

    def resident_call(self) -> dict[str, float]:
        """Return the seconds of the phases of a call with what lies on a device, where that is another than `call`."""
        return {}

    @abstractmethod
    def check_changed(self) -> Verdict:
        """Return what is wrong with an answer that no earlier one can be mistaken for."""

    def operations(self) -> dict[str, float]:
        """Return the operations of a timed call for each feature of a pair, where only counting tells."""
        return {}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Time calls until they fill some seconds, one at the least."""
        times: list[float] = []
        phases: dict[str, list[float]] = {}
        resident, device_peak = start_peak(), self.backend.device_peak()
        with self.meter:
            while not times or (sum(times) < seconds and len(times) < TURN_CALLS):
                times.append(timed(functools.partial(self.call, next(self.shifts)), self.backend)[0])
                for phase, taken in self.resident_call().items():
                    phases.setdefault(phase, []).append(taken)
        self.peak = max(self.peak, peak_since(resident))
        on_device = device_peak()
        if on_device is not None:
            self.device_peak = max(self.device_peak or 0, on_device)
        return {
            "times_s": times,
            "phases": phases,
            "peak_bytes": self.peak,
            "peak_device_bytes": self.device_peak,
            "contention": self.meter.contention,
        }

    def close(self) -> dict[str, Any]:
        """Check an answer to something else: what remembers answers fails."""
        operations = self.operations()
        again = self.check_changed()
        libraries, blas = loaded_libraries()
        if again.reason and not self.verdict.reason:
            again = Verdict(again.error, again.recall, f"after the timed calls, for {self.changed}: {again.reason}")
        self.verdict = _worse(self.verdict, again)
        return {**self.judgement(), "libraries": libraries, "blas": blas, "operations": operations}

    def judgement(self) -> dict[str, Any]:
        """Return what is known of the answers."""
        return {
            "status": "wrong" if self.verdict.reason else "ok",
            "reason": self.verdict.reason,
            "error": self.verdict.error,
            "recall": self.verdict.recall,
            "n_checked": self.checked,
        }


class _Distances(_Case):
    """Neighbours, or the distances of all pairs."""

    changed = "changed queries"

    def __init__(self, backend: str, opening: Opening) -> None:
        super().__init__(backend, opening)
        self.queries, self.corpus = self.case.load()

    def prepared(self, n_corpus: int) -> tuple[float, Prepared]:
        """Return the seconds to prepare the first rows of the corpus, and the result."""
        rows = self.corpus[:n_corpus]
        seconds, _, prepared = timed(lambda: prepare(rows, self.case.metric, backend=self.backend_name), self.backend)
        return seconds, prepared

    def compute(self, queries: Any, corpus: Any) -> Any:
        """Return the answer of the case's operation; the corpus is prepared, or an array."""
        options: Any = (
            {} if isinstance(corpus, Prepared) else {"metric": self.case.metric, "backend": self.backend_name}
        )
        return (
            pairwise(queries, corpus, **options)
            if self.case.k is None
            else knn(queries, corpus, self.case.k, **options)
        )

    def timed_call(self, n_queries: int, prepared: Prepared) -> tuple[float, Any]:
        """Return the seconds of one call on the first queries, and its answer."""
        seconds, _, answer = timed(lambda: self.compute(self.queries[:n_queries], prepared), self.backend)
        return seconds, answer

    def corpus_rows(self, pairs_per_s: float) -> int:
        """Return how many corpus rows to measure: all, unless a few queries would take too long."""
        whole = len(self.corpus)
        affordable = LONGEST * self.call_s * pairs_per_s / LEAST_QUERIES
        if affordable < whole <= affordable * OVERHEAD:
            # The first look was too small to tell: see what one query costs in earnest; the first time it may compile.
            prepared = self.prepared(whole)[1]
            seconds = min(self.timed_call(1, prepared)[0] for _ in range(2))
            affordable = LONGEST * self.call_s * whole / seconds / LEAST_QUERIES
        return whole if affordable >= whole else min(whole, max(LEAST_CORPUS, self.case.k or 1))

    def query_rows(self, prepared: Prepared, pairs_per_s: float) -> int:
        """Return how many queries to measure in one call.

        They fill the time of a call; beyond it, their number still grows while that makes each of them cheaper.
        """
        most = len(self.queries)
        if self.case.k is None:
            most = max(1, min(most, MATRIX_BYTES // (8 * prepared.shape[0])))
        wanted, queries_per_s = int(pairs_per_s * self.call_s / prepared.shape[0]), 0.0
        while True:
            n_queries = min(most, max(LEAST_QUERIES, wanted))
            seconds, _ = self.timed_call(n_queries, prepared)
            if seconds >= self.call_s and n_queries < most:
                # The first call with so many may have compiled what fewer do not use.
                seconds = min(seconds, self.timed_call(n_queries, prepared)[0])
            is_cheaper = n_queries / seconds > CHEAPER * queries_per_s
            is_short = seconds < self.call_s or (is_cheaper and 2 * seconds < LONGEST * self.call_s)
            if n_queries == most or not is_short:
                break
            queries_per_s = n_queries / seconds
            wanted = int(n_queries * min(MOST_GROWTH, max(2.0, self.call_s / seconds)))
        while n_queries < most and LOOK * seconds <= LONGEST * self.call_s:
            more = min(most, LOOK * n_queries)
            more_s, _ = self.timed_call(more, prepared)
            if more / more_s <= CHEAPER * n_queries / seconds:
                break
            n_queries, seconds = more, more_s
        return n_queries

    def open(self) -> dict[str, Any]:
        """Prepare, compute once, and check the answer."""
        _, few = self.prepared(max(FIRST_CORPUS, self.case.k or 1))
        first_call_s, _ = self.timed_call(FIRST_QUERIES, few)
        if self.opening.sizes:
            n_queries, n_corpus = self.opening.sizes
            prepare_s, self.corpus_prepared = self.prepared(n_corpus)
        else:
            seconds = min(self.timed_call(FIRST_QUERIES, few)[0] for _ in range(FIRST_LOOKS))
            pairs_per_s = min(FIRST_QUERIES, len(self.queries)) * few.shape[0] / seconds
            n_corpus = self.corpus_rows(pairs_per_s)
            prepare_s, self.corpus_prepared = self.prepared(n_corpus)
            n_queries = self.query_rows(self.corpus_prepared, pairs_per_s)
        self.sizes = n_queries, n_corpus
        # The rows that calls are given views of; those after the last query are the first again.
        self.rows = np.resize(self.queries, (n_queries + SHIFTS, self.queries.shape[1]))
        call_s, answer = self.timed_call(n_queries, self.corpus_prepared)
        self.verdict = self.check(answer, self.opening.reference)
        space = Space(get_metric(self.case.metric), np.dtype(self.case.dtype), self.case.n_features)
        return {
            **self.judgement(),
            "measured_queries": n_queries,
            "measured_corpus": n_corpus,
            "call_s": call_s,
            "operations": self.backend.operations(space, self.case.op),
            "phases": {"prepare": [prepare_s], "first_call": [first_call_s], **self.copies(space.dtype)},
        }

    def copies(self, dtype: np.dtype[Any]) -> dict[str, list[float]]:
        """Return the phases of a call on a device taken apart: what is copied, and what is computed there."""
        backend = self.backend
        if backend.capabilities.device == "cpu":
            return {}
        rows, corpus = self.rows[: self.sizes[0]], self.corpus[: self.sizes[1]]
        self.resident = backend.to_native(rows, dtype)
        answer = self.compute(self.resident, self.corpus_prepared)
        arrays = answer if isinstance(answer, tuple) else (answer,)

        def repeated(function: Callable[[], Any]) -> list[float]:
            return [timed(function, backend)[0] for _ in range(COPIES)]

        phases = {
            "copy_in": repeated(lambda: backend.to_native(rows, dtype)),
            "copy_out": repeated(lambda: [backend.to_numpy(array) for array in arrays]),
        }
        uploader = backend.uploader()
        with suppress(Exception):  # whatever a library raises: without page-locked memory the rest is measured
            phases["from_pageable"] = repeated(lambda: self.compute(rows, corpus))
            if uploader is not None and rows.nbytes + corpus.nbytes <= PINNED_BYTES:
                pinned = uploader.page_locked(rows), uploader.page_locked(corpus)
                phases["from_pinned"] = repeated(lambda: self.compute(*pinned))
        return phases

    def call(self, shift: int) -> Any:
        """Compute with the queries from another row on."""
        return self.compute(self.rows[shift : shift + self.sizes[0]], self.corpus_prepared)

    def resident_call(self) -> dict[str, float]:
        """Compute with queries that lie on the device: in turns with the others, as calls from the host are."""
        if self.resident is None:
            return {}
        whole = functools.partial(self.compute, self.resident, self.corpus_prepared)
        compute_s, device_s, _ = timed(whole, self.backend)
        return {"compute": compute_s} if device_s is None else {"compute": compute_s, "device": device_s}

    def check_changed(self) -> Verdict:
        """Check the answer to other queries in the place of those that were timed."""
        changed = self.corpus[-CHECKED_QUERIES:]
        self.rows[: len(changed)] = changed
        answer = self.compute(self.rows[: self.sizes[0]], self.corpus_prepared)
        return self.check(answer, self.opening.changed_reference)

    def check(self, answer: Any, path: str) -> Verdict:
        """Return what is wrong with an answer."""
        n_queries, n_corpus = self.sizes
        reference = np.load(path)[:n_queries, :n_corpus]
        exact = np.dtype(self.case.dtype).kind == "u" and self.backend.capabilities.exact_integers
        self.checked += len(reference)
        if isinstance(answer, Neighbors):
            # For cosine the reference rounds otherwise than the definition of the order does.
            same_order = exact and self.case.metric != "cosine"
            nearest, indices = (part[: len(reference)] for part in answer)
            return check_neighbors(nearest, indices, reference, same_order=same_order)
        distances: Array = answer[: len(reference)]
        return check_distances(distances, reference, exact=exact and distances.dtype.kind == "i")


class _Search(_Case):
    """Iterations of the random search, from its first point on, and with a seed of its own in each call."""

    changed = "another seed"

    def __init__(self, backend: str, opening: Opening) -> None:
        super().__init__(backend, opening)
        self.X, self.y = self.case.load_samples()
        self.dtype = np.result_type(self.X.dtype, np.float32)
        self.n_classes = int(self.y.max()) + 1
        # A peer takes one candidate at a time: what is computed ahead would be lost on it.
        self.block_size = 1 if registry()[backend].peer else None
        self.calls, self.before = 0, dict[str, int]()

    def prepared(self, n_samples: int) -> tuple[float, Any]:
        """Return the seconds to prepare the first samples, and their losses."""
        from knnbench.classifiers.random_search import Objective

        X, y, weight = self.X[:n_samples], self.y[:n_samples], np.ones(n_samples)
        seconds, _, objective = timed(lambda: Objective.of(self.backend, X, y, weight, self.dtype), self.backend)
        return seconds, objective

    def search(self, objective: Any, seed: int, n_iterations: int) -> Any:
        """Return a search after some iterations."""
        from knnbench.classifiers.random_search import INIT_SCALE, STEP_SIZE, Search

        search = Search.begun(seed, (self.X.shape[1], self.n_classes), self.dtype, INIT_SCALE)
        for _ in search.improvements(objective, STEP_SIZE, n_iterations, n_iterations, self.block_size):
            pass
        return search

    def timed_search(self, objective: Any, n_iterations: int) -> tuple[float, Any]:
        """Return the seconds of some iterations of the first seed, and the search."""
        seconds, _, search = timed(lambda: self.search(objective, SEEDS[0], n_iterations), self.backend)
        return seconds, search

    def open(self) -> dict[str, Any]:
        """Prepare, search once, and check the losses and the decisions."""
        _, few = self.prepared(min(FIRST_CORPUS, len(self.X)))
        first_call_s, _ = self.timed_search(few, FIRST_QUERIES)
        n_iterations, n_samples = self.opening.sizes or (0, self.samples())
        prepare_s, self.objective = self.prepared(n_samples)
        least = min(LEAST_QUERIES, self.case.n_queries)
        if not n_iterations:
            seconds = min(self.timed_search(self.objective, least)[0] for _ in range(2))
            n_iterations = max(least, min(self.case.n_queries, int(self.call_s / seconds * least)))
        self.sizes = n_iterations, n_samples
        call_s, search = self.timed_search(self.objective, n_iterations)
        self.verdict = self.check(search, self.opening.reference)
        self.before = dict(self.objective.summed.operations)
        return {
            **self.judgement(),
            "measured_queries": n_iterations,
            "measured_corpus": n_samples,
            "call_s": call_s,
            "phases": {"prepare": [prepare_s], "first_call": [first_call_s]},
        }

    def samples(self) -> int:
        """Return how many samples to measure: all, unless a few iterations would take too long."""
        whole, sampled = len(self.X), sampled_corpus(len(self.X))
        seconds, _ = self.timed_search(self.prepared(sampled)[1], 1)
        return whole if seconds * LEAST_QUERIES * whole <= LONGEST * self.call_s * sampled else sampled

    def call(self, shift: int) -> Any:
        """Search with another seed."""
        self.calls += 1
        return self.search(self.objective, SEEDS[-1] + 1 + shift, self.sizes[0])

    def operations(self) -> dict[str, float]:
        """Return what the timed calls did, candidates that were computed ahead and discarded included."""
        per_call = max(1, self.calls) * self.sizes[0] * self.sizes[1] * self.case.n_features
        done = self.objective.summed.operations
        return {name: (count - self.before.get(name, 0)) / per_call for name, count in done.items()}

    def check_changed(self) -> Verdict:
        """Check the search with a seed that was not timed."""
        return self.check(self.search(self.objective, SEEDS[1], self.sizes[0]), self.opening.changed_reference)

    def check(self, search: Any, path: str) -> Verdict:
        """Return what is wrong with a search."""
        reference = np.array(json.loads(Path(path).read_text())[str(self.sizes[1])][: self.sizes[0]])
        self.checked += len(reference)
        return check_search(search.accepted, search.curve, search.near_ties, reference)


def sampled_corpus(n_corpus: int) -> int:
    """Return how many corpus rows stand for all of them, where these take too long."""
    return min(n_corpus, LEAST_CORPUS)


def _worse(first: Verdict, second: Verdict) -> Verdict:
    """Return the worse of both in every respect."""
    errors, recalls = (first.error, second.error), [r for r in (first.recall, second.recall) if r is not None]
    return Verdict(
        None if None in errors else max(e for e in errors if e is not None),
        min(recalls) if recalls else None,
        first.reason or second.reason,
    )


if __name__ == "__main__":
    main()
