"""What a folder of results was asked for: the commands and configs of its plans, as `asked.json` holds them.

{"schema": 1, "plans": [{"time": "2026-11-28T23:07:02+00:00", "command": ["run", "configs/quick.yaml"],
                         "config": "/here/configs/quick.yaml", "text": "norms: [bn, gn]\\n...",
                         "version": "0.9.0", "commit": "222c5ab..."}]}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from results.escape import cut

MOST_PLANS = 50
LONGEST_TEXT = 1_000_000
"""Characters of a config's text; a longer one loses its middle."""
MOST_ARGUMENTS, LONGEST_ARGUMENT = 1000, 10_000

Short = Annotated[str, StringConstraints(max_length=LONGEST_ARGUMENT)]

_SECRET = re.compile(r"(?i)(token|password|passwd|secret|credential|api[-_]?key|access[-_]?key|auth)")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "***"


class Asked(BaseModel):
    """One plan of a folder.

    Attributes:
        time: when the plan was last begun, ISO 8601 in UTC.
        command: the words behind the program's name, without secrets; none from Python.
        config: path of the config's file; "" for a mapping and for a pipe.
        text: the config itself: the file's text, a mapping as JSON; "" for none.
        version: of NormSuite.
        commit: of its checkout, "unknown" without one.
    """

    model_config = ConfigDict(frozen=True)

    time: Short
    command: Annotated[tuple[Short, ...], Field(max_length=MOST_ARGUMENTS)] = ()
    config: Short = ""
    text: Annotated[str, StringConstraints(max_length=LONGEST_TEXT)] = ""
    version: Short = ""
    commit: Short = ""

    def same(self, other: Asked) -> bool:
        """Whether the two ask for the same in the same way, whenever that was."""
        return self.model_copy(update={"time": ""}) == other.model_copy(update={"time": ""})


class AskedNotes(BaseModel):
    """What stands in `asked.json`: the plans, the newest last."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    plans: tuple[Asked, ...] = ()

    def followed_by(self, later: AskedNotes) -> AskedNotes:
        """These plans and others by their time, each once; of equal neighbours the newest, and of all the last
        MOST_PLANS."""
        plans: list[Asked] = []
        once = dict.fromkeys((*self.plans, *later.plans))
        for plan in sorted(once, key=lambda plan: plan.time):  # equal times stay as they were
            if plans and plans[-1].same(plan):
                plans.pop()
            plans.append(plan)
        return AskedNotes(plans=tuple(plans[-MOST_PLANS:]))

    def plain(self) -> list[dict[str, Any]]:
        """The plans as plain values, the newest last."""
        return [plan.model_dump(mode="json") for plan in self.plans]


def asked(
    time: str, command: Sequence[str] = (), config: str = "", text: str = "", version: str = "", commit: str = ""
) -> AskedNotes:
    """One plan as notes, within the bounds of what is read again and without the command's secrets."""
    words = without_secrets(command)[:MOST_ARGUMENTS]
    plan = Asked(
        time=time,
        command=tuple(cut(word, LONGEST_ARGUMENT) for word in words),
        config=cut(config, LONGEST_ARGUMENT),
        text=cut(text, LONGEST_TEXT),
        version=version,
        commit=commit,
    )
    return AskedNotes(plans=(plan,))


def without_secrets(command: Sequence[str]) -> list[str]:
    """The words of a command with *** for the values of options that are named like secrets, and for the user's part of
    addresses."""
    kept: list[str] = []
    hide = False
    for word in map(str, command):
        name, equals, _ = word.partition("=")
        secret = bool(_SECRET.search(name)) and (equals != "" or name.startswith("-"))
        if hide and not word.startswith("-"):
            kept.append(_HIDDEN)
        elif secret and equals:
            kept.append(f"{name}={_HIDDEN}")
        else:
            kept.append(_IN_ADDRESS.sub(_HIDDEN, word))
        hide = secret and not equals
    return kept
