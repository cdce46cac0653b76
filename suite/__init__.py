"""Configs -> runs -> records: the command line, and what it calls.

    from pathlib import Path

    import results
    import suite

    if __name__ == "__main__":  # every run has its own process, which imports this file once more
        classification = {"dataset": "fashion_mnist_mini", "model": "resnet8", "max_steps": 2}
        config = {"norms": ["bn", {"gn": {"num_groups": 8}}], "seeds": [0], "tasks": {"classification": classification}}
        planned = suite.plan_config(config)  # of a file: suite.plan_config(suite.read_config("configs/quick.yaml"))

        out = Path("runs/tried")
        runner = suite.Runner(threads=planned.threads, budget=planned.budget, folders=planned.folders)
        suite.write_skipped(out, planned.skipped)
        counts = suite.execute(planned.runs, runner, out, jobs=2)  # what is done already is not repeated
        print(counts, results.load(out)[["norm_label", "status", "top1"]])

Commands
    main                  `run-suite`, `python run_suite.py`: reads sys.argv and exits
Planning
    read_config           the mapping in a YAML file
    plan_config           a mapping -> a Plan: the runs to make, the skipped ones with the reason
    Overrides             what a command line changes in a config; PlanError holds every mistake, one line each
Running
    Runner                device, threads, data folder and plugins of the runs
    execute               every run in its own process; an Event for each start, progress and end
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
    from suite.plan import Plan, plan_config
    from suite.runner import Runner

__all__ = [
    "Event",
    "Overrides",
    "Plan",
    "PlanError",
    "Runner",
    "execute",
    "main",
    "plan_config",
    "read_config",
    "write_skipped",
]

# Imported when first asked for: planning imports torch, and `--help` must not wait for it.
_HOMES = {
    "cli": ("main",),
    "config": ("PlanError", "read_config"),
    "engine": ("Event", "execute", "write_skipped"),
    "blocks": ("Overrides",),
    "plan": ("Plan", "plan_config"),
    "runner": ("Runner",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"suite.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
