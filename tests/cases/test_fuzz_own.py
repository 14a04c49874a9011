"""Random sets of one's own, prepared, trained on for a step and evaluated: mAP is what files and labels alone say it is."""

import csv
import json
import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_recipe
from PIL import Image

from reidlab.core.run import open_run
from reidlab.data.doctor import examine
from reidlab.data.manifest import write_manifest
from reidlab.data.own import draw_splits, own_rows
from reidlab.data.repair import keep_findings
from reidlab.evaluation.embeddings import load_embeddings
from reidlab.evaluation.evaluate import embed_split
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.jobs.tasks import plan_training
from reidlab.training.trained import load_model

FORMS = ("table", "table with splits", "mapping", "folders", "folders with splits", "tracks")
ENDINGS = ("jpg", "png", "bmp", "webp", "tif", "JPG", "jpeg")
ODD = ("é ü", "a, b", "it's", "-dash", "日本", "100%", "[x]", "two  blanks", 'say "x"', "a.b", "+1")


class Made:
    "A set on the disk, and what is true of it."

    def __init__(self, root: Path, seed: int):
        self.random = np.random.default_rng(seed)
        self.root, self.form = root / "given", FORMS[seed % len(FORMS)]
        self.cameras = ("known", "unknown", "mixed")[seed // len(FORMS) % 3]
        self.rows: list[dict] = []  # of the table: path, pid, camid, split, track
        self.split, self.track = (
            "splits" in self.form or self.form == "tracks",
            self.form == "tracks",
        )
        self.names, numbers = count(), self.random.permutation(40)
        named = self.random.random() < 0.4
        people = [
            f"{'anna' if named else ''}{n + 1}" for n in numbers[: self.random.integers(8, 11)]
        ]
        parts = ["train"] * 5 + ["test"] * (len(people) - 5)
        for person, part in zip(people, parts, strict=True):
            self.person(person, part, int(self.random.choice([1, 2, 3])))
        if self.split:
            self.person("77" if not named else "nobody", "gallery", 1)  # a distractor
        if "table" in self.form:
            self.person("-1", "gallery", 2)
        self.link()
        self.beside()
        self.write()

    def camera(self) -> int:
        known = {"known": 1.0, "unknown": 0.0, "mixed": 0.6}[self.cameras]
        return int(self.random.integers(0, 3)) if self.random.random() < known else -1

    def person(self, pid: str, part: str, n: int) -> None:
        "Some photos of somebody, by whatever cameras."
        for i in range(n):
            split = ("query" if i == 0 else "gallery") if part == "test" else part
            name = f"{self.random.choice(ODD)} {next(self.names)}.{self.random.choice(ENDINGS)}"
            self.photo(pid, self.camera(), split, name)

    def photo(self, pid: str, camid: int, split: str, name: str) -> None:
        if "folders" in self.form:
            camid = -1 if self.cameras == "unknown" else max(camid, 0)
            name = f"{pid}/c{camid}_{name}"
            name = f"{split}/{name}" if self.split else name
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = self.random.integers(0, 256, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place)
        track = len(self.rows) // 2 if split == "gallery" else -1
        self.rows.append({"path": name, "pid": pid, "camid": camid, "split": split, "track": track})
        if self.track and split == "gallery":  # a track has one person and one camera
            last = [r for r in self.rows[:-1] if r["split"] == "gallery"][-1:]
            fits = last and last[0]["pid"] == pid and last[0]["camid"] == camid
            self.rows[-1]["track"] = last[0]["track"] if fits else next(self.names)

    def link(self) -> None:
        "One file more under a second name, in the gallery or wherever splits are drawn."
        asked = [r for r in self.rows if r["split"] == "query"]
        row = asked[int(self.random.integers(len(asked)))]
        place, hard = self.root / row["path"], self.random.random() < 0.5
        folder = Path(row["path"]).parent
        if self.split and "folders" in self.form:
            folder = Path("gallery") / row["pid"]
        path = (folder / f"link {next(self.names)}{place.suffix}").as_posix()
        if "folders" in self.form:
            path = (folder / f"c{row['camid']}_{Path(path).name}").as_posix()
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (os.link if hard else os.symlink)(place, self.root / path)
        if hard or self.form != "folders":  # a walk takes a linked photo once, in each split
            self.rows.append(row | {"path": path, "split": "gallery", "track": next(self.names)})

    def beside(self) -> None:
        "What systems leave beside photos; and of a folder of folders, somebody who lies elsewhere."
        if "folders" not in self.form:
            return
        (self.root / "Thumbs.db").write_bytes(b"no photo")
        first = (self.root / self.rows[0]["path"]).parent
        (first / "._hidden.jpg").write_bytes(b"no photo")
        elsewhere = self.root.parent / "elsewhere"
        os.rename(first, elsewhere)
        first.symlink_to(elsewhere)

    def write(self) -> None:
        "The list that comes with the photos, or none."
        self.source, self.pattern = self.root, ""
        if "folders" in self.form:
            self.pattern = "" if self.cameras == "unknown" else r"/c(?P<cam>\d+)_"
        elif self.form == "mapping":
            self.source = self.root / "class_mapping.json"
            listed: dict[str, list[str]] = {}
            for row in self.rows:
                listed.setdefault(row["pid"], []).append(row["path"])
            self.source.write_text(json.dumps(listed), encoding="utf-8")
        else:
            keys = ["path", "pid", "camid", *["split"] * self.split, *["track"] * self.track]
            self.source = self.root / "list.csv"
            with self.source.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, keys, extrasaction="ignore")
                table.writeheader()
                table.writerows(self.rows)
        if self.form == "mapping":
            self.rows = [row | {"camid": -1} for row in self.rows]


