"""All cases at once, for the terminal: a bar for each backend, as long as it is fast."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from knnbench.report.summaries import Panel, Summary, titles_of
from knnbench.report.table import STATUS_STYLES, format_seconds, plain

__all__ = ["bars_tables"]

BAR = 10
EIGHTHS = " ▏▎▍▌▋▊▉█"

# What a column takes beside the bar: the time for a query, the mark of the fastest, and the edges.
BESIDE = 14
NAMES = 22


def bars_tables(panels: Sequence[Panel], width: int, *, ascii_only: bool = False) -> list[Table]:
    """Return tables with a row for each backend and a column for each case, as many as fit the width.

    Parameters
    ----------
    panels : sequence of Panel
    width : int
        Characters.
    ascii_only : bool
        Whether bars are of ``#``, for terminals without block elements.

    Returns
    -------
    list of Table
        A bar is as long as the backend is fast, that of the fastest of each case full; beside it the time for a
        query. What was not measured has its status. Absent backends are left out.
    """
    shared, titles = titles_of(panels)
    most = max(1, (width - NAMES) // (BAR + BESIDE))
    step = math.ceil(len(panels) / max(1, math.ceil(len(panels) / most))) or 1  # tables of one width
    names: dict[str, list[int]] = {}
    for panel in panels:
        for cell in panel.cells:
            if cell.status != "absent":
                names.setdefault(cell.backend, []).append(cell.rank or len(panel.cells))
    # By how they do on the whole.
    order = sorted(names, key=lambda name: sum(names[name]) / len(names[name]))
    tables = []
    for start in range(0, len(panels), step):
        part = panels[start : start + step]
        caption = "a query; bars: speed, of the fastest; =: the fastest, and what cannot be told from it"
        table = Table(
            title=plain(shared),
            title_justify="left",
            title_style="bold",
            caption=caption if start + step >= len(panels) else None,
            caption_justify="left",
        )
        table.add_column("backend", no_wrap=True)
        for title in titles[start : start + step]:
            table.add_column(plain(title.replace(", ", "\n")), no_wrap=True)
        for name in order:
            cells = [next((cell for cell in panel.cells if cell.backend == name), None) for panel in part]
            if any(cell is not None for cell in cells):
                peer = " (peer)" if any(cell is not None and cell.peer for cell in cells) else ""
                rows = [_cell(cell, panel, ascii_only) for cell, panel in zip(cells, part, strict=True)]
                table.add_row(plain(name + peer), *rows)
        tables.append(table)
    return tables


def _cell(cell: Summary | None, panel: Panel, ascii_only: bool) -> Text:
    if cell is None:
        return Text("")
    if cell.rank is None or cell.query_s is None:
        return Text(cell.status, style=STATUS_STYLES.get(cell.status, "red"))
    least = panel.cells[0].query_s or cell.query_s
    mark = "=" if cell.is_fastest else " "
    style = "bold green" if cell.is_fastest else ""
    return Text(f"{_bar(least / cell.query_s, ascii_only)} {mark}{format_seconds(cell.query_s):>8}", style=style)


def _bar(share: float, ascii_only: bool) -> str:
    """Return a bar of a length from 0 to 1.

    Examples
    --------
    >>> _bar(0.5, ascii_only=True), _bar(0.33, ascii_only=False)
    ('#####     ', '███▎      ')
    """
    if ascii_only:
        return ("#" * round(share * BAR)).ljust(BAR)
    whole, part = divmod(round(share * BAR * 8), 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(BAR)
