"""How tests read the page of a report in a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from .planted_study import data_of


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


def shown(browser: Chrome, page: Path, name: str) -> list[tuple[WebElement, Any]]:
    """The figures of a chart, each with what it is to be drawn from."""
    (panels,) = (chart["panels"] for chart in data_of(page)["charts"] if chart["id"] == name)
    titled = {" · ".join(panel["keys"].values()): panel for panel in panels}
    (chart,) = (c for c in drawn(browser) if c.get_attribute("aria-labelledby") == name)
    figures = chart.find_elements(By.TAG_NAME, "figure")
    return [(f, titled[f.find_element(By.TAG_NAME, "h3").text]) for f in figures]


def along(labels: list[list[float]], log: bool = False) -> Callable[[Any], Any]:
    """Where a value lies, as the numbers beside an axis say."""
    values, places = np.array(labels).T
    slope, begin = np.polyfit(np.log2(values) if log else values, places, 1)
    return lambda value: begin + slope * (np.log2(value) if log else np.asarray(value))


def walked(browser: Chrome, figure: WebElement, count: int) -> list[str]:
    """What is said of each of a chart's values, on the way from the first to the last and back."""
    svg, texts = figure.find_element(By.CSS_SELECTOR, "svg[role=img]"), list[str]()
    for key in [Keys.ARROW_RIGHT] * count + [Keys.ARROW_LEFT] * (count - 1):
        svg.send_keys(key)
        texts.append(str(browser.find_element(By.ID, "said").get_attribute("textContent")))
    assert texts[count:] == texts[: count - 1][::-1]
    return texts[:count]


def tabled(browser: Chrome, figure: WebElement) -> list[list[str]]:
    """The table behind a chart."""
    figure.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(browser, 5).until(lambda _: figure.find_elements(By.CSS_SELECTOR, "tbody tr"))
    rows = "return [...arguments[0].querySelectorAll('tr')].map((r) => [...r.children].map((c) => c.textContent))"
    found: list[list[str]] = browser.execute_script(rows, figure)
    return found


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
