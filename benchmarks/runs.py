"""What the commands share that print a table of one run: where its records are kept, and how it is measured.

A run is of one machine and one commit. One that was interrupted is gone on with there; what a file has of other
machines, commits or versions stays in it, and is neither taken for this machine's nor shown.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knnbench.measure import Journal, Plan, measure
from knnbench.measure.ceilings import Ceilings
from knnbench.measure.comparison import commit_name, machine_name
from knnbench.measure.machine import machine_identity
from knnbench.results import Record

# Ignored by git: what a machine measured is not to be committed by mistake.
RESULTS = Path(__file__).parents[1] / "results"


def run(plan: Plan, output: Path, ceilings: Ceilings, say: Callable[[str, float], object]) -> list[Record]:
    """Measure a plan, append its records to a file, and return them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(output, plan) as journal:
        records = [record for record in journal.earlier if record.complete]
        for update in measure(plan, journal.earlier, ceilings):
            say(update.running, update.done)
            journal.take(update.records)
            records += [record for record in update.records if record.complete]
        journal.finish()
    return records


def newest(records: Sequence[Record]) -> list[Record]:
    """Return the records of the run that began last, all of one machine."""
    if not records:
        return []
    last = max(records, key=lambda record: record.started)
    return [record for record in records if _run_of(record) == _run_of(last)]


def _run_of(record: Record) -> tuple[str, dict[str, Any]]:
    return record.run, machine_identity(record.machine)


def title(records: Sequence[Record], path: Path) -> str:
    """Return what a table of one run is called: its file, and what machine, commit and threads it is of."""
    if not records:
        return str(path)
    first = records[0]
    threads = f"{first.threads} thread{'s' if first.threads != 1 else ''}"
    machine, commit = machine_name(first) or "a machine not known", commit_name(first) or "not known"
    return f"{machine}, {threads}, commit {commit}, {first.started}: {path}"
