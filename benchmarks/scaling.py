"""Out of core and on Dask, beside the same search in memory and in one process.

Run it as ``python -m benchmarks.scaling`` with ``knnbench[distributed]`` and MNIST there. What is compared takes turns;
medians are shown and the median, least and greatest ratio of a round. Answers are checked to be the same to the bit.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from knnbench import datasets, distributed, knn, scaling
from knnbench.ordering import merge_topk, order_rows
from knnbench.selection import Problem
from knnbench.selection.measurement import measure
from knnbench.selection.wisdom import wisdom
from knnbench.settings import THREADS_VARIABLE, held
from knnbench.threads import thread_count

K = 3


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of each call by the round, after one to warm up, and its answer."""
    answers = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls) if number % 2 else list(reversed(calls))
        for name in names:
            begin = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - begin)
    return times, answers


def ratio(times: list[float], others: list[float]) -> str:
    """Return the median of the ratios of each round, and the least and the greatest."""
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def check_same(first: Any, second: Any) -> None:
    """Raise if two answers differ in a bit."""
    for one, other in zip(first, second, strict=True):
        if not np.array_equal(np.asarray(one), np.asarray(other)):
            raise RuntimeError("the answers differ")


def mnist(dtype: str) -> tuple[Any, Any]:
    """Return queries and corpus, MNIST's or of its shape."""
    if any(status.name == "mnist" and status.available for status in datasets.status()):
        data = datasets.load("mnist")
        return data.X_test.astype(dtype), data.X_train.astype(dtype)
    rng = np.random.default_rng(0)
    queries, corpus = (rng.integers(0, 256, (n, 784), dtype=np.uint8) for n in (10_000, 60_000))
    return queries.astype(dtype), corpus.astype(dtype)


def streaming(rounds: int) -> None:
    """Compare a memmap, whose pages are cached, with an array."""
    print("a memmap in the page cache beside an array, numba:")
    with tempfile.TemporaryDirectory() as folder:
        for dtype, metric, n_queries, times, accuracy in (
            ("float32", "cityblock", 500, 1, "fast"),
            ("float32", "euclidean", 1000, 1, "fast"),
            ("float32", "euclidean", 1000, 1, "exact"),
            ("uint8", "cityblock", 1000, 1, "fast"),
            ("uint8", "cityblock", 200, 1, "fast"),
            ("uint8", "cityblock", 1, 1, "fast"),
            ("uint8", "euclidean", 1000, 1, "fast"),
            # In several blocks:
            ("float32", "euclidean", 200, 3, "fast"),
            ("float32", "euclidean", 200, 3, "exact"),
            ("uint8", "cityblock", 100, 20, "fast"),
            ("uint8", "euclidean", 1000, 20, "fast"),
            ("uint8", "cityblock", 1, 20, "fast"),
        ):
            queries, corpus = mnist(dtype)
            # Other copies are shifted: of equal rows, which of them are nearest would have to be decided.
            queries, corpus = queries[:n_queries], np.concatenate([corpus + corpus.dtype.type(t) for t in range(times)])
            path = Path(folder) / f"{dtype}.npy"
            np.save(path, corpus)
            mapped = np.load(path, mmap_mode="r")
            search = functools.partial(knn, k=K, metric=metric, backend="numba", accuracy=accuracy)
            calls = {
                name: functools.partial(search, queries, rows)
                for name, rows in (("array", corpus), ("memmap", mapped), ("again", corpus.copy()))
            }
            seconds, answers = in_turns(calls, rounds)
            check_same(answers["array"], answers["memmap"])
            ratios = (ratio(seconds[name], seconds["array"]) for name in ("memmap", "again"))
            print(
                f"  {dtype:8} {metric:10} {accuracy:5} {n_queries:5} queries x {len(corpus):9,}  "
                f"array {statistics.median(seconds['array']):.4f} s, ratio {' array / itself '.join(ratios)}"
            )


def merging() -> None:
    """Merge the lists of 64 shards."""
    rng, k, n_queries, n_shards = np.random.default_rng(0), 100, 10_000, 64
    lists = [
        order_rows(
            np,
            rng.random((n_queries, k), np.float32),
            np.sort(rng.integers(s * 10_000, (s + 1) * 10_000, (n_queries, k)), axis=1) * k + np.arange(k),
        )
        for s in range(n_shards)
    ]
    begin = time.perf_counter()
    merged = lists[0]
    for other in lists[1:]:
        merged = merge_topk(merged, other, k)
    print(f"merging {n_shards} lists of {n_queries:,} x {k}: {time.perf_counter() - begin:.2f} s")


def calibrate() -> None:
    """Measure shapes, none of them that of a task below, as ``knnbench calibrate`` does."""
    shapes = [(q, c, f) for q in (100, 1000) for c in (2000, 30_000) for f in (100, 500)]
    problems = [Problem("knn", *shape, K, "cityblock", "float32") for shape in shapes]
    wisdom().add([measure("numba", problem, seconds=0.3) for problem in problems], fit=True)
    with held({THREADS_VARIABLE: "1"}):
        alone = [measure("numba", problem, seconds=0.3, with_prepared=False) for problem in problems[-1:]]
        wisdom().add(alone)


def on_dask(rounds: int, n_queries: int) -> None:
    """Compare workers of one thread with one process of two threads, and with what `plan` says."""
    import dask.array as da
    from distributed import Client, LocalCluster

    queries, corpus = mnist("float32")
    queries = queries[:n_queries]
    calibrate()
    print(f"Dask, {n_queries:,} queries x {len(corpus):,} x 784 float32 cityblock, k = {K}:")
    for workers in (1, 2):
        with (
            LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            shape = {"n_queries": n_queries, "n_corpus": len(corpus), "n_features": 784, "k": K, "metric": "cityblock"}
            rate = scaling.network_rate(client)
            found = scaling.plan(**shape, backend="numba", workers=workers, network_rate=rate)
            blocks = np.split(corpus, range(found.shard_rows, len(corpus), found.shard_rows))
            shards = da.concatenate(
                [
                    da.from_delayed(there, block.shape, block.dtype)
                    for there, block in zip(client.scatter(blocks), blocks, strict=True)
                ]
            ).persist()
            calls = {
                "dask": lambda s=shards: distributed.knn(queries, s, K, "cityblock", backend="numba"),
                "process": lambda: knn(queries, corpus, K, "cityblock", backend="numba"),
            }
            seconds, answers = in_turns(calls, rounds)
            check_same(answers["dask"], answers["process"])
            low, high = (value - found.start_s for value in found.interval())
            print(
                f"  {workers} worker{'s' * (workers - 1)}: {statistics.median(seconds['dask']):.2f} s; one process of "
                f"{thread_count()} threads {statistics.median(seconds['process']):.2f} s, ratio "
                f"{ratio(seconds['dask'], seconds['process'])}; planned {found.search_s:.2f} s "
                f"({low:.2f} to {high:.2f}, {found.source}, {found.n_shards} shards, network {rate / 1e9:.2f} GB/s)"
            )


def main() -> None:
    """Print all of it, or a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--queries", type=int, default=2000, help="of the comparison with Dask")
    parser.add_argument("--only", choices=("streaming", "merging", "dask"))
    given = parser.parse_args()
    if given.only in (None, "streaming"):
        streaming(given.rounds)
    if given.only in (None, "merging"):
        merging()
    if given.only in (None, "dask"):
        on_dask(given.rounds, given.queries)


if __name__ == "__main__":
    main()
