"""One page of HTML with all charts and tables of some records, which needs nothing else, a network least of all.

What the page holds are summaries. Its script (``page.js``) filters and sorts them, and has the specifications of
`knnbench.report.charts` drawn by Vega, whose JavaScript comes with vl-convert and is embedded whole.
"""

import functools
import html
import json
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import knnbench
from knnbench.errors import InvalidInputError
from knnbench.measure.comparison import Comparison
from knnbench.measure.contention import CONTENDED
from knnbench.report import charts
from knnbench.report.appearance import look_of
from knnbench.report.comparison import caption_lines, case_columns, verdict_words
from knnbench.report.rows import AXES, PANEL_FIELDS, looks_in, roof_rows, scaling_groups
from knnbench.report.summaries import Panel, Summary, default_baseline, panels_of, titles_of
from knnbench.results import Record

__all__ = ["build_page"]

# Digits of each number; nothing that is measured has more.
DIGITS = 6

MACHINE_FACTS = (
    "machine", "cpus", "features", "memory", "cache", "clock_max_mhz", "governor", "gpus", "os", "python", "libraries",
)  # fmt: skip


def build_page(
    records: Iterable[Record],
    *,
    sources: Sequence[str] = (),
    title: str = "",
    baseline: str = "",
    comparison: Comparison | None = None,
    choices: dict[str, Any] | None = None,
    classifiers: dict[str, Any] | None = None,
) -> str:
    """Return the page.

    Parameters
    ----------
    records : iterable of Record
        Of any number of files, runs and machines.
    sources : sequence of str
        What they come from, for the reader.
    title : str
        Default from what the records share.
    baseline : str
        The backend that ratios are against at first; default `default_baseline`.
    comparison : Comparison, optional
        Two runs, side by side.
    choices : dict, optional
        What `knnbench.report.choices.choice_rows` gives.
    classifiers : dict, optional
        What `knnbench.report.classifiers.classifier_facts` gives.

    Returns
    -------
    str
        HTML. Names in records are text in it, whatever they hold.

    Raises
    ------
    InvalidInputError
        If there are no records, or no cell of the baseline was measured.
    """
    records = list(records)
    panels = panels_of(records)
    if not panels:
        raise InvalidInputError("there are no records to report; `knnbench run` measures some.")
    named = {cell.backend for panel in panels for cell in panel.cells}
    if baseline and baseline not in named:
        raise InvalidInputError(
            f"the baseline {baseline!r} is in no record; expected one of: {', '.join(sorted(named))}."
        )
    looks = looks_in(panels)
    shared, titles = titles_of(panels)
    machines = _machines(panels)
    values: dict[str, Any] = {
        "panels": [
            {**{name: getattr(panel, name) for name in PANEL_FIELDS}, "size": panel.size, "title": text}
            for panel, text in zip(panels, titles, strict=True)
        ],
        "cells": _columns(panels),
        "baseline": baseline or default_baseline(panels),
        "looks": {cell.backend: asdict(look_of(cell.backend, cell.peer)) for panel in panels for cell in panel.cells},
        "backends": list(looks),
        "axes": AXES,
        "scaling": scaling_groups(panels),
        "roofs": roof_rows(panels),
        "machines": machines,
        "machine_columns": [name for name in MACHINE_FACTS if any(facts.get(name) for facts in machines)],
        "runs": _runs(panels),
        "comparison": None if comparison is None else _comparison(comparison),
        "choices": choices,
        "classifiers": classifiers,
        "specs": {name: _specification(chart(looks)) for name, chart in charts.CHARTS.items()},
        "themes": {mode: {**charts.theme(mode), "background": "transparent"} for mode in ("light", "dark")},
    }
    # A browser would take "</script>" in a name for the end of the data.
    data = json.dumps(_plain(values), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    files = resources.files("knnbench.report")
    text = {name: files.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    parts = {
        "title": html.escape(title or f"knnbench: {_subject(panels)}"),
        "lead": html.escape(_lead(panels, shared)),
        "warning": html.escape(_warning(panels)),
        "version": html.escape(knnbench.__version__),
        "sources": html.escape(", ".join(sources) or f"{len(records):,} records"),
        "style": text["css"],
        "data": data,
        "library": _library(),
        "script": text["js"],
    }
    return string.Template(text["html"]).substitute(parts)


@functools.cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that leaves nothing but ``vegaEmbed`` behind."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return f"(() => {{{bundle}\n}})();".replace("</script", "<\\/script")


def _specification(chart: Any) -> dict[str, Any]:
    made: dict[str, Any] = chart.to_dict()
    made.pop("config", None)
    _drop_legends(made)
    return made


def _drop_legends(part: Any) -> None:
    """Leave out the legends of backends: the page has its own, which show what is filled and what is hollow."""
    if isinstance(part, list):
        for each in part:
            _drop_legends(each)
    elif isinstance(part, dict):
        if part.get("field") == "backend" and "legend" in part:
            part["legend"] = None
        for each in part.values():
            _drop_legends(each)


def _columns(panels: Sequence[Panel]) -> dict[str, Any]:
    """Return the fields of all cells; of text each value once, and its places."""
    columns: dict[str, Any] = {
        "panel_order": [order for order, panel in enumerate(panels) for _ in panel.cells],
    }
    cells = [cell for panel in panels for cell in panel.cells]
    for name in Summary.names():
        column = [getattr(cell, name) for cell in cells]
        if any(isinstance(value, (str, bool)) for value in column):
            codes: dict[Any, int] = {}
            places = [codes.setdefault(value, len(codes)) for value in column]
            columns[name] = {"values": list(codes), "codes": places}
        else:
            columns[name] = column
    return columns


def _plain(value: Any) -> Any:
    """Return a value that JSON has: what is not finite is left out, and digits that say nothing are too."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _subject(panels: Sequence[Panel]) -> str:
    names = list(dict.fromkeys(panel.dataset for panel in panels))
    return f"exact nearest neighbours and distances on {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def _lead(panels: Sequence[Panel], shared: str) -> str:
    ranked = {cell.backend for panel in panels for cell in panel.cells if cell.rank}
    counts = [(len(ranked), "backend"), (len(panels), "case"), (len({panel.run for panel in panels}), "run")]
    text = ", ".join(f"{count:,} {name}{'s' if count != 1 else ''}" for count, name in counts)
    return f"{text}: {shared}." if shared else f"{text}."


def _warning(panels: Sequence[Panel]) -> str:
    """Return what makes the times less worth believing; empty if nothing does."""
    shares = [cell.contention or 0.0 for panel in panels for cell in panel.cells]
    taken = [share for share in shares if share >= CONTENDED]
    if not taken:
        return ""
    return (
        f"While {len(taken):,} of {len(shares):,} cells were measured, other processes took up to {max(taken):.0%} of "
        f"the CPU time that these needed: believe such times less; the column contention says which."
    )


def _machines(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    libraries: dict[str, dict[str, dict[str, None]]] = {}
    for panel in panels:
        facts = panel.facts
        for name, version in panel.libraries.items():
            libraries.setdefault(panel.machine, {}).setdefault(name, {})[version] = None
        found[panel.machine] = {
            **{name: _text(facts.get(name)) for name in MACHINE_FACTS},
            "machine": panel.machine or "not known",
            "memory": _size(facts.get("memory_bytes")),
            "cache": _size(facts.get("cache_bytes")),
            "gpus": "; ".join(", ".join(map(str, gpu.values())) for gpu in facts.get("gpus") or []),
        }
    for machine, facts in found.items():
        versions = libraries.get(machine, {})
        facts["libraries"] = ", ".join(f"{name} {' and '.join(each)}" for name, each in sorted(versions.items()))
    return list(found.values())


def _text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def _size(n_bytes: Any) -> str:
    if not isinstance(n_bytes, (int, float)):
        return ""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.0f} MiB"


def _runs(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[Panel]] = {}
    for panel in panels:
        key = panel.started, panel.run, panel.machine, panel.threads, panel.commit, panel.version
        groups.setdefault(key, []).append(panel)
    names = "started", "run", "machine", "threads", "commit", "version"
    return [
        {
            **dict(zip(names, key, strict=True)),
            "cases": len(group),
            "cells": sum(len(panel.cells) for panel in group),
            "noise": max((panel.noise for panel in group if panel.noise is not None), default=None),
        }
        for key, group in sorted(groups.items(), key=lambda item: item[0][0], reverse=True)
    ]


def _comparison(comparison: Comparison) -> dict[str, Any]:
    columns = case_columns(comparison)
    varying = [show for show in columns.values() if len({show(row) for row in comparison.rows}) > 1]
    rows = []
    for row in comparison.rows:
        low, high = row.interval or (None, None)
        rows.append(
            {
                "cell": ", ".join(filter(None, (show(row) for show in varying))) or row.key.get("backend", ""),
                "verdict": row.verdict,
                "ratio": row.ratio,
                "low": low,
                "high": high,
                "p": row.p,
                "a_s": row.a.query_s if row.a else None,
                "b_s": row.b.query_s if row.b else None,
                "is_regression": row.is_regression,
                "note": "; ".join(verdict_words(row)[1:]),
            }
        )
    return {"rows": rows, "sides": ". ".join(caption_lines(comparison))}
