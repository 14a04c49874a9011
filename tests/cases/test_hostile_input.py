"""Hostile and broken texts, a table for each reader: one line that names the file or key, and no hang."""

import itertools
import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_bad_input import refused

from reidlab.core.parts import options_of
from reidlab.core.recipe import load_recipe, validated
from reidlab.core.settings import settings
from reidlab.core.upgrade import value_at
from reidlab.data.manifest import COLUMNS, read_manifest, write_manifest
from reidlab.data.own import cameras_of, read_mapping, read_table
from reidlab.interchange.autoreid import read_seed_config
from reidlab.interchange.reid_lite import read_lite_config
from reidlab.interchange.strong_baseline import read_strong_config
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.parameters import EvaluateJob, RecipeJob, SweepJob, check_parameters
from reidlab.losses.catalogue import weighted_sum
from reidlab.models.genotype import PUBLISHED, find_genotype, genotype_from
from reidlab.models.ops import SPACES
from reidlab.nas.derive import RULES, derive
from reidlab.nas.health import RULES as HEALTH
from reidlab.nas.health import checked_rules


@pytest.fixture(autouse=True)
def ends():
    "A reader that waits for ever is ended after 20 seconds."

    def stop(*_):
        raise AssertionError("still reading after 20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- what is wrong with a file, whatever it should hold -------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join(['*' + before] * 9)}]\n"
    for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as open_end:
        open_end.bind(os.path.relpath(path))


def device(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


def dangling(path):
    path.symlink_to(path.with_name("gone"))


HARMS = {
    "latin-1": b"a: caf\xe9\n",
    "utf-16": "a: 1\n".encode("utf-16"),
    "utf-16-be": b"\xfe\xff" + "a: 1\n".encode("utf-16-be"),
    "zero-bytes": b"\0" * 99,
    "noise": bytes(range(255, 0, -1)),
    "zip": b"PK\x03\x04\xff\xff",
    "half": b'{"a": [1, ',
    "number": b"5",
    "word": b"hello",
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "deep-braces": b'{"a":' * 5000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "folder": Path.mkdir,
    "pipe": pipe,
    "socket": a_socket,
    "device": device,
    "loop": loop,
    "dangling": dangling,
    "long": None,
}


def read_recipe_file(path):
    load_recipe(path.stem, folder=path.parent)


def read_settings_file(path):
    settings(path.parent)


READERS = {
    "recipe": (".yaml", read_recipe_file),
    "settings": (".ini", read_settings_file),
    "genotype": (".json", lambda path: find_genotype(str(path))),
    "lite": (".json", read_lite_config),
    "strong": (".yml", lambda path: read_strong_config(path, "strong", True)),
    "seed": (".yml", read_seed_config),
    "mapping": (".json", read_mapping),
    "table": (".csv", read_table),
}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    "A manifest's two files, as they are written."
    folder = tmp_path_factory.mktemp("manifest")
    rows = [("a.jpg", 1, 0, "train"), ("b.jpg", 2, 0, "query"), ("c.jpg", 2, 1, "gallery")]
    for path, *_ in rows:
        (folder / path).write_bytes(path.encode())
    write_manifest(folder, "set", pd.DataFrame(rows, columns=COLUMNS), folder)
    return json.loads((folder / "manifest.json").read_text()), (folder / "manifest.csv").read_text()


def laid(folder, card, **files):
    "A folder with a manifest in which something else stands."
    for name, text in {"manifest.json": json.dumps(card[0]), "manifest.csv": card[1]}.items():
        (folder / name).write_text(text)
    for name, spoil in files.items():
        path = folder / f"manifest.{name}"
        path.unlink()
        spoil(path) if callable(spoil) else path.write_bytes(spoil)
    return folder


@pytest.mark.parametrize("file", ["json", "csv"])
@pytest.mark.parametrize("harm", [harm for harm in HARMS if harm != "long"])
def test_a_broken_manifest_is_one_line_that_names_it(file, harm, card, tmp_path):
    with refused(f"manifest.{file}"):
        read_manifest(laid(tmp_path, card, **{file: HARMS[harm]}))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"format": True}, ("format True",)),
        ({"format": -1}, ("format -1",)),
        ({"format": 10**400}, ()),
        ({"name": "../set"}, ("manifest.json: data set",)),
        ({"root": "a\0b"}, ("root", "zero byte")),
        ({"root": "\ud800"}, ("root",)),
        ({"root": "x/" * 5000}, ("root",)),
        ({"version": 5}, ("version",)),
        ({"version": ["1"]}, ("version",)),
        ({"protocol": ["market1501"]}, ("protocol",)),
        ({"counts": [5]}, ("counts",)),
        ({"counts": {"train photos": 1}}, ("counts.train photos",)),
        ({"counts": {"train photos": {"ours": -1}}}, ("counts.train photos.ours",)),
        ({"rows": []}, ("rows",)),
        ({"rows": None}, ("rows",)),
        ({"rows": {"count": "3", "sha256": ""}}, ("rows.count",)),
        ({"rows": {"count": 3}}, ("rows.sha256",)),
        ({"contents": None}, ("contents",)),
        ({"marks": [5]}, ("marks",)),
        ({"drawn": 5}, ("drawn",)),
        ({"findings": 5}, ("findings",)),
        ({"findings": ["broken"]}, ("findings.0",)),
        ({"left_out": {}}, ("left_out",)),
        ({"classes": "ab"}, ("classes",)),
        ({"classes": [1, 2]}, ("classes.0",)),
        ({"parts": [{"name": "a"}]}, ("parts.0.family",)),
        ({"mended_from": "set"}, ("mended_from",)),
        ({"fingerprint": "2:0 1:0"}, ("manifest.csv", "has the fingerprint of others")),
        ({"seal": "0"}, ("do not match their seal",)),
    ],
)
def test_bad_values_in_a_manifest_s_card(values, words, card, tmp_path):
    with refused("manifest.", *words):
        read_manifest(laid(tmp_path, card, json=json.dumps(card[0] | values).encode()))


