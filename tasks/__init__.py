"""Task modules by name, imported only when asked for. A plugin adds one with `register_task`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.base import Task

_MODULES = {
    "classification": "tasks.classification",
    "architecture_search": "tasks.architecture_search",
    "adversarial": "tasks.adversarial",
    "few_shot": "tasks.few_shot",
    "domain_adaptation": "tasks.domain_adaptation",
    "domain_generalization": "tasks.domain_generalization",
}
_TASKS: dict[str, Task] = {}


def task_names() -> list[str]:
    return [*_MODULES, *(name for name in _TASKS if name not in _MODULES)]


def get_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the nearest name for an unknown one."""
    if name in _TASKS:
        return _TASKS[name]
    if name not in _MODULES:
        from norms.registry import nearest

        raise ValueError(f'unknown task "{name}"; tasks: {", ".join(task_names())}{nearest(name, task_names())}')
    task: Task = importlib.import_module(_MODULES[name]).TASK
    _TASKS[name] = task
    return task


def register_task(task: Task) -> Task:
    """Add a task of one's own. Raises ValueError when the name is taken."""
    if task.name in task_names():
        raise ValueError(f'task "{task.name}" is already registered; choose another name')
    _TASKS[task.name] = task
    return task
