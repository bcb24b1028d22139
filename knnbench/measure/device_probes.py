"""Probes of a CUDA device: how fast it can be reached, read, add and multiply at best.

Each function takes the number of host threads, which changes nothing, and the seconds to fill, and returns
operations, or bytes, a second by the device's own clock.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from knnbench.dtypes import Array
from knnbench.errors import BackendUnavailableError, OverBudgetError
from knnbench.kernels.cuda_probes import (
    BLOCKS,
    CHAINS,
    INSTRUCTIONS,
    READ_THREADS,
    STEPS,
    THREADS,
    WORD_BYTES,
    chain_source,
    instruction_source,
    read_source,
)
from knnbench.measure.host_probes import LEAST_ROWS, MEMORY_SHARE, Rounds, growing_products, stream_bytes

__all__ = [
    "add_float32",
    "add_float64",
    "copy_in",
    "copy_out",
    "dot_uint8",
    "fma_float32",
    "fma_float64",
    "gemm_bfloat16",
    "gemm_float16",
    "gemm_float32",
    "gemm_float64",
    "gemm_int8",
    "matrix_bfloat16",
    "matrix_int8",
    "read",
    "sad_uint8",
]

# Large enough that starting a copy takes little of its time.
COPIED_BYTES = 1 << 28

# Rows and columns of the largest matrices that are multiplied.
MOST_ROWS = 16_384

# cudaDataType, in the toolkit's library_types.h.
CUDA_R_32F, CUDA_R_8I, CUDA_R_32I, CUDA_R_16BF = 0, 3, 10, 14


def best_rate(call: Callable[[int], Any], amount: float, seconds: float) -> float:
    """Return the best rate of calls that are put on the current stream.

    Parameters
    ----------
    call : callable
        Takes the number of calls, and need not wait for them.
    amount : float
        Operations or bytes of one call.
    seconds : float

    Returns
    -------
    float
        Operations or bytes a second.
    """
    call(1)
    rounds = Rounds(amount, seconds)
    while not rounds.done:
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call(rounds.calls)
        stop.record()
        stop.synchronize()
        rounds.take(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
    return rounds.best


def _repeated(call: Callable[[], Any]) -> Callable[[int], None]:
    def calls(n: int) -> None:
        for _ in range(n):
            call()

    return calls


def _free_bytes() -> int:
    cupy.get_default_memory_pool().free_all_blocks()  # what an earlier probe held
    free, _ = cupy.cuda.Device().mem_info
    return int(free)


def _pinned() -> Array:
    """Return page-locked host memory, written once."""
    host = np.frombuffer(cupy.cuda.alloc_pinned_memory(COPIED_BYTES), np.uint8, COPIED_BYTES)
    host[:] = 0
    return host


def copy_in(threads: int, seconds: float) -> float:
    """Return bytes a second from page-locked host memory to the device."""
    host, device = _pinned(), cupy.empty(COPIED_BYTES, np.uint8)
    stream = cupy.cuda.get_current_stream()
    copy = _repeated(lambda: device.data.copy_from_host_async(host.ctypes.data, COPIED_BYTES, stream))
    return best_rate(copy, COPIED_BYTES, seconds)


def copy_out(threads: int, seconds: float) -> float:
    """Return bytes a second from the device to page-locked host memory."""
    host, device = _pinned(), cupy.zeros(COPIED_BYTES, np.uint8)
    stream = cupy.cuda.get_current_stream()
    copy = _repeated(lambda: device.data.copy_to_host_async(host.ctypes.data, COPIED_BYTES, stream))
    return best_rate(copy, COPIED_BYTES, seconds)


def read(threads: int, seconds: float) -> float:
    """Return bytes a second read from the device's memory."""
    attributes = cupy.cuda.Device().attributes
    n_words = stream_bytes(attributes["L2CacheSize"], _free_bytes()) // WORD_BYTES
    words, out = cupy.zeros(n_words * WORD_BYTES, np.uint8), cupy.zeros(1, np.uint32)
    kernel = _module(read_source()).get_function("read_words")
    grid = (BLOCKS * attributes["MultiProcessorCount"],)
    call = _repeated(lambda: kernel(grid, (READ_THREADS,), (words, out, np.int64(n_words))))
    return best_rate(call, n_words * WORD_BYTES, seconds)


@functools.cache
def _module(source: str) -> Any:
    return cupy.RawModule(code=source, options=("--std=c++17",))


def _chains(name: str, dtype: type[np.floating[Any]], factor: float, term: float, seconds: float) -> float:
    blocks = BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
    kernel = _module(chain_source(np.dtype(dtype).name)).get_function(name)
    out = cupy.zeros(blocks, dtype)
    given = out, dtype(0), dtype(factor), dtype(term)
    amount = blocks * THREADS * CHAINS * STEPS
    return best_rate(lambda n: kernel((blocks,), (THREADS,), (*given, np.int32(n))), amount, seconds)


def add_float32(threads: int, seconds: float) -> float:
    """Return additions of float32 a second."""
    return _chains("add_chains", np.float32, -1.0, 1e-3, seconds)


def add_float64(threads: int, seconds: float) -> float:
    """Return additions of float64 a second."""
    return _chains("add_chains", np.float64, -1.0, 1e-3, seconds)


def fma_float32(threads: int, seconds: float) -> float:
    """Return fused multiply-adds of float32 a second, each counted as one."""
    return _chains("fma_chains", np.float32, 0.5, 0.5, seconds)


def fma_float64(threads: int, seconds: float) -> float:
    """Return fused multiply-adds of float64 a second, each counted as one."""
    return _chains("fma_chains", np.float64, 0.5, 0.5, seconds)


