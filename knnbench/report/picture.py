"""One chart by itself: for notebooks, and as a picture without a browser."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knnbench.errors import InvalidInputError, MissingLibraryError
from knnbench.report.files import write_file
from knnbench.report.rows import AXES, looks_in, roof_rows, rows_of, scaling_groups, scaling_rows
from knnbench.report.summaries import Panel, current_panels, default_baseline, titles_of

__all__ = ["PICTURES", "SUFFIXES", "chart_of", "load_page_builder", "save_picture"]

PICTURES = ("ranking", "accuracy", "roofline", "scaling", "phases", "memory")
"""The charts that need nothing but records."""

SUFFIXES = (".svg", ".png", ".pdf")
INSTALL = "pip install 'knnbench[report]'"

# Panels of one picture; more would be too small to read, and take minutes.
MOST_PANELS = 24
TITLE_WIDTH = 44
COLUMNS = 2
WIDTH = 240


def chart_of(panels: Sequence[Panel], name: str = "ranking", *, baseline: str = "", mode: str = "light") -> Any:
    """Return a chart with its rows in it.

    Parameters
    ----------
    panels : sequence of Panel
        Those that no later run has taken the place of are shown.
    name : str
        One of `PICTURES`; ``"scaling"`` may be followed by one of `AXES`, as in ``"scaling:n_corpus"``.
    baseline : str
    mode : {"light", "dark"}

    Returns
    -------
    altair.Chart

    Raises
    ------
    InvalidInputError
        If there is no such chart, or the records have nothing for it.
    MissingLibraryError
        If Vega-Altair is not installed.
    """
    kind, _, axis = name.partition(":")
    if kind not in PICTURES or (axis and (kind != "scaling" or axis not in AXES)):
        raise InvalidInputError(
            f"chart {name!r} is unknown; expected one of: {', '.join(PICTURES)}, or scaling:AXIS with an axis of "
            f"{', '.join(AXES)}."
        )
    try:
        import altair

        from knnbench.report.charts import CHARTS, DATA, ROOFS, theme
    except ImportError as error:
        raise MissingLibraryError(f"charts need Vega-Altair ({error}): {INSTALL}.") from None
    panels = current_panels(panels)[:MOST_PANELS]
    if kind == "scaling":
        axes = [group["axis"] for group in scaling_groups(panels)]
        axis = axis or next(iter(axes), "")
        rows = scaling_rows(panels, axis, baseline) if axis in axes else []
    else:
        rows = rows_of(panels, baseline)
    needed = {"accuracy": "error", "roofline": "limit_rate", "memory": "peak_bytes"}.get(kind, "query_s")
    if not any(row["rank"] and row[needed] is not None for row in rows):
        raise InvalidInputError(f"the records have nothing for the chart {name!r}.")
    chart = CHARTS[kind](looks_in(panels))
    made = chart.to_dict()
    for row in rows:
        row["panel"] = textwrap.fill(row["panel"].replace(" x ", "\u00a0x\u00a0"), TITLE_WIDTH)
    made["datasets"] = {DATA: rows, ROOFS: roof_rows(panels)} if kind == "roofline" else {DATA: rows}
    made["config"] = theme(mode)
    baseline = baseline or default_baseline(panels)
    lines = [titles_of(panels)[0], NOTES.get(kind, "").format(baseline=baseline)]
    made["title"] = {"text": TITLES[kind].format(axis=AXES.get(axis, "")), "subtitle": [*filter(None, lines)]}
    if "facet" in made:  # as wide as the column of text on a page that shows it
        made["columns"] = COLUMNS
        made["spec"]["width"] = WIDTH
    return altair.Chart.from_dict(made)


def load_page_builder() -> Callable[..., str]:
    """Return `knnbench.report.page.build_page`, which needs the libraries of the extra ``report``.

    Raises
    ------
    MissingLibraryError
        If they are not installed.
    """
    try:
        import vl_convert  # noqa: F401

        from knnbench.report.page import build_page
    except ImportError as error:
        raise MissingLibraryError(f"a page needs Vega-Altair and vl-convert ({error}): {INSTALL}.") from None
    return build_page


TITLES = {
    "ranking": "Ranking",
    "accuracy": "Accuracy against speed",
    "roofline": "Roofline",
    "scaling": "Time for all queries against {axis}",
    "phases": "Before the first answer",
    "memory": "Memory",
}


NOTES = {
    "ranking": "time for a query, and × as fast as {baseline}; =: the fastest, and what cannot be told from it",
    "accuracy": "dashed: the Pareto front",
    "scaling": "ringed: the fastest",
}


def save_picture(chart: Any, path: Path) -> None:
    """Write a chart as SVG, PNG or PDF, as the suffix says.

    Raises
    ------
    InvalidInputError
        For another suffix.
    MissingLibraryError
        If vl-convert is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"{path} is no picture; expected a name that ends in {', '.join(SUFFIXES)}.")
    try:
        import vl_convert
    except ImportError as error:
        raise MissingLibraryError(f"pictures need vl-convert ({error}): {INSTALL}.") from None
    text = chart.to_json()
    if path.suffix == ".svg":
        content = vl_convert.vegalite_to_svg(text).encode()
    elif path.suffix == ".png":
        content = vl_convert.vegalite_to_png(text, scale=2)
    else:
        content = vl_convert.vegalite_to_pdf(text)
    write_file(path, content)
