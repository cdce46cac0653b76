"""The file of a report."""

from __future__ import annotations

from pathlib import Path

from results import files
from results.report.content import Content
from results.report.page import page

REPORT = "report.html"


def write_report(folder: str | Path, content: Content, file: str | Path | None = None) -> Path:
    """Write the page of a folder, whole or not at all, and return the file.

    Args:
        folder: of results.
        content: of `results.report.gathering.gather`.
        file: another place than `<folder>/report.html`; its folder is made.

    Raises:
        OSError: the file can not be written.
    """
    target = Path(folder) / REPORT if file is None else Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    return files.write_text(target, page(content))
