"""The CUDA C++ source of the fused search: values in tiles, of which only what may be among the k nearest is written.

A block of threads holds some queries and goes through a part of the corpus, a tile of rows at a time. Slices of both
sides come to shared memory by asynchronous copies, some slices ahead; every thread accumulates several rows by
several columns in registers. Of a finished tile, a value below the k-th of its query goes to a list in memory, which a
thread for each query then takes into a heap. The expected number of those is ``k (1 + ln(n / k))`` of n rows, so what
decides is the accumulation:

==================  ======================  ==================================================================
rows, form          instruction             why
==================  ======================  ==================================================================
uint8, products     IMMA                    exact in int32, and 16 to 30 times the rate of float32
uint8, absolutes    VABSDIFF4.U8.ACC        four differences, their signs and their sum in one
uint8, largest      VABSDIFF4, VIMNMX3      four differences, compared by halves of a word
float32, halves     HMMA                     products of rows rounded to float16 only choose candidates: what
                                            rounding took from each row is measured, and bounds the error
float32, products   FFMA                    where nothing may rest on how tensor cores were measured to round, as they
                                            do by rules that are not published; a matrix of cuBLAS would cost as
                                            many products and be written and read once more
floats, direct      FADD, FADD or FFMA      the same operations as the naive form
==================  ======================  ==================================================================

Tensor cores can be given the work of four warps at once (``wgmma``) on devices of compute capability 9.0, and then read
shared memory for themselves: by one warp's instructions they work a third of the time (uint8, H100). That search is
emulated and compiled; as no device has run it, who wants it asks for it (`knnbench.backends.cupy`).

Products of float64 have no kernel here: cuBLAS computes them on tensor cores at twice the rate of DFMA.

It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and as C++ for the host. The naive
form is `knnbench.backends.python`.

References
----------
.. [1] NVIDIA, Parallel Thread Execution ISA, sections on mma.m16n8k32, wgmma, ldmatrix, cp.async and vabsdiff4.
"""

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnbench.metrics import Space, add_absolute, dot_itself, keep_largest, squares_from_dot

from .cuda_source import ASYNC_COPIES, EXPRESSIONS, SHARED_ADDRESS, TYPES, WARP_SUMS

__all__ = [
    "AGAIN_THREADS",
    "CHUNK",
    "LARGEST_K",
    "MERGED",
    "MOST_ROWS",
    "PANEL_ROWS",
    "Search",
    "Tile",
    "merge_shape",
    "panels_shape",
    "parts_of",
    "recompute_source",
    "search_of",
]

MOST_ROWS = 1 << 31
"""Rows of the corpus at the most: their numbers have 32 bits."""

LARGEST_K = 1040
"""Neighbours beyond which the heaps, a thread for each query, take longer than what they save: 1,024, and some that a
search by products keeps to compute them again."""

MERGED = 8192
"""Neighbours of one query, in lists of parts of the corpus, that `merge` joins: they lie in shared memory."""

MERGE_THREADS = 512
"""Threads a block of `merge` at the most."""

PANEL_ROWS = 128
"""Rows that are packed together for tensor cores that read shared memory themselves."""

AGAIN_THREADS = 128
"""Threads a block of `recompute`."""

CHUNK = 16
"""Bytes of a load. Rows whose length is no multiple are copied to shared memory in smaller pieces."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of threads computes at once.

    Attributes
    ----------
    warps : (int, int)
        Along the queries and along the corpus.
    per_thread : (int, int)
        Values along both that a thread accumulates.
    stages : int
        Slices in shared memory, of which one is computed with.
    blocks : int
        Blocks that share a multiprocessor, which limits the registers of a thread.
    slice_bytes : int
        Of a row, that pass through shared memory at a time.
    in_groups : bool
        Whether tensor cores are given the work of four warps at once (``wgmma``), and read shared memory themselves.
    """

    warps: tuple[int, int]
    per_thread: tuple[int, int]
    stages: int
    blocks: int
    slice_bytes: int = 64
    in_groups: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps[0] * self.warps[1]


# On one side of a multiplication by tensor cores stand 16 rows and on the other 8, of which a thread of the warp gets
# 2 by 2; without them the 32 threads stand 4 by 8.
TENSOR_LANES = 8, 4
LANES = 4, 8

# Warps of 32 x 64: 16 multiplications for 6 loads of matrices. Of 11 shapes measured on an H100 it is the fastest or
# next to it: 2.0 ms on MNIST's bytes, against 2.2 with warps of 64 x 64, one block a multiprocessor and less to read.
TENSOR_TILE = Tile(warps=(4, 2), per_thread=(4, 16), stages=2, blocks=2, slice_bytes=128)

# Four warps have 64 x 256. Of the stages one is multiplied, one may still be, and two are on their way.
GROUP_TILE = Tile(warps=(8, 1), per_thread=(2, 64), stages=4, blocks=1, slice_bytes=128, in_groups=True)

# Shared memory gives a multiprocessor 128 bytes a clock, which is 4 clocks for a load of 16 bytes by each thread of a
# warp. SAD takes 2 clocks of a quarter of a multiprocessor, and FFMA one: 16 loads for 256 SAD, and 24 for 512 FFMA,
# take half and three quarters of that. With 8 by 8 in float32, shared memory would set the pace.
TILES = {
    "uint8": Tile(warps=(4, 2), per_thread=(8, 8), stages=2, blocks=2, slice_bytes=128),
    "float32": Tile(warps=(4, 2), per_thread=(8, 16), stages=3, blocks=1),
    "float64": Tile(warps=(4, 2), per_thread=(8, 8), stages=3, blocks=1),
}

# For a few queries memory sets the pace, whatever is computed: 8 of them by 256 rows of the corpus.
FEW_QUERIES = 8
FEW_TILE = Tile(warps=(1, 8), per_thread=(2, 4), stages=3, blocks=2)

# Tiles whose candidates a list has room for. Between two visits to the heaps, whose threads wait for memory while all
# others wait for them, the bounds stand still: that lets a few more candidates pass.
ROOM_TILES = 4

