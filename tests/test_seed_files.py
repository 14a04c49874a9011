"""Settings of Auto-ReID-Fast: miniatures of the shipped files, and an answer for every key there is."""

from collections import Counter

import pytest
import yaml

from reidlab.core.recipe import validated
from reidlab.interchange.autoreid import KEYS, read_seed_config, seed_recipe, typed
from reidlab.training.checks import check_model

ENV = {"seed": 1024, "fix_gpu_id": False}
SEARCHED = {
    "model_name": "Darts_normal",
    "Search_layers": 3,
    "init_channels": 16,
    "input_channels": 3,
    "w_lr": 0.1,
    "w_momentum": 0.9,
    "w_weight_decay": "5e-5",
    "w_lr_min": 0.001,
    "alpha_lr": 0.02,
    "alpha_weight_decay": "5e-5",
}
BASELINE = {"model_name": "resnet50_middle", "dropoutrate": 0.5, "pretrain": False, "PCB": False}
SGD = {
    "optimizer_type": "build_base_SGD_opt",
    "lr_mode": "wrap_cosine_lr",
    "backbone_lr": 0.1,
    "head_lr": 0.1,
    "w_lr_min": 0.001,
    "momentum": 0.9,
    "weight_decay": "5e-5",
    "nesterov": True,
}


def config(model, batch, epochs, train_all, pair_num=None, loss="cross_entropy", **train):
    "A file as the first project ships them, with the keys that decide something."
    data = {"data_dir": "./Market-1501/image", "train_all": False}
    return {
        "ENV": ENV,
        "AUG": {"erasing_p": False, "color_jitter": False, "aug_for_train": "train_baseline_aug"},
        "DATA": data | ({"pair_num": pair_num} if pair_num else {}),
        "TRAIN": {"batch_size": batch, "epochs": epochs, "train_all": train_all, "loss_f": loss}
        | train,
        "MODEL": model,
        "TEST": {"checkpoint_path": None},
    }


