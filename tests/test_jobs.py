"""The jobs end to end, as their users call them: prepare, search, train, evaluate, and a sweep of them."""

import re
import shutil
import zipfile

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import TINY, done, facts, laboratory, pictures, run_job, walk
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reidlab.core.run import RunFolder, keep_run, load_runs, read_json
from reidlab.data.loaders import open_data
from reidlab.data.manifest import load_manifest, read_manifest
from reidlab.evaluation.breakdown import CameraMatrix
from reidlab.evaluation.embeddings import load_embeddings
from reidlab.evaluation.lists import ranking_of, read_ranking
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.sweep import STEPS, check_sweep, run_sweep, start_page
from reidlab.models.genotype import genotypes_of, read_genotype
from reidlab.nas.derive import derive
from reidlab.viz.ranking import show_recorded_ranks

TRAIN, EVALUATE, MARKET = "nbs/train.ipynb", "nbs/evaluate.ipynb", "data_prep/market1501.ipynb"
SEARCH, SWEEP = "nbs/search.ipynb", "nbs/sweep.ipynb"


OWN = TINY | {"model.backbone": "small_cnn"}
NOWHERE = {"derived": {"genotype": "nowhere"}}
WRONG = "smoke-backbone_derived-genotype-nowhere-train-s0"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    "A laboratory after a sweep that called train and evaluate once with papermill, and train for a cell that cannot be built."
    with pytest.MonkeyPatch.context() as patch:
        lab = laboratory(tmp_path_factory.mktemp("chain"), patch)
        grid = {"model.backbone": ["small_cnn", NOWHERE]}
        lab.sweep = lab.root / "sweep.ipynb"
        lab.job = run_job(SWEEP, lab.sweep, grid=grid, overrides=TINY, at_once=2)
        lab.run = RunFolder(lab.runs / "smoke-backbone_small-cnn-train-s0")
        assert lab.run.finished, lab.job.text[-3000:]
        lab.train, lab.evaluate = (lab.run.path / f"{step}.ipynb" for step in STEPS)
        lab.console = (lab.run.path / "train.log").read_text(encoding="utf-8")
        yield lab


def test_a_sweep_with_the_real_pages(chain):
    "Two cells, one of which cannot be built: it is reported, the other finishes, and stays finished."
    job, run = chain.job, chain.run
    assert job.rc == 1 and "1 of 2 cells are not finished" in job.text, job.text[-3000:]
    assert WRONG in job.text and "genotype 'nowhere' not found" in job.text
    assert run.finished and (run.path / "evaluate/synthetic/metrics.json").is_file()
    for step in STEPS:
        page = nbformat.read(run.path / f"{step}.ipynb", as_version=4)
        assert not [o for c in page.cells for o in c.get("outputs", []) if o.output_type == "error"]
    shown = "".join(str(c.get("outputs")) for c in nbformat.read(chain.sweep, as_version=4).cells)
    assert "smoke-backbone_small-cnn" in shown and "minutes" in shown
    cells = plan_cells("smoke", grid={"model.backbone": ["small_cnn"]}, overrides=TINY)
    before = (run.path / "train.ipynb").stat().st_mtime_ns
    table = run_sweep(cells, start_page, show=lambda table: None)
    assert check_sweep(table) == "All 1 cells are finished."
    assert (run.path / "train.ipynb").stat().st_mtime_ns == before


