"""Vector instructions of the CPU: which there are, and what the steps of inner loops do with them.

An `Operation` says what one step does with a vector of queries' and a vector of corpus features; `Vectors` is an
operation at the width of a `Level`, with an instruction of its own where the CPU has one. The loops around the steps
are in `knnbench.kernels.cpu_loops`.

To add an operation: a function that emits its step, and an entry in `OPERATIONS`. Its form without an instruction is
what every CPU does, and what the tests hold the instruction against.
"""

import ctypes
import functools
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils as untyped_cgutils

from knnbench.errors import InvalidInputError, UnsupportedError
from knnbench.settings import LEVEL_VARIABLE, setting

__all__ = [
    "BYTE",
    "CENTRE",
    "INT32",
    "INT64",
    "LEVELS",
    "LEVEL_VARIABLE",
    "MATRIX_ROWS",
    "NARROW",
    "OPERATIONS",
    "TYPES",
    "Builder",
    "Level",
    "Operation",
    "Vectors",
    "call",
    "constant",
    "cpu_features",
    "groups_summed",
    "is_float",
    "multiply_add",
    "simd_level",
    "vectors_named",
    "vectors_of",
]

MATRIX_ROWS = 16
"""Rows of a tile of a matrix unit; each has the bytes of a vector."""

CENTRE = 128
"""What the queries of a `Operation.centred` operation are less than the corpus rows."""

# numba's annotations do not cover its tools for code generation, nor llvmlite's its builder.
cgutils: Any = untyped_cgutils
Builder = Any

BYTE = ir.IntType(8)
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)

TYPES: dict[str, Any] = {
    "uint8": BYTE,
    "int16": ir.IntType(16),
    "int32": INT32,
    "int64": INT64,
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
}


_ON_ARM = platform.machine().lower() in ("aarch64", "arm64")


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return LLVM's names of the features that this CPU has, and its operating system allows."""
    listed = frozenset(name for name, present in binding.get_host_cpu_features().items() if present)
    return listed | dot_product(binding.get_host_cpu_name()) if _ON_ARM else listed


def dot_product(name: str, told: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the feature of Arm's products of bytes, if a CPU of LLVM's name has it.

    LLVM does not list it, and knows it from the name: it compiles the instruction for processors that it knows only,
    and ends the process otherwise. Every processor of macOS on Arm has it; Linux tells.
    """
    if name == "generic":
        return frozenset()
    has_dot = sys.platform == "darwin"
    with suppress(OSError):
        has_dot |= any(
            line.startswith("Features") and "asimddp" in line.split() for line in told.read_text().splitlines()
        )
    return frozenset({"dotprod"}) if has_dot else frozenset()


def always() -> bool:
    """Return True."""
    return True


@dataclass(frozen=True, slots=True)
class Level:
    """A family of CPUs whose vector instructions kernels use.

    Attributes
    ----------
    name : str
    width : int
        Bytes of a vector.
    registers : int
        Vectors that the CPU can hold.
    needs : frozenset of str
        Features of the CPU, by LLVM's names.
    is_allowed : callable
        Whether the operating system lets this process use it.
    """

    name: str
    width: int
    registers: int
    needs: frozenset[str] = frozenset()
    is_allowed: Callable[[], bool] = always

    @property
    def has_matrix(self) -> bool:
        """Whether there is a matrix unit."""
        return "amx-int8" in self.needs

    def lacks(self, features: frozenset[str]) -> frozenset[str]:
        """Return the features that a CPU with these lacks."""
        return self.needs - features


# Linux lets a process use the registers of the matrix unit, which make its context larger, after it asked (arch/x86:
# "Using XSTATE features in user space applications").
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18
SYS_ARCH_PRCTL = 158


@functools.cache
def request_matrix_unit() -> bool:
    """Ask the operating system for the matrix unit; return whether this process, all its threads, may use it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)


_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})

# What tells Zen 4, which takes vectors of 64 bytes in two halves, from CPUs that do not. There, few sums of 32 bytes
# keep two kinds of units busier than many of 64 do (measured: 56 against 44 G/s of sums of the larger).
_HALVING, _WHOLE = frozenset({"avx512f", "sse4a"}), "avxvnni"

# From the best to the one that every CPU has.
LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level("amx", 64, 32, _AVX512 | {"amx-tile", "amx-int8"}, request_matrix_unit),
        Level("avx512", 64, 32, _AVX512),
        Level("avx2", 32, 16, frozenset({"avx2", "fma"})),
        Level("generic", 16, 32 if _ON_ARM else 16),
    )
}


