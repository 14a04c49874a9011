"""The reports as an advisor gets them: files that ask nobody for anything, on a screen, a telephone and on paper."""

import html as escaped
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from browser import browser_page, needs_browser, seen_by
from nbformat.v4 import new_markdown_cell, new_notebook
from pdf_text import pages_of

from reidlab.core.run import RunFolder
from reidlab.core.settings import project_root
from reidlab.viz.page import write_html
from reidlab.viz.report import page_facts, report_faults, write_report

REPORTS = sorted((project_root() / "reports").glob("*.ipynb"))
FIRST_LOOK, ADVISOR = "01_first_look", "04_reproduction"
SIZES = (1280, 800, 390)
TOO_WIDE = """() => [...document.querySelectorAll('main *')]
  .filter(e => !e.closest('svg, math') && !e.parentElement.closest('.scroll'))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
SAID = """() => ({
  unnamed: [...document.images].filter(i => !i.alt).length
    + [...document.querySelectorAll('.drawn')].filter(d => d.querySelector('svg') && !d.ariaLabel).length,
  bare: [...document.querySelectorAll('img, .drawn svg')].filter(i => !i.closest('figure')?.querySelector('figcaption')?.textContent).length,
  pictures: document.querySelectorAll('figure img, figure .drawn svg').length,
  left: new Set([...document.querySelectorAll('main > p, main > figure, main > .scroll, main > details')].map(e => Math.round(e.getBoundingClientRect().left))).size,
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    "Every committed report as its page, by its name."
    folder = tmp_path_factory.mktemp("html")
    return {r.stem: write_report(r, folder / f"{r.stem}.html") for r in REPORTS}


@pytest.fixture(scope="module")
def browser():
    "One browser for all pages; a page is opened in it, and what it asked for is told."
    with browser_page(viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.mark.parametrize("report", REPORTS, ids=lambda r: r.stem)
def test_a_report_lacks_no_caption_no_words_and_no_sentence(report):
    assert report_faults(report) == []


@needs_browser
@pytest.mark.parametrize("name", [r.stem for r in REPORTS])
def test_a_report_opens_quietly_and_fits(name, pages, browser):
    assert pages[name].stat().st_size <= 2_000_000
    visit = seen_by(browser, pages[name])
    assert visit.requests == [] and visit.errors == [] and not visit.broken
    for width in SIZES:
        browser.set_viewport_size({"width": width, "height": 900})
        assert browser.evaluate(TOO_WIDE) == [], width
    said = browser.evaluate(SAID)
    assert said["pictures"] >= 1 and said["unnamed"] == said["bare"] == 0 and said["left"] == 1


def letters(text):
    "Text as paper and screen agree on it: no spaces, ligatures taken apart."
    return re.sub(r"[\s\u200b]+", "", unicodedata.normalize("NFKC", text))


@needs_browser
@pytest.mark.parametrize("name", [r.stem for r in REPORTS])
def test_nothing_is_cut_on_paper(name, pages, browser):
    browser.goto(pages[name].as_uri())
    printed = pages_of(browser.pdf(prefer_css_page_size=True))
    whole = letters("".join(printed))
    text = pages[name].read_text(encoding="utf-8")
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text, re.S)
    assert len(cells) > 20
    for cell in cells:
        shown = letters(escaped.unescape(re.sub(r"<[^>]+>", "", cell)))
        assert shown in whole, shown
    if name == ADVISOR:  # two pages, then the appendix
        assert "Limits." in printed[1] and "Appendix" not in "".join(printed[:2])
        assert printed[2].lstrip(" 0123456789/").startswith("Appendix")


def test_a_report_links_to_its_runs_and_recipes_and_says_its_day(pages):
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", page_facts(page)["day"])
        assert "<details><summary>" in text and 'class="contents"' in text
        links = re.findall(r'<a href="([^"#][^"]*)"', text)
        links = [to for to in links if not to.startswith("http")]
        assert any("results/" in to for to in links) and any("recipes/" in to for to in links)
        for to in links:
            assert (page.parent / unquote(to)).exists(), f"{name}: {to}"


def test_a_link_to_a_page_beside_it_keeps_its_place(tmp_path):
    for name in ("a", "b c"):
        page = new_notebook(cells=[new_markdown_cell("# A\n\n[1](b%20c.ipynb#how) [2](a.ipynb)")])
        nbformat.write(page, tmp_path / f"{name}.ipynb")
    text = write_html(tmp_path / "a.ipynb", tmp_path / "a.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"', text) == ["b%20c.html#how", "a.html"]


def test_the_contents_page_lists_them_all(pages):
    index = next(iter(pages.values())).parent / "index.html"
    text = index.read_text(encoding="utf-8")
    for page in pages.values():
        facts = page_facts(page)
        assert f'href="{page.name}">{facts["title"]}<' in text
        assert facts["day"] in text and len(facts["headline"]) > 40 and facts["headline"] in text


def test_every_run_of_the_report_has_its_record():
    page = nbformat.read(project_root() / "reports" / f"{FIRST_LOOK}.ipynb", as_version=4)
    (front,) = [c for c in page.cells if "parameters" in c.metadata.get("tags", [])]
    names: dict = {}
    exec(front.source, {}, names)
    lists = [list(v.values()) if isinstance(v, dict) else v for v in names.values()]
    runs = {r for v in lists for r in ([v] if isinstance(v, str) else v)}
    shown = "".join(str(o) for c in page.cells for o in c.get("outputs", []))
    for name in runs:
        record = RunFolder(project_root() / "results" / name)
        assert record.finished and not record.environment["dirty"]
        assert name in shown and record.environment["commit"][:10] in shown