def test_train_leaves_a_run_folder(chain):
    run = chain.run
    assert {p.name for p in chain.runs.iterdir()} == {run.name, WRONG}
    assert pictures(chain.train) == 3  # a batch, the newest strip, the curves
    page = nbformat.read(chain.train, as_version=4)
    assert max(len(cell.get("outputs", [])) for cell in page.cells) <= 4  # replaced, not added to
    text = str(page)
    assert "2 epochs of" in text and "measured: its steps alone" in text and "/?" not in text
    assert re.search(r"epoch 2/2 · loss \d+\.\d+ · \d+ images/s · 0:00:00 left", chain.console)
    assert run.recipe.overrides == OWN and run.recipe.train.epochs == 2
    assert run.status()["epochs"] == 2 and run.status()["seconds_left"] == 0
    made = {"python", "packages", "device", "threads", "commit", "dirty", "data", "command"}
    assert made <= run.environment.keys()
    pulse = {"epoch", "step", "images_per_s", "seconds_left", "pid", "host", "beat"}
    assert pulse <= run.status().keys() and run.status()["state"] == "finished"
    history = run.history()
    assert list(history["epoch"]) == [1, 2] and history["val_mAP"].between(0, 1).all()
    final = run.metrics()
    about = {"format", "run", "recipe", "seed", "commit", "dirty", "device", "dataset", "seconds"}
    assert about <= final.keys() and {"val_mAP", "params", "macs"} <= final["metrics"].keys()
    assert final["metrics"]["val_mAP"] == history["val_mAP"].max()


def test_checkpoints_hold_what_is_promised(chain):
    files = {
        p.stem: torch.load(p, weights_only=True) for p in chain.run.path.glob("checkpoints/*.pt")
    }
    assert files.keys() == {"best", "last", "previous"}
    promised = {"format", "kind", "model", "architecture", "recipe", "epoch", "selection"}
    assert all(promised <= content.keys() for content in files.values())
    assert {"optimizer", "scaler", "random", "progress"} <= files["last"].keys()
    assert [files[stem]["epoch"] for stem in ("previous", "last")] == [1, 2]
    assert files["best"]["kind"] == "best" and "val_mAP" in files["best"]["selection"]


def test_checkpoints_carry_the_fingerprint(chain):
    content = torch.load(chain.run.path / "checkpoints" / "best.pt", weights_only=True)
    assert "fingerprint" in content, "formats.md: best.pt {…, architecture, recipe, fingerprint, …}"


def test_tensorboard_reads_back(chain):
    board = EventAccumulator(str(chain.run.path)).Reload()
    history = chain.run.history()
    for tag, column in (("train/loss", "loss"), ("val/mAP", "val_mAP")):
        scalars = board.Scalars(tag)
        assert [s.step for s in scalars] == [1, 2]
        np.testing.assert_allclose([s.value for s in scalars], history[column], rtol=1e-6)


def test_evaluate_leaves_metrics_and_embeddings(chain):
    folder = chain.run.path / "evaluate" / "synthetic"
    files = {"metrics.json", "embeddings.npz", "features.json", "ranking.json", "opened.json"}
    assert {p.name for p in folder.iterdir()} == files
    assert pictures(chain.evaluate) == 5  # CMC, APs, cameras, hardest, easiest
    stored = read_json(folder / "metrics.json")
    about = {"format", "run", "recipe", "seed", "commit", "dirty", "device", "dataset", "split"}
    assert about <= stored.keys() and stored["split"] == "test"
    card = stored["protocol"]
    rules = {"version", "fingerprint", "counts", "ap_rule", "metric", "normalised", "flip"}
    rules |= {"multi_query", "rerank", "checkpoint", "chosen", "times_opened"}
    assert rules <= card.keys() and card["times_opened"] == 1
    assert card["fingerprint"] == chain.run.environment["data"]
    figures = stored["metrics"]
    names = {"mAP", "mAP_trapezoidal", "mINP", "R1", "R5", "R10", "params", "macs"}
    assert names | {"cmc", "queries_without_match"} <= figures.keys()
    assert all(0 <= v <= 1 for k, v in figures.items() if k[0] in "mR" and k != "macs")
    assert figures["cmc"][0] == figures["R1"] and len(figures["cmc"]) == card["max_rank"]
    sure = stored["intervals"]
    assert {"mAP", "mINP", "R1"} <= sure.keys()
    assert all(e["low"] <= figures[k] <= e["high"] for k, e in sure.items() if k in figures)
    assert sure["mAP"]["low"] < sure["mAP"]["high"] and sure["mAP"]["value"] == figures["mAP"]
    pairs = CameraMatrix.from_plain(stored["cameras"])
    assert pairs.mAP.shape == pairs.queries.shape and pairs.mAP.isna().sum().sum() > 0
    text = chain.evaluate.read_text(encoding="utf-8")
    for shown in ("trapezoidal", "low, high", "first match at", "times opened"):
        assert shown in text, shown  # both APs, intervals, worst queries, the card
    (prepared,) = chain.data.iterdir()
    manifest, features = read_manifest(prepared), load_embeddings(folder / "embeddings.npz")
    for side, split in (("q", "query"), ("g", "gallery")):
        photos, columns = manifest.photos(split), features._asdict()
        assert columns[f"{side}_feats"].dtype == np.float32
        assert columns[f"{side}_paths"].tolist() == photos.paths
        np.testing.assert_array_equal(columns[f"{side}_pids"], photos.pids)
    row = load_runs([chain.run.name], [chain.runs]).loc[chain.run.name]
    assert (
        row["mAP"] == figures["mAP"] and row["val_mAP"] == chain.run.metrics()["metrics"]["val_mAP"]
    )


