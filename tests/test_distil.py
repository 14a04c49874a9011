"""Any run teaches: of another size, normalisation, width, number of branches or other people; or one line says why not."""

import shutil
from functools import partial

import pytest
import torch
from conftest import tiny_recipe
from torch.nn.functional import interpolate
from torch.testing import assert_close

from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import Batch, open_data
from reidlab.models.heads import Branch
from reidlab.training.checkpoint import read_checkpoint
from reidlab.training.distill import Distiller, as_teacher_sees, check_teacher, distil_from_recipe
from reidlab.training.trained import load_model

BRIEF = {"data__val_fraction": 0.0, "data__height": 32, "data__width": 16, "train__epochs": 2}
TAUGHT = {"teacher": "run:teacher", "checkpoint": "last"}
OTHER = TAUGHT | {"logits": 0.0, "features": 0.0, "relations": 10.0, "branches": "whole"}
CDNET = {
    "model__backbone": {"cdnet": {"width": 0.25}},
    "model__neck": "fblneck",
    "train__distill": {"teacher_student": OTHER},
}
STRIPES = {  # six branches of a network of another size and normalisation, for fewer people
    "data__synthetic__train_pids": 8,
    "data__height": 64,
    "data__width": 32,
    "data__mean": [0.5, 0.5, 0.5],
    "data__std": [0.5, 0.25, 0.5],
    "model__head": {"pcb": {"stripes": 6}},
    "model__neck": {"bnneck": {"embedding": 4}},
    "train__epochs": 1,
}


def stop(path, record):
    raise SystemError("the power went out")


@pytest.fixture(scope="module")
def lesson(photos, tmp_path_factory):
    "A teacher of other people; a student of it trained at once, and one that was stopped and went on."
    root, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    shutil.copytree(photos, data, dirs_exist_ok=True)
    recipes = {
        "teacher": tiny_recipe(**BRIEF | STRIPES),
        **dict.fromkeys(("whole", "stopped"), tiny_recipe(**BRIEF | CDNET)),
    }
    for name, recipe in recipes.items():
        there = open_data(recipe.data, recipe.seed, data)
        check_teacher(recipe, there, roots=[root])
        run = open_run(name, recipe, verb="train", data=there.fingerprint, root=root)
        go = partial(distil_from_recipe, recipe, run.path, workers=0, data_dir=data)
        if name == "stopped":
            with pytest.raises(SystemError):
                go(on_epoch=[stop])
            assert len(run.history()) == 1
        go()
    return root


def test_a_stopped_student_ends_with_the_same_bits(lesson):
    one, two = (read_checkpoint(lesson / n / "checkpoints/last.pt") for n in ("whole", "stopped"))
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert RunFolder(lesson / "whole").history()["taught_relations"].gt(0).all()


def test_a_student_is_loaded_without_its_teacher(lesson, tmp_path):
    alone = shutil.copytree(lesson / "whole", tmp_path / "whole")
    model, content = load_model(alone, "last")
    assert not [key for key in content["model"] if "teacher" in key]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 16)).isfinite().all()


class Listener(torch.nn.Module):
    "A teacher that remembers what it was shown."

    takes_cameras = True

    def forward(self, images, cameras=None):
        self.seen, self.cameras = images, cameras
        return [Branch(None, images.flatten(1)[:, :7])]


def shown(theirs, **told):
    "Photos as numbers from 0 to 1, and what a teacher of a recipe is shown of them."
    ours = tiny_recipe(**CDNET | BRIEF)
    raw = torch.rand(4, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (ours.data.mean, ours.data.std))
    batch = Batch((raw - mean) / std, torch.arange(4) % 2, torch.arange(4), index=torch.arange(4))
    student, teacher = Listener(), Listener()
    student.weight = torch.nn.Parameter(torch.zeros(1))
    view = partial(as_teacher_sees, ours=ours.data, theirs=theirs.data, **told)
    loss = lambda branches, pids: (student.weight.sum(), {})
    Distiller(student, loss, ours.train, teacher=teacher, view=view).forward(batch)
    assert torch.equal(student.seen, batch.images)
    return raw, batch, teacher


def test_a_teacher_gets_the_photos_in_its_own_normalisation_and_size():
    raw, _, teacher = shown(tiny_recipe(**BRIEF | STRIPES))
    mean, std = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.5])
    large = interpolate(raw, (64, 32), mode="bilinear", antialias=True)
    assert_close(teacher.seen, (large - mean[:, None, None]) / std[:, None, None])


def test_a_teacher_of_the_same_photos_gets_them_to_the_bit():
    _, batch, teacher = shown(tiny_recipe(**BRIEF))
    assert torch.equal(teacher.seen, batch.images)


@pytest.mark.parametrize(("known", "cameras"), [(True, [0, 1, 2, 3]), (False, [-1] * 4)])
def test_cameras_are_told_to_a_teacher_of_the_same_photos_alone(known, cameras):
    _, _, teacher = shown(tiny_recipe(**BRIEF), same_cameras=known)
    assert teacher.cameras.tolist() == cameras


REFUSED = {
    "its columns are other people": ({"logits": 1.0}, {}, "classes is 8 there and 10 here"),
    "its branches are others": ({"branches": "each"}, {}, "or say branches: whole"),
    "its width is another": ({"features": 1.0}, {}, r"features: 0, relations: 1\)"),
    "it held out nobody": ({}, {"data__val_fraction": 0.2}, "val_fraction is 0.0 there and 0.2"),
    "nothing is taught": ({"relations": 0.0}, {}, "all 0: nothing would be taught"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_who_cannot_teach_is_told_in_one_line(why, lesson, photos):
    changes, more, told = REFUSED[why]
    asked = CDNET | BRIEF | more | {"train__distill": {"teacher_student": OTHER | changes}}
    recipe = tiny_recipe(**asked)
    with pytest.raises(ValueError, match=told) as wrong:
        check_teacher(recipe, open_data(recipe.data, recipe.seed, photos), roots=[lesson])
    assert "\n" not in str(wrong.value)
