"""Tasks, which train and measure a norm, by name; each is imported when it is asked for. And the contract of your own.

    from pathlib import Path

    import torch

    import norms
    import tasks

    task = tasks.get_task("classification")
    print(task.name, task.metrics, sorted(task.options.model_fields))
    options = task.options(dataset="fashion_mnist_mini", model="resnet8", epochs=1, max_steps=2)
    context = tasks.RunContext(torch.device("cpu"), seed=0, data_dir=Path("data"), folder=Path("."))
    outcome = task.run(norms.make_norm("gn", num_groups=8), options, context)
    print(outcome.metrics["top1"])

Names
    task_names(), get_task(name)    the tasks there are
    task_version(name)              of a task of the suite its own number, of a plugin's the plugin's version
    register_task(task)             adds one of yours; a file with it is loaded by --plugin
    register_model(name)            the decorator that adds a network of yours, a function of a norm factory
    register_optimizer(name)        the decorator that adds an optimizer of yours
    load_network(folder)            the network of a run that was made with --keep-weights, and what prepares images
The contract (tasks.base)
    Task                  name, version, options, metrics, and the methods setting, data_checksum, why_not, run
    Options               base of its options model
    Setting               what of a run a norm's constructor may ask for
    RunContext            device, seed, folders, named generators
    Outcome, Diverged     how a run ends: with metrics, or by a loss that is not finite
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.base import Diverged, Outcome, RunContext, Setting, Task
    from tasks.nets.models import register_model
    from tasks.options import Options
    from tasks.schedule import register_optimizer
    from tasks.weights import load_network

__all__ = [
    "Diverged",
    "Options",
    "Outcome",
    "RunContext",
    "Setting",
    "Task",
    "get_task",
    "load_network",
    "register_model",
    "register_optimizer",
    "register_task",
    "task_names",
    "task_version",
]

_CONTRACT = ("Diverged", "Options", "Outcome", "RunContext", "Setting", "Task")
_HOMES = {
    "load_network": "tasks.weights",
    "register_model": "tasks.nets.models",
    "register_optimizer": "tasks.schedule",
    **dict.fromkeys(_CONTRACT, "tasks.base"),
}
_MODULES = {
    "classification": "tasks.classification.task",
    "architecture_search": "tasks.architecture_search.task",
    "adversarial": "tasks.adversarial.task",
    "few_shot": "tasks.few_shot.task",
    "domain_adaptation": "tasks.domain_adaptation.task",
    "domain_generalization": "tasks.domain_generalization.task",
}
_TASKS: dict[str, Task] = {}


def task_names() -> list[str]:
    """All names: the built-in tasks, then those of plugins."""
    return [*_MODULES, *(name for name in _TASKS if name not in _MODULES)]


def get_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the nearest name for an unknown one."""
    if name in _TASKS:
        return _TASKS[name]
    if name not in _MODULES:
        from norms import plugins
        from norms.values import nearest

        if plugins.load_offered("task", name):
            return _TASKS[name]
        raise ValueError(f'unknown task "{name}"; tasks: {", ".join(task_names())}{nearest(name, task_names())}')
    task: Task = importlib.import_module(_MODULES[name]).TASK
    _TASKS[name] = task
    return task


def task_version(name: str) -> str:
    """The version of a task in a run's key; that of a plugin's task changes with the plugin's text."""
    from norms import plugins

    task, plugin = get_task(name), plugins.plugin_of("task", name)
    return str(task.version) if plugin is None else plugin.version


def register_task(task: Task, *, replace: bool = False) -> Task:
    """Add a task of one's own; a plugin that is loaded again replaces its own.

    Args:
        task: its value, see tasks.base.Task.
        replace: replace one that was registered at the prompt, or by a program; for notebooks.

    Raises:
        ValueError: the name is malformed or taken, a metric's name is malformed, a method is missing, or the options
            are no Options or allow no `norm_batch_size` of None.
    """
    _check_names(task)
    from norms import plugins

    if task.name in task_names():
        plugins.check_free("task", task.name, "", replace=replace, of_the_suite=task.name in _MODULES)
    _check_shape(task)
    plugins.registered("task", task.name, lambda: _TASKS)
    _TASKS[task.name] = task
    return task


def _check_names(task: Task) -> None:
    """Names become folders, columns and headings; the rule is that of norms."""
    if isinstance(task.metrics, str) or not task.metrics:
        raise ValueError(f'task "{task.name!s:.80}": metrics are a tuple of names, one or more; given {task.metrics!r}')
    from norms import plugins

    for what, name in (("task", task.name), *(("metric", metric) for metric in task.metrics)):
        plugins.check_name(what, name)


def _check_shape(task: Task) -> None:
    """What every plan and run asks of a task is there, so that its absence is said where the task is registered."""
    from pydantic import TypeAdapter, ValidationError

    from tasks.options import Options

    missing = [name for name in ("setting", "data_checksum", "why_not", "run") if not callable(getattr(task, name, 0))]
    if missing:
        raise ValueError(f'task "{task.name}" has no method {", ".join(missing)}; tasks.base.Task says what each gives')
    options = getattr(task, "options", None)
    if not isinstance(options, type) or not issubclass(options, Options):
        raise ValueError(f'task "{task.name}": options are a class derived from tasks.Options; given {options!r:.80}')
    field = options.model_fields.get("norm_batch_size")
    if field is not None:
        try:
            TypeAdapter[Any](field.annotation or Any).validate_python(None)
        except ValidationError:
            raise ValueError(
                f'task "{task.name}": norm_batch_size must allow None (int | None): the plan sets it so for norms that '
                "do not mix samples, which are run once"
            ) from None


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # tasks.base imports torch, which the names of tasks do not need
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
