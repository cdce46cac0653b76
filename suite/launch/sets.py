"""The prepared data sets that runs read, and how they come to the nodes of a Ray cluster: once, by ray.put."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from results.record import RunSpec
from suite.folders import located
from suite.runner import Runner

_LARGEST = 2 * 2**30  # bytes of a data set that is sent
_PART = 32 * 2**20  # bytes of its parts


class Sets:
    """The data sets that a command has sent.

    Args:
        runner: of the runs.
        there: the nodes' own folder of prepared sets; None: of the same name as here.
        put: gives a reference to bytes that are kept for all nodes.
    """

    def __init__(self, runner: Runner, there: str | None, put: Callable[[bytes], Any]):
        self.runner, self.there, self.put = runner, there or str(runner.data_dir), put
        self._known: dict[str, dict[str, Any]] = {}  # by their folders

    def of(self, spec: RunSpec) -> dict[str, Any]:
        """`data` of suite.launch.far.placed, for a run. Raises OSError, ValueError: what is here is damaged or gone."""
        sets = {}
        for name in sets_of(spec, self.runner):
            folder = self.runner.data_dir / name
            manifest = (folder / "manifest.json").read_bytes()
            known = self._known.get(name)
            if known is None or known["manifest"] != manifest:
                known = self._known[name] = {"manifest": manifest, **self._sent(folder, manifest)}
            sets[name] = known
        return {"data_dir": self.there, "sets": sets}

    def _sent(self, folder: Path, manifest: bytes) -> dict[str, Any]:
        """The files of a data set in the cluster's memory: references to their parts by name, or None and why."""
        names = ["manifest.json", *json.loads(manifest)["files"]]
        size = sum((folder / name).stat().st_size for name in names)
        if "index.json" in names:
            return {"files": None, "why": "its images are files that are not sent: prepare it on the nodes"}
        if size > _LARGEST:
            return {"files": None, "why": f"has {size / 2**30:.1f} GiB, too much to be sent: prepare it on the nodes"}

        def parts(file: Path) -> list[Any]:
            with file.open("rb") as stream:
                return [self.put(part) for part in iter(lambda: stream.read(_PART), b"")]

        return {"files": {name: parts(folder / name) for name in names}, "why": ""}


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
