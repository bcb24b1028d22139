"""Every backend gives the right distances and neighbours for everything that it claims.

The reference is the python backend on the same values in float64 (`tests/test_oracle.py` proves it), computed
once for all backends. On uint8 own backends are compared with ``==``.
"""

import functools
import itertools
import os
import subprocess
import sys
import tracemalloc
import zlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knnbench
from knnbench import UnsupportedError, knn, pairwise, prepare
from knnbench.backends import backend_status, get_backend, registry
from knnbench.dtypes import COMPUTED
from knnbench.measure.ceilings import PROBES
from knnbench.metrics import METRICS, Space

from ._checks import (
    assert_distances_close,
    assert_identical,
    assert_same_neighbors,
    assert_ties_by_index,
    assert_well_formed,
    tolerance,
)

FLOATS = ("float32", "float64")


def ordinary(rng, n_queries, n_corpus, n_features):
    return rng.normal(size=(n_queries, n_features)), rng.normal(size=(n_corpus, n_features))


def stacked(change):
    """Make a kind of data from a change of ordinary rows, queries and corpus together."""

    def make(rng, n_queries, n_corpus, n_features):
        rows = change(rng, rng.normal(size=(n_queries + n_corpus, n_features)))
        return rows[:n_queries], rows[n_queries:]

    return make


def with_duplicates(rng, n_queries, n_corpus, n_features):
    queries, corpus = ordinary(rng, n_queries, n_corpus, n_features)
    corpus[-n_queries:] = queries[:n_corpus]
    corpus[:2] = queries[0]
    return queries, corpus


def one_feature(rng, rows):
    rows[:, 0] *= 1e6
    return rows


def one_row(rng, rows):
    rows[-1] *= 1e5
    return rows


KINDS = {
    "ordinary": ordinary,
    "duplicates": with_duplicates,
    "ties": stacked(lambda rng, rows: rng.integers(-1, 2, rows.shape) + 3.0),
    "negative": stacked(lambda rng, rows: -np.abs(rows) - 1),
    "offset 1e3": stacked(lambda rng, rows: rows + 1e3),
    "offset 1e6": stacked(lambda rng, rows: rows + 1e6),
    "offset -1e6": stacked(lambda rng, rows: 100 * rows - 1e6),
    "two far clusters": stacked(lambda rng, rows: rows + 1e4 * rng.choice([-1, 1], (len(rows), 1))),
    "near duplicates": stacked(lambda rng, rows: rows[:1] + 1e-5 * rows),
    "one feature": stacked(one_feature),
    "one row": stacked(one_row),
    "mixed scales": stacked(lambda rng, rows: rows * 10.0 ** rng.uniform(-6, 6, rows.shape[1])),
    "mixed rows": stacked(lambda rng, rows: rows * 10.0 ** rng.uniform(-4, 4, (len(rows), 1))),
    "constant rows": stacked(lambda rng, rows: np.repeat(rows[:, :1], rows.shape[1], axis=1)),
    "small": stacked(lambda rng, rows: rows * 1e-15),
    "large": stacked(lambda rng, rows: rows * 1e15),
}
ON_BYTES = {
    "ordinary": lambda rng, shape: rng.integers(0, 256, shape),
    "ties": lambda rng, shape: rng.integers(1, 4, shape),
    "extremes": lambda rng, shape: rng.choice([0, 255], shape) | (np.arange(shape[1]) == 0),
    "brightest": lambda rng, shape: rng.integers(254, 256, shape),
    "darkest": lambda rng, shape: rng.integers(0, 2, shape) | (np.arange(shape[1]) == 0),
}


