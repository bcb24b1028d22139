"""What a measurement is, and the file of JSON lines that keeps it.

One line is one cell: one backend on one case. It stands for itself, so that files can be cut and joined.
Fields may be added within a schema version; a change of what one means raises `SCHEMA_VERSION`.

>>> record = Record(op="knn", backend="numba", metric="cityblock", dataset="mnist", dtype="uint8", k=3,
...                 n_queries=10_000, n_corpus=60_000, n_features=784, status="ok",
...                 phases={"call": [0.31, 0.30, 0.32]}, measured_queries=100, measured_corpus=60_000)
>>> record.case
'knn/cityblock/mnist/uint8/10000x60000x784/k3'
>>> record.median_s, record.is_sampled
(0.31, True)
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

from knnbench.errors import InvalidInputError

__all__ = [
    "OPS",
    "PHASES",
    "RANDOM_SEARCH",
    "SCHEMA_VERSION",
    "STATUSES",
    "Record",
    "Results",
    "append_record",
    "case_name",
    "median_interval",
    "parse_records",
    "read_records",
]

SCHEMA_VERSION = 2

RANDOM_SEARCH = "random-search"

OPS: dict[str, tuple[str, str]] = {
    "knn": ("query", "queries"),
    "pairwise": ("query", "queries"),
    RANDOM_SEARCH: ("iteration", "iterations"),
}
"""Every operation, and what its queries are called: one, and several. An iteration of the random search compares a
candidate with the best point so far over all samples, which are the corpus."""

STATUSES: dict[str, str] = {
    "ok": "measured, and the answer is right",
    "absent": "the backend does not work on this machine",
    "unsupported": "the backend lacks the operation, metric, dtype or k",
    "wrong": "the answer is not right; the time counts for nothing",
    "impossible": "faster than the machine can be, by a ceiling measured three times; the time counts for nothing",
    "over-budget": "the memory budget cannot hold the computation",
    "out-of-memory": "the machine's memory ran out",
    "crashed": "the process ended by a signal or an error",
    "timed-out": "no answer in the time allowed; the process was ended",
}
"""Every status of a cell, and what it means."""

PHASES: dict[str, str] = {
    "import": "until the backend could compute: its library loaded, its answer to a 2 x 2 problem checked",
    "prepare": "the corpus checked, packed and copied",
    "first_call": "the first call of the case, on a few rows, which compiles where a backend compiles",
    "copy_in": "the queries of one call, from the host to the device; absent on a CPU",
    "call": "one call, from queries on the host to the answer on the host; without any of the phases above",
    "compute": "one call whose queries and answer stay on the device; absent on a CPU, where it is `call`",
    "device": "of each `compute`, what the device's own clock says",
    "copy_out": "the answer of one call, from the device to the host; absent on a CPU",
    "from_pageable": "one call whose queries and corpus, not prepared, are in ordinary host memory; absent on a CPU",
    "from_pinned": "the same with both in page-locked memory",
}
"""The phases of a measurement, each kept apart from the others."""

# Sizes and seconds that are more come from no machine, and not all of them fit a float.
MOST = 2**63 - 1

# One interval of the median in so many misses it: 95 % confidence.
MISSES = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One cell.

    Attributes
    ----------
    op : str
        One of `OPS`.
    backend, metric, dataset, dtype : str
        `dtype` is that of the data given; peers convert it when they prepare the corpus. The metric of the random
        search is its loss.
    k : int or None
        None where the operation has none.
    n_queries, n_corpus, n_features : int
        The case's; for the random search, iterations and training samples.
    status, reason : str
        One of `STATUSES`; the reason is empty if it is ``"ok"``.
    measured_queries, measured_corpus : int
        Rows in each timed call; fewer than the case's where all of them would not have fitted the time.
        0 if nothing was measured.
    peer : bool
        Whether the backend is another project's search.
    twin : bool
        Whether this is the second process of a pair of the same backend, whose difference is the noise.
    complete : bool
        False while the rounds of the case go on: what an interrupted run left.
    phases : dict of str to list of float
        Seconds of each sample, in order, by the names of `PHASES`.
    error : float or None
        max |d - d_ref| / max d_ref against float64 by the direct form, on `n_checked` queries, of which half
        were put in the place of others after the timed calls. For the random search the same of losses, with
        iterations of two seeds.
    recall : float or None
        Share of the neighbours returned whose reference distance is at most the k-th reference distance
        (with a tolerance of 1e-3 of it, so that ties do not count as errors); None where there are none.
    n_checked : int
        Queries whose answers were checked.
    floor_s, bound : float or None, str
        The least seconds that a call can take on this machine, and the ceiling that says so
        (`knnbench.measure.ceilings`); None where the backend does not tell which operations it does.
    operations, ceilings : dict of str to float
        By the names of probes: the operations, or bytes, that one timed call takes at the least, and how many of each
        this machine does in a second, that of reading memory too. Empty where the backend does not tell.
    peak_bytes, peak_device_bytes : int or None
        Most memory held during the timed calls beyond what was held before them: resident on the host, and
        on the device.
    contention : float or None
        CPU time that other processes took during the timed calls, as a share of the CPUs' time.
    threads : int
    version, library : str
        Of knnbench, and of the backend's library.
    libraries : dict of str to str
        Versions of the numerical libraries that the process had loaded.
    blas : list of dict
        Each thread pool that the process had loaded: ``name``, ``version``, ``threads``.
    commit, dirty : str, bool
        Of knnbench's sources, and whether they differed from it; empty if they are not in a git checkout.
    run, started : str
        A name for the run, and when it began (ISO 8601, UTC); the same for all its cells.
    machine : dict
        `knnbench.measure.machine.describe_machine`.
    schema : int
        `SCHEMA_VERSION` at the time.
    """

    op: str
    backend: str
    metric: str
    dataset: str
    dtype: str
    k: int | None
    n_queries: int
    n_corpus: int
    n_features: int
    status: str
    reason: str = ""
    measured_queries: int = 0
    measured_corpus: int = 0
    peer: bool = False
    twin: bool = False
    complete: bool = True
    phases: dict[str, list[float]] = field(default_factory=dict)
    error: float | None = None
    recall: float | None = None
    n_checked: int = 0
    floor_s: float | None = None
    bound: str = ""
    operations: dict[str, float] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    contention: float | None = None
    threads: int = 0
    version: str = ""
    library: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    blas: list[dict[str, Any]] = field(default_factory=list)
    commit: str = ""
    dirty: bool = False
    run: str = ""
    started: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @property
    def case(self) -> str:
        """Name of what was to be computed, the same for every backend, machine and commit."""
        return case_name(
            self.op, self.metric, self.dataset, self.dtype, (self.n_queries, self.n_corpus, self.n_features), self.k
        )

    @property
    def cell(self) -> tuple[str, str, bool]:
        """Case, backend and whether a twin: what tells the cells of a run apart."""
        return self.case, self.backend, self.twin

    @property
    def times_s(self) -> list[float]:
        """Seconds of each timed call."""
        return self.phases.get("call", [])

    @property
    def is_sampled(self) -> bool:
        """Whether queries or corpus rows were left out, to stay within the time."""
        return bool(self.times_s) and (self.measured_queries, self.measured_corpus) != (self.n_queries, self.n_corpus)

    @property
    def pair_features(self) -> int:
        """Features of pairs that one timed call goes through."""
        return self.measured_queries * self.measured_corpus * self.n_features

    @property
    def median_s(self) -> float | None:
        """Median seconds of the timed calls; None if there are none."""
        return statistics.median(self.times_s) if self.times_s else None

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """Interval of the median (`median_interval`); None if there are no timed calls."""
        return median_interval(self.times_s)[1:] if self.times_s else None

    @property
    def seconds_per_pair(self) -> float | None:
        """Median seconds for one feature of one pair of a query and a corpus row."""
        return None if self.median_s is None else self.median_s / self.pair_features

    @property
    def queries_per_s(self) -> float | None:
        """Queries per second against the corpus that was measured."""
        return None if self.median_s is None else self.measured_queries / self.median_s

    @property
    def fraction_of_floor(self) -> float | None:
        """The least seconds that the machine allows, divided by the seconds taken: 1 at the machine's limit."""
        return None if self.median_s is None or self.floor_s is None else self.floor_s / self.median_s

    def phase_s(self, name: str) -> float | None:
        """Return the median seconds of a phase; None if it was not measured."""
        samples = self.phases.get(name)
        return statistics.median(samples) if samples else None

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the newline."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


