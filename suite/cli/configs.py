"""The commands about configs, which make no run: config check, config schema."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from results.escape import cut, one_line
from suite.cli import completing
from suite.cli.app import SETTINGS, DataDir, Plugins, app
from suite.console import documented, fail, print_lines, print_notes, timed
from suite.environment import export_threads
from suite.plugins import load_plugins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from suite.planning import Plan

config_app = typer.Typer(help="Configs: their mistakes, and a schema of them for editors.", **SETTINGS)
app.add_typer(config_app, name="config")


@config_app.command("check")
def config_check(
    configs: Annotated[list[Path], typer.Argument(help="Config files.", autocompletion=completing.configs)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Change an option, as of `run` (repeatable)."),
    ] = None,
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> int:
    """Say what configs ask for, or their mistakes: no run is made, and data need not be here.

    Printed are the number of runs of each task, and what is skipped with the reason. Exit code 2 for mistakes.
    """
    export_threads(1)
    from suite.config import PlanError
    from suite.session import plan

    own = tuple(plugin or ())
    load_plugins(own)  # so that a mistake in them is said once
    code = 0
    for config in configs:
        try:
            with timed(f"planning {config}"):
                planned = plan(
                    config, settings=tuple(settings or ()), plugins=own, data_dir=data_dir, without_data=True, many=True
                )
        except PlanError as error:
            code = fail("\n".join(line if len(configs) == 1 else f"{config}: {line}" for line in error.lines))
        else:
            print_lines(_lines(config, planned))
            print_notes(planned.notes)
    return code


@config_app.command("schema")
def config_schema(
    out: Annotated[Path | None, typer.Option(help="A file to write.  [default: standard output]")] = None,
    plugin: Plugins = None,
) -> int:
    """Write a JSON schema of configs (draft 2020-12), with which an editor completes and checks them.

    It knows the norms, tasks and data sets that are registered, those of --plugin among them. An editor with a YAML
    language server finds it by a first line in the config:

    # yaml-language-server: $schema=config.schema.json
    """
    with documented(True):  # a user's file may print
        own = load_plugins(plugin)
    from suite.schema import config_schema as schema

    text = json.dumps(schema(), indent=2, allow_nan=False) + "\n"
    if out is None:
        sys.stdout.write(text)
        return 0
    from results.files import write_text

    write_text(out, text)
    print(f"{out}: for the first line of a config beside it: # yaml-language-server: $schema={out.name}")
    if own:
        print_notes([f"it knows {', '.join(own)} as long as the plugin stays as it is"])
    return 0


def _lines(config: Path, planned: Plan) -> Iterator[str]:
    """What a config asks for: a line for all of it, one for each task, one for each reason to skip."""
    skipped = f", {len(planned.skipped)} skipped" if planned.skipped else ""
    yield f"{config}: {len(planned.runs)} runs{skipped}, budget {planned.budget}"
    runs = Counter(spec.task for spec in planned.runs)
    reasons: dict[str, Counter[tuple[str, str]]] = {}
    for spec, reason in planned.skipped:
        reasons.setdefault(spec.task, Counter())[spec.norm_label or spec.norm, reason] += 1
    for task in dict.fromkeys([*runs, *reasons]):
        yield f"  {task}: {runs[task]} runs"
        for (norm, reason), count in reasons.get(task, Counter()).items():
            yield f"    skipped {count}: {norm}: {cut(one_line(reason), 300)}"
    if planned.left_out:
        yield f"  combinations left out: {len(planned.left_out)}, such as {planned.left_out[0]}"
    for line in planned.missing:
        yield f"  not here: {line}"
