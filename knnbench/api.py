"""`pairwise`, `knn` and `prepare`: the only place that validates, and that converts at the edge."""

import operator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from knnbench import exact, interchange, selection
from knnbench.backends import get_backend
from knnbench.backends.base import Backend, Native, scan_rows
from knnbench.blocking import block_shape, check_budget, require_memory, slices
from knnbench.dtypes import Array, common_dtype, computed_dtype
from knnbench.errors import InvalidInputError, UnsupportedError
from knnbench.metrics import Metric, Space, get_metric
from knnbench.ordering import merge_topk
from knnbench.selection import Problem
from knnbench.threads import limited_blas

__all__ = ["Accuracy", "Neighbors", "Prepared", "knn", "pairwise", "prepare"]

Accuracy = Literal["fast", "exact"]

# What a corpus is prepared for by backend="auto", which does not know the calls to come.
USUAL_QUERIES, USUAL_K = 1000, 10


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
    rows : (n_corpus, n_features) array
        The corpus as given.
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
        self.shape: tuple[int, int] = rows.shape
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
        return {**self.__dict__, "rows": interchange.to_host(self.rows), "_packed": {}}

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
    if len(blocks) == len(parts) == 1:
        return task.answer(task.pairwise(blocks[0], task.packed(parts[0])))
    result: Array | None = None
    for part in parts:
        packed = task.packed(part)
        for block in blocks:
            found = task.engine.to_numpy(task.pairwise(block, packed))
            result = np.empty(shape, found.dtype) if result is None else result
            result[block, part] = found
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
) -> Neighbors:
    """Find the k nearest rows of the corpus for each query, by looking at all of them.

    Neighbours are ordered by (distance, index): of equally distant rows the one with the smaller index comes
    first. Nothing of the size n_queries x n_corpus is held.

    Parameters
    ----------
    queries : (n_queries, n_features) array of real numbers
    corpus : (n_corpus, n_features) array of real numbers, or Prepared
    k : int
        ``1 <= k <= n_corpus``.
    metric, backend, memory_budget, check_finite
        As for `pairwise`.
    accuracy : {"fast", "exact"}, optional
        That of a `Prepared` corpus, otherwise ``"fast"``: the backend's native arithmetic. ``"exact"``: the
        neighbours are those of exact arithmetic on the values, as they are in the dtype computed in, and float
        distances are within one unit in the last place. Own backends have it for every dtype and metric;
        `Neighbors.certificate` tells how it was proved.

    Returns
    -------
    Neighbors
        The pair ``distances, indices``; dtypes of the distances as for `pairwise`.

    Raises
    ------
    InvalidInputError, UnknownBackendError, BackendUnavailableError, UnsupportedError, OverBudgetError
        As for `pairwise`; also for a k out of range, and for an accuracy that the backend does not give.

    Examples
    --------
    >>> import numpy as np
    >>> corpus = np.array([[0, 0], [2, 0], [0, 2], [9, 9]], np.uint8)
    >>> distances, indices = knn(np.array([[1, 0]], np.uint8), corpus, k=3, metric="cityblock", backend="numpy")
    >>> distances, indices
    (array([[1, 1, 3]], dtype=int32), array([[0, 1, 2]]))
    """
    task = _enter(queries, corpus, check_count("k", k), metric, backend, accuracy, memory_budget, check_finite)
    k = check_k(k, task.prepared.shape[0])
    if task.accuracy == "exact" and not task.space.is_integer:
        return task.neighbors(*exact.search(task, k))
    blocks, parts = task.query_blocks(k * (task.space.ranked.itemsize + 8)), task.corpus_parts()
    ranked: Any = None
    indices: Any = None
    if len(blocks) == len(parts) == 1:
        ranked, indices = task.knn(blocks[0], task.packed(parts[0]), k)
    else:
        for part in parts:
            found = _search(task, blocks, part, min(k, part.stop - part.start))
            ranked, indices = found if ranked is None else merge_topk((ranked, indices), found, k)
        ranked = task.engine.to_native(ranked, ranked.dtype)
    certificate = exact.Certificate("integers", float(k)) if task.accuracy == "exact" else None
    return task.neighbors(task.engine.finish(ranked, task.space), indices, certificate)


