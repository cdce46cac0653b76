"""The command `check`: which norms it checks, the facts of a task, facts as rows of text, and those that a results
folder keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.declared import Checked, FactCheck, NormNotes
from results.record import RunSpec
from suite.console import documented, painted, print_document, print_lines
from suite.environment import commit, now, own_version
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
    from suite.as_json import facts
    from suite.config import parse_value
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


def measured(specs: Iterable[RunSpec]) -> tuple[NormNotes, list[str]]:
    """What a report says of the norms of these runs: what they declare here and now, and every fact as it is measured,
    with default options and with those of each row.

    A second or a few for each, mostly compiling.

    Returns:
        The notes, and a line for each row that could not be measured: a norm that is not registered here, options that
        this version refuses.
    """
    import torch

    from norms.conformance import check_norm
    from norms.protocol import SETTING_FIELDS
    from norms.registry import norm_info
    from suite.describing import norm_notes

    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for spec in specs:
        rows.setdefault(spec.norm, (spec.norm, {}))
        options = {k: v for k, v in spec.norm_options.items() if k not in SETTING_FIELDS}
        rows.setdefault(spec.norm_label or spec.norm, (spec.norm, options))
    torch.set_num_threads(1)  # on inputs this small a second one costs more than it computes
    checked, lines, known = {}, {}, []
    for row, (norm, options) in rows.items():
        try:
            checks = check_norm(norm, **options)
        except ValueError as error:
            lines[str(error)] = f"{row} is not checked: {error}"
            continue
        if not options:
            known.append(norm)
        checked[row] = Checked(
            norm=norm,
            norm_version=str(norm_info(norm).version),
            version=own_version(),
            commit=commit(),
            time=now(),
            checks=tuple(
                FactCheck(fact=c.fact, declared=c.declared, measured=c.measured, verdict=_verdict(c)) for c in checks
            ),
        )
    return NormNotes(norms=norm_notes(known).norms, checked=checked), list(lines.values())


def _verdict(check: Check) -> Any:
    if check.false:
        return "false"
    return "note" if check.note and not check.ok else "not tried" if check.measured == "not tried" else "holds"
