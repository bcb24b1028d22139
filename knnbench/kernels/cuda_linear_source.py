"""The CUDA C++ source of the cross-entropy of linear models: products in registers, exponentials and losses, fused.

A block of threads has some samples, of which each of its warps computes the losses of one model. Slices of the samples
and of all these models' weights come to shared memory by asynchronous copies, some slices ahead. A thread has
`per_thread` samples by all classes in registers: a load of 16 bytes, which every thread of the warp reads at once,
brings weights for four times as many samples, so that the rate of multiply-adds sets the pace. Bytes become float32 by
putting them into the last bits of 2**23, and taking that away. Where a few features in a row are 0 in all samples of a
warp, as at the edges of images, their products are left out, which changes no bit of a sum.

Products are chains of fused multiply-adds over the features in their order. Losses are added up over `UNIT` samples in
the same order, whatever models are computed together, and however many.

It needs neither CuPy nor a GPU: the tests compile it for devices that are not there, and as C++ for the host. The naive
form is `knnbench.backends.linear.ArrayLoss`.
"""

import functools
import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cuda_source import ASYNC_COPIES, SHARED_ADDRESS, TYPES, WARP_SUMS

__all__ = ["CHUNK", "CLASSES", "MOST_MODELS", "UNIT", "LossKernel", "loss_kernel", "row_chunks"]

CHUNK = 16
"""Bytes of a load; the length of a row must be a multiple."""

UNIT = 128
"""Samples whose losses are added up to one number."""

MOST_MODELS = 4
"""Models of a block of threads at the most."""

CLASSES = 10
"""Classes of one model that are computed at a time, at the most: 4 samples of as many fill 40 registers."""

PER_THREAD = 4
"""Samples of a thread. With 8, weights are loaded half as often, but on an H200 it took 1.1 to 1.5 times as long."""

SLICE_CHUNKS = 2
STAGES = 3

