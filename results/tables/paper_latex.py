r"""The table of a paper in LaTeX, as wide as a column of a two-column page, or as both.

The largest font and the widest gaps that fit are taken, whole headings before abbreviated ones; nothing is scaled, so
that every text keeps the size of a paper's text. Where nothing fits, the table is as narrow as it can be and `advice`
says what to do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from results.escape import escape_latex
from results.metrics import nearest
from results.tables.grid import Entry, Grid, grid
from results.tables.latex import CAPTIONS, caption_sentences
from results.tables.marked import LONGEST_SENTENCE
from results.tables.stems import file_stem
from results.tables.styled import escaped, styler
from results.tables.table import Table
from results.tables.widths import text_width

COLUMN_PT, PAGE_PT = 237.0, 492.0
"""The widths of one column and of both, of the narrowest usual two-column pages."""
LIMITS = {"table": COLUMN_PT, "table*": PAGE_PT}
NUMBERS = ("plain", "siunitx")

_SIZES = (("small", 9), ("footnotesize", 8), ("scriptsize", 7))
_WAYS = tuple(
    (short, size, points, gap)
    for short, sizes, gaps in (
        (False, _SIZES[:2], (4.0, 3.0)),
        (True, _SIZES[:2], (4.0, 3.0)),
        (True, _SIZES[2:], (4.0, 3.0, 2.0, 1.5)),
    )
    for size, points in sizes
    for gap in gaps
)
"""Ways to set a table, the best first."""
_SUPERSCRIPT = {9: 6, 8: 6, 7: 5}
_EM = {9: 1.028, 8: 1.063, 7: 1.139}
"""Of Computer Modern, in sizes of the font."""
_SAFETY = 1.005
"""Of the estimate: kerning that is not known, and rounding."""


@dataclass(frozen=True)
class Fit:
    """How a table is set.

    Attributes:
        short: with abbreviated headings.
        size: LaTeX's name of the font size.
        points: that size in a document of 10 pt.
        gap: half the space between two columns, pt.
        width: of the whole table in Computer Modern, pt: an estimate.
        limit: what there is, pt.
    """

    short: bool
    size: str
    points: int
    gap: float
    width: float
    limit: float

    @property
    def fits(self) -> bool:
        return self.width <= self.limit


def fit(table: Table, environment: str = "table", numbers: str = "plain") -> Fit:
    """How a table is set so that it fits, or the narrowest way if it can not."""
    limit = LIMITS[environment]
    tried: list[Fit] = []
    for short, size, points, gap in _WAYS:
        widths = _column_widths(grid(table, short), points, short, numbers)
        width = _SAFETY * sum(widths) + 2 * gap * (len(widths) - 1)
        tried.append(Fit(short, size, points, gap, width, limit))
    return next((found for found in tried if found.fits), min(tried, key=lambda found: found.width))


def advice(table: Table, environment: str = "table", numbers: str = "plain") -> str:
    """What to do if a table is too wide for its place; "" if it fits."""
    found = fit(table, environment, numbers)
    if found.fits:
        return ""
    ways = []
    if environment == "table" and fit(table, "table*", numbers).fits:
        ways.append("environment table*")
    if fit(replace(table, transpose=not table.transpose), environment, numbers).fits:
        ways.append("transpose" if not table.transpose else "no transpose")
    if any(cell is not None and cell.std is not None for row in table.rows for cell in row.cells) and table.spread:
        bare = fit(replace(table, spread=False), environment, numbers)
        ways += ["spread none"] if bare.fits else []
    ways.append("fewer tasks, metrics or settings (where)" if not table.transpose else "fewer norms")
    return (
        f"{table.name}: about {found.width:.0f} pt wide at its narrowest, {found.limit:.0f} pt are there; "
        f"try {', '.join(ways[:-1])}{' or ' if ways[:-1] else ''}{ways[-1]}"
    )


def paper_latex(table: Table, environment: str = "table", caption: str = "short", numbers: str = "plain") -> str:
    r"""The table as one float, a fragment for \input. It needs booktabs, with numbers="siunitx" also siunitx.

    Args:
        table: of `paper_table`.
        environment: "table", a column of 237 pt, or "table*", a page of 492 pt.
        caption: "short"; "full", with every sentence, of very many the last below the table; "none", no caption at
            all: the notes under the table stay.
        numbers: "plain", right-aligned, or "siunitx", aligned at the decimal point by columns of type S.

    Raises:
        ValueError: an unknown environment, caption or kind of numbers (with the nearest).
    """
    check_choices(environment, caption, numbers)
    found = fit(table, environment, numbers)
    made = grid(table, found.short)
    rows = _siunitx(made) if numbers == "siunitx" else _plain(made)
    heads = escaped(made.heads, lambda text: _stacked(_words(text, found.short)))
    shown = styler(heads, escaped(made.labels, escape_latex), rows.cells)
    body = shown.to_latex(
        column_format="@{}" + "l" * len(made.labels[0]) + "".join(rows.columns) + "@{}",
        hrules=True,
        sparse_columns=True,
        sparse_index=False,
        multicol_align="c",
        siunitx=numbers == "siunitx",
    )
    text, rest = (
        " ".join(escape_latex(sentence[:LONGEST_SENTENCE]) for sentence in sentences)
        for sentences in caption_sentences(table, caption)
    )
    title = escape_latex(table.title)
    head = [rf"\caption[{title}]{{{text}}}", rf"\label{{tab:{file_stem(table.name)}}}"]
    notes = [rf"\textsuperscript{{{letter}}}~{escape_latex(note)}" for letter, note in made.notes]
    packages = "booktabs,siunitx" if numbers == "siunitx" else "booktabs"
    note = advice(table, environment, numbers)
    lines = [
        rf"% needs \usepackage{{{packages}}}; about {found.width:.0f} pt wide in Computer Modern",
        *([f"% too wide: {escape_latex(note)}"] if note else []),
        rf"\begin{{{environment}}}[tbp]",
        r"\centering",
        *(head if caption != "none" else []),
        rf"\par\smallskip\{found.size}\setlength{{\tabcolsep}}{{{found.gap:g}pt}}%",
        *([r"\sisetup{detect-weight=true,mode=text}%"] if numbers == "siunitx" else []),
        _ruled(body, made),
    ]
    if notes:
        lines.append(rf"\par\smallskip{{\footnotesize {'; '.join(notes)}\par}}")
    if rest:
        lines.append(rf"\par\smallskip{{\footnotesize\raggedright {rest}\par}}")
    return "\n".join([*lines, rf"\end{{{environment}}}", ""])


def check_choices(environment: str, caption: str, numbers: str) -> None:
    """Raises ValueError, one line for each unknown word, with the nearest."""
    given = (("environment", environment, tuple(LIMITS)), ("caption", caption, CAPTIONS), ("numbers", numbers, NUMBERS))
    wrong = [
        f'{what} "{value}": {" or ".join(allowed)}{nearest(value, allowed)}'
        for what, value, allowed in given
        if value not in allowed
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def notes_latex(table: Table) -> str:
    r"""Everything that must be said of a table, as a fragment for \input: an itemized list."""
    items = [rf"\item {escape_latex(sentence[:LONGEST_SENTENCE])}" for sentence in notes_of(table)]
    return "\n".join([r"\begin{itemize}\footnotesize\raggedright", *items, r"\end{itemize}", ""])


def notes_of(table: Table) -> list[str]:
    """The sentences of a table's note file: all of its caption, its footnotes, and what short labels stand for."""
    shortened = grid(table, short=True).shortened
    named = [f"{short} is {whole}." for short, whole in shortened]
    return [f"{table.title}.", *table.caption, *named, *(f"{letter}: {note}." for letter, note in grid(table).notes)]


