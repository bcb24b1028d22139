"""RandomSearchClassifier: the notebook's method, the same on every backend and in every run."""

import importlib
import math
import pickle
import re
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_info

from knnbench.backends import get_backend
from knnbench.backends.linear import LinearLoss
from knnbench.backends.numpy import NumpyBackend
from knnbench.classifiers import RandomSearchClassifier
from knnbench.classifiers.random_search import Steps, generator
from knnbench.errors import BackendUnavailableError, InvalidInputError, UnknownBackendError
from knnbench.kernels.cpu_linear import linear_kernels

MODULE = "knnbench.classifiers.random_search"
FITTED = (
    "coef_",
    "intercept_",
    "best_loss_",
    "n_iter_",
    "accepted_iterations_",
    "loss_curve_",
    "near_ties_",
    "seed_",
)


def images(n: int = 300, dtype: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X[:n].astype(dtype), y[:n]


def same_run(first: RandomSearchClassifier, second: RandomSearchClassifier) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in FITTED)


def draw(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, counter]))


def notebook(
    X: np.ndarray, y: np.ndarray, *, seed: int, max_iter: int, patience: int, step_size: float, init_scale: float
) -> tuple[list[int], list[float], int]:
    """The original search, batch by batch and sample by sample.

    Returns the accepted iterations, the sum of the batches' mean losses after each, and the iterations executed.
    """
    n_classes = int(y.max()) + 1
    shuffle = np.random.default_rng(99)
    W = draw(seed, 0).standard_normal((X.shape[1], n_classes)) * init_scale
    b = np.zeros(n_classes)
    best, since = math.inf, 0
    accepted, losses = [], []
    executed = 0
    for iteration in range(max_iter):
        executed += 1
        noise = draw(seed, 1 + iteration)
        W_new = W + noise.standard_normal(W.shape) * step_size
        b_new = b + noise.standard_normal(b.shape) * step_size
        order = shuffle.permutation(len(X))
        loss = 0.0
        for start in range(0, len(X), 256):
            batch = order[start : start + 256]
            terms = []
            for i in batch:
                logits = X[i] @ W_new + b_new
                top = max(logits)
                terms.append(top + math.log(sum(math.exp(z - top) for z in logits)) - logits[y[i]])
            loss += sum(terms) / len(batch)
        if loss < best:
            W, b, best, since = W_new, b_new, loss, 0
            accepted.append(iteration)
            losses.append(loss)
        else:
            since += 1
            if since == patience:
                break
    return accepted, losses, executed


class Given(LinearLoss):
    """Losses that a function gives."""

    def __init__(self, function: Callable[..., np.ndarray]) -> None:
        super().__init__()
        self._function = function

    def __call__(self, W: np.ndarray, b: np.ndarray, limit: float = math.inf) -> np.ndarray:
        return self._function(W, b, limit)