def test_the_kept_queries_are_those_of_the_whole_ranking(chain):
    record, (query, gallery, ranks) = read_ranking(chain.run.path), ranking_of(chain.run.path)
    stored = read_json(chain.run.path / "evaluate" / "synthetic" / "metrics.json")
    assert (record["format"], record["n"], record["queries"]) == (1, 5, len(query.paths))
    assert (record["run"], record["dataset"]) == (chain.run.name, "synthetic")
    assert record["mAP"] == stored["metrics"]["mAP"]
    assert record["checkpoint"] == stored["protocol"]["checkpoint"]
    assert record["ap"] == [None if np.isnan(v) else round(v, 4) for v in ranks.ap.tolist()]
    for end, sign in (("worst", 1), ("best", -1)):
        order = sorted((sign * v, q) for q, v in enumerate(ranks.ap.tolist()) if v == v)[:5]
        assert len(record[end]) == len(order) > 1
        for kept, (ap, q) in zip(record[end], order, strict=True):
            named = query.paths[q], query.pids[q], query.camids[q], sign * ap
            assert (kept["path"], kept["pid"], kept["camid"], kept["ap"]) == named
            listed = [g for g in ranks.top[q] if g >= 0]
            assert len(listed) == len(kept["ranks"]) == 10
            for entry, g in zip(kept["ranks"], listed, strict=True):
                same = gallery.pids[g] == query.pids[q]
                named = gallery.paths[g], gallery.pids[g], gallery.camids[g], same
                assert (entry["path"], entry["pid"], entry["camid"], entry["match"]) == named
                assert entry["pid"] != -1 and not (same and entry["camid"] == kept["camid"])


def test_a_kept_record_draws_its_queries_without_embeddings(chain):
    root = open_data(chain.run.recipe.data).manifest.root
    kept = keep_run(chain.run.name)
    files = {p.name for p in (kept / "evaluate" / "synthetic").iterdir()}
    assert files == {"metrics.json", "ranking.json"}
    record = read_ranking(kept)
    assert record == read_ranking(chain.run.path)
    for end in ("best", "worst"):
        ax = show_recorded_ranks(record, root, end)
        solid = [frame.get_linestyle() == "-" for frame in ax.patches]
        assert solid == [entry["match"] for q in record[end] for entry in q["ranks"]]
    plt.close("all")
    with pytest.raises(ValueError, match="Prepare 'synthetic' and hand in its root"):
        show_recorded_ranks(record, kept)


def test_an_older_evaluation_gets_its_ranking_from_its_embeddings(chain, tmp_path):
    folder = chain.run.path / "evaluate" / "synthetic"
    before = facts(folder)
    shutil.move(folder / "ranking.json", tmp_path)
    with pytest.raises(ValueError, match="Evaluate it again: papermill"):
        read_ranking(chain.run.path)
    walk(EVALUATE, run=chain.run.name, device="cpu", gpus=2)
    after = facts(folder)
    assert after.keys() == before.keys()
    assert after["ranking.json"][0] == before["ranking.json"][0]
    assert all(after[name] == before[name] for name in ("metrics.json", "embeddings.npz"))


