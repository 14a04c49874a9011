"""The network sees what a viewer shows: turned, deep, transparent and tagged pictures, and those that cannot be read.

Most files are written here byte by byte, by the formats' own rules, so that no reader checks itself.
"""

import io
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms

from reidlab.data.doctor import examine, examine_files
from reidlab.data.manifest import Photos, write_manifest
from reidlab.data.packed import pack_photos
from reidlab.data.pictures import open_picture
from reidlab.data.transforms import read_photo, read_pixels
from reidlab.evaluation.baselines import colour_histogram, histogram_features
from reidlab.viz.photos import open_photo

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, *rows, width, before=(), after=()):
    "A PNG by its specification; colour 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *before, (b"IDAT", pixels), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(width, height, bits, data, colour=1, kind=1, turn=1, order="<"):
    "A TIFF of one strip; colour 0 says that 0 is white; kind 1 unsigned, 2 signed, 3 float."
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: colour, 273: 8 + 2 + 12 * 11 + 4}
    tags |= {274: turn, 277: 1, 278: height, 279: len(data), 339: kind}
    rows = b"".join(
        struct.pack(f"{order}HHI", t, 4, 1) + struct.pack(f"{order}I", v) for t, v in tags.items()
    )
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    return start + struct.pack(f"{order}H", len(tags)) + rows + bytes(4) + data


def exif(turn, order=">"):
    "An EXIF block with its orientation alone, as cameras write it."
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, 1)
    return head + struct.pack(f"{order}HHIHHI", 0x0112, 3, 1, turn, 0, 0)


def jpeg(image, *segments):
    "A JPEG with further APP segments after its first two bytes."
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    extra = b"".join(
        b"\xff" + bytes([app]) + struct.pack(">H", len(d) + 2) + d for app, d in segments
    )
    return file.getvalue()[:2] + extra + file.getvalue()[2:]


AND_ANOTHER = {"save_all": True, "append_images": [Image.new("L", (1, 1), 99)]}  # frame, or page


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def big(*values):
    return struct.pack(f">{len(values)}H", *values)


