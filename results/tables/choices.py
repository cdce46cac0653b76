"""What a person asks a table for by name: tasks, norms, metrics, settings. All mistakes are told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from results.facts import every_task
from results.metrics import METRICS, nearest
from results.rows import current, distinct, option_columns, value_text
from results.tables.pivot import Pivot, every_pivot

Where = Mapping[str, Any]
"""Option, or task.option, -> the value, or the list of values, that its runs must have."""


@dataclass(frozen=True)
class Norms:
    """The rows that norms give over several tasks.

    A norm with at most one row in each task has one row, called as it is there, or by the norm's name where its options
    differ between tasks. A norm with several rows in some task has a row for each label.

    Attributes:
        of: row -> its norm's registered name, in the order in which tasks have them.
        labels: row -> task -> its label there.
    """

    of: Mapping[str, str]
    labels: Mapping[str, Mapping[str, str]]

    @classmethod
    def among(cls, pivots: Iterable[Pivot]) -> Norms:
        """Those of any of these tasks."""
        found: dict[str, dict[str, list[str]]] = {}  # norm -> task -> labels
        for pivot in pivots:
            for row in pivot.rows:
                found.setdefault(pivot.norms[row], {}).setdefault(pivot.task, []).append(pivot.labels[row])
        of, labels = {}, {}
        taken = {label for tasks in found.values() for every in tasks.values() for label in every}
        for norm, tasks in found.items():
            different = list(dict.fromkeys(label for every in tasks.values() for label in every))
            alone = all(len(every) == 1 for every in tasks.values())
            if len(different) > 1 and alone and (norm not in taken or norm in different):
                of[norm], labels[norm] = norm, {task: every[0] for task, every in tasks.items()}
                continue
            for label in different:
                of[label], labels[label] = norm, {task: label for task, every in tasks.items() if label in every}
        return cls(of, labels)

    def find(self, name: str) -> list[str]:
        """The rows that a label or a registered name stands for; none for an unknown one."""
        if name in self.of:
            return [name]
        rows = [row for row, norm in self.of.items() if norm == name]
        return rows or [row for row, labels in self.labels.items() if name in labels.values()]

    def unknown(self, what: str, name: str) -> str:
        """The mistake of an unknown name."""
        known = list(dict.fromkeys((*self.of, *self.of.values())))
        return f'{what} "{name}": no row has this norm; norms: {", ".join(self.of)}{nearest(name, known)}'


def check_reference(norms: Norms, reference: str) -> list[str]:
    """The mistake, if any, in naming the norm that others are compared with."""
    found = norms.find(reference)
    if not found:
        return [norms.unknown("reference", reference)]
    return [] if len(found) == 1 else [_several("reference", reference, found)]


def named_reference(df: pd.DataFrame, reference: str) -> str:
    """The name of a norm that others can be compared with in some task of a frame.

    Raises:
        ValueError: no run has this norm (with the nearest), or it has several rows wherever it is.
    """
    pivots = every_pivot(df, reference)
    norms = Norms.among(pivots)
    if all(pivot.reference is None for pivot in pivots) and (mistakes := check_reference(norms, reference)):
        raise ValueError(mistakes[0])
    return reference


def chosen_rows(norms: Norms, what: str, names: Iterable[str], mistakes: list[str]) -> list[str]:
    """The rows that names stand for, each once, in the order of the names; mistakes are added to the list."""
    rows: list[str] = []
    for name in names:
        if not norms.find(name):
            mistakes.append(norms.unknown(what, name))
        rows += norms.find(name)
    return list(dict.fromkeys(rows))


def renamed(norms: Norms, rows: Mapping[str, str], mistakes: list[str]) -> dict[str, str]:
    """row -> what is printed for it, of the rows that are called otherwise; mistakes are added to the list."""
    printed: dict[str, str] = {}
    for name, text in rows.items():
        found = norms.find(name)
        if not found:
            mistakes.append(norms.unknown("rows", name))
        elif len(found) > 1:
            mistakes.append(_several("rows", name, found))
        elif not text.strip():
            mistakes.append(f'rows "{name}": the printed name is empty')
        else:
            printed[found[0]] = text.strip()
    names = [printed.get(label, label) for label in norms.of]
    twice = sorted({name for name in names if names.count(name) > 1})
    mistakes += [f'rows: several rows would be called "{name}"; give them different names' for name in twice]
    return printed


def chosen_tasks(df: pd.DataFrame, tasks: Sequence[str] | None, mistakes: list[str]) -> list[str]:
    """The tasks asked for, in that order; None: all. Mistakes are added to the list."""
    known = distinct(df["task"])
    for task in tasks or ():
        if task not in known:
            mistakes.append(f'tasks "{task}": no run is of this task; tasks: {", ".join(known)}{nearest(task, known)}')
    return list(dict.fromkeys(task for task in tasks if task in known)) if tasks is not None else known


def check_metrics(df: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """Mistakes in names of metrics: unknown ones, and those that no run measured. df: with derived metrics."""
    facts = every_task(df).values()
    measured = list(dict.fromkeys(name for found in facts for name in found.in_order(found.present)))
    mistakes = []
    for name in metrics:
        if name in METRICS and name not in measured:
            mistakes.append(f'no run here measured "{name}"; measured: {", ".join(measured) or "nothing"}')
        elif name not in measured:
            close = nearest(name, [*measured, *METRICS])
            mistakes.append(f'unknown metric "{name}"; measured: {", ".join(measured) or "nothing"}{close}')
    return mistakes


def only_where(df: pd.DataFrame, where: Where, mistakes: list[str]) -> pd.DataFrame:
    """The runs whose options have these values; mistakes are added to the list.

    A value is compared as it is printed, None as "none". A run without a norm batch, whose norm does not mix samples,
    has every norm batch. An option without a task's name applies to the tasks that have it.

    Args:
        df: of `results.load` or `with_derived`.
        where: as `Where`.
        mistakes: gets a line for each option that no task has, and each value that no run has.
    """
    df = current(df)
    if not where or df.empty:
        return df
    keep = pd.Series(True, df.index)
    tasks = distinct(df["task"])
    for place, wanted in where.items():
        task, dot, option = place.partition(".")
        task, option = (task, option) if dot and task in tasks else ("", place)
        inside = df["task"] == task if task else pd.Series(True, df.index)
        column = f"option.{option}"
        known = [name.removeprefix("option.") for name in option_columns(df[inside])]
        if option not in known:
            mistakes.append(f'where "{place}": no such option; options: {", ".join(known)}{nearest(option, known)}')
            continue
        values = [text.strip() for text in map(str, wanted if isinstance(wanted, list | tuple) else [wanted])]
        having = inside & df["task"].map(df.groupby("task")[column].apply(lambda found: bool(found.notna().any())))
        texts = pd.Series([value_text(option, v) for v in _plain(df[column])], df.index)
        there = list(dict.fromkeys(value_text(option, v) for v in distinct(df.loc[having, column].tolist())))
        for value in values:
            if value not in there:
                mistakes.append(
                    f'where "{place}={value}": no run has this value; values: {", ".join(there)}{nearest(value, there)}'
                )
        fits = texts.isin(values)
        if column == "option.norm_batch_size":
            fits |= df["repeats"].astype(bool)
        keep &= ~having | fits
    return df[keep]


def _plain(column: pd.Series) -> list[Any]:
    return [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]


def _several(what: str, name: str, found: Sequence[str]) -> str:
    return f'{what} "{name}": {len(found)} rows have this norm; name one: {", ".join(found)}'
