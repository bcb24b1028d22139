"""Tables for the terminal."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from knnbench.backends import Status
from knnbench.datasets import DatasetStatus
from knnbench.measure.record import Record

__all__ = ["BASELINE", "absent_table", "backends_table", "datasets_table", "format_seconds", "metric_table"]

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


def metric_table(records: Iterable[Record], n_corpus: int) -> Table:
    """Return the ranking of the backends on one case.

    Parameters
    ----------
    records : iterable of Record
        Of one metric and data set, at least one, one for each backend that works here.
    n_corpus : int
        Rows of the whole corpus, to which times of sampled measurements are scaled.

    Returns
    -------
    rich.table.Table
        The fastest first; then what failed or is not supported, with its reason. Absent backends are left to
        `absent_table`.
    """
    cells = list(records)
    measured = sorted(
        (cell for cell in cells if cell.seconds_per_pair is not None), key=lambda cell: cell.seconds_per_pair or 0
    )
    baseline = next((cell for cell in measured if cell.backend == BASELINE and cell.status == "ok"), None)
    first = cells[0]
    table = Table(
        title=f"{first.metric}, {first.dataset} {first.dtype}, k={first.k}, {n_corpus:,} x {first.n_features}, "
        f"{first.threads} thread{'s' if first.threads != 1 else ''}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("backend", no_wrap=True)
    for heading in ("ms/query", "± %", "queries/s", "Gpair/s", f"x {BASELINE}", "error", "first call", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for cell in measured:
        table.add_row(*_measured_row(cell, n_corpus, baseline), style=STATUS_STYLES.get(cell.status, "red"))
    for cell in cells:
        if cell.seconds_per_pair is None:
            gaps = [""] * (len(table.columns) - 2)
            style = STATUS_STYLES.get(cell.status, "red")
            table.add_row(_name(cell), *gaps, escape(f"{cell.status}: {cell.reason}"), style=style)
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
        table.add_row(name, escape(reason), style="dim")
    return table


def _measured_row(cell: Record, n_corpus: int, baseline: Record | None) -> list[str]:
    assert cell.seconds_per_pair is not None
    assert cell.median_s is not None
    assert cell.low_s is not None
    assert cell.high_s is not None
    query_s = cell.seconds_per_pair * n_corpus * cell.n_features
    spread = (cell.high_s - cell.low_s) / 2 / cell.median_s
    ratio = "" if baseline is None else f"{(baseline.seconds_per_pair or 0) / cell.seconds_per_pair:.3g}"
    notes = [f"{cell.n_queries:,} queries" + ("" if cell.n_corpus == n_corpus else f" x {cell.n_corpus:,} rows")]
    if cell.status != "ok":
        notes.append(f"{cell.status}: {cell.reason}")
    return [
        _name(cell),
        f"{query_s * 1e3:,.3g}" if query_s < 1 else f"{query_s * 1e3:,.0f}",
        f"{spread:.1%}".rstrip("%"),
        f"{1 / query_s:,.0f}" if query_s < 0.1 else f"{1 / query_s:,.3g}",
        f"{1e-9 / cell.seconds_per_pair:.3g}",
        ratio,
        "" if cell.error is None else f"{cell.error:.1e}" if cell.error else "0",
        "" if cell.first_call_s is None else format_seconds(cell.first_call_s),
        "" if cell.peak_bytes is None else f"{cell.peak_bytes / 1e6:,.0f}",
        escape("; ".join(notes)),
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
