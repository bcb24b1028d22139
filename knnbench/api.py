"""`pairwise`, `knn` and `prepare`: the only place that validates, and that converts at the edge."""

import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np

import knnbench
from knnbench import exact, interchange, selection
from knnbench.backends import get_backend
from knnbench.backends.base import Backend, Native, scan_rows
from knnbench.blocking import BUDGET_VARIABLE, block_shape, check_budget, require_memory, slices
from knnbench.checkpoint import Checkpoint, Progress, RowDigest, digest_of
from knnbench.dtypes import Array, common_dtype, computed_dtype, finite_mean
from knnbench.errors import CheckpointError, InvalidInputError, OverBudgetError, UnsupportedError
from knnbench.exact_values import distances_of
from knnbench.metrics import Metric, Space, get_metric
from knnbench.ordering import MISSING, merge_topk
from knnbench.selection import Problem
from knnbench.streams import MappedStream, Stream, as_stream, open_rows, read_ahead, touch
from knnbench.threads import limited_blas

__all__ = ["Accuracy", "Neighbors", "Prepared", "knn", "pairwise", "prepare"]

T = TypeVar("T")

Accuracy = Literal["fast", "exact"]

# What a corpus is prepared for by backend="auto", which does not know the calls to come.
USUAL_QUERIES, USUAL_K = 1000, 10

# Rows that stand for a corpus when it is centred or a backend is chosen, where not all are at hand.
CENTRE_ROWS, USUAL_CORPUS = 1024, 100_000

# What the packed form of a corpus takes with its copy, in sizes of the rows; what merging an answer takes, in its size.
PACKED_COPIES, MERGED_COPIES = 2, 4

# What lists of exact values take, in their size: they are copied when one comes that is longer than all before.
LIST_COPIES = 2

# What the exact value of a neighbour of ordinary rows takes, in sizes of a float; which is not known before. A cosine,
# which is a continued fraction, took 71 to 91 bytes in float32 and 137 to 159 in float64.
BINARY_BYTES, FRACTION_BYTES = 6, 24

# Bytes of a block of a streamed corpus at the most: it is read while another is searched, and more gains nothing.
STREAM_BYTES = 1 << 28


class Neighbors(tuple[Any, Any]):
    """The k nearest neighbours of each query: a tuple of exactly two, with further facts as attributes.

    Attributes
    ----------
    distances : (n_queries, k) array
        Ascending.
    indices : (n_queries, k) array of int64
        Corpus rows, in the order (value ranked, index): ascending where distances are equal, unless the last
        rounding made them so (two squared distances can have one float32 root).
    backend : str
        The backend that computed them.
    certificate : knnbench.exact.Certificate or None
        With ``accuracy="exact"``: how they were proved.
    passed_over : dict of str to str
        With ``backend="auto"``: the backends that the choice passed over, and why.

    Examples
    --------
    >>> distances, indices = knn([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0]], k=1, backend="numpy")
    >>> distances, indices
    (array([[1.]]), array([[1]]))
    """

    backend: str
    certificate: exact.Certificate | None
    passed_over: dict[str, str]

    def __new__(
        cls,
        distances: Any,
        indices: Any,
        *,
        backend: str = "",
        certificate: exact.Certificate | None = None,
        passed_over: dict[str, str] | None = None,
    ) -> "Neighbors":
        """Make the pair."""
        self = super().__new__(cls, (distances, indices))
        self.backend = backend
        self.certificate = certificate
        self.passed_over = passed_over or {}
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[Any, Any], dict[str, Any]]:
        facts = {"backend": self.backend, "certificate": self.certificate, "passed_over": self.passed_over}
        return tuple(self), facts

    @property
    def distances(self) -> Any:
        """The distances, shape (n_queries, k)."""
        return self[0]

    @property
    def indices(self) -> Any:
        """The corpus rows, shape (n_queries, k)."""
        return self[1]

    def __repr__(self) -> str:
        n_queries, k = self.indices.shape
        return (
            f"Neighbors({n_queries} queries, k={k}, backend={self.backend!r})\n"
            f"distances={self.distances!r}\nindices={self.indices!r}"
        )


class Prepared:
    """A corpus that was checked, centred, packed and copied once; made by `prepare`.

    `knn` and `pairwise` take it wherever they take a corpus. It keeps the rows it was made from (not a copy,
    where they needed no conversion: do not change them) and can be pickled; the packed form is then rebuilt.

    Attributes
    ----------
    backend : str
        Name of the backend it is packed for.
    metric : str
        Canonical name.
    accuracy : {"fast", "exact"}
    dtype : numpy.dtype
        What the rows are stored in.
    shape : (int, int)
        ``(n_corpus, n_features)``.
    rows : (n_corpus, n_features) array, or Stream
        The corpus as given. What is not held in memory is read and packed block by block in each call.
    passed_over : dict of str to str
        With ``backend="auto"``: the backends that the choice passed over, and why.
    """

    def __init__(
        self,
        rows: Any,
        metric: Metric,
        backend: str,
        accuracy: Accuracy,
        passed_over: dict[str, str],
        *,
        keep_bytes: int = 0,
    ) -> None:
        self.backend = backend
        self.metric = metric.name
        self.accuracy = accuracy
        self.passed_over = passed_over
        self.shape: tuple[int, int] = _shape_of(rows)
        self.dtype = computed_dtype(interchange.dtype_of(rows))
        self.rows = rows
        self._keep_bytes = keep_bytes  # what it may take beyond the rows to make later calls faster
        self._packed: dict[np.dtype[Any], Any] = {}

    def packed(self, dtype: np.dtype[Any]) -> Any:
        """Return the backend's own form of the corpus for computing in `dtype`, made on first use."""
        if dtype not in self._packed:
            space = Space(get_metric(self.metric), dtype, self.shape[1])
            self._packed[dtype] = _pack(get_backend(self.backend), self.rows, space, self._keep_bytes)
        return self._packed[dtype]

    def __getstate__(self) -> dict[str, Any]:
        rows = self.rows if isinstance(self.rows, Stream) else interchange.to_host(self.rows)
        return {**self.__dict__, "rows": rows, "_packed": {}}

    def __repr__(self) -> str:
        return (
            f"Prepared(shape={self.shape}, dtype={self.dtype}, metric={self.metric!r}, backend={self.backend!r}, "
            f"accuracy={self.accuracy!r})"
        )


