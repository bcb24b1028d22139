"""Nearest neighbours on Dask: the corpus stays where its chunks are, queries travel, lists of neighbours are merged.

A task searches one chunk of rows of the corpus (a shard) for a block of queries, and gives values to rank with indices
of the whole corpus (`knnbench.api.search_block`); a tree of merges (`knnbench.ordering.merge_topk`) joins the lists.
The merge is associative, commutative and idempotent, so that lost workers, retries and tasks that ran twice change no
bit of the answer.

Who computes must not matter either. On uint8, and with ``accuracy="exact"``, every own backend gives the same, and each
worker takes the fastest of its machine. With floats and ``accuracy="fast"`` the job names one backend, one level of
vector instructions that all workers have and one number of threads a task, for all tasks, and one centre for each block
of queries.

Dask is loaded on use; ``pip install 'knnbench[distributed]'``.
"""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from knnbench import interchange, selection
from knnbench.api import (
    Accuracy,
    Neighbors,
    as_rows,
    centre_of,
    check_accuracy,
    check_count,
    check_k,
    finish_ranked,
    search_block,
)
from knnbench.backends import backend_status, get_backend
from knnbench.blocking import check_budget, slices
from knnbench.classifiers.knn import KNNClassifier, check_weights, classes_and_codes
from knnbench.dtypes import Array, common_dtype, computed_dtype
from knnbench.errors import BackendUnavailableError, InvalidInputError, UnsupportedError
from knnbench.metrics import Space, get_metric
from knnbench.ordering import merge_topk
from knnbench.selection import Problem
from knnbench.selection.auto import CANDIDATES
from knnbench.selection.wisdom import wisdom
from knnbench.settings import LEVEL_VARIABLE, THREADS_VARIABLE, held, setting
from knnbench.streams import is_dask

__all__ = ["DistributedKNNClassifier", "Job", "knn"]

# Queries of a block at the most: a task is then long beside what Dask needs to hand it out, its lists are small beside
# a shard, and a shard is searched for all queries in a few tasks. A constant, so that no answer depends on the cluster.
QUERY_ROWS = 1 << 14

# Lists that a task of the tree merges.
SPLIT_EVERY = 8

# Bytes of lists, of all shards or of what a tree has left of them, up to which they are finished where they were asked
# for: a step less, of some 7 ms, and no work that workers had better share.
FINISHED_BYTES = 1 << 20

LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"

List = tuple[Array, Array]


