"""A browser for tests: Debian's chromium behind playwright, and pages opened with an ear for what they ask."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
]


def no_browser():
    "Why no browser can be started here; empty when one can."
    if find_spec("playwright") is None:
        return 'needs playwright: pip install -e ".[test]"'
    if shutil.which("chromium") is None:
        return "needs a chromium on the PATH: apt-get install chromium"
    return ""


needs_browser = pytest.mark.skipif(bool(no_browser()), reason=no_browser() or "there is one")


_shared = []  # the browser that pages share while `one_browser` lasts: no second one can be started


@contextmanager
def one_browser():
    "A headless chromium for every page that is opened within."
    if _shared:
        yield _shared[0]
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=FLAGS, headless=True
        )
        _shared.append(browser)
        try:
            yield browser
        finally:
            _shared.clear()
            browser.close()


@contextmanager
def browser_page(**context):
    "A fresh page of a headless chromium, closed at the end."
    with one_browser() as browser:
        there = browser.new_context(**context)
        try:
            yield there.new_page()
        finally:
            there.close()


@dataclass
class Visit:
    "What a page asked for, complained of, and showed."

    requests: list[str] = field(default_factory=list)  # URLs, the page itself and data: left out
    errors: list[str] = field(default_factory=list)  # of the console, and uncaught ones
    pictures: int = 0  # images and SVGs with something to see
    broken: list[str] = field(default_factory=list)  # images that did not load
    text: str = ""


SEEN = """() => {
  const images = [...document.images].filter(i => !i.closest('svg'));
  const drawn = [...document.querySelectorAll('svg')].filter(s => !s.parentElement.closest('svg'));
  const big = e => { const box = e.getBoundingClientRect(); return box.width > 20 && box.height > 20 };
  return {
    pictures: images.filter(i => i.naturalWidth > 0 && big(i)).length + drawn.filter(big).length,
    broken: images.filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80)),
    text: document.body.innerText,
  }
}"""


def open_quietly(html, screenshot=None):
    "Open a local HTML file; what it asked for (nothing, one hopes), its errors, its pictures."
    with browser_page(viewport={"width": 1200, "height": 900}) as page:
        visit = seen_by(page, html)
        if screenshot:
            page.screenshot(path=screenshot, full_page=True)
    return visit


def seen_by(page, html):
    "The same in a page that is open already, and stays so."
    address, visit = Path(html).resolve().as_uri(), Visit()

    def asked(request):
        if request.url != address and not request.url.startswith(("data:", "blob:")):
            visit.requests.append(request.url)

    ears = {
        "request": asked,
        "console": lambda m: visit.errors.append(m.text) if m.type == "error" else None,
        "pageerror": lambda wrong: visit.errors.append(str(wrong)),
    }
    for event, ear in ears.items():
        page.on(event, ear)
    page.goto(address, wait_until="networkidle")
    seen = page.evaluate(SEEN)
    for event, ear in ears.items():
        page.remove_listener(event, ear)
    visit.pictures, visit.broken, visit.text = seen["pictures"], seen["broken"], seen["text"]
    return visit
