"""The page of a report in a real browser: drawn, silent, offline, walked by keyboard, legible small, dark and printed.

Needs Chromium and its driver, e.g. `apt-get install chromium chromium-driver`; skipped where there is none.
"""

from __future__ import annotations

import base64
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from pvrpipe.worldmodel.report import build_report

from .browsing import along, contrast, drawn, requested, shown, tabled, walked
from .planted_study import TRUE, Planted, data_of, write_study

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with its driver is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options, Service(DRIVER)) as driver:
        driver.set_window_size(1280, 900)
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    planted = Planted(TRUE, seeds=3, pictures=True)
    folder = write_study(tmp_path_factory.mktemp("planted"), planted)
    return build_report([folder], folder / "report", figures=False).page


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    browser.get_log("performance")  # of earlier pages
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def test_every_chart_is_drawn_without_a_word_or_a_request(opened: Chrome, page: Path) -> None:
    charts = drawn(opened)
    names = [chart.get_attribute("aria-labelledby") for chart in charts]
    assert names == ["summary", "errors", "horizons", "maps", "ood", "strips", "cost"]
    for chart in charts[:-2]:
        marks = chart.find_elements(By.CSS_SELECTOR, "svg[role=img] circle, svg[role=img] path")
        assert len(marks) >= len(TRUE), chart.text
        assert all(mark.is_displayed() for mark in marks[:10])
    pictures = opened.find_elements(By.CSS_SELECTOR, ".strip img")
    assert len(pictures) >= 3 * 8
    assert all(opened.execute_script("return arguments[0].naturalWidth", each) == 64 for each in pictures[:6])
    assert opened.get_log("browser") == []
    assert [url for url in requested(opened) if not url.startswith("data:")] == [page.as_uri()]


def test_what_is_drawn_is_where_the_numbers_are(opened: Chrome) -> None:
    """Marks lie along the axis as their values do, which the table behind the chart has."""
    figure = drawn(opened)[1].find_element(By.CSS_SELECTOR, "figure")
    values = {row[0]: float(row[1]) for row in tabled(opened, figure)[1:]}
    assert list(values) == ["vc1", "from scratch", "autoencoder", "random (random weights)"]
    places = [
        mark.rect["x"] + mark.rect["width"] / 2
        for mark in figure.find_elements(By.CSS_SELECTOR, "svg[role=img] > path, svg[role=img] > circle")
    ]
    shares = [(p - places[0]) / (places[-1] - places[0]) for p in places]
    numbers = list(values.values())
    assert shares == pytest.approx([(v - numbers[0]) / (numbers[-1] - numbers[0]) for v in numbers], abs=0.02)


#: Of a chart's SVG, in the units it is drawn in: marks and texts with their middles, lines and bands with their ends.
PARTS = """
    const middle = (node) => { const b = node.getBBox(); return [b.x + b.width / 2, b.y + b.height / 2]; };
    const of = (selector) => [...arguments[0].querySelectorAll(`svg[role=img] > ${selector}`)];
    const ends = (l) => ["x1", "y1", "x2", "y2"].map((name) => +l.getAttribute(name));
    return {
        marks: of("path, svg[role=img] > circle").map((m) => [...middle(m), m.getAttribute("fill")]),
        across: of("text[text-anchor=middle]").slice(0, -1).map((t) => [+t.textContent, middle(t)[0]]),
        up: of("text[text-anchor=end]:not(.label)").map((t) => [+t.textContent, middle(t)[1]]),
        bars: of("line[stroke]").map(ends),
        dashed: of("line.mark").map(ends),
        bands: of("polygon").map((p) => [...p.points].map((each) => [each.x, each.y])),
    };
"""