def test_evaluation_says_how_long_it_took(chain):
    stored = read_json(chain.run.path / "evaluate" / "synthetic" / "metrics.json")
    assert stored["seconds"] > 0


def test_train_again_shows_the_finished_run(chain, tmp_path):
    before = facts(chain.run.path)
    walk(TRAIN, tmp_path / "again.ipynb", run=chain.run.name, overrides=OWN)
    assert facts(chain.run.path) == before
    assert pictures(tmp_path / "again.ipynb") == 2
    assert chain.run.metrics()["selection"] in (tmp_path / "again.ipynb").read_text()


def test_evaluate_again_does_not_open_the_test_split(chain):
    before = facts(chain.run.path)
    walk(EVALUATE, run=chain.run.name)
    assert facts(chain.run.path) == before


def test_two_processes_measure_the_same(chain, tmp_path):
    folder = chain.run.path / "evaluate"
    shutil.move(folder, tmp_path / "alone")
    try:
        walk(EVALUATE, run=chain.run.name, device="cpu", gpus=2)
        two = read_json(folder / "synthetic" / "metrics.json")
        shared = load_embeddings(folder / "synthetic" / "embeddings.npz")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "alone", folder)
    one = read_json(folder / "synthetic" / "metrics.json")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == two["metrics"]
    alone = load_embeddings(folder / "synthetic" / "embeddings.npz")
    np.testing.assert_allclose(alone.q_feats, shared.q_feats, rtol=1e-4, atol=1e-5)
    assert alone.g_paths.tolist() == shared.g_paths.tolist()


def test_two_processes_train(chain, monkeypatch):
    monkeypatch.setenv("REIDLAB_WORKERS", "1")
    walk(TRAIN, run="pair", device="cpu", gpus=2, overrides=TINY)
    pair = RunFolder(chain.runs / "pair")
    assert pair.finished and pair.environment["processes"] == 2
    assert list(pair.history()["epoch"]) == [1, 2]  # written once, by rank 0
    rows = [line.split('"epoch": ')[1][0] for line in (pair.path / "metrics.jsonl").open()]
    assert rows == ["1", "2"]
    assert len(EventAccumulator(str(pair.path)).Reload().Scalars("train/loss")) == 2
    assert len(torch.load(pair.path / "checkpoints/last.pt", weights_only=True)["random"]) == 2


MINIATURE = {  # path: (pid, camid, split)
    "bounding_box_train/0002_c1s1_000451_03.jpg": (2, 0, "train"),
    "bounding_box_train/0002_c2s1_000301_01.jpg": (2, 1, "train"),
    "bounding_box_train/0007_c6s3_077242_02.jpg": (7, 5, "train"),
    "query/0001_c1s1_001051_00.jpg": (1, 0, "query"),
    "bounding_box_test/-1_c3s2_028512_04.jpg": (-1, 2, "gallery"),
    "bounding_box_test/0000_c4s1_014202_02.jpg": (0, 3, "gallery"),
    "bounding_box_test/0001_c2s3_011742_01.jpg": (1, 1, "gallery"),
    "gt_bbox/0001_c1s1_001051_00.jpg": (1, 0, "multi_query"),
}


