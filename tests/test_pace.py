"""The choice of a pace: by the clock, once, and kept by the run."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny_recipe
from test_distil import OTHER
from test_repeatable import different, fitted, last, leaves, opened

from reidlab.core.recipe import load_recipe
from reidlab.core.run import RunFolder, open_run
from reidlab.data.class_loaders import open_classes
from reidlab.data.loaders import open_data
from reidlab.jobs.parameters import RecipeJob
from reidlab.jobs.verbs import open_training
from reidlab.models.catalogue import build_model
from reidlab.nas import lean
from reidlab.nas.search import search_from_recipe
from reidlab.training import distill
from reidlab.training import pace as pace_module
from reidlab.training import step as step_module
from reidlab.training.checks import check_model
from reidlab.training.classify import fit_classes
from reidlab.training.distill import distil_from_recipe
from reidlab.training.fit import fit_from_recipe
from reidlab.training.pace import (
    Choice,
    Pace,
    Question,
    choice_in,
    choose,
    kept,
    offered,
    pace_file,
    reckoned,
    settled,
)
from reidlab.training.studio import check_generator
from reidlab.training.trained import load_model
from reidlab.training.with_generator import check_beside, fit_beside_generator

PLAIN, NHWC, BF16, BOTH = offered()
FACTS = {"network": "any", "batch": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Clock:
    "Stands still but for the steps that move it."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def steps(self, seconds):
        "A step for each pace: of so many seconds in turn, or one that breaks."
        return {pace: self.step(pace, list(told)) for pace, told in seconds.items()}

    def step(self, pace, told):
        def move():
            if not told:
                raise RuntimeError(f"no units for {pace}")
            self.now += told[0] if len(told) == 1 else told.pop(0)

        return move


@pytest.mark.parametrize(
    ("seconds", "taken", "told"),
    [
        ({PLAIN: [2.0], NHWC: [1.0], BF16: [1.5], BOTH: [0.9]}, BOTH, "2.22 times"),
        ({PLAIN: [1.0], NHWC: [1.0]}, PLAIN, "nothing is 5% faster"),
        ({PLAIN: [1.0], NHWC: [0.951]}, PLAIN, "nothing is 5% faster"),
        ({PLAIN: [1.0], NHWC: [0.949]}, NHWC, "1.05 times"),
        ({PLAIN: [1.0], NHWC: [0.5], BOTH: [0.48]}, NHWC, "2.00 times"),
        ({PLAIN: [9.0, 9.0, 1.0], NHWC: [0.1, 0.1, 1.0]}, PLAIN, "nothing"),  # a warm-up counts not
        ({PLAIN: [1.0], NHWC: [1.0, 1.0, 2.0, 2.0, 0.5, 2.0]}, NHWC, "2.00 times"),  # the best
        ({PLAIN: [1.0], NHWC: [], BF16: [0.5]}, BF16, "2.00 times"),
        ({PLAIN: [1.0], NHWC: []}, PLAIN, "and no other way"),
        ({PLAIN: [], NHWC: [1.0]}, PLAIN, "no units for fp32 nchw"),
    ],
)
def test_the_clock_decides(seconds, taken, told):
    clock = Clock()
    choice = choose(clock.steps(seconds), clock=clock)
    assert choice.pace == taken and told in choice.why
    broken = [pace for pace, times in seconds.items() if not times]
    assert list(choice.dropped) == [str(pace) for pace in broken]
    assert all(f"no units for {pace}" in choice.dropped[str(pace)] for pace in broken)


def test_a_choice_draws_no_random_number():
    before = torch.get_rng_state()
    choose({PLAIN: partial(torch.rand, 3), NHWC: partial(torch.rand, 5)})
    assert torch.equal(before, torch.get_rng_state())


def test_slow_networks_are_timed_once_and_quick_ones_four_times():
    counts = {}
    for seconds in (0.1, 30.0):
        clock = Clock()
        choose(clock.steps({PLAIN: [seconds], NHWC: [seconds]}), clock=clock)
        counts[seconds] = round(clock.now / seconds)
    assert counts == {0.1: 12, 30.0: 4}


@pytest.mark.parametrize(
    ("told", "there"),
    [
        (("auto", "auto", "auto"), 8),
        (("auto", "nhwc", "none"), 2),
        (("fp16", "auto", "none"), 2),
        (("fp32", "nchw", "inductor"), 1),
    ],
)
def test_what_is_said_outright_is_not_asked_again(told, there):
    paces = offered(*told)
    assert len(paces) == there
    for word, options in zip(told, zip(*paces, strict=True), strict=True):
        assert word == "auto" or set(options) == {word}
    assert ("fp16" in {pace.precision for pace in paces}) == (told[0] == "fp16")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("nhwc", "nchw"),  # the seal no longer fits
        lambda text: "[]",
        lambda text: '{"pace": {"precision": "int8", "layout": "nchw", "compiler": "none"}}',
        lambda text: "\x00\xff",
    ],
)
def test_a_kept_answer_is_used_and_a_damaged_one_asked_anew(damage):
    asked = []

    def ask():
        asked.append(1)
        clock = Clock()
        return choose(clock.steps({PLAIN: [2.0], NHWC: [1.0]}), clock=clock)

    first = kept("train", FACTS, (PLAIN, NHWC), ask)
    assert kept("train", FACTS, (PLAIN, NHWC), ask) == first and len(asked) == 1
    file = pace_file("train", FACTS, (PLAIN, NHWC))
    file.write_bytes(damage(file.read_text()).encode("latin-1"))
    assert kept("train", FACTS, (PLAIN, NHWC), ask).pace == NHWC and len(asked) == 2
    assert kept("train", FACTS, (PLAIN, NHWC), ask) == first and len(asked) == 2


def test_a_run_is_asked_before_the_machine(tmp_path):
    run = RunFolder(tmp_path / "run")
    told = [Choice(NHWC, {"fp32 nhwc": 1.0}), Choice(PLAIN, {"fp32 nchw": 1.0})]
    ask = lambda kind, paces: settled(kind, FACTS, paces, told.pop, run)
    assert ask("embed", (PLAIN, NHWC)).pace == PLAIN
    pace_file("embed", FACTS, (PLAIN, NHWC)).unlink()
    assert ask("embed", (PLAIN, NHWC)).pace == PLAIN and len(told) == 1
    assert ask("train", (PLAIN, NHWC)).pace == NHWC  # another question
    assert [event["kind"] for event in run.events("pace")] == ["embed", "train"]


def test_an_answer_that_is_not_on_offer_is_none():
    clock = Clock()
    stored = choose(clock.steps({PLAIN: [2.0], NHWC: [1.0]}), clock=clock).stored()
    assert choice_in(stored, (PLAIN, NHWC)).pace == NHWC
    assert choice_in(stored, (PLAIN, BF16)) is None
    assert choice_in(stored | {"pace": list(NHWC)}, (PLAIN, NHWC)) is None
    assert choice_in(stored | {"pace": {"precision": ["fp32"]}}, (PLAIN, Pace())) is None


# --- trainings -------------------------------------------------------------------------------

FEW = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0}
AUTO = {"train__precision": "auto", "train__layout": "auto"}
DROPOUT = {"model__head": {"linear": {"dropout": 0.3}}}
FAST = Pace(compiler="inductor")
GAN = {"input_dim": 8, "ngf": 4, "ndf": 4, "batch_size": 16}


@pytest.fixture
def decide(monkeypatch):
    "decide(pace): the clock makes its steps, and then says what the test wants; the asked are counted."
    asked, real = [], choose

    def decided(wanted):
        def choose_it(steps, *args, **more):
            asked.append(list(steps))
            found = real(steps, *args, seconds=0.0, **more)
            assert not found.dropped
            pace = wanted if wanted in steps else next(iter(steps))
            times = {str(one): 1.0 if one == wanted else 10.0 for one in steps}
            return replace(found, pace=pace, milliseconds=times)

        monkeypatch.setattr(pace_module, "choose", choose_it)
        return asked

    return decided


def power_cut(path, record):
    raise SystemError("the power went out")


def test_a_choice_of_the_plain_way_leaves_the_plain_bits(photos, tmp_path, decide):
    "All four ways were tried on copies, with dropout and a loss that learns."
    noisy = FEW | DROPOUT | {"loss__centre": {"weight": 0.01}}
    plain = leaves(fitted(tiny_recipe(**noisy), "plain", tmp_path, photos))
    asked = decide(PLAIN)
    auto = leaves(fitted(tiny_recipe(**noisy, **AUTO), "auto", tmp_path, photos))
    assert asked == [[PLAIN, NHWC, BF16, BOTH]]
    assert different(plain, auto) == []


def test_a_run_goes_on_as_it_began_whatever_the_machine_says_now(photos, tmp_path, cache, decide):
    recipe = tiny_recipe(**FEW | DROPOUT | AUTO, train__ema=0.9)
    asked = decide(BOTH)
    whole = leaves(fitted(recipe, "whole", tmp_path, photos))
    cut = opened(recipe, "cut", tmp_path, photos)
    go = partial(fit_from_recipe, recipe, cut, workers=0, data_dir=photos)
    with pytest.raises(SystemError):
        go(on_epoch=[power_cut])
    assert len(asked) == 1  # the second run read the file
    for file in (cache / "pace").iterdir():
        file.unlink()
    decide(PLAIN)
    go()
    assert len(asked) == 1
    assert different(whole, leaves(last(cut))) == []
    (event,) = RunFolder(cut).events("pace")
    assert event["pace"] == BOTH._asdict() and event["kind"] == "train"
    assert RunFolder(cut).recipe.train.precision == "auto"  # the recipe says what was asked
    other = leaves(fitted(recipe, "other", tmp_path, photos))  # the comparison can fail
    assert ".model.head.classifier.weight" in different(whole, other)


def test_a_compiled_run_keeps_its_checkpoints_and_its_bits(photos, tmp_path, decide, monkeypatch):
    monkeypatch.setattr(step_module, "BACKEND", "aot_eager")
    monkeypatch.setattr(pace_module, "LAYER", 0.0)
    recipe = tiny_recipe(**FEW | DROPOUT, train__compiler="auto", train__freeze_stages=1)
    decide(FAST)
    times = {str(PLAIN): 10.0, str(FAST): 1.0}
    measured = lambda *_: Choice(FAST, times, reckoned={"cost_s": 0.001, "again_s": 0.001})
    monkeypatch.setattr(pace_module, "_measured", measured)
    whole = fitted(recipe, "whole", tmp_path, photos)
    plain = fitted(tiny_recipe(**FEW | DROPOUT), "plain", tmp_path, photos)
    assert whole["model"].keys() == plain["model"].keys()
    (event,) = RunFolder(tmp_path / "whole").events("pace")
    assert event["pace"]["compiler"] == "inductor" and "compiled: 10 steps of 1" in event["why"]
    told = {"steps": 10, "eager_ms": 10.0, "compiled_ms": 1.0, "cost_s": 0.001, "saved_s": 0.09}
    assert event["reckoned"] == pytest.approx(told)
    cut = opened(recipe, "cut", tmp_path, photos)
    go = partial(fit_from_recipe, recipe, cut, workers=0, data_dir=photos)
    with pytest.raises(SystemError):
        go(on_epoch=[power_cut])
    go()
    assert different(leaves(whole), leaves(last(cut))) == []


def test_classes_lessons_and_drawings_are_trained_at_a_pace(photos, tmp_path, decide, monkeypatch):
    teachers, load = [], load_model
    monkeypatch.setattr(distill, "load_model", lambda *a: teachers.append(load(*a)) or teachers[-1])
    asked = decide(BOTH)
    shapes = {"classes": 3, "train_photos": 8, "test_photos": 4}
    few = {f"data.shapes.{key}": n for key, n in shapes.items()}
    few |= {"data.batch_size": 8, "data.val_fraction": 0.0, "train.epochs": 1}
    few |= {key.replace("__", "."): value for key, value in AUTO.items()}
    named = load_recipe("shapes", overrides=few)
    print_of = open_classes(named.data, 0, tmp_path / "data").fingerprint
    run = open_run("classes", named, verb="train", data=print_of, root=tmp_path)
    fit_classes(named, run.path, workers=0, data_dir=tmp_path / "data")
    beside = tiny_recipe(**FEW | AUTO, train__epochs=1, train__gan={"alone": GAN})
    fit_beside_generator(beside, opened(beside, "beside", tmp_path, photos), data_dir=photos)
    cdnet = {"model__backbone": {"cdnet": {"width": 0.25}}, "model__neck": "fblneck"}
    fitted(tiny_recipe(**FEW | cdnet, train__epochs=1), "teacher", tmp_path, photos)
    taught = {"train__distill": {"teacher_student": OTHER}, "train__epochs": 1}
    for name, more in {"told": {}, "asked": AUTO}.items():
        decide(PLAIN)
        recipe = tiny_recipe(**FEW | taught | more)
        distil_from_recipe(
            recipe, opened(recipe, name, tmp_path, photos), workers=0, data_dir=photos
        )
    assert len(asked) == 3
    for name in ("classes", "beside"):
        assert RunFolder(tmp_path / name).events("pace")[0]["pace"] == BOTH._asdict()
    told, found = (leaves(last(tmp_path / name)) for name in ("told", "asked"))
    assert different(told, found) == []
    assert all(x.is_contiguous() for net, _ in teachers for x in net.parameters())  # as they were


# --- searches --------------------------------------------------------------------------------

SPACE = {
    "search__epochs": 1,
    "search__space__*__nodes": 2,
    "search__space__*__cells_per_stage": [1],
    "search__warmup": 0,
    "search__space__*__ops": ["skip_connect", "sep_conv_3x3", "none"],
    "search__space__*__init_channels": 4,
}
HOW = {"gdas": {"search__strategy": "gdas"}, "lean": {"search__memory": "cell"}}


@pytest.mark.parametrize("how", HOW)
def test_a_search_finds_its_pace(how, photos, tmp_path, decide):
    found = {}
    for name, more in {"plain": {}, "auto": AUTO | {"train__compiler": "auto"}}.items():
        asked = decide(PLAIN)
        recipe = tiny_recipe(**FEW | SPACE | HOW[how] | more)
        path = opened_search(recipe, name, tmp_path, photos)
        search_from_recipe(recipe, path, workers=0, data_dir=photos)
        found[name] = leaves(last(path))
    assert asked == [[PLAIN, NHWC, BF16, BOTH]]
    assert RunFolder(path).events("pace")[0]["kind"] == "search"
    assert different(found["plain"], found["auto"]) == []


@pytest.mark.parametrize(("precision", "larger"), [("fp32", 3.0), ("bf16", 2.0), ("auto", 3.0)])
def test_memory_is_planned_for_the_larger_need(precision, larger, monkeypatch):
    needs = lambda net, h, w, amp=False: SimpleNamespace(cells=[1], alive=lambda _: 3.0 - amp)
    monkeypatch.setattr(lean, "measure", needs)
    assert lean._need(None, 64, 32, lean.under_autocast(precision)).alive(["lean"]) == larger


def opened_search(recipe, name, root, photos):
    data = open_data(recipe.data, recipe.seed, photos)
    return open_run(name, recipe, verb="search", data=data.fingerprint, root=root).path


# --- compiling -------------------------------------------------------------------------------


class Plan:
    "A question with injected times: a step takes 100 ms, compiled as long as the test says."

    def __init__(self, monkeypatch, compiled_ms, cost):
        self.tried = []

        def measured(question, pace):
            self.tried.append(pace)
            if compiled_ms is None:
                return Choice(pace, dropped={"inductor": "InvalidCxxCompiler: no g++"})
            times = {str(PLAIN): 100.0, str(FAST): compiled_ms}
            return Choice(FAST, times, reckoned={"cost_s": cost, "again_s": 1.0})

        monkeypatch.setattr(pace_module, "_measured", measured)

    def ask(self, steps, **train):
        recipe = tiny_recipe(train__compiler="auto", **train)
        net = build_model("small_cnn", n_pids=4)  # 21 layers: about 21 s
        question = Question(recipe.train, net, None, None, FACTS, steps=steps)
        return reckoned(Choice(PLAIN, {str(PLAIN): 100.0}, "100 ms a step"), question)


@pytest.mark.parametrize(
    ("steps", "compiled_ms", "cost", "tried", "told"),
    [
        (
            100,
            50.0,
            10.0,
            0,
            "100 steps of 100 ms save 6.67 s at the very best, compiling takes about",
        ),
        (1000, 50.0, 10.0, 1, "; compiled: 1,000 steps of 50 instead of 100 ms save 50 s"),
        (1000, 50.0, 60.0, 1, "; not compiled: 1,000 steps of 50 instead of 100 ms save 50 s"),
        (1000, 120.0, 10.0, 1, "; not compiled: 1,000 steps of 120 instead of 100 ms save -20 s"),
        (1000, None, 10.0, 1, "; not compiled: InvalidCxxCompiler: no g++"),
    ],
)
def test_a_compiler_is_used_where_the_run_earns_its_time(
    steps, compiled_ms, cost, tried, told, monkeypatch
):
    plan = Plan(monkeypatch, compiled_ms, cost)
    choice = plan.ask(steps)
    assert told in choice.why and len(plan.tried) == tried
    assert choice.pace == (FAST if "; compiled" in told else PLAIN)
    assert ("inductor" in choice.dropped) == (choice.pace == PLAIN)


def test_what_compiling_costs_is_known_the_next_time(monkeypatch):
    plan = Plan(monkeypatch, 50.0, 60.0)
    assert plan.ask(1000).pace == PLAIN  # 50 s saved, and 60 s paid
    again = plan.ask(1000)  # the code lies there: 1 s to read
    assert again.pace == FAST and again.reckoned["cost_s"] == 1.0 and len(plan.tried) == 1
    assert plan.ask(10).pace == PLAIN


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"train__freeze_epochs": 1}, "layers wake up"),
        ({"train__freeze_stages": 1, "train__freeze_stages_epochs": 1}, "layers wake up"),
        ({"CXX": "no-such-compiler"}, "torch needs a C++ compiler"),
    ],
)
def test_what_cannot_be_compiled_is_not_tried(train, told, monkeypatch):
    if said := train.pop("CXX", ""):
        monkeypatch.setenv("CXX", said)
    plan = Plan(monkeypatch, 50.0, 1.0)
    choice = plan.ask(10**6, **train)
    assert told in choice.dropped["inductor"] and told in choice.why and not plan.tried
    if said:  # said outright it is refused before there is a folder
        with pytest.raises(ValueError, match=r"train.compiler inductor: torch needs a C\+\+"):
            check_model(tiny_recipe(train__compiler="inductor"))


@pytest.mark.parametrize("key", ["precision", "layout", "compiler"])
def test_a_generator_alone_has_no_pace(key, photos):
    told = {f"train__{key}": "auto"}
    recipe = tiny_recipe(**FEW, **told, train__gan={"only": GAN})
    data = open_data(recipe.data, 0, photos)
    with pytest.raises(ValueError, match=f"train.{key} auto is about the step of a re-ID network"):
        check_generator(recipe, data)
    beside = tiny_recipe(**FEW, **told, train__gan={"alone": GAN})
    refuses = pytest.raises(ValueError, match="beside a generator nothing is compiled")
    with refuses if key == "compiler" else suppress(()):
        check_beside(beside, data)


@pytest.mark.slow  # half a minute of compiling
def test_inductor_compiles_a_step_that_moves_as_the_plain_one(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pace_module, "LAYER", 0.0)
    sgd = {"train__optimizer": {"sgd": {"lr": 0.01}}, "train__epochs": 1, **FEW | DROPOUT}
    plain = fitted(tiny_recipe(**sgd), "plain", tmp_path, photos)
    fitted(tiny_recipe(**sgd, train__compiler="auto"), "auto", tmp_path, photos)
    (event,) = RunFolder(tmp_path / "auto").events("pace")
    assert set(event["reckoned"]) == {"steps", "eager_ms", "compiled_ms", "cost_s", "saved_s"}
    for name in ("fast", "again"):
        fast = fitted(tiny_recipe(**sgd, train__compiler="inductor"), name, tmp_path, photos)
        torch.testing.assert_close(fast["model"], plain["model"], rtol=1e-3, atol=1e-4)
    assert different(leaves(fast), leaves(last(tmp_path / "fast"))) == []


# --- where it is told ------------------------------------------------------------------------


def test_a_card_says_what_was_chosen(lab, decide):
    decide(BOTH)
    small = {key.replace("__", "."): value for key, value in (FEW | AUTO).items()}
    about = RecipeJob(recipe="smoke", overrides=TINY | small | {"train.epochs": 1})
    job = open_training(about)
    assert job.card.rows["Pace"] == "auto: chosen by a few timed steps, before the first"
    job.run()
    assert open_training(about).card.rows["Pace"].startswith("bf16 nhwc: ")
    assert job.card.rows["Pace"].startswith("bf16 nhwc: ")
