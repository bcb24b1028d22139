"""Rows that are read block by block: from a file, a Dask array or any iterable, ahead of who computes with them."""

import contextvars
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np

from knnbench.blocking import slices
from knnbench.dtypes import Array
from knnbench.errors import InvalidInputError

__all__ = ["BlockStream", "MappedStream", "Stream", "as_stream", "is_dask", "open_rows", "read_ahead", "touch"]

T = TypeVar("T")

# Bytes of which one is read so that all are in memory: the smallest page of the systems there are.
PAGE = 4096

NO_SHAPE = (-1, -1)

# What takes rows that are passed over: their first index, and they.
Skipped = Callable[[int, Array], None]


class Stream(ABC):
    """Rows of one dtype and length that come in blocks.

    Attributes
    ----------
    name : str
        ``"queries"`` or ``"corpus"``, for the errors.
    dtype : numpy.dtype
        Of the rows as given.
    n_rows : int or None
        None if only the last block tells.
    n_features : int
    is_once : bool
        Whether it can be read only once.
    """

    name: str
    dtype: np.dtype[Any]
    n_rows: int | None
    n_features: int
    is_once: bool

    @abstractmethod
    def blocks(self, step: int, skip: int = 0, skipped: Skipped | None = None) -> Iterator[tuple[int, Array]]:
        """Yield the first index and the rows of each block.

        Parameters
        ----------
        step : int
            Rows of a block at the most.
        skip : int
            Rows to pass over.
        skipped : callable, optional
            Takes the first index and the rows of what is passed over.
        """

    def pays_ahead(self, step: int) -> bool:
        """Return whether reading blocks of at most `step` rows in a thread gains time: if one follows another."""
        return self.n_rows is None or self.n_rows > step


class MappedStream(Stream):
    """Rows of an array that lies in a file, or in memory, and is read in slices, none of them a copy."""

    is_once = False

    def __init__(self, rows: Array, name: str) -> None:
        self.rows, self.name, self.dtype = rows, name, rows.dtype
        self.n_rows, self.n_features = rows.shape

    def blocks(self, step: int, skip: int = 0, skipped: Skipped | None = None) -> Iterator[tuple[int, Array]]:
        """Yield slices."""
        if skip and skipped:
            skipped(0, self.rows[:skip])
        for part in slices(len(self.rows), step):
            if part.stop > skip:
                start = max(part.start, skip)
                yield start, self.rows[start : part.stop]


class BlockStream(Stream):
    """Rows that an iterable gives in blocks, which are checked as they come.

    Parameters
    ----------
    given : iterable of (n, n_features) arrays
    name : str
    as_rows : callable
        Checks an array of that name and returns it as rows.
    n_rows : int, optional
        Of all blocks, if known.
    """

    def __init__(
        self, given: Iterable[Any], name: str, as_rows: Callable[[Any, str], Any], n_rows: int | None = None
    ) -> None:
        self.name, self.n_rows, self._as_rows, self._given = name, n_rows, as_rows, given
        self.is_once = iter(given) is given
        # A look at the first block, which an iterator gives only once.
        blocks = iter(given)
        try:
            first = next(blocks)
        except StopIteration:
            raise InvalidInputError(f"{name} is an iterable without a block; expected at least one.") from None
        rows = self._checked(first, 0)
        self.dtype, self.n_features = rows.dtype, rows.shape[1]
        self._left: tuple[Any, Iterator[Any]] | None = (first, blocks) if self.is_once else None

    def blocks(self, step: int, skip: int = 0, skipped: Skipped | None = None) -> Iterator[tuple[int, Array]]:
        """Yield slices of the blocks given."""
        start = 0
        for number, block in enumerate(self._all()):
            rows = self._checked(block, number)
            if (rows.dtype, rows.shape[1]) != (self.dtype, self.n_features):
                raise InvalidInputError(
                    f"{self.name} block {number} has dtype {rows.dtype} and {rows.shape[1]} features, and block 0 "
                    f"{self.dtype} and {self.n_features}; expected all blocks to be of one dtype and width."
                )
            passed = min(len(rows), max(0, skip - start))
            if passed and skipped:
                skipped(start, rows[:passed])
            for part in slices(len(rows) - passed, step):
                first = passed + part.start
                yield start + first, rows[first : passed + part.stop]
            start += len(rows)
        if self.n_rows is not None and start != self.n_rows:
            raise InvalidInputError(f"{self.name} gave {start} rows in its blocks and {self.n_rows} were expected.")

    def pays_ahead(self, step: int) -> bool:
        """Return whether it does: also if blocks are short, but must be read or computed."""
        n_blocks = operator.length_hint(self._given, 2)  # or more
        return super().pays_ahead(step) or (n_blocks > 1 and not _is_in_memory(self._given))

    def _all(self) -> Iterator[Any]:
        if not self.is_once:
            yield from self._given
            return
        if self._left is None:
            raise InvalidInputError(
                f"{self.name} is an iterator, which can be read only once, and is needed again; expected a list of "
                f"blocks, a numpy.memmap, the path of a .npy file or a Dask array."
            )
        (first, others), self._left = self._left, None
        yield first
        del first
        yield from others

    def _checked(self, block: Any, number: int) -> Array:
        name = f"{self.name} block {number}"
        if hasattr(block, "__cuda_array_interface__"):
            raise InvalidInputError(f"{name} lives on a CUDA device; expected blocks on the host.")
        n_rows, n_features = _shape_of(block)
        if n_rows == 0 < n_features:
            return np.asarray(block)  # such as a chunk of which a filter left nothing
        rows: Array = self._as_rows(block, name)
        return rows