class Results(list[Record]):
    """Records, with what a notebook shows of them: a table by itself, and charts and a data frame when asked.

    Examples
    --------
    >>> results = Results([Record(op="knn", backend="numpy", metric="cosine", dataset="digits", dtype="uint8", k=3,
    ...                           n_queries=10, n_corpus=100, n_features=64, status="ok", measured_queries=10,
    ...                           measured_corpus=100, phases={"call": [0.3, 0.1, 0.2]})])
    >>> results.to_frame().query_s.round(6).tolist()
    [0.02]
    """

    def to_frame(self, baseline: str = "") -> Any:
        """Return a row for each cell, in a data frame of pandas, or of polars where pandas is not installed.

        Parameters
        ----------
        baseline : str
            The backend that ``ratio`` is against: how many times as fast as that one; default numpy.

        Returns
        -------
        pandas.DataFrame or polars.DataFrame
            Columns as in `knnbench.report.summaries.Summary` and its panel: medians and intervals, not samples.

        Raises
        ------
        MissingLibraryError
            If neither is installed.
        """
        from knnbench.report.export import frame
        from knnbench.report.summaries import panels_of

        return frame(panels_of(self), baseline)

    def plot(self, chart: str = "ranking", *, baseline: str = "", mode: str = "light") -> Any:
        """Return a chart, which a notebook shows; its ``save`` writes HTML, SVG or PNG.

        Parameters
        ----------
        chart : str
            ``"ranking"``, ``"accuracy"``, ``"roofline"``, ``"scaling"``, ``"phases"`` or ``"memory"``; scaling may
            name its axis, as in ``"scaling:n_corpus"``.
        baseline : str
            The backend that ratios are against; default numpy.
        mode : {"light", "dark"}

        Returns
        -------
        altair.Chart

        Raises
        ------
        InvalidInputError
            If there is no such chart, or the records have nothing for it.
        MissingLibraryError
            If Vega-Altair is not installed.
        """
        from knnbench.report.picture import chart_of
        from knnbench.report.summaries import panels_of

        return chart_of(panels_of(self), chart, baseline=baseline, mode=mode)

    def _repr_html_(self) -> str:
        """Return a table for notebooks: backends and, for each case, the time for a query, of the newest runs."""
        from knnbench.report.export import html_text
        from knnbench.report.summaries import current_panels, panels_of

        return html_text(current_panels(panels_of(self)))


