"""Slips of one line that once went through every other test: each test here notices one kind."""

import dataclasses
import gc
import math
import random
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.files import write_bytes
from reidlab.core.recipe import Train, load_recipe
from reidlab.core.run import open_run, write_json
from reidlab.core.seed import deterministic, rng, seed_all
from reidlab.data import loaders, packed
from reidlab.data.doctor import _copies, examine_labels
from reidlab.data.loaders import Batch, open_data
from reidlab.data.manifest import Manifest
from reidlab.data.packed import packed_key
from reidlab.data.samplers import epoch_batches, groups
from reidlab.evaluation import paired
from reidlab.evaluation.statistics import tail_share
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.sweep import cell_state
from reidlab.losses.circle import circle_logits, circle_terms
from reidlab.models.cells import Cell
from reidlab.models.genotype import Genotype
from reidlab.nas.derive import derive, strengths
from reidlab.nas.gdas import GumbelSupernet, gumbel_weights
from reidlab.nas.health import verdicts
from reidlab.retrieval.expansion import expand_queries
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.training import fit as fitting
from reidlab.training import progress as standing
from reidlab.training.distill import Distiller
from reidlab.training.freeze import Asleep, rest
from reidlab.training.network import model_from_recipe
from reidlab.training.progress import Progress
from reidlab.training.step import Trainer
from reidlab.viz.curves import plot_history


def test_the_circles_weights_are_numbers_to_a_gradient():
    "α is how far a similarity is from its aim; the slope is γα alone (Sun et al., 2020, eq. 6)."
    similarity = torch.tensor([-0.9, 0.1, 0.5, 0.95], dtype=torch.float64, requires_grad=True)
    away, near = circle_terms(similarity, margin=0.25, scale=64.0)
    (slope,) = torch.autograd.grad(away.sum(), similarity)
    torch.testing.assert_close(slope, 64 * (similarity.detach() + 0.25).clamp(min=0))
    (slope,) = torch.autograd.grad(near.sum(), similarity)
    torch.testing.assert_close(slope, -64 * (1.25 - similarity.detach()).clamp(min=0))
    pids = torch.tensor([0, 1])
    logits = circle_logits(similarity.view(2, 2), pids, margin=0.25, scale=64.0)
    (slope,) = torch.autograd.grad(logits[0, 0], similarity)
    torch.testing.assert_close(slope[0], 64 * (1.25 - similarity.detach()[0]))


def test_a_last_group_that_is_not_full_is_dropped_and_filled_as_asked():
    pids = np.repeat([4, 7, 8, 9], [5, 7, 3, 2])  # in threes: 1, 2 and 1 whole, and one short
    for remainder, wanted in (("drop", [1, 2, 1, 1]), ("fill", [2, 3, 1, 1])):
        members, owner = groups(pids, 3, remainder, rng(0, 1))
        assert [int((owner == p).sum()) for p in (4, 7, 8, 9)] == wanted
        assert members.shape == (sum(wanted), 3) and (pids[members] == owner[:, None]).all()
        whole = members[np.isin(owner, [4, 7, 8])]
        assert len(np.unique(whole)) == (12 if remainder == "drop" else 15)
    for epoch in range(4):
        seen = epoch_batches(np.repeat(np.arange(6), 7), 2, 3, seed=0, epoch=epoch)
        assert seen.shape[1] == 6 and len(np.unique(seen)) == seen.size, "a photo comes once"


def rows(*labels):
    "A frame of photos: split, pid, camid, digest."
    frame = pd.DataFrame(labels, columns=["split", "pid", "camid", "digest"])
    return frame.assign(path=[f"{i}.jpg" for i in range(len(frame))])