def test_dots_lie_where_their_axis_says_with_their_intervals_and_runs(opened: Chrome, page: Path) -> None:
    for name in ("summary", "errors"):
        figure, panel = shown(opened, page, name)[0]
        parts, dots = opened.execute_script(PARTS, figure), panel["dots"]
        x = along(parts["across"])
        assert [mark[0] for mark in parts["marks"]] == pytest.approx(x([dot["value"] for dot in dots]), abs=1)
        assert len({mark[2] for mark in parts["marks"]}) == len(dots)
        bars = [x([dot[end] for dot in dots]) for end in ("low", "high")]
        ticks = x([run for dot in dots for run in dot.get("runs", [])])
        wide = [bar for bar in parts["bars"] if bar[0] != bar[2]]
        assert [bar[0] for bar in wide] == pytest.approx(bars[0], abs=1)
        assert [bar[2] for bar in wide] == pytest.approx(bars[1], abs=1)
        assert [bar[0] for bar in parts["bars"] if bar not in wide] == pytest.approx(ticks, abs=1)
        assert [bar[0] for bar in parts["dashed"]] == pytest.approx(
            [x(1)] if name == "summary" else [], abs=1
        )
        labels = figure.find_elements(By.CSS_SELECTOR, "text.label")
        assert [label.text for label in labels] == [dot["label"] for dot in dots]
        assert [label.text for label in labels if "random" in str(label.get_attribute("class"))] == ["random"]
        head, *rows = tabled(opened, figure)
        assert head[2:4] == ["low", "high"]
        told = [[float(cell) for cell in row[1:4]] for row in rows]
        assert told == [pytest.approx([d["value"], d["low"], d["high"]], rel=1e-3) for d in dots]


def test_lines_lie_where_their_axes_say_with_their_bands(opened: Chrome, page: Path) -> None:
    figure, panel = shown(opened, page, "horizons")[0]
    parts = opened.execute_script(PARTS, figure)
    x, y = along(parts["across"], log=True), along(parts["up"])
    points = [(line, v, i) for line in panel["lines"] for i, v in enumerate(line["x"])]
    assert len({mark[2] for mark in parts["marks"]}) == len(panel["lines"])
    assert [mark[0] for mark in parts["marks"]] == pytest.approx(x([v for _, v, _ in points]), abs=1)
    legend = figure.find_element(By.XPATH, "../..//ul").text.splitlines()
    assert legend == [line["label"] for line in panel["lines"]]
    heights = [line["y"][i] for line, _, i in points]
    assert [mark[1] for mark in parts["marks"]] == pytest.approx(y(heights), abs=2)
    for line, band in zip(panel["lines"], parts["bands"], strict=True):
        assert [p[0] for p in band] == pytest.approx(x([*line["x"], *line["x"][::-1]]), abs=1)
        assert [p[1] for p in band] == pytest.approx(y([*line["high"], *line["low"][::-1]]), abs=2)
    for text, (line, v, i) in zip(walked(opened, figure, len(points)), points, strict=True):
        assert text.startswith(f"{line['label']}, {v:g}: ")
        assert float(text.rpartition(" ")[2]) == pytest.approx(line["y"][i], rel=1e-3)
    (*_, low, high), *rows = tabled(opened, figure)
    assert (low, high) == ("low", "high")
    known = [(li["label"], v, li["y"][i], li["low"][i], li["high"][i]) for li, v, i in points]
    assert [row[0] for row in rows] == [each[0] for each in known]
    assert [[*map(float, row[1:])] for row in rows] == [pytest.approx(each[1:], rel=1e-3) for each in known]


def test_points_lie_where_both_axes_say_hollow_without_the_property(opened: Chrome, page: Path) -> None:
    figure, panel = shown(opened, page, "ood")[0]
    parts, points = opened.execute_script(PARTS, figure), panel["points"]
    x, y = along(parts["across"]), along(parts["up"])
    assert [mark[0] for mark in parts["marks"]] == pytest.approx(x([p["x"] for p in points]), abs=1)
    assert [mark[1] for mark in parts["marks"]] == pytest.approx(y([p["y"] for p in points]), abs=2)
    hollow = [mark[2] == "var(--paper)" for mark in parts["marks"]]
    assert hollow == [not p["filled"] for p in points]
    assert len(set(hollow)) == 2
    known = [
        bar
        for p in points
        for bar in (
            [x(p["x"] - p["x_sem"]), y(p["y"]), x(p["x"] + p["x_sem"]), y(p["y"])],
            [x(p["x"]), y(p["y"] - p["y_sem"]), x(p["x"]), y(p["y"] + p["y_sem"])],
        )
    ]
    assert np.array(parts["bars"]) == pytest.approx(np.array(known), abs=2)
    ((x1, y1, x2, y2),) = parts["dashed"]  # where errors are alike
    largest = max(p["x"] for p in points)
    assert np.interp(x(largest), [x1, x2], [y1, y2]) == pytest.approx(y(largest), abs=2)
    head, *rows = tabled(opened, figure)
    assert head[-1] == panel["keys"]["property"]
    for row, p in zip(rows, points, strict=True):
        assert (row[0], row[-1]) == (p["label"], "yes" if p["filled"] else "no")
        numbers = [p["x"], p["x_sem"], p["y"], p["y_sem"]]
        assert [*map(float, row[1:-1])] == pytest.approx(numbers, rel=1e-3)


