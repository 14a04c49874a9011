"""Published files of MobileNetV2, under both kinds of names, and what a recipe's card says of them."""

import pytest
import torch
from torchvision.models import mobilenet_v2

from reidlab.core.recipe import load_recipe
from reidlab.core.settings import settings
from reidlab.interchange.families import foreign_network, read_foreign
from reidlab.models.backbones import key_account
from reidlab.models.small_networks import flat_name, mobilenetv2
from reidlab.models.squeeze_excite import se_resnet
from reidlab.training.parts import weights_report

PHOTO = torch.linspace(-2, 2, 3 * 64 * 32).reshape(1, 3, 64, 32)


def counted(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    "Torchvision's weights as files from before its blocks were nested name them."
    found = {}
    for i, block in enumerate(net.features):
        leaves = [m for m in block.modules() if not list(m.children())]
        for place, leaf in enumerate(leaves):
            name = f"features.{i}.conv.{place}" if 0 < i < 18 else f"features.{i}.{place}"
            found |= {f"{name}.{k}": v for k, v in leaf.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def theirs():
    "Torchvision's network with random weights, and norms that are not the identity."
    torch.manual_seed(0)
    net = mobilenet_v2(num_classes=7).eval()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return net


KINDS = {
    "torchvision": lambda net: net.state_dict(),
    "counted": counted,
    "without classifier": lambda net: {k: v for k, v in net.state_dict().items() if k[0] == "f"},
    "counted, with an old classifier": lambda net: (
        counted(net) | {"classifier.weight": torch.ones(7, 1280), "classifier.bias": torch.ones(7)}
    ),
    "counted, of a DataParallel": lambda net: {f"module.{k}": v for k, v in counted(net).items()},
    "counted, in a larger network": lambda net: (
        {f"encoder.{k}": v for k, v in counted(net).items()} | {"fc.weight": torch.ones(2, 1280)}
    ),
    "counted, without counters": lambda net: {
        k: v for k, v in counted(net).items() if "num_batches" not in k
    },
    "wrapped": lambda net: {"state_dict": counted(net), "epoch": 3},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_gives_its_network(kind, zipped, theirs, tmp_path):
    file = tmp_path / "published.pth"
    torch.save(KINDS[kind](theirs), file, _use_new_zipfile_serialization=zipped)
    ours = mobilenetv2(last=1280, weights=str(file)).eval()
    with torch.no_grad():
        assert torch.equal(ours(PHOTO), theirs.features(PHOTO))
    account = key_account(ours, str(file))
    assert len(account["loaded"]) in (312, 260)  # 52 norms count their batches, or do not
    assert all("classifier" in k or k == "fc.weight" for k in account["left"])
    assert all("num_batches_tracked" in k for k in account["missing"])


@pytest.mark.parametrize(("kind", "width"), [("torchvision", 0.5), ("counted", 1.4)])
def test_a_published_file_is_recognised_and_read_whole(kind, width, tmp_path):
    theirs = mobilenet_v2(width_mult=width, num_classes=7).eval()
    torch.save(KINDS[kind](theirs), tmp_path / "mobile.pth")
    found = read_foreign(tmp_path / "mobile.pth")
    model, report = foreign_network(found)
    assert (found.name, found.facts["width"], found.facts["last"]) == ("mobilenetv2", width, 1280)
    assert not report.left and set(report.fresh) <= {
        "head.classifier.weight",
        "head.classifier.bias",
    }
    assert ("head.classifier.weight" in report.loaded) == (kind == "torchvision")
    with torch.no_grad():
        pooled = theirs.features(PHOTO).mean((2, 3))
        torch.testing.assert_close(model.eval()(PHOTO), pooled)


def test_our_own_file_keeps_its_names(tmp_path):
    net = mobilenetv2(width=0.25, last=64)
    torch.save({f"backbone.{k}": v for k, v in net.state_dict().items()}, tmp_path / "own.pth")
    twin = mobilenetv2(width=0.25, last=64, weights=str(tmp_path / "own.pth"))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in net.state_dict().items())


WRONG = {
    "another width": (lambda s: s, {}, "5 other shapes.*last is 1280 for published files"),
    "a block less": (
        lambda s: {k: v for k, v in s.items() if ".17." not in k},
        {"last": 1280},
        "missing",
    ),
    "a block more": (
        lambda s: s | {k.replace(".17.", ".19."): v for k, v in s.items() if ".17." in k},
        {"last": 1280},
        "unexpected",
    ),
    "one layer shorter": (
        lambda s: s | {"features.5.conv.4.bias": torch.zeros(191)},
        {"last": 1280},
        "1 other shapes .layers.5.conv.1.1.bias .191,. instead of .192,.",
    ),
    "another architecture's": (
        lambda s: {"conv1.weight": torch.ones(3, 3)},
        {"last": 1280},
        "missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused_whole(case, theirs, tmp_path):
    change, options, message = WRONG[case]
    torch.save(change(counted(theirs)), tmp_path / "wrong.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=message) as wrong:
        mobilenetv2(**options, weights=str(tmp_path / "wrong.pt"))
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("features.1.conv.0.weight", "features.1.conv.0.0.weight"),
        ("features.1.conv.1.bias", "features.1.conv.0.1.bias"),
        ("features.1.conv.3.weight", "features.1.conv.1.weight"),
        ("features.1.conv.4.running_var", "features.1.conv.2.running_var"),
        ("features.12.conv.3.weight", "features.12.conv.1.0.weight"),
        ("features.12.conv.4.bias", "features.12.conv.1.1.bias"),
        ("features.12.conv.6.weight", "features.12.conv.2.weight"),
        ("features.12.conv.7.weight", "features.12.conv.3.weight"),
        ("features.18.1.weight", "features.18.1.weight"),
        ("classifier.1.weight", "classifier.1.weight"),
    ],
)
def test_an_older_name(key, name):
    assert flat_name(key) == name


def test_a_recipe_tells_where_every_tensor_of_a_published_file_went(tmp_path, monkeypatch, theirs):
    monkeypatch.setenv("REIDLAB_WEIGHTS_DIR", str(tmp_path))
    file = load_recipe("pretrained_people/frozen").model.weights
    torch.save(counted(theirs), settings().weights_dir / file)
    report = weights_report(load_recipe("pretrained_people/frozen"), 4)
    assert len(report.loaded) == 312 and not report.left
    assert report.fresh and all(not k.startswith("backbone.") for k in report.fresh)


def test_the_card_knows_the_other_names_of_squeezed_networks(tmp_path):
    with torch.device("meta"):
        net = se_resnet("se_resnet50")
    named = {k: torch.zeros(v.shape) for k, v in net.state_dict().items()}
    theirs = {k.replace(".bn3.gate.", ".se_module."): v for k, v in named.items()}
    theirs = {k if k.startswith("layer") else f"layer0.{k}": v for k, v in theirs.items()}
    torch.save(theirs | {"last_linear.bias": torch.zeros(3)}, tmp_path / "se.pth")
    account = key_account(net, str(tmp_path / "se.pth"))
    assert (account["left"], account["missing"]) == (["last_linear.bias"], [])
