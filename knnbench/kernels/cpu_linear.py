"""Cross-entropy of linear models on the CPU: a product in registers, its exponentials and the losses, in one pass.

Samples lie in *panels* of as many as a tile has lanes, a step of features of all of them at a time, so that a lane
belongs to a sample: classes are compared, and exponentials added, without crossing lanes. Steps that are 0 in all
samples of a panel are left out, which changes no sum.

On vectors a step is a feature: of images in bytes about half are left out (MNIST, 32 samples). Bytes stay bytes in
memory and become floats on their way into a register. Each product of a sample and a class is one chain of
multiply-adds over the features, in their order.

A matrix unit multiplies bytes by signed bytes and sums in 32 bits, in steps of 64 features: those that most panels need
come first, and a fourth of MNIST's steps is left out. A weight is a multiple of a power of two, which is that of its
class and model, and three digits to the base of 256. The sums of digits are exact, and what they make of a product is,
too: all that is rounded is the weights, each by at most 1 / 8,355,711 of the largest of its class. A logit is then off
by at most that largest times the sum of the sample's bytes / 8,355,711, beside ``n_features * 2**-24 * |x| |w|`` of a
product in float32.

The losses of a panel are added lane by lane: nothing depends on how many models are computed together.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from knnbench.dtypes import Array
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_loops import (
    array_data,
    emit_loop,
    intrinsic,
    multiply_tiles,
    place_at,
    set_up,
    splat,
    tear_down,
)
from knnbench.kernels.cpu_simd import (
    INT32,
    INT64,
    MATRIX_ROWS,
    Builder,
    Vectors,
    constant,
    groups_summed,
    is_float,
    larger_of_floats,
    multiply_add,
    simd_level,
    vectors_named,
    vectors_of,
)
from knnbench.kernels.cpu_tiles import carved, matrix_unit_is_exact

__all__ = ["LinearKernels", "Panels", "kernels_of", "linear_kernels"]

# Adding it rounds to a whole number, which is then in the low bits (valid below 2**51), as an exponent is stored.
ROUNDER = 1.5 * 2.0**52 + 1023

# Logits are held in these units: a range is then reduced by what is exact.
LN2, LOG2_E = math.log(2), math.log2(math.e)

# Those of (2**r - 1) / r, which they meet at Chebyshev's points of |r| <= 1/2, and last that of 1: what 2**r is off is
# below 2**-55 of it.
EXPONENTIAL = (
    *map(
        float.fromhex,
        (
            "0x1.e9d3fe3952179p-32",
            "0x1.e6063f7217bc6p-28",
            "0x1.b524fae627834p-24",
            "0x1.62bfd47773353p-20",
            "0x1.ffcbfc670dcd4p-17",
            "0x1.430913096fd9fp-13",
            "0x1.5d87fe78a5276p-10",
            "0x1.3b2ab6fba1ddap-7",
            "0x1.c6b08d704a0c2p-5",
            "0x1.ebfbdff82c598p-3",
            "0x1.62e42fefa39efp-1",
        ),
    ),
    1.0,
)

# Those of log2(m) / s in even powers of s = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2): the term that is left
# out is below 2**-53.
LOGARITHM = tuple(2 / (2 * n + 1) / LN2 for n in range(10, -1, -1))
HALF_ROOT = 0x3FE6A09E667F3BCC

# Classes of a tile, by the number of registers: kernels for any number of classes would be compiled for each. With two
# vectors of samples the largest leave some registers for the values between.
HEIGHTS = {16: (2, 5), 32: (2, 5, 10)}
VECTORS = 2

# Digits of a weight, to the base of 256 and from -128 to 127, the number of all that is the largest of both signs, and
# what makes all of them positive.
DIGITS, DIGIT_BITS = 3, 23
LARGEST_NUMBER = sum(127 * 256**d for d in range(DIGITS))
OFFSET = sum(128 * 256**d for d in range(DIGITS))

# From so many features on a matrix unit is used, which takes 64 at a time: below, vectors are faster (measured: 1.3 to
# 1.7 times with 16), panels would be longer than the samples, and with few the rounding of weights would be more than
# that of products in float32. And the products of a byte and a digit that 32 bits can always sum.
LEAST_FEATURES = 64
SUMMED_FEATURES = (2**31 - 1) // (255 * 128)

# Below, a term is 0 beside the largest, which is 1; an exponent of a float goes no lower either.
LEAST_POWER = -1022.0


class Panels(NamedTuple):
    """Samples as the kernel takes them.

    Attributes
    ----------
    values : (n_kept, n_groups, width, group) array of uint8, float32 or float64
        Features of a step, of all samples of a panel, in each row; 0 past the last sample.
    steps : (n_kept,) array of uint32
        The number of this step.
    starts : (n_panels + 1,) array of int64
        The first row of each panel, and the end.
    """

    values: Array
    steps: Array
    starts: Array


class LinearKernels(NamedTuple):
    """The compiled functions for weights of one dtype and a number of classes.

    Attributes
    ----------
    form : Vectors
    height, width : int
        Rows of weights and samples of a tile.
    depth : int
        Features of a step.
    parts : int
        Rows of weights that a class takes.
    operation : str
        Of `knnbench.measure.ceilings`, for the products.
    mark : callable
        ``(X, order, first, stop, kept)``: set ``kept[p, f]`` where feature f is not 0 in all samples of panel p. The
        samples are the rows of X with the numbers in `order`, here and below.
    fill : callable
        ``(X, order, columns, first, stop, values, steps, starts)``: fill the values of some panels.
    code : callable
        ``(W, columns, weights, scales)``: fill the tiles of weights of all models, and what a product is to be
        multiplied by for the logit in units of log 2.
    losses : callable
        ``(values, steps, starts, chunk, size, labels, sample_weight, weights, scales, intercepts, models, scores,
        logits, lanes, losses)``: fill the summed losses over some chunks from this one on, of so many panels each, of
        the models with some numbers, and of others 0; intercepts in the same units.
    """

    form: Vectors
    height: int
    width: int
    depth: int
    parts: int
    operation: str
    mark: Callable[..., None]
    fill: Callable[..., None]
    code: Callable[..., None]
    losses: Callable[..., None]

    def packing(self, n_rows: int, dtype: np.dtype[Any]) -> Array:
        """Return room for the values of `Panels`."""
        group, part = (self.form.operation.group, self.form.lanes) if self.depth > 1 else (1, self.width)
        (values,) = carved((n_rows * self.depth * self.width, dtype))
        return values.reshape(n_rows, self.width // part, self.depth // group, part, group)

    def coded(self, W: Array, b: Array, columns: Array) -> tuple[Array, Array, Array]:
        """Return the weights, scales and intercepts that `losses` takes, of features in some order."""
        n_models, _, n_classes = W.shape
        shape = n_models, self._tiles(n_classes), -(-len(columns) // self.depth), self.height, self.depth
        (weights,) = carved((math.prod(shape), np.dtype(self.form.operation.element)))
        weights, scales = weights.reshape(shape), np.empty((n_models, n_classes))
        self.code(W, columns, weights, scales)
        return weights, scales, b * LOG2_E

    def workspace(self, n_models: int, n_classes: int) -> tuple[Array, Array, Array]:
        """Return the arrays between that `losses` takes."""
        n_rows, real = self._tiles(n_classes) * self.height, np.dtype(np.float64)
        rows = (n_rows, np.dtype(self.form.operation.accumulator)), (n_classes, real), (3 + n_models, real)
        scores, logits, lanes = carved(*((n * self.width, dtype) for n, dtype in rows))
        return scores.reshape(-1, self.width), logits.reshape(-1, self.width), lanes.reshape(-1, self.width)

    def _tiles(self, n_classes: int) -> int:
        return -(-n_classes * self.parts // self.height)


@intrinsic(prefer_literal=True)
def products(
    typing_context: Any, vectors: Any, height: Any, values: Any, features: Any, start: Any, stop: Any, weights: Any,
    first: Any, out: Any, to: Any,
) -> Any:  # fmt: skip
    """Compute the products of a panel of samples with the weights of a tile of classes.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    height : int
        Classes of a tile, a constant.
    values, features : arrays
        Of `Panels`, of which a step is a feature.
    start, stop : int
        Rows of the panel, at least one.
    weights : array
        Tiles of classes, the classes of a tile beside each other for each feature.
    first : int
        The tile's first element in `weights`.
    out : array
        Where the products are stored, shape (classes, samples).
    to : int
        The first element of the tile in `out`.
    """
    if not all(isinstance(kind, types.Literal) for kind in (vectors, height)):
        return None
    form = vectors_named(vectors.literal_value)
    n_classes, n_vectors = height.literal_value, VECTORS
    float_bytes = form.width // form.lanes

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        values, features, weights, out = (
            array_data(context, builder, signature.args[i], args[i]) for i in (2, 3, 6, 8)
        )
        stored = context.get_data_type(signature.args[2].dtype)
        stored_bytes = signature.args[2].dtype.bitwidth // 8
        start, element = args[4], form.elements.element

        def loaded(row: Any) -> list[Any]:
            vector, parts = ir.VectorType(stored, form.lanes), []
            for v in range(n_vectors):
                at = builder.mul(row, INT64(n_vectors * form.lanes * stored_bytes))
                at = builder.add(at, INT64(v * form.lanes * stored_bytes))
                parts.append(builder.load(place_at(builder, values, at, vector), align=stored_bytes))
            return parts if stored == element else [builder.uitofp(part, form.elements) for part in parts]

        def step(number: Any, accs: list[Any]) -> list[Any]:
            row = builder.add(start, number)
            address = place_at(builder, features, builder.mul(row, INT64(4)), ir.IntType(32))
            feature = builder.zext(builder.load(address, align=4), INT64)
            base = builder.add(args[7], builder.mul(feature, INT64(n_classes)))
            samples, following = loaded(row), []
            for c in range(n_classes):
                at = builder.mul(builder.add(base, INT64(c)), INT64(float_bytes))
                weight = builder.load(place_at(builder, weights, at, element), align=float_bytes)
                weight = splat(builder, weight, form.lanes)
                own = accs[c * n_vectors : (c + 1) * n_vectors]
                following += [multiply_add(builder, weight, x, acc) for x, acc in zip(samples, own, strict=True)]
            return following

        zeros = [ir.Constant(form.accumulators, None)] * (n_classes * n_vectors)
        accs = emit_loop(builder, builder.sub(args[5], start), zeros, step)
        for number, acc in enumerate(accs):
            at = builder.mul(builder.add(args[9], INT64(number * form.lanes)), INT64(float_bytes))
            builder.store(acc, place_at(builder, out, at, acc.type), align=float_bytes)
        return context.get_dummy_value()

    number = types.int64
    return types.void(vectors, height, values, features, number, number, weights, number, out, number), generate


@intrinsic(prefer_literal=True)
def matrix_products(
    typing_context: Any, vectors: Any, values: Any, steps: Any, start: Any, stop: Any, weights: Any, first: Any,
    out: Any, tile: Any,
) -> Any:  # fmt: skip
    """Compute the products of a panel of samples with a tile of digits on a matrix unit, 2 x 2 of its tiles.

    Rows of its first operand are digits, so that a lane of what is stored is a sample, as of `products`.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    values, steps : arrays
        Of `Panels`.
    start, stop : int
        Rows of the panel, at least one.
    weights : array of uint8
        Tiles of digits, for each step `Vectors.depth` of the first row, then of the second, and so on.
    first : int
        The tile's first step in `weights`.
    out : array of int32
        Where the products are stored, shape (rows, samples).
    tile : int
        The number of the tile in `out`.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)
    height, n_vectors = form.tile_shape
    stride, tile_bytes = n_vectors * form.width, MATRIX_ROWS * form.width

    def emulate(builder: Builder, n_steps: Any, operands: Callable[[Any], tuple[Any, Any]], out: Any) -> None:
        wide, none = ir.VectorType(INT32, form.width), ir.Constant(form.accumulators, None)

        def row(number: Any, _: list[Any]) -> list[Any]:
            def step(at: Any, accs: list[Any]) -> list[Any]:
                digits, samples = operands(at)
                accs = list(accs)
                for group in range(MATRIX_ROWS):
                    at = builder.add(builder.mul(number, INT64(form.width)), INT64(4 * group))
                    digit = splat(builder, builder.load(place_at(builder, digits, at, INT32), align=4), form.lanes)
                    digit = builder.sext(builder.bitcast(digit, form.elements), wide)
                    for v in range(n_vectors):
                        at = INT64(v * tile_bytes + group * form.width)
                        sample = builder.load(place_at(builder, samples, at, form.elements), align=form.width)
                        terms = builder.mul(digit, builder.zext(sample, wide))
                        accs[v] = builder.add(accs[v], groups_summed(builder, terms, form.operation.group))
                return accs

            for v, acc in enumerate(emit_loop(builder, n_steps, [none] * n_vectors, step)):
                at = builder.add(builder.mul(number, INT64(stride)), INT64(v * form.width))
                builder.store(acc, place_at(builder, out, at, acc.type), align=form.width)
            return []

        emit_loop(builder, INT64(height), [], row)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        values, steps, weights, out = (array_data(context, builder, signature.args[i], args[i]) for i in (1, 2, 5, 7))
        out = builder.gep(out, [builder.mul(args[8], INT64(height * stride))])

        def operands(number: Any) -> tuple[Any, Any]:
            row = builder.add(args[3], number)
            address = place_at(builder, steps, builder.mul(row, INT64(4)), INT32)
            step = builder.add(args[6], builder.zext(builder.load(address, align=4), INT64))
            return (
                builder.gep(weights, [builder.mul(step, INT64(height * form.width))]),
                builder.gep(values, [builder.mul(row, INT64(n_vectors * tile_bytes))]),
            )

        n_steps = builder.sub(args[4], args[3])
        if form.instruction:
            multiply_tiles(builder, form, n_steps, operands, tile_bytes, form.width, out)
        else:
            emulate(builder, n_steps, operands, out)
        return context.get_dummy_value()

    number = types.int64
    return types.void(vectors, values, steps, number, number, weights, number, out, number), generate