class DaskBlocks:
    """The blocks of a Dask array, each computed when it is asked for."""

    def __init__(self, array: Any) -> None:
        self._array = array.rechunk({1: -1}) if array.numblocks[1] > 1 else array

    def __len__(self) -> int:
        return int(self._array.numblocks[0])

    def __iter__(self) -> Iterator[Array]:
        for number in range(len(self)):
            yield self._array.blocks[number].compute()


def is_dask(array: Any) -> bool:
    """Return whether it is a Dask array, without loading Dask."""
    return type(array).__module__.startswith("dask.array")


def open_rows(path: Any, name: str) -> Array:
    """Return the rows of a .npy file, mapped into memory.

    Raises
    ------
    InvalidInputError
        If the path does not end in .npy, or the file is not there or holds no array of numbers.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.endswith(".npy"):
        raise InvalidInputError(f"{name} is {text!r}; expected an array, or the path of a file that ends in .npy.")
    try:
        rows: Array = np.load(text, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{name} cannot be read from {text!r}: {error}") from None
    return rows


def as_stream(array: Any, name: str, as_rows: Callable[[Any, str], Any]) -> Stream | None:
    """Return what is to be read block by block as a stream, None if it is an array like any other.

    Parameters
    ----------
    array : object
        A stream is made of a numpy.memmap, the path of a .npy file, a two-dimensional Dask array, a list or tuple of
        paths or two-dimensional arrays, and an iterable that is no collection of anything else, such as a generator.
    name, as_rows
        As for `BlockStream`.

    Examples
    --------
    >>> blocks = (np.zeros((2, 3)) for _ in range(2))
    >>> stream = as_stream(blocks, "corpus", lambda rows, name: rows)
    >>> [(start, rows.shape) for start, rows in stream.blocks(step=10)]
    [(0, (2, 3)), (2, (2, 3))]
    """
    if isinstance(array, Stream):
        return array
    if isinstance(array, str | os.PathLike):
        array = open_rows(array, name)
    if isinstance(array, np.memmap):
        return MappedStream(as_rows(array, name), name)
    if is_dask(array):
        if array.ndim != 2:
            return None
        n_rows = array.shape[0]
        return BlockStream(DaskBlocks(array), name, as_rows, None if np.isnan(n_rows) else int(n_rows))
    if isinstance(array, list | tuple):
        if not array or (_shape_of(array[0]) == NO_SHAPE and not isinstance(array[0], str | os.PathLike)):
            return None
        lengths = [_shape_of(block)[0] for block in array]
        return BlockStream(array, name, as_rows, sum(lengths) if all(n >= 0 for n in lengths) else None)
    if isinstance(array, Iterable) and not isinstance(array, Collection) and not hasattr(array, "shape"):
        return BlockStream(array, name, as_rows)
    return None


def _shape_of(block: Any) -> tuple[int, int]:
    """Return the shape of a block, `NO_SHAPE` of what has none, or not of two numbers."""
    shape = getattr(block, "shape", NO_SHAPE)
    return (shape[0], shape[1]) if len(shape) == 2 else NO_SHAPE


def _is_in_memory(given: Iterable[Any]) -> bool:
    """Return whether all blocks are arrays whose values are there."""
    arrays = given if isinstance(given, list | tuple) else [None]
    return all(isinstance(block, np.ndarray) and not isinstance(block, np.memmap) for block in arrays)


def touch(rows: Array) -> None:
    """Read a byte of each page of rows, so that they are in memory."""
    if rows.flags.c_contiguous:
        rows.reshape(-1).view(np.uint8)[::PAGE].max()


def read_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator, of which a thread gets the next while one is in use.

    Whoever takes them lets an item go before asking for the next, or three are held.

    Examples
    --------
    >>> list(read_ahead(letter for letter in 'abc'))
    ['a', 'b', 'c']
    """
    end = object()

    def following() -> Any:
        return next(items, end)

    # Such as the current client of Dask; items are got one after the other.
    context = contextvars.copy_context()
    with closing(items), ThreadPoolExecutor(1, "knnbench-read") as pool:
        coming = pool.submit(context.run, following)
        while True:
            item = coming.result()
            if item is end:
                return
            coming = pool.submit(context.run, following)
            yield item
            del item