@dataclass(frozen=True)
class Job:
    """What all tasks of a search agree on.

    Attributes
    ----------
    k : int
    metric : str
        Canonical name.
    dtype : str
        That is computed in.
    n_features : int
    accuracy : {"fast", "exact"}
    backend : str
        ``"auto"``: each worker takes its fastest, if all give the same.
    settings : dict of str to str
        Variables that each task holds: its number of threads, and the level of vector instructions.
    memory_budget : int
        Bytes, of each task.
    check_finite : bool
    """

    k: int
    metric: str
    dtype: str
    n_features: int
    accuracy: Accuracy
    backend: str
    settings: dict[str, str]
    memory_budget: int
    check_finite: bool

    @property
    def space(self) -> Space:
        """The metric on rows of this dtype and length."""
        return Space(get_metric(self.metric), np.dtype(self.dtype), self.n_features)

    @property
    def is_pinned(self) -> bool:
        """Whether tasks must compute alike, or answers would depend on who computes."""
        return self.accuracy == "fast" and not self.space.is_integer

    def search(self, queries: Array, shard: Array, part: slice, name: str) -> List:
        """Return the neighbours of queries in a shard, which holds some rows of the corpus.

        Floats are centred amid the queries: a point that all shards have without a task that looks for it. What
        centring is for, that rows lie near it which are near to a query, it does as well as one amid the corpus.
        """
        try:
            return self._search(queries, shard, part)
        except InvalidInputError as error:
            raise InvalidInputError(f"in {name}, whose first row is {part.start:,} of the corpus: {error}") from None

    def _search(self, queries: Array, shard: Array, part: slice) -> List:
        shard = shard if hasattr(shard, "dtype") else np.asarray(shard)
        dtypes = interchange.dtype_of(queries), interchange.dtype_of(shard)
        shape = part.stop - part.start, self.n_features  # which Dask takes on trust, as it does the dtype
        if np.shape(shard) != shape or (len(shard) and common_dtype(*dtypes) != self.dtype):
            raise InvalidInputError(
                f"it has shape {np.shape(shard)} and {dtypes[1]} for queries of {dtypes[0]}; expected shape {shape}, "
                f"and both to be computed in {self.dtype}, as their Dask arrays say."
            )
        if len(shard) == 0:
            # Exact values of floats are strings of bytes; any merge with others makes them as long as those.
            ranked = self.space.ranked if self.is_pinned or self.space.is_integer else np.dtype("S1")
            return np.empty((len(queries), 0), ranked), np.empty((len(queries), 0), np.int64)
        backend = self.backend
        if backend == "auto" and not interchange.on_device(shard):
            backend = fastest_here(
                len(queries), len(shard), self.n_features, self.k, self.metric, self.dtype, self.accuracy
            )
        centre = centre_of(queries, self.space) if self.is_pinned and len(queries) else None
        with held(self.settings):
            ranked, indices = search_block(
                queries, shard, self.k, part.start, self.metric, backend=backend, accuracy=self.accuracy,
                memory_budget=self.memory_budget, check_finite=self.check_finite, centre=centre,
            )  # fmt: skip
        return np.asarray(ranked), np.asarray(indices)

    def merge(self, lists: list[List]) -> List:
        """Return the nearest of several lists; the order of the lists does not matter, nor that one comes twice."""
        return functools.reduce(lambda first, second: merge_topk(first, second, self.k), lists)

    def finish(self, lists: list[List]) -> List:
        """Return distances and indices of the nearest of the lists that are left."""
        backend = self.backend if self.backend != "auto" else "numpy"
        ranked, indices = self.merge(lists)
        return finish_ranked(ranked, self.metric, self.dtype, self.n_features, backend, self.accuracy), indices


@functools.lru_cache(maxsize=256)
def fastest_here(
    n_queries: int, n_corpus: int, n_features: int, k: int, metric: str, dtype: str, accuracy: Accuracy
) -> str:
    """Return the fastest own backend of this machine by estimate, a GPU's if there is one that was calibrated.

    Examples
    --------
    >>> fastest_here(10, 100, 4, 1, "cityblock", "uint8", "exact") in ("numba", "numpy")
    True
    """
    problem = Problem("knn", n_queries, n_corpus, n_features, min(k, n_corpus), metric, dtype, accuracy=accuracy)
    name, _ = selection.choose(problem)
    if any(find_spec(module) for module in ("cupy", "numba_cuda")):
        on_gpu = [other for other in CANDIDATES["device"] if backend_status(other).ok]
        costs = {other: wisdom().costs((other, *problem.group)) for other in (name, *on_gpu)}
        known = {other: cost["call"].predict(problem).seconds for other, cost in costs.items() if cost}
        if known:
            return min(known, key=lambda other: known[other])
    return name


