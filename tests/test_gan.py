"""The generator of people (experimental): full size, repeatable, resumable, and what it refuses."""

import pytest
import torch
from conftest import tiny_recipe, walk

from reidlab.core.recipe import Synthetic, load_recipe
from reidlab.core.run import find_run, keep_run, load_runs, open_run
from reidlab.data.loaders import open_data
from reidlab.data.transforms import normalise
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.jobs.tasks import plan_training
from reidlab.models.generator import Critic, Generator
from reidlab.training.adversary import Adversarial
from reidlab.training.checkpoint import read_checkpoint
from reidlab.training.generate import generate_from_recipe, load_generator
from reidlab.training.studio import Studio
from reidlab.training.with_generator import fit_beside_generator
from reidlab.viz.tensorboard import EVENTS

PLAN = {"input_dim": 8, "ngf": 4, "ndf": 4, "batch_size": 16, "sample_every": 1}


def recipe_of(epochs=1, game="only", **more):
    "The smallest people with a generator."
    small = {"data__val_fraction": 0.0, "data__height": 32, "data__width": 16}
    return tiny_recipe(train__epochs=epochs, train__gan={game: {**PLAN, **more}}, **small)


def weights(run):
    return read_checkpoint(run.path / "checkpoints" / "last.pt")["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# --- shapes and counts -----------------------------------------------------------------------


def test_full_size_is_as_published():
    with torch.device("meta"):
        generator = Generator(input_dim=256, ngf=64)
        photos = generator(torch.zeros(2, 256))
    assert photos.shape == (2, 3, 256, 128)
    assert sum(p.numel() for p in generator.parameters()) == 11_147_136
    critic = Critic(ndf=32)
    assert critic(torch.zeros(2, 3, 256, 128)).shape == (2,)
    assert sum(p.numel() for p in critic.parameters()) == 715_264


def test_the_maps_double_from_8_by_4():
    with torch.device("meta"):
        x, sizes = torch.zeros(1, 256, 1, 1), []
        for layer in Generator(input_dim=256, ngf=64).layers:
            x = layer(x)
            if isinstance(layer, torch.nn.ConvTranspose2d):
                sizes.append(tuple(x.shape[1:]))
    widths = (512, 512, 256, 128, 64, 3)
    assert sizes == [(w, 8 * 2**k, 4 * 2**k) for k, w in enumerate(widths)]


def test_other_defaults_of_a_recipe_are_the_originals():
    plan = Adversarial()
    assert (plan.input_dim, plan.ngf, plan.ndf, plan.batch_size) == (256, 64, 32, 128)
    assert (plan.lr, plan.beta1, plan.penalty, plan.loss) == (2e-4, 0.0, 10.0, "wgan_gp")
    assert (plan.loops, plan.every, plan.trust, plan.feature_noise) == (3, 20, 0.7, 0.01)


# --- alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["wgan_gp", "dcgan"])
def test_five_steps_move_the_losses_and_repeat(loss, photos):
    recipe = recipe_of(loss=loss)
    data = open_data(recipe.data, recipe.seed, photos)
    said = []
    for _ in range(2):
        studio = Studio(recipe, data)
        studio.loader.batch_sampler.batches = studio.loader.batch_sampler.batches[:5]
        chance = torch.Generator().manual_seed(0)
        batches = [b.images for b in studio.loader][:5]
        said.append([studio.pair.step(images, chance) for images in batches])
    assert said[0] == said[1] and len(said[0]) == 5
    for key in ("critic_loss", "generator_loss"):
        assert len({float(step[key]) for step in said[0]}) == 5
    assert all(v.isfinite() for step in said[0] for v in step.values())
    assert ("penalty" in said[0][0]) == (loss == "wgan_gp")


def stop(path, record):
    if record["epoch"] == 1:
        raise KeyboardInterrupt


def test_a_broken_run_ends_like_a_whole_one(photos, tmp_path):
    recipe, kept = recipe_of(epochs=3), {}
    about = {"workers": 0, "data_dir": photos}
    for name, hooks in (("whole", []), ("broken", [stop])):
        run = open_run(name, recipe, verb="generate", root=tmp_path)
        if hooks:
            with pytest.raises(KeyboardInterrupt):
                generate_from_recipe(recipe, run.path, on_epoch=hooks, **about)
            assert run.status()["state"] == "stopped"
        generate_from_recipe(recipe, run.path, **about)
        kept[name] = run
    assert same(*(weights(run) for run in kept.values()))
    drop = lambda run: [
        {k: v for k, v in e.items() if k not in ("seconds", "images_per_s")} for e in run.events()
    ]
    assert drop(kept["whole"]) == drop(kept["broken"]) and len(drop(kept["whole"])) == 3
    grids = [(run.path / "samples" / "epoch_003.png").read_bytes() for run in kept.values()]
    assert grids[0] == grids[1]
    record = keep_run("whole", [tmp_path], tmp_path / "results")
    assert len(list(record.glob("samples/*.png"))) == 4 and not list(record.rglob("*.pt"))
    assert load_runs(["whole"], [tmp_path]).loc["whole", "backbone"] == "generator"
    generator = load_generator(kept["whole"].path)
    assert torch.equal(generator.layers[0].weight, weights(kept["whole"])["0.layers.0.weight"])
    with pytest.raises(ValueError, match="is a generator; it draws people and ranks none"):
        evaluate_run(kept["whole"].path, data_dir=photos)


# --- drawn from features ---------------------------------------------------------------------


def test_features_of_a_run_are_what_is_drawn_from(photos, finished, tmp_path):
    path, _ = finished
    root = path.parent
    recipe = recipe_of(input_dim=256, features="run:done", l1=1.0)
    data = open_data(recipe.data, recipe.seed, photos)
    studio = Studio(recipe, data, roots=[root])
    assert studio.bank.shape == (len(data.train.paths), 256)
    batch = next(
        iter(studio.loader)
    )  # a feature knows no crop and no mirror: neither does the photo
    plain = torch.stack([studio.files[i] for i in batch.index.tolist()])
    torch.testing.assert_close(batch.images, normalise(plain, recipe.data.mean, recipe.data.std))
    here = studio.run(0)
    assert here["l1"] > 0
    other = Studio(recipe, data, roots=[root])
    other.bank = other.bank.flip(0)  # everybody gets another's feature
    assert other.run(0) != here
    again = Studio(recipe, data, roots=[root])
    assert again.run(0) == here


def test_a_run_that_does_not_fit_is_refused(photos, finished, tmp_path):
    root = finished[0].parent
    data = open_data(recipe_of().data, 0, photos)
    for changes, roots, message in (
        ({"features": "run:nobody"}, [root], "run 'nobody' not found"),
        (
            {"features": "run:done"},
            [root],
            "has features of 256 numbers and train.gan.only.input_dim is 8",
        ),
        ({"features": "done"}, [root], "train.gan.only.features is run:NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            Studio(recipe_of(**changes), data, roots=roots)
    others = Synthetic(train_pids=10, test_pids=4, cameras=3, seed=1)
    recipe = recipe_of(features="run:done", input_dim=256)
    elsewhere = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"synthetic": others})}
    )
    with pytest.raises(ValueError, match="run 'done' saw other photos"):
        Studio(elsewhere, open_data(elsewhere.data, 0, tmp_path), roots=[root])


