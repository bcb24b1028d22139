"""Inner loops of vector instructions, as functions that kernels compiled by numba can call.

They are numba intrinsics that emit LLVM's intermediate representation, because a compiler that sees only scalar loops
neither keeps the sums of many pairs in registers nor finds ``VPSADBW``. They take a `Vectors` by its name: numba keeps
compiled code on disk only for what is named by constants.

There are two layouts. In a *panel*, the features of some rows lie interleaved, a group of them at a time::

    row 0 features 0..g-1 | row 1 features 0..g-1 | ... | row 0 features g..2g-1 | ...

so that a lane of an accumulator belongs to one row: nothing is summed across lanes, however few features there are.
`move` and `move_square` fill panels, and `tile` computes with them. `row_values` takes rows as they lie, and sums
across lanes at the end of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic as untyped_intrinsic

from knnbench.kernels.cpu_simd import (
    BYTE,
    CENTRE,
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
    is_float,
    multiply_add,
    vectors_named,
)

__all__ = [
    "KEYS",
    "LIST_LANES",
    "array_data",
    "column_dtype",
    "configure_matrix_unit",
    "emit_loop",
    "intrinsic",
    "matrix_instruction",
    "matrix_sums",
    "move",
    "move_square",
    "multiply_tiles",
    "place_at",
    "release_matrix_unit",
    "row_values",
    "rows_beyond",
    "set_up",
    "shift_in",
    "splat",
    "tear_down",
    "tile",
    "tile_sums",
    "trailing_zeros",
]

LIST_LANES = 8
"""Pairs of a sorted list that `shift_in` moves at once; lists have room for a multiple of them."""

# numba's annotations cover neither its tools for code generation nor what its decorator makes of a function.
cgutils: Any = untyped_cgutils
intrinsic: Callable[..., Callable[[Any], Any]] = untyped_intrinsic


def array_data(context: Any, builder: Builder, kind: Any, array: Any) -> Any:
    """Return the address of an array's first byte."""
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    return builder.bitcast(data, BYTE.as_pointer())


def place_at(builder: Builder, base: Any, offset: Any, kind: Any) -> Any:
    """Return the address so many bytes after another, of a value of `kind`."""
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


def splat(builder: Builder, value: Any, lanes: int) -> Any:
    """Emit a vector of equal lanes."""
    vector = ir.VectorType(value.type, lanes)
    none = ir.Constant(vector, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(none, value, INT32(0)),
        none,
        ir.Constant(ir.VectorType(INT32, lanes), [INT32(0)] * lanes),
    )


def _load(builder: Builder, vectors: Vectors, base: Any, at: Any, count: int) -> Any:
    """Emit a load of `count` features from where they are stored, as elements."""
    operation = vectors.operation
    stored, element = TYPES[operation.stored], TYPES[operation.element]
    address = place_at(
        builder, base, builder.mul(at, INT64(np.dtype(operation.stored).itemsize)), ir.VectorType(stored, count)
    )
    value = builder.load(address, align=1)
    return value if stored == element else builder.zext(value, ir.VectorType(element, count))


@intrinsic(prefer_literal=True)
def move(
    typing_context: Any, vectors: Any, count: Any, is_query: Any, source: Any, at: Any, target: Any, to: Any
) -> Any:
    """Move some features of a row into a panel, as elements.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    count : int
        How many features, a constant.
    is_query : int
        1 for queries, 0 for corpus rows, a constant.
    source : array
        Rows.
    at : int
        Number of the first feature in `source`, all rows counted.
    target : array
        The panel.
    to : int
        Number of the first element in `target`.
    """
    if not all(isinstance(kind, types.Literal) for kind in (vectors, count, is_query)):
        return None
    form, n, centred = vectors_named(vectors.literal_value), count.literal_value, is_query.literal_value
    operation = form.operation

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        source, target = (array_data(context, builder, signature.args[i], args[i]) for i in (3, 5))
        value = _load(builder, form, source, args[4], n)
        if operation.centred and centred:
            value = builder.xor(value, constant(value.type, CENTRE))
        size = np.dtype(operation.element).itemsize
        # A whole group lies where its lane does.
        align = n * size if n == operation.group else size
        builder.store(value, place_at(builder, target, builder.mul(args[6], INT64(size)), value.type), align=align)
        return context.get_dummy_value()

    return types.void(vectors, count, is_query, source, types.int64, target, types.int64), generate