def simd_level() -> Level:
    """Return the best level that this CPU has, or the one that $KNNBENCH_SIMD names.

    Raises
    ------
    InvalidInputError
        If the variable is set to anything else than a level's name.
    UnsupportedError
        If this CPU lacks the level.
    """
    name = setting(LEVEL_VARIABLE)
    if not name:
        return next(level for level in LEVELS.values() if not level.lacks(cpu_features()) and level.is_allowed())
    if name not in LEVELS:
        raise InvalidInputError(
            f"${LEVEL_VARIABLE} is {name!r}; expected one of: {', '.join(LEVELS)}, or unset for the best of this CPU."
        )
    lacking = LEVELS[name].lacks(cpu_features())
    if lacking:
        raise UnsupportedError(
            f"${LEVEL_VARIABLE} is {name!r} and this CPU lacks {', '.join(sorted(lacking))}; leave it unset for the "
            f"best that this CPU has, or choose a lower one of: {', '.join(LEVELS)}."
        )
    if not LEVELS[name].is_allowed():
        raise UnsupportedError(
            f"${LEVEL_VARIABLE} is {name!r}, which the operating system does not let this process use; choose a lower "
            f"one of: {', '.join(LEVELS)}."
        )
    return LEVELS[name]


# Steps: each takes (vectors, builder, accumulators, queries, corpus) and returns the accumulators.


def call(builder: Builder, name: str, result: Any, *args: Any) -> Any:
    """Emit a call of one of LLVM's intrinsics."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def is_float(vector: Any) -> bool:
    """Return whether a vector has floats."""
    return not isinstance(vector.element, ir.IntType)


def _on(vector: Any) -> str:
    """Return what the names of LLVM's intrinsics end with for a vector."""
    return f"v{vector.count}{vector.element.intrinsic_name if is_float(vector) else vector.element}"


def constant(vector: Any, value: float) -> Any:
    """Return a vector of equal lanes."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def absolute_of_floats(builder: Builder, values: Any) -> Any:
    """Emit |v|."""
    return call(builder, f"llvm.fabs.{_on(values.type)}", values.type, values)


def multiplied_by_one(builder: Builder, values: Any, other: Any, sign: float = 1.0) -> Any:
    """Emit other + v, or other - v, as a fused multiply-add: the same number, from another unit of the processor."""
    # Kept from the compiler, which would make an addition of it.
    one = call(builder, f"llvm.arithmetic.fence.{_on(values.type)}", values.type, constant(values.type, sign))
    return call(builder, f"llvm.fma.{_on(values.type)}", values.type, values, one, other)


def larger_of_floats(builder: Builder, a: Any, b: Any) -> Any:
    """Emit the larger, as one instruction of x86: the second where they cannot be compared."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def multiply_add(builder: Builder, a: Any, b: Any, acc: Any) -> Any:
    """Emit a * b + acc: fused where the CPU has that, two instructions elsewhere, never a call of a function."""
    return call(builder, f"llvm.fmuladd.{_on(acc.type)}", acc.type, a, b, acc)


