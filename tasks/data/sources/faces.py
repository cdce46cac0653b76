"""Characters rendered in the text faces that matplotlib ships. Needed to rebuild built-in data, never at run time.

The faces are text faces only: no symbol, display, size or fallback faces. Computer Modern's files use the encodings of
TeX, so only their ASCII letters and digits are trusted to be what their code says.

The bytes depend on the FreeType inside matplotlib.ft2font; the built-in files were made with matplotlib 3.11.2.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

FAMILIES = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "STIX General": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10"),
}
FACES = tuple(face for faces in FAMILIES.values() for face in faces)
FACE_FAMILIES = tuple(family for family, faces in FAMILIES.items() for _ in faces)
MADE_WITH = "matplotlib 3.11.2"

SIDE = 32
EM_PIXELS = 28  # capitals are about 20 pixels high
LARGEST = 30  # a larger glyph is rendered at the largest size that fits, so one pixel stays free on every side


@cache
def _font(face: str):  # type: ignore[no-untyped-def]  # the class comes from a compiled module without stubs
    import matplotlib
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"))


def covered(face: str) -> frozenset[str]:
    """The letters and numbers (Unicode categories L and N) that a face has a glyph for."""
    codes = _font(face).get_charmap()
    if FACE_FAMILIES[FACES.index(face)] == "Computer Modern":
        return frozenset(chr(code) for code in codes if code < 128 and chr(code).isalnum())
    return frozenset(chr(code) for code in codes if unicodedata.category(chr(code))[0] in "LN")


def render(face: str, character: str) -> np.ndarray | None:
    """A glyph centred by its ink, unhinted, antialiased: uint8 (32, 32), ink 255. None if the face draws no ink."""
    em = EM_PIXELS
    ink = draw(face, character, em)
    while ink is not None and max(ink.shape) > LARGEST:
        em -= 1
        ink = draw(face, character, em)
    if ink is None:
        return None
    height, width = ink.shape
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    image[top : top + height, left : left + width] = ink
    return image


def draw(face: str, character: str, em: int) -> np.ndarray | None:
    """A glyph at `em` pixels per em, cut to its ink: uint8 (H, W). None if there is no ink."""
    from matplotlib.ft2font import LoadFlags

    font = _font(face)
    font.set_size(em, 72)  # at 72 dots per inch a point is a pixel
    glyph = font.load_char(ord(character), flags=LoadFlags.NO_HINTING | LoadFlags.NO_BITMAP)
    canvas = np.zeros((3 * em + 8, 3 * em + 8), np.uint8)
    font.draw_glyph_to_bitmap(canvas, 4, 4, glyph)
    rows, columns = np.flatnonzero(canvas.any(axis=1)), np.flatnonzero(canvas.any(axis=0))
    if not len(rows):
        return None
    return canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
