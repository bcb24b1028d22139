"""The process that measures one backend.

Started by `knnbench.measure.runner` with its threads pinned; it is sent a `Job` and sends back the fields of a
`Record` for each of its metrics, in their order.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnbench import datasets
from knnbench.api import Neighbors, Prepared, knn, prepare
from knnbench.backends import backend_status, get_backend
from knnbench.dtypes import Array
from knnbench.errors import OverBudgetError, UnsupportedError
from knnbench.measure.memory import peak_since, start_peak
from knnbench.measure.process import worker_channel
from knnbench.measure.reference import check_neighbors
from knnbench.measure.timer import median_interval, timed, timed_repeats

__all__ = ["Job", "load_rows", "main"]

# A first look at a backend's speed, after a call that compiles: small enough for naive loops.
FIRST_LOOKS = 3
FIRST_QUERIES = 2
FIRST_CORPUS = 100

# The least that is measured: of a naive loop's corpus so many rows, and of all others the whole.
LEAST_QUERIES = 5
LEAST_CORPUS = 2000

# Of the time for a case, the share of one call; it may take so many times longer rather than leave corpus rows
# out.
CALL_SHARE = 0.2
LONGEST = 4.0

# Of queries, from one try to the next; and how much faster they must become for another when the time is filled.
MOST_GROWTH = 8.0
CHEAPER = 1.25

# How much slower a pair may look in the first look than it is, because of the overhead of a call.
OVERHEAD = 50


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to do.

    Attributes
    ----------
    backend : str
    metrics : list of str
    dataset : str
    options : dict
        Of `knnbench.datasets.load`.
    dtype : str
        Empty for the data's own.
    k, n_queries : int
    case_s : float
        Seconds for a case, within which queries are sampled.
    references : dict of str to str
        For each metric, the file with the reference distances of the first queries.
    """

    backend: str
    metrics: list[str]
    dataset: str
    options: dict[str, Any]
    dtype: str
    k: int
    n_queries: int
    case_s: float
    references: dict[str, str]


def load_rows(dataset: str, options: dict[str, Any], dtype: str) -> tuple[Array, Array]:
    """Return the queries and the corpus of a data set: its test and its training rows."""
    data = datasets.load(dataset, **options)
    if not dtype:
        return data.X_test, data.X_train
    return data.X_test.astype(dtype), data.X_train.astype(dtype)


def main() -> None:
    """Do the job that the parent sent."""
    sent, channel = worker_channel()
    job = Job(**sent)
    start = time.perf_counter()
    status = backend_status(job.backend)
    import_s = time.perf_counter() - start
    if not status.ok:
        reason = status.reason + (f". To use it: {status.install}" if status.install else "")
        for _ in job.metrics:
            print(json.dumps({"status": "absent", "reason": reason}), file=channel)
        return
    queries, corpus = load_rows(job.dataset, job.options, job.dtype)
    for metric in job.metrics:
        print(json.dumps({"import_s": import_s, **_cell(job, metric, queries, corpus)}), file=channel)


def _cell(job: Job, metric: str, queries: Array, corpus: Array) -> dict[str, Any]:
    """Measure one case; what goes wrong becomes its status."""
    statuses = {UnsupportedError: "unsupported", OverBudgetError: "over-budget", MemoryError: "out-of-memory"}
    try:
        return _Case(job, metric, queries, corpus).measure()
    except Exception as error:  # whatever a library raises is a fact about it
        status = next((name for kind, name in statuses.items() if isinstance(error, kind)), "crashed")
        return {"status": status, "reason": " ".join(f"{type(error).__name__}: {error}".split())}