def knn(
    queries: Any,
    corpus: Any,
    k: int,
    metric: str = "euclidean",
    *,
    backend: str = "auto",
    accuracy: Accuracy = "fast",
    memory_budget: int | None = None,
    check_finite: bool = True,
    threads: int = 1,
    compute: bool = True,
    client: Any = None,
) -> Neighbors:
    """Find the k nearest rows of a Dask corpus for each query, by looking at all of them, where they are.

    The answer is that of `knnbench.knn`, and for uint8 and with ``accuracy="exact"`` it is the same to the bit whatever
    the chunks, the workers and what happens to them. For other floats it is the same whoever computes which task, as
    long as the chunks are the same.

    Parameters
    ----------
    queries : (n_queries, n_features) array of real numbers, or dask.array
        An array travels to the workers with the tasks; many queries are better a Dask array, whose chunks of rows are
        then searched one by one, and of two chunks that meet in a task the smaller one travels.
    corpus : (n_corpus, n_features) dask.array
        Chunked by rows, with known chunk sizes. A chunk is searched in one task for each block of queries: chunks of
        100 MB to 1 GB, at least a few for each worker, serve well; ``knnbench plan`` says more.
    k : int
        ``1 <= k <= n_corpus``.
    metric, accuracy, check_finite
        As for `knnbench.knn`.
    backend : str
        An own backend, or ``"auto"``: the fastest of each worker, but for floats with ``accuracy="fast"`` the one that
        is estimated to be the fastest on this machine, for all workers.
    memory_budget : int, optional
        Bytes that a task may hold beyond its shard, its queries and its list; default ``$KNNBENCH_MEMORY_BUDGET`` of
        this process, else 1 GiB.
    threads : int
        That a task computes with. A worker runs as many tasks at a time as it has threads, so 1 unless its processes
        have one thread and several CPUs each.
    compute : bool
        Whether to return NumPy arrays, or Dask arrays that compute them.
    client : distributed.Client, optional
        Default: the current one, or without one Dask's own scheduler in this process.

    Returns
    -------
    Neighbors
        The pair ``distances, indices``, (n_queries, k) arrays. Without a certificate: how often tasks ran is not known.

    Raises
    ------
    InvalidInputError, UnknownBackendError, BackendUnavailableError, UnsupportedError, OverBudgetError
        As for `knnbench.knn`; also for a corpus of unknown chunk sizes, for a backend without the total order, and for
        workers that share no level of vector instructions.

    Examples
    --------
    >>> import dask.array as da
    >>> corpus = da.from_array(np.array([[0, 0], [2, 0], [0, 2], [9, 9]], np.uint8), chunks=(2, 2))
    >>> distances, indices = knn(np.array([[1, 0]], np.uint8), corpus, k=3, metric="cityblock")
    >>> distances, indices
    (array([[1, 1, 3]], dtype=int32), array([[0, 1, 2]]))
    """
    corpus = _as_shards(corpus)
    import dask.array as da

    blocks = _as_query_blocks(queries, da)
    k = check_k(check_count("k", k), corpus.shape[0])
    if blocks.shape[1] != corpus.shape[1]:
        raise InvalidInputError(
            f"queries has {blocks.shape[1]} features and corpus has {corpus.shape[1]}; expected the same number."
        )
    cluster = _Cluster(client)
    job = _job(blocks, corpus, k, metric, backend, accuracy, memory_budget, check_finite, threads, cluster)
    n_bytes = blocks.shape[0] * min(SPLIT_EVERY, corpus.numblocks[0]) * k * (job.space.ranked.itemsize + 8)
    is_finished_here = compute and n_bytes <= FINISHED_BYTES
    parts = _answers(job, blocks, corpus, finished=not is_finished_here)
    if compute:
        with cluster.large_graphs():
            found = cluster.compute([each for part in parts for each in part])
        if is_finished_here:
            found = [job.finish(found[part]) for part in slices(len(found), len(parts[0]))]
        distances, indices = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    else:
        heights = blocks.chunks[0]
        distances, indices = (
            da.concatenate(
                [
                    da.from_delayed(part[side], (height, k), dtype=dtype)
                    for (part,), height in zip(parts, heights, strict=True)
                ]
            )
            for side, dtype in ((0, job.space.output), (1, np.int64))
        )
    return Neighbors(distances, indices, backend=job.backend)


