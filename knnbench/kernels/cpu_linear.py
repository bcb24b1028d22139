"""Cross-entropy of linear models on the CPU: a product in registers, its exponentials and the losses, in one pass.

Samples lie in *panels* of as many as a tile has lanes, a feature of all of them at a time, so that a lane belongs to
a sample: classes are compared, and exponentials added, without crossing lanes. Features that are 0 in all samples of
a panel are left out, which changes no sum: for images in bytes that is about half of them (MNIST, 32 samples). Bytes
stay bytes in memory and become floats on their way into a register.

Each product of a sample and a class is one chain of multiply-adds over the features, in their order, and the losses of
a panel are added lane by lane: nothing depends on how many models are computed together.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from knnbench.dtypes import Array
from knnbench.kernels.compilation import compile_cached
from knnbench.kernels.cpu_loops import array_data, emit_loop, intrinsic, place_at, splat
from knnbench.kernels.cpu_simd import INT64, Builder, Vectors, multiply_add, simd_level, vectors_named, vectors_of

__all__ = ["LinearKernels", "Panels", "linear_kernels"]

# Adding it rounds to a whole number, which is then in the low bits (valid below 2**51).
ROUNDER = 1.5 * 2.0**52
EXPONENT_BIAS = 1023

LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first with so many zeros at its end that a product with an exponent is exact.
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

# Taylor's coefficients: the term that is left out is below 2**-53 for |r| <= ln(2) / 2.
EXPONENTIAL = tuple(1 / math.factorial(n) for n in range(13, -1, -1))

# Those of log(m) / s in even powers of s = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2): the term that is left
# out is below 2**-54.
LOGARITHM = tuple(2 / (2 * n + 1) for n in range(10, -1, -1))
HALF_ROOT = 0x3FE6A09E667F3BCC

# Classes of a tile, by the number of registers: kernels for any number of classes would be compiled for each. With two
# vectors of samples the largest leave some registers for the values between.
HEIGHTS = {16: (2, 5), 32: (2, 5, 10)}
VECTORS = 2

# Below, a term is 0 beside the largest, which is 1; an exponent of a float goes no lower either.
LEAST_POWER = -708.0


class Panels(NamedTuple):
    """Samples as the kernel takes them.

    Attributes
    ----------
    values : (n_kept, width) array of uint8, float32 or float64
        A feature of all samples of a panel in each row, 0 past the last sample.
    features : (n_kept,) array of int32
        The number of this feature.
    starts : (n_panels + 1,) array of int64
        The first row of each panel, and the end.
    """

    values: Array
    features: Array
    starts: Array


class LinearKernels(NamedTuple):
    """The compiled functions for weights of one dtype and a number of classes.

    Attributes
    ----------
    height, width : int
        Classes and samples of a tile.
    mark : callable
        ``(X, order, first, stop, kept)``: set ``kept[p, f]`` where feature f is not 0 in all samples of panel p. The
        samples are the rows of X with the numbers in `order`, here and below.
    fill : callable
        ``(X, order, first, stop, values, features, starts)``: fill the values of some panels.
    losses : callable
        ``(values, features, starts, first, stop, labels, sample_weight, weights, intercepts, wanted, scores, logits,
        lanes, losses)``: the summed losses of the wanted models over some panels.
    """

    height: int
    width: int
    mark: Callable[..., None]
    fill: Callable[..., None]
    losses: Callable[..., None]


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
        Of `Panels`.
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


@intrinsic(prefer_literal=False)
def power_of_two(typing_context: Any, rounded: Any) -> Any:
    """Return 2**k of a float64 that is k + `ROUNDER`."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        bits = builder.add(builder.bitcast(args[0], INT64), INT64(EXPONENT_BIAS))
        return builder.bitcast(builder.shl(bits, INT64(52)), args[0].type)

    return types.float64(types.float64), generate


