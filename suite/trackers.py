"""Trackers: programs in which people look at runs. A tracker hears a run's rows, and its record at the end.

Each writes below `<out>/tracking/<tracker>/<task>/<norm>/<key>/`. A process that goes on with a run begins that folder
anew, with the rows so far, so that no epoch is there twice and none that is made again contradicts another. A tracker
that fails costs a line, never the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from results.escape import cut, one_line
from results.record import RunRecord, RunSpec


class Tracker(Protocol):
    """The log of one run."""

    def row(self, number: int, row: Mapping[str, float | None]) -> None:
        """A row of the history. number: from 1; the same as `epoch` where a run has one loop."""
        ...

    def end(self, record: RunRecord) -> None:
        """The run is finished and stored."""
        ...


class TensorBoard:
    """Event files: a scalar per column of the history, at the number of its row; at the end `metrics/NAME`, and the
    status as a text. Options, norm and seed are its hyperparameters."""

    def __init__(self, folder: Path, spec: RunSpec):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for left in folder.glob("events.out.tfevents.*"):  # by an earlier process of this run
            with contextlib.suppress(OSError):
                left.unlink()
        # what a TensorBoard that is running has read of those files counts no more
        self.writer = SummaryWriter(str(folder), purge_step=0)
        self.spec, self.rows = spec, 0
        self._summary(hparams(hyperparameters(spec), {})[1])
        self.writer.flush()

    def row(self, number: int, row: Mapping[str, float | None]) -> None:
        self.rows = number
        for name, value in row.items():
            self.writer.add_scalar(name, float("nan") if value is None else value, number)
        self.writer.flush()

    def end(self, record: RunRecord) -> None:
        from torch.utils.tensorboard.summary import hparams

        metrics = {f"metrics/{name}": value for name, value in record.metrics.items()}
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.rows)
        self.writer.add_text("status", f"{record.status} {record.reason}".strip(), self.rows)
        experiment, _, ended = hparams(hyperparameters(self.spec), metrics)
        self._summary(experiment)
        if record.status == "ok":
            self._summary(ended)
        self.writer.close()

    def _summary(self, summary: Any) -> None:
        writer = self.writer.file_writer
        assert writer is not None
        writer.add_summary(summary)


TRACKERS: Mapping[str, tuple[str, Callable[[Path, RunSpec], Tracker]]] = {"tensorboard": ("tensorboard", TensorBoard)}
"""name -> (module that it needs, how the log of a run is begun in its folder)."""


def check_trackers(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown tracker, and for one whose package is not installed."""
    from norms.values import nearest

    for name in names:
        if name not in TRACKERS:
            raise ValueError(f'unknown tracker "{name}"; allowed: {", ".join(TRACKERS)}{nearest(name, TRACKERS)}')
        module = TRACKERS[name][0]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f'tracker "{name}": the package {module} is not installed; `python -m pip install {module}` '
                f'installs it, as does the extra `".[{name}]"`'
            )


def hyperparameters(spec: RunSpec) -> dict[str, bool | int | float | str]:
    """The options by which a tracker tells runs apart, named like the columns of a frame."""
    found: dict[str, Any] = {"task": spec.task, "norm": spec.norm_label or spec.norm, "seed": spec.seed}
    found |= {f"option.{name}": value for name, value in spec.task_options.items()}
    found |= {f"norm.{name}": value for name, value in spec.norm_options.items()}
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in found.items()
        if value is not None
    }


class Trackers:
    """The trackers of one run; one that fails is named and heard no more.

    Args:
        out: the folder of results.
        spec: of the run.
        names: of TRACKERS.
        say: called with a line for the user.
    """

    def __init__(self, out: Path, spec: RunSpec, names: Sequence[str], say: Callable[[str], None]):
        self.say, self.number = say, 0
        self._open: dict[str, Tracker] = {}
        for name in names:
            folder = out / "tracking" / name / spec.task / spec.norm / spec.key
            self._try(name, lambda name=name, folder=folder: self._begin(name, folder, spec))  # type: ignore[misc]

    def begin(self, rows: Iterable[Mapping[str, float | None]]) -> None:
        """The rows so far."""
        for row in rows:
            self.row(row)

    def row(self, row: Mapping[str, float | None]) -> None:
        self.number += 1
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.row(self.number, row))  # type: ignore[misc]

    def end(self, record: RunRecord) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.end(record))  # type: ignore[misc]

    def _begin(self, name: str, folder: Path, spec: RunSpec) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._open[name] = TRACKERS[name][1](folder, spec)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - of any package; the run goes on without it
            self._open.pop(name, None)
            self.say(f"tracker {name} is left out: {type(error).__name__}: {cut(one_line(str(error)), 500)}")
