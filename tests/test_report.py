"""What a report says of records, before anything is drawn: panels, summaries, values, pictures, commands."""

import base64
import csv
import io
import itertools
import json
import math
import re
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from knnbench import cli_report, datasets
from knnbench.backends import registry
from knnbench.classifiers import KNNClassifier
from knnbench.errors import InvalidInputError, MissingLibraryError
from knnbench.measure import comparison
from knnbench.measure.comparison import indistinguishable
from knnbench.report import appearance, classifiers, page, picture
from knnbench.report.appearance import BACKGROUNDS, COLOURS, look_of
from knnbench.report.bars import bars_tables
from knnbench.report.choices import choice_rows, read_outcomes
from knnbench.report.export import COLUMNS, csv_text, html_text, markdown_text
from knnbench.report.page import build_page
from knnbench.report.picture import PICTURES, chart_of, save_picture
from knnbench.report.rows import roof_rows, rows_of, scaling_groups, scaling_rows
from knnbench.report.summaries import Summary, current_panels, default_baseline, panels_of, titles_of
from knnbench.report.table import case_table
from knnbench.results import Results, append_record, parse_records, read_records
from tests.generated_records import HOSTILE, MACHINE, made, many
from tests.test_cli import invoke as invoke  # the fixture
from tests.test_results import VERSION_1

LATER = {"run": "20261127T100000-bbbbbb", "started": "2026-11-27T10:00:00+00:00"}
SPEEDS = {"numba": 0.001, "numpy": 0.004, "torch": 0.00405, "faiss": 0.02}
ONE_CASE = [made(backend, seconds=seconds, n=25) for backend, seconds in SPEEDS.items()]


def only_panel(records):
    (panel,) = panels_of(records)
    return panel


def cell_of(panel, backend):
    return next(cell for cell in panel.cells if cell.backend == backend)


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.jsonl"
    for record in ONE_CASE:
        append_record(path, record)
    return path


# Panels


def test_a_panel_ranks_what_is_ok_and_keeps_the_rest():
    gone = replace(made("scipy"), status="crashed", reason="signal 11", phases={})
    wrong = replace(made("sklearn", seconds=0.0001), status="wrong", reason="error 0.3")
    panel = only_panel([*reversed(ONE_CASE), gone, wrong])
    assert [(cell.backend, cell.rank) for cell in panel.cells] == [
        ("numba", 1), ("numpy", 2), ("torch", 3), ("faiss", 4), ("scipy", None), ("sklearn", None),
    ]  # fmt: skip
    assert (cell_of(panel, "scipy").reason, cell_of(panel, "scipy").query_s) == ("signal 11", None)
    assert not cell_of(panel, "sklearn").is_fastest


def test_a_summary_is_of_the_whole_case_where_a_part_was_measured():
    record = made(times=[0.2, 0.4, 0.6], n_queries=1000, n_corpus=60_000, measured_queries=10, measured_corpus=2000)
    cell = only_panel([record]).cells[0]
    assert cell.query_s == pytest.approx(0.4 / 10 * 30)
    assert (cell.low_s, cell.high_s) == pytest.approx((0.2 / 10 * 30, 0.6 / 10 * 30))
    assert cell.queries_per_s == pytest.approx(1 / cell.query_s)
    assert cell.rate == pytest.approx(10 * 2000 * 64 / 0.4)
    assert cell.limit_share == record.fraction_of_floor
    assert cell.limit_rate * cell.limit_share == pytest.approx(cell.rate)


def test_arithmetic_intensity_counts_each_byte_once():
    record = made(k=3, n_features=64, measured_queries=100, measured_corpus=1000)
    moved = (100 + 1000) * 64 * 4 + 100 * 3 * (8 + 4)
    assert only_panel([record]).cells[0].intensity == pytest.approx(100 * 1000 * 64 / moved)
    every = replace(record, op="pairwise", k=None, dtype="float64")
    moved = (100 + 1000) * 64 * 8 + 100 * 1000 * 8
    assert only_panel([every]).cells[0].intensity == pytest.approx(100 * 1000 * 64 / moved)


