"""A figure as a value: what was drawn, the numbers behind it, what must be said beside it; and its files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from results import files
from results.escape import one_line
from results.figures import style
from results.figures.compact import compact, in_tags
from results.metrics import nearest
from results.tables.stems import file_stems

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        name: stem of its files.
        title: one line, not drawn: a paper's figure has its caption instead.
        figure: of matplotlib; n and seeds stand in it.
        alt: what a reader who can not see it is told: kind, axes, what is compared, the finding in a sentence.
        caption: sentences, as those under a table.
        data: the numbers that are drawn, one mapping per mark (a point, a bar, a cell), in printed units, so that
            tests and screen readers read what eyes see.
        task: the task that it is about; "" if about several.
    """

    name: str
    title: str
    figure: Figure
    alt: str
    caption: tuple[str, ...] = ()
    data: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    task: str = ""
    _drawn: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def words(self) -> str:
        """Title, caption and alternative text, each a line of plain text."""
        lines = (self.title, " ".join(self.caption), f"Alternative text: {self.alt}")
        return "".join(f"{one_line(line)}\n" for line in lines if line)

    def svg(self, prefix: str = "") -> str:
        """The figure as one <svg> element to stand in a page: no XML head, ids that begin with `prefix`, colours and
        texts kept as texts, nothing that loads anything."""
        text = self._drawn.get("svg") or self._drawn.setdefault("svg", self._draw_svg())
        if prefix:
            text = in_tags(text, lambda tag: re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag))
        return text

    def _draw_svg(self) -> str:
        stream = io.StringIO()
        with style.style({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self._save(stream, "svg", {"Date": None, "Creator": None})
        return compact(stream.getvalue())

    def write(self, file: Path) -> None:
        """Write the figure whole or not at all, in the format of the file's ending."""
        kind = file.suffix.removeprefix(".")
        metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
        with style.style({"svg.hashsalt": self.name}), files.replacing(file) as stream:
            self._save(stream, kind, metadata)

    def _save(self, stream: IO[Any], kind: str, metadata: dict[str, Any]) -> None:
        import matplotlib as mpl

        style.settle(self.figure)
        with style.in_print(self.figure):  # not by savefig, which draws the figure once more for it
            box = self.figure.get_tightbbox().frozen()
        self.figure.savefig(
            stream, format=kind, metadata=metadata, bbox_inches=box.padded(mpl.rcParams["savefig.pad_inches"])
        )


def write_drawings(
    drawings: Sequence[Drawing], folder: str | Path, formats: Sequence[str] = ("pdf", "svg")
) -> list[Path]:
    """Write every drawing in every format, NAME.pdf, NAME.svg, NAME.png, and return the files. NAME.txt has its caption
    and the text for those who can not see it.

    Raises:
        ValueError: an unknown format (with the nearest). Nothing is written then.
        OSError: the folder can not be made, or a file not be written; the files before it are.
    """
    formats = check_formats(formats)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_folder(folder)
    written = []
    for stem, drawing in zip(file_stems([d.name for d in drawings]), drawings, strict=True):
        for name in formats:
            drawing.write(folder / f"{stem}.{name}")
            written.append(folder / f"{stem}.{name}")
        with files.replacing(folder / f"{stem}.txt") as stream:
            stream.write(drawing.words.encode())
        written.append(folder / f"{stem}.txt")
    return written


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once. Raises ValueError for an unknown one (with the nearest)."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f'unknown format "{name}"; formats: {", ".join(FORMATS)}{nearest(name, FORMATS)}')
    return tuple(dict.fromkeys(formats))
