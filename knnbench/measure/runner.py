"""Running a plan: one process for each backend, so that none disturbs, starves or takes down another."""

import tempfile
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import knnbench
from knnbench.backends import registry, version_of
from knnbench.measure.machine import describe_machine, source_commit
from knnbench.measure.process import WorkerEnded, run_worker
from knnbench.measure.record import Record
from knnbench.measure.reference import reference_distances
from knnbench.measure.worker import Job, load_rows
from knnbench.threads import thread_count

__all__ = ["Plan", "measure"]

# Queries whose answers are checked, at the most.
CHECKED_QUERIES = 8

# Seconds that an answer may take: so many times the time for a case, which finding its size can exceed, and more
# for starting, importing, compiling, and loading and preparing the data.
LIMIT_SHARE = 10
GRACE_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes
    ----------
    backends, metrics : list of str
        Every one with every other.
    dataset : str
        For `knnbench.datasets.load`, with `options`.
    dtype : str
        Rows are converted to it; empty for the data's own.
    k, n_queries : int
        `n_queries` at the most: slower backends are measured on fewer, to stay within the time.
    case_s : float
        Seconds for each backend and metric, beyond starting and preparing.
    threads : int
    """

    backends: list[str]
    metrics: list[str]
    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    k: int = 3
    n_queries: int = 10_000
    case_s: float = 3.0
    threads: int = field(default_factory=thread_count)


def measure(plan: Plan) -> Generator[Record, None, None]:
    """Measure a plan, yielding each cell as soon as it is known.

    Parameters
    ----------
    plan : Plan

    Yields
    ------
    Record
        For each backend, in the order of the plan, one for each metric. A backend that crashes or hangs gives
        cells that say so, and the run goes on. Closing the iterator ends the process that is measuring.
    """
    queries, corpus = load_rows(plan.dataset, plan.options, plan.dtype)
    queries = queries[: plan.n_queries]
    with tempfile.TemporaryDirectory(prefix="knnbench-") as folder:
        references = {}
        for metric in plan.metrics:
            references[metric] = str(Path(folder) / f"{metric}.npy")
            np.save(references[metric], reference_distances(queries[:CHECKED_QUERIES], corpus, metric))
        shared = {
            "dataset": plan.dataset,
            "k": plan.k,
            "dtype": str(corpus.dtype),
            "n_features": corpus.shape[1],
            "threads": plan.threads,
            "version": knnbench.__version__,
            "commit": source_commit(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
        }
        for backend in plan.backends:
            own = {"backend": backend, "peer": registry()[backend].peer, "library": version_of(backend)}
            for cell in _cells_of_backend(plan, backend, references):
                shape = {"n_queries": len(queries), "n_corpus": len(corpus)}
                sampled = (cell.get("n_queries"), cell.get("n_corpus")) not in ((None, None), tuple(shape.values()))
                yield Record(**{**shared, **own, **shape, "sampled": sampled, **cell})


def _cells_of_backend(plan: Plan, backend: str, references: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each metric's cell; a worker that dies is replaced for the metrics that are left."""
    left = list(plan.metrics)
    while left:
        job = Job(
            backend=backend,
            metrics=left,
            dataset=plan.dataset,
            options=plan.options,
            dtype=plan.dtype,
            k=plan.k,
            n_queries=plan.n_queries,
            case_s=plan.case_s,
            references=references,
        )
        try:
            for cell in run_worker(
                "knnbench.measure.worker", asdict(job), plan.threads, LIMIT_SHARE * plan.case_s + GRACE_S
            ):
                yield {**cell, "metric": left.pop(0)}
        except WorkerEnded as ended:
            # Between two answers it was at work on the next metric; after the last, nothing is lost.
            if left:
                yield {"status": ended.status, "reason": ended.reason, "metric": left.pop(0)}
        else:
            if left:  # a library that ends the process and calls that success
                yield {"status": "crashed", "reason": "the process ended before its answer", "metric": left.pop(0)}