@pytest.mark.parametrize(
    ("cameras", "own_alone", "free"),
    [
        ((3, 3), True, False),  # one camera: no match, and no free hit
        ((3, 4), False, True),
        ((-1, -1), False, True),  # unknown cameras are never the same one
        ((3, -1), False, True),
        ((-1, 3), False, True),
    ],
)
def test_an_unknown_camera_is_neither_the_own_one_nor_another(cameras, own_alone, free):
    frame = rows(
        ("query", 5, cameras[0], "a"),
        ("gallery", 5, cameras[1], "a"),
        ("query", 6, 0, "b"),
        ("gallery", 6, 1, "c"),
    )
    manifest = Manifest("set", Path(), frame.drop(columns="digest"), {})
    codes = {f.code for f in examine_labels(manifest)}
    assert ("query-own-camera-only" in codes) == own_alone
    assert ("camera-partly-missing" in codes) == (-1 in cameras)
    assert ("query-in-gallery" in {f.code for f in _copies(frame)}) == free


def test_a_cell_is_finished_when_its_evaluation_is_written(tmp_path):
    (cell,) = plan_cells("smoke", seeds=[0])
    assert cell_state(cell, tmp_path)[0] == "waiting"
    run = open_run(cell.name, cell.resolved(), verb="train", root=tmp_path)
    assert cell_state(cell, tmp_path)[0] == "begun"
    run.finish({"val_mAP": 0.5})
    assert cell_state(cell, tmp_path)[0] == "trained"
    place = run.path / "evaluate/synthetic"
    write_json(place / "progress.json", {})
    assert cell_state(cell, tmp_path)[0] == "trained", "a folder is no result"
    write_json(place / "metrics.json", {"metrics": {"mAP": 0.4}})
    assert cell_state(cell, tmp_path)[0] == "finished"


def first_numbers(*place):
    seed_all(*place)
    return random.random(), np.random.random(), torch.rand(()).item()


def test_every_place_has_its_own_global_numbers():
    places = [(0,), (1,), (0, 1, 0), (0, 2, 0), (0, 1, 1), (0, 0, 0), (2**32,), (2**32, 1, 0)]
    columns = list(zip(*(first_numbers(*p) for p in places), strict=True))
    assert [len(set(c)) for c in columns] == [len(places)] * 3
    assert first_numbers(0, 1, 0) == first_numbers(0, 1, 0)


def test_of_an_epoch_that_ran_twice_the_later_record_counts(tmp_path):
    run = open_run("run", tiny_recipe(), verb="train", root=tmp_path)
    for epoch, loss in ((1, 3.0), (2, 2.0), (3, 9.0), (2, 1.5), (3, 1.0)):
        run.log("epoch", epoch=epoch, loss=loss)
    table = run.history()
    assert (table["epoch"].tolist(), table["loss"].tolist()) == ([1, 2, 3], [3.0, 1.5, 1.0])


def test_a_low_temperature_makes_the_draw_hard():
    logits, noise = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.5, -1.0]])
    for tau in (10.0, 1.0, 0.1):
        h, q = gumbel_weights(logits, noise, tau)
        torch.testing.assert_close(q, torch.softmax(noise / tau, 1))
        torch.testing.assert_close(h, torch.tensor([[0.0, 1, 0, 0]]))
    assert q.max() > 0.99
    net = GumbelSupernet.__new__(GumbelSupernet)
    torch.nn.Module.__init__(net)
    net.ends, seen = (10.0, 0.1), []
    for share in (0.0, 0.5, 1.0):
        net.schedule(share)
        seen.append(round(net.tau, 9))
    assert seen == [10.0, 5.05, 0.1]


WORDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1, 2**64, 10**30]


def test_no_two_seeds_and_no_two_places_share_a_stream():
    keys = [(s,) for s in WORDS] + [(0, s) for s in (*WORDS, -1, -2, -(2**31), -(2**32) - 1)]
    keys += [(s, t) for s in WORDS[3:6] for t in (-1, 1, 2**32 - 1, 2**32)]
    keys += [(2**32, 0, 0), (0, 1, 1), (0, 2**32, 0), (0, 0, 2**32)]
    drawn = {key: rng(*key).random() for key in dict.fromkeys(keys)}
    assert len(set(drawn.values())) == len(drawn)


