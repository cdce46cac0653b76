"""The command `report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from suite.cli import completing
from suite.cli.app import DataDir, Plugins, app
from suite.console import print_notes, shown
from suite.environment import export_threads
from suite.plugins import load_plugins


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file.  [default: FOLDER/report.html, as `run` writes it; FOLDER/report_custom.html with --config]"
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Measure first what the folder's norms declare (seconds for each), and keep it in FOLDER/norms.json.",
        ),
    ] = False,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", help="Only the runs that this config asks for, as it is now (repeatable)."),
    ] = None,
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> int:
    """Write a folder of results as one page: tables, figures, norms, runs. It needs no other file and no network.

    With --config, and with --check of your own norms, give the same --plugin and --data-dir as to `run`.
    Exit code 1 when --check finds a fact false.
    """
    from results.report import gather, write_report

    own = load_plugins(plugin)  # their metrics count without --check, too
    keys = None
    if configs:
        own_file = folder / "report.html"
        if out is not None and out.resolve() == own_file.resolve():
            raise ValueError(f"--out {shlex.quote(str(out))}: `run` writes its own report there; name another file")
        out = folder / "report_custom.html" if out is None else out
        export_threads(1)
        from suite.planning import planned_keys

        keys = planned_keys(configs, own, data_dir)
    false = _check(folder) if check else 0
    content = gather(folder, keys)
    try:
        file = write_report(folder, content, out)
    except OSError as error:
        raise ValueError(f'"{error.filename or out or folder}": {error.strerror or error}') from error
    print_notes([shown(line) for line in content.left_out])
    print(f"{shlex.quote(str(file))}: {file.stat().st_size / 1e6:.1f} MB")
    return 1 if false else 0


def _check(folder: Path) -> int:
    """Measure the norms of a folder and keep what was found; returns how many facts are false."""
    from results.frame import read_folder
    from results.store import write_norms
    from suite.checking import measured

    specs = [record.spec for _, _, record in read_folder(folder).records]
    told, lines = measured(specs)
    print_notes([shown(line) for line in [*lines, *write_norms(folder, told)]])
    false = [
        f"false: {row}: {c.fact}: declared {c.declared}, measured {c.measured}"
        for row, found in told.checked.items()
        for c in found.checks
        if c.verdict == "false"
    ]
    for line in false:
        print(shown(line), file=sys.stderr)
    print(f"{len(told.checked)} norms checked, {len(false)} false facts")
    return len(false)
