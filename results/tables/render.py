r"""A finished table and its formats: CSV, LaTeX, Markdown, plain text. Pure functions, apart from `write_tables`.

Numbers are rounded here and nowhere else. CSV keeps full precision and base units.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import files
from results.escape import columns_of, cut, escape_csv, escape_latex, escape_markdown, one_line, spell
from results.metrics import Metric, nearest
from results.tables.table import HOLES, Cell, Column, Row, Table

FORMATS = ("csv", "latex", "markdown")
LATEX_ROWS = 40
"""A longer table is printed as several floats, so that each fits a page."""
NARROWEST = 20
"""Characters of a line at least, whatever the terminal says of itself."""

_STEM = 150  # characters of a file's name without its ending
_LABEL, _HEADING, _SENTENCE = 160, 400, 4000
"""Characters that are printed of a row's label, of a heading, and of a sentence below a table; CSV has all."""

NUMBERS = ("mean", "std", "ci95", "n", *HOLES, "difference", "difference_std", "difference_n", "p")
"""A cell's columns in the tidy CSV."""


@dataclass(frozen=True)
class _Style:
    write: Callable[[str], str]
    best: str
    second: str
    note: str
    plus_minus: str
    dash: str

    def escape(self, text: str, longest: int = _HEADING) -> str:
        return self.write(cut(text, longest))


