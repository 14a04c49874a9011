"""Settings of other projects, read and then put to work: rates and checks of training and search."""

import pytest

from reidlab.core.recipe import validated
from reidlab.interchange.autoreid import read_seed_config
from reidlab.interchange.reid_lite import lite_recipe
from reidlab.interchange.strong_baseline import strong_recipe
from reidlab.nas.checks import check_search
from reidlab.training.checks import check_model
from reidlab.training.optim import learning_rate


def rates(recipe, epochs):
    t = recipe.train
    about = t.schedule, t.warmup
    return [learning_rate(e, t.epochs, t.optimizer.get("lr"), *about) for e in range(epochs)]


def test_rates_of_reid_lite_follow_the_original_s_rule():
    def theirs(e, w=20, steps=(40, 80)):
        return 0.01 * (e + 1) / w if e < w else 0.01 * 0.1 ** sum(e - w >= s for s in steps)

    params = {
        "epochs": 100,
        "batch_sampling_params": {"P": 32, "K": 2, "batch_size": 64, "class_balanced": True},
    }
    params["tri_loss_params"] = {"margin": 0.16, "lambda_tri": 1, "lambda_cls": 1}
    ours = rates(validated("lite", lite_recipe(params)[0]), 120)
    assert ours == pytest.approx([theirs(e) for e in range(120)], abs=1e-9)
    assert [round(ours[e], 5) for e in (0, 9, 19, 59, 60, 100)] == [
        0.0005,
        0.005,
        0.01,
        0.01,
        0.001,
        0.0001,
    ]


def test_rates_of_sbn_are_those_of_its_log():
    "The first of its logged runs: 1.09e-5 at first, 1e-4 from the tenth epoch to the nineteenth."
    solver = {"OPTIMIZER_NAME": "Adam", "MAX_EPOCHS": 30, "BASE_LR": 1e-4, "BIAS_LR_FACTOR": 1}
    solver |= {"WEIGHT_DECAY_BIAS": 5e-4, "GAMMA": 0.6, "STEPS": [20, 30, 45], "IMS_PER_BATCH": 64}
    solver |= {"WARMUP_FACTOR": 0.01, "WARMUP_ITERS": 10, "EVAL_PERIOD": 1}
    sampler = {"SAMPLER": "softmax_triplet", "NUM_INSTANCE": 8}
    values, _ = strong_recipe(
        {"SOLVER": solver, "DATALOADER": sampler}, family="sbn", stem_relu=False
    )
    recipe = validated("sbn", values)
    check_model(recipe)
    ours = rates(recipe, 30)
    told = ["1.09e-05", "1.00e-04", "1.00e-04", "6.00e-05"]
    assert [f"{ours[e]:.2e}" for e in (0, 9, 18, 19)] == told


def test_a_network_of_reid_lite_with_the_transform_can_be_trained():
    single = {
        "model_params": {"pcb_n_parts": 0, "feature_dim": 256, "random_drop_branchs": 0},
        "batch_sampling_params": {"P": 8, "K": 4},
    }
    check_model(validated("single", lite_recipe(single)[0]))


def test_a_search_of_autoreid_can_begin(tmp_path):
    file = tmp_path / "retrieval.yaml"
    file.write_text(
        "MODEL: {model_name: Darts_normal, Search_layers: 3, init_channels: 16, w_lr: 0.1}\n"
        "DATA: {train_all: true, pair_num: 4}\n"
        "TRAIN: {batch_size: 32, epochs: 210, train_all: true, loss_f: cross_entropy}\n"
    )
    values, _ = read_seed_config(file, space="reid")
    recipe = validated("retrieval", values)
    check_search(recipe, 751)
    assert (recipe.search.p, recipe.search.k) == (8, 4)
