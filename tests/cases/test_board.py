"TensorBoard's files read back: what was tried, alphas, strips; nothing lost or doubled; no bit changed by writing."

from functools import partial

import pytest
from conftest import tiny_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from reidlab.core.run import open_run
from reidlab.data.loaders import open_data
from reidlab.evaluation.validators import by_market
from reidlab.jobs.verbs import drawn_by
from reidlab.nas.search import search_from_recipe
from reidlab.training.checkpoint import read_checkpoint
from reidlab.training.fit import fit_from_recipe
from reidlab.viz.board import write_alphas, write_strips
from reidlab.viz.genotype import write_genotype


class Died(BaseException):
    "As if somebody had killed the process."


def killed(path, record, at):
    "Dies once, between saving and drawing."
    if record["epoch"] == at and not (path / "died").exists():
        (path / "died").touch()
        raise Died


def events(run):
    return EventAccumulator(str(run.path), size_guidance={"images": 0, "histograms": 0}).Reload()


def world(board):
    "Everything that a board shows, but for the speed."
    tags = board.Tags()
    found = {t: [(s.step, s.value) for s in board.Scalars(t)] for t in tags["scalars"]}
    found |= {
        t: [(i.step, i.encoded_image_string) for i in board.Images(t)] for t in tags["images"]
    }
    spread = board.Histograms
    found |= {t: [(h.step, h.histogram_value) for h in spread(t)] for t in tags["histograms"]}
    return {t: v for t, v in found.items() if not t.startswith("speed/")}


WRITERS = {"train": [write_strips], "search": [write_alphas, write_strips, write_genotype]}


@pytest.mark.parametrize("verb", ["train", "search"])
def test_a_board_holds_what_was_tried_alphas_and_strips(tmp_path, verb):
    r = tiny_recipe(train__epochs=3, search__epochs=3, search__warmup=1, search__validate_every=1)
    work = {"train": fit_from_recipe, "search": search_from_recipe}[verb]
    data = open_data(r.data, r.seed, tmp_path / "data").fingerprint
    about = {"validate": by_market, "workers": 0, "data_dir": tmp_path / "data"}
    draw = drawn_by(*WRITERS[verb])
    whole, broken, bare = (
        open_run(name, r, verb, data=data, root=tmp_path) for name in ("whole", "broken", "bare")
    )
    work(r, whole.path, on_epoch=draw, **about)
    with pytest.raises(Died):
        work(r, broken.path, on_epoch=[partial(killed, at=2), *draw], **about)
    work(r, broken.path, on_epoch=draw, **about)
    work(r, bare.path, **about)

    board, again = events(whole), events(broken)
    told = board.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(told[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["model.backbone"].string_value == r.model.backbone.name
    assert start.hparams["train.epochs"].number_value == 3
    assert metadata.SESSION_END_INFO_TAG in told
    seen = world(board)
    kept = {k: v for k, v in whole.metrics()["metrics"].items() if k.startswith("val_")}
    for name, value in kept.items():
        assert seen[f"kept/{name[4:]}"][-1] == (3, pytest.approx(value))
    assert [step for step, _ in seen["val/ranks"]] == [1, 2, 3]
    assert {tag.partition("/")[0] for tag in board.Tags()["scalars"]} == {
        *("train", "val", "kept", "speed"),
        *(["search"] if verb == "search" else []),
    }
    assert verb == "train" or [s for s, _ in seen["search/alphas_normal"]] == [1, 2, 3]
    lost = world(again)["val/ranks"]  # of the epoch after which it was killed: its network is gone
    assert [step for step, _ in lost] == [1, 3]
    assert {k: v for k, v in world(again).items() if k != "val/ranks"} == {
        k: v for k, v in seen.items() if k != "val/ranks"
    }
    one, two = (read_checkpoint(f.path / "checkpoints/last.pt")["model"] for f in (whole, bare))
    assert all((value == two[name]).all() for name, value in one.items())
