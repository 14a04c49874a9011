"""The installed command and the public face: the same parameters, checks and errors as the pages."""

import importlib.metadata
import json
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
from conftest import TINY, walk

import reidlab
from reidlab.core.run import RunFolder
from reidlab.data.manifest import load_manifest
from reidlab.deploy.latency import latency_table
from reidlab.jobs.command import VERBS, as_typed, main
from reidlab.jobs.face import FACE
from reidlab.jobs.parameters import comments
from reidlab.jobs.sets import SETS

ROOT = Path(__file__).parents[1]
FEW = {"train_pids": 3, "test_pids": 2, "cameras": 2, "photos_per_camera": 2}


def options(given):
    "Parameters as words of a command line."
    text = lambda v: json.dumps(v) if isinstance(v, dict | list) else str(v)
    return [word for name, v in given.items() for word in (f"--{name}", text(v))]


@pytest.mark.parametrize(
    ("page", "words", "given"),
    [
        ("nbs/train", ["train"], {"gpu": 4}),
        ("nbs/train", ["train"], {"recipe-name": "smoke", "sed": 1}),
        ("nbs/train", ["train", "smoek"], {}),
        ("nbs/train", ["train"], {"seed": "lucky"}),
        ("nbs/train", ["train"], {"seed": -1}),
        ("nbs/train", ["train"], {"gpus": 99}),
        ("nbs/train", ["train"], {"device": "tpu"}),
        ("nbs/train", ["train"], {"overrides": '{"train.lr": '}),
        ("nbs/train", ["train"], {"overrides": {"train.lrr": 0.1}}),
        ("nbs/train", ["train"], {"run": "../elsewhere"}),
        ("nbs/search", ["search"], {"overrides": {"search.space.*.nodes": 0}}),
        ("nbs/generate", ["generate"], {"gpus": 2}),
        ("nbs/evaluate", ["evaluate"], {"dataset": "market1501"}),
        ("nbs/export", ["export"], {"precision": "int4"}),
        ("nbs/export", ["export"], {"out": "network.pt"}),
        ("nbs/export", ["export"], {"opset": 3}),
        ("nbs/sweep", ["sweep"], {"rows": '["no_such_row"]'}),
        ("nbs/sweep", ["sweep"], {"seeds": "[]"}),
        ("nbs/sweep", ["sweep"], {"at-once": -1}),
        ("data_prep/market1501", ["prepare", "market1501"], {"name": "../../x"}),
        ("data_prep/market1501", ["prepare", "market1501"], {"source": "no/such/place"}),
        ("data_prep/veriwild", ["prepare", "veriwild"], {"size": "tiny"}),
        ("data_prep/joined", ["prepare", "joined"], {"name": "both"}),
        ("data_prep/synthetic", ["prepare", "synthetic"], {"cameras": 1}),
    ],
)  # fmt: skip
def test_the_command_refuses_as_the_page_does(page, words, given, lab, capsys):
    told = {name.replace("-", "_"): value for name, value in given.items()}
    named = {"recipe": words[1]} if words[1:] == ["smoek"] else {}
    with pytest.raises((ValueError, FileNotFoundError)) as wrong:
        walk(f"{page}.ipynb", **told, **named)
    capsys.readouterr()
    assert main([*words, *options(given)]) == 1
    told = capsys.readouterr().err
    assert told == f"{wrong.type.__name__}: {as_typed(str(wrong.value))}\n"
    assert " -p " not in told or "papermill" in told  # what is said is what this line takes
    assert not list(lab.runs.iterdir())


