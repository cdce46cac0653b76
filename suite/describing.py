"""What a plan tells the results folder of its tasks, norms and runs, so that tables and reports need neither these nor
their plugins.

Tasks declare it (tasks.base.Declaring), and norms (norms.protocol.NormInfo); `results.declared` is its form. Nothing of
it takes part in a run's key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from norms.protocol import SETTING_FIELDS
from norms.registry import norm_definition, norm_info, norm_option_defaults
from norms.values import cut, nearest
from results import metrics
from results.declared import Declaration, NormNote, NormNotes, TaskNotes
from results.escape import one_line
from results.record import RunSpec
from results.store import write_norms, write_tasks
from suite.norm_entries import Norm
from tasks import get_task
from tasks.base import Task
from tasks.options import Options


class Described:
    """Collects what the runs of a plan are compared with, and what the config gave their norms.

    Attributes:
        baselines, given: as in results.declared.TaskNotes.
    """

    def __init__(self) -> None:
        self.baselines: dict[str, str | None] = {}
        self.given: dict[str, tuple[str, ...]] = {}

    def add(self, spec: RunSpec, norm: Norm, seeds: Sequence[int], baseline: RunSpec | None) -> None:
        """Note one setting and norm.

        Args:
            spec: of any seed.
            norm: as the config gave it.
            seeds: those of the plan.
            baseline: what its runs are compared with, of any seed.
        """
        given = tuple(field for field in SETTING_FIELDS if field in norm.options)
        compared = declares_baseline(get_task(spec.task))
        if not (given or compared):
            return
        keys = spec.keys(seeds)
        if given:
            self.given.update(dict.fromkeys(keys, given))
        if compared:
            others = [None] * len(keys) if baseline is None else baseline.keys(seeds)
            self.baselines.update(zip(keys, others, strict=True))

    def notes(self, specs: Sequence[RunSpec]) -> TaskNotes:
        """What a results folder is told of a plan. specs: one of each task at least, skipped ones included."""
        versions = dict.fromkeys((spec.task, spec.task_version) for spec in specs)
        return TaskNotes(
            tasks={task: {version: declaration(get_task(task))} for task, version in versions},
            setting_fields=SETTING_FIELDS,
            given=self.given,
            baselines=self.baselines,
        )


def tell_folder(folder: Path, specs: Sequence[RunSpec], told: TaskNotes) -> list[str]:
    """Write what a plan says of its tasks and norms into a folder of results.

    Args:
        specs: of the whole plan, skipped ones included.
        told: of `Described.notes`.

    Returns:
        A line for each note that said nothing readable and was set aside.

    Raises:
        OSError: a note, or the lock of them, can not be written.
    """
    named = dict.fromkeys(spec.norm for spec in specs)
    named.update(dict.fromkeys(norm for spec in specs for norm, _ in spec.further_norms.values()))
    return [*write_tasks(folder, told), *write_norms(folder, norm_notes(named))]


def norm_notes(names: Iterable[str]) -> NormNotes:
    """What these registered norms declare."""
    return NormNotes(norms={name: {str(norm_info(name).version): _note(name)} for name in names})


def _note(name: str) -> NormNote:
    info = norm_info(name)
    return NormNote(
        source=info.source,
        about=norm_definition(name),
        options=dict(norm_option_defaults(name)),
        axes=info.axes,
        mixes_samples=info.mixes_samples,
        mixes_samples_in_eval=info.mixes_samples_in_eval,
        keeps_stats=info.keeps_stats,
        needs=tuple(sorted(info.needs)),
        exact_gradient=info.exact_gradient,
        compiles=info.compiles,
    )


def declaration(task: Task) -> Declaration:
    """What a task declares, with the definitions of its metrics and its headline.

    Raises:
        ValueError: a headline or validation that is none of its metrics, or options that it has not (with the
            nearest).
    """
    chosen = {name: getattr(task, name, None) for name in ("headline", "validation")}
    for what, name in chosen.items():
        if name is not None:
            _check(task, what, [name], task.metrics)
    options = {name: getattr(task, name, None) for name in ("always_shown", "deciding")}
    over = getattr(task, "folds_over", None)
    for what, names in (*options.items(), ("folds_over", [over] if over else None)):
        if isinstance(names, str) or not isinstance(names, list | tuple | None):
            raise ValueError(f'task "{task.name}": {what}: a tuple of options is needed; given {cut(repr(names), 80)}')
        _check(task, what, names or (), task.options.model_fields)
    compares = getattr(task, "baseline", None)
    if compares is not None and not declares_baseline(task):
        raise ValueError(f'task "{task.name}": baseline: a method is needed; given {cut(repr(compares), 80)}')
    known = {name: metric for name, metric in metrics.METRICS.items() if name in task.metrics}
    return Declaration(
        headline=headline(task),
        validation=chosen["validation"] or metrics.VALIDATES.get(task.name),
        folds_over=over,
        metrics=known,
        **{name: None if given is None else tuple(given) for name, given in options.items()},
    )


def headline(task: Task) -> str:
    """The metric that ranks norms in a task: its own word, else that of `add_metric`, else its first metric with a
    direction (of a task whose metrics have none, its first)."""
    known = (metrics.METRICS.get(name) for name in task.metrics)
    directed = [metric.name for metric in known if metric is not None and metric.higher_is_better is not None]
    asked = getattr(task, "headline", None) or metrics.RANKS.get(task.name)
    return str(asked or (*directed, task.metrics[0])[0])


def declares_baseline(task: Task) -> bool:
    return callable(getattr(task, "baseline", None))


def baseline(task: Task, options: Options) -> Options | None:
    """Options of the run that one with these options is compared with; None where there is none.

    Raises:
        ValueError: the task's own function raised, or returned something else.
    """
    if not declares_baseline(task):
        return None
    try:
        found: Any = task.baseline(options)  # type: ignore[attr-defined]
    except Exception as error:
        text = cut(one_line(f"{type(error).__name__}: {error}"), 200)
        raise ValueError(f'task "{task.name}": baseline(options) raised {text}') from error
    if found is not None and not isinstance(found, task.options):
        given = type(found).__name__
        raise ValueError(
            f'task "{task.name}": baseline(options) gives {task.options.__name__} or None; given {cut(given, 80)}'
        )
    return None if found == options else found


def _check(task: Task, what: str, names: Sequence[Any], allowed: Any) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(
                f'task "{task.name}": {what} {cut(repr(name), 80)}: it has {", ".join(allowed)}'
                f"{nearest(str(name), allowed)}"
            )
