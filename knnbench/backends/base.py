"""What a backend is: the abstract classes that every backend implements.

A class here is abstract or final: a backend implements what is abstract and overrides nothing, except
that one with a better `Backend.linear_loss` or `Backend.candidates` may bring its own, with `Backend.spare`, and that
one may tell more of itself for measuring: `Backend.operations`, `Backend.stopwatch`, `Backend.device_peak`; or for
sharing work: `Backend.prepare_about`, `Backend.prepared_bytes`, `Backend.levels`; or of its device: `Backend.uploader`,
`Backend.ran_out`. Which backends exist, and whether they work here, is the business of `knnbench.backends`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from knnbench.blocking import BUDGET_VARIABLE, chunk_rows, slices
from knnbench.bounds import Floats, direct_floor
from knnbench.dtypes import COMPUTED, Array
from knnbench.errors import OverBudgetError, UnsupportedError
from knnbench.metrics import METRICS, Space, add_absolute

from .linear import HOST_ELEMENTS, ArrayLoss, LinearLoss

if TYPE_CHECKING:
    from .upload import Uploader

__all__ = [
    "Backend",
    "Candidates",
    "Capabilities",
    "HostArrays",
    "HostBackend",
    "HostPeer",
    "Native",
    "PeerSearch",
    "Scan",
    "byte_operations",
    "float_operations",
    "scan_rows",
]

# The array type of a backend's own library.
Native = Any

# What a proof asks for beyond k neighbours: so many candidates, and one for each so many of k.
SPARE, SPARE_SHARE = 8, 8

# What adds differences of four bytes at once on CUDA, by the scalar function of a metric.
BYTE_SUMS: dict[Callable[..., Any], str] = {add_absolute: "cuda-sad-uint8"}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can compute.

    Attributes
    ----------
    device : {"cpu", "cuda"}
        Where it computes.
    metrics, dtypes : frozenset of str
        Canonical metric names, and dtypes of `knnbench.dtypes.COMPUTED`, that it takes in any
        combination.
    total_order : bool
        Whether neighbours come in the total order (value, index), ties included.
    exact_integers : bool
        Whether uint8 is accumulated in integers, or in a unit shown to be exact for the shape.
    certifies : bool
        Whether `Backend.candidates` is true for floats: what ``accuracy="exact"`` needs there.
    """

    device: Literal["cpu", "cuda"]
    metrics: frozenset[str] = frozenset(METRICS)
    dtypes: frozenset[str] = frozenset(COMPUTED)
    total_order: bool = True
    exact_integers: bool = True
    certifies: bool = False


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that may be among the nearest, and a proof of what is not.

    Attributes
    ----------
    indices : (n_queries, count) native array of int64
        Different rows of the corpus, in any order.
    floor : (n_queries,) array of float64
        No other row has an exact accumulated value below it, on the rows as they were given: for cosine the squared
        difference of rows of unit length. Minus infinity where nothing is proved.
    last : (n_queries,) array of float64
        The largest value that was selected; `last` less `floor` is what the error of the arithmetic costs.
    form : str
        What was computed, for people.
    is_sure : (n_queries,) array of bool, or None
        Whether they are the nearest of exact arithmetic, of equally distant rows those of smaller index, and their
        values by the direct form in float64 are exact; None where that is not known of any.
    """

    indices: Native
    floor: Floats
    last: Floats
    form: str
    is_sure: Array | None = None


@dataclass(frozen=True, slots=True)
class Scan:
    """The first rows of an array that break a rule; None where no row does or none was looked for."""

    not_finite: int | None
    all_zero: int | None


class Backend(ABC):
    """One way to compute distances and neighbours.

    All arguments have passed `knnbench.api`, the only place that validates: rows are two-dimensional, not
    empty, of `space.dtype`, finite unless the user waived that, and k is in range.
    """

    capabilities: ClassVar[Capabilities]
    calls_blas: ClassVar[bool] = True
    """Whether it may call numpy's BLAS. Holding that at the threads that are allowed takes a millisecond."""

    @abstractmethod
    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return rows as this backend's own C-contiguous array of `dtype`, copied only where needed.

        Parameters
        ----------
        rows : (n, n_features) array
            On the host, or for a CUDA backend also on the device, of any library.
        dtype : numpy.dtype
            One of `COMPUTED`.
        """

    @abstractmethod
    def to_numpy(self, native: Native) -> Array:
        """Return this backend's array as a numpy array on the host."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work given to the device is done; nothing on a CPU."""

    @abstractmethod
    def scan(self, native: Native, *, finite: bool, zero: bool) -> Scan:
        """Look through the rows of a native array for the first not `finite`, and the first all `zero`."""

    @abstractmethod
    def prepare(self, corpus: Native, space: Space) -> Any:
        """Return all that `pairwise` and `knn` can compute from a native corpus before they see queries."""

    def prepare_about(self, corpus: Native, centre: Any, space: Space) -> Any:
        """Return what `prepare` does, of floats that are centred about a given point instead of their own mean.

        A part of a corpus is: its answers then do not depend on where the parts end. By default as `prepare` does, for
        a backend that does not centre.

        Parameters
        ----------
        corpus : (n, n_features) native array of `space.dtype`
        centre : (n_features,) numpy array of `space.dtype`
            Amid the rows as the metric accumulates them.
        space : Space
        """
        return self.prepare(corpus, space)

    def prepared_bytes(self, space: Space) -> int:
        """Return what `prepare` holds of a corpus row beside the row itself, at the most.

        By default a copy in twice the precision, in which a peer may compute.
        """
        return space.n_features * max(2 * space.dtype.itemsize, np.dtype(np.float64).itemsize)

    def levels(self) -> tuple[str, ...]:
        """Return the levels of vector instructions that it can compute at here, the best first.

        By default none: its library chooses. They are values of `LEVEL_VARIABLE`, and floats may round otherwise at
        another one.
        """
        return ()

    def keep(self, prepared: Any, space: Space, budget: int) -> Any:
        """Return what `prepare` gave in a form for many calls, with up to `budget` bytes more; by default as it is."""
        return prepared

    @abstractmethod
    def pairwise(self, queries: Native, prepared: Any, space: Space, budget: int) -> Native:
        """Return all distances.

        Parameters
        ----------
        queries : (n_queries, n_features) native array of `space.dtype`
        prepared : object
            What `prepare` returned for the corpus and the same `space`.
        space : Space
        budget : int
            Bytes to be held at most, beyond inputs, prepared corpus and result.

        Returns
        -------
        (n_queries, n_corpus) native array of `space.output`
        """

    @abstractmethod
    def knn(self, queries: Native, prepared: Any, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest neighbours, arguments as in `pairwise`.

        Returns
        -------
        ranked : (n_queries, k) native array of `space.ranked`
            The values before `Space.finish`, so that lists of several corpora can be merged under the
            total order. A peer without the total order may give any monotone float equivalent.
        indices : (n_queries, k) native array of int64
        """

    def spare(self, k: int, n_queries: int, space: Space) -> int:
        """Return how many candidates more than k to ask `candidates` for, so that most queries are proved by them.

        On ordinary data the last of them lies farther from the k-th than any bound; the queries for which it does not
        are searched again. The more neighbours there are, the closer do they lie to each other.
        """
        return SPARE + k // SPARE_SHARE

    def candidates(self, queries: Native, prepared: Any, count: int, space: Space, budget: int) -> Candidates:
        """Return the `count` rows that are nearest by fast arithmetic on floats, and what that proves of all others.

        Arguments are those of `knn`. Only a backend with `Capabilities.certifies` is asked.

        Notes
        -----
        The default is for a backend whose `knn` is right in the direct form, whatever sums it selected by: among values
        each within `knnbench.bounds.direct_error` of the exact ones, it returns the smallest.
        """
        ranked, indices = self.knn(queries, prepared, count, space, budget)
        last = self.to_numpy(ranked)[:, -1].astype(np.float64)
        return Candidates(indices, direct_floor(space, last), last, f"{space.dtype} differences")

    @abstractmethod
    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances, of `space.output`, of the values that `knn` ranked."""

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return the operations that ``"knn"`` or ``"pairwise"`` does for each feature of each pair, at the least.

        They are named as in `knnbench.measure.ceilings`, which knows how many a second the machine can do; the
        default tells none.
        """
        return {}

    def stopwatch(self) -> Callable[[], float | None]:
        """Start the device's own clock; what is returned stops it and gives the seconds.

        The default, for the CPU, gives None: its clock is the host's.
        """
        return lambda: None

    def device_peak(self) -> Callable[[], int | None]:
        """Forget the peak of device memory; what is returned gives the bytes by which it rose since.

        The default, for the CPU or where it cannot be told, gives None.
        """
        return lambda: None

    def uploader(self) -> "Uploader | None":
        """Return what copies host rows to the current device; the default, for the CPU, is None."""
        return None

    def ran_out(self, error: Exception) -> bool:
        """Return whether an error says that the device had no memory left, having given back what nothing uses.

        The caller then asks for less. The default, for the CPU, says no.
        """
        return False

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Return a function of linear models: their summed cross-entropy over all samples; by default numpy's.

        Parameters
        ----------
        X : (n_samples, n_features) array of uint8, float32 or float64
            On the host, not to be changed as long as the function is used.
        y : (n_samples,) array of int64
            Class numbers.
        sample_weight : (n_samples,) array of float64
            Not negative.
        dtype : numpy.dtype
            float32 or float64: of the weights. Products are computed in it, or at least as accurately.

        Returns
        -------
        LinearLoss

        Notes
        -----
        ``loss_m = sum_i w_i (logsumexp_c(z_mic) - z_mi,y_i)`` with ``z = X W + b``; the exponentials and the sums
        are float64.
        """
        return ArrayLoss(np, X, y, sample_weight, dtype, HOST_ELEMENTS, f"gemm-{dtype}")


class HostArrays(Backend):
    """The array side of a backend whose arrays are numpy's."""

    def to_native(self, rows: Any, dtype: np.dtype[Any]) -> Native:
        """Return a C-contiguous numpy array."""
        return np.ascontiguousarray(rows, dtype=dtype)

    def to_numpy(self, native: Native) -> Array:
        """Return the array itself."""
        return np.asarray(native)

    def synchronize(self) -> None:
        """Do nothing: a call on the CPU returns when it is done."""

    def scan(self, native: Native, *, finite: bool, zero: bool) -> Scan:
        """Look through the rows in chunks."""
        return scan_rows(np, native, finite=finite, zero=zero)


class HostBackend(HostArrays):
    """An own backend on numpy arrays: it ranks by the accumulated value, as the rules say."""

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return the distances of ranked values."""
        return space.finish(ranked)


class PeerSearch(Backend):
    """The computing side of another project's search, measured as it is.

    Called on blocks of queries that fit the budget; dtypes and the order of ties are the library's. What
    `prepare` returns has a length, the number of rows.
    """

    @abstractmethod
    def held_bytes(self, n_queries: int, n_corpus: int, k: int, space: Space) -> tuple[int, int]:
        """Return what the library's search holds at the most for each query, its answer included, and once a call."""

    @abstractmethod
    def distances(self, queries: Native, prepared: Any, space: Space) -> Native:
        """Return the distances of a block of queries, shape (n_queries, n_corpus)."""

    @abstractmethod
    def neighbors(self, queries: Native, prepared: Any, k: int, space: Space) -> tuple[Native, Native]:
        """Return distances and int64 indices of a block of queries, shape (n_queries, k) each."""

    @abstractmethod
    def empty_rows(self, n_rows: int, like: Native) -> Native:
        """Return an array of `n_rows` rows of any values, otherwise as `like`."""

    def pairwise(self, queries: Native, prepared: Any, space: Space, budget: int) -> Native:
        """Return all distances, a block of queries at a time."""
        blocks = self._query_blocks(len(queries), len(prepared), 1, space, budget)
        answers = ((rows, (self.distances(queries[rows], prepared, space),)) for rows in blocks)
        return self._collect(len(queries), answers)[0]

    def knn(self, queries: Native, prepared: Any, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the neighbours, a block of queries at a time."""
        blocks = self._query_blocks(len(queries), len(prepared), k, space, budget)
        answers = ((rows, self.neighbors(queries[rows], prepared, k, space)) for rows in blocks)
        values, indices = self._collect(len(queries), answers)
        return values, indices

    def finish(self, ranked: Native, space: Space) -> Native:
        """Return `ranked`: a peer answers in distances."""
        return ranked

    def linear_loss(self, X: Array, y: Array, sample_weight: Array, dtype: np.dtype[Any]) -> LinearLoss:
        """Raise `UnsupportedError`: only a peer that has losses of its own brings them."""
        raise UnsupportedError(
            f"{type(self).__name__} has no losses of linear models; take an own backend, 'notebook' or 'torch-cdist'."
        )

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return what any exhaustive search in floats does at the least."""
        return float_operations(self.capabilities.device, space, product=True)

    def _query_blocks(self, n_queries: int, n_corpus: int, k: int, space: Space, budget: int) -> Iterator[slice]:
        per_query, per_call = self.held_bytes(n_queries, n_corpus, k, space)
        step = (budget - per_call) // per_query
        if step < 1:
            raise OverBudgetError(
                f"a memory budget of {budget:,} bytes cannot hold what {type(self).__name__} needs for one query, "
                f"{per_query + per_call:,}; raise memory_budget (or ${BUDGET_VARIABLE})."
            )
        return slices(n_queries, min(step, n_queries))

    def _collect(self, n_queries: int, answers: Iterable[tuple[slice, tuple[Native, ...]]]) -> tuple[Native, ...]:
        """Return the answers of blocks as whole arrays."""
        whole: tuple[Native, ...] = ()
        for rows, parts in answers:
            if rows == slice(0, n_queries):
                return parts
            whole = whole or tuple(self.empty_rows(n_queries, part) for part in parts)
            for array, part in zip(whole, parts, strict=True):
                array[rows] = part
        return whole


class HostPeer(HostArrays, PeerSearch):
    """A peer on numpy arrays."""

    def empty_rows(self, n_rows: int, like: Native) -> Native:
        """Return a numpy array."""
        return np.empty((n_rows, *like.shape[1:]), like.dtype)


def float_operations(device: str, space: Space, *, product: bool, dtype: str = "") -> dict[str, float]:
    """Return `Space.operations` on a device, in `dtype`: if not given, the rows' own, or float32 for uint8."""
    own = "float32" if space.is_integer else str(space.dtype)
    prefix = "" if device == "cpu" else f"{device}-"
    return {prefix + name: count for name, count in space.operations(dtype or own, product=product).items()}


def byte_operations(space: Space, product: str) -> dict[str, float]:
    """Return what a CUDA kernel of uint8 takes of the unit that adds four bytes at once, `product` if it multiplies."""
    if space.accumulator != np.int32:
        return {}  # they are taken one by one
    unit = product if space.form.from_dot else BYTE_SUMS.get(space.form.accumulate)
    return {unit: 1.0} if unit else {}


def scan_rows(xp: Any, rows: Native, *, finite: bool, zero: bool, dtype: np.dtype[Any] | None = None) -> Scan:
    """Return the `Scan` of an array of numpy, or of a module like it, as it is once converted to `dtype`."""
    not_finite = all_zero = None
    finite = finite and rows.dtype.kind == "f"
    for chunk in slices(len(rows), chunk_rows(rows.shape[1])) if finite or zero else ():
        part = rows[chunk] if dtype is None else rows[chunk].astype(dtype, copy=False)
        if finite and not_finite is None:
            good = xp.isfinite(part)
            if not good.all():
                not_finite = chunk.start + int(xp.argmin(good.all(axis=1)))
        if zero and all_zero is None:
            good = part.any(axis=1)
            if not good.all():
                all_zero = chunk.start + int(xp.argmin(good))
    return Scan(not_finite, all_zero)
