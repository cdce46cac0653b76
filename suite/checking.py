"""The command `check`: which norms it checks, the facts of a task, and facts as rows of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.console import documented, painted, print_document, print_lines
from suite.plugins import load_plugins

if TYPE_CHECKING:
    from norms.conformance import Check
    from tasks.conformance import Check as TaskCheck


def norms_to_check(
    norms: Sequence[str] | None, all_norms: bool, plugin: Sequence[Path] | None
) -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of each norm to check. Raises ValueError that names every unknown norm and every mistake."""
    from norms.registry import norm_info, norm_names, resolve_norm_options
    from suite.naming import named_norm

    own = load_plugins(plugin)
    if all_norms and norms:
        raise ValueError(f"--all checks every norm; given {', '.join(norms)}, too")
    if plugin and not (own or norms or all_norms):
        files = ", ".join(map(str, plugin))
        raise ValueError(f"{files}: registers no norm; put @register(...) before the class (README, Your own norm)")
    chosen: list[tuple[str, dict[str, Any]]] = []
    mistakes: list[str] = []
    for text in norm_names() if all_norms else (norms or own or norm_names()):
        try:
            name, options = named_norm(text)
            if options:
                resolve_norm_options(name, options)
            norm_info(name)
            chosen.append((name, options))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return chosen


def check_one_task(
    name: str,
    options: dict[str, Any],
    norm: str | None,
    plugin: Sequence[Path] | None,
    data_dir: Path,
    as_json: bool = False,
) -> int:
    """Check a task by runs of a norm, and print its facts; returns the exit code, 1 where one is false."""
    from results.metrics import METRICS
    from suite.config import parse_value
    from suite.documents import facts
    from suite.naming import has_options, named_norm
    from tasks import get_task
    from tasks.conformance import Check, check_task, small_options

    with documented(as_json):
        load_plugins(plugin)
        task = get_task(name)
        small = {**small_options(name), **options}
        shown = ", ".join(f"{key}={value}" for key, value in small.items()) or "its defaults"
        print(f"{name}: runs of {shown}", flush=True)
        given: Any = "bn" if norm is None else dict([named_norm(norm)]) if has_options(norm) else parse_value(norm)
        checks = check_task(name, options, norm=given, data_dir=data_dir)
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    detail = f"no unit, no direction: {', '.join(unknown)}" if unknown else ""
    hint = "results.metrics.add_metric(Metric(...)) tells tables how to print it" if unknown else ""
    found = f"{len(task.metrics) - len(unknown)} of {len(task.metrics)}"
    checks.append(Check(name, "metrics known to tables", "all", found if unknown else "all", not unknown, detail, hint))
    if not as_json:
        print_lines(map(painted, check_lines(name, checks)))
    for c in checks:
        if c.false:
            print(f"false: {name}: {c.fact}: declared {c.declared}, measured {c.measured}", file=sys.stderr)
    false = sum(c.false for c in checks)
    if as_json:
        print_document({"task": name, "options": small, "facts": facts(checks), "false": false})
    else:
        print(f"{len(checks)} facts of {name}, {false} of them false")
    return 1 if false else 0


def check_lines(title: str, checks: Sequence[Check | TaskCheck]) -> Iterator[str]:
    """The facts of one norm as a table, and under each false one its hint."""
    from suite.progress import columns

    yield title
    rows = [("", "fact", "declared", "measured", "")]
    rows += [
        ("FALSE" if c.false else "ok" if c.ok else "note", c.fact, c.declared, c.measured, c.detail) for c in checks
    ]
    head, *lines = columns(rows)
    yield head
    for check, line in zip(checks, lines, strict=True):
        yield line
        if check.hint:
            yield f"       usually: {check.hint}"