@compile_cached(nogil=True, inline="always", error_model="numpy")
def exponential(x: Any) -> Any:
    """Return exp(x) of a float64 of at most 0, in steps that a compiler makes vectors of, unlike a library's call.

    The range is reduced to ``x = k ln 2 + r`` as in W. J. Cody and W. Waite, Software Manual for the Elementary
    Functions, 1980, chapter 6. NaN stays NaN.
    """
    x = LEAST_POWER if x < LEAST_POWER else x
    rounded = x * LOG2_E + ROUNDER
    k = rounded - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = EXPONENTIAL[0]
    for coefficient in EXPONENTIAL[1:]:
        total = total * r + coefficient
    return total * power_of_two(rounded)


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
    """Return log(x) of a normal float64 above 0 in such steps; NaN and infinity stay what they are.

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
    result = k * LN2_HIGH + (k * LN2_LOW + s * total)
    return result if x - x == 0.0 else x


def linear_kernels(dtype: Any, n_classes: int) -> LinearKernels:
    """Return the kernels for weights of float32 or float64 on this CPU, compiled when they are first called."""
    form = vectors_of(f"product-{np.dtype(dtype)}", simd_level())
    # A tile costs its classes, and the loading of the samples; of equals, the fewest tiles.
    height = min(HEIGHTS[form.registers], key=lambda height: (-(-n_classes // height) * (height + 1), -height))
    return _compiled(form, height)


@functools.cache
def _compiled(form: Vectors, height: int) -> LinearKernels:
    vectors, width = form.name, VECTORS * form.lanes

    @compile_cached(nogil=True)
    def mark(X: Any, order: Any, first: Any, stop: Any, kept: Any) -> None:
        for p in range(first, stop):
            for i in order[p * width : (p + 1) * width]:
                for f in range(X.shape[1]):
                    kept[p, f] |= X[i, f] != 0
            # A loop of no steps would need a kernel of its own.
            kept[p, 0] = True

    @compile_cached(nogil=True)
    def fill(X: Any, order: Any, first: Any, stop: Any, values: Any, features: Any, starts: Any) -> None:
        for p in range(first, stop):
            for lane in range(width):
                i = p * width + lane
                for row in range(starts[p], starts[p + 1]):
                    values[row, lane] = X[order[i], features[row]] if i < len(order) else 0

    # A multiply-add as one instruction is exact where the reduction of a range needs that, and rounds less elsewhere.
    @compile_cached(nogil=True, error_model="numpy", fastmath={"contract"})
    def losses(
        values: Any, features: Any, starts: Any, first: Any, stop: Any, labels: Any, sample_weight: Any, weights: Any,
        intercepts: Any, wanted: Any, scores: Any, logits: Any, lanes: Any, totals: Any,
    ) -> None:  # fmt: skip
        n_models, n_classes = intercepts.shape
        n_tiles, n_features = weights.shape[1], weights.shape[2]
        largest, sums, right, sum_of = lanes[0], lanes[1], lanes[2], lanes[3:]
        for m in range(n_models):
            for lane in range(width):
                sum_of[m, lane] = 0.0
        for p in range(first, stop):
            for m in range(n_models):
                if not wanted[m]:
                    continue
                for t in range(n_tiles):
                    products(
                        vectors, height, values, features, starts[p], starts[p + 1], weights,
                        (m * n_tiles + t) * n_features * height, scores, t * height * width,
                    )  # fmt: skip
                for lane in range(width):
                    largest[lane] = -np.inf
                    sums[lane] = 0.0
                for c in range(n_classes):
                    for lane in range(width):
                        value = np.float64(scores[c, lane]) + intercepts[m, c]
                        logits[c, lane] = value
                        largest[lane] = value if value > largest[lane] else largest[lane]
                for lane in range(width):
                    right[lane] = logits[labels[p * width + lane], lane]
                for c in range(n_classes):
                    for lane in range(width):
                        sums[lane] += exponential(logits[c, lane] - largest[lane])
                for lane in range(width):
                    loss = logarithm(sums[lane]) + (largest[lane] - right[lane])
                    sum_of[m, lane] += sample_weight[p * width + lane] * loss
        for m in range(n_models):
            total = 0.0
            for lane in range(width):
                total += sum_of[m, lane]
            totals[m] = total

    return LinearKernels(height, width, mark, fill, losses)
