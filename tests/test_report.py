"""The report as the advisor gets it: one file, in a browser, asking nobody for anything."""

from pathlib import Path

import nbformat
import pytest
from browser import needs_browser, open_quietly

from reidlab.core.run import RunFolder
from reidlab.core.settings import project_root
from reidlab.viz.page import write_html

FIRST_LOOK = project_root() / "reports" / "01_first_look.ipynb"


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    "The committed page as its HTML."
    return write_html(FIRST_LOOK, tmp_path_factory.mktemp("html") / "01_first_look.html")


def test_the_report_is_one_small_file(html):
    assert html.stat().st_size <= 5_000_000
    text = html.read_text(encoding="utf-8")
    assert "<svg" in text and text.count("data:image/png") >= 8
    assert "application/vnd.jupyter.widget" not in text


@needs_browser
def test_the_report_opens_without_a_request_or_an_error(html, tmp_path):
    visit = open_quietly(html, screenshot=tmp_path / "page.png")
    assert visit.requests == [] and visit.errors == [] and not visit.broken
    assert visit.pictures >= 8
    for heading in ("What was searched", "What was learned", "How they rank", "Limits"):
        assert heading in visit.text


def test_every_run_of_the_report_has_its_record():
    page = nbformat.read(FIRST_LOOK, as_version=4)
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
