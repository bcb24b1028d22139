"""The CUDA C++ source of what is done to rows one by one: looked through, brought to unit length, summed, rounded.

A warp has a row. It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and as C++ for
the host.
"""

import string
from typing import Any

import numpy as np

from .cuda_source import TYPES, WARP_SUMS

__all__ = ["ROWS_A_BLOCK", "THREADS", "halve_source", "norms_source", "pack_source", "scan_source", "unit_source"]

THREADS = 128
"""Threads a block."""

ROWS_A_BLOCK = THREADS // 32

COMMON = "typedef long long size;\n" + WARP_SUMS

# What all kernels begin with; the end of a grid may have more warps than there are rows.
ROW = r"""
    const size i = size(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (i >= n_rows)
        return;
"""

SCAN = string.Template(r"""
typedef $element element;

// found: the first row with a value that is not finite, and the first that is all zeros, if they are smaller than what
// is there.
extern "C" __global__ void __launch_bounds__($threads) scan_rows(
    const element* rows, unsigned long long* found, size n_rows, size n_features)
{
    $row
    unsigned n_strange = 0, n_others = 0;
    for (size f = lane; f < n_features; f += 32) {
        const element x = rows[i * n_features + f];
        n_strange += !(x - x == 0);
        n_others += x != 0;
    }
    n_strange = sum_of_warp(n_strange), n_others = sum_of_warp(n_others);
    if (lane == 0 && n_strange)
        atomicMin(&found[0], (unsigned long long)i);
    if (lane == 0 && !n_others)
        atomicMin(&found[1], (unsigned long long)i);
}
""")

UNIT = string.Template(r"""
typedef $element element;

// Rows divided by their lengths. Before squares are taken, the largest element is brought to between 1 and 2 by a power
// of two, which is exact.
extern "C" __global__ void __launch_bounds__($threads) unit_rows(
    const element* rows, element* out, size n_rows, size n_features)
{
    $row
    double largest = 0, sum = 0;
    for (size f = lane; f < n_features; f += 32)
        largest = fmax(largest, fabs(double(rows[i * n_features + f])));
    #pragma unroll
    for (unsigned mask = 16; mask > 0; mask /= 2)
        largest = fmax(largest, of_lane(largest, mask));
    int exponent;
    const double power = largest / (2 * frexp(largest, &exponent));
    for (size f = lane; f < n_features; f += 32) {
        const double x = double(rows[i * n_features + f]) / power;
        sum += x * x;
    }
    const double length = sqrt(sum_of_warp(sum));
    for (size f = lane; f < n_features; f += 32)
        out[i * n_features + f] = element(double(rows[i * n_features + f]) / power / length);
}
""")

NORMS = string.Template(r"""
// out[i]: the sum of (x - centre)^2 over row i.
extern "C" __global__ void __launch_bounds__($threads) squared_norms(
    const $element* rows, $norm* out, size n_rows, size n_features, int centre)
{
    $row
    $sum sum = 0;
    for (size f = lane; f < n_features; f += 32) {
        const $value x = $value(rows[i * n_features + f]) - centre;
        sum += x * x;
    }
    sum = sum_of_warp(sum);
    if (lane == 0)
        out[i] = ($norm)sum;
}
""")

PACK = string.Template(r"""
// Rows of bytes in panels, of which the slices of 128 bytes come one after the other: in a slice the rows, and in a row
// its 8 chunks of 16 bytes, which change places with the number of the row (128-byte swizzling). What is not written
// to is zero.
extern "C" __global__ void __launch_bounds__($threads) pack_rows(
    const unsigned char* rows, uint4* packed, size n_rows, size row_bytes, int panel_rows)
{
    $row
    const size n_chunks = (row_bytes + 15) / 16, n_slices = (n_chunks + 7) / 8;
    const bool is_aligned = (size_t(rows) | row_bytes) % 16 == 0;
    packed += i / panel_rows * n_slices * panel_rows * 8 + i % panel_rows * 8;
    for (size c = lane; c < n_chunks; c += 32) {
        uint4 chunk;
        const unsigned char* const from = rows + i * row_bytes + c * 16;
        if (is_aligned)
            chunk = *reinterpret_cast<const uint4*>(from);
        else {
            unsigned words[4] = {};
            #pragma unroll
            for (int b = 0; b < 16; ++b)
                if (c * 16 + b < row_bytes)
                    words[b / 4] |= unsigned(from[b]) << b % 4 * 8;
            chunk = {words[0], words[1], words[2], words[3]};
        }
        packed[c / 8 * panel_rows * 8 + (c % 8 ^ i % 8)] = chunk;
    }
}
""")

