"""Host rows on their way to a device, the same for every CUDA backend; what differs between libraries is a `Lane`.

A GPU copies at the full rate of its bus, and without holding the host up, only from page-locked memory. Rows in any
other memory therefore pass through two page-locked buffers: while the device copies out of one, the host fills the
other, converting on the way.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from knnbench.blocking import slices
from knnbench.dtypes import Array

from .base import Native

__all__ = ["BUFFER_BYTES", "Lane", "Uploader"]

BUFFER_BYTES = 1 << 22
"""Bytes of each of the two buffers: 80 us of a bus of 55 GB/s, many times what starting a copy takes.

They are kept for the next call, and no budget counts them: with them a process holds 8 MiB more, once.
"""

N_BUFFERS = 2


class Lane(ABC):
    """A stream for copies, on one device, in the terms of one library."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Native:
        """Return a C-contiguous device array of any values."""

    @abstractmethod
    def page_locked(self, n_bytes: int) -> Array:
        """Return page-locked memory as a one-dimensional array of uint8."""

    @abstractmethod
    def is_page_locked(self, rows: Array) -> bool:
        """Return whether a contiguous array lies in page-locked memory; False where it cannot be told."""

    @abstractmethod
    def begin(self) -> None:
        """Let the stream wait for the work that this thread has put on the library's current stream.

        The memory of a new array may be that of one on which such work is still to be done.
        """

    @abstractmethod
    def copy(self, source: Array, target: Native, rows: slice) -> Callable[[], None]:
        """Put a copy of contiguous host rows into some rows of a device array on the stream.

        Returns
        -------
        callable
            Waits until it is done, and for nothing that comes after.
        """


class Uploader:
    """Copies rows to a device; safe to be shared by threads, of which one copies at a time.

    Parameters
    ----------
    lane : Lane
    """

    def __init__(self, lane: Lane) -> None:
        self._lane, self._lock = lane, threading.Lock()
        self._buffers: list[Array] = []

    def upload(self, rows: Array, dtype: np.dtype[Any]) -> Native:
        """Return a device array with the rows, once all of them are there: the caller may then change his.

        Parameters
        ----------
        rows : (n, ...) array
            Of any layout and dtype.
        dtype : numpy.dtype
            What they are converted to, on the host.
        """
        target = self._lane.empty(rows.shape, dtype)
        if rows.size == 0:
            return target
        with self._lock:
            self._lane.begin()
            if rows.nbytes <= BUFFER_BYTES:  # less than what overlapping could gain
                held = np.ascontiguousarray(rows, dtype)
                self._lane.copy(held, target, slice(0, len(rows)))()
            elif rows.dtype == dtype and rows.flags.c_contiguous and self._lane.is_page_locked(rows):
                self._lane.copy(rows, target, slice(0, len(rows)))()
            else:
                self._through_buffers(rows, dtype, target)
        return target

    def page_locked(self, rows: Array) -> Array:
        """Return a copy of rows in page-locked memory."""
        copy: Array = self._lane.page_locked(rows.nbytes).view(rows.dtype).reshape(rows.shape)
        copy[...] = rows
        return copy

    def _through_buffers(self, rows: Array, dtype: np.dtype[Any], target: Native) -> None:
        row_bytes = rows[0].size * dtype.itemsize
        step = max(1, BUFFER_BYTES // row_bytes)
        if not self._buffers or len(self._buffers[0]) < step * row_bytes:
            self._buffers = [self._lane.page_locked(max(BUFFER_BYTES, step * row_bytes)) for _ in range(N_BUFFERS)]
        under_way: deque[Callable[[], None]] = deque()
        try:
            for number, part in enumerate(slices(len(rows), step)):
                if len(under_way) == N_BUFFERS:
                    under_way.popleft()()
                shape = part.stop - part.start, *rows.shape[1:]
                n_bytes = shape[0] * row_bytes
                buffer = self._buffers[number % N_BUFFERS][:n_bytes].view(dtype).reshape(shape)
                np.copyto(buffer, rows[part], casting="unsafe")
                under_way.append(self._lane.copy(buffer, target, part))
        finally:
            # After an error too: the next call fills these buffers.
            while under_way:
                under_way.popleft()()
