"""What a comparison found, for the terminal."""

from collections.abc import Callable, Iterable

from rich.table import Table
from rich.text import Text

from knnbench.measure.comparison import Cell, Comparison, Row, SideFacts
from knnbench.report.table import format_seconds, plain

__all__ = ["caption_lines", "case_columns", "comparison_table", "summary_line", "verdict_words"]

STYLES = {"slower": "red", "broken": "bold red", "less accurate": "red", "faster": "green", "mended": "green"}

# Counted in the summary only: a backend that is absent on both sides would fill the table.
UNSHOWN = ("not ok",)


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison as a table.

    Parameters
    ----------
    comparison : Comparison

    Returns
    -------
    rich.table.Table
        A row for each cell that is ok on a side, or on one side only. What all cells share is in the title; what the
        sides are, what decided and `summary_line` are in the caption.
    """
    rows = [row for row in comparison.rows if row.verdict not in UNSHOWN]
    columns = case_columns(comparison)
    varying = {name: show for name, show in columns.items() if len({show(row) for row in rows}) > 1}
    shared = [_labelled(name, show(rows[0])) for name, show in columns.items() if name not in varying and rows]
    table = Table(
        title=plain(", ".join(("B against A", *filter(None, shared)))),
        title_justify="left",
        title_style="bold",
        caption=Text("\n").join(map(plain, caption_lines(comparison))),
        caption_justify="left",
        caption_style="",
    )
    for name in varying:
        table.add_column(name, no_wrap=True)
    for heading in ("A /query", "B /query", "B / A", "95 % interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in rows:
        cells = [*(show(row) for show in varying.values()), *_numbers(row)]
        table.add_row(*map(plain, cells), _verdict(row))
    return table


def summary_line(comparison: Comparison) -> str:
    """Return how many cells are slower, faster and so on, and the geometric mean of the ratios."""
    mean = comparison.geometric_mean
    names = {verdict: None for row in comparison.rows for verdict in (row.verdict, row.accuracy) if verdict}
    # These four are worth a zero; the others are there only if there is such a cell.
    counts = [
        f"{comparison.count(name)} {name}" for name in dict.fromkeys(("slower", "faster", "same", "broken", *names))
    ]
    first = "" if mean is None else f"geometric mean of B / A: {_ratio(mean)}; "
    return first + ", ".join(counts)


def case_columns(comparison: Comparison) -> dict[str, Callable[[Row], str]]:
    """Return each column that says which cell a row is, with what gives its text."""

    def field(name: str) -> Callable[[Row], str]:
        return lambda row: "" if row.key[name] is None else str(row.key[name])

    def size(row: Row) -> str:
        return " x ".join(f"{row.key[name]:,}" for name in ("n_queries", "n_corpus", "n_features"))

    names = ("op", "metric", "dataset", "dtype", "k", "size", "backend", "threads")
    return {name: size if name == "size" else field(name) for name in names if name not in comparison.set_aside}


def _labelled(name: str, text: str) -> str:
    if name == "k":
        return f"k={text}" if text else ""
    return f"{text} thread{'s' if text != '1' else ''}" if name == "threads" else text


def _numbers(row: Row) -> list[str]:
    times = [_seconds(cell) for cell in (row.a, row.b)]
    if row.ratio is None:
        return [*times, "", "", ""]
    interval = "" if row.interval is None else " .. ".join(map(_ratio, row.interval))
    p = "" if row.p is None else f"{row.p:.2g}" if row.p >= 0.001 else f"{row.p:.0e}"
    return [*times, _ratio(row.ratio), interval, p]


def _seconds(cell: Cell | None) -> str:
    return "" if cell is None or cell.query_s is None else format_seconds(cell.query_s)


def _ratio(ratio: float) -> str:
    # Three digits after the point where a hundredth matters, three in all where it does not.
    return f"{ratio:.3f}" if 0.1 <= ratio < 10 else f"{ratio:.3g}"


def verdict_words(row: Row) -> list[str]:
    """Return the verdict on a row, and what else a reader has to know of it."""
    words = [row.verdict]
    for name, cell in (("A", row.a), ("B", row.b)):
        if cell is not None and cell.status != "ok":
            words.append(f"{name} is {cell.status}" + (f" ({cell.reason})" if cell.reason else ""))
    if row.accuracy and row.a is not None and row.b is not None:
        words.append(f"{row.accuracy} (error {row.a.error:.1e} -> {row.b.error:.1e})")
    if row.sizes_differ:
        words.append("measured sizes differ")
    return words


def _verdict(row: Row) -> Text:
    worst = row.accuracy if row.accuracy == "less accurate" else row.verdict
    return plain("; ".join(verdict_words(row)), STYLES.get(worst, ""))


def caption_lines(comparison: Comparison) -> Iterable[str]:
    """Return what the sides are, what decided, and how many cells have which verdict."""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        yield f"{letter}: {_side(side)}"
    yield (
        f"slower and faster: p < {comparison.alpha:g} (Mann-Whitney, two-sided), an interval without 1, and a change "
        f"above {comparison.threshold:.1%} (least change of interest {comparison.min_change:.1%}; noise of A "
        f"{_noise(comparison.a.noise)}, of B {_noise(comparison.b.noise)})"
    )
    yield summary_line(comparison)


def _side(side: SideFacts) -> str:
    commits = [commit or "not known" for commit in side.commits]
    shown = ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else "")
    machines = "; ".join(machine or "not known" for machine in side.machines)
    return f"{side.name}; commit{'s' if len(commits) > 1 else ''} {shown}; machine {machines}"


def _noise(noise: float | None) -> str:
    return "not known, no A/A pair" if noise is None else f"{noise:.1%}"