@functools.cache
def problem(kind, dtype, n_queries, n_corpus, n_features):
    """Return queries and a corpus of that kind: the same for every backend."""
    seed = zlib.crc32(f"{kind} {n_queries} {n_corpus} {n_features}".encode())
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        rows = ON_BYTES[kind](rng, (n_queries + n_corpus, n_features)).astype(np.uint8)
        rows[n_queries] = rows[0]  # at least one query is in the corpus
        return rows[:n_queries], rows[n_queries:]
    queries, corpus = KINDS[kind](rng, n_queries, n_corpus, n_features)
    return queries.astype(dtype), corpus.astype(dtype)


@functools.cache
def reference_of(case, metric):
    """Return all distances of a problem: exact for uint8 as own backends give them, float64 for floats."""
    queries, corpus = problem(*case)
    if case[1] != "uint8":
        queries, corpus = queries.astype(np.float64), corpus.astype(np.float64)
    return pairwise(queries, corpus, metric, backend="python")


@functools.cache
def wide_reference_of(case, metric):
    """Return all distances of a problem in float64, also for uint8: what a peer comes near."""
    return pairwise(*(rows.astype(np.float64) for rows in problem(*case)), metric, backend="python")


@functools.cache
def neighbors_of(case, metric):
    """Return all neighbours of a uint8 problem under the total order."""
    queries, corpus = problem(*case)
    return tuple(knn(queries, corpus, len(corpus), metric, backend="python"))


def space_of(case, metric):
    return Space(METRICS[metric], np.dtype(case[1]), case[4])


def peer_tolerance(space, queries, corpus, reference, dtype):
    """Return the tolerance of a peer, which is free to answer, and thus to compute, in any float dtype."""
    floats = space if not space.is_integer else Space(space.metric, np.dtype(np.float32), space.n_features)
    computed = dtype if dtype.kind == "f" else np.dtype(np.float32)
    return tolerance(floats, queries, corpus, reference, "peer", dtype=computed)


def check_pairwise(backend, case, metric, **options):
    queries, corpus = problem(*case)
    space, reference = space_of(case, metric), reference_of(case, metric)
    got = pairwise(queries, corpus, metric, backend=backend, **options)
    if registry()[backend].peer:
        reference = wide_reference_of(case, metric)
        assert_distances_close(got, reference, peer_tolerance(space, queries, corpus, reference, got.dtype))
    elif space.is_integer:
        assert_identical(got, reference)
    else:
        assert_well_formed(got, reference.shape, space.output)
        assert_distances_close(got, reference, tolerance(space, queries, corpus, reference, "pairwise"))


def check_knn(backend, case, metric, k, **options):
    queries, corpus = problem(*case)
    space, reference = space_of(case, metric), reference_of(case, metric).astype(np.float64)
    answer = knn(queries, corpus, k, metric, backend=backend, **options)
    distances, indices = answer
    assert answer.backend == backend
    if registry()[backend].peer:
        reference = wide_reference_of(case, metric)
        allowed = peer_tolerance(space, queries, corpus, reference, distances.dtype)
        assert_same_neighbors(distances, indices, reference, k, allowed, allowed)
    elif space.is_integer:
        expected = neighbors_of(case, metric)
        assert_identical(distances, expected[0][:, :k].copy())
        assert_identical(indices, expected[1][:, :k].copy())
    else:
        assert_well_formed(distances, (len(queries), k), space.output)
        assert_same_neighbors(
            distances,
            indices,
            reference,
            k,
            tolerance(space, queries, corpus, reference, "direct"),
            tolerance(space, queries, corpus, reference, "knn", k=k),
        )
        if metric not in ("euclidean", "cosine"):  # whose ranked values can differ where distances do not
            assert_ties_by_index(distances, indices)


def check_both(backend, case, metric, *ks):
    check_pairwise(backend, case, metric)
    for k in ks:
        check_knn(backend, case, metric, k)


def claims(backend, metric, dtype):
    capabilities = backend_status(backend).capabilities
    return metric in capabilities.metrics and dtype in capabilities.dtypes


def skip_unclaimed(backend, metric, dtype):
    if not claims(backend, metric, dtype):
        pytest.skip(f"{backend} does not claim {metric} on {dtype}")


