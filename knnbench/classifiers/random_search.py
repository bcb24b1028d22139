"""Random search over the weights of a linear classifier, as a scikit-learn classifier."""

import math
import numbers
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from knnbench.api import check_count
from knnbench.backends import get_backend
from knnbench.blocking import chunk_rows, slices
from knnbench.dtypes import Array, computed_dtype
from knnbench.errors import InvalidInputError
from knnbench.threads import limited_blas

from .knn import training_data

__all__ = ["RandomSearchClassifier"]

# A loss is one matrix product over all samples, which numpy's BLAS does well on every machine.
AUTO_BACKEND = "numpy"

NOTEBOOK_BATCH = 256

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
        A name that `knnbench.backends` lists: where losses are computed. ``"auto"`` is ``"numpy"``. A named
        backend works or raises.
    random_state : int, RandomState or None
        An int is the seed itself; otherwise a seed is drawn.
    verbose : bool
        Whether to print each improvement: its iteration and `notebook_loss_`.

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
    that happened before it, and a run takes the same steps on every backend, as long as rounding does not
    decide a comparison of losses. Between versions of numpy the numbers themselves may change.

    Weights and logits are float32 for uint8, float16 and float32 data, otherwise float64; exponentials and sums are
    float64. An iteration takes ``2 n_samples n_features n_classes`` operations.

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
       SC '11, 2011.

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
        step_size: float = 1e-4,
        init_scale: float = 1e-3,
        backend: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.max_iter = max_iter
        self.patience = patience
        self.step_size = step_size
        self.init_scale = init_scale
        self.backend = backend
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Search.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of real numbers
        y : (n_samples,) array_like
            Labels: numbers or strings.

        Returns
        -------
        RandomSearchClassifier
            The estimator itself.

        Raises
        ------
        InvalidInputError
            A parameter out of range, or data so large that no candidate has a finite loss.
        UnknownBackendError, BackendUnavailableError
            The named backend does not exist or does not work here.
        ValueError
            X or y that scikit-learn's validation refuses: NaN, not two-dimensional, several outputs.
        """
        max_iter = check_count("max_iter", self.max_iter)
        patience = check_count("patience", self.patience)
        step_size = check_scale("step_size", self.step_size)
        init_scale = check_scale("init_scale", self.init_scale, may_be_zero=True)
        seed = check_seed(self.random_state)
        engine = get_backend(AUTO_BACKEND if self.backend == "auto" else self.backend)
        X, self.classes_, codes = training_data(self, X, y)
        X = X.astype(computed_dtype(X.dtype), copy=False)
        shape = X.shape[1], len(self.classes_)
        n_batches = math.ceil(len(X) / NOTEBOOK_BATCH)
        dtype = np.result_type(X.dtype, np.float32)

        accepted: list[int] = []
        curve: list[float] = []
        best, fruitless = math.inf, 0
        # An overflow ends in a loss that is not finite, which is not below any other.
        with limited_blas(), np.errstate(over="ignore", invalid="ignore"):
            W = (init_scale * generator(seed, 0).standard_normal(shape)).astype(dtype)
            b = np.zeros(shape[1], dtype)
            for iteration in range(max_iter):
                steps = generator(seed, 1 + iteration)
                W_next = (W + step_size * steps.standard_normal(shape)).astype(dtype)
                b_next = (b + step_size * steps.standard_normal(shape[1])).astype(dtype)
                loss = float(engine.linear_loss(X, codes, W_next[None], b_next[None])[0]) / len(X)
                if loss < best:
                    W, b, best, fruitless = W_next, b_next, loss, 0
                    accepted.append(iteration)
                    curve.append(loss)
                    if self.verbose:
                        print(f"iteration {iteration}: loss {n_batches * loss:.6g}")
                else:
                    fruitless += 1
                    if fruitless == patience:
                        break
        if not accepted:
            raise InvalidInputError(
                f"no candidate has a finite loss in {dtype}; X reaches {np.abs(X).max():.3g}: expected values small "
                f"enough for their weighted sums; scale X or lower init_scale and step_size."
            )
        self.coef_ = np.ascontiguousarray(W.T)
        self.intercept_ = b
        self.best_loss_ = best
        self.notebook_loss_ = n_batches * best
        self.n_iter_ = iteration + 1
        self.accepted_iterations_ = np.array(accepted, np.int64)
        self.loss_curve_ = np.array(curve)
        self.seed_ = seed
        return self

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
