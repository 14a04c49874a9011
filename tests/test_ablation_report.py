"""The ablation's report and the page of published figures: with records, with some, with none."""

import ast
import json
import re
import shlex
import shutil

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from reidlab.core.recipe import load_recipe, recipe_names
from reidlab.core.run import keep_run, open_run, write_json
from reidlab.core.settings import project_root
from reidlab.evaluation import parity
from reidlab.evaluation.published import read_published
from reidlab.evaluation.reproduction import command
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.parameters import SweepJob, check_parameters
from reidlab.training.network import build_network

SHOWN = ast.Name("_shown", ast.Store(), lineno=1, col_offset=0)
ABLATION, REPRODUCTION = "reports/03_ablation.ipynb", "reports/04_reproduction.ipynb"
ROWS = [
    n.split("/")[1] for n in recipe_names(project_root() / "recipes") if n.startswith("ablation/")
]


def made_up(lab, recipe, seed, mAP, dataset="synthetic"):
    "A finished run with the evaluation that a page would read, and nothing trained."
    run = open_run("", load_recipe(recipe, seed), verb="train", root=lab.runs)
    run.finish({"params": 1000, "macs": 10_000}, seconds=30.0, dataset=dataset)
    card = {"rerank": "none", "ap_rule": "standard", "chosen": "the last epoch"}
    figures = {"mAP": mAP, "mAP_trapezoidal": mAP - 0.02, "R1": mAP + 0.1, "mINP": mAP / 2}
    about = {"run": run.name, "recipe": recipe, "seed": seed, "dataset": dataset}
    write_json(
        run.path / "evaluate" / dataset / "metrics.json",
        {**about, "split": "test", "protocol": card, "metrics": figures},
    )
    return run


def fill(lab, rows=ROWS, worth=None):
    "Three seeds a row: what a row is worth, and what its seed adds."
    for row in rows:
        for seed, luck in enumerate((0.0, 0.05, -0.03)):
            own = (worth or {}).get(row, 0.0) + 0.001 * seed
            made_up(lab, f"ablation/{row}", seed, 0.6 + luck + own)


def sentences(page, **parameters):
    "What the code cells of a report show, as text, and the names they leave; run in this process."
    said, names = [], {"__name__": "page"}
    for cell in nbformat.read(project_root() / page, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        body = ast.parse(cell.source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), page, "exec"), names)
        if last is not None:
            exec(
                compile(
                    ast.Module(
                        [ast.Assign([SHOWN], last.value, lineno=last.lineno, col_offset=0)], []
                    ),
                    page,
                    "exec",
                ),
                names,
            )
            shown = names.pop("_shown")
            said.append(getattr(shown, "data", None) or str(shown))
        if "parameters" in cell.metadata.get("tags", []):
            names |= parameters
    plt.close("all")
    return "\n".join(said), names


def test_without_records_the_ablation_says_what_to_run(lab):
    said, _ = sentences(ABLATION)
    assert "**Not answered: 30 of 30 runs are missing.**" in said
    assert "papermill nbs/sweep.ipynb" in said and "-p recipe ablation" in said
    assert not re.search(r"Shown to|helps|harms", said)
    assert "0 of 3 seeds" in said and "No run yet." in said
    assert "BNNeck" in said and "4.0" in said  # the published side stands all the same


def test_with_records_the_ablation_answers(lab):
    fill(lab, worth={"no_bnneck": -0.05, "no_erasing": 0.04, "bare": -0.08})
    said, names = sentences(ABLATION)
    assert "Shown to help: BNNeck (+" in said and "all eight (+" in said
    assert "Shown to harm here: random erasing (-" in said and "Every row is complete." in said
    quiet = re.search(r"Not shown either way: (.+?)\.\*\*", said)[1].split(", ")
    assert set(quiet) == {"warm-up", "label smoothing", "soft margin"} | {
        "mirrored photos",
        "padded crop",
        "flip at test",
    }
    e = names["apart"]["BNNeck"]
    np.testing.assert_allclose(e.value, 0.05, atol=1e-12)  # the seeds' luck cancels


def test_a_row_that_lacks_a_seed_is_left_out_and_named(lab):
    fill(lab, rows=["full", "no_bnneck", "no_crop"])
    shutil.rmtree(lab.runs / "ablation.no_crop-train-s2")
    said, names = sentences(ABLATION)
    assert "Not answered: 22 of 30" in said and "What is there so far" in said
    assert "padded crop (2 of 3 seeds)" in said and "padded crop" not in names["groups"]
    assert "BNNeck" in names["groups"]


def test_the_ablation_reads_kept_records_alone(lab):
    fill(lab)
    for run in sorted(lab.runs.iterdir()):
        keep_run(run.name, [lab.runs], lab.results)
    shutil.rmtree(lab.runs)
    said, names = sentences(ABLATION)
    assert "Every row is complete." in said and len(names["asked"]) == 9


