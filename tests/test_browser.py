"In a real browser: the explorers live in JupyterLab, and their pages ask nothing of anyone."

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from browser import browser_page, needs_browser, open_quietly

from reidlab.viz.page import write_html

PAGE = Path(__file__).parents[1] / "nbs" / "09_viz" / "10_explorers.ipynb"
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


def settings_of(folder):
    "JupyterLab's own settings: every cell on the page, no news, no questions."
    wanted = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {
            "checkForUpdates": False,
            "doNotDisturbMode": True,
            "fetchNews": "false",
        },
    }
    for name, values in wanted.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return folder


@contextmanager
def jupyter_lab(root, home):
    "A JupyterLab on a free port that writes nothing outside `home`; its address and token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {
        "HOME": home,
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": settings_of(home / "settings"),
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
        f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "JUPYTER"))}
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *words],
        cwd=root,
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
        yield place[0], token
    finally:
        lab.terminate()
        lab.wait(timeout=20)
        lab.stderr.close()


IDLE = """async token => {
  const kernels = await (await fetch(`/api/kernels?token=${token}`)).json();
  return kernels.length === 1 && kernels[0].execution_state === 'idle';
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


def press(page, handle, key, picture, words):
    "Press an arrow key on a slider's handle and wait until the picture says so."
    before = picture.inner_html(), picture.screenshot()
    handle.focus()
    handle.press(key)
    picture.filter(has_text=re.compile(words)).wait_for(timeout=20 * SECOND)
    after = picture.inner_html(), picture.screenshot()
    assert before[0] != after[0] and before[1] != after[1]


def test_the_explorers_follow_their_sliders_in_jupyterlab(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(PAGE, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel  # or JupyterLab asks which
    nbformat.write(notebook, work / PAGE.name)
    with jupyter_lab(work, tmp_path / "home") as (address, token), browser_page() as page:
        page.set_viewport_size({"width": 1400, "height": 1000})
        page.goto(f"{address}/lab/tree/{PAGE.name}?token={token}")
        page.locator(".jp-NotebookPanel-notebook").wait_for(timeout=60 * SECOND)
        page.wait_for_function(IDLE, arg=token, polling=200, timeout=60 * SECOND)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        page.wait_for_function(READY, arg=cells, polling=200, timeout=60 * SECOND)
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator('li[data-command="runmenu:run-all"]').click()
        page.wait_for_function(RAN, arg=WRONG, polling=200, timeout=120 * SECOND)
        page.wait_for_function(IDLE, arg=token, polling=200, timeout=60 * SECOND)
        assert page.locator(WRONG).all_inner_texts() == []

        explorer = page.locator(".jp-OutputArea-output", has=page.locator(".noUi-handle")).first
        epochs, queries = (explorer.locator(".noUi-handle").nth(i) for i in (0, 1))
        cells, strip = explorer.locator(".reidlab-search"), explorer.locator(".reidlab-query")
        press(page, epochs, "ArrowLeft", cells, "epoch 11 of 12")
        press(page, epochs, "ArrowLeft", cells, "epoch 10 of 12")
        press(page, queries, "ArrowRight", strip, "query 2 of 16, hardest first")
        explorer.get_by_role("button", name="by person").click()
        strip.filter(has_text="query 2 of 16, by person").wait_for(timeout=20 * SECOND)
        assert page.locator(WRONG).all_inner_texts() == []
