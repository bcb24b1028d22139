"""CUDA kernels that take each row, or each element, by itself."""

import math
from typing import Any

import numba.cuda
from numba import float64, int32, int64, uint32

from knnbench.kernels.cuda_intrinsics import VECTOR_BYTES, add_products, vectors_of
from knnbench.kernels.cuda_launch import compiled

__all__ = ["convert", "find_rows", "squared_norms", "unit_rows"]

# The simulator swaps a global of this module that is `numba.cuda`.
cuda: Any = numba.cuda

words_of = vectors_of(uint32)


@compiled()
def convert(source: Any, out: Any) -> None:
    """Copy an array (n, m) of any layout and dtype, a thread for each element; columns past its own become zeros."""
    element = cuda.grid(1)
    i, j = element // out.shape[1], element % out.shape[1]
    if i < out.shape[0]:
        if j < source.shape[1]:
            out[i, j] = source[i, j]
        else:
            out[i, j] = 0


@compiled("squared_norms")
def squared_norms(rows: Any, norms: Any) -> None:
    """Fill `norms` with the squared norms of uint8 rows of whole vectors, a thread for each."""
    i = cuda.grid(1)
    if i < rows.shape[0]:
        n_vectors, total = rows.shape[1] // VECTOR_BYTES, int64(0)
        for number in range(n_vectors):
            part = int32(0)
            for word in words_of(rows, i * n_vectors + number):
                part = add_products(part, word, word)
            total += part
        norms[i] = total


@compiled()
def unit_rows(rows: Any, out: Any) -> None:
    """Fill `out` with float rows brought to unit length in float64, a thread for each; as `Metric.prepare_rows`.

    Columns past those of `rows` become zeros.
    """
    i = cuda.grid(1)
    if i < rows.shape[0]:
        largest = float64(0)
        for f in range(rows.shape[1]):
            largest = max(largest, abs(float64(rows[i, f])))
        total = float64(0)
        for f in range(rows.shape[1]):
            # Of at most 1, so that no square overflows, and only those that do not matter underflow.
            scaled = float64(rows[i, f]) / largest
            total += scaled * scaled
        norm = math.sqrt(total)
        for f in range(rows.shape[1]):
            out[i, f] = float64(rows[i, f]) / largest / norm
        for f in range(rows.shape[1], out.shape[1]):
            out[i, f] = 0


@compiled()
def find_rows(rows: Any, found: Any) -> None:
    """Lower found[0] to the first row that is not finite and found[1] to the first of zeros, a thread for each."""
    i = cuda.grid(1)
    if i < rows.shape[0]:
        is_finite, is_zero = True, True
        for f in range(rows.shape[1]):
            is_finite = is_finite and math.isfinite(rows[i, f])
            is_zero = is_zero and rows[i, f] == 0
        if not is_finite:
            cuda.atomic.min(found, 0, i)
        if is_zero:
            cuda.atomic.min(found, 1, i)
