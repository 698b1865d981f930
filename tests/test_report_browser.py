"""The page of a report in a real browser: drawn, silent, offline, walked by keyboard, legible small, dark and printed.

Needs Chromium and its driver, e.g. `apt-get install chromium chromium-driver`; skipped where there is none.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from pvrpipe.worldmodel.report import build_report

from .planted_study import TRUE, Planted, write_study

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


def drawn(browser: Chrome) -> list[WebElement]:
    """All charts, each scrolled to, as a reader would."""
    for section in browser.find_elements(By.CSS_SELECTOR, "section.chart"):
        browser.execute_script("arguments[0].scrollIntoView()", section)
        WebDriverWait(browser, 10).until(lambda _, s=section: s.get_attribute("data-drawn") == "yes")
    return browser.find_elements(By.CSS_SELECTOR, "section.chart")


def requested(browser: Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


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
    figure.find_element(By.TAG_NAME, "summary").click()
    rows = WebDriverWait(opened, 5).until(lambda _: figure.find_elements(By.CSS_SELECTOR, "tbody tr"))
    values = {
        row.find_element(By.TAG_NAME, "th").text: float(row.find_elements(By.TAG_NAME, "td")[0].text)
        for row in rows
    }
    assert list(values) == ["vc1", "from scratch", "autoencoder", "random (random weights)"]
    places = [
        mark.rect["x"] + mark.rect["width"] / 2
        for mark in figure.find_elements(By.CSS_SELECTOR, "svg[role=img] > path, svg[role=img] > circle")
    ]
    shares = [(p - places[0]) / (places[-1] - places[0]) for p in places]
    numbers = list(values.values())
    assert shares == pytest.approx([(v - numbers[0]) / (numbers[-1] - numbers[0]) for v in numbers], abs=0.02)


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
    tip, said = opened.find_element(By.ID, "tip"), opened.find_element(By.ID, "said")
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
    svg = drawn(opened)[3].find_element(By.CSS_SELECTOR, "svg[role=img]")
    svg.send_keys(Keys.HOME)
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
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        for selector in ("p", "svg text.label", ".about", ".alarm", "a", "summary"):
            assert contrast(opened, selector) >= 4.5, selector
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser: Chrome, selector: str) -> float:
    """WCAG's contrast of a text with the page."""
    script = """
        const style = getComputedStyle(document.querySelector(arguments[0]));
        const colour = document.querySelector(arguments[0]).namespaceURI.endsWith("svg") ? style.fill : style.color;
        return [colour, getComputedStyle(document.body).backgroundColor];
    """
    lights = []
    for colour in browser.execute_script(script, selector):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        lights.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


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
    content = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    pdf = base64.b64decode(content)
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    left = opened.find_elements(By.CSS_SELECTOR, "section.chart:not([data-drawn])")
    assert left == []
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
