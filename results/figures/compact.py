"""An SVG of matplotlib in less than half of its letters: the same picture.

matplotlib wraps each artist in groups that only name it, repeats looks and font with every mark, and writes six digits
of a point. What is left here is what is drawn; numbers of places are cut to hundredths of a point. Texts, which may
hold whatever people call a norm, are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_TAG = re.compile(r"(<[^>]*>)")
_PLACES = re.compile(r'\s(?:d|x|y|points)="[^"]*"|(?:translate|rotate)\([^)]*\)')
_TURNED_BY_NOTHING = re.compile(r'\stransform="rotate\(-?0 [^)]*\)"')
_ID = re.compile(r'\sid="([^"]*)"')
_TO = re.compile(r'(href="|url\()#([^")]+)')
_STYLE = re.compile(r'\sstyle="([^"]*)"')
_FONT = "font-family: 'DejaVu Sans'"


def compact(svg: str) -> str:
    """The <svg> element of a file, with the same marks and texts. Ids are a0, a1, ... of what is referred to."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    parts = list(_without_wrappers(_TAG.split(svg)))
    tags = [part for part in parts if part.startswith("<")]
    names = {name: f"a{i}" for i, name in enumerate(dict.fromkeys(to for tag in tags for _, to in _TO.findall(tag)))}
    looks = {found[1]: _STYLE.findall(tag) for tag in tags if (found := _ID.search(tag))}

    def shorter(tag: str) -> str:
        if tag.startswith("<use"):  # it has the look of what it uses, unless it says another
            own = _TO.search(tag)
            tag = _STYLE.sub("", tag) if own and looks.get(own[2]) == _STYLE.findall(tag) else tag
        tag = _PLACES.sub(lambda found: _places(found[0]), _TURNED_BY_NOTHING.sub("", tag))
        tag = _ID.sub(lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", tag)
        tag = _TO.sub(lambda found: f"{found[1]}#{names[found[2]]}", tag)
        return _STYLE.sub(lambda found: _look(found[1]), tag)

    head, *rest = parts
    return head.replace("<svg", f'<svg style="{_FONT}"', 1) + in_tags("".join(rest), shorter)


def in_tags(svg: str, change: Callable[[str], str]) -> str:
    """An SVG with every tag changed, and texts as they are."""
    return _TAG.sub(lambda found: change(found[0]), svg)


def _places(text: str) -> str:
    """Coordinates in hundredths, without the blanks that a path does not need."""
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    text = re.sub(r"\.0+(?!\d)|(?<=\.\d)0(?!\d)", "", text)
    if not text.startswith(' d="'):
        return text
    return ' d="' + re.sub(r"\s*([A-Za-z])\s*", r"\1", text[4:-1]).strip() + '"'


def _look(style: str) -> str:
    """A style without the font, which stands once at the top."""
    kept = [entry.replace(": ", ":") for entry in style.split("; ") if entry != _FONT]
    return f' style="{";".join(kept)}"' if kept else ""


def _without_wrappers(parts: list[str]) -> Iterator[str]:
    """Tags and texts, less groups that have no look, and the white space between tags."""
    dropped: list[bool] = []  # of each group around
    for part in parts:
        if part == "</g>":
            if not dropped.pop():
                yield part
        elif part.startswith("<g") and not part.endswith("/>"):
            dropped.append(re.fullmatch(r'<g(\sid="[^"]*")?>', part) is not None)
            if not dropped[-1]:
                yield part
        elif part.strip():
            yield part
