"""PyTorch, on the CPU and on CUDA: one implementation, with the device as the only difference.

The search is that of `knnbench.backends.blockwise`; here is what its blocks are computed with. A tile of products is
passed over four times: it is written, the corpus norms are added in place (two), and minima of groups of columns are
read, by which `knnbench.backends.torch_selection` chooses. The norm of a query is added to what was chosen.
"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from knnbench import interchange, metrics
from knnbench.blocking import block_shape, chunk_rows, slices
from knnbench.dtypes import Array
from knnbench.errors import BackendUnavailableError
from knnbench.metrics import METRICS, Space
from knnbench.ordering import Selection
from knnbench.settings import setting
from knnbench.threads import THREADS_VARIABLE, SharedSetting, thread_count

from .base import Backend, Capabilities, Native, Scan
from .blockwise import CENTRE_OF_UINT8, EXACT_FEATURES, BlockCorpus, Blocks, BlockSearch
from .linear import DEVICE_ELEMENTS, HOST_ELEMENTS, ChunkedLoss, LinearLoss
from .torch_selection import Minima, group_columns
from .upload import Lane, Uploader

__all__ = ["TorchArrays", "TorchBackend", "TorchCudaBackend"]

DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(name): getattr(torch, name)
    for name in ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")
}

# Differences of a tile of the direct form on the CPU, one for each thread, and queries that it takes at the least:
# the tile stays in the second-level cache.
TILE_ELEMENTS = 1 << 19
TILE_QUERIES = 16

# Features from which such tiles are faster on the CPU than torch.cdist, which takes one pair after the other.
TILED_FEATURES = 64

# Sums of at most this many uint8 stay below 2**24, so that float32 holds them exactly.
EXACT_SUM = 2**24 // 255

# What ``torch._int_mm`` asks of matrices on CUDA: more than 16 rows on the left, a multiple of 8 on the right, and a
# multiple of 8 features; of 16, so that each row begins where a tensor core's load does.
LEAST_ROWS = 17
ROWS_MULTIPLE = 8
FEATURES_MULTIPLE = 16

# Bytes held for each column that is looked at again: its value, number and place, twice.
CANDIDATE_BYTES = 40

# Chunks of `knnbench.blocking.chunk_rows` that are taken at once: starting a kernel takes longer than one of them.
CHUNKS = {"cpu": 1, "cuda": 8}

# Centred uint8 have products of at most 2**14 in size: sums of so many of them stay below 2**31.
INT32_FEATURES = 2**16


class NumpyNames:
    """The functions of numpy that the search calls, on tensors of one device.

    What is not defined here has the same name, arguments and meaning in torch.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, dtype: Any) -> Native:
        """Return a tensor of any values."""
        return torch.empty(shape, dtype=DTYPES[np.dtype(dtype)], device=self._device)

    def full(self, shape: Any, value: Any, dtype: Any) -> Native:
        """Return a tensor of one value."""
        return torch.full(shape, value, dtype=DTYPES[np.dtype(dtype)], device=self._device)

    def zeros(self, shape: Any, dtype: Any) -> Native:
        """Return a tensor of zeros."""
        return torch.zeros(shape, dtype=DTYPES[np.dtype(dtype)], device=self._device)

    def arange(self, stop: int, dtype: Any = np.int64) -> Native:
        """Return the whole numbers below `stop`."""
        return torch.arange(stop, dtype=DTYPES[np.dtype(dtype)], device=self._device)

    def asarray(self, array: Native, dtype: Any) -> Native:
        """Return the tensor in that dtype."""
        return array.to(DTYPES[np.dtype(dtype)])

    def nonzero(self, array: Native) -> Native:
        """Return the indices of what is true, a tensor for each axis."""
        return torch.nonzero(array, as_tuple=True)

    def repeat(self, array: Native, times: int, axis: int = 0) -> Native:
        """Return the elements of an axis, each several times."""
        return torch.repeat_interleave(array, times, dim=axis)

    def take_along_axis(self, array: Native, indices: Native, axis: int) -> Native:
        """Return the elements at `indices` of each row, none of which is negative."""
        return torch.gather(array, axis, indices)

    def argsort(self, array: Native, axis: int, kind: str) -> Native:
        """Return the order of each row."""
        return torch.argsort(array, dim=axis, stable=kind == "stable")

    def median(self, array: Native, axis: int) -> Native:
        """Return the median; of an even number the smaller. torch's own has no deterministic form on CUDA."""
        return torch.sort(array, dim=axis).values.select(axis, (array.shape[axis] - 1) // 2)

    def sqrt(self, array: Native) -> Native:
        """Return roots; those of float64 on the CPU are numpy's.

        torch takes them from a library that rounds one in a hundred to the wrong side (MKL, on an AMD EPYC), which
        decides between neighbours whose cosines are ranked by them.
        """
        if self._device == "cpu" and array.dtype == torch.float64:
            return torch.from_numpy(np.sqrt(array.numpy()))
        return torch.sqrt(array)

    def maximum(self, array: Native, other: Any) -> Native:
        """Return the larger of each element and another, or of each element and a number."""
        return torch.maximum(array, other) if isinstance(other, torch.Tensor) else torch.clamp(array, min=other)


@dataclass(frozen=True, slots=True)
class DirectForm:
    """The array form of one scalar step, on whole rows.

    Attributes
    ----------
    order : float
        Of the norm that ``torch.cdist`` computes.
    from_norm : callable
        Takes this norm to the accumulated value, in place.
    terms : callable
        Takes differences of features to what is accumulated of them, in place.
    reduce : callable
        ``(terms, axis) -> accumulated``.
    """

    order: float
    from_norm: Callable[[Native], Native]
    terms: Callable[[Native], Native]
    reduce: Callable[[Native, int], Native]


DIRECT_FORMS: dict[Any, DirectForm] = {
    metrics.step_squares: DirectForm(2.0, torch.Tensor.square_, torch.Tensor.square_, torch.sum),
    metrics.step_absolutes: DirectForm(1.0, torch.Tensor.abs_, torch.Tensor.abs_, torch.sum),
    metrics.step_largest: DirectForm(math.inf, torch.Tensor.abs_, torch.Tensor.abs_, torch.amax),
}


@dataclass(frozen=True, slots=True)
class GramForm:
    """`Form.from_dot` in place, in two parts, as a pass over all pairs takes about as long as 20 features of a product.

    Attributes
    ----------
    shared : callable
        ``(dots, corpus_norms) -> values``, in place: by these a query ranks the corpus.
    own : callable
        ``(values, query_norms) -> accumulated``, in place: what is the same for all that a query is compared with, and
        never changes their order.
    """

    shared: Callable[[Native, Native], Native]
    own: Callable[[Native, Native], Native]


FROM_DOT: dict[Any, GramForm] = {
    metrics.squares_from_dot: GramForm(
        lambda dots, corpus_norms: torch.sub(corpus_norms, dots, alpha=2, out=dots), torch.Tensor.add_
    ),
    metrics.dot_itself: GramForm(lambda dots, corpus_norms: dots, lambda values, query_norms: values),
}


# A metric on a step that is not in the table above is not claimed.
SUPPORTED = frozenset(
    metric.name for metric in METRICS.values() if {metric.floating.step, metric.integer.step} <= {None, *DIRECT_FORMS}
)


class TorchArrays(Backend):
    """The array side of a backend whose arrays are tensors on the device that its capabilities name."""

    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return a contiguous tensor, detached from any graph."""
        device = self.capabilities.device
        require_device(device)
        uploader = self.uploader()
        if isinstance(rows, torch.Tensor):
            tensor = rows.detach()
        elif interchange.on_device(rows):
            tensor = interchange.take("torch", rows)
        elif uploader is None:
            tensor = torch.from_numpy(writeable(np.ascontiguousarray(rows, dtype=dtype)))
        else:
            tensor = uploader.upload(np.asarray(rows), np.dtype(dtype))
        return tensor.to(device, DTYPES[np.dtype(dtype)]).contiguous()

    def to_numpy(self, native: Native) -> Array:
        """Return the tensor's own memory on the CPU, a copy from CUDA."""
        return np.asarray(native.cpu().numpy())

    def uploader(self) -> Uploader | None:
        """Return that of the current CUDA device."""
        return None if self.capabilities.device == "cpu" else uploader_of(torch.cuda.current_device())

    def ran_out(self, error: Exception) -> bool:
        """Return whether torch's allocator, or cuBLAS, found no memory, having emptied the former's cache."""
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "CUBLAS_STATUS_ALLOC_FAILED" not in str(error):
            return False
        torch.cuda.empty_cache()
        return True

    def synchronize(self) -> None:
        """Wait for the current stream, on which everything runs; a call on the CPU returns when it is done."""
        if self.capabilities.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def stopwatch(self) -> Callable[[], float | None]:
        """Record an event on the current stream of a CUDA device, and another at the stop."""
        if self.capabilities.device == "cpu":
            return lambda: None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()

        def stop() -> float | None:
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3

        return stop

    def device_peak(self) -> Callable[[], int | None]:
        """Let torch's allocator forget its peak."""
        if self.capabilities.device == "cpu":
            return lambda: None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: int(torch.cuda.max_memory_allocated() - before)

    def scan(self, native: Native, *, finite: bool, zero: bool) -> Scan:
        """Look through the rows in chunks."""
        finite = finite and native.is_floating_point()
        return Scan(
            first_row(native, lambda chunk: ~torch.isfinite(chunk).all(dim=1)) if finite else None,
            first_row(native, lambda chunk: (chunk == 0).all(dim=1)) if zero else None,
        )


class TorchSearch(TorchArrays, BlockSearch):
    """The blockwise search on tensors.

    Attributes
    ----------
    short : int
        Of `knnbench.backends.torch_selection.Minima`.
    row_copies : int
        How many times as much as a block's float rows the direct form holds.
    """

    short: ClassVar[int]
    row_copies: ClassVar[int]

    @property
    def xp(self) -> Any:
        """numpy's names for torch's functions."""
        return NumpyNames(self.capabilities.device)

    def settings(self) -> AbstractContextManager[None]:
        """Hold torch's global switches."""
        return plain_arithmetic(self.capabilities.device)

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        is_rounded = space.is_integer and not space.form.keeps_integers
        wide = ranked.to(torch.float64) if is_rounded else ranked
        return space.form.finish(self.xp, wide).to(DTYPES[space.output])

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return the losses of `Backend.linear_loss`, with the samples on the device."""
        return TensorLoss(self, X, y, sample_weight, dtype)

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the products, in int8 where the device multiplies uint8 so."""
        is_product = space.is_integer and space.form.from_dot is not None
        unit = INT8_UNITS[self.capabilities.device]() if is_product else None
        return {unit: 1.0} if unit else BlockSearch.operations(self, space, op)

    def direct_block(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the accumulated values of all pairs.

        Notes
        -----
        On uint8, with terms of at most 255, the sums are taken in float32 where it holds them exactly, else in
        float64. Squares on the CPU never go through ``torch.cdist``, whose root costs a rounding.
        """
        a, b = (rows.to(unit_of(space)) for rows in (queries, corpus))
        form = DIRECT_FORMS[space.form.step]
        if self.capabilities.device == "cuda" or (space.n_features < TILED_FEATURES and form.order != 2):
            norms = torch.cdist(a, b, p=form.order, compute_mode="donot_use_mm_for_euclid_dist")
            return form.from_norm(norms).to(DTYPES[space.accumulator])
        result = torch.empty((len(a), len(b)), dtype=DTYPES[space.accumulator], device=a.device)
        threads = torch.get_num_threads()
        # All tiles together take no more than the rows themselves, which the budget counts.
        elements = min(TILE_ELEMENTS, (len(a) + len(b)) * space.n_features // threads)
        width = max(1, min(elements // (TILE_QUERIES * space.n_features), -(-len(b) // threads)))
        height = max(1, elements // (width * space.n_features))
        inference = torch.is_inference_mode_enabled()

        def fill(columns: slice) -> None:
            shape = min(height, len(a)), columns.stop - columns.start, space.n_features
            with torch.inference_mode(inference):
                tile = torch.empty(shape, dtype=a.dtype, device=a.device)
                for rows in slices(len(a), height):
                    part = torch.sub(a[rows, None], b[columns], out=tile[: rows.stop - rows.start])
                    result[rows, columns] = over_features(form.reduce, form.terms(part))

        run_apart(fill, list(slices(len(b), width)))
        return result

    def _prepared_rows(self, rows: Native, space: Space) -> Native:
        return unit_length(rows) if space.metric.unit_rows and not space.is_integer else rows

    def _mean(self, rows: Native) -> Native:
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for chunk in row_chunks(rows):
            total += chunk.sum(dim=0, dtype=torch.float64)
        return (total / len(rows)).to(rows.dtype)

    def _take(self, rows: Native, centre: Native | None, space: Space) -> BlockCorpus:
        form = space.form
        if form.from_dot is None:
            return BlockCorpus(rows)
        if centre is not None:
            centred = rows - centre
            return BlockCorpus(rows, squared_norms(centred, centred.dtype), centre, centred)
        # As the dot products they belong to: centred, unless the dot itself is wanted.
        shift = 0 if form.rank_uses_norms else CENTRE_OF_UINT8
        dtype = torch.float64 if form.rank_uses_norms else DTYPES[space.accumulator]
        # Kept where it is as large as the rows: twice as much is what the budget counts of a packed corpus.
        centred = as_int8(rows) if self._keeps_int8(space) else None
        return BlockCorpus(rows, squared_norms(rows, dtype, shift), centred=centred)

    def _block(self, block: BlockCorpus, prepared: BlockCorpus, space: Space, columns: slice) -> Native:
        if space.form.from_dot is None:
            return self.direct_block(block.rows, prepared.rows[columns], space)
        return self._whole(self._shared(block, prepared, space, columns), block, space)

    def _nearest(
        self, block: BlockCorpus, prepared: BlockCorpus, k: int, space: Space, blocks: Blocks, *, direct: bool = False
    ) -> tuple[Native, Native]:
        is_direct = direct or space.form.from_dot is None

        def tile(columns: slice) -> Native:
            if is_direct:
                return self.direct_block(block.rows, prepared.rows[columns], space)
            return self._shared(block, prepared, space, columns)

        # Queries with products that are NaN are searched again.
        minima = Minima(k, self.short, finite=space.is_integer or not is_direct)
        selection = Selection(self.xp, k, minima.smallest, minima.closer)
        for columns in slices(len(prepared.rows), blocks.corpus):
            # No name keeps a tile, so that the next one takes its place in memory, and in the caches.
            selection.update(tile(columns), columns.start)
        values = selection.values if is_direct else self._whole(selection.values, block, space)
        return values, selection.indices

    def _whole(self, shared: Native, block: BlockCorpus, space: Space) -> Native:
        """Return, in place, the values to rank from those that rank the corpus for each query of a block by itself."""
        assert block.norms is not None
        return FROM_DOT[space.form.from_dot].own(shared, block.norms[:, None])

    def _shared(self, block: BlockCorpus, prepared: BlockCorpus, space: Space, columns: slice) -> Native:
        """Return what ranks some columns of the corpus for each query of a block."""
        form, corpus = space.form, prepared.rows[columns]
        assert block.norms is not None
        assert prepared.norms is not None
        norms = block.norms[:, None], prepared.norms[None, columns]
        if prepared.centre is not None:
            assert block.centred is not None
            assert prepared.centred is not None
            dots = torch.matmul(block.centred, prepared.centred[columns].T)
        else:
            if self._multiplies_int8():
                left = as_int8(block.rows) if block.centred is None else block.centred
                right = as_int8(corpus) if prepared.centred is None else prepared.centred[columns.start :]
                dots = int8_dot(left, right, (len(block.rows), len(corpus)), space)
            else:
                dots = float_dot(block.rows, corpus, space)
            if form.rank_uses_norms:
                uncentre(dots, block.rows, corpus, space)
        return form.rank_arrays(self.xp, FROM_DOT[form.from_dot].shared(dots, norms[1]), *norms)

    def _search_blocks(self, n_queries: int, n_corpus: int, k: int, space: Space, budget: int) -> Blocks:
        """Return blocks that are wide where queries are few: a tile then meets fewer lists."""
        size, ranked = max(4, space.accumulator.itemsize), space.ranked.itemsize
        # A product of bytes that is ranked as it comes is the only tile, and float rows are; of others tiles and rows
        # are converted. What is smaller than the k-th value of its row is at most an eighth: 4 bytes a pair more.
        is_packed = self._keeps_int8(space) and space.form.from_dot is not None and ranked == 4
        copies = self.row_copies if not space.is_integer else 0 if is_packed else 2
        pair_bytes = 0 if space.is_integer else min(budget // 4, 3 * self.largest.elements * size)
        # Where those would be more than a quarter of a row, all of it is selected from, which takes no more.
        candidates = min(k * group_columns(n_corpus, k), n_corpus // 4)
        queries, corpus = block_shape(
            n_queries,
            n_corpus,
            budget=budget - pair_bytes,
            per_pair=(1 if is_packed or not space.is_integer else 3) * max(size, ranked) + 4,
            per_query=4 * space.n_features * size + 6 * k * (ranked + 8) + CANDIDATE_BYTES * candidates,
            per_corpus=copies * space.n_features * size,
            max_queries=self.largest.queries,
            max_corpus=self.largest.corpus * max(1, self.largest.queries // n_queries),
        )
        return Blocks(queries, corpus, pair_bytes // (3 * size))

    def _keeps_int8(self, space: Space) -> bool:
        return space.is_integer and self._multiplies_int8() and space.n_features % FEATURES_MULTIPLE == 0

    def _multiplies_int8(self) -> bool:
        return INT8_UNITS[self.capabilities.device]() is not None

    def _pairs(self, queries: Native, corpus: Native, i: Native, j: Native, space: Space, elements: int) -> Native:
        form = DIRECT_FORMS[space.form.step]
        result = torch.empty(len(i), dtype=DTYPES[space.accumulator], device=i.device)
        # In parts of the same size: how CUDA divides the sums of a last, smaller one would show in their rounding.
        n_parts = -(-len(i) // max(1, elements // space.n_features))
        for part, rows, columns in zip(*(x.tensor_split(n_parts) for x in (result, i, j)), strict=True):
            difference = queries.index_select(0, rows).sub_(corpus.index_select(0, columns))
            part.copy_(over_features(form.reduce, form.terms(difference)))
        return result


class TensorLoss(ChunkedLoss):
    """Losses of linear models on tensors.

    Parameters
    ----------
    backend : TorchSearch
    X, y, sample_weight, dtype
        As of `Backend.linear_loss`.
    """

    def __init__(self, backend: TorchSearch, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> None:
        is_host = backend.capabilities.device == "cpu"
        probe = f"gemm-{dtype}" if is_host else f"cuda-gemm-{dtype}"
        super().__init__(X.shape, HOST_ELEMENTS if is_host else DEVICE_ELEMENTS, probe)
        self._backend, self._dtype, self.spares_host = backend, dtype, not is_host
        self._X, self._labels, self._weight = (
            backend.to_native(array, array.dtype) for array in (X, y[:, None], sample_weight)
        )

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Hold torch's global switches."""
        with torch.inference_mode(), self._backend.settings():
            yield

    def models(self, W: Array, b: Array) -> list[tuple[Native, Native]]:
        """Return tensors of their own: at another alignment a product may round otherwise."""
        intercepts = self._backend.to_native(b, np.dtype(np.float64))
        return [(self._backend.to_native(w, self._dtype).clone(), c) for w, c in zip(W, intercepts, strict=True)]

    def widened(self, rows: slice) -> Native:
        """Return some samples in the dtype of the weights."""
        return self._X[rows].to(DTYPES[self._dtype])

    def loss(self, samples: Native, rows: slice, W: Native, b: Native) -> float:
        """Return the summed loss of a model over some samples."""
        logits = (samples @ W).to(torch.float64).add_(b)
        largest = logits.amax(dim=1, keepdim=True)
        right = torch.gather(logits, 1, self._labels[rows])
        sums = (logits - largest).exp_().sum(dim=1, keepdim=True)
        return float((sums.log_().add_(largest - right)[:, 0] * self._weight[rows]).sum())


class TorchBackend(TorchSearch):
    """PyTorch on the CPU."""

    capabilities: ClassVar[Capabilities] = Capabilities(device="cpu", metrics=SUPPORTED, certifies=True)
    # Of float32, a row of 96 is sorted in 2.7 us and one of 938 in 54; topk takes 0.7 and 6.7 (k = 3 and 19, AMD EPYC).
    short: ClassVar[int] = 64
    row_copies: ClassVar[int] = 1


class TorchCudaBackend(TorchSearch):
    """PyTorch on the current CUDA device."""

    capabilities: ClassVar[Capabilities] = Capabilities(device="cuda", metrics=SUPPORTED, certifies=True)
    # A tile is as wide as the corpus where the budget allows it: nothing is then compared with lists, nor waited for.
    largest: ClassVar[Blocks] = Blocks(queries=2048, corpus=1 << 16, elements=1 << 22)
    # A row of so many elements is sorted by one block of threads; topk starts a kernel for each digit, and which rows
    # have more that equal the k-th value would be waited for.
    short: ClassVar[int] = 4096
    row_copies: ClassVar[int] = 0


class TorchLane(Lane):
    """Copies on a stream of torch's."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Native:
        """Return a tensor of the current device."""
        return torch.empty(shape, dtype=DTYPES[dtype], device="cuda")

    def page_locked(self, n_bytes: int) -> Array:
        """Return memory that torch's caching host allocator has back when the array is gone."""
        return np.asarray(torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy())

    def is_page_locked(self, rows: Array) -> bool:
        """Ask the driver, whoever allocated them."""
        return torch.from_numpy(writeable(rows)).is_pinned()

    def begin(self) -> None:
        """Wait for torch's current stream."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, source: Array, target: Native, rows: slice) -> Callable[[], None]:
        """Copy, and record an event."""
        with torch.cuda.stream(self._stream):
            target[rows].copy_(torch.from_numpy(writeable(source)), non_blocking=True)
        wait: Callable[[], None] = self._stream.record_event().synchronize
        return wait


@functools.cache
def uploader_of(device: int) -> Uploader:
    """Return the uploader to a CUDA device, by its number, while it is the current one."""
    return Uploader(TorchLane())


def require_device(device: str) -> None:
    """Raise `BackendUnavailableError` if torch cannot compute on `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        built_for = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise BackendUnavailableError(f"no CUDA device: torch {torch.__version__} {built_for}")


@contextmanager
def plain_arithmetic(device: str) -> Iterator[None]:
    """Hold the global switches that change what an operation computes, and leave them as found.

    These are autocast, the precision of float32 products (TF32 on CUDA, bfloat16 on the CPU) and, where
    $KNNBENCH_THREADS is set, the number of threads. Tensors are detached, and made with a dtype and a device,
    so that the gradient mode and torch's defaults of both do not matter.
    """
    # Autocast belongs to the thread; the others to the process, where calls may overlap.
    with torch.autocast(device, enabled=False), SWITCHES[device]():
        yield


@contextmanager
def switches(device: str) -> Iterator[None]:
    """Hold the switches that belong to the process."""
    threads = torch.get_num_threads()
    wanted = thread_count() if setting(THREADS_VARIABLE) else threads
    with full_precision(device):
        if wanted != threads:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if wanted != threads:
                torch.set_num_threads(threads)


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Hold the precision of float32 matrix products at float32.

    TF32 rounds factors to 11 bits. Products are then off by up to ``2**-10 |q| |c|``, and squared distances by ``2**-10
    (|q|^2 + |c|^2)``: more than `knnbench.backends.blockwise.TOLERANCE` of all below ``|q|^2 + |c|^2``, where near rows
    are.
    """
    backends: Any = torch.backends  # filled in at run time, so no type checker knows its names
    switch = backends.cuda.matmul if device == "cuda" else backends.mkldnn.matmul
    before = switch.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


SWITCHES = {device: SharedSetting(partial(switches, device)) for device in ("cpu", "cuda")}


def run_apart(task: Callable[[slice], None], parts: list[slice]) -> None:
    """Run a task on each part, on as many threads as torch has, each of which works on its own.

    torch itself divides every operation, and its threads meet at the end of it. On a tile that takes
    microseconds, and where another program uses one of the processors, they wait much longer than they compute.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(task, parts):
                pass
    finally:
        # What one thread sets is also what torch starts with in every thread to come.
        torch.set_num_threads(threads)


class Writeable:
    """An array's memory, said to be writeable: torch has no read-only tensors, and warns of such arrays.

    Nothing here writes to an input.
    """

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array


def writeable(array: Array) -> Array:
    """Return `array`, or a view that calls its memory writeable."""
    return array if array.flags.writeable else np.asarray(Writeable(array))


def row_chunks(rows: Native) -> Iterator[Native]:
    """Yield a tensor's rows in chunks whose temporary copies stay small."""
    return iter(rows.split(chunk_rows(rows.shape[1]) * CHUNKS[rows.device.type]))


def first_row(rows: Native, is_bad: Callable[[Native], Native]) -> int | None:
    """Return the first row that is bad, None if none is."""
    start = 0
    for chunk in row_chunks(rows):
        bad = torch.nonzero(is_bad(chunk))
        if len(bad):
            return start + int(bad[0])
        start += len(chunk)
    return None


def unit_of(space: Space) -> torch.dtype:
    """Return the float dtype that differences are summed in."""
    if space.is_integer:
        return torch.float32 if space.n_features <= EXACT_SUM else torch.float64
    return DTYPES[space.dtype]


def over_features(reduce: Callable[[Native, int], Native], terms: Native) -> Native:
    """Reduce the last axis, each row rounded in the same way whatever the rows beside it.

    A reduction to a single number is split over the threads by torch, and rounded otherwise.
    """
    if terms.numel() > terms.shape[-1]:
        return reduce(terms, -1)
    return reduce(terms.expand(2, *terms.shape[1:]), -1)[:1]


def squared_norms(rows: Native, dtype: torch.dtype, shift: int = 0) -> Native:
    """Return the squared norms of rows, or of uint8 rows less `shift`; of uint8 exactly."""
    norms = torch.empty(len(rows), dtype=dtype, device=rows.device)
    start = 0
    for chunk in row_chunks(rows):
        values = chunk if chunk.is_floating_point() else chunk.to(torch.int32) - shift
        norms[start : start + len(chunk)] = values.square().sum(dim=1)
        start += len(chunk)
    return norms


def float_dot(queries: Native, corpus: Native, space: Space) -> Native:
    """Return the dot products of centred uint8 rows, in float32 on as many features as it is exact for."""
    dtype = DTYPES[space.accumulator]
    dots: Any = None
    for features in slices(space.n_features, EXACT_FEATURES):
        a, b = (rows[:, features].to(torch.float32).sub_(CENTRE_OF_UINT8) for rows in (queries, corpus))
        product = torch.matmul(a, b.T).to(dtype)
        dots = product if dots is None else dots.add_(product)
    return dots


def int8_dot(queries: Native, corpus: Native, shape: tuple[int, int], space: Space) -> Native:
    """Return the dot products of the first centred uint8 rows, in the integers of the device's matrix units.

    Parameters
    ----------
    queries, corpus : (n, n_features) tensors of int8
        From `as_int8`, from any row of the corpus on.
    shape : (int, int)
        How many of each.
    space : Space
    """
    n_queries, width = shape
    left, right = queries[: max(n_queries, LEAST_ROWS)], corpus[: -(-width // ROWS_MULTIPLE) * ROWS_MULTIPLE]
    dots: Any = None
    for features in slices(corpus.shape[1], INT32_FEATURES):
        product = torch._int_mm(left[:, features], right[:, features].T)[:n_queries, :width]
        product = product.to(DTYPES[space.accumulator])
        dots = product if dots is None else dots.add_(product)
    return dots


def as_int8(rows: Native) -> Native:
    """Return uint8 rows less 128 as int8, and zeros beyond them, so that `int8_dot` can take any slice of them."""
    n_rows, n_features = rows.shape
    shape = max(n_rows + ROWS_MULTIPLE - 1, LEAST_ROWS), -(-n_features // FEATURES_MULTIPLE) * FEATURES_MULTIPLE
    centred = torch.zeros(shape, dtype=torch.int8, device=rows.device)
    start = 0
    for chunk in row_chunks(rows):
        # The first bit of a byte is worth 128, and of a signed one -128: to turn it over takes away 128.
        centred[start : start + len(chunk), :n_features] = chunk.bitwise_xor(CENTRE_OF_UINT8).view(torch.int8)
        start += len(chunk)
    return centred


def host_int8_unit() -> str | None:
    """Return the ceiling of the CPU's products of int8, None where torch has no fast ones.

    That is without the instructions, or oneDNN, which has a switch: loops would take a hundred times as long then.
    """
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled and torch.cpu._is_vnni_supported()):
        return None
    if not multiplies_int8(torch.device("cpu")):
        return None
    return "matrix-uint8" if torch.cpu._is_amx_tile_supported() else "dot-uint8"


def cuda_int8_unit() -> str | None:
    """Return the ceiling of the current CUDA device's products of int8, None if torch has none for it."""
    return "cuda-gemm-int8" if multiplies_int8(torch.device("cuda", torch.cuda.current_device())) else None


INT8_UNITS: dict[str, Callable[[], str | None]] = {"cpu": host_int8_unit, "cuda": cuda_int8_unit}


@functools.cache
def multiplies_int8(device: torch.device) -> bool:
    """Return whether torch has exact products of int8 on a device, from computing one of the largest numbers.

    It has none on devices before compute capability 7.5, nor in some builds; and CPUs without VNNI may sum two products
    in 16 bits.
    """
    extremes = torch.tensor([-128, 127], dtype=torch.int8, device=device).repeat_interleave(32)
    rows = extremes.reshape(64, 1).repeat(1, FEATURES_MULTIPLE)
    try:
        product = torch._int_mm(rows, rows.T)
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return False
    expected = FEATURES_MULTIPLE * extremes.to(torch.int32)[:, None] * extremes.to(torch.int32)
    return bool(torch.equal(product, expected))


def uncentre(dots: Native, queries: Native, corpus: Native, space: Space) -> None:
    """Turn the dot products of centred uint8 rows, in place, into those of the rows.

    q.c = (q - 128).(c - 128) + 128 (sum(q) - 128 n) + 128 sum(c): in this order no sum exceeds the largest q.c.
    """
    query_sums, corpus_sums = (rows.sum(dim=1, dtype=dots.dtype) for rows in (queries, corpus))
    dots += CENTRE_OF_UINT8 * (query_sums - CENTRE_OF_UINT8 * space.n_features)[:, None]
    dots += CENTRE_OF_UINT8 * corpus_sums


def unit_length(rows: Native) -> Native:
    """Return float rows divided by their length: `Metric.prepare_rows` on tensors.

    The largest element of a row is first scaled to between 1 and 2, by dividing by a power of two, which is
    exact.
    """
    result = torch.empty_like(rows)
    start = 0
    for chunk in row_chunks(rows):
        largest = chunk.abs().amax(dim=1, keepdim=True)
        mantissa, _ = torch.frexp(largest)
        wide = (chunk / (largest / (2 * mantissa))).to(torch.float64)
        result[start : start + len(chunk)] = wide / wide.square().sum(dim=1, keepdim=True).sqrt()
        start += len(chunk)
    return result