@pytest.mark.parametrize(
    "old, new, word",
    [
        ("a.jpg,1", "a.jpg,1.5", "line 2"),
        ("a.jpg,1", "a.jpg,nan", "line 2"),
        ("a.jpg,1", "a.jpg,", "line 2"),
        ("a.jpg,1", "a.jpg,99999999999999999999", "line 2"),
        ("a.jpg,1", "a.jpg,0x1", "line 2"),
        ("a.jpg,1", "a.jpg,9", "edited"),
        ("1,0,train", "1,-5,train", "edited"),
        ("a.jpg", "../a.jpg", "edited"),
        ("a.jpg", "b.jpg", "1 of them for a photo that has one"),
        ("a.jpg", '"a.jpg', ""),
        ("a.jpg", "a\0.jpg", ""),
        ("train", "trian", "split 'trian'"),
        ("train", "TRAIN", "split 'TRAIN'"),
        ("path,pid", "path,path,pid", ""),
        ("path,pid", "path,name", "pid"),
        ("c.jpg,2,1,gallery\n", "", "3 were prepared"),
        ("c.jpg,2,1,gallery\n", "c.jpg,2,1\n", ""),
        ("a.jpg,1,0,train\n", "a.jpg,1,0,train\n" * 2, "4 rows"),
    ],
)
def test_bad_rows_in_a_manifest(old, new, word, card, tmp_path):
    assert old in card[1]
    with refused("manifest.csv", word):
        read_manifest(laid(tmp_path, card, csv=card[1].replace(old, new, 1).encode()))


@pytest.mark.parametrize("how", [("\n", "\r\n"), (",", ";"), (",", "\t"), ("path", "\ufeffpath")])
def test_a_manifest_saved_by_a_spreadsheet_is_read(how, card, tmp_path):
    text = card[1].replace(*how) if how[0] != "path" else "\ufeff" + card[1]
    assert len(read_manifest(laid(tmp_path, card, csv=text.encode())).frame) == 3


