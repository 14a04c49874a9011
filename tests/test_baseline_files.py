"""Weights and settings of the public baselines: an answer for every tensor and key, the same figures."""

import re
from pathlib import Path

import pytest
import torch
from conftest import from_facts, tiny_recipe

from reidlab.core.recipe import load_recipe, recipe_names, validated
from reidlab.core.run import open_run
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.interchange.baseline_weights import (
    NAMES,
    baseline_facts,
    baseline_key,
    baseline_parts,
    load_baseline,
)
from reidlab.interchange.reid_lite import LITE, LITE_DEFAULTS, lite_recipe
from reidlab.interchange.strong_baseline import STRONG, STRONG_DEFAULTS, strong_recipe
from reidlab.interchange.weights_out import outward
from reidlab.models.catalogue import build_model
from reidlab.training.adopt import adopt
from reidlab.training.checks import check_model
from reidlab.training.fit import fit_from_recipe

MODELS = {
    "strong": {"backbone": "resnet18"},
    "strong without neck": {"backbone": "resnet34", "neck": "none"},
    "strong ibn": {"backbone": "resnet50_ibn"},
    "lite": {"backbone": "resnet50", "neck": "bn", "embedding": 8},
    "lite masked": {"backbone": "resnet18", "neck": "bn", "embedding": 8, "feature_mask": True},
    "lite stripes": {
        "backbone": "resnet18",
        "head": "pcb",
        "neck": "bn",
        "embedding": 4,
        "stripes": 3,
    },
    "lite stripes, all": {
        "backbone": "resnet18",
        "head": "pcb",
        "neck": "bn",
        "embedding": 4,
        "global_branch": 6,
        "feature_mask": True,
        "pool": "max",
    },
    "torchreid": {"backbone": "osnet_published", "width": 0.25, "neck": "fc"},
}


def theirs(model, family, prefix="module."):
    "The state dict that the other code would have written."
    stripes = getattr(model.head, "stripes", 0)
    state = {baseline_key(k, family, stripes): v.clone() for k, v in model.state_dict().items()}
    assert "" not in state and len(state) == len(model.state_dict())
    return {
        prefix + k: v[:, :, None, None] if re.fullmatch(r"Pcb\.branch\.\d+\.0\.weight", k) else v
        for k, v in state.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_network_of_ours_leaves_as_the_other_code_would_have_saved_it(name):
    model, family = from_facts(**MODELS[name], n_pids=3), name.split()[0]
    expected, gone = theirs(model, family, prefix=""), outward(model, family).tensors
    assert list(gone) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in gone.items())


@pytest.mark.parametrize("name", MODELS)
def test_what_a_file_shows_rebuilds_its_network(name):
    torch.manual_seed(0)
    family = name.split()[0]
    source = from_facts(**MODELS[name], n_pids=5).eval()
    state = theirs(source, family, "")
    facts = baseline_facts(state)
    assert (facts.pop("family"), facts.pop("n_pids")) == (family, 5)
    parts = baseline_parts(facts, MODELS[name].get("pool", "avg"))
    target = build_model(**parts, n_pids=5).eval()
    report = load_baseline(target, state, family)
    assert (len(report.loaded), report.left, report.fresh) == (len(state), {}, {})
    images = torch.randn(2, 3, 96, 32)
    with torch.no_grad():
        assert torch.equal(source(images), target(images))


@pytest.mark.parametrize("family", NAMES)
def test_every_tensor_is_accounted_for(family):
    torch.manual_seed(0)
    options = MODELS["lite stripes, all" if family == "lite" else family]
    model = from_facts(**options, n_pids=5)
    state = theirs(model, family, "")
    some = 9 if family == "torchreid" else 1  # of its six hundred every ninth, and the last
    for name in [*list(state)[::some], *list(state)[-8:]]:
        less = {k: v for k, v in state.items() if k != name}
        if "classifier" in name or name.endswith("num_batches_tracked"):
            assert len(load_baseline(model, less, family).fresh) == 1
        else:
            with pytest.raises(ValueError, match="of another network"):
                load_baseline(model, less, family)
    home = {"strong": "base", "lite": "model"}.get(family)
    more = {f"{home}.fc.weight": torch.zeros(1)} if home else {}
    more |= {"mask_g.0.weight": torch.zeros(1)} if family == "lite" else {}
    assert load_baseline(model, state | more, family).left.keys() == more.keys()