# Tiles of which one more goes by between visits for each that many have gone: bounds hardly change by then.
TILES_A_VISIT = 8

# Tiles in whose time the lists of a part of the corpus are started and a first bound is found: of the first, everything
# is listed.
STARTING_TILES = 4

COMMON = string.Template(r"""
typedef unsigned char byte;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef $key key;

const u32 chunk_bytes = 16;
const key no_key = ~key(0);
const u32 no_row = ~u32(0);

__device__ u32 bits(float x) { union { float value; u32 bits; } both; both.value = x; return both.bits; }
__device__ u64 bits(double x) { union { double value; u64 bits; } both; both.value = x; return both.bits; }
__device__ float float_of(u32 x) { union { u32 bits; float value; } both; both.bits = x; return both.value; }
__device__ double double_of(u64 x) { union { u64 bits; double value; } both; both.bits = x; return both.value; }

// An unsigned integer in the order of the values, which are not negative but for a rounding of cosines; NaN, of
// whatever sign, is the largest but for no_key.
const u64 sign = u64(1) << 63;
__device__ u32 ordered(u32 x) { return x; }
__device__ u32 ordered(int x) { return u32(x); }
__device__ u32 ordered(float x) { return bits(x) & 0x7fffffff; }
__device__ u64 ordered(double x) { return x < 0 ? ~bits(x) : (bits(x) | sign); }

__device__ void restore(u32 x, int& value) { value = int(x); }
__device__ void restore(u32 x, float& value) { value = float_of(x); }
__device__ void restore(u64 x, double& value) { value = double_of(x & sign ? x ^ sign : ~x); }

// One instruction in float32, unlike what compares with NaN as C++ does.
template <typename T> __device__ T smaller(T x, T y) { return y < x ? y : x; }
template <typename T> __device__ T larger(T x, T y) { return x < y ? y : x; }
__device__ float smaller(float x, float y) { return fminf(x, y); }
__device__ float larger(float x, float y) { return fmaxf(x, y); }

__device__ bool before(key a, u32 row_a, key b, u32 row_b) { return a < b || (a == b && row_a < row_b); }
""")

SEARCH = string.Template(r"""
typedef $accumulator accumulator;
typedef $column column_value;
typedef $norm norm_value;

const u32 warps_down = $warps_down, warps_across = $warps_across;
const u32 threads = 32 * warps_down * warps_across;
const u32 down = $down, across = $across;
const u32 tile_queries = warps_down * $lanes_down * down, tile_corpus = warps_across * $lanes_across * across;
const u32 slice_chunks = $slice_bytes / chunk_bytes;
const u32 n_stages = $stages;
const u32 copy_bytes = $copy_bytes;
const bool uses_norms = $uses_norms;
const u32 room = $room_tiles * tile_corpus;


$shared_address$copying$intrinsics
$lanes
$ranking
struct Shared {
    Stage stages[n_stages];
    Feed feed;
    bound bounds[tile_queries];
    norm_value norms[tile_queries];
    u32 counts[tile_queries];
};
static_assert(sizeof(Shared) <= $shared_bytes, "more shared memory than is asked for");
static_assert(tile_queries <= threads, "a query without a thread");
static_assert(tile_corpus <= threads, "a column without a thread");

// Puts a pair in the place of the largest of a heap, whose elements are `stride` apart.
__device__ void replace_largest(key* keys, u32* rows, u32 stride, u32 size, key value, u32 row)
{
    u32 hole = 0;
    for (u32 child = 1; child < size; child = 2 * hole + 1) {
        key largest = keys[size_t(child) * stride];
        u32 its_row = rows[size_t(child) * stride];
        if (child + 1 < size) {
            const key other = keys[size_t(child + 1) * stride];
            const u32 other_row = rows[size_t(child + 1) * stride];
            if (before(largest, its_row, other, other_row)) {
                largest = other, its_row = other_row;
                ++child;
            }
        }
        if (!before(value, row, largest, its_row))
            break;
        keys[size_t(hole) * stride] = largest;
        rows[size_t(hole) * stride] = its_row;
        hole = child;
    }
    keys[size_t(hole) * stride] = value;
    rows[size_t(hole) * stride] = row;
}

// The k nearest of a part of the corpus to each query, as a heap. Element e of the list of query i and part p lies at
// (p * (k + room) + e) * n_queries + i: first the heap, then room for what some tiles add.
extern "C" __global__ void __launch_bounds__(threads, $blocks) search(
    const byte* queries, const byte* corpus, const norm_value* query_norms, const norm_value* corpus_norms,
    const column_value* columns, key* keys, u32* rows, u32 n_queries, u32 n_corpus, u32 row_bytes, u32 part_rows, u32 k)
{
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>($memory);
    const u32 thread = threadIdx.x;
    const u32 first_query = blockIdx.x * tile_queries, first_row = blockIdx.y * part_rows;
    const u32 end_row = n_corpus - first_row < part_rows ? n_corpus : first_row + part_rows;
    const u32 n_tiles = (end_row - first_row + tile_corpus - 1) / tile_corpus;
    const u32 chunks = (row_bytes + chunk_bytes - 1) / chunk_bytes;
    const u32 n_slices = (chunks + slice_chunks - 1) / slice_chunks;

    const size_t lists = size_t(blockIdx.y) * (k + room) * n_queries + first_query;
    keys += lists;
    rows += lists;
    const bool has_query = thread < tile_queries && first_query + thread < n_queries;
    if (thread < tile_queries) {
        shared.counts[thread] = 0;
        shared.bounds[thread] = has_query ? everything : nothing;
        if (uses_norms)
            shared.norms[thread] = has_query ? query_norms[first_query + thread] : norm_value(0);
    }
    if (has_query)
        for (u32 e = 0; e < k; ++e) {
            keys[size_t(e) * n_queries + thread] = no_key;
            rows[size_t(e) * n_queries + thread] = no_row;
        }

$copy_next
    for (u32 s = 0; s + 1 + lag < n_stages; ++s)
        copy_next(shared.stages[s]);
    u32 current = n_stages - 1, visit = 0;
    for (u32 tile = 0; tile < n_tiles; ++tile) {
        accumulator acc[down][across] = {};
        for (u32 chunk = 0; chunk < chunks; chunk += slice_chunks) {
            $before
            Stage& freed = shared.stages[lag == 0 ? current : current == 0 ? n_stages - 1 : current - 1];
            current = current + 1 == n_stages ? 0 : current + 1;
            copy_next(freed);
            $after
            accumulate(acc, shared.stages[current], chunks - chunk);
        }
        finish(acc);
        const u32 first = first_row + tile * tile_corpus;
        {
            column_value of[across];
            #pragma unroll
            for (u32 c = 0; c < across; ++c)
                of[c] = uses_norms ? shared.stages[current].columns[corpus_of(c)] : column_value(0);
            #pragma unroll
            for (u32 r = 0; r < down; ++r) {
                const u32 i = query_of(r);
                const bound limit = shared.bounds[i];
                const norm_value own = uses_norms ? shared.norms[i] : norm_value(0);
                estimate least = estimated(acc[r][0], of[0]);
                #pragma unroll
                for (u32 c = 1; c < across; ++c)
                    least = smaller(least, estimated(acc[r][c], of[c]));
                // One test for the row: hardly any passes.
                if (is_within(least, limit, own)) {
                    #pragma unroll
                    for (u32 c = 0; c < across; ++c) {
                        const u32 j = corpus_of(c);
                        const estimate value = estimated(acc[r][c], of[c]);
                        if (j < end_row - first && is_within(value, limit, own)) {
                            const u32 place = k + atomicAdd(&shared.counts[i], 1u);
                            keys[size_t(place) * n_queries + i] = listed(acc[r][c], value, own);
                            rows[size_t(place) * n_queries + i] = first + j;
                        }
                    }
                }
            }
        }
        if (tile < visit && tile + 1 < n_tiles)
            continue;
        visit = tile + 1 + smaller(tile / $tiles_a_visit, u32($room_tiles - 1));
        __syncthreads();
        if (has_query && shared.counts[thread]) {
            const u32 n = shared.counts[thread];
            const norm_value own = uses_norms ? shared.norms[thread] : norm_value(0);
            key* const heap = keys + thread;
            u32* const heap_rows = rows + thread;
            for (u32 e = k; e < k + n; ++e) {
                const u32 row = heap_rows[size_t(e) * n_queries];
                const key value = ranked(heap[size_t(e) * n_queries], own, corpus_norms, row);
                if (before(value, row, heap[0], heap_rows[0]))
                    replace_largest(heap, heap_rows, n_queries, k, value, row);
            }
            shared.counts[thread] = 0;
            if (heap[0] != no_key)
                shared.bounds[thread] = bound_of(heap[0], own);
        }
    }
}
""")