def test_market1501_from_a_folder_and_from_an_archive(lab, tmp_path):
    tree = lab.raw / "mini"
    rng = np.random.default_rng(0)
    for path in MINIATURE:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(tree / path)
    (tree / "bounding_box_test" / "Thumbs.db").write_bytes(b"left by a file browser")
    Image.new("RGB", (16, 32)).save(tree / "query" / "overview.jpg")
    archive = tmp_path / "as downloaded.zip"
    with zipfile.ZipFile(archive, "w") as box:
        for file in sorted(p for p in tree.rglob("*") if p.is_file()):
            box.write(file, "Mini-v1/" + file.relative_to(tree).as_posix())
    sources = facts(lab.raw), archive.read_bytes()

    walk(MARKET, tmp_path / "folder.ipynb", name="mini")
    walk(MARKET, name="zipped", source=str(archive))

    assert (facts(lab.raw), archive.read_bytes()) == sources
    assert pictures(tmp_path / "folder.ipynb") == 2
    assert "query/overview.jpg" in (tmp_path / "folder.ipynb").read_text()
    assert sorted(p.name for p in (lab.data / "mini").iterdir()) == [
        "contents.jsonl",
        "manifest.csv",
        "manifest.json",
    ]
    found = load_manifest("mini")
    assert {r.path: (r.pid, r.camid, r.split) for r in found.frame.itertuples()} == MINIATURE
    order = found.frame["split"].map(["train", "query", "gallery", "multi_query"].index)
    assert order.is_monotonic_increasing and found.photos("gallery").pids.tolist() == [-1, 0, 1]
    assert found.about["counts"]["gallery photos"]["ours"] == 3

    packed = load_manifest("zipped")
    for file in ("mini", "zipped"):
        assert {"format", "name", "version", "protocol", "counts", "fingerprint", "findings"} <= (
            read_json(lab.data / file / "manifest.json").keys()
        )
    csv = [(lab.data / name / "manifest.csv").read_bytes() for name in ("mini", "zipped")]
    assert csv[0] == csv[1] and found.fingerprint == packed.fingerprint
    assert packed.root == lab.data / "zipped" / "unpacked" / "Mini-v1"
    assert all(
        (packed.root / path).read_bytes() == (tree / path).read_bytes() for path in MINIATURE
    )
    walk(MARKET, name="zipped", source=str(archive))  # unpacked once, prepared again
    assert load_manifest("zipped").fingerprint == packed.fingerprint


