"""Options of tasks: the base model, the ranges that numbers take, and what an options model may say.

Nothing here knows a task. `tasks.supervised` has the options of every task that trains one classifier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import to_jsonable_python

from norms import plugins
from norms.factory import NormFactory
from norms.protocol import SETTING_FIELDS
from norms.registry import make_norm, norm_info, norm_label, resolve_norm_options
from norms.values import exact, shown

if TYPE_CHECKING:
    from tasks.base import Setting

_N = TypeVar("_N")
# Ranges of options: far beyond what is published, and short of what no machine plans, prints or stores. Of the
# form Batch[int], or Batch[int | None] where null stands for something.
Batch = Annotated[_N, Field(ge=1, le=2**17)]  # images of an update or a forward; up to 65,536 are published
Images = Annotated[_N, Field(ge=1, le=10**8)]
Epochs = Annotated[_N, Field(ge=1, le=10**5)]
Steps = Annotated[_N, Field(ge=1, le=10**9)]  # of one training
Count = Annotated[_N, Field(ge=1, le=10**5)]  # of what is done for every image, batch, class or seed
WorkerCount = Annotated[_N, Field(ge=1, le=4096)]  # processes of one run
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


# of the schedule "steps" (tasks.schedule.learning_rate_at)
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


PARTS = ("model", "optimizer")
"""What an option may name that a plugin registers: one of this name, or whose name ends in it ("search_optimizer")."""


def plugin_parts(options: BaseModel) -> dict[str, str]:
    """option -> "name@version" of the models and optimizers that options name and a plugin registered.

    Runs with them depend on the plugin's text, so that it is part of their key (results.record.RunSpec). Data sets are
    not here: the checksum of the data is part of it already.
    """
    found = {}
    for option, kind, name in named_parts(dict(options)):
        plugins.load_offered(kind, name)  # an options model of a plugin's task may not have looked for it
        plugin = plugins.plugin_of(kind, name)
        if plugin is not None:
            found[option] = f"{name}@{plugin.version}"
    return found


def named_parts(options: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(option, "model" or "optimizer", name) of each option that names one."""
    for option, name in options.items():
        kind = option.rpartition("_")[2]
        if kind in PARTS and isinstance(name, str):
            yield option, kind, name


class LeftOut(ValueError):
    """These values do not go together, and a grid over both leaves the combination out. Raised by an options model."""


def divisors(number: int, near: int, most: int = 8) -> str:
    """The divisors of `number`, at most so many of them, those nearest to `near`: for messages."""
    found = [d for d in range(1, number + 1) if number % d == 0]
    if len(found) <= most:
        return ", ".join(map(str, found))
    return f"{', '.join(map(str, sorted(sorted(found, key=lambda d: abs(d - near))[:most])))} and others"


def only_used(given: Mapping[str, Any], used: Mapping[str, Any], conditional: Collection[str]) -> dict[str, Any]:
    """The values given for an options model, with null for every option that the others leave without use, so that a
    grid over it repeats no run and no table shows it.

    Args:
        given: option -> value. Null means the default, too, so that a stored record resolves to itself.
        used: option -> default, of the `conditional` options that are in use.
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
