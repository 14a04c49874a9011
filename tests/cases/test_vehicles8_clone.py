"""vehicles8 out of a clone of its source: a clone in small that is drawn here, and the tables against the set itself."""

import hashlib
import importlib.util
import io
import shutil
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import facts, walk
from PIL import Image

from reidlab.core.recipe import load_recipe
from reidlab.data.archives import find_raw
from reidlab.data.loaders import open_data
from reidlab.data.vehicles8 import (
    CLEAR,
    COMMIT,
    FOLDERS,
    SIDE,
    TABLES,
    Vehicle,
    cut_all,
    cut_set,
    digest_of,
    jpeg,
    table_rows,
    vehicles,
)

SHARED = Path(__file__).parents[2].parent / "shared/data/vehicles8"
SIDES = ("s", "sw", "w", "nw", "n", "ne", "e", "se")
PAGE = "data_prep/vehicles8.ipynb"


def sheet(rows, tint):
    "Squares with a vehicle each, of another size and colour in every direction; one reaches the edge."
    pixels = np.full((rows * SIDE, 8 * SIDE, 3), CLEAR, np.uint8)
    for row in range(rows):
        for column in range(8):
            square = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
            square[60 : 80 + row + column, 40 : 70 + 3 * column] = (tint, 30 * row, 31 * column)
    pixels[:30, SIDE - 20 : SIDE] = (tint, 9, 200)  # row 0, column 0
    return Image.fromarray(pixels)


def listed(kind, where, sides=SIDES):
    "A line for each direction."
    return "".join(f"{kind}[{side}]={where}.{i}\n" for i, side in enumerate(sides))


DAT = {  # the spellings that the source has
    "vehicles/road/lorry.dat": (
        "# a lorry\nobj=vehicle\nname=Lorry\ncopyright=Ada, Ben\nname=Second\n"
        + listed("emptyimage", "> lorry.v2.0")
        + listed("freightimage[0]", "lorry.v2.1")
        + "-----\nObj=vehicle\nName=Bus\nCopyright=Cy\n"
        + f"EmptyImage[{','.join(SIDES)}]=lorry.v2.2.<$0>\n"
        + "obj=vehicle\nname=Trailer\n"  # no line of dashes before it
        + "emptyimage[s]=../other.0.3,4,-2 # moved\n#emptyimage[n]=no.0.0\n"
    ),
    "citycars/cär.dat": "Obj=citycar\nName=Car\ncopyright=\nImage[N]=car.0.4\nImage[S]=car\n",
}
TABLED = {
    "identities": (
        "pid,split,category,name,author,source\n"
        '0001,test,road,Lorry,"Ada, Ben",vehicles/road/lorry.dat\n'
        "0002,train,road,Bus,Cy,vehicles/road/lorry.dat\n"
    ),
    "distractors": (
        "file,source,name,picture\n"
        "0000_c5s1_000001_00.jpg,citycars/cär.dat,Car,image\n"
        "0000_c1s1_000002_00.jpg,citycars/cär.dat,Car,image\n"
        "0000_c1s1_000003_00.jpg,vehicles/road/lorry.dat,Trailer,emptyimage\n"
    ),
    "queries": "file\n0001_c2s1_000001_00.jpg\n0001_c7s1_000001_00.jpg\n",
}
PHOTOS = 16 + 8 + 3


def draw_clone(root, tint=200):
    "A clone: definitions, sheets, and what else lies in one."
    for name, text in DAT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    sheet(3, tint).save(root / "vehicles/road/lorry.v2.png")
    sheet(1, tint + 1).save(root / "vehicles/other.png")
    sheet(1, tint + 2).convert("P", palette=Image.Palette.ADAPTIVE).save(root / "citycars/car.png")
    (root / ".git").mkdir()
    (root / "README.txt").write_text("an open graphics set")
    return root


def draw_tables(clone, folder):
    "Tables for the clone, their digests made of what comes out, as those of vehicles8 were."
    folder.mkdir()
    for name, text in TABLED.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    numbers = {"0001_c1s1_000001_00.jpg": 16, "0002_c1s1_000001_00.jpg": 8}
    numbers |= {row["file"]: 1 for row in table_rows(folder, "distractors")}
    lines = [f"{file},{n},0,-" for file, n in numbers.items()]
    head = "file,pictures,pixels,sha256"
    (folder / "pictures.csv").write_text("\n".join([head, *lines]))
    cuts = cut_all(clone, list(vehicles(folder))).photos
    lines = [
        f"{file},{n},{sum(p[..., 0].size for p in photos)},{digest_of(map(jpeg, photos))}"
        for (file, n), photos in zip(numbers.items(), cuts, strict=True)
    ]
    (folder / "pictures.csv").write_text("\n".join([head, *lines]))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A clone, its tables, and the set cut of it."
    root = tmp_path_factory.mktemp("pak")
    clone = draw_clone(root / "pak128")
    tables = draw_tables(clone, root / "tables")
    return clone, tables, cut_set(clone, root / "set", tables)


