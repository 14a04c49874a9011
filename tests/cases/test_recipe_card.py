"A recipe shows what somebody chose: enough to make the same one, escaped, the rest folded away."

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from reidlab.core.recipe import Recipe, card_lines, first_difference, load_recipe, validated
from reidlab.jobs.card import Card

ROOT = Path(__file__).parents[2]
OTHERS = """# what: a <i>small</i> one
# paper: none
# should reach: mAP > 3 & more
# costs: nothing
base: smoke
data: {name: "<img src=x onerror=alert(1)>"}
rows:
  a: {train: {epochs: 3}, evaluate: {rerank: {k_reciprocal: {k1: 9}}}}
  b: {loss: {triplet: {margin: soft}, softmax: }}
"""


class Tags(HTMLParser):
    "The tags and the words of a piece of HTML."

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], set(), []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        assert attrs in ([], [("style", "text-align: left")])  # no colour of ours, no handler
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append((data, "details" in self.open))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of recipes with one that somebody wrote."
    for name in ("smoke", "first_look", "gan_people"):
        shutil.copy(ROOT / "recipes" / f"{name}.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text(OTHERS, encoding="utf-8")
    monkeypatch.setenv("REIDLAB_RECIPES_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("smoke", {}),
        ("first_look/handmade", {"evaluate.rerank": "smooth_top"}),
        ("mine/a", {"evaluate.rerank.k_reciprocal.k2": 1, "train.epochs": 12}),
        ("mine/b", {"search.loss.triplet.weight": 2}),
        ("mine", {"loss": {"softmax": {"smoothing": 0.0}, "centre": {}}}),
        ("gan_people/smoke", {"data.mean": [0.5, 0.5, 0.5]}),
    ],
)
def test_what_is_shown_makes_the_same_recipe(name, overrides, shelf):
    recipe = load_recipe(name, overrides=overrides)
    text = repr(recipe)
    again = validated(name, yaml.safe_load(text) or {})
    assert first_difference(again, recipe) is None
    assert len(text.splitlines()) < 60 < len(recipe.to_yaml().splitlines())


def test_a_card_names_what_was_set_and_folds_the_rest(shelf):
    recipe = load_recipe("mine/a", overrides={"train.epochs": 12, "evaluate.flip": True})
    lines = {line.key: line for line in card_lines(recipe)}
    assert lines["evaluate.rerank"][1:] == ("k_reciprocal: {k1: 9}", "none", False)
    assert lines["train.epochs"][1:] == ("12", "12", True)  # the usual, said all the same
    assert lines["evaluate.flip"][1:] == ("true", "false", True)
    assert "data.width" not in lines
    page = Tags(recipe._repr_html_())
    open_words = [word for word, folded in page.words if not folded]
    assert "true (set here)" in open_words and "data.synthetic.cameras" not in lines
    assert len(open_words) < 100
    folded = "".join(word for word, folded in page.words if folded)
    assert yaml.safe_load(folded.removeprefix("the whole recipe")) == yaml.safe_load(
        recipe.to_yaml()
    )


@pytest.mark.parametrize(("title", "listed"), [("Train", False), ("Search", True)])
def test_a_job_lists_what_it_reads(title, listed):
    recipe = load_recipe("vehicles8_search/searched", overrides={"search.epochs": 3})
    table = Card(title, "a", {}, recipe=recipe)._repr_html_().partition("<details>")[0]
    assert ("search.space" in table) is listed
    assert "3 (set here)" in table  # what was asked for is always told


def test_a_card_is_text_whatever_a_file_holds(shelf):
    page = Tags(load_recipe("mine/b")._repr_html_())
    allowed = "p b dl dt dd table thead tbody tr th td details summary pre"
    assert page.seen <= set(allowed.split())
    words = "".join(word for word, _ in page.words)
    assert "<img src=x onerror=alert(1)>" in words
    assert "a <i>small</i> one" in words and "mAP > 3 & more" in words


def test_a_recipe_without_a_file_promises_nothing(shelf):
    for name in ("unnamed", "../mine", "nowhere/a", "<b>"):
        html = Recipe(name=name)._repr_html_()
        assert "<dl>" not in html and "Nothing differs" in html
        assert not re.search("<b><b>", html)


def test_the_order_of_a_set_is_a_difference():
    terms = {"triplet": {}, "softmax": {}}
    assert Recipe(loss=terms).differing() == {"loss": terms}
    assert Recipe(loss=dict(reversed(terms.items()))).differing() == {}
