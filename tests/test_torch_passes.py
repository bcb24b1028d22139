"""How often the torch backends touch what is as large as a tile, how often they wait, and what they hold meanwhile.

Times on a GPU follow from these counts, which need none: a tile is as many bytes as the product writes, and whatever
looks at it once more takes about as long again.
"""

import weakref
from collections import Counter

import numpy as np
import pytest

from knnbench import knn
from knnbench.metrics import METRICS, Space

from ._checks import assert_identical

torch = pytest.importorskip("torch")
backend = pytest.importorskip("knnbench.backends.torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from knnbench.backends.torch_selection import Minima, first_columns  # noqa: E402

# Of these a call reads no more elements than it returns, however large what it looks them up in.
LOOKED_UP = {"gather", "index", "index_select"}

# What gives the host a number, or a shape, that a device has to compute first.
WAITED_FOR = {"nonzero", "_local_scalar_dense", "masked_select", "equal"}

# Rows of the corpus are fewer elements than `LARGE`, and so is what is chosen among; every tile is more.
SHAPE = 256, 40_000, 16
LARGE = SHAPE[0] * 4096
PRODUCTS = {"uint8": "_int_mm", "float32": "mm", "float64": "mm"}


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


class Watch(TorchDispatchMode):
    """Counts what operations read and write of large tensors, and the bytes of all that are alive."""

    def __init__(self):
        super().__init__()
        self.elements, self.waited, self.n_operations = Counter(), Counter(), 0
        self.peak = self._held = 0
        self._users = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = list(tensors([*args, *(value for name, value in (kwargs or {}).items() if name != "out")]))
        for tensor in read:
            self.keep(tensor, counted=False)
        result = function(*args, **(kwargs or {}))
        name, written = function.overloadpacket.__name__, list(tensors([result]))
        for tensor in written:
            self.keep(tensor)
        self.waited[name] += name in WAITED_FOR
        memory = {tensor.untyped_storage().data_ptr() for tensor in read}
        if not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in memory for t in written):
            return result  # a view
        self.n_operations += 1
        touched = written if name in LOOKED_UP else [*read, *written]
        self.elements[name] += sum(tensor.numel() for tensor in touched if tensor.numel() >= LARGE)
        return result

    def keep(self, tensor, *, counted=True):
        """Count the memory of a tensor until no tensor seen has it; what was there before is not counted."""
        memory = tensor.untyped_storage()
        key, n_bytes = memory.data_ptr(), memory.nbytes()
        if not self._users[key] and not counted:
            return
        self._held += 0 if self._users[key] else n_bytes
        self.peak = max(self.peak, self._held)
        self._users[key] += 1
        weakref.finalize(tensor, self.drop, key, n_bytes)

    def drop(self, key, n_bytes):
        self._users[key] -= 1
        self._held -= 0 if self._users[key] else n_bytes


class Wide(backend.TorchBackend):
    """The search as it is on CUDA, on the CPU: wide tiles, and long rows sorted."""

    largest = backend.TorchCudaBackend.largest
    short = backend.TorchCudaBackend.short
    row_copies = backend.TorchCudaBackend.row_copies


ENGINES = {"cpu": backend.TorchBackend, "cuda": Wide}


@pytest.fixture(autouse=True)
def int8_products(monkeypatch):
    monkeypatch.setitem(backend.INT8_UNITS, "cpu", lambda: "dot-uint8")


def rows_of(dtype, shape=SHAPE):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, shape[2])).astype(dtype) for n in shape[:2]]


def watched(engine, dtype, k, metric="sqeuclidean", budget=1 << 30, shape=SHAPE):
    """Return what a search did, and its answer."""
    queries, corpus = map(torch.from_numpy, rows_of(dtype, shape))
    space = Space(METRICS[metric], np.dtype(dtype), shape[2])
    prepared = engine.prepare(corpus, space)
    with Watch() as watch:
        answer = engine.knn(queries, prepared, k, space, budget)
    return watch, answer


