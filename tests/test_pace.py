"""The choice of a pace: by the clock, once, and kept by the run."""

import pytest

from reidlab.training.pace import Pace, choice_in, choose, kept, offered, pace_file

PLAIN, NHWC, BF16, BOTH = offered()
FACTS = {"network": "any", "batch": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Clock:
    "Stands still but for the steps that move it."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def steps(self, seconds):
        "A step for each pace: of so many seconds in turn, or one that breaks."
        return {pace: self.step(pace, list(told)) for pace, told in seconds.items()}

    def step(self, pace, told):
        def move():
            if not told:
                raise RuntimeError(f"no units for {pace}")
            self.now += told[0] if len(told) == 1 else told.pop(0)

        return move


@pytest.mark.parametrize(
    ("seconds", "taken", "told"),
    [
        ({PLAIN: [2.0], NHWC: [1.0], BF16: [1.5], BOTH: [0.9]}, BOTH, "2.22 times"),
        ({PLAIN: [1.0], NHWC: [1.0]}, PLAIN, "nothing is 5% faster"),
        ({PLAIN: [1.0], NHWC: [0.951]}, PLAIN, "nothing is 5% faster"),
        ({PLAIN: [1.0], NHWC: [0.949]}, NHWC, "1.05 times"),
        ({PLAIN: [1.0], NHWC: [0.5], BOTH: [0.48]}, NHWC, "2.00 times"),
        ({PLAIN: [9.0, 9.0, 1.0], NHWC: [0.1, 0.1, 1.0]}, PLAIN, "nothing"),  # a warm-up counts not
        ({PLAIN: [1.0], NHWC: [1.0, 1.0, 2.0, 2.0, 0.5, 2.0]}, NHWC, "2.00 times"),  # the best
        ({PLAIN: [1.0], NHWC: [], BF16: [0.5]}, BF16, "2.00 times"),
        ({PLAIN: [1.0], NHWC: []}, PLAIN, "nothing else could be run"),
        ({PLAIN: [], NHWC: [1.0]}, PLAIN, "no units for fp32 nchw"),
    ],
)
def test_the_clock_decides(seconds, taken, told):
    clock = Clock()
    choice = choose(clock.steps(seconds), clock=clock)
    assert choice.pace == taken and told in choice.why
    broken = [pace for pace, times in seconds.items() if not times]
    assert list(choice.dropped) == [str(pace) for pace in broken]
    assert all(f"no units for {pace}" in choice.dropped[str(pace)] for pace in broken)


def test_slow_networks_are_timed_once_and_quick_ones_four_times():
    counts = {}
    for seconds in (0.1, 30.0):
        clock = Clock()
        choose(clock.steps({PLAIN: [seconds], NHWC: [seconds]}), clock=clock)
        counts[seconds] = round(clock.now / seconds)
    assert counts == {0.1: 12, 30.0: 6}


@pytest.mark.parametrize(
    ("told", "there"),
    [
        (("auto", "auto", "auto"), 8),
        (("auto", "nhwc", "none"), 2),
        (("fp16", "auto", "none"), 2),
        (("fp32", "nchw", "inductor"), 1),
    ],
)
def test_what_is_said_outright_is_not_asked_again(told, there):
    paces = offered(*told)
    assert len(paces) == there
    for word, options in zip(told, zip(*paces, strict=True), strict=True):
        assert word == "auto" or set(options) == {word}
    assert ("fp16" in {pace.precision for pace in paces}) == (told[0] == "fp16")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("nhwc", "nchw"),  # the seal no longer fits
        lambda text: "[]",
        lambda text: '{"pace": {"precision": "int8", "layout": "nchw", "compiler": "none"}}',
        lambda text: "\x00\xff",
    ],
)
def test_a_kept_answer_is_used_and_a_damaged_one_asked_anew(damage):
    asked = []

    def ask():
        asked.append(1)
        clock = Clock()
        return choose(clock.steps({PLAIN: [2.0], NHWC: [1.0]}), clock=clock)

    first = kept("train", FACTS, (PLAIN, NHWC), ask)
    assert kept("train", FACTS, (PLAIN, NHWC), ask) == first and len(asked) == 1
    file = pace_file("train", FACTS, (PLAIN, NHWC))
    file.write_bytes(damage(file.read_text()).encode("latin-1"))
    assert kept("train", FACTS, (PLAIN, NHWC), ask).pace == NHWC and len(asked) == 2
    assert kept("train", FACTS, (PLAIN, NHWC), ask) == first and len(asked) == 2


def test_an_answer_that_is_not_on_offer_is_none():
    clock = Clock()
    stored = choose(clock.steps({PLAIN: [2.0], NHWC: [1.0]}), clock=clock).stored()
    assert choice_in(stored, (PLAIN, NHWC)).pace == NHWC
    assert choice_in(stored, (PLAIN, BF16)) is None
    assert choice_in(stored | {"pace": list(NHWC)}, (PLAIN, NHWC)) is None
    assert choice_in(stored | {"pace": {"precision": ["fp32"]}}, (PLAIN, Pace())) is None
