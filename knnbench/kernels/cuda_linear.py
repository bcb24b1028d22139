"""Cross-entropy of linear models on CUDA: a product in registers, its exponentials and the losses, in one kernel.

A block of threads has some samples and one model. Features of its samples and weights pass through shared memory, 16
bytes of a sample at a time, several loads of a thread at once. Each thread has `PER_THREAD` samples and `CLASSES`
classes in registers at a time, so that a weight, which all threads read at once, serves its samples, and a feature
serves all classes. Of the logits of a sample its thread keeps the largest, and the sum of exponentials below that,
which a larger one rescales [1]_. That is done from shared memory: registers have no index, and the code of an
exponential is too long to be repeated for each.

Products are chains of multiply-adds over the features in their order; the losses of a block are added in the same order
whatever models are computed together.

References
----------
.. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, 2018.
"""

import functools
import math
from typing import Any

import numba
import numba.cuda
from numba import float64, uint8, uint32

from knnbench.kernels import cuda_launch
from knnbench.kernels.cuda_intrinsics import VECTOR_BYTES, filled, folded, gathered, vectors_of

__all__ = ["launch_losses", "row_length", "sample_blocks"]

# A power of two.
THREADS = 64
PER_THREAD = 4
CLASSES = 10

# Of a sample in shared memory: with 256 samples 32 KiB.
FEATURE_BYTES = 128

# Vectors of samples that a thread loads before it stores the first; a power of two, as PER_THREAD.
TOGETHER = 8

# The simulator swaps a global of this module that is `numba.cuda`, as in `knnbench.kernels.cuda_tiles`.
cuda: Any = numba.cuda