def test_runs_machines_and_threads_are_panels_of_their_own():
    other_machine = {**MACHINE, "cpu": "Intel Xeon"}
    records = [made(), made(threads=1), made(machine=other_machine), made(**LATER), made(metric="cosine")]
    panels = panels_of(records)
    assert len(panels) == 5
    assert [panel.is_current for panel in panels].count(False) == 1
    assert len(set(titles_of(panels)[1])) == 5
    newest = current_panels(panels)
    assert {panel.run for panel in newest if panel.metric == "cityblock" and panel.threads == 2} == {
        LATER["run"], records[0].run,
    }  # fmt: skip


def test_of_runs_of_one_second_the_last_is_the_newest():
    first, second = made(run="a"), made(run="b", seed=1)
    panels = panels_of([first, second])
    assert {panel.run: panel.is_current for panel in panels} == {"a": False, "b": True}
    assert len(set(titles_of(panels)[1])) == 2


def test_a_later_run_of_fewer_backends_hides_nothing():
    later = [made("numba", seed=1, **LATER)]
    panels = panels_of([*ONE_CASE, *later])
    assert [(len(panel.cells), panel.is_current) for panel in panels] == [(1, True), (4, True)]
    panels = panels_of([*ONE_CASE, *later, *(replace(record, run="c", started="2026-11-28") for record in ONE_CASE)])
    assert [panel.is_current for panel in panels] == [True, False, False]
    nothing = replace(made("numba", **LATER), status="crashed", phases={})
    assert all(panel.is_current for panel in panels_of([*ONE_CASE, nothing]))


def test_titles_say_what_differs_and_only_that():
    panels = panels_of([made(), made(metric="cosine", dtype="uint8")])
    shared, titles = titles_of(panels)
    assert titles == ["cityblock, float32", "cosine, uint8"]
    assert shared == "knn, digits, 100 x 1,000 x 64, k=3, 2 threads, AMD EPYC 9B14, 2026-11-26 10:00:00"
    assert titles_of([]) == ("", [])


def test_groups_and_noise_are_those_of_the_comparison():
    twin = replace(ONE_CASE[1], twin=True, phases={"call": [1.3 * time for time in ONE_CASE[1].times_s]})
    for records in (ONE_CASE, [*ONE_CASE, twin]):
        panel = only_panel(records)
        assert {cell.backend for cell in panel.cells if cell.is_fastest} == indistinguishable(records)
        assert panel.noise == comparison.noise(records)
    assert {cell.backend for cell in only_panel(ONE_CASE[1:]).cells if cell.is_fastest} == {"numpy", "torch"}