def test_an_adopted_checkpoint_gives_the_metrics_of_its_source(stocked, tmp_path):
    net = {"resnet18": {"stem_relu": False, "last_stride": 2}}
    asked = tiny_recipe(train__epochs=1, model__backbone=net)
    source = open_run("source", asked, verb="train")
    fit_from_recipe(asked, source.path, workers=0)
    state = torch.load(source.path / "checkpoints" / "best.pt", weights_only=True)
    weights = {f"module.{baseline_key(k, 'strong')}": v for k, v in state["model"].items()}
    before = evaluate_run(source.path)["metrics"]
    told = {"stem_relu": False, "last_stride": 2, "pool": "avg"}
    for run, content in (("wrapped", weights), ("plain", {k[7:]: v for k, v in weights.items()})):
        torch.save(content, tmp_path / f"{run}.pth")
        folder, _ = adopt(tmp_path / f"{run}.pth", source.recipe, run, **told)
        after = evaluate_run(folder.path)["metrics"]
        assert 0 < after["mAP"] < 1
        assert all(after[k] == before[k] for k in ("mAP", "mAP_trapezoidal", "mINP", "R1", "cmc"))


# --- settings: every key there is (specification of the baselines, 9.1 and 9.3) ---------------

LITE_KEYS = """
asoftmax_params.margin step scale unlabel_fold unlabel_update; batch_sampling_params.P K batch_size class_balanced
softmax_only; data_augmentation.colour_jitering crop_h crop_w padding_h padding_w mirror random_erasing gaussian_noise
imagenet_static rotation; evaluation_params.type step epoch; lr.base_lr fc_lr decay_gamma decay_step warmup_epoch;
model_params.model feature_dim pcb_n_parts random_drop_branchs last_conv_stride spectral_trans feature_mask
feature_gobal_dim; gan_params.input_dim batch_size adv_train alone_train lr beta1 ngf ndf preheating
pretrain_snapshot_d pretrain_snapshot_g d_update_freq train_loop only_train; tri_loss_params.margin
use_adaptive_weight lambda_tri lambda_cls
"""
LITE_FLAT = """
batches_dir epochs fine_tune focal_loss imagenet_pretrain img_h img_w num_preprocess_workers optimizer parallels
pretrain_snapshot weight_decay working_dir
"""
STRONG_KEYS = """
MODEL.DEVICE NAME LAST_STRIDE LABEL_SMOOTH PRETRAIN_PATH DEVICE_ID PRETRAIN_CHOICE NECK IF_WITH_CENTER
METRIC_LOSS_TYPE IF_LABELSMOOTH; INPUT.SIZE_TRAIN SIZE_TEST PROB RE_PROB PIXEL_MEAN PIXEL_STD PADDING; DATASETS.NAMES
DATA_PATH TRAIN_PATH QUERY_PATH GALLERY_PATH; DATALOADER.NUM_WORKERS SAMPLER NUM_INSTANCE; SOLVER.OPTIMIZER_NAME FP16
MAX_EPOCHS BASE_LR BIAS_LR_FACTOR MOMENTUM MARGIN WEIGHT_DECAY WEIGHT_DECAY_BIAS GAMMA STEPS WARMUP_FACTOR
WARMUP_ITERS WARMUP_METHOD CHECKPOINT_PERIOD LOG_PERIOD EVAL_PERIOD IMS_PER_BATCH CYTHON CLUSTER_MARGIN CENTER_LR
CENTER_LOSS_WEIGHT RANGE_K RANGE_MARGIN RANGE_ALPHA RANGE_BETA RANGE_LOSS_WEIGHT; TEST.IMS_PER_BATCH WEIGHT DEBUG
MULTI_GPU CMC VIS VIS_Q_NUM VIS_G_NUM RERANK RE_RANKING NECK_FEAT FEAT_NORM
"""


def keys(text):
    for part in text.split(";"):
        section, *rest = part.split()
        section, first = section.split(".")
        yield from (f"{section}.{key}" for key in (first, *rest))


