"""Samplers: what every batch and every epoch promises, whatever the set looks like."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidlab.core.parts import build
from reidlab.core.seed import rng
from reidlab.data.batches import SAMPLERS, spread_cameras
from reidlab.data.samplers import count_people, epoch_batches, shuffled_within

counts = st.lists(st.integers(1, 14), min_size=4, max_size=24)
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
some = settings(max_examples=40, deadline=None, derandomize=True)


def sampler_of(name, people, p, k, seed=0, rank=0, world=1):
    "A sampler by its name."
    pids, camids = people
    given = {"camids": camids, "seed": seed, "rank": rank, "world": world}
    return build("data.sampler", {name: {"p": p, "k": k}}, pids, **given)


def a_set(per_person, n_cameras=3):
    "Photos in no order: (pids, camids)."
    random = rng(5, len(per_person), sum(per_person))
    pids = random.permutation(np.repeat(np.arange(len(per_person)) * 7 + 2, per_person))
    camids = random.integers(n_cameras, size=len(pids))
    camids[:2] = 0, 1
    return pids, camids


@each_sampler
@some
@given(per_person=counts, k=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch(name, per_person, k, epoch):
    pids, camids = a_set(per_person)
    p = 2 if len(pids) >= 2 * k else 1
    if name == "random" and len(pids) < p * k:
        p, k = 1, 1
    sampler = sampler_of(name, (pids, camids), p, k, seed=1)
    sampler.set_epoch(epoch)
    batches = sampler.batches
    assert batches.shape == (len(sampler), p * k) and len(batches)
    again = sampler_of(name, (pids, camids), p, k, seed=1)
    again.set_epoch(epoch)
    assert np.array_equal(again.batches, batches)
    times = np.bincount(batches.ravel(), minlength=len(pids))
    enough = np.bincount(pids)[pids] >= k
    if name == "random":
        assert times.max() == 1 and len(batches) == len(pids) // (p * k)
        return
    assert times[enough].max(initial=0) <= 1, "no photo twice, unless its identity is too small"
    who = pids[batches].reshape(-1, p, k)
    assert (who == who[:, :, :1]).all()
    assert all(len(set(people)) == p for people in who[:, :, 0])
    if name == "class_balanced":
        assert len(np.unique(who[:, :, 0])) == who[:, :, 0].size == len(per_person) // p * p


@each_sampler
@some
@given(per_person=counts, epoch=st.integers(0, 3), start=st.integers(0, 3))
def test_ranks_share_and_epochs_can_be_entered_late(name, per_person, epoch, start):
    pids, camids = a_set([n + 4 for n in per_person])
    whole = sampler_of(name, (pids, camids), 4, 2, seed=3)
    parts = [sampler_of(name, (pids, camids), 4, 2, 3, r, 2) for r in (0, 1)]
    start = min(start, len(whole) - 1)
    for sampler in (whole, *parts):
        sampler.set_epoch(epoch, start)
    one, *two = (list(s) for s in (whole, *parts))
    assert len(two[0]) == len(two[1]) == len(one) == len(whole)
    for joint, left, right in zip(one, *two, strict=True):
        assert left + right == joint
        assert not {k.index for k in left} & {k.index for k in right}
    whole.set_epoch(epoch)
    assert list(whole)[start:] == one


@each_sampler
def test_another_epoch_or_seed_is_another_order(name):
    pids, camids = a_set([9] * 12)
    sampler, other = (sampler_of(name, (pids, camids), 4, 2, seed=s) for s in (0, 1))
    orders = [other.batches]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(sampler.batches)
    assert len({o[:8].tobytes() for o in orders}) == len(orders)


@pytest.mark.parametrize("name", ["pk", "camera"])
@some
@given(per_person=counts, p=st.integers(1, 4), k=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_drop_leaves_out_what_makes_no_group(name, per_person, p, k, seed):
    pids, camids = a_set(per_person)
    sampler = sampler_of(name, (pids, camids), p, k, seed)
    batches = sampler.batches
    who = pids[batches].reshape(-1, p, k)
    for person, n in zip(*np.unique(pids, return_counts=True), strict=True):
        groups = batches.reshape(-1, p, k)[who[:, :, 0] == person]
        assert len(groups) <= max(n // k, 1)
        if n < k and len(groups):
            assert len(groups) == 1 and set(groups[0]) == set(np.flatnonzero(pids == person))
    # the epoch ends when fewer than p people have a group left, and not before
    all_groups = {
        i: max(n // k, 1) for i, n in zip(*np.unique(pids, return_counts=True), strict=True)
    }
    for person in who[:, :, 0].ravel():
        all_groups[person] -= 1
    assert sum(left > 0 for left in all_groups.values()) < p


@each_sampler
@some
@given(
    per_person=counts,
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    world=st.sampled_from([1, 2, 4]),
    stop=st.integers(0, 20),
)
def test_a_run_stopped_anywhere_goes_on_in_the_same_order(
    name, per_person, seed, epoch, world, stop
):
    pids, camids = a_set([n + 4 for n in per_person])
    for rank in range(world):
        there, here = (sampler_of(name, (pids, camids), 4, 2, seed, rank, world) for _ in range(2))
        there.set_epoch(epoch)
        whole = list(there)
        at = min(stop, len(whole))
        there.set_epoch(epoch + 1)
        here.set_epoch(epoch, at)
        assert len(here) == len(whole) - at and list(here) == whole[at:]
        assert len(whole[0]) == 8 // world and {k.epoch for b in whole for k in b} == {epoch}
        here.set_epoch(epoch + 1)
        assert list(here) == list(there)


@each_sampler
@some
@given(per_person=counts, seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
def test_no_two_epochs_and_no_two_seeds_agree(name, per_person, seed, epoch):
    pids, camids = a_set([n + 8 for n in per_person])
    orders = []
    for s, e in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch)):
        sampler = sampler_of(name, (pids, camids), 4, 2, s)
        sampler.set_epoch(e)
        orders.append(sampler.batches.tobytes())
    assert len(set(orders)) == 3


@some
@given(per_person=counts, k=st.integers(2, 4))
def test_the_camera_sampler_takes_every_camera_it_can(per_person, k):
    pids, camids = a_set(per_person, n_cameras=4)
    people, labels, n = count_people(pids)
    order = shuffled_within(rng(0).random(len(pids)), labels, np.cumsum(n) - n)
    spread = spread_cameras(order, n, camids, 4, k)
    assert sorted(spread) == list(range(len(pids)))
    for person in people:
        own = [i for i in spread if pids[i] == person]
        for at in range(0, len(own) // k * k, k):
            left = len({camids[i] for i in own[at:]})
            assert len({camids[i] for i in own[at : at + k]}) == min(k, left)


def slow_epoch(pids, p, k, seed, epoch):
    "The P×K epoch as it was first written, one person and one swap at a time."
    random = rng(seed, 303, epoch)
    order = np.lexsort((random.random(len(pids)), pids))
    starts = np.flatnonzero(np.r_[True, np.diff(pids[order]) != 0])
    hands = []
    for own in np.split(order, starts[1:]):
        if len(own) < k:
            own = np.r_[own, random.choice(own, -len(own) % k)]
        hands.append(own[: len(own) // k * k].reshape(-1, k).tolist())
    living, batches = list(range(len(hands))), []
    while len(living) >= p:
        for i in range(p):
            j = int(random.integers(i, len(living)))
            living[i], living[j] = living[j], living[i]
        batches.append([photo for c in living[:p] for photo in hands[c].pop(0)])
        for i in reversed(range(p)):
            if not hands[living[i]]:
                living[i] = living[-1]
                living.pop()
    return np.array(batches).reshape(-1, p * k)


@some
@given(per_person=counts, k=st.integers(1, 5), epoch=st.integers(0, 3))
def test_the_fast_epoch_is_the_slow_one(per_person, k, epoch):
    pids, _ = a_set(per_person)
    assert np.array_equal(epoch_batches(pids, 3, k, 2, epoch), slow_epoch(pids, 3, k, 2, epoch))