@pytest.mark.parametrize(
    ("reader", "harm"),  # settings always have their name, and a folder may lack them
    [pair for pair in itertools.product(READERS, HARMS) if pair != ("settings", "long")],
)
def test_a_broken_file_is_one_line_that_names_it(reader, harm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ending, read = READERS[reader]
    name = ("n" * 300 if harm == "long" else "settings") + ending
    path, spoil = tmp_path / name, HARMS[harm]
    if callable(spoil):
        spoil(path)
    elif spoil is not None:
        path.write_bytes(spoil)
    gone = reader == "recipe" and harm in ("dangling", "loop", "long")  # no such recipe
    seen = 24  # letters of a long name that are shown under any temporary folder's
    with refused(name.removesuffix(ending)[:seen] if gone else name[:seen]):
        read(path)


YAML = {
    "bomb": (BOMB, "aliases unfolded"),
    "itself": ("a: &a [*a]\n", "aliases unfolded"),
    "tag": ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "binary": ("a: !!binary aGVsbG8=\n", "kind bytes"),
    "nan": ("a: .nan\n", "finite"),
    "key": ("? [1]\n: 2\n", "a key that is no text"),
    "two": ("a: 1\n---\nb: 2\n", "single document"),
    "tab": ("a:\n\t- 1\n", "is not YAML"),
}


@pytest.mark.parametrize("reader", ["recipe", "strong", "seed"])
@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_no_settings(reader, kind, tmp_path):
    ending, read = READERS[reader]
    text, word = YAML[kind]
    (tmp_path / f"mine{ending}").write_text(text)
    with refused("mine", word):
        read(tmp_path / f"mine{ending}")


@pytest.mark.parametrize("reader", ["genotype", "lite", "mapping"])
@pytest.mark.parametrize(
    "text, word",
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": {"b": [1], "b": [2]}}', "'b' stands twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": [1e999]}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_json_that_says_a_key_twice_or_no_number(reader, text, word, tmp_path):
    if reader == "genotype" and text.startswith("{'"):
        word = "JSON"
    (tmp_path / "mine.json").write_text(text)
    with refused("mine.json", word):
        READERS[reader][1](tmp_path / "mine.json")


# --- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("base: 5", ("base needs the name", "got 5")),
        ("base: [a, b]", ("base needs the name",)),
        ("base: mine", ("its own base",)),
        ("base: mine/a\nrows: {a: {}}", ("its own base", "mine/a")),
        ("base: " + "n" * 400, ("not found",)),
        ("base: '../../etc/passwd'", ("not found",)),
        ("rows: 5", ("rows needs names", "got 5")),
        ("rows: [a, b]", ("rows needs names",)),
        ("rows: {a: 5}", ("row a needs sections", "got 5")),
        ("rows: {a: [train]}", ("row a needs sections",)),
        ("train: {epochs: 3}\ntrain: {lr: 1}", ("'train' stands twice", "line 2")),
        ("train: {epochs: 1, epochs: 2}", ("'epochs' stands twice",)),
        ("train: 5", ("train", "got 5")),
        ("loss: [softmax]", ("loss needs", "softmax")),
        ("loss: {softmax: 5}", ("loss.softmax needs options",)),
        ("loss: {softmax: {weight: [1]}}", ("loss.softmax.weight", "number")),
        ("search: {stages: [{epochs: 1, epoch: 2}]}", ("key 'search.stages.0.epoch' not found",)),
        (
            "search: {space: {reid: {nodes: 100000}}}",
            ("search.space.reid.nodes", "less than or equal to 16"),
        ),
        (
            "search: {space: {reid: {cells_per_stage: [1, 1, 1000000]}}}",
            ("reid.cells_per_stage.2", "less than"),
        ),
        ("model: {backbone: {derived: {layers: 1000000}}}", ("derived.layers", "equal to 200")),
        ("data: {sampler: {pk: {p: 1000000000}}}", ("data.sampler.pk.p", "less than")),
        ("data: {width: 1000000000}", ("data.width", "less than or equal to 4096")),
        ("data: {name: 2024}", ("data.name", "string")),
        ('data: {name: "a\\nb"}', ("name needs text of one line",)),
        ("train: {epochs: 1000000000000}", ("train.epochs", "less than")),
        ("train: {schedule: {multistep: {milestones: 40}}}", ("multistep.milestones", "got 40")),
        ("model: {backbone: {resnet50: {last_stride: true}}}", ("last_stride needs a number",)),
    ],
)
def test_bad_recipes(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with refused("mine", *words):
        load_recipe("mine" if "rows: {a: {}}" not in text else "mine/a", folder=tmp_path)


def test_bases_that_go_round(tmp_path):
    for name, base in ("ab", "bc", "ca"):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n")
    with refused("'a' is its own base", "a → b → c → a"):
        load_recipe("a", folder=tmp_path)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "../mine", "/etc/passwd", "", ".", "é" * 200])