@dataclass(frozen=True, slots=True)
class Feed:
    """How slices come to shared memory, in C++.

    Attributes
    ----------
    copying : str
        `Stage`, and functions that start copies.
    copy_next : str
        Defines what starts to copy the next slice to a stage.
    before, after : str
        What is done before the next copy is started, when all threads have left the stage that it goes to; and after,
        so that the current stage has what it should.
    alignment : int
        Of a stage, in bytes.
    """

    copying: str
    copy_next: str
    before: str
    after: str = ""
    alignment: int = CHUNK


# Each thread copies chunks.
COPIES = string.Template(r"""
// A row takes an odd number of chunks, so that 8 threads who load a chunk each of 8 rows meet different banks.
const u32 row_stride = (slice_chunks | 1) * chunk_bytes;

// Stages that may still be read when the next is begun with.
const u32 lag = 0;

$async_copies
struct Stage {
    alignas(16) byte queries[tile_queries][row_stride];
    alignas(16) byte corpus[tile_corpus][row_stride];
    alignas(16) column_value columns[tile_corpus];
};
struct Feed {};

// Starts to copy a slice of some rows, of which n_left are there, from byte `start` on; zeros stand for the others and
// for what lies past the ends of rows.
template <u32 n> __device__ void copy_slice(byte (&to)[n][row_stride], const byte* from, u32 n_left, u32 start,
                                            u32 row_bytes)
{
    const u32 step = threads / slice_chunks;
    static_assert(threads % slice_chunks == 0, "a thread copies the same chunk of several rows");
    const u32 first = threadIdx.x / slice_chunks, offset = threadIdx.x % slice_chunks * chunk_bytes;
    // In 32 bits, but for the sum with the address.
    const u32 place = first * row_bytes + offset;
    from += start;
    // Of small copies there are so many that their addresses would hold registers that sums need.
    #pragma unroll (copy_bytes == 4 ? 1 : n)
    for (u32 row = 0; row < n; row += step) {
        if (n % step && first + row >= n)
            break;
        #pragma unroll
        for (u32 part = 0; part < chunk_bytes; part += copy_bytes) {
            const bool is_there = first + row < n_left && start + offset + part < row_bytes;
            copy_async<copy_bytes>(&to[first + row][offset + part], from + (place + row * row_bytes + part),
                                   is_there ? copy_bytes : 0);
        }
    }
}
""")

FEEDING = r"""
    const byte* const query_rows = queries + u64(first_query) * row_bytes;
    const byte* next_rows = corpus + u64(first_row) * row_bytes;
    u32 next_first = first_row, next_slice = 0;
    auto copy_next = [&](Stage& stage) {
        if (next_first < end_row) {
            const u32 start = next_slice * slice_chunks * chunk_bytes;
            copy_slice(stage.queries, query_rows, n_queries - first_query, start, row_bytes);
            copy_slice(stage.corpus, next_rows, end_row - next_first, start, row_bytes);
            if (++next_slice == n_slices) {
                if (uses_norms && thread < tile_corpus)
                    copy_async<sizeof(column_value)>(&stage.columns[thread], columns + next_first + thread,
                                                     thread < end_row - next_first ? sizeof(column_value) : 0);
                next_slice = 0;
                next_first += tile_corpus;
                next_rows += u64(tile_corpus) * row_bytes;
            }
        }
        end_of_group();
    };
"""
COPIES_BY_THREADS = Feed(
    copying=COPIES.substitute(async_copies=ASYNC_COPIES),
    copy_next=FEEDING,
    before="wait_for_all_but<n_stages - 2>();\n            __syncthreads();",
)

