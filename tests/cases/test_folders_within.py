"""Folders below an identity's: cameras and tracks pass in silence, what looks like people is named."""

import warnings

import pytest
from PIL import Image

from reidlab.data.own import own_rows

WITHIN = {  # folders, how many identities, whether a word is due
    "groups of people": (["staff/anna", "staff/bob", "guests/cy", "guests/dora"], 2, True),
    "cameras": (["anna/cam1", "anna/cam2", "bob/cam1", "bob/cam2"], 2, False),
    "one folder each": (["anna/photos", "bob/photos", "cy/photos"], 3, False),
    "plain": (["anna", "bob"], 2, False),
    "splits": (["train/anna/c1", "train/bob/c1", "query/cy/c1", "gallery/cy/c1"], 3, False),
}


@pytest.mark.parametrize("kind", WITHIN)
def test_folders_that_look_like_people_are_named(kind, tmp_path):
    folders, identities, due = WITHIN[kind]
    for folder in folders:
        (tmp_path / "own" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 16)).save(tmp_path / "own" / folder / "1.jpg")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        frame = own_rows(tmp_path / "own")[0]
    words = [str(w.message) for w in said if "one identity" in str(w.message)]
    assert frame.pid.nunique() == identities
    assert bool(words) == due and all("below guests" in w and "guests/cy" in w for w in words)