def test_names_that_no_recipe_has(name, tmp_path):
    with refused("recipe", "not found"):
        load_recipe(name, folder=tmp_path)


# --- overrides and other parameters --------------------------------------------------------------


@pytest.mark.parametrize(
    "schema, wrong, words",
    [
        (RecipeJob, {"overrides": "[" * 5000}, ("overrides", "JSON")),
        (RecipeJob, {"overrides": '{"a": ' * 500}, ("overrides", "JSON")),
        (RecipeJob, {"overrides": "5"}, ("overrides", "dictionary")),
        (RecipeJob, {"overrides": '"a"'}, ("overrides", "dictionary")),
        (RecipeJob, {"overrides": "{'a': 1}"}, ("overrides", "JSON such as")),
        (RecipeJob, {"overrides": {"train.clip": float("inf")}}, ("overrides", "finite")),
        (RecipeJob, {"seed": -1}, ("seed", "greater")),
        (RecipeJob, {"seed": 2**70}, ("seed", "less")),
        (RecipeJob, {"seed": 1.5}, ("seed",)),
        (RecipeJob, {"seed": float("nan")}, ("seed", "finite")),
        (RecipeJob, {"gpus": 10**9}, ("gpus", "less than or equal to 1024")),
        (RecipeJob, {"gpus": True}, ("gpus",)),
        (
            EvaluateJob,
            {"overrides": '{"evaluate.max_rank": 1e999}'},
            ("overrides", "evaluate.max_rank"),
        ),
        (SweepJob, {"rows": "5"}, ("rows", "list")),
        (SweepJob, {"seeds": "[1, NaN]"}, ("seeds", "finite")),
        (SweepJob, {"grid": '{"a": [1], "a": [2]}'}, ("grid", "stands twice")),
        (SweepJob, {"grid": '{"a": 5}'}, ("grid", "list")),
        (SweepJob, {"at_once": 10**9}, ("at_once", "less")),
    ],
)
def test_bad_parameters(schema, wrong, words):
    with refused("parameter", *words):
        check_parameters(wrong, schema)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"": 1}, ("override",)),
        ({"lr": 1}, ("override 'lr' not found",)),
        ({"train": 5}, ("train",)),
        ({"data.synthetic.size": 1}, ("not found",)),
        ({"train.clip.x": 1}, ("train.clip",)),
        ({"train.optimizer.adamw.lr.x": 1}, ("train.optimizer.adamw.lr",)),
        ({"train.optimizer.lr": 1}, ("write train.optimizer.adamw.lr",)),
        ({"train..clip": 1}, ("train.",)),
        ({"x" * 9999: 1}, ("override",)),
        ({"loss": 5}, ("loss needs",)),
        ({"loss": {"softmax": {"weight": float("nan")}}}, ("finite",)),
        ({"data.name": "a\0b"}, ("one line",)),
    ],
)
def test_bad_overrides(overrides, words):
    with refused("recipe" if "override" not in words[0] else "override", *words):
        load_recipe("smoke", overrides=overrides)


def test_a_grid_is_counted_before_it_is_written_out():
    grid = {"train.ema": [0.1] * 1000, "train.clip": [1] * 1000, "data.sampler.pk.p": [2] * 1000}
    with refused("1000000000 cells", "train.ema with 1000", "2000 are the most"):
        plan_cells("smoke", grid=grid)
    with refused("3000 cells", "fewer values"):
        plan_cells("smoke", seeds=range(3000))


