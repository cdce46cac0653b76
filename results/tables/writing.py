"""Every format's files in a folder."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from results import files
from results.escape import cut, escape_markdown
from results.metrics import nearest
from results.tables.csv import to_csv
from results.tables.latex import caption_sentences, latex_document, to_latex
from results.tables.markdown import to_markdown
from results.tables.marked import LONGEST_HEADING, LONGEST_SENTENCE
from results.tables.stems import file_stems
from results.tables.table import Table

FORMATS = ("csv", "latex", "markdown")
PAPER_FORMATS = ("latex", "html", "excel", "csv", "markdown")


def write_tables(
    tables: Sequence[Table], folder: str | Path, formats: Sequence[str] = FORMATS, caption: str = "short"
) -> list[Path]:
    """Write every table in every format; each file is replaced in one step.

    Files, by format: csv: NAME.csv (one line per cell), NAME_wide.csv; latex: NAME.tex (for \\input) and
    all_tables.tex (a document); markdown: NAME.md and all_tables.md. caption: of LaTeX, as in `to_latex`.

    Raises:
        ValueError: unknown format or caption (with the nearest), or two tables of one name. Nothing is written then.
        OSError: the folder can not be made, or a file not be written; the files before it are.
    """
    _check_formats(formats, FORMATS)
    twice = [name for name, count in Counter(table.name for table in tables).items() if count > 1]
    if twice:
        raise ValueError(
            f"several tables would be written to {cut(', '.join(twice), LONGEST_HEADING)}; give them different names"
        )
    stems = file_stems([table.name for table in tables])
    texts: dict[str, str] = {}
    for stem, table in zip(stems, tables, strict=True):
        if "csv" in formats:
            texts[f"{stem}.csv"] = to_csv(table)
            texts[f"{stem}_wide.csv"] = to_csv(table, wide=True)
        if "latex" in formats:
            texts[f"{stem}.tex"] = to_latex(table, caption)
        if "markdown" in formats:
            texts[f"{stem}.md"] = to_markdown(table)
    if "latex" in formats:
        texts["all_tables.tex"] = latex_document(tables, caption)
    if "markdown" in formats:
        texts["all_tables.md"] = "\n".join(to_markdown(table) for table in tables)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_folder(folder)
    for name, text in texts.items():
        files.write_text(folder / name, text)
    return [folder / name for name in texts]


def write_paper(
    table: Table,
    folder: str | Path,
    formats: Sequence[str] = ("latex",),
    *,
    environment: str = "table",
    caption: str = "short",
    numbers: str = "plain",
) -> list[Path]:
    """Write a table of `paper_table`, and beside it a note file with everything that must be said of it.

    Files, by format: latex: NAME.tex (for \\input) and NAME.notes.tex; html: NAME.html; excel: NAME.xlsx, which needs
    openpyxl; csv: NAME.csv, NAME_wide.csv; markdown: NAME.md. Always: NAME.notes.md. Each file is replaced in one step.

    Args:
        table: what to write.
        folder: made if it is not there.
        formats: of PAPER_FORMATS.
        environment, caption, numbers: as in `paper_latex`; with LaTeX a UserWarning says if the table is too wide
            or its caption too long.

    Raises:
        ValueError: an unknown format, environment, caption or kind of numbers, or openpyxl is missing.
        OSError: the folder can not be made, or a file not be written; the files before it are.
    """
    # the Styler behind them needs jinja2, which plain tables do not
    from results.tables.paper_latex import advice, check_choices, notes_latex, notes_of, paper_latex
    from results.tables.styled import check_excel, to_html, write_excel

    _check_formats(formats, PAPER_FORMATS)
    check_choices(environment, caption, numbers)
    if "excel" in formats:
        check_excel()
    (stem,) = file_stems([table.name])
    sentences = notes_of(table)
    texts: dict[str, Callable[[], str]] = {}
    if "latex" in formats:
        texts[f"{stem}.tex"] = lambda: paper_latex(table, environment, caption, numbers)
        texts[f"{stem}.notes.tex"] = lambda: notes_latex(table)
    if "html" in formats:
        texts[f"{stem}.html"] = lambda: to_html(table)
    if "csv" in formats:
        texts[f"{stem}.csv"] = lambda: to_csv(table)
        texts[f"{stem}_wide.csv"] = lambda: to_csv(table, wide=True)
    if "markdown" in formats:
        texts[f"{stem}.md"] = lambda: to_markdown(table)
    lines = [f"- {escape_markdown(cut(sentence, LONGEST_SENTENCE))}" for sentence in sentences]
    texts[f"{stem}.notes.md"] = lambda: "\n".join([*lines, ""])
    made = {name: make() for name, make in texts.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_folder(folder)
    for name, text in made.items():
        files.write_text(folder / name, text)
    written = [folder / name for name in made]
    if "excel" in formats:
        write_excel(table, folder / f"{stem}.xlsx")
        written.append(folder / f"{stem}.xlsx")
    if "latex" in formats and (wide := advice(table, environment, numbers)):
        warnings.warn(wide, stacklevel=2)
    if "latex" in formats and caption_sentences(table, caption)[1]:
        warnings.warn(
            f"{table.name}: the full caption is longer than a page; take caption short, and {stem}.notes.tex",
            stacklevel=2,
        )
    return written


def _check_formats(formats: Sequence[str], allowed: Sequence[str]) -> None:
    for name in formats:
        if name not in allowed:
            raise ValueError(f'unknown format "{name}"; formats: {", ".join(allowed)}{nearest(name, allowed)}')