SOURCE = string.Template(r"""
typedef unsigned char byte;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef $element element;
typedef $real real;

const u32 per_thread = $per_thread, n_columns = $columns;
const u32 slice_chunks = $slice_chunks, n_stages = $stages, most_models = $most_models;
const bool in_parts = $in_parts;

const u32 chunk_bytes = 16;
const u32 n_rows = 32 * per_thread;
const u32 unit = $unit, units_here = n_rows / unit, per_unit = unit / 32;
const u32 words = chunk_bytes / 4;
const u32 features = chunk_bytes / sizeof(element);
// Features at a time: a whole number of words of samples, and of loads of weights.
const u32 step = sizeof(element) == 1 ? 4 : features, steps = features / step, words_a_step = words / steps;
const u32 per_load = chunk_bytes / sizeof(real), loads = step * n_columns / per_load;
static_assert(step * n_columns % per_load == 0, "loads of weights end with a step");
// In chunks. 8 threads who copy chunks of a few rows, or load those of 8 rows, meet different banks.
const u32 slice_stride = n_rows + 8 / slice_chunks;
const u32 weights_of_slice = slice_chunks * features * n_columns * sizeof(real) / chunk_bytes;

struct alignas(16) Words { u32 of[words]; };
struct alignas(16) Reals { real of[per_load]; };

#ifdef __CUDACC__
__device__ bool any_of_warp(bool x) { return __any_sync(~0u, x); }
#endif
$warp_sums
$async_copies

template <typename T> __device__ T read_as(u32 bits)
{
    union { u32 bits; T value; } both;
    both.bits = bits;
    return both.value;
}

// A feature of a step, from the words of a sample.
__device__ void take(float& x, const u32* word, u32 f, byte, u32 two_23)
{
    x = read_as<float>(__byte_perm(word[0], two_23, 0x7650 + f)) - 8388608;
}
__device__ void take(double& x, const u32* word, u32 f, byte, u32) { x = word[0] >> 8 * f & 255; }
template <typename T> __device__ void take(T& x, const u32* word, u32 f, float, u32) { x = read_as<float>(word[f]); }
__device__ void take(double& x, const u32* word, u32 f, double, u32)
{
    union { u64 bits; double value; } both;
    both.bits = u64(word[2 * f + 1]) << 32 | word[2 * f];
    x = both.value;
}

// Of one slice: samples by chunks, those of a chunk side by side, and then the weights of each model. A thread has the
// samples `lane`, `lane` + 32, ...
__device__ void accumulate(real (&acc)[per_thread][n_columns], const Words* samples, const Reals* weights, u32 n_chunks,
                           u32 two_23)
{
    const Words* own = samples + threadIdx.x % 32;
    // Not unrolled: the compiler would load a chunk ahead, for which there are no registers.
    #pragma unroll 1
    for (u32 chunk = 0; chunk < slice_chunks && chunk < n_chunks; ++chunk, own += slice_stride) {
        Words x[per_thread];
        #pragma unroll
        for (u32 r = 0; r < per_thread; ++r)
            x[r] = own[r * 32];
        #pragma unroll
        for (u32 s = 0; s < steps; ++s, weights += loads) {
            u32 some = 0;
            #pragma unroll
            for (u32 r = 0; r < per_thread; ++r)
                #pragma unroll
                for (u32 word = 0; word < words_a_step; ++word)
                    some |= x[r].of[s * words_a_step + word];
            if (!any_of_warp(some != 0))
                continue;
            Reals w[loads];
            #pragma unroll
            for (u32 load = 0; load < loads; ++load)
                w[load] = weights[load];
            #pragma unroll
            for (u32 f = 0; f < step; ++f)
                #pragma unroll
                for (u32 r = 0; r < per_thread; ++r) {
                    real value;
                    take(value, &x[r].of[s * words_a_step], f, element(), two_23);
                    #pragma unroll
                    for (u32 c = 0; c < n_columns; ++c) {
                        const u32 place = f * n_columns + c;
                        acc[r][c] = fma(value, w[place / per_load].of[place % per_load], acc[r][c]);
                    }
                }
        }
    }
}

// sums[model, u]: the loss of model over samples u * unit to (u + 1) * unit - 1. Weights lie by models, parts of
// n_columns classes, features and classes of the part, with zeros in the place of classes and features past the ends.
extern "C" __global__ void __launch_bounds__(32 * most_models, $blocks) losses(
    const byte* samples, const long long* labels, const double* sample_weights, const real* weights,
    const real* intercepts, double* sums, u64 n_samples, u32 row_chunks, u32 n_classes, u32 n_models)
{
    extern __shared__ uint4 memory[];
    const u32 models_here = blockDim.x / 32, lane = threadIdx.x % 32;
    const u32 first_model = blockIdx.y * models_here, model = first_model + threadIdx.x / 32;
    const u32 models_left = n_models - first_model < models_here ? n_models - first_model : models_here;
    const u64 first_sample = u64(blockIdx.x) * n_rows;
    const u32 n_left = n_samples - first_sample < n_rows ? u32(n_samples - first_sample) : n_rows;
    const u32 row_bytes = row_chunks * chunk_bytes, n_parts = in_parts ? (n_classes + n_columns - 1) / n_columns : 1;
    const u32 n_slices = (row_chunks + slice_chunks - 1) / slice_chunks;
    const u32 stage_chunks = slice_chunks * slice_stride + models_here * weights_of_slice;
    const u32 chunk_reals = features * n_columns;
    const byte* const rows = samples + first_sample * row_bytes;
    Words* const stages = reinterpret_cast<Words*>(memory);
    // The bits of 2**23, in a register: a constant would be brought there again for each byte.
    const u32 two_23 = 0x4b000000 | n_models >> 31;

    // In the place of the stages, once they are used up: the logits of each warp. And what a part of the classes hands
    // on to the next, a column for each sample.
    real* const logits = reinterpret_cast<real*>(memory) + (threadIdx.x / 32) * n_columns * n_rows + lane;
    const u32 logit_chunks = models_here * n_columns * n_rows * u32(sizeof(real)) / chunk_bytes;
    const u32 used_chunks = n_stages * stage_chunks < logit_chunks ? logit_chunks : n_stages * stage_chunks;
    double* const states = reinterpret_cast<double*>(stages + used_chunks) + (threadIdx.x / 32) * 3 * n_rows + lane;

    real strange = 0;
    double total[units_here] = {};
    for (u32 part = 0; part < n_parts; ++part) {
        u32 next_slice = 0;
        auto copy_next = [&](u32 stage) {
            if (next_slice < n_slices) {
                Words* const to = stages + stage * stage_chunks;
                const u32 first = next_slice * slice_chunks;
                const u32 n_chunks = row_chunks - first < slice_chunks ? row_chunks - first : slice_chunks;
                for (u32 i = threadIdx.x; i < n_rows * slice_chunks; i += blockDim.x) {
                    const u32 row = i / slice_chunks, chunk = i % slice_chunks;
                    // The first stands for those past the end.
                    const u32 place = (row < n_left ? row : 0) * row_bytes + (first + chunk) * chunk_bytes;
                    if (chunk < n_chunks)
                        copy_async<chunk_bytes>(&to[chunk * slice_stride + row], rows + place, chunk_bytes);
                }
                const u32 n_weights = n_chunks * chunk_reals / per_load;
                for (u32 i = threadIdx.x; i < models_left * weights_of_slice; i += blockDim.x) {
                    const u32 m = i / weights_of_slice, place = i % weights_of_slice;
                    const u64 of_part = (u64(first_model + m) * n_parts + part) * row_chunks + first;
                    if (place < n_weights)
                        copy_async<chunk_bytes>(&to[slice_chunks * slice_stride + i],
                                                weights + of_part * chunk_reals + place * per_load, chunk_bytes);
                }
                ++next_slice;
            }
            end_of_group();
        };

        real acc[per_thread][n_columns] = {};
        for (u32 s = 0; s + 1 < n_stages; ++s)
            copy_next(s);
        u32 current = n_stages - 1;
        for (u32 first = 0; first < row_chunks; first += slice_chunks) {
            wait_for_all_but<n_stages - 2>();
            __syncthreads();
            const u32 freed = current;
            current = current + 1 == n_stages ? 0 : current + 1;
            copy_next(freed);
            if (model < n_models) {
                const Words* const stage = stages + current * stage_chunks;
                const Reals* const own = reinterpret_cast<const Reals*>(
                    stage + slice_chunks * slice_stride + threadIdx.x / 32 * weights_of_slice);
                accumulate(acc, stage, own, row_chunks - first, two_23);
                // Weights that are not finite tell in every loss, as in a product that leaves nothing out.
                const u32 n_chunks = row_chunks - first < slice_chunks ? row_chunks - first : slice_chunks;
                for (u32 i = lane; i < n_chunks * chunk_reals; i += 32)
                    strange = fma(reinterpret_cast<const real*>(own)[i], real(0), strange);
            }
        }
        wait_for_all_but<0>();
        __syncthreads();
        if (model < n_models) {
            // Each thread reads what it wrote: registers have no index, and the code of an exponential is too long to
            // be repeated for each.
            #pragma unroll
            for (u32 r = 0; r < per_thread; ++r)
                #pragma unroll
                for (u32 c = 0; c < n_columns; ++c)
                    logits[c * n_rows + r * 32] = acc[r][c];
            const u32 first_class = part * n_columns;
            const u32 n_here = n_classes - first_class < n_columns ? n_classes - first_class : n_columns;
            const real* const added = intercepts + u64(model) * n_classes + first_class;
            #pragma unroll
            for (u32 u = 0; u < units_here; ++u)
                #pragma unroll 1
                for (u32 r = u * per_unit; r < (u + 1) * per_unit && r * 32 + lane < n_left; ++r) {
                    const real* const own = logits + r * 32;
                    double* const state = states + r * 32;
                    const u64 sample = first_sample + r * 32 + lane;
                    const u32 label = u32(labels[sample]) - first_class;
                    double largest = -read_as<float>(0x7f800000), below = 0, right = 0;
                    if (in_parts && part > 0)
                        largest = state[0], below = state[n_rows], right = state[2 * n_rows];
                    const double before = largest;
                    for (u32 c = 0; c < n_here; ++c)
                        largest = fmax(largest, double(own[c * n_rows]) + double(added[c]));
                    if (in_parts)
                        below *= exp(before - largest);
                    for (u32 c = 0; c < n_here; ++c) {
                        const double logit = double(own[c * n_rows]) + double(added[c]);
                        below += exp(logit - largest);
                        right = c == label ? logit : right;
                    }
                    if (in_parts)
                        state[0] = largest, state[n_rows] = below, state[2 * n_rows] = right;
                    if (part + 1 == n_parts)
                        total[u] += sample_weights[sample] * (log(below) + (largest - right));
                }
        }
        __syncthreads();
    }
    #pragma unroll
    for (u32 u = 0; u < units_here; ++u) {
        const double sum = sum_of_warp(total[u] + double(strange));
        const u64 place = u64(blockIdx.x) * units_here + u, n_units = (n_samples + unit - 1) / unit;
        if (lane == 0 && model < n_models && place < n_units)
            sums[model * n_units + place] = sum;
    }
}
""")