def add_absolute_floats(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add |q - c|."""
    distance = absolute_of_floats(builder, builder.fsub(queries, corpus))
    return multiplied_by_one(builder, distance, acc) if vectors.instruction else builder.fadd(acc, distance)


def add_larger_floats(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the larger of q and c."""
    larger = larger_of_floats(builder, queries, corpus)
    return multiplied_by_one(builder, larger, acc) if vectors.instruction else builder.fadd(acc, larger)


def add_square_floats(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add (q - c)^2."""
    difference = builder.fsub(queries, corpus)
    return multiply_add(builder, difference, difference, acc)


def add_product_floats(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add q * c."""
    return multiply_add(builder, queries, corpus, acc)


def keep_largest_floats(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Keep the larger of what there is and |q - c|."""
    if not vectors.instruction:
        return larger_of_floats(builder, acc, absolute_of_floats(builder, builder.fsub(queries, corpus)))
    difference = multiplied_by_one(builder, corpus, queries, sign=-1.0)
    if vectors.instruction == FUSED:
        return larger_of_floats(builder, acc, absolute_of_floats(builder, difference))
    # VRANGEPS, VRANGEPD: the larger of two absolute values, without its sign.
    mask = ir.IntType(max(8, vectors.lanes))(-1)
    return call(builder, vectors.instruction, acc.type, acc, difference, INT32(0b1011), acc, mask, INT32(4))


def difference_of_bytes(builder: Builder, queries: Any, corpus: Any) -> Any:
    """Emit |q - c| of unsigned bytes, as the larger less the smaller: Arm has one instruction for that."""
    on, vector = _on(queries.type), queries.type
    larger = call(builder, f"llvm.umax.{on}", vector, queries, corpus)
    return builder.sub(larger, call(builder, f"llvm.umin.{on}", vector, queries, corpus))


def keep_largest_bytes(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Keep the larger of what there is and |q - c|, of unsigned bytes."""
    difference = difference_of_bytes(builder, queries, corpus)
    return call(builder, f"llvm.umax.{_on(acc.type)}", acc.type, acc, difference)


def add_absolute_bytes(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of |q - c| over each group of eight unsigned bytes."""
    if vectors.instruction:
        return builder.add(acc, call(builder, vectors.instruction, acc.type, queries, corpus))
    sums = difference_of_bytes(builder, queries, corpus)
    for bits in (8, 16, 32):
        pairs = ir.VectorType(ir.IntType(2 * bits), vectors.width * 4 // bits)
        sums = builder.bitcast(sums, pairs)
        low = builder.and_(sums, constant(pairs, (1 << bits) - 1))
        sums = builder.add(low, builder.lshr(sums, constant(pairs, bits)))
    return builder.add(acc, sums)


def groups_summed(builder: Builder, values: Any, group: int) -> Any:
    """Emit the sums of each `group` neighbouring lanes."""
    count = values.type.count // group
    none, index = ir.Constant(values.type, ir.Undefined), ir.VectorType(INT32, count)
    parts = (
        builder.shuffle_vector(values, none, ir.Constant(index, [INT32(group * lane + part) for lane in range(count)]))
        for part in range(group)
    )
    return functools.reduce(builder.add, parts)


def add_product_pairs(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of q * c over each pair of signed 16-bit integers."""
    if vectors.instruction:
        return builder.add(acc, call(builder, vectors.instruction, acc.type, queries, corpus))
    wide = ir.VectorType(INT32, queries.type.count)
    products = builder.mul(builder.sext(queries, wide), builder.sext(corpus, wide))
    return builder.add(acc, groups_summed(builder, products, 2))


def add_square_pairs(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of (q - c)^2 over each pair of signed 16-bit integers."""
    difference = builder.sub(queries, corpus)
    return add_product_pairs(vectors, builder, acc, difference, difference)


def add_product_quads(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of q * c over each four bytes; those of queries are signed, those of the corpus are not."""
    if vectors.instruction:
        # Its operands are declared as 32-bit integers.
        return call(
            builder, vectors.instruction, acc.type, acc, *(builder.bitcast(v, acc.type) for v in (corpus, queries))
        )
    wide = ir.VectorType(INT32, queries.type.count)
    products = builder.mul(builder.sext(queries, wide), builder.zext(corpus, wide))
    return builder.add(acc, groups_summed(builder, products, 4))


def add_product_quads_of_bytes(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of q * c over each four unsigned bytes."""
    if vectors.instruction:
        return call(builder, vectors.instruction, acc.type, acc, queries, corpus)
    wide = ir.VectorType(INT32, queries.type.count)
    return builder.add(acc, groups_summed(builder, builder.mul(*(builder.zext(v, wide) for v in (queries, corpus))), 4))


def add_absolute_quads(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add the sum of |q - c| over each four unsigned bytes, as products with 1."""
    ones = constant(queries.type, 1)
    return add_product_quads_of_bytes(vectors, builder, acc, difference_of_bytes(builder, queries, corpus), ones)


def add_square_longs(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add (q - c)^2 of 64-bit integers."""
    difference = builder.sub(queries, corpus)
    return builder.add(acc, builder.mul(difference, difference))


def add_product_longs(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Add q * c of 64-bit integers."""
    return builder.add(acc, builder.mul(queries, corpus))


def no_step(vectors: "Vectors", builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
    """Stand where an operation has no steps of vectors."""
    raise NotImplementedError(vectors.name)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a step of an inner loop does.

    Attributes
    ----------
    name : str
    stored : str
        Dtype of the rows as they are given.
    element : str
        Dtype in which `step` takes features.
    group : int
        Neighbouring features that share a lane of the accumulators.
    accumulator : str
        Dtype of the accumulators; `group` elements are as wide.
    step : callable
        ``(vectors, builder, accumulators, queries, corpus) -> accumulators``.
    instructions : mapping of int to tuple
        By the width of vectors: the instruction that `step` uses, by LLVM's name, and the feature of a CPU that has it.
    is_largest : bool
        Whether lanes are combined by the larger of them, otherwise by their sum.
    is_light : bool
        Whether `step` needs no register for values between, or hides them behind few of its instructions.
    is_balanced : bool
        Whether `step` keeps two kinds of units of a processor busy.
    centred : bool
        Whether `CENTRE` is taken away from the queries, so that bytes become signed.
    is_matrix : bool
        Whether the accumulators are not vectors but tiles of a matrix unit, and `step` therefore not used.
    digits : int
        Elements that stand for a feature: 0 for the feature itself, otherwise see `knnbench.kernels.cpu_digits`.
    """

    name: str
    stored: str
    element: str
    group: int
    accumulator: str
    step: Callable[["Vectors", Builder, Any, Any, Any], Any]
    instructions: Mapping[int, tuple[str, str]] = field(compare=False)
    is_largest: bool = False
    is_light: bool = False
    is_balanced: bool = False
    centred: bool = False
    is_matrix: bool = False
    digits: int = 0


def _floats(
    name: str, step: Callable[..., Any], instructions: Mapping[str, Any] = MappingProxyType({}), **options: Any
) -> list[Operation]:
    return [
        Operation(f"{name}-{dtype}", dtype, dtype, 1, dtype, step, instructions.get(dtype, {}), **options)
        for dtype in ("float32", "float64")
    ]


# Where additions and multiply-adds have units of their own, half of a sum of distances is left to each.
FUSED = "llvm.fma"
_FUSED = {dtype: {32: (FUSED, "fma"), 64: (FUSED, "avx512f")} for dtype in ("float32", "float64")}
_RANGE = {
    dtype: {32: (FUSED, "fma"), 64: (f"llvm.x86.avx512.mask.range.{suffix}.512", "avx512dq")}
    for dtype, suffix in (("float32", "ps"), ("float64", "pd"))
}

_SAD = {32: ("llvm.x86.avx2.psad.bw", "avx2"), 64: ("llvm.x86.avx512.psad.bw.512", "avx512bw")}
_MADD = {32: ("llvm.x86.avx2.pmadd.wd", "avx2"), 64: ("llvm.x86.avx512.pmaddw.d.512", "avx512bw")}
_VNNI = {32: ("llvm.x86.avx512.vpdpbusd.256", "avxvnni"), 64: ("llvm.x86.avx512.vpdpbusd.512", "avx512vnni")}
# UDOT, of Arm, which takes bytes that are not signed.
_DOT = {16: ("llvm.aarch64.neon.udot.v4i32.v16i8", "dotprod")}
_AMX = {64: ("llvm.x86.tdpbuud", "amx-int8")}
_AMX_SIGNED = {64: ("llvm.x86.tdpbssd", "amx-int8")}
_AMX_MIXED = {64: ("llvm.x86.tdpbsud", "amx-int8")}

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        *_floats("absolute", add_absolute_floats, _FUSED),
        *_floats("square", add_square_floats),
        *_floats("larger", add_larger_floats, _FUSED, is_balanced=True),
        *_floats("product", add_product_floats, is_light=True),
        *_floats("largest", keep_largest_floats, _RANGE, is_largest=True),
        Operation("absolute-uint8", "uint8", "uint8", 8, "int64", add_absolute_bytes, _SAD, is_light=True),
        Operation("largest-uint8", "uint8", "uint8", 1, "uint8", keep_largest_bytes, {}, is_largest=True),
        Operation("square-int16", "uint8", "int16", 2, "int32", add_square_pairs, _MADD),
        Operation("product-int16", "uint8", "int16", 2, "int32", add_product_pairs, _MADD, is_light=True),
        Operation("product-uint8", "uint8", "uint8", 4, "int32", add_product_quads, _VNNI, is_light=True, centred=True),
        Operation("product-uint8-dot", "uint8", "uint8", 4, "int32", add_product_quads_of_bytes, _DOT, is_light=True),
        Operation("absolute-uint8-dot", "uint8", "uint8", 4, "int32", add_absolute_quads, _DOT, is_light=True),
        Operation("product-uint8-matrix", "uint8", "uint8", 4, "int32", no_step, _AMX, is_matrix=True),
        *(
            Operation(f"digits-{dtype}", dtype, "uint8", 4, "float32", no_step, _AMX_SIGNED, is_matrix=True, digits=2)
            for dtype in ("float32", "float64")
        ),
        # Bytes of queries are signed.
        Operation("product-digits-matrix", "uint8", "uint8", 4, "int32", no_step, _AMX_MIXED, is_matrix=True),
        # For so many features that 32 bits cannot hold their sum.
        Operation("square-int64", "uint8", "int64", 1, "int64", add_square_longs, {}),
        Operation("product-int64", "uint8", "int64", 1, "int64", add_product_longs, {}),
    )
}


# What bytes are compared by, the fastest first, where a CPU has an instruction for it that sums in 32 bits or more.
NARROW = {
    "product": ("product-uint8-matrix", "product-uint8", "product-uint8-dot"),
    "absolute": ("absolute-uint8", "absolute-uint8-dot"),
}


@dataclass(frozen=True, slots=True)
class Vectors:
    """An operation on vectors of one width.

    Attributes
    ----------
    operation : Operation
    width : int
        Bytes.
    registers : int
    instruction : str
        The instruction that the step uses, by LLVM's name; empty for the form that every CPU can do.
    """

    operation: Operation
    width: int
    registers: int
    instruction: str = ""

    @property
    def name(self) -> str:
        """What the intrinsics know these vectors by; `vectors_named` takes it back."""
        return f"{self.operation.name}:{self.width}:{self.registers}:{self.instruction}"

    @property
    def lanes(self) -> int:
        """Lanes of a vector of accumulators."""
        return self.width // np.dtype(self.operation.accumulator).itemsize

    @property
    def features(self) -> int:
        """Features in a vector."""
        return self.lanes * self.operation.group

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Queries and vectors of the corpus whose accumulators are held in registers.

        Measured on Zen 3: a shape that leaves no register for the values between costs a third.
        """
        if self.operation.is_matrix:
            # Of sums of two kinds there is a tile for each.
            return 2 * MATRIX_ROWS, 1 if self.operation.digits else 2
        # AVX-512 takes the larger of absolute values at once (`keep_largest_floats`).
        light = self.operation.is_light or (self.width == 64 and self.operation.is_largest and is_float(self.elements))
        queries, vectors = ((8, 3) if light else (8, 2)) if self.registers == 32 else ((6, 2) if light else (4, 2))
        # A bit for each row of a panel says whether it is of interest.
        return queries, min(vectors, 64 // self.lanes)

    @property
    def panel_rows(self) -> int:
        """Corpus rows of a panel."""
        return self.tile_shape[1] * self.lanes

    @property
    def square(self) -> int:
        """Rows, and groups of features, that are moved into a panel together."""
        return min(self.lanes, 16)

    @property
    def depth(self) -> int:
        """Features that are taken together, and that a query has together in its panel; a row is filled with zeros."""
        return self.width if self.operation.is_matrix else self.operation.group

    @property
    def row_elements(self) -> int:
        """Elements of `depth` features of a row in a panel."""
        return self.depth * max(1, self.operation.digits)

    @property
    def accumulators(self) -> Any:
        """Type of a vector of accumulators."""
        return ir.VectorType(TYPES[self.operation.accumulator], self.lanes)

    @property
    def elements(self) -> Any:
        """Type of a vector of features."""
        return ir.VectorType(TYPES[self.operation.element], self.features)

    def step(self, builder: Builder, acc: Any, queries: Any, corpus: Any) -> Any:
        """Emit a step."""
        return self.operation.step(self, builder, acc, queries, corpus)

    def combine(self, builder: Builder, a: Any, b: Any) -> Any:
        """Emit the sum, or the larger, of the lanes of two vectors of accumulators."""
        if not self.operation.is_largest:
            return builder.fadd(a, b) if is_float(a.type) else builder.add(a, b)
        if is_float(a.type):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.icmp_unsigned(">", a, b), a, b)

    def less(self, builder: Builder, a: Any, b: Any) -> Any:
        """Emit a comparison of vectors of accumulators, or of what is made of them."""
        if is_float(a.type):
            return builder.fcmp_ordered("<", a, b)
        unsigned = self.operation.accumulator == "uint8"
        return builder.icmp_unsigned("<", a, b) if unsigned else builder.icmp_signed("<", a, b)


def vectors_of(name: str, level: Level, features: frozenset[str] | None = None) -> Vectors:
    """Return an operation at a level, with its instruction if a CPU with these features, by default this one, has it.

    Parameters
    ----------
    name : str
        Of the `Operation`.
    level : Level
    features : frozenset of str, optional
    """
    present = cpu_features() if features is None else features
    if level.width == 64 and OPERATIONS[name].is_balanced and present >= _HALVING and _WHOLE not in present:
        level = LEVELS["avx2"]
    instruction, needs = OPERATIONS[name].instructions.get(level.width, ("", ""))
    if needs not in present:
        instruction = ""
    return Vectors(OPERATIONS[name], level.width, level.registers, instruction)


@functools.cache
def vectors_named(name: str) -> Vectors:
    """Return what has this `Vectors.name`."""
    operation, width, registers, instruction = name.split(":")
    return Vectors(OPERATIONS[operation], int(width), int(registers), instruction)
