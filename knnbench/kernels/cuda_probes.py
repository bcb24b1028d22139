"""The CUDA C++ source of loops of one instruction each, which show how fast a GPU can execute it.

It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and count the instructions.
"""

import string
from dataclasses import dataclass

__all__ = [
    "BLOCKS",
    "CHAINS",
    "INSTRUCTIONS",
    "READ_THREADS",
    "STEPS",
    "THREADS",
    "WORD_BYTES",
    "Instruction",
    "chain_source",
    "instruction_source",
    "read_source",
]

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


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction of PTX that adds to what it has summed.

    Attributes
    ----------
    ptx : str
        With ``$x`` in the place of what it has summed, ``$a`` and ``$b`` of what it multiplies or compares.
    sums : str
        The C++ type of a sum.
    n_sums, n_a, n_b : int
        32-bit registers of each for a thread.
    elements : int
        That it treats a thread, on average: those of a matrix unit are the work of a warp.
    """

    ptx: str
    sums: str
    n_sums: int
    n_a: int
    n_b: int
    elements: int


INSTRUCTIONS: dict[str, Instruction] = {
    "sad_uint8": Instruction("vabsdiff4.u32.u32.u32.add $x, $a, $b, $x;", "unsigned int", 1, 1, 1, 4),
    "dot_uint8": Instruction("dp4a.u32.u32 $x, $a, $b, $x;", "unsigned int", 1, 1, 1, 4),
    "matrix_int8": Instruction(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$x}, {$a}, {$b}, {$x};", "int", 4, 4, 2, 16 * 8 * 32 // 32
    ),
    "matrix_bfloat16": Instruction(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$x}, {$a}, {$b}, {$x};",
        "float",
        4,
        4,
        2,
        16 * 8 * 16 // 32,
    ),
}
"""Those that a kernel's distances may be made of, by name; see the PTX ISA for what each does."""

# The compiler does not look into the instruction, and each is given what the last one of its chain summed: it can
# leave none out. Two instructions of equal operands but for the sums are not the same to it.
INSTRUCTION_SOURCE = string.Template(r"""
extern "C" __global__ void __launch_bounds__($threads) $name(
    $sums* out, $sums start, unsigned int a, unsigned int b, int iterations)
{
    $sums x[$chains][$n_sums];
    for (int c = 0; c < $chains; ++c)
        for (int r = 0; r < $n_sums; ++r)
            x[c][r] = start + ($sums)(c + r + threadIdx.x);
    for (int i = 0; i < iterations; ++i)
        #pragma unroll
        for (int step = 0; step < $steps; ++step)
            #pragma unroll
            for (int c = 0; c < $chains; ++c)
                asm("$ptx" : $outputs : $inputs);
    $sums sum = 0;
    for (int c = 0; c < $chains; ++c)
        for (int r = 0; r < $n_sums; ++r)
            sum += x[c][r];
    if (sum == start)
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


def instruction_source(name: str) -> str:
    """Return the source of a loop of one of `INSTRUCTIONS`.

    Parameters
    ----------
    name : str

    Returns
    -------
    str
        CUDA C++17 without headers::

            NAME(out, start, a, b, iterations)    x = instruction(a, b) + x
                grid (blocks,), block (THREADS,); out holds a sum for each block

        `a` and `b` fill the registers of what is multiplied or compared. An iteration is STEPS * CHAINS instructions a
        thread.
    """
    made = INSTRUCTIONS[name]
    registers = [f"%{number}" for number in range(made.n_sums + made.n_a + made.n_b)]
    groups = registers[: made.n_sums], registers[made.n_sums : -made.n_b], registers[-made.n_b :]
    ptx = string.Template(made.ptx).substitute(dict(zip("xab", (", ".join(group) for group in groups), strict=True)))
    constraint = "f" if made.sums == "float" else "r"
    return INSTRUCTION_SOURCE.substitute(
        name=name,
        ptx=ptx,
        sums=made.sums,
        n_sums=made.n_sums,
        outputs=", ".join(f'"+{constraint}"(x[c][{r}])' for r in range(made.n_sums)),
        inputs=", ".join(['"r"(a)'] * made.n_a + ['"r"(b)'] * made.n_b),
        threads=THREADS,
        chains=CHAINS,
        steps=STEPS,
    )


def read_source() -> str:
    """Return the source of ``read_words(words, out, n_words)``: grid (blocks,), block (READ_THREADS,)."""
    return READ_SOURCE.substitute(read_threads=READ_THREADS)
