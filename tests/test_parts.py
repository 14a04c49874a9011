"Every shelf is where the table says, and every key and option has its word."

import pickle
from dataclasses import dataclass
from functools import partial

import pytest

from reidlab.core.explain import explain, moved_keys, undescribed
from reidlab.core.parts import KINDS, documented, options_of, part, resolved, shelf
from reidlab.core.places import places, sections
from reidlab.core.upgrade import MOVES
from reidlab.viz.reference import reference_texts


@pytest.mark.parametrize("kind", KINDS)
def test_a_shelf_is_where_the_table_says(kind):
    for builder in shelf(kind).values():
        assert callable(builder)
        options_of(builder)
    if KINDS[kind].also:
        assert options_of(resolved(KINDS[kind].also))


def test_every_key_and_option_has_its_word():
    assert undescribed() == []
    assert all(explain(place).about for place in places())
    assert set(KINDS) <= set(places())
    bare = [f"{k}.{name}" for k in KINDS for name, b in shelf(k).items() if not documented(b)]
    assert bare == []


def test_every_key_of_a_recipe_is_a_line_of_the_reference():
    told = {line.key for place in places() for line in explain(place).lines}
    for place, schema in sections().items():
        assert {f"{place}.{name}" for name in schema.model_fields} <= told
    text = "".join(reference_texts().values())
    twins = (
        "search.loss.",
        "search.optimizer.",
        "search.schedule.",
    )  # told once, of the training's shelf
    assert [key for key in told if f"`{key}`" not in text and not key.startswith(twins)] == []
    assert [old for old in MOVES if f"| `{old}` |" not in text] == []
    assert all(line.kind for line in moved_keys().lines)


class Based(dict):
    "What a base class says is no word of its own."


class Silent(Based):
    def __init__(self, height: int = 3):
        self.height = height


@dataclass
class Given:
    height: int = 3


def test_a_part_has_words_of_its_own():
    assert [documented(b) for b in (Silent, Given, partial(Silent, height=2))] == ["", "", ""]
    assert documented(Based) == "What a base class says is no word of its own."


def test_own_parts_are_explained_and_stay_out_of_the_book(monkeypatch):
    def mine(sigma: float = 0.5):  # width | of the *bell*, <in> pixels
        "A bell of one's own (Somebody et al., 2031)."

    before = reference_texts()
    monkeypatch.setitem(shelf("evaluate.rerank"), "mine", mine)
    told = explain("evaluate.rerank.mine")
    assert told.paper == "Somebody et al., 2031" and told.lines[0][1:4] == ("number", "0.5", "")
    assert "&lt;in&gt;" in told._repr_html_() and r"\|" in told.to_markdown()
    assert "evaluate.rerank.mine" in repr(explain("evaluate.rerank"))
    with pytest.raises(ValueError, match=r"Close names: evaluate\.rerank\.mine"):
        explain("evaluate.rerank.mime")
    assert reference_texts() == before


def test_a_part_travels_and_reads_back():
    for kind in (k for k in KINDS if not KINDS[k].many):
        for name in shelf(kind):
            chosen = part(kind, name)
            assert part(kind, chosen.plain()) == pickle.loads(pickle.dumps(chosen)) == chosen


# what comes from no paper; every other part names its own
NO_PAPER = {
    "loss": {"am_lite"},
    "model.backbone": {"small_cnn", "stage_net", "derived", "resnet50_middle"},
    "evaluate.rerank": {"none"},
    "evaluate.expansion": {"none"},
}


@pytest.mark.parametrize("kind", NO_PAPER)
def test_a_part_names_its_paper(kind):
    silent = {name for name in shelf(kind) if not explain(f"{kind}.{name}").paper}
    assert silent == NO_PAPER[kind]
