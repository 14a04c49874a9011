"A name that somebody chose is text wherever it is shown: no page makes an element of it."

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import laboratory, tiny_recipe
from nbconvert.filters import markdown2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from reidlab.core.markup import markdown_html
from reidlab.core.recipe import load_recipe, recipe_html
from reidlab.core.run import load_runs, open_run, provenance
from reidlab.core.showing import picture_html
from reidlab.core.wording import Explained, Line
from reidlab.data.doctor import examine, findings_table
from reidlab.data.manifest import Photos, write_manifest
from reidlab.evaluation.counts import CountFinding
from reidlab.jobs.grid import SweepCell, plan_table
from reidlab.jobs.sweep import CellProgress, sweep_table
from reidlab.models.genotype import PUBLISHED, PUBLISHED_LAYERS
from reidlab.viz.contents import chapters_table, folder_page, recipes_page
from reidlab.viz.data_set import closing_line
from reidlab.viz.explorers import Explorer, Walk, epoch_html, query_html
from reidlab.viz.genotype import draw_cell, draw_genotype
from reidlab.viz.page import result_html, to_html, write_html
from reidlab.viz.ranking import ranks_html
from reidlab.viz.report import folded, sources, write_contents
from reidlab.viz.tables import compare, metrics_table

EVIL = "<img src=x onerror=alert(1)>"
QUOTED = "\"><svg onload=alert(2)>' `</code><script>alert(3)</script>"  # leaves quotes and code


class Read(HTMLParser):
    "What a browser would read: elements with their attributes, and all text."

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def is_text(html, names):
    "Every name stands in the text, and nothing in the page runs or comes from a name."
    read = Read(html)
    for tag, attrs in read.elements:
        assert tag != "script" and not [a for a in attrs if a.startswith("on")], (tag, attrs)
        assert attrs.get("src", "data:").startswith("data:"), attrs
    said = "".join(read.text)
    for name in names:
        assert name in said, said[:2000]


# --- what shows names, each given a few ------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "Photos, runs, recipes and pages that are called as nobody would call them."
    root = tmp_path_factory.mktemp("room")
    with pytest.MonkeyPatch.context() as patch:
        lab = laboratory(root, patch)
        names = [f"{EVIL}.jpg", f"{QUOTED.replace('/', '')}.jpg"]
        (root / "photos").mkdir()
        for i, name in enumerate(names):
            Image.new("RGB", (8, 16), (60 * i, 0, 0)).save(root / "photos" / name)
        (root / "photos" / f"{EVIL}.txt").write_text("no photo")
        ids = np.array([1, 1])
        photos = Photos(root / "photos", names, ids, camids=np.array([0, 1]))
        (root / "recipes").mkdir()
        card = f"# what: {EVIL}\n# paper: {QUOTED}\n# should reach: {EVIL}\n# costs: {QUOTED}\n"
        rows = json.dumps({EVIL: {"train": {"epochs": 3}}})
        (root / "recipes" / "odd.yaml").write_text(
            f"{card}data: {{name: '{EVIL}'}}\nrows: {rows}\n"
        )
        patch.setenv("REIDLAB_RECIPES_DIR", str(root / "recipes"))
        run = open_run("mine", tiny_recipe(), verb="train")
        run.finish({"mAP": 0.5})
        shutil.copytree(run.path, lab.runs / EVIL)
        yield SimpleNamespace(root=root, photos=photos, names=names, runs=lab.runs)


def strips(room):
    top = np.array([[1, 0], [0, -1]])
    yield ranks_html(room.photos, room.photos, top, ap=[1.0, np.nan]), room.names
    ranked = SimpleNamespace(top=top, ap=np.array([1.0, np.nan]))
    yield query_html(room.photos, room.photos, ranked, q=0, place=EVIL), [EVIL, room.names[0]]


def drawings(room):
    cells, layers = PUBLISHED["auto_reid"], PUBLISHED_LAYERS["cdnet"]
    for name in (EVIL, QUOTED):
        for drawn in (
            draw_genotype(cells, name),
            draw_genotype(layers, name),
            draw_cell(cells.normal, title=name),
        ):
            yield drawn.svg, [name]
            assert name in repr(drawn)
        yield epoch_html([cells], 0, title=name), [name]
        yield picture_html(b"", name), [name]


def explorers(room):
    def lost(**_):
        raise OSError(EVIL)

    walk = Walk(lost)
    yield walk.picture, [EVIL]
    yield Explorer([walk])._repr_mimebundle_()["text/html"], [EVIL]


def recipes(room):
    yield recipe_html(load_recipe("odd")), [EVIL, QUOTED]
    yield markdown2html(recipes_page(room.root / "recipes")), [EVIL]


def explained(room):
    line = Line(EVIL, QUOTED, QUOTED, range=EVIL, meaning=EVIL)
    told = Explained(EVIL, EVIL, EVIL, (line,))
    yield told._repr_html_(), [EVIL, QUOTED]
    yield markdown2html(told.to_markdown()), [EVIL, QUOTED]