def case_name(op: str, metric: str, dataset: str, dtype: str, shape: tuple[int, int, int], k: int | None) -> str:
    """Return the name of a case; `shape` is (n_queries, n_corpus, n_features)."""
    name = f"{op}/{metric}/{dataset}/{dtype}/{'x'.join(map(str, shape))}"
    return name if k is None else f"{name}/k{k}"


def median_interval(times: list[float]) -> tuple[float, float, float]:
    """Return the median and an interval for it.

    The interval lies between the (i + 1)-th smallest and the (i + 1)-th largest time, with the largest i for
    which it covers the median with at least 95 % confidence, whatever the distribution. Fewer than six times
    cannot give that: then it is their whole range.

    References
    ----------
    W. J. Conover, Practical Nonparametric Statistics, 3rd ed., Wiley 1999, section 3.2.

    Examples
    --------
    >>> median_interval([3.0, 1.0, 2.0])
    (2.0, 1.0, 3.0)
    >>> median_interval([float(i) for i in range(9)])
    (4.0, 1.0, 7.0)
    """
    ordered, n, outside, i = sorted(times), len(times), 0, -1
    # In integers: 2**n leaves the range of floats at 1,024 times.
    while 2 * MISSES * (outside := outside + math.comb(n, i + 1)) <= 2**n:
        i += 1
    return statistics.median(ordered), ordered[max(i, 0)], ordered[-1 - max(i, 0)]