# Slices come whole, as one copy each of the rows of a panel that were packed for it: see `cuda_row_source.pack_source`.
PANEL_COPIES = string.Template(r"""
const u32 panel_rows = $panel_rows, row_stride = slice_chunks * chunk_bytes;
const u32 lag = 1;

#ifdef __CUDACC__
// What is copied to shared memory counts down the bytes that a barrier was told to expect.
__device__ void begin_barrier(u64& barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(&barrier)) : "memory");
}
__device__ void show_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void expect(u64& barrier, u32 n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(&barrier)), "r"(n_bytes) : "memory");
}
__device__ void copy_whole(void* to, const void* from, u32 n_bytes, u64& barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(n_bytes), "r"(shared_address(&barrier)) : "memory");
}
// Waits until a barrier was filled an odd number of times, or for `parity` of 1 an even one.
__device__ void wait_until_filled(u64& barrier, u32 parity)
{
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra AGAIN; }"
                 :: "r"(shared_address(&barrier)), "r"(parity) : "memory");
}
#endif

struct Stage {
    alignas(1024) byte queries[tile_queries][row_stride];
    alignas(1024) byte corpus[tile_corpus][row_stride];
    alignas(16) column_value columns[tile_corpus];
};
struct Feed { u64 filled[n_stages]; };
static_assert(tile_queries % panel_rows == 0 && tile_corpus % panel_rows == 0, "tiles of whole panels");

// Starts to copy a slice of the panels of a tile.
template <u32 n> __device__ void copy_panels(byte (&to)[n][row_stride], const byte* from, u32 first, u32 slice,
                                             u32 n_slices, u64& filled)
{
    const u32 n_bytes = panel_rows * row_stride;
    #pragma unroll
    for (u32 panel = 0; panel < n / panel_rows; ++panel)
        copy_whole(to[panel * panel_rows], from + (u64(first / panel_rows + panel) * n_slices + slice) * n_bytes,
                   n_bytes, filled);
}
""")

PANEL_FEEDING = r"""
    u32 next_first = first_row, next_slice = 0, parity = 1;
    if (thread == 0) {
        for (u32 s = 0; s < n_stages; ++s)
            begin_barrier(shared.feed.filled[s]);
        show_barriers();
    }
    auto copy_next = [&](Stage& stage) {
        if (thread || next_first >= end_row)
            return;
        u64& filled = shared.feed.filled[&stage - shared.stages];
        const bool is_last = ++next_slice == n_slices;
        expect(filled, sizeof(stage.queries) + sizeof(stage.corpus) + is_last * sizeof(stage.columns));
        copy_panels(stage.queries, queries, first_query, next_slice - 1, n_slices, filled);
        copy_panels(stage.corpus, corpus, next_first, next_slice - 1, n_slices, filled);
        if (is_last) {
            copy_whole(stage.columns, columns + next_first, sizeof(stage.columns), filled);
            next_slice = 0;
            next_first += tile_corpus;
        }
    };
"""
COPIES_OF_PANELS = Feed(
    copying=PANEL_COPIES.substitute(panel_rows=PANEL_ROWS),
    copy_next=PANEL_FEEDING,
    before="__syncthreads();",
    # The first wait for a stage is for parity 0.
    after="parity ^= current == 0;\n            wait_until_filled(shared.feed.filled[current], parity);",
    alignment=1024,
)

# Without tensor cores: a thread holds `down` rows by `across` of the corpus, the threads of a warp interleaved.
LANES_BODY = string.Template(r"""
typedef $word word;
const u32 words = chunk_bytes / sizeof(word);
struct alignas(16) Chunk { word of[words]; };

template <typename T> __device__ T absolute(T x) { return fabs(x); }

__device__ u32 query_of(u32 r) { return ((threadIdx.x / 32 / warps_across) * down + r) * 4 + threadIdx.x % 32 / 8; }
__device__ u32 corpus_of(u32 c) { return ((threadIdx.x / 32 % warps_across) * across + c) * 8 + threadIdx.x % 8; }
__device__ accumulator step(accumulator acc, word a, word b) { return $step; }
__device__ void finish(accumulator (&)[down][across]) {}

__device__ void accumulate(accumulator (&acc)[down][across], const Stage& stage, u32 n_chunks)
{
    // Not unrolled: the compiler would load a chunk ahead, for which there are no registers.
    #pragma unroll 1
    for (u32 chunk = 0; chunk < slice_chunks && chunk < n_chunks; ++chunk) {
        Chunk a[down];
        #pragma unroll
        for (u32 r = 0; r < down; ++r)
            a[r] = *reinterpret_cast<const Chunk*>(&stage.queries[query_of(r)][chunk * chunk_bytes]);
        #pragma unroll
        for (u32 c = 0; c < across; ++c) {
            const Chunk b = *reinterpret_cast<const Chunk*>(&stage.corpus[corpus_of(c)][chunk * chunk_bytes]);
            #pragma unroll
            for (u32 w = 0; w < words; ++w)
                #pragma unroll
                for (u32 r = 0; r < down; ++r)
                    acc[r][c] = step(acc[r][c], a[r].of[w], b.of[w]);
        }
    }
}
""")

