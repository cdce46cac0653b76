"""One image file -> uint8 RGB of one size: which files are read, and what becomes of modes that are not 8-bit RGB.

Read are regular files of at most LARGEST_FILE bytes whose content is one of FORMATS, whatever their names say; no side
above LARGEST_SIDE and no area above LARGEST_AREA pixels, by the header, before a pixel is decoded. Of animations and
files of several pages the first image counts. Everything else is refused by a ValueError that names the file.

- 16-bit gray: divided by 257 and rounded, so 0 to 65,535 becomes 0 to 255 (of a 12-bit TIFF: 0 to 4,095). The file's
  own range counts, not that of its values: 12-bit values in a 16-bit file stay dark. 16-bit colour: its high bytes.
- 32-bit integers have no scale of their own. As 16-bit where they come from a format that scales to 65,535 (PGM), or
  lie within 0 to 65,535 and exceed 255; all others are refused: up to 255 they may be meant as 8 or as 16 bits.
- float: 0 to 1 is multiplied by 255 and rounded. Values outside, NaN among them, are refused.
- transparency (an alpha channel, a transparent palette entry, a transparent colour): composited on white.
- EXIF's (or XMP's) orientation: turned. EXIF that can not be parsed, as many photographs have, says nothing.
- 1-bit, palettes, YCbCr and CMYK as Pillow converts them; L*a*b* by littleCMS to sRGB. Embedded profiles are ignored.
"""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from tasks.data.crops import Box, Crop

DECODING = 2  # raised when some file is decoded in another way: it enters the checksum of lazily decoded sets
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # a fixed list: Pillow's others start Ghostscript (EPS)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
LARGEST_FILE = 512 * 2**20  # bytes
LARGEST_SIDE = 65_535  # pixels: what JPEG and GIF can hold
LARGEST_AREA = 2**30 // 12  # pixels, 89 million: a quarter of a GiB as RGB, where Pillow warns
LARGEST_RESIZED = 2**24  # pixels; a long strip is cut before it is resized where it would become larger than this

_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323  # TIFF tags
_WHITE_IS_ZERO = 0
_SIDEWAYS = 5  # orientations from here on exchange width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: Path, size: int, crop: Crop | None = None, shorter: int | None = None) -> np.ndarray:
    """An image file as uint8 (3, size, size): RGB, shorter side resized (bilinear), middle kept; or a crop of it.

    Args:
        path: of the file.
        size: of both sides, in pixels.
        crop: of the whole image, resized (bilinear, with antialias) whatever its sides; None: the middle.
        shorter: what the shorter side is resized to before the middle is cut; None: `size`.

    Raises:
        ValueError: the file is not an image that is read, by the rules above; names it.
    """
    try:
        # Pillow warns about files (damaged EXIF, large images); what a file becomes must not depend on who listens
        with warnings.catch_warnings(), regular_file(path) as file:
            warnings.simplefilter("ignore")
            shorter = shorter or size
            rgb, full = _read(file, size if crop else shorter, crop)
            return (
                _middle(rgb, size, shorter)
                if crop is None
                else _cropped(rgb, size, crop.box(*full), full, crop.mirrored)
            )
    except Exception as error:  # Pillow raises a dozen kinds for damaged files, struct.error and KeyError among them
        raise ValueError(f"{path}: can not be decoded as an image: {reason(error)}") from error


