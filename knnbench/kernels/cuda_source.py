"""The CUDA C++ source of the direct form, written for one way of accumulating and one dtype at a time.

It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and as C++ for the host.
The naive form is `knnbench.backends.python`.
"""

import string
from collections.abc import Callable
from typing import Any

from knnbench.metrics import Space, add_absolute, add_square, keep_largest

__all__ = [
    "ASYNC_COPIES",
    "EXPRESSIONS",
    "PAIR_THREADS",
    "SHARED_ADDRESS",
    "THREADS",
    "TILE",
    "TYPES",
    "WARP_SUMS",
    "direct_source",
]

THREADS = 16
"""Threads along each side of a block of `accumulate_block`."""

TILE = 64
"""Pairs along each side of the tile that such a block computes."""

PAIR_THREADS = 128
"""Threads a block of `accumulate_pairs`."""

EXPRESSIONS: dict[Callable[..., Any], str] = {
    add_square: "acc + (a - b) * (a - b)",
    add_absolute: "acc + absolute(a - b)",
    keep_largest: "larger(acc, accumulator(absolute(a - b)))",
}
"""The C++ of every scalar function of `knnbench.metrics` that works on differences."""

# Integers by size: what `long` holds differs between platforms. A uint8 takes part in arithmetic as an int, in which
# a square of differences fits, and the accumulator is the only one that may need 64 bits.
TYPES = {
    "uint8": "unsigned char",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float32": "float",
    "float64": "double",
}

WARP_SUMS = r"""
#ifdef __CUDACC__
template <typename T> __device__ T of_lane(T x, unsigned mask) { return __shfl_xor_sync(~0u, x, mask); }
#endif

template <typename T> __device__ T sum_of_warp(T x)
{
    #pragma unroll
    for (unsigned mask = 16; mask > 0; mask /= 2)
        x += of_lane(x, mask);
    return x;
}
"""
"""What all threads of a warp have together, in an order that is always the same; each thread is given it."""

SHARED_ADDRESS = r"""
#ifdef __CUDACC__
__device__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
#endif
"""

ASYNC_COPIES = r"""
#ifdef __CUDACC__
// Copies n_bytes of `size` and fills up with zeros. What is copied whole does not pass through the first-level cache.
template <u32 size> __device__ void copy_async(void* to, const void* from, u32 n_bytes)
{
    if (size == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(to)), "l"(from), "r"(n_bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(to)), "l"(from), "n"(size), "r"(n_bytes) : "memory");
}
__device__ void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 n_groups> __device__ void wait_for_all_but()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(n_groups) : "memory");
}
#endif
"""
"""Copies to shared memory that nobody waits for until they are needed; before it stand `SHARED_ADDRESS` and `u32`."""

SOURCE = string.Template(r"""
typedef $element element;
typedef $value value;
typedef $accumulator accumulator;
typedef long long size;

const int threads = $threads;
const int tile = $tile;
const int per_thread = tile / threads;
const int features = 16;

template <typename T> __device__ T absolute(T x) { return x < T(0) ? -x : x; }
template <typename T> __device__ T larger(T x, T y) { return x < y ? y : x; }

__device__ accumulator accumulate(accumulator acc, value a, value b) { return $expression; }

__device__ value feature(const element* rows, size n_rows, size n_features, size i, size f)
{
    // Two zeros past the ends add nothing, under any metric.
    return i < n_rows && f < n_features ? value(rows[i * n_features + f]) : value(0);
}

// out[i, j] from row i of queries and row j of corpus. A block computes a tile; both sides' rows pass through shared
// memory, and each thread keeps per_thread x per_thread accumulators in registers.
extern "C" __global__ void __launch_bounds__(threads * threads) accumulate_block(
    const element* queries, const element* corpus, accumulator* out, size n_queries, size n_corpus, size n_features)
{
    // A column more than is used: threads that store one row's features side by side then meet different banks.
    __shared__ value query_tile[features][tile + 1];
    __shared__ value corpus_tile[features][tile + 1];
    const int x = threadIdx.x, y = threadIdx.y;
    const size down = size(blockIdx.y) * tile, across = size(blockIdx.x) * tile;
    accumulator acc[per_thread][per_thread] = {};
    for (size start = 0; start < n_features; start += features) {
        for (int k = y * threads + x; k < tile * features; k += threads * threads) {
            const int i = k / features, f = k % features;
            query_tile[f][i] = feature(queries, n_queries, n_features, down + i, start + f);
            corpus_tile[f][i] = feature(corpus, n_corpus, n_features, across + i, start + f);
        }
        __syncthreads();
        for (int f = 0; f < features; ++f)
            for (int r = 0; r < per_thread; ++r)
                for (int c = 0; c < per_thread; ++c)
                    acc[r][c] = accumulate(acc[r][c], query_tile[f][y + r * threads], corpus_tile[f][x + c * threads]);
        __syncthreads();
    }
    for (int r = 0; r < per_thread; ++r)
        for (int c = 0; c < per_thread; ++c) {
            const size i = down + y + r * threads, j = across + x + c * threads;
            if (i < n_queries && j < n_corpus)
                out[i * n_corpus + j] = acc[r][c];
        }
}

// out[p] from row i[p] of queries and row j[p] of corpus, a thread for each.
extern "C" __global__ void __launch_bounds__($pair_threads) accumulate_pairs(
    const element* queries, const element* corpus, const size* i, const size* j, accumulator* out, size n_pairs,
    size n_features)
{
    const size p = size(blockIdx.x) * $pair_threads + threadIdx.x;
    if (p < n_pairs) {
        const element* a = queries + i[p] * n_features;
        const element* b = corpus + j[p] * n_features;
        accumulator acc = 0;
        #pragma unroll 4
        for (size f = 0; f < n_features; ++f)
            acc = accumulate(acc, value(a[f]), value(b[f]));
        out[p] = acc;
    }
}
""")


def direct_source(space: Space) -> str:
    """Return the source of `accumulate_block` and `accumulate_pairs` for a space.

    Parameters
    ----------
    space : Space
        Of a metric that works on differences (`Form.step`).

    Returns
    -------
    str
        CUDA C++17 without headers. Both kernels take C-contiguous rows and 64-bit sizes, in this order::

            accumulate_block(queries, corpus, out, n_queries, n_corpus, n_features)
                grid (ceil(n_corpus / TILE), ceil(n_queries / TILE)), block (THREADS, THREADS)
            accumulate_pairs(queries, corpus, i, j, out, n_pairs, n_features)
                grid (ceil(n_pairs / PAIR_THREADS),), block (PAIR_THREADS,)
    """
    return SOURCE.substitute(
        element=TYPES[space.dtype.name],
        value="int" if space.is_integer else TYPES[space.dtype.name],
        accumulator=TYPES[space.accumulator.name],
        expression=EXPRESSIONS[space.form.accumulate],
        threads=THREADS,
        tile=TILE,
        pair_threads=PAIR_THREADS,
    )
