"""Configs -> runs -> records: what the command line does, from Python.

    from pathlib import Path

    import suite

    if __name__ == "__main__":  # every run has its own process, which imports this file once more
        classification = {"dataset": "fashion_mnist_mini", "model": "resnet8", "max_steps": 2}
        config = {"norms": ["bn", {"gn": {"num_groups": 8}}], "seeds": [0], "tasks": {"classification": classification}}
        df = suite.run(config, out=Path("runs/tried"), jobs=2)  # what is done already is not repeated
        print(df[["norm_label", "status", "top1"]])

        planned = suite.plan("configs/quick.yaml", norms=["bn"], seeds="0-1")
        print(len(planned.runs), "runs", len(planned.skipped), "skipped")

Runs
    run                   makes what is missing of a config, and returns one row per run
    plan                  the runs that a config asks for, and those that it skips with the reasons: a Plan
    PlanError             every mistake of a config, one line each
    Event                 what `run(on_event=...)` is told: the start, the progress and the end of a run
Commands
    main                  `run-suite`, `python run_suite.py`: reads sys.argv and exits
The steps of `run`, for who needs one alone
    read_config           the mapping in a YAML file
    plan_config           a mapping -> a Plan, with the Overrides of a command line
    Overrides             what a command line changes in a config
    Session               a Plan beside a folder of results: what is done, what is to do, its making
    Runner                device, threads, data folder and plugins of the runs
    execute               every run in its own process
    write_skipped         stores why runs are skipped, for the tables
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.blocks import Overrides
    from suite.cli import main
    from suite.config import PlanError, read_config
    from suite.engine import Event, execute, write_skipped
    from suite.planning import Plan, plan_config
    from suite.runner import Runner
    from suite.session import Session, plan, run

__all__ = [
    "Event",
    "Overrides",
    "Plan",
    "PlanError",
    "Runner",
    "Session",
    "execute",
    "main",
    "plan",
    "plan_config",
    "read_config",
    "run",
    "write_skipped",
]

# Imported when first asked for: planning imports torch, and `--help` must not wait for it.
_HOMES = {
    "cli": ("main",),
    "config": ("PlanError", "read_config"),
    "engine": ("Event", "execute", "write_skipped"),
    "blocks": ("Overrides",),
    "planning": ("Plan", "plan_config"),
    "runner": ("Runner",),
    "session": ("Session", "plan", "run"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"suite.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