CELLS = TINY | {  # a search of two epochs, of which the first leaves the alphas alone
    "model.backbone": {
        "derived": {"stem": "conv3x2", "init_channels": 8, "cells_per_stage": [1, 1]}
    },
    "search.space.*.cells_per_stage": [1, 1],
    "search.space.*.init_channels": 6,
    "search.space.*.nodes": 2,
    "search.epochs": 2,
    "search.warmup": 1,
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    "A laboratory after a search by two processes, called once with papermill."
    with pytest.MonkeyPatch.context() as patch:
        lab = laboratory(tmp_path_factory.mktemp("searched"), patch)
        lab.page = lab.root / "search.ipynb"
        lab.console = done(run_job(SEARCH, lab.page, device="cpu", gpus=2, overrides=CELLS)).text
        lab.run = RunFolder(lab.runs / "smoke-search-s0")
        yield lab


def test_search_leaves_genotypes_and_their_history(searched):
    run = searched.run
    assert [p.name for p in searched.runs.iterdir()] == [run.name]
    assert pictures(searched.page) == 6  # a batch, answer, curves, alphas, their entropy, health
    assert searched.page.read_text().count("image/svg+xml") == 1  # the answer
    assert re.search(r"epoch 2/2 · loss \d+\.\d+", searched.console)
    names = [p.name for p in sorted((run.path / "genotypes").iterdir())]
    assert names == ["epoch_000.json", "epoch_001.json", "epoch_002.json"]
    first, warm, final = genotypes_of(run.path)
    assert read_genotype(run.path / "genotype.json") == final
    assert (run.path / "genotype.json").read_bytes() == (
        run.path / "genotypes" / names[-1]
    ).read_bytes()
    assert first.about["alphas"] == warm.about["alphas"] != final.about["alphas"]
    assert {kind: np.shape(a) for kind, a in final.about["alphas"].items()} == {
        "normal": (5, 7),
        "reduce": (5, 7),
    }
    made = {"run": run.name, "recipe": "smoke", "seed": 0, "epoch": 2}
    assert (final.about["rule"], final.about["made_by"]) == ("softmax", made)
    assert final.nodes == 2 and final.about["cost"]["input"] == [64, 32]
    derived = derive(*final.about["alphas"].values(), final.ops)
    assert (derived.normal, derived.reduce) == (final.normal, final.reduce)


def test_search_writes_its_records(searched):
    run, stored = searched.run, searched.run.metrics()
    about = {"format", "run", "recipe", "seed", "commit", "dirty", "device", "dataset", "seconds"}
    assert about <= stored.keys() and stored["verb"] == "search"
    assert "alphas after epoch 2, the last" in stored["selection"]
    history, cost = run.history(), genotypes_of(run.path)[-1].about["cost"]
    assert list(history["epoch"]) == [1, 2] and (history["alpha_drift"] == 0).all()
    assert history["alpha_loss"].isna().tolist() == [True, False]
    assert history["val_mAP"].between(0, 1).iloc[-1]
    assert stored["metrics"]["macs"] == cost["macs"] == history["macs"].iloc[-1]
    assert stored["metrics"]["params"] == cost["params"] < stored["metrics"]["supernet_params"]
    board = EventAccumulator(str(run.path)).Reload()
    for tag, column in (("train/loss", "loss"), ("search/entropy_normal", "entropy_normal")):
        scalars = board.Scalars(tag)
        assert [s.step for s in scalars] == [1, 2]
        np.testing.assert_allclose([s.value for s in scalars], history[column], rtol=1e-6)
    assert sorted(board.Tags()["images"]) == ["genotype/cells", "val/ranks"]
    assert [s.step for s in board.Images("genotype/cells")] == [1, 2]
    last = torch.load(run.path / "checkpoints" / "last.pt", weights_only=True)
    assert {"alpha_optimizer", "circle", "optimizer", "random", "progress"} <= last.keys()


def test_what_was_searched_is_trained_and_ranked(searched):
    before = facts(searched.run.path)
    own = CELLS | {"model.backbone.*.genotype": "run:smoke-search-s0"}
    walk(TRAIN, overrides=own | {"train.epochs": 1})
    walk(EVALUATE)  # its run is smoke-train-s0
    assert facts(searched.run.path) == before
    run, found = RunFolder(searched.runs / "smoke-train-s0"), genotypes_of(searched.run.path)[-1]
    assert read_genotype(run.path / "genotype.json") == found
    ranked = read_json(run.path / "evaluate" / "synthetic" / "metrics.json")["metrics"]
    for figures in (run.metrics()["metrics"], ranked):  # what the search said it would cost
        assert figures["macs"] == found.about["cost"]["macs"]
    assert 0 < ranked["mAP"] <= 1
    shutil.move(searched.run.path, searched.root / "elsewhere")
    try:  # the run stands on its own
        shutil.rmtree(run.path / "evaluate")
        walk(EVALUATE, run="smoke-train-s0")
    finally:
        shutil.move(searched.root / "elsewhere", searched.run.path)
    again = read_json(run.path / "evaluate" / "synthetic" / "metrics.json")["metrics"]
    assert again == ranked


def test_search_again_shows_the_finished_run(searched):
    before = facts(searched.run.path)
    names = walk(SEARCH, overrides=CELLS)
    assert facts(searched.run.path) == before
    assert names["folder"].path == searched.run.path
    assert names["found"] == genotypes_of(searched.run.path)[-1]


def test_two_processes_search(searched):
    walk(SEARCH, run="alone", overrides=CELLS)
    pair, one = searched.run, RunFolder(searched.runs / "alone")
    history, alone = pair.history(), one.history()
    assert pair.finished and pair.environment["processes"] == 2
    assert list(history["epoch"]) == [1, 2] and (history["alpha_drift"] == 0).all()
    np.testing.assert_allclose(history["loss"].iloc[0], alone["loss"].iloc[0], rtol=1e-3)
    assert len(genotypes_of(pair.path)) == 3
    starts = [genotypes_of(r.path)[0].about["alphas"] for r in (pair, one)]
    assert starts[0] == starts[1]