@dataclass(frozen=True, slots=True)
class LossKernel:
    """The kernel for some numbers of models, features and classes: its source, and what starting it takes.

    Attributes
    ----------
    source : str
        CUDA C++17 without headers::

            losses(samples, labels, sample_weights, weights, intercepts, sums, n_samples, row_chunks, n_classes,
                   n_models)
                grid (ceil(n_samples / samples), ceil(n_models / models)), block (threads,), shared memory
                `shared_bytes`; `n_samples` has 64 bits, the sizes after it 32

        Rows of `samples` have ``row_chunks * CHUNK`` bytes, labels int64; `sums`, (n_models, ceil(n_samples / UNIT)),
        and sample weights float64. Weights are `weight_shape`, intercepts (n_models, n_classes).
    samples, models : int
        Of a block of threads.
    shared_bytes : int
    most_bytes : int
        The largest `shared_bytes` of this source.
    weight_shape : (int, int, int)
        Of one model: parts of the classes, features and classes of a part. There are zeros past the ends.
    """

    source: str
    samples: int
    models: int
    shared_bytes: int
    most_bytes: int
    weight_shape: tuple[int, int, int]

    @property
    def threads(self) -> int:
        """Threads of a block: a warp for each model."""
        return 32 * self.models


def row_chunks(n_features: int, element: np.dtype[Any]) -> int:
    """Return how many loads a row takes; it is filled up with zeros."""
    return -(-n_features * element.itemsize // CHUNK)


@functools.cache
def loss_kernel(
    element: np.dtype[Any],
    real: np.dtype[Any],
    n_features: int,
    n_classes: int,
    n_models: int,
) -> LossKernel:
    """Return the kernel that suits some models.

    Parameters
    ----------
    element, real : numpy.dtype
        Of the samples, uint8 or floats, and of the weights: float32 or float64, no smaller.
    n_features, n_classes, n_models : int
    """
    n_parts = -(-n_classes // CLASSES)
    n_columns, models, samples = -(-n_classes // n_parts), min(n_models, MOST_MODELS), 32 * PER_THREAD
    chunks, features = row_chunks(n_features, element), CHUNK // element.itemsize
    shared_bytes, most_bytes = (
        _shared_bytes(n, samples, n_columns, features, real.itemsize, n_parts > 1) for n in (models, MOST_MODELS)
    )
    source = _source(element.name, real.name, n_columns, n_parts > 1)
    return LossKernel(source, samples, models, shared_bytes, most_bytes, (n_parts, chunks * features, n_columns))


@functools.cache
def _source(element: str, real: str, n_columns: int, in_parts: bool) -> str:
    return SOURCE.substitute(
        element=TYPES[element],
        real=TYPES[real],
        per_thread=PER_THREAD,
        columns=n_columns,
        in_parts=str(in_parts).lower(),
        slice_chunks=SLICE_CHUNKS,
        stages=STAGES,
        most_models=MOST_MODELS,
        unit=UNIT,
        # What the registers of a multiprocessor have room for.
        blocks=2 if in_parts else 3,
        warp_sums=WARP_SUMS,
        async_copies=SHARED_ADDRESS + ASYNC_COPIES,
    )


def _shared_bytes(models: int, samples: int, n_columns: int, features: int, itemsize: int, in_parts: bool) -> int:
    """Return the shared memory of a block: the stages or the logits in their place, and what parts hand on."""
    stage = (
        SLICE_CHUNKS * (samples + 8 // SLICE_CHUNKS) * CHUNK + models * SLICE_CHUNKS * features * n_columns * itemsize
    )
    logits = models * n_columns * samples * itemsize
    return max(STAGES * stage, logits) + in_parts * models * 3 * 8 * samples
