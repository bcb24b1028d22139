"""A corpus that does not fit into memory: blocks, budgets, reading ahead."""

import contextvars
import os
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnbench import InvalidInputError, KNNClassifier, OverBudgetError, api, knn, pairwise, prepare
from knnbench.api import as_rows, finish_ranked, search_block
from knnbench.backends import backend_status, registry
from knnbench.backends.numba import NumbaBackend
from knnbench.exact_values import Values
from knnbench.kernels.cpu_filters import KeyFilter, filters_of
from knnbench.metrics import Space, get_metric
from knnbench.ordering import merge_topk
from knnbench.settings import held, setting
from knnbench.streams import MappedStream, as_stream, read_ahead
from knnbench.threads import thread_count

from ._checks import assert_identical
from .conftest import as_parameter, available

N_QUERIES, N_CORPUS, N_FEATURES, K = 23, 611, 12, 7


def make(rng, dtype, n_corpus=N_CORPUS):
    """Return queries and a corpus with many ties, without a row of zeros."""
    queries, corpus = (rng.integers(0, 5, (n, N_FEATURES)) for n in (N_QUERIES, n_corpus))
    queries[:, 0], corpus[:, 0] = 1, rng.integers(1, 3, n_corpus)
    return queries.astype(dtype), corpus.astype(dtype)


@pytest.fixture
def short_blocks(monkeypatch):
    """Let a corpus be read in several blocks, however small it is beside the budget."""
    monkeypatch.setattr(api, "STREAM_BYTES", 4096)


def assert_same(answer, expected):
    assert_identical(answer.distances, expected.distances)
    assert_identical(answer.indices, expected.indices)


def cut(corpus, lengths):
    return np.split(corpus, np.cumsum(lengths)[:-1])


# ---- what a corpus may be


def as_memmap(corpus, path):
    np.save(path, corpus)
    return np.load(path, mmap_mode="r")


def as_path(corpus, path):
    np.save(path, corpus)
    return path


def as_raw_memmap(corpus, path):
    path = path.with_suffix(".raw")
    (corpus if corpus.flags.c_contiguous else np.ascontiguousarray(corpus)).tofile(path)
    return np.memmap(path, corpus.dtype, "r", shape=corpus.shape)


def as_dask(corpus, path):
    return pytest.importorskip("dask.array").from_array(corpus, chunks=(100, 5))


SEVEN = (1, 200, 3, 150, 250, 2, 5)


def as_paths(corpus, path):
    paths = [path.with_stem(f"block{number}") for number in range(len(SEVEN))]
    for block, one in zip(cut(corpus, SEVEN), paths, strict=True):
        np.save(one, block)
    return paths


def as_memmaps(corpus, path):
    return [np.load(one, mmap_mode="r") for one in as_paths(corpus, path)]


def as_dasks(corpus, path):
    return [as_dask(block, path) for block in cut(corpus, SEVEN)]


KINDS = {
    "memmap": as_memmap,
    "path": as_path,
    "text": lambda corpus, path: str(as_path(corpus, path)),
    "raw memmap": as_raw_memmap,
    "memmap by columns": lambda corpus, path: as_memmap(np.asfortranarray(corpus), path),
    "slice of a memmap": lambda corpus, path: as_memmap(np.repeat(corpus, 2, axis=0), path)[::2],
    "dask": as_dask,
    "one block": lambda corpus, path: [corpus],
    "seven blocks": lambda corpus, path: cut(corpus, SEVEN),
    "paths": as_paths,
    "memmaps": as_memmaps,
    "dasks": as_dasks,
    "tuple": lambda corpus, path: tuple(cut(corpus, SEVEN)),
    "generator": lambda corpus, path: (block for block in cut(corpus, SEVEN)),
    "iterator": lambda corpus, path: iter(cut(corpus, SEVEN)),
    "empty blocks": lambda corpus, path: [corpus[:0], corpus[:9], corpus[:0], corpus[9:], corpus[:0]],
    "lists": lambda corpus, path: iter([corpus[:5].tolist(), corpus[5:].tolist()]),
}


