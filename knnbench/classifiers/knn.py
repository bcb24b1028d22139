"""The k-nearest-neighbours vote as a scikit-learn classifier, on any backend."""

from collections.abc import Iterable
from typing import Any, Literal, Self, get_args

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from knnbench.api import Accuracy, as_corpus, as_rows, check_count, knn, prepare
from knnbench.blocking import check_budget
from knnbench.dtypes import Array
from knnbench.errors import InvalidInputError
from knnbench.streams import Stream, as_stream

__all__ = ["KNNClassifier"]

Weights = Literal["uniform", "distance"]


class KNNClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no type hints
    """Classify by a vote of the k nearest training samples, found by looking at all of them.

    Neighbours come in the order (distance, index of the training sample), so of equally distant samples the
    one given to `fit` first counts. A vote that ends in a tie goes to the smallest label, `classes_` being
    sorted. Data keep their dtype: uint8 images are neither scaled nor widened.

    Parameters
    ----------
    n_neighbors : int
        How many neighbours vote. Read at each call, so it may be changed after `fit`.
    metric : {"euclidean", "sqeuclidean", "cityblock", "chebyshev", "cosine"} or alias
    weights : {"uniform", "distance"}
        ``"uniform"``: every neighbour has one vote. ``"distance"``: a vote weighs the inverse of the
        distance; where neighbours are at distance 0, only those vote. Read at each call.
    backend : str
        A name that `knnbench.backends` lists, or ``"auto"``. A named backend works or raises.
    accuracy : {"fast", "exact"}
        As for `knnbench.knn`.
    memory_budget : int, optional
        Bytes that a search may hold at the most beyond its inputs, the prepared training data and its
        result; default ``$KNNBENCH_MEMORY_BUDGET``, else 1 GiB. Read at each call.

    Attributes
    ----------
    classes_ : (n_classes,) array
        The labels, sorted.
    prepared_ : knnbench.Prepared
        The training data, packed for the backend; ``prepared_.backend`` says which ``"auto"`` chose. It keeps
        the array given to `fit` without a copy where that needed no conversion: do not change it afterwards.
    n_samples_fit_ : int
        Number of training samples.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : (n_features_in_,) array of str
        Names of the features, if X had any.

    See Also
    --------
    knnbench.knn : The search itself.
    sklearn.neighbors.KNeighborsClassifier : The same vote, on trees or by scikit-learn's own search; it does
        not say which of equally distant samples it takes.

    Notes
    -----
    Queries of a wider dtype than the training data are compared in the wider one, and the training data are then
    packed, and kept, in that dtype as well: give uint8 queries to a classifier of uint8 images.

    References
    ----------
    T. M. Cover and P. E. Hart, "Nearest neighbor pattern classification", IEEE Transactions on Information
    Theory 13 (1967), 21-27. S. A. Dudani, "The distance-weighted k-nearest-neighbor rule", IEEE Transactions on
    Systems, Man, and Cybernetics 6 (1976), 325-327, is where votes by distance come from.

    Examples
    --------
    >>> classifier = KNNClassifier(n_neighbors=3, metric="cityblock", backend="numpy")
    >>> classifier.fit([[0.0], [1.0], [2.0], [7.0]], ["near", "near", "far", "far"]).predict([[1.5], [6.0]])
    array(['near', 'far'], dtype='<U4')
    >>> classifier.predict_proba([[6.0]]).round(2)
    array([[0.67, 0.33]])
    """

    def __init__(
        self,
        n_neighbors: int = 3,
        metric: str = "euclidean",
        weights: Weights = "uniform",
        backend: str = "auto",
        accuracy: Accuracy = "fast",
        memory_budget: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.weights = weights
        self.backend = backend
        self.accuracy = accuracy
        self.memory_budget = memory_budget

    def fit(self, X: Any, y: Any) -> Self:
        """Check the training data and prepare them for the backend.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of real numbers, or what is read block by block
            A numpy.memmap, the path of a ``.npy`` file, a Dask array or a list of blocks, as for `knnbench.knn`; if it
            is large beside the memory budget it stays where it is, and each search reads it.
        y : (n_samples,) array_like
            Labels: numbers or strings.

        Returns
        -------
        KNNClassifier
            The estimator itself.

        Raises
        ------
        InvalidInputError
            A parameter out of range, or training data that the metric cannot compare.
        UnknownBackendError, BackendUnavailableError, UnsupportedError
            The named backend does not exist, does not work here, or lacks this metric, dtype or accuracy.
        ValueError
            X or y that scikit-learn's validation refuses: NaN, not two-dimensional, several outputs.
        """
        check_count("n_neighbors", self.n_neighbors)
        check_weights(self.weights)
        check_budget(self.memory_budget)
        stream = as_stream(X, "corpus", as_rows)
        rows = X if stream is None else as_corpus(stream, kept=True)
        if isinstance(rows, Stream):
            y = column_or_1d(y)
            check_consistent_length(np.empty(rows.n_rows or 0), y)
            X, self.n_features_in_ = rows, rows.n_features
            self.classes_, self._codes = classes_and_codes(y)
        else:
            X, self.classes_, self._codes = training_data(self, rows, y)
        self.prepared_ = prepare(X, self.metric, backend=self.backend, accuracy=self.accuracy)
        self.n_samples_fit_ = self.prepared_.shape[0]
        return self

    def kneighbors(self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        """Find the nearest training samples of each query.

        Parameters
        ----------
        X : (n_queries, n_features) array_like of real numbers, or what is read block by block, optional
            Without it the training samples are the queries, and each is left out of its own neighbours;
            a duplicate of it stays.
        n_neighbors : int, optional
            Default: that of the estimator.
        return_distance : bool

        Returns
        -------
        distances : (n_queries, n_neighbors) array
            Ascending; dtype as for `knnbench.knn`. Only if `return_distance`.
        indices : (n_queries, n_neighbors) array of int64
            Training samples; ascending where distances are equal.

        Raises
        ------
        NotFittedError
            Before `fit`.
        InvalidInputError
            A number of neighbours that is not in 1 .. n_samples_fit_, or without X in 1 .. n_samples_fit_ - 1.
        OverBudgetError
            `memory_budget` is too small for a single query.
        ValueError
            X that scikit-learn's validation refuses.

        Examples
        --------
        >>> classifier = KNNClassifier(n_neighbors=1, backend="numpy").fit([[0.0], [0.0], [3.0]], [0, 0, 1])
        >>> classifier.kneighbors([[2.0]])
        (array([[1.]]), array([[2]]))
        >>> classifier.kneighbors(return_distance=False)
        array([[1],
               [0],
               [0]])
        """
        check_is_fitted(self)
        k = check_count("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors)
        distances, indices = self._search(X, k)
        return (distances, indices) if return_distance else indices

    def predict_proba(self, X: Any) -> Array:
        """Return the share of the votes that each class gets.

        Parameters
        ----------
        X : (n_queries, n_features) array_like of real numbers, or None
            None: the training samples, each without its own vote (leave-one-out).

        Returns
        -------
        (n_queries, n_classes) array of float64
            Columns in the order of `classes_`; rows add up to 1.

        Raises
        ------
        NotFittedError, InvalidInputError, OverBudgetError, ValueError
            As for `kneighbors`.
        """
        check_is_fitted(self)
        check_weights(self.weights)
        return self._vote(*self._search(X, check_count("n_neighbors", self.n_neighbors)))

    def predict(self, X: Any) -> Array:
        """Return the label with the largest share of the votes, the smallest label on a tie.

        Parameters
        ----------
        X : (n_queries, n_features) array_like of real numbers, or None
            None: the training samples, each without its own vote (leave-one-out).

        Returns
        -------
        (n_queries,) array
            Of labels.

        Raises
        ------
        NotFittedError, InvalidInputError, OverBudgetError, ValueError
            As for `kneighbors`.
        """
        return self._elect(self.predict_proba(X))

    def score_k(self, X: Any = None, y: Any = None, ks: Iterable[int] = range(1, 12, 2)) -> dict[int, float]:
        """Return the accuracy for many numbers of neighbours, from one search with the largest.

        Each value is what `score` returns with that `n_neighbors`. With ``accuracy="fast"`` on floats this
        holds as far as the search does: rounding may decide which of two nearly equal samples is a neighbour.

        Parameters
        ----------
        X : (n_queries, n_features) array_like of real numbers, optional
            Default: the training samples, each without its own vote (leave-one-out).
        y : (n_queries,) array_like, optional
            True labels; without X the default is those of the training samples.
        ks : iterable of int
            Numbers of neighbours; default the odd ones from 1 to 11.

        Returns
        -------
        dict of int to float
            Accuracy in 0 .. 1 by number of neighbours, in the order of `ks`.

        Raises
        ------
        InvalidInputError
            X without y, or `ks` that are empty or out of range.
        NotFittedError, OverBudgetError, ValueError
            As for `kneighbors`.

        Examples
        --------
        >>> classifier = KNNClassifier(backend="numpy").fit([[0.0], [1.0], [2.0], [9.0], [10.0]], [0, 0, 0, 1, 1])
        >>> classifier.score_k([[1.0], [8.0]], [0, 1], ks=(1, 3, 5))
        {1: 1.0, 3: 1.0, 5: 0.5}
        >>> classifier.score_k(ks=[1])
        {1: 1.0}
        """
        check_is_fitted(self)
        check_weights(self.weights)
        if y is None and X is not None:
            raise InvalidInputError("y is None and X is given; expected the true labels of its rows.")
        try:
            counts = [check_count("ks", k) for k in ks]
        except TypeError:
            raise InvalidInputError(f"ks is {ks!r}; expected numbers of neighbours, such as range(1, 12, 2).") from None
        if not counts:
            raise InvalidInputError("ks is empty; expected numbers of neighbours, such as range(1, 12, 2).")
        distances, indices = self._search(X, max(counts))
        labels = self.classes_[self._codes] if y is None else y
        return {
            k: float(accuracy_score(labels, self._elect(self._vote(distances[:, :k], indices[:, :k])))) for k in counts
        }

    def _search(self, X: Any, k: int) -> tuple[Array, Array]:
        """Return the k nearest training samples of X, or of every training sample without itself."""
        if X is None and k >= self.n_samples_fit_:
            raise InvalidInputError(
                f"n_neighbors={k} asks for too many neighbours: each of the {self.n_samples_fit_} training samples "
                f"has {self.n_samples_fit_ - 1} others; expected n_neighbors < n_samples_fit_."
            )
        if k > self.n_samples_fit_:
            raise InvalidInputError(
                f"n_neighbors={k} asks for more neighbours than the {self.n_samples_fit_} training samples; "
                f"expected n_neighbors <= n_samples_fit_."
            )
        distances, indices = self._neighbors(X, k + 1 if X is None else k)
        return without_self(distances, indices) if X is None else (distances, indices)

    def _neighbors(self, X: Any, k: int) -> tuple[Any, Any]:
        """Return the k nearest training samples of X, or of every training sample with itself."""
        queries = self.prepared_.rows if X is None else as_stream(X, "queries", as_rows)
        if queries is None:
            queries = validate_data(self, X, reset=False)
        return knn(
            queries,
            self.prepared_,
            k,
            memory_budget=self.memory_budget,
            # Of anything else scikit-learn's validation has looked at the values.
            check_finite=isinstance(queries, Stream) or isinstance(self.prepared_.rows, Stream),
        )

    def _vote(self, distances: Array, indices: Array) -> Array:
        """Return the share of each class among the votes of neighbours, shape (n_queries, n_classes)."""
        n_queries, n_classes = len(indices), len(self.classes_)
        ballots = self._codes[indices] + n_classes * np.arange(n_queries)[:, None]
        votes = np.bincount(
            ballots.ravel(), vote_weights(distances, self.weights).ravel(), minlength=n_queries * n_classes
        ).reshape(n_queries, n_classes)
        return np.asarray(votes / votes.sum(axis=1, keepdims=True))

    def _elect(self, shares: Array) -> Array:
        # argmax takes the first of equals, and the classes are sorted.
        return np.asarray(self.classes_[shares.argmax(axis=1)])


def without_self(distances: Array, indices: Array) -> tuple[Array, Array]:
    """Take row i's own index i out of its k + 1 neighbours.

    Parameters
    ----------
    distances : (n, k + 1) array
    indices : (n, k + 1) array of int64

    Returns
    -------
    distances, indices : (n, k) arrays

    Examples
    --------
    Three samples at one place: the last is not even among its own first two neighbours.

    >>> without_self(np.zeros((3, 2)), np.array([[0, 1], [0, 1], [0, 1]]))[1].ravel()
    array([1, 0, 0])
    """
    leave = indices == np.arange(len(indices))[:, None]
    # A sample that is missing has k + 1 others before it in the total order; the last of them is too many.
    leave[~leave.any(axis=1), -1] = True
    return distances[~leave].reshape(len(indices), -1), indices[~leave].reshape(len(indices), -1)


def vote_weights(distances: Array, weights: Weights) -> Array:
    """Return what the vote of each neighbour weighs.

    Parameters
    ----------
    distances : (n_queries, k) array
        Ascending.
    weights : {"uniform", "distance"}

    Returns
    -------
    (n_queries, k) array of float64

    Notes
    -----
    Inverse distances are taken relative to the nearest neighbour, ``d_1 / d_j``: only their ratios matter, and
    unlike ``1 / d_j`` these cannot overflow.

    Examples
    --------
    >>> vote_weights(np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 4.0]]), "distance")
    array([[1.  , 0.5 , 0.25],
           [1.  , 1.  , 0.  ]])
    """
    if weights == "uniform":
        return np.ones(distances.shape)
    # Peers round a distance of 0 to below it, and a distance beyond float32 is infinite: neither has a ratio.
    lengths = np.clip(distances.astype(np.float64), 0.0, np.finfo(np.float64).max)
    relative = (lengths == 0).astype(np.float64)
    return np.asarray(np.divide(lengths[:, :1], lengths, out=relative, where=lengths > 0))


def training_data(estimator: Any, X: Any, y: Any) -> tuple[Array, Array, Array]:
    """Check the arguments of `fit` as scikit-learn does.

    Returns
    -------
    X : (n_samples, n_features) array
        In the dtype given.
    classes : (n_classes,) array
        Sorted labels.
    codes : (n_samples,) array of int64
        Class number of each sample.
    """
    X, y = validate_data(estimator, X, y)
    return X, *classes_and_codes(y)


def classes_and_codes(y: Array) -> tuple[Array, Array]:
    """Return the sorted labels, and the class number of each sample."""
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    return classes, codes.astype(np.int64, copy=False)


def check_weights(weights: Any) -> None:
    """Raise `InvalidInputError` if `weights` is not one of `Weights`."""
    if weights not in get_args(Weights):
        raise InvalidInputError(f"weights is {weights!r}; expected one of: {', '.join(get_args(Weights))}.")
