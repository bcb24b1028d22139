"""Wrong neighbours of every backend and peer, and what exact ones cost, as tables.

Run it as ``python -m benchmarks.exactness`` from a checkout with the peers installed (``pip install -e '.[peers]'``);
it takes some minutes. The reference is exact arithmetic on whole numbers: rows are made as integers, in which distances
are computed and put in order, and given to the backends as floats that are these integers times a power of two. Nothing
of `knnbench.exact` is in it. A neighbour is wrong if its exact distance is not the one at its place: another row was
nearer, or comes first. After a plus stand the neighbours that are as near as they should be, but not the first of
equals by index; only own backends promise that.

With ``--time``, times are measured side by side, in turns, in one process: the backends by themselves and with
``accuracy="exact"``, and faiss; quoted are medians, and for the first backend the ratio of CPU seconds of all threads,
which what else runs on the machine changes less. MNIST must be there for its rows (``knnbench data fetch mnist``).
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import knnbench
from knnbench import datasets
from knnbench.errors import DatasetError
from knnbench.metrics import Space, get_metric
from knnbench.selection import lacks

N_QUERIES, N_CORPUS, N_FEATURES, K = 300, 2000, 784, 10

Rows = Any


def pixels(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return values of an image."""
    return rng.integers(0, 256, shape)


