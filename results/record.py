"""One run as data: what was asked (RunSpec), what came out (RunRecord), and the text that says both."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from results.escape import cut, visible

SCHEMA = 1
RECORD = "record.json"
LARGEST = 32 * 2**20
"""Bytes of the largest record: more than 50,000 epochs of ten quantities."""
MOST_ENTRIES = 2_000
"""Of a record's options, metrics, environment and evidence, and of an epoch: each of these is a column of a frame."""
DATASET = "dataset"
"""The task option that names the data, in tasks that have it."""
Status = Literal["ok", "diverged", "failed", "skipped"]
DONE: frozenset[str] = frozenset({"ok", "diverged"})
"""A non-finite loss is a result: neither of these is run again."""


_LONGEST = 1000  # characters of a line about a damaged record


class RecordError(ValueError):
    """A file that is not a readable record of this schema; the message names the file and the reason, in one line that
    is safe to print."""

    def __init__(self, message: str):
        super().__init__(cut(visible(message), _LONGEST))


class RunSpec(BaseModel):
    """Everything that decides a run's numbers, complete after defaults, and nothing else.

    `norm_label` is for people (name and options that differ from the defaults) and takes no part in the key.

    `newer` names the task's options that came after records had been made, each with the default that means what runs
    did before it existed. An option that has this value is left out of the key: a record that lacks it, one that has
    it, and a plan of today share a key. `newer` itself takes no part in it.

    `parts` names what a plugin registered besides norm and task: option -> "name@version" of a model or an optimizer.
    It is part of the key where there are any.
    """

    # "constants": pydantic would else turn NaN and infinity into null, and two different specs would share a key
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    task: str
    norm: str
    norm_options: dict[str, Any]
    task_options: dict[str, Any]
    seed: int
    norm_version: str
    task_version: str
    data_checksum: str
    norm_label: str = ""
    newer: dict[str, Any] = Field(default_factory=dict)
    parts: dict[str, str] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without empty `newer` and `parts`, so that older records are still written as they stand on disk."""
        found: dict[str, Any] = handler(self)
        for name in ("newer", "parts"):
            if not found.get(name):
                found.pop(name, None)
        return found

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON, first 24 hexadecimal digits: 96 bits, so that paths stay short.

        Computed anew at each use: a cached one would survive `model_copy(update=...)` and name another run.

        Raises:
            ValueError: an option, or a default in `newer`, is NaN or infinite, for which JSON has no word.
        """
        return _digest(_canonical(self._content()))

    def _content(self) -> dict[str, Any]:
        """What the key is of, as plain values."""
        content = self.model_dump(mode="json", exclude={"norm_label", "newer"})
        options = content["task_options"]
        for option, default in self.newer.items():
            if option in options and _canonical(options[option]) == _canonical(default):
                del options[option]
        return content

    def keys(self, seeds: Iterable[int]) -> list[str]:
        """The key of the same run with each of these seeds, in far less time than one by one."""
        content = self._content()  # its text is in the order of its names
        head = _canonical({name: value for name, value in content.items() if name < "seed"}).removesuffix("}")
        tail = _canonical({name: value for name, value in content.items() if name > "seed"}).removeprefix("{")
        return [_digest(f'{head},"seed":{int(seed)},{tail}') for seed in seeds]

    @property
    def part_versions(self) -> dict[str, str]:
        """ "option name" of each of `parts` -> its version."""
        split = {option: part.rpartition("@") for option, part in self.parts.items()}
        return {f"{option} {name}": version for option, (name, _, version) in split.items()}

    @property
    def further_norms(self) -> dict[str, tuple[str, str]]:
        """option -> (name, version) of the norms that task options name (tasks.options.NormChoice)."""
        choices = {
            k: v for k, v in self.task_options.items() if isinstance(v, dict) and {"name", "version"} <= v.keys()
        }
        return {option: (str(choice["name"]), str(choice["version"])) for option, choice in choices.items()}