def prepare(corpus: Any, metric: str = "euclidean", *, backend: str = "auto", accuracy: Accuracy = "fast") -> Prepared:
    """Check, centre, pack and copy a corpus once, for many calls of `knn` and `pairwise`.

    What packing holds beside the rows is at most half of the memory budget (``$KNNBENCH_MEMORY_BUDGET``, 1 GiB); a
    corpus that needs more is packed in each call.

    Parameters
    ----------
    corpus : (n_corpus, n_features) array of real numbers
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
    rows = as_rows(corpus, "corpus")
    prepared = _prepared(
        rows, metric_record, backend, checked, rows_dtype(rows), True, interchange.on_device(rows),
        n_queries=USUAL_QUERIES, k=USUAL_K, keep_bytes=check_budget(None) // 2,
    )  # fmt: skip
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
    budget_left: int = 0

    def __post_init__(self) -> None:
        self.budget_left = self.budget

    @property
    def _crosses(self) -> bool:
        """Whether host arrays have to be copied to a device."""
        return self.engine.capabilities.device == "cuda"

    def query_blocks(self, answer_bytes: int) -> list[slice]:
        """Return the blocks of queries to be taken one by one, `answer_bytes` being a query's share of the answer.

        There is one block unless queries must be copied: converted, or to a device. The copies, and the
        answers that come back from the device, then take a quarter of the budget.
        """
        n_queries, n_features = self.queries.shape
        fits = self.queries.dtype == self.space.dtype and self.queries.flags.c_contiguous if self._is_host else True
        if fits and not (self._crosses and self._is_host):
            return [slice(0, n_queries)]
        row_bytes = n_features * self.space.dtype.itemsize + answer_bytes
        step, _ = block_shape(n_queries, 1, budget=self.budget // 4, per_pair=row_bytes, max_queries=n_queries)
        self.budget_left -= step * row_bytes
        return list(slices(n_queries, step))

    def corpus_parts(self) -> list[slice]:
        """Return the parts of the corpus to be searched one by one.

        There is one part unless the corpus must be copied to a device for this call and does not fit into
        half of the budget there, with as much again for its packed form.
        """
        n_corpus, n_features = self.prepared.shape
        if self.is_resident or not self._crosses or interchange.on_device(self.prepared.rows):
            return [slice(0, n_corpus)]
        row_bytes = 2 * n_features * self.space.dtype.itemsize
        _, step = block_shape(1, n_corpus, budget=self.budget // 2, per_pair=row_bytes, max_corpus=n_corpus)
        self.budget_left -= step * row_bytes
        return list(slices(n_corpus, step))

    @property
    def _is_host(self) -> bool:
        return not interchange.on_device(self.queries)

    def native(self, block: slice) -> Native:
        """Return a block of queries as the backend's own array."""
        return self.engine.to_native(self.queries[block], self.space.dtype)

    def packed(self, part: slice) -> Any:
        """Return a part of the corpus in the backend's own form."""
        if part == slice(0, self.prepared.shape[0]):
            return self.prepared.packed(self.space.dtype)
        return _pack(self.engine, self.prepared.rows[part], self.space)

    def pairwise(self, block: slice, packed: Any) -> Native:
        """Return the distances of a block of queries."""
        with limited_blas():
            return self.engine.pairwise(self.native(block), packed, self.space, self.budget_left)

    def knn(self, block: slice, packed: Any, k: int) -> tuple[Native, Native]:
        """Return the ranked values and indices of a block of queries."""
        with limited_blas():
            return self.engine.knn(self.native(block), packed, k, self.space, self.budget_left)

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
    rows = corpus if isinstance(corpus, Prepared) else as_rows(corpus, "corpus")
    if queries.shape[1] != rows.shape[1]:
        raise InvalidInputError(
            f"queries has {queries.shape[1]} features and corpus has {rows.shape[1]}; expected the same number."
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
    return _Task(engine, space, queries, prepared, accuracy, isinstance(corpus, Prepared), budget)


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
    space = Space(metric, dtype, rows.shape[1])
    passed_over: dict[str, str] = {}
    if backend == "auto":
        op, data_on = "knn" if k else "pairwise", "device" if on_device else "host"
        k = min(k, len(rows))
        problem = Problem(op, n_queries, len(rows), space.n_features, k, metric.name, space.dtype.name, data_on)
        backend, passed_over = selection.choose(problem, accuracy)
    engine = get_backend(backend)
    _check_supported(backend, engine, space, accuracy)
    _check_device(rows, "corpus", backend, engine)
    _check_values(rows, "corpus", engine, metric, check_finite)
    return Prepared(rows, metric, backend, accuracy, passed_over, keep_bytes=keep_bytes)


def _pack(engine: Backend, rows: Any, space: Space, keep_bytes: int = 0) -> Any:
    prepared = engine.prepare(engine.to_native(rows, space.dtype), space)
    return engine.keep(prepared, space, keep_bytes) if keep_bytes else prepared


def _search(task: _Task, blocks: list[slice], part: slice, k: int) -> tuple[Array, Array]:
    """Return the k nearest in one part of the corpus, on the host, with indices of the whole corpus."""
    ranked: Array | None = None
    indices = np.empty((len(task.queries), k), np.int64)
    packed = task.packed(part)
    for block in blocks:
        values, columns = (task.engine.to_numpy(native) for native in task.knn(block, packed, k))
        # Of the dtype that comes: a peer ranks by its own distances.
        ranked = np.empty(indices.shape, values.dtype) if ranked is None else ranked
        ranked[block], indices[block] = values, columns
    assert ranked is not None
    indices += part.start
    return ranked, indices


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


def _check_values(rows: Any, name: str, engine: Backend, metric: Metric, check_finite: bool) -> None:
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
            f"{name} row {found.not_finite} holds NaN or infinity; expected finite values (check_finite=False skips "
            f"this check and leaves the results undefined)."
        )
    if found.all_zero is not None:
        raise InvalidInputError(
            f"{name} row {found.all_zero} is all zeros and has no direction, which metric {metric.name!r} compares; "
            f"drop such rows or use another metric."
        )
