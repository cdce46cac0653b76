"""What commands print with --json: one document each, of texts, numbers, true, false, null, lists and mappings.

Fields are only ever added. A number that is not finite is null.

run --dry-run   {"folder", "budget", "threads", "jobs",
                 "counts": {"runs", "done", "todo", "failed", "skipped"},      of this plan
                 "seconds_left": number or null, "at_least": true or false,    of the runs to do, as far as is known
                 "runs": [{"key": text, or null where its data is not here, "task", "norm", "norm_label",
                           "norm_options", "task_options", "seed", "versions": {"norm", "task"},
                           "state": "todo", "ok", "diverged", "failed", "damaged" or "skipped",
                           "reason": why it is skipped, else null,
                           "goes_on": "from epoch 3 of 10" where a checkpoint is there, else null}],
                 "missing": [text], "left_out": [text], "notes": [text]}       data; combinations; what was not tried
list norms      {"norms": [the facts of norms.protocol.NormInfo, and "options": {name: {"default", "type"}}]}
list tasks      {"tasks": [{"name", "version", "metrics": [name], "options": {name: {"default", "type"}}}]}
list metrics    {"metrics": [{"name", "unit", "better": "higher", "lower" or null, "description"}]}
list datasets   {"datasets": [{"name", "here": "yes", "no" or "damaged", "what"}]}; the same of data list
check           {"norms": [{"norm", "options", "source", "facts"}], "false": count}
check --task    {"task", "options", "facts", "false": count}

A fact is {"fact", "declared", "measured", "ok", "detail", "hint", ...}, of norms.conformance.Check and
tasks.conformance.Check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results.record import RunSpec
    from suite.session import Session

Document = dict[str, Any]


def as_text(document: Document) -> str:
    """A document as JSON."""
    return json.dumps(_plain(document), allow_nan=False, indent=2)


def plan_document(session: Session, notes: Sequence[str] = ()) -> Document:
    """A plan beside what is stored, as `run --dry-run` shows it. notes: further ones."""
    status, plan, left = session.status, session.plan, session.left()
    runs = [
        {**_run(spec), "state": state, "reason": None, "goes_on": status.going_on.get(spec.key)}
        for spec, state in zip(plan.runs, status.states, strict=True)
    ]
    runs += [{**_run(spec), "state": "skipped", "reason": reason, "goes_on": None} for spec, reason in plan.skipped]
    return {
        "folder": str(session.folder),
        "budget": plan.budget,
        "threads": plan.threads,
        "jobs": session.jobs,
        "counts": {
            "runs": len(plan.runs),
            "done": status.done,
            "todo": len(status.todo),
            "failed": status.failed,
            "skipped": len(plan.skipped),
        },
        "seconds_left": None if left is None else left.seconds,
        "at_least": left is not None and left.at_least,
        "runs": runs,
        "missing": list(plan.missing),
        "left_out": list(plan.left_out),
        "notes": [*notes, *plan.notes],
    }


def _run(spec: RunSpec) -> Document:
    return {
        "key": spec.key if spec.data_checksum else None,
        "task": spec.task,
        "norm": spec.norm,
        "norm_label": spec.norm_label or spec.norm,
        "norm_options": spec.norm_options,
        "task_options": spec.task_options,
        "seed": spec.seed,
        "versions": {"norm": spec.norm_version, "task": spec.task_version},
    }


def norms_document() -> Document:
    from norms.registry import norm_info, norm_names, norm_option_defaults, norm_option_types

    def options(name: str) -> Document:
        types = norm_option_types(name)
        defaults = norm_option_defaults(name)
        return {key: {"default": value, "type": type_text(types[key])} for key, value in defaults.items()}

    return {"norms": [{**asdict(norm_info(name)), "options": options(name)} for name in norm_names()]}


def tasks_document() -> Document:
    from pydantic_core import to_jsonable_python

    from tasks import get_task, task_names, task_version

    def options(fields: Mapping[str, Any]) -> Document:
        return {
            key: {
                "default": to_jsonable_python(field.get_default(call_default_factory=True)),
                "type": type_text(field.annotation),
            }
            for key, field in fields.items()
        }

    return {
        "tasks": [
            {
                "name": name,
                "version": task_version(name),
                "metrics": list(get_task(name).metrics),
                "options": options(get_task(name).options.model_fields),
            }
            for name in task_names()
        ]
    }


def metrics_document() -> Document:
    from results.metrics import METRICS

    better = {True: "higher", False: "lower", None: None}
    return {
        "metrics": [
            {
                "name": name,
                "unit": metric.unit,
                "better": better[metric.higher_is_better],
                "description": metric.description,
            }
            for name, metric in METRICS.items()
        ]
    }


def datasets_document(data_dir: Path) -> Document:
    from tasks import data

    return {"datasets": [asdict(each) for each in data.listed(data_dir)]}


def facts(checks: Sequence[Any]) -> list[Document]:
    """Facts of one norm or one task, without the name of that under which they stand."""
    return [{key: value for key, value in asdict(check).items() if key not in ("norm", "task")} for check in checks]


def type_text(annotation: Any) -> str:
    """A type as people write it in Python."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _plain(value: Any) -> Any:
    """A value as JSON has it, and in one order on every machine."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