# --- settings --------------------------------------------------------------------------------------

KEYS = (
    "data_dir = d\nraw_dirs = r\nweights_dir = w\nruns_dir = u\nresults_dir = s\nrecipes_dir = c\n"
)
WHOLE = f"[reidlab]\n{KEYS}device = cpu\nworkers = 0\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("workers = 1\n", ("before any section", "line 1")),
        ("[other]\nworkers = 1\n", ("no section [reidlab]",)),
        ("[reidlab]\nworkers = 1\nworkers = 2\n", ("already exists",)),
        ("[reidlab]\n[reidlab]\n", ("already exists",)),
        ("[reidlab]\nworkers = nan\n", ("workers", "whole number")),
        ("[reidlab]\nworkers = inf\n", ("workers", "whole number")),
        ("[reidlab]\nworkers = ²\n", ("workers", "whole number")),
        ("[reidlab]\nworkers = 1000000000\n", ("workers", "to 256")),
        ("[reidlab]\nworkers = -1\n", ("workers", "whole number")),
        ("[reidlab]\nworkers\n", ("no settings file",)),
        ("[reidlab\nworkers = 1\n", ("before any section",)),
        ("[reidlab]\ndata_dir =\n", ("data_dir", "a folder on one line")),
        ("[reidlab]\ndata_dir = a\n  b\n", ("data_dir", "a folder on one line")),
        ("[reidlab]\ndata_dir = " + "n" * 5000, ("data_dir", "a folder")),
        ("[reidlab]\ndata_dir = ~nobody-here/x\n", ("data_dir", "no folder")),
        ("[reidlab]\ndevice = gpu\n", ("device", "auto, cpu or cuda")),
        ("[reidlab]\nwork" + "x" * 500 + " = 1\n", ("not found",)),
    ],
)
def test_bad_settings(text, words, tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("REIDLAB_")]:
        monkeypatch.delenv(key)
    (tmp_path / "settings.ini").write_text(WHOLE)
    (tmp_path / "settings.local.ini").write_text(text)
    with refused("settings.local.ini", *words):
        settings(tmp_path)


# --- genotypes -------------------------------------------------------------------------------------

EDGE = ["sep_conv_3x3", 0]
PLAIN = json.loads(PUBLISHED["auto_reid"].to_json())


@pytest.mark.parametrize(
    "values, words",
    [
        ({"normal_concat": [2.0]}, ("normal_concat", "got [2.0]")),
        ({"normal_concat": [True, 2]}, ("normal_concat",)),
        ({"normal_concat": 5}, ("normal_concat", "got 5")),
        ({"normal_concat": [2] * 10**6}, ("normal_concat",)),
        ({"normal": [EDGE, EDGE]}, ("format 1 lists them by node",)),
        ({"normal": [[EDGE]] * 1000}, ("normal has 1000 nodes",)),
        ({"normal": [[EDGE] * 1000]}, ("normal node 2 has 1000 edges",)),
        ({"normal": "sep_conv_3x3"}, ("normal needs a list",)),
        ({"normal": {}}, ("normal needs a list",)),
        ({"normal": [[["sep_conv_3x3", 0.0]]]}, ("(op, source)",)),
        ({"normal": [[["sep_conv_3x3", True]]]}, ("(op, source)",)),
        ({"normal": [[[5, 0]]]}, ("(op, source)",)),
        ({"ops": 5}, ()),
        ({"space": ["reid"]}, ()),
        ({"format": "1"}, ("format",)),
        ({"alphas": [float("nan")]}, ("alphas.0", "finite")),
        ({"layers": [[3, 5, 10**9]]}, ("layers", "255")),
        ({"layers": [[3, 5.0, 1]]}, ("layers",)),
        ({"layers": 5}, ("layers",)),
        ({"layers": [5]}, ("layer",)),
        ({"layers": []}, ("layers",)),
        ({"layers": [[3, 5, 1]] * 5000}, ("layers",)),
    ],
)
def test_bad_genotypes(values, words, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(PLAIN | values))
    with refused("g.json", *words):
        find_genotype(str(tmp_path / "g.json"))


