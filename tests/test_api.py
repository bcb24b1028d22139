"""The edge: what is refused and in which words, what is converted, and what a caller can rely on."""

import copy
import pickle

import numpy as np
import pytest

import knnbench
from knnbench import (
    BackendUnavailableError,
    InvalidInputError,
    Neighbors,
    OverBudgetError,
    Prepared,
    UnknownBackendError,
    api,
    blocking,
    knn,
    pairwise,
    prepare,
)
from knnbench.backends import backend_status, registry
from knnbench.blocking import CHUNK_ELEMENTS, slices
from knnbench.metrics import METRICS

from ._checks import assert_distances_close, assert_identical, assert_well_formed

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]
B = {"backend": "numpy"}


def as_queries(array, **options):
    return lambda: knn(array, ROWS, 1, **B, **options)


def as_corpus(array, **options):
    return lambda: knn(ROWS, array, 1, **B, **options)


def as_both_of_pairwise(array, **options):
    return lambda: pairwise(array, ROWS, **B, **options)


def prepared(array, **options):
    return lambda: prepare(array, **B)


ENTRANCES = [(as_queries, "queries"), (as_corpus, "corpus"), (as_both_of_pairwise, "queries"), (prepared, "corpus")]


def refused(call, *texts):
    """Require an `InvalidInputError` whose text has all of `texts`."""
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, knnbench.KnnbenchError)
    for text in texts:
        assert text in message, f"{text!r} not in {message!r}"
    assert "\n" not in message
    assert len(message) < 500


# ---- shapes


@pytest.mark.parametrize(("entrance", "name"), ENTRANCES)
@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (5.0, "()"),
        ([1.0, 2.0], "(2,)"),
        ([], "(0,)"),
        ([[]], "(1, 0)"),
        (np.empty((0, 2)), "(0, 2)"),
        (np.empty((3, 0)), "(3, 0)"),
        (np.ones((2, 2, 2)), "(2, 2, 2)"),
        (np.ones((1, 2, 2)), "(1, 2, 2)"),
    ],
)
def test_shapes(entrance, name, array, shape):
    refused(entrance(array), f"{name} has shape {shape}", f"expected (n_{name}, n_features)")


def test_a_single_row_is_told_how():
    refused(as_queries([1.0, 2.0]), "x[None, :]")
    assert knn(np.array([1.0, 2.0])[None, :], ROWS, 1, **B).indices.tolist() == [[0]]


def test_unequal_features():
    for call in (lambda: knn([[1.0, 2.0, 3.0]], ROWS, 1), lambda: pairwise([[1.0, 2.0, 3.0]], prepare(ROWS, **B))):
        refused(call, "queries has 3 features", "corpus has 2", "the same number")


# ---- kinds of values


@pytest.mark.parametrize(("entrance", "name"), ENTRANCES)
@pytest.mark.parametrize(
    "array",
    [
        np.array([[1j, 2.0]]),
        np.array([["a", "b"]]),
        [["1", "2"]],
        np.array([[b"1", b"2"]]),
        np.array([["2020-01-01", "2020-01-02"]], "datetime64[D]"),
        np.array([[1, 2]], "timedelta64[s]"),
        np.zeros((1, 2), "f4,f4"),
        np.array([[1.0, None]], dtype=object),
        np.array([[1.0, 2.0]], dtype=object),
        [[1.0, None]],
        [[2**70, 1]],
        [[1.0, 2.0], [3.0]],
        None,
        "rows",
        {"a": 1},
        object(),
        iter(ROWS),
        (row for row in ROWS),
    ],
    ids=lambda array: str(getattr(array, "dtype", type(array).__name__)),
)
def test_what_is_not_real_numbers(entrance, name, array):
    refused(entrance(array), name, "expected" if not isinstance(array, list) else "")


def test_a_dtype_is_named():
    refused(as_queries(np.array([[1j, 2.0]])), "queries has dtype complex128", "real numbers")
    refused(as_corpus(np.array([["a", "b"]])), "corpus has dtype <U1")


def test_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    for make in (sparse.csr_matrix, sparse.csr_array, sparse.coo_array):
        refused(as_queries(make(ROWS)), "queries, a ", "dense", ".toarray()")


