"""The contract between the suite and a task. No training code.

A task is a value with a name, a version, an options model and a `run`. It receives a norm as a factory, so it can not
know which norm it trains; a run's settings reach it as a frozen options model, and everything about the process
(device, seed, folders) as a RunContext.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.protocol import NormInfo
from norms.workers import ALONE, Workers
from tasks.journal import Journal
from tasks.options import Options


class NotPrepared(ValueError):
    """A data set is not on this machine; the message names the command that prepares it. Nothing replaces it."""


class Diverged(ArithmeticError):
    """A non-finite loss ended the run: a result, not a failure.

    Args:
        reason: the step, and the names of the layers whose parameters or outputs are not finite.
        history: the epochs before it, where they do not stand in the run's journal.
        evidence: as in Outcome, where a task has some to give before it has metrics.
    """

    def __init__(self, reason: str, history: list[dict[str, float]] | None = None):
        super().__init__(reason)
        self.history = history or []
        self.evidence: dict[str, Any] = {}


@dataclass(frozen=True)
class Setting:
    """Facts of a run that a norm's constructor may name (registry.SETTING_FIELDS)."""

    norm_batch_size: int | None = None
    num_domains: int = 1
    image_shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Trained:
    """The network that a run has trained.

    Args:
        weights: its state_dict.
        facts: JSON values that `Task.network` needs besides norm and options, so that nobody needs the data: numbers of
            classes and channels, mean, std, ...
    """

    weights: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The result of `Task.run`.

    Args:
        metrics: exactly the names in `Task.metrics`, plain finite floats; None where the options leave nothing to
            measure (no search of a given genotype), which tables show as a hole.
        history: one mapping of numbers per epoch.
        artifacts: names of files written into `context.folder`.
        evidence: JSON values for the table's caption: "data" ("real" | "synthetic"), "selection", "equals", ...; a
            "budget" here takes the place of the config's, where a task knows that it is smaller; in a word of its own,
            since "reduced" and "full" follow the config when that is corrected.
        trained: the network, for who keeps it; only looked at where `context.keep_weights` is set.
    """

    metrics: Mapping[str, float | None]
    history: list[dict[str, float]] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    trained: Trained | None = None


@dataclass(frozen=True)
class RunContext:
    """One run's surroundings.

    Args:
        device: of networks and data.
        seed: the run's seed; use it through `generator` only.
        data_dir: folder of prepared data sets.
        folder: for the artifacts of this run.
        report: called with the finished fraction in [0, 1], as often as convenient.
        journal: the state of this run, which it goes on from after an interruption (tasks.journal).
        keep_weights: the outcome shall hold the trained network.
        loader_workers: processes that decode images which are not held in memory; None: as tasks.data.reading chooses.
            No result depends on it.
        workers: that make this run together; this process is one of them.
    """

    device: torch.device
    seed: int
    data_dir: Path
    folder: Path
    report: Callable[[float], None] = lambda fraction: None
    journal: Journal = field(default_factory=Journal)
    keep_weights: bool = False
    loader_workers: int | None = None
    workers: Workers = ALONE

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator seeded from (seed, purpose) alone, so that no draw depends on which norm or part drew before.

        Draw on the CPU (the default) and move the result where equal numbers on every device matter.
        """
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        made = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return self.journal.hand_out(purpose, made)


class Task(Protocol):
    """A task module offers one value of this shape, named TASK.

    Attributes:
        name: as in configs and tables.
        version: raised with every change of results; not looked at where a plugin registers the task, whose runs are
            repeated when the plugin's text changes (tasks.task_version).
        options: the options model; its fields are the defaults.
        metrics: the names `run` returns; each is in results/metrics.py.
    """

    name: str
    version: int
    options: type[Options]
    metrics: tuple[str, ...]

    def setting(self, options: Any) -> Setting:
        """The facts that norm constructors may name. Reads no data."""
        ...

    def data_checksum(self, options: Any, data_dir: Path) -> str:
        """Identity of the data the options name. Raises NotPrepared, or ValueError for an unknown name.

        Where a task has an option `dataset`, that one names the data: tables show one identity for each of its values.
        """
        ...

    def why_not(self, norm: NormFactory, info: NormInfo, options: Any) -> str | None:
        """None if this norm can serve here, else the reason in one line, which is read beside the norm's name
        (tasks.admission)."""
        ...

    def run(self, norm: NormFactory, options: Any, context: RunContext) -> Outcome:
        """Train and measure. Raises Diverged for a non-finite loss."""
        ...


class Telling(Task, Protocol):
    """Two optional methods of a task; without them the suite says less about its runs."""

    def steps(self, options: Any, data_dir: Path) -> int:
        """Updates of a whole run, in all its loops: what remaining time is estimated by. Raises as data_checksum."""
        ...

    def network(
        self, norm: NormFactory, options: Any, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The network of a run as it is built, its weights not loaded, and the function that turns images (N, C, H, W)
        on the scale 0 to 255 into its input. facts: as in Outcome.trained."""
        ...


class Declaring(Task, Protocol):
    """What a task can say of its results, for tables and progress; each of these may be absent.

    A plan writes it into the results folder, so that tables need neither the task nor its plugin. Nothing of it takes
    part in a run's key, so a task that declares more keeps its runs.

    Attributes:
        headline: the metric that ranks norms, that a finished run's line shows, and that gains are of. Absent: the
            first of `metrics` with a direction.
        validation: the metric that may choose hyper-parameters; it comes from validation data. Absent: the first of
            val_pgd_top1, val_acc and val_top1 that the runs measured.
        always_shown: options that stand in a table's headings even with one value, since results can not be read
            without them. Absent: crafting_mode and forward.
        deciding: options that others usually follow from; where an option follows from one of these, it stands in the
            caption and not in every heading. Absent: dataset and method.
        folds_over: the option whose values are held out one after the other, so that a result is the mean over all of
            them; "" for none. Absent: held_out, where the task has such an option.
    """

    headline: str
    validation: str
    always_shown: tuple[str, ...]
    deciding: tuple[str, ...]
    folds_over: str

    def baseline(self, options: Any) -> Any | None:
        """Options of the run that a run with these options is compared with, norm and seed being the same.

        The difference of their headline metrics is the metric `gain`. None where there is no such run, or where these
        are its own options. Absent: the run with method "source_only" and otherwise the same options, where the task
        has such a method. Reads no data.
        """
        ...


def check_names(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """ValueError, one line per unknown name with the nearest allowed one."""
    from norms.values import nearest

    allowed = list(allowed)
    lines = [
        f'unknown {what} "{g}"; allowed: {", ".join(allowed)}{nearest(g, allowed)}' for g in given if g not in allowed
    ]
    if lines:
        raise ValueError("\n".join(lines))
