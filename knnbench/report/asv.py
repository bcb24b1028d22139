"""Records of `knnbench run` as results of asv, so that wide sweeps and GPU machines appear on the same site.

asv keeps one file for each machine, commit and environment, and ``benchmarks.json``, which lists the benchmarks and
their parameters. `export` adds one benchmark for each operation, such as ``runner.time_knn``,
in an environment of its own, ``runner-py3.11``, beside those that asv made.

``asv run`` writes ``benchmarks.json`` anew, with what it found in the benchmark directory alone. The results of
`export` stay in their files, but ``asv publish`` passes over what ``benchmarks.json`` does not list: call `export`
(``knnbench export-asv``) after ``asv run`` and before ``asv publish``, with the same records as before or with later
ones.

Notes
-----
The format is that of asv 0.6: version 2 of result files and of ``benchmarks.json``, version 1 of ``machine.json``.
asv takes less for better, so a value is seconds for 10^9 features of pairs, which is also the same quantity for every
shape. Parameters are a full product there; what was not measured is NaN, which asv shows as n/a.
"""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from knnbench.errors import InvalidInputError
from knnbench.results import Record

__all__ = ["PARAMETERS", "UNIT", "Exported", "export", "machine_name"]

PARAMETERS: tuple[str, ...] = ("backend", "metric", "dataset", "dtype", "shape", "k", "threads")
"""Parameters of the exported benchmarks, in their order."""

UNIT = "s / 10^9 feature pairs"

# Raised when the exported values change their meaning: asv passes over results of another version.
BENCHMARK_VERSION = "1"

RESULTS_VERSION = BENCHMARKS_VERSION = 2
MACHINE_VERSION = 1

# Columns with a value for each combination of parameters.
CELL_COLUMNS = (
    "result",
    "stats_ci_99_a",
    "stats_ci_99_b",
    "stats_q_25",
    "stats_q_75",
    "stats_number",
    "stats_repeat",
    "samples",
)
COLUMNS = ("result", "params", "version", "started_at", "duration", *CELL_COLUMNS[1:], "profile")

CONFIDENCE = 0.99

Cell = tuple[str, ...]


class Exported(NamedTuple):
    """What `export` did.

    Attributes
    ----------
    paths : list of Path
        Files written.
    refused : list of (str, str)
        Records that no commit can be charged with, and why.
    """

    paths: list[Path]
    refused: list[tuple[str, str]]


class _File(NamedTuple):
    """What results share a file."""

    machine: str
    commit: str
    python: str


@dataclass(slots=True)
class _Benchmark:
    """What was measured with one operation, for one file."""

    samples: dict[Cell, list[float]] = field(default_factory=dict)
    started_ms: int = 0
    duration_s: float = 0.0