def files_of(made: Made, photos) -> list[SimpleNamespace]:
    "What is true of some photos of a data set, from the generator alone."
    known = {row["path"]: row for row in made.rows}
    found = []
    for path in photos.paths:
        about = os.stat(made.root / path)
        found.append(SimpleNamespace(**known[path], file=(about.st_dev, about.st_ino)))
    return found


def left_out(q: SimpleNamespace, g: SimpleNamespace) -> bool:
    "Whether a query's list has no place for an entry."
    same_camera = q.camid != -1 and q.camid == g.camid
    return g.pid == "-1" or (g.pid == q.pid and (same_camera or q.file == g.file))


def slow_map(query, gallery, q_feats, g_feats, tracks: bool) -> float:
    "mAP from files, labels and features."
    unit = [
        f / np.linalg.norm(f, axis=1, keepdims=True)
        for f in (np.float64(q_feats), np.float64(g_feats))
    ]
    found = []
    for q, feat in zip(query, unit[0], strict=True):
        near = dict(enumerate(np.linalg.norm(unit[1] - feat, axis=1)))
        entries: dict[int, list[int]] = {}
        for i, g in enumerate(gallery):
            entries.setdefault(g.track if tracks else i, []).append(i)
        listed = [
            (min(near[i] for i in members), gallery[members[0]].pid == q.pid)
            for members in entries.values()
            if not any(left_out(q, gallery[i]) for i in members)
        ]
        hits = [
            place for place, (_, right) in enumerate(sorted(listed, key=lambda e: e[0])) if right
        ]
        if hits:
            found.append(np.mean([(n + 1) / (place + 1) for n, place in enumerate(hits)]))
    return float(np.mean(found)) if found else float("nan")


def prepare(made: Made, lab, name: str):
    "As the page of one's own photos does it."
    frame, root = own_rows(made.source, made.pattern)
    if "split" not in frame:
        frame = draw_splits(frame, seed=0)
    protocol = "veri776_track" if made.track else "market1501"
    manifest = write_manifest(lab.data / name, name, frame, root, protocol=protocol)
    keep_findings(lab.data / name, examine(manifest))
    return manifest


def recipe_of(name: str, val_fraction: float):
    return tiny_recipe(
        **{
            "data__name": name,
            "data__height": 32,
            "data__width": 16,
            "data__augment__pad_crop__pixels": 2,
        },
        **{"data__sampler": {"pk": {"p": 2, "k": 2}}, "data__val_fraction": val_fraction},
        **{"train__epochs": 1, "evaluate__baselines": False},
    )


def planned(name: str):
    "A plan that judges if anybody could be found, and one that does not if not."
    for fraction in (0.4, 0.0):
        recipe = recipe_of(name, fraction)
        try:
            return recipe, plan_training(recipe)
        except ValueError as wrong:
            if "data.val_fraction to 0" not in str(wrong):
                raise
    raise AssertionError("without validation nothing is left to refuse")


def check(made: Made, lab, name: str) -> bool:
    "Prepare, train, evaluate; compare with the slow definition. Whether held-out people judged, too."
    manifest = prepare(made, lab, name)
    assert sorted(manifest.frame["path"]) == sorted(row["path"] for row in made.rows)
    recipe, plan = planned(name)
    run = open_run(name, recipe, verb="train", data=plan.data.fingerprint)
    plan.fit(recipe=recipe, folder=run.path, validate=plan.judge, workers=0)
    data = plan.data
    if data.held_out:
        sides = [files_of(made, p) for p in (data.val_query, data.val_gallery)]
        model, _ = load_model(run.path, "last")
        feats = embed_split(model, recipe, data, "val")[:2]
        want = slow_map(*sides, *feats, tracks=False)
        assert run.history()["val_mAP"].iloc[-1] == pytest.approx(want, abs=1e-6), "validation"
    sides = [files_of(made, manifest.photos(s)) for s in ("query", "gallery")]
    result = evaluate_run(run.path, workers=0)
    embeddings = load_embeddings(run.path / "evaluate" / name / "embeddings.npz")
    want = slow_map(*sides, *embeddings[:2], tracks=made.track)
    assert result["metrics"]["mAP"] == pytest.approx(want, abs=1e-6), "test"
    return data.held_out


def refused(error: ValueError) -> bool:
    "A set of a dozen photos may have nobody to ask for; it is refused, and says so."
    return any(
        words in str(error) for words in ("nobody to ask for", "nobody could be found in the test")
    )


@pytest.mark.parametrize(
    "seeds",
    [range(20), pytest.param(range(20, 320), marks=pytest.mark.slow)],
    ids=["20 sets", "300 sets"],
)
def test_map_is_what_files_and_labels_say(lab, tmp_path, seeds):
    said, judged = [], 0
    for seed in seeds:
        made = Made(tmp_path / f"set{seed}", seed)
        try:
            judged += check(made, lab, f"set{seed}")
        except ValueError as error:
            if not refused(error):
                raise AssertionError(f"set {seed}, {made.form}, cameras {made.cameras}") from error
            said.append(seed)
        except AssertionError as error:
            raise AssertionError(f"set {seed}, {made.form}, cameras {made.cameras}") from error
    assert len(said) <= len(seeds) / 4 and judged >= len(seeds) / 2, (said, judged)
