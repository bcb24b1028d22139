"""Distances of floats by bytes that stand for them: a filter of which rows to look at.

All rows are rounded to one grid, of a step s and an offset for each feature, from which it reaches 255 steps. Values
beyond are brought to its ends first::

    y' = min(max(y, offset), offset + 255 s) = offset + s b + r,    0 <= b <= 255

and bytes are compared by the kernels of uint8, exactly, several times as fast as floats. The distance is a norm of the
difference (the sum of magnitudes, or the root of the sum of squares). That takes no two values farther apart, so that
with the triangle inequality ::

    distance(q, c) >= distance(q', c') >= s distance(b_q, b_c) - |r_q| - |r_c|

where ``|r|``, a row's *rest* in that norm, is measured as it is rounded. A row for which the right side is not below
the k-th distance so far is left out; any other is computed at once by the direct form. So neighbours and distances are
those of the direct form whatever the data, which decide only how many rows are looked at. Of numbers that lie on a grid
(bytes given as floats, or divided by 255) it is hardly more than the neighbours themselves; of normal data in 784
features some ten times as many.

The grid is that of some sampled rows. A row of the corpus whose rest is larger than those of the sample is looked at in
any case. Where rows lie closer to each other than their rests tell apart, or queries far outside the grid, nearly all
would be looked at, and the search gives up.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from knnbench.bounds import direct_error
from knnbench.dtypes import Array
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_lists import MANY, insert
from knnbench.kernels.cpu_loops import (
    array_data,
    column_dtype,
    emit_loop,
    intrinsic,
    place_at,
    set_up,
    splat,
    tear_down,
    tile,
    trailing_zeros,
)
from knnbench.kernels.cpu_simd import (
    BYTE,
    INT32,
    INT64,
    TYPES,
    Builder,
    absolute_of_floats,
    call,
    constant,
    larger_of_floats,
    multiply_add,
)
from knnbench.kernels.cpu_tiles import Packing, TileKernels, Workspace, tile_kernels
from knnbench.metrics import METRICS, Space, add_absolute, add_square

__all__ = ["MOST_FEATURES", "ByteKernels", "ByteWorkspace", "Rounded", "Rounding", "byte_kernels", "narrow_space"]

MOST_FEATURES = 1 << 17
"""Up to so many, the error of the direct form is known in float32, and `REST_SLACK` covers that of a rest."""

# The metric of bytes that stands for one of floats, by what that accumulates.
METRIC_OF: dict[Callable[..., Any], str] = {add_absolute: "cityblock", add_square: "sqeuclidean"}

# Rows that the grid is that of.
SAMPLED = 256

# Offsets are one for all features unless that makes the step wider than by so much: then fewer values are outside.
WIDER = 1.25

# Of the sampled rows one in so many may be farther from their mean than others, so many times as far as most: the grid
# does not cover these. For queries as far, nearly all rows are looked at, which is no more than the search allows.
EXCEPTIONS, FARTHER = 20, 2.0

# Rests up to so much larger than any of the sample are no exception.
ALLOWED = 1.05

# Steps of which neither the squares of rests underflow, nor those of distances overflow sooner than by the direct form.
LEAST_STEP, MOST_STEP = 2.0**-40, 2.0**40

# Features that are rounded together, of a row; and room for some of them, or for 16 of their sums, or for the values of
# some pairs.
LANES = 16
SCRATCH = 3 * LANES

# A rest is off by this share of itself, as a sum of 16 lanes, and by this share of the step for each feature: by less
# than 2^-16 as a value less its offset is rounded, of which there are at most 255 steps, and again where a product is.
REST_SLACK, STEP_SLACK = 1.001, 2.0**-14

# For the roundings of limits themselves.
SLACK = 1 + 1e-9

# Limits are 32-bit integers.
LARGEST_LIMIT = 2.0**31 - 1

# How many rows are looked at before a search gives up: of each query so many, so many times those in its list, and one
# in so many. Looking at one takes as long as comparing the bytes of twenty.
LOOKED, LOOKED_FILLED, LOOKED_SHARE = 256, 16, 16


class Rounding(NamedTuple):
    """A grid.

    Attributes
    ----------
    offsets : (n_features, and to the next multiple of `LANES`,) array of the rows' dtype
    numbers : (4,) array of float64
        The step, the largest rest that is no exception, and the relative and absolute error of the direct form.
    """

    offsets: Array
    numbers: Array


class Rounded(NamedTuple):
    """A corpus packed for many searches: fields of `ByteWorkspace`."""

    offsets: Array
    numbers: Array
    is_packed: int
    panels: Array
    columns: Array
    norms: Array
    shifts: Array
    rests: Array


class ByteWorkspace(NamedTuple):
    """What a task holds beside its rows and its answer, as the kernel takes it: first what `Rounded` has.

    Attributes
    ----------
    offsets, numbers : arrays
        Of a `Rounding`.
    is_packed, panels, columns, norms, shifts, queries, query_norms, sums, limits, out, hits, byte_values
        Of the `Workspace` of the bytes: `corpus_norms` is `norms` here, and `values` `byte_values`.
    rests, query_rests : (n_panels, panel rows) and (n_queries,) arrays of float64
        How far rows are from what their bytes stand for.
    reaches : (n_queries,) array of float64
        From which distance of bytes on a row without a rest is of no interest, in steps.
    query_bytes, row_bytes : (n_queries, n_features) and (panel rows, n_features) arrays of uint8
        Rows as bytes, before they are packed.
    scratch : (SCRATCH,) array of the rows' dtype
    """

    offsets: Array
    numbers: Array
    is_packed: int
    panels: Array
    columns: Array
    norms: Array
    shifts: Array
    rests: Array
    queries: Array
    query_norms: Array
    sums: Array
    limits: Array
    out: Array
    hits: Array
    byte_values: Array
    query_rests: Array
    reaches: Array
    query_bytes: Array
    row_bytes: Array
    scratch: Array


@dataclass(frozen=True)
class ByteKernels(TileKernels):
    """The kernels of a space of floats by bytes.

    `knn` takes the k nearest by the direct form into the lists, or gives up, with False.

    Attributes
    ----------
    metric : str
        What accumulates the same of floats.
    deviate : callable
        ``(rows, every, middle, deviations)`` tells how far every so many of some rows are from their mean in any
        feature.
    measure : callable
        ``(rows, every, deviations, most, lows, highs, row_bytes, scratch, *rounding) -> bool`` finds the grid of those
        that are no farther than `most`, if there is one.
    """

    metric: str
    deviate: Callable[..., None]
    measure: Callable[..., bool]

    def reference(self, rows: Array, about: Array | None = None) -> Rounding | None:
        """Return the grid of rows; None if there is none, as where all that are sampled are equal but not whole, or
        where nothing is known of the values of the direct form."""
        n_features, dtype = rows.shape[1], rows.dtype
        errors = direct_error(Space(METRICS[self.metric], dtype, n_features))
        if not math.isfinite(errors[0]):
            return None
        found = Rounding(np.zeros(-(-n_features // LANES) * LANES, dtype), np.array([0.0, 0.0, *errors]))
        lows, highs, row_bytes = np.empty(n_features, dtype), np.empty(n_features, dtype), byte_rows(1, n_features)
        every = max(1, len(rows) // SAMPLED)
        deviations = np.empty(-(-len(rows) // every))
        self.deviate(rows, every, lows, deviations)
        ordinary, usual = np.sort(deviations)[[len(deviations) // 2, -1 - len(deviations) // EXCEPTIONS]]
        is_found = self.measure(
            rows, every, deviations, max(FARTHER * ordinary, usual), lows, highs, row_bytes, np.zeros(SCRATCH, dtype),
            *found,
        )  # fmt: skip
        return found if is_found else None

    def workspace(
        self, n_queries: int, n_features: int, reference: Any = None, packing: Any = None
    ) -> Any:  # a ByteWorkspace
        """Return the arrays for a task of so many queries, on a corpus that is packed, or is not, by a grid."""
        work = super().workspace(n_queries, n_features, packing=packing and plain(packing))
        corpus: Rounded = packing or rounded(reference, work)
        return ByteWorkspace(
            *corpus, work.queries, work.query_norms, work.sums, work.limits, work.out,
            work.hits, work.values, np.empty(n_queries), np.empty(n_queries), byte_rows(n_queries, n_features),
            byte_rows(self.plan.panels.panel_rows, n_features), np.zeros(SCRATCH, corpus.offsets.dtype),
        )  # fmt: skip

    def packing(self, n_corpus: int, n_features: int, reference: Any = None) -> Any:  # a Rounded
        """Return room for the panels of a corpus, which `pack` fills."""
        return rounded(reference, super().packing(n_corpus, n_features))

    def packing_bytes(self, n_corpus: int, n_features: int) -> int:
        """Return what `packing` takes, about."""
        return super().packing_bytes(n_corpus, n_features) + 8 * n_corpus

    def workspace_bytes(self, n_features: int) -> tuple[int, int]:
        """Return what `workspace` takes for a tile of queries, or a part of one, and besides."""
        (per_tile, fixed), (height, _) = super().workspace_bytes(n_features), self.plan.panels.tile_shape
        width = self.plan.panels.panel_rows
        return per_tile + height * (n_features + 16), fixed + width * (n_features + 8) + 8 * SCRATCH


def rounded(rounding: Rounding, found: Packing | Workspace) -> Rounded:
    """Return the panels of bytes with a grid, and room for rests."""
    return Rounded(
        rounding.offsets, rounding.numbers, found.is_packed, found.panels, found.columns, found.corpus_norms,
        found.shifts, np.empty(found.columns.shape),
    )  # fmt: skip


def plain(packing: Rounded) -> Packing:
    """Return what a packed corpus is to the kernels of bytes."""
    _, _, is_packed, panels, columns, norms, shifts, _ = packing
    return Packing(np.empty(0), is_packed, panels, columns, norms, shifts)


def byte_rows(n_rows: int, n_features: int) -> Array:
    """Return rows of bytes, with room for a few bytes behind the last."""
    return np.zeros(n_rows * n_features + LANES, np.uint8)[: n_rows * n_features].reshape(n_rows, n_features)


@intrinsic(prefer_literal=True)
def round_features(
    typing_context: Any, is_sum: Any, rows: Any, at: Any, offsets: Any, first: Any, n_steps: Any, step: Any,
    inverse: Any, target: Any, to: Any, sums: Any,
) -> Any:  # fmt: skip
    """Round some features of a row to bytes.

    Parameters
    ----------
    is_sum : int
        1 to add up magnitudes of what is lost, 0 for squares, a constant.
    rows : array of floats
    at : int
        Number of the first feature in `rows`, all rows counted.
    offsets : array of the same dtype
    first : int
        The first feature's number in `offsets`.
    n_steps : int
        Of 16 features, at least one.
    step, inverse : floats of the same dtype
        The step of the grid, and about one divided by it.
    target : array of bytes
    to : int
        The place of the first byte.
    sums : array of the same dtype
        To which 16 sums are added of what is lost; NaN, where a value is not finite.
    """
    if not isinstance(is_sum, types.Literal):
        return None
    adds_magnitudes = is_sum.literal_value

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        kind = signature.args[1].dtype
        size = kind.bitwidth // 8
        rows, offsets, target, sums = (array_data(context, builder, signature.args[i], args[i]) for i in (1, 3, 8, 10))
        vector = ir.VectorType(TYPES[kind.name], LANES)
        suffix = f"v{LANES}{vector.element.intrinsic_name}"
        step, inverse = (splat(builder, args[i], LANES) for i in (6, 7))
        nothing, most = constant(vector, 0.0), builder.fmul(step, constant(vector, 255.0))
        step = builder.fneg(step)

        def load(base: Any, start: Any, number: Any) -> Any:
            at = builder.add(start, builder.mul(number, INT64(LANES)))
            return builder.load(place_at(builder, base, builder.mul(at, INT64(size)), vector), align=size)

        def round_some(number: Any, found: list[Any]) -> list[Any]:
            values = builder.fsub(load(rows, args[2], number), load(offsets, args[4], number))
            inside = larger_of_floats(builder, values, nothing)
            inside = builder.select(builder.fcmp_ordered("<", inside, most), inside, most)
            whole = call(builder, f"llvm.rint.{suffix}", vector, builder.fmul(inside, inverse))
            # Zero times a value, for those that are not finite.
            rest = multiply_add(builder, values, nothing, multiply_add(builder, whole, step, inside))
            numbers = builder.fptosi(whole, ir.VectorType(INT32, LANES))
            few = builder.trunc(numbers, ir.VectorType(BYTE, LANES))
            place = builder.add(args[9], builder.mul(number, INT64(LANES)))
            builder.store(few, place_at(builder, target, place, few.type), align=1)
            if adds_magnitudes:
                return [builder.fadd(found[0], absolute_of_floats(builder, rest))]
            return [multiply_add(builder, rest, rest, found[0])]

        place = place_at(builder, sums, INT64(0), vector)
        (total,) = emit_loop(builder, args[5], [builder.load(place, align=size)], round_some)
        builder.store(total, place, align=size)
        return context.get_dummy_value()

    number = types.int64
    of_rows = rows.dtype
    arguments = (is_sum, rows, number, offsets, number, number, of_rows, of_rows, target, number, sums)
    return types.void(*arguments), generate


def narrow_space(space: Space) -> Space:
    """Return the space of the bytes."""
    return Space(METRICS[METRIC_OF[space.form.accumulate]], np.dtype(np.uint8), space.n_features)


def byte_kernels(space: Space) -> ByteKernels:
    """Return the kernels by bytes of a space of floats, compiled when they are first called."""
    narrow = narrow_space(space)
    return _compiled(narrow.metric.name, tile_kernels(narrow), tile_kernels(space))


@functools.cache
def _compiled(metric: str, narrow: TileKernels, direct: TileKernels) -> ByteKernels:
    is_sum, key, tiles = int(metric == "cityblock"), narrow.plan.key, narrow.plan.panels.name
    depth, group = narrow.plan.panels.depth, narrow.plan.panels.operation.group
    (height, _), width = narrow.plan.panels.tile_shape, narrow.plan.panels.panel_rows
    dtype = np.dtype(direct.plan.rows.operation.stored)
    of_rows, of_limits = numba.from_dtype(dtype), numba.from_dtype(np.dtype(column_dtype(key, narrow.key_dtype.name)))
    pack_queries, pack_panel, pair = narrow.parts.pack_queries, narrow.parts.pack_panel, direct.parts.pair

    @register_jitable
    def round_row(rows: Any, i: Any, offsets: Any, numbers: Any, target: Any, j: Any, scratch: Any) -> Any:
        """Write the bytes of row i, as the j-th; return how far it is from what they stand for, at the most."""
        n_features = rows.shape[1]
        n_whole = n_features // LANES
        step = of_rows(numbers[0])
        inverse = of_rows(1 / numbers[0])
        at, to, done = i * n_features, j * n_features, n_whole * LANES
        sums = scratch[2 * LANES :]
        sums[:LANES] = 0
        if n_whole:
            round_features(is_sum, rows, at, offsets, 0, n_whole, step, inverse, target, to, sums)
        if done < n_features:
            scratch[:LANES] = 0
            for f in range(done, n_features):
                scratch[f - done] = rows[i, f]
            round_features(is_sum, scratch, 0, offsets, done, 1, step, inverse, target, to + done, sums)
        total = 0.0
        for lane in range(LANES):
            total += sums[lane]
        if is_sum:
            return REST_SLACK * total + STEP_SLACK * numbers[0] * n_features
        return REST_SLACK * math.sqrt(total) + STEP_SLACK * numbers[0] * math.sqrt(n_features)

    @register_jitable
    def round_panel(
        corpus: Any, begin: Any, count: Any, offsets: Any, numbers: Any, panel: Any, columns: Any, norms: Any,
        shifts: Any, rests: Any, row_bytes: Any, byte_values: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Pack the bytes of `count` rows from row `begin` on."""
        for r in range(count):
            rests[r] = round_row(corpus, begin + r, offsets, numbers, row_bytes, r, scratch)
        pack_panel(row_bytes, 0, count, panel, columns, norms, shifts, offsets, byte_values)

    @register_jitable
    def reach_of(largest: Any, rest: Any, numbers: Any) -> Any:
        """Return from which distance of bytes on no row without a rest can have less than the largest value given, in
        steps."""
        distance = (np.float64(largest) + numbers[3]) / (1 - numbers[2])
        if not is_sum:
            distance = math.sqrt(distance)
        return SLACK * (distance + rest) / numbers[0]

    @register_jitable
    def limit_of(reach: Any, query_norm: Any) -> Any:
        """Return what keys of the tile are to be below where the distance of bytes is."""
        value = reach if is_sum else reach * reach
        # A comparison with NaN is false.
        return (np.int64(value) + 1 if value < LARGEST_LIMIT - 1 else np.int64(LARGEST_LIMIT)) - query_norm

    @compile_cached(nogil=True, error_model="numpy")
    def knn(
        queries: Any, corpus: Any, first: Any, stop: Any, offsets: Any, numbers: Any, is_packed: Any, panels: Any,
        columns: Any, norms: Any, shifts: Any, rests: Any, packed: Any, query_norms: Any, sums: Any, limits: Any,
        out: Any, hits: Any, byte_values: Any, query_rests: Any, reaches: Any, query_bytes: Any, row_bytes: Any,
        scratch: Any, k: Any, values: Any, indices: Any, counts: Any,
    ) -> Any:  # fmt: skip
        n_queries, n_features = queries.shape
        n_groups = (n_features + depth - 1) // depth * (depth // group)
        filled, kth = (k, k - 1) if k < MANY else (values.shape[1], 0)
        for i in range(n_queries):
            query_rests[i] = round_row(queries, i, offsets, numbers, query_bytes, i, scratch)
            if not query_rests[i] < np.inf:
                return False
        pack_queries(query_bytes, packed, query_norms, sums, offsets, byte_values)
        looked = 0
        set_up(tiles)
        for begin in range(first, stop, width):
            count, at = min(width, stop - begin), begin // width if is_packed else 0
            panel, column, shift = panels[at], columns[at], shifts[at]
            if not is_packed:
                round_panel(
                    corpus, begin, count, offsets, numbers, panel, column, norms[at], shift, rests[at], row_bytes,
                    byte_values, scratch,
                )  # fmt: skip
            is_filling, present = begin - first < filled, (np.int64(1) << count) - 1 if count < 64 else np.int64(-1)
            exceptions = np.int64(0)
            for r in range(count):
                rest = rests[at, r]
                if not rest <= numbers[1]:
                    exceptions |= np.int64(1) << r
                if not rest < np.inf:
                    tear_down(tiles)
                    return False
            always = np.int64(is_filling or exceptions != 0)
            for i in range(0, n_queries, height):
                if not tile(tiles, key, packed, i, panel, n_groups, column, shift, limits, always, out, hits):
                    continue
                for t in range(min(height, n_queries - i)):
                    left = present if is_filling else (hits[t] | exceptions) & present
                    if not left:
                        continue
                    norm = 0 if is_sum else query_norms[i + t]
                    while left:
                        r = trailing_zeros(left)
                        left &= left - 1
                        seen = begin + r - first
                        if not is_filling:
                            acc = np.int64(out[t * width + r])
                            between = acc if is_sum else norm + norms[at, r] - 2 * acc
                            reach = reaches[i + t] + SLACK * rests[at, r] / numbers[0]
                            if between >= (reach if is_sum else reach * reach):
                                continue
                        value = pair(queries, i + t, corpus, begin + r, scratch)
                        looked += 1
                        if seen < filled or value < values[i + t, kth]:
                            insert(k, values, indices, counts, i + t, seen, value, begin + r)
                    reach = reach_of(values[i + t, kth], query_rests[i + t], numbers)
                    reaches[i + t] = reach
                    limits[i + t] = of_limits(limit_of(reach + SLACK * numbers[1] / numbers[0], norm))
            done = begin + count - first
            if looked > n_queries * (LOOKED + LOOKED_FILLED * filled + done // LOOKED_SHARE):
                tear_down(tiles)
                return False
        tear_down(tiles)
        return True

    @compile_cached(allocates=True, nogil=True, error_model="numpy")
    def pack(
        corpus: Any, start: Any, stop: Any, offsets: Any, numbers: Any, is_packed: Any, panels: Any, columns: Any,
        norms: Any, shifts: Any, rests: Any,
    ) -> None:  # fmt: skip
        n_features = corpus.shape[1]
        row_bytes = np.zeros(width * n_features + LANES, np.uint8)[: width * n_features].reshape(width, n_features)
        scratch, byte_values = np.zeros(SCRATCH, dtype), np.zeros(1, np.int32)
        for p in range(start, stop):
            count = min(width, len(corpus) - p * width)
            round_panel(
                corpus, p * width, count, offsets, numbers, panels[p], columns[p], norms[p], shifts[p], rests[p],
                row_bytes, byte_values, scratch,
            )  # fmt: skip

    @compile_cached(nogil=True, error_model="numpy")
    def deviate(rows: Any, every: Any, middle: Any, deviations: Any) -> None:
        n_features = rows.shape[1]
        middle[:] = 0
        for n in range(len(deviations)):
            for f in range(n_features):
                middle[f] += rows[n * every, f] / of_rows(len(deviations))
        for n in range(len(deviations)):
            largest = of_rows(0)
            for f in range(n_features):
                deviation = abs(rows[n * every, f] - middle[f])
                largest = deviation if deviation > largest else largest
            deviations[n] = largest

    @compile_cached(nogil=True, error_model="numpy")
    def measure(
        rows: Any, every: Any, deviations: Any, most: Any, lows: Any, highs: Any, row_bytes: Any, scratch: Any,
        offsets: Any, numbers: Any,
    ) -> Any:  # fmt: skip
        n_rows, n_features = rows.shape
        lows[:], highs[:] = np.inf, -np.inf
        are_whole = True
        for i in range(0, n_rows, every):
            if not deviations[i // every] <= most:
                continue
            for f in range(n_features):
                value = rows[i, f]
                lows[f] = value if value < lows[f] else lows[f]
                highs[f] = value if value > highs[f] else highs[f]
                are_whole &= value == math.floor(value)
        low, high, widest = np.inf, -np.inf, 0.0
        for f in range(n_features):
            low, high = min(low, np.float64(lows[f])), max(high, np.float64(highs[f]))
            widest = max(widest, np.float64(highs[f]) - lows[f])
        is_common = high - low <= WIDER * widest
        step = (high - low if is_common else widest) / 255
        step = np.float64(of_rows(1.0 if are_whole and step < 1 else step))
        if not LEAST_STEP <= step <= MOST_STEP:
            return False
        for f in range(n_features):
            offset = low if is_common else (np.float64(lows[f]) + highs[f]) / 2 - 127.5 * step
            offsets[f] = math.floor(offset) if are_whole else offset
        numbers[0], largest = step, 0.0
        for i in range(0, n_rows, every):
            if deviations[i // every] <= most:
                largest = max(largest, round_row(rows, i, offsets, numbers, row_bytes, 0, scratch))
        numbers[1] = ALLOWED * largest
        return True

    return ByteKernels(
        narrow.plan, direct.ranked, knn, direct.knn_rows, narrow.order, direct.prove, direct.pairwise, pack,
        narrow.parts, metric, deviate, measure,
    )  # fmt: skip
