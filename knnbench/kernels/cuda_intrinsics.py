"""What CUDA kernels need and Python cannot say: loops that are unrolled, wide loads, and instructions on four bytes.

Values that a thread keeps in registers are tuples here. An array would do only if the compiler unrolled every loop
over it, which it does not with loops as long as these; what is left of it then lies in memory. `gathered`, `outer` and
`folded` unroll while they emit code: each calls a function, `cuda_launch.inlined` or an intrinsic, for every element,
with its number as a constant.

The instructions are written as PTX, because the compiler does not find them: of CUDA's own ``__vsadu4(a, b) + c`` it
makes two instructions where ``vabsdiff4.add`` is one.

numba's simulator runs no intrinsic; `tests/simulated_cuda.py` has Python for each.

References
----------
NVIDIA, PTX ISA, sections "SIMD Video Instructions" and "dp4a".
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types as untyped_types
from numba.cuda import extending

__all__ = [
    "VECTOR_BYTES",
    "add_absolute_differences",
    "add_products",
    "anew",
    "filled",
    "folded",
    "gathered",
    "inverse_root",
    "larger_differences",
    "largest_difference",
    "outer",
    "vectors_of",
]

VECTOR_BYTES = 16
"""Bytes that a thread loads at once: the most that there is an instruction for, on an address that they divide."""

# The first architecture with an instruction for the larger of pairs of 16-bit integers.
LARGER_INTEGERS = 900

INT32 = ir.IntType(32)

# Without annotations.
intrinsic: Callable[[Any], Callable[..., Any]] = extending.intrinsic
types: Any = untyped_types


def _call_of(typing: Any, function: Any, args: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    """Return the type of a call of a function, and what emits the call."""
    kind = typing.resolve_value_type(function)
    signature = kind.get_call_type(typing, args, {})

    def call(context: Any, builder: Any, values: Any) -> Any:
        given = [
            context.cast(builder, value, from_type, to_type)
            for value, from_type, to_type in zip(values, args, signature.args, strict=True)
        ]
        return context.get_function(kind, signature)(builder, given)

    return signature.return_type, call


def _elements(builder: Any, value: Any, kind: Any) -> list[Any]:
    return [builder.extract_value(value, number) for number in range(len(kind))]


def filled(value: Any, count: int) -> Callable[[], Any]:
    """Return a function that gives a tuple of `count` zeros of a type."""
    kind = types.UniTuple(value, count)

    @intrinsic
    def zeros(typing: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(context.get_value_type(kind), None)

        return kind(), codegen

    return zeros


def gathered(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return ``(args) -> tuple`` of what ``function(number, *args)`` gives for `count` numbers.

    If that is tuples, they are joined.
    """

    @intrinsic
    def gather(typing: Any, args: Any) -> Any:
        part, call = _call_of(typing, function, (types.int32, *args))
        width = len(part) if isinstance(part, types.UniTuple) else 1
        kind = types.UniTuple(part.dtype if width > 1 else part, count * width)

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given, found = _elements(builder, values[0], args), []
            for number in range(count):
                value = call(context, builder, [INT32(number), *given])
                found += _elements(builder, value, part) if width > 1 else [value]
            return context.make_tuple(builder, kind, found)

        return kind(args), codegen

    return gather


def outer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``(sums, a, b) -> sums``, each of which becomes ``function(sum, a[row], b[column])``."""

    @intrinsic
    def combine(typing: Any, sums: Any, a: Any, b: Any) -> Any:
        result, call = _call_of(typing, function, (sums.dtype, a.dtype, b.dtype))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            before, rows, columns = (
                _elements(builder, value, kind) for value, kind in zip(args, signature.args, strict=True)
            )
            found = []
            for number, value in enumerate(before):
                row, column = divmod(number, len(columns))
                after = call(context, builder, [value, rows[row], columns[column]])
                found.append(context.cast(builder, after, result, sums.dtype))
            return context.make_tuple(builder, sums, found)

        return sums(sums, a, b), codegen

    return combine


def folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``(state, values, args) -> state``, which becomes ``function(state, number, value, *args)`` for each."""

    @intrinsic
    def fold(typing: Any, state: Any, values: Any, args: Any) -> Any:
        result, call = _call_of(typing, function, (state, types.int32, values.dtype, *args))

        def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            current, rest = given[0], _elements(builder, given[2], args)
            for number, value in enumerate(_elements(builder, given[1], values)):
                after = call(context, builder, [current, INT32(number), value, *rest])
                current = context.cast(builder, after, result, state)
            return current

        return state(state, values, args), codegen

    return fold


