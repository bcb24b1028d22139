"""Summaries as values for other programs: CSV, a Markdown table, a data frame."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from knnbench.errors import MissingLibraryError
from knnbench.report.rows import PANEL_FIELDS, rows_of
from knnbench.report.summaries import Panel, Summary, default_baseline, titles_of
from knnbench.report.table import format_seconds

__all__ = ["COLUMNS", "csv_text", "frame", "markdown_text"]

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
    baseline = baseline or default_baseline(panels)
    shared, titles = titles_of(panels)
    names = list(dict.fromkeys(cell.backend for panel in panels for cell in panel.cells if cell.status != "absent"))
    lines = [
        "| " + " | ".join(["backend", *map(_escaped, titles)]) + " |",
        "|" + "---|" + "---:|" * len(titles),
    ]
    for name in names:
        cells = [_markdown_cell(panel, name, baseline) for panel in panels]
        lines.append("| " + " | ".join([_escaped(name), *cells]) + " |")
    note = f"A query, and × as fast as {_escaped(baseline)}; bold: the fastest, and what cannot be told from it."
    return "\n".join([*lines, "", ". ".join(filter(None, (_escaped(shared), note))), ""])


def _markdown_cell(panel: Panel, name: str, baseline: str) -> str:
    cell = next((cell for cell in panel.cells if cell.backend == name), None)
    if cell is None:
        return ""
    if cell.rank is None or cell.query_s is None:
        return _escaped(cell.status)
    least = next((other.query_s for other in panel.cells if other.backend == baseline and other.rank), None)
    text = format_seconds(cell.query_s) + (f", {least / cell.query_s:.3g}×" if least else "")
    return f"**{text}**" if cell.is_fastest else text


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
