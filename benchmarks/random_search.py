"""The random search beside the loops it replaces, in turns, on MNIST.

Run it as ``python -m benchmarks.random_search`` from a checkout with MNIST there (``knnbench data fetch mnist``) and
torch; it takes about a minute. Before anything is timed, all three must give the same loss.
"""

import argparse
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from knnbench import RandomSearchClassifier, datasets
from knnbench.backends import get_backend
from knnbench.backends.notebook import BATCH
from knnbench.classifiers.random_search import generator
from knnbench.measure.ceilings import Ceilings
from knnbench.threads import thread_count

# Mean losses in float32 and float64 differ by far less.
TOLERANCE = 1e-4


def notebook_loss(loader: Any, W: Any, b: Any, n_batches: int) -> tuple[float, float]:
    """Return the mean loss of some batches of the notebook's loop, and its seconds for all of them."""
    start, total = time.perf_counter(), 0.0
    for number, (X, y) in enumerate(loader, 1):
        total += cross_entropy(X @ W + b, y).item()
        if number == n_batches:
            break
    return total / n_batches, (time.perf_counter() - start) / n_batches * len(loader)


def full_batch_loss(X: Any, y: Any, W: Any, b: Any) -> tuple[float, float]:
    """Return the mean loss by one product over all samples, and its seconds, the drawing of a candidate included."""
    start = time.perf_counter()
    torch.randn_like(W), torch.randn_like(b)
    loss = cross_entropy(X @ W + b, y).item()
    return loss, time.perf_counter() - start


def search_s(data: Any, iterations: int, backend: str) -> float:
    """Return the seconds of an iteration of a whole `fit`, preparation included."""
    model = RandomSearchClassifier(iterations, iterations, backend=backend, random_state=0)
    start = time.perf_counter()
    model.fit(data.X_train, data.y_train)
    return (time.perf_counter() - start) / model.n_iter_


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description="The random search beside the loops it replaces.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--iterations", type=int, default=300, help="of the search, in each turn")
    parser.add_argument("--batches", type=int, default=40, help="of the notebook's 235, in each turn")
    parser.add_argument("--backend", default="numba", help="of the search")
    given = parser.parse_args()
    torch.set_num_threads(thread_count())
    data = datasets.load("mnist")
    X, y = torch.from_numpy(data.X_train.astype(np.float32)), torch.from_numpy(data.y_train.astype(np.int64))
    loader = DataLoader(TensorDataset(X, y), batch_size=BATCH, shuffle=True)

    first = RandomSearchClassifier(1, backend=given.backend, random_state=0).fit(data.X_train, data.y_train)
    W = torch.from_numpy(np.ascontiguousarray(first.coef_.T))
    b = torch.from_numpy(first.intercept_)
    for name, loss in (
        ("full batch", full_batch_loss(X, y, W, b)[0]),
        # Of shuffled batches of unequal sizes the mean of means differs a little.
        ("notebook", notebook_loss(loader, W, b, len(loader))[0]),
    ):
        tolerance = TOLERANCE if name == "full batch" else 10 / math.sqrt(len(y))
        if not math.isclose(loss, first.best_loss_, rel_tol=tolerance):
            raise SystemExit(f"the losses differ: {name} {loss}, {given.backend} {first.best_loss_}")

    times: dict[str, list[float]] = {"notebook": [], "full batch": [], given.backend: []}
    for _ in range(given.rounds):
        times["notebook"].append(notebook_loss(loader, W, b, given.batches)[1])
        times["full batch"] += [full_batch_loss(X, y, W, b)[1] for _ in range(20)]
        times[given.backend].append(search_s(data, given.iterations, given.backend))
    drawn = []
    for i in range(50):
        start = time.perf_counter()
        generator(0, i).standard_normal((785, 10))
        drawn.append(time.perf_counter() - start)
    own = statistics.median(times[given.backend])
    print(f"{thread_count()} threads, medians of {given.rounds} rounds, seconds an iteration:")
    for name, samples in times.items():
        median = statistics.median(samples)
        print(f"{name:12} {median:.4g}  ({min(samples):.4g} to {max(samples):.4g})  x {median / own:.3g}")
    print(f"drawing a candidate: {statistics.median(drawn) / own:.1%} of an iteration")
    losses = get_backend(given.backend).linear_loss(data.X_train, y.numpy(), np.ones(len(y)), np.dtype(np.float32))
    losses(first.coef_.T[None], first.intercept_[None])
    for probe, count in losses.operations.items():
        rate = Ceilings(thread_count()).rate(probe)
        if rate is not None:
            print(f"operations of one candidate, {probe}: {count / own / rate:.0%} of the ceiling")


if __name__ == "__main__":
    main()
