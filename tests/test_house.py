"""The house itself: the order of the book, jobs' front doors, recipes, the files a newcomer installs from."""

import ast
import json
import re
import subprocess
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from papermill import inspect_notebook
from rattler import MatchSpec, VersionSpec
from rattler import Version as CondaVersion

from reidlab.core.recipe import SECTION_NAMES, load_recipe, recipe_card, recipe_names
from reidlab.core.settings import Settings
from reidlab.jobs.parameters import (
    EvaluateJob,
    ExportJob,
    GenerateJob,
    RecipeJob,
    SweepJob,
    comments,
)
from reidlab.jobs.sets import SETS
from reidlab.viz.contents import chapters_table, recipes_page
from reidlab.viz.links import LINK, right_link
from reidlab.viz.page import to_readme
from reidlab.viz.reference import reference_page

ROOT = Path(__file__).parents[1]
CHAPTERS = [p for p in sorted((ROOT / "nbs").glob("*_*/*.ipynb")) if p.name[:2] != "00"]
FRONTS = sorted((ROOT / "nbs").glob("*_*/00_*.ipynb"))
TUTORIALS = sorted((ROOT / "nbs").glob("tutorial_*.ipynb"))
ROOMS = {front.stem[3:] for front in FRONTS}
READING = [  # no jobs
    *(ROOT / "nbs" / f"{name}.ipynb" for name in ("index", "tour", "reference")),
    *TUTORIALS,
]
JOBS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p not in READING] + sorted(
    (ROOT / "data_prep").glob("*.ipynb")
)
PAGES = CHAPTERS + FRONTS + JOBS + sorted((ROOT / "reports").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# where a machine keeps its people and projects; not preceded by what makes it part of a URL,
# of a longer path or of a picture's letters
PLACES = "home|Users|root|work|workspace|mnt|media|opt|tmp|scratch|private|content|kaggle"
MACHINE_PATH = re.compile(rf"(?<![\w.~+=/)\]}}-])/(?:{PLACES})/[\w.@-]|\b[A-Za-z]:\\{{1,2}}Users\b")


def shown(path):
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=shown)
each_chapter = pytest.mark.parametrize("page", CHAPTERS, ids=shown)
each_job = pytest.mark.parametrize("page", JOBS, ids=shown)


@cache
def cells(page, kind="code"):
    return [c for c in nbformat.read(page, as_version=4).cells if c.cell_type == kind]


def code(cell):
    "A cell's syntax tree; lines that only IPython understands are left out."
    lines = [line for line in cell.source.splitlines() if not re.match(r"\s*[%!]", line)]
    return ast.parse("\n".join(lines))


def module_of(page):
    "The module a chapter becomes: losses.triplet."
    found = [re.match(r"#\|\s*default_exp\s+(\S+)", c.source) for c in cells(page)]
    (name,) = [m[1] for m in found if m]
    return name


# --- the book --------------------------------------------------------------------------------


def test_the_listing_is_the_book():
    assert len(CHAPTERS) > 30
    modules = [module_of(page) for page in CHAPTERS]
    assert len(set(modules)) == len(modules)
    for page, module in zip(CHAPTERS, modules, strict=True):
        number, name = page.stem.split("_", 1)
        assert re.fullmatch(r"\d\d", number) and page.parent.name[0].isdigit()
        assert module == f"{page.parent.name.split('_', 1)[1]}.{name}", shown(page)
        assert (ROOT / "reidlab" / f"{module.replace('.', '/')}.py").is_file()
    for room in {page.parent for page in CHAPTERS}:
        numbers = sorted(int(page.stem[:2]) for page in room.glob("*.ipynb"))
        assert numbers == list(range(len(numbers))), room.name  # 00 is the front page
    rooms = sorted({page.parent.name for page in CHAPTERS})
    assert [room[:3] for room in rooms] == [f"{i:02}_" for i in range(len(rooms))]
    made = {p.relative_to(ROOT / "reidlab") for p in (ROOT / "reidlab").rglob("*.py")}
    hand = {p.as_posix() for p in made if p.stem not in ("__init__", "_modidx")}
    assert hand == {f"{module.replace('.', '/')}.py" for module in modules}


def imported(page):
    "The modules of reidlab that a page imports, without the package's name."
    known = {module_of(p) for p in CHAPTERS}
    for cell in cells(page):
        for node in ast.walk(code(cell)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{shown(page)} imports relatively"
                if node.module.split(".")[0] != "reidlab":
                    continue
                where = node.module.removeprefix("reidlab").removeprefix(".")
                if where in known:
                    yield where
                else:  # from reidlab.core import look; a room alone is nothing yet
                    names = (f"{where}.{alias.name}".strip(".") for alias in node.names)
                    yield from (name for name in names if name not in ROOMS)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "reidlab" and alias.name != "reidlab":
                        yield alias.name.removeprefix("reidlab.")


@each_chapter
def test_chapters_import_what_stands_before_them(page):
    order = [module_of(p) for p in CHAPTERS]
    own = module_of(page)
    allowed = {*order[: order.index(own)], own}  # its own twin, for processes it starts
    assert set(imported(page)) <= allowed, sorted(set(imported(page)) - allowed)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in CHAPTERS + FRONTS], ids=shown)
