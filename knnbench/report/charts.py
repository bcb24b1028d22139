"""The charts of a report, as specifications of Vega-Lite.

One specification serves the page, where a browser draws it, and the pictures, which vl-convert makes without one. A
chart names its data instead of holding them: `DATA`, rows as `knnbench.report.rows` gives them. Each has a facet for
each panel; `columns` and `width` are what a page changes to fit a screen.
"""

import json
from collections.abc import Mapping
from typing import Any

import altair as alt

from knnbench.report.appearance import COLOURS, Look

__all__ = ["CHARTS", "DATA", "PHASE_COLOURS", "ROOFS", "VERDICT_LOOKS", "theme"]

DATA = "rows"
ROOFS = "roofs"

# Smaller errors are drawn here: of no use to tell apart, and 0 has no place on a logarithmic axis.
LEAST_ERROR = 1e-10

PHASE_COLOURS = {
    "import": "#5b6c8f",
    "prepare": "#2e8b57",
    "first call": "#c8701c",
    "copy in": "#9163bd",
    "compute": "#2b7bba",
    "copy out": "#c9539b",
}
"""The phases in the order in which they are stacked, each with its colour."""

VERDICT_LOOKS = {
    "slower": ("#d5473d", "triangle-right"),
    "faster": ("#2e8b57", "triangle-left"),
    "same": ("#7b8088", "circle"),
    "too few samples": ("#85861f", "cross"),
}

# What was measured, and is right.
IS_RANKED = "datum.rank != null"

# 1, 2 and 5 of each decade: labels of all that Vega marks on a logarithmic axis would run into each other.
_IS_LABELLED = "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0"
_IS_DECADE = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"

Chart = Any
Looks = Mapping[str, Look]


def ranking(looks: Looks) -> Chart:
    """Return the time for a query, with the interval of its median, the fastest first."""
    y = alt.Y("backend:N", sort=alt.EncodingSortField("query_s", op="min", order="ascending"), title=None)
    x = alt.X("query_s:Q", title="time for a query", scale=_log(), axis=_si("s"))
    base = alt.Chart()
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        y=y, x=alt.X("low_s:Q"), x2="high_s:Q", color=_colour(looks, legend=False)
    )
    point = _points(base, looks, legend=False).encode(y=y, x=x, tooltip=_tooltip())
    time, ratio = (
        base.mark_text(align="right", dx=dx, fontSize=11).encode(y=y, x=alt.value("width"), text=text)
        for dx, text in ((64, "time:N"), (122, "factor:N"))
    )
    chart = _facet(alt.layer(interval, point, time, ratio), step=21, beside=225, y="independent").transform_filter(
        IS_RANKED
    )
    return chart.transform_calculate(
        time="(datum.is_fastest ? '= ' : '') + format(datum.query_s, '.3~s') + 's'",
        factor="!datum.ratio ? '' : datum.ratio < 0.01 ? '< 0.01×' : "
        "format(datum.ratio, datum.ratio < 100 ? '.2~r' : ',.0f') + '×'",
    )


def accuracy(looks: Looks) -> Chart:
    """Return queries a second against the error, with the front of those that none beats in both."""
    label = f"datum.value <= {LEAST_ERROR} ? 'exact' : format(datum.value, '.0e')"
    x = alt.X(
        "error_shown:Q",
        title="largest error, of the largest distance",
        scale=alt.Scale(type="log", domain=[LEAST_ERROR, 1], nice=False, padding=8),
        axis=alt.Axis(labelExpr=label, values=[1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1]),
    )
    y = alt.Y("queries_per_s:Q", title="queries a second", scale=_log(), axis=_si(""))
    base = alt.Chart()
    front = base.transform_filter("datum.queries_per_s >= datum.best")
    line = front.mark_line(interpolate="step-after", strokeDash=[4, 3], opacity=0.7, color="#7b8088").encode(x=x, y=y)
    name = front.mark_text(align="left", dx=9, dy=-6, fontSize=11).encode(x=x, y=y, text="backend:N")
    points = _points(base, looks).encode(x=x, y=y, tooltip=_tooltip())
    chart = _facet(alt.layer(line, points, name), height=230)
    return (
        chart.transform_filter(f"{IS_RANKED} && datum.error != null")
        .transform_calculate(error_shown=f"max(datum.error, {LEAST_ERROR})")
        .transform_window(
            best="max(queries_per_s)",
            frame=[None, 0],
            groupby=["panel"],
            sort=[
                alt.SortField("error_shown", order="ascending"),
                alt.SortField("queries_per_s", order="descending"),
            ],
        )
    )


