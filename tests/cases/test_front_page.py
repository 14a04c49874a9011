"""The front page tried by a test: its Python runs and gives what it says, its commands and keys are there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from reidlab.core.explain import explain
from reidlab.core.recipe import load_recipe
from reidlab.data.vehicles8 import REPOSITORY
from reidlab.jobs.command import VERBS, check_words
from reidlab.jobs.parameters import check_parameters
from reidlab.jobs.sets import SETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
INLINE = re.findall(r"`((?:papermill|make|reidlab|git clone) [^`]+)`", TEXT)
OTHER_VERBS = {"new", "lab", "explain", "runs", "prepare", "import", "weights", "diff", "submit"}


def commands():
    "Every command of the page, in words."
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    for line in [*lines, *INLINE]:
        for part in line.split("  #")[0].split("&&"):
            yield tuple(shlex.split(part))


def papermill(page, out, *words):
    "A page is called with parameters that it has, and a recipe that takes the overrides."
    said = dict(zip(words[1::3], words[2::3], strict=True))
    assert out == "out.ipynb" and set(words[::3]) <= {"-p"} and (ROOT / page).is_file()
    name = Path(page).stem
    schema = SETS[name][1] if page.startswith("data_prep/") else VERBS[name].schema
    given = {k: int(v) if v.isdecimal() else v for k, v in said.items()}
    p = check_parameters({k: v for k, v in given.items() if k != "gpus"}, schema)
    assert "gpus" not in said or "gpus" in schema.model_fields
    if "recipe" in schema.model_fields:
        load_recipe(p.recipe, overrides=p.overrides)


def reidlab(verb, *words):
    "A verb that there is, with options that it has."
    assert verb in {*VERBS, *OTHER_VERBS, "--help"}
    check_words([verb, *words])
    if verb == "submit":
        assert words[0] in VERBS and words[1] == "NAME"
    elif verb in ("train", "search"):
        load_recipe(*words[:1] or ["smoke"])


def make(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def git(verb, url):
    assert (verb, url) == ("clone", REPOSITORY)


KNOWN = {"papermill": papermill, "reidlab": reidlab, "make": make, "git": git}


@pytest.mark.parametrize("words", dict.fromkeys(commands()), ids=" ".join)
def test_a_command_of_the_front_page_is_there(words):
    if words[0] in KNOWN:
        KNOWN[words[0]](*words[1:])
    else:
        assert words[0] in (".", "cd")


def test_the_first_lines_ask_for_no_gpus():
    start = TEXT[: TEXT.index("## Results")]
    assert "gpus" not in start and "drawn, not photographed" in start.lower()
    first = next(text for kind, text in BLOCKS if not kind).splitlines()
    assert first[0].startswith("make install") and len(first) == 5


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`((?:train|search|data|evaluate|model|loss)\.[a-z_.]+)`", TEXT)))
)
def test_a_key_of_the_front_page_is_one(key):
    assert explain(key)


def test_its_five_lines_of_python_give_what_they_say(lab, capsys):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    assert len(code.split("\n\n")) == 2 and code.count("\n") == 6  # imports, then four lines
    exec(compile(code, "README.md", "exec"), names := {})
    got = capsys.readouterr().out.split()
    said = re.findall(r"0\.\d\d", code.splitlines()[-1])
    assert [float(x) for x in got[-2:]] == pytest.approx([float(x) for x in said], abs=0.05)
    assert json.loads((lab.runs / "easy/metrics.json").read_text())["run"] == "easy"
    assert names["found"]["metrics"]["mAP"] > 5 * names["found"]["baselines"]["histogram"]["mAP"]