def to_csv(table: Table, wide: bool = False) -> str:
    """The table as CSV in full precision and base units (fractions, seconds).

    A text that a spreadsheet would take for a formula (it begins with =, +, - or @ and is no number) has "'" before it,
    and control characters are written as U+XXXX; the frame of `results.load` has every text as it is.

    Args:
        table: what to write.
        wide: one line per row with mean, std and n of every column, instead of one line per cell with everything.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def write(cells: Sequence[str | int]) -> None:
        writer.writerow([escape_csv(cell) if isinstance(cell, str) else cell for cell in cells])

    settings = [*(row.setting for row in table.rows), *(column.setting for column in table.columns)]
    options = list(dict.fromkeys(name for setting in settings for name, _ in setting))
    if wide:
        fixed = [o for o in options if any(o == k for row in table.rows for k, _ in row.setting)]
        names = [" ".join((c.metric.name, *(f"{k}={v}" for k, v in c.setting))) for c in table.columns]
        write(["task", *fixed, table.heading, *(f"{name}{end}" for name in names for end in ("", " std", " n"))])
        for row in table.rows:
            numbers = [_number(v) for c in row.cells for v in ((c.mean, c.std, c.n) if c else (None, None, None))]
            write([table.task, *(dict(row.setting).get(o, "") for o in fixed), row.label, *numbers])
        return out.getvalue()
    flags = ("best", "second", "repeated")
    write(["table", "task", *options, table.heading, "metric", *NUMBERS, *flags, "equals"])
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is None:
                continue
            setting = dict((*row.setting, *column.setting))
            place = [table.name, table.task, *(setting.get(o, "") for o in options), row.label, column.metric.name]
            shown = [_number(getattr(cell, name)) for name in NUMBERS]
            write([*place, *shown, *(int(getattr(cell, name)) for name in flags), cell.equals])
    return out.getvalue()


def to_latex(table: Table) -> str:
    r"""The table as one or more `table` floats: a fragment for \input; it needs the packages booktabs and graphicx."""
    marked, notes = _texts(table, _LATEX)
    groups: list[list[int]] = [[]]
    for index, row in enumerate(table.rows):
        if len(groups[-1]) >= LATEX_ROWS or (
            groups[-1]
            and row.group != table.rows[groups[-1][-1]].group
            and len(groups[-1]) + sum(r.group == row.group for r in table.rows) > LATEX_ROWS
        ):
            groups.append([])
        groups[-1].append(index)
    width = len(table.columns)
    head = []
    if any(c.over for c in table.columns):
        spans, rules, start = [], [], 2
        for over, count in _runs([c.over for c in table.columns]):
            spans.append(rf"\multicolumn{{{count}}}{{c}}{{{_LATEX.escape(over)}}}")
            if over:
                rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
            start += count
        head = [" & ".join(["", *spans]) + r" \\", "".join(rules)]
    head.append(" & ".join(_LATEX.escape(t) for t in (table.heading, *(c.title for c in table.columns))) + r" \\")
    floats = []
    for part, indices in enumerate(groups):
        title = _LATEX.escape(table.title) + (" (continued)" if part else "")
        caption = " ".join(_LATEX.escape(sentence, _SENTENCE) for sentence in table.caption) if not part else ""
        body: list[str] = []
        before = None
        for index in indices:
            row = table.rows[index]
            if row.group and row.group != before:
                body += [r"\midrule"] if before is not None else []
                body.append(rf"\multicolumn{{{width + 1}}}{{l}}{{\textit{{{_LATEX.escape(row.group)}}}}} \\")
            before = row.group
            body.append(" & ".join(marked[index]) + r" \\")
        lines = [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption[{title}]{{{f'{title}. {caption}'.strip()}}}",
            *([rf"\label{{tab:{_stem(table.name)}}}"] if not part else []),
            r"\par\medskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * width}}}",
            r"\toprule",
            *head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
        ]
        if notes:
            lines.append(r"\par\smallskip{\footnotesize " + "; ".join(notes) + r"\par}")
        floats.append("\n".join([*lines, r"\end{table}"]))
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n\n".join(floats) + "\n"


def latex_document(tables: Sequence[Table]) -> str:
    """A complete LaTeX document of all tables; pdflatex compiles it as it is."""
    parts = [f"{to_latex(table)}\\clearpage" for table in tables]
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[margin=15mm]{geometry}",
            r"\usepackage{booktabs,graphicx}",
            r"\begin{document}",
            *(parts or ["No tables."]),
            r"\end{document}",
            "",
        ]
    )


def to_markdown(table: Table) -> str:
    """The table as Markdown (pipes), its caption as a list below it."""
    lines = [f"### {_MARKDOWN.escape(table.title)}", ""]
    grid, notes = _grid(table, _MARKDOWN)
    widths = [max(3, *(columns_of(line[i]) for line in grid)) for i in range(len(grid[0]))]
    for number, line in enumerate(grid):
        padded = [
            _left(text, w) if i == 0 else _right(text, w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            lines.append(f"| {' | '.join(rule)} |")
    lines += [
        "",
        *(f"- {_MARKDOWN.escape(sentence, _SENTENCE)}" for sentence in table.caption),
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def to_text(table: Table, width: int | None = None, encoding: str = "utf-8") -> str:
    """The table for a terminal: aligned columns, the best as *x*, the second as _x_.

    Args:
        table: what to print.
        width: characters of a line, 20 or more; columns that do not fit follow below, their rows labelled again, and
            the caption is wrapped. None: no limit.
        encoding: of the terminal; what it lacks is printed in other characters, ± as +- and ↑ as ^.
    """
    return tables_text([table], width, encoding)


def tables_text(tables: Sequence[Table], width: int | None = None, encoding: str = "utf-8") -> str:
    """Tables for a terminal, one below the other. What stands under several of them is printed once, after the last.

    Arguments as `to_text`.
    """
    width = None if width is None else max(width, NARROWEST)
    style = _text_style(encoding)
    homes: dict[str, list[Table]] = {}
    for table in tables:
        for sentence in table.caption:
            homes.setdefault(sentence, []).append(table)
    lines: list[str] = []
    marks: list[str] = []
    for table in tables:
        body, notes = _body(table, width, style)
        own = [style.escape(sentence, _SENTENCE) for sentence in table.caption if len(homes[sentence]) == 1]
        if any(cell is not None and cell.best for row in table.rows for cell in row.cells):
            marks = ["Here the best is *so*, the second _so_."]
        lines += [*body, "", *_wrapped([*own, *notes], width), *([""] if own or notes else [])]
    shared: list[str] = []
    for sentence, where in homes.items():
        if len(where) > 1:
            of = "" if len(where) == len(tables) else ", ".join(dict.fromkeys(t.task or t.name for t in where)) + ": "
            shared.append(style.escape(of + sentence, _SENTENCE))
    if shared:
        lines.append("Under several tables:")
    return "\n".join([*lines, *_wrapped([*shared, *marks], width)]).rstrip() + "\n"


def _wrapped(texts: Sequence[str], width: int | None) -> list[str]:
    if width is None:
        return list(texts)
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def _body(table: Table, width: int | None, style: _Style) -> tuple[list[str], list[str]]:
    """Title and cells as lines of text, and the footnotes."""
    grid, notes = _grid(table, style)
    widths = [max((columns_of(line[i]) for line in grid if any(line[1:])), default=0) for i in range(len(grid[0]))]
    parts: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if width is not None and parts[-1] and widths[0] + sum(widths[j] + 2 for j in (*parts[-1], i)) > width:
            parts.append([])
        parts[-1].append(i)
    lines = [style.escape(table.title)]
    for part in parts:
        lines.append("")
        for number, line in enumerate(grid):
            if number and not any(line[1:]):  # the heading of a group
                lines += ["", line[0]]
                continue
            lines.append("  ".join([_left(line[0], widths[0]), *(_right(line[i], widths[i]) for i in part)]).rstrip())
            if not number:
                lines.append("  ".join("-" * widths[i] for i in (0, *part)))
    return lines, notes


def write_tables(tables: Sequence[Table], folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write every table in every format; each file is replaced in one step.

    Files, by format: csv: NAME.csv (one line per cell), NAME_wide.csv; latex: NAME.tex (for \\input) and
    all_tables.tex (a document); markdown: NAME.md and all_tables.md.

    Raises:
        ValueError: unknown format (with the nearest), or two tables of one name. Nothing is written then.
        OSError: the folder can not be made, or a file not be written; the files before it are.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f'unknown format "{name}"; formats: {", ".join(FORMATS)}{nearest(name, FORMATS)}')
    twice = [name for name, count in Counter(table.name for table in tables).items() if count > 1]
    if twice:
        raise ValueError(
            f"several tables would be written to {cut(', '.join(twice), _HEADING)}; give them different names"
        )
    stems = _stems([table.name for table in tables])
    texts: dict[str, str] = {}
    for stem, table in zip(stems, tables, strict=True):
        if "csv" in formats:
            texts[f"{stem}.csv"] = to_csv(table)
            texts[f"{stem}_wide.csv"] = to_csv(table, wide=True)
        if "latex" in formats:
            texts[f"{stem}.tex"] = to_latex(table)
        if "markdown" in formats:
            texts[f"{stem}.md"] = to_markdown(table)
    if "latex" in formats:
        texts["all_tables.tex"] = latex_document(tables)
    if "markdown" in formats:
        texts["all_tables.md"] = "\n".join(to_markdown(table) for table in tables)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_folder(folder)
    for name, text in texts.items():
        files.write_text(folder / name, text)
    return [folder / name for name in texts]


_LATEX = _Style(escape_latex, r"\textbf{%s}", r"\underline{%s}", r"\textsuperscript{%s}", r" $\pm$ ", "---")
_MARKDOWN = _Style(escape_markdown, "**%s**", "<ins>%s</ins>", "<sup>%s</sup>", " ± ", "—")


def _text_style(encoding: str) -> _Style:
    def say(text: str) -> str:
        return spell(text, encoding)

    return _Style(lambda text: say(one_line(text)), "*%s*", "_%s_", "[%s]", say(" ± "), say("—"))


def _left(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))


def _right(text: str, width: int) -> str:
    return " " * (width - columns_of(text)) + text


def _texts(table: Table, style: _Style) -> tuple[list[list[str]], list[str]]:
    """Label and cells of every row as text, and the notes that their letters stand for."""
    letters: dict[str, str] = {}

    def letter(note: str) -> str:
        return style.note % letters.setdefault(note, _letter(len(letters)))

    rows: list[list[str]] = []
    usual_n = table.usual_n if table.show_n else 0
    for row in table.rows:
        label = f"{row.label} = {row.equals}" if row.equals else row.label
        texts = [style.escape(label, _LABEL) + "".join(letter(note) for note in row.notes)]
        for column, cell in zip(table.columns, row.cells, strict=True):
            texts.append("" if cell is None else _cell_text(row, column.metric, cell, usual_n, style, letter))
        rows.append(texts)
    return rows, [f"{style.note % short} {style.escape(note)}" for note, short in letters.items()]


def _cell_text(row: Row, metric: Metric, cell: Cell, usual_n: int, style: _Style, letter: Callable[[str], str]) -> str:
    text = style.dash
    if cell.mean is not None:
        text = style.escape(metric.text(cell.mean))
        if cell.std or (cell.std == 0 and metric.higher_is_better is not None):  # a count that never varies needs no ±
            text += style.plus_minus + style.escape(metric.text(cell.std))
        text = style.best % text if cell.best else style.second % text if cell.second else text
        text += style.escape("†") if cell.significant else ""
        # where a footnote counts the holes, n is what they leave
        text += f" (n={cell.n})" if usual_n not in (0, cell.seeds) else ""
        text += f" = {style.escape(cell.equals)}" if cell.equals and cell.equals != row.equals else ""
    return text + (letter(cell.note) if cell.note else "")


def _grid(table: Table, style: _Style) -> tuple[list[list[str]], list[str]]:
    rows, notes = _texts(table, style)
    over = [f"{c.over}: {c.title}" if c.over and c.over != b else c.title for c, b in _with_before(table.columns)]
    grid = [[style.escape(t) for t in (table.heading, *over)]]
    before = ""
    for row, texts in zip(table.rows, rows, strict=True):
        if row.group and row.group != before:
            grid.append([style.escape(row.group), *[""] * len(table.columns)])
        before = row.group
        grid.append(texts)
    return grid, notes


def _with_before(columns: Sequence[Column]) -> list[tuple[Column, str]]:
    return list(zip(columns, ["", *(c.over for c in columns)], strict=False))


def _runs(values: Sequence[str]) -> list[tuple[str, int]]:
    """Neighbours that are equal, counted: aab -> (a, 2), (b, 1)."""
    result: list[tuple[str, int]] = []
    for value in values:
        if result and result[-1][0] == value:
            result[-1] = (value, result[-1][1] + 1)
        else:
            result.append((value, 1))
    return result


def _letter(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa: as spreadsheets count columns."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def _number(value: float | int | None) -> str:
    return "" if value is None else repr(value)


def _stem(name: str) -> str:
    """A table's name as that of a file, short enough for every file system."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "table"
    return stem if len(stem) <= _STEM else f"{stem[: _STEM - 9]}-{_digest(name)}"


def _stems(names: Sequence[str]) -> list[str]:
    """The stem of each name, told apart where two would be one file: by a few letters behind the later one."""
    taken = {"all_tables"}
    stems = []
    for name in names:
        stem = _stem(name)
        if stem.casefold() in taken:  # some file systems do not tell capitals apart
            stem = f"{stem[: _STEM - 9]}-{_digest(name)}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