def export(
    records: Iterable[Record], results_dir: Path, machine: str | None = None, *, repository: Path | None = None
) -> Exported:
    """Write records into a directory of asv's results.

    Only records that are ``"ok"``, complete and no twins count; the others are passed over in silence. Samples of
    several records of one cell are pooled. What a file already holds stays, except for the cells given here, which
    are replaced: exporting the same records again changes nothing.

    Parameters
    ----------
    records : iterable of Record
    results_dir : Path
        ``results_dir`` of ``asv.conf.json``; made if need be.
    machine : str, optional
        What asv is to call the machine; give the name that ``asv run`` used on it (``asv run --machine``) to have
        both in one place. Default: `machine_name` of each record's machine.
    repository : Path, optional
        Where git finds the commits; default the current directory.

    Returns
    -------
    Exported
        The files written, and the records refused: those of sources that were in no commit, or differed from it.

    Raises
    ------
    InvalidInputError
        A commit that is not in the repository, records of several machines under one name, a name that cannot be a
        directory, or files in `results_dir` that are not asv's. Nothing has been written then.
    """
    refused: list[tuple[str, str]] = []
    accepted: list[Record] = []
    for record in records:
        if record.status != "ok" or not record.complete or record.twin or not record.times_s:
            continue
        reason = _refusal(record)
        if reason:
            refused.append((f"{record.backend} on {record.case}", reason))
        else:
            accepted.append(record)
    if not accepted:
        return Exported([], refused)

    commits = {name: _Commit.find(name, repository or Path()) for name in {record.commit for record in accepted}}
    facts = _machines(accepted, machine)
    written: dict[Path, dict[str, Any]] = {}
    for name, about in facts.items():
        path = results_dir / name / "machine.json"
        # What asv found out itself is kept: results under other facts would be lines of their own in its graphs.
        written[path] = _read(path, MACHINE_VERSION) or {**about, "version": MACHINE_VERSION}
    dates = {commit.sha: commit.date_ms for commit in commits.values()}
    for file, benchmarks in _by_file(accepted, commits, machine).items():
        path = results_dir / file.machine / f"{file.commit[:8]}-{_environment(file.python)}.json"
        about = {key: text for key, text in written[path.with_name("machine.json")].items() if key != "version"}
        written[path] = _merged(_read(path, RESULTS_VERSION), file, dates[file.commit], about, benchmarks)
    path = results_dir / "benchmarks.json"
    written[path] = _listing(_read(path, BENCHMARKS_VERSION), results_dir, written)
    # The listing last: it names what the others must hold.
    for path, data in written.items():
        _write(path, data)
    return Exported(sorted(written), refused)


def machine_name(facts: dict[str, Any]) -> str:
    """Return a name for a machine that says what decides its speed.

    Parameters
    ----------
    facts : dict
        `Record.machine`.

    Examples
    --------
    >>> machine_name({"cpu": "AMD EPYC 9654 96-Core Processor", "cpus": 16, "gpus": [{"name": "NVIDIA H100 80GB"}]})
    'AMD-EPYC-9654-96-Core-Processor-16cpus-1xNVIDIA-H100-80GB'
    """
    names = [gpu["name"] for gpu in facts.get("gpus", [])]
    gpus = [f"{names.count(name)}x{name}" for name in sorted(set(names))]
    parts = [str(facts.get("cpu") or "unknown"), f"{facts.get('cpus', 0)}cpus", *gpus]
    return re.sub(r"[^A-Za-z0-9._]+", "-", " ".join(parts)).strip("-.")


