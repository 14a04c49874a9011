"Every shelf is where the table says, and every key and option has its word."

import pickle

import pytest

from reidlab.core.explain import explain, places, undescribed
from reidlab.core.parts import KINDS, options_of, part, resolved, shelf


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


def test_a_part_travels_and_reads_back():
    for kind in (k for k in KINDS if not KINDS[k].many):
        for name in shelf(kind):
            chosen = part(kind, name)
            assert part(kind, chosen.plain()) == pickle.loads(pickle.dumps(chosen)) == chosen
