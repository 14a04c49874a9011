"""Parts of one's own: in a recipe, in a run, in other processes."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from reidlab.core import own
from reidlab.core.identity import given_files
from reidlab.core.own import OwnError, load_own, shelves
from reidlab.core.parts import shelf
from reidlab.core.recipe import Data, load_recipe
from reidlab.data.loaders import open_data, recipe_sampler, train_loader
from reidlab.training.checks import check_batches, check_model

ROOT = Path(__file__).parents[1]
MINE = """import torch

from reidlab.losses.catalogue import LOSSES


def {name}(feats: torch.Tensor, pids: torch.Tensor, size: float = 2.0):  # size: how much
    "A loss of my own."
    return size * feats.square().mean()


LOSSES["{name}"] = {name}
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    "A workbench with an own.py, whose parts are gone afterwards."
    text = (ROOT / "settings.ini").read_text(encoding="utf-8").replace("\nown =", "\nown = own.py")
    (tmp_path / "settings.ini").write_text(text, encoding="utf-8")
    monkeypatch.setenv("REIDLAB_ROOT", str(tmp_path))
    yield tmp_path
    monkeypatch.undo()
    load_own()


def test_every_shelf_of_the_house_is_found():
    import reidlab.losses.catalogue
    import reidlab.models.catalogue  # noqa: F401

    found = {address for address, _ in shelves()}
    assert {"reidlab.losses.catalogue:LOSSES", "reidlab.models.catalogue:BACKBONES"} <= found


def test_an_own_part_is_checked_like_any_other(bench):
    (bench / "own.py").write_text(MINE.format(name="mine"))
    folder = ROOT / "recipes"
    recipe = load_recipe("smoke", overrides={"loss": {"mine": {"size": 3.0}}}, folder=folder)
    assert recipe.loss["mine"]["size"] == 3.0
    with pytest.raises(ValueError, match="sise"):
        load_recipe("smoke", overrides={"loss": {"mine": {"sise": 3.0}}}, folder=folder)
    before = given_files(recipe)["own.py"]
    (bench / "own.py").write_text(MINE.format(name="mine") + "# another\n")
    assert given_files(recipe)["own.py"] != before  # a run continued with another is refused


def test_a_part_of_the_house_is_not_replaced(bench):
    (bench / "own.py").write_text(MINE.format(name="triplet"))
    with pytest.raises(OwnError, match=r"own.py replaces 'triplet' in reidlab.losses"):
        load_recipe("smoke", folder=ROOT / "recipes")
    (bench / "own.py").write_text("")
    assert "triplet" in load_recipe("smoke", overrides=TINY, folder=ROOT / "recipes").loss


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ValueError('no card')", "ValueError: no card in line 1"),
        ("\nassert False", "AssertionError in line 2"),
        ("def loss(:", "SyntaxError: invalid syntax in line 1"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing' in line 1"),
        (None, "own.py is not there"),
    ],
)
def test_what_is_wrong_with_the_file_is_not_told_of_the_recipe(text, says, bench):
    if text is not None:
        (bench / "own.py").write_text(text)
    for _ in range(2):  # and it is not forgotten
        with pytest.raises(OwnError, match=says) as caught:
            load_recipe("smoke", overrides=TINY, folder=ROOT / "recipes")
        assert "recipe 'smoke'" not in str(caught.value)


def test_a_look_at_a_shelf_sees_the_settings_of_that_moment(bench, monkeypatch):
    local = bench / "settings.local.ini"
    (bench / "own.py").write_text(MINE.format(name="mine"))
    (bench / "own.py").rename(bench / "away.py")
    for _ in range(2):  # what was said before is no answer for what is said now
        local.write_text("[reidlab]\nown =\n")
        assert "mine" not in shelf("loss")
        (bench / "away.py").rename(bench / "own.py")
        local.unlink()
        assert "mine" in shelf("loss")
        monkeypatch.setenv("REIDLAB_OWN", "")
        assert "mine" not in shelf("loss")
        monkeypatch.delenv("REIDLAB_OWN")
        (bench / "own.py").rename(bench / "away.py")
        with pytest.raises(OwnError, match="is not there"):
            shelf("loss")
        for wrong, says in (("device = gpu", "setting device"), ("wokers = 1", "wokers")):
            local.write_text(f"[reidlab]\nown =\n{wrong}\n")
            for _ in range(2):
                with pytest.raises(ValueError, match=says):
                    shelf("loss")


def test_a_package_that_fails_is_told_every_time(monkeypatch):
    def entry():
        raise ImportError("half installed")

    monkeypatch.delitem(own._LOADED, "packages", raising=False)
    found = [SimpleNamespace(value="lab.parts", load=entry)]
    monkeypatch.setattr(own, "entry_points", lambda group: found)
    for _ in range(2):
        with pytest.raises(ImportError, match="half installed"):
            load_own()


