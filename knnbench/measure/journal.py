"""The file of a run's records, from which an interrupted run goes on.

Complete cells are appended to the file of results. What is measured of the others meanwhile is kept beside it, in a
file that each round replaces and that the end of the run removes: as long as it is there, the run is unfinished.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import knnbench
from knnbench.errors import InvalidInputError
from knnbench.measure.machine import describe_machine, machine_identity, source_commit
from knnbench.measure.runner import Plan
from knnbench.results import Record, append_record, parse_records, read_records

__all__ = ["Journal"]

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class Journal:
    """The records of one run, as they come.

    Parameters
    ----------
    path : Path
        The file of results.
    plan : Plan
    fresh : bool
        Whether to leave an interrupted run as it is and start anew.

    Attributes
    ----------
    earlier : list of Record
        What an interrupted run of the same plan, machine and sources left; complete or not.

    Raises
    ------
    InvalidInputError
        On entering, if the file cannot be written, is no file of records, or another run is writing to it.
    """

    def __init__(self, path: Path, plan: Plan, *, fresh: bool = False) -> None:
        self.earlier: list[Record] = []
        self._path, self._partial_path = path, path.with_name(path.name + ".partial")
        commit, dirty = source_commit()
        # Through JSON, to be compared with what comes back from it.
        self._plan = json.loads(
            json.dumps(
                {"plan": asdict(plan), "version": knnbench.__version__, "commit": commit, "dirty": dirty,
                 "machine": machine_identity(describe_machine())}
            )
        )  # fmt: skip
        self._fresh = fresh
        self._partial: dict[tuple[str, str, bool], Record] = {}
        self._run: dict[str, str] = {}

    def __enter__(self) -> "Journal":
        self._existed = self._path.exists()
        try:
            self._lock = self._path.open("ab")
        except OSError as error:
            raise InvalidInputError(
                f"records cannot be written to {self._path}: {error.strerror}; name another with --output."
            ) from None
        try:
            self._take_lock()
            self._resume()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def take(self, records: Iterable[Record]) -> None:
        """Keep records: those that are complete for good, others until they are replaced.

        Raises
        ------
        OSError
            If they cannot be written, for example because the disk is full.
        """
        for record in records:
            if record.complete:
                append_record(self._path, record)
                self._partial.pop(record.cell, None)
            elif record.times_s:
                self._partial[record.cell] = record
            self._run = {"run": record.run, "started": record.started}
        self._write_partial()

    def finish(self) -> None:
        """Say that the run is over."""
        self._partial_path.unlink(missing_ok=True)

    @property
    def partial(self) -> list[Record]:
        """The cells that are not complete, as far as they are."""
        return list(self._partial.values())

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInputError(
                f"another run is writing to {self._path}; wait for it, or name another file with --output."
            ) from None

    def _release(self) -> None:
        self._lock.close()
        if not self._existed and self._path.exists() and not self._path.stat().st_size:
            self._path.unlink()

    def _resume(self) -> None:
        before = read_records(self._path)  # refuses to append to a file of something else
        if not self._partial_path.exists():
            return
        first, *rest = self._partial_path.read_text(encoding="utf-8").splitlines() or [""]
        left = list(parse_records(rest, str(self._partial_path), first_line=2))
        header: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            header = json.loads(first)
        if header.get("unfinished") == self._plan and not self._fresh:
            of_run = [record for record in before if record.run and record.run == header.get("run")]
            done = {record.cell for record in of_run if record.complete}
            left = [record for record in left if record.cell not in done]
            self.earlier = [*of_run, *left]
            self._partial = {record.cell: record for record in left}
            self._run = {name: header[name] for name in ("run", "started") if name in header}
            return
        for record in left:  # of another plan: kept as far as it is
            append_record(self._path, record)
        self.finish()

    def _write_partial(self) -> None:
        lines = [json.dumps({"unfinished": self._plan, **self._run}), *(r.to_json() for r in self._partial.values())]
        new = self._partial_path.with_name(self._partial_path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._partial_path)
