"""Squared distances of floats by a matrix unit that multiplies bytes: a filter of which rows to look at.

A centred row y is written in fixed point, with a power of two of its own, as two digits of eight bits::

    y = s (256 h + l) + r,    -127 <= h <= 127,    -128 <= l <= 127,    |r| <= s / 2 in each feature

so that a product of two rows is, but for the last two terms, ::

    q.c = s_q s_c (65536 h_q.h_c + 256 (h_q.l_c + l_q.h_c)) + s_q s_c l_q.l_c + (terms of r)

whole numbers that the matrix unit sums without rounding: three products of bytes, which take an eighth of the time of
one of float32. What is left out is, by Cauchy and Schwarz, at most ::

    |q| |r_c| + |r_q| (|c| + |r_c|) + s_q |l_q| s_c |l_c|

where ``s |l|`` is measured of each row and ``|r|`` at most ``s sqrt(n) / 2``. A row's key is ``|c|^2 - 2 q.c`` less
twice that bound: below it no exact value can be, but for the roundings that `error` declares. That is about twice what
float32 arithmetic leaves in doubt by its own declared error, unless single features of a row are much larger
than all others: then queries are searched again.

A panel of queries has, for each 64 features, a tile of h of 16 queries, one of the next 16, and those of l; a panel of
the corpus a tile of h and one of l of its 16 rows, of which groups of four features lie interleaved (Intel SDM,
TDPBSSD).
"""

import functools
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_lists import MANY, insert
from knnbench.kernels.cpu_loops import (
    array_data,
    emit_loop,
    intrinsic,
    matrix_instruction,
    place_at,
    set_up,
    splat,
    tear_down,
    trailing_zeros,
)
from knnbench.kernels.cpu_simd import (
    BYTE,
    INT32,
    INT64,
    MATRIX_ROWS,
    TYPES,
    Builder,
    Vectors,
    absolute_of_floats,
    call,
    constant,
    groups_summed,
    larger_of_floats,
    multiply_add,
    vectors_named,
)
from knnbench.metrics import Space

__all__ = ["MOST_FEATURES", "digit_kernels", "error", "exact_error", "scratch_elements"]

MOST_FEATURES = 1 << 15
"""Of so many features the sums of products fit 32 bits: each is below ``2 * 127 * 128``."""

# Features of a step of the matrix unit, and bytes of one of its tiles.
DEPTH, TILE = 64, 64 * MATRIX_ROWS
HEIGHT = 2 * MATRIX_ROWS

# Features that are written as digits together, of a row.
LANES = 16

# The largest whole number of two digits.
LARGEST = 127 * 256

# Exponents of scales that are normal numbers of float32, and so are their inverses.
LEAST_EXPONENT, MOST_EXPONENT = -126, 120

# For the roundings of the bound itself.
SLACK = 1.001


def exact_error(space: Space) -> float:
    """Return how far keys may be above exact values less ``|q|^2``, as a factor of ``|q|^2 + |c|^2`` of centred rows.

    With u = eps / 2 of float32, the six roundings of a key are together below ``43 u (|q|^2 + |c|^2)``, because what a
    row's high and low digits stand for is at most 2.5 and 2 times as long as the row. Norms are sums of 16 lanes, off
    by at most ``(n / 16 + 18) u``, and centring costs ``4.1 u``, u here of the rows' dtype (`Space.gram_error`).
    """
    eps, own = float(np.finfo(np.float32).eps), float(np.finfo(space.dtype).eps)
    return 24 * eps + (space.n_features / 16 + 26) * own


def error(space: Space) -> float:
    """Return the same from values by the direct form in the dtype of the rows, whose error comes on top."""
    return space.gram_error + 24 * float(np.finfo(np.float32).eps)


