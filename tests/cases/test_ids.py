"Identities, cameras, tracks and splits as other programs and people write them."

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidlab.data.own import draw_splits, numbered, own_rows

NOTHING = [
    "",
    " ",
    "\u00a0",
    "nan",
    "NaN",
    "NA",
    "N/A",
    "#N/A",
    "None",
    "null",
    "NULL",
    "<NA>",
    "NaT",
    "#N/A N/A",  # what pandas takes for nothing besides
    "-1.#IND",
    "1.#QNAN",
    "#NV",  # a German spreadsheet
    "\\N",  # MySQL
    "?",
    "-",
    "(blank)",  # a pivot table
    "unknown",
    "undefined",
]
ZOE, ZOE_APART = "Zo\u00e9", "Zoe\u0301"  # as most systems store it, and as macOS does


def csv(folder, rows, header="path,pid,camid", **how):
    "A CSV of photos named by their row."
    file = folder / "t.csv"
    lines = [header, *(f"{i}.jpg,{row}" for i, row in enumerate(rows))]
    file.write_text("\n".join(lines) + "\n", **how)
    return file


def tree(folder, names):
    "A photo in each folder."
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 8)).save(folder / name / "a.png")
    return folder


# --- nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", NOTHING)
def test_a_blank_identity_is_refused_with_its_line(tmp_path, nothing):
    with pytest.raises(ValueError, match=r"t\.csv: identity .* in line 3, which says nothing"):
        own_rows(csv(tmp_path, ["anna,1", f"{nothing},1", "bob,1"]))
    mapping = json.dumps({"anna": ["0.jpg"], nothing: ["1.jpg"], "bob": ["2.jpg"]}, indent=1)
    (tmp_path / "m.json").write_text(mapping, encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.json: identity .* in line 5, which says nothing"):
        own_rows(tmp_path / "m.json")
    if nothing.strip() and "/" not in nothing:
        with pytest.raises(ValueError, match="which says nothing"):
            own_rows(tree(tmp_path / "own", ["anna", nothing, "bob"]))


@pytest.mark.parametrize("nothing", NOTHING)
def test_an_unknown_camera_and_track_are_unknown(tmp_path, nothing):
    rows = ["7,3,4", f"7,{nothing},{nothing}", "7,-1.0,-1", "7,5.0,5"]
    found = own_rows(csv(tmp_path, rows, "path,pid,camid,track"))[0]
    assert found["camid"].tolist() == [3, -1, -1, 5]
    assert found["track"].tolist() == [4, -1, -1, 5]


@pytest.mark.parametrize("nothing", NOTHING)
def test_a_split_is_given_to_all_or_to_none(tmp_path, nothing):
    with pytest.raises(ValueError, match=r"t\.csv: split is blank in line 3 \(2 in all\)"):
        own_rows(csv(tmp_path, ["7,train", f"7,{nothing}", f"8,{nothing}"], "path,pid,split"))
    rows = [f"{p},{nothing}" for p in (7, 8)]
    assert "split" not in own_rows(csv(tmp_path, rows, "path,pid,split"))[0]


@pytest.mark.parametrize("junk", ["-1", "-1.0", " -1", "-1.00", "\u22121", "\u20131", "\uff0d1"])
@pytest.mark.parametrize("people", [["ann", "bob", "cy", "di"], ["7", "8", "9", "12"]])
def test_junk_is_junk_whatever_stands_beside_it(tmp_path, junk, people):
    rows = [f"{p},{c}" for p in people for c in (1, 1, 2, 2)] + [f"{junk},1"] * 2
    drawn = draw_splits(own_rows(csv(tmp_path, rows))[0])
    assert drawn["pid"].nunique() == 5 and drawn["pid"].min() == -1
    assert drawn.loc[drawn["pid"] == -1, "split"].tolist() == ["gallery"] * 2


def test_junk_neither_learns_nor_asks(tmp_path):
    for split in ("train", "query"):
        rows = ["1,train", "2,query", "2,gallery", f"-1,{split}"]
        with pytest.raises(ValueError, match=rf"junk \(-1\) in line 5 is in {split}"):
            own_rows(csv(tmp_path, rows, "path,pid,split"))


@pytest.mark.parametrize("pattern", [r"c(?P<cam>\d+)?_", r"(c(?P<cam>\d+))?"])
def test_a_camera_that_a_pattern_may_miss_is_missed_aloud(tmp_path, pattern):
    (tmp_path / "t.csv").write_text("path,pid\nc1_a.jpg,1\nc_b.jpg,1\n")
    with pytest.raises(ValueError, match=r"finds nothing in 1 of 2 paths, first 'c_b\.jpg'"):
        own_rows(tmp_path / "t.csv", pattern)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["7.0", "-1.0", "12.0"], [7, -1, 12]),
        (["7,0", "-1,0"], [7, -1]),
        (["7.000000", "12.000000"], [7, 12]),
        (["0007", "12", "0000"], [7, 12, 0]),
        (["999999999999999999", "1"], [999999999999999999, 1]),
        ([7.0, -1.0], [7, -1]),
        (["ann", "12e5", "7.5"], [2, 0, 1]),
    ],
)
def test_whole_numbers_in_other_programs_spelling(given, wanted):
    assert numbered(pd.Series(given)).tolist() == wanted


