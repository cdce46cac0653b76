"""What tables know of a task: from the results folder where it says so, else by general rules.

A folder that was planned by this version describes its tasks (results.declared). Of an older one, and of what a task
does not declare, this holds:
- the headline is the first measured metric with a direction, in the vocabulary's order;
- the first measured one of `metrics.VALIDATION` may choose hyper-parameters;
- options of these names are folded over, always shown, or decide others: HELD_OUT, ALWAYS_SHOWN, DECIDING.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from results.declared import Declaration
from results.frame import ENDED, HELD_OUT, METHOD, metric_columns
from results.metrics import (
    GAIN,
    METRICS,
    RANKS,
    TARGET,
    VALIDATES,
    VALIDATION,
    WORST,
    Metric,
    domain_of,
    metric_or_plain,
    of_domain,
)
from results.record import DATASET
from results.rows import bare, distinct, natural

ALWAYS_SHOWN = ("crafting_mode", "forward")
"""Options without whose value results can not be read."""
DECIDING = (DATASET, METHOD)
"""Options that others usually follow from."""


@dataclass(frozen=True)
class Facts:
    """One task, as its frame knows it.

    Attributes:
        task: its name.
        declared: what the results folder says of it.
        present: the metrics that its runs measured, in no order.
        folded: the metric that has a part for each held-out domain, where the rows are folded over these.
    """

    task: str
    declared: Declaration
    present: frozenset[str]
    folded: str = ""

    @property
    def always_shown(self) -> tuple[str, ...]:
        return ALWAYS_SHOWN if self.declared.always_shown is None else self.declared.always_shown

    @property
    def deciding(self) -> tuple[str, ...]:
        return DECIDING if self.declared.deciding is None else self.declared.deciding

    @property
    def folds_over(self) -> str:
        """The option whose values are held out one after the other; "" where there is none."""
        return HELD_OUT if self.declared.folds_over is None else self.declared.folds_over

    @property
    def headline(self) -> str | None:
        """The measured metric that ranks norms; None if no measured metric has a direction."""
        ranked = (self.declared.headline, RANKS.get(self.task), *self.in_order(self.present))
        return next((name for name in ranked if name in self.present and self._ranks(str(name))), None)

    @property
    def validation(self) -> str:
        """The metric that may choose hyper-parameters."""
        first = next((name for name in VALIDATION if name in self.present), VALIDATION[-1])
        return self.declared.validation or VALIDATES.get(self.task) or first

    @functools.cached_property
    def subject(self) -> str:
        """The metric of which gains, single domains and worst domains are computed, measured or not."""
        if asked := self.folded or self.declared.headline or RANKS.get(self.task):
            return asked
        known = (name for name in (TARGET, *METRICS, *self.declared.metrics) if name not in (GAIN, WORST))
        return next((name for name in known if name in self.present and self._ranks(name)), TARGET)

    def _ranks(self, name: str) -> bool:
        return not domain_of(name) and self._of_run(name).higher_is_better is not None

    @property
    def worst(self) -> str:
        """The name of the lowest subject over the held-out domains."""
        return WORST if self.subject == TARGET else f"worst_{self.subject}"

    def metric(self, name: str) -> Metric:
        """The metric of this name: by the vocabulary, by the results folder, else without unit and direction."""
        base, _, domain = name.partition("/")
        if domain and (base in METRICS or base in self.declared.metrics):
            return of_domain(self._of_run(base), name)
        subject, own = self._of_run(self.subject), self.declared.metrics
        if name == GAIN and self.declared.headline not in (None, TARGET) and name not in own:
            said = f"{subject.title} less that of the run that it is compared with."
            unit = "points" if subject.unit == "%" else subject.unit
            return replace(subject, name=name, title="gain", unit=unit, description=said)
        if name == self.worst and name not in METRICS and name not in own:
            return replace(
                subject, name=name, title=f"worst {subject.title}", description="The worst over the domains."
            )
        return self._of_run(name)

    def _of_run(self, name: str) -> Metric:
        return METRICS.get(name) or self.declared.metrics.get(name) or metric_or_plain(name)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names of metrics in the order of tables: the vocabulary's, then the folder's, then all others; what is
        derived of the subject follows it."""
        order = {name: i for i, name in enumerate(dict.fromkeys((*METRICS, *self.declared.metrics)))}
        subject = order.get(self.subject, len(order))

        def place(name: str) -> tuple[Any, ...]:
            base, _, domain = name.partition("/")
            if domain and base == self.subject:
                return (subject, 3, natural(domain), name)
            if name in (GAIN, self.worst):
                return (subject, 1 + (name == self.worst), (), name)
            return (order.get(name, len(order)), 0, (), name)

        return sorted(names, key=place)


def task_facts(df: pd.DataFrame, task: str) -> Facts:
    """What is known of a task of a frame. df: of `results.load`, or a part of it; it may hold other tasks, too."""
    part = bare(df[df["task"] == task] if len(df) else df)
    declared = Declaration.model_validate(df.attrs.get("tasks", {}).get(task, {}))
    present = frozenset(name for name in metric_columns(part) if part[name].notna().any())
    ends = [c for c in map(str, part.columns) if c.startswith(ENDED) and "/" in c]
    folded = next((c.removeprefix(ENDED).partition("/")[0] for c in ends if part[c].notna().any()), "")
    return Facts(task, declared, present, folded)


def every_task(df: pd.DataFrame) -> dict[str, Facts]:
    """task -> what is known of it, of each task of a frame."""
    return {task: task_facts(df, task) for task in distinct(df["task"])} if len(df) else {}


def present_metrics(df: pd.DataFrame) -> list[str]:
    """The metrics that some run here measured, in the order of tables; of several tasks one after the other."""
    return list(dict.fromkeys(name for facts in every_task(df).values() for name in facts.in_order(facts.present)))