def test_jobs_and_reports_import_chapters(page):
    assert set(imported(page)) <= {module_of(p) for p in CHAPTERS}


@pytest.mark.parametrize("page", FRONTS, ids=shown)
def test_a_front_page_lists_its_room(page):
    assert page.stem[3:] == page.parent.name[3:]
    (listing,) = [c for c in cells(page, "markdown") if "contents" in c.metadata.get("tags", [])]
    assert listing.source == f"## Chapters\n\n{chapters_table(page.parent)}"  # make readme
    rooms = [front.parent for front in FRONTS]
    before = [p for p in CHAPTERS if p.parent in rooms[: rooms.index(page.parent) + 1]]
    assert set(imported(page)) <= {module_of(p) for p in before}
    assert re.match(r"# .+\n\n> .+", cells(page, "markdown")[0].source)
    outputs = [o for cell in cells(page) for o in cell.outputs]
    assert any(
        "image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in outputs
    )
    assert len(cells(page)) == 3  # imports, an example, a picture: one screen


@pytest.mark.parametrize("page", PAGES + READING, ids=shown)
def test_links_lead_somewhere(page):
    for cell in cells(page, "markdown"):
        for found in LINK.finditer(cell.source):
            assert right_link(found["to"], page.parent, ROOT / "nbs") == found["to"]  # make readme


def test_the_tour_has_fourteen_chapters_of_ninety_minutes():
    text = "".join(c.source for c in cells(READING[1], "markdown"))
    minutes = [
        int(m) for m in re.findall(r"^\| \d+ \| \[.+\]\(.+\) \| (\d+) \| .+ \|$", text, re.M)
    ]
    assert len(minutes) == 14 and 80 <= sum(minutes) <= 100
    assert f"{sum(minutes)} in all" in text


@pytest.mark.parametrize("page", TUTORIALS, ids=shown)
def test_a_tutorial_asks_for_ten_lines_at_most(page):
    assert not [o for c in cells(page) for o in c.outputs if o.output_type == "error"]
    own = [c.source for c in cells(page) if c.source.startswith("%%writefile own.py")]
    for text in own:
        nodes = [n for n in ast.parse(text.partition("\n")[2]).body]
        lines = [n.end_lineno - n.lineno + 1 for n in nodes]
        assert sum(lines) <= 12, lines  # with the import and the line that puts it on the shelf


def test_the_list_of_recipes_is_whole():
    assert (ROOT / "recipes" / "README.md").read_text(encoding="utf-8") == recipes_page(
        ROOT / "recipes"
    )  # make readme


@each_page
def test_a_page_holds_nothing_that_it_should_not(page):
    for kind in ("code", "markdown", "raw"):
        for cell in cells(page, kind):
            assert set(cell.metadata) <= {"tags"}, f"metadata {dict(cell.metadata)}"
            assert not re.search(r"\b(?:TODO|FIXME|XXX)\b", cell.source), cell.source
            assert not MACHINE_PATH.search(cell.source), MACHINE_PATH.search(cell.source)[0]
    stars = [
        n.module
        for cell in cells(page)
        for n in ast.walk(code(cell))
        if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"
    ]
    assert not stars


@each_chapter
def test_a_chapter_opens_with_its_title_and_shows_its_results(page):
    assert cells(page)[0].source.startswith("#| default_exp ")
    assert re.match(r"# .+\n\n> .+", cells(page, "markdown")[0].source)
    outputs = [o for cell in cells(page) for o in cell.outputs]
    assert outputs, "no outputs: run it and keep them"
    assert not [o.evalue for o in outputs if o.output_type == "error"]
    assert len(json.dumps(outputs)) <= 300_000


# --- the jobs --------------------------------------------------------------------------------


SCHEMAS = [EvaluateJob, ExportJob, GenerateJob, RecipeJob, SweepJob]
SCHEMAS += [schema for _, schema in SETS.values()]


def schema_of(page):
    "The schema that a job hands to check_parameters."
    (call,) = [
        node
        for cell in cells(page)
        for node in ast.walk(code(cell))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_parameters"
    ]
    assert ast.unparse(call.args[0]) == "globals()"
    (schema,) = [s for s in SCHEMAS if s.__name__ == call.args[1].id]
    return schema


def test_the_jobs_are_there():
    doors = {"nbs/search.ipynb", "nbs/train.ipynb", "nbs/evaluate.ipynb"}
    assert doors | {"data_prep/market1501.ipynb"} <= {shown(page) for page in JOBS}


