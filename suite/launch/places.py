"""Where runs are made: the value of `--on`, as text or as a small YAML file.

    local                                                    this machine
    slurm                slurm:partition=gpu,time=4:00:00,gpus=1,array=32%8
    ray                  ray:10.0.0.1:6379                   ray:address=auto,gpus=0.5
    FILE.yaml            {on: slurm, partition: gpu, ...}; configs/on/NAME.yaml is the suite's own, too

On the command line a comma separates options; inside quotes or brackets it does not. What stands here decides where and
with what a run is made and never what it is: no part of it enters a run's key.

Every text ends in a batch script or in a process' arguments, so none may hold a line break or a character that does not
show. `setup` alone is shell by its purpose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from norms.values import cut, exact, nearest, shown
from results.escape import visible
from suite.config import CONFIGS, PlanError, read_mapping

LONGEST = 1000
"""Characters of one text."""
MOST_ELEMENTS = 100_000
MOST_LINES = 100
"""Of `setup`, and of `extra`."""
NOTICE = 120
"""Seconds; see `Slurm.notice`."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_OURS = {
    *("array", "output", "error", "input", "open-mode", "requeue", "no-requeue", "signal", "job-name", "chdir"),
    *("parsable", "wrap", "wait", "test-only", "help", "usage", "version", "kill-on-invalid-dep"),
}
"""Options of sbatch that the suite gives itself, and such as submit nothing."""
_FIELDS = {
    **{name: name for name in ("partition", "account", "qos", "time", "constraint", "nodelist", "exclude")},
    "gpus": "gpus",
    "gres": "gpus",
    "gpus-per-node": "gpus",
    "cpus-per-task": "cpus",
    "mem": "memory",
}
"""Options of sbatch that have a field -> its name."""


def _plain(text: str) -> str:
    if not text.strip():
        raise ValueError("a text is needed, not an empty one")
    if len(text) > LONGEST:
        raise ValueError(f"a text of {len(text):,} characters; {LONGEST:,} are allowed")
    if visible(text) != text:
        raise ValueError("a line break, or a character that does not show, has no place in it")
    return text


def _bytes(given: Any) -> int:
    """Bytes of "16G", "512 MB", "1.5TiB"; a number alone would mean megabytes to Slurm and bytes to Ray."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(?:i?B)?\s*", str(given), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise ValueError("a size with its unit is needed, such as 16G or 500M")
    return size


def _gpus(given: Any) -> str:
    """ "2" or "a100:2"."""
    if isinstance(given, bool) or not re.fullmatch(r"(?:[\w.-]{1,60}:)?[1-9][0-9]{0,3}", str(given), re.ASCII):
        raise ValueError("a number from 1, or TYPE:NUMBER such as a100:2, is needed")
    return str(given)


def _time(given: Any) -> str:
    """As Slurm prints it: "04:00:00", "2-00:00:00", "UNLIMITED"."""
    text = str(given).strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return "UNLIMITED"
    if match := re.fullmatch(r"(\d{1,6}) ?([smhd])", text, re.ASCII):
        seconds = int(match[1]) * _SECONDS[match[2]]
    elif match := re.fullmatch(r"(\d{1,5})-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    elif match := re.fullmatch(r"(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII):
        first, second, third = (None if part is None else int(part) for part in match.groups())
        if third is None:  # minutes[:seconds]
            seconds = (first or 0) * 60 + (second or 0)
        else:
            seconds = (first or 0) * 3600 + (second or 0) * 60 + third
    else:
        seconds = 0
    if not seconds or isinstance(given, bool):
        raise ValueError("a time above 0 as Slurm has it (minutes, HH:MM:SS, D-HH:MM:SS), or 30m, 4h, 2d, is needed")
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def _array(given: Any) -> str:
    """ "32" or "32%8"."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:%([1-9]\d{0,5}))?", str(given), re.ASCII)
    if isinstance(given, bool) or match is None or int(match[1]) > MOST_ELEMENTS:
        raise ValueError(
            f"a number of elements from 1 to {MOST_ELEMENTS:,} is needed, or with the most that run at once, as 32%8"
        )
    return str(given)


def _lines(given: Any) -> tuple[str, ...]:
    """Lines of shell: a list, or a text of several lines."""
    lines = given.splitlines() if isinstance(given, str) else given
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise ValueError("a list of lines of shell is needed")
    if len(lines) > MOST_LINES:
        raise ValueError(f"{len(lines):,} lines; {MOST_LINES} are allowed")
    return tuple(_plain(line.rstrip().replace("\t", "    ")) for line in lines if line.strip())