class _Case:
    """One metric on one backend."""

    def __init__(self, job: Job, metric: str, queries: Array, corpus: Array) -> None:
        self.job, self.metric, self.queries, self.corpus = job, metric, queries[: job.n_queries], corpus
        self.backend = get_backend(job.backend)
        self.call_s = CALL_SHARE * job.case_s

    def prepared(self, n_corpus: int) -> tuple[float, Prepared]:
        """Return the seconds to prepare the first rows of the corpus, and the result."""
        rows = self.corpus[:n_corpus]
        return timed(lambda: prepare(rows, self.metric, backend=self.job.backend), self.backend.synchronize)

    def search(self, n_queries: int, prepared: Prepared) -> Callable[[], Neighbors]:
        """Return the call that is timed."""
        rows = self.queries[:n_queries]
        return lambda: knn(rows, prepared, self.job.k)

    def timed_search(self, n_queries: int, prepared: Prepared) -> tuple[float, Neighbors]:
        """Return the seconds of one call, and its answer."""
        return timed(self.search(n_queries, prepared), self.backend.synchronize)

    def corpus_rows(self, pairs_per_s: float) -> int:
        """Return how many corpus rows to measure: all, unless a few queries would take too long."""
        whole = len(self.corpus)
        affordable = LONGEST * self.call_s * pairs_per_s / LEAST_QUERIES
        if affordable < whole <= affordable * OVERHEAD:
            # The first look was too small to tell: see what one query costs in earnest.
            seconds, _ = self.timed_search(1, self.prepared(whole)[1])
            affordable = LONGEST * self.call_s * whole / seconds / LEAST_QUERIES
        return whole if affordable >= whole else min(whole, max(LEAST_CORPUS, self.job.k))

    def query_rows(self, prepared: Prepared, pairs_per_s: float) -> tuple[int, Neighbors]:
        """Return how many queries to measure in one call, and the answer to them.

        They fill the time of a call; beyond it, their number still grows while that makes each of them cheaper.
        """
        wanted, queries_per_s = int(pairs_per_s * self.call_s / prepared.shape[0]), 0.0
        while True:
            n_queries = min(len(self.queries), max(LEAST_QUERIES, wanted))
            seconds, answer = self.timed_search(n_queries, prepared)
            is_cheaper = n_queries / seconds > CHEAPER * queries_per_s
            is_short = seconds < self.call_s or (is_cheaper and 2 * seconds < LONGEST * self.call_s)
            if n_queries == len(self.queries) or not is_short:
                return n_queries, answer
            queries_per_s = n_queries / seconds
            wanted = int(n_queries * min(MOST_GROWTH, max(2.0, self.call_s / seconds)))

    def measure(self) -> dict[str, Any]:
        """Return the fields of the record."""
        job = self.job
        first_rows = max(FIRST_CORPUS, job.k)
        _, few = self.prepared(first_rows)
        first_call_s, _ = self.timed_search(FIRST_QUERIES, few)
        seconds = min(self.timed_search(FIRST_QUERIES, few)[0] for _ in range(FIRST_LOOKS))
        pairs_per_s = min(FIRST_QUERIES, len(self.queries)) * few.shape[0] / seconds
        n_corpus = self.corpus_rows(pairs_per_s)
        prepare_s, prepared = self.prepared(n_corpus)
        n_queries, answer = self.query_rows(prepared, pairs_per_s)
        resident = start_peak()
        times = timed_repeats(self.search(n_queries, prepared), self.backend.synchronize, job.case_s)
        peak = peak_since(resident)
        reference = np.load(job.references[self.metric])[:n_queries, :n_corpus]
        verdict = check_neighbors(
            answer.distances[: len(reference)],
            answer.indices[: len(reference)],
            reference,
            # For cosine the reference rounds otherwise than the definition of the order does.
            same_order=prepared.dtype.kind == "u"
            and self.backend.capabilities.exact_integers
            and self.metric != "cosine",
        )
        median_s, low_s, high_s = median_interval(times)
        return {
            "status": "wrong" if verdict.reason else "ok",
            "reason": verdict.reason,
            "n_queries": n_queries,
            "n_corpus": n_corpus,
            "times_s": times,
            "median_s": median_s,
            "low_s": low_s,
            "high_s": high_s,
            "prepare_s": prepare_s,
            "first_call_s": first_call_s,
            "error": verdict.error,
            "recall": verdict.recall,
            "n_checked": len(reference),
            "peak_bytes": peak,
        }


if __name__ == "__main__":
    main()
