"A job's card, bar and time left: right for a run that goes on, text where it is a name's, and no random number spent."

from types import SimpleNamespace

import pytest
import torch
from conftest import laboratory, tiny_recipe

from reidlab.core.run import RunFolder
from reidlab.jobs.card import Card, Known
from reidlab.jobs.live import LiveView, bar_html, pulse_line
from reidlab.jobs.parameters import RecipeJob
from reidlab.jobs.verbs import open_search, open_training, train
from reidlab.training.epoch import seconds_left
from reidlab.training.fit import fit_from_recipe
from reidlab.training.launch import status_line
from reidlab.training.progress import Progress


class Died(BaseException):
    "As if somebody had killed the process."


EVIL = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    "status",
    [{"state": "new", "epoch": 0}, {"state": "running"}, {"epoch": 0, "epochs": 4, "step": 0}],
)
def test_nobody_reads_of_an_unknown_end(status):
    for text in (status_line(status), pulse_line(status)):
        assert "?" not in text and "0/" not in text.replace("/4", "")


@pytest.mark.parametrize(
    ("epoch", "step", "between", "wanted"),
    [(0, 0, [], 40.0), (2, 5, [], 15.0), (2, 5, [1.0, 3.0], 19.0), (4, 0, [2.0], 0.0)],
)
def test_time_left_counts_what_is_still_to_do(epoch, step, between, wanted):
    plan, progress = SimpleNamespace(epochs=4), Progress(epoch=epoch, step=step)
    fit = SimpleNamespace(plan=plan, progress=progress, steps=10, photos=16, between=between)
    assert seconds_left(fit, speed=16.0) == wanted


def test_names_are_text_on_a_card_and_beside_a_bar():
    card = Card("Train", EVIL, {"Photos": EVIL, EVIL: "x"}, Known(1.0, EVIL))
    for html in (card._repr_html_(), bar_html(0.5, EVIL)):
        assert "<img" not in html and "&lt;img" in html
    assert EVIL in repr(card)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    return laboratory(tmp_path, monkeypatch)


@pytest.mark.parametrize("opened", [open_training, open_search])
def test_a_card_spends_no_random_number(lab, opened):
    job = opened(RecipeJob(recipe="smoke", overrides=tiny_recipe().overrides))
    before = torch.get_rng_state()
    text = repr(job.card)
    assert torch.equal(before, torch.get_rng_state())
    assert "2 epochs of" in text or "4 epochs of" in text
    assert "not known before the first steps" in text and "measured" not in text


def test_a_run_that_goes_on_shows_all_of_its_curve_and_asks_its_like(lab, capfd):
    r = tiny_recipe(train__epochs=3)
    job = open_training(RecipeJob(recipe="smoke", overrides=r.overrides))

    def die(path, record):
        raise Died

    with pytest.raises(Died):
        fit_from_recipe(r, job.folder.path, on_epoch=[die], workers=0)
    again = open_training(RecipeJob(recipe="smoke", overrides=r.overrides))
    assert "goes on after epoch 1" in str(again.card)
    assert "from this run's first 1 epochs" in str(again.card)
    view, shares = LiveView(again.folder, again.card), []
    note = view.curve.note
    view.curve.note = lambda status: (shares.append(status.get("share", 0.0)), note(status))
    again.__dict__["view"] = lambda folder: view  # as the page's, but listened to
    again.run()
    assert view.curve.run.history()["epoch"].tolist() == [1, 2, 3] and shares[-1] == 1.0
    assert "measured: its steps alone" in str(again.card)
    told = repr(open_training(RecipeJob(recipe="smoke", seed=1, overrides=r.overrides)).card)
    assert f"from {job.folder.name}, on the same machine" in told and "an estimate" in told
    capfd.readouterr()
    train("smoke", seed=1, overrides=r.overrides)
    said = capfd.readouterr().err
    assert "3 epochs of" in said and "epoch 3/3" in said and "/?" not in said
    assert RunFolder(lab.runs / "smoke-train-s1").status()["memory"] > 2**20