def bmp32(*pixels):
    "A 32-bit BMP with masks for alpha, one line, as old Windows programs write it: BGRA."
    head = struct.pack("<IiiHHIIiiII", 108, len(pixels), 1, 1, 32, 3, 4 * len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    data = b"".join(struct.pack("BBBB", *p) for p in pixels)
    start = 14 + len(head) + len(masks)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + masks + data


TRNS = lambda *values: ((b"tRNS", big(*values)),)
PLTE = (b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
HALF = Image.new("RGBA", (1, 1), (100, 0, 0, 128))
TABLE = {
    "png grey 16": (png(16, 0, big(0, 0x8000, 0xFFFF, 0x40FF), width=4), [0, 128, 255, 64]),
    "png rgb 16": (png(16, 2, big(0, 0x8000, 0xFFFF), width=1), [(0, 128, 255)]),
    "png grey 16 and alpha": (png(16, 4, big(0x8000, 0xFFFF, 0x1234, 0), width=2), [128, WHITE]),
    "png grey 16, one clear": (
        png(16, 0, big(0x1234, 0x4000), width=2, before=TRNS(0x1234)),
        [WHITE, 64],
    ),
    "png rgb 16, one clear": (
        png(
            16,
            2,
            big(0x1234, 0x5678, 0x9ABC, 0, 0, 0),
            width=2,
            before=TRNS(0x1234, 0x5678, 0x9ABC),
        ),
        [WHITE, BLACK],
    ),
    "png rgb, one clear": (
        png(8, 2, bytes([1, 2, 3, 4, 5, 6]), width=2, before=TRNS(4, 5, 6)),
        [(1, 2, 3), WHITE],
    ),
    "png 1 bit": (png(1, 0, b"\x40", width=2), [BLACK, WHITE]),
    "png 1 bit, black clear": (png(1, 0, b"\x40", width=2, before=TRNS(0)), [WHITE, WHITE]),
    "png 4 bits, one clear": (png(4, 0, b"\x3f", width=2, before=TRNS(3)), [WHITE, WHITE]),
    "png palette": (png(8, 3, b"\1\0", width=2, before=(PLTE,)), [(200, 100, 50), (10, 20, 30)]),
    "png palette, first clear": (
        png(8, 3, b"\1\0", width=2, before=(PLTE, (b"tRNS", b"\0"))),
        [(200, 100, 50), WHITE],
    ),
    "png rgba": (png(8, 6, bytes([9, 8, 7, 255, 9, 8, 7, 0]), width=2), [(9, 8, 7), WHITE]),
    "png half clear": (saved(HALF, "PNG"), [(177, 127, 127)]),
    "webp clear": (
        saved(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True),
        [WHITE],
    ),
    "tiff 16, Intel": (tiff(3, 1, 16, struct.pack("<3H", 0, 0x80FF, 0xFFFF)), [0, 128, 255]),
    "tiff 16, Motorola": (tiff(3, 1, 16, big(0, 0x80FF, 0xFFFF), order=">"), [0, 128, 255]),
    "tiff 16, 0 is white": (tiff(2, 1, 16, struct.pack("<2H", 0, 0xFFFF), colour=0), [255, 0]),
    "tiff 8, 0 is white": (tiff(2, 1, 8, bytes([0, 5]), colour=0), [255, 250]),
    "tiff 12": (tiff(2, 1, 12, bytes([0xFF, 0xF8, 0x00])), [255, 128]),
    "tiff 32": (tiff(2, 1, 32, struct.pack("<2I", 0x80000000, 0xFFFFFFFF)), [128, 255]),
    "tiff 32, small numbers": (tiff(2, 1, 32, struct.pack("<2I", 7, 200)), [7, 200]),
    "tiff 32, signed": (tiff(2, 1, 32, struct.pack("<2i", -3, 200), kind=2), [0, 200]),
    "tiff 16, signed": (tiff(2, 1, 16, struct.pack("<2h", -3, 0x7FFF), kind=2), [0, 255]),
    "tiff float": (tiff(3, 1, 32, struct.pack("<3f", 0, 0.5, 1), kind=3), [0, 128, 255]),
    "tiff float to 255": (
        tiff(3, 1, 32, struct.pack("<3f", float("nan"), 7, 255), kind=3),
        [0, 7, 255],
    ),
    "pgm 16": (b"P5\n2 1\n65535\n" + big(0x4000, 0xFFFF), [64, 255]),
    "pgm 10": (b"P5\n2 1\n1023\n" + big(512, 1023), [128, 255]),
    "ppm": (b"P6 1 1 255\n\1\2\3", [(1, 2, 3)]),
    "pbm in letters": (b"P1\n# by hand\n2 1\n1 0\n", [BLACK, WHITE]),
    "bmp, alpha meant nothing": (bmp32((3, 2, 1, 0), (6, 5, 4, 0)), [(1, 2, 3), (4, 5, 6)]),
    "bmp with alpha": (bmp32((3, 2, 1, 255), (6, 5, 4, 0)), [(1, 2, 3), WHITE]),
    "cmyk": (saved(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)]),
    "grey": (saved(Image.new("L", (1, 1), 7), "PNG"), [7]),
    "grey and alpha": (saved(Image.new("LA", (1, 1), (7, 0)), "PNG"), [WHITE]),
    "gif of two frames": (saved(Image.new("L", (1, 1), 9), "GIF", **AND_ANOTHER), [9]),
    "tiff of two pages": (saved(Image.new("L", (1, 1), 9), "TIFF", **AND_ANOTHER), [9]),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_mode_has_the_pixels_that_a_viewer_shows(name, tmp_path):
    content, expected = TABLE[name]
    (tmp_path / "0.png").write_bytes(content)  # the name says nothing
    seen = read_pixels(tmp_path / "0.png").permute(1, 2, 0).reshape(-1, 3).tolist()
    assert seen == [[e] * 3 if isinstance(e, int) else list(e) for e in expected]


# --- upright -----------------------------------------------------------------------------------

PICTURE = np.zeros((48, 32, 3), "uint8")  # red above, blue below, a white corner at the top left
PICTURE[:24, :, 0], PICTURE[24:, :, 2], PICTURE[:16, :16] = 255, 255, 255
STORED = {  # what the sensor wrote, by EXIF's own table: row 0 is the …, column 0 the …
    1: PICTURE,  # top, left
    2: PICTURE[:, ::-1],  # top, right
    3: PICTURE[::-1, ::-1],  # bottom, right
    4: PICTURE[::-1],  # bottom, left
    5: PICTURE.transpose(1, 0, 2),  # left, top
    6: PICTURE.transpose(1, 0, 2)[::-1],  # right, top
    7: PICTURE[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: PICTURE[::-1].transpose(1, 0, 2),  # left, bottom
}


def containers(turn):
    "The stored picture of this orientation in several formats."
    image = Image.fromarray(np.ascontiguousarray(STORED[turn]))
    grey = np.ascontiguousarray(STORED[turn][..., 0])
    return {
        "jpg": jpeg(image, (0xE1, b"Exif\0\0" + exif(turn))),
        "jpg by another maker": jpeg(image, (0xE1, b"Exif\0\0" + exif(turn, "<"))),
        "png": saved(image, "PNG", exif=b"Exif\0\0" + exif(turn)),
        "png, said last": png(
            8,
            0,
            *(row.tobytes() for row in grey),
            width=grey.shape[1],
            after=((b"eXIf", exif(turn)),),
        ),
        "webp": saved(image, "WEBP", lossless=True, exif=exif(turn)),
        "tif": tiff(grey.shape[1], grey.shape[0], 8, grey.tobytes(), turn=turn),
    }


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_stands_upright(turn, tmp_path):
    for name, content in containers(turn).items():
        (tmp_path / "0.jpg").write_bytes(content)
        seen = read_pixels(tmp_path / "0.jpg").permute(1, 2, 0).numpy()
        whole = (
            PICTURE
            if name.split()[0] in ("jpg", "webp") or name == "png"
            else PICTURE[..., :1].repeat(3, 2)
        )
        assert seen.shape == whole.shape, name
        assert (np.abs(seen.astype(int) - whole) > 60).mean() < 0.02, name  # JPEG's edges
        changed = open_picture(tmp_path, "0.jpg", len(content)).changed
        assert changed == (() if turn == 1 else ("turned",)), name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "block",
    [b"Exif\0\0torn", b"Exif\0\0" + exif(6)[:-6], b"Exif\0\0" + exif(0), b"Exif\0\0" + exif(9)],
)
def test_exif_that_says_nothing_turns_nothing(block, tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(Image.fromarray(PICTURE), (0xE1, block)))
    assert tuple(read_pixels(tmp_path / "0.jpg").shape) == (3, 48, 32)


# --- colours -----------------------------------------------------------------------------------


def profile(curve=None):
    "sRGB's profile, or one with another curve: its parametric one replaced by a plain gamma."
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if curve is None:
        return whole
    at = whole.index(b"para", 128)
    return whole[:at] + b"curv" + struct.pack(">IIH", 0, 1, round(curve * 256)) + whole[at + 14 :]


def test_profiles_count_as_in_a_viewer(tmp_path):
    grey = Image.new("RGB", (4, 4), (55, 55, 55))
    for given, level in ((profile(), 55), (b"torn", 55), (profile()[:99], 55), (profile(1.0), 128)):
        grey.save(tmp_path / "0.png", icc_profile=given)
        assert abs(int(read_pixels(tmp_path / "0.png")[0, 0, 0]) - level) <= (level == 128)
    for name, image in (("L", grey.convert("L")), ("RGB", grey)):
        image.save(tmp_path / "0.png", icc_profile=profile())
        assert set(read_pixels(tmp_path / "0.png").flatten().tolist()) == {55}, name


def test_plain_photos_keep_their_bits(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype="uint8")
    for quality, given in ((75, b""), (95, profile())):
        Image.fromarray(noise).save(tmp_path / "0.jpg", quality=quality, icc_profile=given)
        with Image.open(tmp_path / "0.jpg") as image:
            plain = np.array(image.convert("RGB"))
        assert (read_pixels(tmp_path / "0.jpg").permute(1, 2, 0).numpy() == plain).all()


# --- every reader, and the doctor --------------------------------------------------------------


def odd_set(root):
    "A photo of each kind that has to be brought into form, and a plain one."
    files = {
        "plain.jpg": jpeg(Image.fromarray(PICTURE)),
        "turned.jpg": containers(6)["jpg"],
        "deep.png": png(16, 2, *[big(*([0x8000] * 96))] * 48, width=32),
        "clear.png": saved(Image.fromarray(PICTURE).convert("RGBA"), "PNG"),
        "glass.png": saved(Image.new("RGBA", (32, 48), (9, 9, 9, 90)), "PNG"),
        "linear.png": saved(Image.fromarray(PICTURE), "PNG", icc_profile=profile(1.0)),
        "torn.png": saved(Image.fromarray(PICTURE), "PNG", icc_profile=b"torn"),
        "meant.tga": saved(
            Image.new("RGBA", (32, 48), (9, 80, 9, 0)), "TGA"
        ),  # alpha of no meaning
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    rows = [(name, i, 0, "train") for i, name in enumerate(files)]
    return pd.DataFrame(rows, columns=["path", "pid", "camid", "split"])


def test_the_doctor_counts_what_was_changed(tmp_path):
    manifest = write_manifest(tmp_path / "m", "x", odd_set(tmp_path), tmp_path)
    found = {f.code: f.paths for f in examine_files(manifest)}
    expected = {
        "turned-photo": ("turned.jpg",),
        "deep-pixels": ("deep.png",),
        "transparent-photo": ("glass.png",),
        "other-colours": ("linear.png",),
        "odd-profile": ("torn.png",),
    }
    assert {code: found.get(code) for code in expected} == expected
    assert {f.code for f in examine_files(manifest, deep=False)} >= {"turned-photo"}


def test_every_reader_sees_the_same(tmp_path):
    frame = odd_set(tmp_path)
    photos = Photos(tmp_path, list(frame["path"]), np.arange(7), np.zeros(7, int))
    packed = pack_photos(photos, 48, 32, tmp_path / "packed")
    features = histogram_features(photos)
    for i, path in enumerate(photos.paths):
        pixels = read_pixels(tmp_path / path).permute(1, 2, 0).numpy()
        assert (np.asarray(open_photo(photos, i)) == pixels).all(), path
        assert (packed[i] == read_photo(tmp_path / path, 48, 32).numpy()).all(), path
        assert np.array_equal(features[i], colour_histogram(pixels)), path


# --- what cannot be read -----------------------------------------------------------------------


def of_size(width, height):
    "A PNG of these measures without its pixels; a bomb says no more."
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99)))