@contextmanager
def regular_file(path: Path) -> Iterator[BufferedReader]:
    """The file, open; links are followed. Raises OSError, or ValueError: no regular file, too large (not named)."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for its writer

    with open(path, "rb", opener=opener) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > LARGEST_FILE:
            raise ValueError(f"{found.st_size} bytes; allowed: {LARGEST_FILE}")
        yield file


def _read(file: BufferedReader, size: int, crop: Crop | None) -> tuple[Image.Image, tuple[int, int]]:
    """The first image of a file, RGB of 8 bits and turned the right way up, perhaps at a fraction of its size that is
    enough for `size` pixels a side; and its own size."""
    with Image.open(file, formats=FORMATS) as image:
        _check_size(*image.size)
        tags = getattr(image, "tag_v2", {})
        _check_size(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1))  # a small TIFF may lie in a huge tile
        raw_mode = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
        stored = image.size
        # lets the JPEG decoder skip detail that would be thrown away
        image.draft("RGB", (size, size) if crop is None else _enough(image, size, crop))
        image.load()
        if not isinstance(image, JpegImageFile):
            stored = image.size  # a GIF's first frame may be larger than its header says
            _check_size(*stored)
        rgb = _rgb(image, raw_mode)
        orientation = _orientation(image)  # after loading: Pillow turns a TIFF by itself and drops the tag
    turn = _TURNS.get(orientation)
    if turn is None:
        return rgb, stored
    return rgb.transpose(turn), stored[::-1] if orientation >= _SIDEWAYS else stored


def _enough(image: Image.Image, size: int, crop: Crop) -> tuple[int, int]:
    """The smallest size of a JPEG, as it is stored, at which its crop has `size` pixels a side."""
    if not isinstance(image, JpegImageFile):
        return image.size  # other decoders skip nothing; a PNG would be loaded to look for its orientation
    width, height = image.size
    left, top, right, bottom = crop.box(*((height, width) if _orientation(image) >= _SIDEWAYS else (width, height)))
    part = min(right - left, bottom - top) / size
    return math.ceil(width / part), math.ceil(height / part)


def _check_size(width: int, height: int) -> None:
    if max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
        raise ValueError(f"{width}x{height} pixels; allowed: sides to {LARGEST_SIDE}, areas to {LARGEST_AREA}")


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001  not parsed: as if there were none
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image, raw_mode: str) -> Image.Image:
    """A loaded image as RGB of 8 bits. raw_mode: how a PNG stores its pixels, "" for other formats."""
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "I":
        return _from_integers(image)
    if image.mode == "F":
        return _from_float(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert converted is not None  # it is, where nothing is converted in place
        return converted
    transparent_palette = image.palette is not None and image.palette.mode == "RGBA"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent_palette or "transparency" in image.info:
        return _on_white(image, raw_mode)
    return image.convert("RGB")


def _on_white(image: Image.Image, raw_mode: str) -> Image.Image:
    colour = image.info.get("transparency")
    # Pillow leaves a PNG's transparent colour as the file has it and scales the pixels to 8 bits: scale it alike
    if image.mode == "RGB" and isinstance(colour, tuple) and "16" in raw_mode:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.mode == "L" and isinstance(colour, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = colour * 255 // (2 ** int(raw_mode[2:]) - 1)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    ground = Image.new("RGB", image.size, _WHITE)
    ground.paste(rgba, mask=rgba.getchannel("A"))
    return ground


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint16)  # in the machine's byte order
    tags = getattr(image, "tag_v2", {})
    full = 4095 if tags.get(_BITS) == (12,) else 65535
    if values.max() > full:
        raise ValueError(f"values up to {values.max()} in a file of 12 bits")
    gray = _to_8_bit(values, full)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow minds this up to 8 bits only
        gray = 255 - gray
    if isinstance(image.info.get("transparency"), int):
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    scaled = image.format in ("PPM", "PNG")  # to 65,535, by the format
    if low < 0 or high > 65535 or (high <= 255 and high > 0 and not scaled):
        raise ValueError(
            f"32-bit integers from {low} to {high} have no known scale; "
            "allowed: 0 to 65535, above 255 somewhere (or save it with 8 or 16 bits)"
        )
    return Image.fromarray(_to_8_bit(values, 65535)).convert("RGB")


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # true of NaN
        raise ValueError(
            f"floats from {low:g} to {high:g} have no known scale; allowed: 0 to 1 (or save it with 8 bits)"
        )
    return Image.fromarray(np.rint(values * np.float32(255)).astype(np.uint8)).convert("RGB")


def _to_8_bit(values: np.ndarray, full: int) -> np.ndarray:
    """round(values * 255 / full), exactly: full and 255 * values + full // 2 are integers, and no half occurs."""
    return ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def _middle(rgb: Image.Image, size: int, shorter: int | None = None) -> np.ndarray:
    shorter = shorter or size
    scale = shorter / min(rgb.size)
    width, height = (max(shorter, round(side * scale)) for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= LARGEST_RESIZED:
        resized = rgb.resize((width, height), Image.Resampling.BILINEAR)
        square = resized.crop((left, top, left + size, top + size))
    else:
        # the same pixels but for the last digits of their weights, without the rest of the strip
        x, y = rgb.width / width, rgb.height / height
        box = (left * x, top * y, min((left + size) * x, rgb.width), min((top + size) * y, rgb.height))
        square = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square, np.uint8).transpose(2, 0, 1).copy()


def _cropped(rgb: Image.Image, size: int, box: Box, full: tuple[int, int], mirrored: bool) -> np.ndarray:
    """A box of an image of `full` pixels, of which `rgb` is the whole at the same or a smaller size."""
    left, right = (box[side] * rgb.width / full[0] for side in (0, 2))
    top, bottom = (box[side] * rgb.height / full[1] for side in (1, 3))
    x, y = math.floor(left), math.floor(top)
    # cut before it is resized, so that nothing from outside is mixed in
    cut = rgb.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    square = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR, box=inside), np.uint8).transpose(2, 0, 1)
    return (square[:, :, ::-1] if mirrored else square).copy()


def reason(error: Exception) -> str:
    """One short line; the errors of the system and of Pillow name the file a second time."""
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}, or damaged"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:160] or type(error).__name__
