"""Panels as rows: one for each cell, with what its panel has, as charts, tables and files of values take them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from knnbench.report.appearance import Look, look_of
from knnbench.report.summaries import Panel, Summary, default_baseline, titles_of

__all__ = ["AXES", "PANEL_FIELDS", "looks_in", "roof_rows", "rows_of", "scaling_groups", "scaling_rows"]

PANEL_FIELDS = (
    "op", "metric", "dataset", "dtype", "k", "n_queries", "n_corpus", "n_features", "threads", "machine", "commit",
    "version", "run", "started", "is_adversarial", "noise", "is_current",
)  # fmt: skip
"""What a row has of its panel."""

AXES = {
    "n_queries": "queries",
    "n_corpus": "corpus rows",
    "n_features": "features",
    "k": "k",
    "threads": "threads",
}
"""What times are drawn against, each with what it is called."""

# Lines of the roofline that are closer than this would have their names on top of each other.
ALIKE = 1.08


def looks_in(panels: Iterable[Panel]) -> dict[str, Look]:
    """Return how each backend that some panels show is drawn, in the order of the names."""
    peers = {cell.backend: cell.peer for panel in panels for cell in panel.cells if cell.status != "absent"}
    return {name: look_of(name, peers[name]) for name in sorted(peers)}


def rows_of(panels: Sequence[Panel], baseline: str = "") -> list[dict[str, Any]]:
    """Return a row for each cell.

    Parameters
    ----------
    panels : sequence of Panel
    baseline : str
        The backend that ``ratio`` is against: how many times as fast as that one; default `default_baseline`.

    Returns
    -------
    list of dict
        The fields of `Summary`, `PANEL_FIELDS`, and ``panel`` (its title), ``panel_order``, ``ratio``, ``filled``.
    """
    baseline = baseline or default_baseline(panels)
    rows = []
    for order, (panel, title) in enumerate(zip(panels, titles_of(panels)[1], strict=True)):
        least = next((cell.query_s for cell in panel.cells if cell.backend == baseline and cell.rank), None)
        shared = {name: getattr(panel, name) for name in PANEL_FIELDS}
        for cell in panel.cells:
            ratio = least / cell.query_s if least and cell.query_s and cell.rank else None
            own = {"panel": title, "panel_order": order, "ratio": ratio, "filled": not cell.peer}
            rows.append({**shared, **asdict(cell), **own})
    return rows


def scaling_groups(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return which panels differ in one size only.

    Returns
    -------
    list of dict
        ``axis`` (of `AXES`), ``title`` (what they share) and ``panels`` (their places, by that size).
    """
    names = ("op", "metric", "dataset", "dtype", *AXES, "machine")
    found = []
    for axis in AXES:
        groups: dict[tuple[Any, ...], dict[int, int]] = {}
        for place, panel in enumerate(panels):
            value = getattr(panel, axis)
            if panel.is_current and value:
                key = tuple(getattr(panel, name) for name in names if name != axis)
                groups.setdefault(key, {}).setdefault(value, place)
        groups = {key: places for key, places in groups.items() if len(places) > 1}
        members = [panels[min(places.values())] for places in groups.values()]
        for key, title in zip(groups, _titles_without(axis, members), strict=True):
            places = groups[key]
            found.append({"axis": axis, "title": title, "panels": [places[value] for value in sorted(places)]})
    return found


def scaling_rows(panels: Sequence[Panel], axis: str, baseline: str = "") -> list[dict[str, Any]]:
    """Return rows whose ``panel`` is a group of `scaling_groups`, with ``x`` and ``total_s``, of all queries."""
    rows = rows_of(panels, baseline)
    by_panel: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_panel.setdefault(row["panel_order"], []).append(row)
    groups = [group for group in scaling_groups(panels) if group["axis"] == axis]
    return [
        {
            **row,
            "panel": group["title"],
            "panel_order": order,
            "x": row[axis],
            "total_s": row["query_s"] and row["query_s"] * row["n_queries"],
        }
        for order, group in enumerate(groups)
        for place in group["panels"]
        for row in by_panel[place]
    ]


def _joined(limits: dict[str, float]) -> list[tuple[float, str]]:
    """Return limits with their names, those that are nearly equal as one."""
    found: list[tuple[float, str]] = []
    for name, limit in sorted(limits.items(), key=lambda item: -item[1]):
        if found and found[-1][0] < limit * ALIKE:
            found[-1] = found[-1][0], f"{found[-1][1]}, {name}"
        else:
            found.append((limit, name))
    return found


def _titles_without(axis: str, members: Sequence[Panel]) -> list[str]:
    """Return titles that leave a size open."""
    titles = []
    for panel in members:
        sizes = " x ".join(
            "any" if name == axis else f"{getattr(panel, name):,}" for name in ("n_queries", "n_corpus", "n_features")
        )
        rest = [panel.op, panel.metric, panel.dtype, panel.dataset, sizes]
        rest += [f"k={panel.k}"] if panel.k and axis != "k" else []
        titles.append(", ".join(rest))
    return titles


def roof_rows(panels: Iterable[Panel]) -> list[dict[str, Any]]:
    """Return the lines of the roofline: for each machine and number of threads, a line for each ceiling.

    Returns
    -------
    list of dict
        ``machine``, ``threads``, ``roof`` (the name of the ceiling), ``intensity``, ``rate``, and ``is_ridge``,
        where a line turns level.
    """
    machines: dict[tuple[str, int], list[Summary]] = {}
    for panel in panels:
        for cell in panel.cells:
            if cell.memory_rate and cell.limit_rate and cell.intensity:
                machines.setdefault((panel.machine, panel.threads), []).append(cell)
    rows = []
    for (machine, threads), cells in machines.items():
        memory = max(cell.memory_rate or 0.0 for cell in cells)
        limits: dict[str, float] = {}
        for cell in cells:
            limits[cell.bound] = max(limits.get(cell.bound, 0.0), cell.limit_rate or 0.0)
        top = max(limits.values())
        low = min(min(cell.intensity or 0.0 for cell in cells), min(limits.values()) / memory) / 2
        high = max(max(cell.intensity or 0.0 for cell in cells), top / memory) * 3
        for limit, name in _joined(limits):
            ridge = limit / memory
            points = [(low, memory * low)] if limit >= top / ALIKE else []
            points += [(ridge, limit), (high, limit)]
            for intensity, rate in points:
                own = {"intensity": intensity, "rate": rate, "is_ridge": intensity == ridge}
                rows.append({"machine": machine, "threads": threads, "roof": name, **own})
    return rows