# --- cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    columns: list[str]
    cells: list[list[str]]


def _plain(made: Grid) -> _Rows:
    """Right-aligned numbers; room for the widest suffix of a column in each of its cells, so that digits align."""
    cells = []
    widest = [max((e.suffix for e in column), key=_suffix_width, default="") for column in _columns(made)]
    for line in made.entries:
        texts = []
        for entry, suffix in zip(line, widest, strict=True):
            if entry.blank:
                texts.append("")
                continue
            text = escape_latex(entry.mean) if entry.mean else "---"
            text += _spread(entry)
            text = rf"\textbf{{{text}}}" if entry.best else rf"\underline{{{text}}}" if entry.second else text
            room = rf"\phantom{{{_superscript(suffix)}}}" if suffix else ""
            texts.append(text + (rf"\rlap{{{_superscript(entry.suffix)}}}" if entry.suffix else "") + room)
        cells.append(texts)
    return _Rows(["r"] * len(made.heads), cells)


def _siunitx(made: Grid) -> _Rows:
    """Columns of type S, which parse the means; what stands behind them is text, so that siunitx drops no zero."""
    columns, turned = [], []
    for column in _columns(made):
        fixed = [entry for entry in column if entry.digits is not None]
        before = max((_before(entry.mean) for entry in fixed), default=1)
        after = max((entry.digits or 0 for entry in fixed), default=0)
        minus = "-" if any(entry.mean.startswith("-") for entry in fixed) else ""
        behind = _behind(max(column, key=lambda entry: _behind_width(entry, 8, False)))
        options = [f"table-format={minus}{before}.{after}"]
        options += [f"table-space-text-post={{{behind}}},table-align-text-after=false"] if behind else []
        columns.append(f"S[{','.join(options)}]")
        turned.append([_number_cell(entry, before, behind) for entry in column])
    return _Rows(columns, [list(line) for line in zip(*turned, strict=True)])