# ---- claims


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_claimed_is_right_and_the_rest_raises(backend, metric, dtype):
    case = ("ordinary", dtype, 5, 12, 9)
    if claims(backend, metric, dtype):
        check_both(backend, case, metric, 1, 3, 12)
        return
    queries, corpus = problem(*case)
    for call in (
        lambda: pairwise(queries, corpus, metric, backend=backend),
        lambda: knn(queries, corpus, 2, metric, backend=backend),
        lambda: prepare(corpus, metric, backend=backend),
    ):
        with pytest.raises(UnsupportedError, match=f"backend '{backend}' lacks (metric|dtype)"):
            call()


def test_own_backends_claim_everything(own_backend):
    capabilities = backend_status(own_backend).capabilities
    assert capabilities.metrics == frozenset(METRICS)
    assert capabilities.dtypes == frozenset(COMPUTED)
    assert capabilities.total_order
    assert capabilities.exact_integers
    assert capabilities.certifies


def test_the_status_is_that_of_the_backend(backend):
    status = backend_status(backend)
    assert status.name == backend
    assert status.device in ("cpu", "cuda")
    assert status.version or "knnbench" in registry()[backend].distributions  # run from a checkout
    assert not status.reason
    assert status.peer == registry()[backend].peer


# ---- shapes

SIZES = [
    # n_queries, n_corpus, n_features, ks
    (1, 1, 1, (1,)),
    (1, 2, 1, (1, 2)),
    (2, 1, 2, (1,)),
    (3, 17, 3, (2, 17)),
    (15, 16, 7, (1, 16)),
    (16, 33, 2, (17,)),
    (17, 63, 64, (2, 17, 63)),
    (33, 15, 65, (1, 15)),
    (63, 65, 1, (17, 65)),
    (65, 129, 7, (2, 129)),
    (129, 3, 3, (1, 3)),
    (1, 129, 65, (17,)),
    (2, 5, 784, (2, 5)),
    (3, 4, 1025, (1, 4)),
]


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
@pytest.mark.parametrize(("n_queries", "n_corpus", "n_features", "ks"), SIZES)
def test_shapes(backend, metric, dtype, n_queries, n_corpus, n_features, ks):
    skip_unclaimed(backend, metric, dtype)
    check_both(backend, ("ordinary", dtype, n_queries, n_corpus, n_features), metric, *ks)


@pytest.mark.parametrize("metric", ["sqeuclidean", "chebyshev", "cosine"])
@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize(("n_queries", "n_corpus", "n_features", "ks"), [SIZES[3], SIZES[6], SIZES[12]])
def test_shapes_of_the_other_metrics(backend, metric, dtype, n_queries, n_corpus, n_features, ks):
    skip_unclaimed(backend, metric, dtype)
    check_both(backend, ("ordinary", dtype, n_queries, n_corpus, n_features), metric, *ks)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["extremes", "brightest"])
@pytest.mark.parametrize("n_features", [1024, 1025, 33_025, 33_026])
def test_no_integer_overflows(compared_backend, metric, kind, n_features):
    check_both(compared_backend, (kind, "uint8", 2, 3, n_features), metric, 3)