def sample_blocks(n_samples: int) -> int:
    """Return how many blocks of threads some samples take, for one model."""
    return -(-n_samples // (THREADS * PER_THREAD))


def row_length(n_features: int, dtype: Any) -> int:
    """Return the length of a row that is filled up with zeros to whole vectors."""
    multiple: int = VECTOR_BYTES // dtype.itemsize
    return -(-n_features // multiple) * multiple


def launch_losses(dtype: Any, *args: Any) -> None:
    """Start the kernel for weights of float32 or float64.

    Parameters
    ----------
    dtype : numpy.dtype
    *args : device arrays
        ``X, labels, sample_weight, weights, intercepts, losses``. Rows of X have `row_length`, weights are (n_models,
        n_features, n_classes); the last, (n_models, n_blocks), is filled with the summed losses of the samples of each
        block. What is neither X, labels nor weights is float64.
    """
    elements = VECTOR_BYTES // args[0].dtype.itemsize
    features = max(FEATURE_BYTES // dtype.itemsize, elements)
    kernel = _kernel(numba.from_dtype(dtype), numba.from_dtype(args[0].dtype), features)
    n_models, n_blocks = args[-1].shape
    cuda_launch.launch(kernel, (n_blocks, n_models), THREADS, *args)


@functools.cache
def _kernel(real: Any, element: Any, features: int) -> Any:
    threads, per_thread, classes = THREADS, PER_THREAD, CLASSES
    edge, vector = threads * per_thread, VECTOR_BYTES * 8 // element.bitwidth
    depth = features // vector
    # Bytes come in words: of single ones the compiler makes loads of their own.
    word, each = (uint32, 4) if element == uint8 else (element, 1)
    lanes, together = vector // each, min(TOGETHER, per_thread * depth)
    words_of, no_words = vectors_of(word), filled(word, lanes)

    @cuda_launch.inlined
    def fetch(number: Any, X: Any, first: Any, start: Any, turn: Any, thread: Any) -> Any:
        place = uint32((turn + number) * threads + thread)
        row, at, n_vectors = first + place // depth, start // vector + place % depth, X.shape[1] // vector
        if at < n_vectors:
            return words_of(X, min(row, X.shape[0] - 1) * n_vectors + at)
        return no_words()

    @cuda_launch.inlined
    def spread(state: Any, number: Any, x: Any, samples: Any, turn: Any, thread: Any) -> Any:
        place = uint32((turn + number // lanes) * threads + thread)
        f = place % depth * vector + number % lanes * each
        if each == 1:
            samples[f, place // depth] = real(x)
        else:
            samples[f, place // depth] = real(x & 255)
            samples[f + 1, place // depth] = real(x >> 8 & 255)
            samples[f + 2, place // depth] = real(x >> 16 & 255)
            samples[f + 3, place // depth] = real(x >> 24)
        return state

    @cuda_launch.inlined
    def fetch_weight(number: Any, weights: Any, model: Any, start: Any, first_class: Any, thread: Any) -> Any:
        place = uint32(number * threads + thread)
        f, c = start + place // classes, first_class + place % classes
        if f < weights.shape[1] and c < weights.shape[2]:
            return weights[model, f, c]
        return real(0)

    @cuda_launch.inlined
    def spread_weight(state: Any, number: Any, w: Any, columns: Any, thread: Any) -> Any:
        place = uint32(number * threads + thread)
        if place < features * classes:
            columns[place // classes, place % classes] = w
        return state

    fetched, store = gathered(fetch, together), folded(spread)
    fetched_weights, store_weights = gathered(fetch_weight, -(-features * classes // threads)), folded(spread_weight)
    # A column more than is used, against conflicts of banks, as in `knnbench.kernels.cuda_tiles`.
    padded = edge + 1

    @cuda_launch.compiled()
    def losses(X: Any, labels: Any, sample_weight: Any, weights: Any, intercepts: Any, sums: Any) -> None:
        # The simulator wants each shared array on a line of its own.
        samples = cuda.shared.array((features, padded), real)
        columns = cuda.shared.array((features, classes), real)
        largest = cuda.shared.array(edge, float64)
        below = cuda.shared.array(edge, float64)
        right = cuda.shared.array(edge, float64)
        totals = cuda.shared.array(threads, float64)
        acc = cuda.local.array((per_thread, classes), real)
        thread, model = cuda.threadIdx.x, cuda.blockIdx.y
        first = cuda.blockIdx.x * edge
        for i in range(thread, edge, threads):
            largest[i] = -math.inf
            below[i] = 0.0
            right[i] = 0.0
        for first_class in range(0, weights.shape[2], classes):
            for r in range(per_thread):
                for c in range(classes):
                    acc[r, c] = real(0)
            for start in range(0, X.shape[1], features):
                store_weights(0, fetched_weights((weights, model, start, first_class, thread)), (columns, thread))
                for turn in range(0, per_thread * depth, together):
                    store(0, fetched((X, first, start, turn, thread)), (samples, turn, thread))
                cuda.syncthreads()
                for f in range(features):
                    for r in range(per_thread):
                        x = samples[f, thread + r * threads]
                        for c in range(classes):
                            acc[r, c] += x * columns[f, c]
                cuda.syncthreads()
            # Each thread reads what it wrote; there are as many rows as classes, or more.
            for r in range(per_thread):
                for c in range(classes):
                    samples[c, thread + r * threads] = acc[r, c]
            for i in range(thread, min(edge, X.shape[0] - first), threads):
                for c in range(min(classes, weights.shape[2] - first_class)):
                    logit = float64(samples[c, i]) + intercepts[model, first_class + c]
                    if first_class + c == labels[first + i]:
                        right[i] = logit
                    if logit > largest[i]:
                        below[i] = below[i] * math.exp(largest[i] - logit) + 1.0
                        largest[i] = logit
                    else:
                        below[i] += math.exp(logit - largest[i])
            cuda.syncthreads()
        total = float64(0)
        for i in range(thread, min(edge, X.shape[0] - first), threads):
            total += sample_weight[first + i] * (math.log(below[i]) + (largest[i] - right[i]))
        totals[thread] = total
        cuda.syncthreads()
        width = threads // 2
        while width > 0:
            if thread < width:
                totals[thread] += totals[thread + width]
            cuda.syncthreads()
            width //= 2
        if thread == 0:
            sums[model, cuda.blockIdx.x] = totals[0]

    return losses
