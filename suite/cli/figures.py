"""The command `figures`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from suite.cli import completing
from suite.cli.app import app, split_names
from suite.console import fail, shown


@app.command()
def figures(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)],
    formats: Annotated[str, typer.Option("--format", help="pdf, svg, png, separated by commas.")] = "pdf,svg",
    out: Annotated[Path | None, typer.Option(help="Where the files go.  [default: FOLDER/figures]")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only these kinds of figures, as option_curve,learning_curves.")
    ] = None,
    option: Annotated[
        str | None,
        typer.Option(help="The option along the x axis of curves.  [default: each that varies while others stay]"),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The metric.  [default: each task's headline]")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    reference: Annotated[str, typer.Option(help="The norm that others are compared with.")] = "bn",
) -> int:
    """Draw the runs that are there: one file for each figure and format, and its caption as text.

    Each figure that the runs do not support is named with the reason.
    """
    import results
    from results.figures.drawing import check_formats

    chosen = check_formats(split_names("--format", formats))
    df, history = results.load(folder), results.load_history(folder)
    for line in df.attrs["damaged"]:
        print(f"damaged, left out of the figures: {line}", file=sys.stderr)
    for line in df.attrs["doubles"]:
        print(f"left out of the figures: {line}", file=sys.stderr)
    drawings, refused = results.draw_all(
        df,
        history,
        only=split_names("--only", only),
        option=option,
        metric=metric,
        task=task,
        reference=reference,
    )
    where = folder / "figures" if out is None else out
    try:
        files = results.write_drawings(drawings, where, chosen) if drawings else []
    except FileExistsError as error:
        raise ValueError(f"figures are not written to {shlex.quote(str(where))}: a file has this name") from error
    for file in files:
        print(shown(str(file)))
    for name, reason in refused.items():
        print(shown(f"not drawn: {name}: {reason}"))
    return 0 if drawings else fail(f"no figure of {folder}: none is supported by its runs; the reasons stand above")
