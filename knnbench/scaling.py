"""What a search on a cluster will take, before it is paid for: time, memory, bytes moved, and the shards to choose.

The seconds of a task come from this machine's cost model (`knnbench.selection`), which ``knnbench calibrate`` makes
good; what a task, a merge and the network add is counted as `knnbench.distributed` does it. Workers are taken to be
processes of machines like this one, of which each is filled before the next. A thread is as fast as one of a search
that takes all CPUs where all are busy; where some are idle, it is faster, as far as searches of one thread were
measured.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from knnbench.api import USUAL_CORPUS, check_accuracy, check_count, check_k
from knnbench.blocking import check_budget
from knnbench.distributed import QUERY_ROWS, SPLIT_EVERY
from knnbench.dtypes import computed_dtype
from knnbench.errors import InvalidInputError, UnsupportedError
from knnbench.metrics import get_metric
from knnbench.selection import Problem, choose
from knnbench.selection.calibration import ALONE
from knnbench.selection.costs import Cost, Prediction
from knnbench.selection.wisdom import wisdom
from knnbench.settings import THREADS_VARIABLE, held

__all__ = ["ScalingPlan", "network_rate", "plan"]

# Of Dask's scheduler for each task ("Dask best practices": about a millisecond each), of a worker between two tasks,
# and of a search from the call to its first task and from the last one to the answer: measured on a LocalCluster with
# next to no corpus in 1 to 128 shards (35 ms with one, 2 to 3 ms more for each task of one worker). Merging a pair of
# an index and a value on one core: 64 lists of 10,000 x 100 in 0.8 s on a Zen 4.
TASK_SECONDS = 1e-3
WORKER_SECONDS = 1.5e-3
JOB_SECONDS = 0.03
MERGE_SECONDS = 13e-9

# What a worker holds before it has any data: Python, Dask, numba and its kernels.
WORKER_BYTES = 300_000_000

# A shard is no larger: it is moved, and computed again, as a whole.
SHARD_BYTES = 1 << 30

# Waves of tasks from which is chosen, beyond those that the size of a shard asks for, and the share of time that more
# waves may cost a search of so many seconds: the more there are, the less is lost with a worker, or by waiting for the
# last one. Of a shorter search less can be lost, and more waves may cost a smaller share.
WAVES = range(1, 9)
WORTH = 0.05
LONG_SECONDS = 60

# Bytes of a transfer that is timed.
TRANSFER = 1 << 26


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """A search on a cluster.

    Attributes
    ----------
    problem : Problem
        The whole search.
    backend, source : str
        That computes, and where its costs come from.
    workers, threads : int
        Processes, and tasks that each computes at a time, with one thread each.
    shard_rows, n_shards : int
        Rows of a chunk of the corpus, and how many chunks that makes.
    n_tasks : int
        Searches and merges.
    compute_s, merge_s, transfer_s, overhead_s, start_s : float
        Seconds of searching, merging, moving, handing out tasks, and starting the backend in each worker.
    spread : float
        Standard deviation of the logarithm of `compute_s`.
    worker_bytes : int
        Memory of a worker that holds its share of the corpus.
    corpus_bytes : int
        Of which that share.
    moved_bytes : int
        Over the network: queries to the workers, lists between them and to the client.
    network_rate : float
        Bytes a second between two workers.
    """

    problem: Problem
    backend: str
    source: str
    workers: int
    threads: int
    shard_rows: int
    n_shards: int
    n_tasks: int
    compute_s: float
    merge_s: float
    transfer_s: float
    overhead_s: float
    start_s: float
    spread: float
    worker_bytes: int
    corpus_bytes: int
    moved_bytes: int
    network_rate: float

    @property
    def seconds(self) -> float:
        """All of it, from the first task to the answer, when the corpus lies in the workers' memory."""
        return self.search_s + self.start_s

    @property
    def search_s(self) -> float:
        """All of it but for what starting the backend takes, once in the life of a worker."""
        return self.compute_s + self.merge_s + self.transfer_s + self.overhead_s

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard."""
        return self.shard_rows * self.problem.n_features * np.dtype(self.problem.dtype).itemsize

    def interval(self) -> tuple[float, float]:
        """Return seconds between which 95 % of the outcomes are expected, as far as the cost model tells."""
        low, high = Prediction(self.compute_s, self.spread).interval()
        rest = self.seconds - self.compute_s
        return low + rest, high + rest

    def __str__(self) -> str:
        low, high = self.interval()
        ends = f"{_duration(low)} to {_duration(high)}"
        return "\n".join(
            (
                f"{self.problem}, on {self.workers} workers x {self.threads} threads",
                f"  backend            {self.backend}, with {self.source}",
                f"  time               {_duration(self.seconds)} ({ends}): searching {_duration(self.compute_s)}, "
                f"merging {_duration(self.merge_s)}, moving {_duration(self.transfer_s)}, "
                f"handing out {self.n_tasks:,} tasks {_duration(self.overhead_s)}, starting {_duration(self.start_s)}",
                f"  memory of a worker {_size(self.worker_bytes)}, its share of the corpus included "
                f"({_size(self.corpus_bytes)})",
                f"  bytes moved        {_size(self.moved_bytes)}, at {_size(self.network_rate)}/s",
                f"  shards             {self.n_shards:,} of {self.shard_rows:,} rows ({_size(self.shard_bytes)}): "
                f"corpus.rechunk(({self.shard_rows}, -1))",
            )
        )


def plan(
    *,
    n_queries: int,
    n_corpus: int,
    n_features: int,
    k: int = 10,
    metric: str = "euclidean",
    dtype: Any = "float32",
    accuracy: str = "fast",
    backend: str = "auto",
    workers: int = 1,
    threads: int = 1,
    network_rate: float = 1.25e9,
    shard_rows: int | None = None,
    memory_budget: int | None = None,
) -> ScalingPlan:
    """Predict a search of `knnbench.distributed.knn` on a corpus that lies in the memory of a cluster.

    Parameters
    ----------
    n_queries, n_corpus, n_features, k, metric, dtype, accuracy, backend, memory_budget
        Of the search.
    workers, threads : int
        Processes, and the threads of each; ``knnbench.distributed`` gives each task one.
    network_rate : float
        Bytes a second between two workers; `network_rate` measures it. Default: 10 Gbit/s.
    shard_rows : int, optional
        Default: the most shards, of at most 1 GiB each, whose time is within 5 % of the least, or less for a search
        of less than a minute.

    Returns
    -------
    ScalingPlan

    Raises
    ------
    InvalidInputError
        If a number is out of range.
    UnsupportedError
        If the backend lacks what is asked for, or has never been measured.

    Examples
    --------
    >>> found = plan(n_queries=10_000, n_corpus=10**8, n_features=128, workers=16, threads=4, backend="numba")
    >>> found.workers, found.n_shards % 64
    (16, 0)
    """
    sizes = {"n_queries": n_queries, "n_corpus": n_corpus, "n_features": n_features}
    n_queries, n_corpus, n_features = (check_count(name, value) for name, value in sizes.items())
    workers, threads = check_count("workers", workers), check_count("threads", threads)
    k = check_k(check_count("k", k), n_corpus)
    if not network_rate > 0:
        raise InvalidInputError(f"network_rate is {network_rate!r}; expected bytes a second, above 0.")
    problem = Problem(
        "knn", n_queries, n_corpus, n_features, k, get_metric(metric).name, computed_dtype(dtype).name,
        accuracy=check_accuracy(accuracy),
    )  # fmt: skip
    if backend == "auto":
        usual = min(n_corpus, USUAL_CORPUS)
        task = replace(problem, n_queries=min(n_queries, QUERY_ROWS), n_corpus=usual, k=min(k, usual))
        backend, _ = choose(task)
    costs = wisdom().costs((backend, *problem.group))
    if "call" not in costs:
        raise UnsupportedError(
            f"backend {backend!r} has never been measured on {problem.metric} of {problem.dtype}, and has no default; "
            f"`knnbench calibrate` measures it."
        )
    slots = workers * threads
    if shard_rows is not None:
        shards = [check_count("shard_rows", shard_rows)]
    else:
        largest = max(1, SHARD_BYTES // (n_features * np.dtype(problem.dtype).itemsize))
        first = max(1, math.ceil(n_corpus / (largest * slots)))
        shards = list(dict.fromkeys(math.ceil(n_corpus / (slots * first * wave)) for wave in WAVES))
    plans = [
        _planned(problem, backend, costs["call"], workers, threads, rows, network_rate, check_budget(memory_budget))
        for rows in shards
    ]
    least = min(found.search_s for found in plans)
    worth = WORTH * min(1.0, least / LONG_SECONDS)
    return next(found for found in reversed(plans) if found.search_s <= (1 + worth) * least)


def _planned(
    problem: Problem, backend: str, cost: Cost, workers: int, threads: int, rows: int, rate: float, budget: int
) -> ScalingPlan:
    """Return what a search takes in shards of so many rows."""
    space, known = problem.space, wisdom()
    rows = min(rows, problem.n_corpus)
    n_shards, n_blocks = math.ceil(problem.n_corpus / rows), math.ceil(problem.n_queries / QUERY_ROWS)
    slots = workers * threads
    task = replace(problem, n_queries=math.ceil(problem.n_queries / n_blocks), n_corpus=rows, k=min(problem.k, rows))
    predicted = cost.predict(task)
    group = (backend, *problem.group)
    one_thread = predicted.seconds * threads_worth(backend, cost, known.threads(group), slots)
    n_searches = n_shards * n_blocks
    n_merges = n_blocks * _merges(n_shards)
    n_tasks = n_searches + n_merges
    pairs = problem.n_queries * problem.k
    list_bytes = pairs * (space.ranked.itemsize + 8)
    query_bytes = problem.n_queries * problem.n_features * space.dtype.itemsize
    corpus_bytes = math.ceil(n_shards / workers) * rows * problem.n_features * space.dtype.itemsize
    # A list moves unless it is merged where it was found; a tree merges each about once.
    lists_moved = n_shards * list_bytes * (workers - 1) // workers
    result_bytes = pairs * (space.output.itemsize + 8)
    # Workers pass queries on to each other: those that have them double each round.
    rounds = 1 + math.ceil(math.log2(workers))
    transfer = query_bytes * rounds / rate + lists_moved / workers / rate + result_bytes / rate
    merge_pairs = (n_shards - 1) * pairs
    parallel = min(slots, max(1, n_blocks * math.ceil(n_shards / SPLIT_EVERY)))
    return ScalingPlan(
        problem, backend, known.source(group), workers, threads, rows, n_shards, n_tasks,
        compute_s=math.ceil(n_searches / slots) * one_thread,
        merge_s=merge_pairs * MERGE_SECONDS / parallel,
        transfer_s=transfer,
        overhead_s=JOB_SECONDS + n_tasks * TASK_SECONDS + math.ceil(n_tasks / slots) * WORKER_SECONDS,
        start_s=known.start(group),
        spread=predicted.spread,
        worker_bytes=WORKER_BYTES + corpus_bytes + query_bytes
        + threads * (min(budget, 2 * rows * problem.n_features * space.dtype.itemsize)
                     + (SPLIT_EVERY + 2) * list_bytes // n_blocks),
        corpus_bytes=corpus_bytes,
        moved_bytes=query_bytes * workers + lists_moved + result_bytes,
        network_rate=rate,
    )  # fmt: skip


def threads_worth(backend: str, cost: Cost, threads: int, busy: int) -> float:
    """Return how many times as long as a search by all threads one by a single thread takes.

    That is as many times as there are threads where all CPUs are busy. A thread alone has what others would take of
    caches, of memory and, on CPUs with two threads a core, of the core: searches of one thread, which are kept as
    wisdom of their own, tell how much that is, and it shrinks as more threads are busy.

    Parameters
    ----------
    backend : str
    cost : Cost
        Of calls by all threads.
    threads : int
        That those are.
    busy : int
        Threads that search at once.
    """
    with held({THREADS_VARIABLE: "1"}):
        searches = [
            sample
            for sample in wisdom().fresh
            if (sample.backend, sample.problem.op) == (backend, "knn") and cost.knows(sample.problem)
        ]
    if threads == 1 or not searches:
        return float(threads)
    # Of short ones, which threads hardly share, there may be any number.
    longest = sorted(searches, key=lambda sample: sample.seconds["call"])[-ALONE:]
    alone = [sample.seconds["call"] / cost.predict(sample.problem).seconds for sample in longest]
    least = min(max(float(np.median(alone)), 1.0), threads)
    return least + (threads - least) * (min(busy, threads) - 1) / (threads - 1)


def _merges(n_lists: int) -> int:
    """Return the tasks of a tree of merges, the last of which finishes the answer.

    Examples
    --------
    >>> _merges(1), _merges(8), _merges(9), _merges(65)
    (1, 1, 3, 12)
    """
    if n_lists <= SPLIT_EVERY:
        return 1
    merges = math.ceil(n_lists / SPLIT_EVERY)
    return merges + _merges(merges)


def network_rate(client: Any) -> float:
    """Measure the bytes a second that a worker of a cluster gets from another, or from here if there is one only.

    Parameters
    ----------
    client : distributed.Client

    Returns
    -------
    float
        The median of three transfers of 64 MiB.
    """
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    if not addresses:
        raise InvalidInputError("the cluster has no workers; start some before the network between them is measured.")
    rates = []
    for _ in range(3):
        data = np.random.default_rng().integers(0, 256, TRANSFER, dtype=np.uint8)
        begin = time.perf_counter()
        there = client.scatter(data, workers=addresses[:1], hash=False)
        if len(addresses) > 1:
            begin = time.perf_counter()
            client.submit(len, there, workers=addresses[1:2], pure=False).result()
        rates.append(TRANSFER / (time.perf_counter() - begin))
    return float(np.median(rates))


def _duration(seconds: float) -> str:
    """Return seconds as people say them.

    Examples
    --------
    >>> _duration(0.0123), _duration(75), _duration(7200)
    ('12 ms', '75 s', '2.0 h')
    """
    for limit, unit, name in ((0.1, 1e-3, "ms"), (600, 1.0, "s"), (7200 - 1, 60.0, "min")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.2g} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{seconds / 3600:.1f} h"


def _size(n_bytes: float) -> str:
    """Return bytes in units of a thousand.

    Examples
    --------
    >>> _size(512_000_000_000)
    '512 GB'
    """
    power = min(4, int(math.log10(max(n_bytes, 1)) / 3))
    return f"{n_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