@functools.cache
def one_distance(query, corpus, n_features, metric):
    """Return the distance of two rows that are 0 or 255 throughout, 0 with a first feature of 1."""
    a, b = (np.array([[value or 1] + [value] * (n_features - 1)], np.uint8) for value in (query, corpus))
    return pairwise(a, b, metric, backend="python")[0, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_features", [784, 33_026])
def test_the_largest_distances_of_bytes(compared_backend, metric, n_features):
    black, white = np.zeros((2, n_features), np.uint8), np.full((3, n_features), 255, np.uint8)
    black[:, 0] = 1  # a direction, for cosine
    for queries, corpus in itertools.product((black, white), repeat=2):
        # Equal rows: one pair stands for all.
        one = one_distance(int(queries[0, 1]), int(corpus[0, 1]), n_features, metric)
        expected = np.full((len(queries), len(corpus)), one, Space(METRICS[metric], queries.dtype, n_features).output)
        assert_identical(pairwise(queries, corpus, metric, backend=compared_backend), expected)
        assert knn(queries, corpus, 2, metric, backend=compared_backend).indices.tolist() == [[0, 1]] * len(queries)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("metric", METRICS)
def test_very_many_features(compared_backend, metric, dtype):
    check_both(compared_backend, ("ordinary", dtype, 2, 3, 33_026), metric, 2)


# ---- values


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ON_BYTES)
def test_bytes(backend, metric, kind):
    skip_unclaimed(backend, metric, "uint8")
    check_both(backend, (kind, "uint8", 9, 40, 11), metric, 1, 5, 40)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_floats(own_backend, metric, dtype, kind):
    check_both(own_backend, (kind, dtype, 7, 37, 6), metric, 1, 5, 37)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["duplicates", "ties", "negative", "offset 1e3", "mixed rows"])
def test_floats_with_peers(backend, metric, dtype, kind):
    skip_unclaimed(backend, metric, dtype)
    if registry()[backend].peer:
        check_both(backend, (kind, dtype, 7, 37, 6), metric, 1, 5, 37)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("kind", ["ordinary", "offset 1e3", "near duplicates", "two far clusters", "mixed rows"])
def test_floats_of_many_features(own_backend, metric, dtype, kind):
    check_both(own_backend, (kind, dtype, 5, 60, 130), metric, 1, 7)


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", METRICS)
def test_a_row_is_at_distance_zero_from_itself(own_backend, metric, dtype):
    for kind in ("ordinary",) if dtype == "uint8" else ("ordinary", "offset 1e6", "mixed scales", "one row", "small"):
        rows = problem(kind, dtype, 3, 41, 13)[1]
        assert (np.diagonal(pairwise(rows, rows, metric, backend=own_backend)) == 0).all(), kind
        distances, indices = knn(rows, rows, 1, metric, backend=own_backend)
        assert (distances == 0).all(), kind
        if dtype != "uint8" and metric not in ("cosine", "chebyshev") and kind != "mixed scales":
            assert (indices[:, 0] == np.arange(41)).all(), kind


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "cosine"])
@pytest.mark.parametrize("dtype", COMPUTED)
def test_rows_of_zeros(backend, metric, dtype):
    skip_unclaimed(backend, metric, dtype)
    zeros = np.zeros((3, 5), dtype)
    assert (pairwise(zeros, zeros[:2], metric, backend=backend) == 0).all()
    distances, indices = knn(zeros, zeros[:2], 2, metric, backend=backend)
    assert (distances == 0).all()
    assert (np.sort(indices, axis=1) == [0, 1]).all()
    if not registry()[backend].peer:
        assert (indices == [0, 1]).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_values(own_backend, metric, dtype):
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    rows = (rng.integers(1, 1000, (30, 4)) * rng.choice([-1, 1], (30, 4))).astype(dtype) * info.smallest_subnormal
    queries, corpus = rows[:4], rows[4:]
    space = Space(METRICS[metric], np.dtype(dtype), 4)
    # Exact in integers; scaled back, all but cosine are subnormal, or 0 where a square underflows.
    whole = np.rint(rows.astype(np.float64) / float(info.smallest_subnormal))
    reference = pairwise(whole[:4], whole[4:], metric, backend="python")
    if metric == "sqeuclidean":
        reference = reference * 0
    elif metric != "cosine":
        reference = reference * float(info.smallest_subnormal)
    allowed = tolerance(space, queries, corpus, reference, "direct")
    assert_distances_close(pairwise(queries, corpus, metric, backend=own_backend), reference, allowed)
    distances, indices = knn(queries, corpus, 6, metric, backend=own_backend)
    assert_same_neighbors(distances, indices, reference, 6, allowed, allowed)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e30), ("float64", 1e300)])
