"""What only the torch backends can get wrong; that they are right is in `tests/test_backends.py`."""

import contextlib
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from knnbench import knn, pairwise, prepare
from knnbench.backends import backend_status, get_backend
from knnbench.blocking import slices
from knnbench.dtypes import COMPUTED
from knnbench.metrics import METRICS, Space
from knnbench.ordering import Selection, smallest_k

from ._checks import assert_identical

torch = pytest.importorskip("torch")
backend = pytest.importorskip("knnbench.backends.torch")

from knnbench.backends.torch_selection import LEAST_GROUP, Minima, group_columns  # noqa: E402

CASES = Path(__file__).with_name("gpu_cases.py")

SHAPE = 40, 150, 70  # of enough features for the tiles of the direct form


def rows_of(rng, n, n_features, dtype):
    if dtype == "uint8":
        return rng.integers(1, 256, (n, n_features), np.uint8)
    return (rng.normal(size=(n, n_features)) + 3).astype(dtype)


def answers(dtype, n_features=SHAPE[2]):
    """Return what every operation answers in all metrics."""
    rng = np.random.default_rng(8)
    queries, corpus = (rows_of(rng, n, n_features, dtype) for n in SHAPE[:2])
    corpus[10] = corpus[100] = queries[3]
    far = (queries + 1e4, corpus + 1e4) if dtype != "uint8" else (queries, corpus)
    found = []
    for metric, (q, c) in itertools.product(METRICS, ((queries, corpus), far)):
        found += [*knn(q, c, 7, metric, backend="torch"), pairwise(q, c, metric, backend="torch")]
    return found


@contextlib.contextmanager
def set_aside(get, put, value):
    before = get()
    put(value)
    try:
        yield lambda: get() == value
    finally:
        put(before)


def precision(switch, value):
    return set_aside(lambda: switch.fp32_precision, lambda v: setattr(switch, "fp32_precision", v), value)