@pytest.mark.parametrize("seed", range(12))
def test_what_is_clearly_apart_is_what_resampling_finds(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    records = [
        made(f"b{number}", 0.01 * np.exp(rng.uniform(0, 1) + 0.05 * rng.standard_normal(rng.integers(2, 30))))
        for number in range(6)
    ]
    quick = indistinguishable(records)
    monkeypatch.setattr(comparison, "_are_clearly_apart", lambda *_: False)
    assert quick == indistinguishable(records)


def test_adversarial_data_are_said_to_be():
    assert only_panel([made(dataset="synthetic:far")]).is_adversarial
    assert not only_panel([made(dataset="synthetic:clusters")]).is_adversarial
    assert not only_panel([made(dataset="digits")]).is_adversarial
    _, titles = titles_of(panels_of([made(dataset="synthetic:far"), made(dataset="digits")]))
    assert titles == ["cityblock, float32, digits", "cityblock, float32, synthetic:far (adversarial)"]


def test_the_baseline_is_numpy_where_it_was_measured():
    assert default_baseline(panels_of(ONE_CASE)) == "numpy"
    assert default_baseline(panels_of([made("mine")])) == "mine"
    assert default_baseline(panels_of([replace(made("mine"), status="wrong")])) == ""
    rows = {row["backend"]: row["ratio"] for row in rows_of(panels_of(ONE_CASE), "faiss")}
    assert rows["faiss"] == 1
    assert rows["numba"] == pytest.approx(ONE_CASE[3].median_s / ONE_CASE[0].median_s)


# Roofline and scaling


def test_the_roofline_meets_memory_where_a_ceiling_begins():
    rows = roof_rows(panels_of([made("numpy"), made("numba", bound="fma-float32", floor_s=0.001)]))
    lines = {}
    for row in rows:
        lines.setdefault(row["roof"], []).append((row["intensity"], row["rate"], row["is_ridge"]))
    assert lines.keys() == {"add-float32", "fma-float32"}
    for points in lines.values():
        (ridge,) = [(intensity, rate) for intensity, rate, is_ridge in points if is_ridge]
        assert ridge[1] == pytest.approx(2e10 * ridge[0])
    low = lines["fma-float32"][0]
    assert low[1] == pytest.approx(2e10 * low[0])
    assert lines["fma-float32"][-1][1] == pytest.approx(6.4e6 / 0.001)


def test_ceilings_that_are_nearly_equal_are_one_line():
    rows = roof_rows(panels_of([made("numpy", floor_s=0.001), made("numba", bound="fma-float32", floor_s=0.00101)]))
    assert {row["roof"] for row in rows} == {"add-float32, fma-float32"}
    assert roof_rows(panels_of([made(ceilings={})])) == []


def test_scaling_follows_one_size_at_a_time():
    records = [
        made(backend, seconds=seconds * n, n_corpus=n, measured_corpus=n)
        for backend, seconds in (("numpy", 1e-6), ("numba", 2e-6))
        for n in (1000, 10_000)
    ]
    records += [made("numpy", n_features=128, n_corpus=500, measured_corpus=500), made("numpy", threads=1)]
    groups = {group["axis"]: group for group in scaling_groups(panels_of(records))}
    assert groups.keys() == {"n_corpus", "threads"}
    assert groups["n_corpus"]["title"] == "knn, cityblock, float32, digits, 100 x any x 64, k=3"
    rows = scaling_rows(panels_of(records), "n_corpus")
    assert [(row["backend"], row["x"]) for row in rows] == [
        ("numpy", 1000), ("numba", 1000), ("numpy", 10_000), ("numba", 10_000),
    ]  # fmt: skip
    assert rows[0]["total_s"] == pytest.approx(1e-3, rel=0.1)


# How backends look


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_as_defined():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colour", COLOURS.values())
def test_colours_stand_out_on_both_backgrounds(colour):
    assert min(contrast(colour, background) for background in BACKGROUNDS.values()) >= 3


def test_no_two_backends_look_the_same_and_peers_are_hollow():
    known = [name for name in registry() if name in appearance._LOOKS]
    assert appearance._LOOKS.keys() <= registry().keys()
    assert {line for line in registry() if registry()[line].peer and line in known} == {
        name for name in known if not look_of(name).filled
    }
    for one, other in itertools.combinations(known, 2):
        assert (look_of(one).shape, look_of(one).filled) != (look_of(other).shape, look_of(other).filled) or look_of(
            one
        ).colour != look_of(other).colour
    assert look_of("theirs", peer=True).filled is False
    assert look_of("\udc80")


# Values


def test_csv_has_every_field_with_all_digits():
    panels = panels_of([*ONE_CASE, made(HOSTILE, metric="cosine")])
    rows = list(csv.DictReader(io.StringIO(csv_text(panels))))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 5
    (row,) = [row for row in rows if row["backend"] == "numba"]
    assert float(row["query_s"]) == cell_of(panels[0], "numba").query_s
    assert set(Summary.names()) < set(COLUMNS)
    assert f"'{HOSTILE}" in [row["backend"] for row in rows], "a spreadsheet would run it"


def test_markdown_is_one_table_with_the_fastest_bold():
    text = markdown_text(panels_of([*ONE_CASE, made("a|b`c", seconds=0.05)]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| backend | cityblock, float32 |"
    assert lines[2].startswith("| numba | **")
    assert sum("**" in line for line in lines) == 1
    assert [line.replace(r"\|", "").count("|") for line in lines] == [3] * len(lines)
    assert "as fast as numpy" in text


def test_html_for_notebooks_escapes_names():
    text = Results([*ONE_CASE, made(HOSTILE)])._repr_html_()
    assert text.startswith("<table>")
    assert "<script" not in text
    assert "<b>" in text
    assert html_text([]).startswith("<table>")


def test_a_data_frame_has_a_row_for_each_cell(monkeypatch):
    pytest.importorskip("pandas")
    frame = Results([*ONE_CASE, made("scipy", status="absent", phases={})]).to_frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame.set_index("backend").query_s["numba"] == only_panel(ONE_CASE).cells[0].query_s
    assert math.isnan(frame.set_index("backend").query_s["scipy"])
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match="pip install pandas"):
        Results(ONE_CASE).to_frame()


# Pictures


def wide_records():
    return [
        made(backend, seconds=seconds * n, n_corpus=n, measured_corpus=n)
        for backend, seconds in (("numpy", 1e-6), ("numba", 2e-6))
        for n in (1000, 10_000)
    ]


@pytest.mark.parametrize("name", PICTURES)
def test_every_chart_is_a_picture_without_a_browser(tmp_path, name):
    pytest.importorskip("vl_convert")
    path = tmp_path / f"{name}.svg"
    save_picture(chart_of(panels_of(wide_records()), name), path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "numba" in text
    assert text.count("<path") > 5


def test_pictures_are_png_and_pdf_too_and_nothing_else(tmp_path):
    pytest.importorskip("vl_convert")
    chart = Results(wide_records()).plot("scaling:n_corpus", mode="dark")
    for suffix, beginning in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / f"a.{suffix}"
        save_picture(chart, path)
        assert path.read_bytes().startswith(beginning)
    with pytest.raises(InvalidInputError, match=r"ends in \.svg, \.png, \.pdf"):
        save_picture(chart, tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pie", "chart 'pie' is unknown; expected one of: ranking"),
        ("scaling:colour", "chart 'scaling:colour' is unknown"),
        ("ranking:k", "chart 'ranking:k' is unknown"),
        ("scaling", "the records have nothing for the chart 'scaling'"),
        ("scaling:k", "the records have nothing for the chart 'scaling:k'"),
    ],
)
def test_charts_that_cannot_be_made_say_why(name, text):
    pytest.importorskip("altair")
    with pytest.raises(InvalidInputError, match=re.escape(text)):
        chart_of(panels_of(ONE_CASE), name)


def test_without_the_libraries_of_charts_the_error_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'knnbench\[report\]'"):
        chart_of(panels_of(ONE_CASE))
    with pytest.raises(MissingLibraryError, match=r"pip install 'knnbench\[report\]'"):
        picture.load_page_builder()
    with pytest.raises(MissingLibraryError, match=r"pip install 'knnbench\[report\]'"):
        save_picture(None, tmp_path / "a.svg")


# The page, as text; tests/test_report_page.py opens it


def data_of(text):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def needs_report():
    for name in ("altair", "vl_convert"):
        pytest.importorskip(name)


def test_5000_records_make_a_page_below_3_mb(needs_report):
    records = many(5000)
    text = build_page(records)
    library = page._library()
    assert library in text
    assert len(text.encode()) - len(library.encode()) < 3_000_000
    cells = data_of(text)["cells"]
    assert len(cells["query_s"]) == sum(not record.twin for record in records)
    assert "samples" not in cells


def test_hostile_names_stay_inside_the_data(needs_report):
    records = [made(HOSTILE, metric=HOSTILE, dataset=HOSTILE, reason=HOSTILE)]
    text = build_page(records, title=HOSTILE, sources=[HOSTILE])
    plain = build_page([made("numpy")], title="t", sources=["s"])
    for mark in ("<script", "</script", "<img", "<!--"):
        assert text.count(mark) == plain.count(mark), mark
    (name,) = data_of(text)["cells"]["backend"]["values"]
    assert name == HOSTILE


def test_what_is_not_finite_is_left_out_of_the_page(needs_report):
    data = data_of(build_page([made(error=math.inf, recall=math.nan, floor_s=0.0)]))
    assert data["cells"]["error"] == [None]
    assert data["cells"]["recall"] == [None]


def test_no_records_make_no_page(needs_report):
    with pytest.raises(InvalidInputError, match="no records"):
        build_page([])
    with pytest.raises(InvalidInputError, match="'nope' is in no record; expected one of: faiss, numba, numpy, torch"):
        build_page(ONE_CASE, baseline="nope")


def test_a_page_of_nothing_but_failures_is_a_page(needs_report):
    data = data_of(build_page([replace(made(), status="crashed", reason="signal 9", phases={}, measured_corpus=0)]))
    assert data["baseline"] == ""
    assert data["cells"]["rank"] == [None]


def test_records_of_version_1_make_a_page(needs_report):
    (record,) = parse_records([json.dumps(VERSION_1)], "a file")
    assert data_of(build_page([record]))["panels"][0]["metric"] == "cityblock"


# Files that are not what they should be


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backend": ["numpy"]}, "backend is ['numpy']; expected str"),
        ({"n_queries": "100"}, "n_queries is '100'; expected int"),
        ({"n_queries": True}, "n_queries is True; expected int"),
        ({"n_corpus": -1}, "n_corpus is -1; expected a number from 0 to"),
        ({"n_features": 10**400}, "n_features is 1000"),
        ({"phases": {"call": [10**400]}}, "phases['call'] is [1000"),
        ({"phases": {"call": ["1"]}}, "phases['call'] is ['1']; expected a list of seconds"),
        ({"phases": {"call": 1.0}}, "phases['call'] is 1.0"),
        ({"phases": {"call": [-1.0]}}, "phases['call'] is [-1.0]"),
        ({"ceilings": {"read": "fast"}}, "ceilings is {'read': 'fast'}"),
        ({"machine": {"gpus": ["H100"]}}, "machine['gpus'] is ['H100']; expected a list of objects"),
        ({"machine": []}, "machine is []; expected dict"),
        ({"error": "small"}, "error is 'small'"),
    ],
)
def test_values_that_no_measurement_has_are_refused_by_line(tmp_path, changes, text):
    path = tmp_path / "bad.jsonl"
    data = {**json.loads(made().to_json()), **changes}
    path.write_text(made().to_json() + "\n" + json.dumps(data) + "\n")
    with pytest.raises(InvalidInputError, match=re.escape(f"line 2 is not a knnbench record: {text}")):
        read_records(path)


