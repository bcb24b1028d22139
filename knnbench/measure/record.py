"""What a measurement is, and the file of JSON lines that keeps it.

One line is one cell: one backend on one case. It stands for itself, so that files can be cut and joined.
Fields may be added within a schema version; a change of what one means raises `SCHEMA_VERSION`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from knnbench.errors import InvalidInputError

__all__ = ["SCHEMA_VERSION", "STATUSES", "Record", "append_record", "read_records"]

SCHEMA_VERSION = 1

STATUSES: dict[str, str] = {
    "ok": "measured, and the answer is right",
    "absent": "the backend does not work on this machine",
    "unsupported": "the backend lacks the metric, dtype or k",
    "wrong": "the answer is not right; the time counts for nothing",
    "over-budget": "the memory budget cannot hold the computation",
    "out-of-memory": "the machine's memory ran out",
    "crashed": "the process ended by a signal or an error",
    "timed-out": "no answer in the time allowed; the process was ended",
}
"""Every status of a cell, and what it means. ``impossible`` (faster than the machine can be) joins them with the
machine's measured ceilings."""


@dataclass(frozen=True, slots=True)
class Record:
    """One cell.

    Attributes
    ----------
    backend, metric, dataset, dtype : str
        `dtype` is that of the data given; peers convert it when they prepare the corpus.
    k : int
    n_queries, n_corpus, n_features : int
        What was measured.
    status, reason : str
        One of `STATUSES`; the reason is empty if it is ``"ok"``.
    peer : bool
        Whether the backend is another project's search.
    sampled : bool
        Whether queries or corpus rows were left out, to stay within the time.
    times_s : list of float
        Seconds of each timed call, in order. None of these includes the phases below.
    median_s, low_s, high_s : float or None
        Median, and the ends of its interval (`knnbench.measure.timer.median_interval`).
    import_s, prepare_s, first_call_s : float or None
        Seconds to import the backend, to prepare the corpus (checks and copies included), and of the first
        call, which compiles where a backend compiles.
    error : float or None
        max |d - d_ref| / max d_ref against float64 by the direct form, on `n_checked` queries.
    recall : float or None
        Share of the neighbours returned whose reference distance is at most the k-th reference distance
        (with a tolerance of 1e-3 of it, so that ties do not count as errors).
    n_checked : int
        Queries whose answers were checked.
    peak_bytes : int or None
        Most resident memory of the process during the timed calls, less what it held before them.
    threads : int
    version, library : str
        Of knnbench, and of the backend's library.
    commit : str
        Of knnbench's sources; empty if they are not in a git checkout.
    started : str
        When the run began (ISO 8601, UTC); the same for all cells of a run.
    machine : dict
        `knnbench.measure.machine.describe_machine`.
    schema : int
        `SCHEMA_VERSION` at the time.
    """

    backend: str
    metric: str
    dataset: str
    dtype: str
    k: int
    n_queries: int
    n_corpus: int
    n_features: int
    status: str
    reason: str = ""
    peer: bool = False
    sampled: bool = False
    times_s: list[float] = field(default_factory=list)
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    import_s: float | None = None
    prepare_s: float | None = None
    first_call_s: float | None = None
    error: float | None = None
    recall: float | None = None
    n_checked: int = 0
    peak_bytes: int | None = None
    threads: int = 0
    version: str = ""
    library: str = ""
    commit: str = ""
    started: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @property
    def seconds_per_pair(self) -> float | None:
        """Median seconds for one feature of one pair of a query and a corpus row."""
        if self.median_s is None:
            return None
        return self.median_s / (self.n_queries * self.n_corpus * self.n_features)

    @property
    def queries_per_s(self) -> float | None:
        """Queries per second against the corpus that was measured."""
        return None if self.median_s is None else self.n_queries / self.median_s

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the newline."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


def append_record(path: Path, record: Record) -> None:
    """Append a record to a file, and see it written to the disk: nothing measured is lost by a later crash."""
    with path.open("ab+") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            # A crash cut the last line short: what follows must not become part of it.
            file.write(b"\n")
        file.write(record.to_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file.

    A line that a crash cut short is left out. Unknown fields, of a later version, are left out too.

    Raises
    ------
    InvalidInputError
        If any other line is not a record of a schema version known here.
    """
    known = {entry.name for entry in fields(Record)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError:
            if line.startswith('{"backend":'):  # how every record begins
                continue
            raise InvalidInputError(f"{path} line {number} is not a knnbench record: not JSON.") from None
        try:
            if data["schema"] > SCHEMA_VERSION:
                raise ValueError(f"schema version {data['schema']}, known here up to {SCHEMA_VERSION}")
            yield Record(**{name: value for name, value in data.items() if name in known})
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{path} line {number} is not a knnbench record: {error}.") from None