@intrinsic(prefer_literal=True)
def make_logits(
    typing_context: Any, vectors: Any, scores: Any, scales: Any, intercepts: Any, first: Any, n_classes: Any,
    logits: Any, largest: Any,
) -> Any:  # fmt: skip
    """Make logits of the products of a panel, and find the largest of each sample.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    scores : array
        Of products, or of those of digits.
    scales, intercepts : arrays of float64
        By which a product is multiplied, and what is then added, in each class of all models.
    first : int
        The number of the model's first class in them.
    n_classes : int
        At least 1.
    logits : array of float64
        Filled, shape (classes, samples).
    largest : array of float64
        Filled for each sample; not NaN if any logit is not.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)
    lanes, width, score_bytes = form.width // 8, VECTORS * form.lanes, form.width // form.lanes
    real, stored = ir.VectorType(ir.DoubleType(), lanes), ir.VectorType(form.accumulators.element, lanes)
    n_parts, numbers = DIGITS if form.operation.is_matrix else 1, range(width // lanes)

    def widened(builder: Builder, value: Any) -> Any:
        if not is_float(stored):
            return builder.sitofp(value, real)
        return value if stored == real else builder.fpext(value, real)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        scores, scales, intercepts, logits, largest = (
            array_data(context, builder, signature.args[i], args[i]) for i in (1, 2, 3, 6, 7)
        )

        def product(c: Any, v: int) -> Any:
            """Emit the number that the sums of its digits make, which float64 holds."""
            total = None
            for part in range(n_parts):
                row = builder.add(builder.mul(c, INT64(n_parts)), INT64(part))
                place = builder.add(builder.mul(row, INT64(width)), INT64(v * lanes))
                address = place_at(builder, scores, builder.mul(place, INT64(score_bytes)), stored)
                value = widened(builder, builder.load(address, align=score_bytes))
                total = multiply_add(builder, total, constant(real, 256.0), value) if part else value
            return total

        def step(c: Any, tops: list[Any]) -> list[Any]:
            at, following = builder.mul(builder.add(args[4], c), INT64(8)), []
            scale, intercept = (
                splat(builder, builder.load(place_at(builder, base, at, ir.DoubleType()), align=8), lanes)
                for base in (scales, intercepts)
            )
            for v in numbers:
                value = multiply_add(builder, product(c, v), scale, intercept)
                at = builder.add(builder.mul(c, INT64(8 * width)), INT64(v * form.width))
                builder.store(value, place_at(builder, logits, at, real), align=8)
                following.append(larger_of_floats(builder, value, tops[v]))
            return following

        tops = emit_loop(builder, args[5], [constant(real, -math.inf)] * len(numbers), step)
        for v, top in enumerate(tops):
            builder.store(top, place_at(builder, largest, INT64(v * form.width), real), align=8)
        return context.get_dummy_value()

    number = types.int64
    return types.void(vectors, scores, scales, intercepts, number, number, logits, largest), generate


@intrinsic(prefer_literal=True)
def add_exponentials(typing_context: Any, vectors: Any, logits: Any, n_classes: Any, largest: Any, sums: Any) -> Any:
    """Sum 2**(logit - largest) over the classes of each sample of a panel; NaN stays NaN.

    A range is reduced to ``x = k + r`` as in W. J. Cody and W. Waite, Software Manual for the Elementary Functions,
    1980, chapter 6.

    Parameters
    ----------
    vectors : str
        Name of the `Vectors`, a constant.
    logits : array of float64
        Shape (classes, samples).
    n_classes : int
        At least 1.
    largest : array of float64
        For each sample.
    sums : array of float64
        Filled for each sample.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)
    lanes, width = form.width // 8, VECTORS * form.lanes
    real, whole = ir.VectorType(ir.DoubleType(), lanes), ir.VectorType(INT64, lanes)
    numbers = range(width // lanes)

    def exponential(builder: Builder, x: Any, acc: Any) -> Any:
        """Emit acc + 2**x, of x of at most 0."""
        x = larger_of_floats(builder, constant(real, LEAST_POWER), x)
        rounded = builder.fadd(x, constant(real, ROUNDER))
        r = builder.fsub(x, builder.fsub(rounded, constant(real, ROUNDER)))
        total = constant(real, EXPONENTIAL[0])
        for coefficient in EXPONENTIAL[1:]:
            total = multiply_add(builder, total, r, constant(real, coefficient))
        power = builder.shl(builder.bitcast(rounded, whole), constant(whole, 52))
        return multiply_add(builder, total, builder.bitcast(power, real), acc)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        logits, largest, sums = (array_data(context, builder, signature.args[i], args[i]) for i in (1, 3, 4))
        tops = [builder.load(place_at(builder, largest, INT64(v * form.width), real), align=8) for v in numbers]

        def step(c: Any, accs: list[Any]) -> list[Any]:
            at = builder.mul(c, INT64(width * 8))
            places = [builder.add(at, INT64(v * form.width)) for v in numbers]
            values = [builder.load(place_at(builder, logits, place, real), align=8) for place in places]
            return [
                exponential(builder, builder.fsub(value, top), acc)
                for value, top, acc in zip(values, tops, accs, strict=True)
            ]

        totals = emit_loop(builder, args[2], [ir.Constant(real, None)] * len(numbers), step)
        for v, total in enumerate(totals):
            builder.store(total, place_at(builder, sums, INT64(v * form.width), real), align=8)
        return context.get_dummy_value()

    return types.void(vectors, logits, types.int64, largest, sums), generate


@intrinsic(prefer_literal=True)
def use_whole_vectors(typing_context: Any, vectors: Any) -> Any:
    """Let the compiler make vectors as wide as the level's of this function's loops.

    LLVM takes half of 64 bytes of Intel's processors, of which the first slowed down their clocks for the whole.
    """
    if not isinstance(vectors, types.Literal):
        return None
    form = vectors_named(vectors.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        # llvmlite knows only the attributes without a value.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * form.width}"')
        return context.get_dummy_value()

    return types.void(vectors), generate


@intrinsic(prefer_literal=False)
def bits_of(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float64."""
    return types.int64(types.float64), lambda context, builder, signature, args: builder.bitcast(args[0], INT64)


@intrinsic(prefer_literal=False)
def float_of(typing_context: Any, bits: Any) -> Any:
    """Return the float64 with these bits."""
    return types.float64(types.int64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@compile_cached(nogil=True, inline="always", error_model="numpy")
def logarithm(x: Any) -> Any:
    """Return log2(x) of a normal float64 above 0 in such steps; NaN and infinity stay what they are.

    The range is reduced to ``x = 2**k m`` with m about 1, as in the same book, chapter 5.
    """
    bits = bits_of(x)
    k = (bits - HALF_ROOT) >> 52
    m = float_of(bits - (k << 52))
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    total = LOGARITHM[0]
    for coefficient in LOGARITHM[1:]:
        total = total * square + coefficient
    result = k + s * total
    return result if x - x == 0.0 else x


def linear_kernels(stored: Any, dtype: Any, n_features: int, n_classes: int) -> LinearKernels:
    """Return the kernels for samples and weights of some dtypes on this CPU, compiled when they are first called."""
    level = simd_level()
    is_exact = np.dtype(stored) == np.uint8 and np.dtype(dtype) == np.float32
    is_exact &= LEAST_FEATURES <= n_features <= SUMMED_FEATURES
    if is_exact and level.has_matrix and matrix_unit_is_exact(level):
        return kernels_of(vectors_of("product-digits-matrix", level))
    form = vectors_of(f"product-{np.dtype(dtype)}", level)
    # A tile costs its classes, and the loading of the samples; of equals, the fewest tiles.
    height = min(HEIGHTS[form.registers], key=lambda height: (-(-n_classes // height) * (height + 1), -height))
    return kernels_of(form, height)


@functools.cache
def kernels_of(form: Vectors, height: int = 2 * MATRIX_ROWS) -> LinearKernels:
    """Return the kernels of an operation: on a matrix unit, or on vectors with so many classes in a tile."""
    vectors, width, is_matrix = form.name, VECTORS * form.lanes, form.operation.is_matrix
    depth, group, part = (form.depth, form.operation.group, form.lanes) if is_matrix else (1, 1, width)
    operation = "matrix-uint8" if is_matrix else f"fma-{form.operation.accumulator}"
    columns_of_class = DIGITS if is_matrix else 1

    @compile_cached(nogil=True)
    def mark(X: Any, order: Any, first: Any, stop: Any, kept: Any) -> None:
        for p in range(first, stop):
            for i in order[p * width : (p + 1) * width]:
                for f in range(X.shape[1]):
                    kept[p, f] |= X[i, f] != 0

    @compile_cached(nogil=True)
    def fill(
        X: Any, order: Any, columns: Any, first: Any, stop: Any, values: Any, steps: Any, starts: Any
    ) -> None:  # fmt: skip
        for p in range(first, stop):
            for lane in range(width):
                i = p * width + lane
                sample = X[order[min(i, len(order) - 1)]]
                weight = i < len(order)
                for row in range(starts[p], starts[p + 1]):
                    target, at = values[row, lane // part, :, lane % part], steps[row] * depth
                    for g in range(depth // group):
                        for f in range(group):
                            target[g, f] = sample[columns[at + g * group + f]] * weight

    if is_matrix:

        @compile_cached(nogil=True, error_model="numpy")
        def code(W: Any, columns: Any, weights: Any, scales: Any) -> None:
            for m in range(W.shape[0]):
                factors = scales[m]
                factors[:] = 0.0
                for f in columns:
                    for c in range(W.shape[2]):
                        value = abs(np.float64(W[m, f, c]))
                        factors[c] = value if value > factors[c] or value != value else factors[c]
                for c in range(W.shape[2]):
                    largest = factors[c]
                    # Weights that are not finite make the loss so.
                    factors[c] = np.nan
                    if largest - largest == 0.0:
                        power = DIGIT_BITS - math.frexp(largest)[1]
                        power -= np.rint(math.ldexp(largest, power)) > LARGEST_NUMBER
                        factors[c] = math.ldexp(1.0, power)
                for place, f in enumerate(columns):
                    for c in range(W.shape[2]):
                        number = W[m, f, c] * factors[c]
                        digits = np.int64(np.rint(number)) + OFFSET if number == number else 0
                        for d in range(DIGITS):
                            row = DIGITS * c + d
                            digit = (digits >> 8 * (DIGITS - 1 - d)) & 255 ^ 128
                            weights[m, row // height, place // depth, row % height, place % depth] = digit
                for c in range(W.shape[2]):
                    factors[c] = LOG2_E / factors[c]

    else:

        @compile_cached(nogil=True)
        def code(W: Any, columns: Any, weights: Any, scales: Any) -> None:
            scales[:] = LOG2_E
            for m in range(W.shape[0]):
                for place, f in enumerate(columns):
                    for c in range(W.shape[2]):
                        weights[m, c // height, place, c % height, 0] = W[m, f, c]

    if is_matrix:

        @register_jitable
        def multiply(values: Any, steps: Any, start: Any, stop: Any, weights: Any, m: Any, scores: Any) -> None:
            n_tiles, n_steps = weights.shape[1], weights.shape[2]
            for t in range(n_tiles):
                first = (m * n_tiles + t) * n_steps
                matrix_products(vectors, values, steps, start, stop, weights, first, scores, t)

    else:

        @register_jitable
        def multiply(values: Any, steps: Any, start: Any, stop: Any, weights: Any, m: Any, scores: Any) -> None:
            n_tiles, n_steps = weights.shape[1], weights.shape[2]
            for t in range(n_tiles):
                first = (m * n_tiles + t) * n_steps * height
                products(
                    vectors, height, values, steps, start, stop, weights, first, scores, t * height * width
                )  # fmt: skip

    # A multiply-add as one instruction is exact where the reduction of a range needs that, and rounds less elsewhere.
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

    @register_jitable(**options)
    def add_losses(
        values: Any, steps: Any, starts: Any, first: Any, stop: Any, labels: Any, sample_weight: Any, weights: Any,
        scales: Any, intercepts: Any, models: Any, scores: Any, logits: Any, lanes: Any, totals: Any,
    ) -> None:  # fmt: skip
        n_models, n_classes = intercepts.shape
        largest, sums, right, sum_of = lanes[0], lanes[1], lanes[2], lanes[3:]
        for m in range(n_models):
            for lane in range(width):
                sum_of[m, lane] = 0.0
        use_whole_vectors(vectors)
        # The next products come before the exponentials of these, which then do not wait for what a matrix unit stores.
        multiply(values, steps, starts[first], starts[first + 1], weights, models[0], scores)
        for p in range(first, stop):
            for number, m in enumerate(models):
                make_logits(
                    vectors, scores, scales, intercepts, m * n_classes, n_classes, logits, largest
                )  # fmt: skip
                if number + 1 < len(models):
                    multiply(values, steps, starts[p], starts[p + 1], weights, models[number + 1], scores)
                elif p + 1 < stop:
                    multiply(values, steps, starts[p + 1], starts[p + 2], weights, models[0], scores)
                for lane in range(width):
                    right[lane] = logits[labels[p * width + lane], lane]
                add_exponentials(vectors, logits, n_classes, largest, sums)
                for lane in range(width):
                    loss = logarithm(sums[lane]) + (largest[lane] - right[lane])
                    sum_of[m, lane] += sample_weight[p * width + lane] * loss
        for m in range(n_models):
            total = 0.0
            for lane in range(width):
                total += sum_of[m, lane]
            totals[m] = total * LN2

    @compile_cached(nogil=True, **options)
    def losses(
        values: Any, steps: Any, starts: Any, chunk: Any, size: Any, labels: Any, sample_weight: Any, weights: Any,
        scales: Any, intercepts: Any, models: Any, scores: Any, logits: Any, lanes: Any, totals: Any,
    ) -> None:  # fmt: skip
        set_up(vectors)
        for number in range(len(totals)):
            first = (chunk + number) * size
            add_losses(
                values, steps, starts, first, min(first + size, len(starts) - 1), labels, sample_weight, weights,
                scales, intercepts, models, scores, logits, lanes, totals[number],
            )  # fmt: skip
        tear_down(vectors)

    return LinearKernels(form, height, width, depth, columns_of_class, operation, mark, fill, code, losses)