def test_whole_numbers_pass_for_numbers(tmp_path):
    path = tmp_path / "whole.jsonl"
    path.write_text(json.dumps({**json.loads(made().to_json()), "error": 0}) + "\n")
    (record,) = read_records(path)
    assert record.error == 0


def test_a_time_of_0_that_counts_for_nothing_is_left_out():
    (cell,) = only_panel([made(times=[0.0], status="wrong", reason="error 1")]).cells
    assert (cell.query_s, cell.rank, cell.limit_share) == (None, None, None)


def test_times_without_rows_are_refused():
    with pytest.raises(InvalidInputError, match=r"expected times and sizes above 0"):
        panels_of([made(measured_queries=0)])


# The command line


def test_the_page_is_made_by_a_command(invoke, results, tmp_path, needs_report):
    code, shown, _ = invoke("report", str(results))
    assert code == 0
    assert "4 records in report.html" in shown
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert len(data_of(text)["cells"]["rank"]) == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("suffix", ["csv", "md", "svg"])
def test_the_suffix_says_what_is_made(invoke, results, tmp_path, suffix, needs_report):
    code, _, _ = invoke("report", str(results), "-o", f"x.{suffix}")
    assert code == 0
    assert "numba" in (tmp_path / f"x.{suffix}").read_text(encoding="utf-8")