def test_values_whose_squares_overflow(own_backend, metric, dtype, scale):
    """Squares beyond the dtype come back as infinity, never as NaN, ordered by index; the rest is right."""
    queries, corpus = problem("ordinary", dtype, 4, 50, 6)
    reference = reference_of(("ordinary", dtype, 4, 50, 6), metric)
    got = pairwise(scale * queries, scale * corpus, metric, backend=own_backend)
    distances, indices = knn(scale * queries, scale * corpus, 5, metric, backend=own_backend)
    assert not np.isnan(got).any()
    assert not np.isnan(distances).any()
    if metric in ("euclidean", "sqeuclidean"):
        # The python backend sums in float64 and rounds once, so of float32 it has the euclidean distance.
        assert np.isinf(got).all() or own_backend == "python"
        assert_ties_by_index(distances, indices)
        return
    space = Space(METRICS[metric], np.dtype(dtype), 6)
    factor = 1 if metric == "cosine" else scale
    scaled = reference * factor
    allowed = tolerance(space, scale * queries, scale * corpus, scaled, "direct")
    slack = tolerance(space, queries, corpus, reference, "pairwise") * factor + allowed
    assert_distances_close(got, scaled, slack)
    assert_same_neighbors(distances, indices, scaled, 5, allowed, slack)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("place", [0, 2500, -1])
def test_one_row_whose_square_overflows_spoils_no_other(compared_backend, metric, place):
    # |c|^2 and q.c overflow float32 for one row c, |q|^2 does not: inf - inf in the Gram form.
    rng = np.random.default_rng(1)
    queries = ((rng.normal(size=(3, 16)) + 2) * 1e18).astype(np.float32)
    corpus = (rng.normal(size=(5000, 16)) * 1e18).astype(np.float32)
    corpus[place] = 3e21
    squares = ((queries[:, None].astype(float) - corpus[None].astype(float)) ** 2).sum(axis=2)
    reference = squares if metric == "sqeuclidean" else np.sqrt(squares)
    space = Space(METRICS[metric], np.dtype(np.float32), 16)
    near = np.abs(corpus[:, 0]) < 1e20
    allowed = tolerance(space, queries, corpus, reference, "direct")
    slack = tolerance(space, queries, corpus, reference, "knn", k=5)
    for budget in (None, 2_000_000):
        distances, indices = knn(queries, corpus, 5, metric, backend=compared_backend, memory_budget=budget)
        assert_same_neighbors(distances, indices, reference, 5, allowed, slack)
    got = pairwise(queries, corpus, metric, backend=compared_backend)
    slack = tolerance(space, queries, corpus, reference, "pairwise")
    assert_distances_close(got[:, near], reference[:, near], slack[:, near])
    assert not np.isnan(got).any()


# ---- what must not matter


