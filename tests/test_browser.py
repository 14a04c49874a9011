"In a real browser: the explorers live in JupyterLab, and their pages ask nothing of anyone."

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from browser import browser_page, needs_browser, one_browser, open_quietly

from reidlab.viz.links import LINK
from reidlab.viz.page import write_html

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "nbs" / "10_viz" / "10_explorers.ipynb"
pytestmark = needs_browser
SECOND = 1000  # playwright counts in milliseconds


# --- pages that stand alone --------------------------------------------------------------------


def test_an_exported_explorer_keeps_its_picture_and_asks_for_nothing(tmp_path):
    visit = open_quietly(write_html(PAGE, tmp_path / "page.html"))
    assert visit.requests == [] and visit.errors == [] and visit.broken == []
    assert visit.pictures >= 2 + 1 + 11  # cells; shares and entropy; a query and its ten ranks
    assert "toy-search, epoch 12 of 12" in visit.text and "hardest first" in visit.text


def test_a_page_that_talks_is_heard(tmp_path):
    (tmp_path / "talks.html").write_text(
        "<img src='http://127.0.0.1:9/pixel.png'><img src='data:image/png;base64,AAAA'>"
        "<script>console.error('loud'); undefined.word</script>"
    )
    visit = open_quietly(tmp_path / "talks.html")
    assert visit.requests == ["http://127.0.0.1:9/pixel.png"]
    assert "loud" in visit.errors and any("undefined" in error for error in visit.errors)
    assert len(visit.broken) == 2 and visit.pictures == 0


# --- JupyterLab --------------------------------------------------------------------------------


@dataclass
class Lab:
    "A JupyterLab that runs: where it is, and what it shows."

    address: str
    token: str
    root: Path  # of the clone that it is started in

    def open(self, page, path=""):
        "Open a file as a fresh visitor would; without a path, whatever JupyterLab opens by itself."
        page.set_viewport_size({"width": 1400, "height": 1000})
        at = f"/lab/workspaces/{secrets.token_hex(4)}/tree/{path}" if path else "/"
        page.goto(f"{self.address}{at}?token={self.token}")
        return self.shown(page, path) if path else self.shown(page)

    def shown(self, page, path="nbs/index.ipynb"):
        "The notebook in front, once it is that one and its cells are there."
        front = page.locator(".lm-DockPanel-tabBar .lm-mod-current", has_text=Path(path).name)
        front.first.wait_for(timeout=60 * SECOND)
        panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").first
        panel.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60 * SECOND)
        return panel

    def start(self, page, path):
        "Run all cells of the page in front, and do not wait."
        cells = nbformat.read(self.root / path, as_version=4).cells
        n = sum(cell.cell_type == "code" for cell in cells)
        page.wait_for_function(IDLE, arg=[self.token, path], polling=200, timeout=60 * SECOND)
        page.wait_for_function(READY, arg=n, polling=200, timeout=60 * SECOND)
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator('li[data-command="runmenu:run-all"]').click()

    def run_all(self, page, path, timeout=300):
        "Run all cells of the page in front and wait for the last; none may end in an error."
        self.start(page, path)
        page.wait_for_function(RAN, arg=WRONG, polling=200, timeout=timeout * SECOND)
        page.wait_for_function(IDLE, arg=[self.token, path], polling=200, timeout=60 * SECOND)
        assert page.locator(WRONG).all_inner_texts() == []

    def git(self, *words):
        "What git says of the clone."
        line = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(self.root), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def clone(to):
    "The tree as it stands, as a repository of its own: nothing in it was ever run or trusted."
    line = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(line, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    there = Lab("", "", to)
    there.git("init", "-q")
    there.git("add", "-A")
    there.git("commit", "-qm", "a clone")
    return to


def whole_pages(folder):
    "A setting of JupyterLab's: every cell on the page at once, not only those in sight."
    file = folder / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"windowingMode": "none"}))
    return folder