def _number_cell(entry: Entry, before: int, widest: str) -> str:
    if entry.blank:
        return "{}"
    if entry.digits is None:
        return f"{{{escape_latex(entry.mean) if entry.mean else '---'}{_behind(entry)}}}"
    if not entry.second:
        behind = _behind(entry)
        return (r"\bfseries " if entry.best else "") + entry.mean + (f" {{{behind}}}" if behind else "")
    # an underlined number can not be parsed: it stands in braces, in a box as wide as the others'
    filler = rf"\phantom{{{'0' * (before - _before(entry.mean))}}}" if before > _before(entry.mean) else ""
    text = rf"\underline{{{escape_latex(entry.mean)}{_spread(entry)}}}"
    suffix = _superscript(entry.suffix) if entry.suffix else ""
    return rf"{{{filler}\rlap{{{text}{suffix}}}\phantom{{{escape_latex(entry.mean)}{widest}}}}}"


def _spread(entry: Entry) -> str:
    return rf"\,$\pm$\,{escape_latex(entry.std)}" if entry.std else ""


def _behind(entry: Entry) -> str:
    """What stands behind a mean."""
    return _spread(entry) + (_superscript(entry.suffix) if entry.suffix else "")


def _before(number: str) -> int:
    """Digits before the decimal point."""
    return len(number.removeprefix("-").partition(".")[0])


def _superscript(text: str) -> str:
    return rf"\textsuperscript{{{escape_latex(text)}}}"


def _columns(made: Grid) -> list[tuple[Entry, ...]]:
    return list(zip(*made.entries, strict=True))


# --- headings and widths ---------------------------------------------------------------------------------------------


def _words(text: str, short: bool) -> list[str]:
    """The lines of a heading: a short one has a word on each."""
    return [word.rstrip() for word in re.split(r"(?<=[ _])", text) if word.strip()] if short and text else [text]


def _stacked(words: Sequence[str]) -> str:
    text = r"\\".join(map(escape_latex, words))
    return rf"\shortstack{{{text}}}" if len(words) > 1 else text


def _ruled(body: str, made: Grid) -> str:
    """The tabular with rules under headings that stand over several columns, and the corner's text."""
    lines = body.rstrip().split("\n")
    top = lines.index(r"\toprule")
    levels = len(made.heads[0])
    rules, start = [], len(made.labels[0]) + 1
    for over, group in itertools.groupby(made.heads, key=lambda head: head[0]):
        count = len(list(group))
        if over and count > 1 and levels > 1:
            rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    if rules:
        lines.insert(top + 2, "".join(rules))
    last = lines.index(r"\midrule") - 1
    lines[last] = escape_latex(made.corner) + " " + lines[last].removeprefix("{}").lstrip()
    return "\n".join(lines)


def _column_widths(made: Grid, points: int, short: bool, numbers: str) -> list[float]:
    """pt of every column, those of labels first, without the gaps."""
    labels = [max(text_width(label[i], points) for label in made.labels) for i in range(len(made.labels[0]))]
    labels[0] = max(labels[0], text_width(made.corner, points))
    head = [[max(text_width(w, points) for w in _words(text, short)) for text in levels] for levels in made.heads]
    widths = [_column_width(column, points, numbers) for column in _columns(made)]
    for level in range(len(made.heads[0])):
        own = level == len(made.heads[0]) - 1
        for _over, group in itertools.groupby(
            range(len(widths)), key=lambda i: i if own else made.heads[i][: level + 1]
        ):
            at = list(group)
            lacking = head[at[0]][level] - sum(widths[i] for i in at)
            # TeX gives what a heading over several columns needs more to the last of them
            widths[at[-1]] += max(0.0, lacking)
    return [*labels, *widths]


def _column_width(column: Sequence[Entry], points: int, numbers: str) -> float:
    """pt of the widest number of a column; one of type S has its widest mean beside its widest spread and suffix."""
    given = [entry for entry in column if not entry.blank]
    means = [text_width(entry.mean or "—", points, entry.best) for entry in given]
    if numbers == "siunitx":
        behind = max((_behind_width(entry, points, entry.best) for entry in given), default=0.0)
        # measured with siunitx 3.2: what it puts around a number, and between that and text behind it
        around = 0.35 if not any(entry.std for entry in given) else 2.5
        return max(means, default=0.0) + behind + around
    room = max((_suffix_width(entry.suffix, points) for entry in given), default=0.0)
    wide = [mean + _spread_width(entry, points, entry.best) for mean, entry in zip(means, given, strict=True)]
    return max(wide, default=0.0) + room


def _spread_width(entry: Entry, points: int, bold: bool) -> float:
    """pt of a spread and of the sign before it, between thin spaces."""
    thin = _EM[points] * points / 6
    return text_width("±", points) + 2 * thin + text_width(entry.std, points, bold) if entry.std else 0.0


def _behind_width(entry: Entry, points: int, bold: bool) -> float:
    return _spread_width(entry, points, bold) + _suffix_width(entry.suffix, points)


def _suffix_width(text: str, points: int = 8) -> float:
    return text_width(text, _SUPERSCRIPT[points])
