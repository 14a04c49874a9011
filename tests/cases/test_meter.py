"""One meter for every number of milliseconds; its clock is a parameter, and here it is of paper."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.meter import REPEATS, UNCOUNTED, Times, measure, measure_in_turn
from reidlab.deploy import latency
from reidlab.deploy.latency import forecast, latency_table, measured_where, searched_latency
from reidlab.models.genotype import random_genotype
from reidlab.nas.budget import CostTable
from reidlab.nas.latency import Latency

PHOTOS = torch.zeros(4, 3, 2, 2)
MS = 1_000_000


def clock_of(*spans):
    "A clock by which one call after the other takes so many milliseconds."
    moments = iter([t for span in spans for t in (0, round(span * MS))])
    return lambda: next(moments)


def ticking(step=1):
    "A clock that goes on by a step at every reading."
    now = iter(range(0, 10**9, step))
    return lambda: next(now)


@pytest.mark.parametrize("spans", [[5] * 9, [1, 2, 3, 4], [7, 1, 1, 1, 90], list(range(1, 41))])
def test_median_and_late_calls_are_those_of_the_counted_calls(spans):
    seen = measure(
        lambda batch: None,
        PHOTOS,
        repeats=(len(spans), len(spans)),
        clock=clock_of(*[1000] * UNCOUNTED, *spans),
    )
    assert seen.middle == pytest.approx(np.median(spans))
    assert seen.slow == pytest.approx(np.percentile(spans, 95))
    assert seen.rate == pytest.approx(4000 / np.median(spans))


@pytest.mark.parametrize(
    "seconds, repeats, calls",
    [(0.0, (3, 9), 3), (1.0, (3, 9), 9), (0.05, (3, 9), 5), (0.05, (7, 9), 7), (0.05, (1, 1), 1)],
)
def test_it_goes_on_until_time_is_up_within_the_number_of_repeats(seconds, repeats, calls):
    "Each call takes ten milliseconds."
    seen = measure(lambda batch: None, PHOTOS, seconds, repeats, clock=clock_of(*[10] * 20))
    assert len(seen.calls) == calls


def test_a_busy_machine_shows():
    "Thirty milliseconds on the wall, of which the process computed for a third."
    how = {"repeats": (3, 3), "clock": clock_of(*[10] * 6)}
    seen = measure(lambda batch: None, PHOTOS, cpu=iter([0, 10 * MS]).__next__, **how)
    assert seen.busy == pytest.approx(1 / 3)
    assert len(seen.load) == 2


def test_the_same_clock_gives_the_same_times():
    one, other = (
        measure(lambda batch: None, PHOTOS, 0, clock=ticking(3), cpu=ticking()) for _ in "ab"
    )
    assert (one.calls, one.cpu) == (other.calls, other.cpu) and len(one.calls) == REPEATS[0]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_given_back(fails):
    before, inside = torch.get_num_threads(), []

    def call(batch):
        inside.append(torch.get_num_threads())
        assert not (fails and len(inside) > UNCOUNTED), "out of order"
        assert not torch.is_grad_enabled()

    def again():
        return measure(call, PHOTOS, 0, repeats=(2, 2), threads=before + 1)

    if fails:
        with pytest.raises(AssertionError, match="out of order"):
            again()
    else:
        assert again().threads == before + 1
    assert set(inside) == {before + 1} and torch.get_num_threads() == before


def test_turns_add_up():
    seen = measure_in_turn(
        {"a": lambda batch: None, "b": lambda batch: None},
        PHOTOS,
        seconds=0.06,
        turns=2,
        repeats=(2, 100),
        clock=clock_of(*([10] * (UNCOUNTED + 3) + [20] * (UNCOUNTED + 2)) * 2),
        threads=1,
    )
    assert seen["a"].calls == (10 * MS,) * 6 and seen["b"].calls == (20 * MS,) * 4


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"batch": PHOTOS[:0]}, "a batch of 0 photos"),
        ({"threads": 0}, "threads needs .* got 0"),
        ({"threads": -1}, "threads needs .* got -1"),
        ({"threads": True}, "threads needs .* got True"),
        ({"threads": 1.5}, "threads needs .* got 1.5"),
        ({"uncounted": 0}, "uncounted needs 1 or more"),
        ({"repeats": (0, 1)}, "repeats needs"),
        ({"repeats": (3, 2)}, "repeats needs"),
        ({"seconds": -1}, "seconds needs 0 or more, got -1"),
        ({"seconds": float("inf")}, "seconds needs 0 or more, got inf"),
    ],
)
def test_what_has_no_time_is_refused_before_it_is_called(wrong, words):
    with pytest.raises(ValueError, match=words):
        measure(lambda batch: pytest.fail("called"), **({"batch": PHOTOS} | wrong))


def test_a_call_faster_than_the_clock_has_a_rate():
    still = Times((0, 0), 0, photos=1, threads=1, load=(0.0, 0.0))
    assert np.isfinite(still.rate) and still.busy == 0


EXACT = {"repeats": (2, 2), "uncounted": 1}  # of a table: no time decides how often


def exact():
    "How a table is measured here: a millisecond at every reading of the clock."
    return EXACT | {"clock": ticking(MS), "seconds": 0.0}


def test_a_table_has_a_row_for_everything_that_was_asked(finished, monkeypatch):
    opened = []

    class File:
        takes = "images"

        def __call__(self, images):
            if len(images) > 1:
                raise ValueError("small.onnx takes (1, 3, 64, 32)")

    class Bytes(File):
        takes = "photos"

        def __call__(self, images):
            assert images.dtype == torch.uint8 and images.shape[-1] == 3

    kinds = {"small.onnx": File, "bytes.onnx": Bytes}
    monkeypatch.setattr(
        latency, "open_exported", lambda file, n: opened.append((file, n)) or kinds[file]()
    )
    files = {"one at a time": "small.onnx", "of bytes": "bytes.onnx"}
    table = latency_table(finished[0], files, batches=(1, 3), threads=(1, 2), **exact())
    assert list(table.columns) == latency.COLUMNS and len(table) == 3 * 2 * 2
    assert set(opened) == {(file, n) for file in kinds for n in (1, 2)}
    fixed = table[(table["runtime"] == "one at a time") & (table["batch"] == 3)]
    assert fixed["ms"].isna().all() and set(fixed["note"]) == {"small.onnx takes (1, 3, 64, 32)"}
    seen = table.drop(fixed.index)
    assert set(seen["ms"]) == {1.0} == set(seen["times torch"]) and not any(seen["note"])
    assert (seen["photos/s"] == 1000 * seen["batch"]).all()
    assert measured_where(table.assign(busy=1.0)).startswith("Photos of 64 by 32 on ")


@pytest.mark.parametrize(
    "files, words",
    [
        ({"OpenVINO": "reidlab needs the package openvino"}, "needs the package openvino"),
        ({"lost": "nowhere/lost.onnx"}, "no file at nowhere/lost.onnx"),
        (
            None,
            'needs the packages onnx, onnxscript and onnxruntime: pip install "reidlab[deploy]"',
        ),
    ],
)
def test_a_runtime_that_is_absent_says_so_in_its_row(files, words, finished, monkeypatch):
    if files is None:
        monkeypatch.setitem(sys.modules, "onnx", None)
    table = latency_table(finished[0], files, batches=(1,), threads=(1,), **exact())
    assert table["ms"].notna().tolist()[0] and table["ms"].isna()[1:].all()
    assert words in table["note"].iloc[1]


@pytest.mark.parametrize(
    "wrong, said",
    [({"batches": (0,)}, 0), ({"threads": (1, 0)}, 0), ({"batches": (2.0,)}, 2.0)],
)
def test_a_table_of_nothing_is_refused_before_a_run_is_opened(wrong, said):
    with pytest.raises(ValueError, match=f"whole numbers of 1 or more, got {said}"):
        latency_table("no such run", **wrong)


def test_a_forecast_is_the_sum_beside_the_clock(finished, monkeypatch):
    "Two milliseconds of frame and a quarter for each of eight operations, against one by the clock."
    monkeypatch.setattr(latency, "made_files", lambda *_: {"onnxruntime": ImportError("absent")})
    small = {"model__backbone": "derived", "model__backbone__*__init_channels": 4}
    small |= {"model__backbone__*__cells_per_stage": [1, 1]}
    recipe = tiny_recipe(**small)
    genotype = random_genotype(0, nodes=2)
    prices = np.full((5, len(genotype.ops)), MS // 4)
    known = Latency(CostTable(2 * MS, prices, prices), {"ops": list(genotype.ops)})
    found = forecast(genotype, recipe, known, seconds=0.0, clock=ticking(MS))
    assert (found.summed, found.torch) == (4.0, 1.0) and np.isnan(found.exported)
    assert found.errors[0] == pytest.approx(300) and np.isnan(found.errors[1])


def test_a_network_without_cells_has_no_forecast(finished):
    with pytest.raises(ValueError, match="'done' has no cells"):
        searched_latency(finished[0])


@pytest.mark.parametrize("missing", [(), ("OpenVINO",), ("onnxruntime, int8",), latency.RUNTIMES])
def test_a_runtime_that_is_missing_takes_no_other_with_it(missing, tmp_path, monkeypatch):
    def maker(name, place):
        def make(*given):
            if name in missing:
                raise ModuleNotFoundError(f"{name} needs a package")
            given[place].write_text(name)
            return given[place]

        return make

    for what, name, place in zip(
        ("write_onnx", "to_int8", "write_openvino"), latency.RUNTIMES, (2, 1, 1), strict=True
    ):
        monkeypatch.setattr(latency, what, maker(name, place))
    made = latency.made_files(None, latency.rules_of(tiny_recipe(), 4), tmp_path)
    assert list(made) == list(latency.RUNTIMES)
    there = {name: file.read_text() for name, file in made.items() if isinstance(file, Path)}
    assert there == {name: name for name in latency.RUNTIMES if name not in missing}
    first = missing[0] if missing else ""
    assert {str(made[name]) for name in missing} <= {f"{first} needs a package"}
