"""The contract between the suite and a task. No training code.

A task is a value with a name, a version, an options model and a `run`. It receives a norm as a factory, so it can not
know which norm it trains; a run's settings reach it as a frozen options model, and everything about the process
(device, seed, folders) as a RunContext.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from norms.registry import (
    SETTING_FIELDS,
    NormFactory,
    NormInfo,
    make_norm,
    norm_info,
    norm_label,
    resolve_norm_options,
)
from norms.values import exact, shown
from tasks.journal import Journal

_N = TypeVar("_N")
# What numbers options take: far beyond what is published, and short of what no machine plans, prints or stores. Of the
# form Batch[int], or Batch[int | None] where null stands for something.
Batch = Annotated[_N, Field(ge=1, le=2**17)]  # images of an update or a forward; up to 65,536 are published
Images = Annotated[_N, Field(ge=1, le=10**8)]
Epochs = Annotated[_N, Field(ge=1, le=10**5)]
Steps = Annotated[_N, Field(ge=1, le=10**9)]  # of one training
Repeats = Annotated[_N, Field(ge=1, le=10**5)]  # of what is done for every image, batch, class or seed
Classes = Annotated[_N, Field(ge=2, le=10**5)]
Width = Annotated[_N, Field(ge=1, le=512)]  # channels; planning resnet18_cifar with 512 takes 4 GB and 13 s
Cells = Annotated[_N, Field(le=40)]  # planning a search network of 40 takes 3 GB and 11 s
Pixels = Annotated[_N, Field(ge=0, le=4096)]  # of an image's side
Positive = Annotated[_N, Field(gt=0, le=1e30, allow_inf_nan=False)]  # a rate or a weight; its square is finite, too
NotNegative = Annotated[_N, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[_N, Field(ge=0, lt=1)]
Betas = tuple[Fraction[float], Fraction[float]]  # of Adam


def _rising(milestones: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
    given = list(milestones or ())
    if any(not 0 < m < 1 for m in given) or given != sorted(given):
        raise ValueError(f"{info.field_name} {given}: rising fractions between 0 and 1 are needed")
    return milestones


# of the schedule "steps" (tasks.fit.learning_rate_at)
Milestones = Annotated[tuple[float, ...] | None, Field(max_length=100), AfterValidator(_rising)]


class Newer:
    """Marks an option that came after records had been made: `name: Annotated[type, NEWER] = default`.

    At its default, which must mean what runs did before it existed, it takes no part in a run's key
    (results.record.RunSpec), so that no record is orphaned and no version has to change.
    """


NEWER = Newer()


class Options(BaseModel):
    """Base of every task's options: immutable, unknown keys raise, a field's default is the option's only home.

    True, numbers and texts are not turned into each other (see norms.values).

    A field named `norm_batch_size` (None: the SGD batch) has one meaning everywhere: the images per forward that share
    statistics, where a batch holds several domains those of each. The plan sets it to null for norms that do not mix
    samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _unconverted(cls, given: Any, info: ValidationInfo) -> Any:
        return exact(cls.model_fields[info.field_name or ""].annotation, given)


def newer_options(options: type[BaseModel]) -> dict[str, Any]:
    """name -> default, as JSON has it, of the options of a model that are marked as NEWER."""
    return {
        name: to_jsonable_python(field.get_default(call_default_factory=True))
        for name, field in options.model_fields.items()
        if any(isinstance(mark, Newer) for mark in field.metadata)
    }


class LeftOut(ValueError):
    """These values do not go together, and a grid over both leaves the combination out. Raised by an options model."""


def divisors(number: int, near: int, most: int = 8) -> str:
    """The divisors of `number`, at most so many of them, those nearest to `near`: for messages."""
    found = [d for d in range(1, number + 1) if number % d == 0]
    if len(found) <= most:
        return ", ".join(map(str, found))
    return f"{', '.join(map(str, sorted(sorted(found, key=lambda d: abs(d - near))[:most])))} and others"


def only_used(given: Mapping[str, Any], used: Mapping[str, Any], conditional: Collection[str]) -> dict[str, Any]:
    """What was given for an options model, with null for every option that the others leave without use, so that a grid
    over it repeats no run and no table shows it.

    Args:
        given: option -> value. Null means the default, too, so that a stored record resolves to itself.
        used: those of the `conditional` options that are in use -> default.
        conditional: the options that may be without use; each has None as its field's default.
    """
    always = {key: value for key, value in given.items() if key not in conditional}
    return always | {key: default if given.get(key) is None else given[key] for key, default in used.items()}


class NormChoice(BaseModel):
    """A further norm, which an option names beside the one that a run is about: resolved and hashed like that one.

    Given as "gn" or {"gn": {"num_groups": 8}}; an options model completes it with `resolved`.

    Attributes:
        name: a registered norm.
        options: of the norm; complete once resolved.
        version: of the norm; "" before it is resolved.
        label: as tables call it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = {}
    version: str = ""
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"name": given}
        if isinstance(given, dict) and len(given) == 1:
            name, options = next(iter(given.items()))
            return {"name": name, "options": options or {}}
        if isinstance(given, NormChoice) or (isinstance(given, dict) and "version" in given):  # as a record holds it
            return given
        raise ValueError(f"a norm's name or {{name: {{option: value}}}} is needed, given {shown(given)}")

    def resolved(self, setting: Setting) -> NormChoice:
        """With options, version and label complete.

        Raises:
            ValueError: unknown norm or option (with the nearest), or a wrong value.
        """
        own = {key: value for key, value in self.options.items() if key not in SETTING_FIELDS}
        return NormChoice(
            name=self.name,
            options=resolve_norm_options(self.name, self.options, asdict(setting)),
            version=str(norm_info(self.name).version),
            label=norm_label(self.name, own),
        )

    def factory(self) -> NormFactory:
        return make_norm(self.name, **self.options)


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
    """What `Task.run` returns.

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
        device: where networks and data live.
        seed: the run's seed; use it through `generator` only.
        data_dir: folder of prepared data sets.
        folder: where this run may leave artifacts.
        report: called with the finished fraction in [0, 1], as often as convenient.
        journal: what the run has done so far, and goes on from (tasks.journal); of this run alone.
        keep_weights: the outcome shall hold the trained network.
    """

    device: torch.device
    seed: int
    data_dir: Path
    folder: Path
    report: Callable[[float], None] = lambda fraction: None
    journal: Journal = field(default_factory=Journal)
    keep_weights: bool = False

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
        """None if this norm can serve here, else why not in one line, read beside the norm's name (tasks.trial)."""
        ...

    def run(self, norm: NormFactory, options: Any, context: RunContext) -> Outcome:
        """Train and measure. Raises Diverged for a non-finite loss."""
        ...


class Telling(Task, Protocol):
    """What a task can have besides; without it the suite says less about its runs."""

    def steps(self, options: Any, data_dir: Path) -> int:
        """Updates of a whole run, in all its loops: what remaining time is estimated by. Raises as data_checksum."""
        ...

    def network(
        self, norm: NormFactory, options: Any, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The network of a run, as it is built, with whatever weights; and what turns images (N, C, H, W) on the scale
        0 to 255 into its input. facts: as in Outcome.trained."""
        ...


def check_names(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """ValueError, one line per unknown name with the nearest allowed one."""
    from norms.registry import nearest

    allowed = list(allowed)
    lines = [
        f'unknown {what} "{g}"; allowed: {", ".join(allowed)}{nearest(g, allowed)}' for g in given if g not in allowed
    ]
    if lines:
        raise ValueError("\n".join(lines))
