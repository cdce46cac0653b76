"""What makes a run, as plain values that travel to another machine, and made into a value again there.

Numbers, texts, bytes, lists and mappings alone, so that nothing of it executes when it arrives: plugins travel as the
texts that were read here, and are executed by the run's own process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from results.record import RunRecord, RunSpec
from suite.launch.making import RunOne
from suite.runner import Runner

Plain = dict[str, Any]


def plain(run_one: RunOne) -> Plain:
    """A Runner by its values, another function by its name.

    Raises:
        ValueError: a function that can not be imported by its name.
    """
    if not isinstance(run_one, Runner):
        module, name = getattr(run_one, "__module__", "__main__"), getattr(run_one, "__qualname__", "")
        found = None if module == "__main__" else getattr(importlib.import_module(module), name, None)
        if found is not run_one:
            raise ValueError(f"{run_one!r} makes runs on this machine alone: it has no name by which others import it")
        return {"function": f"{module}:{name}"}
    values = {field.name: getattr(run_one, field.name) for field in fields(run_one)}
    return {
        "runner": {
            **values,
            "data_dir": str(run_one.data_dir),
            "folders": dict(run_one.folders),
            "trackers": list(run_one.trackers),
            "plugins": [_plugin(each) for each in run_one.plugins],
        }
    }


def _plugin(plugin: Any) -> Plain:
    modules = [[each.name, str(each.file), each.content, each.tree] for each in plugin.source.modules]
    names = [list(pair) for pair in plugin.names]
    return {
        "file": str(plugin.file),
        "modules": modules,
        "names": names,
        "module": plugin.module,
        "release": plugin.release,
    }


@dataclass(frozen=True)
class Carried:
    """A RunOne that has travelled. It is unpacked by the process of the run, which has imported torch.

    Args:
        values: of `plain`.
        data_dir: of prepared data sets on this machine.
    """

    values: Mapping[str, Any]
    data_dir: str = ""

    def __call__(self, spec: RunSpec, folder: Path, report: Callable[[float], None]) -> RunRecord:
        return self.unpacked()(spec, folder, report)

    def unpacked(self) -> RunOne:
        """The Runner, or the function. Raises ImportError, AttributeError, ValueError."""
        if "function" in self.values:
            module, _, name = self.values["function"].partition(":")
            function: RunOne = getattr(importlib.import_module(module), name)
            return function
        from norms.plugins import Plugin
        from norms.source import Module, Source

        values = dict(self.values["runner"])
        values["data_dir"] = Path(self.data_dir or values["data_dir"])
        values["trackers"] = tuple(values["trackers"])
        values["plugins"] = tuple(
            Plugin(
                Source(Path(each["file"]), tuple(Module(n, Path(f), c, t) for n, f, c, t in each["modules"])),
                tuple((kind, name) for kind, name in each["names"]),
                each["module"],
                each["release"],
            )
            for each in values["plugins"]
        )
        return Runner(**values)
