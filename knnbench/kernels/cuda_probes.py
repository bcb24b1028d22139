"""The CUDA C++ source of loops of one instruction each, which show how fast a GPU can execute it.

It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and count the instructions.
"""

import string

__all__ = ["BLOCKS", "CHAINS", "READ_THREADS", "STEPS", "THREADS", "WORD_BYTES", "chain_source", "read_source"]

THREADS = 256
"""Threads a block."""

BLOCKS = 48
"""Blocks for each multiprocessor: whole rounds of the 4, 6 or 8 that it holds at once, so that none is idle at the end.

See the CUDA C++ Programming Guide, technical specifications per compute capability: 1024, 1536 or 2048 threads.
"""

CHAINS = 8
"""Independent chains a thread: with all the threads that a multiprocessor holds, many times its latency."""

STEPS = 16
"""Steps of each chain an iteration, so that counting iterations takes little of the time."""

READ_THREADS = 512
"""Threads a block of `read_words`."""

WORD_BYTES = 16
"""Bytes of a load of `read_words`."""

# Each chain depends on its last value by an operation on floats, which may not be reordered: the compiler can neither
# shorten it nor merge it with another, whose first value differs. The sum is stored under a condition that only the
# values can decide; `start` and the others are arguments because constants would be folded.
CHAIN_SOURCE = string.Template(r"""
extern "C" __global__ void __launch_bounds__($threads) add_chains(
    $type* out, $type start, $type factor, $type term, int iterations)
{
    $type x[$chains];
    for (int c = 0; c < $chains; ++c)
        x[c] = start + $type(c + threadIdx.x);
    for (int i = 0; i < iterations; ++i)
        #pragma unroll
        for (int step = 0; step < $steps; ++step)
            #pragma unroll
            for (int c = 0; c < $chains; ++c)
                x[c] = x[c] + term;
    $type sum = 0;
    for (int c = 0; c < $chains; ++c)
        sum += x[c];
    if (sum == factor)
        out[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__($threads) fma_chains(
    $type* out, $type start, $type factor, $type term, int iterations)
{
    $type x[$chains];
    for (int c = 0; c < $chains; ++c)
        x[c] = start + $type(c + threadIdx.x);
    for (int i = 0; i < iterations; ++i)
        #pragma unroll
        for (int step = 0; step < $steps; ++step)
            #pragma unroll
            for (int c = 0; c < $chains; ++c)
                x[c] = $fma(x[c], factor, term);
    $type sum = 0;
    for (int c = 0; c < $chains; ++c)
        sum += x[c];
    if (sum == factor)
        out[blockIdx.x] = sum;
}
""")

READ_SOURCE = string.Template(r"""
// Reads all words, which are zero; a thread that finds another stores it.
extern "C" __global__ void __launch_bounds__($read_threads) read_words(
    const uint4* words, unsigned int* out, long long n_words)
{
    const long long step = (long long)gridDim.x * $read_threads;
    unsigned int found = 0;
    #pragma unroll 8
    for (long long i = (long long)blockIdx.x * $read_threads + threadIdx.x; i < n_words; i += step) {
        const uint4 word = words[i];
        found |= word.x | word.y | word.z | word.w;
    }
    if (found)
        out[0] = found;
}
""")


def chain_source(dtype: str) -> str:
    """Return the source of `add_chains` and `fma_chains` for float32 or float64.

    Parameters
    ----------
    dtype : str

    Returns
    -------
    str
        CUDA C++17 without headers::

            add_chains(out, start, factor, term, iterations)    x = x + term
            fma_chains(out, start, factor, term, iterations)    x = factor * x + term
                grid (blocks,), block (THREADS,); out holds an element for each block

        An iteration is STEPS * CHAINS operations a thread.
    """
    kind, fma = {"float32": ("float", "__fmaf_rn"), "float64": ("double", "__fma_rn")}[dtype]
    return CHAIN_SOURCE.substitute(type=kind, fma=fma, threads=THREADS, chains=CHAINS, steps=STEPS)


def read_source() -> str:
    """Return the source of ``read_words(words, out, n_words)``: grid (blocks,), block (READ_THREADS,)."""
    return READ_SOURCE.substitute(read_threads=READ_THREADS)