@pytest.mark.parametrize(
    "text",
    [
        "Genotype(normal=[], reduce=[], normal_concat=range(100000000000))",
        "Genotype(normal=list(range(10**10)))",
        "Genotype(" + "[" * 5000,
        "Genotype(normal=" + "-" * 50000 + "1)",
        "Genotype(normal=[('sep_conv_3x3', 0)], reduce=[('sep_conv_3x3', 0)])",
        "Genotype(**{})",
        "__import__('os').system('ls')",
        "Genotype(normal=range('a'))",
        "x" * 200_000,
        "",
    ],
)
def test_genotypes_in_the_originals_style(text, tmp_path):
    (tmp_path / "g.txt").write_text(text)
    with refused("g.txt"):
        find_genotype(str(tmp_path / "g.txt"))


def test_flat_edges_of_the_originals_still_read():
    flat = [EDGE, ["skip_connect", 1]] * 4
    assert genotype_from({"normal": flat, "reduce": flat}).nodes == 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_alphas_that_are_no_numbers_decide_nothing(rule, wrong):
    even, beta = np.zeros((14, 8)), np.zeros(14)
    lost = even.copy()
    lost[3, 2] = wrong
    for tables in ((lost, even), (even, lost)):
        with refused("alphas are not finite", "Lower the rate"):
            derive(*tables, SPACES["darts"], rule, beta, beta)
    if rule == "edge_norm":
        with refused("alphas are not finite"):
            derive(even, even, SPACES["darts"], rule, beta, np.full(14, wrong))


@pytest.mark.parametrize(
    "terms, words",
    [
        ({"softmax": {"weight": "heavy"}}, ("loss.softmax.weight", "heavy")),
        ({"softmax": {"weight": float("inf")}}, ("loss.softmax.weight", "finite")),
        ({"softmax": {"smoothing": 2}}, ("smoothing", "less than or equal to 1")),
        ({"triplet": {"margin": float("nan")}}, ("margin", "finite")),
        ({"triplet": {"valid_only": 1}}, ("valid_only", "true or false")),
        ({"range": {"k": 10**9}}, ("loss.range.k", "less than or equal to 1000")),
        ({"am": {"scale": -1}}, ("scale", "greater than or equal to 0")),
    ],
)
def test_bad_options_of_a_loss(terms, words):
    with refused(*words):
        weighted_sum(terms)


@pytest.mark.parametrize(
    "rule, option, value",
    [
        ("skips", "least", -1),
        ("skips", "least", 10**7),
        ("skips", "margin", float("nan")),
        ("skips", "margin", 1.5),
        ("skips", "patience", 0),
        ("skips", "patience", True),
        ("skips", "kind", "odd"),
        ("parameter_free", "share", -0.1),
        ("parameter_free", "mass", 2),
        ("none", "times", float("inf")),
        ("none", "times", -1.0),
        ("none", "kind", "../x"),
        ("entropy", "floor", 10**400),
        ("entropy", "before", 50),
        ("eigenvalue", "ratio", -1.0),
        ("eigenvalue", "window", 0),
        ("eigenvalue", "window", 10**12),
        ("eigenvalue", "apart", -5),
        ("unchanged", "epochs", 0),
        ("unheard", "share", "x" * 10**5),
        ("unheard", "after", 1.1),
    ],
)
def test_bounds_of_what_watches_a_search(rule, option, value):
    with refused(f"search.health.{rule}", option):
        checked_rules({rule: {option: value}})


def test_each_number_that_a_rule_takes_is_bounded():
    for rule, check in HEALTH.items():
        for name, option in options_of(check).items():
            assert option.kind not in (int, float, str), (rule, name)