BYTES = r"""
#ifdef __CUDACC__
// The intrinsic __vsadu4 takes an instruction more.
__device__ u32 add_differences(u32 sum, u32 a, u32 b)
{
    u32 result;
    asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}
__device__ u32 differences(u32 a, u32 b)
{
    u32 result;
    asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0));
    return result;
}
#endif

// The largest byte, by halves of a word.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#ifdef __CUDACC__
__device__ u32 larger_halves(u32 a, u32 b)
{
    u32 result;
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
#endif
// As float16: those of a byte are subnormal numbers, in its order.
__device__ u32 keep_largest(u32 largest, u32 a, u32 b)
{
    const u32 by_byte = differences(a, b);
    return larger_halves(larger_halves(by_byte & 0x00ff00ff, __byte_perm(by_byte, 0, 0x4341)), largest);
}
__device__ u32 largest_byte(u32 x) { return (x & 0xffff) < x >> 16 ? x >> 16 : x & 0xffff; }
#else
// As integers, of which the high byte decides: once those of the word, once the others moved there. One instruction
// compares all three.
__device__ u32 keep_largest(u32 largest, u32 a, u32 b)
{
    const u32 by_byte = differences(a, b);
    return __vmaxu2(__vmaxu2(by_byte, by_byte << 8), largest);
}
__device__ u32 largest_byte(u32 x) { return (x >> 8 & 0xff) < x >> 24 ? x >> 24 : x >> 8 & 0xff; }
#endif
"""

TENSOR = r"""
#ifdef __CUDACC__
__device__ void load_matrices(u32 (&to)[4], const byte* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
__device__ void multiply_add(int& c0, int& c1, int& c2, int& c3, const u32 (&a)[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c0), "+r"(c1), "+r"(c2), "+r"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 16 numbers of float16 lie as 32 bytes do.
__device__ void multiply_add(float& c0, float& c1, float& c2, float& c3, const u32 (&a)[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
"""

TENSOR_PLACES = r"""
// The layout of the accumulators of mma.m16n8: row lane / 4 and 8 below, columns 2 * (lane % 4) and right of it.
__device__ u32 query_of(u32 r)
{
    return threadIdx.x / 32 / warps_across * 8 * down + r * 8 + threadIdx.x % 32 / 4;
}
__device__ u32 corpus_of(u32 c)
{
    return threadIdx.x / 32 % warps_across * 4 * across + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
}
"""

TENSOR_BODY = r"""
__device__ void finish(accumulator (&)[down][across]) {}
__device__ void accumulate(accumulator (&acc)[down][across], const Stage& stage, u32 n_chunks)
{
    static_assert(slice_chunks % 2 == 0 && down % 2 == 0 && across % 4 == 0, "no whole matrices");
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first_query = warp / warps_across * 8 * down, first_row = warp % warps_across * 4 * across;
    // Each thread gives the place of a row of one of four matrices, 8 rows of 16 bytes. Of queries these stand as upper
    // and lower rows, left and then right; of the corpus, left and right, then of the next 8 rows.
    const byte* const a_row = &stage.queries[first_query + lane % 16][lane / 16 * 16];
    const byte* const b_row = &stage.corpus[first_row + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 16];
    u32 a[2][down / 2][4], b[2][across / 4][4];
    auto load = [&](u32 chunk) {
        const u32 to = chunk / 2 % 2;
        #pragma unroll
        for (u32 r = 0; r < down / 2; ++r)
            load_matrices(a[to][r], a_row + r * 16 * row_stride + chunk * chunk_bytes);
        #pragma unroll
        for (u32 c = 0; c < across / 4; ++c)
            load_matrices(b[to][c], b_row + c * 16 * row_stride + chunk * chunk_bytes);
    };
    load(0);
    #pragma unroll
    for (u32 chunk = 0; chunk < slice_chunks; chunk += 2) {
        // Loaded while the tensor cores multiply what was loaded before; past the ends of rows stand zeros.
        if (chunk + 2 < slice_chunks)
            load(chunk + 2);
        const u32 (&left)[down / 2][4] = a[chunk / 2 % 2], (&right)[across / 4][4] = b[chunk / 2 % 2];
        #pragma unroll
        for (u32 c = 0; c < across / 2; ++c)
            #pragma unroll
            for (u32 r = 0; r < down / 2; ++r)
                multiply_add(acc[2 * r][2 * c], acc[2 * r][2 * c + 1], acc[2 * r + 1][2 * c], acc[2 * r + 1][2 * c + 1],
                             left[r], right[c / 2][c % 2 * 2], right[c / 2][c % 2 * 2 + 1]);
        if (chunk + 2 >= n_chunks)
            return;
    }
}
"""

# The accumulators of a multiplication of 64 x 256, as operands: of 8 columns each thread has two, in two rows.
_OUTPUTS = ", ".join(f'"+{{0}}"(acc[{r // 2 % 2}][{r // 4 * 2 + r % 2}])' for r in range(128))
_REGISTERS = ", ".join(f"%{r}" for r in range(128))

GROUP = string.Template(r"""
#ifdef __CUDACC__
// Where rows of 128 bytes begin: in units of 16 bytes the address, and 1024 bytes from 8 rows to the next 8, whose
// chunks change places (128-byte swizzling).
__device__ u64 matrix_at(const byte* rows)
{
    return u64(shared_address(rows) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
__device__ u64 bytes_on(u64 matrix, u32 n_bytes) { return matrix + (n_bytes >> 4); }
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 n_groups> __device__ void wait_for_products()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n_groups) : "memory");
}
// What is read of a sum is read after this.
__device__ void settle(int& sum) { asm volatile("" : "+r"(sum) :: "memory"); }
__device__ void settle(float& sum) { asm volatile("" : "+f"(sum) :: "memory"); }
__device__ void multiply_add(int (&acc)[2][64], u64 a, u64 b)
{
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %130, 0; "
                 "wgmma.mma_async.sync.aligned.m64n256k32.s32.u8.u8 {$registers}, %128, %129, p; }"
                 : $integers : "l"(a), "l"(b), "r"(1));
}
__device__ void multiply_add(float (&acc)[2][64], u64 a, u64 b)
{
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %130, 0; "
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {$registers}, %128, %129, p, 1, 1, 0, 0; }"
                 : $floats : "l"(a), "l"(b), "r"(1));
}
#endif
""").substitute(registers=_REGISTERS, integers=_OUTPUTS.format("r"), floats=_OUTPUTS.format("f"))