def test_masked_arrays():
    masked = np.ma.masked_array(ROWS, mask=[[0, 0], [0, 1], [0, 0]])
    refused(as_corpus(masked), "corpus has masked elements")
    unmasked = np.ma.masked_array(ROWS, mask=False)
    assert_identical(knn(ROWS, unmasked, 1, **B).distances, np.zeros((3, 1)))


def test_an_array_protocol_that_fails():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("cannot be an array today")

    refused(as_queries(Broken()), "queries, a Broken", "cannot be an array today")


# ---- values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8", "longdouble"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_values_that_are_not_finite(bad, dtype, row):
    rows = np.array(ROWS, dtype)
    rows[row, 1] = bad
    for entrance, name in ENTRANCES:
        refused(entrance(rows), f"{name} row {row} holds NaN or infinity", "check_finite=False")


@pytest.mark.parametrize("row", [0, 3, 4, 5, 6])
def test_the_row_is_right_after_several_chunks(row):
    n_features = CHUNK_ELEMENTS // 2
    rows = np.ones((7, n_features), np.float32)
    rows[row, -1] = np.nan
    rows[6, 0] = np.inf
    refused(lambda: pairwise(rows, rows[:1] if row else rows[1:2], **B), f"queries row {row} ")
    rows[row:] = 0
    refused(lambda: pairwise(rows[:1] + 1, rows, "cosine", **B), f"corpus row {row} is all zeros")


def test_the_check_of_values_can_be_skipped(own_backend):
    rows = np.array(ROWS)
    rows[1, 0] = np.nan
    with np.errstate(all="ignore"):
        answer = knn(rows, ROWS, 2, "cityblock", backend=own_backend, check_finite=False)
        distances = pairwise(ROWS, rows, "cityblock", backend=own_backend, check_finite=False)
    assert answer.indices.shape == (3, 2)
    assert np.isnan(distances[:, 1]).all() or own_backend == "python"
    assert distances[0, 0] == 0  # the other rows are as ever
    assert answer.indices[0].tolist() == [0, 1]


def test_a_value_that_its_computed_dtype_cannot_hold():
    # Finite as given, infinite in float64.
    largest = np.finfo(np.longdouble).max
    if largest == np.finfo(np.float64).max:
        pytest.skip("long double is float64 here")
    rows = np.array(ROWS, np.longdouble)
    rows[2, 0] = largest
    for entrance, name in ENTRANCES:
        refused(entrance(rows), f"{name} row 2")
    rows[2] = np.finfo(np.longdouble).smallest_normal  # 0 in float64
    refused(as_corpus(rows, metric="cosine"), "corpus row 2 is all zeros")


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "int64", "bool"])
def test_rows_of_zeros_have_no_direction(dtype):
    rows = np.array([[1, 1], [0, 1], [0, 0], [0, 0]], dtype)
    refused(lambda: knn(rows, rows[:2], 1, "cosine", **B), "queries row 2 is all zeros", "'cosine'")
    refused(lambda: pairwise(rows[:2], rows, "cosine", **B), "corpus row 2 is all zeros")
    refused(lambda: prepare(rows, "cosine", **B), "corpus row 2")
    refused(lambda: knn(rows[:2], rows, 1, "cosine", **B, check_finite=False), "corpus row 2")
    assert knn(rows, rows, 1, "euclidean", **B).distances.max() == 0


def test_tiny_rows_have_a_direction():
    tiny = np.array([[1e-45, 0], [0, 1e-45]], np.float32)
    assert pairwise(tiny, tiny, "cosine", **B).tolist() == [[0, 1], [1, 0]]


# ---- k


NOT_A_K = [0, -1, -(2**70), 1.5, 1.0, True, False, np.True_, "3", "", None, [1], np.float64(2), np.nan]


@pytest.mark.parametrize("k", NOT_A_K)
def test_k_is_a_whole_number(k):
    refused(lambda: knn(ROWS, ROWS, k, **B), f"k is {k!r}", "at least 1")


@pytest.mark.parametrize("k", [4, 2**70, np.int64(9)])
def test_k_is_at_most_the_corpus(k):
    refused(lambda: knn(ROWS, ROWS, k, **B), f"k={k}", "n_corpus=3")
    refused(lambda: knn(ROWS, prepare(ROWS, **B), k), f"k={k}", "n_corpus=3")


