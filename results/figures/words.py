"""The words in and under a figure: names cut to fit, n and seeds, holes, evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from results.escape import columns_of, cut, one_line
from results.metrics import Metric
from results.rows import distinct
from results.statistics import summarize
from results.tables.captions import evidence
from results.tables.pivot import Pivot
from results.tables.table import Cell

LONGEST_NAME = 22
"""Characters of a norm's name in a figure; captions and data have all."""
LONGEST_TOLD = 60
_MOST = 6  # entries of a list in a caption


def drawn(text: str, longest: int = LONGEST_NAME) -> str:
    """Any text as one line that the figures' font can draw; a character without a glyph becomes U+XXXX."""
    known = _glyphs()
    text = "".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in cut(one_line(text), 4 * longest))
    return cut(text, longest) if columns_of(text) > longest else text


def drawn_names(labels: Iterable[str], longest: int = LONGEST_NAME) -> dict[str, str]:
    """label -> its name in a figure; two labels that are cut to the same name get a number."""
    names: dict[str, str] = {}
    for label in labels:
        name, number = drawn(label, longest), 2
        while name in names.values() and label not in names:
            name, number = f"{drawn(label, longest - 4)} #{number}", number + 1
        names[label] = name
    return names


def told(text: str) -> str:
    """Any text as one line of a caption or a description: nothing that does not show, no name longer than a line."""
    return cut(one_line(text), LONGEST_TOLD)


def n_text(counts: Iterable[int]) -> str:
    """'n = 3', or 'n = 2 to 3'."""
    found = sorted(set(counts)) or [0]
    return f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"


def seeds_text(seeds: Iterable[int]) -> str:
    """'seed 3', 'seeds 0-4', 'seeds 0, 2, 5'; of many the first and the last."""
    found = sorted(set(seeds))
    texts = [cut(str(seed), 12) for seed in found]
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"seeds {texts[0]}-{texts[-1]}"
    if len(found) > 8:
        texts = [*texts[:3], "…", texts[-1]]
    return f"seed{'s' * (len(found) != 1)} {', '.join(texts) or 'none'}"


def finite(value: float | None) -> float | None:
    """The value if it can be drawn, else None."""
    return value if value is not None and abs(value) < 1e300 else None


def printed(metric: Metric, values: Iterable[float]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation and n in printed units; None where undefined or beyond what can be drawn."""
    mean, std, n, _ = summarize(values)
    mean = finite(None if mean is None else mean * metric.scale)
    return mean, None if mean is None else finite(None if std is None else std * abs(metric.scale)), n


def holes_lines(cells: Sequence[tuple[str, Cell]]) -> list[str]:
    """A sentence about the cells with holes, if there are any. cells: (where, cell), once for each place."""
    notes = [f"{where}: {cell.note}" for where, cell in cells if cell.holes]
    if not notes:
        return []
    more = f"; and {len(notes) - _MOST} more" if len(notes) > _MOST else ""
    return [f"Holes: {'; '.join(notes[:_MOST])}{more}."]


def sources(part: pd.DataFrame, pivot: Pivot | None = None) -> list[str]:
    """Fixed options that matter to a reader stand in the tables; here: where the runs come from."""
    lines = [f"{pivot.surplus} older runs of the same place are left out."] if pivot and pivot.surplus else []
    return [*lines, *evidence(part)]


def spread_words(counts: Iterable[int], what: str = "band") -> str:
    """What the band shows, or that there is none."""
    found = set(counts)
    if not any(n > 1 for n in found):
        return f"no {what}: one seed"
    return f"{what}: mean ± sample std" + (" where n > 1" if min(found) < 2 else "")


def seeds_of(df: pd.DataFrame) -> list[int]:
    """The seeds of a frame's runs."""
    return [int(seed) for seed in distinct(df["seed"].tolist())]


def listed(pairs: Mapping[str, str]) -> str:
    """'a: x; b: y', of many the first."""
    texts = [f"{key}: {value}" for key, value in pairs.items()]
    return "; ".join(texts[:_MOST]) + (f"; and {len(texts) - _MOST} more" if len(texts) > _MOST else "")


_KNOWN: set[int] = set()


def _glyphs() -> set[int]:
    """The characters of the figures' font."""
    if not _KNOWN:
        from matplotlib import font_manager

        _KNOWN.update(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
    return _KNOWN
