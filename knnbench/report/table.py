"""Tables for the terminal."""

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from knnbench.backends import Status
from knnbench.datasets import DatasetStatus
from knnbench.measure.ceilings import PROBES, Ceiling
from knnbench.measure.comparison import indistinguishable, machine_name, noise
from knnbench.measure.contention import CONTENDED
from knnbench.results import OPS, Record

__all__ = [
    "BASELINE",
    "absent_table",
    "backends_table",
    "case_table",
    "ceilings_table",
    "datasets_table",
    "format_seconds",
    "machine_table",
    "plain",
]

BASELINE = "numpy"
"""The backend that ratios are against."""

STATUS_STYLES = {"ok": "", "absent": "dim", "unsupported": "dim"}


def format_seconds(seconds: float) -> str:
    """Return seconds with three significant digits and the unit that suits them.

    Examples
    --------
    >>> format_seconds(0.00123), format_seconds(75.2), format_seconds(4.5e-7)
    ('1.23 ms', '75.2 s', '0.45 µs')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def plain(text: Any, style: str = "") -> Text:
    """Return a text that the terminal shows as it is: names in a file of records must not act as markup or controls."""
    return Text("".join(char if char.isprintable() or char == "\n" else "?" for char in str(text)), style=style)


def case_table(records: Iterable[Record]) -> Table:
    """Return the ranking of the backends on one case.

    Parameters
    ----------
    records : iterable of Record
        Of one case, at least one; one for each backend that works here, and twins.

    Returns
    -------
    rich.table.Table
        The fastest first, with those that cannot be told from it; then what failed or is not supported, with its
        reason. Absent backends are left to `absent_table`.
    """
    records = list(records)
    cells = [record for record in records if not record.twin]
    measured = sorted(
        (cell for cell in cells if cell.seconds_per_pair is not None), key=lambda cell: cell.seconds_per_pair or 0
    )
    baseline = next((cell for cell in measured if cell.backend == BASELINE and cell.status == "ok"), None)
    fastest = indistinguishable(records)
    first, difference = cells[0], noise(records)
    machine = machine_name(first)
    table = Table(
        title=plain(
            f"{first.op} {first.metric}, {first.dataset} {first.dtype}, {f'k={first.k}, ' if first.k else ''}"
            f"{first.n_corpus:,} x {first.n_features}, {first.threads} thread{'s' if first.threads != 1 else ''}"
            f"{machine and f', {machine}'}"
        ),
        title_justify="left",
        title_style="bold",
        caption=_caption(measured, fastest, difference),
        caption_justify="left",
    )
    table.add_column("backend", no_wrap=True)
    query, queries = OPS[first.op]
    headings = (
        f"ms/{query}",
        "± %",
        f"{queries}/s",
        "Gpair/s",
        f"x {BASELINE}",
        "% of limit",
        "error",
        "first call",
        "peak MB",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for cell in measured:
        mark = "= " if len(fastest) > 1 and cell.backend in fastest else ""
        style = STATUS_STYLES.get(cell.status, "red")
        table.add_row(plain(mark + _name(cell)), *_measured_row(cell, baseline), style=style)
    for cell in cells:
        if cell.seconds_per_pair is None:
            gaps = [""] * (len(table.columns) - 2)
            style = STATUS_STYLES.get(cell.status, "red")
            table.add_row(plain(_name(cell)), *gaps, plain(f"{cell.status}: {cell.reason}"), style=style)
    return table


def absent_table(records: Iterable[Record]) -> Table | None:
    """Return the backends that do not work here, each with its reason and how to get it; None if there are none."""
    reasons = {_name(cell): cell.reason for cell in records if cell.status == "absent"}
    if not reasons:
        return None
    table = Table(title="Absent", title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, reason in reasons.items():
        table.add_row(plain(name), plain(reason), style="dim")
    return table


def _caption(measured: list[Record], fastest: set[str], difference: float | None) -> str:
    """Return what a reader has to know of the marks in a ranking."""
    facts = []
    if len(fastest) > 1:
        facts.append("=: cannot be told from the fastest")
    if difference is not None:
        facts.append(f"noise: one backend in two processes differed by {difference:.1%}")
    if any((cell.contention or 0) >= CONTENDED for cell in measured):
        facts.append("contended: share of the CPU time needed that other processes took; believe such times less")
    return "; ".join(facts)


def _measured_row(cell: Record, baseline: Record | None) -> list[str | Text]:
    assert cell.seconds_per_pair is not None
    assert cell.median_s is not None
    assert cell.interval_s is not None
    query_s = cell.seconds_per_pair * cell.n_corpus * cell.n_features
    spread = (cell.interval_s[1] - cell.interval_s[0]) / 2 / cell.median_s
    ratio = "" if baseline is None else f"{(baseline.seconds_per_pair or 0) / cell.seconds_per_pair:.3g}"
    rows = "" if cell.measured_corpus == cell.n_corpus else f" x {cell.measured_corpus:,} rows"
    notes = [f"{cell.measured_queries:,} {OPS[cell.op][1]}{rows}"]
    if not cell.complete:
        notes.append(f"interrupted after {len(cell.times_s)} calls")
    if cell.contention is not None and cell.contention >= CONTENDED:
        notes.append(f"contended {cell.contention:.0%}")
    if cell.status != "ok":
        notes.append(f"{cell.status}: {cell.reason}")
    first_call_s = cell.phase_s("first_call")
    return [
        f"{query_s * 1e3:,.3g}" if query_s < 1 else f"{query_s * 1e3:,.0f}",
        f"{spread:.1%}".rstrip("%"),
        f"{1 / query_s:,.0f}" if query_s < 0.1 else f"{1 / query_s:,.3g}",
        f"{1e-9 / cell.seconds_per_pair:.3g}",
        ratio,
        "" if cell.fraction_of_floor is None else f"{100 * cell.fraction_of_floor:.2g}",
        "" if cell.error is None else f"{cell.error:.1e}" if cell.error else "0",
        "" if first_call_s is None else format_seconds(first_call_s),
        "" if cell.peak_bytes is None else f"{cell.peak_bytes / 1e6:,.0f}",
        plain("; ".join(notes)),
    ]


def _name(cell: Record) -> str:
    return f"{cell.backend} (peer)" if cell.peer else cell.backend


def backends_table(statuses: Iterable[Status]) -> Table:
    """Return each backend with whether it works, on what device, in what version, and what would make it work."""
    table = Table()
    for heading in ("backend", "status", "device", "version"):
        table.add_column(heading, no_wrap=True)
    table.add_column("metrics, dtypes; or why not", overflow="fold")
    for status in statuses:
        name = f"{status.name} (peer)" if status.peer else status.name
        if status.ok and status.capabilities is not None:
            has = status.capabilities
            detail = f"{', '.join(sorted(has.metrics))}; {', '.join(sorted(has.dtypes))}"
            table.add_row(name, "[green]ok[/]", status.device, status.version, detail)
        else:
            remedy = f". To use it: {status.install}" if status.install else ""
            table.add_row(name, "absent", status.device, status.version, escape(status.reason + remedy), style="dim")
    return table


def datasets_table(statuses: Iterable[DatasetStatus]) -> Table:
    """Return each data set with where it is, or how to get it."""
    table = Table()
    for heading in ("data set", "train", "test", "dtype"):
        table.add_column(heading, no_wrap=True)
    table.add_column("where; or how to get it", overflow="fold")
    for status in statuses:
        shapes = [
            " x ".join(f"{size:,}" for size in shape) if shape else ""
            for shape in (status.train_shape, status.test_shape)
        ]
        table.add_row(
            status.name,
            *shapes,
            status.dtype or "",
            escape(status.where if status.available else status.reason),
            style="" if status.available else "dim",
        )
    return table


def machine_table(facts: dict[str, Any], threads: int) -> Table:
    """Return the facts of `knnbench.measure.machine.describe_machine`."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    shown = {**facts, "threads": threads}
    for name in ("memory_bytes", "cache_bytes"):
        size = shown.pop(name)
        shown[name.removesuffix("_bytes")] = "" if size is None else f"{size / 2**20:,.0f} MiB"
    for name, value in shown.items():
        text = "\n".join(map(_named, value)) if name == "gpus" else ", ".join(value) if name == "features" else value
        table.add_row(name.replace("_", " "), escape(str(text)) if text not in (None, "") else "[dim]not known[/]")
    return table


def _named(facts: dict[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def ceilings_table(ceilings: Iterable[Ceiling]) -> Table:
    """Return each ceiling with its rate and how it was measured, or why it could not be."""
    table = Table()
    table.add_column("ceiling", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("what; or why not", overflow="fold")
    for ceiling in ceilings:
        if ceiling.rate is None:
            table.add_row(ceiling.name, "", escape(ceiling.reason), style="dim")
        else:
            what = PROBES[ceiling.name].description
            if ceiling.contention is not None and ceiling.contention >= CONTENDED:
                what += f"; contended {ceiling.contention:.0%}, so too low"
            table.add_row(ceiling.name, _rate(ceiling.rate, ceiling.unit), what)
    return table


def _rate(rate: float, unit: str) -> str:
    """Return a rate with three significant digits, in tera where there are thousands of giga."""
    prefix, size = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
    return f"{rate / size:.3g} {prefix}B/s" if unit == "bytes/s" else f"{rate / size:.3g} {prefix} op/s"