@dataclass(frozen=True, slots=True)
class _Commit:
    sha: str
    date_ms: int

    @classmethod
    def find(cls, name: str, repository: Path) -> "_Commit":
        """Return a commit by the beginning of its hash."""
        command = ["git", "-C", str(repository), "show", "--no-patch", "--format=%H %at", f"{name}^{{commit}}", "--"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = re.fullmatch(r"([0-9a-f]{40}) (\d+)\n", done.stdout) if re.fullmatch("[0-9a-f]+", name) else None
            why = "" if found else (done.stderr.strip().splitlines() or ["not the hash of a commit"])[-1]
        except OSError as error:
            found, why = None, f"git cannot be run: {error.strerror}"
        if found is None:
            raise InvalidInputError(
                f"commit {name!r} of the records cannot be found in {repository.absolute()} ({why}); expected a clone "
                f"of the repository that has it: pass its path, or fetch the commit."
            )
        return cls(found[1], int(found[2]) * 1000)


def _refusal(record: Record) -> str:
    """Return why no commit can be charged with a record; empty if one can."""
    if not record.commit:
        return "its sources were not in a git checkout, so no commit is known"
    if record.dirty:
        return f"its sources differed from commit {record.commit}"
    return ""


def _machines(records: list[Record], machine: str | None) -> dict[str, dict[str, Any]]:
    """Return what asv is to know of each machine, by its name."""
    if machine is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", machine):
        raise InvalidInputError(
            f"machine is {machine!r}; expected a name that can be a directory: letters, digits and . _ - only."
        )
    kinds = {machine_name(record.machine): record.machine for record in records}
    if machine is not None and len(kinds) > 1:
        raise InvalidInputError(
            f"the records are of {len(kinds)} machines, and asv compares all that has one machine's name: "
            f"{', '.join(sorted(kinds))}; export them one by one, or without the name {machine!r}."
        )
    return {machine or name: _asv_facts(machine or name, facts) for name, facts in kinds.items()}


def _asv_facts(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    gpus = [gpu["name"] for gpu in facts.get("gpus", [])]
    return {
        "machine": name,
        "os": str(facts.get("os", "")),
        "arch": str(facts.get("arch", "")),
        # asv has no place for them.
        "cpu": " + ".join([str(facts.get("cpu", "")), *gpus]),
        "num_cpu": str(facts.get("cpus", "")),
        "ram": str(facts.get("memory_bytes") or ""),
    }


def _environment(python: str) -> str:
    return f"runner-py{python}"


def _by_file(
    records: list[Record], commits: dict[str, _Commit], machine: str | None
) -> dict[_File, dict[str, _Benchmark]]:
    """Return the samples by file and benchmark, earlier runs first."""
    files: dict[_File, dict[str, _Benchmark]] = {}
    for record in sorted(records, key=lambda record: (record.started, record.run)):
        python = ".".join(str(record.machine.get("python", "")).split(".")[:2])
        file = _File(machine or machine_name(record.machine), commits[record.commit].sha, python)
        benchmark = files.setdefault(file, {}).setdefault(f"runner.time_{record.op.replace('-', '_')}", _Benchmark())
        scale = 1e9 / record.pair_features
        benchmark.samples.setdefault(_cell(record), []).extend(scale * seconds for seconds in record.times_s)
        benchmark.started_ms = benchmark.started_ms or _milliseconds(record.started)
        benchmark.duration_s += sum(sum(phase) for phase in record.phases.values())
    return files


def _cell(record: Record) -> Cell:
    """Return the values of `PARAMETERS`, as asv writes them."""
    shape = "x".join(map(str, (record.n_queries, record.n_corpus, record.n_features)))
    values = (record.backend, record.metric, record.dataset, record.dtype, shape, record.k, record.threads)
    return tuple(map(repr, values))


def _milliseconds(started: str) -> int:
    try:
        return int(datetime.fromisoformat(started).timestamp() * 1000)
    except ValueError:
        return 0


def _statistics(samples: list[float]) -> dict[str, Any]:
    """Return the columns of one cell."""
    ordered = sorted(samples)
    low, high = _interval(ordered)
    # quantiles() wants two values at least.
    quarters = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "result": statistics.median(ordered),
        "stats_ci_99_a": low,
        "stats_ci_99_b": high,
        "stats_q_25": quarters[0],
        "stats_q_75": quarters[2],
        "stats_number": 1,
        "stats_repeat": len(samples),
        "samples": samples,
    }


def _interval(ordered: list[float]) -> tuple[float, float]:
    """Return an interval for the median with at least 99 % confidence: infinite for fewer than eight samples.

    It lies between the (i + 1)-th smallest and the (i + 1)-th largest, as in `knnbench.results.median_interval`.
    """
    n, outside, i = len(ordered), 0, -1
    while 2 * (outside := outside + math.comb(n, i + 1)) <= (1 - CONFIDENCE) * 2**n:
        i += 1
    return (ordered[i], ordered[-1 - i]) if i >= 0 else (-math.inf, math.inf)


def _merged(
    old: dict[str, Any] | None, file: _File, date_ms: int, machine: dict[str, Any], benchmarks: dict[str, _Benchmark]
) -> dict[str, Any]:
    """Return a result file with these benchmarks in it."""
    data = old or {
        "commit_hash": file.commit,
        "env_name": _environment(file.python),
        "date": date_ms,
        "params": {**machine, "python": file.python},
        "python": file.python,
        "requirements": {},
        "env_vars": {},
        "result_columns": list(COLUMNS),
        "results": {},
        "durations": {},
        "version": RESULTS_VERSION,
    }
    if data["commit_hash"] != file.commit:
        raise InvalidInputError(
            f"the results of commit {file.commit} belong into a file that holds those of {data['commit_hash']}: asv "
            f"tells commits apart by eight digits; move that file away."
        )
    results = dict(data["results"])
    for name, benchmark in benchmarks.items():
        row = dict(zip(data["result_columns"], results.get(name, ()), strict=False))
        cells = _cells(row) | {cell: _statistics(samples) for cell, samples in benchmark.samples.items()}
        params = _union(zip(*cells, strict=True), ())
        product = [cells.get(cell, {"result": math.nan}) for cell in itertools.product(*params)]
        row = {column: [values.get(column) for values in product] for column in CELL_COLUMNS}
        row |= {"params": params, "version": BENCHMARK_VERSION}
        row |= {"started_at": benchmark.started_ms, "duration": benchmark.duration_s}
        results[name] = [row.get(column) for column in data["result_columns"]]
    return {**data, "results": results}


def _cells(row: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Return the measured cells of a benchmark in a result file; none of another version."""
    if row.get("version") != BENCHMARK_VERSION or not row.get("result"):
        return {}
    columns = {column: row[column] for column in CELL_COLUMNS if row.get(column)}
    cells = itertools.product(*row["params"])
    values = ({column: column_values[i] for column, column_values in columns.items()} for i in itertools.count())
    return {
        cell: value
        for cell, value in zip(cells, values, strict=False)
        if value["result"] is not None and not math.isnan(value["result"])
    }


def _union(one: Iterable[Iterable[str]], other: Iterable[Iterable[str]]) -> list[list[str]]:
    """Return the values of each parameter in either product, numbers in their order."""

    def natural(value: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", value)]

    return [sorted({*a, *b}, key=natural) for a, b in itertools.zip_longest(one, other, fillvalue=())]


def _listing(old: dict[str, Any] | None, results_dir: Path, written: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return ``benchmarks.json`` with the exported benchmarks in it.

    Their parameters are those of all result files: asv shows no others, and may have dropped the list.
    """
    params: dict[str, list[list[str]]] = {}
    for data in _result_files(results_dir, written):
        for name, values in data["results"].items():
            row = dict(zip(data["result_columns"], values, strict=False))
            if name.startswith("runner.time_") and row.get("version") == BENCHMARK_VERSION:
                params[name] = _union(row["params"], params.get(name, []))
    entries = {
        name: {
            "name": name,
            "type": "track",
            "unit": UNIT,
            "code": f"# Measured by `knnbench run`: seconds of {name.removeprefix('runner.time_')} for 10^9 features "
            f"of pairs, on a prepared corpus.",
            "param_names": list(PARAMETERS),
            "params": values,
            "version": BENCHMARK_VERSION,
        }
        for name, values in params.items()
    }
    return {**(old or {"version": BENCHMARKS_VERSION}), **entries}


def _result_files(results_dir: Path, written: dict[Path, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the result files that `export` has written, now or earlier, in the order of their names."""
    for path in sorted({*results_dir.glob(f"*/*-{_environment('*')}.json"), *written}):
        data = written.get(path) or _read(path, RESULTS_VERSION) or {}
        if "result_columns" in data:
            yield data


def _read(path: Path, version: int) -> dict[str, Any] | None:
    """Return a file of asv; None if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} is not a file of asv: {error}; move it away.") from None
    if not isinstance(data, dict) or data.get("version") != version:
        found = data.get("version") if isinstance(data, dict) else None
        raise InvalidInputError(
            f"{path} has format version {found!r}; expected {version}, that of asv 0.6: run `asv update`, or move it "
            f"away."
        )
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    """Put a file in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            json.dump(data, file, indent=None if "result_columns" in data else 4)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are for their owner's eyes
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