# --- other programs' settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, values",
    [
        ("SOLVER:\n  STEPS: (40, 70)\n", {"train.schedule.multistep.milestones": [40, 70]}),
        ("SOLVER:\n  STEPS: [40, 70]\n  BASE_LR: 5e-4\n", {"train.optimizer.adam.lr": 5e-4}),
        ("INPUT:\n  SIZE_TRAIN: (256, 128)\n  SIZE_TEST: [256, 128]\n", {"data.height": 256}),
        ("MODEL:\n  NAME: ('resnet50')\n", {"model.backbone.resnet50.last_stride": 1}),
        ("SOLVER:\n  WEIGHT_DECAY: '0.0005'\n", {"train.optimizer.adam.weight_decay": 5e-4}),
    ],
)
def test_strong_files_read_as_yacs_reads_them(text, values, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    mapping, lines = read_strong_config(tmp_path / "c.yml", "strong", True)
    assert not [line for line in lines if line.status == "refused"]
    recipe = json.loads(validated("c", mapping).model_dump_json())
    for dotted, value in values.items():
        assert value_at(recipe, dotted) == value


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.STEPS", "40"),
        ("SOLVER.STEPS", "soon"),
        ("SOLVER.BASE_LR", "fast"),
        ("SOLVER.BASE_LR", "[1, 2]"),
        ("SOLVER.IMS_PER_BATCH", "many"),
        ("SOLVER.WARMUP_ITERS", "[1]"),
        ("INPUT.SIZE_TRAIN", "256"),
        ("MODEL.NAME", "[resnet50]"),
        ("DATALOADER.SAMPLER", "{a: 1}"),
        ("TEST.FEAT_NORM", "[1]"),
    ],
)
def test_a_wrong_kind_of_value_is_a_refused_line(key, value, tmp_path):
    section, name = key.split(".")
    (tmp_path / "c.yml").write_text(f"{section}:\n  {name}: {value}\n")
    _, lines = read_strong_config(tmp_path / "c.yml", "strong", True)
    assert [line for line in lines if line.status == "refused"]


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": "many"},
        {"lr": {"decay_step": 40}},
        {"lr": {"decay_step": ["a"]}},
        {"model_params": {"pcb_n_parts": "six"}},
        {"batch_sampling_params": {"P": [4]}},
        {"lr": 5},
    ],
)
def test_a_wrong_kind_of_value_in_a_lite_file(values, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(values))
    _, lines = read_lite_config(tmp_path / "p.json")
    assert [line for line in lines if line.status == "refused"]


@pytest.mark.parametrize("value", [".inf", "nan", "1e999", "[1]", "{a: 1}", "many"])
def test_a_wrong_value_in_a_seed_file(value, tmp_path):
    (tmp_path / "s.yml").write_text(f"MODEL: {{model_name: Darts_normal, w_lr: {value}}}\n")
    with refused("s.yml", "w_lr"):
        read_seed_config(tmp_path / "s.yml")


# --- patterns of one's own -------------------------------------------------------------------------


@pytest.mark.slow  # each waits until its time is over
@pytest.mark.parametrize(
    "pattern", [r"(?P<cam>(a+)+)b", r"(?P<cam>(a|a)*)b", ".*" * 12 + "(?P<cam>b)"]
)
def test_a_pattern_that_does_not_end(pattern):
    with refused("camera", "does not come to an end"):
        cameras_of(pd.DataFrame({"path": ["a" * 60 + ".jpg"]}), pattern)


@pytest.mark.parametrize("pattern", ["(", "(?P<cam>", "[", "(?P<cam>a){99999999999}", "nothing"])
def test_a_pattern_that_is_none(pattern):
    with refused("camera"):
        cameras_of(pd.DataFrame({"path": ["a.jpg"]}), pattern)


def test_a_pattern_is_searched_for_as_before():
    table = pd.DataFrame({"path": ["é_c2/a.jpg", "x_c10/b.jpg"]})
    assert cameras_of(table, r"_c(?P<cam>\d+)").tolist() == [2, 10]


def test_a_manifest_that_is_no_file(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    os.mkfifo(tmp_path / "manifest.csv")
    with pytest.raises((ValueError, FileNotFoundError)):
        read_manifest(tmp_path)
