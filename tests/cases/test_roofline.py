"""What a step's calls compute and move, how its time is divided, and an optimiser in one sweep."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reidlab.core.recipe import Train
from reidlab.data.loaders import Batch
from reidlab.losses.catalogue import weighted_sum
from reidlab.models.heads import Branch
from reidlab.training import roofline
from reidlab.training.optim import build_optimizer, in_one_sweep
from reidlab.training.roofline import (
    KINDS,
    PARTS,
    Call,
    Clock,
    by_kind,
    calls_of,
    kind_of,
    seconds_of_parts,
)
from reidlab.training.step import Trainer


class Little(nn.Module):
    "A convolution of 2 × 3 channels, norm, ReLU and average; a depthwise one before it."

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.wide = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 2)

    def forward(self, x):
        feat = torch.relu(self.norm(self.wide(self.deep(x)))).mean((2, 3))
        return [Branch(self.head(feat), feat)]


BATCH = Batch(
    torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 0, 1, 1]),
    torch.zeros(4),
    index=torch.arange(4),
)


def little(precision="fp32", optimizer="adamw"):
    torch.manual_seed(0)
    loss = weighted_sum({"softmax": {}, "triplet": {}})
    return Trainer(Little(), loss, Train(precision=precision, optimizer=optimizer))


@pytest.fixture(scope="module")
def calls():
    return calls_of(little(), BATCH, steps=2)


def test_convolutions_are_counted_as_by_hand(calls):
    deep, wide = 2 * (4 * 3 * 8 * 6) * 9, 2 * (4 * 5 * 4 * 3) * (3 * 9)
    counted = lambda name: [c.operations for c in calls if c.name == name]
    assert counted("convolution") == [deep, wide]
    assert counted("convolution_backward") == [2 * wide, deep]  # no slope for the photos themselves
    assert counted("addmm") == [2 * 4 * 5 * 2]


def test_bytes_are_what_goes_in_and_out(calls):
    norm = next(c for c in calls if c.name.startswith(("native_batch_norm", "_native_batch_norm")))
    maps, channels = 4 * 5 * 4 * 3 * 4, 5 * 4
    assert norm.bytes == 2 * maps + 6 * channels  # weight, bias, two running, two of the batch
    assert all(c.bytes == 0 for c in calls if c.name in ("view", "detach", "t"))
    with Clock() as clock:
        torch.ones(3, 4).bfloat16() * 2
    assert [c.bytes for c in clock.calls][1:] == [48 + 24, 24 + 24]


def test_parts_stand_in_their_order_and_kinds_where_they_belong(calls):
    seen = [call.part for call in calls]
    assert seen == sorted(seen, key=PARTS.index) and set(seen) == set(PARTS[1:])
    kinds = {call.name: kind_of(call) for call in calls if call.part != "optimiser"}
    expected = {"convolution": "products", "relu": "pointwise", "mean": "pools"}
    assert expected.items() <= kinds.items()
    assert {kind_of(c) for c in calls if c.part == "optimiser"} <= {"optimiser", "dispatch"}


@pytest.mark.parametrize("whole", [20.0, 6.0])
def test_kinds_add_up_to_the_step(whole):
    made = [Call("forward", "mm", 8.0, 9, 9), Call("backward", "add", 3.0, 9, 9)]
    found = by_kind(made, whole, 1.0)
    assert sum(kind.seconds for kind in found.values()) == pytest.approx(whole)
    assert tuple(found) == KINDS and found["products"].seconds <= 7
    assert found["dispatch"].seconds == pytest.approx(max(whole - 9, 0))


def test_a_step_whose_calls_differ_is_refused():
    trainer = little()
    trainer.see = lambda batch, see=trainer.see: (torch.ones(len(PARTS)).sum(), see(batch))[1]
    ragged = iter([1, 2, 3])
    trainer.move = lambda: [torch.ones(1) for _ in range(next(ragged))]
    with pytest.raises(ValueError, match="calls other operators every time"):
        calls_of(trainer, BATCH, steps=2)


def test_parts_are_timed():
    found = seconds_of_parts(little(), BATCH, steps=1)
    assert tuple(found) == PARTS and all(0 <= s < 60 for s in found.values())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_sweep_is_for_bf16_and_goes_on_after_a_stop(name):
    assert not little("fp32", name).optimizer.param_groups[0]["fused"]
    straight, stopped = little("bf16", name), little("bf16", name)
    for _ in range(4):
        straight.step(BATCH)
    for _ in range(2):
        stopped.step(BATCH)
    resumed = little("bf16", name)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.restore(stopped.state())
    for _ in range(2):
        resumed.step(BATCH)
    assert all(group["fused"] for group in resumed.optimizer.param_groups)
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_began_without_a_sweep_goes_on_without():
    before = little("bf16")
    for group in before.optimizer.param_groups:
        group["fused"] = None  # as it was kept before there were sweeps
    before.step(BATCH)
    now = little("bf16")
    now.restore(before.state())
    assert not now.optimizer.param_groups[0]["fused"]
    now.step(BATCH)


def test_an_optimiser_without_a_sweep_stays_as_it_is():
    own = torch.optim.RMSprop([nn.Parameter(torch.ones(2))])
    assert not in_one_sweep(own) and "fused" not in own.param_groups[0]
    assert build_optimizer(Little(), fused=True).param_groups[0]["fused"] is True


def test_a_part_has_its_fastest_step_and_the_first_two_do_not_count(monkeypatch):
    ticks = [[1, 1, 1, 1, 1]] * 2 + [[30, 4, 50, 6, 7], [3, 40, 5, 60, 70]]  # of each step's parts
    now = accumulate(t for step in ticks for t in (100, *step))
    monkeypatch.setattr(roofline, "time", SimpleNamespace(process_time=lambda: next(now)))
    monkeypatch.setattr(roofline, "parts_of", lambda trainer, batch: iter(PARTS))
    seen = seconds_of_parts(None, None, steps=2)
    assert list(seen.values()) == [3, 4, 5, 6, 7]


def test_what_moves_no_byte_is_dispatch():
    assert kind_of(Call("forward", "view", 1.0, 0, 0)) == "dispatch"
    assert kind_of(Call("optimiser", "view", 1.0, 0, 0)) == "dispatch"
