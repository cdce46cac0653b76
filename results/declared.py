"""What a results folder says of its tasks, so that tables need neither the tasks nor their plugins.

`suite.describing` writes it when runs are planned, `results.store` keeps it in `<out>/tasks.json`. Nothing of it takes
part in a run's key. Where a folder says nothing, as all older ones, the rules of `results.facts` serve.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator

from results.escape import cut
from results.metrics import LONGEST_TITLE, Metric
from results.record import MOST_ENTRIES

MOST_VERSIONS = 50
"""Versions of a task that are kept: those planned last."""
MOST_TASKS = 1_000
MOST_RUNS = 1_000_000
"""Runs of which something is kept: those planned last."""
_MOST_DIGITS = 20

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _printable(metric: Metric) -> Metric:
    if not 0 <= metric.digits <= _MOST_DIGITS or not math.isfinite(metric.scale):
        raise ValueError(f"a metric of {metric.digits} digits and scale {metric.scale}")
    title, unit, said = cut(metric.title, LONGEST_TITLE), cut(metric.unit, LONGEST_TITLE), cut(metric.description, 1000)
    return replace(metric, title=title, unit=unit, description=said)


class Declaration(BaseModel):
    """What a task of one version declares (tasks.base.Declaring); None where it says nothing.

    Attributes:
        headline: the metric that ranks norms.
        validation: the metric that may choose hyper-parameters.
        always_shown: options that stand in headings even with one value.
        deciding: options that others usually follow from.
        folds_over: the option whose values are held out one after the other; "" where there is none.
        metrics: name -> definition, in the order in which tables show them.
    """

    model_config = ConfigDict(frozen=True)  # what a later version says besides is passed over

    headline: Name | None = None
    validation: Name | None = None
    always_shown: Annotated[tuple[Name, ...], Field(max_length=MOST_ENTRIES)] | None = None
    deciding: Annotated[tuple[Name, ...], Field(max_length=MOST_ENTRIES)] | None = None
    folds_over: Annotated[str, StringConstraints(max_length=200)] | None = None
    metrics: Annotated[dict[Name, Annotated[Metric, AfterValidator(_printable)]], Field(max_length=MOST_ENTRIES)] = (
        Field(default_factory=dict)
    )

    @field_validator("metrics")
    @classmethod
    def _named(cls, metrics: dict[str, Metric]) -> dict[str, Metric]:
        return {name: replace(metric, name=name) for name, metric in metrics.items()}


class TaskNotes(BaseModel):
    """What stands in `tasks.json`.

    Attributes:
        tasks: task -> version -> what it declares; the version planned last is last.
        setting_fields: norm options that a run's setting fills in where the config does not give them.
        given: key of a run -> those of the setting fields that the config gave.
        baselines: key of a run -> key of the run that its gain is over; None for a run that has none. Only runs of
            tasks that declare baselines are here.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    tasks: dict[Name, dict[Name, Declaration]] = Field(default_factory=dict)
    setting_fields: tuple[Name, ...] = ()
    given: dict[Name, tuple[Name, ...]] = Field(default_factory=dict)
    baselines: dict[Name, Name | None] = Field(default_factory=dict)

    def declaration(self, task: str, version: str) -> Declaration:
        """The declaration of this version of a task; an empty one if none is noted."""
        return self.tasks.get(task, {}).get(version, Declaration())

    def followed_by(self, later: TaskNotes) -> TaskNotes:
        """These notes joined with those of a later plan, which win. If there are too many, the oldest are dropped."""
        tasks = {task: dict(versions) for task, versions in self.tasks.items()}
        for task, versions in later.tasks.items():
            found = tasks.pop(task, {})
            for version, declaration in versions.items():
                found.pop(version, None)  # the last one stands last
                found[version] = declaration
            tasks[task] = dict([*found.items()][-MOST_VERSIONS:])
        return TaskNotes(
            tasks=dict([*tasks.items()][-MOST_TASKS:]),
            setting_fields=tuple(dict.fromkeys((*self.setting_fields, *later.setting_fields))),
            given=dict([*(self.given | later.given).items()][-MOST_RUNS:]),
            baselines=dict([*(self.baselines | later.baselines).items()][-MOST_RUNS:]),
        )