def products(builder: Builder, form: Vectors, queries: Any, panel: Any, n_steps: Any, out: Any) -> None:
    """Store the sums of products of high digits, and then those of high with low ones, of a tile.

    Parameters
    ----------
    builder : ir.IRBuilder
    form : Vectors
    queries, panel : ir.Value
        Addresses of a panel of 32 queries and of one of 16 corpus rows.
    n_steps : ir.Value
        Of 64 features, at least one.
    out : ir.Value
        Address of two arrays of int32 of shape (32, 16).
    """
    emit = functools.partial(matrix_instruction, builder)
    query_step, row_step = INT64(4 * TILE), INT64(2 * TILE)
    if form.instruction:
        for number in range(4):
            emit("llvm.x86.tilezero", BYTE(number))

        def load(tile: int, base: Any, at: int) -> None:
            emit("llvm.x86.tileloadd64", BYTE(tile), builder.gep(base, [INT64(at * TILE)]), INT64(64))

        def step(number: Any, _: list[Any]) -> list[Any]:
            rows = builder.gep(queries, [builder.mul(number, query_step)])
            columns = builder.gep(panel, [builder.mul(number, row_step)])
            load(4, columns, 0)
            load(6, rows, 0)
            load(5, columns, 1)
            load(7, rows, 1)
            for to, query, column in ((0, 6, 4), (1, 7, 4), (2, 6, 5), (3, 7, 5)):
                emit(form.instruction, BYTE(to), BYTE(query), BYTE(column))
            load(6, rows, 2)
            load(7, rows, 3)
            for to, query, column in ((2, 6, 4), (3, 7, 4)):
                emit(form.instruction, BYTE(to), BYTE(query), BYTE(column))
            return []

        emit_loop(builder, n_steps, [], step)
        for number in range(4):
            at = builder.gep(out, [INT64(number * TILE)])
            emit("llvm.x86.tilestored64", BYTE(number), at, INT64(64))
        return

    vector, wide = ir.VectorType(BYTE, 64), ir.VectorType(INT32, 64)
    sums = ir.VectorType(INT32, MATRIX_ROWS)

    def row(i: Any, _: list[Any]) -> list[Any]:
        half, within = builder.sdiv(i, INT64(MATRIX_ROWS)), builder.srem(i, INT64(MATRIX_ROWS))
        at_query = builder.add(builder.mul(half, INT64(TILE)), builder.mul(within, INT64(64)))

        def step(number: Any, accs: list[Any]) -> list[Any]:
            step_of, group = builder.sdiv(number, INT64(16)), builder.srem(number, INT64(16))
            base = builder.add(builder.mul(step_of, query_step), builder.add(at_query, builder.mul(group, INT64(4))))
            column_base = builder.add(builder.mul(step_of, row_step), builder.mul(group, INT64(64)))

            def query(digit: int) -> Any:
                at = builder.add(base, INT64(digit * 2 * TILE))
                value = splat(builder, builder.load(place_at(builder, queries, at, INT32), align=4), MATRIX_ROWS)
                return builder.sext(builder.bitcast(value, vector), wide)

            def column(digit: int) -> Any:
                at = builder.add(column_base, INT64(digit * TILE))
                return builder.sext(builder.load(place_at(builder, panel, at, vector), align=64), wide)

            def added(acc: Any, a: Any, b: Any) -> Any:
                return builder.add(acc, groups_summed(builder, builder.mul(a, b), 4))

            low = added(accs[1], query(0), column(1))
            return [added(accs[0], query(0), column(0)), added(low, query(1), column(0))]

        zero = ir.Constant(sums, None)
        found = emit_loop(builder, builder.mul(n_steps, INT64(16)), [zero, zero], step)
        for number, value in enumerate(found):
            at = builder.add(builder.mul(i, INT64(64)), INT64(2 * number * TILE))
            builder.store(value, place_at(builder, out, at, sums), align=64)
        return []

    emit_loop(builder, INT64(HEIGHT), [], row)


