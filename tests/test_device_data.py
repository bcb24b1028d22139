"""Host rows on their way to a device, arrays handed from one library to another, and devices without memory.

There is no device: a lane of numpy arrays, whose copies are done as late as they may be, stands for one; libraries are
pretended; and a backend of the CPU runs out of memory where it is told to.
"""

import sys
import threading
import types
from collections import deque

import numpy as np
import pytest

from knnbench import OverBudgetError, api, interchange, knn, pairwise, prepare
from knnbench.backends import get_backend, upload
from knnbench.backends.upload import Lane, Uploader

from ._checks import assert_identical


class LateLane(Lane):
    """Copies are done when they are waited for, and no earlier: what else the buffers are used for then shows."""

    def __init__(self):
        self.queue, self.events, self.locked, self.fails_at = [], [], [], None

    def empty(self, shape, dtype):
        return np.full(shape, 77, dtype)

    def page_locked(self, n_bytes):
        self.locked.append(np.zeros(n_bytes, np.uint8))
        return self.locked[-1]

    def is_page_locked(self, rows):
        return any(np.shares_memory(rows, buffer) for buffer in self.locked)

    def begin(self):
        assert not self.queue
        self.events.append("begin")

    def copy(self, source, target, rows):
        assert source.flags.c_contiguous
        assert source.dtype == target.dtype
        number = sum(event != "begin" for event in self.events)
        if number == self.fails_at:
            raise RuntimeError("planted")
        self.events.append((rows.start, rows.stop))
        self.queue.append((source, target, rows))
        position = len(self.queue)

        def wait():
            for place in range(position):
                if self.queue[place] is not None:
                    source, target, rows = self.queue[place]
                    target[rows] = source
                    self.queue[place] = None
            while self.queue and self.queue[0] is None and all(entry is None for entry in self.queue):
                self.queue.clear()

        return wait


@pytest.fixture
def lane(monkeypatch):
    monkeypatch.setattr(upload, "BUFFER_BYTES", 64)
    return LateLane()


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 8, 9, 17, 100])
@pytest.mark.parametrize("n_features", [1, 5, 16, 17, 40])
@pytest.mark.parametrize(("given", "dtype"), [("uint8", "uint8"), ("float32", "float32"), (">f8", "float32")])
def test_every_row_arrives(lane, given, dtype, n_rows, n_features, rng):
    uploader = Uploader(lane)
    for _ in range(2):  # in the buffers of the first time
        rows = rng.integers(0, 256, (n_rows, n_features)).astype(given)
        got = uploader.upload(rows, np.dtype(dtype))
        assert_identical(got, rows.astype(dtype))
        assert not lane.queue


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, lambda rows: np.repeat(rows, 2, axis=0)[::2], lambda rows: rows[::-1]]
)
def test_rows_of_any_layout_arrive(lane, layout, rng):
    rows = layout(rng.normal(size=(31, 7)).astype(np.float32))
    assert_identical(Uploader(lane).upload(rows, np.dtype(np.float32)), np.ascontiguousarray(rows))


def test_parts_are_whole_rows_in_order(lane):
    rows = np.arange(23 * 7, dtype=np.uint8).reshape(23, 7)
    Uploader(lane).upload(rows, rows.dtype)
    assert lane.events == ["begin", (0, 9), (9, 18), (18, 23)]
    assert len(lane.locked) == 2


def test_a_row_larger_than_a_buffer(lane):
    rows = np.arange(3 * 100, dtype=np.float64).reshape(3, 100)
    uploader = Uploader(lane)
    assert_identical(uploader.upload(rows, rows.dtype), rows)
    assert_identical(uploader.upload(rows[:, :20].copy(), rows.dtype), rows[:, :20])


def test_small_rows_and_page_locked_ones_pass_no_buffer(lane):
    small = np.arange(60, dtype=np.uint8).reshape(6, 10)
    uploader = Uploader(lane)
    assert_identical(uploader.upload(small, small.dtype), small)
    assert not lane.locked
    large = uploader.page_locked(np.arange(100 * 10, dtype=np.uint16).reshape(100, 10))
    assert_identical(uploader.upload(large, large.dtype), np.arange(1000, dtype=np.uint16).reshape(100, 10))
    assert lane.events[-1] == (0, 100)
    assert len(lane.locked) == 1


@pytest.mark.parametrize("fails_at", [0, 1, 2, 4])
def test_an_error_leaves_nothing_under_way(lane, fails_at):
    rows = np.arange(50 * 16, dtype=np.uint8).reshape(50, 16)
    uploader, lane.fails_at = Uploader(lane), fails_at
    with pytest.raises(RuntimeError, match="planted"):
        uploader.upload(rows, rows.dtype)
    assert not lane.queue
    lane.fails_at = None
    assert_identical(uploader.upload(rows, rows.dtype), rows)


def test_rows_that_cannot_be_read_leave_nothing_under_way(lane):
    class Broken(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, slice) and key.start == 8:
                raise OSError("planted")
            return super().__getitem__(key)

    rows = np.zeros((20, 16), np.uint8).view(Broken)
    uploader = Uploader(lane)
    with pytest.raises(OSError, match="planted"):
        uploader.upload(rows, np.dtype(np.uint8))
    assert not lane.queue
    assert_identical(uploader.upload(np.ones((20, 16), np.uint8), np.dtype(np.uint8)), np.ones((20, 16), np.uint8))


