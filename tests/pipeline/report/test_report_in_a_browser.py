"""The report in a real headless browser: Chromium, where there is one, driven by Playwright.

`AXE_CORE` may name axe-core's `axe.min.js`, for the checks that it makes of accessibility.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.classify import HIGHEST_CONFIDENCE
from pipeline.report import GalleryItem, write_gallery
from pipeline.storage import Storage
from tests.makers import make_image
from tests.pipeline.report.test_report import NASTY, make_partition, report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

#: Of every text the contrast with what lies behind it, by the computed styles.
CONTRASTS = """
() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || ['TITLE', 'title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    found.push({text: node.data.trim().slice(0, 40), ratio: (a + 0.05) / (b + 0.05)});
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    uri = make_partition(folder, NASTY).uri
    picture = make_image(1)
    items = [
        GalleryItem(i, label, HIGHEST_CONFIDENCE, 0.9, "/in/a.tar", i, label, picture)
        for i, label in enumerate(NASTY)
    ]
    write_gallery(Storage(), uri, items)
    return report(uri)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # As root, which containers have, Chromium wants no sandbox.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Opened:
    """The page in the browser, and what it did there."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())


def test_it_runs_nothing_and_asks_for_nothing(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)
    for summary in opened.page.locator("summary").all():
        summary.click()
    opened.page.mouse.move(200, 200)
    assert opened.messages == []
    assert opened.requests == [path.as_uri()]
    assert opened.page.evaluate("document.scripts.length") == 0
    pictures = opened.page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert pictures == [32] * len(NASTY)
    labels = opened.page.locator("#classes tbody th").all_inner_texts()
    assert {*NASTY[:3], NASTY[5]} <= set(labels)


def test_a_script_that_got_in_all_the_same_would_be_stopped(browser: Any, path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text().replace("</main>", "<script>alert(1)</script><img src=x:y></main>"))
    opened = Opened(browser, broken)
    assert any("Content Security Policy" in message for message in opened.messages)
    assert "1" not in opened.messages


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_either_colour_scheme(browser: Any, path: Path, scheme: str) -> None:
    page = Opened(browser, path, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [each for each in found if each["ratio"] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].split(","))
    assert (brightness > 600) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_narrow_and_wide_windows(browser: Any, path: Path, width: int) -> None:
    page = Opened(browser, path, viewport={"width": width, "height": 800}).page
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_nothing_is_cut_off_and_nothing_wants_a_click(browser: Any, path: Path) -> None:
    page = Opened(browser, path, viewport={"width": 680, "height": 900}).page
    wants_a_click = page.locator("nav, summary, .skip")
    assert any(each.is_visible() for each in wants_a_click.all())
    page.emulate_media(media="print")
    assert not any(each.is_visible() for each in wants_a_click.all())
    assert page.evaluate("document.documentElement.scrollWidth") <= 680


def test_the_keyboard_reaches_the_skip_link_first_and_then_everything(browser: Any, path: Path) -> None:
    page = Opened(browser, path).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page = Opened(browser, path).page
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name == "BODY":
            break
        assert outline != "none"
        reached.append(name)
    assert reached.count("SUMMARY") == page.locator("summary").count()
    assert reached.count("A") == page.locator("a").count()


def test_a_screen_reader_finds_landmarks_headings_and_every_charts_text(browser: Any, path: Path) -> None:
    page = Opened(browser, path).page
    assert page.locator("main").count() == page.locator("nav").count() == page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert all(b <= a + 1 for a, b in pairwise(levels))
    charts = page.locator("svg").all()
    assert len(charts) >= 6
    assert page.get_by_role("img").count() == len(charts) + page.locator("img[alt]").count()
    for chart in charts:
        assert chart.locator("title").first.text_content()
        assert chart.locator("desc").first.text_content()
    figures = page.locator(".charts figure")
    assert figures.filter(has=page.locator("table")).count() == figures.count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, path: Path, scheme: str) -> None:
    axe = os.environ.get("AXE_CORE")
    if not axe:
        pytest.skip("AXE_CORE names no axe.min.js")
    page = Opened(browser, path, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.evaluate(Path(axe).read_text())
    result = page.evaluate("axe.run()")
    assert len(result["passes"]) > 20
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in result["violations"]] == []
