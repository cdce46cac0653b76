"""Every format's files in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from results import files
from results.escape import cut
from results.metrics import nearest
from results.tables.csv import to_csv
from results.tables.latex import latex_document, to_latex
from results.tables.markdown import to_markdown
from results.tables.marked import LONGEST_HEADING
from results.tables.stems import file_stems
from results.tables.table import Table

FORMATS = ("csv", "latex", "markdown")


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
            f"several tables would be written to {cut(', '.join(twice), LONGEST_HEADING)}; give them different names"
        )
    stems = file_stems([table.name for table in tables])
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
