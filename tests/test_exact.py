"""accuracy="exact" on floats: the neighbours of exact arithmetic, against whole numbers."""

import dataclasses
import functools
import itertools
import math
import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnbench import METRICS, KNNClassifier, bounds, exact, fastest_backend, knn, prepare, underflow
from knnbench.api import Neighbors, finish_ranked, search_block
from knnbench.backends import base, get_backend
from knnbench.backends.base import Candidates
from knnbench.errors import InvalidInputError, OverBudgetError, UnsupportedError
from knnbench.exact_values import Values, whole_values
from knnbench.metrics import Space
from knnbench.ordering import merge_topk

from .conftest import available
from .exact_cases import FLOATS, KINDS, data, exact_distance, exact_neighbors, exact_values, rounded

BACKENDS = ("numpy", "numba", "torch")


def assert_exact(found, queries, corpus, k, metric):
    """Require the neighbours of exact arithmetic, and their distances, rounded."""
    expected = exact_neighbors(queries, corpus, k, metric)
    wrong = found.indices != expected
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.size} neighbours are wrong: {found.certificate}"
    for q, distances, indices in zip(queries, found.distances, found.indices, strict=True):
        for distance, index in zip(distances, indices, strict=True):
            assert distance == rounded(exact_distance(q, corpus[index], metric), distance.dtype), index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_those_of_exact_arithmetic(kind, dtype, metric, compared_backend, rng):
    queries, corpus = data(kind, dtype, 5, 90, 11, rng)
    for k in (1, 6):
        found = knn(queries, corpus, k, metric, backend=compared_backend, accuracy="exact")
        assert found.distances.dtype == dtype
        assert_exact(found, queries, corpus, k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_backend_is_certified_too(metric, rng):
    queries, corpus = data("near", "float32", 3, 40, 5, rng)
    assert_exact(knn(queries, corpus, 4, metric, backend="python", accuracy="exact"), queries, corpus, 4, metric)


@pytest.mark.parametrize("n_features", [1, 2, 7, 8, 9, 33, 100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_odd_sizes(n_features, dtype, compared_backend, rng):
    for metric in METRICS:
        queries, corpus = data("few values" if n_features < 9 else "near", dtype, 3, 41, n_features, rng)
        for k in (1, 40, 41):
            found = knn(queries, corpus, k, metric, backend=compared_backend, accuracy="exact")
            assert_exact(found, queries, corpus, k, metric)
    one = knn(corpus[:1], corpus[:1], 1, backend=compared_backend, accuracy="exact")
    assert (one.indices.tolist(), one.distances.tolist()) == ([[0]], [[0.0]])


@given(st.data())
def test_any_floats(draw):
    dtype = draw.draw(st.sampled_from(FLOATS))
    n_features, n_rows = draw.draw(st.integers(1, 4)), draw.draw(st.integers(2, 14))
    width = 32 if dtype == "float32" else 64
    number = st.floats(allow_nan=False, allow_infinity=False, width=width) | st.sampled_from([0.0, 1.0, -1.0, 3.0])
    rows = np.array(draw.draw(st.lists(number, min_size=n_features * n_rows, max_size=n_features * n_rows)), dtype)
    rows = rows.reshape(n_rows, n_features)
    metric = draw.draw(st.sampled_from([name for name in METRICS if rows.any(axis=1).all() or name != "cosine"]))
    k = draw.draw(st.integers(1, n_rows - 1))
    backend = draw.draw(st.sampled_from(["numpy", "numba"]))
    found = knn(rows[:1], rows[1:], k, metric, backend=backend, accuracy="exact")
    assert_exact(found, rows[:1], rows[1:], k, metric)


def on_a_grid(dtype, n_queries, n_corpus, n_features, bits, rng):
    """Return rows of whole numbers with many ties, and as floats that use all digits of the dtype."""
    whole = rng.integers(0, 1 << bits, (n_queries + n_corpus, n_features))
    whole[::3] = whole[rng.integers(0, len(whole), len(whole[::3]))]
    whole[1::4] ^= 1
    whole += 1
    rows = np.ldexp(whole.astype(dtype), -7)
    return whole[:n_queries], whole[n_queries:], rows[:n_queries], rows[n_queries:]


def wholly_nearest(queries, corpus, k, metric):
    """Return the k nearest of rows of integers whose values int64 holds."""
    if metric == "cosine":
        dots = queries @ corpus.T
        # Quotients of whole numbers this small differ by more than a rounding, if they differ.
        values = -(dots * np.abs(dots) / (corpus**2).sum(axis=1))
    else:
        differences = np.abs(queries[:, None] - corpus[None])
        values = {
            "cityblock": lambda: differences.sum(axis=2),
            "chebyshev": lambda: differences.max(axis=2),
        }.get(metric, lambda: (differences**2).sum(axis=2))()
    return np.argsort(values, axis=1, kind="stable")[:, :k]


BITS = {"float32": 24, "float64": 29}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_in_the_thousands(metric, dtype, compared_backend, rng):
    q, c, queries, corpus = on_a_grid(dtype, 12, 3000, 6, 1, rng)
    found = knn(queries, corpus, 50, metric, backend=compared_backend, accuracy="exact")
    np.testing.assert_array_equal(found.indices, wholly_nearest(q, c, 50, metric))
    if metric not in ("cosine", "chebyshev"):
        assert found.certificate.searched_again > 0  # or this would not be the case to test


def rounded_alike(dtype, bits):
    """Return queries, and rows whose largest difference is 1 less a multiple of ``2**-bits``, which `dtype` rounds."""
    n_corpus, n_features = 500, 70
    rows = np.zeros((n_corpus, n_features), dtype)
    rows[:, 3] = rows[:, 40] = np.ldexp(np.arange(n_corpus) % 100, -bits).astype(dtype)
    rows[::7, 60] = 1
    queries = np.zeros((9, n_features), dtype)
    queries[:, [3, 40]] = 1
    return queries, rows


@pytest.mark.parametrize(("dtype", "bits", "again"), [("float32", 40, 0), ("float32", 70, 9), ("float64", 70, 9)])
def test_largest_differences_that_rounding_makes_equal(dtype, bits, again):
    queries, corpus = rounded_alike(dtype, bits)
    for k in (1, 30):
        found = knn(queries, corpus, k, "chebyshev", backend="numba", accuracy="exact")
        assert_exact(found, queries, corpus, k, "chebyshev")
        assert found.certificate.searched_again == again


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_million_neighbours(metric, dtype, compared_backend, rng):
    for bits in (1, 4) if metric == "cosine" else (1, 4, 12, BITS[dtype]):
        n_features = 3 if bits == BITS[dtype] else 4
        q, c, queries, corpus = on_a_grid(dtype, 2000, 500, n_features, bits, rng)
        found = knn(queries, corpus, 30, metric, backend=compared_backend, accuracy="exact")
        for rows in np.array_split(np.arange(len(q)), 20):
            np.testing.assert_array_equal(found.indices[rows], wholly_nearest(q[rows], c, 30, metric))


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_rows_in_the_thousands(dtype, compared_backend, rng):
    corpus = np.repeat(rng.normal(size=(2, 40)).astype(dtype), 3000, axis=0)
    order = rng.permutation(len(corpus))
    corpus = corpus[order]
    queries = corpus[:4] + rng.normal(size=(4, 40)).astype(dtype) / 9
    for metric in METRICS:
        found = knn(queries, corpus, 9, metric, backend=compared_backend, accuracy="exact")
        expected = [np.nonzero((corpus == corpus[i]).all(axis=1))[0][:9] for i in range(4)]
        np.testing.assert_array_equal(found.indices, expected)


def test_the_answer_does_not_depend_on_blocks_threads_or_the_backend(compared_backend, rng, monkeypatch):
    queries, corpus = data("near", "float32", 40, 300, 20, rng)
    expected = knn(queries, corpus, 5, backend="python", accuracy="exact")
    for budget, threads in ((None, "1"), (100_000, "2"), (1 << 20, "3")):
        monkeypatch.setenv("KNNBENCH_THREADS", threads)
        found = knn(queries, corpus, 5, backend=compared_backend, accuracy="exact", memory_budget=budget)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.distances, expected.distances)


@pytest.mark.parametrize("kind", ["equal", "few values", "near"])
def test_the_budget_holds(kind, rng):
    queries, corpus = data(kind, "float32", 60, 20_000, 8, rng)
    knn(queries[:1], corpus, 3, backend="numba", accuracy="exact")  # compiles
    budget = 16 << 20
    tracemalloc.start()
    try:
        found = knn(queries, corpus, 3, backend="numba", accuracy="exact", memory_budget=budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < budget + sum(array.nbytes for array in found)
    assert found.certificate.searched_again > 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_the_budget_holds_where_a_query_ties_with_all_rows(n_queries, metric, rng):
    queries, corpus = permuted("float32", rng, 20_000, 7)
    queries, budget = queries[:n_queries], 4 << 20
    knn(queries, corpus[:20], 3, metric, backend="numba", accuracy="exact")  # compiles
    tracemalloc.start()
    try:
        found = knn(queries, corpus, 3, metric, backend="numba", accuracy="exact", memory_budget=budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < budget
    assert found.indices.tolist() == [[0, 1, 2]] * n_queries
    assert found.certificate.searched_again == n_queries


def test_a_budget_that_holds_nothing_is_refused(rng):
    queries, corpus = data("normal", "float32", 4, 50, 3, rng)
    with pytest.raises(OverBudgetError):
        knn(queries, corpus, 5, backend="numpy", accuracy="exact", memory_budget=100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_kind(backend, rng):
    rows = rng.integers(1, 200, (60, 7))
    plain = rows.astype(np.float32)
    read_only = plain.copy()
    read_only.flags.writeable = False
    expected = knn(plain[:9], plain, 4, "cityblock", backend=backend, accuracy="exact")
    for queries, corpus in (
        (plain[:9], rows.astype(np.uint8)),
        (rows[:9].astype(np.uint8), plain),
        (np.asfortranarray(plain[:9]), plain.astype(">f4")),
        (plain[:9].tolist(), np.repeat(plain, 2, axis=1)[:, ::2]),
        (rows[:9], read_only),
        (plain[:9].astype(np.float16), plain.astype(np.float64)),
    ):
        found = knn(queries, corpus, 4, "cityblock", backend=backend, accuracy="exact")
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_a_prepared_corpus_keeps_its_accuracy(own_backend, rng):
    queries, corpus = data("near", "float32", 4, 50, 6, rng)
    prepared = prepare(corpus, backend=own_backend, accuracy="exact")
    found = knn(queries, prepared, 3)
    assert found.certificate.filter.startswith("float32 ")
    assert_exact(found, queries, corpus, 3, "euclidean")
    assert_exact(knn(queries.astype(np.float64), prepared, 3), queries, corpus, 3, "euclidean")
    assert knn(queries, prepared, 3, accuracy="fast").certificate is None


def test_the_certificate_tells_how_an_answer_was_proved(rng):
    queries, corpus = data("normal", "float32", 20, 500, 16, rng)
    found = knn(queries, corpus, 3, backend="numpy", accuracy="exact")
    distances, indices = found
    certificate = found.certificate
    assert (distances.shape, indices.shape) == ((20, 3), (20, 3))
    assert certificate == exact.Certificate("float32 products", 3 + base.SPARE, certificate.bound)
    assert 0 < certificate.bound < 1e-3
    copy = pickle.loads(pickle.dumps(found))
    assert copy.certificate == certificate
    integers = corpus.astype(np.uint8)
    assert knn(integers, integers, 2, backend="numpy", accuracy="exact").certificate == exact.Certificate("integers", 2)
    assert knn(queries, corpus, 3, backend="numpy").certificate is None


def test_each_step_is_taken_where_it_is_needed(rng):
    near = data("near", "float64", 6, 200, 12, rng)
    certificate = knn(*near, 3, backend="numpy", accuracy="exact").certificate
    assert certificate.settled > 0
    apart = data("far apart", "float32", 6, 200, 12, rng)
    certificate = knn(*apart, 3, backend="numpy", accuracy="exact").certificate
    assert (certificate.searched_again, certificate.settled) == (6, 0)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock", "chebyshev"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["small", "tiny", "big", "huge"])
def test_rows_out_of_range_are_scaled_and_not_searched_again(kind, dtype, metric, compared_backend, rng):
    queries, corpus = data(kind, dtype, 6, 200, 12, rng)
    found = knn(queries, corpus, 3, metric, backend=compared_backend, accuracy="exact")
    assert found.certificate.searched_again == 0
    assert_exact(found, queries, corpus, 3, metric)
    corpus[-1], corpus[-2, 0] = 1.0, np.finfo(dtype).smallest_subnormal  # which no sample shows, and no scale fits
    found = knn(queries, corpus, 3, metric, backend=compared_backend, accuracy="exact")
    assert_exact(found, queries, corpus, 3, metric)


def test_auto_and_the_choice_give_it(rng):
    queries, corpus = data("far", "float32", 4, 60, 5, rng)
    found = knn(queries, corpus, 2, accuracy="exact")
    assert found.certificate is not None
    assert_exact(found, queries, corpus, 2, "euclidean")
    choice = fastest_backend(
        n_queries=4, n_corpus=60, n_features=5, k=2, accuracy="exact", max_error=1e-6, effort="estimate",
        candidates=["numpy", "numba", "scipy"],
    )  # fmt: skip
    assert choice.backend in ("numpy", "numba")
    assert "lacks accuracy='exact' for float32" in choice.passed_over["scipy"]


def test_the_classifier_has_it(rng):
    X = data("near", "float32", 0, 60, 5, rng)[1]
    classifier = KNNClassifier(3, accuracy="exact", backend="numpy").fit(X, np.arange(60) % 2)
    np.testing.assert_array_equal(classifier.kneighbors(X[:5])[1], exact_neighbors(X[:5], X, 3, "euclidean"))


def test_nan_has_no_exact_neighbours():
    rows = np.array([[1.0, np.nan], [2.0, 3.0]])
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        knn(rows, rows, 1, backend="numpy", accuracy="exact", check_finite=False)


@pytest.fixture
def flushing():
    """Let this thread take subnormal numbers as zero, as some libraries do."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_processor_that_flushes_subnormals_is_set_right(metric, dtype, compared_backend, flushing, rng):
    with underflow.gradual_underflow() as was_flushed:
        queries, corpus = data("subnormal", dtype, 4, 60, 5, rng)
        small = float(np.finfo(dtype).tiny) * 8
        queries[:, 0], corpus[:, 0] = small, small  # rows that are not all flushed: those are refused as zeros
    assert was_flushed
    found = knn(queries, corpus, 5, metric, backend=compared_backend, accuracy="exact")
    assert underflow.flushes_subnormals()
    with underflow.gradual_underflow():
        assert_exact(found, queries, corpus, 5, metric)


def test_a_processor_that_cannot_be_set_right_is_refused(flushing, monkeypatch):
    monkeypatch.setattr(underflow, "_library", lambda: None)
    rows = np.ones((3, 2))
    with pytest.raises(UnsupportedError, match="set_flush_denormal"):
        knn(rows, rows, 1, backend="numpy", accuracy="exact")


@pytest.mark.parametrize("peer", ["scipy", "sklearn", "faiss"])
def test_a_backend_that_declares_nothing_is_refused(peer, rng):
    queries, corpus = data("normal", "float32", 2, 9, 3, rng)
    for call in (
        lambda: knn(queries, corpus, 1, backend=available(peer), accuracy="exact"),
        lambda: prepare(corpus, backend=available(peer), accuracy="exact"),
    ):
        with pytest.raises(UnsupportedError, match="lacks accuracy='exact' for float32"):
            call()


# In blocks: lists of exact values.


def in_blocks(queries, corpus, k, metric, cuts, backend="numba"):
    """Return the lists of blocks of the corpus, each with its first row."""
    bounds = [0, *cuts, len(corpus)]
    return [
        search_block(queries, corpus[a:b], k, a, metric, backend=backend, accuracy="exact")
        for a, b in itertools.pairwise(bounds)
    ]


def finished(ranked, indices, corpus, metric):
    space = corpus.dtype, corpus.shape[1]
    return Neighbors(finish_ranked(ranked, metric, *space, "numba", "exact"), indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_the_same_bits(kind, dtype, metric, rng):
    queries, corpus = data(kind, dtype, 5, 90, 11, rng)
    expected = knn(queries, corpus, 6, metric, backend="numba", accuracy="exact")
    assert_exact(expected, queries, corpus, 6, metric)
    lists = in_blocks(queries, corpus, 6, metric, (1, 5, 30, 31, 60, 80))
    lists += in_blocks(queries, corpus, 6, metric, (40, 77), "numpy")  # others, and some that lap over
    lists = [lists[place] for place in rng.permutation(len(lists))]
    merged = functools.reduce(lambda first, second: merge_topk(first, second, 6), lists)
    found = finished(*merged, corpus, metric)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.distances, expected.distances)
    streamed = knn(queries, iter([corpus[:9], corpus[9:]]), 6, metric, backend="numba", accuracy="exact")
    np.testing.assert_array_equal(streamed.indices, expected.indices)
    np.testing.assert_array_equal(streamed.distances, expected.distances)


@given(st.data())
def test_any_order_any_duplicates_and_any_tree_of_blocks(draw):
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32)))
    kind, dtype = draw.draw(st.sampled_from(list(KINDS))), draw.draw(st.sampled_from(FLOATS))
    metric, n_corpus = draw.draw(st.sampled_from(list(METRICS))), draw.draw(st.integers(1, 30))
    k = draw.draw(st.integers(1, n_corpus))
    queries, corpus = data(kind, dtype, 2, n_corpus, 3, rng)
    cuts = sorted(draw.draw(st.sets(st.integers(1, n_corpus - 1), max_size=6))) if n_corpus > 1 else []
    lists = in_blocks(queries, corpus, k, metric, cuts)
    lists += draw.draw(st.lists(st.sampled_from(lists), max_size=3))
    while len(lists) > 1:
        first, second = (lists.pop(draw.draw(st.integers(0, len(lists) - 1))) for _ in range(2))
        lists.append(merge_topk(first, second, k))
    ((ranked, indices),) = lists
    assert_exact(finished(ranked[:, :k], indices[:, :k], corpus, metric), queries, corpus, k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_values_that_only_the_last_digits_tell_apart(metric, rng, monkeypatch):
    queries, corpus = rng.normal(size=(6, 9)), data("near", "float64", 0, 60, 9, rng)[1]
    cuts = (20, 40)
    merge = functools.partial(functools.reduce, lambda first, second: merge_topk(first, second, 9))
    assert_exact(
        finished(*merge(in_blocks(queries, corpus, 9, metric, cuts)), corpus, metric), queries, corpus, 9, metric
    )
    cut = Values._strings  # a string that is cut is noticed
    digits = 12 if metric == "cosine" else 8
    monkeypatch.setattr(Values, "_strings", lambda self, i, j: cut(self, i, j).astype(f"S{digits}"))
    indices = merge(in_blocks(queries, corpus, 9, metric, cuts))[1]
    assert (indices != exact_neighbors(queries, corpus, 9, metric)).any()


def test_the_certificate_of_blocks_is_that_of_all(rng):
    queries, corpus = data("near", "float32", 400, 90, 5, rng)
    blocks = [corpus[:30], corpus[30:]]
    parts = [knn(queries, block, 3, backend="numpy", accuracy="exact").certificate for block in blocks]
    found = knn(queries, iter(blocks), 3, backend="numpy", accuracy="exact").certificate
    assert found == exact.joined([(part, 1.0) for part in parts])
    assert found.candidates == sum(part.candidates for part in parts)
    in_groups = knn([queries[:200], queries[200:]], corpus, 3, backend="numpy", accuracy="exact", memory_budget=60_000)
    whole = knn(queries, corpus, 3, backend="numpy", accuracy="exact").certificate
    assert (in_groups.certificate.filter, in_groups.certificate.settled) == (whole.filter, whole.settled)


# Faults, planted: each must be noticed, by the search or by the tests above.


def planted(monkeypatch, backend, change):
    """Let a backend's candidates be changed."""
    engine = get_backend(backend)
    original = type(engine).candidates
    monkeypatch.setattr(type(engine), "candidates", lambda self, *given: change(original(self, *given)))


def without_nearest(found):
    """Return candidates of which the first is another row, and the floor as it was: a filter that is wrong."""
    indices = found.indices.copy()
    for row in indices:
        row[0] = next(j for j in range(1000) if j not in row)
    return dataclasses.replace(found, indices=indices)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_filter_that_drops_a_candidate_is_noticed(backend, monkeypatch, rng):
    queries, corpus = data("normal", "float32", 6, 200, 16, rng)
    planted(monkeypatch, backend, without_nearest)
    with pytest.raises(AssertionError, match="neighbours are wrong"):
        assert_exact(knn(queries, corpus, 3, backend=backend, accuracy="exact"), queries, corpus, 3, "euclidean")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_filter_that_proves_less_costs_only_time(backend, monkeypatch, rng):
    queries, corpus = data("normal", "float32", 6, 200, 16, rng)

    def proves_nothing(found: Candidates):
        return dataclasses.replace(without_nearest(found), floor=np.full(len(found.floor), -np.inf))

    planted(monkeypatch, backend, proves_nothing)
    found = knn(queries, corpus, 3, backend=backend, accuracy="exact")
    assert found.certificate.searched_again == 6
    assert_exact(found, queries, corpus, 3, "euclidean")


def test_a_doubt_that_is_not_told_is_noticed(monkeypatch):
    queries, corpus = rounded_alike("float32", 70)
    planted(monkeypatch, "numba", lambda found: dataclasses.replace(found, is_sure=np.ones(len(queries), bool)))
    with pytest.raises(AssertionError, match="neighbours are wrong"):
        assert_exact(
            knn(queries, corpus, 5, "chebyshev", backend="numba", accuracy="exact"), queries, corpus, 5, "chebyshev"
        )


def test_a_bound_a_thousand_times_too_small_is_noticed(monkeypatch, rng):
    queries, corpus = (  # two places, between which any centre is far from both
        (rows + rng.choice([-999, 999], (len(rows), 1))).astype(np.float32)
        for rows in data("normal", "float32", 20, 300, 30, rng)
    )
    original = Space.gram_error.fget
    monkeypatch.setattr(Space, "gram_error", property(lambda self: original(self) / 1e6))
    monkeypatch.setattr(base, "SPARE", 1)
    with pytest.raises(AssertionError, match="neighbours are wrong"):
        assert_exact(knn(queries, corpus, 3, backend="numpy", accuracy="exact"), queries, corpus, 3, "euclidean")


def permuted(dtype, rng, n_corpus=300, n_features=30):
    """Return rows that are equally far from each query: what is summed is the same, and only its order differs."""
    corpus = rng.permuted(np.repeat(rng.normal(size=(1, n_features)), n_corpus, axis=0), axis=1)
    return np.repeat(rng.normal(size=(5, 1)), n_features, axis=1).astype(dtype), corpus.astype(dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_that_rounding_tells_apart(metric, dtype, compared_backend, rng):
    queries, corpus = permuted(dtype, rng)
    found = knn(queries, corpus, 9, metric, backend=compared_backend, accuracy="exact")
    if METRICS[metric].floating.reduce is not max:  # whose values in float64 may be exact
        assert found.certificate.settled == 5
    np.testing.assert_array_equal(found.indices, [np.arange(9)] * 5)


def test_a_float64_interval_that_is_too_small_is_noticed(monkeypatch, rng):
    queries, corpus = permuted("float64", rng)
    monkeypatch.setattr("knnbench.exact_values.interval", lambda space, values: (values, np.nextafter(values, np.inf)))
    with pytest.raises(AssertionError, match="neighbours are wrong"):
        assert_exact(knn(queries, corpus, 9, backend="numba", accuracy="exact"), queries, corpus, 9, "euclidean")


# The kernels, beside their definition.


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "chebyshev"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_expansion_that_lost_nothing_is_exact(kind, dtype, metric, rng):
    queries, corpus = data(kind, dtype, 3, 8, 21, rng)
    space = Space(METRICS[metric], np.dtype(dtype), 21)
    values = Values(space, queries, corpus, 1 << 20)
    i, j = (axis.ravel() for axis in np.indices((3, 8)))
    expected = exact_values(queries, corpus, metric)
    lossless = 0
    for components in (2, 8):
        expansions, lost = values._expansions(values._queries, i, values._corpus, j, components, space.form.accumulate)
        for p, (parts, missing) in enumerate(zip(expansions.tolist(), lost.tolist(), strict=True)):
            if not np.isfinite(missing):
                continue
            from fractions import Fraction

            error = abs(sum(map(Fraction, parts)) - expected[i[p]][j[p]])
            assert error <= Fraction(missing), (kind, components, float(error), missing)
            lossless += missing == 0
    assert lossless or kind in ("tiny", "subnormal", "all exponents", "huge", "small", "big")


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "chebyshev"])
def test_the_definition_in_whole_numbers(metric, rng):
    queries, corpus = data("all exponents", "float64", 1, 6, 5, rng)
    numbers, exponent = whole_values(METRICS[metric].floating.accumulate, np.repeat(queries, 6, axis=0), corpus)
    from fractions import Fraction

    assert [number * Fraction(2) ** exponent for number in numbers] == exact_values(queries, corpus, metric)[0]


def test_bounds_are_where_they_are_used():
    # A planted fault in one place must not leave another in force.
    assert exact.Values is Values
    assert Values.interval.__globals__["interval"] is bounds.interval


@pytest.mark.parametrize(
    ("metric", "query", "corpus", "expected"),
    [
        # Squared norms are within the range, their product is not.
        ("cosine", [[3e-49, 2e-49]], [[1e-113, 5e-113], [-1, 0]], 1 - 13 / math.sqrt(13 * 26)),
        # Half way between two numbers, and a little more.
        ("cityblock", [[0, 0, 0]], [[1, 2.0**-53, 2.0**-200], [9, 9, 9]], 1 + 2.0**-52),
        # Rounded to the smallest normal number, and from there once more.
        ("sqeuclidean", [[0] * 4], np.ldexp([[1073741269, 1091719, 1655, 50]], -541), None),
    ],
)
def test_distances_at_the_edges_of_what_is_certain(metric, query, corpus, expected):
    query, corpus = np.array(query, np.float64), np.array(corpus, np.float64)
    if expected is None:
        expected = float(sum(Fraction(x) ** 2 for x in corpus[0].tolist()))
    for backend in ("numpy", "numba", "python"):
        for rows in (corpus, [corpus[:1], corpus[1:]] if len(corpus) > 1 else [corpus]):
            found = knn(query, rows, 1, metric, backend=backend, accuracy="exact")
            assert found.distances[0, 0] == pytest.approx(expected, rel=1e-15 if metric == "cosine" else 0, abs=0)