class DistributedKNNClassifier(KNNClassifier):
    """Classify by a vote of the k nearest training samples of a Dask array, which stay where they are.

    It votes as `KNNClassifier` does, with `knnbench.distributed.knn` for the search, on the current
    ``distributed.Client`` or, without one, on Dask's own scheduler in this process. The labels are kept here.

    Parameters
    ----------
    n_neighbors, metric, weights, backend, accuracy, memory_budget
        As for `knnbench.KNNClassifier`; the budget is that of a task.
    threads : int
        That a task computes with.

    Attributes
    ----------
    classes_, n_samples_fit_, n_features_in_
        As for `knnbench.KNNClassifier`.
    corpus_ : dask.array
        The training data. Persist them (``X.persist()``) before `fit`, or each search computes them again.

    Examples
    --------
    >>> import dask.array as da
    >>> X = da.from_array(np.array([[0.0], [1.0], [2.0], [7.0]]), chunks=(2, 1))
    >>> classifier = DistributedKNNClassifier(n_neighbors=3, metric="cityblock", backend="numpy")
    >>> classifier.fit(X, ["near", "near", "far", "far"]).predict([[1.5], [6.0]])
    array(['near', 'far'], dtype='<U4')
    """

    def __init__(
        self,
        n_neighbors: int = 3,
        metric: str = "euclidean",
        weights: Any = "uniform",
        backend: str = "auto",
        accuracy: Accuracy = "fast",
        memory_budget: int | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(n_neighbors, metric, weights, backend, accuracy, memory_budget)
        self.threads = threads

    def fit(self, X: Any, y: Any) -> Self:
        """Keep the training data where they are, and their labels here.

        Parameters
        ----------
        X : (n_samples, n_features) dask.array
            Chunked by rows, with known chunk sizes.
        y : (n_samples,) array_like or dask.array
            Labels: numbers or strings.

        Returns
        -------
        DistributedKNNClassifier
            The estimator itself.

        Raises
        ------
        InvalidInputError
            A parameter out of range, or X that is no such array.
        ValueError
            y that scikit-learn's validation refuses, or of another length.
        """
        check_count("n_neighbors", self.n_neighbors)
        check_weights(self.weights)
        check_budget(self.memory_budget)
        check_accuracy(self.accuracy)
        get_metric(self.metric)
        X, y = _as_shards(X), column_or_1d(y)
        check_consistent_length(np.empty(X.shape[0]), y)
        self.corpus_, (self.n_samples_fit_, self.n_features_in_) = X, X.shape
        self.classes_, self._codes = classes_and_codes(y)
        return self

    def _neighbors(self, X: Any, k: int) -> Neighbors:
        check_is_fitted(self)
        return knn(
            self.corpus_ if X is None else X,
            self.corpus_,
            k,
            self.metric,
            backend=self.backend,
            accuracy=self.accuracy,
            memory_budget=self.memory_budget,
            threads=self.threads,
        )


def _as_shards(corpus: Any) -> Any:
    """Return a Dask array with one chunk across, or raise."""
    if not is_dask(corpus):
        raise InvalidInputError(
            f"corpus is a {type(corpus).__name__}; expected a Dask array (dask.array.from_array makes one, and "
            f"knnbench.knn takes anything else)."
        )
    computed_dtype(corpus.dtype, "corpus")
    if corpus.ndim != 2 or 0 in corpus.shape:
        raise InvalidInputError(
            f"corpus has shape {corpus.shape}; expected (n_corpus, n_features), at least one of each."
        )
    if np.isnan(corpus.shape).any():
        raise InvalidInputError(
            f"corpus has chunks of unknown size: {corpus.chunks[0]}; call its .compute_chunk_sizes() first."
        )
    return corpus.rechunk({1: -1}) if corpus.numblocks[1] > 1 else corpus


def _as_query_blocks(queries: Any, da: Any) -> Any:
    """Return queries as a Dask array with one chunk across."""
    if not is_dask(queries):
        # A name of their own: one by their values would take as long as sending them.
        return da.from_array(as_rows(queries, "queries"), chunks=(QUERY_ROWS, -1), name=False)
    computed_dtype(queries.dtype, "queries")
    if queries.ndim != 2 or 0 in queries.shape or np.isnan(queries.shape).any():
        raise InvalidInputError(
            f"queries has shape {queries.shape}; expected (n_queries, n_features), known and at least one of each."
        )
    return queries.rechunk({1: -1}) if queries.numblocks[1] > 1 else queries


class _Cluster:
    """Where tasks are computed: by a client's workers, or in this process."""

    def __init__(self, client: Any) -> None:
        self.client = client
        if client is None and "distributed" in sys.modules:  # or nobody has made one
            from distributed import get_client

            try:
                self.client = get_client()
            except ValueError:  # there is none
                self.client = None

    def compute(self, values: list[Any]) -> list[Any]:
        import dask

        if self.client is not None:
            return list(self.client.gather(self.client.compute(values)))
        return list(dask.compute(*values))

    def each(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what a function gives on each worker, here if there is none."""
        return [function(*args)] if self.client is None else list(self.client.run(function, *args).values())

    def large_graphs(self) -> AbstractContextManager[Any]:
        """Let queries be part of the graph without a warning: so they can be computed again when a worker is lost."""
        import dask

        if self.client is None:
            return nullcontext()
        config: AbstractContextManager[Any] = dask.config.set({LARGE_GRAPH: "10GB"})
        return config


def _job(
    queries: Any,
    corpus: Any,
    k: int,
    metric: str,
    backend: str,
    accuracy: Accuracy,
    memory_budget: int | None,
    check_finite: bool,
    threads: int,
    cluster: _Cluster,
) -> Job:
    """Return what all tasks hold to."""
    dtype, name = common_dtype(queries.dtype, corpus.dtype), get_metric(metric).name
    space = Space(get_metric(metric), dtype, corpus.shape[1])
    settings = {THREADS_VARIABLE: str(check_count("threads", threads))}
    job = Job(
        k, name, dtype.name, space.n_features, check_accuracy(accuracy), backend, settings,
        check_budget(memory_budget), check_finite,
    )  # fmt: skip
    if backend == "auto" and job.is_pinned:
        rows = max(corpus.chunks[0]), min(QUERY_ROWS, queries.shape[0])
        data_on = "device" if interchange.on_device(corpus._meta) else "host"
        backend, _ = selection.choose(
            Problem("knn", rows[1], rows[0], space.n_features, min(k, rows[0]), name, dtype.name, data_on, accuracy)
        )
    if backend != "auto":
        capabilities = get_backend(backend).capabilities
        lacking = selection.lacks(capabilities, space, accuracy)
        if lacking:
            raise UnsupportedError(f"backend {backend!r} {lacking}; `knnbench backends` lists what each has.")
        if not capabilities.total_order:
            raise UnsupportedError(
                f"backend {backend!r} does not keep the total order (distance, index), by which lists are merged; "
                f"expected an own backend."
            )
    if job.is_pinned:
        levels = cluster.each(_levels, backend)
        if setting(LEVEL_VARIABLE) and levels[0]:
            levels.append((setting(LEVEL_VARIABLE),))
        shared = [level for level in levels[0] if all(level in others for others in levels)]
        if levels[0] and not shared:
            raise BackendUnavailableError(
                f"the workers share no level of vector instructions: {sorted(set(levels))}; set ${LEVEL_VARIABLE} to "
                f"the same on all, or unset it."
            )
        if shared:
            settings[LEVEL_VARIABLE] = shared[0]
    return replace(job, backend=backend, settings=settings)


def _levels(backend: str) -> tuple[str, ...]:
    return get_backend(backend).levels()


def _answers(job: Job, queries: Any, corpus: Any, *, finished: bool) -> list[list[Any]]:
    """Return for each block of queries what Dask computes: a pair of distances and indices, or lists to be finished."""
    from dask.base import tokenize
    from dask.blockwise import fuse_roots, optimize_blockwise
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    # A graph written down: `dask.delayed` merges graphs at each call, which took 5 ms a shard.
    token = tokenize(job, queries.name, corpus.name)
    shards = [key for (key,) in corpus.__dask_keys__()]
    starts = np.cumsum((0, *corpus.chunks[0])).tolist()
    tasks: dict[Any, Any] = {}
    answers: list[list[Any]] = []
    for i, (block,) in enumerate(queries.__dask_keys__()):
        lists: list[Any] = []
        for j, shard in enumerate(shards):
            lists.append((f"knnbench-search-{token}", i, j))
            tasks[lists[-1]] = (Job.search, job, block, shard, slice(*starts[j : j + 2]), f"chunk {j}")
        level = 0
        while len(lists) > SPLIT_EVERY:
            parts = list(slices(len(lists), SPLIT_EVERY))
            merged = [(f"knnbench-merge-{token}", i, level, part.start) for part in parts]
            tasks.update((key, (Job.merge, job, lists[part])) for key, part in zip(merged, parts, strict=True))
            lists, level = merged, level + 1
        if finished:
            pair = (f"knnbench-finish-{token}", i)
            tasks[pair] = (Job.finish, job, lists)
            lists = [pair]
        answers.append(lists)
    layer = f"knnbench-{token}"
    graph = HighLevelGraph.from_collections(layer, tasks, dependencies=(queries, corpus))
    # As Dask does for arrays and not for delayed values: elementwise steps, and reading before them, become one task,
    # whose array between steps nobody keeps or moves. Chunks keep their names; all of what Dask does would give each
    # another one and a task that only says so.
    asked = [key for part in answers for key in part]
    graph = fuse_roots(optimize_blockwise(graph, keys=asked), keys=asked)
    return [[Delayed(key, graph, layer=layer) for key in part] for part in answers]
