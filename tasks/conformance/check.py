"""A task against its facts, on a few planted images.

Runs are of the options in tasks.conformance.cases.SMALL (of a task of one's own: of its attribute `small`, else of its
defaults); a task that has no option `dataset`, or refuses the planted images, reads its own data. Every run has an
empty folder, a journal that can be told to leave anywhere, and global generators in another state, so that "the same"
means that nothing but seed, options and data decides.

Of a user's plugin it is a note and no mistake where a run can not go on after an interruption: it begins anew.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from norms.conformance.subject import Finding, line
from norms.registry import make_norm, norm_info, resolve_norm_options
from tasks import get_task
from tasks.base import check_names
from tasks.conformance.cases import SMALL, small_options
from tasks.conformance.facts import FACTS, HINTS, goes_on_between_steps, goes_on_in_evaluation
from tasks.conformance.planted import known, plant
from tasks.conformance.subject import Subject, TooLong
from tasks.options import NormChoice

_ANEW = (goes_on_between_steps, goes_on_in_evaluation)


@dataclass(frozen=True)
class Check:
    """One fact of one task; the form is that of norms.conformance.Check.

    Attributes:
        task: the registered name.
        fact: the fact, in words.
        declared: the value that the task (or the contract) promises; "-" where nothing is declared.
        measured: the value that its runs show.
        ok: False when the two contradict each other, or the check could not be carried out.
        detail: why, or what else there is to say; one line.
        hint: the usual cause, where ok is False; one line.
        note: to be known, and no mistake.
    """

    task: str
    fact: str
    declared: str
    measured: str
    ok: bool
    detail: str = ""
    hint: str = ""
    note: bool = False

    @property
    def false(self) -> bool:
        """A mistake."""
        return not (self.ok or self.note)


def check_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    norm: Any = "bn",
    data_dir: Path = Path("data"),
    limit: float = 60.0,
) -> list[Check]:
    """Measure every fact of a registered task, with one norm, on the CPU. About ten small runs.

    Args:
        name: of the task.
        options: in the place of the small ones.
        norm: "gn" or {"gn": {"num_groups": 2}}.
        data_dir: folder of data that a task reads itself.
        limit: seconds that one run may take.

    Returns:
        One Check per fact, or the single check "runs" where no run came to its end.

    Raises:
        ValueError: unknown task, norm or option, a norm that can not serve, or a run that takes longer than `limit`.
    """
    with subjects(data_dir) as find:
        subject = find(name, options or {}, norm, limit)
        if reason := subject.task.why_not(subject.norm, subject.info, subject.options):
            raise ValueError(f'norm "{subject.info.name}" can not serve in {name}: {reason}; choose another one')
        try:
            subject.whole.ok  # noqa: B018 - the run is made once, and all facts are measured against it
        except TooLong:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a task under test raises is the finding
            return [Check(name, "runs", "yes", "no", False, line(error), HINTS["runs"])]
        return [measure(subject, fact) for fact in FACTS]


class subjects:
    """Within the block: (name, options, norm, limit) -> the Subject. Planted data are written once for all of them."""

    def __init__(self, data_dir: Path = Path("data")):
        self.data_dir = data_dir.resolve()

    def __enter__(self) -> Callable[..., Subject]:
        self._temporary = tempfile.TemporaryDirectory(prefix="normsuite-check-")
        self.folder = Path(self._temporary.name).resolve()
        self._known = known(self.folder)
        self._threads = torch.get_num_threads()
        self._generators = random.getstate(), torch.get_rng_state()
        torch.set_num_threads(1)  # on so little a second one costs more than it computes
        self.names = self._known.__enter__()
        for kind, name in self.names.items():
            plant(self.folder / "data", kind, name)
        return self.find

    def __exit__(self, *error: Any) -> None:
        self._known.__exit__(*error)
        torch.set_num_threads(self._threads)
        random.setstate(self._generators[0])
        torch.set_rng_state(self._generators[1])
        self._temporary.cleanup()

    def find(
        self, name: str, options: Mapping[str, Any] | None = None, norm: Any = "bn", limit: float = math.inf
    ) -> Subject:
        """See check_task."""
        task, given = get_task(name), dict(options or {})
        check_names(given, task.options.model_fields, f"option of {name}")
        kind, resolved = self._options(task, name, given)
        choice = NormChoice.model_validate(norm)
        facts = asdict(task.setting(resolved))
        made = make_norm(choice.name, **resolve_norm_options(choice.name, choice.options, facts))
        where = self.folder / "data" if kind else self.data_dir
        return Subject(task, made, norm_info(choice.name), resolved, kind, where, self.folder, limit)

    def _options(self, task: Any, name: str, given: dict[str, Any]) -> tuple[str, BaseModel]:
        """The planted data that the task takes, and its options with them."""
        if "dataset" in task.options.model_fields and "dataset" not in given:
            refused: Exception | None = None
            for kind, dataset in self.names.items():
                try:
                    options = task.options(**{**small_options(name), "dataset": dataset, **given})
                    task.data_checksum(options, self.folder / "data")
                except (ValueError, TypeError) as error:
                    refused = refused or error
                else:
                    return kind, options
            if name in SMALL and refused is not None:
                raise ValueError(_one_line(refused)) from refused
        own = given if name not in SMALL and getattr(task, "small", None) is None else {**small_options(name), **given}
        try:
            options = task.options(**own)
        except ValidationError as error:
            raise ValueError(f"{name}: {_one_line(error)}") from error
        task.data_checksum(options, self.data_dir)
        return "", options


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return str(error)


def measure(subject: Subject, fact: Callable[[Subject], Finding]) -> Check:
    """One fact of a task. What the task raises is the finding, but TooLong, which is raised."""
    try:
        found = fact(subject)
    except TooLong:
        raise
    except Exception as error:  # noqa: BLE001 - a task under test may raise anything; one failed check, not a crash
        found = Finding("works", "raises", line(error), False)
    ok = found.declared == found.measured if found.ok is None else found.ok
    name, plugin = fact.__name__, subject.task.name not in SMALL
    anew = plugin and fact in _ANEW and found.measured == "begins anew"
    hint = "" if ok else HINTS[name]
    return Check(
        subject.task.name, name.replace("_", " "), found.declared, found.measured, ok, found.detail, hint, anew
    )