def pairwise(
    queries: Any,
    corpus: Any,
    metric: str | None = None,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
    check_finite: bool = True,
) -> Any:
    """Compute the distance between each query and each row of the corpus.

    Parameters
    ----------
    queries : (n_queries, n_features) array of real numbers
    corpus : (n_corpus, n_features) array of real numbers, or Prepared
    metric : {"euclidean", "sqeuclidean", "cityblock", "chebyshev", "cosine"} or alias, optional
        That of a `Prepared` corpus, otherwise ``"euclidean"``.
    backend : str
        A name that `backends` lists, or ``"auto"``. A named backend works or raises.
    memory_budget : int, optional
        Bytes to hold at the most beyond inputs, prepared corpus and result; default
        ``$KNNBENCH_MEMORY_BUDGET``, else 1 GiB.
    check_finite : bool
        Whether to look for NaN and infinity. With False, their results are undefined.

    Returns
    -------
    (n_queries, n_corpus) array
        float64 for float64, float32 for float32; for uint8 exact integers (int32 or int64) with cityblock,
        sqeuclidean and chebyshev, and float32 with euclidean and cosine. On the host, or for queries on a
        CUDA device in an array of their library.

    Raises
    ------
    InvalidInputError
        Shapes, dtypes or values that break the rules; the text names the array and the first bad row.
    UnknownBackendError, BackendUnavailableError, UnsupportedError
        The named backend does not exist, does not work here, or lacks this metric or dtype.
    OverBudgetError
        The result does not fit into the memory that is available, or a block not into the budget.

    Examples
    --------
    >>> import numpy as np
    >>> pairwise([[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0]], backend="numpy")
    array([[5.        ],
           [3.60555128]])
    >>> pairwise(np.array([[0, 9]], np.uint8), np.array([[255, 0]], np.uint8), "cityblock", backend="numpy")
    array([[264]], dtype=int32)
    """
    task = _enter(queries, corpus, 0, metric, backend, "fast", memory_budget, check_finite)
    shape = len(task.queries), task.prepared.shape[0]
    row_bytes = shape[1] * task.space.output.itemsize
    if not interchange.on_device(task.queries):
        require_memory(shape[0] * row_bytes, f"a result of {shape[0]:,} x {shape[1]:,} distances")
    blocks, parts = task.query_blocks(row_bytes), task.corpus_parts()
    packed = task.packed_whole(parts[0]) if len(blocks) == len(parts) == 1 else None
    if packed is not None:
        return task.answer(task.pairwise(blocks[0], packed))
    result: Array | None = None
    for part, packed in task.packed_parts(parts):
        for block in blocks:
            found = task.engine.to_numpy(task.pairwise(block, packed))
            result = np.empty(shape, found.dtype) if result is None else result
            result[block, part] = found
        del packed  # before there is another
    return task.answer(result)