@contextlib.contextmanager
def legacy_precision():
    """Set the precision by the function that came before the switches, which moves them too."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield (
            lambda: (
                torch.get_float32_matmul_precision() == "medium"
                and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
                and torch.backends.cuda.matmul.fp32_precision == "tf32"
            )
        )
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def mode(manager, is_on):
    with manager:
        yield is_on


SWITCHES = {
    "bfloat16 products": lambda: precision(torch.backends.mkldnn.matmul, "bf16"),
    "bfloat16 everywhere": lambda: precision(torch.backends, "bf16"),
    "legacy precision": legacy_precision,
    "autocast": lambda: mode(
        torch.autocast("cpu", torch.bfloat16), lambda: torch.is_autocast_enabled("cpu")
    ),
    "inference mode": lambda: mode(torch.inference_mode(), torch.is_inference_mode_enabled),
    "default dtype": lambda: set_aside(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: set_aside(
        lambda: torch.get_default_device().type, torch.set_default_device, "meta"
    ),
    "deterministic": lambda: set_aside(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "no oneDNN": lambda: set_aside(
        lambda: torch.backends.mkldnn.enabled, lambda v: setattr(torch.backends.mkldnn, "enabled", v), False
    ),
    "one thread": lambda: set_aside(torch.get_num_threads, torch.set_num_threads, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("switch", SWITCHES)
def test_global_switches_change_no_answer_and_are_left_alone(switch, dtype):
    expected = answers(dtype)
    with SWITCHES[switch]() as is_as_set:
        assert is_as_set()
        got = answers(dtype)
        assert is_as_set()
    for ours, theirs in zip(got, expected, strict=True):
        assert_identical(ours, theirs)


def test_autocast_would_have_changed_the_answer():
    # Or the test above proves nothing about it.
    rows = torch.rand(64, 64, dtype=torch.float32)
    expected = rows @ rows
    with torch.autocast("cpu", torch.bfloat16):
        assert (rows @ rows).dtype == torch.bfloat16
        with backend.plain_arithmetic("cpu"):
            assert torch.equal(rows @ rows, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("found", "held"), [("bf16", "ieee"), ("tf32", "ieee"), ("ieee", "ieee"), ("none", "none")])
def test_products_are_held_at_full_precision(device, found, held):
    # What processors without bfloat16, or machines without a GPU, cannot show in an answer.
    if (device, found) == ("cuda", "bf16"):
        pytest.skip("not a precision of CUDA's products")
    switch = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    with precision(switch, found) as is_as_set:
        with backend.full_precision(device):
            assert switch.fp32_precision == held
        assert is_as_set()
        with pytest.raises(KeyError), backend.full_precision(device):
            raise KeyError
        assert is_as_set()


def test_calls_that_overlap_hold_the_precision_together():
    switch = torch.backends.mkldnn.matmul
    with precision(switch, "bf16") as is_as_set:
        first, second = backend.plain_arithmetic("cpu"), backend.plain_arithmetic("cpu")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert switch.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert is_as_set()


def test_the_number_of_threads_is_held_and_restored(monkeypatch):
    before = torch.get_num_threads()
    wanted = before + 1
    monkeypatch.setenv("KNNBENCH_THREADS", str(wanted))
    with backend.plain_arithmetic("cpu"):
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), backend.plain_arithmetic("cpu"):
        raise KeyError
    assert torch.get_num_threads() == before


def test_threads_to_come_have_as_many_as_before(rng):
    rows = rng.normal(size=(50, 70))
    with set_aside(torch.get_num_threads, torch.set_num_threads, 3) as is_as_set:
        pairwise(rows, rows, "cityblock", backend="torch")
        assert is_as_set()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3


def test_an_error_in_a_thread_is_raised():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        backend.run_apart(lambda part: 1 // part.start, [slice(2, 3), slice(0, 1)])
    assert torch.get_num_threads() == before


# ---- arrays


@pytest.mark.parametrize("dtype", COMPUTED)
def test_arrays_are_shared_both_ways(dtype):
    engine, dtype = get_backend("torch"), np.dtype(dtype)
    rows = rows_of(np.random.default_rng(0), 5, 3, dtype)
    native = engine.to_native(rows, dtype)
    assert np.shares_memory(engine.to_numpy(native), rows)
    assert engine.to_native(native, dtype).data_ptr() == native.data_ptr()


@pytest.mark.parametrize("dtype", COMPUTED)
def test_read_only_arrays_are_taken_without_a_copy_or_a_warning(dtype):
    engine, dtype = get_backend("torch"), np.dtype(dtype)
    rows = rows_of(np.random.default_rng(0), 5, 3, dtype)
    kept = rows.copy()
    rows.flags.writeable = False
    native = engine.to_native(rows, dtype)
    assert native.data_ptr() == rows.ctypes.data
    assert not rows.flags.writeable
    del rows  # the tensor keeps the memory
    assert_identical(engine.to_numpy(native), kept)


def test_tensors_of_a_graph_are_detached():
    engine = get_backend("torch")
    leaf = torch.ones((4, 3), requires_grad=True)
    native = engine.to_native(leaf * 2, np.dtype(np.float32))
    assert not native.requires_grad
    assert_identical(engine.to_numpy(native), np.full((4, 3), 2, np.float32))


def test_answers_are_made_outside_inference_mode_from_a_corpus_prepared_in_it():
    rows = rows_of(np.random.default_rng(0), 30, 5, "float32")
    expected = knn(rows, rows, 3, backend="torch")
    with torch.inference_mode():
        prepared = prepare(rows, backend="torch")
    assert_identical(knn(rows, prepared, 3).distances, expected.distances)


@pytest.mark.parametrize(("finite", "zero"), [(False, False), (False, True), (True, False), (True, True)])
def test_scan_finds_the_first_bad_row_beyond_the_first_chunk(finite, zero):
    engine = get_backend("torch")
    rows = np.ones((5000, 700), np.float32)
    for row, value in ((4100, np.inf), (3000, np.nan), (4999, np.nan)):
        rows[row, 7] = value
    rows[[2900, 4000]] = 0
    found = engine.scan(engine.to_native(rows, rows.dtype), finite=finite, zero=zero)
    assert found.not_finite == (3000 if finite else None)
    assert found.all_zero == (2900 if zero else None)
    integers = np.ones((3, 2), np.uint8)
    found = engine.scan(engine.to_native(integers, integers.dtype), finite=finite, zero=zero)
    assert (found.not_finite, found.all_zero) == (None, None)


# ---- order


@pytest.mark.parametrize("short", [0, 64, 4096])
@pytest.mark.parametrize(("width", "k"), [(40, 1), (40, 7), (40, 40), (200, 1), (2600, 3), (2603, 19), (900, 100)])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("largest", [1, 4, 1000])
def test_the_total_order_is_that_of_numpy(dtype, width, k, short, largest, rng):
    values = rng.integers(0, largest, (20, width)).astype(dtype)
    expected = smallest_k(np, values, k)
    minima = Minima(k, short, finite=True)
    for ours, theirs in zip(minima.smallest(torch.from_numpy(values), k), expected, strict=True):
        assert_identical(ours.numpy(), theirs)
    for step in (37, 300, 1280, width):
        selection = Selection(backend.NumpyNames("cpu"), k, minima.smallest, minima.closer)
        for columns in slices(width, step):
            selection.update(torch.from_numpy(values[:, columns]), columns.start)
        assert_identical(selection.values.numpy(), expected[0])
        assert_identical(selection.indices.numpy(), expected[1])


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_columns_in_order_are_selected(order):
    # Every block then replaces all that is held, or nothing of it.
    values = np.arange(2000, dtype=np.float32)[None].repeat(3, axis=0)[:, :: 1 if order == "ascending" else -1]
    minima = Minima(5, 64, finite=True)
    selection = Selection(backend.NumpyNames("cpu"), 5, minima.smallest, minima.closer)
    for columns in slices(2000, 320):
        selection.update(torch.from_numpy(values[:, columns].copy()), columns.start)
    expected = range(5) if order == "ascending" else range(1999, 1994, -1)
    assert selection.indices.tolist() == [list(expected)] * 3


def test_the_first_of_equal_columns_are_in_the_first_groups(rng):
    # The k-th value is that of more groups than are chosen, and of columns on both sides of an edge of two.
    values = np.full((4, 640), 9, np.int32)
    values[:, [31, 32, 95, 96, 320, 639]] = 1
    values[1, 400:] = 0
    values[2] = 1
    for k in (1, 2, 4):
        found = Minima(k, 0, finite=True).smallest(torch.from_numpy(values), k)
        assert_identical(found[1].numpy(), smallest_k(np, values, k)[1])


@pytest.mark.parametrize("short", [0, 4096])
@pytest.mark.parametrize("k", [1, 3, 50, 2500])
def test_what_is_not_a_number_is_last(k, short, rng):
    values = rng.random((6, 2600)).astype(np.float32)
    values[:, rng.integers(0, 2600, 400)] = np.nan  # of nearly every group one
    values[1, 2:] = np.nan
    values[2, 7] = np.inf
    expected = np.argsort(values, axis=1, kind="stable")[:, :k]
    minima = Minima(k, short, finite=False)
    for step in (320, 2600):
        selection = Selection(backend.NumpyNames("cpu"), k, minima.smallest, minima.closer)
        for columns in slices(2600, step):
            selection.update(torch.from_numpy(values[:, columns]), columns.start)
        assert_identical(np.isnan(selection.values.numpy()), np.isnan(np.take_along_axis(values, expected, axis=1)))
        numbers = ~np.isnan(selection.values.numpy())
        assert_identical(selection.indices.numpy()[numbers], expected[numbers])


@pytest.mark.parametrize(("width", "k"), [(60_000, 3), (60_000, 19), (4096, 3), (4096, 19), (65_536, 100)])
def test_groups_leave_few_columns_to_look_at(width, k):
    def looked_at(size):
        return width // size + k * size

    size = group_columns(width, k)
    assert size >= LEAST_GROUP
    assert looked_at(size) <= width / 4
    assert looked_at(size) <= 1.1 * min(looked_at(2**n) for n in range(5, 12))


def test_a_median_is_one_of_the_values():
    values = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 9.0, 9.0]])
    assert backend.NumpyNames("cpu").median(values, axis=1).tolist() == [2.0, 1.0]
    assert backend.NumpyNames("cpu").median(values[:, :3], axis=1).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_features", [3, 70, 40_000])
def test_equal_rows_are_equally_far_wherever_they_stand(metric, n_features, rng):
    # At 40,000 features torch sums one row alone by several threads, and rows together by one each.
    queries = rng.normal(size=(2, n_features)).astype(np.float32)
    corpus = rng.normal(size=(7, n_features)).astype(np.float32)
    corpus[[1, 4, 6]] = corpus[3]
    for budget in (1 << 30, 160 * n_features + 4000):
        distances, indices = knn(queries, corpus, 7, metric, backend="torch", memory_budget=budget)
        for found, order in zip(distances, indices.tolist(), strict=True):
            place = order.index(1)
            assert order[place : place + 4] == [1, 3, 4, 6]
            assert len(set(found[place : place + 4].tolist())) == 1


@pytest.mark.parametrize("n_terms", [1, 2, 5])
@pytest.mark.parametrize("n_features", [5, 40_000, 100_000])
def test_a_row_alone_is_rounded_as_among_others(n_features, n_terms, rng):
    terms = torch.from_numpy(rng.random((64, n_features), np.float32))
    together = backend.over_features(torch.sum, terms)
    for start in range(0, 60, n_terms):
        part = terms[start : start + n_terms]
        assert torch.equal(backend.over_features(torch.sum, part), together[start : start + n_terms])
        assert torch.equal(backend.over_features(torch.sum, part[None])[0], together[start : start + n_terms])


# ---- arithmetic


@pytest.mark.parametrize("n_features", [backend.EXACT_SUM, backend.EXACT_SUM + 1, 2 * backend.EXACT_SUM])
def test_sums_of_bytes_are_exact_where_float32_ends(n_features):
    queries = np.zeros((2, n_features), np.uint8)
    corpus = np.full((3, n_features), 255, np.uint8)
    corpus[1, 0] = 254
    corpus[2, :2] = 254
    expected = 255 * n_features - np.array([[0, 1, 2]] * 2, np.int64)
    assert_identical(pairwise(queries, corpus, "cityblock", backend="torch").astype(np.int64), expected)


@pytest.mark.parametrize("metric", ["cityblock", "chebyshev", "sqeuclidean"])
@pytest.mark.parametrize("n_features", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_direct_forms_are_right(metric, n_features, dtype, rng, monkeypatch):
    engine, space = get_backend("torch"), Space(METRICS[metric], np.dtype(dtype), n_features)
    # Quarters of small integers, whose sums are exact in any order.
    queries, corpus = (rng.integers(-40, 40, (n, n_features)).astype(dtype) / 4 for n in (37, 51))
    expected = pairwise(queries, corpus, metric, backend="python")
    a, b = (engine.to_native(rows, space.dtype) for rows in (queries, corpus))
    for tiled in (1, n_features + 1):
        monkeypatch.setattr(backend, "TILED_FEATURES", tiled)
        for elements in (1, 1000, 30_000, 1 << 19):
            monkeypatch.setattr(backend, "TILE_ELEMENTS", elements)
            assert_identical(engine.to_numpy(engine.direct_block(a, b, space)), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_the_direct_form_that_cuda_takes_is_right(metric, rng):
    # torch.cdist is the same function on the CPU: what stands around it is tested here.
    space = Space(METRICS[metric], np.dtype(np.float64), 20)
    form = backend.DIRECT_FORMS[space.form.step]
    queries, corpus = (torch.from_numpy(rng.normal(size=(n, 20))) for n in (5, 9))
    norms = torch.cdist(queries, corpus, p=form.order, compute_mode="donot_use_mm_for_euclid_dist")
    differences = queries[:, None] - corpus[None]
    expected = form.reduce(form.terms(differences), -1)
    torch.testing.assert_close(form.from_norm(norms), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unit_rows_are_those_of_the_metric(dtype, rng):
    info = np.finfo(dtype)
    scales = [info.smallest_subnormal, 8 * info.smallest_subnormal, info.tiny, 1e-20, 1, 1e20, info.max / 2, info.max]
    rows = np.concatenate([np.clip(rng.normal(size=(20, 9)), -1, 1) * scale for scale in scales]).astype(dtype)
    rows[:, 0] = np.repeat(np.array(scales, dtype), 20)  # none is all zeros
    got = backend.unit_length(torch.from_numpy(rows)).numpy()
    expected = METRICS["cosine"].prepare_rows(np, rows)
    np.testing.assert_allclose(got, expected, rtol=2 * info.eps, atol=float(info.tiny))
    np.testing.assert_allclose((got.astype(float) ** 2).sum(axis=1), 1, rtol=30 * info.eps)


def test_roots_are_rounded_as_the_definition_says(rng):
    squares = rng.integers(1, 2**53, 100_000).astype(np.float64) * rng.integers(1, 2**20, 100_000)
    assert_identical(backend.NumpyNames("cpu").sqrt(torch.from_numpy(squares)).numpy(), np.sqrt(squares))


def test_cosines_of_bytes_are_ranked_by_the_same_numbers(rng):
    form, (n_queries, n_corpus) = METRICS["cosine"].integer, (50, 2000)
    norms = (
        rng.integers(1000, 4000, (n_queries, 1)).astype(float),
        rng.integers(1000, 4000, (1, n_corpus)).astype(float),
    )
    dots = rng.integers(0, 3000, (n_queries, n_corpus)).astype(np.int32)
    got = form.rank_arrays(backend.NumpyNames("cpu"), *map(torch.from_numpy, (dots, *norms)))
    assert_identical(got.numpy(), form.rank_arrays(np, dots, *norms))


def test_every_metric_has_what_torch_needs():
    assert frozenset(METRICS) == backend.SUPPORTED
    forms = [form for metric in METRICS.values() for form in (metric.floating, metric.integer)]
    assert {form.from_dot for form in forms} - {None} == backend.FROM_DOT.keys()


@pytest.mark.parametrize("form", backend.FROM_DOT)
def test_the_forms_in_place_are_those_of_the_metrics(form, rng):
    shapes = ((4, 5), 1000), ((4, 1), 9), ((1, 5), 9)
    dots, query_norms, corpus_norms = (rng.integers(0, largest, shape) for shape, largest in shapes)
    given = torch.from_numpy(dots.copy())
    shared = backend.FROM_DOT[form].shared(given, torch.from_numpy(corpus_norms))
    order = shared.argsort(dim=1, stable=True).numpy()
    got = backend.FROM_DOT[form].own(shared, torch.from_numpy(query_norms))
    expected = form(dots, query_norms, corpus_norms)
    assert got.data_ptr() == given.data_ptr()
    assert_identical(got.numpy(), expected)
    assert_identical(order, np.argsort(expected, axis=1, kind="stable"))


# ---- CUDA


@pytest.mark.parametrize("n_features", [1, 7, 8, 16, 17, 784, 1025])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (17, 9), (18, 63), (40, 65)], ids=str)
def test_products_of_int8_are_exact(shape, n_features, rng):
    queries, corpus = (rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (n, n_features)) for n in shape)
    a, b = (backend.as_int8(torch.from_numpy(rows)) for rows in (queries, corpus))
    # What cuBLAS takes; on the CPU torch takes any shape.
    assert a.shape[0] > 16
    assert (a.shape[1] % 8, b.shape[1] % 8) == (0, 0)
    space = Space(METRICS["euclidean"], np.dtype(np.uint8), n_features)
    expected = (queries.astype(np.int64) - 128) @ (corpus.astype(np.int64) - 128).T
    for step in (1, 3, 8, 64):
        for start in range(0, shape[1], step):
            columns = slice(start, min(start + step, shape[1]))
            got = backend.int8_dot(a, b[start:], (shape[0], columns.stop - start), space).numpy()
            assert_identical(got.astype(np.int64), expected[:, columns])


def test_the_right_side_of_every_product_of_int8_is_a_multiple_of_8(rng, monkeypatch):
    product, widths = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: widths.append((a.shape[0], b.shape[1])) or product(a, b))
    rows = backend.as_int8(torch.from_numpy(rng.integers(0, 256, (61, 5), np.uint8)))
    space = Space(METRICS["euclidean"], np.dtype(np.uint8), 5)
    for columns in (slice(0, 61), slice(60, 61), slice(53, 61), slice(0, 1)):
        backend.int8_dot(rows, rows[columns.start :], (61, columns.stop - columns.start), space)
    assert widths == [(61, 64), (61, 8), (61, 8), (61, 8)]


@pytest.mark.parametrize("n_features", [1, 15, 16, 17, 784])
def test_a_packed_corpus_is_at_most_twice_as_large_as_its_rows(n_features, rng, monkeypatch):
    monkeypatch.setitem(backend.INT8_UNITS, "cpu", lambda: "dot-uint8")
    engine, space = get_backend("torch"), Space(METRICS["euclidean"], np.dtype(np.uint8), n_features)
    queries, corpus = (torch.from_numpy(rng.integers(0, 256, (n, n_features), np.uint8)) for n in (9, 1000))
    prepared = engine.prepare(corpus, space)
    kept = 0 if prepared.centred is None else prepared.centred.nbytes
    assert kept <= corpus.nbytes + backend.ROWS_MULTIPLE * n_features
    assert (kept > 0) == (n_features % 16 == 0)
    found = engine.knn(queries, prepared, 5, space, 1 << 20)
    expected = knn(queries.numpy(), corpus.numpy(), 5, "sqeuclidean", backend="numpy")
    assert_identical(found[0].numpy(), expected.distances)
    assert_identical(found[1].numpy(), expected.indices)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("n_features", [7, 16, 1025])
@pytest.mark.parametrize("unit", [None, "dot-uint8"])
def test_bytes_are_multiplied_alike_with_and_without_int8(unit, n_features, metric, rng, monkeypatch):
    monkeypatch.setitem(backend.INT8_UNITS, "cpu", lambda: unit)
    queries, corpus = (rng.integers(1, 256, (n, n_features), np.uint8) for n in (9, 300))
    expected = pairwise(queries, corpus, metric, backend="numpy")
    assert_identical(pairwise(queries, corpus, metric, backend="torch"), expected)
    found, neighbors = (knn(queries, corpus, 5, metric, backend=name) for name in ("torch", "numpy"))
    assert_identical(found.indices, neighbors.indices)
    assert_identical(found.distances, neighbors.distances)


def test_int8_is_taken_on_a_cpu_that_is_fast_at_it(monkeypatch):
    space = Space(METRICS["euclidean"], np.dtype(np.uint8), 16)
    supported = {"_is_vnni_supported": True, "_is_amx_tile_supported": True}
    for name, value in supported.items():
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
    monkeypatch.setattr(backend, "multiplies_int8", lambda device: True)
    assert get_backend("torch").operations(space, "knn") == {"matrix-uint8": 1.0}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert get_backend("torch").operations(space, "knn") == {"dot-uint8": 1.0}
    with SWITCHES["no oneDNN"]():
        assert backend.host_int8_unit() is None
    monkeypatch.setattr(backend, "multiplies_int8", lambda device: False)
    assert backend.host_int8_unit() is None
    monkeypatch.setattr(backend, "multiplies_int8", lambda device: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert get_backend("torch").operations(space, "knn") == {"fma-float32": 1}


def test_more_features_than_int32_can_sum(monkeypatch):
    assert backend.INT32_FEATURES * 2**14 < 2**31
    n_features = 3 * backend.INT32_FEATURES + 1
    rows = np.zeros((2, n_features), np.uint8)
    rows[1] = 255
    packed = backend.as_int8(torch.from_numpy(rows))
    space = Space(METRICS["euclidean"], np.dtype(np.uint8), n_features)
    got = backend.int8_dot(packed, packed, (2, 2), space)
    assert got.dtype == torch.int64
    assert got.tolist() == [
        [n_features * 2**14, -n_features * 128 * 127],
        [-n_features * 128 * 127, n_features * 127**2],
    ]


def test_both_errors_of_a_full_device_are_known():
    engine = get_backend("torch")
    assert engine.ran_out(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert engine.ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not engine.ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_products_of_int8_that_are_wrong_or_absent_are_not_used(monkeypatch):
    device = torch.device("cpu")
    multiplies = backend.multiplies_int8.__wrapped__
    assert multiplies(device)
    # As of an instruction that sums two products in 16 bits, and of a build without any.
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b).clamp(max=2**17))
    assert not multiplies(device)

    def absent(a, b):
        raise RuntimeError("not compiled for this platform")

    monkeypatch.setattr(torch, "_int_mm", absent)
    assert not multiplies(device)

    def full(a, b):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "_int_mm", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        multiplies(device)


@pytest.mark.parametrize("hidden", ["", "_int_mm"])
def test_the_cases_on_a_pretended_device(hidden):
    environment = {**os.environ, "KNNBENCH_CASES": "torch-cuda", "KNNBENCH_HIDDEN": hidden}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.fake_torch_cuda",
        str(CASES),
    ]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("legacy", ["allow_tf32", "high", "medium"])
def test_switches_of_before_are_left_as_found_too(legacy):
    switch = torch.backends.cuda.matmul
    state = lambda: (switch.allow_tf32, switch.fp32_precision, torch.get_float32_matmul_precision())  # noqa: E731
    before = state()
    try:
        if legacy == "allow_tf32":
            switch.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision(legacy)
        found = state()
        assert found[0]
        with backend.full_precision("cuda"):
            assert switch.fp32_precision == "ieee"
        assert state() == found
        with pytest.raises(KeyError), backend.full_precision("cuda"):
            raise KeyError
        assert state() == found
    finally:
        torch.set_float32_matmul_precision("highest")
        switch.fp32_precision = before[1]


def test_without_cuda_the_status_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status = backend_status("torch-cuda")
    assert not status.ok
    assert f"no CUDA device: torch {torch.__version__}" in status.reason
    assert status.device == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_tensor_float_32_changes_no_answer(metric, dtype, rng):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    queries, corpus = (rows_of(rng, n, 70, dtype) for n in (40, 500))
    expected = knn(queries, corpus, 7, metric, backend="torch-cuda")
    with precision(torch.backends.cuda.matmul, "tf32"):
        got = knn(queries, corpus, 7, metric, backend="torch-cuda")
    assert_identical(got.distances, expected.distances)
    assert_identical(got.indices, expected.indices)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_tensors_on_the_device_are_answered_in_kind(metric, dtype, rng):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = [rows_of(rng, n, 70, dtype) for n in (40, 500)]
    on_device = [torch.from_numpy(array).to("cuda") for array in rows]
    expected = knn(*rows, 7, metric, backend="torch-cuda")
    got = knn(*on_device, 7, metric, backend="torch-cuda")
    assert got.distances.device.type == got.indices.device.type == "cuda"
    assert_identical(got.distances.cpu().numpy(), expected.distances)
    assert_identical(got.indices.cpu().numpy(), expected.indices)
