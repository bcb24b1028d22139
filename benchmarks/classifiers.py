"""Speed of the scikit-learn estimators."""

import functools
import math
from typing import Any

import numpy as np

import knnbench

from . import common


def estimator(name: str, **options: Any) -> Any:
    """Return an estimator of this commit, or raise what tells asv n/a."""
    if name not in knnbench.__all__:
        raise NotImplementedError(f"this commit has no {name}")
    return getattr(knnbench, name)(**options)


def fitted(model: Any, X: Any, y: Any) -> Any:
    """Return the model after `fit`, or raise what tells asv n/a."""
    with common.applicable(model.backend):
        return model.fit(X, y)


@functools.lru_cache(maxsize=1)
def checked_classifier(backend: str, workload: common.Workload) -> tuple[Any, Any]:
    """Return a classifier whose labels have been checked, and its queries."""
    data = common.problem(workload, "float32")
    model = fitted(estimator("KNNClassifier", n_neighbors=data.k, backend=backend), data.corpus, data.labels)
    check_labels(model.predict(data.queries), data)
    return model, data.queries


def check_labels(labels: Any, data: common.Problem) -> None:
    """Raise `WrongAnswerError` unless these are the votes of the nearest; the clusters leave no ties."""
    order = np.argsort(common.reference(data.queries, data.corpus, "euclidean"), axis=1)[:, : data.k]
    expected = [np.bincount(votes).argmax() for votes in data.labels[order]]
    if not np.array_equal(labels, expected):
        raise common.WrongAnswerError("the labels are not those of the nearest neighbours")


class Predict:
    """Seconds of a vote on a fitted classifier."""

    version = "1"
    timeout = 120
    rounds, repeat, number = common.ROUNDS, common.REPEAT, 1
    param_names = ("backend", "workload")
    params = (common.BACKENDS, ["images"])

    def setup(self, backend: str, workload: str) -> None:
        """Fit, compile, warm up and check, once."""
        self.model, self.queries = checked_classifier(backend, common.WORKLOADS[workload])

    def time_predict(self, backend: str, workload: str) -> Any:
        """Return the labels."""
        return self.model.predict(self.queries)


class LoopingPredict(Predict):
    """The same for backends that loop in Python."""

    params = (common.LOOPING_BACKENDS, ["tiny"])


@functools.lru_cache(maxsize=1)
def checked_search(backend: str, workload: common.Workload) -> tuple[Any, common.Problem]:
    """Return a random search whose result has been checked, and its data."""
    data = common.problem(workload, "float32")
    model = estimator("RandomSearchClassifier", max_iter=10, backend=backend, random_state=0)
    check_loss(fitted(model, data.corpus, data.labels), data)
    return model, data


def check_loss(model: Any, data: common.Problem) -> None:
    """Raise `WrongAnswerError` unless the best loss is that of the weights found, and the lowest of the curve."""
    logits = data.corpus.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    logits -= logits.max(axis=1, keepdims=True)
    likelihood = logits[np.arange(len(logits)), data.labels] - np.log(np.exp(logits).sum(axis=1))
    expected = float(-likelihood.mean())
    if not math.isclose(model.best_loss_, expected, rel_tol=common.TOLERANCE):
        raise common.WrongAnswerError(f"the best loss is {model.best_loss_}, that of its weights {expected}")
    if not (np.diff(model.loss_curve_) < 0).all() or model.n_iter_ != model.max_iter:
        raise common.WrongAnswerError(f"{model.n_iter_} iterations with the losses {model.loss_curve_}")


class RandomSearch:
    """Seconds of ten iterations of a random search, with its validation."""

    version = "1"
    timeout = 120
    rounds, repeat, number = common.ROUNDS, common.REPEAT, 1
    param_names = ("backend", "workload")
    # The others inherit numpy's loss.
    params = (["numpy", "numba", "torch", "torch-cuda"], ["images"])

    def setup(self, backend: str, workload: str) -> None:
        """Warm up and check, once."""
        self.model, self.data = checked_search(backend, common.WORKLOADS[workload])

    def time_fit(self, backend: str, workload: str) -> Any:
        """Return the fitted model."""
        return self.model.fit(self.data.corpus, self.data.labels)