def _extra(given: Any) -> dict[str, str | None]:
    """Further options of sbatch -> their values; None for a flag."""
    if not isinstance(given, Mapping):
        raise ValueError("a mapping of sbatch's options is needed, such as {mail-type: END}")
    if len(given) > MOST_LINES:
        raise ValueError(f"{len(given):,} options; {MOST_LINES} are allowed")
    extra: dict[str, str | None] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]{1,40}", name, re.ASCII):
            raise ValueError(f'{shown(name)} is no long option of sbatch, as "mail-type"')
        if name in _OURS:
            raise ValueError(f'"{name}" is set by the suite')
        if name in _FIELDS:
            raise ValueError(f'"{name}" has a field of its own here: {_FIELDS[name]}')
        if isinstance(value, bool | None):
            if value is False:
                raise ValueError(f'"{name}": false; leave it out')
            extra[name] = None
        elif isinstance(value, str | int | float):
            extra[name] = _plain(str(value))
        else:
            raise ValueError(f'"{name}": text, a number or true is needed, not {shown(value)}')
    return extra


Word = Annotated[str, AfterValidator(_plain)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Count = Annotated[int, Field(ge=1, le=4096)]


class Options(BaseModel):
    """Base of what a place may be told. Values are not converted between true, numbers and text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("runs_per_device", "jobs", "cpus", "notice", "requeues", mode="before", check_fields=False)
    @classmethod
    def _unconverted(cls, given: Any, info: Any) -> Any:
        return exact(cls.model_fields[info.field_name].annotation, given)


class Local(Options):
    """This machine.

    Attributes:
        jobs: runs at a time; None: as `--jobs` says.
        runs_per_device: runs at a time on one accelerator; None: as `--runs-per-device` says.
    """

    jobs: Count | None = None
    runs_per_device: Count | None = None


class Slurm(Options):
    """An array of a Slurm cluster. Resources are those of one element, on one node; an element makes runs one after the
    other, or `jobs` at a time, until none is left.

    Attributes:
        partition, account, qos, constraint, nodelist, exclude: as sbatch has them.
        time: limit of an element, as sbatch has it (a number alone: minutes), or 30m, 4h, 2d; None: the partition's.
        gpus: accelerators: a number, or TYPE:NUMBER.
        cpus: of `--cpus-per-task`.
        memory: bytes; given as 16G.
        array: elements, and behind % the most that run at once. No more are submitted than there are runs to do.
        jobs: runs at a time in an element; None: cpus // threads without gpus, and with them as the element's command
            says (one run on each).
        runs_per_device: runs at a time on one accelerator; None: one.
        notice: seconds before the time limit at which an element is told to make checkpoints and leave.
        requeues: how often one element begins again, after a time limit or otherwise, until it is left to the user.
        setup: lines of shell before the command, such as "module load cuda".
        extra: further long options of sbatch -> values; None for a flag.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodelist: Word | None = None
    exclude: Word | None = None
    time: Annotated[str, BeforeValidator(_time)] | None = None
    gpus: Annotated[str, BeforeValidator(_gpus)] | None = None
    cpus: Count | None = None
    memory: Bytes | None = None
    array: Annotated[str, BeforeValidator(_array)] = "1"
    jobs: Count | None = None
    runs_per_device: Count | None = None
    notice: Annotated[int, Field(ge=10, le=65535)] = NOTICE
    requeues: Annotated[int, Field(ge=0, le=10_000)] = 100
    setup: Annotated[tuple[str, ...], BeforeValidator(_lines)] = ()
    extra: Annotated[dict[str, str | None], BeforeValidator(_extra)] = {}

    @property
    def elements(self) -> int:
        return int(self.array.partition("%")[0])

    @property
    def at_once(self) -> int | None:
        """The most elements that run at once; None: as many as the cluster lets run."""
        most = self.array.partition("%")[2]
        return int(most) if most else None

    @property
    def seconds(self) -> int | None:
        """The time limit; None: not said, or none."""
        if self.time is None or self.time == "UNLIMITED":
            return None
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


class Ray(Options):
    """A Ray cluster. Resources are those of one run.

    Attributes:
        address: of the cluster, as ray.init has it; None: the one that RAY_ADDRESS or this machine names, else a new
            one on this machine.
        cpus, gpus: of a run; parts are allowed. None: as many as the run has threads; 1 on an accelerator, else 0.
        memory: bytes; given as 16G. None: not counted.
        jobs: runs at a time; None: as many as there are resources for.
        data_dir: of prepared data sets on the nodes; None: as `--data-dir` says.
        code: "check": nodes with other code than this command make no run; "ship": they get this command's.
    """

    address: Word | None = None
    cpus: Annotated[float, Field(gt=0, le=4096)] | None = None
    gpus: Annotated[float, Field(ge=0, le=4096)] | None = None
    memory: Bytes | None = None
    jobs: Count | None = None
    data_dir: Word | None = None
    code: Literal["check", "ship"] = "check"

    @field_validator("gpus", mode="before")
    @classmethod
    def _a_number(cls, given: Any) -> Any:
        return exact(float | None, given)


KINDS: dict[str, type[Options]] = {"local": Local, "slurm": Slurm, "ray": Ray}


@dataclass(frozen=True)
class Place:
    """Where runs are made.

    Args:
        kind: "local", "slurm" or "ray".
        options: a Local, Slurm or Ray, by the kind.
    """

    kind: Literal["local", "slurm", "ray"]
    options: Options


def read_place(text: str) -> Place:
    """The place that `--on TEXT` names.

    Raises:
        PlanError: an unknown kind or option, a value that does not fit, a file that can not be read; one line each.
    """
    kind, _, rest = text.strip().partition(":")
    where = f'--on "{cut(text, 120)}"'
    if kind in KINDS:
        return _place(kind, _given(kind, rest, where), where, typed=True)
    if text.strip().endswith((".yaml", ".yml")):
        return _from_file(text.strip(), where)
    allowed = f"{', '.join(KINDS)} are allowed, and a YAML file such as configs/on/slurm.yaml"
    raise PlanError([f"{where}: {allowed}{nearest(kind, KINDS)}"])


def _from_file(text: str, where: str) -> Place:
    path = Path(text)
    own = CONFIGS / "on" / path.name
    found = own if path.parent == Path("configs/on") and not path.exists() and own.is_file() else path
    others = [
        *path.parent.glob("*.yaml"),
        *(Path("configs/on") / file.name for file in (CONFIGS / "on").glob("*.yaml")),
    ]
    given = read_mapping(found, where, ("on", *Slurm.model_fields), others)
    kind = given.pop("on", None)
    if kind not in KINDS:
        said = "is missing" if kind is None else f"is {shown(kind)}"
        raise PlanError([f'{where}: "on" {said}; it is one of {", ".join(KINDS)}{nearest(str(kind), KINDS)}'])
    return _place(str(kind), given, where)


def _place(kind: str, given: Mapping[Any, Any], where: str, typed: bool = False) -> Place:
    fields = KINDS[kind].model_fields
    lines = [
        f'{where}: unknown option "{cut(str(name), 60)}"; {kind} has {", ".join(fields)}{nearest(str(name), fields)}'
        for name in given
        if name not in fields
    ]
    known = {name: value for name, value in given.items() if name in fields}
    if typed:
        known = {name: _as_typed(fields[name].annotation, value) for name, value in known.items()}
    try:
        options = KINDS[kind](**known)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            said = each["msg"].removeprefix("Value error, ")
            name = str(each["loc"][0]) if each["loc"] else ""
            lines.append(f"{where}: {name}{f' given {shown(known[name])}' if name in known else ''}: {said}")
    if not lines and isinstance(options, Slurm) and options.seconds is not None and options.seconds <= options.notice:
        lines.append(
            f"{where}: time {options.time} is not above the {options.notice} seconds at whose beginning an element is "
            "told to leave; give notice=SECONDS, or more time"
        )
    if lines:
        raise PlanError(lines)
    return Place(kind, options)  # type: ignore[arg-type]


def _as_typed(annotation: Any, value: Any) -> Any:
    """A text of the command line as the number that a field of numbers needs."""
    if isinstance(value, str) and str not in _all_types(annotation):
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                continue
    return value


def _all_types(annotation: Any) -> set[Any]:
    inside = getattr(annotation, "__args__", ())
    return {annotation}.union(*map(_all_types, inside)) if inside else {annotation}


def _given(kind: str, text: str, where: str) -> dict[str, Any]:
    """The options behind the kind: NAME=VALUE, separated by commas. A ray's first part may be its address."""
    given: dict[str, Any] = {}
    for number, part in enumerate(_parts(text, where)):
        name, equals, value = part.partition("=")
        name = name.strip()
        if kind == "ray" and number == 0 and not equals and name and name not in Ray.model_fields:
            name, equals, value = "address", "=", part
        if not equals or not name:
            near = nearest(name, KINDS[kind].model_fields)
            quote = f'; a value with a comma is written {last}="A,B"' if (last := next(reversed(given), "")) else ""
            raise PlanError([f'{where}: "{cut(part, 60)}": OPTION=VALUE is needed{near or quote}'])
        value = _unquoted(value.strip())
        of, dot, option = name.partition(".")
        if kind == "slurm" and of == "extra" and dot:
            place: dict[str, Any] = given.setdefault("extra", {})
            value = True if value == "true" else value  # type: ignore[assignment]
        else:
            place, option = given, name
        if option in place:
            raise PlanError([f"{where}: {cut(name, 60)} is given twice"])
        place[option] = value
    return given


def _parts(text: str, where: str) -> list[str]:
    """The parts between commas, but for those inside quotes and square brackets."""
    parts, quote, depth = [""], "", 0
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[]":
            depth = max(0, depth + (1 if character == "[" else -1))
        if character == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if quote:
        raise PlanError([f"{where}: a {quote} is not closed"])
    return parts if text.strip() else []


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
