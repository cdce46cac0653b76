"""One image file -> 8-bit RGB: every mode by its rule, ordinary images as ever, and nothing that hurts the machine."""

import os
import resource
import struct
import sys
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from tasks.data import decoding
from tasks.data.decoding import decode

RAMP = np.linspace(0, 65535, 256).reshape(16, 16)  # 0, 257, 514, ...
LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def before(path, size):
    """The formula of NormSuite 1.0 to 1.4, which ordinary images must keep to the last bit."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))
        rgb = image.convert("RGB")
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    resized = rgb.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.uint8).transpose(2, 0, 1)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def gray(path, size=16):
    """The one channel of an image that is gray."""
    image = decode(path, size)
    assert image.shape == (3, size, size)
    assert image.dtype == np.uint8
    assert (image == image[:1]).all()
    return image[0]


def png(width, height, depth, kind, rows, *chunks):
    """A PNG of any bit depth and colour type; rows: filter bytes and pixels; chunks before them: (name, content)."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    middle = b"".join(chunk(name, content) for name, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("side", [(64, 64), (37, 90), (200, 120), (1, 50)])
@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGB", "jpg", {"quality": 90}),
        ("RGB", "jpg", {"progressive": True}),
        ("L", "jpg", {}),
        ("CMYK", "jpg", {}),
        ("RGB", "png", {}),
        ("L", "png", {}),
        ("P", "png", {}),
        ("1", "png", {}),
        ("RGB", "webp", {}),
        ("RGB", "bmp", {}),
        ("RGB", "ppm", {}),
        ("L", "pgm", {}),
        ("RGB", "tif", {"compression": "tiff_lzw"}),
        ("P", "gif", {}),
    ],
)
def test_ordinary_images_keep_every_bit(tmp_path, mode, suffix, options, side, size):
    path = saved(Image.fromarray(noise(*side, 3)).convert(mode), tmp_path / f"x.{suffix}", **options)
    assert np.array_equal(decode(path, size), before(path, size))


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (RAMP.astype(np.uint16), "png"),
        (RAMP.astype(np.uint16), "tif"),
        (RAMP.astype(">u2"), "tif"),
        (RAMP.astype(np.int32), "tif"),
        (RAMP.astype(np.int32), "pgm"),
        ((RAMP / 65535).astype(np.float32), "tif"),
    ],
)
def test_more_than_8_bits_are_scaled(tmp_path, values, suffix):
    assert np.array_equal(gray(saved(Image.fromarray(values), tmp_path / f"x.{suffix}")), LEVELS)


def test_16_bits_are_rounded_not_cut(tmp_path):
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16).repeat(8, 0)
    path = saved(Image.fromarray(values), tmp_path / "x.png")
    assert gray(path, 8)[0].tolist() == [0, 0, 1, 1, 2, 254, 255, 255]


def test_a_set_of_dark_16_bit_images_stays_dark(tmp_path):
    path = saved(Image.fromarray((RAMP / 257).astype(np.uint16)), tmp_path / "x.png")  # 0 to 255 of 65,535
    assert gray(path).max() == 1


def patched(path, tag, value):
    """Give a little-endian TIFF's tag (of one short) another value."""
    content = path.read_bytes()
    at = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    path.write_bytes(content[:at] + struct.pack("<H", value) + content[at + 2 :])
    return path


def test_16_bit_tiffs_whose_zero_is_white_are_inverted(tmp_path):
    path = saved(Image.fromarray(RAMP.astype(np.uint16)), tmp_path / "x.tif")
    assert np.array_equal(gray(patched(path, 262, 0)), 255 - LEVELS)


def tiff(pixels, **tags):
    """A little-endian TIFF of one strip or tile; tags: t258=12 and so on, t273 and t324 say where the pixels are."""
    entries = sorted({int(name[1:]): value for name, value in tags.items()}.items())
    start = 8 + 2 + 12 * len(entries) + 4
    found = [(tag, start if tag in (273, 324) else value) for tag, value in entries]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in found)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + b"\0" * 4 + pixels


def test_12_bit_tiffs_have_a_scale_of_their_own(tmp_path):
    content = tiff(b"\xff\xf8\x00", t256=2, t257=1, t258=12, t259=1, t262=1, t273=0, t277=1, t278=1, t279=3)
    (tmp_path / "x.tif").write_bytes(content)  # 4095 and 2048
    wide = Image.fromarray(np.array([[255, 128]], np.uint8)).resize((4, 2), Image.Resampling.BILINEAR)
    assert np.array_equal(gray(tmp_path / "x.tif", 2), np.asarray(wide)[:, 1:3])


