"""The report in a headless Chromium: security, contrast, layout, keyboard and screen reader use.

Playwright controls Chromium. Accessibility rules are checked if `AXE_CORE` names axe-core's `axe.min.js`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.classify import HIGHEST_CONFIDENCE
from pipeline.report import encode_gallery
from pipeline.storage import Storage
from tests.makers import make_image
from tests.pipeline.report.test_report import HOSTILE_TEXTS, make_gallery, make_partition, report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

#: Minimum contrast ratios of WCAG 2.2, level AA, for text and for graphics.
TEXT_CONTRAST, GRAPHICS_CONTRAST = 4.5, 3

#: Returns the contrast ratio of each text, and of each shape of a chart, with its background.
CONTRASTS = """
() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const contrast = (color, element) => {
    const [a, b] = [luminance(parse(color)), luminance(background(element))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || ['TITLE', 'title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const color = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    texts.push({text: node.data.trim().slice(0, 40), ratio: contrast(color, element)});
  }
  const shapes = [...document.querySelectorAll('svg .a, svg .b, svg .outline')].map((shape) => {
    const style = getComputedStyle(shape);
    const color = style.stroke === 'none' ? style.fill : style.stroke;
    return {shape: shape.outerHTML.slice(0, 80), ratio: contrast(color, shape)};
  });
  return {texts, shapes};
}
"""

#: Returns tag, name and outline style of the focused element, and whether the sticky navigation covers it.
FOCUSED = """
() => {
  const element = document.activeElement, nav = document.querySelector('nav');
  const covered = getComputedStyle(nav).position === 'sticky' && !nav.contains(element)
    && nav.getBoundingClientRect().top <= 0 && !element.matches('.skip')
    && element.getBoundingClientRect().bottom <= nav.getBoundingClientRect().bottom;
  return {
    tag: element.tagName,
    name: element.getAttribute('aria-label') || element.textContent.trim(),
    outline: getComputedStyle(element).outlineStyle,
    covered,
  };
}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    uri = make_partition(folder, HOSTILE_TEXTS).uri
    picture = make_image(1)
    items = [
        (i, label, HIGHEST_CONFIDENCE, 0.9, "/in/a.tar", i, label, picture)
        for i, label in enumerate(HOSTILE_TEXTS)
    ]
    Storage().write(f"{uri}/gallery.parquet", encode_gallery(make_gallery(items)))
    return report(uri)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not work for root, who is the usual user of a container.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class OpenPage:
    """The page in the browser, and the messages and requests of the page."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())


def open_details(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")


def focused_elements(page: Any, key: str) -> list[dict[str, Any]]:
    """Presses a key until the focus leaves the page; returns the focused elements in order."""
    elements: list[dict[str, Any]] = []
    for _ in range(300):
        page.keyboard.press(key)
        focused = page.evaluate(FOCUSED)
        if focused["tag"] == "BODY":
            return elements
        elements.append(focused)
    raise AssertionError("the focus does not leave the page")


def test_page_runs_no_script_and_sends_no_request(browser: Any, path: Path) -> None:
    opened = OpenPage(browser, path)
    for summary in opened.page.locator("summary").all():
        summary.click()
    opened.page.mouse.move(200, 200)
    assert opened.messages == []
    assert opened.requests == [path.as_uri()]
    assert opened.page.evaluate("document.scripts.length") == 0
    widths = opened.page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert widths == [32] * len(HOSTILE_TEXTS)
    labels = opened.page.locator("#classes tbody th").all_inner_texts()
    assert {*HOSTILE_TEXTS[:3], HOSTILE_TEXTS[5]} <= set(labels)


def test_content_security_policy_blocks_an_injected_script(browser: Any, path: Path, tmp_path: Path) -> None:
    injected = tmp_path / "injected.html"
    injected.write_text(path.read_text().replace("</main>", "<script>alert(1)</script><img src=x:y></main>"))
    opened = OpenPage(browser, injected)
    assert any("Content Security Policy" in message for message in opened.messages)
    assert "1" not in opened.messages


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_have_sufficient_contrast(browser: Any, path: Path, scheme: str) -> None:
    page = OpenPage(browser, path, color_scheme=scheme).page
    open_details(page)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts["texts"]) > 200
    assert [each for each in contrasts["texts"] if each["ratio"] < TEXT_CONTRAST] == []
    assert len(contrasts["shapes"]) > 20
    assert [each for each in contrasts["shapes"] if each["ratio"] < GRAPHICS_CONTRAST] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].split(","))
    assert (brightness > 600) == (scheme == "light")


@pytest.mark.parametrize("width", [320, 1400])
def test_page_fits_narrow_and_wide_windows(browser: Any, path: Path, width: int) -> None:
    page = OpenPage(browser, path, viewport={"width": width, "height": 800}).page
    open_details(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_gallery_uses_the_width_of_the_page(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path, viewport={"width": 1280, "height": 800}).page
    section = page.locator("#gallery").bounding_box()
    right = max(each.bounding_box()["x"] for each in page.locator(".gallery h3").all())
    assert right > section["x"] + section["width"] / 2


def test_printed_page_is_complete_and_has_no_controls(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path, viewport={"width": 680, "height": 900}).page
    controls = page.locator("nav, summary, .skip")
    assert any(each.is_visible() for each in controls.all())
    page.emulate_media(media="print")
    assert not any(each.is_visible() for each in controls.all())
    assert page.evaluate("document.documentElement.scrollWidth") <= 680


def test_skip_link_is_first_and_moves_the_focus_to_the_content(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")


def test_keyboard_reaches_links_tables_and_details_in_page_order(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path).page
    elements = focused_elements(page, "Tab")
    assert all(element["outline"] != "none" for element in elements)
    tags = [element["tag"] for element in elements]
    assert tags.count("SUMMARY") == page.locator("summary").count()
    assert tags.count("A") == page.locator("a").count()
    assert tags.count("DIV") == page.locator(".scroll:visible").count()
    names = page.evaluate(
        "[...document.querySelectorAll('a, summary, .scroll')].filter((e) => e.checkVisibility())"
        ".map((e) => e.getAttribute('aria-label') || e.textContent.trim())"
    )
    assert [element["name"] for element in elements] == names


@pytest.mark.parametrize("key", ["Tab", "Shift+Tab"])
def test_sticky_navigation_does_not_cover_the_focus(browser: Any, path: Path, key: str) -> None:
    page = OpenPage(browser, path, viewport={"width": 1000, "height": 500}).page
    elements = focused_elements(page, key)
    assert len(elements) > 20
    assert [element for element in elements if element["covered"]] == []


def test_enter_follows_section_links_and_opens_details(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path).page
    link = page.locator("nav a").last
    link.focus()
    page.keyboard.press("Enter")
    section = page.locator(link.get_attribute("href"))
    assert page.url.endswith(link.get_attribute("href"))
    assert 0 <= section.bounding_box()["y"] < page.viewport_size["height"]
    details = page.locator("details").first
    details.locator("summary").focus()
    for is_open in (True, False):
        page.keyboard.press("Enter")
        assert details.evaluate("(element) => element.open") == is_open


def test_arrow_keys_scroll_a_wide_table(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path, viewport={"width": 360, "height": 800}).page
    open_details(page)
    table = page.locator("#classes details .scroll").first
    assert table.evaluate("(element) => element.scrollWidth > element.clientWidth")
    table.focus()
    # The page's policy forbids `wait_for_function`, which evaluates a string in the page.
    deadline = time.monotonic() + 30
    page.keyboard.press("ArrowRight")
    while not table.evaluate("(element) => element.scrollLeft > 0"):
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def test_screen_reader_finds_landmarks_headings_and_chart_texts(browser: Any, path: Path) -> None:
    page = OpenPage(browser, path).page
    assert page.locator("main").count() == page.locator("nav").count() == page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert all(b <= a + 1 for a, b in pairwise(levels))
    sections = page.evaluate(
        "[...document.querySelectorAll('section')].map((s) => s.getAttribute('aria-labelledby'))"
    )
    assert sections == page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.id)")
    charts = page.locator("svg").all()
    assert len(charts) >= 6
    assert page.get_by_role("img").count() == len(charts) + page.locator("img[alt]").count()
    for chart in charts:
        assert chart.locator("title").first.text_content()
        assert chart.locator("desc").first.text_content()
    figures = page.locator(".charts figure")
    assert figures.filter(has=page.locator("table")).count() == figures.count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(browser: Any, path: Path, scheme: str) -> None:
    axe = os.environ.get("AXE_CORE")
    if not axe:
        pytest.skip("AXE_CORE does not name an axe.min.js")
    page = OpenPage(browser, path, color_scheme=scheme).page
    open_details(page)
    page.evaluate(Path(axe).read_text())
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    result = page.evaluate("(tags) => axe.run({runOnly: tags})", tags)
    assert len(result["passes"]) > 20
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in result["violations"]] == []
