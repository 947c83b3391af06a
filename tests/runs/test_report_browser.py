# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: skips where Chromium or playwright is absent (pip install playwright; a Chromium)."""

from __future__ import annotations

import shutil

import pytest

from curvlab.runs.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH (apt install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory, make_study):
    return write_report([make_study(published=False)], tmp_path_factory.mktemp("report"))


@pytest.fixture
def open_page(browser, path):
    """Opens the report; fails on console errors and on any request but that of the page itself."""
    problems: list[str] = []
    contexts = []

    def opened(width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: request.url == path.as_uri() or problems.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == [] or problems == ["request: data:,"]


def column(page, table: str, index: int) -> list[str]:
    return page.eval_on_selector_all(f"{table} tbody tr", f"rows => rows.map(r => r.cells[{index}].innerText.trim())")


def test_clicking_a_header_sorts(open_page):
    page = open_page()
    table = "section.study table"
    head = page.locator(f"{table} thead th").nth(1)
    unsorted = column(page, table, 1)
    assert len(unsorted) == 8 and head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    rising = column(page, table, 1)
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text.split()[0]) for text in rising] == sorted(float(text.split()[0]) for text in unsorted)
    head.get_by_role("button").press("Enter")
    assert column(page, table, 1) == rising[::-1] and head.get_attribute("aria-sort") == "descending"
    remarks = page.locator(f"{table} thead th").nth(4)
    for _ in range(2):  # the one remark stands first both ways: missing cells stay last
        remarks.get_by_role("button").press("Space")
        assert column(page, table, 4)[0].startswith("<script>") and head.get_attribute("aria-sort") is None


def test_claims_sort_by_verdict(open_page):
    page = open_page()
    verdicts = [text.split("\n")[0] for text in column(page, "table.claims", 3)]
    page.locator("table.claims thead th").nth(3).get_by_role("button").dblclick()
    assert verdicts[0] == "✓ Reproduced"
    assert column(page, "table.claims", 3)[0].startswith("○ Not testable at this preset")


def test_theme_follows_the_system_and_the_switch(open_page):
    def colors(page):
        return page.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector('figure svg')).color]"""
        )

    light, dark = colors(open_page()), colors(open_page(scheme="dark"))
    assert light[0] != dark[0] and light[1] != dark[1]
    page = open_page()
    page.get_by_role("button", name="Dark theme").click()
    assert colors(page) == dark
    page.reload()
    assert colors(page) == dark  # remembered
    page.get_by_role("button", name="Light theme").click()
    assert colors(page) == light


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_sticks_out(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    clipped = page.evaluate(
        """Array.from(document.querySelectorAll('table.claims td, h1, h2, p, figcaption'))
             .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.innerText.slice(0, 40))"""
    )
    assert clipped == []
    page.get_by_text("Environment").click()
    assert page.get_by_text("numpy 2.4, torch 2.14").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_copy_button(open_page):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("button.copy").first.click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "python -m experiments run ntk_width --preset cpu"


def test_print_hides_the_controls(open_page):
    page = open_page(scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible() and not page.locator("button.copy").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