def test_without_runs_no_published_figure_reads_as_reproduced(lab):
    said, names = sentences(REPRODUCTION)
    assert "**none**" in said and "0 of " in said and "None of these runs is on record" in said
    table = names["table"]
    assert set(table["R1 ours"]) == {"–"} and not table["status"].str.startswith("run").any()
    assert len(table) == len(read_published())
    n = len(names["checks"])
    assert names["checks"]["passed"].all() and f"{n} of {n} checks agree" in said
    covered(names["waits"], table.loc[names["waiting"], ["status", "recipe"]])


def covered(waits, rows):
    "Every row's own command asks for nothing that its whole table's command does not run."
    assert sum(row["figures"] for row in waits) == len(rows) and len(waits) < 12
    asked = {}
    for words in (shlex.split(row["command"]) for row in waits):
        if words[1] == "sweep":
            given = dict(zip(words[3::2], words[4::2], strict=True))
            assert given["--rows"] == '["all"]'
            asked.setdefault(words[2], []).append(json.loads(given.get("--grid", "{}")))
        else:
            assert words[1] == "evaluate" and words[-2:] == ["--dataset", "partial_ilids"]
    for status, recipe in rows.itertuples(index=False):
        words = shlex.split(status.partition("one command: ")[2].partition(", once ")[0])
        given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
        if "run" not in given:
            own = json.loads(given.get("grid", "{}"))
            rerank = own.get("evaluate.rerank", ["none"])[0]
            assert any(
                grid.get("data.name") == own.get("data.name")
                and rerank in grid.get("evaluate.rerank", [rerank])
                for grid in asked[recipe.split("/")[0]]
            ), status


def test_a_run_finds_its_published_figure(lab):
    made_up(lab, "strong/bnneck", 0, 0.85, dataset="market1501")
    said, names = sentences(REPRODUCTION)
    table = names["table"]
    (row,) = table[table["status"].str.startswith("run: ")].to_dict("records")
    assert (row["mAP published"], row["mAP ours"], row["mAP difference"]) == (
        "85.7",
        "85.0",
        "-0.7",
    )
    assert row["AP rule"] == "standard" and row["selection ours"] == "the last epoch"
    assert "strong.bnneck-train-s0" in said and "**none**" not in said


def test_the_published_figures_are_those_collected():
    table = read_published()
    counts = {"pytorch-reid-lite": 68, "reid_baseline_with_syncbn": 83, "reid-strong-baseline": 36}
    counts |= {"CDNet": 11, "Auto-ReID-Fast": 2}
    assert table.groupby("source").size().to_dict() == counts
    r7 = table[(table["rank1"] == 0.94329) & (table["map"] == 0.834388)]
    assert len(r7) == 1 and r7.iloc[0]["ap_rule"] == "trapezoidal"
    trap = set(table.loc[table["ap_rule"] == "trapezoidal", "source"])
    assert trap == {"pytorch-reid-lite"}
    named = table.loc[table["recipe"] != "", "recipe"]
    files = {name.split("/")[0] for name in named}
    assert files == {"strong", "sbn", "lite", "lite_a", "lite_b", "lite_c", "cdnet"}


@pytest.mark.parametrize("name", ["strong", "sbn", "lite_c"])
def test_every_row_of_a_published_table_has_its_figures(name):
    named = set(read_published()["recipe"])
    rows = {n for n in recipe_names(project_root() / "recipes") if n.startswith(f"{name}/")}
    assert rows and rows <= named


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("strong/bnneck", 25_050_176), ("sbn/market", 25_050_176), ("lite_c/c04", 24_226_095)],
)
def test_a_published_recipe_builds_the_published_network(recipe, parameters):
    said = load_recipe(recipe, folder=project_root() / "recipes")
    with torch.device("meta"):
        net = build_network(said.from_scratch(), 751)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_what_a_row_says_to_type_is_a_plan_of_its_own():
    table = read_published()
    table = table[table["recipe"].isin(recipe_names()) & (table["selection"] != "epoch of a log")]
    runs = {}
    for _, row in table.iterrows():
        words = shlex.split(command(row).partition(", once ")[0])
        given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
        if "run" in given:
            continue
        job = check_parameters({k: v for k, v in given.items() if k != "gpus"}, SweepJob)
        (cell,) = plan_cells(job.recipe, job.rows, job.grid, job.seeds)
        recipe = cell.resolved()
        assert recipe.data.name == row["dataset"]
        assert row["rerank"] in (recipe.evaluate.rerank.name, "not said")
        runs.setdefault(cell.name, set()).add((row["recipe"], row["dataset"], row["rerank"]))
    assert len(runs) > 20 and all(len(asked) == 1 for asked in runs.values())


def test_the_page_of_published_figures_names_a_check_that_fails(lab, monkeypatch):
    made, checks = parity.read_parity()
    checks.loc[0, "passed"] = False
    monkeypatch.setattr(parity, "read_parity", lambda: (made, checks))
    said, _ = sentences(REPRODUCTION)
    assert f"{len(checks) - 1} of {len(checks)} checks agree" in said
    assert f"1 of {len(checks)} do not agree: {checks.loc[0, 'system']}" in said
