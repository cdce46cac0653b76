"""How wide a text will be in LaTeX: by the widths of Computer Modern, the widest of the usual fonts of papers.

What can not be known here: a journal's own font (Times is about 8 % narrower) and size of \\footnotesize.
"""

from __future__ import annotations

import unicodedata

from results.escape import one_line

# fmt: off
_REGULAR = """
295 531 885 531 885 826 295 413 413 531 826 295 354 295 531 531 531 531 531 531 531 531 531 531 531 295 295 295 826
502 502 826 796 752 767 811 723 693 834 796 383 545 825 664 973 796 826 723 826 782 590 767 796 796 1091 796 796 649
295 531 295 531 295 295 531 590 472 590 472 325 531 590 295 325 561 295 885 590 531 590 561 414 419 413 590 561 767
561 561 472 531 1063 531 531
"""
_BOLD = """
373 636 1021 613 1021 953 340 476 476 613 953 340 408 340 613 613 613 613 613 613 613 613 613 613 613 340 340 373
953 578 578 953 922 869 885 938 803 769 962 955 459 631 956 735 1159 955 920 835 920 915 681 852 939 922 1263 922
922 749 340 636 340 613 340 340 595 681 544 681 561 374 613 681 340 374 647 340 1021 681 613 681 647 506 483 476 681
647 885 647 647 544 613 1225 613 613
"""
# fmt: on
"""Thousandths of an em of the characters "!" to "~" in cmr8 and cmbx8, from their font metrics."""

_WIDTHS = {
    bold: dict(zip(map(chr, range(33, 127)), map(int, text.split()), strict=True))
    for bold, text in ((False, _REGULAR), (True, _BOLD))
}
_STRETCH = {5: 1.29, 6: 1.15, 7: 1.08, 8: 1.0, 9: 0.97, 10: 0.945}
"""Ems of a character at this size, of those at 8 pt: small fonts are wider."""
# fmt: off
_OTHERS = {
    " ": 354, "±": 826, "×": 826, "−": 826, "†": 472, "·": 295, "…": 1300, "—": 1063, "–": 531,
    "↑": 531, "↓": 531, "→": 1063, "←": 1063,
    # as they are escaped: from the fonts of mathematics
    "<": 826, ">": 826, "\\": 531, "{": 531, "}": 531, "|": 295, "_": 340,
}
# fmt: on
_WIDEST = 1000


def text_width(text: str, points: int, bold: bool = False) -> float:
    """The width in pt of a text that `escape_latex` writes, in Computer Modern of a size of 5 to 10 pt.

    Kerning and ligatures are ignored; for a character that is not known the widest one is taken.
    """
    text = unicodedata.normalize("NFC", one_line(text))
    thousandths = sum(_character(c, bold) for c in text)
    return thousandths / 1000 * points * _STRETCH[points]


def _character(c: str, bold: bool) -> int:
    if c in _OTHERS:
        return _OTHERS[c]
    base = unicodedata.normalize("NFD", c)[:1]
    if base in _WIDTHS[bold]:
        return _WIDTHS[bold][base]
    if unicodedata.name(c, "").startswith("GREEK"):
        return _WIDEST
    return sum(_WIDTHS[bold][x] for x in f"U+{ord(c):04X}")