@pytest.mark.parametrize("budget", [None, 90_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_kind_of_corpus_gives_what_an_array_gives(kind, dtype, budget, rng, tmp_path, request):
    if kind == "lists" and dtype == "float32":
        dtype = "float64"
    queries, corpus = make(rng, dtype)
    given_corpus = corpus.astype(np.float64) if kind == "lists" else corpus
    expected = knn(queries, given_corpus, K, backend="numba")
    if budget:
        request.getfixturevalue("short_blocks")
    calls = []
    answer = knn(
        queries, KINDS[kind](given_corpus, tmp_path / "corpus.npy"), K, backend="numba", memory_budget=budget,
        progress=lambda done, of: calls.append((done, of)),
    )  # fmt: skip
    assert_same(answer, expected)
    known = N_CORPUS if kind not in ("generator", "iterator", "lists", "paths") else None
    assert calls[-1] == (N_CORPUS, known)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    if budget:
        assert len(calls) > 1


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
def test_a_file_that_is_one_block_is_searched_as_an_array(accuracy, rng, tmp_path, monkeypatch):
    queries, corpus = make(rng, "float32")
    expected = knn(queries, corpus, K, backend="numba", accuracy=accuracy)
    monkeypatch.setattr(api, "_search", None)
    assert_same(knn(queries, as_memmap(corpus, tmp_path / "c.npy"), K, backend="numba", accuracy=accuracy), expected)
    corpus[402, 3] = np.nan
    mapped = as_memmap(corpus, tmp_path / "c.npy")
    refused(lambda: knn(queries, mapped, K, accuracy=accuracy), "corpus row 402 holds NaN")
    knn(queries, mapped, K, check_finite=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lists"])
def test_every_kind_of_queries(kind, rng, tmp_path):
    queries, corpus = make(rng, "uint8")
    corpus, queries = queries, corpus  # as many as the kinds above
    expected = knn(queries, corpus, K, "cityblock", backend="numba")
    for rows in (corpus, cut(corpus, (3, 20)), as_memmap(corpus, tmp_path / "c.npy"), prepare(corpus, "cityblock")):
        given_queries = KINDS[kind](queries, tmp_path / "queries.npy")
        for budget in (None, 60_000):
            if budget and kind in ("generator", "iterator"):
                given_queries = KINDS[kind](queries, tmp_path / "queries.npy")
            assert_same(knn(given_queries, rows, K, "cityblock", memory_budget=budget), expected)


@pytest.mark.parametrize("backend", [as_parameter(name) for name in registry()])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "chebyshev"])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_every_backend_searches_in_blocks(backend, metric, dtype, rng):
    available(backend)
    capabilities = backend_status(backend).capabilities
    if dtype not in capabilities.dtypes or metric not in capabilities.metrics:
        pytest.skip(f"{backend} lacks it")
    queries, corpus = make(rng, dtype, 60)
    whole, blocks = knn(queries, corpus, K, metric, backend=backend), cut(corpus, (3, 40, 17))
    answer = knn(queries, blocks, K, metric, backend=backend)
    if capabilities.total_order:
        assert_same(answer, whole)
    else:  # of other shapes a library's product may round otherwise
        np.testing.assert_allclose(answer.distances, whole.distances, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [">f8", "float16", "int16", "bool"])
@pytest.mark.usefixtures("short_blocks")
def test_blocks_are_converted_as_arrays_are(dtype, rng, tmp_path):
    queries, corpus = make(rng, dtype)
    expected = knn(queries, corpus, K, backend="numba")
    for kind in ("memmap", "seven blocks", "memmap by columns"):
        rows = KINDS[kind](corpus, tmp_path / "c.npy")
        assert_same(knn(queries, rows, K, backend="numba", memory_budget=200_000), expected)


def test_queries_of_another_dtype_meet_the_blocks_where_arrays_meet(rng):
    queries, corpus = make(rng, "uint8")
    answer = knn(queries.astype(np.float32), cut(corpus, SEVEN), K, backend="numba")
    assert_same(answer, knn(queries.astype(np.float32), corpus, K, backend="numba"))
    assert answer.distances.dtype == np.float32


def test_auto_chooses_for_blocks(rng):
    queries, corpus = make(rng, "uint8")
    answer = knn(queries, iter(cut(corpus, SEVEN)), K)
    assert answer.backend in registry()
    assert_same(answer, knn(queries, corpus, K))


def test_exact_neighbours(rng, tmp_path):
    queries, corpus = make(rng, "uint8")
    answer = knn(queries, iter(cut(corpus, SEVEN)), K, accuracy="exact")
    assert_same(answer, knn(queries, corpus, K, accuracy="exact"))
    assert answer.certificate.filter == "integers"


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("budget", [None, 200_000])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lists"])
def test_exact_neighbours_of_floats(kind, budget, rng, tmp_path):
    queries, corpus = (rows / np.float32(7) for rows in make(rng, "float32"))
    expected = knn(queries, corpus, K, "cosine", backend="numpy", accuracy="exact")
    given_corpus = KINDS[kind](corpus, tmp_path / "c.npy")
    answer = knn(queries, given_corpus, K, "cosine", backend="numpy", accuracy="exact", memory_budget=budget)
    assert_same(answer, expected)
    assert answer.certificate.filter == "float32 products"


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_exact_values_are_made_of_what_may_be_nearest_only(metric, rng, monkeypatch):
    queries, corpus = rng.random((20, 9)), rng.random((2000, 9))
    made, strings, ends = [], Values.strings, Values.ends
    monkeypatch.setattr(Values, "strings", lambda self, i, j: made.append(len(i)) or strings(self, i, j))
    blocks = cut(corpus, (40,) * 50)
    expected = knn(queries, corpus, K, metric, backend="numpy", accuracy="exact")
    assert_same(knn(queries, blocks, K, metric, backend="numpy", accuracy="exact"), expected)
    # Of blocks in any order, the n-th holds one n-th of what is nearest so far.
    assert 20 * K <= sum(made) < 2 * 20 * K * sum(1 / n for n in range(1, 51))
    # An end that is too low is noticed.
    monkeypatch.setattr(Values, "ends", lambda self, values: (ends(self, values)[0], 0.5 * ends(self, values)[1]))
    wrong = knn(queries, blocks, K, metric, backend="numpy", accuracy="exact")
    assert (wrong.indices != expected.indices).any()


def test_exact_neighbours_of_more_queries_than_there_is_room_for(rng, tmp_path, monkeypatch):
    queries, corpus = (rows / 7 for rows in make(rng, "float64"))
    expected = knn(queries, corpus, K, "cosine", backend="numpy", accuracy="exact")
    many, whole = np.repeat(queries, 20, axis=0), 250_000
    options = {"backend": "numpy", "accuracy": "exact", "memory_budget": whole}
    calls = []
    answer = knn(many, cut(corpus, SEVEN), K, "cosine", **options, progress=lambda done, of: calls.append(done))
    assert_identical(answer.distances, np.repeat(expected.distances, 20, axis=0))
    assert_identical(answer.indices, np.repeat(expected.indices, 20, axis=0))
    assert calls.count(N_CORPUS) > 2  # it was read so often
    assert answer.certificate.filter == expected.certificate.filter
    reads = calls.count(N_CORPUS)
    refused(
        lambda: knn(many, iter(cut(corpus, SEVEN)), K, "cosine", **options),
        "of 460 queries", "an iterator, which can be read only once", "fewer queries", error=OverBudgetError,
    )  # fmt: skip
    refused(
        lambda: knn(many, corpus, K, "cosine", **options, checkpoint=tmp_path / "job"),
        "with a checkpoint, once", "raise memory_budget", error=OverBudgetError,
    )  # fmt: skip
    assert not (tmp_path / "job").exists()
    assert_same(knn(many, iter(cut(corpus, SEVEN)), K, "cosine", **options | {"memory_budget": reads * whole}), answer)


# ---- the core: blocks in any order, any number of times


@st.composite
def shards(draw):
    """Cuts of a corpus, an order of its blocks in which some come again, and a tree of merges."""
    n_corpus, dtype = draw(st.integers(1, 40)), draw(st.sampled_from(["uint8", "float32"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries, corpus = (rng.integers(0, 4, (n, 6)).astype(dtype) for n in (3, n_corpus))
    if dtype == "float32":  # values whose sums round
        queries, corpus = queries / np.float32(7), corpus / np.float32(7)
    ends = sorted(draw(st.sets(st.integers(1, n_corpus - 1), max_size=7))) if n_corpus > 1 else []
    parts = list(zip([0, *ends], [*ends, n_corpus], strict=True))
    order = draw(st.permutations([*parts, *draw(st.lists(st.sampled_from(parts), max_size=4))]))
    return queries, corpus, order, draw(st.integers(1, n_corpus)), draw(st.randoms(use_true_random=False))


@settings(max_examples=150)
@given(shards(), st.sampled_from(["cityblock", "euclidean"]))
def test_any_order_any_duplicates_and_any_tree_give_the_same_bits(drawn, metric):
    queries, corpus, order, k, random = drawn
    options = {"backend": "numpy", "accuracy": "exact"}
    expected = knn(queries, corpus, k, metric, **options)
    lists = [search_block(queries, corpus[a:b], k, a, metric, **options) for a, b in order]
    while len(lists) > 1:
        first, second = (lists.pop(random.randrange(len(lists))) for _ in range(2))
        lists.append(merge_topk(first, second, k))
    ((ranked, indices),) = lists
    assert_identical(indices[:, :k], expected.indices)
    dtype = corpus.dtype
    assert_identical(finish_ranked(ranked[:, :k], metric, dtype, 6, "numpy", "exact"), expected.distances)


def test_a_centre_given_is_that_of_all_blocks(own_backend, rng):
    # Far from the origin, where a block's own mean and another's would filter differently.
    corpus = (rng.normal(size=(60, 40)) + 1e4).astype(np.float32)
    queries, centre = corpus[:5] + np.float32(0.5), corpus.mean(axis=0)
    answers = [search_block(queries, corpus, 3, 0, "euclidean", backend=own_backend, centre=c) for c in (centre, None)]
    assert_identical(answers[0][1], answers[1][1])
    found = get_centre(own_backend, corpus, centre)
    assert found is None or np.array_equal(found, centre)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_a_centre_does_not_depend_on_what_is_not_finite(metric, value, rng):
    # Of features that numba filters, and enough pairs.
    queries, corpus = rng.random((500, 70), np.float32), rng.random((2000, 70), np.float32)
    bad, space = corpus.copy(), Space(get_metric(metric), corpus.dtype, 70)
    bad[::400, 3] = value  # within what stands for the corpus
    others = np.isfinite(bad).all(axis=1)
    for rows in (bad, bad[:800]):  # more rows than are looked at, and fewer
        sample = rows[:: -(-len(rows) // api.CENTRE_ROWS)]
        unit = space.metric.prepare_rows(np, sample[np.isfinite(sample).all(axis=1)])
        np.testing.assert_allclose(api.centre_of(rows, space), unit.mean(axis=0), rtol=1e-5)
    assert not api.centre_of(bad[:1], space).any()
    (keys, *_) = (one for one in filters_of(space) if isinstance(one, KeyFilter))
    assert np.isfinite(NumbaBackend().prepare(bad, space).reference(keys.kernels(space))).all()
    # The other queries' answers, and those of other rows, are what they are without.
    expected = knn(queries, corpus[others], 3, metric, backend="numba")
    at_end = np.concatenate([corpus[others], bad[~others]])
    for given_corpus in (at_end, [at_end[:1500], at_end[1500:]]):
        answer = knn(queries, given_corpus, 3, metric, backend="numba", check_finite=False)
        assert_same(answer, expected)
    some = queries.copy()
    some[7, 5] = value
    answer = knn(some, corpus[others], 3, metric, backend="numba", check_finite=False)
    kept = np.arange(500) != 7
    assert_identical(answer.distances[kept], expected.distances[kept])
    assert_identical(answer.indices[kept], expected.indices[kept])


def get_centre(name, corpus, centre):
    from knnbench.backends import get_backend

    backend = get_backend(name)
    space = Space(get_metric("euclidean"), corpus.dtype, corpus.shape[1])
    prepared = backend.prepare_about(backend.to_native(corpus, corpus.dtype), centre, space)
    found = getattr(prepared, "centre", None)
    return None if found is None else backend.to_numpy(found)


# ---- what is refused


def refused(call, *texts, error=InvalidInputError):
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def test_blocks_that_differ_are_named(rng):
    queries, corpus = make(rng, "uint8")
    for blocks in ([corpus[:5], corpus[5:9].astype(np.float32)], iter([corpus[:5], corpus[5:9].astype(np.float32)])):
        refused(lambda blocks=blocks: knn(queries, blocks, 2), "corpus block 1", "float32", "block 0", "uint8")
    refused(lambda: knn(queries, [corpus[:5], corpus[5:9, :-1]], 2), "corpus block 1", "11 features", "block 0", "12")
    refused(lambda: knn([queries[:5], queries[5:].astype(float)], corpus, 2), "queries block 1", "float64")
    refused(lambda: knn(queries, iter([corpus, corpus[0]]), 2), "corpus block 1", "shape (12,)")
    refused(lambda: knn(queries, iter([corpus, "x"]), 2), "corpus block 1")
    refused(lambda: knn(queries, iter([]), 2), "corpus", "without a block")
    refused(lambda: knn(queries, iter([corpus[:0]]), 2), "k=2 exceeds n_corpus=0")
    refused(lambda: knn(queries[:, :3], iter([corpus]), 2), "3 features", "12")


@pytest.mark.usefixtures("short_blocks")
def test_a_row_is_named_by_its_place_in_the_corpus(rng, tmp_path):
    queries, corpus = make(rng, "float32")
    corpus[402, 3] = np.nan
    for given_corpus in (cut(corpus, SEVEN), as_memmap(corpus, tmp_path / "c.npy"), iter(cut(corpus, SEVEN))):
        refused(lambda c=given_corpus: knn(queries, c, 2, memory_budget=90_000), "corpus row 402 holds NaN")
    corpus[402] = 0
    refused(lambda: knn(queries, cut(corpus, SEVEN), 2, "cosine"), "corpus row 402 is all zeros")


def test_more_neighbours_than_rows(rng):
    queries, corpus = make(rng, "uint8", 20)
    refused(lambda: knn(queries, iter([corpus[:15], corpus[15:]]), 21), "k=21 exceeds n_corpus=20")
    refused(lambda: knn(queries, [corpus[:15], corpus[15:]], 21), "k=21 exceeds n_corpus=20")
    assert knn(queries, iter([corpus[:15], corpus[15:]]), 20).indices.shape == (N_QUERIES, 20)


@pytest.mark.parametrize(
    ("path", "text"),
    [("nothing.npy", "No such file"), ("corpus.csv", "ends in .npy"), ("bad.npy", "cannot be read"), ("o.npy", "read")],
)
def test_files_that_hold_no_rows(path, text, tmp_path, rng):
    (tmp_path / "bad.npy").write_text("not numpy's")
    np.save(tmp_path / "o.npy", np.array([[object()]], object), allow_pickle=True)
    queries, _ = make(rng, "uint8")
    refused(lambda: knn(queries, tmp_path / path, 1), "corpus", text)
    refused(lambda: knn(str(tmp_path / path), queries, 1), "queries", text)


def test_an_iterator_is_not_read_twice(rng):
    queries, corpus = make(rng, "uint8")
    refused(lambda: prepare(iter([corpus])), "list_iterator", "read only once")
    refused(lambda: KNNClassifier().fit(iter([corpus]), np.zeros(N_CORPUS)), "read only once")
    many = [np.repeat(queries, 40, axis=0)] * 3
    refused(lambda: knn(many, iter([corpus]), 2, memory_budget=60_000), "corpus is an iterator", "needed again")


def test_a_budget_that_holds_nothing(rng, tmp_path):
    queries, corpus = make(rng, "uint8")
    refused(lambda: knn(queries, as_memmap(corpus, tmp_path / "c.npy"), 2, memory_budget=50), error=OverBudgetError)


def test_an_error_of_the_iterable_reaches_the_caller(rng):
    queries, corpus = make(rng, "uint8")

    def blocks():
        yield corpus
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        knn(queries, blocks(), 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("knnbench-read")]


# ---- reading ahead


def test_the_next_block_is_read_while_one_is_searched():
    asked = threading.Event()

    def items():
        yield 0
        asked.set()
        yield 1

    reader = read_ahead(items())
    assert next(reader) == 0
    assert asked.wait(10)  # though nobody has asked for it
    assert list(reader) == [1]


def test_the_reader_has_the_context_of_whoever_asks():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(3)
    assert list(read_ahead(variable.get() for _ in range(3))) == [3, 3, 3]


def test_an_iterable_may_refuse_to_say_how_long_it_is(rng):
    queries, corpus = make(rng, "uint8")

    class Endless:
        def __len__(self):
            raise TypeError("no length")

        def __iter__(self):
            return iter([corpus[:100], corpus[100:]])

    assert_identical(knn(queries, Endless(), K).indices, knn(queries, corpus, K).indices)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_lists_of_dask_arrays_may_not_know_their_length(order, rng):
    da = pytest.importorskip("dask.array")
    queries, corpus = make(rng, "uint8")
    known, unknown = (da.from_array(rows, chunks=(50, -1)) for rows in (corpus[:100], corpus[100:]))
    blocks = [known, unknown[unknown[:, 0] >= 0]]
    rows = [corpus[:100], corpus[100:]]
    expected = knn(queries, np.concatenate([rows[i] for i in order]), K).indices
    assert_identical(knn(queries, [blocks[i] for i in order], K).indices, expected)


def test_few_blocks_are_read_ahead_where_reading_takes_time(rng, tmp_path, monkeypatch):
    queries, corpus = make(rng, "uint8")
    ahead, expected = [], knn(queries, corpus, K)
    monkeypatch.setattr(api, "read_ahead", lambda items: ahead.append(1) or read_ahead(items))
    for kind, count in (("seven blocks", 0), ("one block", 0), ("paths", 1), ("memmaps", 1), ("generator", 1)):
        ahead.clear()
        given_corpus = KINDS[kind](corpus, tmp_path / "c.npy")
        assert_same(knn(queries, given_corpus, K), expected)
        assert len(ahead) == count, kind
    ahead.clear()
    knn(queries, as_memmaps(corpus, tmp_path / "c.npy")[:1], 1)
    assert not ahead


@pytest.mark.parametrize("is_list", [True, False])
def test_chunks_of_dask_are_computed_ahead(is_list, rng):
    da = pytest.importorskip("dask.array")
    queries, corpus = make(rng, "uint8")
    begun = [threading.Event() for _ in SEVEN]

    def begin(block, block_info=None, number=None):
        begun[block_info[0]["chunk-location"][0] if number is None else number].set()
        return block

    if is_list:
        options = {"meta": np.empty((0, 0), corpus.dtype)}
        given_corpus = [
            da.from_array(block, chunks=-1).map_blocks(begin, number=number, **options)
            for number, block in enumerate(cut(corpus, SEVEN))
        ]
    else:
        given_corpus = da.from_array(corpus, chunks=(SEVEN, -1)).map_blocks(begin, dtype=corpus.dtype)
    waited = []

    def progress(done, n_corpus):
        number = len(waited)
        waited.append(number + 1 == len(SEVEN) or begun[number + 1].wait(10))  # though nobody has asked for it

    assert_same(knn(queries, given_corpus, K, progress=progress), knn(queries, corpus, K))
    assert waited == [True] * len(SEVEN)


def test_two_items_are_held_at_the_most():
    class Item:
        def __init__(self):
            alive.add(self)
            counts.append(len(alive))

    def items():
        for _ in range(50):
            yield Item()

    alive, counts = weakref.WeakSet(), []
    for item in read_ahead(items()):
        del item
    assert max(counts) <= 2


def test_a_reader_that_is_left_ends():
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    reader = read_ahead(items())
    next(reader)
    reader.close()
    assert closed.is_set()


def test_what_is_no_stream():
    for array in ([[1.0]], np.ones((2, 2)), "x", {"a": 1}, {1.0}, range(3), b"xy", [], (), None, 3.0, [1.0], object()):
        if isinstance(array, str):
            refused(lambda array=array: as_stream(array, "corpus", as_rows), "ends in .npy")
        else:
            assert as_stream(array, "corpus", as_rows) is None


# ---- preparing, and the classifier


@pytest.mark.parametrize("kind", ["memmap", "path", "dask", "seven blocks"])
def test_a_prepared_corpus_on_disk(kind, rng, tmp_path, monkeypatch):
    queries, corpus = make(rng, "float32")
    expected, matrix = knn(queries, corpus, K, backend="numba"), pairwise(queries, corpus, backend="numba")
    monkeypatch.setenv("KNNBENCH_MEMORY_BUDGET", "100000")
    prepared = prepare(KINDS[kind](corpus, tmp_path / "c.npy"), backend="numba")
    assert prepared.shape == corpus.shape
    for _ in range(2):
        assert_same(knn(queries, prepared, K), expected)
    assert_identical(pairwise(queries, prepared), matrix)
    restored = pickle.loads(pickle.dumps(prepared))
    assert_same(knn(queries, restored, K), expected)


def test_a_small_file_is_packed_once(rng, tmp_path):
    _, corpus = make(rng, "uint8")
    assert isinstance(prepare(as_memmap(corpus, tmp_path / "c.npy")).rows, np.ndarray)
    assert isinstance(api.as_corpus(as_memmap(corpus, tmp_path / "c.npy")), MappedStream)


def test_an_iterable_without_a_length_is_counted_when_it_is_prepared(rng):
    queries, corpus = make(rng, "uint8")

    class Blocks:
        def __iter__(self):
            yield from cut(corpus, SEVEN)

    prepared = prepare(Blocks())
    assert prepared.shape == corpus.shape
    assert_same(knn(queries, prepared, K), knn(queries, corpus, K))


@pytest.mark.parametrize("kind", ["memmap", "path", "dask", "seven blocks"])
def test_the_classifier_takes_what_lies_on_disk(kind, rng, tmp_path, monkeypatch):
    queries, corpus = make(rng, "uint8")
    labels = np.array(["a", "b", "c"])[corpus[:, 1] % 3]
    whole = KNNClassifier(5).fit(corpus, labels)
    monkeypatch.setenv("KNNBENCH_MEMORY_BUDGET", "100000")
    classifier = KNNClassifier(5).fit(KINDS[kind](corpus, tmp_path / "c.npy"), labels)
    assert classifier.n_features_in_ == N_FEATURES
    assert classifier.n_samples_fit_ == N_CORPUS
    for given_queries in (queries, KINDS[kind](queries, tmp_path / "q.npy") if kind != "seven blocks" else [queries]):
        np.testing.assert_array_equal(classifier.predict(given_queries), whole.predict(queries))
    np.testing.assert_array_equal(classifier.kneighbors()[1], whole.kneighbors()[1])
    assert classifier.score_k() == whole.score_k()
    with pytest.raises(ValueError, match="inconsistent"):
        KNNClassifier(5).fit(KINDS[kind](corpus, tmp_path / "c.npy"), labels[:-1])


# ---- memory

MEASURED = """
import sys
from pathlib import Path
import numpy as np
from knnbench import knn

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

path, kind, budget, backend, accuracy = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
corpus = np.load(path, mmap_mode="r")
rng = np.random.default_rng(0)
n_queries, k, metric = (300, 10, "euclidean") if accuracy == "fast" else (2000, 25, "cosine")
queries = rng.integers(0, 256, (n_queries, corpus.shape[1])).astype(np.float32 if kind == "float32" else corpus.dtype)
options = {"metric": metric, "backend": backend, "accuracy": accuracy, "memory_budget": budget}
knn(queries[:300], [corpus[:500]], k, **options)  # compiles what so many rows take
before, peak, stop = anonymous(), 0, False

import threading
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
given = corpus if kind != "blocks" else (corpus[i : i + 500] for i in range(0, len(corpus), 500))
answer = knn(queries, given, k, **options)
stop = True
watcher.join()
print(peak - before, answer.distances.nbytes + answer.indices.nbytes)
"""


def measured(corpus, path, kind, budget, backend, accuracy):
    """Return the bytes that a search held at the most beyond what was there before, and those of its outputs."""
    np.save(path, corpus)
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), kind, str(budget), backend, accuracy],
        capture_output=True, text=True, check=False, timeout=240,
        # Who watches takes a CPU, and threads of OpenBLAS for which there is none left spin: 20 times as long.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return map(int, run.stdout.split())


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's account of anonymous memory")

# What Python and the allocator round up to.
ROUNDED = 2 << 20


@LINUX
@pytest.mark.parametrize(("kind", "backend"), [("memmap", "numba"), ("float32", "numba"), ("blocks", "numpy")])
def test_memory_stays_within_the_budget_on_a_corpus_ten_times_as_large(kind, backend, rng, tmp_path):
    budget = 8 << 20
    corpus = rng.integers(0, 256, (10 * budget // 512, 512), dtype=np.uint8)
    used, outputs = measured(corpus, tmp_path / "c.npy", kind, budget, backend, "fast")
    assert used <= budget + outputs + ROUNDED, f"{used:,} bytes with a budget of {budget:,}"


@LINUX
def test_exact_values_of_many_queries_stay_within_the_budget(rng, tmp_path):
    budget = 1 << 20  # they would take ten times as much
    used, outputs = measured(rng.random((1200, 32)), tmp_path / "c.npy", "memmap", budget, "numba", "exact")
    assert used <= budget + outputs + ROUNDED, f"{used:,} bytes with a budget of {budget:,}"


# ---- settings that a job holds


def test_a_setting_is_held_in_its_own_thread_only(monkeypatch):
    monkeypatch.setenv("KNNBENCH_THREADS", "2")
    seen = []
    with held({"KNNBENCH_THREADS": "5"}):
        assert thread_count() == 5
        with held({"KNNBENCH_SIMD": "generic"}):
            assert (setting("KNNBENCH_THREADS"), setting("KNNBENCH_SIMD")) == ("5", "generic")
        other = threading.Thread(target=lambda: seen.append(thread_count()))
        other.start()
        other.join()
    assert seen == [2]
    assert thread_count() == 2


def test_the_level_of_vector_instructions_is_held():
    from knnbench.kernels.cpu_simd import simd_level

    with held({"KNNBENCH_SIMD": "generic"}):
        assert simd_level().name == "generic"
    assert simd_level().name != "generic" or not setting("KNNBENCH_SIMD")