def roofline(looks: Looks) -> Chart:
    """Return rates against arithmetic intensity, under the ceilings of the machine."""
    x = alt.X("intensity:Q", title="features of pairs for a byte", scale=_log(), axis=_si(""))
    y = alt.Y("rate:Q", title="features of pairs a second", scale=_log(), axis=_si(""))
    roofs = alt.Chart(alt.NamedData(ROOFS))
    lines = roofs.mark_line(strokeWidth=1.5, color="#7b8088").encode(x=x, y=y, detail="roof:N")
    names = roofs.transform_filter("datum.is_ridge").mark_text(align="left", dx=4, dy=-7, fontSize=11)
    points = _points(alt.Chart().transform_filter(f"{IS_RANKED} && datum.limit_rate"), looks)
    points = points.encode(x=x, y=y, tooltip=_tooltip())
    return _alone(alt.layer(lines, names.encode(x=x, y=y, text="roof:N"), points), width=640, height=360)


def scaling(looks: Looks) -> Chart:
    """Return the time for all queries against one size of the case; the fastest at each is ringed."""
    base = alt.Chart()
    x = alt.X("x:Q", title=None, scale=_log(), axis=_si(""))
    y = alt.Y("total_s:Q", title="time for all queries", scale=_log(), axis=_si("s"))
    lines = base.mark_line(opacity=0.6).encode(x=x, y=y, color=_colour(looks), detail="backend:N")
    points = _points(base, looks).encode(x=x, y=y, tooltip=_tooltip())
    rings = (
        base.transform_filter("datum.rank == 1")
        .mark_point(shape="circle", size=230, color="#7b8088", strokeWidth=1.5)
        .encode(x=x, y=y)
    )
    return _facet(alt.layer(lines, rings, points), height=240, below=72, x="independent").transform_filter(IS_RANKED)


def phases(looks: Looks) -> Chart:
    """Return what passes before the first answer, stacked; of a device, the copies of one call too.

    The calls themselves are not among them: slow backends are measured on fewer rows, so that calls do not compare.
    """
    fields = {f"{name.replace(' ', '_')}_s": name for name in PHASE_COLOURS}
    y = alt.Y("backend:N", sort=alt.EncodingSortField("start_s", op="min", order="ascending"), title=None)
    bars = (
        alt.Chart()
        .mark_bar(height=13)
        .encode(
            y=y,
            x=alt.X("seconds:Q", title="seconds", stack="zero"),
            color=alt.Color(
                "phase:N",
                title=None,
                scale=alt.Scale(domain=list(PHASE_COLOURS), range=list(PHASE_COLOURS.values())),
                legend=alt.Legend(orient="top", columns=3, symbolLimit=0),
            ),
            order=alt.Order("phase_order:Q"),
            tooltip=["backend:N", "phase:N", alt.Tooltip("seconds:Q", format=".3~s"), "panel:N"],
        )
    )
    return (
        _facet(alt.layer(bars), step=21, beside=115, y="independent")
        .transform_filter("datum.call_s != null")
        .transform_calculate(start_s=" + ".join(f"(datum.{field} || 0)" for field in fields))
        .transform_fold(list(fields), as_=["field", "seconds"])
        .transform_calculate(
            phase=f"({json.dumps(fields)})[datum.field]",
            phase_order=f"indexof({json.dumps(list(fields))}, datum.field)",
        )
        .transform_filter("datum.seconds > 0")
    )


def memory(looks: Looks) -> Chart:
    """Return the most memory that the timed calls held."""
    y = alt.Y("backend:N", sort=alt.EncodingSortField("peak_mb", op="min", order="ascending"), title=None)
    x = alt.X(
        "peak_mb:Q", title="MB, beyond what was held before", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False)
    )
    base = alt.Chart()
    bars = base.mark_bar(height=11).encode(y=y, x=x, color=_colour(looks, legend=False), tooltip=_tooltip())
    text = base.mark_text(align="right", dx=50, fontSize=11).encode(y=y, x=alt.value("width"), text="peak:N")
    return (
        _facet(alt.layer(bars, text), step=21, beside=155, y="independent")
        .transform_filter("datum.peak_bytes != null && datum.call_s != null")
        .transform_calculate(peak_mb="datum.peak_bytes / 1e6")
        .transform_calculate(peak="datum.peak_mb < 1 ? '< 1' : format(datum.peak_mb, ',.0f')")
    )