def test_seeds_of_one_word_give_what_they_always_gave():
    places = [(0,), (1, 2, 3), (2**31,), (2**32 - 1, 5), (7, -1), (3, 2**31 + 5)]
    assert [int(rng(*place).integers(2**62)) for place in places] == [
        64872751699987434,
        3871127614972865414,
        4345213613679312301,
        139491342835005670,
        3539233136055721709,
        3686188328790841480,
    ]
    assert rng(np.int64(7), 3.0).random() == rng(7, np.int32(3)).random()


@pytest.mark.parametrize("bad", [-1, 0.5, float("nan"), float("inf"), -(2**32), "3", None, [0]])
def test_what_is_no_seed_is_refused_in_one_line(bad):
    for place in ((bad,), (0, bad)) if bad != -1 and bad != -(2**32) else ((bad,),):
        with pytest.raises(ValueError, match="rng needs a seed of 0 or more and integer streams"):
            rng(*place)


def test_a_part_at_rest_has_no_gradient_left_to_step_by():
    part = torch.nn.Linear(2, 1)
    weights, optimizer = list(part.parameters()), torch.optim.SGD(part.parameters(), lr=1.0)
    part(torch.ones(1, 2)).sum().backward()
    rest(weights, Asleep([part], weights))
    before = [w.detach().clone() for w in weights]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("before", [False, True])
def test_after_the_block_kernels_are_chosen_as_before_it(before):
    torch.use_deterministic_algorithms(before)
    try:
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_edge_norm_and_sigmoid_listen_to_betas():
    alpha, beta = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([3.0, 0.0])
    p, share = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (alpha, beta))
    np.testing.assert_allclose(strengths(alpha, "softmax", beta), p)
    np.testing.assert_allclose(strengths(alpha, "edge_norm", beta), p * share[:, None])
    np.testing.assert_array_equal(strengths(alpha, "raw_logit", beta), alpha)


def test_only_queries_with_a_wrong_photo_as_near_are_tied():
    dist = np.array([[0.5, 0.5, 0.9], [0.2, 0.5, 0.9], [0.5, 0.5, 0.1]])
    result = evaluate_rank(dist, [1, 1, 3], [1, 2, 3], [0] * 3, [1] * 3)
    assert result.matches.tied.tolist() == [True, False, False]


def test_a_neighbour_on_the_far_side_is_worth_nothing():
    query, gallery = np.array([[1.0, 0.0]]), np.array([[-0.8, 0.6], [-0.6, -0.8]])
    np.testing.assert_allclose(expand_queries(query, gallery, top=2, weight=3.0), query, atol=1e-6)


def test_curves_of_validation_are_in_per_cent():
    history = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "val_mAP": [0.25, 0.5]})
    left, right = plot_history(history)
    (line,) = [x for x in right.get_lines() if len(x.get_xdata()) == 2]
    np.testing.assert_allclose(line.get_ydata(), [25, 50])
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), [2, 1])
    plt.close("all")


# --- twenty further, a test each for those that nothing else had noticed -----------------------


def test_a_group_that_is_filled_up_shows_each_photo_once():
    "Where there are as many: what it lacks comes from the person's whole groups."
    pids = np.repeat([4, 7, 8], [5, 4, 2])
    for seed in range(20):
        members, owner = groups(pids, 3, "fill", rng(seed))
        enough = members[owner != 8]
        assert all(len(set(group)) == 3 for group in enough.tolist())


def judged(every, epochs):
    "The epochs that are validated."
    plan = SimpleNamespace(validate_every=every, epochs=epochs)
    about = {"recipe": load_recipe("smoke"), "run": None}
    fit = SimpleNamespace(plan=plan, trainer=SimpleNamespace(judged=None, device="cpu"), **about)
    fit.data, fit.validate = SimpleNamespace(held_out=True), lambda *_, **__: {"mAP": 0.5}
    return [e for e in range(1, epochs + 1) if fitting._judged(fit, e) == {"val_mAP": 0.5}]


def test_the_last_epoch_is_validated_whatever_its_number():
    assert [judged(every, 5) for every in (0, 1, 2, 3, 9)] == [
        [],
        [1, 2, 3, 4, 5],
        [2, 4, 5],
        [3, 5],
        [5],
    ]