def ordinary(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return normal values of 20 bits."""
    return np.rint(rng.normal(size=shape) * 2**17).astype(np.int64)


def far(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return normal values around 1000 times their spread, of 24 bits."""
    return np.rint(rng.normal(size=shape) * 2**13).astype(np.int64) + 2**23


def far_apart(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return tight clusters far from one another: no centre is near both."""
    return np.rint(rng.normal(size=shape) * 2**11).astype(np.int64) + 2**22 * rng.choice([-1, 1], (shape[0], 1))


def near(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return rows that differ from one row by a few units in the last place."""
    one = rng.integers(2**23, 2**24 - 8, (1, shape[1]))
    return one + rng.integers(0, 8, shape)


def near_ties(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return rows of which half are others with one value moved by a unit in the last place."""
    rows = rng.integers(2**23, 2**24 - 1, shape)
    half = shape[0] // 2
    rows[half : 2 * half] = rows[:half]
    rows[np.arange(half, 2 * half), rng.integers(0, shape[1], half)] += 1
    return rows


def one_large(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return small values beside a feature that is large and nearly constant."""
    rows = rng.integers(-4, 5, shape)
    rows[:, 0] = 2**23 + rng.integers(0, 16, shape[0])
    return rows


def few_values(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Return values 1 and 2: ties in the thousands."""
    return rng.integers(1, 3, shape)


SETS: dict[str, tuple[Callable[..., Rows], int]] = {  # and the exponent of the power of two
    "pixels": (pixels, -8),
    "ordinary": (ordinary, -17),
    "far from the origin": (far, -13),
    "two far clusters": (far_apart, -11),
    "1 to 7 ulp apart": (near, -23),
    "pairs 1 ulp apart": (near_ties, -23),
    "one large feature": (one_large, 0),
    "ties": (few_values, 0),
}


@functools.cache
def whole_set(name: str, metric: str, n_queries: int, seed: int) -> tuple[Rows, Rows, Any]:
    """Return queries and a corpus of integers, and the distances of all pairs."""
    make, _ = SETS[name]
    rows = make(np.random.default_rng(seed), (n_queries + N_CORPUS, N_FEATURES))
    queries, corpus = rows[:n_queries], rows[n_queries:]
    return queries, corpus, whole_values(queries, corpus, metric)


def whole_values(queries: Rows, corpus: Rows, metric: str) -> Any:
    """Return squared or absolute distances of all pairs of rows of int64, none of which leaves that range."""
    differences = (np.abs(corpus - row) for row in queries)
    return np.array([((d**2) if metric == "euclidean" else d).sum(axis=1) for d in differences])


def verdict(indices: Any, values: Any) -> str:
    """Return how many neighbours are wrong, and how many are not the first of equals."""
    order = np.argsort(values, axis=1, kind="stable")[:, : indices.shape[1]]
    found, exact = (np.take_along_axis(values, index, axis=1) for index in (indices, order))
    wrong, other = int((found != exact).sum()), int(((found == exact) & (indices != order)).sum())
    return f"{wrong:,}" + (f" + {other:,}" if other else "")


def ways(dtype: str, metric: str) -> Iterator[tuple[str, str]]:
    """Yield every backend that works here and has the metric and the dtype, with each accuracy that it has."""
    space = Space(get_metric(metric), np.dtype(dtype), N_FEATURES)
    for status in knnbench.backends():
        if not status.ok or status.capabilities is None or status.name == "python":
            continue
        for accuracy in ("fast", "exact"):
            if not lacks(status.capabilities, space, accuracy):
                yield status.name, accuracy


def wrong_neighbors(dtype: str, metric: str, n_queries: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Yield for each way its backend, its accuracy and the `verdict` on each set."""
    sets = {}
    for name, (_, exponent) in SETS.items():
        *whole, values = whole_set(name, metric, n_queries, seed)
        queries, corpus = (np.ldexp(rows.astype(dtype), exponent) for rows in whole)
        assert (np.ldexp(corpus.astype(np.float64), -exponent) == whole[1]).all()
        sets[name] = queries, corpus, values
    for backend, accuracy in ways(dtype, metric):
        verdicts = [
            verdict(knnbench.knn(queries, corpus, K, metric, backend=backend, accuracy=accuracy).indices, values)
            for queries, corpus, values in sets.values()
        ]
        yield backend, accuracy, *verdicts


def timed_sets() -> Iterator[tuple[str, Rows, Rows]]:
    """Yield sets of MNIST's shape in float32."""
    n_queries, shape = 500, (60_000, 784)
    try:
        mnist = datasets.load("mnist", n_test=n_queries)
        yield "MNIST / 255", *((rows / 255).astype(np.float32) for rows in (mnist.X_test, mnist.X_train))
    except DatasetError as error:
        Console(stderr=True).print(str(error))
    rng = np.random.default_rng(0)
    yield "normal", *(rng.standard_normal((n, shape[1]), dtype=np.float32) for n in (n_queries, shape[0]))
    for kind in datasets.ADVERSARIAL_KINDS:
        data = datasets.load("synthetic", kind=kind, n_train=shape[0], n_test=n_queries, n_features=shape[1])
        yield kind, data.X_test, data.X_train


def costs(
    queries: Rows, corpus: Rows, k: int, metric: str, backends: list[str], rounds: int
) -> tuple[dict[str, float], dict[str, float], Any]:
    """Return the median seconds of each way, measured in turns, those of the CPUs, and the first one's certificate."""
    ways: dict[str, Callable[[], Any]] = {}
    for name in backends:
        for accuracy in ("fast", "exact"):
            ways[f"{name} {accuracy}"] = lambda name=name, accuracy=accuracy: knnbench.knn(
                queries, corpus, k, metric, backend=name, accuracy=accuracy
            )
    # In other metrics it takes up to two hundred times as long.
    if metric == "euclidean" and any(status.name == "faiss" and status.ok for status in knnbench.backends()):
        ways["faiss"] = lambda: knnbench.knn(queries, corpus, k, metric, backend="faiss")
    answers = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_cpus: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin, begin_of_cpus = time.perf_counter(), time.process_time()
            way()
            seconds[name].append(time.perf_counter() - begin)
            of_cpus[name].append(time.process_time() - begin_of_cpus)
    medians = [{name: statistics.median(each) for name, each in times.items()} for times in (seconds, of_cpus)]
    return medians[0], medians[1], answers[f"{backends[0]} exact"].certificate


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Wrong neighbours of every backend and peer.")
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--metrics", default="euclidean,cityblock")
    parser.add_argument("--queries", type=int, default=N_QUERIES, help=f"of a set; {K} neighbours each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", action="store_true", help="measure times instead")
    parser.add_argument("--backends", default="numba", help="with --time")
    parser.add_argument("--rounds", type=int, default=5, help="with --time")
    parser.add_argument("--sets", type=int, help="with --time: so many of the sets; default all")
    given = parser.parse_args()
    console = Console(width=200)
    if given.time:
        backends = given.backends.split(",")
        table = Table(
            "metric",
            "set",
            "k",
            *(f"{name} exact / fast" for name in backends),
            "CPU seconds",
            "exact / faiss",
            "ms a query",
            "again",
            "settled",
        )
        for name, queries, corpus in itertools.islice(timed_sets(), given.sets):
            for metric, k in itertools.product(given.metrics.split(","), (3, 10)):
                seconds, of_cpus, certificate = costs(queries, corpus, k, metric, backends, given.rounds)
                fast, exact = f"{backends[0]} fast", f"{backends[0]} exact"
                table.add_row(
                    metric, name, str(k),
                    *(f"{seconds[f'{b} exact'] / seconds[f'{b} fast']:.2f}" for b in backends),
                    f"{of_cpus[exact] / of_cpus[fast]:.2f}",
                    f"{seconds[exact] / seconds['faiss']:.2f}" if "faiss" in seconds else "",
                    f"{1e3 * seconds[exact] / len(queries):.2f}", str(certificate.searched_again),
                    str(certificate.settled),
                )  # fmt: skip
        console.print(table)
        return
    for metric in given.metrics.split(","):
        for dtype in given.dtypes.split(","):
            title = f"{metric}, {dtype}: wrong of {given.queries * K:,} neighbours"
            table = Table("backend", "accuracy", *SETS, title=title)
            for row in wrong_neighbors(dtype, metric, given.queries, given.seed):
                table.add_row(*row)
            console.print(table)


if __name__ == "__main__":
    main()
