"What no single chapter of the viz room can say: frames, escaping, and event files across processes."

import json
import pickle
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from reidlab.core import look
from reidlab.data.manifest import Photos
from reidlab.retrieval.metrics import best_queries, worst_queries
from reidlab.viz.curves import plot_ap_histogram, plot_cmc, plot_history
from reidlab.viz.photos import contact_sheet, show_person
from reidlab.viz.ranking import hits, ranks_html, show_ranks
from reidlab.viz.tables import compare, metrics_table
from reidlab.viz.tensorboard import EVENTS, write_epoch, write_photos

EVIL = "\"><script>alert(1)</script>' onerror=x {0}.jpg"


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def people(tmp_path):
    "Six photos of three people; one of the files carries a hostile name."
    paths = [f"{i}.jpg" for i in range(5)] + [EVIL]
    for i, path in enumerate(paths):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 64), (40 * i, 90, 200 - 30 * i)).save(file)
    pids, camids = np.array([1, 1, 2, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 1])
    return Photos(tmp_path, paths, pids, camids)


def queries_and_gallery(people):
    return people.take(np.array([0, 2, 4])), people.take(np.array([1, 3, 5]))


class Elements(HTMLParser):
    "The elements and attributes that a browser would see."

    def __init__(self, html):
        super().__init__()
        self.seen = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_html_stays_text_whatever_a_file_is_called(people):
    query, gallery = queries_and_gallery(people)
    html = ranks_html(query, gallery, np.array([[0, 1], [1, 2], [2, -1]]), ap=[1.0, np.nan, 0.5])
    seen = Elements(html).seen
    assert {tag for tag, _ in seen} <= {"style", "div", "figure", "img", "figcaption", "br", "span"}
    images = [attrs for tag, attrs in seen if tag == "img"]
    assert len(images) == 3 + 5
    assert all(set(image) == {"class", "style", "src", "alt", "title"} for image in images)
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert sum(EVIL in image["alt"] for image in images) == 2  # the browser reads the name back
    assert [image["class"] for image in images if image["class"]] == [
        "hit",
        "miss",
        "hit",
        "miss",
        "hit",
    ]


def test_frames_tell_hit_and_miss_twice(people):
    query, gallery = queries_and_gallery(people)
    top = np.array([[0, 1, 2], [0, 1, -1]])
    ax = show_ranks(query.take(np.arange(2)), gallery, top, ap=np.array([1.0, np.nan]))
    frames = ax.patches
    assert [f.get_linestyle() for f in frames] == ["-", "--", "--", "--", "-", ":"]
    assert same_color(frames[0].get_edgecolor(), look.HIT["color"])
    assert same_color(frames[1].get_edgecolor(), look.MISS["color"])
    assert all(not f.get_fill() and f.get_linewidth() >= 2 for f in frames)
    words = [t.get_text() for t in ax.texts]
    assert "pid 1\ncam 0\nAP 100.0 %" in words and "pid 2\ncam 0\nno match" in words
    assert words.count("none") == 1


def test_an_empty_place_is_no_hit_though_it_indexes_the_last_photo():
    assert not hits([[-1]], q_pids=[5], g_pids=[4, 5]).any()


def test_queries_are_shown_in_the_order_asked_for(people):
    query, gallery = queries_and_gallery(people)
    top = np.array([[0], [1], [0]])
    ax = show_ranks(query, gallery, top, queries=[2, 0])
    assert [t.get_text() for t in ax.texts if t.get_text().startswith("pid")][::2] == [
        "pid 3\ncam 0",
        "pid 1\ncam 0",
    ]
    assert [f.get_linestyle() for f in ax.patches] == ["--", "-"]
    with pytest.raises(ValueError, match="positions from 0 to 2, got -1"):
        show_ranks(query, gallery, top, queries=[-1])


def test_pickers_pass_over_queries_without_an_ap():
    ap = np.array([np.nan, 0.2, 0.9, np.nan, 0.2])
    assert worst_queries(ap, 2).tolist() == [1, 4]
    assert best_queries(ap, 2).tolist() == [2, 1]
    assert worst_queries(ap, 99).tolist() == [1, 4, 2]
    assert worst_queries(np.full(3, np.nan), 2).tolist() == []


def test_one_person_by_camera_and_an_unknown_pid(people):
    ax = show_person(people, 2)
    assert [t.get_text() for t in ax.texts] == ["cam 0\n1 of 1", "cam 1\n1 of 1"]
    assert len(show_person(people, 2, max_photos=1).get_images()) == 1
    with pytest.raises(
        ValueError, match="no photo has pid 9; these 6 photos show 3 people: 1, 2, 3"
    ):
        show_person(people, 9)