def test_a_small_image_in_a_huge_tile_is_refused(tmp_path):
    sides = {"t256": 4, "t257": 4, "t258": 8, "t322": 40_000, "t323": 40_000}  # 1.6 GB for 16 pixels
    (tmp_path / "x.tif").write_bytes(tiff(b"", **sides, t259=8, t262=1, t277=1, t324=0, t325=0))
    with pytest.raises(ValueError, match=r"x\.tif: .*40000x40000 pixels"):
        decode(tmp_path / "x.tif", 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP / 257).astype(np.int32), "32-bit integers from 0 to 255 have no known scale"),
        ((RAMP * 30000).astype(np.int32), "from 0 to 1966050000 have no known scale"),
        ((RAMP - 5).astype(np.int32), "from -5 to 65530 have no known scale"),
        ((RAMP / 257).astype(np.float32), "floats from 0 to 255 have no known scale; allowed: 0 to 1"),
        (np.full((4, 4), -0.1, np.float32), "floats from -0.1 to"),
        (np.array([[0, np.nan], [0, 1]], np.float32), "floats from nan"),
        (np.array([[0, np.inf], [0, 1]], np.float32), "to inf have no known scale"),
    ],
)
def test_values_without_a_known_scale_are_refused(tmp_path, values, message):
    path = saved(Image.fromarray(values), tmp_path / "odd one.tif")
    with pytest.raises(ValueError, match=message) as caught:
        decode(path, 8)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGBA", "png", {}),
        ("LA", "png", {}),
        ("RGBA", "webp", {"lossless": True, "exact": True}),
        ("RGBA", "tif", {}),
        ("LA", "tif", {}),
        ("PA", "tif", {}),
        ("RGBA", "gif", {}),
    ],
)
def test_a_black_drawing_on_transparent_ground_is_black_on_white(tmp_path, mode, suffix, options):
    drawing = np.zeros((16, 16, 4), np.uint8)
    drawing[4:8, :, 3] = 255
    path = saved(Image.fromarray(drawing).convert(mode), tmp_path / f"x.{suffix}", **options)
    expected = np.full((16, 16), 255)
    expected[4:8] = 0
    assert np.array_equal(gray(path), expected)


def test_half_transparent_is_half_white(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 3] = 100
    assert (gray(saved(Image.fromarray(array), tmp_path / "x.png"), 4) == 155).all()
    premultiplied = saved(Image.fromarray(array).convert("LA"), tmp_path / "x.tif")
    patched(premultiplied, 338, 1)  # ExtraSamples: alpha is in the values already
    with Image.open(premultiplied) as image:
        assert image.mode == "La"
    assert (gray(premultiplied, 4) == 155).all()


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    array = noise(40, 30, 4)
    array[..., 3] = 255
    path = saved(Image.fromarray(array), tmp_path / "x.png")
    assert np.array_equal(decode(path, 16), before(path, 16))


@pytest.mark.parametrize(
    ("depth", "kind", "rows", "transparent", "expected"),
    [
        (8, 0, b"\0\x07\x09", struct.pack(">H", 7), [255, 9]),
        (8, 2, b"\0\x07\x07\x07\x09\x09\x09", struct.pack(">3H", 7, 7, 7), [255, 9]),
        (1, 0, b"\0\x40", struct.pack(">H", 0), [255, 255]),
        (2, 0, b"\0\x10", struct.pack(">H", 0), [255, 85]),
        (2, 0, b"\0\x10", struct.pack(">H", 1), [0, 255]),
        (16, 0, struct.pack(">x2H", 258, 2570), struct.pack(">H", 258), [255, 10]),
        (16, 2, struct.pack(">x6H", 258, 258, 258, 2570, 2570, 2570), struct.pack(">3H", 258, 258, 258), [255, 10]),
    ],
)
def test_a_transparent_colour_is_white_at_any_bit_depth(tmp_path, depth, kind, rows, transparent, expected):
    path = tmp_path / "x.png"
    path.write_bytes(png(2, 1, depth, kind, rows, (b"tRNS", transparent)))
    assert gray(path, 1).shape == (1, 1)
    wide = Image.fromarray(np.array([expected], np.uint8)).convert("RGB").resize((4, 2), Image.Resampling.BILINEAR)
    assert np.array_equal(gray(path, 2), np.asarray(wide)[:, 1:3, 0])