def runs(room):
    table = load_runs(roots=[room.runs])
    for frame in (table, metrics_table(table), compare(table, ["mAP"]), provenance(table)):
        yield frame._repr_html_(), [EVIL]
    yield sources(table).data, [EVIL]
    yield folded(EVIL, pd.DataFrame({EVIL: [QUOTED]})).data, [EVIL, QUOTED]


def sweeps(room):
    cells = [SweepCell(EVIL, EVIL, EVIL, 0, {EVIL: QUOTED}), SweepCell("b", "b", QUOTED, 0)]
    yield plan_table(cells)._repr_html_(), [EVIL]
    yield sweep_table([CellProgress(cell, about=EVIL) for cell in cells]).to_html(), [EVIL]


def a_set(room):
    paths = [f"photos/{name}" for name in (*room.names, f"{EVIL}.txt")]
    frame = pd.DataFrame({"path": paths, "pid": 0, "camid": 0, "split": "train"})
    made = write_manifest(room.root / "a-set", "a-set", frame, room.root, version=EVIL)
    yield findings_table(examine(made))._repr_html_(), [EVIL]
    yield made.frame._repr_html_(), [EVIL]
    strange = CountFinding(EVIL, 1, published=2, level="differs", message=EVIL)
    yield markdown2html(closing_line(made, [f"{EVIL}/a.{QUOTED}"], [strange])), [EVIL]
    told = write_manifest(room.root / "set", "set", frame, room.root, classes=[EVIL]).counts()
    yield told._repr_html_(), []


def pages(room):
    page = new_notebook(cells=[new_markdown_cell("no title")])
    folder = room.root / "pages"
    folder.mkdir()
    for name in (EVIL, f"01_{EVIL}"):
        nbformat.write(page, folder / f"{name}.ipynb")
    yield markdown2html(folder_page(folder, "Pages", "All.")), [EVIL]
    page.cells[0].source = f"# A `{EVIL}`\n\n> One line."
    nbformat.write(page, folder / f"01_{EVIL}.ipynb")
    yield markdown2html(chapters_table(folder)), [EVIL]


def exported(room):
    said = [
        new_output("stream", text=EVIL),
        new_output("error", ename="ValueError", evalue=EVIL, traceback=[f"ValueError: {EVIL}"]),
        new_output("display_data", {"text/plain": QUOTED}),
        new_output("display_data", {"text/markdown": EVIL, "text/plain": ""}),
        new_output("display_data", {"image/png": "", "text/plain": EVIL}),
    ]
    code = f'#| fig-cap: "{EVIL}"\n#| fig-alt: "{EVIL}"\nNone'
    cells = [new_markdown_cell("No title."), new_code_cell(code, outputs=said)]
    path = room.root / f"{EVIL}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    yield to_html(path), [EVIL, QUOTED]
    (room.root / "html").mkdir()
    write_html(path, room.root / "html" / f"{EVIL}.html")
    yield write_contents(room.root / "html", EVIL).read_text(encoding="utf-8"), [EVIL]


@pytest.mark.parametrize(
    "show",
    [strips, drawings, explorers, recipes, explained, runs, sweeps, a_set, pages, exported],
    ids=lambda show: show.__name__,
)
def test_a_name_is_text_wherever_it_is_shown(room, show):
    shown = list(show(room))
    assert shown
    for html, names in shown:
        is_text(html, names)


def test_what_makes_an_element_is_seen():
    for harm in (EVIL, QUOTED, "<a href=x onclick=y>"):
        with pytest.raises(AssertionError):
            is_text(harm, [])


@pytest.mark.parametrize(
    "harm",
    [
        "<img src=`x` onerror=alert(1)//",  # never ends: it would swallow what follows
        "<a href='java&#115;cript:alert(1)'>x</a>",
        "<a href='java\tscript:alert(1)'>x</a>",
        '<p title="x"onclick=alert(1)>x</p>',
        "<scr<script></script>ipt>alert(1)</scr<script></script>ipt>",
        "<div style=\"background:url('https://a.example/b.png')\">x</div>",
        "<style>@import '//a.example/b'; p {background: url(//a.example/c)}</style>",
        "<svg><image href='https://a.example/b.png'/><use xlink:href='//a.example/c#d'/></svg>",
        "<table background=//a.example/b></table>",
    ],
)
@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "prose"])
def test_nothing_on_a_page_runs_or_is_loaded(kind, harm):
    body = (
        markdown_html(harm)
        if kind == "prose"
        else result_html(new_output("display_data", {kind: harm}))
    )
    for tag, attrs in Read(body + "</p>").elements:
        told = " ".join(re.sub(r"\s", "", value or "") for value in attrs.values())
        assert tag != "script" and not [a for a in attrs if a.startswith("on")], (tag, attrs)
        assert "script:" not in told and "example" not in told, (tag, attrs)
    assert "<script" not in body and "url(" not in body and "@import" not in body


def test_a_page_may_say_the_words_that_it_is_made_with():
    text = "formula0holder and formulax7holder, $x^2$"
    shown = markdown_html(text)
    assert "formula0holder and formulax7holder" in shown and shown.count("<math ") == 1
