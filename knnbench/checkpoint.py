"""What a long search has found so far, in a file from which it goes on after a kill.

The file is replaced as a whole, so that there is always a good one. It holds the job that it is of and a digest of all
its bytes: a damaged file, or one of another job, is refused and never used. Of the corpus one row in `STRIDE` is in a
digest too, which is compared when a search goes on; the rows between may change unseen.
"""

import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnbench.dtypes import Array
from knnbench.errors import CheckpointError

__all__ = ["STRIDE", "Checkpoint", "Progress", "RowDigest", "digest_of"]

SCHEMA = 2
MAGIC = b"knnbench checkpoint\n"
DIGEST_BYTES = 32

STRIDE = 4096
"""Of so many rows of a corpus, one is compared when a search goes on."""

# Between two files, at the least; and so many times as long as writing one takes.
SECONDS = 20.0
TIMES_WRITING = 20


class RowDigest:
    """A digest of the rows of a corpus whose index is a multiple of `STRIDE`, whatever the blocks they come in.

    Parameters
    ----------
    dtype : numpy.dtype
        In which rows count.
    """

    def __init__(self, dtype: np.dtype[Any], value: bytes = b"") -> None:
        self._dtype, self.value = dtype, value

    def take(self, start: int, rows: Array) -> None:
        """Take rows in, of which `start` is the index of the first."""
        for row in np.asarray(rows[-start % STRIDE :: STRIDE], self._dtype):
            self.value = hashlib.blake2b(self.value + row.tobytes(), digest_size=DIGEST_BYTES).digest()


def digest_of(array: Array) -> str:
    """Return a digest of the values of an array."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for row in range(0, len(array), STRIDE):
        found.update(np.ascontiguousarray(array[row : row + STRIDE]).data)
    return found.hexdigest()


@dataclass(slots=True)
class Progress:
    """How far a search is.

    Attributes
    ----------
    done : int
        Corpus rows searched.
    ranked, indices : (n_queries, held) arrays
        The neighbours among them.
    centre : (n_features,) array or None
        About which floats are centred.
    seen : bytes
        `RowDigest.value` of the rows searched.
    certificate : tuple or None
        The fields of a `knnbench.exact.Certificate` for them, if they were searched exactly.
    """

    done: int
    ranked: Array
    indices: Array
    centre: Array | None = None
    seen: bytes = b""
    certificate: tuple[Any, ...] | None = None


class Checkpoint:
    """The file of one job.

    Parameters
    ----------
    path : path_like
    """

    def __init__(self, path: Any) -> None:
        self.path = Path(path)
        self._next = 0.0
        self.header, self._body = self._read()

    def resume(self, job: dict[str, Any]) -> Progress | None:
        """Return what was found of a job, None if there is no file; the file is from then on that of the job.

        Raises
        ------
        CheckpointError
            If the file is of another job, or none can be written.
        """
        self._job = json.loads(json.dumps(job))
        found = None
        if self.header is not None:
            before = self.header["job"]
            other = [name for name in self._job.keys() | before.keys() if self._job.get(name) != before.get(name)]
            if other:
                differ = ", ".join(
                    f"{name} is {before.get(name)!r} there and {self._job.get(name)!r} here" for name in sorted(other)
                )
                raise CheckpointError(
                    f"the checkpoint {self.path} is of another job: {differ}; name another file, or remove it."
                )
            found = self._progress()
        empty = np.empty((0, 0))
        try:
            self._write(found or Progress(0, empty, empty.astype(np.int64)))
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.path}: {error.strerror or error}; name another file."
            ) from None
        return found

    def save(self, progress: Progress) -> None:
        """Keep what was found, if that is due; a failure is a warning, and the file there was stays."""
        start = time.monotonic()
        if start < self._next:
            return
        try:
            self._write(progress)
        except OSError as error:
            warnings.warn(
                f"the checkpoint {self.path} could not be written at row {progress.done:,}: "
                f"{error.strerror or error}. The search goes on; an earlier checkpoint stays.",
                RuntimeWarning,
                stacklevel=2,
            )
        end = time.monotonic()
        self._next = end + max(SECONDS, TIMES_WRITING * (end - start))

    def remove(self) -> None:
        """Remove the file: the job is done."""
        self.path.unlink(missing_ok=True)

    def _write(self, progress: Progress) -> None:
        arrays = [progress.ranked, progress.indices, *([] if progress.centre is None else [progress.centre])]
        header = {
            "schema": SCHEMA,
            "job": self._job,
            "done": progress.done,
            "seen": progress.seen.hex(),
            "certificate": progress.certificate,
            "arrays": [[array.dtype.str, list(array.shape)] for array in arrays],
        }
        new = self.path.with_name(self.path.name + ".new")
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        try:
            with new.open("wb") as file:
                for part in (MAGIC, json.dumps(header).encode(), b"\n", *map(_bytes_of, arrays)):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def _read(self) -> tuple[dict[str, Any] | None, memoryview]:
        """Return the header of the file and what follows it, if there is a file."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None, memoryview(b"")
        except OSError as error:
            raise CheckpointError(f"the checkpoint {self.path} cannot be read: {error.strerror}.") from None
        content = data[:-DIGEST_BYTES]
        if not data.startswith(MAGIC):
            raise CheckpointError(f"{self.path} is no checkpoint of knnbench, and is left as it is; name another file.")
        if hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
            raise CheckpointError(f"the checkpoint {self.path} is damaged; remove it to begin anew.")
        end = content.index(b"\n", len(MAGIC))
        header: dict[str, Any] = json.loads(content[len(MAGIC) : end])
        if header["schema"] != SCHEMA:
            raise CheckpointError(
                f"the checkpoint {self.path} has schema {header['schema']}, of another knnbench; expected {SCHEMA}."
            )
        return header, memoryview(content)[end + 1 :]

    def _progress(self) -> Progress | None:
        assert self.header is not None
        arrays, start = [], 0
        for dtype, shape in self.header["arrays"]:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(self._body, dtype, count, start).reshape(shape).copy())
            start += arrays[-1].nbytes
        self._body = memoryview(b"")
        if not self.header["done"]:
            return None
        (ranked, indices, *centre), header = arrays, self.header
        proof = header["certificate"]
        return Progress(
            header["done"], ranked, indices, centre[0] if centre else None, bytes.fromhex(header["seen"]),
            None if proof is None else tuple(proof),
        )  # fmt: skip


def _bytes_of(array: Array) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
