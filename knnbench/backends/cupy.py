"""CuPy: neighbours by the fused search of `knnbench.kernels.cuda_search`, distances by cuBLAS or a kernel of our own.

Euclidean and cosine neighbours of float32 are chosen by products of float16, on tensor cores: a few more than k, which
are computed once more by the direct form. What the rounding to float16 took from each row is measured, so that the
error of a product is known; queries for which it could have hidden a neighbour are searched again by the direct form.

What the fused search does not take (more than 1,024 neighbours, products in float64, uint8 rows whose sums need 64
bits, devices before compute capability 8.0 or with too little shared memory) is searched block by block.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cupy
import numpy as np

from knnbench import interchange
from knnbench.blocking import block_shape, slices
from knnbench.bounds import halves_error
from knnbench.dtypes import Array
from knnbench.errors import BackendUnavailableError
from knnbench.kernels import cuda_row_source
from knnbench.kernels.cuda_compiler import machine_code
from knnbench.kernels.cuda_linear_source import CLASSES, MOST_MODELS, UNIT, loss_kernel, row_chunks
from knnbench.kernels.cuda_row_source import (
    ROWS_A_BLOCK,
    halve_source,
    norms_source,
    pack_source,
    scan_source,
    unit_source,
)
from knnbench.kernels.cuda_search import (
    AGAIN_THREADS,
    CHUNK,
    LARGEST_K,
    MERGED,
    MOST_ROWS,
    PANEL_ROWS,
    Search,
    merge_shape,
    panels_shape,
    parts_of,
    recompute_source,
    search_of,
)
from knnbench.kernels.cuda_source import PAIR_THREADS, THREADS, TILE, direct_source
from knnbench.metrics import Space

from .base import Candidates, Capabilities, Native, Scan, byte_operations, float_operations
from .blockwise import CENTRE_OF_UINT8, SPARE, BlockCorpus, Blocks, BlockSearch, BlockwiseBackend
from .linear import DEVICE_ELEMENTS, ArrayLoss, LinearLoss
from .upload import Lane, Uploader

__all__ = ["CupyBackend"]

TF32_VARIABLE = "CUPY_TF32"

# Bytes of a row from which on padding it to a multiple of `CHUNK` adds at most a quarter. Shorter ones are padded to
# `WORD`, the smallest piece that is copied to shared memory.
PADDED_BYTES = 4 * CHUNK
WORD = 4


# Rows are scaled so that the largest element lies below 2 to this: queries may have elements 16 times as large, and
# what is 2**26 times smaller is still rounded to 11 bits.
HALF_EXPONENT = 12

# Scales beyond this are no float32, or leave no room for squares.
MOST_EXPONENT = 60

# Asks for the searches that give tensor cores the work of four warps at once. Emulated and compiled they are right, but
# no device has run them yet; an earlier form, whose threads copied, was right on an H100 and no faster.
GROUP_VARIABLE = "KNNBENCH_WGMMA"

# Of devices that have ``wgmma``, which later ones do not.
GROUP_CAPABILITY, GROUP_ARCHITECTURE = "90", "90a"
PROBE = 'extern "C" __global__ void probe() {}'

# Of losses of linear models: what a call takes beyond the products, on the host and on the bus, and multiply-adds a
# second, on an H200: calls of 1, 4 and 16 models of MNIST took 0.12, 0.21 and 0.64 ms. They decide how many models a
# call is given, not what comes of it.
CALL_S = 8.5e-5
LOSS_RATE = 1.7e13


@dataclass(frozen=True, slots=True)
class Halves:
    """Centred rows as float16.

    Attributes
    ----------
    rows : (n, any) native array
        Centred, times `scale`, rounded, with zeros at the ends that 128-bit loads need; or such rows in panels.
    scale : (1,) native array
        A power of two.
    norms, lost : (n,) native arrays
        Squared norms, times the square of `scale`, of centred rows and of what rounding took from them.
    columns : (any,) native array
        `norms`, and room behind.
    """

    rows: Native
    scale: Native
    norms: Native
    lost: Native
    columns: Native


@dataclass(frozen=True, slots=True)
class SearchRows(BlockCorpus):
    """Rows with what the fused search wants of them.

    Attributes
    ----------
    packed : native array
        What is accumulated: `rows` or `centred`, (n, any) with zeros at the ends that 128-bit loads need; or in panels.
    own_norms : native array or None
        Squared norms (n,) of `packed`, where the search uses norms.
    columns : native array or None
        What the search looks at for each row of the corpus: its squared norm, or the reciprocal of its length.
    halves : Halves or None
        Of float32 with products, where the device has room for their tiles.
    """

    packed: Native = None
    own_norms: Native | None = None
    columns: Native | None = None
    halves: Halves | None = None


class CupyBackend(BlockwiseBackend):
    """The fused search, and the blockwise one where that ends.

    Notes
    -----
    CuPy compiles every kernel so that subnormal float32 are taken as 0.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(device="cuda", certifies=True)
    # Blocks large enough that starting kernels takes little of the time; single pairs need no differences held.
    largest: ClassVar[Blocks] = Blocks(queries=8192, corpus=4096, elements=0)

    def __init__(self) -> None:
        if os.environ.get(TF32_VARIABLE, "0") != "0":
            raise BackendUnavailableError(
                f"${TF32_VARIABLE} lets cuBLAS round float32 to 11 bits, which breaks the declared error of products; "
                f"unset it"
            )

    @property
    def xp(self) -> Any:
        """cupy itself."""
        return cupy

    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return a C-contiguous CuPy array."""
        if not interchange.on_device(rows):
            return self.uploader().upload(np.asarray(rows), np.dtype(dtype))
        return cupy.ascontiguousarray(interchange.take("cupy", rows), dtype=dtype)

    def uploader(self) -> Uploader:
        """Return that of the current device."""
        return uploader_of(cupy.cuda.Device().id)

    def ran_out(self, error: Exception) -> bool:
        """Return whether CuPy's pool found no memory, having given back what it keeps."""
        if not isinstance(error, cupy.cuda.memory.OutOfMemoryError):
            return False
        cupy.get_default_memory_pool().free_all_blocks()
        return True

    def to_numpy(self, native: Native) -> Array:
        """Return a copy on the host."""
        return np.asarray(native.get())

    def synchronize(self) -> None:
        """Wait for the current stream, on which everything runs."""
        cupy.cuda.get_current_stream().synchronize()

    def scan(self, native: Native, *, finite: bool, zero: bool) -> Scan:
        """Look through the rows on the device, a warp for each."""
        if not finite and not zero:
            return Scan(None, None)
        n_rows = len(native)
        found = cupy.full(2, n_rows, np.uint64)
        on_rows(scan_source(native.dtype), "scan_rows", native, found)
        not_finite, all_zero = (row if row < n_rows else None for row in self.to_numpy(found).tolist())
        return Scan(not_finite if finite else None, all_zero if zero else None)

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        is_rounded = space.is_integer and not space.form.keeps_integers
        wide = ranked.astype(np.float64) if is_rounded else ranked
        return space.form.finish(cupy, wide).astype(space.output, copy=False)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the products, or of the direct form on floats; neighbours of bytes take other units."""
        if op == "knn" and fits(chosen(space, halves=True)):
            return {"cuda-gemm-float16": 1}
        if not space.is_integer or (op != "knn" and space.form.from_dot):
            return float_operations("cuda", space, product=True)
        return byte_operations(space, "cuda-matrix-int8") if op == "knn" else {}

    def stopwatch(self) -> Callable[[], float | None]:
        """Record an event on the current stream, and another at the stop."""
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()

        def stop() -> float | None:
            end.record()
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(start, end)) * 1e-3

        return stop

    def device_peak(self) -> Callable[[], int | None]:
        """Empty the memory pool: what it then takes from the device it keeps, so that its size is its peak."""
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        return lambda: int(pool.total_bytes() - before)

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return the losses of `Backend.linear_loss`, with the samples on the device."""
        samples, labels, weight = (self.to_native(array, array.dtype) for array in (X, y, sample_weight))
        # Of classes in parts, which hand something on; not much, but asynchronous copies must be there.
        largest = loss_kernel(X.dtype, dtype, X.shape[1], 2 * CLASSES, MOST_MODELS)
        fits_32_bits = largest.samples * (X.shape[1] * X.itemsize + CHUNK) < 1 << 32
        if largest.most_bytes <= shared_memory() and fits_32_bits:
            return FusedLoss(samples, labels, weight, int(y.max()) + 1, dtype)
        return ArrayLoss(cupy, samples, labels, weight, dtype, DEVICE_ELEMENTS, f"cuda-gemm-{dtype}")

    def direct_block(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the accumulated values of all pairs, by the CUDA kernel."""
        shape = len(queries), len(corpus)
        out = cupy.empty(shape, dtype=space.accumulator)
        sizes = np.int64(shape[0]), np.int64(shape[1]), np.int64(space.n_features)
        grid = -(-shape[1] // TILE), -(-shape[0] // TILE)
        kernel = direct_module(space).get_function("accumulate_block")
        kernel(grid, (THREADS, THREADS), (queries, corpus, out, *sizes))
        return out

    def prepare(self, corpus: Native, space: Space) -> BlockCorpus:
        """Centre and pack a corpus and take its norms."""
        return self._halved(super().prepare(corpus, space), space)

    def prepare_about(self, corpus: Native, centre: Any, space: Space) -> BlockCorpus:
        """Centre a corpus about a given point, pack it and take its norms."""
        return self._halved(super().prepare_about(corpus, centre, space), space)

    def candidates(self, queries: Native, prepared: BlockCorpus, count: int, space: Space, budget: int) -> Candidates:
        """Return what is selected by products in float32: how tensor cores round is known from measurements only."""
        prepared, left = self._without_halves(prepared, space, budget)
        return super().candidates(queries, prepared, count, space, left)

    def pairwise(self, queries: Native, prepared: BlockCorpus, space: Space, budget: int) -> Native:
        """Return all distances, by products in the dtype of the rows."""
        prepared, left = self._without_halves(prepared, space, budget)
        return super().pairwise(queries, prepared, space, left)

    def _prepared_rows(self, rows: Native, space: Space) -> Native:
        if space.is_integer or not space.metric.unit_rows:
            return rows
        result = cupy.empty_like(rows)
        on_rows(unit_source(rows.dtype), "unit_rows", rows, result)
        return result

    def knn(self, queries: Native, prepared: BlockCorpus, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest; so many that no fused search takes them by products in the dtype of the rows."""
        n_corpus = len(prepared.rows)
        if fused(space, min(k + SPARE, n_corpus), len(queries), n_corpus) is None:
            prepared, budget = self._without_halves(prepared, space, budget)
        return super().knn(queries, prepared, k, space, budget)

    def _halved(self, taken: BlockCorpus, space: Space) -> BlockCorpus:
        """Return a corpus with its halves in the place of its centred rows, if there is a search that takes them."""
        if taken.centre is None or not fits(chosen(space, halves=True)):
            return taken
        assert isinstance(taken, SearchRows)
        assert taken.centred is not None
        _, exponent = cupy.frexp(cupy.maximum(taken.centred.max(), -taken.centred.min()))
        scale = cupy.ldexp(np.float32(1), cupy.clip(HALF_EXPONENT - exponent, -MOST_EXPONENT, MOST_EXPONENT))
        halves = halved(taken.rows, taken.centre, scale.reshape(1), in_panels=takes_panels(space, halves=True))
        return SearchRows(taken.rows, taken.norms, taken.centre, halves=halves)

    def _without_halves(self, prepared: BlockCorpus, space: Space, budget: int) -> tuple[BlockCorpus, int]:
        """Return a corpus that is searched in its own dtype, and what is left of a budget.

        A corpus that is larger than half of it is not charged: who has that on a device has room for another.
        """
        if halves_of(prepared) is None:
            return prepared, budget
        n_bytes = len(prepared.rows) * (space.n_features * space.dtype.itemsize + CHUNK)
        return self._take(prepared.rows, prepared.centre, space), budget - n_bytes * (2 * n_bytes <= budget)

    def _take_queries(self, queries: Native, prepared: BlockCorpus, space: Space) -> BlockCorpus:
        halves = halves_of(prepared)
        if halves is None:
            return super()._take_queries(queries, prepared, space)
        rows = self._prepared_rows(queries, space)
        own = halved(rows, prepared.centre, halves.scale, in_panels=takes_panels(space, halves=True))
        return SearchRows(rows, halves=own)

    def _take(self, rows: Native, centre: Native | None, space: Space) -> SearchRows:
        if centre is not None and space.form.from_dot is not None:
            centred = padded(rows, centre=centre)
            norms = squared_norms(centred, centred.dtype, centre=0)
            return SearchRows(rows, norms, centre, centred, centred, norms, norms)
        packed = panels_of(rows) if takes_panels(space) else padded(rows)
        if space.form.from_dot is None:
            return SearchRows(rows, packed=packed)
        if space.form.rank_uses_norms:
            norms = squared_norms(rows, space.ranked, centre=0)
            return SearchRows(rows, norms, None, None, packed, norms, (1 / cupy.sqrt(norms)).astype(np.float32))
        norms = squared_norms(rows, space.accumulator, centre=CENTRE_OF_UINT8)
        columns = room_for_columns(len(rows), space.accumulator)
        own_norms = squared_norms(rows, space.accumulator, centre=0, room=columns)
        return SearchRows(rows, norms, None, None, packed, own_norms, columns)

    def _search_blocks(self, n_queries: int, n_corpus: int, k: int, space: Space, budget: int) -> Blocks:
        search = fused(space, k, n_queries, n_corpus)
        if search is None:
            return self._blocks(n_queries, n_corpus, k, space, budget)
        halves = chosen(space, halves=True)
        others = search, halves, search_of(space, direct=True)
        search = halves if halves is not None and fits(halves) else search
        # What a query holds: its own rows, the lists, and as they are computed once more.
        row_bytes = 6 * (space.n_features * max(WORD, space.dtype.itemsize) + CHUNK)
        lists = max(other.list_bytes(k) for other in others if other)
        queries, _ = block_shape(
            n_queries,
            1,
            budget=budget,
            per_pair=row_bytes + lists + 6 * k * (space.ranked.itemsize + 8),
            max_queries=n_queries,
        )
        # Half of what is left: lists of parts only serve to give all multiprocessors work.
        left = max(0, budget - queries * (row_bytes + lists)) // 2
        most = min(MERGED // k, 1 + left // (queries * lists))
        multiprocessors, _ = device_limits(cupy.cuda.Device().id)
        tiles = -(-queries // search.tile_queries), -(-n_corpus // search.tile_corpus)
        n_parts = parts_of(*tiles, search.tile.blocks * multiprocessors, most)
        part_rows = -(-n_corpus // n_parts)
        return Blocks(queries, -(-part_rows // search.tile_corpus) * search.tile_corpus, 0)

    def _nearest(
        self, block: BlockCorpus, prepared: BlockCorpus, k: int, space: Space, blocks: Blocks, *, direct: bool = False
    ) -> tuple[Native, Native]:
        # The direct form is asked for after a search of more candidates, whose blocks these are.
        if fused(space, k + SPARE * direct, len(block.rows), len(prepared.rows)) is None:
            return BlockSearch._nearest(self, block, prepared, k, space, blocks, direct=direct)
        if direct:
            block, prepared = SearchRows(block.rows, packed=block.rows), SearchRows(prepared.rows, packed=prepared.rows)
        assert isinstance(block, SearchRows)
        assert isinstance(prepared, SearchRows)
        halves, own = prepared.halves, block.halves
        if halves is not None and own is not None:
            block, prepared = (
                SearchRows(own.norms, packed=own.rows, own_norms=own.norms, columns=own.columns)
                for own in (own, halves)
            )
        queries, corpus = block.packed, prepared.packed
        n_queries, n_corpus, row_bytes = len(block.rows), len(prepared.rows), queries.shape[1] * queries.dtype.itemsize
        in_panels = takes_panels(space, direct=direct, halves=halves is not None)
        if in_panels:
            row_bytes = space.n_features * (1 if halves is None else 2)
        copy_bytes = CHUNK if in_panels else math.gcd(CHUNK, row_bytes, queries.data.ptr, corpus.data.ptr)
        options = {"n_queries": n_queries, "direct": direct, "halves": halves is not None, "copy_bytes": copy_bytes}
        search = chosen(space, **options)
        assert search is not None
        part_rows, device = blocks.corpus, cupy.cuda.Device().id
        n_parts = -(-n_corpus // part_rows)
        lists = n_parts, search.list_length(k), n_queries
        keys, rows = cupy.empty(lists, search.key), cupy.empty(lists, np.uint32)
        # A search without norms does not look at what stands for them.
        norms = (corpus,) * 3
        if prepared.own_norms is not None:
            norms = block.own_norms, prepared.own_norms, prepared.columns
        start(
            kernel(search.source, "search", search.shared_bytes, device, search.tile.in_groups),
            (-(-n_queries // search.tile_queries), n_parts),
            search.tile.threads,
            (queries, corpus, *norms, keys, rows),
            (n_queries, n_corpus, row_bytes, part_rows, k),
            search.shared_bytes,
        )
        values, indices = merged(search.source, keys, rows, k, space.ranked, in_groups=search.tile.in_groups)
        return (values if halves is None else values / halves.scale / halves.scale), indices

    def _recomputed(
        self, indices: Native, block: BlockCorpus, prepared: BlockCorpus, space: Space, blocks: Blocks
    ) -> tuple[Native, Native]:
        n_queries, wanted = indices.shape
        merged_bytes = MERGED * (space.dtype.itemsize + 4)
        if wanted > LARGEST_K or len(prepared.rows) > MOST_ROWS or merged_bytes > shared_memory():
            return super()._recomputed(indices, block, prepared, space, blocks)
        source = recompute_source(space.dtype)
        keys = cupy.empty((1, wanted, n_queries), f"uint{8 * space.dtype.itemsize}")
        rows = cupy.empty(keys.shape, np.uint32)
        start(
            _module(source).get_function("recompute"),
            (n_queries,),
            AGAIN_THREADS,
            (block.rows, prepared.rows, indices, keys, rows),
            (n_queries, space.n_features, wanted),
            0,
        )
        return merged(source, keys, rows, wanted, space.dtype)

    def _are_right(self, last: Native, kth: Native, block: BlockCorpus, prepared: BlockCorpus, space: Space) -> Native:
        halves, own = halves_of(prepared), halves_of(block)
        if halves is None or own is None:
            return super()._are_right(last, kth, block, prepared, space)
        scale = cupy.asarray(halves.scale, np.float64)
        length, own_loss = (cupy.sqrt(cupy.asarray(array, np.float64)) / scale for array in (own.norms, own.lost))
        loss = cupy.sqrt(cupy.asarray(halves.lost.max(), np.float64)) / scale
        kth = cupy.asarray(kth, np.float64)
        # A row as near as the k-th is no longer than that.
        error = halves_error(space, length, length + cupy.sqrt(kth), own_loss, loss)
        # A comparison with NaN, from an overflow, is false.
        return cupy.asarray(last, np.float64) - error > kth

    def _pairs(self, queries: Native, corpus: Native, i: Native, j: Native, space: Space, elements: int) -> Native:
        out = cupy.empty(len(i), dtype=space.accumulator)
        # What nonzero() returns are columns of one array.
        rows = cupy.ascontiguousarray(i), cupy.ascontiguousarray(j)
        sizes = np.int64(len(i)), np.int64(space.n_features)
        grid = (-(-len(i) // PAIR_THREADS),)
        kernel = direct_module(space).get_function("accumulate_pairs")
        kernel(grid, (PAIR_THREADS,), (queries, corpus, *rows, out, *sizes))
        return out


class CupyLane(Lane):
    """Copies on a stream of CuPy's."""

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Native:
        """Return an array of CuPy's pool."""
        return cupy.empty(shape, dtype)

    def page_locked(self, n_bytes: int) -> Array:
        """Return memory that CuPy's pool has back when the array is gone."""
        return page_locked(n_bytes)

    def is_page_locked(self, rows: Array) -> bool:
        """Ask the runtime, whoever allocated them."""
        runtime = cupy.cuda.runtime
        return bool(runtime.pointerGetAttributes(rows.ctypes.data).type == runtime.memoryTypeHost)

    def begin(self) -> None:
        """Wait for CuPy's current stream."""
        self._stream.wait_event(cupy.cuda.get_current_stream().record())

    def copy(self, source: Array, target: Native, rows: slice) -> Callable[[], None]:
        """Copy, and record an event."""
        target[rows].data.copy_from_host_async(source.ctypes.data, source.nbytes, self._stream)
        wait: Callable[[], None] = self._stream.record().synchronize
        return wait


def page_locked(n_bytes: int) -> Array:
    """Return page-locked memory as uint8, which CuPy's pool has back when the array is gone."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)


@functools.cache
def uploader_of(device: int) -> Uploader:
    """Return the uploader to a device, by its number, while it is the current one."""
    return Uploader(CupyLane())


def chosen(space: Space, **options: Any) -> Search | None:
    """Return `search_of` for the current device."""
    return search_of(space, in_groups=multiplies_in_groups(cupy.cuda.Device().id), **options)


def takes_panels(space: Space, **options: Any) -> bool:
    """Return whether the search that is `chosen` wants its rows in panels."""
    search = chosen(space, **options)
    return search is not None and search.tile.in_groups


def panels_of(rows: Native) -> Native:
    """Return C-contiguous rows in the panels of `pack_rows`."""
    n_rows, row_bytes = len(rows), rows.shape[1] * rows.dtype.itemsize
    packed = cupy.zeros(panels_shape(n_rows, row_bytes), np.uint8)
    on_rows(pack_source(), "pack_rows", rows.view(np.uint8), packed, more=(np.int32(PANEL_ROWS),))
    return packed


class Room:
    """Where some models and their losses lie, on both sides of the bus.

    Parameters
    ----------
    n_models : int
        At the most.
    n_classes : int
    weight_shape : tuple of int
        As of `LossKernel`.
    n_units : int
        Losses of one model.
    dtype : numpy.dtype
        Of the weights.
    """

    def __init__(
        self, n_models: int, n_classes: int, weight_shape: tuple[int, int, int], n_units: int, dtype: np.dtype[Any]
    ) -> None:
        self.n_models, self.shape = n_models, (n_classes, weight_shape)
        self._intercept_bytes = -(-n_models * n_classes * dtype.itemsize // CHUNK) * CHUNK
        self._model_bytes = math.prod(weight_shape) * dtype.itemsize
        self._host = page_locked(self._intercept_bytes + n_models * self._model_bytes)
        self._host[:] = 0  # what lies past the ends of features and classes stays so
        self._device = cupy.empty(self._host.shape, np.uint8)
        self.intercepts, self.weights = self._device, self._device[self._intercept_bytes :]
        self._host_intercepts, self._host_weights = (
            part.view(dtype) for part in np.split(self._host, [self._intercept_bytes])
        )
        self._host_intercepts = self._host_intercepts[: n_models * n_classes].reshape(n_models, n_classes)
        self._host_weights = self._host_weights.reshape(n_models, *weight_shape)
        self.sums = cupy.empty((n_models, n_units), np.float64)
        self._host_sums = page_locked(8 * n_models * n_units).view(np.float64).reshape(n_models, n_units)

    def upload(self, W: Array, b: Array, stream: Any) -> None:
        """Start to copy models."""
        n_models, n_features, n_classes = W.shape
        n_columns = self._host_weights.shape[-1]
        self._host_intercepts[:n_models] = b
        for part, classes in enumerate(slices(n_classes, n_columns)):
            self._host_weights[:n_models, part, :n_features, : classes.stop - classes.start] = W[..., classes]
        n_bytes = self._intercept_bytes + n_models * self._model_bytes
        self._device.data.copy_from_host_async(self._host.ctypes.data, n_bytes, stream)

    def download(self, n_models: int, stream: Any) -> Array:
        """Return the sums of the first models, once they are there."""
        sums = self._host_sums[:n_models]
        self.sums.data.copy_to_host_async(sums.ctypes.data, sums.nbytes, stream)
        stream.synchronize()
        return sums


class FusedLoss(LinearLoss):
    """Losses by the kernel of `knnbench.kernels.cuda_linear_source`, of all models in one launch between two copies.

    Parameters
    ----------
    samples, labels, sample_weight : (n, n_features), (n,) and (n,) native arrays
    n_classes : int
        That there are labels of: what a model costs is guessed from it.
    dtype : numpy.dtype
        Of the weights.
    """

    def __init__(
        self, samples: Native, labels: Native, sample_weight: Native, n_classes: int, dtype: np.dtype[Any]
    ) -> None:
        super().__init__()
        self.spares_host = True
        self.pass_cost = CALL_S / (samples.size * n_classes / LOSS_RATE)
        self._n_samples, self._dtype, self._element = len(samples), dtype, samples.dtype
        self._samples = padded(samples, CHUNK), labels, sample_weight
        self._n_units = -(-self._n_samples // UNIT)
        self._room: Room | None = None

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        n_models, n_features, n_classes = W.shape
        losses = loss_kernel(self._element, self._dtype, n_features, n_classes, n_models)
        room, shape = self._room, (n_classes, losses.weight_shape)
        if room is None or room.n_models < n_models or room.shape != shape:
            # Numbers of models change from call to call; memory of a few sizes serves them.
            room = self._room = Room(1 << (n_models - 1).bit_length(), *shape, self._n_units, self._dtype)
        stream = cupy.cuda.get_current_stream()
        room.upload(W, b, stream)
        function = kernel(losses.source, "losses", losses.most_bytes, cupy.cuda.Device().id, False)
        sizes = row_chunks(n_features, self._element), n_classes, n_models
        function(
            (-(-self._n_samples // losses.samples), -(-n_models // losses.models)),
            (losses.threads,),
            (
                *self._samples,
                room.weights,
                room.intercepts,
                room.sums,
                np.uint64(self._n_samples),
                *map(np.uint32, sizes),
            ),
            shared_mem=losses.shared_bytes,
        )
        self.operations[f"cuda-fma-{self._dtype}"] += self._n_samples * W.size
        # Not numpy's sum, which adds in an order that depends on the shape.
        totals = np.add.accumulate(room.download(n_models, stream), axis=1)[:, -1]
        return np.where(totals <= limit, totals, math.inf)


def fused(space: Space, k: int, n_queries: int, n_corpus: int) -> Search | None:
    """Return the fused search of a problem, None if there is none or the device is too small for it."""
    search = chosen(space, n_queries=n_queries) if k <= LARGEST_K and n_corpus <= MOST_ROWS else None
    return search if fits(search) else None


def fits(search: Search | None) -> bool:
    """Return whether there is a search, and the current device has room for its tiles."""
    return search is not None and search.shared_bytes <= shared_memory()


def shared_memory() -> int:
    """Return the bytes of shared memory that a block of threads may take on the current device."""
    return device_limits(cupy.cuda.Device().id)[1]


@functools.cache
def multiplies_in_groups(device: int) -> bool:
    """Return whether searches by ``wgmma`` are asked for, a device has it, and CuPy the compiler for it."""
    if (
        os.environ.get(GROUP_VARIABLE, "0") == "0"
        or str(cupy.cuda.Device(device).compute_capability) != GROUP_CAPABILITY
    ):
        return False
    try:
        _module(PROBE, in_groups=True)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        warnings.warn(
            f"CuPy {cupy.__version__} does not compile for sm_{GROUP_ARCHITECTURE}, so that products take twice as "
            f"long: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def halved(rows: Native, centre: Native, scale: Native, *, in_panels: bool) -> Halves:
    """Return rows less a centre, times a scale, as float16, by the CUDA kernel."""
    n_rows, n_features = rows.shape
    step = 1 if in_panels else CHUNK // 2
    halves = cupy.empty((n_rows, -(-n_features // step) * step), np.float16)
    columns, lost = room_for_columns(n_rows, np.float32), cupy.empty(n_rows, np.float32)
    norms = columns[:n_rows]
    on_rows(halve_source(), "halve", rows, centre, scale, halves, norms, lost, more=(np.int64(halves.shape[1]),))
    return Halves(panels_of(halves) if in_panels else halves, scale, norms, lost, columns)


def halves_of(rows: BlockCorpus) -> Halves | None:
    """Return the halves of rows, None if they have none."""
    return rows.halves if isinstance(rows, SearchRows) else None


def merged(
    source: str, keys: Native, rows: Native, k: int, ranked: np.dtype[Any], *, in_groups: bool = False
) -> tuple[Native, Native]:
    """Return the k first, in order, of the lists of all parts, (n_parts, any, n_queries), by `merge` of a source."""
    n_parts, length, n_queries = keys.shape
    values, indices = cupy.empty((n_queries, k), ranked), cupy.empty((n_queries, k), np.int64)
    threads, size = merge_shape(n_parts * k)
    pair_bytes = keys.dtype.itemsize + rows.dtype.itemsize
    start(
        kernel(source, "merge", MERGED * pair_bytes, cupy.cuda.Device().id, in_groups),
        (n_queries,),
        threads,
        (keys, rows, values, indices),
        (n_queries, n_parts, length, k, size),
        size * pair_bytes,
    )
    return values, indices


@functools.cache
def device_limits(device: int) -> tuple[int, int]:
    """Return how many multiprocessors a device has, and the bytes of shared memory that a block of threads may take.

    Asked once, as CuPy asks for all attributes at a time. 0 bytes where asynchronous copies are missing.
    """
    attributes, has_copies = cupy.cuda.Device(device).attributes, int(cupy.cuda.Device(device).compute_capability) >= 80
    return int(attributes["MultiProcessorCount"]), has_copies * int(attributes["MaxSharedMemoryPerBlockOptin"])


def padded(rows: Native, unit: int | None = None, centre: Native | None = None) -> Native:
    """Return rows whose length and address so many bytes divide: others are copied, with zeros at the ends.

    If it is not given, `unit` is that of the fused search, which reads short rows by words. With a centre, rows less it
    are returned.
    """
    n_rows, n_features = rows.shape
    unit = unit or (CHUNK if n_features * rows.dtype.itemsize >= PADDED_BYTES else WORD)
    step = max(1, unit // rows.dtype.itemsize)
    width = -(-n_features // step) * step
    if centre is None and width == n_features and rows.data.ptr % unit == 0:
        return rows
    result = cupy.zeros((n_rows, width), rows.dtype)
    if centre is None:
        result[:, :n_features] = rows
    else:
        cupy.subtract(rows, centre, out=result[:, :n_features])
    return result


def room_for_columns(n_rows: int, dtype: Any) -> Native:
    """Return room for a number of each row, and of those that fill up the last tile of panels."""
    return cupy.empty(panels_shape(n_rows, 1)[0], dtype)


def squared_norms(rows: Native, dtype: np.dtype[Any], *, centre: int, room: Native | None = None) -> Native:
    """Return the squared norms of rows less a centre, by the CUDA kernel."""
    norms = cupy.empty(len(rows), dtype) if room is None else room[: len(rows)]
    on_rows(norms_source(rows.dtype, dtype), "squared_norms", rows, norms, more=(np.int32(centre),))
    return norms


def on_rows(source: str, name: str, rows: Native, *arrays: Native, more: tuple[Any, ...] = ()) -> None:
    """Start a kernel of `cuda_row_source` on all rows."""
    n_rows, n_features = rows.shape
    arguments = rows, *arrays, np.int64(n_rows), np.int64(n_features), *more
    grid = (-(-n_rows // ROWS_A_BLOCK),)
    _module(source).get_function(name)(grid, (cuda_row_source.THREADS,), arguments)


def start(
    function: Any, grid: tuple[int, ...], threads: int, arrays: tuple[Native, ...], sizes: tuple[int, ...], shared: int
) -> None:
    """Start a kernel of the fused search on the current stream; its sizes have 32 bits."""
    function(grid, (threads,), (*arrays, *map(np.uint32, sizes)), shared_mem=shared)


@functools.cache
def kernel(source: str, name: str, shared_bytes: int, device: int, in_groups: bool) -> Any:
    """Return a kernel that may be started with so much shared memory: more than 48 KiB must be asked for.

    That is the kernel's on the current device, whose number is given, whoever starts it: each is always to be asked for
    with the same number of bytes.
    """
    function = _module(source, in_groups).get_function(name)
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def direct_module(space: Space) -> Any:
    """Return the compiled source of a space; CuPy keeps it on disk by a hash of the source."""
    return _module(direct_source(space))


@functools.cache
def _module(source: str, in_groups: bool = False) -> Any:
    if in_groups:
        return cupy.RawModule(path=str(machine_code(source, GROUP_ARCHITECTURE)))
    return cupy.RawModule(code=source, options=("--std=c++17",))