def knn(
    queries: Any,
    corpus: Any,
    k: int,
    metric: str | None = None,
    *,
    backend: str = "auto",
    accuracy: Accuracy | None = None,
    memory_budget: int | None = None,
    check_finite: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> Neighbors:
    """Find the k nearest rows of the corpus for each query, by looking at all of them.

    Neighbours are ordered by (distance, index): of equally distant rows the one with the smaller index comes
    first. Nothing of the size n_queries x n_corpus is held, and a corpus that lies on disk need not fit into memory.

    Parameters
    ----------
    queries : (n_queries, n_features) array of real numbers, or what is read block by block
    corpus : (n_corpus, n_features) array of real numbers, Prepared, or what is read block by block
        Read block by block are a numpy.memmap, the path of a ``.npy`` file, a Dask array, a list of these or of
        two-dimensional arrays, or an iterable of them such as a generator: blocks of one dtype and width, in the order
        of their rows. A thread reads the next block while one is searched; a file that is one block is searched as an
        array.
    k : int
        ``1 <= k <= n_corpus``.
    metric, backend, memory_budget, check_finite
        As for `pairwise`. Blocks are cut so that they fit the budget, packed; those of an iterable or a Dask array,
        of which two are there at a time, count besides as they are given.
    accuracy : {"fast", "exact"}, optional
        That of a `Prepared` corpus, otherwise ``"fast"``: the backend's native arithmetic. ``"exact"``: the
        neighbours are those of exact arithmetic on the values, as they are in the dtype computed in, and float
        distances are the exact ones, rounded. Own backends have it for every dtype and metric;
        `Neighbors.certificate` tells how it was proved.
    checkpoint : path_like, optional
        A file that keeps what was found, written every 20 seconds or less often, and removed at the end. A search that
        was killed goes on from it when it is started again with the same arguments; a corpus given as an iterator is
        read from its beginning, and not searched again. Not for a corpus that is prepared in memory or lies on a
        device.
    progress : callable, optional
        Called with the rows searched and n_corpus (None if not known) after each block; from the beginning again where
        the corpus is read for some queries after the other.

    Returns
    -------
    Neighbors
        The pair ``distances, indices``; dtypes of the distances as for `pairwise`.

    Raises
    ------
    InvalidInputError, UnknownBackendError, BackendUnavailableError, UnsupportedError, OverBudgetError
        As for `pairwise`; also for a k out of range, for an accuracy that the backend does not give, and for a block
        of another dtype or width than the first.
    CheckpointError
        If the checkpoint is damaged, is of another job or another corpus, or cannot be written at the start. When it
        cannot be written later, the search warns and goes on.

    Examples
    --------
    >>> import numpy as np
    >>> corpus = np.array([[0, 0], [2, 0], [0, 2], [9, 9]], np.uint8)
    >>> distances, indices = knn(np.array([[1, 0]], np.uint8), corpus, k=3, metric="cityblock", backend="numpy")
    >>> distances, indices
    (array([[1, 1, 3]], dtype=int32), array([[0, 1, 2]]))

    The same corpus in two blocks:

    >>> knn(np.array([[1, 0]], np.uint8), iter([corpus[:3], corpus[3:]]), 3, "cityblock", backend="numpy").indices
    array([[0, 1, 2]])
    """
    streamed = as_stream(queries, "queries", as_rows)
    if streamed is not None and not isinstance(streamed, MappedStream):
        if checkpoint is not None:
            raise InvalidInputError(
                "checkpoint is given and queries come in blocks; expected queries as an array, a numpy.memmap or the "
                "path of a .npy file."
            )
        budget = check_budget(memory_budget)
        options: Any = {"backend": backend, "accuracy": accuracy, "memory_budget": budget, "check_finite": check_finite}
        return _knn_in_groups(_groups(streamed, budget // 4), corpus, k, metric, progress, options)
    queries = queries if streamed is None else streamed.rows
    if not isinstance(corpus, Prepared):
        corpus = as_corpus(corpus, whole=checkpoint is None and progress is None)
    if checkpoint is not None and not isinstance(corpus.rows if isinstance(corpus, Prepared) else corpus, Stream):
        kind = "prepared in memory" if isinstance(corpus, Prepared) else "on a device"
        raise InvalidInputError(
            f"checkpoint is given and the corpus is {kind}; expected one on the host that is read block by block: an "
            f"array, a numpy.memmap, the path of a .npy file, a Dask array or an iterable of blocks."
        )
    kept = None if checkpoint is None else Checkpoint(checkpoint)
    if backend == "auto" and kept is not None and kept.header is not None:
        backend = kept.header["job"].get("backend", backend)
    task = _enter(queries, corpus, check_count("k", k), metric, backend, accuracy, memory_budget, check_finite)
    k = check_k(k, task.prepared.shape[0]) if task.n_corpus is not None else k
    if kept is None:
        task = task.in_one_block()
    if task.proves_floats and not task.is_streamed:
        with clear_when_full(task.engine, f"the exact search of {task.prepared.shape[0]:,} rows"):
            found = task.neighbors(*exact.search(task, k))
        if progress is not None:
            progress(task.prepared.shape[0], task.prepared.shape[0])
        return found
    if task.proves_floats:
        return _search_exactly(task, k, progress, kept)
    blocks, parts = task.query_blocks(k * task.ranked_bytes), task.corpus_parts()
    ranked: Any
    indices: Any
    packed = task.packed_whole(parts[0]) if len(blocks) == len(parts) == 1 else None
    if packed is not None:
        ranked, indices = task.knn(blocks[0], packed, k)
        if progress is not None:
            progress(parts[0].stop, parts[0].stop)
    else:
        ranked, indices = _search(task, blocks, parts, k, progress, kept)
        ranked = task.engine.to_native(ranked, ranked.dtype)
    if kept is not None:
        kept.remove()
    certificate = exact.Certificate("integers", float(k)) if task.accuracy == "exact" else None
    return task.neighbors(task.engine.finish(ranked, task.space), indices, certificate)


def search_block(
    queries: Any,
    block: Any,
    k: int,
    first: int,
    metric: str,
    *,
    backend: str,
    accuracy: Accuracy = "fast",
    memory_budget: int | None = None,
    check_finite: bool = True,
    centre: Array | None = None,
) -> tuple[Any, Any]:
    """Find the k nearest rows in one block of a corpus: what `merge_topk` merges, and `finish_ranked` ends.

    Parameters
    ----------
    queries, block : arrays, as for `knn`
        Of dtypes that give the same for all blocks.
    k : int
        Fewer are found in a block of fewer rows.
    first : int
        Corpus index of the first row of the block.
    metric, backend, accuracy, memory_budget, check_finite
        As for `knn`.
    centre : (n_features,) array, optional
        A point amid the whole corpus, about which floats are centred: `centre_of` some of its rows.

    Returns
    -------
    ranked : (n_queries, min(k, n_rows)) array
        The values that neighbours are ordered by.
    indices : (n_queries, min(k, n_rows)) array of int64
        Of the whole corpus.

    Examples
    --------
    >>> ranked, indices = search_block([[1.0]], [[3.0], [2.0]], 1, 100, "euclidean", backend="numpy")
    >>> ranked, indices
    (array([[1.]]), array([[101]]))
    """
    task = _enter(queries, block, check_count("k", k), metric, backend, accuracy, memory_budget, check_finite)
    task.centre = centre
    k = min(k, task.prepared.shape[0])
    ranked, indices = _search(task, task.query_blocks(k * task.ranked_bytes), task.corpus_parts(), k, None, None)
    return ranked, indices + first


def finish_ranked(
    ranked: Array, metric: str, dtype: Any, n_features: int, backend: str, accuracy: Accuracy = "fast"
) -> Array:
    """Return the distances of the values that `search_block` ranked, and `merge_topk` merged."""
    engine, space = get_backend(backend), Space(get_metric(metric), np.dtype(dtype), n_features)
    if accuracy == "exact" and not space.is_integer:
        return distances_of(space, ranked)
    return engine.to_numpy(engine.finish(engine.to_native(ranked, ranked.dtype), space))


def centre_of(rows: Array, space: Space) -> Array | None:
    """Return the mean of some rows as the metric accumulates them, None for uint8, which needs no centre.

    Of more than `CENTRE_ROWS`, as many stand for all; rows that are not finite do not count.
    """
    if space.is_integer:
        return None
    sample = interchange.to_host(rows[:: -(-len(rows) // CENTRE_ROWS)]).astype(space.dtype, copy=False)
    with np.errstate(all="ignore"):  # rows without a direction are refused by the search
        return finite_mean(space.metric.prepare_rows(np, sample))


def prepare(corpus: Any, metric: str = "euclidean", *, backend: str = "auto", accuracy: Accuracy = "fast") -> Prepared:
    """Check, centre, pack and copy a corpus once, for many calls of `knn` and `pairwise`.

    What packing holds beside the rows is at most half of the memory budget (``$KNNBENCH_MEMORY_BUDGET``, 1 GiB); a
    corpus that needs more is packed in each call.

    Parameters
    ----------
    corpus : (n_corpus, n_features) array of real numbers, or what `knn` reads block by block
        A corpus on disk is packed if it is small beside the budget, and otherwise read in each call; so are a Dask
        array and an iterable, which must not be an iterator that can be read only once.
    metric, backend, accuracy
        As for `knn`; calls with the result need not repeat them.

    Returns
    -------
    Prepared

    Raises
    ------
    InvalidInputError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As for `knn`.

    Examples
    --------
    >>> corpus = prepare([[0.0, 0.0], [3.0, 4.0]], "cityblock", backend="numpy")
    >>> knn([[1.0, 1.0]], corpus, k=1).distances
    array([[2.]])
    """
    metric_record, checked = get_metric(metric), check_accuracy(accuracy)
    rows = as_corpus(corpus, kept=True)
    prepared = _prepared(
        rows, metric_record, backend, checked, rows_dtype(rows), True, interchange.on_device(rows),
        n_queries=USUAL_QUERIES, k=USUAL_K, keep_bytes=check_budget(None) // 2,
    )  # fmt: skip
    if not isinstance(rows, Stream):
        with clear_when_full(get_backend(prepared.backend), f"a corpus of {rows.shape[0]:,} x {rows.shape[1]:,}"):
            prepared.packed(prepared.dtype)
    return prepared


def rows_dtype(rows: Any) -> np.dtype[Any]:
    """Return the dtype that checked rows are computed in among themselves."""
    return computed_dtype(interchange.dtype_of(rows))


def as_rows(array: Any, name: str) -> Any:
    """Return `array` as rows: a numpy array, or the array itself if it lives on a device.

    Parameters
    ----------
    array : array_like
    name : str
        ``"queries"`` or ``"corpus"``, for the errors.

    Raises
    ------
    InvalidInputError
        If it is not a two-dimensional array of real numbers with at least one row and one feature.
    """
    if isinstance(array, str | os.PathLike):
        array = open_rows(array, name)
    rows = array
    if not interchange.on_device(array):
        if np.ma.is_masked(array):
            raise InvalidInputError(f"{name} has masked elements; expected every value to be present.")
        try:
            rows = np.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"{name}, a {type(array).__name__}, is not an array of real numbers: {error}"
            ) from None
        if rows.dtype == object:
            raise InvalidInputError(
                f"{name}, a {type(array).__name__}, gives an array of objects; expected a dense array of real "
                f"numbers with rows of equal length (of a sparse matrix: its .toarray())."
            )
    computed_dtype(interchange.dtype_of(rows), name)
    shape = tuple(rows.shape)
    if len(shape) != 2 or 0 in shape:
        hint = " (one row: x[None, :])" if len(shape) == 1 else ""
        raise InvalidInputError(
            f"{name} has shape {shape}; expected (n_{name}, n_features) with at least one of each{hint}."
        )
    return rows


def as_corpus(corpus: Any, *, whole: bool = True, kept: bool = False) -> Any:
    """Return a corpus as rows, or as a `Stream` of them.

    Parameters
    ----------
    corpus : array_like, or what `as_stream` takes
    whole : bool
        Whether an array in memory may be searched as a whole; otherwise it is a stream too.
    kept : bool
        Whether it is for many calls: then it must be readable more than once, and what is small is taken as rows.
    """
    stream = as_stream(corpus, "corpus", as_rows)
    if stream is None:
        rows = as_rows(corpus, "corpus")
        return rows if whole or interchange.on_device(rows) else MappedStream(rows, "corpus")
    computed_dtype(stream.dtype, "corpus")
    if not kept:
        return stream
    if stream.is_once:
        raise InvalidInputError(
            f"corpus is a {type(corpus).__name__}, which can be read only once, and is prepared for many calls; "
            f"expected an array, a list of blocks, a numpy.memmap, the path of a .npy file or a Dask array."
        )
    if isinstance(stream, MappedStream) and PACKED_COPIES * stream.rows.nbytes <= check_budget(None) // 2:
        return stream.rows
    if stream.n_rows is None:
        stream.n_rows = sum(len(rows) for _, rows in stream.blocks(USUAL_CORPUS))
    return stream


def _shape_of(rows: Any) -> tuple[int, int]:
    """Return the shape of rows or of a stream, with 0 rows if it does not tell."""
    return (rows.n_rows or 0, rows.n_features) if isinstance(rows, Stream) else rows.shape


def check_count(name: str, value: Any) -> int:
    """Return `value` as an int, or raise `InvalidInputError` if it is not a whole number of at least 1."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise InvalidInputError(f"{name} is {value!r}; expected a whole number of at least 1.")
    return count


def check_k(k: Any, n_corpus: int) -> int:
    """Return `k` as an int from 1 to `n_corpus`, or raise `InvalidInputError`."""
    count = check_count("k", k)
    if count > n_corpus:
        raise InvalidInputError(f"k={count} exceeds n_corpus={n_corpus}; there are no more neighbours than rows.")
    return count


def check_accuracy(accuracy: Any) -> Accuracy:
    """Return `accuracy`, or raise `InvalidInputError`."""
    if accuracy not in get_args(Accuracy):
        raise InvalidInputError(f"accuracy is {accuracy!r}; expected one of: {', '.join(get_args(Accuracy))}.")
    return cast(Accuracy, accuracy)


@dataclass(slots=True)
class _Task:
    """A call that has passed the edge: what to compute, with what, in which pieces."""

    engine: Backend
    space: Space
    queries: Any
    prepared: Prepared
    accuracy: Accuracy
    is_resident: bool  # the corpus came prepared, so it is not held by this call
    budget: int
    check_finite: bool = True
    centre: Array | None = None  # of the whole corpus, where it is searched in parts
    is_full: bool = False  # the device has no room for the whole corpus
    budget_left: int = 0
    certificates: list[tuple[exact.Certificate, float]] = field(default_factory=list)  # of what was searched in blocks
    reach: Array | None = None  # of the nearest so far, where they are searched exactly in blocks

    def __post_init__(self) -> None:
        self.budget_left = self.budget

    @property
    def is_streamed(self) -> bool:
        """Whether the corpus is read block by block."""
        return isinstance(self.prepared.rows, Stream)

    @property
    def proves_floats(self) -> bool:
        """Whether neighbours of floats are to be those of exact arithmetic."""
        return self.accuracy == "exact" and not self.space.is_integer

    @property
    def ranked_bytes(self) -> int:
        """What a neighbour takes in a list that is merged."""
        if not self.proves_floats:
            return 8 + self.space.ranked.itemsize
        # An index, how far it reaches, and the string.
        return 16 + (FRACTION_BYTES if self.space.metric.unit_rows else BINARY_BYTES) * self.space.dtype.itemsize

    @property
    def n_corpus(self) -> int | None:
        """Rows of the corpus, None if only its last block tells."""
        return self.prepared.rows.n_rows if self.is_streamed else self.prepared.shape[0]

    @property
    def _crosses(self) -> bool:
        """Whether host arrays have to be copied to a device."""
        return self.engine.capabilities.device == "cuda"

    def query_blocks(self, answer_bytes: int) -> list[slice]:
        """Return the blocks of queries to be taken one by one, `answer_bytes` being a query's share of the answer.

        There is one block unless queries must be copied (converted, or to a device), or answers merged. The
        copies, the answers that come back from a device, and those to be merged, take a quarter of the budget.
        """
        n_queries, n_features = self.queries.shape
        fits = self._fits(self.queries) if self._is_host else True
        row_bytes = 0 if fits and not (self._crosses and self._is_host) else n_features * self.space.dtype.itemsize
        if not row_bytes and not self.is_streamed:
            return [slice(0, n_queries)]
        row_bytes += answer_bytes * (MERGED_COPIES if self.is_streamed else 1)
        step, _ = block_shape(n_queries, 1, budget=self.budget // 4, per_pair=row_bytes, max_queries=n_queries)
        self.budget_left -= step * row_bytes
        return list(slices(n_queries, step))

    def corpus_parts(self) -> list[slice]:
        """Return the parts of the corpus to be searched one by one.

        There is one part unless the corpus must be copied to a device for this call and does not fit into
        half of the budget there, with as much again for its packed form; or unless it is read block by block, when
        the first part says how large a block is.
        """
        n_corpus, n_features = self.prepared.shape
        if self.is_streamed:
            step, n_bytes = self._streamed_block()
            self.budget_left -= n_bytes
            return [slice(0, step)]
        if self.is_resident or not self._crosses or interchange.on_device(self.prepared.rows):
            return [slice(0, n_corpus)]
        row_bytes = PACKED_COPIES * n_features * self.space.dtype.itemsize
        _, step = block_shape(1, n_corpus, budget=self.budget // 2, per_pair=row_bytes, max_corpus=n_corpus)
        self.budget_left -= step * row_bytes
        return list(slices(n_corpus, step))

    def _streamed_block(self) -> tuple[int, int]:
        """Return how many rows of a streamed corpus are read together, and the bytes that it takes."""
        given, n_bytes = self.prepared.rows, self.space.n_features * self.space.dtype.itemsize
        # A larger share gains less than a backend does by packing a block for many queries.
        share = self.budget // 4
        n_rows = max(1, min(STREAM_BYTES, share) // n_bytes)
        if given.n_rows is not None:
            n_rows = min(given.n_rows, n_rows)
        # This block and the next, unless they are pages of a file; and what the backend makes of a block.
        row_bytes = (0 if self._is_view else 2 * n_bytes) + self.engine.prepared_bytes(self.space)
        _, step = block_shape(1, n_rows, budget=share, per_pair=row_bytes, max_corpus=n_rows)
        return step, step * row_bytes

    @property
    def _is_view(self) -> bool:
        """Whether blocks of a streamed corpus are slices of an array, and no copies."""
        given = self.prepared.rows
        return isinstance(given, MappedStream) and self._fits(given.rows)

    def in_one_block(self) -> "_Task":
        """Return the task on a streamed corpus as one on an array, if it is one that a single block holds as it is."""
        stream = self.prepared.rows
        if not self.is_streamed or not self._is_view or self._streamed_block()[0] < stream.n_rows:
            return self
        _check_values(stream.rows, "corpus", self.engine, self.space.metric, self.check_finite)
        prepared = Prepared(
            stream.rows, self.space.metric, self.prepared.backend, self.prepared.accuracy, self.prepared.passed_over
        )
        budget = self.budget - stream.n_rows * self.engine.prepared_bytes(self.space)
        return replace(self, prepared=prepared, is_resident=False, budget=budget)

    def _fits(self, rows: Array) -> bool:
        return rows.dtype == self.space.dtype and rows.flags.c_contiguous

    @property
    def _is_host(self) -> bool:
        return not interchange.on_device(self.queries)

    def native(self, block: slice) -> Native:
        """Return a block of queries as the backend's own array."""
        return self.engine.to_native(self.queries[block], self.space.dtype)

    def packed_whole(self, part: slice) -> Any:
        """Return the corpus in the backend's own form, as it is kept for all calls.

        None if the part is not all of it, if it is read block by block, or if the device has no room for it.
        """
        if self.is_streamed or part != slice(0, self.prepared.shape[0]) or self.centre is not None or self.is_full:
            return None
        try:
            return self.prepared.packed(self.space.dtype)
        except Exception as error:
            if not self.engine.ran_out(error):
                raise
        self.is_full = True
        return None

    def packed(self, part: slice) -> Any:
        """Return a part of the corpus in the backend's own form."""
        if part == slice(0, self.prepared.shape[0]) and self.centre is None:
            return self.prepared.packed(self.space.dtype)
        return self._packed_rows(self.prepared.rows[part])

    def _packed_rows(self, rows: Array) -> Any:
        native = self.engine.to_native(rows, self.space.dtype)
        if self.centre is None:
            return self.engine.prepare(native, self.space)
        return self.engine.prepare_about(native, self.centre, self.space)

    def packed_parts(
        self, parts: list[slice], skip: int = 0, seen: RowDigest | None = None, expected: bytes = b""
    ) -> Iterator[tuple[slice, Any]]:
        """Yield the parts of the corpus, from row `skip` on, in the backend's own form.

        Parameters
        ----------
        parts : list of slice
            From `corpus_parts`. Where each is searched exactly, its rows are yielded as they are.
        skip : int
        seen, expected : RowDigest and bytes
            Takes the rows in; and what it must give for those skipped.
        """
        needs_centre = not self.proves_floats and self.centre is None
        if not self.is_streamed:
            if needs_centre and len(parts) > 1:
                self.centre = centre_of(self.prepared.rows, self.space)
            for part in parts:
                packed = None if self.proves_floats else self.packed_whole(part)
                if self.proves_floats:
                    yield part, self.prepared.rows[part]
                elif packed is None:
                    yield from self._pieces(part.start, self.prepared.rows[part])
                else:
                    yield part, packed
            return
        stream = self.prepared.rows
        if needs_centre and isinstance(stream, MappedStream):
            self.centre = centre_of(stream.rows, self.space)
        step = parts[0].stop
        reader = self._read(step, skip, seen, expected)
        if stream.pays_ahead(step):
            reader = read_ahead(reader)
        with closing(reader) as blocks:
            for start, rows in blocks:
                part = slice(start, start + len(rows))
                if needs_centre and self.centre is None:
                    self.centre = centre_of(rows, self.space)
                if seen is not None:
                    seen.take(start, rows)
                whole = iter([(slice(start, start + len(rows)), rows)])
                pieces = whole if self.proves_floats else self._pieces(start, rows)
                del whole
                del rows
                yield from pieces
                del pieces

    def _pieces(self, start: int, rows: Array) -> Iterator[tuple[slice, Any]]:
        """Yield rows in the backend's own form; where its device has no room for all of them, in halves."""
        stop = start + len(rows)
        try:
            packed = self._packed_rows(rows)
        except Exception as error:
            if not self.engine.ran_out(error):
                raise
            if len(rows) == 1:
                raise OverBudgetError(full_text("a single row of the corpus", error)) from None
        else:
            del rows
            yield slice(start, stop), packed
            return
        if self.centre is None:
            self.centre = centre_of(rows, self.space)
        for part in slices(len(rows), (len(rows) + 1) // 2):
            yield from self._pieces(start + part.start, rows[part])

    def _read(
        self, step: int, skip: int, seen: RowDigest | None, expected: bytes
    ) -> Generator[tuple[int, Array], None, None]:
        """Yield the blocks of a streamed corpus, checked, converted and in memory."""
        skipped = RowDigest(self.space.dtype)
        at_start = True
        for start, given in self.prepared.rows.blocks(step, skip, skipped.take):
            if at_start:
                _check_seen(skipped.value, expected, skip)
                at_start = False
            _check_values(given, "corpus", self.engine, self.space.metric, self.check_finite, start)
            rows = np.ascontiguousarray(given, self.space.dtype)
            if rows is given and start > skip:  # the first is not waited for twice
                touch(rows)
            yield start, rows
            del given, rows
        if at_start:
            _check_seen(skipped.value, expected, skip)

    def pairwise(self, block: slice, packed: Any) -> Native:
        """Return the distances of a block of queries."""
        with limited_blas(self.engine.calls_blas):
            return self._shrinking(lambda budget: self.engine.pairwise(self.native(block), packed, self.space, budget))

    def knn(self, block: slice, packed: Any, k: int) -> tuple[Native, Native]:
        """Return the ranked values and indices of a block of queries."""
        with limited_blas(self.engine.calls_blas):
            return self._shrinking(lambda budget: self.engine.knn(self.native(block), packed, k, self.space, budget))

    def _shrinking(self, compute: Callable[[int], T]) -> T:
        """Return what is computed within a budget; where the memory of the device runs out, within half of it.

        What has been too much is so for the calls to come too. A budget too small for any block says what is needed.
        """
        reason = ""
        while True:
            try:
                return compute(self.budget_left)
            except OverBudgetError as error:
                if not reason:
                    raise
                raise OverBudgetError(f"the device has no memory left ({reason}), and {error}") from None
            except Exception as error:
                if not self.engine.ran_out(error):
                    raise
                if self.budget_left < 2:
                    raise OverBudgetError(full_text("the smallest block", error)) from None
                reason = one_line(error)
            # Out here, where the error and the arrays of its frames are gone.
            self.budget_left //= 2

    def nearest(self, block: slice, packed: Any, k: int) -> tuple[Array, Array]:
        """Return, on the host, what `knn` does, or for exact neighbours of floats their exact values and indices."""
        if not self.proves_floats:
            ranked, indices = self.knn(block, packed, k)
            return self.engine.to_numpy(ranked), self.engine.to_numpy(indices)
        queries = self.queries[block]
        with clear_when_full(self.engine, f"the exact search of {len(packed):,} rows"):
            assert self.reach is not None
            ranked, indices, proof = exact.search_rows(
                self.engine, self.space, queries, packed, k, self.budget_left, self.reach[block]
            )
        self.certificates.append((proof, len(queries) / len(self.queries)))
        return ranked, indices

    def neighbors(self, distances: Native, indices: Native, certificate: exact.Certificate | None) -> Neighbors:
        """Return what `knn` does."""
        return Neighbors(
            self.answer(distances),
            self.answer(indices),
            backend=self.prepared.backend,
            certificate=certificate,
            passed_over=self.prepared.passed_over,
        )

    def answer(self, native: Native) -> Any:
        """Return an answer on the host, or in an array of the queries' library if they live on a device."""
        if self._is_host:
            return native if isinstance(native, np.ndarray) else self.engine.to_numpy(native)
        if not interchange.on_device(native):
            native = self.engine.to_native(native, native.dtype)
        return interchange.in_kind(native, self.queries)


@contextmanager
def clear_when_full(engine: Backend, what: str) -> Iterator[None]:
    """Raise `OverBudgetError`, which names what was to be held, where the memory of the engine's device runs out."""
    try:
        yield
    except Exception as error:
        if not engine.ran_out(error):
            raise
        raise OverBudgetError(full_text(what, error)) from None


def full_text(what: str, error: Exception) -> str:
    """Return the text of an error of a device without room for something."""
    return (
        f"the device has no memory left for {what} ({one_line(error)}); free some of it, pass the queries or the "
        f"corpus in parts, or leave the corpus unprepared, which is then searched in pieces that fit."
    )


def one_line(error: Exception) -> str:
    """Return the text of another library's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _enter(
    queries: Any,
    corpus: Any,
    k: int,
    metric: str | None,
    backend: str,
    accuracy: Accuracy | None,
    memory_budget: int | None,
    check_finite: bool,
) -> _Task:
    """Check a call, `k` being 0 if it asks for all distances, and decide all that follows from its arguments."""
    budget = check_budget(memory_budget)
    if accuracy is None:
        accuracy = corpus.accuracy if isinstance(corpus, Prepared) else "fast"
    accuracy = check_accuracy(accuracy)
    queries = as_rows(queries, "queries")
    rows = corpus if isinstance(corpus, Prepared | Stream) else as_rows(corpus, "corpus")
    n_features = rows.n_features if isinstance(rows, Stream) else rows.shape[1]
    if queries.shape[1] != n_features:
        raise InvalidInputError(
            f"queries has {queries.shape[1]} features and corpus has {n_features}; expected the same number."
        )
    corpus_dtype = rows.dtype if isinstance(rows, Prepared) else interchange.dtype_of(rows)
    dtype = common_dtype(interchange.dtype_of(queries), corpus_dtype)
    if isinstance(rows, Prepared):
        prepared = rows
        _check_agrees(prepared, metric, backend)
    else:
        record = get_metric("euclidean" if metric is None else metric)
        on_device = interchange.on_device(queries) or interchange.on_device(rows)
        prepared = _prepared(rows, record, backend, accuracy, dtype, check_finite, on_device, len(queries), k)
    space = Space(get_metric(prepared.metric), dtype, queries.shape[1])
    engine = get_backend(prepared.backend)
    if prepared is corpus:  # made for its own dtype; the queries may bring a wider one
        _check_supported(prepared.backend, engine, space, accuracy)
    _check_device(queries, "queries", prepared.backend, engine)
    _check_values(queries, "queries", engine, space.metric, check_finite)
    return _Task(engine, space, queries, prepared, accuracy, isinstance(corpus, Prepared), budget, check_finite)


def _prepared(
    rows: Any,
    metric: Metric,
    backend: str,
    accuracy: Accuracy,
    dtype: np.dtype[Any],
    check_finite: bool,
    on_device: bool,
    n_queries: int,
    k: int,
    *,
    keep_bytes: int = 0,
) -> Prepared:
    """Choose a backend for checked rows that are computed in `dtype`, and look through their values."""
    n_rows, n_features = _shape_of(rows)
    space = Space(metric, dtype, n_features)
    passed_over: dict[str, str] = {}
    if backend == "auto":
        op, data_on = "knn" if k else "pairwise", "device" if on_device else "host"
        n_rows = n_rows or USUAL_CORPUS
        backend, passed_over = selection.choose(
            Problem(op, n_queries, n_rows, n_features, min(k, n_rows), metric.name, dtype.name, data_on, accuracy)
        )
    engine = get_backend(backend)
    _check_supported(backend, engine, space, accuracy)
    if not isinstance(rows, Stream):  # whose blocks are looked through as they come
        _check_device(rows, "corpus", backend, engine)
        _check_values(rows, "corpus", engine, metric, check_finite)
    return Prepared(rows, metric, backend, accuracy, passed_over, keep_bytes=keep_bytes)


def _pack(engine: Backend, rows: Any, space: Space, keep_bytes: int = 0) -> Any:
    prepared = engine.prepare(engine.to_native(rows, space.dtype), space)
    return engine.keep(prepared, space, keep_bytes) if keep_bytes else prepared


def _search(
    task: _Task,
    blocks: list[slice],
    parts: list[slice],
    k: int,
    progress: Callable[[int, int | None], object] | None,
    kept: Checkpoint | None,
) -> tuple[Array, Array]:
    """Return the k nearest, on the host, one part of the corpus after the other."""
    so_far = kept.resume(_job(task, k)) if kept else None
    seen = RowDigest(task.space.dtype, so_far.seen if so_far else b"") if kept else None
    shape, held, done = (len(task.queries), k), 0, 0
    if task.proves_floats:
        task.reach = np.full(shape, np.inf)
    ranked: Array | None = None
    indices: Array = np.empty(shape, np.int64)
    if so_far is not None:
        task.centre, done, held = so_far.centre, so_far.done, so_far.indices.shape[1]
        ranked = np.empty(shape, so_far.ranked.dtype)
        ranked[:, :held], indices[:, :held] = so_far.ranked, so_far.indices
        if so_far.certificate is not None:
            task.certificates.append((exact.Certificate(*so_far.certificate), 1.0))
    for part, packed in task.packed_parts(parts, done, seen, so_far.seen if so_far else b""):
        width = min(k, part.stop - part.start)
        total = min(k, held + width)
        for block in blocks:
            values, columns = task.nearest(block, packed, width)
            columns = np.where(columns == MISSING, MISSING, columns + part.start)
            if held:
                assert ranked is not None
                values, columns = merge_topk((ranked[block, :held], indices[block, :held]), (values, columns), k)
            # Of the dtype that comes: a peer ranks by its own distances, and exact values may become longer.
            ranked = np.empty(shape, values.dtype) if ranked is None else ranked
            ranked = ranked.astype(np.result_type(ranked, values), copy=False)
            ranked[block, :total], indices[block, :total] = values, columns
        del packed
        held, done = total, part.stop
        assert ranked is not None
        if kept is not None and seen is not None:
            proof = astuple(exact.joined(task.certificates)) if task.certificates else None
            kept.save(Progress(done, ranked[:, :held], indices[:, :held], task.centre, seen.value, proof))
        if progress is not None:
            progress(done, task.n_corpus)
    if held < k:
        check_k(k, done)
    assert ranked is not None
    return ranked, indices


def _search_exactly(
    task: _Task, k: int, progress: Callable[[int, int | None], object] | None, kept: Checkpoint | None
) -> Neighbors:
    """Return the exact neighbours of floats in a streamed corpus.

    It is read once for as many queries as there is room for: their lists, which hold exact values, take a quarter of
    the budget at the most.
    """
    n_queries, list_bytes = len(task.queries), LIST_COPIES * k * task.ranked_bytes
    step, _ = block_shape(n_queries, 1, budget=task.budget // 4, per_pair=list_bytes, max_queries=n_queries)
    if step < n_queries and (kept is not None or task.prepared.rows.is_once):
        reason = "is an iterator, which can be read only once" if kept is None else "is read with a checkpoint, once"
        raise OverBudgetError(
            f"a quarter of the memory budget has room for the exact values of {step:,} of {n_queries:,} queries, and "
            f"the corpus {reason}; raise memory_budget (or ${BUDGET_VARIABLE}) to some {4 * n_queries * list_bytes:,} "
            f"bytes, or pass fewer queries at a time."
        )
    distances, indices = np.empty((n_queries, k), task.space.output), np.empty((n_queries, k), np.int64)
    proofs = []
    for group in slices(n_queries, step):
        some = replace(task, queries=task.queries[group], certificates=[])
        some.budget_left -= step * list_bytes
        blocks, parts = some.query_blocks(k * task.ranked_bytes), some.corpus_parts()
        ranked, indices[group] = _search(some, blocks, parts, k, progress, kept)
        distances[group] = distances_of(task.space, ranked)
        del ranked  # before there are others
        proofs.append((exact.joined(some.certificates), len(some.queries) / n_queries))
    if kept is not None:
        kept.remove()
    return task.neighbors(distances, indices, exact.joined(proofs))


def _job(task: _Task, k: int) -> dict[str, Any]:
    """Return what a checkpoint must agree on."""
    return {
        "knnbench": knnbench.__version__,
        "k": k,
        "metric": task.space.metric.name,
        "dtype": task.space.dtype.name,
        "backend": task.prepared.backend,
        "accuracy": task.prepared.accuracy,
        "n_corpus": task.n_corpus,
        "n_features": task.space.n_features,
        "n_queries": len(task.queries),
        "queries": digest_of(task.queries),
    }


def _check_seen(found: bytes, expected: bytes, n_rows: int) -> None:
    """Raise `CheckpointError` if the rows passed over are not those that a checkpoint is of."""
    if found != expected:
        raise CheckpointError(
            f"the checkpoint is of another corpus: its first {n_rows:,} rows differ; name another file, or remove it."
        )


def _groups(stream: Stream, room: int) -> Iterator[Array]:
    """Yield the rows of a stream in arrays of at most `room` bytes, each as large as fits."""
    step = max(1, room // (2 * stream.n_features * stream.dtype.itemsize))
    held: list[Array] = []
    n_held = 0
    for _, rows in stream.blocks(step):
        if n_held + len(rows) > step:
            yield np.concatenate(held)
            held, n_held = [], 0
        held.append(rows)
        n_held += len(rows)
    if held:
        yield np.concatenate(held)


def _knn_in_groups(
    groups: Iterable[Array],
    corpus: Any,
    k: int,
    metric: str | None,
    progress: Callable[[int, int | None], object] | None,
    options: dict[str, Any],
) -> Neighbors:
    """Return the neighbours of queries that come in groups, for each of which the corpus is read."""
    if not isinstance(corpus, Prepared):
        corpus = as_corpus(corpus, whole=progress is None)
    found = [knn(group, corpus, k, metric, progress=progress, **options) for group in groups]
    if not found:
        raise InvalidInputError("queries has no rows in its blocks; expected at least one.")
    distances, indices = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    proofs = [(each.certificate, len(each.indices) / len(indices)) for each in found if each.certificate]
    return Neighbors(
        distances, indices, backend=found[0].backend, certificate=exact.joined(proofs) if proofs else None,
        passed_over=found[0].passed_over,
    )  # fmt: skip


def _check_agrees(prepared: Prepared, metric: str | None, backend: str) -> None:
    """Raise `InvalidInputError` if a call asks for other than its corpus was prepared for."""
    asked = {
        "metric": prepared.metric if metric is None else get_metric(metric).name,
        "backend": prepared.backend if backend == "auto" else backend,
    }
    for what, value in asked.items():
        if value != getattr(prepared, what):
            raise InvalidInputError(
                f"{what} is {value!r} and the corpus was prepared for {getattr(prepared, what)!r}; leave {what} out, "
                f"or prepare the corpus for it."
            )


def _check_supported(backend: str, engine: Backend, space: Space, accuracy: Accuracy) -> None:
    lacking = selection.lacks(engine.capabilities, space, accuracy)
    if lacking:
        raise UnsupportedError(f"backend {backend!r} {lacking}; `knnbench backends` lists what each has.")


def _check_device(rows: Any, name: str, backend: str, engine: Backend) -> None:
    if interchange.on_device(rows) and engine.capabilities.device != "cuda":
        raise InvalidInputError(
            f"{name} lives on a CUDA device and backend {backend!r} computes on the CPU; copy it to the host or "
            f"use a CUDA backend."
        )


def _check_values(rows: Any, name: str, engine: Backend, metric: Metric, check_finite: bool, first: int = 0) -> None:
    """Raise `InvalidInputError` for the first row that is not finite, or lacks the direction that cosine needs."""
    if interchange.on_device(rows):
        native = engine.to_native(rows, rows_dtype(rows))
        found = engine.scan(native, finite=check_finite, zero=metric.unit_rows)
    else:
        # Converted, because a long double may overflow, or vanish, in float64.
        with np.errstate(over="ignore"):
            found = scan_rows(np, rows, finite=check_finite, zero=metric.unit_rows, dtype=rows_dtype(rows))
    if found.not_finite is not None:
        raise InvalidInputError(
            f"{name} row {first + found.not_finite} holds NaN or infinity; expected finite values (check_finite=False "
            f"skips this check and leaves the results undefined)."
        )
    if found.all_zero is not None:
        raise InvalidInputError(
            f"{name} row {first + found.all_zero} is all zeros and has no direction, which metric {metric.name!r} "
            f"compares; drop such rows or use another metric."
        )