class Scripted:
    """A backend whose losses are given in advance, as means over the samples."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def linear_loss(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray, dtype: np.dtype) -> Any:
        def losses(W: np.ndarray, b: np.ndarray, limit: float = math.inf) -> np.ndarray:
            assert W.shape == (1, X.shape[1], b.shape[1])
            return np.array([next(self.losses) * len(X)])

        return Given(losses)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float], **params: Any) -> RandomSearchClassifier:
    monkeypatch.setattr(f"{MODULE}.get_backend", lambda name: Scripted(losses))
    return RandomSearchClassifier(random_state=0, block_size=1, **params).fit(*images(20))


@parametrize_with_checks([RandomSearchClassifier(), RandomSearchClassifier(backend="numpy", patience=3, step_size=0.1)])
def test_is_a_scikit_learn_estimator(
    estimator: RandomSearchClassifier, check: Callable[[RandomSearchClassifier], None]
) -> None:
    check(estimator)


@pytest.mark.parametrize(("seed", "patience"), [(0, 4), (1, 4), (7, 2), (8, 30)])
def test_follows_the_notebook(seed: int, patience: int) -> None:
    # 512 samples are two full batches, whose means add up to twice the mean however they are shuffled.
    X, y = images(512, "float64")
    X, y = X[:, 18:30], y % 3
    options: dict[str, Any] = {"max_iter": 40, "patience": patience, "step_size": 1e-3, "init_scale": 1e-2}
    accepted, losses, executed = notebook(X, y, seed=seed, **options)
    found = RandomSearchClassifier(random_state=seed, backend="numpy", **options).fit(X, y)
    assert found.accepted_iterations_.tolist() == accepted
    assert found.n_iter_ == executed
    np.testing.assert_allclose(2 * found.loss_curve_, losses, rtol=1e-12)
    assert found.notebook_loss_ == pytest.approx(losses[-1], rel=1e-12)


def test_the_reference_both_stops_early_and_runs_out() -> None:
    X, y = images(512, "float64")
    X, y = X[:, 18:30], y % 3
    options: dict[str, Any] = {"max_iter": 40, "step_size": 1e-3, "init_scale": 1e-2}
    assert notebook(X, y, seed=7, patience=2, **options)[2] < 40
    assert notebook(X, y, seed=8, patience=30, **options)[2] == 40


@pytest.mark.parametrize(("n_samples", "n_batches"), [(1, 1), (256, 1), (257, 2), (600, 3)])
def test_the_loss_of_the_notebook_counts_batches(n_samples: int, n_batches: int) -> None:
    found = RandomSearchClassifier(max_iter=2, random_state=0).fit(*images(n_samples))
    assert found.notebook_loss_ == n_batches * found.best_loss_


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_every_backend_takes_the_same_steps(own_backend: str, dtype: str) -> None:
    X, y = images(dtype=dtype)
    search = RandomSearchClassifier(max_iter=120, random_state=3)
    reference, found = clone(search).fit(X, y), search.set_params(backend=own_backend).fit(X, y)
    assert len(reference.accepted_iterations_) > 20
    assert found.accepted_iterations_.tolist() == reference.accepted_iterations_.tolist()
    assert found.n_iter_ == reference.n_iter_
    np.testing.assert_allclose(found.loss_curve_, reference.loss_curve_, rtol=1e-6 if dtype != "float64" else 1e-12)
    np.testing.assert_array_equal(found.coef_, reference.coef_)


@pytest.mark.parametrize(("dtype", "weights"), [("uint8", "f4"), ("float16", "f4"), ("float32", "f4"), ("int64", "f8")])
def test_dtypes_of_the_weights_and_one_trajectory(dtype: str, weights: str) -> None:
    X, y = images(dtype=dtype)
    before = X.copy()
    X.flags.writeable = False
    found = RandomSearchClassifier(max_iter=60, random_state=0).fit(X, y)
    assert (found.coef_.dtype, found.intercept_.dtype) == (weights, weights)
    assert (found.coef_.shape, found.intercept_.shape) == ((10, 64), (10,))
    assert X.dtype == dtype
    np.testing.assert_array_equal(X, before)
    wide = RandomSearchClassifier(max_iter=60, random_state=0).fit(X.astype(np.float64), y)
    assert found.accepted_iterations_.tolist() == wide.accepted_iterations_.tolist()
    np.testing.assert_allclose(found.coef_, wide.coef_, rtol=1e-3, atol=1e-7)
    assert found.predict(X).tolist() == found.predict(X.astype(np.float64)).tolist()


def test_uint8_is_computed_as_float32() -> None:
    X, y = images()
    first, second = (
        RandomSearchClassifier(max_iter=60, random_state=0, backend="numpy").fit(data, y)
        for data in (X, X.astype("f4"))
    )
    assert same_run(first, second)
    # A matrix unit sums bytes and rounds weights, not sums.
    third = RandomSearchClassifier(max_iter=60, random_state=0, backend="numba").fit(X, y)
    np.testing.assert_array_equal(third.coef_, first.coef_)
    np.testing.assert_allclose(third.loss_curve_, first.loss_curve_, rtol=1e-6)


def test_layout_of_the_input_does_not_matter() -> None:
    X, y = images(dtype="float64")
    reference = RandomSearchClassifier(max_iter=40, random_state=0).fit(X, y)
    strided = np.repeat(X, 2, axis=1)[:, ::2]
    for layout in (np.asfortranarray(X), strided, X.astype(">f8"), X.tolist()):
        found = RandomSearchClassifier(max_iter=40, random_state=0).fit(layout, y)
        assert found.accepted_iterations_.tolist() == reference.accepted_iterations_.tolist()
        np.testing.assert_allclose(found.loss_curve_, reference.loss_curve_, rtol=1e-12)


def test_order_of_the_samples_does_not_matter() -> None:
    X, y = images(dtype="float64")
    order = np.random.default_rng(0).permutation(len(X))
    first = RandomSearchClassifier(max_iter=80, random_state=0).fit(X, y)
    second = RandomSearchClassifier(max_iter=80, random_state=0).fit(X[order], y[order])
    assert first.accepted_iterations_.tolist() == second.accepted_iterations_.tolist()
    np.testing.assert_allclose(first.loss_curve_, second.loss_curve_, rtol=1e-12)


def test_an_int_is_the_seed_and_repeats_the_run() -> None:
    X, y = images(100)
    search = RandomSearchClassifier(max_iter=30, random_state=42)
    first, second = search.fit(X, y), clone(search).fit(X, y)
    assert first.seed_ == 42
    assert same_run(first, second)
    assert not same_run(first, RandomSearchClassifier(max_iter=30, random_state=43).fit(X, y))


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(5)], ids=["None", "RandomState"])
def test_a_drawn_seed_repeats_the_run(random_state: Any) -> None:
    X, y = images(100)
    drawn = RandomSearchClassifier(max_iter=30, random_state=random_state).fit(X, y)
    assert same_run(drawn, RandomSearchClassifier(max_iter=30, random_state=drawn.seed_).fit(X, y))
    again = RandomSearchClassifier(max_iter=30, random_state=random_state).fit(X, y)
    assert again.seed_ != drawn.seed_


def test_what_an_iteration_draws_depends_on_its_number_alone() -> None:
    X, y = images(100, "float64")
    long = RandomSearchClassifier(max_iter=60, random_state=2).fit(X, y)
    short = RandomSearchClassifier(max_iter=25, random_state=2).fit(X, y)
    kept = long.accepted_iterations_ < 25
    assert short.accepted_iterations_.tolist() == long.accepted_iterations_[kept].tolist()
    np.testing.assert_array_equal(short.loss_curve_, long.loss_curve_[kept])
    # The point is the first weights plus the steps that were accepted, in the stated order of draws.
    W, b = draw(2, 0).standard_normal((64, 10)) * 1e-3, np.zeros(10)
    for iteration in long.accepted_iterations_.tolist():
        steps = draw(2, 1 + iteration)
        W = W + 1e-4 * steps.standard_normal(W.shape)
        b = b + 1e-4 * steps.standard_normal(b.shape)
    np.testing.assert_array_equal(long.coef_, W.T)
    np.testing.assert_array_equal(long.intercept_, b)


def test_the_best_loss_is_that_of_the_weights() -> None:
    X, y = images(dtype="float64")
    found = RandomSearchClassifier(max_iter=80, random_state=0).fit(X, y)
    logits = X @ found.coef_.T + found.intercept_
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    assert found.best_loss_ == pytest.approx(-np.log(shares[np.arange(len(y)), y]).mean(), rel=1e-12)
    assert found.best_loss_ == found.loss_curve_[-1]
    assert len(found.loss_curve_) == len(found.accepted_iterations_)
    assert (np.diff(found.loss_curve_) < 0).all()
    np.testing.assert_allclose(found.predict_proba(X), shares, rtol=1e-12)
    np.testing.assert_array_equal(found.predict(X), found.predict_proba(X).argmax(axis=1))


def test_it_learns() -> None:
    X, y = images(600)
    found = RandomSearchClassifier(max_iter=600, step_size=1e-3, random_state=0).fit(X, y)
    assert found.best_loss_ < found.loss_curve_[0] / 2
    assert found.score(X, y) > 0.5


@pytest.mark.parametrize(
    ("losses", "patience", "accepted", "n_iter"),
    [
        ([5, 6, 6, 4, 3], 2, [0], 3),
        ([5, 6, 6, 4, 3], 3, [0, 3, 4], 5),
        ([5, 5, 4, 4, 4], 2, [0, 2], 5),
        ([5, 4, 3, 2, 1], 1, [0, 1, 2, 3, 4], 5),
        ([5, 5, 1, 1, 1], 1, [0], 2),
        ([math.nan, math.inf, 3, math.nan, 2], 3, [2, 4], 5),
        ([1e300, -0.0, 0.0, -1.0, 7], 9, [0, 1, 3], 5),
    ],
)
def test_only_strictly_lower_losses_are_taken_and_patience_counts_the_others_in_a_row(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], patience: int, accepted: list[int], n_iter: int
) -> None:
    found = scripted(monkeypatch, losses, max_iter=5, patience=patience)
    assert found.accepted_iterations_.tolist() == accepted
    np.testing.assert_allclose(found.loss_curve_, [losses[i] for i in accepted])
    assert found.n_iter_ == n_iter


def test_the_first_candidate_is_taken_and_the_first_point_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, [1e9], max_iter=1)
    assert found.accepted_iterations_.tolist() == [0]
    expected = 1e-3 * draw(0, 0).standard_normal((64, 10)) + 1e-4 * draw(0, 1).standard_normal((64, 10))
    np.testing.assert_allclose(found.coef_, expected.T, rtol=1e-5, atol=1e-9)


def test_stopping_early_ends_patience_iterations_after_the_last_improvement() -> None:
    X, y = images(100)
    for patience in (1, 2, 5):
        found = RandomSearchClassifier(max_iter=500, patience=patience, random_state=1).fit(X, y)
        assert found.n_iter_ == found.accepted_iterations_[-1] + 1 + patience < 500
        gaps = np.diff(found.accepted_iterations_)
        assert (gaps <= patience).all()
    assert RandomSearchClassifier(max_iter=7, random_state=1).fit(X, y).n_iter_ == 7


def test_one_class() -> None:
    X, _ = images(20)
    found = RandomSearchClassifier(patience=6, random_state=0).fit(X, ["only"] * 20)
    # Its loss is 0 from the first candidate on, which nothing can lower.
    assert (found.best_loss_, found.n_iter_, found.accepted_iterations_.tolist()) == (0.0, 7, [0])
    assert (found.coef_.shape, found.intercept_.shape) == ((1, 64), (1,))
    assert found.predict(X[:2]).tolist() == ["only", "only"]
    assert found.predict_proba(X[:2]).tolist() == [[1.0], [1.0]]


def test_two_classes_have_a_row_each() -> None:
    X, y = np.array([[0.0], [1.0], [8.0], [9.0]]), np.array(["low", "low", "high", "high"])
    found = RandomSearchClassifier(max_iter=300, step_size=0.1, random_state=0).fit(X, y)
    assert found.classes_.tolist() == ["high", "low"]
    assert (found.coef_.shape, found.intercept_.shape) == ((2, 1), (2,))
    assert found.score(X, y) == 1.0


def test_labels_are_names_of_the_same_classes() -> None:
    X, y = images(200)
    names = np.array([f"digit {label}" for label in range(10)])
    first = RandomSearchClassifier(max_iter=40, random_state=0).fit(X, y)
    second = RandomSearchClassifier(max_iter=40, random_state=0).fit(X, names[y])
    assert same_run(first, second)
    np.testing.assert_array_equal(second.predict(X), names[first.predict(X)])


def test_a_tie_goes_to_the_smallest_label() -> None:
    found = RandomSearchClassifier(max_iter=1, random_state=0).fit([[1.0], [2.0], [3.0]], ["c", "b", "a"])
    found.coef_, found.intercept_ = np.zeros((3, 1)), np.array([0.0, 1.0, 1.0])
    assert found.predict([[5.0]]).tolist() == ["b"]


def test_prediction_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = images(200)
    found = RandomSearchClassifier(max_iter=40, random_state=0).fit(X, y)
    expected = found.predict_proba(X)
    monkeypatch.setattr(f"{MODULE}.chunk_rows", lambda n_features: 7)
    np.testing.assert_allclose(found.predict_proba(X), expected, rtol=1e-5)


def test_verbose_prints_each_improvement(capsys: pytest.CaptureFixture[str]) -> None:
    X, y = images(600)
    found = RandomSearchClassifier(max_iter=30, random_state=0, verbose=True).fit(X, y)
    pattern = r"iteration (\d+): loss (\S+), \S+ improvements/s, patience left (\d+) of 20"
    lines = [re.fullmatch(pattern, line) for line in capsys.readouterr().out.splitlines()]
    accepted = found.accepted_iterations_
    assert [int(line[1]) for line in lines if line] == accepted.tolist()
    np.testing.assert_allclose([float(line[2]) for line in lines if line], 3 * found.loss_curve_, rtol=1e-5)
    assert [int(line[3]) for line in lines if line] == (20 - np.diff(accepted, prepend=-1) + 1).tolist()
    RandomSearchClassifier(max_iter=3, random_state=0).fit(X, y)
    assert not capsys.readouterr().out


def test_clone_pickle_and_scikit_learns_tools() -> None:
    X, y = images(150)
    found = RandomSearchClassifier(max_iter=40, random_state=0).fit(X, y)
    restored = pickle.loads(pickle.dumps(found))
    assert same_run(found, restored)
    np.testing.assert_array_equal(restored.predict_proba(X), found.predict_proba(X))
    with pytest.raises(NotFittedError):
        clone(found).predict(X)
    pipeline = make_pipeline(MinMaxScaler(), RandomSearchClassifier(max_iter=200, random_state=0))
    search = GridSearchCV(pipeline, {"randomsearchclassifier__step_size": [1e-9, 1e-1]}, cv=2).fit(X, y)
    assert search.best_params_ == {"randomsearchclassifier__step_size": 1e-1}


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"max_iter": 0}, "max_iter is 0; expected a whole number of at least 1"),
        ({"max_iter": 10.0}, "max_iter is 10.0"),
        ({"patience": -1}, "patience is -1"),
        ({"patience": None}, "patience is None"),
        ({"step_size": 0}, "step_size is 0; expected a finite number above 0"),
        ({"step_size": math.inf}, "step_size is inf"),
        ({"step_size": "1e-4"}, "step_size is '1e-4'"),
        ({"init_scale": -1.0}, "init_scale is -1.0; expected a finite number at least 0"),
        ({"init_scale": math.nan}, "init_scale is nan"),
        ({"random_state": -1}, "random_state is -1; expected None"),
        ({"random_state": 2**32}, "random_state is 4294967296"),
        ({"random_state": "seed"}, "random_state is 'seed'"),
    ],
)
def test_parameters_out_of_range_are_refused_in_fit(params: dict[str, Any], text: str) -> None:
    search = RandomSearchClassifier(**params)
    with pytest.raises(InvalidInputError, match=text):
        search.fit(*images(10))


def test_threads_are_held_at_the_number_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def blas_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    class Watched(Scripted):
        def linear_loss(self, *args: Any) -> Any:
            losses = super().linear_loss(*args)

            def watched(*args: Any) -> np.ndarray:
                seen.append(blas_threads())
                return losses(*args)

            return Given(watched)

    seen: list[set[int]] = []
    before = blas_threads()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    monkeypatch.setattr(f"{MODULE}.get_backend", lambda name: Watched([2.0, 1.0]))
    RandomSearchClassifier(max_iter=2, random_state=0, block_size=1).fit(*images(20))
    # A BLAS that threadpoolctl does not know is not listed.
    assert seen == 2 * [{1} if before else set()]
    assert blas_threads() == before


def test_zero_is_a_place_to_start() -> None:
    found = RandomSearchClassifier(max_iter=1, init_scale=0, random_state=0).fit(*images(10, "float64"))
    np.testing.assert_array_equal(found.coef_.T, 1e-4 * draw(0, 1).standard_normal(found.coef_.T.shape))


def test_a_named_backend_exists_or_raises() -> None:
    with pytest.raises(UnknownBackendError, match="backend 'abacus' is unknown"):
        RandomSearchClassifier(backend="abacus").fit(*images(10))


def test_data_too_large_for_any_loss_are_refused() -> None:
    X = np.full((4, 3), 3e38, np.float32)
    with pytest.raises(InvalidInputError, match=r"no candidate has a finite loss in float32; X reaches 3e\+38"):
        RandomSearchClassifier(init_scale=10.0, random_state=0).fit(X, [0, 1, 0, 1])


def test_several_outputs_are_refused() -> None:
    X, y = images(10)
    with pytest.raises(ValueError, match=r"y should be a 1d array, got an array of shape \(10, 2\) instead"):
        RandomSearchClassifier().fit(X, np.column_stack([y, y]))


def replay(X: np.ndarray, y: np.ndarray, *, seed: int, max_iter: int, weight: np.ndarray | None = None) -> list[int]:
    """The sequential method in float64, one candidate after the other, without patience: the accepted iterations."""
    X, n_classes = X.astype(np.float64), int(y.max()) + 1
    W, b = 1e-3 * draw(seed, 0).standard_normal((X.shape[1], n_classes)), np.zeros(n_classes)
    best, accepted = math.inf, []
    for iteration in range(max_iter):
        noise = draw(seed, 1 + iteration)
        # A point is kept in float32, which is its definition for uint8; everything else is float64.
        W_new = (W + 1e-4 * noise.standard_normal(W.shape)).astype(np.float32).astype(np.float64)
        b_new = (b + 1e-4 * noise.standard_normal(b.shape)).astype(np.float32).astype(np.float64)
        loss = np.average(
            logsumexp(X @ W_new + b_new, axis=1) - (X @ W_new + b_new)[np.arange(len(y)), y], weights=weight
        )
        if loss < best:
            W, b, best = W_new, b_new, loss
            accepted.append(iteration)
    return accepted


@pytest.fixture(scope="module")
def replays() -> dict[int, list[int]]:
    return {seed: replay(*images(), seed=seed, max_iter=300) for seed in (0, 1, 5)}


@pytest.mark.parametrize("block_size", [1, 3, 8, "auto"])
def test_decides_as_the_sequential_method_in_float64(
    own_backend: str, replays: dict[int, list[int]], block_size: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNNBENCH_THREADS", "1")  # more would wait for each other longer than they compute
    for seed, accepted in replays.items():
        found = RandomSearchClassifier(300, 300, backend=own_backend, random_state=seed, block_size=block_size)
        found.fit(*images())
        assert found.accepted_iterations_.tolist() == accepted
        assert found.n_iter_ == 300
        assert 40 < len(accepted) < 200


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("patience", [3, 20])
def test_blocks_change_nothing_to_the_bit(
    own_backend: str, dtype: str, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    X, y = images(257, dtype)
    X, y = X[:, :61], y % 7
    search = RandomSearchClassifier(150, patience, backend=own_backend, random_state=4)
    reference = clone(search).set_params(block_size=1).fit(X, y)
    for block_size in (2, 5, 8, "auto"):
        assert same_run(reference, clone(search).set_params(block_size=block_size).fit(X, y))


@pytest.mark.parametrize("patience", [3, 20])
@pytest.mark.parametrize("are_right", [True, False])
def test_guesses_change_nothing_but_the_number_of_passes(
    monkeypatch: pytest.MonkeyPatch, patience: int, are_right: bool
) -> None:
    class Guessing(NumpyBackend):
        def linear_loss(self, X: np.ndarray, *given: Any) -> LinearLoss:
            losses = super().linear_loss(X, *given)

            def counted(W: np.ndarray, b: np.ndarray, limit: float = math.inf) -> np.ndarray:
                if len(X) < 50:
                    return losses(W, b) if are_right else random.random(1)
                passes.append(len(W))
                return losses(W, b, limit)

            return Given(counted)

    random, passes = np.random.default_rng(0), list[int]()
    monkeypatch.setattr(f"{MODULE}.get_backend", lambda name: Guessing())
    monkeypatch.setattr(f"{MODULE}.FEW_SAMPLES", 40)
    monkeypatch.setattr(f"{MODULE}.GUESSED_SAMPLES", 300)
    X, y = images(320)
    search = RandomSearchClassifier(150, patience, random_state=4)
    reference = clone(search).set_params(block_size=1).fit(X, y)
    assert sum(passes) == len(passes) == reference.n_iter_
    for block_size in (5, "auto"):
        passes.clear()
        assert same_run(reference, clone(search).set_params(block_size=block_size).fit(X, y))
        assert len(passes) < reference.n_iter_ * (0.4 if are_right else 1)
        assert max(passes) > 2
    passes.clear()
    monkeypatch.setattr(f"{MODULE}.GUESSED_SAMPLES", 400)
    assert same_run(reference, clone(search).set_params(block_size=5).fit(X, y))
    assert len(passes) > reference.n_iter_ * 0.4


def test_threads_change_nothing_to_the_bit(own_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if own_backend != "numba":
        pytest.skip("a BLAS may divide its sums by threads")
    X, y = images(1500)
    X = np.repeat(X, 8, axis=1)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("KNNBENCH_THREADS", threads)
        found.append(RandomSearchClassifier(40, backend="numba", random_state=0, block_size=4).fit(X, y))
    assert same_run(found[0], found[1])
    assert same_run(found[0], found[2])


@pytest.mark.parametrize(("pass_cost", "least"), [(0.4, 1), (20.0, 2)])
def test_a_block_follows_the_share_of_improvements_and_the_cost_of_a_pass(
    monkeypatch: pytest.MonkeyPatch, pass_cost: float, least: int
) -> None:
    sizes: list[int] = []

    class Falling(LinearLoss):
        def __call__(self, W: np.ndarray, b: np.ndarray, limit: float = math.inf) -> np.ndarray:
            sizes.append(len(W))
            return np.full(len(W), 1.0 / min(len(sizes), 30))

    falling = Falling()
    falling.pass_cost = pass_cost
    engine = SimpleNamespace(linear_loss=lambda *args: falling)
    monkeypatch.setattr(f"{MODULE}.get_backend", lambda name: engine)
    found = RandomSearchClassifier(200, 100, random_state=0).fit(*images(20))
    assert found.accepted_iterations_[-1] < 50
    assert all(least <= size <= least + 3 for size in sizes[1:30])
    assert max(sizes) > 8
    # No candidate past the patience, nor past the last iteration, is evaluated.
    assert found.n_iter_ == found.accepted_iterations_[-1] + 101
    assert sum(sizes) < 400


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_steps_drawn_ahead_are_those_of_their_iterations(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNBENCH_THREADS", threads)
    monkeypatch.setattr(f"{MODULE}.DRAWN_AHEAD", 8)
    others = threading.active_count()
    with closing(Steps(5, (3, 2), 0.5, 30, ahead=True)) as steps:
        for iterations in (range(1), range(1, 4), range(2, 9), range(9, 10), range(25, 30)):
            found = steps.of(iterations)
            assert len(found) == len(iterations)
            for step, iteration in zip(found, iterations, strict=True):
                moves = 0.5 * draw(5, 1 + iteration).standard_normal((4, 2))
                np.testing.assert_array_equal(np.vstack([step.W, step.b]), moves)
                assert step.length == pytest.approx(np.linalg.norm(moves[:3], axis=0).max())
        # What is behind is let go, and not too much drawn ahead.
        assert len(steps._drawn) < 20
    assert threading.active_count() == others


def test_steps_too_large_to_be_held_are_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNBENCH_THREADS", "4")
    monkeypatch.setattr(f"{MODULE}.DRAWN_AHEAD", 8)
    monkeypatch.setattr(f"{MODULE}.DRAWN_BYTES", 100)
    with closing(Steps(5, (3, 2), 0.5, 30, ahead=True)) as steps:
        assert len(steps.of(range(1))) == 1
        assert sum(map(len, steps._drawn.values())) == 1


def test_what_stops_a_drawing_thread_stops_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(seed: int, counter: int) -> np.random.Generator:
        if counter > 20:
            raise MemoryError("no room")
        return generator(seed, counter)

    monkeypatch.setenv("KNNBENCH_THREADS", "2")
    monkeypatch.setattr(f"{MODULE}.DRAWN_AHEAD", 8)
    monkeypatch.setattr(f"{MODULE}.Steps", lambda *args, ahead: Steps(*args, ahead=True))
    others = threading.active_count()
    monkeypatch.setattr(f"{MODULE}.generator", failing)
    with pytest.raises(MemoryError, match="no room"):
        RandomSearchClassifier(60, 60, backend="numpy", random_state=0).fit(*images(20))
    assert threading.active_count() <= others + 1  # one that waits for tasks


class Broken:
    """A backend whose answers are tampered with."""

    def __init__(self, tamper: Callable[[np.ndarray], np.ndarray]) -> None:
        self.engine, self.tamper = get_backend("numpy"), tamper

    def linear_loss(self, *args: Any) -> Any:
        losses = self.engine.linear_loss(*args)
        return Given(lambda W, b, limit: self.tamper(losses(W, b)))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda losses: losses * (1 + 1e-2 * (np.arange(len(losses)) > 0)),
        # As an engine that takes the best of a block, not the first that improves.
        lambda losses: np.where(losses == losses.min(), losses, math.inf),
    ],
    ids=["a loss depends on its place", "a later candidate is accepted"],
)
def test_the_replay_finds_engines_that_are_off(
    monkeypatch: pytest.MonkeyPatch, replays: dict[int, list[int]], tamper: Callable[[np.ndarray], np.ndarray]
) -> None:
    monkeypatch.setattr(f"{MODULE}.get_backend", lambda name: Broken(tamper))
    found = RandomSearchClassifier(300, 300, random_state=0, block_size=4).fit(*images())
    assert found.accepted_iterations_.tolist() != replays[0]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize(
    ("n_samples", "n_features", "n_classes"), [(1, 1, 1), (17, 3, 2), (333, 64, 10), (700, 40, 37)]
)
def test_losses_are_those_of_float64(
    own_backend: str, dtype: str, n_samples: int, n_features: int, n_classes: int
) -> None:
    rng = np.random.default_rng(n_samples)
    X = (rng.integers(0, 256, (n_samples, n_features)) * (rng.random((n_samples, n_features)) < 0.3)).astype(dtype)
    y, weight = rng.integers(0, n_classes, n_samples), rng.random(n_samples)
    kind = np.result_type(dtype, np.float32)
    W, b = (rng.standard_normal((5, *shape)).astype(kind) for shape in ((n_features, n_classes), (n_classes,)))
    W *= kind.type(1e-2)
    logits = X.astype(np.float64) @ W.astype(np.float64) + b[:, None]
    expected = (logsumexp(logits, axis=2) - logits[:, np.arange(n_samples), y]) @ weight
    losses = get_backend(own_backend).linear_loss(X, y, weight, kind)
    found = losses(W, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if kind == np.float32 else 1e-12, atol=1e-12)
    np.testing.assert_array_equal(found, [losses(W[m : m + 1], b[m : m + 1])[0] for m in range(5)])
    # Those at the limit are computed to the end, those above it need not be.
    limit = float(np.median(found))
    np.testing.assert_array_equal(losses(W, b, limit), np.where(found <= limit, found, math.inf))


def test_a_candidate_is_left_once_it_is_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = images(1700)
    monkeypatch.setattr(importlib.import_module("knnbench.backends.numba"), "LOSS_PANELS", 1)
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    engine = get_backend("numba")
    losses = engine.linear_loss(X, y, np.ones(len(X)), np.dtype(np.float32))
    seen: list[int] = []
    kernels = losses._kernels
    monkeypatch.setattr(
        losses,
        "_kernels",
        kernels._replace(losses=lambda *args: (seen.append(len(args[10])), kernels.losses(*args))),
    )
    W = np.stack([np.zeros((64, 10)), np.full((64, 10), 1e-3)]).astype(np.float32)
    W[1, :, 0] = 1.0
    found = losses(W, np.zeros((2, 10), np.float32), 1701 * math.log(10))
    assert found[0] == pytest.approx(1700 * math.log(10))
    assert found[1] == math.inf
    assert (seen[0], seen[-1]) == (2, 1)


def test_operations_are_counted_without_those_left_out() -> None:
    X, y = np.ones((64, 70), np.uint8), np.arange(64) % 3
    X[:, 5:9] = 0
    X[:, 69] = 0
    W, b = np.zeros((2, 70, 3), np.float32), np.zeros((2, 3), np.float32)
    has_matrix = linear_kernels(np.uint8, np.float32, 70, 3).form.operation.is_matrix
    for name, dtype, probe, terms in (
        ("numba", "u1", "matrix-uint8", 128 * 3) if has_matrix else ("numba", "u1", "fma-float32", 65),
        ("numba", "f4", "fma-float32", 65),
        ("numpy", "u1", "gemm-float32", 70),
    ):
        losses = get_backend(name).linear_loss(X.astype(dtype), y, np.ones(64), np.dtype(np.float32))
        losses(W, b)
        losses(W[:1], b[:1])
        assert losses.operations == {probe: 3 * 64 * terms * 3}


def test_one_function_takes_models_of_any_number_of_classes(own_backend: str) -> None:
    X, y = np.random.default_rng(0).integers(0, 256, (200, 70), np.uint8), np.arange(200) % 3
    engine = get_backend(own_backend)
    losses = engine.linear_loss(X, y, np.ones(200), np.dtype(np.float32))
    for n_classes in (3, 12, 40, 3):
        W = np.ones((1, 70, n_classes), np.float32) * np.arange(n_classes, dtype=np.float32) / 1000
        b, alone = np.zeros((1, n_classes), np.float32), engine.linear_loss(X, y, np.ones(200), np.dtype(np.float32))
        assert losses(W, b) == alone(W, b)


def test_not_finite_losses_are_infinite(own_backend: str) -> None:
    losses = get_backend(own_backend).linear_loss(*images(40, "float32"), np.ones(40), np.dtype(np.float32))
    W = np.zeros((3, 64, 10), np.float32)
    W[0, 20, 3], W[1, 21, 4] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        found = losses(W, np.zeros((3, 10), np.float32))
    assert not np.isfinite(found[:2]).any()
    assert found[2] == pytest.approx(40 * math.log(10))


def test_warm_start_goes_on_as_if_there_had_been_more_iterations(own_backend: str) -> None:
    X, y = images(200)
    whole = RandomSearchClassifier(90, 9, backend=own_backend, random_state=3).fit(X, y)
    parts = RandomSearchClassifier(1, 9, backend=own_backend, random_state=3, warm_start=True)
    for max_iter in (1, 2, 30, 31, 90, 90, 50):
        parts.set_params(max_iter=max_iter, random_state=7 if max_iter > 1 else 3).fit(X, y)
    assert same_run(whole, parts)
    parts.set_params(warm_start=False, random_state=3).fit(X, y)
    assert parts.n_iter_ <= 50


def test_warm_start_after_the_patience_is_spent_changes_nothing() -> None:
    X, y = images(100)
    found = RandomSearchClassifier(500, 2, random_state=1, warm_start=True).fit(X, y)
    n_iter = found.n_iter_
    assert found.set_params(max_iter=900).fit(X, y).n_iter_ == n_iter < 500


def test_warm_start_on_other_data_goes_on_from_their_loss() -> None:
    X, y = images(300)
    found = RandomSearchClassifier(20, random_state=0, warm_start=True).fit(X[:150], y[:150])
    found.set_params(max_iter=60).fit(X[150:], y[150:])
    assert found.loss_curve_[-1] == found.best_loss_
    logits = X[150:] @ found.coef_.T.astype(np.float64) + found.intercept_
    expected = (logsumexp(logits, axis=1) - logits[np.arange(150), y[150:]]).mean()
    assert found.best_loss_ == pytest.approx(expected, rel=1e-5)


def test_warm_start_on_data_of_another_kind_is_refused() -> None:
    X, y = images(100)
    found = RandomSearchClassifier(5, random_state=0, warm_start=True).fit(X, y)
    with pytest.raises(InvalidInputError, match="the number of features of the data: 63; expected 64"):
        found.fit(X[:, 1:], y)
    with pytest.raises(InvalidInputError, match=r"the classes of the data: \[1, 2, 3"):
        found.fit(X, y + 1)


def test_weights_count_samples(own_backend: str) -> None:
    X, y = images(200, "float64")
    weight = np.random.default_rng(0).integers(0, 4, 200)
    search = RandomSearchClassifier(80, backend=own_backend, random_state=0)
    weighted = clone(search).fit(X, y, weight)
    repeated = clone(search).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    assert weighted.accepted_iterations_.tolist() == repeated.accepted_iterations_.tolist()
    np.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-12)
    assert weighted.accepted_iterations_.tolist() != search.fit(X, y).accepted_iterations_.tolist()


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ([1.0, -2.0, 1.0], "sample_weight is -2 at row 1; expected at least 0"),
        ([0, 0, 0], "at least one non-zero"),
    ],
)
def test_weights_out_of_range_are_refused(weight: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RandomSearchClassifier().fit([[1.0], [2.0], [3.0]], [0, 1, 1], weight)


def test_ctrl_c_keeps_the_best_and_warm_start_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = images(100)
    options: dict[str, Any] = {"max_iter": 40, "random_state": 0, "backend": "numpy", "block_size": 1}
    whole = RandomSearchClassifier(**options).fit(X, y)
    calls = 0

    def interrupt(losses: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise KeyboardInterrupt
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(f"{MODULE}.get_backend", lambda name: Broken(interrupt))
        found = RandomSearchClassifier(**options, warm_start=True)
        with pytest.raises(KeyboardInterrupt):
            found.fit(X, y)
    assert found.n_iter_ == 24
    kept = whole.accepted_iterations_ < 24
    assert found.accepted_iterations_.tolist() == whole.accepted_iterations_[kept].tolist()
    assert found.best_loss_ == whole.loss_curve_[kept][-1]
    assert found.predict(X[:3]).shape == (3,)
    assert same_run(found.fit(X, y), whole)


def test_close_losses_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, [5, 4, 4 * (1 + 1e-9), 3.9, 4.0, 3.9 * (1 - 1e-9)], max_iter=6)
    assert found.near_ties_.tolist() == [2, 5]
    assert found.accepted_iterations_.tolist() == [0, 1, 3, 5]
    # Of ordinary losses a few are as close, and what two dtypes may differ by covers what they do.
    monkeypatch.undo()
    narrow, wide = (RandomSearchClassifier(200, 200, random_state=0).fit(*images(dtype=d)) for d in ("u1", "f8"))
    assert len(narrow.near_ties_) < 20
    assert len(wide.near_ties_) == 0


@pytest.mark.parametrize("block_size", [0, 2.5, "many", None])
def test_block_sizes_out_of_range_are_refused(block_size: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"block_size is {block_size!r}; expected"):
        RandomSearchClassifier(block_size=block_size).fit(*images(10))


def test_auto_takes_numpy_where_numba_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_numba(name: str) -> Any:
        if name == "numba":
            raise BackendUnavailableError("no numba")
        return get_backend(name)

    monkeypatch.setattr(f"{MODULE}.get_backend", without_numba)
    found = RandomSearchClassifier(20, random_state=0).fit(*images(100))
    monkeypatch.undo()
    assert same_run(found, RandomSearchClassifier(20, random_state=0, backend="numpy").fit(*images(100)))