@pytest.mark.parametrize(
    "odd",
    ["7.5", "inf", "-Infinity", "1e3", "1,00E+03", "1.23E+11", "1.000", "1,234", "1 234", "1'234"]
    + ["-2", "-2.0", "9" * 19, "9" * 400, ".5", "7.", "--1"][:-2],
)
@pytest.mark.parametrize("column", ["pid", "camid", "track"])
def test_a_number_that_has_been_changed_on_its_way_is_refused(tmp_path, odd, column):
    cells = {"pid": "7", "camid": "1", "track": "2"}
    rows = [",".join(f'"{v}"' for v in (cells | {column: v}).values()) for v in ("5", odd, "6")]
    kind = {"pid": "identity", "camid": "camera", "track": "track"}[column]
    with pytest.raises(ValueError, match=rf"t\.csv: {kind} .* in line 3 is ") as said:
        own_rows(csv(tmp_path, rows, "path,pid,camid,track"))
    assert len(str(said.value)) < 250


def test_a_rounded_number_is_no_name_either():
    with pytest.raises(ValueError, match="no whole number"):
        numbered(pd.Series(["anna", "1,00E+03"]))


# --- two spellings of one name ---------------------------------------------------------------

TWINS = [
    ("001", "1"),
    ("7", "7.0"),
    ("anna", "anna "),
    ("Anna", "anna"),
    ("STRASSE", "straße"),
    (ZOE, ZOE_APART),
    ("li wei", "li  wei"),
    ("li wei", "li\u00a0wei"),
    ("bob", "bob\u200b"),
    ("１", "1"),
]