@pytest.mark.parametrize("metric", METRICS)
def test_a_permuted_corpus_permutes_the_indices(own_backend, metric):
    queries, corpus = problem("ties", "uint8", 9, 60, 8)
    everything = pairwise(queries, corpus, metric, backend="python")
    order = np.random.default_rng(3).permutation(len(corpus))
    shuffled = corpus[order]
    assert_identical(pairwise(queries, shuffled, metric, backend=own_backend), everything[:, order])
    distances, indices = knn(queries, shuffled, 7, metric, backend=own_backend)
    before = knn(queries, corpus, 7, metric, backend=own_backend)
    assert_identical(distances, before.distances)
    assert_identical(np.take_along_axis(everything, order[indices], axis=1), distances)
    assert_ties_by_index(distances, indices) if metric != "euclidean" else None
    everyone = knn(queries, shuffled, len(corpus), metric, backend=own_backend).indices
    assert_identical(np.sort(order[everyone], axis=1), np.tile(np.arange(len(corpus)), (9, 1)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["ordinary", "ties"])
def test_the_size_of_blocks_changes_no_bit_of_bytes(compared_backend, metric, kind):
    queries, corpus = problem(kind, "uint8", 150, 700, 5)
    largest = knn(queries, corpus, 9, metric, backend=compared_backend, memory_budget=1 << 30)
    everything = pairwise(queries, corpus, metric, backend=compared_backend, memory_budget=1 << 30)
    order = np.lexsort((np.tile(np.arange(700), (150, 1)), everything), axis=1)[:, :9]
    if metric not in ("euclidean", "cosine"):
        assert_identical(largest.indices, order)
    for budget in (1 << 16, 1 << 19, 1 << 23):
        try:
            answer = knn(queries, corpus, 9, metric, backend=compared_backend, memory_budget=budget)
        except knnbench.OverBudgetError:
            assert budget < 1 << 19, "half a megabyte is enough for a few rows of five bytes"
            continue
        assert_identical(answer.distances, largest.distances)
        assert_identical(answer.indices, largest.indices)
        got = pairwise(queries, corpus, metric, backend=compared_backend, memory_budget=budget)
        assert_identical(got, everything)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_small_blocks_are_right(backend, metric, dtype):
    skip_unclaimed(backend, metric, dtype)
    case = ("ordinary", dtype, 12, 45, 7)
    options = {"memory_budget": 200_000 if backend_status(backend).device == "cpu" else 1 << 24}
    check_pairwise(backend, case, metric, **options)
    check_knn(backend, case, metric, 6, **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_the_number_of_threads_changes_no_bit_of_bytes(own_backend, metric, dtype, monkeypatch):
    queries, corpus = problem("ties" if dtype == "uint8" else "ordinary", dtype, 30, 70, 5)
    many = knn(queries, corpus, 9, metric, backend=own_backend)
    monkeypatch.setenv("KNNBENCH_THREADS", "1")
    one = knn(queries, corpus, 9, metric, backend=own_backend)
    if dtype == "uint8":
        assert_identical(one.distances, many.distances)
        assert_identical(one.indices, many.indices)
    else:
        check_knn(own_backend, ("ordinary", dtype, 30, 70, 5), metric, 9)


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "chebyshev"])
def test_prepared_or_not_is_the_same(backend, metric, dtype):
    skip_unclaimed(backend, metric, dtype)
    queries, corpus = problem("ordinary", dtype, 5, 12, 9)
    prepared = prepare(corpus, metric, backend=backend)
    once = knn(queries, corpus, 3, metric, backend=backend)
    for _ in range(2):
        again = knn(queries, prepared, 3)
        assert_identical(again.distances, once.distances)
        assert_identical(again.indices, once.indices)
    assert_identical(pairwise(queries, prepared), pairwise(queries, corpus, metric, backend=backend))


@pytest.mark.parametrize("dtype", COMPUTED)
def test_calls_leave_nothing_behind(backend, dtype):
    # A scratch array that one call leaves dirty shows in the next, smaller one.
    skip_unclaimed(backend, "euclidean", dtype)
    for case in (("ordinary", dtype, 17, 63, 64), ("ordinary", dtype, 3, 17, 3), ("ordinary", dtype, 2, 5, 784)):
        check_both(backend, case, "euclidean", 2)


@pytest.mark.parametrize("layout", ["Fortran", "strided", "reversed", "read-only", "transposed"])
@pytest.mark.parametrize("dtype", COMPUTED)
def test_layouts(backend, layout, dtype):
    skip_unclaimed(backend, "euclidean", dtype)
    case = ("ordinary", dtype, 5, 12, 9)
    queries, corpus = (laid_out(rows, layout) for rows in problem(*case))
    before = queries.copy(), corpus.copy()
    distances, indices = knn(queries, corpus, 4, "euclidean", backend=backend)
    plain = knn(*problem(*case), 4, "euclidean", backend=backend)
    assert_identical(distances, plain.distances)
    assert_identical(indices, plain.indices)
    everything = pairwise(*problem(*case), "euclidean", backend=backend)
    assert_identical(pairwise(queries, corpus, "euclidean", backend=backend), everything)
    assert_identical(queries, before[0])
    assert_identical(corpus, before[1])


