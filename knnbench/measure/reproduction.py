"""The notebook that knnbench grew out of, done again: its classifiers on MNIST, with its figures beside ours."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knnbench import datasets
from knnbench.blocking import slices
from knnbench.classifiers import KNNClassifier, RandomSearchClassifier
from knnbench.dtypes import Array
from knnbench.measure.process import run_worker, worker_channel

__all__ = ["NOTEBOOK", "NOTEBOOK_SEARCH", "SEARCH_SEEDS", "Progress", "classify", "random_search"]

FIRST_IMAGES = 999
K = 3

# A backend that would need longer for all test images, by what the first few take, is left out. Some are far
# faster on many images than on a few, so unless a trial took long there is another with more.
LONGEST_HOURS = 1.0
LONGEST_TRIAL_S = 10.0
TRIALS = (4, 64)

# Test images whose answers are waited for together: enough for blocks, few enough to show progress.
CHUNK = 250

# Of one message; a chunk of the slowest backend that is not left out takes less.
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class NotebookResult:
    """What the notebook printed for one distance.

    Attributes
    ----------
    first_correct, all_correct : int
        Of the first 999 and of all 10,000 test images.
    cpu_s : float
        Seconds for 1,000 images, one numpy expression per pair.
    cuda_s : float
        Seconds for 10,000 images, one CUDA kernel launch per image.
    """

    first_correct: int
    all_correct: int
    cpu_s: float
    cuda_s: float


NOTEBOOK: dict[str, NotebookResult] = {
    "cityblock": NotebookResult(952, 9633, 275.7, 46.7),
    "euclidean": NotebookResult(961, 9705, 337.7, 47.0),
}

NOTEBOOK_SEARCH: dict[str, float] = {"loss": 383.48, "accuracy": 0.5255, "iterations": 729}
"""The notebook's random search: the summed batch loss at the end, the test accuracy and the iterations."""


SEARCH_SEEDS = 10
"""Runs of the random search: the notebook's own must lie within their spread."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a classification is; the last one is the result.

    Attributes
    ----------
    done, correct : int
        Test images classified, and of those correctly.
    first_correct : int
        Of the first 999, those classified correctly so far.
    seconds : float
        Spent in `KNNClassifier.predict`, without compiling.
    fit_s : float
        Spent in `KNNClassifier.fit`.
    reason : str
        Why the rest was left out; empty if it was not.
    """

    done: int
    correct: int
    first_correct: int
    seconds: float
    fit_s: float
    reason: str = ""


def classify(backend: str, metric: str, threads: int) -> Iterator[Progress]:
    """Classify MNIST's test images with one backend, in a process of its own.

    Parameters
    ----------
    backend, metric : str
    threads : int

    Yields
    ------
    Progress

    Raises
    ------
    knnbench.measure.process.WorkerEnded
        If the process dies.
    """
    job = {"task": "classify", "backend": backend, "metric": metric}
    for message in run_worker("knnbench.measure.reproduction", job, threads, LIMIT_S):
        yield Progress(**message)


def random_search(seeds: Sequence[int], threads: int) -> Iterator[dict[str, Any]]:
    """Run the notebook's random search on MNIST with several seeds, in a process of its own.

    Yields
    ------
    dict
        ``seed``, ``loss`` (as the notebook's sum), ``accuracy``, ``iterations`` and ``seconds``, for each seed.
    """
    job = {"task": "random_search", "seeds": list(seeds)}
    yield from run_worker("knnbench.measure.reproduction", job, threads, 10 * LIMIT_S)


def _classify(backend: str, metric: str) -> Iterator[dict[str, Any]]:
    data = datasets.load("mnist")
    start = time.perf_counter()
    classifier = KNNClassifier(K, metric, backend=backend).fit(data.X_train, data.y_train)
    fit_s = time.perf_counter() - start

    def predict(rows: slice) -> tuple[float, Array]:
        start = time.perf_counter()
        labels = classifier.predict(data.X_test[rows])
        return time.perf_counter() - start, labels == data.y_test[rows]

    n_test, done, correct, first_correct, seconds = len(data.X_test), 0, 0, 0, 0.0
    predict(slice(0, 1))  # compiles
    for trial in TRIALS:
        trial_s, _ = predict(slice(0, trial))
        hours = trial_s / trial * n_test / 3600
        if hours <= LONGEST_HOURS or trial_s > LONGEST_TRIAL_S:
            break
    if hours > LONGEST_HOURS:
        reason = f"all test images would take about {hours:.0f} hours"
        yield asdict(Progress(done, correct, first_correct, seconds, fit_s, reason))
        return
    for rows in slices(n_test, CHUNK):
        chunk_s, right = predict(rows)
        seconds += chunk_s
        done = rows.stop
        correct += int(right.sum())
        first_correct += int(right[: max(0, FIRST_IMAGES - rows.start)].sum())
        yield asdict(Progress(done, correct, first_correct, seconds, fit_s))


def _random_search(seeds: list[int]) -> Iterator[dict[str, Any]]:
    data = datasets.load("mnist")
    RandomSearchClassifier(max_iter=1).fit(data.X_train, data.y_train)  # compiles
    for seed in seeds:
        start = time.perf_counter()
        classifier = RandomSearchClassifier(random_state=seed).fit(data.X_train, data.y_train)
        seconds = time.perf_counter() - start
        yield {
            "seed": seed,
            "loss": classifier.notebook_loss_,
            "accuracy": float(classifier.score(data.X_test, data.y_test)),
            "iterations": classifier.n_iter_,
            "seconds": seconds,
        }


TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"classify": _classify, "random_search": _random_search}


def main() -> None:
    """Do the job that the parent sent."""
    job, channel = worker_channel()
    for message in TASKS[job.pop("task")](**job):
        print(json.dumps(message), file=channel)


if __name__ == "__main__":
    main()
