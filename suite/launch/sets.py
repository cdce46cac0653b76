"""The prepared data sets that a run reads."""

from __future__ import annotations

from collections.abc import Sequence

from results.record import RunSpec
from suite.folders import located
from suite.runner import Runner


def sets_of(spec: RunSpec, runner: Runner) -> Sequence[str]:
    """The folders below `runner.data_dir` whose manifests decide the run's data; none for built-in data.

    Raises:
        ValueError: what is there is damaged or gone.
    """
    if not spec.data_checksum:
        return []
    from tasks import get_task
    from tasks.data.prepared import noting

    task = get_task(spec.task)
    with noting() as found:
        task.data_checksum(task.options.model_validate(located(spec.task_options, runner.folders)), runner.data_dir)
    return sorted(found)
