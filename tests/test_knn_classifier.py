"""KNNClassifier: scikit-learn's conventions, the total order, leave-one-out, votes and `score_k`."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from knnbench import knn
from knnbench.backends import backend_status, registry
from knnbench.classifiers import KNNClassifier
from knnbench.classifiers.knn import vote_weights
from knnbench.errors import (
    InvalidInputError,
    OverBudgetError,
    UnknownBackendError,
    UnsupportedError,
)

WEIGHTS = ("uniform", "distance")
DTYPES = ("uint8", "float32", "float64")

# Definitions of the distances of one query to all rows, in integers or float64.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "euclidean": lambda query, rows: np.sqrt(((rows - query) ** 2).sum(axis=1)),
    "sqeuclidean": lambda query, rows: ((rows - query) ** 2).sum(axis=1),
    "cityblock": lambda query, rows: np.abs(rows - query).sum(axis=1),
    "chebyshev": lambda query, rows: np.abs(rows - query).max(axis=1),
}


def nearest(query: np.ndarray, rows: np.ndarray, metric: str, leave_out: int | None = None) -> list[tuple[float, int]]:
    """All rows in the total order, by definition."""
    distances = DISTANCES[metric](query.astype(np.float64), rows.astype(np.float64))
    return sorted((float(d), j) for j, d in enumerate(distances) if j != leave_out)


def votes(neighbours: list[tuple[float, int]], labels: np.ndarray, weights: str) -> dict[Any, float]:
    """Share of each label among neighbours, by definition."""
    ballots = dict.fromkeys(sorted(set(labels.tolist())), 0.0)
    zeros = [j for d, j in neighbours if d == 0]
    for d, j in neighbours:
        if weights == "uniform":
            ballots[labels[j]] += 1
        elif zeros:
            ballots[labels[j]] += j in zeros
        else:
            ballots[labels[j]] += 1 / d
    total = sum(ballots.values())
    return {label: count / total for label, count in ballots.items()}


def crowd(dtype: str = "float64", n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Few places for many samples: duplicates and equal distances everywhere."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 3, (n, 3)).astype(dtype), generator.integers(0, 3, n)


@parametrize_with_checks(
    [
        KNNClassifier(backend="numpy"),
        KNNClassifier(backend="numpy", weights="distance", metric="cityblock"),
        KNNClassifier(),
    ]
)
def test_is_a_scikit_learn_estimator(estimator: KNNClassifier, check: Callable[[KNNClassifier], None]) -> None:
    check(estimator)


@given(data=st.data(), metric=st.sampled_from(sorted(DISTANCES)), dtype=st.sampled_from(DTYPES))
def test_votes_are_those_of_the_total_order_and_of_scikit_learn(data: st.DataObject, metric: str, dtype: str) -> None:
    n_samples, n_features = data.draw(st.integers(2, 12), "n_samples"), data.draw(st.integers(1, 3), "n_features")
    k = data.draw(st.integers(1, n_samples), "k")
    elements = st.integers(0, 6)
    X = data.draw(hnp.arrays(dtype, (n_samples, n_features), elements=elements), "X")
    queries = data.draw(hnp.arrays(dtype, (3, n_features), elements=elements), "queries")
    y = data.draw(hnp.arrays(np.int64, n_samples, elements=st.integers(0, 2)), "y")
    for weights in WEIGHTS:
        ours = KNNClassifier(k, metric, weights, backend="numpy").fit(X, y)
        shares = ours.predict_proba(queries)
        expected = [votes(nearest(query, X, metric)[:k], y, weights) for query in queries]
        np.testing.assert_allclose(shares, [list(row.values()) for row in expected], rtol=1e-6)
        if weights == "uniform":
            predicted = [max(row, key=lambda label, row=row: (row[label], -label)) for row in expected]
            assert ours.predict(queries).tolist() == predicted
        # Where the k-th and the next sample are equally distant, scikit-learn takes either.
        ordered = [nearest(query, X, metric) for query in queries]
        settled = [i for i, row in enumerate(ordered) if k == n_samples or row[k - 1][0] < row[k][0]]
        if settled:
            theirs = KNeighborsClassifier(k, metric=metric, weights=weights, algorithm="brute").fit(X, y)
            np.testing.assert_allclose(shares[settled], theirs.predict_proba(queries[settled]), rtol=1e-6)
            if weights == "uniform":
                np.testing.assert_array_equal(ours.predict(queries[settled]), theirs.predict(queries[settled]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_scikit_learn_where_no_distances_tie(own_backend: str, dtype: str) -> None:
    generator = np.random.default_rng(0)
    X, queries = (generator.integers(0, 256, (n, 12)).astype(dtype) for n in (60, 9))
    y = generator.integers(0, 4, 60)
    assert all(np.diff([d for d, _ in nearest(query, X, "euclidean")[:6]]).all() for query in queries)
    for weights in WEIGHTS:
        ours = KNNClassifier(5, weights=weights, backend=own_backend).fit(X, y)
        theirs = KNeighborsClassifier(5, weights=weights, algorithm="brute").fit(X.astype(float), y)
        np.testing.assert_array_equal(ours.predict(queries), theirs.predict(queries.astype(float)))
        np.testing.assert_allclose(ours.predict_proba(queries), theirs.predict_proba(queries.astype(float)), rtol=1e-5)


def test_accuracy_on_digits() -> None:
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8)
    for metric in ("euclidean", "cityblock", "cosine"):
        classifier = KNNClassifier(3, metric, backend="numpy").fit(images[:1200], labels[:1200])
        theirs = KNeighborsClassifier(3, metric=metric, algorithm="brute").fit(
            images[:1200].astype(float), labels[:1200]
        )
        score = classifier.score(images[1200:], labels[1200:])
        assert score > 0.94
        assert abs(score - theirs.score(images[1200:].astype(float), labels[1200:])) < 0.005


def test_a_tied_vote_goes_to_the_smallest_label() -> None:
    X = [[0.0], [1.0], [2.0], [3.0]]
    classifier = KNNClassifier(4, backend="numpy").fit(X, ["pear", "apple", "pear", "apple"])
    assert classifier.classes_.tolist() == ["apple", "pear"]
    assert classifier.predict([[0.0]]).tolist() == ["apple"]
    by_distance = KNNClassifier(2, weights="distance", backend="numpy").fit([[0.0], [2.0]], [7, 3])
    assert by_distance.predict([[1.0]]).tolist() == [3]


def test_of_equally_distant_samples_the_first_counts(own_backend: str) -> None:
    X, y = np.array([[2], [0], [2], [0]], np.uint8), [0, 1, 2, 3]
    classifier = KNNClassifier(1, backend=own_backend).fit(X, y)
    assert classifier.predict(np.array([[1], [2], [0]], np.uint8)).tolist() == [0, 0, 1]
    assert classifier.kneighbors(np.array([[1]], np.uint8), 4, return_distance=False).tolist() == [[0, 1, 2, 3]]


def test_only_samples_at_distance_zero_vote_where_there_are_any() -> None:
    X, y = [[0.0], [0.0], [0.0], [1e-300], [5.0]], [1, 0, 1, 0, 0]
    classifier = KNNClassifier(5, weights="distance", metric="cityblock", backend="numpy").fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba([[0.0]]), [[1 / 3, 2 / 3]])


def test_weights_of_extreme_distances_are_finite() -> None:
    tiny = np.nextafter(0.0, 1.0)
    np.testing.assert_array_equal(vote_weights(np.array([[tiny, 2 * tiny, 1.0]]), "distance"), [[1.0, 0.5, tiny]])
    infinite = np.array([[np.inf, np.inf], [1.0, np.inf]], np.float32)
    weights = vote_weights(infinite, "distance")
    np.testing.assert_allclose(weights, [[1.0, 1.0], [1.0, 0.0]], atol=1e-300)
    np.testing.assert_array_equal(vote_weights(np.array([[-1e-17, 0.0, 1.0]]), "distance"), [[1.0, 1.0, 0.0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 7, 39])
def test_training_samples_are_left_out_of_their_own_neighbours(own_backend: str, dtype: str, k: int) -> None:
    X, y = crowd(dtype)
    distances, indices = KNNClassifier(k, "cityblock", backend=own_backend).fit(X, y).kneighbors()
    expected = [nearest(row, X, "cityblock", leave_out=i)[:k] for i, row in enumerate(X)]
    assert indices.dtype == np.int64
    assert indices.tolist() == [[j for _, j in row] for row in expected]
    assert distances.tolist() == [[d for d, _ in row] for row in expected]


def test_leaving_out_survives_more_duplicates_than_neighbours() -> None:
    classifier = KNNClassifier(2, backend="numpy").fit(np.zeros((6, 2)), np.arange(6))
    assert classifier.kneighbors(return_distance=False).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_predicting_none_is_leave_one_out(weights: str) -> None:
    X, y = crowd(n=30)
    classifier = KNNClassifier(3, weights=weights, backend="numpy").fit(X, y)
    loo = cross_val_score(clone(classifier), X, y, cv=LeaveOneOut())
    np.testing.assert_array_equal(classifier.predict(None) == y, loo == 1)
    assert classifier.score(None, y) == pytest.approx(loo.mean())
    assert classifier.predict_proba(None).shape == (30, 3)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_k_is_score_with_each_k(weights: str, metric: str, dtype: str) -> None:
    X, y = crowd(dtype, 60)
    X += 1  # no rows of zeros, for cosine
    X, y, queries, truth = X[:45], y[:45], X[45:], y[45:]
    ks = [7, 1, 2, 45, 3]
    classifier = KNNClassifier(metric=metric, weights=weights, backend="numpy").fit(X, y)
    scores = classifier.score_k(queries, truth, ks)
    assert list(scores) == ks
    assert scores == {k: clone(classifier).set_params(n_neighbors=k).fit(X, y).score(queries, truth) for k in ks}
    ks = [5, 44, 1]
    scores = classifier.score_k(ks=ks)
    assert scores == {k: classifier.set_params(n_neighbors=k).score(None, y) for k in ks}


def test_score_k_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(queries: Any, corpus: Any, k: int, **options: Any) -> Any:
        asked.append(k)
        return knn(queries, corpus, k, **options)

    monkeypatch.setattr("knnbench.classifiers.knn.knn", counted)
    X, y = crowd()
    classifier = KNNClassifier(backend="numpy").fit(X, y)
    assert list(classifier.score_k(X, y)) == [1, 3, 5, 7, 9, 11]
    assert list(classifier.score_k(ks=np.array([2, 9]))) == [2, 9]
    assert asked == [11, 10]


def test_score_k_takes_labels_without_queries() -> None:
    X, y = crowd()
    classifier = KNNClassifier(1, backend="numpy").fit(X, y)
    assert classifier.score_k(None, 1 - y, [1]) == {1: classifier.score(None, 1 - y)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ks": []}, "ks is empty"),
        ({"ks": 3}, "ks is 3; expected numbers of neighbours"),
        ({"ks": [1, 0]}, "ks is 0; expected a whole number"),
        ({"ks": [1, 2.0]}, "ks is 2.0; expected a whole number"),
        ({"ks": [1, 40]}, "each of the 40 training samples has 39 others"),
        ({"X": np.zeros((2, 3)), "ks": [1]}, "y is None"),
        ({"X": np.zeros((2, 3)), "y": [0, 1], "ks": [1, 41]}, "n_neighbors=41 .* the 40 training samples"),
    ],
)
def test_score_k_refuses(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        KNNClassifier(backend="numpy").fit(*crowd()).score_k(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_keep_their_dtype_and_are_not_copied_or_changed(dtype: str) -> None:
    X, y = crowd(dtype)
    before = X.copy()
    X.flags.writeable = False
    classifier = KNNClassifier(metric="cityblock", backend="numpy").fit(X, y)
    assert classifier.prepared_.dtype == X.dtype
    assert np.shares_memory(classifier.prepared_.rows, X)
    distances, _ = classifier.kneighbors(X)
    assert distances.dtype == (np.int32 if dtype == "uint8" else X.dtype)
    np.testing.assert_array_equal(X, before)


def test_queries_of_another_dtype() -> None:
    X, y = crowd("uint8")
    classifier = KNNClassifier(backend="numpy").fit(X, y)
    for dtype in ("float16", "float32", "float64", "int64", "bool", ">f8"):
        queries = (X[:5] > 0).astype(dtype)
        assert classifier.predict(queries).tolist() == classifier.predict((X[:5] > 0).astype(np.uint8)).tolist()
    assert classifier.prepared_.dtype == np.uint8


@pytest.mark.parametrize("labels", [["b", "a", "c"], [True, False, True], [-1, 5, 2], [1.0, 0.0, 3.0]])
def test_labels_come_back_in_their_dtype(labels: list[Any]) -> None:
    X, y = [[0.0], [5.0], [9.0]], np.array(labels)
    classifier = KNNClassifier(1, backend="numpy").fit(X, y)
    predicted = classifier.predict(X)
    assert predicted.dtype == y.dtype
    assert predicted.tolist() == labels
    np.testing.assert_array_equal(classifier.classes_, np.unique(y))


def test_one_class_and_one_sample() -> None:
    classifier = KNNClassifier(1, backend="numpy").fit([[1.0, 2.0]], ["only"])
    assert classifier.predict([[0.0, 0.0]]).tolist() == ["only"]
    assert classifier.predict_proba([[0.0, 0.0]]).tolist() == [[1.0]]
    assert (classifier.n_samples_fit_, classifier.n_features_in_) == (1, 2)
    with pytest.raises(InvalidInputError, match="each of the 1 training samples has 0 others"):
        classifier.kneighbors()


def test_works_in_scikit_learns_tools() -> None:
    X, y = load_digits(n_class=4, return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), KNNClassifier(backend="numpy"))
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.95
    grid = {"knnclassifier__n_neighbors": np.arange(1, 4), "knnclassifier__metric": ["l1", "l2"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    assert search.best_score_ > 0.95
    assert search.predict(X[:3]).shape == (3,)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_clone_and_pickle(own_backend: str, weights: str) -> None:
    X, y = crowd("float32")
    classifier = KNNClassifier(5, "l1", weights, own_backend)
    assert clone(classifier).get_params() == classifier.get_params()
    assert pickle.loads(pickle.dumps(classifier)).get_params() == classifier.get_params()
    classifier.fit(X, y)
    before_use = pickle.loads(pickle.dumps(classifier))
    expected = classifier.predict_proba(X)
    after_use = pickle.loads(pickle.dumps(classifier))
    for restored in (before_use, after_use):
        np.testing.assert_array_equal(restored.predict_proba(X), expected)
        assert restored.prepared_.backend == own_backend
    with pytest.raises(NotFittedError):
        clone(classifier).predict(X)


def test_parameters_of_the_call_may_change_after_fit() -> None:
    X, y = crowd()
    classifier = KNNClassifier(1, backend="numpy").fit(X, y)
    for params in ({"n_neighbors": 4}, {"weights": "distance"}):
        changed = classifier.set_params(**params).predict_proba(X)
        np.testing.assert_array_equal(changed, clone(classifier).fit(X, y).predict_proba(X))


def test_memory_budget_reaches_each_search() -> None:
    X, y = crowd()
    classifier = KNNClassifier(backend="numpy").fit(X, y)
    expected = classifier.predict(X)
    np.testing.assert_array_equal(classifier.set_params(memory_budget=20_000).predict(X), expected)
    classifier.set_params(memory_budget=8)
    for call in (classifier.predict, classifier.predict_proba, classifier.kneighbors):
        with pytest.raises(OverBudgetError):
            call(X)


def test_exact_accuracy_on_images() -> None:
    X, y = crowd("uint8")
    exact, fast = (KNNClassifier(backend="numpy", accuracy=level).fit(X, y) for level in ("exact", "fast"))
    np.testing.assert_array_equal(exact.predict(X), fast.predict(X))
    np.testing.assert_array_equal(exact.predict(X.astype(np.float64)), fast.predict(X))


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"n_neighbors": 0}, "n_neighbors is 0; expected a whole number of at least 1"),
        ({"n_neighbors": 2.5}, "n_neighbors is 2.5"),
        ({"n_neighbors": True}, "n_neighbors is True"),
        ({"n_neighbors": None}, "n_neighbors is None"),
        ({"weights": "inverse"}, "weights is 'inverse'; expected one of: uniform, distance"),
        ({"weights": None}, "weights is None"),
        ({"metric": "minkowski"}, "metric 'minkowski' is unknown"),
        ({"accuracy": "best"}, "accuracy is 'best'"),
        ({"memory_budget": 0}, "memory_budget is 0"),
    ],
)
def test_parameters_out_of_range_are_refused_in_fit(params: dict[str, Any], text: str) -> None:
    classifier = KNNClassifier(backend="numpy").set_params(**params)
    with pytest.raises(InvalidInputError, match=text):
        classifier.fit(*crowd())


def test_backends_that_do_not_exist_or_suffice_are_refused_in_fit() -> None:
    with pytest.raises(UnknownBackendError, match="backend 'abacus' is unknown"):
        KNNClassifier(backend="abacus").fit(*crowd())
    lacking = next((s for s in map(backend_status, registry()) if s.ok and not s.capabilities.total_order), None)
    if lacking is not None:
        with pytest.raises(UnsupportedError, match="lacks accuracy='exact'"):
            KNNClassifier(backend=lacking.name, accuracy="exact").fit(*crowd("uint8"))


def test_more_neighbours_than_samples_are_refused_when_asked_for() -> None:
    X, y = crowd()
    classifier = KNNClassifier(41, backend="numpy").fit(X, y)
    for call in (classifier.predict, classifier.predict_proba, classifier.kneighbors):
        with pytest.raises(InvalidInputError, match="n_neighbors=41 asks for more neighbours than the 40 training"):
            call(X)
    assert classifier.kneighbors(X, 40, return_distance=False).shape == (40, 40)
    with pytest.raises(InvalidInputError, match="expected n_neighbors < n_samples_fit_"):
        classifier.kneighbors(n_neighbors=40)
    with pytest.raises(InvalidInputError, match="n_neighbors is 0"):
        classifier.kneighbors(X, 0)


def test_several_outputs_are_refused() -> None:
    X, y = crowd()
    with pytest.raises(ValueError, match=r"y should be a 1d array, got an array of shape \(40, 2\) instead"):
        KNNClassifier(backend="numpy").fit(X, np.column_stack([y, y]))


def test_rows_without_direction_are_refused_by_cosine() -> None:
    X, y = np.array([[1.0, 0.0], [0.0, 0.0]]), [0, 1]
    with pytest.raises(InvalidInputError, match="corpus row 1 is all zeros"):
        KNNClassifier(1, "cosine", backend="numpy").fit(X, y)
    with pytest.raises(InvalidInputError, match="queries row 1 is all zeros"):
        KNNClassifier(1, "cosine", backend="numpy").fit(X[:1], y[:1]).predict(X)