def test_of_equally_good_epochs_the_first_is_kept(monkeypatch):
    monkeypatch.setattr(fitting, "save", lambda *given: None)
    plan = SimpleNamespace(select="mAP", epochs=4)
    fit = SimpleNamespace(plan=plan, progress=Progress())
    for epoch, score in enumerate((0.2, 0.5, 0.5, 0.4), 1):
        fitting.keep_best(fit, {"epoch": epoch, "loss": 1.0 / epoch, "val_mAP": score})
    assert fit.progress.best == {"epoch": 2, "loss": 0.5, "val_mAP": 0.5}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_cut_to_their_own_length_and_not_to_the_scaled_one(scale):
    "A step of rate 1 is as long as the clip allows, whatever half precision had multiplied."
    trainer = Trainer(torch.nn.Linear(3, 1, bias=False), lambda *_: None, Train(clip=0.25))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    weight = trainer.model.weight
    before = weight.detach().clone()
    trainer.scaler.scale((weight * torch.tensor([[3.0, 4.0, 0.0]])).sum()).backward()
    trainer.move()
    torch.testing.assert_close((before - weight).norm(), torch.tensor(0.25))


def test_the_bootstrap_is_widened_for_few_people():
    "Hesterberg 2015: √(m / (m − 1)) times Student's quantile; 3.182446 for 3 degrees of freedom."
    reach = math.sqrt(4 / 3) * 3.182446
    assert tail_share(0.95, 4) == pytest.approx(NormalDist().cdf(-reach), rel=1e-3)


@pytest.mark.parametrize(("short", "p"), [(1e-15, 1.0), (1e-9, 1 / 101)])
def test_chance_is_never_nothing_and_equal_totals_are_equal(short, p, monkeypatch):
    "A total that was added up in another order is as far from 0; one that falls short is not."
    sums = np.array([0.3, -0.1, 0.7])
    tossed = np.full(100, -0.9 * (1 - short))
    monkeypatch.setattr(paired, "flipped_sums", lambda *given: tossed)
    assert paired.flip_p_value(sums, 100) == pytest.approx(p, rel=1e-12)


def test_of_equal_short_cuts_the_last_is_ruled_out():
    ops = ("skip_connect", "sep_conv_3x3", "none")
    table = [np.tile([2.0, 1.0, 0.0], (j, 1)) for j in (2, 3)]
    found = derive(table, table, ops, max_skips=1)
    skip, other = ops[:2]
    assert found.normal == (((skip, 0), (other, 1)), ((other, 0), (other, 1)))
    assert found.reduce == found.normal


SKIPS = {"skips_normal": 2, "margin_normal": 0.5}
FREE = {"parameter_free_": 4, "edges_": 4, "free_mass_": 0.9}
FREE = {key + kind: value for kind in ("normal", "reduce") for key, value in FREE.items()}
NONE = {"p_none_normal": 0.9, "n_ops": 4}


@pytest.mark.parametrize(
    ("rule", "alarm"), [("skips", SKIPS), ("parameter_free", FREE), ("none", NONE)]
)
def test_a_finding_names_the_last_epoch_before_its_alarm(rule, alarm):
    "Epochs 3, 4 and 5 are alarming; 2 was the last sound one, and the warm-up's are not asked."
    calm = {key: value if key.startswith(("n_ops", "edges")) else 0 for key, value in alarm.items()}
    rows = [{"epoch": e, **(alarm if e >= 3 else calm)} for e in range(1, 7)]
    (found,) = verdicts(rows, {rule: {"patience": 3}})
    assert (found.epoch, found.sound) == (5, 2)
    (late,) = verdicts(rows, {rule: {"patience": 3}}, warmup=3)
    assert (late.epoch, late.sound) == (6, 3)
    again = [*rows[:4], {"epoch": 4, **calm}, *rows[4:]]  # an epoch that was searched twice
    assert verdicts(again, {rule: {"patience": 3}}) == []