@intrinsic(prefer_literal=True)
def tile_of_digits(
    typing_context: Any, vectors: Any, queries: Any, first: Any, panel: Any, n_steps: Any, norms: Any, scales: Any,
    gaps: Any, terms: Any, limits: Any, out: Any, hits: Any,
) -> Any:  # fmt: skip
    """Compute the keys of a tile of 32 queries and a panel of 16 corpus rows, and look for small ones.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    queries : array
        Panels of queries.
    first : int
        The first query of the tile, a multiple of 32.
    panel : array
        The panel of the corpus.
    n_steps : int
        Of 64 features, at least one.
    norms, scales, gaps : arrays of float32
        Of each row of the panel: its squared norm, its power of two, and the bound by the length of a query.
    terms : array of float32
        Of each query: -512 times its power of two, and its length, negative.
    limits : array of float32
        For each query. Only smaller keys are of interest.
    out : array
        Where the keys are stored, shape (32, 16), with as much room behind them.
    hits : array of int64
        Where a word of bits is stored for each query: that of row r is set if its key is below the limit.

    Returns
    -------
    bool
        Whether any is.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        queries, panel, norms, scales, gaps, terms, limits, out, hits = (
            array_data(context, builder, signature.args[i], args[i]) for i in (1, 3, 5, 6, 7, 8, 9, 10, 11)
        )
        first, n_steps = args[2], args[4]
        number, lanes = TYPES["float32"], MATRIX_ROWS
        of_rows = builder.mul(builder.mul(first, n_steps), INT64(2 * DEPTH))
        products(builder, form, builder.gep(queries, [of_rows]), panel, n_steps, out)

        vector, whole = ir.VectorType(number, lanes), ir.VectorType(INT32, lanes)
        word = ir.IntType(lanes)
        norm, scale, gap = (
            builder.load(place_at(builder, base, INT64(0), vector), align=4) for base in (norms, scales, gaps)
        )
        base_256 = constant(vector, 256.0)

        def query(i: Any, found: list[Any]) -> list[Any]:
            places = [builder.add(builder.mul(i, INT64(64)), INT64(2 * TILE * kind)) for kind in range(2)]
            sums = [builder.load(place_at(builder, out, place, whole), align=64) for place in places]
            high, low = (builder.sitofp(value, vector) for value in sums)
            product = builder.fmul(multiply_add(builder, high, base_256, low), scale)
            at = builder.add(first, i)

            def of_query(base: Any, index: Any) -> Any:
                address = place_at(builder, base, builder.mul(index, INT64(4)), number)
                return splat(builder, builder.load(address, align=4), lanes)

            factor, length = (
                of_query(terms, builder.add(builder.mul(at, INT64(2)), INT64(which))) for which in range(2)
            )
            key = multiply_add(builder, product, factor, multiply_add(builder, gap, length, norm))
            builder.store(key, place_at(builder, out, places[0], vector), align=64)
            below = builder.bitcast(builder.fcmp_ordered("<", key, of_query(limits, at)), word)
            builder.store(builder.zext(below, INT64), place_at(builder, hits, builder.mul(i, INT64(8)), INT64))
            return [builder.or_(found[0], below)]

        (found,) = emit_loop(builder, INT64(HEIGHT), [word(0)], query)
        return builder.icmp_unsigned("!=", found, word(0))

    number = types.int64
    arguments = (vectors, queries, number, panel, number, norms, scales, gaps, terms, limits, out, hits)
    return types.boolean(*arguments), generate


def _row_vectors(builder: Builder, kind: Any, row: Any, number: Any) -> Any:
    """Emit the loading of the `number`-th 16 features of a centred row."""
    size = kind.bitwidth // 8
    vector = ir.VectorType(TYPES[kind.name], LANES)
    address = place_at(builder, row, builder.mul(number, INT64(LANES * size)), vector)
    return builder.load(address, align=size)


@intrinsic(prefer_literal=False)
def measure_row(typing_context: Any, row: Any, n_steps: Any, out: Any) -> Any:
    """Add up the squares of a centred row, and find its largest magnitude.

    Parameters
    ----------
    row : array of floats
        64 features for each step.
    n_steps : int
        At least one.
    out : array of the same dtype
        Filled with 16 sums and then 16 largest magnitudes.
    """

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        kind = signature.args[0].dtype
        row, out = (array_data(context, builder, signature.args[i], args[i]) for i in (0, 2))

        def step(number: Any, found: list[Any]) -> list[Any]:
            values = _row_vectors(builder, kind, row, number)
            magnitudes = absolute_of_floats(builder, values)
            return [multiply_add(builder, values, values, found[0]), larger_of_floats(builder, found[1], magnitudes)]

        zero = ir.Constant(ir.VectorType(TYPES[kind.name], LANES), None)
        found = emit_loop(builder, builder.mul(args[1], INT64(DEPTH // LANES)), [zero, zero], step)
        for number, value in enumerate(found):
            at = INT64(number * LANES * kind.bitwidth // 8)
            builder.store(value, place_at(builder, out, at, value.type), align=kind.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(row, types.int64, out), generate


@intrinsic(prefer_literal=True)
def write_digits(
    typing_context: Any, apart: Any, row: Any, n_steps: Any, inverse: Any, target: Any, to: Any, step: Any, low: Any,
    out: Any,
) -> Any:  # fmt: skip
    """Write the digits of a centred row into a panel.

    Parameters
    ----------
    apart : int
        Bytes from four features to the next four, a constant.
    row, n_steps
        As of `measure_row`.
    inverse : float
        Of its power of two.
    target : array of bytes
        The panel.
    to, step, low : int
        The place of the first high digit, and bytes from there to that of the next step, and to the first low one.
    out : array of the row's dtype
        Filled with 16 sums of squares of low digits.
    """
    if not isinstance(apart, types.Literal):
        return None
    distance = apart.literal_value

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        kind = signature.args[1].dtype
        row, target, out = (array_data(context, builder, signature.args[i], args[i]) for i in (1, 4, 8))
        to, step, low_at = args[5], args[6], args[7]
        inverse = splat(builder, args[3], LANES)
        groups = ir.VectorType(INT32, LANES // 4)

        def written(number: Any, found: list[Any]) -> list[Any]:
            values = _row_vectors(builder, kind, row, number)
            vector = values.type
            name = f"v{LANES}{vector.element.intrinsic_name}"
            whole = call(builder, f"llvm.rint.{name}", vector, builder.fmul(values, inverse))
            halves = multiply_add(builder, whole, constant(vector, 1 / 256), constant(vector, 0.5))
            high = call(builder, f"llvm.floor.{name}", vector, halves)
            low = multiply_add(builder, high, constant(vector, -256.0), whole)
            step_of, part = builder.sdiv(number, INT64(4)), builder.srem(number, INT64(4))
            at = builder.add(to, builder.mul(step_of, step))
            at = builder.add(at, builder.mul(part, INT64(4 * distance)))
            for digit, place in ((high, at), (low, builder.add(at, low_at))):
                numbers = builder.fptosi(digit, ir.VectorType(INT32, LANES))
                four = builder.bitcast(builder.trunc(numbers, ir.VectorType(BYTE, LANES)), groups)
                if distance == 4:
                    builder.store(four, place_at(builder, target, place, groups), align=4)
                    continue
                for g in range(LANES // 4):
                    address = place_at(builder, target, builder.add(place, INT64(g * distance)), INT32)
                    builder.store(builder.extract_element(four, INT32(g)), address, align=4)
            return [multiply_add(builder, low, low, found[0])]

        zero = ir.Constant(ir.VectorType(TYPES[kind.name], LANES), None)
        (lows,) = emit_loop(builder, builder.mul(args[2], INT64(DEPTH // LANES)), [zero], written)
        builder.store(lows, place_at(builder, out, INT64(0), lows.type), align=kind.bitwidth // 8)
        return context.get_dummy_value()

    number = types.int64
    arguments = (apart, row, number, row.dtype, target, number, number, number, out)
    return types.void(*arguments), generate


@register_jitable
def steps_of(n_features: Any) -> Any:
    """Return how many steps of the matrix unit a row takes."""
    return (n_features + DEPTH - 1) // DEPTH


@register_jitable
def scratch_elements(n_features: Any) -> Any:
    """Return the room that packing needs, in numbers of the rows' dtype: a row, and what is summed of it."""
    return steps_of(n_features) * DEPTH + 2 * LANES