@pytest.mark.parametrize("k", [1, 3, np.int8(2), np.uint64(2), np.array(2)])
def test_any_whole_number_is_a_k(k):
    distances, indices = knn(ROWS, ROWS, k, **B)
    assert_well_formed(distances, (3, int(k)), np.float64)
    assert_well_formed(indices, (3, int(k)), np.int64)


# ---- names


@pytest.mark.parametrize("metric", ["", "l3", "Euclidean", 3, ["l2"], np.array([1]), object])
def test_unknown_metrics(metric):
    for call in (
        lambda: knn(ROWS, ROWS, 1, metric),
        lambda: pairwise(ROWS, ROWS, metric),
        lambda: prepare(ROWS, metric),
        lambda: knn(ROWS, prepare(ROWS, **B), 1, metric),
    ):
        refused(call, "metric ", "is unknown; expected one of: euclidean, l2")


def test_aliases_are_the_metric(own_backend):
    for metric in METRICS.values():
        expected = pairwise(ROWS, ROWS, metric.name, backend=own_backend)
        for alias in metric.aliases:
            assert_identical(pairwise(ROWS, ROWS, alias, backend=own_backend), expected)
    assert_identical(pairwise(ROWS, ROWS, **B), pairwise(ROWS, ROWS, "euclidean", **B))


@pytest.mark.parametrize("backend", ["", "nump", "NumPy", None, 3, ["numpy"]])
def test_unknown_backends(backend):
    for call in (
        lambda: knn(ROWS, ROWS, 1, backend=backend),
        lambda: pairwise(ROWS, ROWS, backend=backend),
        lambda: prepare(ROWS, backend=backend),
    ):
        with pytest.raises(UnknownBackendError, match=r"is unknown; expected 'auto' or one of: python, numpy"):
            call()


def test_a_backend_that_is_unavailable_says_why_and_what_to_do():
    missing = [name for name in registry() if not backend_status(name).ok]
    if not missing:
        pytest.skip("every backend works here")
    for name in missing:
        status = backend_status(name)
        with pytest.raises(BackendUnavailableError) as caught:
            knn(ROWS, ROWS, 1, backend=name)
        assert isinstance(caught.value, RuntimeError)
        assert f"backend {name!r} is unavailable: {status.reason}" in str(caught.value)
        assert registry()[name].install in str(caught.value)


@pytest.mark.parametrize("accuracy", ["", "slow", "Exact", 1, True, ["exact"]])
def test_unknown_accuracies(accuracy):
    for call in (
        lambda: knn(ROWS, ROWS, 1, **B, accuracy=accuracy),
        lambda: prepare(ROWS, **B, accuracy=accuracy),
    ):
        refused(call, f"accuracy is {accuracy!r}", "fast, exact")


def test_exact_is_for_every_dtype(own_backend):
    for dtype in ("uint8", "float32", "float64"):
        rows = np.array(ROWS, dtype)
        exact = knn(rows, rows, 3, backend=own_backend, accuracy="exact")
        fast = knn(rows, rows, 3, backend=own_backend)
        assert_identical(exact.indices, fast.indices)
        assert_identical(exact.distances, fast.distances)


def test_a_corpus_prepared_as_exact_is_searched_exactly():
    corpus = prepare(np.array(ROWS, np.uint8), accuracy="exact", **B)
    assert knn(np.array(ROWS, np.uint8), corpus, 1).indices.tolist() == [[0], [1], [2]]
    found = knn(np.array(ROWS, np.float32), corpus, 1)
    assert found.indices.tolist() == [[0], [1], [2]]
    assert found.certificate.filter.startswith("float32")  # and not quietly as fast


# ---- budgets


@pytest.mark.parametrize("budget", [0, -1, 1.5, "x", 1e9, [1]])
def test_budgets_refused(budget):
    for call in (
        lambda: knn(ROWS, ROWS, 1, **B, memory_budget=budget),
        lambda: pairwise(ROWS, ROWS, **B, memory_budget=budget),
    ):
        refused(call, f"memory_budget is {budget!r}", "positive whole number of bytes")