def held(folder):
    return {name: data for name, (data, _) in facts(folder).items()}


def zipped(clone, to, top="pak128-master/"):
    with zipfile.ZipFile(to, "w") as box:
        if top:
            box.writestr(top, "")
        for file in sorted(p for p in clone.rglob("*") if p.is_file()):
            box.write(file, f"{top}{file.relative_to(clone).as_posix()}")
    return to


def tarred(clone, to):
    with tarfile.open(to, "w:gz") as box:
        box.add(clone, f"pak128-{COMMIT}")
    return to


def windows(clone, to):
    shutil.copytree(clone, to)
    for file in to.rglob("*.dat"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    return to


def read_only(clone, to):
    shutil.copytree(clone, to)
    for path in [*to.rglob("*"), to]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return to


FORMS = {
    "pak128-master.zip": zipped,
    f"pak128-{COMMIT}.zip": partial(zipped, top=f"pak128-{COMMIT}/"),
    "flat.zip": partial(zipped, top=""),
    "pak128.tar.gz": tarred,
    "windows": windows,
    "read_only": read_only,
    "above": lambda clone, to: shutil.copytree(clone, to / "pak128-1d150f2").parent,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_clone_in_any_form_gives_the_same_files(name, drawn, tmp_path):
    clone, tables, made = drawn
    source = FORMS[name](clone, tmp_path / name)
    before = facts(source) if source.is_dir() else source.read_bytes()
    assert held(cut_set(source, tmp_path / "set", tables)) == held(made)
    assert before == (facts(source) if source.is_dir() else source.read_bytes())
    source.chmod(0o755)


def test_the_photos_are_what_was_drawn(drawn):
    _, _, made = drawn
    assert len(list(made.rglob("*.jpg"))) == PHOTOS + 2
    photo = np.asarray(Image.open(made / "bounding_box_train/0002_c3s1_000001_00.jpg")).astype(int)
    assert photo.shape == (24 + 8, 36 + 8, 3)  # row 2, column 2, four pixels around
    assert np.abs(photo[:2, :2] - 128).max() <= 3
    assert np.abs(photo[8:-8, 8:-8] - (200, 60, 62)).max() <= 3
    edge = Image.open(made / "bounding_box_test/0001_c1s1_000001_00.jpg")
    assert edge.size == (
        128 - 36,
        84,
    )  # from four left of the box to the square's edge, from its top
    for file in ("0001_c2s1_000001_00.jpg", "0001_c7s1_000001_00.jpg"):
        asked = (made / "query" / file).read_bytes()
        assert asked == (made / "bounding_box_test" / file).read_bytes()
    told = (made / "ATTRIBUTION.txt").read_text()
    for word in (COMMIT, "Artistic License 2.0", "Ada, Ben; Cy", "mid grey", "identities.csv"):
        assert word in told
    assert "Artistic License 2.0" in (made / "LICENSE.txt").read_text()


def test_the_script_that_made_the_set_cuts_the_same(drawn, tmp_path):
    if not (SHARED / "vehicles8.py").is_file():
        pytest.skip("vehicles8 is not on this machine: its script neither")
    clone, tables, made = drawn
    spec = importlib.util.spec_from_file_location("script", SHARED / "vehicles8.py")
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    script.build(clone, tmp_path / "set", tables)
    ours = held(made)
    told = {"ATTRIBUTION.txt", "LICENSE.txt"}
    assert held(tmp_path / "set") == {k: v for k, v in ours.items() if k not in told}


# --- another source --------------------------------------------------------------------------


def rewrite(name, old, new):
    def change(clone):
        text = (clone / name).read_text(encoding="utf-8")
        assert old in text
        (clone / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def lower_sheet(clone):
    (clone / "vehicles/road/lorry.v2.png").rename(clone / "vehicles/road/Lorry.v2.png")


def elsewhere(clone):
    "A sheet named by its whole path, beside the clone."
    shutil.copy(clone / "vehicles/other.png", clone.parent / "mine.png")
    rewrite(LORRY, "../other.0.3", f"{clone.parent}/mine.0.3")(clone)


def a_folder(name):
    "A file's name, taken by a folder."
    return lambda clone: ((clone / name).unlink(), (clone / name).mkdir())


def to_nowhere(name):
    "A link whose file is gone."
    return lambda clone: ((clone / name).unlink(), (clone / name).symlink_to("gone"))


def one_pixel(clone):
    image = Image.open(clone / "vehicles/other.png")
    image.putpixel((3 * SIDE + 50, 70), (0, 0, 0))
    image.save(clone / "vehicles/other.png")


LORRY = "vehicles/road/lorry.dat"
CHANGES = {  # what somebody changed: what the error says
    "a definition is gone": (
        lambda c: (c / LORRY).unlink(),
        ["3 of 5 vehicles lack something", f"{LORRY} is not there"],
    ),
    "a name is gone": (rewrite(LORRY, "Name=Bus", "Name=Coach"), [f"{LORRY} describes no Bus"]),
    "a direction is gone": (
        rewrite(LORRY, "freightimage[0][ne]", "smoke"),
        [f"1 of 5 vehicles lack something, first: {LORRY} has no freightimage[ne] for Lorry"],
    ),
    "a place that is none": (
        rewrite(LORRY, "lorry.v2.2.<$0>", "lorry.v2.x.y"),
        [f"{LORRY} has no emptyimage[s] for Bus"],
    ),
    "a sheet is gone": (
        lambda c: (c / "citycars/car.png").unlink(),
        ["2 of 5 vehicles lack something, first: citycars/car.png is not there."],
    ),
    "a sheet's name in other letters": (lower_sheet, ["vehicles/road/lorry.v2.png is not there"]),
    "a sheet outside": (
        rewrite(LORRY, "../other.0.3", "../../../tables/other.0.3"),
        ["first: ../tables/other.png is not there"],
    ),
    "a sheet by its whole path": (elsewhere, ["/mine.png is not there"]),
    "a folder for a sheet": (a_folder("vehicles/other.png"), ["vehicles/other.png is not there"]),
    "a link for a sheet": (to_nowhere("vehicles/other.png"), ["vehicles/other.png is not there"]),
    "a folder for a definition": (a_folder(LORRY), [f"{LORRY} is not there"]),
    "a sheet that shrank": (
        lambda c: sheet(2, 200).save(c / "vehicles/road/lorry.v2.png"),
        ["lorry.v2.png has nothing in row 2, column 0"],
    ),
    "a sheet of another size": (
        lambda c: sheet(3, 200).resize((512, 192)).save(c / "vehicles/road/lorry.v2.png"),
        ["2 of 5 vehicles lack something", "has nothing in row"],
    ),
    "no picture at all": (
        lambda c: (c / "citycars/car.png").write_bytes(b"version https://git-lfs"),
        ["citycars/car.png cannot be read as a picture"],
    ),
    "another colour": (
        lambda c: sheet(3, 180).save(c / "vehicles/road/lorry.v2.png"),
        ["2 of 5 vehicles look different, first: Lorry in vehicles/road/lorry.dat; Bus in"],
    ),
    "one pixel": (
        one_pixel,
        ["1 of 5 vehicles look different, first: Trailer in"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_newer_checkout_is_refused_with_the_way_back(what, drawn, tmp_path):
    clone, tables, _ = drawn
    change, says = CHANGES[what]
    change(newer := shutil.copytree(clone, tmp_path / "newer"))
    with pytest.raises(ValueError) as wrong:
        cut_set(newer, tmp_path / "set", tables)
    line = str(wrong.value)
    for word in [*says, COMMIT[:12], f"git -C newer checkout {COMMIT}", f"archive/{COMMIT}.zip"]:
        assert word in line, line
    assert "\n" not in line and len(line) < 700
    assert not (tmp_path / "set").exists()


def test_archives_that_are_none_of_it(drawn, tmp_path):
    clone, tables, _ = drawn
    bad = zipped(clone, tmp_path / "bad.zip")
    with zipfile.ZipFile(bad, "a") as box:
        box.writestr("../../out.txt", "out")
    torn = tmp_path / "torn.zip"
    whole = zipped(clone, tmp_path / "whole.zip").read_bytes()
    at = whole.index(b"IDAT") + 40
    torn.write_bytes(whole[:at] + b"damage" + whole[at + 6 :])
    other = zipped(clone / "vehicles", tmp_path / "half.zip")
    text = tmp_path / "text.zip"
    text.write_text("Not Found")
    for source, says in {
        bad: "would leave its folder",
        torn: "torn.zip is damaged (BadZipFile",
        other: "holds no folders vehicles and citycars side by side",
        text: "neither a zip nor a tar",
        clone / "vehicles": "git clone https://github.com/simutrans/pak128",
    }.items():
        with pytest.raises(ValueError) as wrong:
            cut_set(source, tmp_path / "set", tables)
        assert says in str(wrong.value), wrong.value
    assert not (tmp_path / "set").exists() and not (tmp_path.parent / "out.txt").exists()


def test_another_encoder_is_said_and_compared_by_sizes(drawn, tmp_path, monkeypatch):
    clone, tables, made = drawn

    def coarser(pixels):
        Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=94, subsampling=0)
        return out.getvalue()

    monkeypatch.setattr("reidlab.data.vehicles8.jpeg", coarser)
    other = cut_set(clone, tmp_path / "set", tables)
    assert held(other).keys() == held(made).keys() and held(other) != held(made)
    sheet(3, 200).transpose(Image.ROTATE_180).save(
        (wide := shutil.copytree(clone, tmp_path / "w")) / "vehicles/road/lorry.v2.png"
    )
    with pytest.raises(ValueError, match="look different"):
        cut_set(wide, tmp_path / "again", tables)


def test_a_set_that_is_there_is_taken_as_it_lies_if_it_is_whole(drawn, tmp_path):
    clone, tables, made = drawn
    mine = shutil.copytree(made, tmp_path / "set")
    assert cut_set(tmp_path / "no clone at all", mine, tables) == mine
    (mine / "bounding_box_train/0002_c8s1_000001_00.jpg").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its photos, first: .*0002_c8.*Delete"):
        cut_set(clone, mine, tables)


# --- the page --------------------------------------------------------------------------------


def test_the_page_prepares_a_clone_and_a_recipe_takes_it(drawn, lab, monkeypatch):
    clone, tables, _ = drawn
    monkeypatch.setattr("reidlab.jobs.prepare_made.cut_set", partial(cut_set, tables=tables))
    before = facts(clone)
    names = walk(PAGE, source=str(clone))
    assert facts(clone) == before
    made = names["made"]
    about = made.manifest.about
    assert about["protocol"] == "vehicles8" and about["version"] == f"pak128 {COMMIT[:12]}"
    assert about["counts"]["query photos"] == {"ours": 2, "published": 430}
    assert not list(made.odd) and made.manifest.root.parent == lab.data / "vehicles8"
    recipe = load_recipe("vehicles8", overrides={"data.val_fraction": 0.0})
    data = open_data(recipe.data, recipe.seed, lab.data)
    assert (len(data.query.paths), len(data.gallery.paths)) == (2, 16 + 3)
    again = walk(PAGE, source=str(zipped(clone, lab.raw / "vehicles8.zip")))["made"]
    assert again.manifest.fingerprint == made.manifest.fingerprint


def test_the_page_takes_the_ready_set_too(drawn, lab, monkeypatch):
    "Under the same name, in the same folders: the same fingerprint, whoever cut it."
    clone, tables, made = drawn
    monkeypatch.setattr("reidlab.jobs.prepare_made.cut_set", partial(cut_set, tables=tables))
    shutil.make_archive(str(lab.raw / "vehicles8"), "zip", made.parent, made.name)
    found = walk(PAGE)["made"].manifest
    assert found.about["protocol"] == "vehicles8" and len(found.frame) == PHOTOS + 2
    cut_here = walk(PAGE, source=str(clone), out=str(lab.data / "cut"))["made"].manifest
    assert cut_here.fingerprint == found.fingerprint
    with pytest.raises(FileNotFoundError, match="has no folder with bounding_box_train"):
        walk(PAGE, source=str(lab.root), out=str(lab.root / "no"))


# --- the set itself --------------------------------------------------------------------------


def test_the_tables_describe_the_set_file_by_file():
    try:
        archive = find_raw("vehicles8")
    except FileNotFoundError as missing:
        pytest.skip(f"vehicles8 is not on this machine: {missing}")
    with zipfile.ZipFile(archive) as box:
        files = {name.partition("/")[2]: name for name in box.namelist() if name[-1] != "/"}
        read = {path: box.read(name) for path, name in files.items()}
    wanted = list(vehicles())
    photos = [path for v in wanted for path in v.pictures]
    asked = [f"{FOLDERS['query']}/{row['file']}" for row in table_rows(TABLES, "queries")]
    assert sorted([*photos, *asked, "LICENSE.txt", "identities.csv"]) == sorted(read)
    assert len(photos) + len(asked) == 5844
    for path in asked:
        assert read[path] == read[path.replace(FOLDERS["query"], FOLDERS["test"])]
    for name in ("LICENSE.txt", "identities.csv"):
        assert read[name] == (TABLES / name).read_bytes()
    for v in wanted:
        views = [read[path] for path in v.pictures]
        sizes = [Image.open(io.BytesIO(view)).size for view in views]
        assert (digest_of(views), sum(w * h for w, h in sizes)) == (v.digest, v.pixels), v


def test_the_tables_are_of_one_piece():
    "Where the archive is not at hand: every vehicle once, and the digest of all of them together."
    wanted = list(vehicles())
    assert all(isinstance(v, Vehicle) for v in wanted) and len(wanted) == 538 + 534
    text = "\n".join(f"{v.digest} {v.pixels} {' '.join(v.pictures)}" for v in wanted)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "87e716e832af04ee"