def comparison(looks: Looks) -> Chart:
    """Return the ratios of two runs with their intervals and verdicts."""
    y = alt.Y("cell:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
    names = list(VERDICT_LOOKS)
    verdict = {
        "color": alt.Color(
            "verdict:N",
            title=None,
            scale=alt.Scale(domain=names, range=[colour for colour, _ in VERDICT_LOOKS.values()]),
            legend=alt.Legend(orient="top"),
        ),
        "shape": alt.Shape(
            "verdict:N", title=None, scale=alt.Scale(domain=names, range=[shape for _, shape in VERDICT_LOOKS.values()])
        ),
    }
    x = alt.X("ratio:Q", title="B / A; right of 1, B is slower", scale=alt.Scale(type="log", nice=False, padding=16))
    base = alt.Chart().transform_filter("datum.ratio != null")
    one = base.mark_rule(strokeDash=[3, 3], color="#7b8088").encode(x=alt.datum(1))
    interval = base.transform_filter("datum.low != null").mark_rule(strokeWidth=3, opacity=0.45)
    interval = interval.encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=verdict["color"])
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        y=y,
        x=x,
        **verdict,
        tooltip=["cell:N", "verdict:N", alt.Tooltip("ratio:Q", format=".3f"), "p:Q"],
    )
    return _alone(alt.layer(one, interval, points), width=520, height=alt.Step(19))


def choices(looks: Looks) -> Chart:
    """Return the fastest backend over shapes; a ring where another was chosen, as large as its regret."""
    x = alt.X("pairs:Q", title="pairs of a query and a corpus row", scale=_log(), axis=_si(""))
    y = alt.Y("n_features:Q", title="features", scale=_log(), axis=_si(""))
    base = alt.Chart()
    tooltip = [
        alt.Tooltip("shape:N"),
        alt.Tooltip("metric:N"),
        alt.Tooltip("backend:N", title="fastest"),
        alt.Tooltip("chosen:N"),
        alt.Tooltip("regret:Q", format=".3f"),
    ]
    points = _points(base, looks).encode(x=x, y=y, tooltip=tooltip)
    rings = (
        base.transform_filter("datum.regret > 1.02")
        .mark_point(shape="circle", color="#d5473d", strokeWidth=1.5)
        .encode(
            x=x,
            y=y,
            size=alt.Size(
                "regret:Q",
                title="regret of another choice",
                legend=alt.Legend(orient="bottom", values=[1.1, 1.5, 2, 4]),
                scale=alt.Scale(domain=[1, 4], range=[180, 900], clamp=True),
            ),
        )
    )
    return _facet(alt.layer(rings, points), height=260)