GROUP_BODY = r"""__device__ void accumulate(accumulator (&acc)[down][across], const Stage& stage, u32 n_chunks)
{
    static_assert(down == 2 && across == 64 && warps_across == 1 && slice_chunks == 8, "the layout of wgmma.m64n256");
    const u64 a = matrix_at(stage.queries[threadIdx.x / 128 * 64]), b = matrix_at(stage.corpus[0]);
    begin_products();
    if (n_chunks >= slice_chunks) {
        #pragma unroll
        for (u32 chunk = 0; chunk < slice_chunks; chunk += 2)
            multiply_add(acc, bytes_on(a, chunk * chunk_bytes), bytes_on(b, chunk * chunk_bytes));
        end_of_products();  // not after both ways: that would take a product of its own, to be waited for
    } else {
        // Past the ends of rows stand zeros.
        #pragma unroll 1
        for (u32 chunk = 0; chunk < n_chunks; chunk += 2)
            multiply_add(acc, bytes_on(a, chunk * chunk_bytes), bytes_on(b, chunk * chunk_bytes));
        end_of_products();
    }
    // All but those: then the stage before may be written to.
    wait_for_products<1>();
}
__device__ void finish(accumulator (&acc)[down][across])
{
    wait_for_products<0>();
    #pragma unroll
    for (u32 r = 0; r < down; ++r)
        #pragma unroll
        for (u32 c = 0; c < across; ++c)
            settle(acc[r][c]);
}
"""

# How accumulated values are ranked. An estimate orders the values of a query; a bound is what it must be within to be
# among the k nearest so far. What is listed is a key, or is made one as it is taken into the heap.
ACCUMULATED = string.Template(r"""
typedef accumulator estimate;
typedef key bound;
const bound everything = no_key, nothing = 0;
__device__ estimate estimated(accumulator acc, column_value) { return $value; }
__device__ bool is_within(estimate x, bound limit, norm_value) { return ordered(x) < limit; }
__device__ key listed(accumulator, estimate x, norm_value) { return ordered(x); }
__device__ key ranked(key x, norm_value, const norm_value*, u32) { return x; }
__device__ bound bound_of(key x, norm_value) { return x; }
""")

SQUARES = string.Template(r"""
typedef accumulator estimate;
typedef key bound;
const bound everything = no_key, nothing = 0;
__device__ estimate estimated(accumulator acc, column_value corpus_norm) { return $estimate; }
__device__ key squared(estimate x, norm_value query_norm) { return $squared; }
__device__ bool is_within(estimate x, bound limit, norm_value query_norm) { return squared(x, query_norm) < limit; }
__device__ key listed(accumulator, estimate x, norm_value query_norm) { return squared(x, query_norm); }
__device__ key ranked(key x, norm_value, const norm_value*, u32) { return x; }
__device__ bound bound_of(key x, norm_value) { return x; }
""")

# The estimate takes a reciprocal length, in float32, of which dot and product are rounded once each: 3 roundings of
# 2**-24 together. The bound leaves 16 times as much, and twice what the ranked value may be off by.
COSINE = r"""
typedef float estimate;
typedef float bound;
const bound everything = 1, nothing = -3.4e38f;
__device__ estimate estimated(accumulator acc, column_value reciprocal) { return -float(acc) * reciprocal; }
__device__ bool is_within(estimate x, bound limit, norm_value) { return x <= limit; }
__device__ key listed(accumulator acc, estimate, norm_value) { return key(acc); }
__device__ key ranked(key dot, norm_value query_norm, const norm_value* corpus_norms, u32 row)
{
    return ordered(1.0 - double(dot) / sqrt(query_norm * corpus_norms[row]));
}
__device__ bound bound_of(key x, norm_value query_norm)
{
    double value;
    restore(x, value);
    const double cosine = 1.0 - value - 1e-15;
    return cosine < 0 ? 0 : float(-cosine * sqrt(query_norm) * (1 - 3e-6));
}
"""

MERGE = string.Template(r"""
// The k first of the lists of all parts, in order: a block for each query.
extern "C" __global__ void __launch_bounds__($threads) merge(
    const key* keys, const u32* rows, $ranked* values, long long* indices, u32 n_queries, u32 n_parts, u32 list_length,
    u32 k, u32 size)
{
    extern __shared__ uint4 memory[];
    key* const own = reinterpret_cast<key*>(memory);
    u32* const own_rows = reinterpret_cast<u32*>(own + size);
    const u32 query = blockIdx.x;
    for (u32 e = threadIdx.x; e < size; e += blockDim.x) {
        const size_t place = (size_t(e / k) * list_length + e % k) * n_queries + query;
        own[e] = e < n_parts * k ? keys[place] : no_key;
        own_rows[e] = e < n_parts * k ? rows[place] : no_row;
    }
    // A bitonic sort; `size` is a power of two.
    for (u32 length = 2; length <= size; length *= 2)
        for (u32 apart = length / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (u32 p = threadIdx.x; p < size / 2; p += blockDim.x) {
                const u32 a = 2 * p - p % apart, b = a + apart;
                const bool is_ascending = (a & length) == 0;
                const key x = own[a], y = own[b];
                const u32 row_x = own_rows[a], row_y = own_rows[b];
                if (before(y, row_y, x, row_x) == is_ascending) {
                    own[a] = y, own[b] = x;
                    own_rows[a] = row_y, own_rows[b] = row_x;
                }
            }
        }
    __syncthreads();
    for (u32 e = threadIdx.x; e < k; e += blockDim.x) {
        restore(own[e], values[size_t(query) * k + e]);
        indices[size_t(query) * k + e] = own_rows[e];
    }
}
""")


AGAIN = string.Template(r"""
typedef $element element;

// The squared distances of some rows of the corpus to each query, by differences; lists as `merge` takes them. A block
// for each query, a warp for each row.
extern "C" __global__ void __launch_bounds__($threads) recompute(
    const element* queries, const element* corpus, const long long* candidates, key* keys, u32* rows, u32 n_queries,
    u32 n_features, u32 n_candidates)
{
    const u32 query = blockIdx.x, lane = threadIdx.x % 32;
    const element* const a = queries + u64(query) * n_features;
    for (u32 e = threadIdx.x / 32; e < n_candidates; e += $threads / 32) {
        const u32 row = u32(candidates[u64(query) * n_candidates + e]);
        const element* const b = corpus + u64(row) * n_features;
        element sum = 0;
        #pragma unroll 4
        for (u32 f = lane; f < n_features; f += 32) {
            const element difference = a[f] - b[f];
            sum += difference * difference;
        }
        sum = sum_of_warp(sum);
        if (lane == 0) {
            keys[size_t(e) * n_queries + query] = ordered(sum);
            rows[size_t(e) * n_queries + query] = row;
        }
    }
}
""")