def _instructions(name: str, a: int, b: int, seconds: float) -> float:
    made = INSTRUCTIONS[name]
    blocks = BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
    kernel = _module(instruction_source(name)).get_function(name)
    kind: Any = {"unsigned int": np.uint32, "int": np.int32, "float": np.float32}[made.sums]
    given = cupy.zeros(blocks, kind), kind(0), np.uint32(a), np.uint32(b)
    amount = blocks * THREADS * CHAINS * STEPS * made.elements
    return best_rate(lambda n: kernel((blocks,), (THREADS,), (*given, np.int32(n))), amount, seconds)


def sad_uint8(threads: int, seconds: float) -> float:
    """Return absolute differences of uint8 a second, summed by four (VABSDIFF4)."""
    return _instructions("sad_uint8", 0x01020304, 0x04030201, seconds)


def dot_uint8(threads: int, seconds: float) -> float:
    """Return multiply-adds of uint8 a second, summed by four (IDP.4A)."""
    return _instructions("dot_uint8", 0x01020304, 0x04030201, seconds)


def matrix_int8(threads: int, seconds: float) -> float:
    """Return multiply-adds of int8 a second of the tensor cores by ``mma.sync`` (IMMA)."""
    return _instructions("matrix_int8", 0x01020304, 0x04030201, seconds)


def matrix_bfloat16(threads: int, seconds: float) -> float:
    """Return multiply-adds of bfloat16 a second of the tensor cores by ``mma.sync`` (HMMA), with sums in float32."""
    return _instructions("matrix_bfloat16", 0x3F803F80, 0x3F803F80, seconds)  # ones


def _gemm_ex(
    ones: tuple[type[np.generic], int], sums: type[np.generic], kinds: tuple[int, int], compute: int, seconds: float
) -> float:
    """Return the rate of a product of which cuBLAS alone knows the dtypes.

    Parameters
    ----------
    ones : (dtype, int)
        Of equal size as an element, and the one of these numbers.
    sums : dtype
    kinds : (int, int)
        ``cudaDataType`` of the elements and of the sums.
    compute : int
        ``cublasComputeType_t``.
    seconds : float
    """
    cublas, (dtype, one) = cupy.cuda.cublas, ones
    per_element = 2 * np.dtype(dtype).itemsize + np.dtype(sums).itemsize
    alpha, beta = np.ones(1, sums), np.zeros(1, sums)

    def call(n: int) -> Callable[[], Any]:
        a, b, c = cupy.full((n, n), one, dtype), cupy.full((n, n), one, dtype), cupy.empty((n, n), sums)
        # A transposed and B not: the only form that cuBLAS has on tensor cores for int8.
        given = (cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, n, n, alpha.ctypes.data, a.data.ptr, kinds[0], n,
                 b.data.ptr, kinds[0], n, beta.ctypes.data, c.data.ptr, kinds[1], n, compute,
                 cublas.CUBLAS_GEMM_DEFAULT)  # fmt: skip
        handle = cupy.cuda.device.get_cublas_handle()
        return lambda: (cublas.gemmEx(handle, *given), a, b, c)

    return _growing(call, per_element, seconds)


def gemm_int8(threads: int, seconds: float) -> float:
    """Return multiply-adds of int8 a second in a matrix product of cuBLAS, which sums in int32."""
    return _gemm_ex((np.int8, 1), np.int32, (CUDA_R_8I, CUDA_R_32I), cupy.cuda.cublas.CUBLAS_COMPUTE_32I, seconds)


def gemm_bfloat16(threads: int, seconds: float) -> float:
    """Return multiply-adds of bfloat16 a second in a matrix product of cuBLAS, which sums in float32."""
    ones = np.uint16, 0x3F80  # numpy has no such dtype
    return _gemm_ex(ones, np.float32, (CUDA_R_16BF, CUDA_R_32F), cupy.cuda.cublas.CUBLAS_COMPUTE_32F, seconds)


def _growing(call: Callable[[int], Callable[[], Any]], per_element: int, seconds: float) -> float:
    """Return the best rate of products of n x n matrices, `call(n)` being one that is ready."""
    most = min(MOST_ROWS, int((_free_bytes() / MEMORY_SHARE / per_element) ** 0.5))
    if most < LEAST_ROWS:
        raise OverBudgetError(f"the device has no memory left for matrices of {LEAST_ROWS} x {LEAST_ROWS}")

    def product_rate(n: int) -> tuple[float, float]:
        rate = best_rate(_repeated(call(n)), float(n) ** 3, seconds / 2)
        return rate, n**3 / rate

    return growing_products(product_rate, seconds, most)


def _gemm(dtype: type[np.floating[Any]], seconds: float) -> float:
    if os.environ.get("CUPY_TF32", "0") != "0":
        raise BackendUnavailableError("$CUPY_TF32 lets cuBLAS round float32 to 11 bits; unset it")

    def call(n: int) -> Callable[[], Any]:
        # Equal numbers take less power, and so are multiplied at a higher clock than others.
        a, b = cupy.ones((n, n), dtype), cupy.ones((n, n), dtype)
        return lambda: cupy.matmul(a, b)

    return _growing(call, 4 * np.dtype(dtype).itemsize, seconds)


def gemm_float16(threads: int, seconds: float) -> float:
    """Return multiply-adds of float16 a second in a matrix product of cuBLAS, which sums in float32."""
    return _gemm(np.float16, seconds)


def gemm_float32(threads: int, seconds: float) -> float:
    """Return multiply-adds of float32 a second in a matrix product of cuBLAS."""
    return _gemm(np.float32, seconds)


def gemm_float64(threads: int, seconds: float) -> float:
    """Return multiply-adds of float64 a second in a matrix product of cuBLAS."""
    return _gemm(np.float64, seconds)