@contextmanager
def jupyter_lab(root, home):
    "`reidlab lab` on a free port, which writes nothing outside `root` and `home`."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {
        "HOME": home,
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": whole_pages(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
        "MPLCONFIGDIR": home / "matplotlib",
    }
    words = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=20",  # another process may have taken it meanwhile
        f"--IdentityProvider.token={token}",
    ]
    kept = ("PYTEST", "JUPYTER", "REIDLAB")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(kept)}
    outside["PYTHONPATH"] = os.pathsep.join([str(ROOT), outside.get("PYTHONPATH", "")])
    lab = subprocess.Popen(
        [sys.executable, "-m", "reidlab.jobs.command", "lab", *words],
        cwd=root / "nbs",  # anywhere within
        env=outside | {k: str(v) for k, v in places.items()} | {"JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = deque(maxlen=40)
        for line in lab.stderr:  # blocks until the server speaks, or ends
            said.append(line)
            if place := re.search(r"http://127\.0\.0\.1:\d+(?=/lab)", line):
                break
        else:
            pytest.fail("JupyterLab did not start:\n" + "".join(said))
        threading.Thread(target=said.extend, args=(lab.stderr,), daemon=True).start()
        yield Lab(place[0], token, root)
    finally:
        lab.terminate()
        try:
            lab.wait(timeout=20)
        except subprocess.TimeoutExpired:  # it was told to while it began
            lab.kill()
            lab.wait()
        lab.stderr.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "One JupyterLab and one browser for the whole file."
    folder = tmp_path_factory.mktemp("lab")
    root = clone(folder / "clone")
    with one_browser(), jupyter_lab(root, folder / "home") as there:
        yield there


IDLE = """async ([token, path]) => {
  const sessions = await (await fetch(`/api/sessions?token=${token}`)).json();
  return sessions.some(s => s.path === path && s.kernel.execution_state === 'idle');
}"""
# all cells are there, and the page knows its kernel; before, Run All asks which one
READY = """cells => document.querySelectorAll('.jp-CodeCell .jp-InputPrompt').length === cells
  && [...document.querySelectorAll('.jp-Toolbar-kernelName')].some(n => /Python 3/.test(n.textContent))"""
WRONG = ", ".join(f'[data-mime-type="application/vnd.jupyter.{x}"]' for x in ("error", "stderr"))
RAN = """wrong => {
  if (document.querySelector(wrong)) return true;
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  return prompts.length > 0 && prompts.every(p => /^\\[\\d+\\]:$/.test(p.textContent.trim()));
}"""


# an output that shows no picture although it has one, or shows a picture's name instead of it
UNSEEN = re.compile(r"<IPython\.core|Error displaying widget|Loading widget|HBox\(|<Figure size")


SEEN = """[...document.querySelectorAll('.jp-OutputArea-output img')]
  .filter(i => i.naturalWidth > 20 && i.getBoundingClientRect().width > 20).length"""


def kept_pictures(path):
    "How many pictures the kept outputs of a page hold, whatever their form."
    found = 0
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            pixels = any(kind.startswith("image/") for kind in data)
            found += pixels or data.get("text/html", "").count("<img ")
    return found


@pytest.mark.parametrize("name", ["08_genotype", "10_explorers", "02_ranking"])
def test_a_page_shows_its_pictures_without_trust(lab, name):
    path = f"nbs/10_viz/{name}.ipynb"
    with browser_page() as page:
        panel = lab.open(page, path)
        wanted = kept_pictures(lab.root / path)
        page.wait_for_function(f"{SEEN} >= {wanted}", timeout=30 * SECOND)
        assert page.evaluate(SEEN) == wanted > 0
        text = "\n".join(panel.locator(".jp-OutputArea-output").all_inner_texts())
        assert not UNSEEN.search(text)
        if "explorers" in name:
            assert text.count("Run All Cells") == 2 and "query 1 of 16, hardest first" in text
            assert panel.locator(".noUi-handle").count() == 0


LINKS = """found => found.map(a => a.href)
  .filter(to => to.startsWith(location.origin) && !to.startsWith(location.href.split('#')[0]))"""


def links_of(panel):
    "What a page's texts link to, from the root; other people's addresses are left out."
    panel.locator('.jp-RenderedMarkdown a[href*="/files/"]').first.wait_for(timeout=30 * SECOND)
    found = panel.locator(".jp-RenderedMarkdown a:not(.jp-InternalAnchorLink)").evaluate_all(LINKS)
    return {unquote(urlsplit(to).path).removeprefix("/files/") for to in found}


KINDS = """async ([token, paths]) => Promise.all(paths.map(async path => {
  const answer = await fetch(`/api/contents/${path}?content=0&token=${token}`);
  return answer.ok ? (await answer.json()).type : 'nothing';
}))"""


def links_in(path):
    "The same of a page that is read as a file."
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    places = (path.parent / found["to"].partition("#")[0] for found in LINK.finditer(text))
    return {os.path.normpath(place) for place in places}


def test_every_link_of_the_front_page_and_the_rooms_opens_something(lab):
    rooms = sorted((lab.root / "nbs").glob("[0-9][0-9]_*/00_*.ipynb"))
    with browser_page() as page:
        front = lab.open(page)  # of itself it opens the front page
        led = links_of(front)
        path = rooms[-1].relative_to(lab.root).as_posix()
        front.locator(f'.jp-RenderedMarkdown a[href*="/{path}"]').first.click()
        of_room = links_of(lab.shown(page, path))  # JupyterLab reads a link as the file says it
        assert of_room == {Path(to).relative_to(lab.root).as_posix() for to in links_in(rooms[-1])}
        for room in rooms:
            led |= {Path(to).relative_to(lab.root).as_posix() for to in links_in(room)}
        kinds = dict(
            zip(paths := sorted(led), page.evaluate(KINDS, [lab.token, paths]), strict=True)
        )
        wrong = {to: kind for to, kind in kinds.items() if kind not in ("notebook", "file")}
        assert len(kinds) > 200 and wrong == {}  # a folder, or nothing
        for end in (".md", ".csv", ".ini", ".cff"):  # one file of every kind, by a click
            page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab").first.click()
            front.locator(f'.jp-RenderedMarkdown a[href*="{end}"]').first.click()
            page.locator(".lm-DockPanel-tabBar .lm-mod-current", has_text=end).wait_for()
        assert page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts() == []  # no news


def test_a_job_page_that_was_filled_in_and_saved_stays_a_form(lab):
    path, kept = "nbs/sweep.ipynb", lab.root / "runs" / "pages" / "sweep.lab.ipynb"
    with browser_page() as page:
        panel = lab.open(page, path)
        panel.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+End")
        page.keyboard.type("\ndry_run = True")
        lab.run_all(page, path)
        assert "stays the form that it is" in panel.inner_text()
        page.keyboard.press("Control+s")
        page.locator(".lm-DockPanel-tabBar .lm-mod-current:not(.jp-mod-dirty)").wait_for()
        assert lab.git("status", "--porcelain") == ""
        text = kept.read_text(encoding="utf-8")
        assert '"dry_run = True"' in text and "execute_result" in text  # what was entered, came out


SMALL = {  # two hundred short epochs: nobody waits for the last
    "data.synthetic.train_pids": 16,
    "data.synthetic.test_pids": 4,
    "data.synthetic.cameras": 3,
    "data.sampler": {"pk": {"p": 4}},
    "data.height": 64,
    "data.width": 32,
    "data.val_fraction": 0.3,
    "train.epochs": 200,
}
FURTHER = "was => document.querySelector('.jp-OutputArea-output progress').value > was"
OTHER = "was => [...document.querySelectorAll('.jp-CodeCell:has(progress) img')][0].src !== was"
END = """async ([token, path]) => {
  const sessions = await (await fetch(`/api/sessions?token=${token}`)).json();
  const mine = sessions.find(s => s.path === path);
  await fetch(`/api/sessions/${mine.id}?token=${token}`, {method: 'DELETE'});
}"""


def test_a_job_moves_while_it_runs(lab):
    "Its card is completed, its bar and its curve go on, and the newest strip is there."
    path = "nbs/train.ipynb"
    with browser_page() as page:
        panel = lab.open(page, path)
        panel.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+End")
        page.keyboard.insert_text(f"\noverrides = {SMALL}")
        lab.start(page, path)
        card = panel.locator(".jp-OutputArea-output", has_text="200 epochs of 5 steps").first
        card.filter(has_text="an estimate: from the first").wait_for(timeout=90 * SECOND)
        cell = page.locator(".jp-CodeCell", has=page.locator("progress"))
        assert "?" not in cell.locator("progress + code").inner_text()
        for _ in range(2):
            was = cell.locator("progress").evaluate("bar => bar.value")
            page.wait_for_function(FURTHER, arg=was, polling=100, timeout=60 * SECOND)
        cell.locator("img").nth(1).wait_for(timeout=60 * SECOND)  # the curve, and a strip
        for _ in range(2):
            was = cell.locator("img").first.evaluate("image => image.src")
            page.wait_for_function(OTHER, arg=was, polling=100, timeout=60 * SECOND)
        assert page.locator(WRONG).all_inner_texts() == []
        page.evaluate(END, [lab.token, path])


def press(page, handle, key, picture, words):
    "Press an arrow key on a slider's handle and wait until the picture says so."
    before = picture.inner_html(), picture.screenshot()
    handle.focus()
    handle.press(key)
    picture.filter(has_text=re.compile(words)).wait_for(timeout=20 * SECOND)
    after = picture.inner_html(), picture.screenshot()
    assert before[0] != after[0] and before[1] != after[1]


def test_the_explorers_follow_their_sliders_in_jupyterlab(lab):
    with browser_page() as page:
        path = PAGE.relative_to(ROOT).as_posix()
        lab.open(page, path)
        lab.run_all(page, path)
        outputs = page.locator(".jp-OutputArea-output")
        epochs, queries = (page.locator(".noUi-handle").nth(i) for i in (0, 1))
        cells = outputs.locator(".reidlab-search").first
        strip = outputs.locator(".reidlab-query").first
        press(page, epochs, "ArrowLeft", cells, "epoch 11 of 12")
        press(page, epochs, "ArrowLeft", cells, "epoch 10 of 12")
        press(page, queries, "ArrowRight", strip, "query 2 of 16, hardest first")
        page.get_by_role("button", name="by person").click()
        strip.filter(has_text="query 2 of 16, by person").wait_for(timeout=20 * SECOND)
        assert page.locator(WRONG).all_inner_texts() == []