def test_there_is_a_rule_for_every_key():
    lite = {*keys(LITE_KEYS), *LITE_FLAT.split()}
    assert LITE.keys() == lite and LITE_DEFAULTS.keys() <= lite
    strong = {*keys(STRONG_KEYS), "OUTPUT_DIR", "DATASETS.ROOT_DIR", "family", "stem_relu"}
    assert STRONG.keys() == strong and STRONG_DEFAULTS.keys() <= strong


@pytest.mark.parametrize("stripes", [0, 4, 6])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("sigma", [0, 0.3])
def test_a_recipe_of_lite_can_be_built(stripes, balanced, sigma):
    values, report = lite_recipe(
        {
            "model_params": {
                "pcb_n_parts": stripes,
                "feature_dim": 256 * max(stripes, 1),
                "spectral_trans": sigma,
                "random_drop_branchs": 6 if stripes else 0,
            },
            "batch_sampling_params": {"class_balanced": balanced, "batch_size": 64},
            "tri_loss_params": {"margin": "soft_margin"},
        }
    )
    assert not [line for line in report if line.status == "refused"]
    r = validated("lite", values)
    check_model(r)
    assert r.model.head.name == ("pcb" if stripes else "spectral" if sigma else "linear")
    assert (r.data.p, r.data.k) == ((4, 2) if balanced else (64, 1))
    assert (r.loss["triplet"]["weight"] > 0) == balanced
    assert r.model.neck.get("embedding") == 256 and r.model.head.get("dropout") == 0.5


def test_a_recipe_of_the_strong_baselines_can_be_built():
    for family in ("sbn", "strong"):
        for sampler, terms in {
            "softmax": (1, 0),
            "triplet": (0, 1),
            "softmax_triplet": (1, 1),
        }.items():
            values, report = strong_recipe({"DATALOADER": {"SAMPLER": sampler}}, family, False)
            assert not [line for line in report if line.status == "refused"]
            r = validated(family, values)
            check_model(r)
            assert tuple(r.loss[t]["weight"] for t in ("softmax", "triplet")) == terms
            assert r.evaluate.normalise == (family == "strong") and not r.model.backbone.get(
                "stem_relu"
            )


RECIPES = Path(__file__).parents[1] / "recipes"
ROWS = [name for name in recipe_names(RECIPES) if re.match(r"(lite|strong|sbn)(/|$)", name)]


def test_every_published_row_trains_on_all_and_keeps_its_last_epoch():
    assert len(ROWS) == 40  # the rows of three files, and the files
    for name in ROWS:
        r = load_recipe(name, folder=RECIPES)
        assert r.data.val_fraction == 0 and r.train.select == "last", name


def test_rows_are_what_the_originals_files_say():
    "A row of ours and the recipe read off a file of theirs."
    ours = load_recipe("lite/best-one-stage", folder=RECIPES)
    theirs, _ = lite_recipe(
        {
            "batch_sampling_params": {"P": 32, "K": 2},
            "tri_loss_params": {"margin": 0.16},
            "epochs": 100,
        }
    )
    theirs = validated("theirs", theirs)
    assert ours.model == theirs.model
    # the row's triplet looks at the global feature, that of the last code at the stripes' too
    assert ours.loss["triplet@global"] == theirs.loss["triplet"]
    assert ours.loss["softmax"] == theirs.loss["softmax"]
    assert ours.train.schedule == theirs.train.schedule
    ours = load_recipe("sbn/market", folder=RECIPES)
    theirs, _ = strong_recipe(
        {
            "SOLVER": {
                "BASE_LR": 1e-4,
                "GAMMA": 0.6,
                "STEPS": [20, 30],
                "WARMUP_FACTOR": 0.01,
                "WARMUP_ITERS": 10,
                "MAX_EPOCHS": 30,
            },
            "DATALOADER": {"SAMPLER": "softmax_triplet", "NUM_INSTANCE": 8},
        },
        "sbn",
        stem_relu=False,
    )
    theirs = validated("theirs", theirs)
    bare = ours.model.with_backbone(weights="")  # the row names its file
    assert bare == theirs.model and (ours.data.p, ours.data.k) == (
        theirs.data.p,
        theirs.data.k,
    )
    assert ours.train.warmup.options == pytest.approx(theirs.train.warmup.options)
    mine, its = (r.train.schedule.get("milestones") for r in (ours, theirs))
    assert mine[:2] == its and ours.train.warmup.get("epochs") == 9
    assert ours.evaluate.normalise == theirs.evaluate.normalise
