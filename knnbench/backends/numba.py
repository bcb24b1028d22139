"""numba on the CPU: loops compiled from the metrics' own scalar functions, on all cores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from knnbench.blocking import block_shape, chunk_rows, slices
from knnbench.dtypes import Array
from knnbench.kernels.cpu_tiles import no_norms, tile_kernels
from knnbench.metrics import Space
from knnbench.threads import thread_count

from .base import Capabilities, HostBackend, Native, float_operations

__all__ = ["NumbaBackend"]

# Queries a task at the most: enough that a tile of the corpus is used often while it is in the cache, few
# enough that the tasks of all threads end at about the same time, and that Ctrl-C is answered soon.
TASK_QUERIES = 32


@dataclass(frozen=True, slots=True)
class TileCorpus:
    """Rows as the metric accumulates them, and their squared norms if the ranking looks at them."""

    rows: Array
    norms: Array


class NumbaBackend(HostBackend):
    """Every distance by the direct form, selection fused, a thread for each CPU.

    The kernels release the interpreter lock and run in Python's threads: unlike numba's own parallel
    loops these start no pool that outlives the call, spins, forbids forks or aborts on concurrent calls.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(device="cpu")

    def prepare(self, corpus: Native, space: Space) -> TileCorpus:
        """Return the prepared rows with their norms."""
        if not space.is_integer:
            return TileCorpus(space.metric.prepare_rows(np, corpus), no_norms())
        return TileCorpus(corpus, squared_norms(corpus) if space.form.rank_uses_norms else no_norms())

    def pairwise(self, queries: Native, prepared: TileCorpus, space: Space, budget: int) -> Native:
        """Return all distances."""
        kernel, n_corpus = tile_kernels(space).pairwise, len(prepared.rows)
        result = np.empty((len(queries), n_corpus), space.output)
        # Values ranked in another dtype than they are answered in need an array between; a root makes two more.
        is_direct = space.ranked == space.output

        def task(rows: slice) -> None:
            block = self.prepare(queries[rows], space)
            values = result[rows] if is_direct else np.empty((len(block.rows), n_corpus), space.ranked)
            kernel(block.rows, prepared.rows, block.norms, prepared.norms, values)
            finished = space.finish(values)
            if finished is not values:
                result[rows] = finished

        row_bytes = 3 * 8 * n_corpus + query_bytes(space)
        threads = max(1, min(thread_count(), budget // row_bytes))
        step, _ = block_shape(len(queries), 1, budget=budget // threads, per_pair=row_bytes, max_queries=TASK_QUERIES)
        run_tasks(task, len(queries), step, threads)
        return result

    def knn(self, queries: Native, prepared: TileCorpus, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest."""
        kernel = tile_kernels(space).knn
        values = np.empty((len(queries), k), space.ranked)
        indices = np.empty((len(queries), k), np.int64)

        def task(rows: slice) -> None:
            block = self.prepare(queries[rows], space)
            kernel(block.rows, prepared.rows, block.norms, prepared.norms, values[rows], indices[rows])

        threads = max(1, min(thread_count(), budget // query_bytes(space)))
        step, _ = block_shape(
            len(queries), 1, budget=budget // threads, per_pair=query_bytes(space), max_queries=TASK_QUERIES
        )
        run_tasks(task, len(queries), step, threads)
        return values, indices

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the direct form on floats; of integers, what the compiler makes of them is not known."""
        return {} if space.is_integer else float_operations("cpu", space, product=False)


def query_bytes(space: Space) -> int:
    """Return what is held to prepare one query: several copies where rows are scaled to unit length."""
    return 64 + (8 * 8 * space.n_features if space.metric.unit_rows else 0)


def squared_norms(rows: Array) -> Array:
    """Return the squared norms of uint8 rows as float64, which holds them exactly."""
    norms = np.empty(len(rows))
    for chunk in slices(len(rows), chunk_rows(rows.shape[1])):
        norms[chunk] = np.einsum("nf,nf->n", rows[chunk], rows[chunk], dtype=np.int64, casting="safe")
    return norms


def run_tasks(task: Callable[[slice], Any], n_queries: int, most: int, threads: int) -> None:
    """Run `task` on blocks of at most `most` queries, on some threads."""
    blocks = list(slices(n_queries, min(most, -(-n_queries // threads))))
    if len(blocks) == 1 or threads == 1:
        for block in blocks:
            task(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(task, blocks):
                pass
        except BaseException:
            # Ctrl-C: let the running tasks end, start no more.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