def test_a_buffer_that_is_filled_too_early_shows(lane, monkeypatch):
    # Or the tests above prove nothing.
    class NeverFull(deque):
        def __len__(self):
            return 0

        def __bool__(self):
            return next(iter(self), None) is not None

    monkeypatch.setattr(upload, "deque", NeverFull)
    rows = np.arange(20 * 16, dtype=np.uint16).astype(np.uint8).reshape(20, 16)
    assert not np.array_equal(Uploader(lane).upload(rows, rows.dtype), rows)


def test_threads_take_turns(lane, rng):
    uploader, wrong = Uploader(lane), []

    def run(seed):
        rows = np.full((60, 16), seed, np.uint8)
        if not np.array_equal(uploader.upload(rows, rows.dtype), rows):
            wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lane.events.count("begin") == 8


# ---- arrays of one library in another


class PretendedArray:
    """What a device array presents itself by."""

    def __init__(self, library, stream, version=3):
        interface = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": version}
        self.__cuda_array_interface__ = interface | ({"stream": stream} if version >= 3 else {})
        self.library = library


def array_of(library, stream, version=3):
    kind = type("Array", (PretendedArray,), {"__module__": f"{library}.arrays"})
    return kind(library, stream, version)


@pytest.fixture
def libraries(monkeypatch):
    """Modules that say which stream an array named when they took it, and what waited for what."""
    log = []

    def taken(library):
        def take(array, **options):
            interface = array.__cuda_array_interface__
            log.append((library, interface.get("stream"), interface["version"]))
            return array_of(library, 5)

        return take

    def stream(handle):
        made = types.SimpleNamespace(ptr=handle, cuda_stream=handle)
        made.wait_stream = lambda other: log.append(("waits", handle, other.cuda_stream))
        return made

    cupy, torch, cuda = (types.ModuleType(name) for name in ("cupy", "torch", "numba.cuda"))
    cupy.asarray, torch.as_tensor, cuda.as_cuda_array = taken("cupy"), taken("torch"), taken("numba")
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream(11))
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda: stream(22), default_stream=lambda: stream(0), ExternalStream=stream
    )
    for module in (cupy, torch, cuda):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return log


@pytest.mark.parametrize(
    ("giver", "stream", "version", "expected"),
    [
        ("cupy", 9, 3, 9),  # as it says
        ("cupy", None, 3, 11),
        ("torch", None, 2, 22),  # which names no stream: its current one
        ("numba", None, 3, 1),  # on the default stream
        ("numba", 7, 3, 7),
        ("jax", 6, 3, 6),
        ("jax", None, 3, None),  # there is nothing to wait for
    ],
)
@pytest.mark.parametrize("taker", ["cupy", "torch", "numba"])
def test_what_takes_an_array_is_told_its_stream(libraries, giver, stream, version, expected, taker):
    array = array_of(giver, stream, version)
    got = interchange.take(taker, array)
    if giver == taker:
        assert got is array
        assert not libraries
        return
    assert type(got).__module__.startswith(taker)
    told = [entry for entry in libraries if entry[0] == taker]
    assert told == [(taker, expected, 3)]
    # torch does not look; 1 stands for the default stream.
    waits = [entry for entry in libraries if entry[0] == "waits"]
    assert waits == ([("waits", 22, 0 if expected == 1 else expected)] if taker == "torch" and expected else [])


def test_an_answer_in_kind_comes_after_what_made_it(libraries):
    interchange.in_kind(array_of("torch", None, 2), array_of("cupy", 9))
    assert libraries == [("cupy", 22, 3)]
    libraries.clear()
    unknown = array_of("jax", 6)
    answer = array_of("torch", None, 2)
    assert interchange.in_kind(answer, unknown) is answer


# ---- devices without memory


class DeviceFullError(Exception):
    """What a library raises."""


@pytest.fixture
def full(monkeypatch):
    """A backend whose device has room for some rows of a packed corpus, and within some budget."""
    kind = type(get_backend("numpy"))
    limits = types.SimpleNamespace(rows=10**9, budget=1 << 60, budgets=[], rows_seen=[], recovered=0)
    knn_of, pairwise_of = kind.knn, kind.pairwise

    def guarded(function):
        def call(self, queries, prepared, *args):
            limits.budgets.append(args[-1])
            if args[-1] > limits.budget:
                raise DeviceFullError("no\nmemory")
            return function(self, queries, prepared, *args)

        return call

    def packing(function):
        def call(self, rows, *args):
            limits.rows_seen.append(len(rows))
            if len(rows) > limits.rows:
                raise DeviceFullError("no\nmemory")
            return function(self, rows, *args)

        return call

    def ran_out(self, error):
        limits.recovered += isinstance(error, DeviceFullError)
        return isinstance(error, DeviceFullError)

    monkeypatch.setattr(kind, "knn", guarded(knn_of))
    monkeypatch.setattr(kind, "pairwise", guarded(pairwise_of))
    monkeypatch.setattr(kind, "prepare", packing(kind.prepare))
    monkeypatch.setattr(kind, "prepare_about", packing(kind.prepare_about))
    monkeypatch.setattr(kind, "ran_out", ran_out)
    return limits


