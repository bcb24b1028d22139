"""numba on a CUDA device: kernels compiled from the metrics' own scalar functions."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numba.cuda
import numpy as np

from knnbench import interchange
from knnbench.blocking import block_shape, slices
from knnbench.dtypes import Array
from knnbench.kernels import cuda_linear, cuda_tiles
from knnbench.kernels.cuda_tiles import launch_rows, launch_tile
from knnbench.metrics import Space
from knnbench.ordering import largest

from .base import Backend, Capabilities, Native, Scan, float_operations
from .linear import LinearLoss
from .upload import Lane, Uploader

__all__ = ["NumbaCudaBackend"]

# A block of this shape has tiles and queries enough for the largest current devices; its values take 256 MiB
# in float32, and a small budget makes it smaller.
MAX_QUERIES = 16_384
MAX_CORPUS = 4_096

# CUDA_ERROR_OUT_OF_MEMORY, of a `CudaAPIError`.
OUT_OF_MEMORY = 2

cuda: Any = numba.cuda  # filled in at run time, so no type checker knows its names


@dataclass(frozen=True, slots=True)
class TileRows:
    """Rows as the metric accumulates them, and their squared norms if the ranking looks at them.

    Attributes
    ----------
    rows : (n, n_features) device array
    norms : (n,) device array of float64
        Of a single element, never read, where the ranking ignores norms.
    """

    rows: Native
    norms: Native


class NumbaCudaBackend(Backend):
    """Every distance by the direct form, in tiles; selection by a heap for each query."""

    capabilities: ClassVar[Capabilities] = Capabilities(device="cuda", certifies=True)

    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return a C-contiguous device array of numba's."""
        if not interchange.on_device(rows):
            return self.uploader().upload(np.asarray(rows), np.dtype(dtype))
        array = cuda.as_cuda_array(interchange.take("numba", rows))
        if array.dtype == dtype and array.is_c_contiguous():
            return array
        converted = cuda.device_array(array.shape, dtype)
        launch_rows(cuda_tiles.convert, array.size, array, converted)
        return converted

    def uploader(self) -> Uploader:
        """Return that of the current device."""
        return uploader_of(cuda.current_context().device.uuid)

    def ran_out(self, error: Exception) -> bool:
        """Return whether the driver found no memory, after numba has freed what it keeps of arrays that are gone."""
        # By name, because the simulator has no such class.
        return type(error).__name__ == "CudaAPIError" and getattr(error, "code", None) == OUT_OF_MEMORY

    def to_numpy(self, native: Native) -> Array:
        """Return a copy on the host."""
        return np.asarray(native.copy_to_host())

    def synchronize(self) -> None:
        """Wait for the device."""
        cuda.synchronize()

    def scan(self, native: Native, *, finite: bool, zero: bool) -> Scan:
        """Look through the rows on the device, a thread for each."""
        n_rows = len(native)
        found = cuda.to_device(np.full(2, n_rows))
        launch_rows(cuda_tiles.find_rows, n_rows, native, found)
        not_finite, all_zero = (row if row < n_rows else None for row in self.to_numpy(found).tolist())
        return Scan(not_finite if finite else None, all_zero if zero else None)

    def prepare(self, corpus: Native, space: Space) -> TileRows:
        """Return the prepared rows with their norms."""
        return self._take(corpus, self._workspace(len(corpus), space), space)

    def pairwise(self, queries: Native, prepared: TileRows, space: Space, budget: int) -> Native:
        """Return all distances."""
        n_queries = len(queries)
        result = cuda.device_array((n_queries, len(prepared.rows)), space.output)
        kernel = cuda_tiles.distance_tile(space)
        step, _ = block_shape(n_queries, 1, budget=budget, per_pair=row_bytes(space), max_queries=MAX_QUERIES)
        workspace = self._workspace(step, space)
        for rows in slices(n_queries, step):
            block = self._take(queries[rows], workspace, space)
            launch_tile(kernel, block.rows, prepared.rows, block.norms, prepared.norms, 0, result[rows])
        return result

    def knn(self, queries: Native, prepared: TileRows, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest."""
        n_queries, n_corpus = len(queries), len(prepared.rows)
        values = cuda.device_array((n_queries, k), space.ranked)
        indices = cuda.device_array((n_queries, k), np.int64)
        launch_rows(cuda_tiles.start_lists, n_queries, values, indices, largest(space.ranked))
        kernel = cuda_tiles.ranked_tile(space)
        step, width = block_shape(
            n_queries,
            n_corpus,
            budget=budget,
            per_pair=space.ranked.itemsize,
            per_query=row_bytes(space),
            max_queries=MAX_QUERIES,
            max_corpus=MAX_CORPUS,
        )
        # One allocation for all tiles: numba frees a dropped array only some time later.
        tiles, workspace = cuda.device_array(step * width, space.ranked), self._workspace(step, space)
        for rows in slices(n_queries, step):
            block, heaps, heap_rows = self._take(queries[rows], workspace, space), values[rows], indices[rows]
            for columns in slices(n_corpus, width):
                shape = columns.stop - columns.start, rows.stop - rows.start
                tile = tiles[: shape[0] * shape[1]].reshape(shape)
                # Corpus down and queries across, so that the threads of neighbouring queries read side by side.
                launch_tile(kernel, prepared.rows, block.rows, prepared.norms, block.norms, columns.start, tile)
                launch_rows(cuda_tiles.update_lists, shape[1], tile, columns.start, heaps, heap_rows)
        launch_rows(cuda_tiles.sort_lists, n_queries, values, indices)
        return values, indices

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        distances = cuda.device_array(ranked.shape, space.output)
        launch_rows(cuda_tiles.finish_values(space), ranked.size, ranked, distances)
        return distances

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return the losses of `Backend.linear_loss` by the fused kernel, with the samples on the device."""
        return DeviceLoss(X, y, sample_weight, dtype)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the direct form on floats."""
        return {} if space.is_integer else float_operations("cuda", space, product=False)

    def stopwatch(self) -> Callable[[], float | None]:
        """Record an event on the default stream, on which everything runs, and another at the stop."""
        start, end = cuda.event(), cuda.event()
        start.record()

        def stop() -> float | None:
            end.record()
            end.synchronize()
            return float(cuda.event_elapsed_time(start, end)) * 1e-3

        return stop

    def _workspace(self, n_rows: int, space: Space) -> TileRows:
        """Return room for what `_take` makes of as many rows."""
        rows = cuda.device_array((n_rows, space.n_features), space.dtype) if makes_unit_rows(space) else None
        return TileRows(rows, cuda.device_array(n_rows if space.form.rank_uses_norms else 1, np.float64))

    def _take(self, rows: Native, workspace: TileRows, space: Space) -> TileRows:
        """Return rows as the metric accumulates them, with their norms, in a workspace of as many rows or more."""
        n_rows, norms = len(rows), workspace.norms
        if space.form.rank_uses_norms:
            norms = norms[:n_rows]
            launch_rows(cuda_tiles.squared_norms, n_rows, rows, norms)
        if makes_unit_rows(space):
            unprepared, rows = rows, workspace.rows[:n_rows]
            launch_rows(cuda_tiles.unit_rows, n_rows, unprepared, rows)
        return TileRows(rows, norms)


def makes_unit_rows(space: Space) -> bool:
    """Return whether rows are copied to be brought to unit length."""
    return space.metric.unit_rows and not space.is_integer


def row_bytes(space: Space) -> int:
    """Return the bytes that a workspace takes for each row."""
    norms = space.form.rank_uses_norms * np.dtype(np.float64).itemsize
    return norms + makes_unit_rows(space) * space.n_features * space.dtype.itemsize


class NumbaLane(Lane):
    """Copies on a stream of numba's."""

    def __init__(self) -> None:
        self._stream = cuda.stream()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Native:
        """Return a device array."""
        return cuda.device_array(shape, dtype)

    def page_locked(self, n_bytes: int) -> Array:
        """Return memory that is freed with the array."""
        return np.asarray(cuda.pinned_array(n_bytes, np.uint8))

    def is_page_locked(self, rows: Array) -> bool:
        """Ask the driver, whoever allocated them; it takes memory that it does not know for an error."""
        try:
            from cuda.bindings import driver  # type: ignore[import-untyped]

            kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
            error, found = driver.cuPointerGetAttribute(kind, rows.ctypes.data)
        except (ImportError, RuntimeError):  # a numba that does without these bindings; its simulator
            return False
        return not int(error) and int(found) == int(driver.CUmemorytype.CU_MEMORYTYPE_HOST)

    def begin(self) -> None:
        """Wait for the default stream, on which everything runs."""
        self._recorded(0).wait(self._stream)

    def copy(self, source: Array, target: Native, rows: slice) -> Callable[[], None]:
        """Copy, and record an event."""
        target[rows].copy_to_device(source, self._stream)
        wait: Callable[[], None] = self._recorded(self._stream).synchronize
        return wait

    def _recorded(self, stream: Any) -> Any:
        event = cuda.event()
        event.record(stream)
        return event


@functools.cache
def uploader_of(device: str) -> Uploader:
    """Return the uploader to a device, by its UUID, while it is the current one."""
    return Uploader(NumbaLane())


class DeviceLoss(LinearLoss):
    """Losses of all models in one launch, those of a model added in the order of its blocks.

    Parameters
    ----------
    X, y, sample_weight, dtype
        As of `Backend.linear_loss`.
    """

    def __init__(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._dtype, self._n_features = dtype, X.size
        self._samples = [cuda.to_device(np.ascontiguousarray(array)) for array in (X, y, sample_weight)]
        self._blocks = cuda_linear.sample_blocks(len(X))

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        models = cuda.to_device(np.ascontiguousarray(W)), cuda.to_device(b.astype(np.float64))
        sums = cuda.device_array((len(W), self._blocks), np.float64)
        cuda_linear.launch_losses(self._dtype, *self._samples, *models, sums)
        self.operations[f"cuda-fma-{self._dtype}"] += self._n_features * b.size
        # Not numpy's sum, which adds in an order that depends on the shape.
        losses = np.add.accumulate(sums.copy_to_host(), axis=1)[:, -1]
        return np.where(losses <= limit, losses, math.inf)
