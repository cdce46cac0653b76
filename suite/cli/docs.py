"""The command `docs`."""

from __future__ import annotations

from typing import Annotated

import typer

from suite.cli.app import app
from suite.environment import ROOT, export_threads


@app.command()
def docs(
    names: Annotated[list[str] | None, typer.Argument(help="Which blocks.  [default: all]")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; name the pages that are not up to date, exit 1.")
    ] = False,
) -> int:
    """Rewrite what README.md and docs/ say of norms, tasks, options, metrics, data sets and commands, from the code.

    Everything outside of the markers of this command stays as it is.
    """
    export_threads(1)
    from suite.documents.made import remade, rewrite

    if check:
        stale = remade(ROOT, names or ())
        for file in stale:
            print(f"not up to date: {file.relative_to(ROOT)}")
        print(f"{len(stale)} pages to rewrite: `python run_suite.py docs`" if stale else "all pages are up to date")
        return 1 if stale else 0
    for file in (written := rewrite(ROOT, names or ())):
        print(f"rewritten: {file.relative_to(ROOT)}")
    if not written:
        print("all pages are up to date")
    return 0