def test_the_budget_of_the_environment(monkeypatch):
    monkeypatch.setenv("KNNBENCH_MEMORY_BUDGET", "nothing")
    refused(lambda: knn(ROWS, ROWS, 1, **B), "$KNNBENCH_MEMORY_BUDGET is 'nothing'")
    assert knn(ROWS, ROWS, 1, **B, memory_budget=1 << 20).indices.tolist() == [[0], [1], [2]]
    monkeypatch.setenv("KNNBENCH_MEMORY_BUDGET", "20")
    with pytest.raises(OverBudgetError):
        knn(ROWS, ROWS, 1, **B)


@pytest.mark.parametrize("dtype", ["float64", "uint8", ">f8"])
def test_a_budget_too_small(dtype):
    rows = np.array(ROWS, dtype)
    for call in (
        lambda: knn(rows, rows, 1, **B, memory_budget=8),
        lambda: pairwise(rows, rows, **B, memory_budget=8),
    ):
        with pytest.raises(OverBudgetError, match=r"raise memory_budget") as caught:
            call()
        assert isinstance(caught.value, MemoryError)


def test_a_result_that_memory_cannot_hold_is_refused(monkeypatch, backend):
    result_bytes = 3 * 3 * np.dtype(np.float32).itemsize
    rows = np.array(ROWS, np.float32)
    if "float32" not in backend_status(backend).capabilities.dtypes:
        pytest.skip("no float32")
    metric = "cityblock" if "cityblock" in backend_status(backend).capabilities.metrics else "euclidean"
    monkeypatch.setattr(blocking, "available_memory", lambda: result_bytes - 1)
    with pytest.raises(OverBudgetError, match=r"a result of 3 x 3 distances needs"):
        pairwise(rows, rows, metric, backend=backend)
    knn(rows, rows, 1, metric, backend=backend)
    monkeypatch.setattr(blocking, "available_memory", lambda: result_bytes)
    assert pairwise(rows, rows, metric, backend=backend).shape == (3, 3)


def test_a_huge_result_is_refused_before_it_is_allocated():
    rows = np.broadcast_to(np.uint8(1), (3_000_000, 1))
    with pytest.raises(OverBudgetError, match=r"3,000,000 x 3,000,000 distances needs .* use knn\(\)"):
        pairwise(rows, rows, **B)


# ---- dtypes

OF_UINT8 = dict.fromkeys(METRICS, "int32") | {"euclidean": "float32", "cosine": "float32"}


@pytest.mark.parametrize(
    ("queries", "corpus", "expected"),
    [
        ("float16", "float16", "float32"), ("float32", "float32", "float32"), ("float64", "float64", "float64"),
        ("uint8", "float32", "float32"), ("float32", "uint8", "float32"), ("uint8", "float16", "float32"),
        ("uint8", "float64", "float64"), ("float32", "float64", "float64"), ("float16", "float64", "float64"),
        ("int8", "int8", "float64"), ("int64", "int64", "float64"), ("uint16", "uint8", "float64"),
        ("bool", "bool", "float64"), ("bool", "uint8", "float64"), ("int64", "float32", "float64"),
        (">f4", "<f4", "float32"), (">f8", ">f8", "float64"), (">f4", "uint8", "float32"), (">i2", ">i2", "float64"),
        ("longdouble", "longdouble", "float64"), ("longdouble", "float32", "float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_of_answers(queries, corpus, expected, metric):
    q = np.array([[1, 0, 1], [0, 1, 1]]).astype(queries)
    c = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1]]).astype(corpus)
    plain = pairwise(q.astype("f8"), c.astype("f8"), metric, backend="python")
    got = pairwise(q, c, metric, **B)
    assert_well_formed(got, (2, 3), expected)
    assert_distances_close(got, plain, 8 * float(np.finfo(expected).eps))
    distances, indices = knn(q, c, 2, metric, **B)
    assert_well_formed(distances, (2, 2), expected)
    assert_well_formed(indices, (2, 2), np.int64)
    assert indices.tolist() == np.argsort(plain, axis=1, kind="stable")[:, :2].tolist()
    assert_identical(knn(q, prepare(c, metric, **B), 2).distances, distances)