def assert_few_passes(watch, dtype):
    n_pairs = SHAPE[0] * SHAPE[1]
    # The product writes a tile, norms are added to it in place, and its minima are read: four passes.
    assert {name for name, n in watch.elements.items() if n} == {PRODUCTS[dtype], "sub", "amin"}
    assert sum(watch.elements.values()) <= 4 * n_pairs


def assert_nothing_waits(watch, dtype):
    # What is computed again of floats is waited for, once for all queries of a block.
    again = {} if dtype == "uint8" else {"_local_scalar_dense": 1, "nonzero": 1}
    assert {name: n for name, n in watch.waited.items() if n} == again
    assert watch.n_operations <= (40 if dtype == "uint8" else 70)


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("device", "k"), [("cpu", 3), ("cpu", 10), ("cuda", 3), ("cuda", 10), ("cuda", 100)])
def test_a_tile_is_passed_over_four_times(device, k, dtype):
    watch, answer = watched(ENGINES[device](), dtype, k)
    assert_few_passes(watch, dtype)
    queries, corpus = rows_of(dtype)
    expected = knn(queries[:20], corpus, k, "sqeuclidean", backend="numpy")
    assert_identical(answer[1][:20].numpy(), expected.indices)


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_nothing_is_waited_for_while_a_device_computes(k, dtype):
    watch, _ = watched(Wide(), dtype, k)
    assert_nothing_waits(watch, dtype)


@pytest.mark.parametrize("device", ENGINES)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_pass_more_is_noticed(device, dtype, monkeypatch):
    form = METRICS["sqeuclidean"].integer.from_dot
    monkeypatch.setitem(
        backend.FROM_DOT,
        form,
        backend.GramForm(lambda dots, norms: dots.mul_(-2).add_(norms), backend.FROM_DOT[form].own),
    )
    watch, _ = watched(ENGINES[device](), dtype, 3)
    with pytest.raises(AssertionError):
        assert_few_passes(watch, dtype)


def plain(values, k):
    columns = first_columns(values, k, 0)
    return values.gather(1, columns), columns


@pytest.mark.parametrize(
    "planted", [{"smallest": plain}, {"closer": lambda v, limit: torch.nonzero(v < limit)[:, :2].T}]
)
def test_a_selection_that_looks_at_everything_is_noticed(planted, monkeypatch):
    for name, function in planted.items():
        monkeypatch.setattr(Minima, name, lambda self, *args, function=function: function(*args))
    watch, _ = watched(backend.TorchBackend(), "uint8", 3)
    with pytest.raises(AssertionError):
        assert_few_passes(watch, "uint8")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_waiting_is_noticed(dtype, monkeypatch):
    minima = Minima.minima
    monkeypatch.setattr(Minima, "minima", lambda self, *args: minima(self, *args).add_(0 * int(args[0][0, 0])))
    watch, _ = watched(Wide(), dtype, 3)
    with pytest.raises(AssertionError):
        assert_nothing_waits(watch, dtype)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_one_tile_takes_the_place_of_another(dtype):
    engine, space = backend.TorchBackend(), Space(METRICS["sqeuclidean"], np.dtype(dtype), SHAPE[2])
    blocks = engine._search_blocks(*SHAPE[:2], 3, space, 1 << 30)
    assert blocks.corpus < SHAPE[1] / 2
    watch, _ = watched(engine, dtype, 3)
    assert 1 <= watch.peak / (blocks.queries * blocks.corpus * 4) < 1.5


@pytest.mark.parametrize("k", [3, 400])
@pytest.mark.parametrize("device", ENGINES)
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "chebyshev"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_tensors_keep_to_the_budget(dtype, metric, device, k):
    budget = 1 << 24
    watch, answer = watched(ENGINES[device](), dtype, k, metric, budget, shape=(300, 8000, 16))
    held = watch.peak - sum(array.nbytes for array in answer)
    assert budget / 8 < held <= budget


def test_what_is_held_is_noticed(monkeypatch):
    monkeypatch.setattr(backend, "block_shape", lambda n_queries, n_corpus, **limits: (n_queries, n_corpus))
    watch, _ = watched(Wide(), "uint8", 3, budget=1 << 24)
    assert watch.peak > SHAPE[0] * SHAPE[1] * 4