@pytest.mark.parametrize(
    ("words", "schema"),
    [([name], verb.schema) for name, verb in VERBS.items()]
    + [(["prepare", page], schema) for page, (_, schema) in SETS.items()],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_help_says_what_the_page_says(words, schema, capsys):
    assert main([*words, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    said = comments(schema)
    assert set(said) == set(schema.model_fields) and all(said.values())
    for name, text in said.items():
        assert text in shown, name


def test_the_command_does_what_the_page_does(stocked, capsys, monkeypatch):
    small = TINY | {"train.epochs": 1, "data.height": 32, "data.width": 16}
    assert main(["train", "--run", "mine", "--overrides", json.dumps(small)]) == 0
    assert capsys.readouterr().out.startswith("mine: ")
    before = (stocked.runs / "mine" / "metrics.json").read_bytes()
    shown = walk("nbs/train.ipynb", run="mine", overrides=small)["job"].folder
    assert shown.finished and (shown.path / "metrics.json").read_bytes() == before
    assert main(["evaluate", "mine"]) == 0
    assert capsys.readouterr().out.startswith("mine on synthetic: mAP ")
    walk("nbs/evaluate.ipynb", run="mine")  # finished: shown, and not opened again
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "mine" in out and "mAP" in out and "finished" in out
    assert main(["runs", "--figures"]) == 0 and "val_mAP" in capsys.readouterr().out
    assert reidlab.train(run="mine", overrides=small) == RunFolder(stocked.runs / "mine").metrics()
    assert main(["export", "mine", "--takes", "photos"]) == 0
    assert "the first ten are the same in 100.0 % of the lists" in capsys.readouterr().out
    assert (stocked.runs / "mine/export/mine-photos.onnx").is_file()
    quick = partial(latency_table, batches=(1,), threads=(1,), seconds=0.01)
    monkeypatch.setattr("reidlab.jobs.export.latency_table", quick)
    assert walk("nbs/export.ipynb", run="mine")["done"].parity.lists == 1


@pytest.mark.parametrize(
    "part", ["timm", "transreid_vit", "solider_swin", "clip_vit", "clip_resnet"]
)
def test_without_timm_a_training_says_so_in_a_line(part, stocked, monkeypatch, capsys):
    "What a plain install meets first: one line at the command, and no run that keeps its name."
    monkeypatch.setitem(sys.modules, "timm", None)
    own = {"name": "test_vit"} if part == "timm" else {}
    said = json.dumps(TINY | {"model.backbone": {part: own}, "model.pool": "avg"})
    assert main(["train", "--run", "mine", "--overrides", said]) == 1
    line = (
        f'backbone {part!r} needs timm, which is not installed. Run: pip install "reidlab[timm]"\n'
    )
    assert capsys.readouterr().err.endswith(f"ValueError: {line}")
    assert not (stocked.runs / "mine").exists()


def test_sets_are_prepared_alike(lab, capsys):
    walk("data_prep/synthetic.ipynb", name="page", **FEW)
    assert main(["prepare", "synthetic", "--name", "line", *options(FEW)]) == 0
    assert capsys.readouterr().out.startswith("line (seed 0, difficulty 0.5): ")
    assert load_manifest("page").fingerprint == load_manifest("line").fingerprint


def test_a_sweep_is_planned_and_a_key_explained(lab, capsys):
    assert main(["sweep", "smoke", "--dry-run", "--at_once", "2", "--seeds", "[0, 1]"]) == 0
    assert capsys.readouterr().out == "2 cells, 2 at once.\n"
    assert main(["explain", "train.epochs"]) == 0
    assert "train.epochs" in capsys.readouterr().out
    assert main(["explain", "train.epocs"]) == 1
    assert "Close names: train.epochs" in capsys.readouterr().err
    assert main(["runs"]) == 0 and "No runs yet." in capsys.readouterr().out


NAMES = """load_recipe explain open_data build_model weighted_sum search train evaluate evaluate_rank
rank_features rerank Embedder load_runs triplet_loss derive cdnet load_reference_state hypergradient"""


def test_every_name_of_the_face_is_there():
    assert set(NAMES.split()) == set(FACE) <= set(dir(reidlab))
    for name in NAMES.split():
        assert callable(getattr(reidlab, name)) and name in vars(reidlab)
    with pytest.raises(AttributeError, match=r"name 'triplet' not found in reidlab\. Close names"):
        reidlab.triplet  # noqa: B018
    with pytest.raises(ImportError):
        from reidlab import no_such_name  # noqa: F401


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "reidlab.__version__"}
    assert importlib.metadata.version("reidlab") == reidlab.__version__
    assert project["project"]["scripts"] == {"reidlab": "reidlab.jobs.command:main"}