def test_rows_of_a_map_lie_and_are_coloured_as_they_were_laid_out(opened: Chrome, page: Path) -> None:
    figure, panel = shown(opened, page, "maps")[0]
    marks, data = opened.execute_script(PARTS, figure)["marks"], dict[str, Any](data_of(page))
    rows = data["rows"][panel["rows"]]
    across, up = (np.polyfit(panel[axis], [mark[n] for mark in marks], 1) for n, axis in enumerate("xy"))
    assert across[0] == pytest.approx(-up[0])
    assert across[0] > 100
    assert [mark[0] for mark in marks] == pytest.approx(np.polyval(across, panel["x"]), abs=1)
    assert [mark[1] for mark in marks] == pytest.approx(np.polyval(up, panel["y"]), abs=1)
    orange = [float(mark[2].partition("%")[0].rpartition(" ")[2]) for mark in marks]
    known = np.interp(rows["reward"], [min(rows["reward"]), max(rows["reward"])], [0, 100])
    assert orange == pytest.approx(known, abs=1)
    assert all("var(--s2)" in mark[2].partition("%")[0] for mark in marks)
    figure.find_element(By.CSS_SELECTOR, "svg[role=img]").send_keys(Keys.END)
    picture = opened.find_element(By.CSS_SELECTOR, "#tip img").get_attribute("src")
    assert str(picture).endswith(data["frames"][rows["frames"][-1]])


def test_a_strip_shows_what_happened_was_imagined_and_was_believed(opened: Chrome, page: Path) -> None:
    (figure, panel), frames = shown(opened, page, "strips")[0], list[Any](data_of(page)["frames"])
    pictures = [str(i.get_attribute("src")) for i in figure.find_elements(By.CSS_SELECTOR, ".strip img")]
    known = [frames[n] for name in ("true", "imagined", "seen") for n in panel["strip"][name]]
    assert [src.partition(",")[2] for src in pictures] == known
    texts = [span.text for span in figure.find_elements(By.CSS_SELECTOR, ".strip span")]
    assert texts[:3] == ["happened", "imagined", "believed"]
    for text, *about in zip(texts[4:], panel["step"], panel["received"], panel["predicted"], strict=True):
        told = [float(part) for part in re.split("[;,]", text)]
        assert told == pytest.approx(about, rel=0.06)


def test_the_contents_lead_to_every_heading(opened: Chrome) -> None:
    links = opened.find_elements(By.CSS_SELECTOR, "#contents a")
    headings = opened.find_elements(By.TAG_NAME, "h2")
    led = [(link.text, str(link.get_attribute("href")).partition("#")[2]) for link in links]
    assert led == [(heading.text, heading.get_attribute("id")) for heading in headings]