def accuracy_by_k(looks: Looks) -> Chart:
    """Return the share of right labels of the nearest-neighbour classifier, by k."""
    colours = alt.Scale(range=list(COLOURS.values()))
    base = alt.Chart().encode(
        x=alt.X("k:O", title="k", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("accuracy:Q", title="right labels", scale=alt.Scale(zero=False), axis=alt.Axis(format=".1%")),
        color=alt.Color("metric:N", scale=colours, legend=None),
        tooltip=["metric:N", "k:O", alt.Tooltip("accuracy:Q", format=".2%")],
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(shape=alt.Shape("metric:N", legend=None))
    ends = base.transform_joinaggregate(last="max(k)").transform_filter("datum.k == datum.last")
    names = ends.mark_text(align="left", dx=10, fontSize=11).encode(text="metric:N")
    return _alone(alt.layer(base.mark_line(opacity=0.7), points, names), width=420, height=240)


def loss_curves(looks: Looks) -> Chart:
    """Return the best loss of the random search, by iteration."""
    legend = alt.Legend(orient="top")
    chart = (
        alt.Chart()
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X("iteration:Q", title="iteration"),
            y=alt.Y("loss:Q", title="mean loss", scale=alt.Scale(type="log", nice=False)),
            color=alt.Color("seed:N", title=None, legend=legend, scale=alt.Scale(range=list(COLOURS.values()))),
            strokeDash=alt.StrokeDash("seed:N", title=None, legend=legend),
            tooltip=["seed:N", "iteration:Q", alt.Tooltip("loss:Q", format=".4f")],
        )
    )
    return _alone(chart, width=420, height=240)


CHARTS = {
    chart.__name__: chart
    for chart in (
        ranking,
        accuracy,
        roofline,
        scaling,
        phases,
        memory,
        comparison,
        choices,
        accuracy_by_k,
        loss_curves,
    )
}
"""Each chart by its name: a function of the looks of the backends."""


def theme(mode: str) -> dict[str, Any]:
    """Return the configuration of Vega-Lite for ``"light"`` or ``"dark"``."""
    text, faint, grid = {"light": ("#1c2430", "#515b69", "#e3e7ec"), "dark": ("#e8ecf1", "#a9b3c0", "#2c343e")}[mode]
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
    return {
        "background": "transparent" if mode == "dark" else "#ffffff",
        "font": font,
        "view": {"stroke": None},
        "axis": {
            "labelColor": faint, "titleColor": faint, "gridColor": grid, "domainColor": grid, "tickColor": grid,
            "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelLimit": 140,
            "labelOverlap": True,
        },
        "axisY": {"labelColor": text},
        "header": {"labelColor": text, "labelFontSize": 12, "labelFontWeight": "bold", "labelAnchor": "start",
                   "labelLimit": 360, "title": None},
        "legend": {"labelColor": text, "titleColor": faint, "labelFontSize": 11, "titleFontSize": 11},
        "text": {"color": text},
        "title": {"color": text, "anchor": "start", "fontSize": 15, "subtitleColor": faint, "offset": 14},
    }  # fmt: skip


def _alone(chart: Chart, *, width: int, height: Any) -> Chart:
    return chart.properties(width=width, height=height, data=alt.NamedData(DATA))


def _log() -> alt.Scale:
    return alt.Scale(type="log", nice=False, padding=12)


def _si(unit: str) -> alt.Axis:
    """Return a logarithmic axis whose labels have the prefixes of units; below 1 only where there is a unit."""
    number = "format(datum.value, '~s')" if unit else "format(datum.value, datum.value < 1 ? '~r' : '~s')"
    return alt.Axis(
        labelExpr=f"{_IS_LABELLED} ? {number} + '{unit}' : ''",
        labelOverlap="greedy",
        tickCount=3,  # from so many decades on, decades only
        gridOpacity=alt.condition(_IS_DECADE, alt.value(1), alt.value(0)),
        tickOpacity=alt.condition(_IS_LABELLED, alt.value(1), alt.value(0)),
    )


def _colour(looks: Looks, *, legend: bool = True) -> alt.Color:
    scale = alt.Scale(domain=list(looks), range=[look.colour for look in looks.values()])
    return alt.Color(
        "backend:N", title=None, scale=scale, legend=alt.Legend(orient="top", columns=5) if legend else None
    )


def _points(base: Chart, looks: Looks, *, legend: bool = True) -> Chart:
    """Return the points of backends, with their looks."""
    scale = alt.Scale(domain=list(looks), range=[look.shape for look in looks.values()])
    colour = _colour(looks, legend=legend)
    return base.mark_point(filled=True, size=85, opacity=1, strokeWidth=1.7).encode(
        color=colour,
        stroke=alt.Stroke("backend:N", scale=colour["scale"], legend=None),
        shape=alt.Shape("backend:N", title=None, scale=scale, legend=colour["legend"]),
        fillOpacity=alt.condition("datum.filled", alt.value(1), alt.value(0.1)),
    )


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("backend:N"),
        alt.Tooltip("panel:N", title="case"),
        alt.Tooltip("query_s:Q", title="s a query", format=".4~g"),
        alt.Tooltip("queries_per_s:Q", title="queries/s", format=",.4~r"),
        alt.Tooltip("ratio:Q", title="ratio", format=".3~g"),
        alt.Tooltip("error:Q", format=".1e"),
        alt.Tooltip("limit_share:Q", title="of the limit", format=".1%"),
        alt.Tooltip("bound:N", title="limit"),
        alt.Tooltip("peak_bytes:Q", title="peak bytes", format=",.3~s"),
    ]


def _facet(layers: Chart, *, step: int = 0, height: int = 0, beside: int = 28, below: int = 50, **scales: str) -> Chart:
    """Return a chart of small multiples, one for each panel, in the order of the rows.

    What transforms the rows belongs on the result: in a layer it would come after the rows are split into panels, so
    that empty panels stay and heights are those of all rows. Panels stand in line, `beside` and `below` pixels apart,
    which labels and text between them must fit.
    """
    sized = layers.properties(width=280, height=alt.Step(step) if step else height)
    order = alt.EncodingSortField("panel_order", op="min", order="ascending")
    header = alt.Header(labelExpr="split(datum.label, '\\n')")  # long titles come in lines
    facet = alt.Facet("panel:N", title=None, sort=order, header=header)
    chart = sized.facet(
        facet=facet, columns=3, data=alt.NamedData(DATA), spacing={"column": beside, "row": below}, bounds="flush"
    )
    return chart.resolve_scale(**scales) if scales else chart
