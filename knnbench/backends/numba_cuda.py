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
from knnbench.kernels import cuda_linear, cuda_rows, cuda_tiles
from knnbench.kernels.cuda_intrinsics import VECTOR_BYTES
from knnbench.kernels.cuda_launch import launch_rows
from knnbench.metrics import Space

from .base import Backend, Capabilities, Native, Scan, byte_operations, float_operations
from .linear import LinearLoss
from .upload import Lane, Uploader

__all__ = ["NumbaCudaBackend"]

# So many queries keep the largest current devices busy.
MAX_QUERIES = 16_384

# CUDA_ERROR_OUT_OF_MEMORY, of a `CudaAPIError`.
OUT_OF_MEMORY = 2

cuda: Any = numba.cuda  # filled in at run time, so no type checker knows its names


@dataclass(frozen=True, slots=True)
class TileRows:
    """Rows as the kernels take them, and their squared norms if those are wanted.

    Attributes
    ----------
    rows : (n, width) device array
        On addresses that 16 divides, each row filled up with zeros to whole vectors of 16 bytes.
    norms : (n,) device array
        Of a single element, never read, where no norms are wanted.
    """

    rows: Native
    norms: Native


class NumbaCudaBackend(Backend):
    """Search in tiles of registers, selection fused: floats by the direct form, bytes four at a time."""

    capabilities: ClassVar[Capabilities] = Capabilities(device="cuda", certifies=True)

    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return a C-contiguous device array of numba's."""
        if not interchange.on_device(rows):
            return self.uploader().upload(np.asarray(rows), np.dtype(dtype))
        array = cuda.as_cuda_array(interchange.take("numba", rows))
        if array.dtype == dtype and array.is_c_contiguous():
            return array
        converted = cuda.device_array(array.shape, dtype)
        launch_rows(cuda_rows.convert, array.size, array, converted)
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
        launch_rows(cuda_rows.find_rows, n_rows, native, found)
        not_finite, all_zero = (row if row < n_rows else None for row in self.to_numpy(found).tolist())
        return Scan(not_finite if finite else None, all_zero if zero else None)

    def prepare(self, corpus: Native, space: Space) -> TileRows:
        """Return the rows as the kernels take them; the corpus itself where that is how it is."""
        return self._take(corpus, None, space)

    def pairwise(self, queries: Native, prepared: TileRows, space: Space, budget: int) -> Native:
        """Return all distances."""
        n_queries = len(queries)
        result = cuda.device_array((n_queries, len(prepared.rows)), space.output)
        per_query = row_bytes(queries, space)
        step, _ = block_shape(n_queries, 1, budget=budget, per_pair=per_query, max_queries=MAX_QUERIES)
        workspace = self._workspace(queries[:step], space)
        for rows in slices(n_queries, step):
            block = self._take(queries[rows], workspace, space)
            cuda_tiles.distances(space, block.rows, prepared.rows, (block.norms, prepared.norms), result[rows])
        return result

    def knn(self, queries: Native, prepared: TileRows, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest."""
        n_queries, n_corpus, parameters = len(queries), len(prepared.rows), cuda_tiles.parameters_of(space)
        values = cuda.device_array((n_queries, k), space.ranked)
        indices = cuda.device_array((n_queries, k), np.int64)
        n_parts, tiles = cuda_tiles.parts_of(min(n_queries, MAX_QUERIES), n_corpus, k, parameters)
        list_bytes = k * (space.ranked.itemsize + indices.dtype.itemsize)
        if n_parts > 1 and 2 * n_parts * list_bytes * min(n_queries, parameters.tile.edge) > budget:
            n_parts, tiles = 1, -(-n_corpus // parameters.tile.edge)
        # The lists of a single part are the answer.
        per_query = row_bytes(queries, space) + (n_parts * list_bytes if n_parts > 1 else 0)
        step, _ = block_shape(n_queries, 1, budget=budget, per_pair=per_query, max_queries=MAX_QUERIES)
        # One allocation for all blocks: numba frees a dropped array only some time later.
        workspace, n_lists = self._workspace(queries[:step], space), n_parts * step if n_parts > 1 else 0
        of_parts = cuda.device_array((n_lists, k), space.ranked), cuda.device_array((n_lists, k), np.int64)
        for rows in slices(n_queries, step):
            block, found = self._take(queries[rows], workspace, space), (values[rows], indices[rows])
            lists = tuple(array[: n_parts * len(block.rows)] for array in of_parts) if n_parts > 1 else found
            norms = block.norms, prepared.norms
            cuda_tiles.search(parameters, block.rows, prepared.rows, norms, tiles, lists)
            cuda_tiles.order(lists, *found)
        return values, indices

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        distances = cuda.device_array(ranked.shape, space.output)
        cuda_tiles.finish(space, ranked, distances)
        return distances

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return the losses of `Backend.linear_loss` by the fused kernel, with the samples on the device."""
        return DeviceLoss(X, y, sample_weight, dtype)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the direct form on floats, and of the instruction for four bytes at once, where one adds."""
        if not space.is_integer:
            return float_operations("cuda", space, product=False)
        return byte_operations(space, "cuda-dot-uint8")

    def stopwatch(self) -> Callable[[], float | None]:
        """Record an event on the default stream, on which everything runs, and another at the stop."""
        start, end = cuda.event(), cuda.event()
        start.record()

        def stop() -> float | None:
            end.record()
            end.synchronize()
            return float(cuda.event_elapsed_time(start, end)) * 1e-3

        return stop

    def _workspace(self, rows: Native, space: Space) -> TileRows:
        """Return room for what `_take` makes of as many rows."""
        norms = cuda_tiles.parameters_of(space).norms
        taken = cuda.device_array((len(rows), padded(space)), space.dtype) if is_copied(rows, space) else None
        return TileRows(taken, cuda.device_array(len(rows) if norms else 1, norms or np.float64))

    def _take(self, rows: Native, workspace: TileRows | None, space: Space) -> TileRows:
        """Return rows as the kernels take them, in a workspace of as many rows or more, or one of their own."""
        n_rows, room = len(rows), workspace or self._workspace(rows, space)
        if is_copied(rows, space):
            given, rows = rows, room.rows[:n_rows]
            if makes_unit_rows(space):
                launch_rows(cuda_rows.unit_rows, n_rows, given, rows)
            else:
                launch_rows(cuda_rows.convert, rows.size, given, rows)
        if cuda_tiles.parameters_of(space).norms is None:
            return TileRows(rows, room.norms)
        launch_rows(cuda_rows.squared_norms, n_rows, rows, room.norms[:n_rows])
        return TileRows(rows, room.norms[:n_rows])


def makes_unit_rows(space: Space) -> bool:
    """Return whether rows are copied to be brought to unit length."""
    return space.metric.unit_rows and not space.is_integer


def padded(space: Space) -> int:
    """Return the length of a row that is filled up to whole vectors."""
    multiple = cuda_tiles.parameters_of(space).row_multiple
    return -(-space.n_features // multiple) * multiple


def is_copied(rows: Native, space: Space) -> bool:
    """Return whether the kernels cannot take rows as they are."""
    address = rows.__cuda_array_interface__["data"][0]
    return makes_unit_rows(space) or padded(space) != space.n_features or bool(address % VECTOR_BYTES)


def row_bytes(rows: Native, space: Space) -> int:
    """Return the bytes that a workspace for some rows takes for each; at least one."""
    norms = cuda_tiles.parameters_of(space).norms
    taken = padded(space) * space.dtype.itemsize if is_copied(rows, space) else 0
    return max(1, taken + (norms.itemsize if norms else 0))


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

    # Of MNIST on an H200: a call of 1 model took 0.67 ms, and one of 32 took 3.2.
    pass_cost = 7.0
    spares_host = True

    def __init__(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._dtype, self._n_values = dtype, X.size
        rows, width = np.ascontiguousarray(X), cuda_linear.row_length(X.shape[1], X.dtype)
        if width > X.shape[1]:
            rows = np.zeros((len(X), width), X.dtype)
            rows[:, : X.shape[1]] = X
        self._samples = [cuda.to_device(array) for array in (rows, *map(np.ascontiguousarray, (y, sample_weight)))]
        self._blocks = cuda_linear.sample_blocks(len(X))

    def __call__(self, W: Array, b: Array, limit: float = math.inf) -> Array:
        """Return the loss of each model."""
        models = cuda.to_device(np.ascontiguousarray(W)), cuda.to_device(b.astype(np.float64))
        sums = cuda.device_array((len(W), self._blocks), np.float64)
        cuda_linear.launch_losses(self._dtype, *self._samples, *models, sums)
        self.operations[f"cuda-fma-{self._dtype}"] += self._n_values * b.size
        # Not numpy's sum, which adds in an order that depends on the shape.
        losses = np.add.accumulate(sums.copy_to_host(), axis=1)[:, -1]
        return np.where(losses <= limit, losses, math.inf)