def test_photos_may_travel_there_as_bytes(photos):
    recipe = recipe_of()
    train = recipe.train.model_copy(update={"normalise_on": "device"})
    data = open_data(recipe.data, 0, photos)
    host, there = (
        Studio(r, data).loader for r in (recipe, recipe.model_copy(update={"train": train}))
    )
    assert there.dataset.on_device and not host.dataset.on_device
    for one, other in zip(host, there, strict=True):
        assert torch.equal(one.images, other.images)


# --- beside a re-ID network ------------------------------------------------------------------


def beside(photos, root, name, hooks=(), **more):
    "A run of two epochs with a generator beside it."
    recipe = recipe_of(2, **{"input_dim": 256, "loops": 1, **more})
    run = open_run(name, recipe, verb="train", root=root)
    about = {"workers": 0, "data_dir": photos}
    if hooks:
        with pytest.raises(KeyboardInterrupt):
            fit_beside_generator(recipe, run.path, on_epoch=hooks, **about)
    fit_beside_generator(recipe, run.path, **about)
    return run, read_checkpoint(run.path / "checkpoints" / "last.pt")


def test_adversarial_training_continues_where_it_stood(photos, tmp_path):
    how = {"game": "adversarial", "every": 2, "trust": 0.0, "preheating": 1}
    _, whole = beside(photos, tmp_path, "whole", **how)
    _, broken = beside(photos, tmp_path, "broken", [stop], **how)
    assert same(whole["model"], broken["model"])
    assert same(whole["gan"]["networks"], broken["gan"]["networks"])
    assert whole["gan"]["passes"] == broken["gan"]["passes"] == 3
    assert whole["architecture"]["n_pids"] == 20  # ten people, and ten drawn


# --- what is refused, and the front doors ----------------------------------------------------


def test_the_jobs_send_each_other_the_right_recipes(stocked):
    with pytest.raises(ValueError, match=r"use nbs/generate\.ipynb"):
        plan_training(recipe_of())
    with pytest.raises(ValueError, match=r"Set data\.height and data\.width"):
        plan_training(
            tiny_recipe(data__height=96, data__width=32, train__gan={"alone": {"input_dim": 256}})
        )
    assert plan_training(tiny_recipe()).fit is not fit_beside_generator
    with pytest.raises(ValueError, match=r"train.gan is for task reid, .*; got only\. Leave"):
        load_recipe("shapes", overrides={"train.gan": "only"})


def test_the_page_draws(lab):
    names = walk("nbs/generate.ipynb")
    run = find_run("gan_people.smoke-generate-s0")
    assert run.finished and run.metrics()["verb"] == "generate"
    assert names["folder"].path == run.path and (run.path / EVENTS).is_file()
    assert {p.stem for p in run.path.glob("samples/*.png")} == {"epoch_001", "epoch_002", "real"}


def test_the_recipes_differ_as_they_say():
    published, bare = (load_recipe(f"gan_people/wgan_gp{k}").train.gan for k in ("", "-no_norm"))
    said = [published.get(key) for key in ("loss", "d_update_freq", "beta1")]
    assert published.name == "only" and said == ["wgan_gp", 1.0, 0.0]
    assert bare == published.changed(critic_norm="none")
    assert load_recipe("gan_people").train.gan.get("loss") == "dcgan"
