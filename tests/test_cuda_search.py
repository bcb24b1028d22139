"""The fused search in CUDA C++, compiled as C++ for the host and run by `tests.cuda_emulator`, against the naive one.

Tiles are as small as the layouts allow, so that odd sizes meet many of them; the cases that `tests/test_cuda_source.py`
runs on the stand-in for CuPy have those of the backend. What becomes of both on devices, `tests/test_gpu_compile.py`
says.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knnbench.dtypes import COMPUTED
from knnbench.kernels import cuda_row_source
from knnbench.kernels.cuda_row_source import pack_source
from knnbench.kernels.cuda_search import (
    CHUNK,
    FEW_TILE,
    GROUP_TILE,
    MERGED,
    PANEL_ROWS,
    WAYS,
    Tile,
    merge_shape,
    panels_shape,
    parts_of,
    search_of,
)
from knnbench.metrics import METRICS, Space
from knnbench.ordering import MISSING, smallest_k

from . import cuda_emulator
from ._checks import assert_identical
from .test_cuda_source import skip

ROOT = Path(__file__).parents[1]

# 8 by 16 values, and 32 by 32 by tensor cores.
SMALL = Tile(warps=(1, 1), per_thread=(2, 2), stages=3, blocks=1, slice_bytes=32)
SMALL_TENSOR = Tile(warps=(2, 2), per_thread=(2, 4), stages=2, blocks=1)

CASES = [
    *((metric, dtype, False) for metric in METRICS for dtype in COMPUTED if metric != "euclidean"),
    ("sqeuclidean", "float32", True),
    ("sqeuclidean", "float64", True),
]
CASES.remove(("sqeuclidean", "float64", False))  # by cuBLAS
CASES.remove(("cosine", "float32", False))  # squares of unit rows
CASES.remove(("cosine", "float64", False))
EXACT = [case for case in CASES if case[1] == "uint8"]


@pytest.fixture(autouse=True)
def compiler():
    if cuda_emulator.compiler() is None:
        skip("there is no C++ compiler to test the source with")


def small_search(space, *, direct=False, copy_bytes=CHUNK):
    is_tensor = space.is_integer and space.form.from_dot is not None
    return search_of(space, direct=direct, copy_bytes=copy_bytes, tile=SMALL_TENSOR if is_tensor else SMALL)


def padded(rows, n_bytes):
    width = -(-rows.strides[0] // n_bytes) * n_bytes // rows.itemsize
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def panels_of(rows):
    """Return rows packed for tensor cores that read shared memory themselves."""
    row_bytes = rows.strides[0]
    packed = np.zeros(panels_shape(len(rows), row_bytes), np.uint8)
    grid = (-(-len(rows) // cuda_row_source.ROWS_A_BLOCK),)
    sizes = np.int64(len(rows)), np.int64(row_bytes), np.int32(PANEL_ROWS)
    kernels = cuda_emulator.compiled(pack_source())
    kernels.launch("pack_rows", grid, (cuda_row_source.THREADS,), (rows.view(np.uint8), packed, *sizes))
    return packed


def found(search, space, queries, corpus, k, *, n_parts=1, copy_bytes=CHUNK, source=None, halves=False):
    """Return what the kernels find."""
    kernels = cuda_emulator.compiled(source or search.source)
    norms = [(rows.astype(np.int64 if space.is_integer else rows.dtype) ** 2).sum(axis=1) for rows in (queries, corpus)]
    columns = 1 / np.sqrt(norms[1]) if space.form.rank_uses_norms else norms[1]
    norms, columns = [array.astype(search.norm) for array in norms], columns.astype(search.column)
    if halves:
        queries, corpus = (array.astype(np.float16) for array in (queries, corpus))
    rows = [padded(array, copy_bytes) for array in (queries, corpus)]
    row_bytes = rows[0].strides[0]
    part_rows = -(-len(corpus) // n_parts)
    if search.tile.in_groups:
        rows = [panels_of(array) for array in (queries, corpus)]
        row_bytes = queries.strides[0]
        columns = np.pad(columns, (0, -len(columns) % search.tile_corpus), constant_values=77)
        part_rows = -(-part_rows // search.tile_corpus) * search.tile_corpus
    n_parts = -(-len(corpus) // part_rows)
    lists = n_parts, search.list_length(k), len(queries)
    keys, numbers = np.zeros(lists, search.key), np.zeros(lists, np.uint32)
    sizes = map(np.uint32, (len(queries), len(corpus), row_bytes, part_rows, k))
    grid = -(-len(queries) // search.tile_queries), n_parts
    arguments = *rows, *norms, columns, keys, numbers, *sizes
    kernels.launch("search", grid, (search.tile.threads,), arguments, search.shared_bytes)
    threads, size = merge_shape(n_parts * k)
    values, indices = np.zeros((len(queries), k), space.ranked), np.zeros((len(queries), k), np.int64)
    sizes = map(np.uint32, (len(queries), n_parts, lists[1], k, size))
    arguments = keys, numbers, values, indices, *sizes
    kernels.launch("merge", (len(queries),), (threads,), arguments, size * search.pair_bytes)
    return values, indices


def expected(space, queries, corpus, k):
    """Return the k nearest by the metric's own scalar functions, in Python's numbers."""
    form, zeros = space.form, [0] * space.n_features
    norms = [[sum(x * x for x in row) for row in rows.tolist()] for rows in (queries, corpus)]
    ranked = [
        [
            form.rank(form.reduce(map(form.accumulate, zeros, q, c)), q_norm, c_norm)
            for c, c_norm in zip(corpus.tolist(), norms[1], strict=True)
        ]
        for q, q_norm in zip(queries.tolist(), norms[0], strict=True)
    ]
    return smallest_k(np, np.array(ranked, space.ranked), k)


def whole_numbers(rng, dtype, n, n_features, high=256):
    """Return rows without a row of zeros; their distances are exact in every dtype."""
    rows = rng.integers(0, high, (n, n_features)).astype(dtype)
    rows[:, 0] = np.maximum(rows[:, 0], 1)
    return rows


def check(search, space, queries, corpus, k, **options):
    for got, right in zip(
        found(search, space, queries, corpus, k, **options), expected(space, queries, corpus, k), strict=True
    ):
        assert_identical(got, right)


def test_every_way_has_its_case():
    covered = set()
    for metric, dtype, direct in CASES:
        space = Space(METRICS[metric], np.dtype(dtype), 5)
        covered.add(
            (space.form.accumulate if direct or not space.form.from_dot else space.form.from_dot, dtype[0] == "u")
        )
    assert covered == WAYS.keys()


def test_what_has_no_fused_search():
    spaces = [
        Space(METRICS["euclidean"], np.dtype(np.float64), 5),
        Space(METRICS["cityblock"], np.dtype(np.uint8), 33_100),
        Space(METRICS["chebyshev"], np.dtype(np.float32), 1 << 24),
    ]
    assert [search_of(space) for space in spaces] == [None] * 3


@pytest.mark.parametrize(
    ("n_queries", "n_corpus", "n_features", "k", "n_parts", "high"),
    [
        (1, 1, 1, 1, 1, 256),
        (9, 17, 5, 17, 1, 256),  # a row more than tiles have, and all of them as neighbours
        (33, 95, 37, 5, 3, 4),  # ties, which parts of the corpus share
        (8, 33, 100, 20, 2, 3),  # more neighbours than a tile has columns, and than a part has rows
        (1, 200, 16, 1, 7, 2),  # one query
    ],
)
@pytest.mark.parametrize(("metric", "dtype", "direct"), CASES)
def test_it_finds_what_the_naive_search_does(
    metric, dtype, direct, n_queries, n_corpus, n_features, k, n_parts, high, rng
):
    space = Space(METRICS[metric], np.dtype(dtype), n_features)
    queries, corpus = (whole_numbers(rng, dtype, n, n_features, high) for n in (n_queries, n_corpus))
    check(small_search(space, direct=direct), space, queries, corpus, k, n_parts=n_parts)


@pytest.mark.parametrize(
    ("n_queries", "n_corpus", "n_features", "k", "n_parts", "high"),
    [
        (1, 1, 1, 1, 1, 64),
        (9, 17, 5, 17, 1, 64),
        (130, 300, 37, 5, 1, 4),
        (8, 700, 300, 20, 2, 3),
        (3, 520, 784, 1, 2, 64),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("tile", [GROUP_TILE, SMALL_TENSOR], ids=["groups", "warps"])
def test_tensor_cores(tile, dtype, n_queries, n_corpus, n_features, k, n_parts, high, rng):
    # Of whole numbers products of float16 are exact.
    space = Space(METRICS["sqeuclidean"], np.dtype(dtype), n_features)
    queries, corpus = (whole_numbers(rng, dtype, n, n_features, high) for n in (n_queries, n_corpus))
    halves = dtype == "float32"
    search = search_of(space, halves=halves, tile=tile)
    check(search, space, queries, corpus, k, n_parts=n_parts, halves=halves)


GROUP_FAULTS = [
    ("wait_for_products<1>();", "wait_for_products<2>();"),
    ("is_last * sizeof(stage.columns)", "0"),
    ("current == 0 ? n_stages - 1 : current - 1", "current"),
    ("parity ^= current == 0;", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("correct", "faulty"), GROUP_FAULTS, ids=[faulty for _, faulty in GROUP_FAULTS])
def test_a_planted_fault_of_groups_shows(correct, faulty, rng):
    # In a process of its own, as the emulator ends it where a barrier is misused.
    code = f"from tests.test_cuda_search import look_for_fault; look_for_fault({correct!r}, {faulty!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 7), done.stdout + done.stderr


def look_for_fault(correct, faulty):
    """Exit with 7 if a source is wrong before it has a fault; raise, or trap, for a fault that shows."""
    rng = np.random.default_rng(0)
    space = Space(METRICS["sqeuclidean"], np.dtype(np.uint8), 300)
    queries, corpus = (whole_numbers(rng, "uint8", n, 300) for n in (70, 600))
    search = search_of(space, tile=GROUP_TILE)
    assert search.source.count(correct) == 1, "7"
    try:
        check(search, space, queries, corpus, 3)
    except AssertionError:
        sys.exit(7)
    check(search, space, queries, corpus, 3, source=search.source.replace(correct, faulty))


@pytest.mark.parametrize("copy_bytes", [4, 8])
@pytest.mark.parametrize(
    ("metric", "dtype"), [("cityblock", "uint8"), ("sqeuclidean", "uint8"), ("chebyshev", "float32")]
)
def test_rows_that_16_bytes_do_not_divide(metric, dtype, copy_bytes, rng):
    space = Space(METRICS[metric], np.dtype(dtype), 9 if dtype == "uint8" else 11)
    search = small_search(space, copy_bytes=copy_bytes)
    queries, corpus = (whole_numbers(rng, dtype, n, space.n_features) for n in (9, 40))
    check(search, space, queries, corpus, 3, copy_bytes=copy_bytes)


@pytest.mark.parametrize(("metric", "dtype", "direct"), CASES)
def test_rows_in_the_worst_order(metric, dtype, direct, rng):
    # Every row is nearer than all before it; then the same backwards, then all at the same distance.
    space = Space(METRICS[metric], np.dtype(dtype), 2)
    rising = np.column_stack([np.arange(1, 151), np.full(150, 255)]).astype(dtype)
    query = np.array([[255, 1]], dtype)
    search = small_search(space, direct=direct)
    for corpus in (rising, rising[::-1].copy(), np.repeat(rising[:1], 150, axis=0)):
        check(search, space, query, corpus, 10)


@pytest.mark.parametrize(("metric", "dtype", "direct"), EXACT)
def test_the_largest_sums_that_fit(metric, dtype, direct):
    space = Space(METRICS[metric], np.dtype(dtype), 33_025)
    queries, corpus = np.full((2, 33_025), 255, np.uint8), np.zeros((3, 33_025), np.uint8)
    corpus[:, 0], corpus[1] = 1, 255
    check(small_search(space), space, queries, corpus, 3)


@pytest.mark.parametrize(("n_features", "n_corpus"), [(40, 120), (7000, 30)])
def test_cosines_that_differ_by_a_rounding(n_features, n_corpus, rng):
    # Multiples of one row, whose cosines are 1 but for roundings (which products of norms beyond 2**53 add), and rows
    # next to those.
    space = Space(METRICS["cosine"], np.dtype(np.uint8), n_features)
    base = rng.integers(0, 9, n_features)
    corpus = base * rng.integers(20, 28, (n_corpus, 1))
    corpus[::3, 7] += 1
    queries, corpus = (rows.astype(np.uint8) for rows in (np.array([base, 27 * base, base + 1]), corpus))
    check(small_search(space), space, queries, corpus, 7, n_parts=2)
    values, _ = found(small_search(space), space, queries, corpus, 7)
    assert (np.abs(values[:2]) < 1e-15).all()


def test_bytes_are_compared_on_older_devices_too(rng):
    space = Space(METRICS["chebyshev"], np.dtype(np.uint8), 33)
    search = small_search(space)
    condition = "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900"
    assert search.source.count(condition) == 1
    queries, corpus = (whole_numbers(rng, "uint8", n, 33) for n in (9, 40))
    check(search, space, queries, corpus, 5, source=search.source.replace(condition, "#if 1"))


@pytest.mark.parametrize("metric", ["cityblock", "chebyshev", "sqeuclidean"])
def test_values_that_are_not_finite_come_last(metric):
    space = Space(METRICS[metric], np.dtype(np.float32), 2)
    corpus = np.array([[np.inf, 1], [3, 3], [1, 1], [-np.inf, 1]] * 6, np.float32)
    values, indices = found(small_search(space, direct=True), space, np.ones((1, 2), np.float32), corpus, len(corpus))
    assert_identical(np.sort(indices[0]), np.arange(len(corpus)))
    assert_identical(indices[0, :12], np.r_[2:24:4, 1:24:4])
    assert np.isinf(values[0, 12:]).all()
    corpus[0] = np.nan, -np.nan
    _, indices = found(small_search(space, direct=True), space, np.ones((1, 2), np.float32), corpus, len(corpus))
    assert_identical(np.sort(indices[0]), np.arange(len(corpus)))


FAULTS = [
    ("wait_for_all_but<n_stages - 2>();\n            __syncthreads();", "wait_for_all_but<n_stages - 2>();"),
    ("        __syncthreads();\n        if (has_query && shared.counts", "        if (has_query && shared.counts"),
    ("wait_for_all_but<n_stages - 2>", "wait_for_all_but<n_stages - 1>"),
    ("j < end_row - first", "j < tile_corpus"),
    ("first + row < n_left && start", "start"),
    ("start + offset + part < row_bytes", "true"),
    ("bound_of(heap[0], own)", "bound_of(heap[0] / 2, own)"),
    ("before(value, row, largest, its_row)", "value < largest"),
    ("before(largest, its_row, other, other_row)", "largest < other"),
    ("before(value, row, heap[0], heap_rows[0])", "value < heap[0]"),
    ("e < k + n; ++e", "e < k + n - 1; ++e"),
    ("&stage.corpus[corpus_of(c)][chunk * chunk_bytes]", "&stage.corpus[corpus_of(c)][0]"),
    ("before(y, row_y, x, row_x)", "(y < x)"),
]


@pytest.mark.parametrize(("correct", "faulty"), FAULTS, ids=[faulty for _, faulty in FAULTS])
def test_a_planted_fault_shows(correct, faulty, rng):
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), 70)
    search = small_search(space)
    assert search.source.count(correct) == 1
    queries, corpus = (np.zeros((n, 70), np.uint8) for n in (11, 150))
    corpus[:, 0] = 1 + (np.arange(150) >= search.tile_corpus)  # all nearest in one tile, at the same distance
    problems = [(queries, corpus)]
    queries, corpus = (np.zeros((n, 70), np.uint8) for n in (11, 150))
    for rows in (queries, corpus):
        rows[:, [0, 40, 69]] = rng.integers(0, 2, (len(rows), 3))
    problems.append((queries, corpus))
    right = [expected(space, *problem, 6) for problem in problems]

    def is_right(source):
        try:
            got = [found(search, space, *problem, 6, n_parts=2, source=source) for problem in problems]
        except AssertionError as error:
            return "search" not in str(error)  # what the emulator says of a kernel
        return all((a == b).all() for pair in zip(got, right, strict=True) for a, b in zip(*pair, strict=True))

    assert is_right(search.source)
    cuda_emulator.compiled(search.source.replace(correct, faulty))
    assert not is_right(search.source.replace(correct, faulty))


def test_shared_memory_is_what_is_asked_for(rng):
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), 5)
    search = small_search(space)
    source = search.source.replace(
        "= bound_of(heap[0], own);",
        "= bound_of(heap[0], own); (&shared.counts[0])[44] = 0;",
    )
    rows = whole_numbers(rng, "uint8", 20, 5)
    with pytest.raises(AssertionError, match="writes past its shared memory"):
        found(search, space, rows, rows, 2, source=source)


def test_missing_neighbours_are_not_confused_with_rows():
    # A part with fewer rows than k has empty places in its list, which come after every row of the others.
    space = Space(METRICS["chebyshev"], np.dtype(np.uint8), 1)
    rows = np.full((5, 1), 255, np.uint8)
    _, indices = found(small_search(space), space, np.zeros((1, 1), np.uint8), rows, 5, n_parts=2)
    assert_identical(indices, np.arange(5)[None])
    assert MISSING not in indices


@pytest.mark.parametrize("n", [1, 2, 3, 6, 64, 1040, MERGED])
def test_the_shape_of_a_merge(n):
    threads, size = merge_shape(n)
    assert size >= n
    assert size == 2 or size < 2 * n
    assert size == 1 << int(math.log2(size))
    assert 32 <= threads <= 512


@pytest.mark.parametrize(
    ("query_blocks", "tiles", "slots", "most", "n_parts"),
    [
        (1, 469, 132, 1000, 118),  # 4 tiles each: 132 parts would not take less
        (40, 469, 132, 1000, 3),
        (132, 469, 132, 1000, 1),
        (1, 469, 132, 1, 1),
        (1, 1, 132, 1000, 1),
    ],
)
def test_parts_give_all_multiprocessors_work(query_blocks, tiles, slots, most, n_parts):
    assert parts_of(query_blocks, tiles, slots, most) == n_parts


def test_a_tile_for_few_queries(rng):
    space = Space(METRICS["cityblock"], np.dtype(np.float32), 6)
    assert search_of(space, n_queries=8).tile == FEW_TILE
    assert search_of(space, n_queries=9).tile != FEW_TILE
    queries, corpus = (whole_numbers(rng, "float32", n, 6) for n in (8, 300))
    check(search_of(space, n_queries=8), space, queries, corpus, 2)