def laid_out(rows, layout):
    """Return the same values laid out otherwise."""
    n, m = rows.shape
    if layout == "Fortran":
        result = np.asfortranarray(rows)
    elif layout == "strided":
        result = np.zeros((2 * n, 3 * m), rows.dtype)[::2, ::3]
        result[...] = rows
    elif layout == "reversed":
        result = np.ascontiguousarray(rows[::-1, ::-1])[::-1, ::-1]
    elif layout == "transposed":
        result = rows.T.copy().T
    else:
        result = rows.copy()
        result.flags.writeable = False
    assert (result == rows).all()
    return result


# ---- axioms

SMALL = hnp.arrays(np.float64, (4, 3), elements=st.integers(-50, 50).map(lambda x: x / 4), fill=st.nothing())
BYTES = hnp.arrays(np.uint8, (4, 3), elements=st.integers(0, 255), fill=st.nothing())
NO_ZERO = {"cosine"}


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15)
@given(rows=st.one_of(SMALL, BYTES, SMALL.map(lambda rows: rows.astype(np.float32))))
def test_axioms(own_backend, metric, rows):
    if metric in NO_ZERO:
        rows = rows.copy()
        rows[~rows.any(axis=1), 0] = 1
    got = pairwise(rows, rows, metric, backend=own_backend)
    assert (got >= 0).all()
    assert (np.diagonal(got) == 0).all()
    wide = got.astype(np.float64)
    space = Space(METRICS[metric], rows.dtype, 3)
    floats = space if not space.is_integer else Space(space.metric, np.dtype(np.float32), 3)
    slack = tolerance(floats, rows, rows, wide, "pairwise")
    exact = space.is_integer
    assert_distances_close(wide, wide.T.copy(), 0 if exact else slack + slack.T)
    if metric in ("euclidean", "cityblock", "chebyshev"):
        through = wide[:, :, None] + wide[None, :, :]
        room = slack.max() * (3 if not exact or metric == "euclidean" else 0)
        assert not (wide[:, None, :] > through + room).any()
    distinct = (rows[:, None] != rows[None]).any(axis=2)
    if metric != "cosine":
        assert ((got > 0) == distinct).all()


# ---- memory


