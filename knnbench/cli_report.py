"""The commands of ``knnbench`` that show what was measured: a page, a picture, values, tables in the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from knnbench.errors import InvalidInputError
from knnbench.measure.comparison import Comparison, compare_sides, parse_side
from knnbench.report.bars import bars_tables
from knnbench.report.choices import choice_rows
from knnbench.report.export import csv_text, markdown_text
from knnbench.report.files import write_file
from knnbench.report.picture import SUFFIXES, chart_of, load_page_builder, save_picture
from knnbench.report.summaries import Panel, current_panels, panels_of
from knnbench.report.table import absent_table, case_table
from knnbench.results import Record, read_records

__all__ = ["add_commands", "print_bars"]

OUTPUT = Path("knnbench-results.jsonl")
PAGE = Path("report.html")

VALUES: dict[str, Callable[[Sequence[Panel], str], str]] = {".csv": csv_text, ".md": markdown_text}

out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)

Results = Annotated[list[Path] | None, typer.Argument(help=f"Files of records; default {OUTPUT}.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(report)
    app.command()(show)


def report(
    results: Results = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Its suffix says what: .html, .svg, .png, .pdf, .csv or .md.")
    ] = PAGE,
    chart: Annotated[
        str, typer.Option(help="For a picture: ranking, accuracy, roofline, scaling, phases or memory.")
    ] = "ranking",
    dark: Annotated[bool, typer.Option("--dark", help="A picture for dark backgrounds.")] = False,
    baseline: Annotated[str, typer.Option(help="The backend that ratios are against.")] = "",
    title: Annotated[str, typer.Option(help="Of the page.")] = "",
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two sides, side by side: as for `knnbench compare`.")
    ] = None,
    regret: Annotated[
        Path | None, typer.Option(help="What `knnbench regret --json` printed: the fastest over shapes.")
    ] = None,
    classifiers: Annotated[
        bool, typer.Option("--classifiers", help="Compute what the classifiers do on MNIST or digits; a minute.")
    ] = False,
) -> None:
    """Make a page of what was measured: one HTML file with all charts and tables, which needs no network.

    Or a picture of one chart, or the values:

    knnbench report before.jsonl after.jsonl -o report.html

    knnbench report --chart roofline -o roofline.svg

    knnbench report -o results.md
    """
    paths = results or [OUTPUT]
    records = _records(paths)
    known = (".html", *VALUES, *SUFFIXES)
    if output.suffix not in known:
        raise InvalidInputError(f"{output} ends in {output.suffix!r}; expected one of: {', '.join(known)}.")
    panels = panels_of(records)
    if baseline and baseline not in (names := {cell.backend for panel in panels for cell in panel.cells}):
        raise InvalidInputError(
            f"the baseline {baseline!r} is in no record; expected one of: {', '.join(sorted(names))}."
        )
    if output.suffix in VALUES:
        write_file(output, VALUES[output.suffix](panels, baseline).encode())
    elif output.suffix in SUFFIXES:
        save_picture(chart_of(panels, chart, baseline=baseline, mode="dark" if dark else "light"), output)
    else:
        page = load_page_builder()
        text = page(
            records,
            sources=[path.name for path in paths],
            title=title,
            baseline=baseline,
            comparison=_comparison(compare, paths),
            choices=None if regret is None else choice_rows(regret),
            classifiers=_classifiers() if classifiers else None,
        )
        write_file(output, text.encode())
    out.print(f"{len(records):,} records in {output}", soft_wrap=True, markup=False)


def show(
    results: Results = None,
    every: Annotated[bool, typer.Option("--all", help="All runs, not only those that no later one replaces.")] = False,
    bars: Annotated[bool, typer.Option("--bars", help="Only the bars of all cases.")] = False,
) -> None:
    """Show what was measured: a table for each case, and bars of all."""
    records = _records(results or [OUTPUT])
    panels = panels_of(records)
    shown = panels if every else current_panels(panels)
    if not bars:
        for panel in shown:
            there = [record for record in panel.records if record.status != "absent"]
            if there:
                out.print(case_table(there), "")
        absent = absent_table(record for panel in shown for record in panel.records)
        if absent is not None:
            out.print(absent, "")
    print_bars(out, shown)


def print_bars(console: Console, panels: Sequence[Panel]) -> None:
    """Print the bars of all cases."""
    for table in bars_tables(panels, console.width, ascii_only=console.options.ascii_only):
        console.print(table)


def _records(paths: list[Path]) -> list[Record]:
    """Return the records of all files, those of a file that is named twice once.

    Raises
    ------
    InvalidInputError
        If a file cannot be read, or holds no records.
    """
    records: list[Record] = []
    for path in dict.fromkeys(paths):
        found = read_records(path)
        if not found:
            raise InvalidInputError(f"{path} holds no records; `knnbench run -o {path}` measures some.")
        records += found
    return records


def _comparison(sides: tuple[str, str] | None, paths: list[Path]) -> Comparison | None:
    """Return the comparison that was asked for; of two files, that of these, if they have something in common."""
    if sides is not None:
        return compare_sides(*(parse_side(side, paths[0]) for side in sides))
    if len(paths) != 2:
        return None
    try:
        return compare_sides(*(parse_side(str(path), path) for path in paths))
    except InvalidInputError as error:
        err.print(f"not side by side: {error}", style="yellow", markup=False)
        return None


def _classifiers() -> dict[str, Any]:
    from knnbench.report.classifiers import classifier_facts

    with err.status("classifying"):
        return classifier_facts()
