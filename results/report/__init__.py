"""One self-contained page per folder of results.

    from results.report import gather, write_report

    write_report("runs/quick", gather("runs/quick"))  # runs/quick/report.html

content.py    what stands in it, as values
gathering.py  a folder -> all of that
overview.py   the facts at its top, and what must be said first
cards.py      the norms
runs.py       single runs, their curves and files, within the room of a page
page.py       the values as one HTML file, by page.html, page.css and page.js beside it
writing.py    that file
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results.report.gathering import gather
    from results.report.writing import write_report

__all__ = ["gather", "write_report"]

_HOMES = {"gather": "gathering", "write_report": "writing"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"results.report.{_HOMES[name]}"), name)