def _transposed(builder: Builder, rows: list[Any]) -> list[Any]:
    """Emit the columns of a square of units: as often as it takes, its upper half is interleaved with its lower one."""
    size = len(rows)
    index = ir.VectorType(INT32, size)
    masks = [
        ir.Constant(index, [INT32(start + lane // 2 + size * (lane % 2)) for lane in range(size)])
        for start in (0, size // 2)
    ]
    for _ in range(size.bit_length() - 1):
        pairs = zip(rows[: size // 2], rows[size // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return rows


@intrinsic(prefer_literal=True)
def move_square(
    typing_context: Any, vectors: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, step: Any, centre: Any,
    first: Any, norms: Any, sums: Any, row: Any,
) -> Any:  # fmt: skip
    """Move `Vectors.square` groups of features of as many corpus rows into a panel.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    source : array
        Rows.
    at, stride : int
        Number of the first feature in `source`, all rows counted, and of features from a row to the next.
    target : array
        The panel.
    to, step : int
        Number of the first element in `target`, and of elements from a group to the next.
    centre : array of elements, or None
        What to take from each feature of a row.
    first : int
        The first feature's number in `centre`.
    norms : array of elements, or None
        To which the squares of what is stored are added, if there is a centre.
    sums : array of elements, or None
        To which then what is stored is added, and to `norms` its magnitudes, not squares.
    row : int
        The first row's number in `norms` and `sums`.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)
    operation, size = form.operation, form.square
    has_centre, has_sums = (not isinstance(kind, types.NoneType) for kind in (centre, sums))

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        source, target = (array_data(context, builder, signature.args[i], args[i]) for i in (1, 4))
        element_bytes = np.dtype(operation.element).itemsize
        unit = ir.IntType(8 * element_bytes * operation.group)
        rows = [
            _load(builder, form, source, builder.add(args[2], builder.mul(args[3], INT64(r))), size * operation.group)
            for r in range(size)
        ]
        if has_centre:
            base = array_data(context, builder, signature.args[7], args[7])
            address = place_at(builder, base, builder.mul(args[8], INT64(element_bytes)), rows[0].type)
            middle = builder.load(address, align=element_bytes)
            rows = [builder.fsub(value, middle) for value in rows]
        units = ir.VectorType(unit, size)
        columns = _transposed(builder, [builder.bitcast(value, units) for value in rows])
        for g, column in enumerate(columns):
            place = builder.add(args[5], builder.mul(args[6], INT64(g)))
            address = place_at(builder, target, builder.mul(place, INT64(element_bytes)), units)
            builder.store(column, address, align=element_bytes)
        if has_centre:
            vector = rows[0].type

            def add(total: Any, value: Any) -> Any:
                return builder.fadd(total, value)

            def add_magnitude(total: Any, value: Any) -> Any:
                return builder.fadd(total, absolute_of_floats(builder, value))

            def add_square(total: Any, value: Any) -> Any:
                return multiply_add(builder, value, value, total)

            kept = [(9, add_magnitude), (10, add)] if has_sums else [(9, add_square)]
            for number, adding in kept:
                base = array_data(context, builder, signature.args[number], args[number])
                address = place_at(builder, base, builder.mul(args[11], INT64(element_bytes)), vector)
                total = builder.load(address, align=element_bytes)
                for column in columns:
                    total = adding(total, builder.bitcast(column, vector))
                builder.store(total, address, align=element_bytes)
        return context.get_dummy_value()

    number = types.int64
    arguments = (vectors, source, number, number, target, number, number, centre, number, norms, sums, number)
    return types.void(*arguments), generate


def emit_loop(
    builder: Builder, count: Any, firsts: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Emit a loop of `count` iterations, at least one, that carries values; return them after the last."""
    before = builder.block
    loop, end = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(INT64)
    carried = [builder.phi(first.type) for first in firsts]
    following = body(number, list(carried))
    after = builder.add(number, INT64(1))
    number.add_incoming(INT64(0), before)
    number.add_incoming(after, builder.block)
    for value, first, later in zip(carried, firsts, following, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_signed("<", after, count), loop, end)
    builder.position_at_end(end)
    return following


# What is compared with a query's limit, from an accumulator and the number of its corpus row.
def _value_itself(builder: Builder, acc: Any, column: Any) -> Any:
    return acc


def _value_of_gram(builder: Builder, acc: Any, column: Any) -> Any:
    """Emit |c|^2 - 2 q.c, which is the squared distance less |q|^2."""
    if is_float(acc.type):
        return multiply_add(builder, acc, constant(acc.type, -2.0), column)
    return builder.sub(column, builder.add(acc, acc))


def _value_of_larger(builder: Builder, acc: Any, column: Any) -> Any:
    """Emit 2 sum(max(q, c)) - sum(c), which is sum(|q - c|) and sum(q)."""
    return builder.fsub(builder.fadd(acc, acc), column)


def _value_of_cosine(builder: Builder, acc: Any, column: Any) -> Any:
    """Emit -q.c / |c|; the column is -1 / |c|."""
    return builder.fmul(builder.sitofp(acc, column.type), column)


KEYS = {"value": _value_itself, "gram": _value_of_gram, "larger": _value_of_larger, "cosine": _value_of_cosine}


def column_dtype(key: str, accumulator: str) -> str:
    """Return the dtype of the numbers of corpus rows, and of the limits, that a key works with."""
    if key != "cosine":
        return accumulator
    return "float32" if accumulator == "int32" else "float64"


def tile_sums(builder: Builder, form: Vectors, queries: Any, panel: Any, n_groups: Any) -> list[Any]:
    """Emit the loop over groups of features; return the accumulators, those of the first query first.

    Parameters
    ----------
    builder : ir.IRBuilder
    form : Vectors
    queries, panel : ir.Value
        Addresses of a panel of queries and of one of the corpus.
    n_groups : ir.Value
        At least 1.
    """
    n_queries, n_vectors = form.tile_shape
    unit_bytes = form.width // form.lanes
    unit = TYPES[form.operation.element] if form.operation.group == 1 else ir.IntType(8 * unit_bytes)

    def step(group: Any, accs: list[Any]) -> list[Any]:
        at = builder.mul(group, INT64(n_vectors * form.width))
        places = [builder.add(at, INT64(v * form.width)) for v in range(n_vectors)]
        corpus = [builder.load(place_at(builder, panel, place, form.elements), align=form.width) for place in places]
        at, following = builder.mul(group, INT64(n_queries * unit_bytes)), []
        for i in range(n_queries):
            address = place_at(builder, queries, builder.add(at, INT64(i * unit_bytes)), unit)
            query = splat(builder, builder.load(address, align=unit_bytes), form.lanes)
            query = builder.bitcast(query, form.elements)
            own = accs[i * n_vectors : (i + 1) * n_vectors]
            following += [form.step(builder, acc, query, rows) for acc, rows in zip(own, corpus, strict=True)]
        return following

    zeros = [ir.Constant(form.accumulators, None)] * (n_queries * n_vectors)
    return emit_loop(builder, n_groups, zeros, step)


def multiply_tiles(
    builder: Builder, form: Vectors, n_steps: Any, operands: Callable[[Any], tuple[Any, Any]], apart: int, stride: int,
    out: Any,
) -> None:  # fmt: skip
    """Store the sums over steps of the products of two tiles of rows with two of columns, by a matrix unit.

    Parameters
    ----------
    builder : ir.IRBuilder
    form : Vectors
        With the instruction.
    n_steps : ir.Value
        At least 1.
    operands : callable
        ``(number of a step) -> (rows, columns)``: the addresses of the first tile of each; the second of rows follows.
    apart, stride : int
        Bytes from the first tile of columns to the second, and from row to row of one.
    out : ir.Value
        Address of the sums, shape (32, 32).
    """
    emit, tile_bytes = functools.partial(matrix_instruction, builder), MATRIX_ROWS * form.width
    for number in range(4):
        emit("llvm.x86.tilezero", BYTE(number))

    def step(number: Any, _: list[Any]) -> list[Any]:
        rows, columns = operands(number)
        for half in range(2):
            at = builder.gep(rows, [INT64(half * tile_bytes)])
            emit("llvm.x86.tileloadd64", BYTE(4 + half), at, INT64(form.width))
            at = builder.gep(columns, [INT64(half * apart)])
            emit("llvm.x86.tileloadd64", BYTE(6 + half), at, INT64(stride))
        for down in range(2):
            for across in range(2):
                emit(form.instruction, BYTE(2 * down + across), BYTE(4 + down), BYTE(6 + across))
        return []

    emit_loop(builder, n_steps, [], step)
    for down in range(2):
        for across in range(2):
            at = builder.gep(out, [INT64(2 * down * tile_bytes + across * form.width)])
            emit("llvm.x86.tilestored64", BYTE(2 * down + across), at, INT64(2 * form.width))


def matrix_sums(builder: Builder, form: Vectors, queries: Any, panel: Any, n_groups: Any, out: Any) -> list[Any]:
    """Store the accumulators of a tile by a matrix unit, 2 x 2 of its tiles; return them as `tile_sums` does.

    Queries lie in steps of `Vectors.depth` features: as many of the first query, then of the second, and so on.
    """
    steps = builder.sdiv(n_groups, INT64(MATRIX_ROWS))
    (height, n_vectors), tile_bytes = form.tile_shape, MATRIX_ROWS * form.width
    if form.instruction:

        def operands(number: Any) -> tuple[Any, Any]:
            at = builder.mul(number, INT64(2 * tile_bytes))
            return builder.gep(queries, [at]), builder.gep(panel, [at])

        multiply_tiles(builder, form, steps, operands, form.width, n_vectors * form.width, out)
    else:

        def pair(i: Any, _: list[Any]) -> list[Any]:
            for v in range(n_vectors):

                def product(number: Any, accs: list[Any], v: int = v) -> list[Any]:
                    block, group = (op(number, INT64(MATRIX_ROWS)) for op in (builder.sdiv, builder.srem))
                    row = builder.add(builder.mul(block, INT64(height)), i)
                    at = builder.add(builder.mul(row, INT64(form.width)), builder.mul(group, INT64(4)))
                    wide = ir.VectorType(INT32, form.width)
                    query = splat(builder, builder.load(place_at(builder, queries, at, INT32), align=4), form.lanes)
                    query = builder.zext(builder.bitcast(query, form.elements), wide)
                    at = builder.add(builder.mul(number, INT64(n_vectors * form.width)), INT64(v * form.width))
                    column = builder.load(place_at(builder, panel, at, form.elements), align=form.width)
                    products = builder.mul(query, builder.zext(column, wide))
                    return [builder.add(accs[0], groups_summed(builder, products, 4))]

                (acc,) = emit_loop(builder, n_groups, [ir.Constant(form.accumulators, None)], product)
                at = builder.mul(builder.add(builder.mul(i, INT64(n_vectors)), INT64(v)), INT64(form.width))
                builder.store(acc, place_at(builder, out, at, acc.type), align=form.width)
            return []

        emit_loop(builder, INT64(height), [], pair)
    return [
        builder.load(place_at(builder, out, INT64(number * form.width), form.accumulators), align=form.width)
        for number in range(height * n_vectors)
    ]


@intrinsic(prefer_literal=True)
def set_up(typing_context: Any, vectors: Any) -> Any:
    """Prepare this thread for `tile`, where that takes anything; `tear_down` takes it back.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    """
    return _of_matrix_unit(vectors, configure_matrix_unit)


@intrinsic(prefer_literal=True)
def tear_down(typing_context: Any, vectors: Any) -> Any:
    """Release what `set_up` took: a thread with tiles in use is slower to switch from."""
    return _of_matrix_unit(vectors, release_matrix_unit)


def _of_matrix_unit(vectors: Any, emit: Callable[[Builder], Any]) -> Any:
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        if form.operation.is_matrix and form.instruction:
            emit(builder)
        return context.get_dummy_value()

    return types.void(vectors), generate


def matrix_instruction(builder: Builder, name: str, *args: Any) -> None:
    """Emit an instruction of the matrix unit; numbers of tiles are bytes, and constants: they are part of it."""
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def release_matrix_unit(builder: Builder) -> None:
    """Emit the release of all tiles."""
    matrix_instruction(builder, "llvm.x86.tilerelease")


def configure_matrix_unit(builder: Builder) -> None:
    """Emit the configuration of eight tiles of 16 rows of 64 bytes (Intel SDM, LDTILECFG: palette 1)."""
    palette = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [MATRIX_ROWS] * 8 + [0] * 8
    kind = ir.ArrayType(BYTE, 64)
    place = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, palette), place)
    matrix_instruction(builder, "llvm.x86.ldtilecfg", builder.bitcast(place, BYTE.as_pointer()))


@intrinsic(prefer_literal=True)
def tile(
    typing_context: Any, vectors: Any, key: Any, queries: Any, first: Any, panel: Any, n_groups: Any, columns: Any,
    shifts: Any, limits: Any, always: Any, out: Any, hits: Any,
) -> Any:  # fmt: skip
    """Compute the accumulators of a tile of queries and a panel of the corpus, and look for small ones.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    key : str
        One of `KEYS`, a constant: what is made of an accumulator before it is compared.
    queries : array
        Panels of as many queries as `Vectors.tile_shape` has.
    first : int
        The first query of the tile, a multiple of that.
    panel : array
        The panel of the corpus.
    n_groups : int
        Groups of features, at least one.
    columns : array of `column_dtype`
        A number for each row of the panel, which the key looks at.
    shifts : array
        What is added to the accumulators of each row of the panel, for `Operation.centred`.
    limits : array of `column_dtype`
        For each query. Only smaller keys are of interest.
    always : int
        1 to store whatever the keys are.
    out : array
        Where all accumulators are stored, shape (queries, rows of the panel), if any key is below its limit.
    hits : array of int64
        Where then a word of bits is stored for each query: that of row r is set if its key is below the limit.

    Returns
    -------
    bool
        Whether they were stored.
    """
    if not all(isinstance(kind, types.Literal) for kind in (vectors, key)):
        return None
    form, key_of = vectors_named(vectors.literal_value), KEYS[key.literal_value]
    operation = form.operation
    n_queries, n_vectors = form.tile_shape
    pairs = [(i, v) for i in range(n_queries) for v in range(n_vectors)]
    unit_bytes = form.width // form.lanes
    key_bytes = np.dtype(column_dtype(key.literal_value, operation.accumulator)).itemsize
    key_type = TYPES[column_dtype(key.literal_value, operation.accumulator)]

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        queries, panel, columns, shifts, limits, out, hits = (
            array_data(context, builder, signature.args[i], args[i]) for i in (2, 4, 6, 7, 8, 10, 11)
        )
        first, n_groups = args[3], args[5]
        queries = builder.gep(queries, [builder.mul(builder.mul(first, n_groups), INT64(unit_bytes))])

        if operation.is_matrix:
            accs = matrix_sums(builder, form, queries, panel, n_groups, out)
        else:
            accs = tile_sums(builder, form, queries, panel, n_groups)
        if operation.centred:
            vector = form.accumulators
            added = [
                builder.load(place_at(builder, shifts, INT64(v * form.width), vector), align=form.width)
                for v in range(n_vectors)
            ]
            accs = [builder.add(acc, added[v]) for acc, (_, v) in zip(accs, pairs, strict=True)]

        vector, below = ir.VectorType(key_type, form.lanes), []
        numbers = [
            builder.load(place_at(builder, columns, INT64(v * key_bytes * form.lanes), vector), align=key_bytes)
            for v in range(n_vectors)
        ]
        for i in range(n_queries):
            at = builder.mul(builder.add(first, INT64(i)), INT64(key_bytes))
            limit = splat(builder, builder.load(place_at(builder, limits, at, key_type), align=key_bytes), form.lanes)
            keys = [key_of(builder, accs[i * n_vectors + v], numbers[v]) for v in range(n_vectors)]
            below.append([form.less(builder, key, limit) for key in keys])
        bit = ir.IntType(1)
        some = functools.reduce(builder.or_, (part for parts in below for part in parts))
        some = call(builder, f"llvm.vector.reduce.or.v{form.lanes}i1", bit, some)
        some = builder.or_(some, builder.icmp_signed("!=", args[9], INT64(0)))
        with builder.if_then(some, likely=False):
            for number, acc in enumerate([] if operation.is_matrix else accs):
                builder.store(acc, place_at(builder, out, INT64(number * form.width), acc.type), align=form.width)
            for i, parts in enumerate(below):
                words = [builder.zext(builder.bitcast(part, ir.IntType(form.lanes)), INT64) for part in parts]
                words = [builder.shl(word, INT64(v * form.lanes)) for v, word in enumerate(words)]
                word = functools.reduce(builder.or_, words)
                builder.store(word, place_at(builder, hits, INT64(8 * i), INT64))
        return some

    arguments = (
        vectors,
        key,
        queries,
        types.int64,
        panel,
        types.int64,
        columns,
        shifts,
        limits,
        types.int64,
        out,
        hits,
    )
    return types.boolean(*arguments), generate


@intrinsic(prefer_literal=True)
def rows_beyond(typing_context: Any, vectors: Any, value: Any, panel: Any, first: Any, most: Any) -> Any:
    """Return which rows of a panel differ from a query in one feature by `most` or more, in float64.

    A difference counts as `most` only if float64 holds it without rounding.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors` of a panel of floats, a constant.
    value : float
        The query's.
    panel : array
        The panel of the corpus.
    first : int
        The feature's first element in `panel`.
    most : float64

    Returns
    -------
    int64
        A word of bits, that of row r set if it is.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        panel = array_data(context, builder, signature.args[2], args[2])
        size = np.dtype(form.operation.element).itemsize
        wide = ir.VectorType(ir.DoubleType(), form.lanes)

        def widened(values: Any) -> Any:
            return values if values.type == wide else builder.fpext(values, wide)

        query, most = widened(splat(builder, args[1], form.lanes)), splat(builder, args[4], form.lanes)
        zero, word = ir.Constant(wide, None), INT64(0)
        for v in range(form.tile_shape[1]):
            at = builder.mul(builder.add(args[3], INT64(v * form.lanes)), INT64(size))
            taken = builder.fneg(widened(builder.load(place_at(builder, panel, at, form.elements), align=size)))
            # The error of the sum of two numbers, as in `expansions.two_sum`.
            total = builder.fadd(query, taken)
            part = builder.fsub(total, query)
            rest = builder.fadd(builder.fsub(query, builder.fsub(total, part)), builder.fsub(taken, part))
            magnitude = absolute_of_floats(builder, total)
            equal = builder.fcmp_ordered("==", magnitude, most)
            equal = builder.and_(equal, builder.fcmp_ordered("==", rest, zero))
            beyond = builder.or_(builder.fcmp_ordered(">", magnitude, most), equal)
            bits = builder.zext(builder.bitcast(beyond, ir.IntType(form.lanes)), INT64)
            word = builder.or_(word, builder.shl(bits, INT64(v * form.lanes)))
        return word

    return types.int64(vectors, value, panel, types.int64, types.float64), generate


@intrinsic(prefer_literal=True)
def row_values(
    typing_context: Any, vectors: Any, count: Any, one: Any, i: Any, others: Any, j: Any, n_features: Any, out: Any
) -> Any:
    """Compute the accumulated values of one row and some neighbouring others, as all lie.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    count : int
        How many others, a constant.
    one, others : arrays
        C-contiguous rows.
    i, j : int
        Which row of `one`, and the first of `others`.
    n_features : int
        At least `Vectors.features`.
    out : array
        Filled with `count` values of the accumulators' dtype.
    """
    if not all(isinstance(kind, types.Literal) for kind in (vectors, count)):
        return None
    form, n_others = vectors_named(vectors.literal_value), count.literal_value

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        one, others, out = (array_data(context, builder, signature.args[k], args[k]) for k in (2, 4, 7))
        n, whole = args[6], INT64(form.features)
        rows = [(one, builder.mul(args[3], n))]
        rows += [(others, builder.mul(builder.add(args[5], INT64(k)), n)) for k in range(n_others)]

        def loaded(at: Any) -> list[Any]:
            return [_load(builder, form, base, builder.add(start, at), form.features) for base, start in rows]

        def stepped(accs: list[Any], values: list[Any]) -> list[Any]:
            return [form.step(builder, acc, values[0], value) for acc, value in zip(accs, values[1:], strict=True)]

        def step(number: Any, accs: list[Any]) -> list[Any]:
            return stepped(accs, loaded(builder.mul(number, whole)))

        accs = emit_loop(builder, builder.sdiv(n, whole), [ir.Constant(form.accumulators, None)] * n_others, step)
        rest, before = builder.srem(n, whole), builder.block
        with builder.if_then(builder.icmp_signed("!=", rest, INT64(0))):
            # The last vector of a row, of which those elements count that no vector before it held: nothing past the
            # row is read, which may be the end of memory.
            lane = ir.VectorType(INT32, form.features)
            past = splat(builder, builder.trunc(builder.sub(whole, rest), INT32), form.features)
            counts = builder.icmp_signed(">=", ir.Constant(lane, [INT32(e) for e in range(form.features)]), past)
            nothing = ir.Constant(form.elements, None)
            values = [builder.select(counts, value, nothing) for value in loaded(builder.sub(n, whole))]
            added, inside = stepped(accs, values), builder.block
        totals = [builder.phi(acc.type) for acc in accs]
        for number, (total, acc, later) in enumerate(zip(totals, accs, added, strict=True)):
            total.add_incoming(acc, before)
            total.add_incoming(later, inside)
            place = INT64(number * form.width // form.lanes)
            builder.store(_across(builder, form, total), place_at(builder, out, place, acc.type.element))
        return context.get_dummy_value()

    return types.void(vectors, count, one, types.int64, others, types.int64, types.int64, out), generate


@intrinsic(prefer_literal=True)
def shift_in(
    typing_context: Any, is_first: Any, values: Any, indices: Any, start: Any, place: Any, seen: Any, value: Any,
    index: Any,
) -> Any:  # fmt: skip
    """Put a pair into its place in `LIST_LANES` pairs of an ascending list, and move those after it up by one.

    Of several vectors of a list the last comes first; the pair comes after those with an equal value. No comparison
    decides where to go on, which a processor would guess wrong half of the time.

    Parameters
    ----------
    is_first : int
        1 for the first pairs of a list, 0 for those after others, a constant.
    values, indices : C-contiguous arrays
        Lists, one after the other.
    start, place : int
        Where the list begins, and which of its pairs is the first of these.
    seen : int
        How many pairs the list holds: those from there on are overwritten.
    value, index : scalar, int
        The pair.

    Returns
    -------
    bool
        Whether the pair may belong before these.
    """
    if not isinstance(is_first, types.Literal):
        return None
    begins = bool(is_first.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        arrays = [array_data(context, builder, signature.args[i], args[i]) for i in (1, 2)]
        at = builder.add(args[3], args[4])
        pair, old, before = (args[6], args[7]), [], []
        for array, one in zip(arrays, pair, strict=True):
            kind = ir.VectorType(one.type, LIST_LANES)
            size = one.type.get_abi_size(context.target_data)
            address = place_at(builder, array, builder.mul(at, INT64(size)), kind)
            old.append((builder.load(address, align=size), address, size))
            if begins:  # there is nothing before
                lanes = ir.Constant(ir.VectorType(INT32, LIST_LANES), [INT32(max(0, i - 1)) for i in range(LIST_LANES)])
                before.append(builder.shuffle_vector(old[-1][0], ir.Constant(kind, ir.Undefined), lanes))
            else:
                address = place_at(builder, array, builder.mul(builder.sub(at, INT64(1)), INT64(size)), kind)
                before.append(builder.load(address, align=size))
        new = [splat(builder, one, LIST_LANES) for one in pair]
        compare = builder.fcmp_ordered if is_float(new[0].type) else builder.icmp_signed
        places = ir.VectorType(INT64, LIST_LANES)
        left = splat(builder, builder.sub(args[5], args[4]), LIST_LANES)

        def stays(found: Any, shift: int) -> Any:
            """Emit which pairs come before the new one; beyond those that the list holds, none does."""
            held = ir.Constant(places, [INT64(lane - shift) for lane in range(LIST_LANES)])
            return builder.and_(builder.not_(compare("<", new[0], found)), builder.icmp_signed("<", held, left))

        keeps, follows = stays(old[0][0], 0), stays(before[0], 1)
        if begins:
            first = ir.Constant(follows.type, [ir.IntType(1)(lane == 0) for lane in range(LIST_LANES)])
            follows = builder.or_(follows, first)
        for (kept, address, size), moved, one in zip(old, before, new, strict=True):
            builder.store(builder.select(keeps, kept, builder.select(follows, one, moved)), address, align=size)
        return builder.not_(builder.extract_element(keeps, INT32(0)))

    number = types.int64
    arguments = (is_first, values, indices, number, number, number, values.dtype, number)
    return types.boolean(*arguments), generate


@intrinsic(prefer_literal=False)
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Return the number of the lowest bit that is set in a word, which is not 0."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


def _across(builder: Builder, form: Vectors, acc: Any) -> Any:
    """Emit the combination of a vector's lanes, halves first."""
    while acc.type.count > 1:
        half = acc.type.count // 2
        index, none = ir.VectorType(INT32, half), ir.Constant(acc.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(acc, none, ir.Constant(index, [INT32(start + lane) for lane in range(half)]))
            for start in (0, half)
        )
        acc = form.combine(builder, low, high)
    return builder.extract_element(acc, INT32(0))