def test_partly_transparent_palettes_are_composited(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 10, 10, 200, 200, 200])
    path = saved(image.resize((8, 4), Image.Resampling.NEAREST), tmp_path / "x.png", transparency=bytes([0, 255]))
    assert set(gray(path, 4)[:, 0].tolist()) == {255}
    assert set(gray(path, 4)[:, 3].tolist()) == {200}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.full((40, 80, 3), 30, np.uint8)
    upright[:20, :40] = 220  # a bright corner, top left
    stored = Image.fromarray(upright)
    inverse = decoding._TURNS | {
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }  # the others are their own
    if orientation != 1:
        stored = stored.transpose(inverse[orientation])
    path = saved(stored, tmp_path / f"x.{suffix}", exif=exif)
    image = decode(path, 4).astype(int)[0]
    reference = decode(saved(Image.fromarray(upright), tmp_path / f"upright.{suffix}"), 4).astype(int)[0]
    assert abs(image - reference).max() <= 3
    assert image[0, 0] > 200
    assert image[3, 3] < 50


def test_exif_that_can_not_be_parsed_says_nothing(tmp_path):
    path = saved(Image.fromarray(noise(20, 30, 3)), tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(decode(path, 8), before(path, 8))


def test_lab_is_converted(tmp_path):
    lab = Image.new("LAB", (8, 8), (136, 208, 195))  # sRGB red: L 53, a 80, b 67
    red = decode(saved(lab, tmp_path / "x.tif"), 8)[:, 0, 0].astype(int)
    assert abs(red - [255, 0, 0]).max() <= 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (10, 200)]
    path = saved(frames[0], tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert abs(gray(path, 8).astype(int) - 10).max() <= 2


def test_a_picture_with_the_content_of_a_program_starts_nothing(tmp_path, monkeypatch):
    eps = BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    (tmp_path / "x.png").write_bytes(eps.getvalue())
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    with pytest.raises(ValueError, match=r"x\.png: can not be decoded as an image: its content is none of BMP, GIF"):
        decode(tmp_path / "x.png", 8)


def test_sides_and_areas_are_bounded_before_a_pixel_is_decoded(tmp_path):
    for width, height in ((1, 300_000), (300_000, 1), (65_000, 2_000), (9_500, 9_500), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "x.png").write_bytes(png(width, height, 8, 0, b"\0"))
        with pytest.raises(ValueError, match=r"x\.png: .*pixels"):
            decode(tmp_path / "x.png", 8)


def test_a_long_strip_takes_little_memory_and_comes_out_as_ever(tmp_path, monkeypatch):
    rows = noise(65_535, 2)
    rows[:, 0] = 0  # each row's filter
    (tmp_path / "x.png").write_bytes(png(1, 65_535, 8, 0, rows.tobytes()))
    decode(tmp_path / "x.png", 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strip = decode(tmp_path / "x.png", 64)  # 64 x 4,194,240 pixels if resized whole: 800 MB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * (1 if sys.platform == "darwin" else 1024) < 2e8
    monkeypatch.setattr(decoding, "LARGEST_RESIZED", 2**40)
    (tmp_path / "y.png").write_bytes(png(1, 2_001, 8, 0, rows[31_767:33_768].tobytes()))
    assert np.array_equal(strip, before(tmp_path / "y.png", 64))  # the middle, exactly


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_cut_before_or_after_it_is_resized_a_strip_is_the_same(width, height, size):
    rgb = Image.fromarray(noise(height, width, 3, seed=width))
    whole = decoding._middle(rgb, size).astype(int)
    limit, decoding.LARGEST_RESIZED = decoding.LARGEST_RESIZED, 0
    try:
        assert abs(decoding._middle(rgb, size) - whole).max() <= 1
    finally:
        decoding.LARGEST_RESIZED = limit


def test_what_is_no_file_of_a_sensible_size_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(8 * 2**30)  # a sparse one
    (tmp_path / "broken.pgm").write_text("P2 2 2 255\n0 1 two 3")
    for name, message in (
        ("fifo.png", "not a regular file"),
        ("folder.png", "Is a directory"),
        ("nowhere.png", "No such file"),
        ("empty.png", "its content is none of"),
        ("endless.png", "not a regular file"),
        ("huge.png", "8589934592 bytes; allowed: 536870912"),
        ("broken.pgm", "can not be decoded"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            decode(tmp_path / name, 8)
        assert str(caught.value).startswith(f"{tmp_path / name}: can not be decoded as an image: ")


def _samples():
    """Small valid files of every format and of all modes that Pillow writes."""
    colour, alpha = Image.fromarray(noise(12, 10, 3)), Image.fromarray(noise(12, 10, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(RAMP.astype(np.uint16))
    cases = [
        *((colour.convert(mode), "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        (colour, "PNG", {"exif": exif}),
        (colour, "PNG", {"save_all": True, "append_images": [colour.convert("L")]}),
        (colour.convert("P"), "PNG", {"transparency": bytes(range(256))}),
        (deep, "PNG", {}),
        *((colour.convert(mode), "JPEG", {"exif": exif}) for mode in ("L", "RGB", "CMYK")),
        (colour, "JPEG", {"progressive": True}),
        *((alpha.convert(mode), "WEBP", {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (0, 1)),
        *((colour.convert(mode), "BMP", {}) for mode in ("1", "L", "P", "RGB")),
        *((colour.convert(mode), "PPM", {}) for mode in ("1", "L", "RGB", "F")),
        (deep, "PPM", {}),
        *((alpha.convert(mode), "GIF", {}) for mode in ("L", "RGBA")),
        *((alpha.convert(mode), "TIFF", {}) for mode in ("1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "F", "I")),
        *((alpha.convert("RGB"), "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "jpeg", "tiff_deflate")),
        (alpha.convert("1"), "TIFF", {"compression": "group4"}),
        (deep, "TIFF", {"compression": "packbits"}),
    ]
    for image, kind, options in cases:
        file = BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()
    yield b"P2 2 2 255\n0 1 2 3"
    yield b"P3 1 1 1023\n0 1 1000"
    yield png(4, 1, 2, 0, b"\0\x1b", (b"tRNS", b"\0\1"))
    yield (
        struct.pack("<2sIHHIIiiHHIIIIII", b"BM", 0, 0, 0, 54 + 1024, 40, 4, 2, 1, 8, 1, 0, 0, 0, 256, 0)
        + bytes(range(256)) * 4
        + b"\4\7\0\0\2\1\0\2\5\6\0\1"
    )


SAMPLES = list(_samples())


def tried(path):
    """The image of a file that may be damaged, or the error: one line that names the file."""
    try:
        image = decode(path, 8)
    except ValueError as error:
        message = str(error)
    else:
        assert image.shape == (3, 8, 8)
        assert image.dtype == np.uint8
        return image
    assert message.startswith(f"{path}: can not be decoded as an image: ")
    assert "\n" not in message
    return message


def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path):
    path = tmp_path / "cut.png"
    for content in SAMPLES:
        path.write_bytes(content)
        whole = tried(path)
        if content[:2] in (b"P2", b"P3"):
            content = content.rpartition(b" ")[0]  # a number in digits is a number wherever it is cut
        for length in range(0, len(content), 1 + len(content) // 25):
            path.write_bytes(content[:length])
            found = tried(path)
            assert isinstance(found, str) or np.array_equal(found, whole)


edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut", "drop", "number"]), st.integers(0, 2**16), st.integers(0, 2**32 - 1)
    ),
    min_size=1,
    max_size=6,
)


def mutated(content, changes):
    data = bytearray(content)
    for kind, where, value in changes:
        at = where % max(1, len(data))
        if kind == "set":
            data[at : at + 1] = bytes([value % 256])
        elif kind == "insert":
            data[at:at] = value.to_bytes(4, "little")
        elif kind == "cut":
            del data[max(1, at) :]
        elif kind == "drop":
            del data[at : at + value % 9]
        else:
            data[at : at + 4] = value.to_bytes(4, "big")
    return bytes(data)


def check_damaged(path, examples):
    """However a valid file is damaged: an image of the right shape, or a ValueError of one line that names the file."""
    slowest = 0.0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.sampled_from(SAMPLES), edits)
    def check(content, changes):
        nonlocal slowest
        path.write_bytes(mutated(content, changes))
        started = time.monotonic()
        tried(path)
        slowest = max(slowest, time.monotonic() - started)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert slowest < 10
    assert grown < 3e8


def test_damaged_files_are_images_or_named_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST_AREA", 2**22)
    check_damaged(tmp_path / "damaged.png", 1_000)


@pytest.mark.slow
def test_damaged_files_are_images_or_named_errors_for_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST_AREA", 2**22)
    check_damaged(tmp_path / "damaged.png", 150_000)
