"""The page in a real browser: it opens without an error, filters and sorts, and its numbers are the records'."""

import functools
import http.server
import itertools
import json
import re
import shutil
import threading
from dataclasses import replace

import pytest

from knnbench.measure.comparison import compare
from knnbench.report.choices import choice_rows
from knnbench.report.classifiers import classifier_facts
from knnbench.report.page import build_page
from knnbench.report.summaries import panels_of
from knnbench.results import STATUSES
from tests.conftest import REQUIRED
from tests.generated_records import HOSTILE, MACHINE, made

# Without a sandbox, because CI is root; and asking nothing of a network.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
# A page is drawn in a second or two, and on a machine that others keep busy in a minute.
PATIENCE_S = 200
DESKTOP, PHONE = (1280, 900), (360, 740)
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def missing(reason):
    if "chromium" in REQUIRED:
        pytest.fail(f"chromium is in $KNNBENCH_REQUIRE, and {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in programs:
        missing("chromium and chromedriver are not both installed: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        missing("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(PATIENCE_S)
    yield driver
    driver.quit()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the address at which this machine serves it."""
    folder = tmp_path_factory.mktemp("pages")
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def some_records():
    """Return two metrics and two dtypes on five backends, a second run of one of them, and cells of every status."""
    times = {"numba": 0.001, "numpy": 0.004, "faiss": 0.0041, "torch": 0.03, "python": 9.0}
    records = [
        made(backend, seconds=seconds, seed=place, metric=metric, dtype=dtype, n=25 if backend != "python" else 3)
        for place, (metric, dtype) in enumerate((m, d) for m in ("cityblock", "cosine") for d in ("uint8", "float32"))
        for backend, seconds in times.items()
    ]
    records = [replace(record, error=0.0) if record.dtype == "uint8" else record for record in records]
    records.append(made("numba", seconds=0.00101, seed=7, dtype="uint8", twin=True))
    gone = {
        "phases": {},
        "measured_queries": 0,
        "measured_corpus": 0,
        "error": None,
        "floor_s": None,
        "peak_bytes": None,
    }
    for number, status in enumerate(sorted(STATUSES.keys() - {"ok"})):
        records.append(made("sklearn", status=status, reason=f"because {number}", n_queries=101 + number, **gone))
        records.append(made("numpy", n_queries=101 + number, measured_queries=101 + number, seed=number))
    later = {"run": "20261127T100000-bbbbbb", "started": "2026-11-27T10:00:00+00:00", "commit": "ba9876543210"}
    records += [replace(record, **later) for record in records[:5]]
    return records


RECORDS = some_records()


@pytest.fixture(scope="module")
def page(browser, served):
    """Build a page of some records, unless it is there, and open it; return its file."""

    def call(records=RECORDS, *, size=DESKTOP, **options):
        folder, address = served
        is_plain = records is RECORDS and not options
        name = "plain.html" if is_plain else f"page-{len(list(folder.iterdir()))}.html"
        if not (is_plain and (folder / name).exists()):
            (folder / name).write_text(build_page(records, **options), encoding="utf-8")
        resize(browser, size)
        browser.get_log("browser")
        browser.get(f"{address}/{name}")
        drawn(browser)
        return folder / name

    return call


def resize(browser, size):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def drawn(browser):
    """Wait until every chart is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    ready = "return document.documentElement.dataset.drawn === 'all'"
    WebDriverWait(browser, PATIENCE_S, poll_frequency=0.05).until(lambda driver: driver.execute_script(ready))


def errors(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def table(browser, name):
    """Return a table as a dict for each row, of the text under each heading."""
    script = """
        const table = document.querySelector(`#table-${arguments[0]} table`);
        if (!table) return [];
        const names = [...table.querySelectorAll("thead th")].map((one) => one.innerText.replace(/ [▲▼]$/, "").trim());
        return [...table.querySelectorAll("tbody tr")].map((row) =>
            Object.fromEntries([...row.children].map((cell, place) => [names[place], cell.innerText.trim()])));
    """
    return run(browser, script, name)


def choose(browser, name, value):
    """Choose in a select, and wait."""
    script = """
        const select = document.getElementById(arguments[0]);
        select.value = arguments[1];
        select.dispatchEvent(new Event("change"));
    """
    run(browser, script, name, value)
    drawn(browser)


def seconds(text):
    number, unit = text.split()
    return float(number.replace(",", "")) * UNITS[unit]


def shown_panels(browser, chart):
    """Return the titles that a chart draws over its panels."""
    script = """
        return [...document.querySelectorAll(`#chart-${arguments[0]} svg .role-title text`)]
            .map((one) => one.textContent);
    """
    return sorted(set(run(browser, script, chart)))


def choices_file(folder):
    path = folder / "regret.jsonl"
    lines = []
    for number, n_features in enumerate((2, 16, 256)):
        problem = {"op": "knn", "n_queries": 10**number, "n_corpus": 1000, "n_features": n_features, "k": 3}
        problem |= {"metric": "euclidean", "dtype": ("float32", "uint8")[number % 2], "data_on": "host"}
        times = {"numba": [1.0, 1.0], "numpy": [0.5 + number, 0.5 + number]}
        lines.append({"problem": problem, "chosen": {"estimate": "numba"}, "alike": {"estimate": []}, "times": times})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_it_opens_without_an_error_and_draws_every_chart(browser, page, tmp_path):
    path = page(
        comparison=compare(RECORDS[:20], [replace(r, commit="x") for r in RECORDS[:20]]),
        choices=choice_rows(choices_file(tmp_path)),
        classifiers=classifier_facts("digits", 100),
    )
    for address in (browser.current_url, path.as_uri()):
        browser.get(address)
        drawn(browser)
        assert errors(browser) == []
        shown = run(
            browser,
            "return [...document.querySelectorAll('main section:not([hidden]) figure.chart')]"
            ".map((one) => [one.id, one.querySelectorAll('svg path, svg rect').length])",
        )
        marks = dict(shown)
        assert {f"chart-{name}" for name in ("ranking", "accuracy", "roofline", "scaling", "phases", "memory")} <= set(
            marks
        )
        assert {f"chart-{name}" for name in ("comparison", "choices", "accuracy_by_k", "loss_curves")} <= set(marks)
        pictures = run(browser, "return [...document.images].map((one) => [one.naturalWidth, one.alt])")
        assert {width for width, _ in pictures} == {8}
        assert all(re.match(r"query, a \d|neighbour \d, a \d, distance", alt) for _, alt in pictures)
        assert min(marks.values()) > 5, marks
    assert run(browser, "return performance.getEntriesByType('resource').map((one) => one.name)") == []


def test_its_numbers_are_the_records(browser, page):
    page()
    rows = table(browser, "cells")
    expected = [record for record in RECORDS if not record.twin]
    newest = {(record.case, record.backend): record for record in expected}  # what came later
    assert len(rows) == len(newest)
    seen = 0
    for row in rows:
        size = row["queries x corpus x features"].replace(",", "").replace(" ", "")
        (record,) = [
            record
            for record in newest.values()
            if record.backend == row["backend"].removesuffix(" (peer)")
            and (record.metric, record.dtype) == (row["metric"], row["dtype"])
            and f"{record.n_queries}x{record.n_corpus}x{record.n_features}" == size
        ]
        assert row["status"] == record.status
        assert row["reason"] == record.reason
        if record.status != "ok":
            assert row["time/query"] == ""
            continue
        seen += 1
        scale = record.n_corpus * record.n_features / record.pair_features
        low, high = record.interval_s
        for name, value in (("time/query", record.median_s), ("from", low), ("to", high)):
            assert seconds(row[name]) == pytest.approx(value * scale, rel=5.1e-3), name
        assert float(row["queries/s"].replace(",", "")) == pytest.approx(record.queries_per_s, rel=5.1e-3)
        assert float(row["error"]) == pytest.approx(record.error, rel=0.06)
        assert seconds(row["first call"]) == pytest.approx(record.phase_s("first_call"), rel=5.1e-3)
        assert float(row["peak MB"]) == round(record.peak_bytes / 1e6)
        assert int(row["calls"]) == len(record.times_s)
    assert seen > 25


def test_the_data_in_it_are_summaries_with_six_digits(browser, page):
    path = page()
    held = run(browser, "return JSON.parse(document.getElementById('data').textContent).cells")
    cells = [cell for panel in panels_of(RECORDS) for cell in panel.cells]
    for name in ("query_s", "low_s", "high_s", "queries_per_s", "limit_share", "error"):
        expected = [getattr(cell, name) for cell in cells]
        assert [value is None for value in held[name]] == [value is None for value in expected]
        for value, exact in zip(held[name], expected, strict=True):
            assert value is None or value == pytest.approx(exact, rel=1e-5), name
    sample = RECORDS[0].times_s[0]
    assert sample not in (RECORDS[0].median_s, *RECORDS[0].interval_s)
    data = path.read_text(encoding="utf-8").split('type="application/json">')[1].split("</script>")[0]
    assert f"{sample:.6g}" not in data


def test_filters_narrow_everything(browser, page):
    page()
    total = len(table(browser, "cells"))
    choose(browser, "filter-dtype", "uint8")
    rows = table(browser, "cells")
    assert 0 < len(rows) < total
    assert {row["dtype"] for row in rows} == {"uint8"}
    assert run(browser, "return document.getElementById('count').textContent").startswith(f"{len(rows)} of ")
    assert all("uint8" in title for title in shown_panels(browser, "ranking"))
    assert {row["case"].split(",")[1].strip() for row in table(browser, "glance")} == {"uint8"}
    choose(browser, "filter-metric", "cosine")
    assert {(row["metric"], row["dtype"]) for row in table(browser, "cells")} == {("cosine", "uint8")}
    run(browser, "document.querySelector('input[name=backend][value=numba]').click()")
    drawn(browser)
    names = {row["backend"] for row in table(browser, "cells")}
    assert names == {"numpy", "faiss (peer)", "torch", "python"}
    assert table(browser, "glance")[0]["fastest"].startswith("numpy")
    choose(browser, "filter-metric", "")
    choose(browser, "filter-dtype", "")
    run(browser, "document.querySelector('input[name=backend][value=numba]').click()")
    drawn(browser)
    assert len(table(browser, "cells")) == total
    run(browser, "[...document.querySelectorAll('fieldset button')].find((one) => one.innerText === 'None').click()")
    drawn(browser)
    assert {row["status"] for row in table(browser, "cells")} <= {"absent"}
    assert errors(browser) == []


def test_runs_are_chosen(browser, page):
    page()
    newest = len(table(browser, "cells"))
    choose(browser, "filter-runs", "all")
    assert len(table(browser, "cells")) == newest + 5
    choose(browser, "filter-runs", "20261127T100000-bbbbbb")
    assert len(table(browser, "cells")) == 5


def test_ratios_are_against_the_baseline_that_is_chosen(browser, page):
    page()
    for baseline in ("numpy", "torch"):
        choose(browser, "filter-baseline", baseline)
        medians = {record.backend: record.median_s for record in RECORDS if record.case == RECORDS[5].case}
        rows = [row for row in table(browser, "cells") if (row["metric"], row["dtype"]) == ("cityblock", "float32")]
        rows = [row for row in rows if row["queries x corpus x features"].startswith("100 ")]
        assert len(rows) == 5
        for row in rows:
            ratio = medians[baseline] / medians[row["backend"].removesuffix(" (peer)")]
            assert float(row["× baseline"].rstrip("×").replace(",", "")) == pytest.approx(ratio, rel=5.1e-3)


@pytest.mark.parametrize("heading", ["time/query", "backend", "error"])
def test_a_click_sorts_and_another_sorts_the_other_way(browser, page, heading):
    page()
    click = """
        const button = [...document.querySelectorAll("#table-cells thead button")].find((one) => one.innerText.replace(/ [▲▼]$/, "") === arguments[0]);
        button.focus();
        button.click();
        return document.activeElement.dataset.key === button.dataset.key;
    """  # noqa: E501
    value = {"time/query": seconds, "error": float, "backend": str}[heading]
    for direction in ("ascending", "descending"):
        assert run(browser, click, heading), "the focus is lost"
        texts = [row[heading] for row in table(browser, "cells")]
        there = [value(text) for text in texts if text]
        assert there == sorted(there, reverse=direction == "descending")
        assert "" not in texts[: len(there)], "what has no value comes last"
        marked = run(
            browser, "return [...document.querySelectorAll('#table-cells th[aria-sort]')].map((one) => one.ariaSort)"
        )
        assert [one for one in marked if one != "none"] == [direction]


def test_searching_the_table(browser, page):
    page()
    script = (
        "const box = document.getElementById('search'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))"
    )
    run(browser, script, "numba COSINE uint8")
    assert [(row["backend"], row["metric"], row["dtype"]) for row in table(browser, "cells")] == [
        ("numba", "cosine", "uint8")
    ]
    run(browser, script, "no such thing")
    assert table(browser, "cells") == []


def test_what_is_not_ranked_has_its_reason(browser, page):
    page()
    rows = table(browser, "unranked")
    assert {row["status"] for row in rows} == STATUSES.keys() - {"ok"}
    assert all(row["reason"].startswith("because ") for row in rows)


def test_names_that_mean_harm_are_text(browser, page):
    machine = {**MACHINE, "cpu": HOSTILE}
    records = [
        made(HOSTILE, seconds=0.002, dataset=HOSTILE, machine=machine, commit="", run=HOSTILE,
             libraries={HOSTILE: HOSTILE}, library=HOSTILE, bound=HOSTILE, started=HOSTILE, version=HOSTILE),
        made("numpy", dataset=HOSTILE, status="crashed", reason=HOSTILE, machine=machine, run=HOSTILE),
        made("__proto__", dataset="constructor", metric="toString", dtype="hasOwnProperty"),
    ]  # fmt: skip
    page(records, title=HOSTILE, sources=[HOSTILE])
    assert errors(browser) == []
    assert run(browser, "return document.body.dataset.owned") is None
    assert run(browser, "return document.images.length") == 0
    assert HOSTILE in [row["backend"] for row in table(browser, "cells")]
    assert HOSTILE in [row["reason"] for row in table(browser, "unranked")]
    assert run(browser, "return document.title").startswith("=1+1</script>")
    assert "__proto__" in [row["backend"] for row in table(browser, "cells")]


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_nothing_is_wider_than_the_screen(browser, page, size):
    page(size=size)
    assert run(browser, "return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    wide = """
        const width = document.documentElement.clientWidth + 1;
        return [...document.querySelectorAll("figure.chart svg")]
            .filter((one) => one.getBoundingClientRect().right > width).map((one) => one.closest("figure").id);
    """
    assert run(browser, wide) == []


def test_dark_and_light(browser, page):
    page()
    background = "return getComputedStyle(document.body).backgroundColor"
    light = run(browser, background)
    run(browser, "document.getElementById('theme').click()")
    drawn(browser)
    assert run(browser, background) != light
    assert run(browser, "return document.getElementById('theme').getAttribute('aria-pressed')") == "true"
    assert errors(browser) == []


def test_a_screen_reader_finds_names_and_words(browser, page):
    page()
    unnamed = """
        const name = (one) => one.innerText || one.getAttribute("aria-label") || (one.labels && [...one.labels].map((label) => label.innerText).join(""));
        return [...document.querySelectorAll("button, select, input, a, [role=region]")].filter((one) => one.offsetParent && !one.closest(".vega-embed") && !name(one)).map((one) => one.outerHTML)
    """  # noqa: E501
    assert run(browser, unnamed) == []
    words = dict(
        run(
            browser,
            "return [...document.querySelectorAll('section:not([hidden]) figure.chart svg.marks')]"
            ".map((one) => [one.closest('figure').id, `${one.role}: ${one.ariaLabel}`])",
        )
    )
    assert all(text.startswith("img: ") and len(text) > 60 for text in words.values()), words
    assert "cityblock, float32, 100 x 1,000 x 64: fastest numba" in words["chart-ranking"]
    levels = run(
        browser,
        "return [...document.querySelectorAll('h1, h2, h3')].filter((one) => one.offsetParent)"
        ".map((one) => +one.tagName[1])",
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_the_keyboard_reaches_everything(browser, page):
    from selenium.webdriver.common.keys import Keys

    page()
    reached = []
    body = browser.find_element("tag name", "body")
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB) if reached else body.send_keys(Keys.TAB)
        reached.append(
            run(
                browser,
                "const one = document.activeElement; return one.id || one.className || one.innerText || one.tagName",
            )
        )
    assert reached[0] == "skip"
    assert {"theme", "filter-dtype", "filter-baseline", "All", "None"} <= set(reached)
    # Without a mouse: a backend less, the other theme, and a table in order.
    total = len(table(browser, "cells"))
    for selector, key in (("input[value=numba]", Keys.SPACE), ("#theme", Keys.ENTER)):
        browser.find_element("css selector", selector).send_keys(key)
    browser.find_element("css selector", "#table-cells button[data-key=query_s]").send_keys(Keys.ENTER)
    drawn(browser)
    assert 0 < len(table(browser, "cells")) < total
    assert run(browser, "return document.documentElement.dataset.theme") == "dark"
    assert run(browser, "return document.querySelector('#table-cells [aria-sort=ascending]').innerText").startswith(
        "time"
    )


def test_shapes_and_colours_of_the_legend_are_those_of_the_charts(browser, page):
    path = page()
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    fills = run(
        browser,
        "return Object.fromEntries([...document.querySelectorAll('fieldset label')].map((one) =>"
        " [one.innerText.trim(), one.querySelector('path').getAttribute('stroke')]))",
    )
    assert fills == {name: data["looks"][name]["colour"] for name in data["backends"]}
    colours = run(
        browser,
        "return [...new Set([...document.querySelectorAll('#chart-accuracy svg .mark-symbol path')]"
        ".map((one) => one.getAttribute('stroke')))]",
    )
    assert set(colours) <= set(fills.values())
    assert len(colours) == 5


def test_a_file_of_values_is_saved(browser, page, tmp_path):
    page()
    script = """
        const made = [];
        URL.createObjectURL = (blob) => { made.push(blob); return "data:,"; };
        document.getElementById("csv").click();
        const done = arguments[arguments.length - 1];
        made[0].text().then(done);
    """
    text = browser.execute_async_script(script)
    lines = text.splitlines()
    assert lines[0].startswith("op,metric,dataset")
    assert len(lines) == 1 + len(table(browser, "cells"))


def test_the_page_needs_no_file_beside_it():
    text = build_page(RECORDS)
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=\"(?!data:)", text.split('<script id="data"')[0])