@register_jitable
def centred_row(rows: Any, i: Any, centre: Any, scratch: Any) -> Any:
    """Put a row, centred, at the beginning of `scratch`; return its squared norm and the exponent of its power of
    two."""
    n_features = rows.shape[1]
    n_steps = steps_of(n_features)
    for f in range(n_features):
        scratch[f] = rows[i, f] - centre[f]
    scratch[n_features : n_steps * DEPTH] = 0
    sums = scratch[n_steps * DEPTH :]
    measure_row(scratch, n_steps, sums)
    total, most = np.float64(0), np.float64(0)
    for lane in range(LANES):
        total += sums[lane]
        most = max(most, np.float64(sums[LANES + lane]))
    _, exponent = math.frexp(most / LARGEST)
    # Of 0 that is 0, and half of such a scale would be a bound for a row that has no rest.
    exponent = exponent if most > 0 else LEAST_EXPONENT
    return total, min(max(exponent, LEAST_EXPONENT), MOST_EXPONENT)


@register_jitable
def low_length(sums: Any, scale: Any) -> Any:
    """Return the length of what the low digits of a row stand for."""
    total = np.float64(0)
    for lane in range(LANES):
        total += sums[lane]
    return scale * math.sqrt(total)


@functools.cache
def digit_kernels(tiles: str, largest_norm: float) -> tuple[Any, Any]:
    """Return `TileKernels.knn` and `TileKernels.pack` of some `Vectors`, by their name, for norms up to the largest.

    Of the arrays of a `Workspace`, `corpus_norms` holds here the powers of two of rows, `shifts` the lengths of what
    their low digits stand for, and `sums` the `terms` of `tile_of_digits`.
    """
    form = vectors_named(tiles)
    width, dtype = form.panel_rows, np.dtype(form.operation.stored)
    of_dtype = numba.from_dtype(dtype)

    @register_jitable
    def pack_queries(queries: Any, packed: Any, norms: Any, terms: Any, centre: Any, scratch: Any) -> Any:
        """Fill a task's panels; return the largest shares of a query's length that its rest and its low digits have,
        and whether all norms are small enough."""
        n_queries, n_features = queries.shape
        n_steps, half = steps_of(n_features), 0.5 * math.sqrt(n_features)
        sums = scratch[n_steps * DEPTH :]
        packed[:] = 0
        terms[:] = 0
        of_rest, of_low = 0.0, 0.0
        for i in range(n_queries):
            norm, exponent = centred_row(queries, i, centre, scratch)
            norms[i] = norm
            if not norm <= largest_norm:
                return of_rest, of_low, False
            scale = math.ldexp(1.0, exponent)
            # Not shorter than rows of this scale are where no exponent is clamped: no share of it is large.
            length = max(math.sqrt(norm), scale * LARGEST / 2)
            to = i // HEIGHT * (HEIGHT * n_steps * 2 * DEPTH) + i % HEIGHT * DEPTH
            write_digits(4, scratch, n_steps, of_dtype(1 / scale), packed, to, 4 * TILE, 2 * TILE, sums)
            terms[2 * i], terms[2 * i + 1] = -512.0 * scale, -length * SLACK
            of_rest = max(of_rest, half * scale / length)
            of_low = max(of_low, low_length(sums, scale) / length)
        return of_rest, of_low, True

    @register_jitable
    def pack_panel(
        corpus: Any, start: Any, count: Any, panel: Any, norms: Any, scales: Any, lows: Any, centre: Any, scratch: Any
    ) -> None:
        n_features = corpus.shape[1]
        n_steps = steps_of(n_features)
        sums = scratch[n_steps * DEPTH :]
        for r in range(width):
            norms[r], scales[r], lows[r] = 0, 0, 0
        if count < width:
            panel[:] = 0
        for r in range(count):
            norm, exponent = centred_row(corpus, start + r, centre, scratch)
            scale = math.ldexp(1.0, exponent)
            norms[r], scales[r] = norm, scale
            # As it is stored: what rounds down to the largest has its digits, too.
            if norms[r] <= largest_norm:
                write_digits(64, scratch, n_steps, of_dtype(1 / scale), panel, 4 * r, 2 * TILE, TILE, sums)
                lows[r] = low_length(sums, scale)

    @compile_cached(nogil=True, error_model="numpy")
    def knn(
        queries: Any, corpus: Any, first: Any, stop: Any, centre: Any, is_packed: Any, packed: Any, panels: Any,
        norms: Any, scales: Any, query_norms: Any, lows: Any, terms: Any, limits: Any, out: Any, hits: Any,
        witnesses: Any, scratch: Any, k: Any, values: Any, indices: Any, counts: Any,
    ) -> Any:  # fmt: skip
        n_queries, n_features = queries.shape
        n_steps, half = steps_of(n_features), 0.5 * math.sqrt(n_features)
        filled, kth = (k, k - 1) if k < MANY else (values.shape[1], 0)
        of_rest, of_low, are_summable = pack_queries(queries, packed, query_norms, terms, centre, scratch)
        if not are_summable:
            return False
        gaps = out[2 * HEIGHT * width :]
        set_up(tiles)
        for begin in range(first, stop, width):
            count, at = min(width, stop - begin), begin // width if is_packed else 0
            panel = panels[at]
            if not is_packed:
                pack_panel(corpus, begin, count, panel, norms[at], scales[at], lows[at], centre, scratch)
            for r in range(count):
                if not norms[at, r] <= largest_norm:
                    tear_down(tiles)
                    return False
                rest, length = half * scales[at, r], math.sqrt(np.float64(norms[at, r]))
                gaps[r] = 2 * SLACK * (rest + of_rest * (length + rest) + of_low * lows[at, r])
            is_filling, present = begin - first < filled, (np.int64(1) << count) - 1
            for i in range(0, n_queries, HEIGHT):
                is_any = tile_of_digits(
                    tiles, packed, i, panel, n_steps, norms[at], scales[at], gaps, terms, limits, out, hits
                )
                if not (is_any or is_filling):
                    continue
                for t in range(min(HEIGHT, n_queries - i)):
                    left = present if is_filling else hits[t] & present
                    if not left:
                        continue
                    while left:
                        r = trailing_zeros(left)
                        left &= left - 1
                        insert(k, values, indices, counts, i + t, begin + r - first, out[t * width + r], begin + r)
                    limits[i + t] = values[i + t, kth]
        tear_down(tiles)
        return True

    @compile_cached(allocates=True, nogil=True, error_model="numpy")
    def pack(
        corpus: Any, start: Any, stop: Any, centre: Any, is_packed: Any, panels: Any, norms: Any, scales: Any,
        lows: Any,
    ) -> None:  # fmt: skip
        n_features = corpus.shape[1]
        scratch = np.zeros(scratch_elements(n_features), dtype)
        for p in range(start, stop):
            count = min(width, len(corpus) - p * width)
            pack_panel(corpus, p * width, count, panels[p], norms[p], scales[p], lows[p], centre, scratch)

    return knn, pack