SHIPPED = {
    "classification": config(BASELINE, 32, 200, False, **SGD),
    "classification_train_all": config(BASELINE, 32, 200, True, **SGD),
    "search": config(SEARCHED, 2, 210, False),
    "search_train_all": config(SEARCHED, 2, 210, True),
    "distributed": config(SEARCHED, 16, 210, True),
    "distributed_bs32": config(SEARCHED, 24, 210, True),
    "deeper": config(SEARCHED, 32, 210, True),
    "retrieval": config(SEARCHED, 32, 210, True, 4),
    "triplet": config(SEARCHED, 32, 210, True, 4, "retrieval_loss"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_becomes_a_recipe_with_nothing_refused(name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(SHIPPED[name], sort_keys=False), encoding="utf-8")
    values, report = read_seed_config(file)
    recipe = validated(name, values)
    assert [line for line in report if line.status == "refused"] == []
    assert [x.key for x in report if x.status == "overridden"] == ["DATA.train_all"]
    wanted = SHIPPED[name]["TRAIN"]
    assert recipe.data.val_fraction == (0.0 if wanted["train_all"] else 0.1)
    if "search" not in values:
        check_model(recipe, 751)
        assert (recipe.data.p, recipe.data.k, recipe.train.epochs) == (32, 1, 200)
        step = recipe.train.optimizer.options
        assert recipe.train.optimizer.name == "sgd"
        assert step["lr"] == pytest.approx(0.01)  # the original's tenth
        assert step["head_lr_factor"] == pytest.approx(10)
        assert step["weight_decay"] == 5e-5 and step["nesterov"] is True
    else:
        s = recipe.search
        assert s.p * s.k == wanted["batch_size"] and s.epochs == 210
        assert s.optimizer.get("weight_decay") == 5e-5
        assert ("triplet" in s.loss) == (wanted["loss_f"] == "retrieval_loss")
        assert s.k == SHIPPED[name]["DATA"].get("pair_num", 1)


SAMPLE = {"int": 3, "float": 0.5, "bool": False, "str": "x", "any": None, "float or False": False}


def test_the_baselines_are_the_networks_of_the_original():
    heads = {"resnet50_middle": ("resnet50_middle", "linear"), "PCB": ("resnet50", "pcb")}
    for name, (backbone, head) in heads.items():
        file = {"MODEL": {"model_name": name, "PCB": name == "PCB", "dropoutrate": 0.5}}
        values, report = seed_recipe(file)
        assert [line for line in report if line.status == "refused"] == []
        model = validated(name, values).model
        assert (model.backbone.name, model.head.name, model.head.get("dropout")) == (
            backbone,
            head,
            0.5,
        )
        check_model(validated(name, values), 751)
    _, report = seed_recipe({"MODEL": {"model_name": "resnet50_middle", "PCB": True}})
    assert [line.key for line in report if line.status == "refused"] == ["MODEL.PCB"]


@pytest.mark.parametrize("model", ["Darts_normal", "resnet50_middle", "PCB"])
def test_every_key_there_is_has_an_answer(model):
    sections = {s: {k: SAMPLE[kind] for k, kind in keys.items()} for s, keys in KEYS.items()}
    sections["MODEL"]["model_name"] = model
    values, report = seed_recipe(sections)
    asked = Counter(f"{s}.{k}" for s, keys in sections.items() for k in keys)
    assert Counter(line.key for line in report) == asked
    for line in report:
        assert line.status in ("mapped", "ignored", "refused", "overridden")
        assert line.becomes if line.status == "mapped" else line.reason, line
    validated("sample", values)


@pytest.mark.parametrize(
    "change, key, words",
    [
        ({"TRAIN": {"shuffle": False}}, "TRAIN.shuffle", "always drawn anew"),
        ({"TRAIN": {"batch_size": 30}, "DATA": {"pair_num": 4}}, "TRAIN.batch_size", "batch of 30"),
        ({"AUG": {"color_jitter": "True"}}, "AUG.color_jitter", "data.augment"),
        ({"AUG": {"aug_for_train": "train_base_aug"}}, "AUG.aug_for_train", "train_baseline_aug"),
        ({"DATA": {"data_dir": "./cuhk"}}, "DATA.data_dir", "set data.name"),
        ({"MODEL": {"Search_layer": 3}}, "MODEL.Search_layer", "Close names: Search_layers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_here_is_refused_by_name_and_left_out(change, key, words):
    sections = {"MODEL": {"model_name": "Darts_normal"} | change.pop("MODEL", {}), **change}
    values, report = seed_recipe(sections)
    (line,) = [x for x in report if x.status == "refused" and x.key == key]
    assert words in line.reason
    validated("left out", values)


def test_a_key_in_an_odd_section_counts_as_in_the_original():
    values, report = seed_recipe({"DATA": {"epochs": 7}, "MODEL": {"model_name": "Darts_normal"}})
    assert values["search"]["epochs"] == 7
    assert "usually in TRAIN" in report[0].reason


def test_a_key_twice_in_a_section_is_told_and_a_section_twice_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("TRAIN: {epochs: 3, epochs: 5}\nMODEL: {model_name: Darts_normal}\n")
    values, report = read_seed_config(file)
    assert values["search"]["epochs"] == 5
    assert [(x.key, x.value) for x in report if x.status == "overridden"] == [("TRAIN.epochs", "3")]
    file.write_text("MODEL: {model_name: Darts_normal}\nMODEL: {w_lr: 0.1}\n")
    with pytest.raises(ValueError, match="section MODEL stands twice"):
        read_seed_config(file)


@pytest.mark.parametrize(
    "key, value", [("epochs", 1.5), ("epochs", True), ("nesterov", "yes"), ("w_lr", "fast")]
)
def test_a_value_of_another_kind_is_an_error(key, value):
    with pytest.raises(ValueError, match=f"{key} needs a value of kind"):
        typed(key, value)


def test_files_are_data_and_never_code(tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text("MODEL: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_seed_config(file)
    file.write_text("just words\n")
    with pytest.raises(ValueError, match="needs sections"):
        read_seed_config(file)
