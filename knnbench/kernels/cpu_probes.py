"""Loops of one vector instruction each, which show how fast this CPU can execute it.

They are written in LLVM's intermediate representation over values of a vector type, because a compiler may turn a
loop in Python into other instructions than those whose rate is asked for. It can neither remove these loops nor
shorten them: each accumulator depends on its last value by an operation on floats, which may not be reordered.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic as untyped_intrinsic

from knnbench.dtypes import Array
from knnbench.errors import UnsupportedError
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_loops import configure_matrix_unit, emit_loop, matrix_instruction, release_matrix_unit
from knnbench.kernels.cpu_simd import MATRIX_ROWS, Vectors, call, cpu_features, simd_level, vectors_named, vectors_of

__all__ = [
    "ALIGNMENT",
    "CHUNK_BYTES",
    "accumulators",
    "add_chains",
    "add_step",
    "build_chains",
    "chain_operations",
    "copy_words",
    "fma_chains",
    "fma_step",
    "instruction_chains",
    "instruction_operations",
    "instruction_vectors",
    "read_words",
    "require_fma",
    "starts",
    "vector_bytes",
]

ALIGNMENT = 64
"""Bytes: of a cache line, and of the widest vector."""

STREAM_VECTORS = 8
CHUNK_BYTES = STREAM_VECTORS * ALIGNMENT
"""What `read_words` and `copy_words` treat as a whole; what is left of an array at its end, they leave out."""

# numba's annotations cover neither its tools for code generation nor what its decorator makes of a function.
cgutils: Any = untyped_cgutils
intrinsic: Callable[..., Callable[[Any], Any]] = untyped_intrinsic

Step = Callable[[ir.IRBuilder, ir.Value, list[ir.Value]], ir.Value]


def accumulators(arch: str = platform.machine()) -> int:
    """Return the number of independent chains: enough to hide the latency, few enough for the registers.

    Latency times instructions a cycle is at most 4 x 2 on x86-64, which has 16 registers before AVX-512, and 4 x 4 on
    Arm cores with four pipes, which have 32 (A. Fog, Instruction tables; Arm, Neoverse V2 Software Optimization Guide).
    """
    return 24 if arch.lower() in ("aarch64", "arm64") else 12


def vector_bytes() -> tuple[int, ...]:
    """Return the widths of the vectors to try, the widest first.

    Where there are 64 bytes, 32 are tried too: some CPUs execute half as many of the wide ones, at a lower clock.
    """
    if "avx512f" in cpu_features():
        return 64, 32
    return (32,) if "avx" in cpu_features() else (16,)


def require_fma() -> None:
    """Raise `UnsupportedError` if the CPU has no fused multiply-add: LLVM would call a function instead."""
    if platform.machine().lower() in ("x86_64", "amd64") and "fma" not in cpu_features():
        raise UnsupportedError("this CPU has no fused multiply-add")


def starts(dtype: type[np.floating[Any]], width: int) -> tuple[Any, ...]:
    """Return the first values of the lanes of a vector; their number and type decide which loop is compiled."""
    return tuple(dtype(lane) for lane in range(width // np.dtype(dtype).itemsize))


def chain_operations(lanes: int) -> int:
    """Return how many elements one iteration of `add_chains` or `fma_chains` treats."""
    return accumulators() * lanes


def build_chains(
    builder: ir.IRBuilder, step: Step, count: int, n: ir.Value, lanes: list[ir.Value], given: list[ir.Value]
) -> ir.Value:
    """Emit a loop of `n` iterations, at least one, in each of which `step` is applied to `count` accumulators.

    Parameters
    ----------
    builder : ir.IRBuilder
        Left behind the loop.
    step : callable
        ``(builder, accumulator, given)`` emits the instruction and returns the next value.
    count : int
        Accumulators.
    n : ir.Value
        A 64-bit integer.
    lanes : list of ir.Value
        The first values of a vector's lanes. Each accumulator starts from others: equal ones could be merged.
    given : list of ir.Value
        Numbers that do not change in the loop, each handed to `step` as a vector of equal lanes.

    Returns
    -------
    ir.Value
        The sum of all, so that none is left out.
    """
    scalar = lanes[0].type
    vector = ir.VectorType(scalar, len(lanes))
    start = _vector(builder, vector, lanes)
    constants = [_vector(builder, vector, [value] * len(lanes)) for value in given]
    firsts = [builder.fadd(start, ir.Constant(vector, [float(c)] * len(lanes))) for c in range(count)]
    before = builder.block
    loop, end = builder.append_basic_block("chains"), builder.append_basic_block("chains.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    left = builder.phi(n.type)
    values = [builder.phi(vector) for _ in range(count)]
    nexts = [step(builder, value, constants) for value in values]
    one_less = builder.sub(left, n.type(1))
    left.add_incoming(n, before)
    left.add_incoming(one_less, loop)
    for value, first, following in zip(values, firsts, nexts, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("!=", one_less, n.type(0)), loop, end)
    builder.position_at_end(end)
    total = functools.reduce(builder.fadd, nexts)
    parts = [builder.extract_element(total, ir.IntType(32)(lane)) for lane in range(len(lanes))]
    return functools.reduce(builder.fadd, parts)


def _vector(builder: ir.IRBuilder, vector: ir.VectorType, values: list[ir.Value]) -> ir.Value:
    result = ir.Constant(vector, ir.Undefined)
    for lane, value in enumerate(values):
        result = builder.insert_element(result, value, ir.IntType(32)(lane))
    return result


def add_step(builder: ir.IRBuilder, value: ir.Value, given: list[ir.Value]) -> ir.Value:
    """Emit an addition; the value stops growing where its distance to the next number is twice what is added."""
    return builder.fadd(value, given[0])


def fma_step(builder: ir.IRBuilder, value: ir.Value, given: list[ir.Value]) -> ir.Value:
    """Emit a fused multiply-add."""
    # llvmlite's own knows scalars only.
    vector = value.type
    name = f"llvm.fma.v{vector.count}{vector.element.intrinsic_name}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
    return builder.call(function, [value, *given])


# numba keeps in its cache what refers to an intrinsic as a global, and not what closes over one.
@intrinsic(prefer_literal=False)
def _add_chains(typing_context: Any, n: Any, lanes: Any, term: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = cgutils.unpack_tuple(builder, args[1])
        return build_chains(builder, add_step, accumulators(), args[0], lanes, list(args[2:]))

    return lanes.dtype(types.int64, lanes, lanes.dtype), generate


@intrinsic(prefer_literal=False)
def _fma_chains(typing_context: Any, n: Any, lanes: Any, factor: Any, term: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = cgutils.unpack_tuple(builder, args[1])
        return build_chains(builder, fma_step, accumulators(), args[0], lanes, list(args[2:]))

    return lanes.dtype(types.int64, lanes, lanes.dtype, lanes.dtype), generate


@compile_cached(nogil=True)
def add_chains(n: Any, lanes: Any, term: Any) -> Any:
    """Add `term` n times to each lane of each accumulator; n is at least 1."""
    return _add_chains(n, lanes, term)


@compile_cached(nogil=True)
def fma_chains(n: Any, lanes: Any, factor: Any, term: Any) -> Any:
    """Replace each lane x of each accumulator n times by factor * x + term; n is at least 1."""
    return _fma_chains(n, lanes, factor, term)


def instruction_vectors(*operations: str) -> Vectors:
    """Return the first of some operations that has an instruction of its own at the level of this CPU.

    Raises
    ------
    UnsupportedError
        If none has.
    """
    level = simd_level()
    for vectors in (vectors_of(operation, level) for operation in operations):
        if vectors.instruction and (level.has_matrix or not vectors.operation.is_matrix):
            return vectors
    raise UnsupportedError(f"this CPU has no instruction of its own for {operations[0]}")


def instruction_operations(vectors: Vectors) -> int:
    """Return how many features one iteration of `instruction_chains` treats."""
    if vectors.operation.is_matrix:
        return 4 * MATRIX_ROWS * MATRIX_ROWS * vectors.width
    return accumulators() * vectors.features


def build_instruction(
    builder: ir.IRBuilder, vectors: Vectors, acc: ir.Value, queries: ir.Value, corpus: ir.Value
) -> ir.Value:
    """Emit the step of an operation; where that adds to what the instruction gives, the instruction alone.

    LLVM knows nothing of what these instructions compute, so that it can neither leave one out nor move it.
    """
    if vectors.operation.group == 4:  # accumulates itself
        return vectors.step(builder, acc, queries, corpus)
    name, elements = vectors.instruction, vectors.elements
    return call(builder, name, acc.type, builder.bitcast(acc, elements), corpus)


@intrinsic(prefer_literal=True)
def _instruction_chains(typing_context: Any, vectors: Any, n: Any, value: Any) -> Any:
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)

    def multiply(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        """Multiply tiles of zeros: four products of two tiles by two, as the kernel does."""
        emit, tile = functools.partial(matrix_instruction, builder), ir.IntType(8)
        configure_matrix_unit(builder)
        for number in range(8):
            emit("llvm.x86.tilezero", tile(number))

        def step(number: Any, _: list[Any]) -> list[Any]:
            for product in range(4):
                emit(form.instruction, tile(product), tile(4 + product // 2), tile(6 + product % 2))
            return []

        emit_loop(builder, args[1], [], step)
        release_matrix_unit(builder)
        return args[2]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.trunc(args[2], ir.IntType(8))
        bytes_ = _vector(builder, ir.VectorType(byte.type, form.width), [byte] * form.width)
        given = builder.bitcast(bytes_, form.elements)
        starts = [builder.bitcast(bytes_, form.accumulators)] * accumulators()
        starts = [builder.add(start, ir.Constant(start.type, [c] * form.lanes)) for c, start in enumerate(starts)]

        def step(number: Any, accs: list[Any]) -> list[Any]:
            return [build_instruction(builder, form, acc, given, given) for acc in accs]

        total = functools.reduce(builder.add, emit_loop(builder, args[1], starts, step))
        parts = [builder.extract_element(total, ir.IntType(32)(lane)) for lane in range(form.lanes)]
        return builder.sext(functools.reduce(builder.add, parts), ir.IntType(64))

    return types.int64(vectors, types.int64, types.int64), multiply if form.operation.is_matrix else generate


@functools.cache
def instruction_chains(vectors: Vectors) -> Callable[[int, int], int]:
    """Return the compiled loop ``(n, value)`` of n iterations, at least one, of an operation's instruction.

    Each of some independent accumulators goes through the instruction once an iteration, together with a vector of
    which every byte is `value`.
    """
    name = vectors.name

    @compile_cached(nogil=True)
    def chains(n: Any, value: Any) -> Any:
        return _instruction_chains(name, n, value)

    return chains


def _build_stream(
    builder: ir.IRBuilder, width: int, n_bytes: ir.Value, source: ir.Value, target: ir.Value | None
) -> ir.Value:
    """Emit a loop that reads a chunk an iteration, and writes it if there is a target; return a sum of what is read."""
    integer = n_bytes.type
    vector = ir.VectorType(ir.IntType(64), width // 8)
    count = CHUNK_BYTES // width
    before = builder.block
    loop, end = builder.append_basic_block("stream"), builder.append_basic_block("stream.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    offset = builder.phi(integer)
    sums = [builder.phi(vector) for _ in range(min(count, STREAM_VECTORS))]
    nexts = list(sums)
    for part in range(count):
        place = builder.add(offset, integer(part * width))
        value = builder.load(_at(builder, source, place, vector), align=width)
        if target is None:
            nexts[part % len(sums)] = builder.add(nexts[part % len(sums)], value)
        else:
            store = builder.store(value, _at(builder, target, place, vector), align=width)
            # Past the caches: otherwise each line written would first be read.
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
    following = builder.add(offset, integer(CHUNK_BYTES))
    offset.add_incoming(integer(0), before)
    offset.add_incoming(following, loop)
    for total, later in zip(sums, nexts, strict=True):
        total.add_incoming(ir.Constant(vector, [0] * (width // 8)), before)
        total.add_incoming(later, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, n_bytes), loop, end)
    builder.position_at_end(end)
    total = functools.reduce(builder.add, nexts)
    parts = [builder.extract_element(total, ir.IntType(32)(lane)) for lane in range(width // 8)]
    return functools.reduce(builder.add, parts)


def _at(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, vector: ir.VectorType) -> ir.Value:
    byte = builder.gep(builder.bitcast(base, ir.IntType(8).as_pointer()), [offset])
    return builder.bitcast(byte, vector.as_pointer())


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return cgutils.create_struct_proxy(kind)(context, builder, array).data


@intrinsic(prefer_literal=False)
def _read_words(typing_context: Any, n_bytes: Any, source: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _data(context, builder, signature.args[1], args[1])
        return _build_stream(builder, vector_bytes()[0], args[0], data, None)

    return types.int64(types.int64, source), generate


@intrinsic(prefer_literal=False)
def _copy_words(typing_context: Any, n_bytes: Any, source: Any, target: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = (_data(context, builder, kind, array) for kind, array in zip(signature.args[1:], args[1:], strict=True))
        return _build_stream(builder, vector_bytes()[0], args[0], *data)

    return types.int64(types.int64, source, target), generate


@compile_cached(nogil=True)
def _read(n: Any, source: Any) -> Any:
    total = 0
    for _ in range(n):
        total += _read_words(source.nbytes // CHUNK_BYTES * CHUNK_BYTES, source)
    return total


@compile_cached(nogil=True)
def _copy(n: Any, source: Any, target: Any) -> Any:
    total = 0
    for _ in range(n):
        total += _copy_words(source.nbytes // CHUNK_BYTES * CHUNK_BYTES, source, target)
    return total


def read_words(n: int, source: Array) -> int:
    """Read an array of int64 n times; return the sum of all that was read, modulo 2**64.

    It starts at a multiple of `ALIGNMENT` and is at least `CHUNK_BYTES` long.
    """
    _check_aligned(source)
    return int(_read(n, source))


def copy_words(n: int, source: Array, target: Array) -> None:
    """Copy an array of int64 n times to another one as long, past the caches.

    Both start at a multiple of `ALIGNMENT` and are at least `CHUNK_BYTES` long.
    """
    _check_aligned(source)
    _check_aligned(target)
    assert len(target) >= len(source)
    _copy(n, source, target)


def _check_aligned(array: Array) -> None:
    # The machine code trusts this, and would end the process or write elsewhere.
    assert array.dtype == np.int64
    assert array.flags.c_contiguous
    assert array.nbytes >= CHUNK_BYTES
    assert array.ctypes.data % ALIGNMENT == 0