@pytest.mark.parametrize(("one", "two"), TWINS, ids=ascii)
def test_two_spellings_of_one_name_are_refused(tmp_path, one, two):
    with pytest.raises(ValueError, match="differ in blanks, case, zeros") as said:
        numbered(pd.Series(["cy", "2", one, two]))
    for name in (one, two):
        assert repr(name) in str(said.value) or ascii(name) in str(said.value)
    with pytest.raises(ValueError, match="line 3"):
        own_rows(csv(tmp_path, [f"{n},1" for n in (one, two)], encoding="utf-8"))
    with pytest.raises(ValueError, match=r"camera .*line 3"):
        own_rows(csv(tmp_path, [f"5,{n}" for n in (one, two)], encoding="utf-8"))
    with pytest.raises(ValueError, match="differ in"):
        own_rows(tree(tmp_path / "own", [one, two]))
    text = json.dumps({one: ["a.jpg"], two: ["b.jpg"]}, ensure_ascii=False)
    (tmp_path / "m.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="differ in"):
        own_rows(tmp_path / "m.json")


def test_names_that_differ_in_more_are_people():
    names = ["ann", "anna", "10", "100", "a1", "a2", "7b", "Zoe", ZOE]
    assert numbered(pd.Series(names)).nunique() == len(names)


# --- splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
@pytest.mark.parametrize("gallery", ["gallery", "Gallery"])
def test_a_split_in_any_case_is_a_split(tmp_path, train, gallery):
    names = [f"{train}/1", f"{train}/2", "Query/3", f"{gallery}/3"]
    found = own_rows(tree(tmp_path / "own", names))[0]
    wanted = {("train", 1), ("train", 2), ("query", 3), ("gallery", 3)}
    assert set(zip(found["split"], found["pid"], strict=True)) == wanted
    assert all((tmp_path / "own" / p).exists() for p in found["path"])
    table = own_rows(csv(tmp_path, [f"1,{train}", "2,QUERY", f"2,{gallery} "], "path,pid,split"))[0]
    assert table["split"].tolist() == ["train", "query", "gallery"]


@pytest.mark.parametrize("other", ["val", "VAL", "valid", "Validation", "test", "Testing", "probe"])
def test_another_kind_of_split_is_nobody(tmp_path, other):
    for names in (
        [other, "1", "2"],
        ["train/1", "query/2", "gallery/2", f"{other}/3"],
        [f"{other}/1"],
    ):
        root = tmp_path / "-".join(names).replace("/", "_")
        with pytest.raises(ValueError, match=r"is no split here.*move the photos there"):
            own_rows(tree(root, names))
    with pytest.raises(ValueError, match=r"t\.csv in line 3: .* is no split here"):
        own_rows(csv(tmp_path, ["1,train", f"1,{other}"], "path,pid,split"))
    (tmp_path / "m.json").write_text(json.dumps({"train": ["a.jpg"], other: ["b.jpg"]}))
    with pytest.raises(ValueError, match=r"m\.json.*(is the name of a split|is no split here)"):
        own_rows(tmp_path / "m.json")


@pytest.mark.parametrize(
    "names",
    [
        ["train2017", "val2017", "test2017", "unlabeled2017"],  # as COCO is unpacked
        ["train_images", "test_images", "extra", "more"],
        ["01_train", "02_query", "03_gallery", "anna"],
        ["Training Set", "anna", "bob", "cy"],
    ],
    ids=lambda names: names[0],
)
def test_a_split_with_something_around_it_is_nobody(tmp_path, names):
    with pytest.raises(ValueError, match=r"is the name of a split\. .*move the photos there"):
        own_rows(tree(tmp_path / "own", names))
    people = ["set 1", "anna2017", "trainer", "a test", "Traing"]
    assert own_rows(tree(tmp_path / "people", people))[0]["identity"].nunique() == len(people)


def test_one_split_in_two_folders_and_one_alone(tmp_path):
    with pytest.raises(ValueError, match="twice, as"):
        own_rows(tree(tmp_path / "a", ["train/1", "Train/2", "query/3", "gallery/3"]))
    with pytest.raises(ValueError, match="has folders Train and lacks query, gallery"):
        own_rows(tree(tmp_path / "b", ["Train/1", "Train/2"]))


# --- tables of other programs ----------------------------------------------------------------


def test_what_pandas_writes_with_gaps_and_with_its_index(tmp_path):
    frame = pd.DataFrame({"path": ["a.jpg", "b.jpg", "c.jpg"], "pid": [7, -1, 12]})
    frame["camid"] = [3, np.nan, 5]
    frame.to_csv(tmp_path / "t.csv")
    found = own_rows(tmp_path / "t.csv")[0]
    assert (found["pid"].tolist(), found["camid"].tolist()) == ([7, -1, 12], [3, -1, 5])
    frame.astype({"camid": "Int64"}).iloc[[2, 0]].to_csv(
        tmp_path / "t.csv", sep="\t", na_rep="NULL"
    )
    assert own_rows(tmp_path / "t.csv")[0]["camid"].tolist() == [5, 3]
    frame.assign(pid=[7, np.nan, 12]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match="identity is '' in line 3"):
        own_rows(tmp_path / "t.csv")


SHEET = [  # a spreadsheet's: byte order mark, semicolons, CRLF, empty columns and lines
    b"\xef\xbb\xbfpath;pid;camid\r\na.jpg;7;1\r\nb.jpg;-1;\r\n\r\n;;\r\n",
    b"sep=;\r\npath;pid;camid\r\na.jpg;7;1\r\nb.jpg;-1;\r\n",
    b"\xef\xbb\xbfpath;pid;camid;;\r\na.jpg;7,0;1,0;;\r\nb.jpg;-1,0;;;\r\n",
    b'path\tpid\tcamid\r\n"a.jpg"\t"7"\t1\r\nb.jpg\t-1\t\r\n',
    b'"path","pid","camid"\r"a.jpg","7","1"\r"b.jpg","-1",""\r',  # the old macOS's line ends
    b'"","path","pid","camid"\n"1","a.jpg",7,1\n"2","b.jpg",-1,NA\n',  # R's
]


@pytest.mark.parametrize("content", SHEET)
def test_what_spreadsheets_and_r_write(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    found = own_rows(tmp_path / "t.csv")[0]
    assert found["path"].tolist() == ["a.jpg", "b.jpg"]
    assert (found["pid"].tolist(), found["camid"].tolist()) == ([7, -1], [1, -1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,pid\na.jpg,7\nb.jpg\n", "line 3 has 1 cells"),
        (b"path,pid\n\n\na.jpg,7,8\n", "line 4 has 3 cells"),
        (b'path,pid\n"a.jpg,7\n', "line 2 cannot be divided"),
        (b"path,pid\n,7\n", "path is blank in line 2"),
        (b"path,pid\n../a.jpg,7\n", "t.csv, line 2 names"),
        (b"path;pid\nM\xfcller.jpg;7\n", "no UTF-8 text"),
        ("path\tpid\na.jpg\t7\n".encode("utf-16"), "UTF-16"),
        (b"path;pid\na.jpg;1,00E+03\n", "line 2 is no whole number"),
        (b'path,pid\n"a\nb.jpg",7\nc.jpg,7.5\n', "line 4 is no whole number"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        own_rows(tmp_path / "t.csv")


def test_a_mapping_says_an_identity_once(tmp_path):
    (tmp_path / "m.json").write_text('{"7": ["a.jpg"], "8": ["b.jpg"], "7": ["c.jpg"]}')
    with pytest.raises(ValueError, match="'7' stands twice"):
        own_rows(tmp_path / "m.json")