def test_a_cache_is_named_by_all_that_decides_its_bytes(photos, monkeypatch):
    whole = open_data(tiny_recipe().data, 0, photos).manifest.photos("train")
    names = [packed_key(whole, 64, 32), packed_key(whole, 32, 64), packed_key(whole, 16, 128)]
    names += [packed_key(whole._replace(paths=whole.paths[::-1]), 64, 32)]
    names += [packed_key(whole._replace(paths=whole.paths[:-1]), 64, 32)]
    for package in ("pillow", "torch", "torchvision"):
        told = lambda name, other=package: "another" if name == other else version(name)
        monkeypatch.setattr(packed, "version", told)
        names += [packed_key(whole, 64, 32)]
    assert len(set(names)) == len(names)
    monkeypatch.setattr(packed, "version", version)
    assert packed_key(whole, 64, 32) == names[0]


def test_seconds_of_all_epochs_add_up():
    progress = Progress()
    for seconds in (2.0, 3.0, 0.5):
        progress.turn({"loss": seconds, "seconds": seconds})
    assert (progress.epoch, progress.seconds, progress.loss) == (3, 5.5, 0.5)


def test_each_process_takes_up_its_own_random_state(monkeypatch):
    states, drawn = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({"cpu": torch.get_rng_state()})
        drawn.append(torch.rand(()))
    for rank in (0, 1):
        monkeypatch.setattr(standing, "process_rank", lambda here=rank: here)
        standing._take_random({"random": states}, "cpu")
        assert torch.rand(()) == drawn[rank]


def test_a_short_cut_is_never_silenced():
    "As published: drop path is for operations; here it silences what it can."
    edges = [[("skip_connect", 0), ("skip_connect", 1)], [("skip_connect", 0), ("max_pool_3x3", 1)]]
    found = Genotype(edges, edges, ops=("skip_connect", "max_pool_3x3", "none"))
    cell = Cell(found, 4, 4, 4, "normal", drop_path=1 - 1e-9).train()
    x = torch.rand(8, 4, 6, 6) + 0.1
    first, second = cell(x, x).detach()[:, :8].split(4, 1)
    one, other = cell.pre0(x).detach(), cell.pre1(x).detach()
    torch.testing.assert_close(first, one + other)
    torch.testing.assert_close(second, one)  # without the pooling


def test_a_teacher_learns_nothing_from_its_lessons(photos):
    "It answers as it was left: its batch norms do not see the batch."
    recipe = tiny_recipe(train__distill="teacher_student")
    student, teacher = (model_from_recipe(recipe, 4) for _ in range(2))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer = Distiller(student, lambda branches, pids: (0.0, {}), recipe.train, teacher=teacher)
    images = torch.rand(8, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.arange(8) % 4, torch.zeros(8), index=torch.arange(8))
    for mood in (True, False):
        teacher.train(mood)
        trainer.model.train()
        _, terms = trainer.forward(batch)
        assert terms["taught_logits"].isfinite()
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())


def test_a_file_that_is_written_leaves_nothing_behind_in_memory(tmp_path):
    "A search writes a file of a new name in each epoch; 40 of them kept some 200 objects."

    def write(first):
        for n in range(first, first + 40):
            write_bytes(tmp_path / f"epoch_{n:03}.json", b"{}")
        gc.collect()
        return len(gc.get_objects())

    write(0)
    before = write(40)
    assert write(80) - before < 20


def test_junk_is_in_no_lesson(photos, monkeypatch):
    recipe = tiny_recipe(data__val_fraction=0.0)
    plain = open_data(recipe.data, 0, photos)
    frame = plain.manifest.frame.copy()
    junk = frame.index[frame["split"] == "train"][:3]
    frame.loc[junk, "pid"] = -1
    spoilt = dataclasses.replace(plain.manifest, frame=frame)
    monkeypatch.setattr(loaders, "find_manifest", lambda *given: spoilt)
    found = open_data(recipe.data, 0, photos)
    assert len(found.train.paths) == len(plain.train.paths) - 3
    assert found.n_pids == plain.n_pids and found.train.pids.min() >= 0