def test_plots_draw_on_the_axes_they_are_given(people):
    fig, axes = plt.subplots(2, 3)
    history = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "val_mAP": [np.nan, 0.5]})
    assert list(plot_history(history, ax=axes[0, :2])) == list(axes[0, :2])
    assert plot_cmc({"a": np.array([0.5, 1.0])}, ax=axes[0, 2]) is axes[0, 2]
    assert plot_ap_histogram(np.array([0.1, np.nan]), ax=axes[1, 0]) is axes[1, 0]
    assert contact_sheet(np.zeros((2, 8, 4, 3), np.uint8), ax=axes[1, 1]) is axes[1, 1]
    assert show_person(people, 1, ax=axes[1, 2]) is axes[1, 2]
    assert plt.get_fignums() == [fig.number]


def test_per_cent_appears_in_the_view_only():
    history = pd.DataFrame({"epoch": [1], "loss": [2.0], "val_mAP": [0.5], "val_R1": [0.75]})
    panel = plot_history(history)[1]
    assert [line.get_ydata().tolist() for line in panel.get_lines()] == [[50.0], [75.0]]
    run = {"run": "r", "metrics": {"mAP": 0.5, "params": 2e6}, "protocol": {"rerank": "none"}}
    row = metrics_table([run]).loc["r"]
    assert row["mAP (%, standard AP)"] == 50 and row["params (M)"] == 2
    assert row["re-ranked"] == "no"
    assert compare([run]).loc["r", "mAP (%, standard AP)"] == "50.0"
    assert "re-ranked" not in metrics_table([{"run": "r", "val_mAP": 0.5}])  # not tested yet


def scalars(path):
    events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
    return {
        t: [(s.step, round(s.value, 4)) for s in events.Scalars(t)]
        for t in events.Tags()["scalars"]
    }


RECORD = {"event": "epoch", "epochs": 12, "softmax": 1.9, "triplet": 0.41, "lr": 0.0009}


def test_tensorboard_reads_back_what_fresh_processes_wrote(tmp_path):
    write = (
        "import json, sys; from pathlib import Path; from reidlab.viz.tensorboard import write_epoch;"
        "write_epoch(Path(sys.argv[1]), json.loads(sys.argv[2]))"
    )
    for epoch, loss in ((1, 2.0), (2, 1.5), (2, 1.25)):  # the second epoch is lived twice
        line = json.dumps({**RECORD, "epoch": epoch, "loss": loss, "val_mAP": epoch / 10})
        subprocess.run([sys.executable, "-c", write, str(tmp_path), line], check=True)
    assert [p.name for p in tmp_path.iterdir()] == [EVENTS]
    found = scalars(tmp_path)
    assert set(found) == {f"train/{k}" for k in ("loss", "softmax", "triplet", "lr")} | {"val/mAP"}
    assert found["train/loss"] == [(1, 2.0), (2, 1.25)]
    assert found["val/mAP"] == [(1, 0.1), (2, 0.2)]


def test_resume_forgets_what_it_repeats_and_photos_keep_their_step(tmp_path):
    photos = np.zeros((2, 8, 4, 3), np.uint8)
    for epoch in range(5):
        write_photos(tmp_path, "batch", photos, epoch)
        write_epoch(tmp_path, {**RECORD, "epoch": epoch, "loss": 5 - epoch})
    write_epoch(tmp_path, {**RECORD, "epoch": 3, "loss": 0.5})
    assert scalars(tmp_path)["train/loss"] == [(0, 5.0), (1, 4.0), (2, 3.0), (3, 0.5)]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [i.step for i in events.Images("photos/batch")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("cut", "more"), [(1, b""), (40, b""), (0, b"\xff" * 9), (0, b"\xff" * 4000)]
)
def test_a_record_torn_by_a_crash_costs_only_itself(tmp_path, cut, more):
    for epoch in (1, 2):
        write_epoch(tmp_path, {**RECORD, "epoch": epoch, "loss": 1.0})
    file = tmp_path / EVENTS
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - cut] + more)
    for epoch in (2, 3):
        write_epoch(tmp_path, {**RECORD, "epoch": epoch, "loss": 0.5})
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_writers_pickle_for_the_launcher():
    for function in (write_epoch, partial(write_photos, name="batch")):
        assert pickle.loads(pickle.dumps(function))
    assert write_epoch.__module__ == "reidlab.viz.tensorboard"


def test_the_path_may_be_text(tmp_path):
    write_epoch(str(tmp_path), {**RECORD, "epoch": 1})
    assert Path(tmp_path, EVENTS).stat().st_size > 0