def held(call):
    """Return the most bytes that numpy held during a call, above what was there, and its result."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before, result


# What Python itself, rather than an array, takes in a call.
INTERPRETER_BYTES = 200_000

BUDGETS = [1 << 20, 1 << 22]


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("budget", BUDGETS)
def test_numpy_honours_its_budget(metric, dtype, budget):
    queries, corpus = sized(dtype, 200, 2000, 48)
    prepared = prepare(corpus, metric, backend="numpy")
    knn(queries[:2], prepared, 2)
    peak, answer = held(lambda: knn(queries, prepared, 30, memory_budget=budget))
    outputs = sum(array.nbytes for array in answer)
    assert peak - outputs <= budget + INTERPRETER_BYTES
    peak, result = held(lambda: pairwise(queries, prepared, memory_budget=budget))
    assert peak - result.nbytes <= budget + INTERPRETER_BYTES


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_numpy_honours_its_budget_where_rows_are_recomputed(metric, budget):
    queries, corpus = sized("float32", 300, 2000, 48)
    prepared = prepare(corpus[:1] + 1e-4 * corpus, metric, backend="numpy")
    queries = corpus[:1] + 1e-4 * queries
    queries[::2] += 100  # and some whose Gram form says nothing
    peak, answer = held(lambda: knn(queries, prepared, 30, memory_budget=budget))
    assert peak - sum(array.nbytes for array in answer) <= budget + INTERPRETER_BYTES
    peak, result = held(lambda: pairwise(queries, prepared, memory_budget=budget))
    assert peak - result.nbytes <= budget + INTERPRETER_BYTES


@pytest.mark.parametrize("given_dtype", ["float16", ">f4", "int32"])
def test_numpy_converts_queries_within_its_budget(given_dtype):
    queries, corpus = sized("uint8", 6_000, 200, 100)
    prepared = prepare(corpus.astype("f8" if given_dtype == "int32" else "f4"), backend="numpy")
    queries = queries.astype(given_dtype)
    budget = 1 << 22
    peak, answer = held(lambda: knn(queries, prepared, 2, memory_budget=budget))
    assert peak - sum(array.nbytes for array in answer) <= budget + INTERPRETER_BYTES


@pytest.mark.parametrize("metric", METRICS)
def test_numpy_prepares_a_corpus_within_the_budget(metric):
    queries, corpus = sized("float32", 2, 40_000, 48)
    budget = 1 << 22
    kept, _ = held(lambda: [prepare(corpus, metric, backend="numpy")])
    tracemalloc.start()
    try:
        prepared = prepare(corpus, metric, backend="numpy")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del prepared
    peak, answer = held(lambda: knn(queries, corpus, 2, metric, backend="numpy", memory_budget=budget))
    assert peak - kept - sum(array.nbytes for array in answer) <= budget + INTERPRETER_BYTES


@functools.cache
def sized(dtype, n_queries, n_corpus, n_features):
    rng = np.random.default_rng(5)
    if dtype == "uint8":
        return tuple(rng.integers(1, 256, (n, n_features), np.uint8) for n in (n_queries, n_corpus))
    return tuple(rng.normal(size=(n, n_features)).astype(dtype) for n in (n_queries, n_corpus))


RESIDENT = """
import resource, sys
import numpy as np
from knnbench import knn, prepare
backend, budget = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
rows = lambda n: rng.integers(1, 256, (n, 16), dtype=np.uint8).astype(dtype)
for dtype in ("uint8", "float32"):
    queries, prepared = rows(4000), prepare(rows(40000), backend=backend)
    knn(queries[:50], prepared, 5, memory_budget=budget)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn(queries, prepared, 5, memory_budget=budget)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_resident_set_stays_within_the_budget(compared_backend):
    # All distances at once would take 640 MB.
    if backend_status(compared_backend).device != "cpu":
        pytest.skip("not in host memory")
    budget = 64 << 20
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, compared_backend, str(budget)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # Allocators and thread pools keep some for themselves.
    assert all(int(grown) <= budget + (32 << 20) for grown in run.stdout.split()), run.stdout


@pytest.mark.parametrize("op", ["knn", "pairwise"])
@pytest.mark.parametrize("metric", METRICS)
def test_operations_are_those_of_probes(backend, metric, op):
    engine = get_backend(backend)
    for dtype in sorted(engine.capabilities.dtypes) if metric in engine.capabilities.metrics else ():
        operations = engine.operations(Space(METRICS[metric], np.dtype(dtype), 10), op)
        assert operations.keys() <= PROBES.keys()
        assert all(PROBES[name].device == engine.capabilities.device for name in operations)
        assert all(0 < count <= 2 for count in operations.values())
        # Of floats every backend tells what it does, but the one whose time goes to Python.
        assert operations or dtype == "uint8" or backend == "python"


def test_a_clock_and_a_peak_are_a_devices(backend):
    engine = get_backend(backend)
    stop, peak = engine.stopwatch(), engine.device_peak()
    rows = np.ones((4, 3), np.float32)
    knn(rows, rows, 2, backend=backend)
    if engine.capabilities.device == "cpu":
        assert (stop(), peak()) == (None, None)
    else:
        assert stop() > 0
        assert (peak() or 0) >= 0