def append_record(path: Path, record: Record) -> None:
    """Append a record to a file, and see it written to the disk: nothing measured is lost by a later crash.

    Raises
    ------
    OSError
        If the disk is full or the file cannot be written; what part of the line was written is taken back.
    """
    # Unbuffered, so that nothing is left to be written once an error has been seen.
    with path.open("ab+", buffering=0) as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        # A crash cut the last line short: what follows must not become part of it.
        gap = b"" if file.read(1) in (b"", b"\n") else b"\n"
        left = gap + record.to_json().encode() + b"\n"
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def read_records(path: Path) -> Results:
    """Return the records of a file, in their order.

    A line that a crash cut short is left out. Unknown fields, of a later version, are left out too. Records of
    schema version 1 are brought to the present one.

    Raises
    ------
    InvalidInputError
        If the file cannot be read, or any other line is not a record of a schema version known here.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidInputError(f"records cannot be read from {path}: {reason}.") from None
    return Results(parse_records(text.splitlines(), str(path)))


def parse_records(lines: Iterable[str], where: str, first_line: int = 1) -> Iterator[Record]:
    """Yield the record of each line, as `read_records`; `where` and the number of the first line are for errors."""
    known = {entry.name for entry in fields(Record)}
    for number, line in enumerate(lines, first_line):
        try:
            data = json.loads(line)
        except ValueError:
            if line.startswith(('{"op":', '{"backend":')):  # how every record begins
                continue
            raise InvalidInputError(f"{where} line {number} is not a knnbench record: not JSON.") from None
        try:
            if data["schema"] > SCHEMA_VERSION:
                raise InvalidInputError(
                    f"{where} line {number} has schema version {data['schema']}; this knnbench knows versions up to "
                    f"{SCHEMA_VERSION}: upgrade it to read the file."
                )
            data = _from_version_1(data) if data["schema"] == 1 else data
            record = Record(**{name: value for name, value in data.items() if name in known})
            _check_values(record)
            yield record
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"{where} line {number} is not a knnbench record: {error}.") from None


def _check_values(record: Record) -> None:
    """Refuse values that no measurement can have, so that what reads a record need not look at them again.

    Raises
    ------
    ValueError
        The text gives the field, its value and what was expected.
    """
    for entry in fields(Record):
        value = getattr(record, entry.name)
        kind: Any = entry.type if isinstance(entry.type, UnionType) else get_origin(entry.type) or entry.type
        # JSON of other writers has 1 for 1.0, and a bool is no number here.
        is_number = isinstance(value, int) and not isinstance(value, bool) and kind in (float, float | None)
        if not (isinstance(value, kind) or is_number) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{entry.name} is {value!r}; expected {getattr(kind, '__name__', kind)}")
    names = "n_queries", "n_corpus", "n_features", "measured_queries", "measured_corpus"
    sizes = {name: getattr(record, name) for name in names}
    for name, size in sizes.items():
        if not 0 <= size <= MOST:
            raise ValueError(f"{name} is {size}; expected a number from 0 to {MOST}")
    for phase, samples in record.phases.items():
        if not isinstance(samples, list) or not all(_is_duration(seconds) for seconds in samples):
            raise ValueError(f"phases[{phase!r}] is {samples!r}; expected a list of seconds")
    for name in ("operations", "ceilings"):
        if not all(_is_duration(value) for value in getattr(record, name).values()):
            raise ValueError(f"{name} is {getattr(record, name)!r}; expected numbers from 0 on")
    gpus = record.machine.get("gpus") or []
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict) for gpu in gpus):
        raise ValueError(f"machine['gpus'] is {gpus!r}; expected a list of objects")


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record of schema version 1, which kept neither the operation nor the case's own sizes."""
    named = {"import": "import_s", "prepare": "prepare_s", "first_call": "first_call_s"}
    phases = {phase: [data[old]] for phase, old in named.items() if data.get(old) is not None}
    commit = data.get("commit", "")
    return {
        **data,
        "op": "knn",
        "measured_queries": data["n_queries"] if data.get("times_s") else 0,
        "measured_corpus": data["n_corpus"] if data.get("times_s") else 0,
        "phases": {**phases, "call": data["times_s"]} if data.get("times_s") else phases,
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "run": data.get("started", ""),
    }
