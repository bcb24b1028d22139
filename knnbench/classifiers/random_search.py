"""Random search over the weights of a linear classifier, as a scikit-learn classifier."""

import math
import numbers
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from knnbench.api import check_count
from knnbench.backends import get_backend
from knnbench.backends.base import Backend
from knnbench.backends.linear import LinearLoss
from knnbench.backends.notebook import BATCH
from knnbench.blocking import chunk_rows, slices
from knnbench.dtypes import Array, computed_dtype
from knnbench.errors import BackendUnavailableError, InvalidInputError
from knnbench.threads import limited_blas, run_tasks, thread_count

from .knn import training_data

__all__ = ["INIT_SCALE", "STEP_SIZE", "Objective", "RandomSearchClassifier", "Search"]

# Of ``backend="auto"``: the first that works here.
AUTO_BACKENDS = ("numba", "numpy")

# Candidates of one pass at the most: where improvements are rarer than one in so many, the pass itself is a small part.
LARGEST_BLOCK = 16

# Iterations over which the share of those that were guessed wrongly is estimated.
MEMORY = 16

# Samples by which it is guessed whether a candidate improves, and those that take so much longer that it pays. Of
# MNIST's iterations a quarter improves, and about this share is guessed wrongly.
MISSED = 0.05
FEW_SAMPLES = 1024
GUESSED_SAMPLES = 16 * FEW_SAMPLES

# A step of MNIST's 7,850 numbers takes 0.17 ms, more than a GPU needs for all else: some threads draw those to come, so
# many together as are worth handing over, and beyond those that are asked for no more bytes than this. Short ones are
# drawn sooner than handed over.
DRAWING_THREADS = 6
DRAWN_AHEAD = 2048
DRAWN_TOGETHER = 4
DRAWN_BYTES = 1 << 26

# Covers the rounding of a point, and those of lengths.
LENGTH_SLACK = 1 + 1e-6

# The limit's own rounding must not exclude what equals it.
LIMIT_SLACK = 1 + 4 * float(np.finfo(np.float64).eps)

# The notebook's.
STEP_SIZE = 1e-4
INIT_SCALE = 1e-3

LARGEST_SEED = np.iinfo(np.int32).max


class RandomSearchClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no type hints
    """Find the weights of a linear classifier by random steps that lower the cross-entropy.

    A point is a matrix of weights and a vector of intercepts. The first is drawn around 0. In each iteration a
    candidate is drawn around the point; if its loss over all samples is strictly below the best so far, it
    becomes the point. The best loss starts at infinity, so the first candidate is always taken, and the drawn
    first point is itself never evaluated. The search stops after `patience` iterations in a row without
    improvement. Data are used as they are, not scaled.

    Parameters
    ----------
    max_iter : int
        Iterations at the most.
    patience : int
        Iterations in a row without improvement after which the search stops.
    step_size : float
        Standard deviation of the step from the point to a candidate, in each weight and intercept. Above 0.
    init_scale : float
        Standard deviation of the weights of the first point; its intercepts are 0.
    backend : str
        A name that `knnbench.backends` lists: where losses are computed. ``"auto"`` is ``"numba"`` where that works,
        else ``"numpy"``. A named backend works or raises, and peers without such losses raise.
    random_state : int, RandomState or None
        An int is the seed itself; otherwise a seed is drawn.
    verbose : bool
        Whether to print each improvement: its iteration and `notebook_loss_`, the improvements a second since `fit`
        began, and how much of the patience was left when it came.
    warm_start : bool
        Whether `fit` on a fitted estimator goes on where it ended, with its seed, as if `max_iter` had been larger;
        on other data, from the loss that the best point has there.
    block_size : int or "auto"
        Candidates evaluated in one pass over the data. It changes the time, never the result: those behind the
        first improvement are discarded, because the search draws the next around another point. Of many samples, a
        few tell beforehand which candidates will probably improve; the next are then drawn around these, and
        discarded are those behind the first wrong guess. ``"auto"`` follows the share of iterations that are guessed
        wrongly, or that improve where nothing is guessed, and what a pass costs the backend beyond its candidates.

    Attributes
    ----------
    classes_ : (n_classes,) array
        The labels, sorted.
    coef_ : (n_classes, n_features) array of float32 or float64
        Weights of the best point; also for two classes a row for each.
    intercept_ : (n_classes,) array of the dtype of `coef_`
        Intercepts of the best point.
    best_loss_ : float
        Mean cross-entropy of the best point over all samples, in nats.
    notebook_loss_ : float
        The same loss as the original notebook showed it, the sum of the mean losses of batches of 256:
        ``ceil(n_samples / 256) * best_loss_``, which is 235 times the mean on MNIST.
    n_iter_ : int
        Iterations executed.
    accepted_iterations_ : (n_accepted,) array of int64
        Iterations, counted from 0, whose candidate was taken; the first is 0.
    loss_curve_ : (n_accepted,) array of float64
        Mean cross-entropy after each of `accepted_iterations_`; the last is `best_loss_`.
    near_ties_ : (n_near_ties,) array of int64
        Iterations whose loss was so close to the best that the rounding of another backend may have decided
        otherwise; see Notes.
    seed_ : int
        The seed of the run; as `random_state` it repeats the run.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : (n_features_in_,) array of str
        Names of the features, if X had any.

    Notes
    -----
    Random numbers come from the counter-based generator Philox [1]_ on the host, keyed by (seed, counter):
    counter 0 gives the first weights and 1 + i the step of iteration i, each in float64, first the weights in
    the order (n_features, n_classes), then the intercepts. What an iteration draws therefore depends on nothing
    that happened before it, and candidates can be drawn and evaluated before it is known whether they will be
    needed. Between versions of numpy the numbers themselves may change.

    Weights and logits are float32 for uint8, float16 and float32 data, otherwise float64; exponentials and sums are
    float64. A matrix unit of a CPU sums products of uint8 exactly, of weights rounded to 22 bits of the largest of
    their class: its logits are less off than what is said of float32 below. An iteration takes
    ``2 n_samples n_features n_classes`` operations, and ends early once the part of its sum that is known exceeds the
    best loss.

    On one backend a loss is the same to the bit however many candidates share a pass, so the result does not depend
    on `block_size`. Backends add products in different orders. With unit roundoff u of the weights, a logit is off by
    about ``sqrt(n_features) u |x| |w|`` [2]_ (with high probability; the worst case has n_features in place of its
    root) and a sample's loss by twice that. Where the losses of a candidate and of the best are no further apart than
    the sum of what both may be off on two backends, the iteration is in `near_ties_`; others are decided alike on all,
    where no product overflows.

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
       SC '11, 2011.
    .. [2] N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
       41(5), 2019.

    Examples
    --------
    >>> X, y = [[0.0], [1.0], [8.0], [9.0]], ["low", "low", "high", "high"]
    >>> classifier = RandomSearchClassifier(step_size=0.1, random_state=0).fit(X, y)
    >>> classifier.accepted_iterations_[:1]
    array([0])
    >>> classifier.predict([[0.5], [9.5]])
    array(['low', 'high'], dtype='<U4')
    """

    def __init__(
        self,
        max_iter: int = 1000,
        patience: int = 20,
        step_size: float = STEP_SIZE,
        init_scale: float = INIT_SCALE,
        backend: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
        warm_start: bool = False,
        block_size: int | str = "auto",
    ) -> None:
        self.max_iter = max_iter
        self.patience = patience
        self.step_size = step_size
        self.init_scale = init_scale
        self.backend = backend
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start
        self.block_size = block_size

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Search.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of real numbers
        y : (n_samples,) array_like
            Labels: numbers or strings.
        sample_weight : (n_samples,) array_like of numbers, at least 0, optional
            What each sample counts in the mean loss; all the same if not given.

        Returns
        -------
        RandomSearchClassifier
            The estimator itself.

        Raises
        ------
        InvalidInputError
            A parameter or a weight out of range, data so large that no candidate has a finite loss, or with
            `warm_start` other classes or numbers of features than before.
        UnknownBackendError, BackendUnavailableError, UnsupportedError
            The named backend does not exist, does not work here, or has no losses of linear models.
        ValueError
            X, y or sample_weight that scikit-learn's validation refuses: NaN, not two-dimensional, several outputs.
        KeyboardInterrupt
            Ctrl-C; the best point so far is kept in the attributes, and `warm_start` goes on from it.
        """
        max_iter = check_count("max_iter", self.max_iter)
        patience = check_count("patience", self.patience)
        step_size = check_scale("step_size", self.step_size)
        init_scale = check_scale("init_scale", self.init_scale, may_be_zero=True)
        block_size = None if self.block_size == "auto" else check_count("block_size", self.block_size)
        seed = check_seed(self.random_state)
        engine = backend_of(self.backend)
        previous = vars(self).copy() if self.warm_start and hasattr(self, "n_iter_") else None
        X, classes, codes = training_data(self, X, y)
        X = X.astype(computed_dtype(X.dtype), copy=False)
        weight = check_weights_of_samples(sample_weight, X)
        dtype, shape = np.result_type(X.dtype, np.float32), (X.shape[1], len(classes))
        if previous is None:
            search = Search.begun(seed, shape, dtype, init_scale)
        else:
            search = Search.continued(previous, classes, X.shape[1], dtype)
        self.classes_ = classes
        counted = weight > 0
        if not counted.all():
            X, codes, weight = X[counted], codes[counted], weight[counted]
        n_batches = math.ceil(len(X) / BATCH)
        # An overflow ends in a loss that is not finite, which is not below any other.
        with limited_blas(), np.errstate(over="ignore", invalid="ignore"):
            objective = Objective.of(engine, X, codes, weight, dtype)
            if previous is not None:
                search.best = float(objective.losses(search.W[None], search.b[None], math.inf)[0])
            start, found = time.perf_counter(), 0
            try:
                for left in search.improvements(objective, step_size, max_iter, patience, block_size):
                    found += 1
                    if self.verbose:
                        rate = found / (time.perf_counter() - start)
                        print(
                            f"iteration {search.accepted[-1]}: loss {n_batches * search.best:.6g}, "
                            f"{rate:.3g} improvements/s, patience left {left} of {patience}"
                        )
            finally:
                if search.accepted:
                    self._keep(search, n_batches)
        if not search.accepted:
            raise InvalidInputError(
                f"no candidate has a finite loss in {dtype}; X reaches {np.abs(X).max():.3g}: expected values small "
                f"enough for their weighted sums; scale X or lower init_scale and step_size."
            )
        return self

    def _keep(self, search: "Search", n_batches: int) -> None:
        """Set the attributes to what a search has found."""
        self.coef_ = np.ascontiguousarray(search.W.T)
        self.intercept_ = search.b
        self.best_loss_ = search.best
        self.notebook_loss_ = n_batches * search.best
        self.n_iter_ = search.iteration
        self.accepted_iterations_ = np.array(search.accepted, np.int64)
        self.loss_curve_ = np.array(search.curve)
        self.near_ties_ = np.array(search.near_ties, np.int64)
        self.seed_ = search.seed

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class: the softmax of the logits.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of real numbers

        Returns
        -------
        (n_samples, n_classes) array of float64
            Columns in the order of `classes_`; rows add up to 1.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            X that scikit-learn's validation refuses.
        """
        logits = self._logits(X)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> Array:
        """Return the label with the largest logit, the smallest label on a tie.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of real numbers

        Returns
        -------
        (n_samples,) array
            Of labels.

        Raises
        ------
        NotFittedError, ValueError
            As for `predict_proba`.
        """
        logits = self._logits(X)
        # argmax takes the first of equals, and the classes are sorted.
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    def _logits(self, X: Any) -> Array:
        """Return ``X W + b``, shape (n_samples, n_classes), in float64 from products in the dtype of the weights."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        dtype = np.result_type(computed_dtype(X.dtype), self.coef_.dtype)
        logits = np.empty((len(X), len(self.classes_)))
        with limited_blas():
            for rows in slices(len(X), chunk_rows(X.shape[1])):
                logits[rows] = X[rows].astype(dtype, copy=False) @ self.coef_.T
        return np.asarray(logits + self.intercept_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Steps of 1e-4 do not come far on data of unit variance.
        tags.classifier_tags.poor_score = True
        return tags


@dataclass(frozen=True, slots=True)
class Objective:
    """The mean loss, and what it may be off.

    Attributes
    ----------
    summed : LinearLoss
    few : LinearLoss or None
        The same over few of the samples, by which to guess, where that is worth while.
    total : float
        Weight of all samples.
    error_per_norm : float
        What a mean loss may be off, for each unit of length of the longest vector of weights.
    """

    summed: LinearLoss
    few: LinearLoss | None
    total: float
    error_per_norm: float

    @classmethod
    def of(cls, engine: Backend, X: Array, y: Array, weight: Array, dtype: np.dtype[Any]) -> Self:
        """Return the objective on some samples, of class numbers y, for weights of a dtype."""
        summed, few = engine.linear_loss(X, y, weight, dtype), None
        # A call for one model after the other is what a device is slow at.
        if len(X) >= GUESSED_SAMPLES and not summed.spares_host:
            # As many of each class as there are of it among all.
            chosen = np.argsort(y, kind="stable")[:: -(-len(X) // FEW_SAMPLES)]
            few = engine.linear_loss(X[chosen], y[chosen], weight[chosen], dtype)
        total, chunks = float(weight.sum()), list(slices(len(X), chunk_rows(X.shape[1])))
        lengths = np.zeros(len(chunks))

        # Squares of bytes do not overflow, and what float32 rounds in a length is nothing to a bound.
        kind = np.float32 if X.dtype == np.uint8 else np.float64

        def add_lengths(number: int) -> None:
            rows = chunks[number]
            wide: Array = X[rows].astype(kind)
            lengths[number] = np.sqrt(np.einsum("ij,ij->i", wide, wide)) @ weight[rows]

        run_tasks(add_lengths, range(len(chunks)), thread_count())
        unit = np.finfo(np.result_type(X.dtype, np.float32)).eps / 2
        return cls(summed, few, total, 2 * math.sqrt(X.shape[1]) * float(unit) * float(lengths.sum()) / total)

    def losses(self, W: Array, b: Array, limit: float) -> Array:
        """Return the mean loss of each candidate, of those above the limit infinity."""
        return np.asarray(self.summed(W, b, limit * self.total * LIMIT_SLACK) / self.total)

    def error(self, W: Array) -> float:
        """Return what the mean loss of a model may be off."""
        return self.error_per_norm * longest_column(W.astype(np.float64))


@dataclass(slots=True)
class Search:
    """How far a search is.

    Attributes
    ----------
    seed : int
    W, b : (n_features, n_classes) and (n_classes,) arrays
        The point.
    best : float
        Its mean loss.
    iteration, fruitless : int
        Iterations executed, and of the last of them those in a row without improvement.
    accepted, curve, near_ties : list
        What becomes the attributes of the estimator.
    guess : float
        The loss of the point over few samples; infinite where no guesses are made.
    missed : float
        The share of iterations that turned out otherwise than guessed, the later ones counted more.
    """

    seed: int
    W: Array
    b: Array
    best: float = math.inf
    iteration: int = 0
    fruitless: int = 0
    accepted: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)
    guess: float = math.inf
    missed: float = 0.5

    @classmethod
    def begun(cls, seed: int, shape: tuple[int, int], dtype: np.dtype[Any], init_scale: float) -> Self:
        """Return the search before its first iteration; `shape` is (n_features, n_classes)."""
        W = (init_scale * generator(seed, 0).standard_normal(shape)).astype(dtype)
        return cls(seed, W, np.zeros(shape[1], dtype))

    @classmethod
    def continued(cls, fitted: dict[str, Any], classes: Array, n_features: int, dtype: np.dtype[Any]) -> Self:
        """Return the search that left these attributes, or raise `InvalidInputError` if it is not for these data."""
        for name, given, expected in (
            ("classes", classes.tolist(), fitted["classes_"].tolist()),
            ("number of features", n_features, fitted["coef_"].shape[1]),
        ):
            if given != expected:
                raise InvalidInputError(
                    f"the {name} of the data: {given}; expected {expected}, as in the search that warm_start goes on "
                    f"with; set warm_start=False to begin anew."
                )
        accepted = fitted["accepted_iterations_"].tolist()
        return cls(
            seed=fitted["seed_"],
            W=np.ascontiguousarray(fitted["coef_"].T, dtype),
            b=fitted["intercept_"].astype(dtype),
            iteration=fitted["n_iter_"],
            fruitless=fitted["n_iter_"] - 1 - accepted[-1],
            accepted=accepted,
            curve=fitted["loss_curve_"].tolist(),
            near_ties=fitted["near_ties_"].tolist(),
        )

    def improvements(
        self, objective: Objective, step_size: float, max_iter: int, patience: int, block_size: int | None
    ) -> Iterator[int]:
        """Search; yield at each improvement the patience that was left, with all attributes as they are then."""
        few = objective.few if block_size != 1 else None
        if few:
            self.missed = min(self.missed, MISSED)
            if self.best < math.inf:  # a search that goes on
                self.guess = float(few(self.W[None], self.b[None])[0])
        ahead = few is not None or objective.summed.spares_host
        with closing(Steps(self.seed, self.W.shape, step_size, max_iter, ahead=ahead)) as steps:
            error = objective.error(self.W)
            while self.iteration < max_iter and self.fruitless < patience:
                wanted = block_size or best_block(self.missed, objective.summed.pass_cost)
                coming = range(self.iteration, self.iteration + min(wanted, max_iter - self.iteration))
                drawn = steps.of(coming[: patience - self.fruitless])
                W, b, guesses = self._candidates(few, drawn)
                # A candidate's weights are no longer than the point's and those of all steps together.
                longest = error + objective.error_per_norm * sum(step.length for step in drawn)
                doubt = 4 * longest * LENGTH_SLACK
                losses = objective.losses(W, b, self.best + doubt)
                for candidate, loss in enumerate(losses.tolist()):
                    apart = abs(loss - self.best)
                    if apart <= doubt and apart <= 2 * (error + objective.error(W[candidate])):
                        self.near_ties.append(self.iteration)
                    self.iteration += 1
                    is_better, is_guessed = loss < self.best, guesses[candidate] < self.guess
                    self.missed += ((is_better != is_guessed) - self.missed) / MEMORY
                    if is_better:
                        left = patience - self.fruitless
                        self.W, self.b, self.best, self.fruitless = W[candidate], b[candidate], loss, 0
                        self.guess = guesses[candidate]
                        self.accepted.append(self.iteration - 1)
                        self.curve.append(loss)
                        error = objective.error(self.W)
                        yield left
                    else:
                        self.fruitless += 1
                    if is_better != is_guessed:
                        break  # the candidates behind are around another point

    def _candidates(self, few: LinearLoss | None, drawn: list["Step"]) -> tuple[Array, Array, list[float]]:
        """Return the candidates of some steps and their losses over few samples, by which a candidate is taken here.

        The next is around it then. Without guesses none is expected to improve.
        """
        W, b, guesses = [], [], []
        point, intercepts, best = self.W, self.b, self.guess
        for step in drawn:
            W.append(np.add(point, step.W, dtype=np.float64).astype(point.dtype))
            b.append(np.add(intercepts, step.b, dtype=np.float64).astype(intercepts.dtype))
            guesses.append(float(few(W[-1][None], b[-1][None])[0]) if few else math.inf)
            if guesses[-1] < best:
                point, intercepts, best = W[-1], b[-1], guesses[-1]
        return np.stack(W), np.stack(b), guesses


@dataclass(frozen=True, slots=True)
class Step:
    """What an iteration adds to the point.

    Attributes
    ----------
    W, b : (n_features, n_classes) and (n_classes,) arrays of float64
    length : float
        Of the longest column of `W`.
    """

    W: Array
    b: Array
    length: float

    @classmethod
    def drawn(cls, seed: int, iteration: int, shape: tuple[int, ...], step_size: float) -> Self:
        """Return the step of an iteration: drawn are a row for each feature, and last the intercepts'."""
        moves = generator(seed, 1 + iteration).standard_normal((shape[0] + 1, shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(step_size, moves, out=moves)
            return cls(moves[:-1], moves[-1], longest_column(moves[:-1]))


class Steps:
    """The steps of iterations: threads draw long ones ahead, if asked to, others when asked for.

    What is drawn depends on the iteration alone, so it does not matter who draws it, nor when.

    Parameters
    ----------
    seed, shape, step_size
        As of `Step.drawn`.
    end : int
        The iteration after the last.
    ahead : bool
        Whether this process has threads to spare.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], step_size: float, end: int, *, ahead: bool) -> None:
        self._seed, self._shape, self._step_size, self._end = seed, shape, step_size, end
        size = (shape[0] + 1) * shape[1]
        affordable = DRAWN_BYTES // (8 * DRAWN_TOGETHER * size)
        threads = min(DRAWING_THREADS, thread_count() - 1, affordable) if ahead and size >= DRAWN_AHEAD else 0
        self._pool = ThreadPoolExecutor(threads, "knnbench-draw") if threads else None
        self._together = DRAWN_TOGETHER if threads else 1
        self._ahead = min(affordable, 2 * threads)
        self._drawn: dict[int, list[Step] | Future[list[Step]]] = {}

    def of(self, iterations: range) -> list[Step]:
        """Return the steps of some iterations; it does not go back to earlier ones."""
        first, last = iterations[0] // self._together, iterations[-1] // self._together
        for number in [number for number in self._drawn if number < first]:
            del self._drawn[number]
        for number in range(first, min(last + self._ahead + 1, -(-self._end // self._together))):
            if number not in self._drawn:
                self._drawn[number] = self._begun(number)
        return [self._steps(i // self._together)[i % self._together] for i in iterations]

    def close(self) -> None:
        """Draw no more."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _steps(self, number: int) -> list[Step]:
        drawn = self._drawn[number]
        if isinstance(drawn, Future):
            drawn = self._drawn[number] = drawn.result()
        return drawn

    def _begun(self, number: int) -> list[Step] | Future[list[Step]]:
        if self._pool:
            with suppress(RuntimeError):  # no thread can be started, such as while Python ends
                return self._pool.submit(self._draw, number)
        return self._draw(number)

    def _draw(self, number: int) -> list[Step]:
        first = number * self._together
        iterations = range(first, min(first + self._together, self._end))
        return [Step.drawn(self._seed, i, self._shape, self._step_size) for i in iterations]


def best_block(missed: float, pass_cost: float) -> int:
    """Return how many candidates to evaluate in a pass when this share of iterations is guessed wrongly.

    A block of B yields ``(1 - (1 - missed)**B) / missed`` iterations and costs ``pass_cost + B``.

    Examples
    --------
    >>> [best_block(missed, 0.4) for missed in (0.5, 0.1, 0.01, 0.0)]
    [1, 3, 9, 16]
    >>> [best_block(missed, 5) for missed in (0.5, 0.1, 0.01, 0.0)]
    [3, 8, 16, 16]
    """
    best, best_rate, gain, left = 1, 0.0, 0.0, 1.0
    for size in range(1, LARGEST_BLOCK + 1):
        gain, left = gain + left, left * (1 - missed)
        if gain > best_rate * (pass_cost + size):
            best, best_rate = size, gain / (pass_cost + size)
    return best


def longest_column(W: Array) -> float:
    """Return the length of the longest column of a matrix of float64."""
    return math.sqrt(np.einsum("ij,ij->j", W, W).max())


def backend_of(name: str) -> Backend:
    """Return the backend of this name; of ``"auto"`` the first of `AUTO_BACKENDS` that works."""
    if name != "auto":
        return get_backend(name)
    for choice in AUTO_BACKENDS[:-1]:
        try:
            return get_backend(choice)
        except BackendUnavailableError:
            continue
    return get_backend(AUTO_BACKENDS[-1])


def check_weights_of_samples(sample_weight: Any, X: Array) -> Array:
    """Return the weights of samples in float64, or raise if they are not one for each, at least 0, some above."""
    weight: Array = _check_sample_weight(sample_weight, X, dtype=np.float64)
    if (weight < 0).any():
        raise InvalidInputError(
            f"sample_weight is {weight.min():.6g} at row {weight.argmin()}; expected at least 0, which leaves a sample "
            f"out."
        )
    if not weight.any():  # older versions of scikit-learn let this pass
        raise InvalidInputError("sample_weight is 0 for every sample; expected at least one non-zero number.")
    return weight


def generator(seed: int, counter: int) -> np.random.Generator:
    """Return the random numbers of one draw of a run: counter 0 the first weights, 1 + i iteration i.

    Parameters
    ----------
    seed : int
        ``0 <= seed < 2**32``.
    counter : int

    Returns
    -------
    numpy.random.Generator
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, counter], np.uint64)))


def check_seed(random_state: Any) -> int:
    """Return the seed that `random_state` is, or one drawn from it; raise `InvalidInputError` if it is neither."""
    try:
        source = check_random_state(random_state)
    except ValueError as error:
        raise InvalidInputError(
            f"random_state is {random_state!r}; expected None, a numpy RandomState or a whole number in "
            f"0 .. 2**32 - 1 ({error})."
        ) from None
    return int(random_state) if isinstance(random_state, numbers.Integral) else int(source.randint(LARGEST_SEED))


def check_scale(name: str, value: Any, *, may_be_zero: bool = False) -> float:
    """Return a standard deviation as a float, or raise `InvalidInputError` if it cannot be one."""
    scale = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (0 <= scale < math.inf and (scale > 0 or may_be_zero)):
        least = "at least" if may_be_zero else "above"
        raise InvalidInputError(f"{name} is {value!r}; expected a finite number {least} 0.")
    return scale