class RunRecord(BaseModel):
    """What one run left behind.

    Attributes:
        spec: what was run.
        status: "ok"; "diverged" (a non-finite loss, a result); "failed" (exception, crash, kill, time limit);
            "skipped" (this norm can not serve in this task).
        reason: why, for every status but "ok".
        metrics: name (up to 200 characters) -> value in full precision; all of the task's metrics when ok, none
            otherwise. A value that is not finite is refused here, since JSON has no word for it.
        history: one mapping per epoch; a non-finite number is stored as null.
        seconds: wall time of the run in its process, 0 to 1e10.
        environment: commit, versions, device, threads (not in the key; tables say when cells differ in them).
        evidence: how far the numbers reach: data "real" | "synthetic", budget "full" | "reduced", selection rule,
            whether every layer equals another norm, ... (printed under tables).
        artifacts: file names in the run's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    spec: RunSpec
    status: Status
    reason: str = ""
    metrics: dict[Annotated[str, StringConstraints(max_length=200)], FiniteFloat] = Field(default_factory=dict)
    # the first mistake is enough: each of millions would be an object of its own
    history: Annotated[list[dict[str, float | None]], FailFast()] = Field(default_factory=list)
    seconds: FiniteFloat = Field(default=0.0, ge=0.0, le=1e10)
    environment: dict[str, Any] = Field(default_factory=dict)
    evidence: dict[str, Any] = Field(default_factory=dict)
    artifacts: Annotated[list[str], FailFast()] = Field(default_factory=list)
    schema_: int = Field(default=SCHEMA, alias="schema")

    @field_validator("history")
    @classmethod
    def _finite_or_null(
        cls, rows: list[dict[str, float | None]], info: ValidationInfo
    ) -> list[dict[str, float | None]]:
        if info.mode == "json":  # written by us, so done already; a grid's histories are most of what is read
            return rows
        return [{k: None if v is None or not math.isfinite(v) else v for k, v in row.items()} for row in rows]

    @field_validator("schema_")
    @classmethod
    def _known(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"schema {value}; this version reads {SCHEMA}")
        return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _canonical(value: Any) -> str:
    """JSON in which equal values, and only these, have equal texts: true is not 1."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def record_text(record: RunRecord) -> str:
    """What `record.json` holds. Raises ValueError for a record that could not be read again: NaN among the options,
    too many metrics or epochs."""
    record.spec.key  # noqa: B018 - pydantic would write NaN as null
    text = as_text(record)
    content = text.encode()
    if len(content) > LARGEST:
        raise ValueError(f"a record of {len(content) / 2**20:.0f} MiB; up to {LARGEST / 2**20:g} MiB are read")
    parse_record(RECORD, content)
    return text


def dataset_of(spec: RunSpec) -> str:
    """The data set that a run names; "" where its task has no such option."""
    return str(spec.task_options.get(DATASET) or "")


def as_text(record: RunRecord) -> str:
    return record.model_dump_json(by_alias=True, indent=1)


def parse_record(file: str | Path, content: bytes) -> RunRecord:
    try:
        record = RunRecord.model_validate_json(content)
        record.spec.key  # noqa: B018 - what options can not be in JSON shows here
        if as_text(record).encode() != content:  # not as we write it: it may say one thing twice
            json.loads(content.decode(), object_pairs_hook=_refuse_repeated)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = cut(".".join(str(part) for part in first["loc"]), 80)
        raise RecordError(f"{file}: not a run record ({where + ': ' if where else ''}{first['msg']})") from error
    except RecursionError as error:
        raise RecordError(f"{file}: not a run record (nested too deeply)") from error
    except ValueError as error:  # of json, and of the key
        raise RecordError(f"{file}: not a run record ({error})") from error
    spec = record.spec
    mappings = (
        spec.task_options,
        spec.newer,
        spec.parts,
        spec.norm_options,
        record.metrics,
        record.environment,
        record.evidence,
    )
    most = max(map(len, (*mappings, *record.history)))
    if most > MOST_ENTRIES:
        raise RecordError(f"{file}: not a run record (a mapping of {most} entries; {MOST_ENTRIES} are allowed)")
    return record


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    """Refuses a JSON object that has a name twice: readers differ in which one they take."""
    if len(dict(pairs)) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{cut(twice, 80)}" is given twice')
