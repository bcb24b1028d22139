"""CuPy: cuBLAS where a metric has a Gram form, otherwise one CUDA C++ kernel for the direct form."""

import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import cupy
import numpy as np

from knnbench import interchange
from knnbench.dtypes import Array
from knnbench.errors import BackendUnavailableError
from knnbench.kernels.cuda_source import PAIR_THREADS, THREADS, TILE, direct_source
from knnbench.metrics import Space

from .base import Capabilities, Native, Scan, scan_rows
from .blockwise import Blocks, BlockwiseBackend
from .upload import Lane, Uploader

__all__ = ["CupyBackend"]

TF32_VARIABLE = "CUPY_TF32"


class CupyBackend(BlockwiseBackend):
    """The blockwise search on CuPy arrays.

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
        """Look through the rows on the device, in chunks."""
        return scan_rows(cupy, native, finite=finite, zero=zero)

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        is_rounded = space.is_integer and not space.form.keeps_integers
        wide = ranked.astype(np.float64) if is_rounded else ranked
        return space.form.finish(cupy, wide).astype(space.output, copy=False)

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

    def direct_block(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the accumulated values of all pairs, by the CUDA kernel."""
        shape = len(queries), len(corpus)
        out = cupy.empty(shape, dtype=space.accumulator)
        sizes = np.int64(shape[0]), np.int64(shape[1]), np.int64(space.n_features)
        grid = -(-shape[1] // TILE), -(-shape[0] // TILE)
        kernel = direct_module(space).get_function("accumulate_block")
        kernel(grid, (THREADS, THREADS), (queries, corpus, out, *sizes))
        return out

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
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)

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


@functools.cache
def uploader_of(device: int) -> Uploader:
    """Return the uploader to a device, by its number, while it is the current one."""
    return Uploader(CupyLane())


def direct_module(space: Space) -> Any:
    """Return the compiled source of a space; CuPy keeps it on disk by a hash of the source."""
    return _module(direct_source(space))


@functools.cache
def _module(source: str) -> Any:
    return cupy.RawModule(code=source, options=("--std=c++17",))