def test_two_files_stand_side_by_side(invoke, results, tmp_path, needs_report):
    other = tmp_path / "after.jsonl"
    for record in ONE_CASE:
        slower = [3 * time for time in record.times_s]
        append_record(other, replace(record, commit="ba9876543210", **LATER, phases={"call": slower}))
    code, _, _ = invoke("report", str(results), str(other))
    assert code == 0
    data = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {row["verdict"] for row in data["comparison"]["rows"]} == {"slower"}
    assert all(row["ratio"] == pytest.approx(3, rel=1e-3) for row in data["comparison"]["rows"])
    code, _, _ = invoke("report", str(results), "--compare", "backend=numpy", "backend=numba")
    assert code == 0
    (row,) = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))["comparison"]["rows"]
    assert row["verdict"] == "faster"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "holds no records; `knnbench run -o"),
        ("nonsense\n", "line 1 is not a knnbench record: not JSON"),
        ('{"schema": 99}\n', "schema version 99; this knnbench knows versions up to"),
        ('{"op": "knn", "schema": 2}\n', "line 1 is not a knnbench record"),
    ],
)
def test_files_of_something_else_are_refused(invoke, tmp_path, content, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    for command in ("report", "show"):
        code, _, errors = invoke(command, str(path))
        assert code == 2
        assert text in errors
    assert not (tmp_path / "report.html").exists()


def test_what_a_crash_cut_short_is_left_out(invoke, results, tmp_path, needs_report):
    results.write_bytes(results.read_bytes()[:-40])
    code, shown, _ = invoke("report", str(results))
    assert code == 0
    assert "3 records" in shown


def test_bad_arguments_of_report(invoke, results):
    for arguments, text in (
        (["nowhere.jsonl"], "nowhere.jsonl: No such file"),
        ([str(results), "-o", "x.gif"], "x.gif ends in '.gif'; expected one of: .html, .csv, .md, .svg"),
        ([str(results), "-o", "no/such/folder/x.csv"], "cannot be written"),
        ([str(results), "--baseline", "nope"], "the baseline 'nope' is in no record"),
        ([str(results), "--chart", "pie", "-o", "x.svg"], "chart 'pie' is unknown"),
        ([str(results), "--regret", "none.jsonl"], "none.jsonl: No such file"),
    ):
        code, _, errors = invoke("report", *arguments)
        assert (code, text in errors) == (2, True), (arguments, errors)


def test_show_prints_tables_and_bars(invoke, results, monkeypatch):
    monkeypatch.setattr(cli_report.out, "_width", 200)
    append_record(results, made("scipy", status="absent", reason="not installed", phases={}))
    append_record(results, made("numba", seconds=0.5, run="earlier", started="2026-11-01T00:00:00+00:00"))
    code, shown, _ = invoke("show", str(results))
    assert code == 0
    assert "ms/query" in shown
    assert "██████████ =" in shown
    assert "not installed" in shown
    assert shown.count("ms/query") == 1
    _, everything, _ = invoke("show", str(results), "--all")
    assert everything.count("ms/query") == 2
    _, bars, _ = invoke("show", str(results), "--bars")
    assert "ms/query" not in bars
    assert "numba" in bars


def test_show_tells_machines_apart(invoke, results, monkeypatch):
    monkeypatch.setattr(cli_report.out, "_width", 200)
    append_record(results, made("numba", seconds=0.5, machine={**MACHINE, "cpu": "Another CPU", "gpus": []}))
    _, shown, _ = invoke("show", str(results))
    tables = shown.split("ms/query")
    assert [name in tables[place] for place in (0, 1) for name in (MACHINE["cpu"], "Another CPU")] == [
        True, False, False, True
    ]  # fmt: skip


def test_a_run_ends_with_bars(invoke):
    code, shown, _ = invoke(
        "run", "--backends", "numpy,python", "--dataset", "digits", "--metrics", "cityblock", "--time", "0.2"
    )
    assert code == 0
    assert shown.rindex("██████████") > shown.rindex("ms/query")


def test_bars_are_as_long_as_a_backend_is_fast():
    def printed(records, **options):
        console = Console(width=120, file=io.StringIO(), highlight=False)
        for table in bars_tables(panels_of(records), 120, **options):
            console.print(table)
        return console.file.getvalue()

    times = {"numba": 0.01, "numpy": 0.02, "torch": 10.0}
    text = printed([made(name, [seconds] * 9) for name, seconds in times.items()], ascii_only=True)
    lengths = {name: re.search(rf"{name} +\S (#*)", text)[1].count("#") for name in times}
    assert lengths == {"numba": 10, "numpy": 5, "torch": 0}
    hostile = printed([made("a[red]\x1b[31m", [0.1] * 9), made("b", status="crashed", phases={})])
    assert "a[red]?[31m" in hostile
    console = Console(width=300, file=io.StringIO(), highlight=False)
    console.print(case_table([made("a[red]\x1b[31m", dataset="[bold]\x1b[31m", status="wrong", reason="[/]\x1b")]))
    shown = console.file.getvalue()
    assert "a[red]?[31m" in shown
    assert "[bold]?[31m" in shown
    assert "wrong: [/]?" in shown
    assert "crashed" in hostile


def test_bars_of_many_cases_are_several_tables():
    tables = bars_tables(panels_of(many(100)), 120)
    assert sum(len(table.columns) - 1 for table in tables) == len(panels_of(many(100)))
    assert max(len(table.columns) for table in tables) == 5


# The map of choices


OUTCOME = {
    "problem": {"op": "knn", "n_queries": 10, "n_corpus": 1000, "n_features": 16, "k": 3, "metric": "euclidean",
                "dtype": "float32", "data_on": "host"},
    "chosen": {"estimate": "numpy", "measure": "numba"},
    "alike": {"estimate": ["numpy"], "measure": ["numba"]},
    "times": {"numba": [1.0, 1.0], "numpy": [1.5, 1.5]},
}  # fmt: skip


def test_choices_are_shown_with_their_regret(tmp_path):
    path = tmp_path / "regret.jsonl"
    path.write_text(json.dumps(OUTCOME) + "\n")
    found = choice_rows(path)
    rows = {row["way"]: row for row in found["rows"]}
    assert rows["estimate"]["regret"] == pytest.approx(1.5)
    assert rows["measure"]["regret"] == 1
    assert {row["backend"] for row in rows.values()} == {"numba"}
    names = {summary["name"]: summary for summary in found["summaries"]}
    assert names["estimate"]["geometric_mean"] == pytest.approx(1.5)
    assert names["oracle"]["worst"] == 1


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"problem": {"op": "knn"}}', "[]", "1"])
def test_what_is_no_outcome_is_refused_by_line(tmp_path, line):
    path = tmp_path / "regret.jsonl"
    path.write_text(json.dumps(OUTCOME) + "\n" + line + "\n")
    with pytest.raises(InvalidInputError, match="line 2 is not what `knnbench regret --json` prints"):
        read_outcomes(path)
    path.write_text("")
    with pytest.raises(InvalidInputError, match="holds no outcomes"):
        read_outcomes(path)