def recompute_source(dtype: np.dtype[Any]) -> str:
    """Return the source of `recompute` and of `merge`, for float rows.

    Parameters
    ----------
    dtype : dtype

    Returns
    -------
    str
        CUDA C++17 without headers; sizes have 32 bits::

            recompute(queries, corpus, candidates, keys, rows, n_queries, n_features, n_candidates)
                grid (n_queries,), block (AGAIN_THREADS,); `candidates` of int64, (n_queries, n_candidates)
            merge(keys, rows, values, indices, n_queries, 1, n_candidates, n_candidates, size)
                as `Search` has it
    """
    element = TYPES[dtype.name]
    common = COMMON.substitute(key=TYPES[f"uint{8 * dtype.itemsize}"])
    merge = MERGE.substitute(ranked=element, threads=MERGE_THREADS)
    return common + WARP_SUMS + AGAIN.substitute(element=element, threads=AGAIN_THREADS) + merge


@dataclass(frozen=True, slots=True)
class Search:
    """The fused search of one space: its source, and what starting it takes.

    Attributes
    ----------
    source : str
        CUDA C++17 without headers, with two kernels. Rows are C-contiguous, sizes 32-bit::

            search(queries, corpus, query_norms, corpus_norms, columns, keys, rows, n_queries, n_corpus, row_bytes,
                   part_rows, k)
                grid (ceil(n_queries / tile_queries), n_parts), block (threads,), shared memory `shared_bytes`
            merge(keys, rows, values, indices, n_queries, n_parts, list_length(k), k, size)
                grid (n_queries,), block and size by `merge_shape`, shared memory size * `pair_bytes`

    tile : Tile
    tile_queries, tile_corpus : int
        Rows of a tile.
    shared_bytes : int
        Shared memory of a block of `search`.
    key, norm, column : numpy.dtype
        Of the lists' values, unsigned; of squared norms; and of what is looked at for each row of the corpus.
    """

    source: str
    tile: Tile
    tile_queries: int
    tile_corpus: int
    shared_bytes: int
    key: np.dtype[Any]
    norm: np.dtype[Any]
    column: np.dtype[Any]

    @property
    def pair_bytes(self) -> int:
        """Bytes of a key and its row."""
        return self.key.itemsize + 4

    def list_length(self, k: int) -> int:
        """Return the pairs of the list of one query and part of the corpus."""
        return k + ROOM_TILES * self.tile_corpus

    def list_bytes(self, k: int) -> int:
        """Return the bytes of such a list."""
        return self.list_length(k) * self.pair_bytes


@dataclass(frozen=True, slots=True)
class Way:
    """How a family of spaces is accumulated and ranked, in C++; a dtype of None is that of the rows.

    Tensor cores multiply where there is no `step` of a word; `group_tile` is for devices that give them the work of
    four warps at once.
    """

    ranking: str
    accumulator: str | None = None
    key: str | None = None
    norm: str | None = None
    column: str | None = None
    word: str | None = None
    step: str = ""
    intrinsics: str = ""
    tile: Tile | None = None
    group_tile: Tile | None = None
    uses_norms: bool = False


_WORDS = functools.partial(
    Way, accumulator="uint32", key="uint32", norm="int32", column="int32", word="uint32", intrinsics=BYTES
)
_TENSORS = functools.partial(Way, accumulator="int32", intrinsics=TENSOR, tile=TENSOR_TILE, uses_norms=True)

_INTEGER_SQUARES = SQUARES.substitute(
    # Sums wrap as unsigned numbers do; the last is the squared distance itself, which fits.
    estimate="int(u32(corpus_norm) - 2 * u32(acc))",
    squared="u32(x) + u32(query_norm)",
)
# The operations of `squares_from_dot` in another order, which `Space.gram_error` covers too.
_FLOAT_SQUARES = SQUARES.substitute(
    estimate="fmaf(acc, -2, corpus_norm)", squared="ordered(larger(x + query_norm, estimate(0)))"
)
_ITSELF = ACCUMULATED.substitute(value="acc")

HALVES = Way(_FLOAT_SQUARES, intrinsics=TENSOR, tile=TENSOR_TILE, group_tile=GROUP_TILE, uses_norms=True)
"""Of float32, by products of rows rounded to float16."""

WAYS: dict[tuple[Callable[..., Any], bool], Way] = {
    (squares_from_dot, True): _TENSORS(
        _INTEGER_SQUARES, key="uint32", norm="int32", column="int32", group_tile=GROUP_TILE
    ),
    # Registers have no room for its float64 beside the sums of a group.
    (dot_itself, True): _TENSORS(COSINE, key="uint64", norm="float64", column="float32"),
    (add_absolute, True): _WORDS(_ITSELF, step="add_differences(acc, a, b)"),
    (keep_largest, True): _WORDS(ACCUMULATED.substitute(value="largest_byte(acc)"), step="keep_largest(acc, a, b)"),
    (squares_from_dot, False): Way(_FLOAT_SQUARES, step="acc + a * b", uses_norms=True),
    **{(function, False): Way(_ITSELF, step=expression) for function, expression in EXPRESSIONS.items()},
}
"""By the function that accumulates, or takes products to what is accumulated, and whether rows are uint8."""


