"""Summaries as values for other programs: CSV, a Markdown table, a data frame."""

import csv
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from knnbench.errors import MissingLibraryError
from knnbench.report.rows import PANEL_FIELDS, rows_of
from knnbench.report.summaries import Panel, Summary, default_baseline, titles_of
from knnbench.report.table import format_seconds

__all__ = ["COLUMNS", "csv_text", "frame", "html_text", "markdown_text"]

COLUMNS = (*PANEL_FIELDS, *Summary.names(), "ratio")
"""The columns of a file of values, and of a data frame: what a panel has, what a cell has, and the ratio."""


def csv_text(panels: Sequence[Panel], baseline: str = "") -> str:
    """Return the summaries as CSV with a line of names, each number with all its digits.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows_of(panels, baseline):
        writer.writerow([_harmless(row[name]) for name in COLUMNS])
    return text.getvalue()


def _harmless(value: Any) -> Any:
    # https://owasp.org/www-community/attacks/CSV_Injection
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def markdown_text(panels: Sequence[Panel], baseline: str = "") -> str:
    """Return a Markdown table for a pull request: a row for each backend, a column for each case.

    A cell is the time for a query and how many times as fast as the baseline that is; the fastest is bold, with what
    cannot be told from it.
    """
    shared, note, titles, rows = _pivot(panels, baseline)
    lines = [
        "| " + " | ".join(["backend", *map(_escaped, titles)]) + " |",
        "|" + "---|" + "---:|" * len(titles),
    ]
    for name, cells in rows:
        texts = [f"**{_escaped(text)}**" if is_fastest else _escaped(text) for text, is_fastest in cells]
        lines.append("| " + " | ".join([_escaped(name), *texts]) + " |")
    return "\n".join([*lines, "", _escaped(". ".join(filter(None, (shared, note)))), ""])


def html_text(panels: Sequence[Panel], baseline: str = "") -> str:
    """Return the table of `markdown_text` as HTML, for a notebook."""
    shared, note, titles, rows = _pivot(panels, baseline)

    def line(cells: Iterable[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = [line(("backend", *map(html.escape, titles)), "th")]
    for name, cells in rows:
        texts = [f"<b>{html.escape(text)}</b>" if is_fastest else html.escape(text) for text, is_fastest in cells]
        body.append(line((html.escape(name), *texts)))
    return f"<table><caption>{html.escape('. '.join(filter(None, (shared, note))))}</caption>{''.join(body)}</table>"


def _pivot(
    panels: Sequence[Panel], baseline: str
) -> tuple[str, str, list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Return what panels share, a note, their titles, and for each backend the text of each, and if it is fastest."""
    baseline = baseline or default_baseline(panels)
    shared, titles = titles_of(panels)
    names = dict.fromkeys(cell.backend for panel in panels for cell in panel.cells if cell.status != "absent")
    rows = [(name, [_text(panel, name, baseline) for panel in panels]) for name in names]
    against = f", and × as fast as {baseline}" if baseline else ""
    return shared, f"Time for a query{against}; bold: the fastest, and what cannot be told from it.", titles, rows


def _text(panel: Panel, name: str, baseline: str) -> tuple[str, bool]:
    cell = next((cell for cell in panel.cells if cell.backend == name), None)
    if cell is None or cell.rank is None or cell.query_s is None:
        return "" if cell is None else cell.status, False
    least = next((other.query_s for other in panel.cells if other.backend == baseline and other.rank), None)
    return format_seconds(cell.query_s) + (f", {least / cell.query_s:.3g}×" if least else ""), cell.is_fastest


def _escaped(text: str) -> str:
    r"""Return a text that Markdown shows as it is.

    Examples
    --------
    >>> print(_escaped("a|b <i> *c*"))
    a\|b \<i\> \*c\*
    """
    text = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!" else char for char in text)


def frame(panels: Sequence[Panel], baseline: str = "") -> Any:
    """Return the summaries as a data frame of pandas, or of polars where that is installed and pandas is not.

    Raises
    ------
    MissingLibraryError
        If neither is installed.
    """
    rows = rows_of(panels, baseline)
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    try:
        import pandas

        return pandas.DataFrame(columns)
    except ImportError:
        pass
    try:
        import polars

        return polars.DataFrame(columns, strict=False)
    except ImportError:
        raise MissingLibraryError(
            "a data frame needs pandas or polars, and neither is installed: pip install pandas."
        ) from None
