"""docs/tasks.md: every task with its options and metrics; the metrics and data sets that there are."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

import tasks
from results import metrics
from suite.documents.docstrings import as_markdown, in_a_cell, parts_of
from tasks import data

_OURS = (
    *("classification", "architecture_search", "adversarial"),
    *("few_shot", "domain_adaptation", "domain_generalization"),
)


def pages_of_tasks() -> str:
    """A section for each task of the suite: what it is, its metrics and its options."""
    return "\n".join(line for name in _OURS for line in _section(name)).rstrip()


def _section(name: str) -> Iterator[str]:
    task = tasks.get_task(name)
    module = sys.modules[type(task).__module__]
    about = inspect.cleandoc(module.__doc__ or "")
    yield from (f"## `{name}`", "", as_markdown(about), "")
    yield from ("| metric | unit | better | meaning |", "| --- | --- | --- | --- |")
    own: dict[str, str] = {}
    for section, entries in parts_of(type(task)).sections.items():
        own |= entries if section.startswith("Metrics") else {}
    for metric in task.metrics:
        yield _metric_row(metrics.metric(metric), own.get(metric, ""))
    yield from ("", "| option | default | values | meaning |", "| --- | --- | --- | --- |")
    meanings: dict[str, str] = {}
    for model in reversed(task.options.__mro__):
        if issubclass(model, BaseModel) and "Attributes" in (said := parts_of(model).sections):
            meanings |= said["Attributes"]
    for option, field in task.options.model_fields.items():
        default = json.dumps(to_jsonable_python(field.get_default(call_default_factory=True)))
        yield f"| `{option}` | `{default}` | {_values(field)} | {in_a_cell(meanings.get(option, ''))} |"
    further = [_further(model) for model in task.options.__mro__ if model.__module__.startswith("tasks.")]
    yield from ("", *(text for text in further if text), "")


def _further(model: type) -> str:
    """What a model of options says besides naming them; the base model of all is for the code's readers."""
    if "Attributes" not in parts_of(model).sections:
        return ""
    _, _, rest = parts_of(model).words.partition("\n\n")
    return as_markdown(rest) + "\n" if rest else ""


def _values(field: FieldInfo) -> str:
    """The values that an option takes, as a config writes them."""
    return _type(field.annotation)


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (typing.Union, UnionType):
        return ", ".join(
            [*(_type(part) for part in inside if part is not NoneType)] + ["`null`"] * (NoneType in inside)
        )
    if origin is tuple:
        return (
            "list of numbers" if inside[0] is not str and "`" not in _type(inside[0]) else f"list of {_type(inside[0])}"
        )
    if origin is dict:
        return "mapping"
    words = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", NoneType: "`null`"}
    return words.get(kind) or ("a norm" if getattr(kind, "__name__", "") == "NormChoice" else "mapping")


def all_metrics() -> str:
    """Every metric that tables know by name."""
    rows = ["| metric | title | unit | better | meaning |", "| --- | --- | --- | --- | --- |"]
    for name in metrics.METRICS:
        found = metrics.METRICS[name]
        first, *rest = _metric_row(found, "").split(" | ")
        rows.append(" | ".join([first, in_a_cell(found.title), *rest]))
    return "\n".join(rows)


def _metric_row(metric: metrics.Metric, own: str) -> str:
    better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
    return f"| `{metric.name}` | {in_a_cell(metric.unit)} | {better} | {in_a_cell(own or metric.description)} |"


def all_datasets() -> str:
    """Every data set that the suite knows by name, whether it is here or not."""
    rows = [
        "| name | what | classes | images | domains | from | licence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in data.dataset_names():
        info = data.dataset_info(name)
        sizes = ", ".join(f"{count:,} {part}" for part, count in info.sizes.items())
        where = "built in" if info.builtin else f"`{info.how}`" if "(" not in info.how else in_a_cell(info.how)
        cells = (f"`{name}`", in_a_cell(f"{info.title}, {info.kind}"), str(info.num_classes or ""), sizes)
        rows.append(f"| {' | '.join((*cells, ', '.join(info.domains), where, in_a_cell(info.licence)))} |")
    return "\n".join(rows)