@each_job
def test_papermill_reads_every_parameter(page):
    (front,) = [c for c in cells(page) if "parameters" in c.metadata.get("tags", [])]
    nodes = code(front).body
    assert all(isinstance(n, ast.Assign) and len(n.targets) == 1 for n in nodes)
    written = {n.targets[0].id: ast.literal_eval(n.value) for n in nodes}
    read = inspect_notebook(str(page))
    assert list(read) == list(written)
    assert {k: ast.literal_eval(v["default"]) for k, v in read.items()} == written
    schema = schema_of(page)
    schema(**written)
    told = {name: v["help"] for name, v in read.items()}
    assert all(told.values()), "each parameter has a comment"
    assert told == comments(schema), "the door, the schema and --help say the same"
    assert written == schema().model_dump(), "and name the same defaults"
    if page.parent.name == "data_prep":
        assert schema is SETS[page.stem][1]


@each_job
def test_a_job_has_no_outputs_and_defines_nothing(page):
    assert not [c.source for c in cells(page) if c.outputs or c.execution_count]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    assert not [n for c in cells(page) for n in ast.walk(code(c)) if isinstance(n, kinds)]


# --- recipes and settings --------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names(ROOT / "recipes"))
def test_recipes_load_and_keep_their_four_lines(name):
    recipe = load_recipe(name, folder=ROOT / "recipes")
    card = recipe_card(name, ROOT / "recipes")
    assert list(card) == ["what", "paper", "should reach", "costs"] and all(card.values())
    assert recipe.name == name and type(recipe).model_validate(yaml.safe_load(recipe.to_yaml()))


def test_recipes_hold_sections_alone():
    assert "smoke" in recipe_names(ROOT / "recipes")
    for path in (ROOT / "recipes").rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(values) <= {*SECTION_NAMES, "base", "rows"}, shown(path)


def test_every_setting_is_there_and_explained():
    lines = (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()
    body = lines[lines.index("[reidlab]") + 1 :]
    keys = {line.split("=")[0].strip(): n for n, line in enumerate(body) if re.match(r"\w", line)}
    assert list(keys) and set(keys) == {f.name for f in fields(Settings)}
    bare = [key for key, n in keys.items() if not re.match(r"# \w+", body[n - 1] if n else "")]
    assert not bare


# --- what a newcomer installs from -----------------------------------------------------------


def requirements():
    "Everything that pyproject.toml asks for."
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(r) for r in [*PROJECT["dependencies"], *(r for e in extras for r in e)]]


def test_conda_users_get_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert (conda["name"], conda["channels"]) == (PROJECT["name"], ["conda-forge"])
    python, pip, inner = conda["dependencies"]
    assert MatchSpec(pip).name.normalized == "pip" and inner.keys() == {"pip"}
    spec = MatchSpec(python)
    assert spec.name.normalized == "python"
    wanted = SpecifierSet(PROJECT["requires-python"])
    offered = VersionSpec(str(spec.version))
    for version in ("3.9.0", "3.10.14", "3.11.0", "3.11.9", "3.12.3", "3.13.1", "3.14.0"):
        assert offered.matches(CondaVersion(version)) == wanted.contains(version), version
    (editable,) = inner["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable)[1].split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])


def test_the_lock_pins_all_that_is_asked_for():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    odd = [x for x in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==\d+(\.\w+)*", x)]
    assert not odd, "name==version alone: no URL, no +local"
    pins = {canonicalize_name(n): Version(v) for n, v in (x.split("==") for x in lines)}
    assert len(pins) == len(lines)
    for need in requirements():
        pin = pins.get(canonicalize_name(need.name))
        assert pin and need.specifier.contains(pin), f"{need} and the lock's {pin}"


def test_the_readme_is_the_front_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == to_readme(ROOT / "nbs" / "index.ipynb"), "run: make readme"


def test_the_reference_says_what_the_code_says():
    page = ROOT / "nbs" / "reference.ipynb"
    assert page.read_text(encoding="utf-8") == reference_page(page), "run: make readme"
    reading = ("index", "tour", "00_core/00_core")
    for name in reading:
        text = "".join(c.source for c in cells(ROOT / "nbs" / f"{name}.ipynb", "markdown"))
        assert "reference.ipynb" in text, f"{name} does not lead to the reference"


def tracked():
    "What git holds or would take."
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine():
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for match in MACHINE_PATH.finditer(content.decode("utf-8", errors="replace")):
            found.setdefault(shown(path), match[0])
    assert not found


def test_runs_and_data_stay_out_of_git():
    kept = {shown(p).split("/")[0] for p in tracked()}
    assert not kept & {"runs", "data", ".venv", "_proc", "_docs"}
    assert not [p for p in tracked() if p.suffix in (".pt", ".pth", ".pkl")]


def test_the_search_for_machine_paths_finds_them():
    slash = "/"
    bad = ("home/ada/x", "root/x", "work/main", "Users/ada", "tmp/x")
    for path in bad:
        for text in (
            f"{slash}{path}",
            f'"{slash}{path}"',
            f"a={slash}{path}"[2:],
            f" {slash}{path}",
        ):
            assert MACHINE_PATH.search(text), text
    assert MACHINE_PATH.search("C:" + "\\Users\\ada")
    for fine in (
        f"https://x.org{slash}home{slash}a",
        "runs/work/x",
        f"..{slash}work/x",
        "/proc/cpuinfo",
    ):
        assert not MACHINE_PATH.search(fine), fine
