"""What differed: planted differences are found at their step and called by their names."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.files import write_json
from reidlab.core.run import RunFolder, open_run
from reidlab.data import loaders
from reidlab.data.loaders import open_data
from reidlab.jobs.command import main
from reidlab.jobs.diff import diff_runs, plot_parting
from reidlab.nas.search import search_from_recipe
from reidlab.training.fit import fit_from_recipe
from reidlab.training.step import Trainer

SMALL = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0, "train__epochs": 1}


def trained(name, root, photos, make=Trainer, seed=0, **how):
    "A run, from where its folder stands to its end."
    recipe = tiny_recipe(seed=seed, **SMALL | how)
    data = open_data(recipe.data, recipe.seed, photos)
    run = open_run(name, recipe, "train", data=data.fingerprint, root=root)
    fit_from_recipe(recipe, run.path, workers=0, data_dir=photos, make=make)
    return run


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory):
    "A root with a run of one epoch and one of nine."
    root = tmp_path_factory.mktemp("runs")
    run = partial(trained, root=root, photos=photos)
    run("short")
    run("long", train__epochs=9)
    return SimpleNamespace(root=root, run=run, diff=partial(diff_runs, roots=[root]))


def turned(layer, step, before=False):
    "A trainer that turns over the lowest bit of one weight after a step, or before it."

    class Turns(Trainer):
        done = 0

        def turn(self):
            weight = dict(self.model.named_parameters())[layer].data
            weight.view(torch.int32)[(0,) * weight.dim()] ^= 1

        def step(self, *args, **options):
            self.done += 1
            if before and self.done == step:
                self.turn()
            terms = super().step(*args, **options)
            if not before and self.done == step:
                self.turn()
            return terms

    return Turns


@pytest.mark.parametrize("every", [1, 16])
def test_a_weight_turned_over_at_step_37_is_found_in_its_layer(every, base, monkeypatch):
    monkeypatch.setenv("REIDLAB_LEDGER", str(every))
    layer, name = "backbone.layer2.1.0.weight", f"turned{every}"
    base.run(name, make=turned(layer, 37), train__epochs=9)
    found = base.diff("long", name)
    first = found.apart[0]
    assert (first.field, first.step, first.layers) == ("weights", 37, (layer,))
    assert "pixels and loss are the same" in found.sentence and "Nothing" in found.sentence
    assert [p for p in found.apart if p.step < 37] == [] and not found.equal
    assert plot_parting(found).get_yscale() == "log"


def test_a_weight_turned_over_between_two_steps_shows_in_the_next(base):
    base.run("between", make=turned("neck.norm.weight", 4, before=True))
    found = base.diff("short", "between")
    assert found.apart[0].step == 4 and {"loss", "weights"} & {found.apart[0].field}
    kept = [p for p in found.apart if p.field in ("lr", "photos", "pixels")]
    assert kept == []


def other_threads(base, monkeypatch):
    try:
        torch.set_num_threads(2)
        base.run("threads")
    finally:
        torch.set_num_threads(1)


def other_augmentation(base, monkeypatch):
    vary = loaders.Variation
    monkeypatch.setattr(loaders, "Variation", lambda data, seed: vary(data, seed + 1))
    base.run("augmentation")


def other_rate(base, monkeypatch):
    base.run("rate", train__optimizer={"adamw": {"lr": 0.003}})


def other_order(base, monkeypatch):
    sampler = loaders.recipe_sampler
    there = lambda photos, data, seed=0, **where: sampler(photos, data, seed + 1, **where)
    monkeypatch.setattr(loaders, "recipe_sampler", there)
    base.run("order")


def other_start(base, monkeypatch):
    class Elsewhere(Trainer):
        def __init__(self, model, *args, **options):
            with torch.no_grad():
                model.neck.norm.weight[0] = 1.0001
            super().__init__(model, *args, **options)

    base.run("start", make=Elsewhere)
    given(base, "start", given={"model.backbone.*.weights": "ab" * 32})


def other_decay(base, monkeypatch):
    base.run("decay", train__optimizer={"adamw": {"weight_decay": 0.1}})


def other_seed(base, monkeypatch):
    base.run("seed", seed=1)


def other_statistics(base, monkeypatch):
    class Forgets(Trainer):
        def move(self):
            super().move()
            self.model.neck.norm.running_var.fill_(2.0)

    base.run("statistics", make=Forgets)


def given(base, name, **more):
    "Write something else into a run's environment."
    run = RunFolder(base.root / name)
    made = {k: v for k, v in run.environment.items() if k != "seal"}
    write_json(run.path / "environment.json", made | more, sealed=True)


PLANTED = {  # how; what parts first, at which step; in which layers, or None; what is said
    other_threads: (("weights", "loss"), 1, "threads is 1 and 2"),
    other_augmentation: (("pixels",), 1, "another augmentation"),
    other_rate: (("lr",), 1, "train.optimizer.adamw.lr is 0.002 and 0.003"),
    other_order: (("photos",), 1, "other photos are drawn, or in another order"),
    other_start: (("weights",), 0, "of neck.norm.weight differ, and of no other layer"),
    other_decay: (("weights",), 1, "train.optimizer.adamw.weight_decay is"),
    other_seed: (("weights",), 0, "seed is 0 and 1"),
    other_statistics: (("buffers",), 5, "nobody looked in between"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_difference_is_named(plant, base, monkeypatch):
    plant(base, monkeypatch)
    name = plant.__name__.removeprefix("other_")
    fields, step, words = PLANTED[plant]
    found = base.diff("short", name)
    assert found.apart[0].field in fields and found.apart[0].step == step, found.sentence
    assert words in found.sentence and not found.equal
    aside = {"threads", "rate", "decay", "seed", "start"}
    assert bool(found.before) == (name in aside), found.before


def test_other_photos_are_known_by_their_fingerprint(base, photos, tmp_path):
    base.run("photos", data__synthetic__cameras=2)
    found = base.diff("short", "photos")
    assert {d.kind for d in found.before} == {"recipe", "data"}
    assert "data.synthetic.cameras is 3 and 2" in found.sentence and found.apart[0].step == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"packages": {"torch": "2.0.1"}}, "packages.torch is"),
        ({"arithmetic": {"capability": "AVX2"}}, "arithmetic.capability is"),
        ({"device": "Other Processor"}, "device is"),
        ({"dirty": "of course"}, "code dirty is"),
        ({"given": {"own.py": "cd" * 32}}, "files own.py is unset and cdcdcdcdcdcd"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_was_recorded_differs_though_the_steps_do_not(changed, said, base, tmp_path):
    shutil.copytree(base.root / "short", tmp_path / "copy")
    made = RunFolder(tmp_path / "copy").environment
    for key, value in changed.items():
        made[key] = made[key] | value if isinstance(value, dict) else value
    values = {k: v for k, v in made.items() if k != "seal"}
    write_json(tmp_path / "copy" / "environment.json", values, sealed=True)
    found = diff_runs(base.root / "short", tmp_path / "copy")
    assert found.equal and f"all the same: {said}" in found.sentence


def test_a_run_that_did_not_repeat_itself_is_said(base):
    class Stops(turned("head.classifier.weight", 3)):
        def step(self, *args, **options):
            if self.done == 4:
                raise KeyboardInterrupt
            return super().step(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        base.run("broken", make=Stops)
    base.run("broken")
    found = base.diff("short", "broken")
    assert found.equal, found
    assert "broken was continued, and did not repeat itself: step 3 and 4" in str(found)


def test_ledgers_are_compared_where_both_can_be_read(base):
    shutil.copytree(base.root / "long", base.root / "harmed")
    path = base.root / "harmed" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    swapped = [
        lines[0],
        *lines[20:],
        b"\x00\xff nothing\n",
        *lines[5:12],
        b'{"step": "x"}\n',
        b"[]\n",
    ]
    path.write_bytes(b"".join(swapped))
    found = base.diff("long", "harmed")
    assert found.equal and "3 lines of its ledger cannot be read" in str(found), str(found)
    path.write_bytes(b"")
    (base.root / "harmed" / "environment.json").write_text("{")
    (base.root / "harmed" / "status.json").write_text("[]")
    told = str(base.diff("long", "harmed"))
    assert "equal in the records of all 9 epochs" in told and "harmed has no ledger" in told
    assert "environment.json" in told and "status.json" in told


def test_searches_of_stages_and_strangers(base, photos):
    net = {"stem": "conv3x2", "init_channels": 6, "cells_per_stage": [1, 1]}
    search = {
        "model__backbone": {"derived": net},
        "search__epochs": 1,
        "search__warmup": 0,
        "search__p": 4,
        "search__k": 2,
    }
    space = {"init_channels": 6, "cells_per_stage": [1, 1], "nodes": 2}
    search |= {f"search__space__*__{key}": value for key, value in space.items()}
    search["search__stages"] = [{"epochs": 1}, {"epochs": 1, "ops": 3}]
    for name, rate in (("first", 0.02), ("second", 0.02), ("third", 0.03)):
        recipe = tiny_recipe(**SMALL | search, search__alpha_lr=rate)
        data = open_data(recipe.data, recipe.seed, photos)
        run = open_run(name, recipe, "search", data=data.fingerprint, root=base.root)
        search_from_recipe(recipe, run.path, workers=0, data_dir=photos)
    assert base.diff("first", "second").equal
    third = base.diff("first", "third")
    assert "search.alpha_lr is 0.02 and 0.03" in third.sentence and third.stage == " of stage 1"
    assert {name for p in third.apart for name in p.layers if "alpha" in name}
    assert "the one is a training, the other a search" in base.diff("short", "first").sentence


def test_the_command_ends_with_what_it_found(base, capsys, monkeypatch):
    monkeypatch.setenv("REIDLAB_RUNS_DIR", str(base.root))
    base.run("twin")
    assert main(["diff", "short", "twin"]) == 0
    assert (
        "are equal in every step that both tell, to step 5; their last" in capsys.readouterr().out
    )
    assert main(["diff", "short", "long"]) == 1
    assert "train.epochs is 1 and 9" in capsys.readouterr().out
    assert main(["diff", "short", "shorted"]) == 2  # not known
    assert "run 'shorted' not found" in capsys.readouterr().err
    assert main(["diff", str(base.root / "short"), f"{base.root / 'twin'}/"]) == 0


def test_a_page_shows_names_as_text(base):
    shutil.copytree(base.root / "short", base.root / "<b>bold")
    shown = diff_runs(base.root / "short", base.root / "<b>bold")._repr_html_()
    assert "<b>" not in shown and "&lt;b&gt;bold" in shown
    json.dumps(shown)