def vectors_of(word: Any) -> Callable[..., Any]:
    """Return ``(array, number) -> tuple`` of the words of a type that a contiguous array has in so many-th vector."""
    lanes = VECTOR_BYTES * 8 // word.bitwidth
    kind = types.UniTuple(word, lanes)

    @intrinsic
    def load(typing: Any, array: Any, number: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(array)(context, builder, args[0]).data
            vector = ir.VectorType(context.get_value_type(word), lanes)
            start = builder.bitcast(data, ir.PointerType(vector, data.type.addrspace))
            loaded = builder.load(builder.gep(start, [args[1]], inbounds=True))
            loaded.align = VECTOR_BYTES
            found = [builder.extract_element(loaded, INT32(lane)) for lane in range(lanes)]
            return context.make_tuple(builder, kind, found)

        return kind(array, number), codegen

    return load


def _emit(builder: Any, instruction: str, *args: Any) -> Any:
    """Emit a PTX instruction of 32-bit registers."""
    kind = ir.FunctionType(INT32, [INT32] * len(args))
    operands = ", ".join(f"${number}" for number in range(1 + len(args)))
    code = ir.InlineAsm(kind, f"{instruction} {operands};", ",".join(["=r"] + ["r"] * len(args)), side_effect=False)
    return builder.call(code, args)


@intrinsic
def anew(typing: Any, value: Any) -> Any:
    """Return an integer, of which the compiler then knows nothing.

    What is computed from it inside a loop stays there: moved out, it would hold registers that the loop needs.
    """
    wide = value.bitwidth == 64
    kind, size, constraint = (types.int64, 64, "l") if wide else (types.int32, 32, "r")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shape = ir.FunctionType(ir.IntType(size), [ir.IntType(size)])
        code = ir.InlineAsm(shape, f"mov.b{size} $0, $1;", f"={constraint},{constraint}", side_effect=True)
        return builder.call(code, args)

    return kind(kind), codegen


@intrinsic
def inverse_root(typing: Any, value: Any) -> Any:
    """Return ``1 / sqrt(value)`` in float32, off by 1.3e-7 of it at the most: one instruction, no function."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.FloatType()
        code = ir.InlineAsm(ir.FunctionType(single, [single]), "rsqrt.approx.f32 $0, $1;", "=f,f", side_effect=False)
        return builder.call(code, args)

    return types.float32(types.float32), codegen


def _on_words(emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic that takes an int32 sum and two uint32 words."""

    def three(typing: Any, total: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args)

        return types.int32(types.int32, types.uint32, types.uint32), codegen

    return intrinsic(three)


add_absolute_differences = _on_words(
    lambda builder, args: _emit(builder, "vabsdiff4.u32.u32.u32.add", args[1], args[2], args[0])
)
"""``(total, a, b) -> total`` and the absolute differences of four bytes: one instruction on most devices."""

add_products = _on_words(lambda builder, args: _emit(builder, "dp4a.u32.u32", args[1], args[2], args[0]))
"""``(total, a, b) -> total`` and the products of four bytes: one instruction."""


def _by_architecture(builder: Any, newer: Callable[[], Any], older: Callable[[], Any]) -> Any:
    """Emit what the architecture that is compiled for can do; LLVM's pass NVVMReflect takes the other away."""
    text = ir.Constant(ir.ArrayType(ir.IntType(8), 12), bytearray(b"__CUDA_ARCH\0"))
    name = ir.GlobalVariable(builder.module, text.type, builder.module.get_unique_name("architecture"))
    name.initializer, name.global_constant, name.linkage = text, True, "internal"
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(INT32, [byte])
    reflect = builder.module.globals.get("__nvvm_reflect") or ir.Function(builder.module, kind, "__nvvm_reflect")
    is_newer = builder.icmp_signed(">=", builder.call(reflect, [builder.bitcast(name, byte)]), INT32(LARGER_INTEGERS))
    with builder.if_else(is_newer) as (then, otherwise):
        with then:
            first, after_first = newer(), builder.block
        with otherwise:
            second, after_second = older(), builder.block
    result = builder.phi(INT32)
    result.add_incoming(first, after_first)
    result.add_incoming(second, after_second)
    return result


def _larger_differences(builder: Any, args: Any) -> Any:
    total, a, b = args
    differences = _emit(builder, "vabsdiff4.u32.u32.u32", a, b, INT32(0))

    def integers() -> Any:
        # In a pair of bytes the first decides; of two equal first ones the second does no harm.
        odd = _emit(builder, "max.u16x2", total, differences)
        return _emit(builder, "max.u16x2", odd, builder.shl(differences, INT32(8)))

    def halves() -> Any:
        # A byte alone in 16 bits is a subnormal number of half precision, and these are in the order of integers.
        even = builder.and_(differences, INT32(0x00FF00FF))
        odd = _emit(builder, "prmt.b32", differences, INT32(0), INT32(0x4341))
        return _emit(builder, "max.f16x2", _emit(builder, "max.f16x2", total, even), odd)

    return _by_architecture(builder, integers, halves)


larger_differences = _on_words(_larger_differences)
"""``(total, a, b) -> total`` takes the absolute differences of four bytes to those that `largest_difference` tells."""


@intrinsic
def largest_difference(typing: Any, total: Any) -> Any:
    """Return the largest of the differences that `larger_differences` saw."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        high, low = builder.lshr(args[0], INT32(16)), builder.and_(args[0], INT32(0xFFFF))
        larger = builder.select(builder.icmp_unsigned(">", high, low), high, low)
        return _by_architecture(builder, lambda: builder.lshr(larger, INT32(8)), lambda: larger)

    return types.int32(types.int32), codegen