# What is computed for the page


def test_what_the_classifiers_do_is_computed(monkeypatch):
    monkeypatch.setattr(classifiers, "ITERATIONS", 20)
    facts = classifiers.classifier_facts("digits", 200)
    digits = datasets.load("digits")
    score = (
        KNNClassifier(3, "euclidean")
        .fit(digits.X_train, digits.y_train)
        .score(digits.X_test[:200], digits.y_test[:200])
    )
    (row,) = [row for row in facts["accuracy_by_k"] if (row["metric"], row["k"]) == ("euclidean", 3)]
    assert row["accuracy"] == score
    for seed in {row["seed"] for row in facts["loss_curves"]}:
        losses = [row["loss"] for row in facts["loss_curves"] if row["seed"] == seed]
        assert losses == sorted(losses, reverse=True)
        assert len(losses) > 1
    for query in facts["neighbours"]:
        assert query["is_right"] == (query["label"] == query["predicted"])
        assert len(query["nearest"]) == classifiers.SHOWN_K
    assert {query["is_right"] for query in facts["neighbours"]} == {True, False}
    json.dumps(facts)


def test_an_image_is_a_png_of_its_pixels():
    content = base64.b64decode(classifiers.image_url(np.array([0, 4, 8, 16], np.uint8)).partition(",")[2])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    assert zlib.decompress(content[start + 4 : start + 4 + length]) == bytes([0, 0, 64, 0, 128, 255])