@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_of_answers_on_uint8(own_backend, metric):
    rows = np.array(ROWS, np.uint8)
    assert_well_formed(pairwise(rows, rows[:2], metric, backend=own_backend), (3, 2), OF_UINT8[metric])
    distances, indices = knn(rows, rows, 2, metric, backend=own_backend)
    assert_well_formed(distances, (3, 2), OF_UINT8[metric])
    assert_well_formed(indices, (3, 2), np.int64)


def test_unsigned_bytes_do_not_wrap():
    assert pairwise(np.uint8([[0]]), np.uint8([[255]]), "cityblock", **B).tolist() == [[255]]
    assert pairwise(np.array([[True]]), np.array([[False]]), "cityblock", **B).tolist() == [[1.0]]
    assert pairwise(np.int8([[-128]]), np.int8([[127]]), "cityblock", **B).tolist() == [[255.0]]


# ---- kinds of arrays


class Frame:
    """What a data frame is to numpy."""

    def __init__(self, rows):
        self.rows = rows

    def __array__(self, dtype=None, copy=None):
        return np.array(self.rows, dtype=dtype)


def variants(tmp_path):
    """Return the same rows in many forms."""
    plain = np.array(ROWS)
    mapped = np.memmap(tmp_path / "rows", dtype=np.float64, mode="w+", shape=plain.shape)
    mapped[:] = plain
    mapped.flush()
    read_only = plain.copy()
    read_only.flags.writeable = False
    wide = np.zeros((6, 4))
    wide[::2, ::2] = plain
    return {
        "list": ROWS,
        "tuple": tuple(map(tuple, ROWS)),
        "list of arrays": list(plain),
        "Fortran": np.asfortranarray(plain),
        "strided": wide[::2, ::2],
        "reversed": plain[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "memory-mapped": np.memmap(tmp_path / "rows", dtype=np.float64, mode="r", shape=plain.shape),
        "frame": Frame(ROWS),
        "big-endian": plain.astype(">f8"),
        "matrix": plain.view(np.matrix),
        "unaligned": np.frombuffer(b"x" + plain.tobytes(), dtype=np.uint8)[1:].view(np.float64).reshape(3, 2),
    }


FORMS = ("list", "tuple", "list of arrays", "Fortran", "strided", "reversed", "read-only", "memory-mapped", "frame",
         "big-endian", "matrix", "unaligned")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_arrays(form, own_backend, tmp_path):
    rows = variants(tmp_path)[form]
    before = np.array(ROWS)
    for metric in ("euclidean", "chebyshev", "cosine"):
        expected = pairwise(np.array(ROWS), np.array(ROWS), metric, backend=own_backend)
        got = pairwise(rows, rows, metric, backend=own_backend)
        assert type(got) is np.ndarray
        assert_identical(got, expected)
        answer = knn(rows, prepare(rows, metric, backend=own_backend), 2)
        assert type(answer.distances) is type(answer.indices) is np.ndarray
        assert answer.indices[:, 0].tolist() == [0, 1, 2]
    assert (np.asarray(rows) == before).all()


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_inputs_are_never_changed_nor_returned(own_backend, metric, dtype, rng):
    queries, corpus = (rng.integers(1, 200, (n, 4)).astype(dtype) for n in (5, 8))
    before = queries.copy(), corpus.copy()
    ready = prepare(corpus, metric, backend=own_backend)
    answers = [
        pairwise(queries, corpus, metric, backend=own_backend),
        *knn(queries, corpus, 3, metric, backend=own_backend),
        pairwise(queries, ready),
        *knn(queries, ready, 8),
    ]
    assert_identical(queries, before[0])
    assert_identical(corpus, before[1])
    for answer in answers:
        assert not any(np.shares_memory(answer, array) for array in (queries, corpus))
        assert answer.flags.writeable
        answer[...] = 0  # a caller's to change
    assert_identical(knn(queries, ready, 3).distances, knn(queries, corpus, 3, metric, backend=own_backend).distances)


def test_queries_may_be_the_corpus(own_backend):
    rows = np.array(ROWS)
    assert knn(rows, rows, 1, backend=own_backend).indices.tolist() == [[0], [1], [2]]


# ---- Neighbors


def test_neighbors_are_a_pair():
    answer = knn(ROWS, ROWS, 2, **B)
    assert isinstance(answer, tuple)
    assert len(answer) == 2
    distances, indices = answer
    assert distances is answer.distances is answer[0]
    assert indices is answer.indices is answer[1]
    assert answer.backend == "numpy"
    assert answer.passed_over == {}
    assert repr(answer).startswith("Neighbors(3 queries, k=2, backend='numpy')\ndistances=array(")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_neighbors_can_be_pickled(protocol):
    answer = Neighbors(np.ones((2, 1)), np.zeros((2, 1), np.int64), backend="mine", passed_over={"a": "b"})
    for other in (pickle.loads(pickle.dumps(answer, protocol)), copy.copy(answer), copy.deepcopy(answer)):
        assert type(other) is Neighbors
        assert_identical(other.distances, answer.distances)
        assert_identical(other.indices, answer.indices)
        assert (other.backend, other.passed_over) == ("mine", {"a": "b"})


def test_auto_says_what_it_took():
    answer = knn(ROWS, ROWS, 1)
    assert not registry()[answer.backend].peer
    assert answer.backend not in answer.passed_over
    assert all(isinstance(reason, str) and reason for reason in answer.passed_over.values())
    prepared = prepare(ROWS)  # for as many queries as are usual, so that it may take another
    assert not registry()[prepared.backend].peer
    assert knn(ROWS, prepared, 1).backend == prepared.backend


def test_auto_passes_over_what_does_not_work(monkeypatch):
    broken = type("Broken", (), {"ok": False, "reason": "planted", "capabilities": None})

    def planted(name):
        return broken if name == "numba" else backend_status(name)

    monkeypatch.setattr("knnbench.selection.auto._chosen", {})
    monkeypatch.setattr("knnbench.selection.auto._ranked", lambda names, problem: ["numba", "numpy"])
    monkeypatch.setattr("knnbench.selection.auto.backend_status", planted)
    answer = knn(ROWS, ROWS, 1)
    assert answer.backend == "numpy"
    assert answer.passed_over == {"numba": "planted"}
    monkeypatch.setattr("knnbench.selection.auto._chosen", {})
    monkeypatch.setattr("knnbench.selection.auto.backend_status", lambda name: broken)
    with pytest.raises(BackendUnavailableError, match=r"numba: planted; numpy: planted"):
        knn(ROWS, ROWS, 1)


# ---- Prepared


def test_prepared_says_what_it_is():
    corpus = prepare(ROWS, "l1", **B)
    assert isinstance(corpus, Prepared)
    assert (corpus.metric, corpus.backend, corpus.accuracy) == ("cityblock", "numpy", "fast")
    assert corpus.shape == (3, 2)
    assert corpus.dtype == np.float64
    text = "Prepared(shape=(3, 2), dtype=float64, metric='cityblock', backend='numpy', accuracy='fast')"
    assert repr(corpus) == text


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("corpus_dtype", ["uint8", "float32", "float64", "float16"])
def test_prepared_takes_queries_of_any_dtype(own_backend, metric, corpus_dtype):
    corpus = np.array([[1, 2], [3, 4], [5, 7], [200, 1]], corpus_dtype)
    ready = prepare(corpus, metric, backend=own_backend)
    for dtype in ("uint8", "float64", "float32", "int16", "uint8"):
        queries = np.array([[1, 2], [9, 7]], dtype)
        expected = knn(queries, corpus, 3, metric, backend=own_backend)
        answer = knn(queries, ready, 3)
        assert_identical(answer.distances, expected.distances)
        assert_identical(answer.indices, expected.indices)
        assert_identical(pairwise(queries, ready), pairwise(queries, corpus, metric, backend=own_backend))


def test_prepared_agrees_with_the_call():
    corpus = prepare(ROWS, "cityblock", **B)
    for agreed in ({}, {"metric": "l1"}, {"metric": "cityblock"}, {"backend": "numpy"}, {"backend": "auto"}):
        assert knn(ROWS, corpus, 1, **agreed).distances.tolist() == [[0], [0], [0]]
    refused(lambda: knn(ROWS, corpus, 1, "euclidean"), "metric is 'euclidean'", "prepared for 'cityblock'")
    refused(lambda: pairwise(ROWS, corpus, "l2"), "metric is 'euclidean'", "prepared for 'cityblock'")
    refused(lambda: knn(ROWS, corpus, 1, backend="python"), "backend is 'python'", "prepared for 'numpy'")
    with pytest.raises((UnknownBackendError, InvalidInputError), match="nonesuch"):
        knn(ROWS, corpus, 1, backend="nonesuch")


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_prepared_can_be_pickled(own_backend, protocol, dtype):
    rows = np.array(ROWS, dtype)
    corpus = prepare(rows, "sqeuclidean", backend=own_backend)
    other = pickle.loads(pickle.dumps(corpus, protocol))
    assert repr(other) == repr(corpus)
    assert_identical(knn(rows, other, 3).distances, knn(rows, corpus, 3).distances)
    assert corpus._packed, "pickling must not unpack the original"


def test_prepared_checks_the_queries():
    corpus = prepare(ROWS, "cosine", **B)
    refused(lambda: knn([[0.0, 0.0]], corpus, 1), "queries row 0 is all zeros")
    refused(lambda: knn([[np.nan, 0.0]], corpus, 1), "queries row 0 holds NaN")
    refused(lambda: prepare(corpus, "cosine", **B), "corpus, a Prepared")
    refused(lambda: knn(corpus, ROWS, 1, **B), "queries, a Prepared")


def test_what_is_asked_for_by_position():
    # metric is the only option that may stand without its name.
    assert_identical(pairwise(ROWS, ROWS, "l1"), pairwise(ROWS, ROWS, metric="l1"))
    for call in (
        lambda: pairwise(ROWS, ROWS, "l1", "numpy"),
        lambda: knn(ROWS, ROWS, 1, "l1", "numpy"),
        lambda: prepare(ROWS, "l1", "numpy"),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


# ---- pieces: queries that must be converted or copied block by block, a corpus that does not fit a device


@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_blocks_of_queries_are_answered_as_all_together(backend, rng, monkeypatch, dtype, metric):
    capabilities = backend_status(backend).capabilities
    if dtype not in capabilities.dtypes or metric not in capabilities.metrics:
        pytest.skip(f"{backend} does not take {dtype} and {metric}")
    queries, corpus = (rng.integers(0, 256, (n, 24)).astype(dtype) for n in (16, 40))
    whole, matrix = knn(queries, corpus, 3, metric, backend=backend), pairwise(queries, corpus, metric, backend=backend)
    monkeypatch.setattr(api._Task, "query_blocks", lambda task, answer_bytes: list(slices(len(task.queries), 7)))
    parts = knn(np.asfortranarray(queries), corpus, 3, metric, backend=backend)
    np.testing.assert_allclose(parts.distances, whole.distances, rtol=1e-14)
    assert parts.distances.dtype == whole.distances.dtype
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(pairwise(queries, corpus, metric, backend=backend), matrix, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_parts_of_a_corpus_are_searched_as_the_whole(own_backend, rng, monkeypatch, dtype):
    queries, corpus = (rng.integers(0, 4, (n, 5)).astype(dtype) for n in (16, 41))  # many ties
    for metric in ("euclidean", "chebyshev"):
        whole = knn(queries, corpus, 9, metric, backend=own_backend)
        matrix = pairwise(queries, corpus, metric, backend=own_backend)
        with monkeypatch.context() as patch:
            patch.setattr(api._Task, "corpus_parts", lambda task: list(slices(task.prepared.shape[0], 6)))
            parts = knn(queries, corpus, 9, metric, backend=own_backend)
            np.testing.assert_array_equal(parts.indices, whole.indices)
            np.testing.assert_array_equal(parts.distances, whole.distances)
            in_parts = pairwise(queries, corpus, metric, backend=own_backend)
            np.testing.assert_allclose(in_parts, matrix, rtol=1e-14)


def test_budgeted_blocks_reach_a_backend_whose_arrays_are_not_numpys(rng):
    if not backend_status("torch").ok:
        pytest.skip(backend_status("torch").reason)
    queries, corpus = rng.random((4000, 8), np.float32), rng.random((30, 8))
    answer = knn(queries, corpus, 2, backend="torch", memory_budget=100_000)
    np.testing.assert_array_equal(answer.indices, knn(queries, corpus, 2, backend="numpy").indices)
