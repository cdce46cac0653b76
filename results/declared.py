"""What a results folder says of its tasks and norms, so that tables and reports need neither these nor their plugins.

`suite.describing` writes it when runs are planned, `results.store` keeps it in `<out>/tasks.json` and
`<out>/norms.json`. Nothing of it takes part in a run's key. Where a folder says nothing of its tasks, as all older
ones, the rules of `results.facts` serve; where it says nothing of its norms, a report says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator

from results.escape import cut, visible
from results.metrics import LONGEST_TITLE, Metric
from results.record import MOST_ENTRIES

MOST_VERSIONS = 50
"""Versions of a task that are kept: those planned last."""
MOST_TASKS = MOST_NORMS = 1_000
MOST_RUNS = 1_000_000
"""Runs of which something is kept: those planned last."""
MOST_CHECKED = 1_000
"""Rows (norms with their options) of which measured facts are kept: those measured last."""
_MOST_DIGITS = 20
_LONGEST_FACT, _LONGEST_OPTION, _LONGEST_DEFINITION = 1_000, 100, 20_000

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


def _shown(text: str) -> str:
    return cut(visible(" ".join(text.split())), _LONGEST_FACT)


def _definition(text: str) -> str:
    """Lines as they are, without what does not show; of a longer text its beginning."""
    lines = "\n".join(visible(line.rstrip()) for line in text.expandtabs().strip().splitlines())
    return lines if len(lines) <= _LONGEST_DEFINITION else f"{lines[: _LONGEST_DEFINITION - 1]}…"


def _bounded(value: Any) -> Any:
    """An option's default as JSON knows it: numbers, short texts, truth values and None as they are, else one text."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value if len(text := str(value)) <= _LONGEST_OPTION else cut(text, _LONGEST_OPTION)
    return _shown(value if isinstance(value, str) else json.dumps(value, default=str))


Shown = Annotated[str, AfterValidator(_shown)]


class FactCheck(BaseModel):
    """One declared fact beside the measured one.

    Attributes:
        verdict: "holds"; "false"; "not tried": the norm declares that it does not do this; "note": it would matter
            outside the suite alone.
    """

    model_config = ConfigDict(frozen=True)

    fact: Shown
    declared: Shown
    measured: Shown
    verdict: Literal["holds", "false", "not tried", "note"]


class Checked(BaseModel):
    """What `check` measured of one norm with one choice of options.

    Attributes:
        norm, norm_version: of the norm whose layer was measured; the facts hold for no other version.
        version, commit: of the suite that measured.
        time: ISO 8601, UTC.
        checks: one for each fact.
    """

    model_config = ConfigDict(frozen=True)

    norm: Name
    norm_version: Name
    version: Shown = ""
    commit: Shown = ""
    time: Shown = ""
    checks: Annotated[tuple[FactCheck, ...], Field(max_length=MOST_ENTRIES)] = ()


class NormNote(BaseModel):
    """What a norm of one version declares (norms.protocol.NormInfo).

    Attributes:
        source: the paper.
        about: its definition, the docstring of its class; "" if there is none.
        options: its own options with their defaults.
        axes: letters of "NCHW" over which a statistic is shared; None: not declared.
        needs: further inputs of a call.
    """

    model_config = ConfigDict(frozen=True)  # what a later version says besides is passed over

    source: Shown = ""
    about: Annotated[str, AfterValidator(_definition)] = ""
    options: Annotated[dict[Name, Annotated[Any, AfterValidator(_bounded)]], Field(max_length=MOST_ENTRIES)] = Field(
        default_factory=dict
    )
    axes: Annotated[str, StringConstraints(pattern="^N?C?(HW)?$")] | None = None
    mixes_samples: bool | None = None
    mixes_samples_in_eval: bool | None = None
    keeps_stats: bool | None = None
    needs: Annotated[tuple[Name, ...], Field(max_length=MOST_ENTRIES)] = ()
    exact_gradient: bool | None = None
    compiles: bool | None = None


class NormNotes(BaseModel):
    """What stands in `norms.json`.

    Attributes:
        norms: norm -> version -> what it declares; the version planned last is last.
        checked: row of a table (a norm, or a norm with its options as its label says them) -> what was measured of it.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    norms: dict[Name, dict[Name, NormNote]] = Field(default_factory=dict)
    checked: dict[Annotated[str, StringConstraints(min_length=1, max_length=2_000)], Checked] = Field(
        default_factory=dict
    )

    def followed_by(self, later: NormNotes) -> NormNotes:
        """These notes joined with later ones, which win. If there are too many, the oldest are dropped."""
        norms = {norm: dict(versions) for norm, versions in self.norms.items()}
        for norm, versions in later.norms.items():
            found = norms.pop(norm, {})
            for version, note in versions.items():
                found.pop(version, None)  # the last one stands last
                found[version] = note
            norms[norm] = dict([*found.items()][-MOST_VERSIONS:])
        before = {row: found for row, found in self.checked.items() if row not in later.checked}
        return NormNotes(
            norms=dict([*norms.items()][-MOST_NORMS:]),
            checked=dict([*(before | later.checked).items()][-MOST_CHECKED:]),
        )

    def of(self, versions: dict[str, str]) -> dict[str, dict[str, Any]]:
        """The notes of these norms as plain values: `df.attrs["norms"]`.

        Facts that were measured at another version of a norm are not shown as holding: "checks" is then empty, and
        "checked" says at which version they were measured.

        Args:
            versions: norm -> the version that takes part.

        Returns:
            norm -> the fields of NormNote, "version", and "checks" and "checked" of the norm with its default options
            ("checked" is None where nothing was measured, else its "version", "commit" and "time" and the
            "norm_version"); under "rows" the same two of each row with other options. A norm of which the folder says
            nothing is missing.
        """
        found = {}
        for norm, version in versions.items():
            note = self.norms.get(norm, {}).get(version)
            rows = {row: _plainly(checked, version) for row, checked in self.checked.items() if checked.norm == norm}
            if note is None and not rows:
                continue
            default = rows.pop(norm, {"checks": [], "checked": None})
            plain = (note or NormNote()).model_dump(mode="json")
            found[norm] = {**plain, "version": version, **default, "rows": rows}
        return found


def _plainly(checked: Checked, version: str) -> dict[str, Any]:
    plain = checked.model_dump(mode="json")
    checks = plain.pop("checks") if checked.norm_version == version else []
    return {"checks": checks, "checked": {name: plain[name] for name in ("version", "commit", "time", "norm_version")}}