def search_of(
    space: Space,
    *,
    n_queries: int | None = None,
    direct: bool = False,
    halves: bool = False,
    in_groups: bool = False,
    copy_bytes: int = CHUNK,
    tile: Tile | None = None,
) -> Search | None:
    """Return the fused search of a space.

    Parameters
    ----------
    space : Space
    n_queries : int, optional
        That are searched at once; many, if not given.
    direct : bool
        By differences, where products would be preferred.
    halves : bool
        By products of rows rounded to float16; their norms are of float32.
    in_groups : bool
        For a device of compute capability 9.0, with the features of that architecture alone (``sm_90a``), where they
        serve: see the `tile` of what is returned.
    copy_bytes : {16, 8, 4}
        What divides the length of rows, and their addresses.
    tile : Tile, optional
        Another one than is fastest.

    Returns
    -------
    Search or None
        None for float64 by products, for halves of anything but float32 with products, for uint8 rows so long that 32
        bits do not hold their sums, and for a tile whose rows 32 bits do not address.
    """
    form, dtype = space.form, space.dtype
    function = form.accumulate if direct or form.from_dot is None else form.from_dot
    way = WAYS.get((function, space.is_integer))
    if halves:
        way = HALVES if dtype == np.float32 and function is squares_from_dot else None
    if way is None or (dtype == np.float64 and way.uses_norms) or space.accumulator == np.int64:
        return None
    is_few = n_queries is not None and n_queries <= FEW_QUERIES
    group_tile = way.group_tile if in_groups else None
    tile = tile or group_tile or way.tile or (FEW_TILE if is_few else TILES[dtype.name])
    search = _search(way, dtype, space.ranked, copy_bytes, tile)
    row_bytes = space.n_features * dtype.itemsize + CHUNK
    return search if max(search.tile_queries, search.tile_corpus) * row_bytes <= np.iinfo(np.uint32).max else None


@functools.cache
def _search(way: Way, dtype: np.dtype[Any], ranked: np.dtype[Any], copy_bytes: int, tile: Tile) -> Search:
    """Return the search of rows of a dtype in one way, once."""
    key, norm, column = (
        np.dtype(name or other)
        for name, other in ((way.key, f"uint{8 * dtype.itemsize}"), (way.norm, dtype), (way.column, dtype))
    )
    lanes = LANES if way.step else TENSOR_LANES
    queries, corpus = (tile.warps[side] * lanes[side] * tile.per_thread[side] for side in range(2))
    shared_bytes = _shared_bytes(tile, queries, corpus, column)
    common, feed = COMMON.substitute(key=TYPES[key.name]), _feed(tile)
    body = SEARCH.substitute(
        accumulator=TYPES[way.accumulator or dtype.name],
        column=TYPES[column.name],
        norm=TYPES[norm.name],
        warps_down=tile.warps[0],
        warps_across=tile.warps[1],
        lanes_down=lanes[0],
        lanes_across=lanes[1],
        down=tile.per_thread[0],
        across=tile.per_thread[1],
        slice_bytes=tile.slice_bytes,
        stages=tile.stages,
        blocks=tile.blocks,
        copy_bytes=copy_bytes,
        shared_address=SHARED_ADDRESS,
        copying=feed.copying,
        # Rounded up only where it must be: the compiler forgets whose memory it is.
        memory="memory" if feed.alignment == CHUNK else f"(size_t(memory) + {feed.alignment - 1}) & -{feed.alignment}",
        copy_next=feed.copy_next,
        before=feed.before,
        after=feed.after,
        uses_norms=str(way.uses_norms).lower(),
        room_tiles=ROOM_TILES,
        tiles_a_visit=TILES_A_VISIT,
        shared_bytes=shared_bytes,
        intrinsics=GROUP if tile.in_groups else way.intrinsics,
        lanes=_body(way, dtype, tile),
        ranking=way.ranking,
    )
    merge = MERGE.substitute(ranked=TYPES[ranked.name], threads=MERGE_THREADS)
    return Search(common + body + merge, tile, queries, corpus, shared_bytes, key, norm, column)


def _body(way: Way, dtype: np.dtype[Any], tile: Tile) -> str:
    """Return how values are accumulated."""
    if way.step:
        return LANES_BODY.substitute(word=TYPES[way.word or dtype.name], step=way.step)
    return TENSOR_PLACES + (GROUP_BODY if tile.in_groups else TENSOR_BODY)


def _feed(tile: Tile) -> Feed:
    """Return how its slices come."""
    return COPIES_OF_PANELS if tile.in_groups else COPIES_BY_THREADS


def _shared_bytes(tile: Tile, n_queries: int, n_corpus: int, column: np.dtype[Any]) -> int:
    """Return what the struct `Shared` takes, with the largest types for each query."""
    alignment = _feed(tile).alignment
    row_stride = tile.slice_bytes if tile.in_groups else (tile.slice_bytes // CHUNK | 1) * CHUNK
    stage = (n_queries + n_corpus) * row_stride + n_corpus * column.itemsize
    stages = tile.stages * (-(-stage // alignment) * alignment)
    # Rounded up by the alignment of the struct, and of where it begins.
    return stages + tile.stages * 8 + n_queries * (8 + 8 + 4) + 2 * alignment


def panels_shape(n_rows: int, row_bytes: int) -> tuple[int, int]:
    """Return the rows, and the bytes of each, that packed panels of some rows have: whole tiles and slices."""
    rows, width = GROUP_TILE.warps[1] * TENSOR_LANES[1] * GROUP_TILE.per_thread[1], GROUP_TILE.slice_bytes
    return -(-n_rows // rows) * rows, -(-row_bytes // width) * width


def merge_shape(n_merged: int) -> tuple[int, int]:
    """Return the threads of a block of `merge`, and its `size`, for so many pairs of a query."""
    size = max(2, 1 << (n_merged - 1).bit_length())
    return min(MERGE_THREADS, max(32, size // 2)), size


@functools.cache
def parts_of(query_blocks: int, tiles: int, slots: int, most: int) -> int:
    """Return into how many parts the corpus is divided, so that the last of all blocks is done soonest.

    Parameters
    ----------
    query_blocks, tiles : int
        Of queries, and of the corpus.
    slots : int
        Blocks that a device computes at once.
    most : int
        Parts at the most.
    """

    def tiles_in_turn(n_parts: int) -> int:
        return -(-query_blocks * n_parts // slots) * (-(-tiles // n_parts) + STARTING_TILES)

    return min(range(1, min(most, slots, tiles) + 1), key=tiles_in_turn)