def test_charts_are_filtered_and_walked_by_keyboard_alone(opened: Chrome) -> None:
    chart = drawn(opened)[1]
    select = chart.find_element(By.CSS_SELECTOR, "select[data-key=model]")
    before = len(chart.find_elements(By.TAG_NAME, "figure"))
    select.send_keys("tdmpc2")
    assert Select(select).first_selected_option.text == "tdmpc2 1m"
    assert len(chart.find_elements(By.TAG_NAME, "figure")) == before // 2
    select.send_keys(Keys.TAB, Keys.TAB, Keys.TAB)  # error, horizon, the first chart
    svg = opened.switch_to.active_element
    assert svg.tag_name == "svg"
    assert "4 values" in str(svg.get_attribute("aria-label"))
    tip, said = (opened.find_element(By.ID, name) for name in ("tip", "said"))
    assert not tip.is_displayed()
    svg.send_keys(Keys.ARROW_DOWN)
    assert tip.is_displayed()
    first = said.get_attribute("textContent")
    svg.send_keys(Keys.END)
    last = said.get_attribute("textContent")
    assert str(first).startswith("vc1:")
    assert str(last).startswith("random:")
    assert str(last).endswith("random weights")
    svg.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_a_point_of_a_map_shows_its_frame(opened: Chrome) -> None:
    drawn(opened)[3].find_element(By.CSS_SELECTOR, "svg[role=img]").send_keys(Keys.HOME)
    picture = opened.find_element(By.CSS_SELECTOR, "#tip img")
    assert opened.execute_script("return arguments[0].naturalWidth", picture) == 48
    assert "reward" in opened.find_element(By.ID, "tip").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_downwards_and_texts_stand_out(opened: Chrome, scheme: str) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        opened.refresh()
        drawn(opened)
        named = "option, h1, h3, .legend li, .findings li, header p"
        opened.execute_script(
            f"for (const e of document.querySelectorAll('{named}')) e.append('x'.repeat(60))"
        )
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        lines = opened.execute_script("return lined('vc1-l blocks 0-11 (mlp)', 18)")
        assert lines == ["vc1-l blocks", "0-11 (mlp)"]
        for selector in ("p", "svg text.label", ".about", ".alarm", "a", "summary"):
            assert contrast(opened, selector) >= 4.5, selector
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_chart_and_table_has_a_name_for_a_screen_reader(opened: Chrome) -> None:
    for chart in drawn(opened):
        chart.find_element(By.CSS_SELECTOR, "figure summary").click()
        WebDriverWait(opened, 5).until(lambda _, c=chart: c.find_elements(By.CSS_SELECTOR, "details table"))
    tree = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[Any]] = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert len(named["image"]) > 20
    for role in ("image", "table", "link", "combobox", "heading"):
        assert all(named[role]), role
    assert "Imagined rollouts: one · dreamerv3 1m · vc1" in named["region"]
    tables = [name for name in named["table"] if name.startswith("Table of ")]
    assert len(tables) == len(set(tables)) == 7
    assert "main" in named


def test_it_prints_with_all_charts_and_no_controls(opened: Chrome) -> None:
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    assert opened.find_elements(By.CSS_SELECTOR, "section.chart:not([data-drawn])") == []
    assert opened.find_elements(By.CSS_SELECTOR, "details[open]") == []  # folded again


def test_no_heading_is_printed_without_what_it_is_of(opened: Chrome) -> None:
    """What is folded on the screen could not be unfolded on paper, and a chart to a page was a book."""
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    try:
        for name in ("tests", "provenance", "commands"):
            section = opened.find_element(By.CSS_SELECTOR, f"section[aria-labelledby={name}]")
            shown = [
                each for each in section.find_elements(By.CSS_SELECTOR, "table, pre") if each.is_displayed()
            ]
            assert len(shown) == 1, name
            assert shown[0].size["width"] <= section.size["width"]
        for chart in opened.find_elements(By.CSS_SELECTOR, "section.chart"):
            heading = chart.find_elements(By.CSS_SELECTOR, "h2, h2 + .about")
            assert [each.value_of_css_property("break-after") for each in heading] == ["avoid", "avoid"]
        across = opened.find_element(By.CSS_SELECTOR, ".panels").value_of_css_property(
            "grid-template-columns"
        )
        assert len(across.split()) == 2
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_a_whole_study_opens_in_two_seconds(browser: Chrome, tmp_path: Path) -> None:
    pvrs = {f"pvr-{n}": 1.0 + 0.05 * n for n in range(11)}
    tasks = [f"dmc:task-{n}" for n in range(5)]
    folder = write_study(tmp_path, Planted({"from scratch": 0.9, **pvrs}, tasks=tasks, pictures=True))
    path = build_report([folder], folder / "report", figures=False).page
    took = []
    for _ in range(3):
        began = time.perf_counter()
        browser.get(path.as_uri())
        browser.execute_script("document.querySelector('section.chart').scrollIntoView()")
        WebDriverWait(browser, 20, 0.02).until(
            lambda b: b.find_elements(By.CSS_SELECTOR, "section.chart[data-drawn] svg[role=img]")
        )
        took.append(time.perf_counter() - began)
    assert min(took) < 2, took