UNREADABLE = {
    "200 megapixels": (of_size(20000, 10000), "200000000 pixels", "oversized"),
    "900 megapixels": (of_size(30000, 30000), "900000000 pixels", "oversized"),
    "900 megapixels, tiff": (tiff(30000, 30000, 8, b"1"), "900000000 pixels", "oversized"),
    "900 megapixels, ppm": (b"P6 30000 30000 255\n1", "900000000 pixels", "oversized"),
    "words": (b"<html>404</html>", "UnidentifiedImageError", "unreadable"),
    "a document": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "Unidentified",
        "unreadable",
    ),
    "cut off": (jpeg(Image.fromarray(PICTURE))[:700], "OSError", "truncated"),
    "cut off in its header": (jpeg(Image.fromarray(PICTURE))[:9], "", "unreadable"),
    "torn palette": (png(8, 3, b"\0", width=1, before=((b"PLTE", b""),)), "", ""),
    "cut off, tiff": (tiff(9, 9, 16, b"123"), "", "truncated"),
    "cut off, ppm": (b"P6 9 9 255\n123", "", "truncated"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, words, wrong = UNREADABLE[name]
    (tmp_path / "0.jpg").write_bytes(content)
    if wrong:
        with pytest.raises(ValueError, match=r"0\.jpg cannot be read \(") as caught:
            read_pixels(tmp_path / "0.jpg")
        assert words in str(caught.value) and "Replace the file or leave it out" in str(
            caught.value
        )
    assert open_picture(tmp_path, "0.jpg", len(content)).wrong == wrong
    if wrong == "oversized":
        rows = pd.DataFrame({"path": ["0.jpg"], "pid": [1], "camid": [0], "split": ["train"]})
        found = examine(write_manifest(tmp_path / "m", "x", rows, tmp_path))
        assert ("oversized-image", ("0.jpg",)) in [(f.code, f.paths) for f in found]