def problem(rng, dtype="uint8"):
    return (rng.integers(0, 6, (n, 5)).astype(dtype) for n in (9, 101))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("source", ["array", "blocks", "file"])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_a_corpus_that_does_not_fit_is_searched_in_pieces_that_do(full, rng, tmp_path, rows, source, dtype):
    queries, corpus = problem(rng, dtype)
    expected = knn(queries, corpus, 4, backend="numpy")
    np.save(tmp_path / "corpus.npy", corpus)
    given = {"array": corpus, "blocks": iter([corpus[:60], corpus[60:]]), "file": str(tmp_path / "corpus.npy")}[source]
    full.rows = rows
    done = []
    got = knn(queries, given, 4, backend="numpy", progress=lambda rows, _: done.append(rows))
    assert_identical(got.indices, expected.indices)
    np.testing.assert_allclose(got.distances, expected.distances, rtol=1e-6)
    assert done == sorted(set(done))
    assert done[-1] == 101
    assert full.recovered
    if source == "array":
        np.testing.assert_allclose(
            pairwise(queries, corpus, backend="numpy"), pairwise(queries, corpus, backend="numba"), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("is_full", [False, True])
def test_a_prepared_corpus_is_packed_once_for_many_blocks_of_queries(full, rng, monkeypatch, is_full):
    queries, corpus = problem(rng, "float32")
    expected = knn(queries, corpus, 4, backend="numpy")
    prepared = prepare(corpus, backend="numpy")
    full.rows_seen.clear()
    if is_full:
        prepared._packed.clear()
        full.rows = 60
    monkeypatch.setattr(api._Task, "query_blocks", lambda task, answer_bytes: [slice(0, 4), slice(4, 9)])
    got = knn(queries, prepared, 4)
    assert_identical(got.indices, expected.indices)
    np.testing.assert_allclose(got.distances, expected.distances, rtol=1e-6)
    # The whole of it is tried as what is kept, and as a part.
    assert full.rows_seen == ([101, 101, 51, 50] if is_full else [])


def test_pieces_of_floats_are_centred_about_one_point(full, rng, monkeypatch):
    queries, corpus = problem(rng, "float32")
    centres, pack = [], type(get_backend("numpy")).prepare_about
    monkeypatch.setattr(
        type(get_backend("numpy")), "prepare_about", lambda self, *args: centres.append(args[1]) or pack(self, *args)
    )
    full.rows = 30
    knn(queries, corpus, 4, backend="numpy")
    assert len(centres) >= 4
    assert all(np.array_equal(centre, centres[0]) for centre in centres)


@pytest.mark.parametrize(
    "operation", [lambda q, c: knn(q, c, 3, backend="numpy").indices, lambda q, c: pairwise(q, c, backend="numpy")]
)
def test_a_block_that_does_not_fit_is_halved_until_it_does(full, rng, operation):
    queries, corpus = problem(rng)
    expected = operation(queries, corpus)
    full.budgets.clear()
    full.budget = api.check_budget(None) // 6
    assert_identical(operation(queries, corpus), expected)
    assert full.budgets == [api.check_budget(None) // 2**n for n in range(4)]


def test_what_cannot_fit_says_what_it_needs(full, rng):
    queries, corpus = problem(rng)
    full.budget = 20
    with pytest.raises(OverBudgetError, match=r"no memory left \(DeviceFullError: no memory\), and the .* which needs"):
        knn(queries, corpus, 3, backend="numpy")
    full.budget, full.rows = 1 << 60, 0
    with pytest.raises(
        OverBudgetError, match=r"no memory left for a single row of the corpus \(DeviceFullError: no memory\)"
    ):
        knn(queries, corpus, 3, backend="numpy")
    with pytest.raises(OverBudgetError, match=r"no memory left for a corpus of 101 x 5 .*leave the corpus unprepared"):
        prepare(corpus, backend="numpy")
    floats = corpus.astype(np.float32)
    with pytest.raises(OverBudgetError, match=r"no memory left for the exact search of 101 rows"):
        knn(floats[:3], floats, 3, backend="numpy", accuracy="exact")


def test_other_errors_pass_and_a_budget_of_the_caller_is_not_excused(full, rng, monkeypatch):
    queries, corpus = problem(rng)
    with pytest.raises(OverBudgetError, match=r"^the \d+ bytes that the memory budget leaves"):
        knn(queries, corpus, 3, backend="numpy", memory_budget=50)

    def broken(*args):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(type(get_backend("numpy")), "knn", broken)
    with pytest.raises(ZeroDivisionError, match="planted"):
        knn(queries, corpus, 3, backend="numpy")
    monkeypatch.setattr(type(get_backend("numpy")), "prepare", broken)
    with pytest.raises(ZeroDivisionError, match="planted"):
        knn(queries, corpus, 3, backend="numpy")
