"""An exported file on a machine without torch: the script that travels with it, and what it makes of people's photos."""

import csv
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_graphs import contract, network
from test_pixels import profile

from reidlab import Embedder
from reidlab.data.transforms import read_photo, resize
from reidlab.deploy.anywhere import SCRIPT, write_script
from reidlab.deploy.onnx import write_onnx

NEEDS = ("onnxruntime", "numpy", "pillow")
FOLDERS = ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs")
# nothing but the standard library and one folder on the path: no site-packages, no PYTHONPATH
BARE = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
for name in ("torch", "torchvision", "reidlab", "onnx"):
    try: __import__(name)
    except ImportError: continue
    sys.exit(f"{name} is here")
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = write_script(tmp_path_factory.mktemp("script") / "anywhere.py")
    spec = importlib.util.spec_from_file_location("anywhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linked(place):
    "The three packages as they lie here, and nothing else."
    site = Path(np.__file__).parents[1]
    for name in FOLDERS:
        if (site / name).is_dir():
            (place / name).symlink_to(site / name)


def installed(place):
    "The three packages from the index, without what they ask for besides."
    asked = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, *NEEDS]
    pip = (
        [shutil.which("pip") or "pip", *asked[3:]] if not importlib.util.find_spec("pip") else asked
    )
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs a package index: there is no pip")
    if done.returncode:
        pytest.skip(f"needs a package index: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize(
    "make", [linked, pytest.param(installed, marks=pytest.mark.slow)], ids=["linked", "installed"]
)
def test_it_runs_where_there_is_no_torch(make, tmp_path):
    make_place = tmp_path / "packages"
    make_place.mkdir()
    make(make_place)
    model = network({"transreid_vit": {"dim": 24, "depth": 1, "heads": 2, "cameras": 3}}, {})
    rules = contract(model, flip=True)
    files = [write_onnx(model, rules, tmp_path / f"{n}.onnx", n) for n in ("images", "photos")]
    write_script(tmp_path / "anywhere.py")
    rng, photos = np.random.default_rng(0), tmp_path / "photos" / "some"
    photos.mkdir(parents=True)
    for i, size in enumerate([(150, 70, 3), (64, 32, 3), (20, 90, 3)]):
        Image.fromarray(rng.integers(0, 256, size, dtype="uint8")).save(photos / f"{i}.png")
    (photos / "notes.txt").write_text("no photo")
    for file in files:
        asked = [sys.executable, "-I", "-S", "-c", BARE, make_place, tmp_path / "anywhere.py", file]
        done = subprocess.run(
            [*asked, photos.parent],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
        assert done.returncode == 0, done.stderr
        lines = [line.split(",") for line in done.stdout.splitlines()]
        assert [Path(name).name for name, *_ in lines] == ["0.png", "1.png", "2.png"]
        there = np.array([list(map(float, row)) for _, *row in lines])
        np.testing.assert_allclose(there, Embedder(file).embed(photos, unit=True), atol=1e-4)


PICTURE = (
    np.random.default_rng(0).integers(0, 256, (13, 6, 3), dtype="uint8").repeat(10, 0).repeat(10, 1)
)


def kinds_of_photo():
    "Name, picture, and how it is saved: what telephones, scanners and the web write."
    plain = Image.fromarray(PICTURE)
    clear, deep = plain.convert("RGBA"), np.arange(130 * 60).reshape(130, 60) * 8
    clear.putalpha(Image.fromarray(PICTURE[..., 0]))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = turn
        yield f"turn{turn}.jpg", plain, {"exif": exif}
    yield "turn6.tif", plain, {"tiffinfo": {274: 6}}
    yield "turn6.png", plain, {"exif": exif}
    for name, given in (("srgb", profile()), ("linear", profile(1.0)), ("torn", b"torn")):
        yield f"{name}.jpg", plain, {"icc_profile": given}
        yield f"{name}.png", clear, {"icc_profile": given}
    yield "grey_linear.png", plain.convert("L"), {"icc_profile": profile(1.0)}
    for mode in ("L", "LA", "P", "1"):
        yield f"{mode}.png", plain.convert(mode), {}
    yield "of_print.jpg", plain.convert("CMYK"), {}
    yield "of_print.tif", plain.convert("CMYK"), {}
    yield "one_clear.png", plain, {"transparency": tuple(PICTURE[0, 0].tolist())}
    yield "clear_palette.png", clear.quantize(16), {}
    yield "clear.gif", plain.convert("P"), {"transparency": 3}
    yield "clear.webp", clear, {"lossless": True}
    yield "deep.png", Image.fromarray(deep.astype("uint16")), {}
    yield "old.bmp", plain, {}


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_photos_come_out_as_the_reader_has_them(how, script, tmp_path):
    for name, picture, options in kinds_of_photo():
        picture.save(tmp_path / name, **options)
        ours = read_photo(tmp_path / name, 64, 32, how).permute(1, 2, 0).numpy()
        there = script.resized(script.opened(tmp_path / name), 64, 32, how)
        np.testing.assert_array_equal(there, ours, err_msg=name)


def test_resizing_is_torchs_to_the_bit(script):
    rng = np.random.default_rng(0)
    for k in range(60):
        (h, w), (height, width) = rng.integers(1, 300, 2), map(int, rng.integers(1, 200, 2))
        photo = rng.integers(0, 256, (h, w, 3), dtype="uint8")
        photo = np.where(photo > 128, np.uint8(255), np.uint8(0)) if k % 3 else photo
        width = int(w) if k % 5 == 0 else width
        ours = resize(torch.from_numpy(photo).permute(2, 0, 1), height, width).permute(1, 2, 0)
        there = script.resized(Image.fromarray(photo), height, width, "bilinear")
        np.testing.assert_array_equal(
            there, ours.numpy(), err_msg=f"{photo.shape} {height} {width}"
        )


def test_the_script_is_short_and_stands_alone():
    assert len(SCRIPT.splitlines()) <= 60 and max(map(len, SCRIPT.splitlines())) <= 101
    assert "torch" not in SCRIPT.replace("as torch's", "") and "reidlab" not in SCRIPT.replace(
        '["reidlab"]', ""
    )


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "A file, the script, and photos under names that a spreadsheet has to be told of."
    place = tmp_path_factory.mktemp("a room, with a comma")
    model = network("small_cnn", {})
    write_onnx(model, contract(model), place / "my net.onnx")
    write_script(place / "anywhere.py")
    (place / "photos").mkdir()
    for name in ("one, of two.png", 'the "second".png'):
        Image.fromarray(PICTURE).save(place / "photos" / name)
    (place / "photos" / "one, of two.png").replace(place / "photos" / "one, of two.PNG")
    Image.fromarray(PICTURE).save(place / "torn.jpg")
    (place / "torn.jpg").write_bytes((place / "torn.jpg").read_bytes()[:400])
    (place / "empty").mkdir()
    return place


def said(room, *places):
    "What the script says from a shell."
    asked = [sys.executable, "anywhere.py", *places]
    return subprocess.run(asked, capture_output=True, text=True, check=False, cwd=room)


def test_its_rows_are_csv_whatever_a_photo_is_called(room):
    names = [Path("photos", "one, of two.PNG"), Path("photos", 'the "second".png')]
    alone = [*csv.reader(io.StringIO(said(room, "my net.onnx", "photos").stdout))]
    assert [Path(name) for name, *_ in alone] == names
    there = np.array([list(map(float, row)) for _, *row in alone])
    here = Embedder(room / "my net.onnx").embed(room / "photos", unit=True)
    np.testing.assert_allclose(there, here, atol=1e-4)
    pairs = [*csv.reader(io.StringIO(said(room, "my net.onnx", "photos", str(names[1])).stdout))]
    assert [(Path(a), Path(b)) for a, b, _ in pairs] == [(name, names[1]) for name in names]


@pytest.mark.parametrize(
    ("places", "cause"),
    [
        ([], "IndexError"),
        (["my net.onnx"], "IndexError"),
        (["gone.onnx", "photos"], "gone.onnx"),
        (["anywhere.py", "photos"], "anywhere.py"),
        (["my net.onnx", "gone.jpg"], "gone.jpg"),
        (["my net.onnx", "torn.jpg"], "torn.jpg"),
        (["my net.onnx", "empty"], "empty"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_stops_it_is_two_lines(places, cause, room):
    done = said(room, *places)
    cause_line, usage = done.stderr.strip().splitlines()
    assert done.returncode == 1 and not done.stdout
    assert cause in cause_line and usage.startswith("python anywhere.py MODEL.onnx PLACE [PLACE]")
