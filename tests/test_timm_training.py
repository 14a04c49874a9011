"""Networks of timm in training: who learns how fast, who rests, what is random, what they cost."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from reidlab.training.optim import build_optimizer, parameter_groups, set_rate

NAMES = {  # of each family: a small network, and the size at which it was made
    "resnet50": {},
    "convnext_tiny": {},
    "vit_small_patch16_224": {"img_size": (256, 128)},
    "vit_small_patch16_dinov3": {},
    "eva02_small_patch14_224": {"img_size": (252, 126)},
    "swin_tiny_patch4_window7_224": {"img_size": (256, 128)},
    "mobilenetv4_conv_small": {},
    "efficientnet_lite0": {},
}


def made(name, **options):
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


class Held(nn.Module):
    "A network of timm as our backbones hold one, and a classifier."

    def __init__(self, net):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = net
        self.head = nn.Linear(net.num_features, 3, bias=False)

    def forward(self, images):
        return self.head(self.backbone.net(images))


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_is_timms_own(name):
    with torch.device("meta"):
        model = Held(made(name, **NAMES[name]))
    net = model.backbone.net
    listed = getattr(net, "no_weight_decay", set)()
    expected = {}
    for group in param_groups_layer_decay(net, 0.05, no_weight_decay_list=listed, layer_decay=0.75):
        about = group["lr_scale"], group["weight_decay"]
        expected |= {id(weight): about for weight in group["params"]}
    seen = {}
    for group in parameter_groups(model, 0.05, layer_decay=0.75, no_weight_decay=True):
        about = group["factor"], group["weight_decay"]
        seen |= {id(weight): about for weight in group["params"]}
    assert seen.pop(id(model.head.weight)) == (1.0, 0.05)
    assert seen == expected


def test_layer_decay_moves_a_transformer():
    torch.manual_seed(0)
    model = Held(made("test_vit", img_size=(64, 32), depth=12))
    optimizer = build_optimizer(model, {"adam": {"layer_decay": 0.75, "weight_decay": 0}})
    set_rate(optimizer, 1e-2)
    assert min(group["lr"] for group in optimizer.param_groups) == 1e-2 * 0.75**12  # 0.0317
    watched = [model.backbone.net.patch_embed.proj, *(b.mlp.fc1 for b in model.backbone.net.blocks)]
    watched = [layer.weight for layer in (*watched, model.head)]
    before = [weight.detach().clone() for weight in watched]
    model(torch.randn(4, 3, 64, 32)).square().mean().backward()
    optimizer.step()
    steps = [float((w.detach() - b).abs().max()) for w, b in zip(watched, before, strict=True)]
    expected = [1e-2 * 0.75**d for d in range(12, -1, -1)] + [1e-2]
    torch.testing.assert_close(steps, expected, rtol=1e-2, atol=0)  # Adam's first step is its rate