def test_another_process_has_it_before_it_looks(bench):
    (bench / "own.py").write_text(MINE.format(name="mine"))
    code = "from reidlab.core.parts import shelf; import sys; print('mine' in shelf('loss'), sys.modules['own'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=bench)
    assert done.stdout.split() == ["True", "own"], done.stderr


SAMPLER = """import numpy as np

from reidlab.core.parts import Given
from reidlab.data.batches import SAMPLERS
from reidlab.data.samplers import PKSampler


class Pairs(PKSampler):
    "Two photos each of so many people, in the order of the set."

    def __init__(
        self,
        pids: np.ndarray,
        couples: int = 4,  # people in a batch
        seed: Given[int] = 0,
        rank: Given[int] = 0,
        world: Given[int] = 1,
    ):
        super().__init__(pids, p=couples, k=2, seed=seed, rank=rank, world=world)

    def draw(self, epoch: int) -> np.ndarray:
        "Everybody's first two photos."
        first = [np.flatnonzero(self.pids == pid)[:2] for pid in np.unique(self.pids)]
        return np.concatenate(first[: len(first) // self.p * self.p]).reshape(-1, 2 * self.p)


SAMPLERS["pairs"] = Pairs
"""


def test_a_sampler_with_options_of_its_own_draws_the_batches(bench, photos):
    (bench / "own.py").write_text(SAMPLER)
    said = TINY | {"data.sampler": {"pairs": {"couples": 3}}}
    recipe = load_recipe("smoke", overrides=said, folder=ROOT / "recipes")
    data = open_data(recipe.data, recipe.seed, photos)
    check_model(recipe)
    check_batches(recipe, data)
    assert recipe_sampler(data.train, recipe.data, recipe.seed).batches.shape[1] == 6
    many = load_recipe(
        "smoke", overrides=said | {"data.sampler.pairs.couples": 99}, folder=ROOT / "recipes"
    )
    with pytest.raises(ValueError, match="Pairs needs 99 identities"):
        check_batches(many, data)


BACKBONE = """from torch import nn

from reidlab.core.values import Channels
from reidlab.models.catalogue import BACKBONES


def plain(channels: Channels = 8) -> nn.Module:  # of its one stage
    "One convolution."
    net = nn.Sequential(nn.Conv2d(3, channels, 3, 4, 1), nn.BatchNorm2d(channels))
    net.out_channels = channels
    return net


BACKBONES["plain"] = plain
"""


def test_a_backbone_without_weights_of_its_own_trains_and_is_opened(bench, photos, tmp_path):
    from reidlab.core.run import open_run
    from reidlab.training.fit import fit_from_recipe
    from reidlab.training.trained import load_model

    (bench / "own.py").write_text(BACKBONE)
    mine = {"model.backbone": {"plain": {"channels": 6}}, "train.epochs": 1}
    mine |= {"train.validate_every": 0, "train.select": "last"}
    recipe = load_recipe("smoke", overrides=TINY | mine, folder=ROOT / "recipes")
    run = open_run("mine", recipe, verb="train", root=tmp_path)
    fit_from_recipe(recipe, run.path, data_dir=photos)
    model, _ = load_model(run.path, "last")
    assert model.architecture["backbone.channels"] == 6 and model.feature_dim == 6


GREY = """import numpy as np
from torch import Tensor

from reidlab.data.augmentations import AUGMENTATIONS


def grey(
    photo: Tensor,
    random: np.random.Generator,
    probability: float = 0.1,  # of a photo without colour
) -> Tensor:
    "Without colour."
    flat = photo.float().mean(0, keepdim=True).byte().expand(3, -1, -1)
    return flat if random.random() < probability else photo


AUGMENTATIONS["grey"] = grey
"""


def test_an_augmentation_of_ones_own_varies_the_photos(bench, photos):
    (bench / "own.py").write_text(GREY)
    folder, said = ROOT / "recipes", {"data.augment": {"flip": {}, "grey": {"probability": 0.5}}}
    recipe = load_recipe("smoke", overrides=TINY | said, folder=folder)
    data = open_data(recipe.data, recipe.seed, photos)
    plain = {**recipe.data.model_dump(), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    loader = train_loader(data.train, Data(**plain), recipe.seed)
    dataset = pickle.loads(pickle.dumps(loader.dataset))  # as a reading process gets it
    keys = [key for batch in loader.batch_sampler for key in batch]
    one, two = (torch.stack([d[key][0] for key in keys]) for d in (loader.dataset, dataset))
    assert torch.equal(one, two)
    flat = (one[:, 0] == one[:, 1]).all(-1).all(-1).float().mean()
    assert 0.25 < flat < 0.75
    with pytest.raises(ValueError, match=r"data\.augment\.grey\.probability"):
        load_recipe(
            "smoke", overrides={"data.augment": {"grey": {"probability": "x"}}}, folder=folder
        )