HALVE = string.Template(r"""
#ifdef __CUDACC__
__device__ unsigned short to_half(float x)
{
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
__device__ float from_half(unsigned short half)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
#endif

// Rows less a centre, times a power of two, rounded to float16 and filled up with zeros; their squared norms before
// rounding, and at the most the squared norms of what rounding took from them.
extern "C" __global__ void __launch_bounds__($threads) halve(
    const float* rows, const float* centre, const float* scale, unsigned short* halves, float* norms, float* lost,
    size n_rows, size n_features, size width)
{
    $row
    float norm = 0, its_loss = 0;
    for (size f = lane; f < width; f += 32) {
        const float x = f < n_features ? (rows[i * n_features + f] - centre[f]) * scale[0] : 0;
        const unsigned short half = to_half(x);
        const float rest = x - from_half(half);
        norm += x * x;
        its_loss += rest * rest;
        halves[i * width + f] = half;
    }
    norm = sum_of_warp(norm), its_loss = sum_of_warp(its_loss);
    // Each square may have been lost for being below the smallest normal number.
    if (lane == 0)
        norms[i] = norm, lost[i] = its_loss + width * 1.1754944e-38f;
}
""")


def _source(template: string.Template, **names: str) -> str:
    return COMMON + template.substitute(row=ROW, threads=THREADS, **names)


def scan_source(dtype: np.dtype[Any]) -> str:
    """Return the source of `scan_rows`.

    Parameters
    ----------
    dtype : dtype
        Of the rows.

    Returns
    -------
    str
        CUDA C++17 without headers, as of all functions here. Rows are C-contiguous, sizes have 64 bits; the grid is
        ``(ceil(n_rows / ROWS_A_BLOCK),)``, the block ``(THREADS,)``::

            scan_rows(rows, found, n_rows, n_features)
                `found`, two of uint64, is lowered to the numbers of the rows
    """
    return _source(SCAN, element=TYPES[dtype.name])


def unit_source(dtype: np.dtype[Any]) -> str:
    """Return the source of `unit_rows` of floats.

    Parameters
    ----------
    dtype : dtype

    Returns
    -------
    str
        As `scan_source` does::

            unit_rows(rows, out, n_rows, n_features)
    """
    return _source(UNIT, element=TYPES[dtype.name])


def norms_source(element: np.dtype[Any], dtype: np.dtype[Any]) -> str:
    """Return the source of `squared_norms`.

    Parameters
    ----------
    element, dtype : dtype
        Of the rows and of the norms. Those of uint8 are summed in 64 bits, others in their own dtype.

    Returns
    -------
    str
        As `scan_source` does::

            squared_norms(rows, out, n_rows, n_features, centre)
                `centre`, of 32 bits, is subtracted from every element
    """
    name = TYPES[element.name]
    value, total = ("int", "long long") if element.kind == "u" else (name, name)
    return _source(NORMS, element=name, value=value, sum=total, norm=TYPES[dtype.name])


def pack_source() -> str:
    """Return the source of `pack_rows`.

    Returns
    -------
    str
        As `scan_source` does, of rows of bytes, which are as long as `row_bytes` says::

            pack_rows(rows, packed, n_rows, row_bytes, panel_rows)
                `packed` of zeros, ceil(n_rows / panel_rows) * panel_rows * ceil(row_bytes / 128) * 128 bytes;
                `panel_rows`, of 32 bits, is a multiple of 8
    """
    return _source(PACK)


def halve_source() -> str:
    """Return the source of `halve`.

    Returns
    -------
    str
        As `scan_source` does::

            halve(rows, centre, scale, halves, norms, lost, n_rows, n_features, width)
                of float32; `scale` of one element, `halves` (n_rows, width) of float16
    """
    return _source(HALVE)
