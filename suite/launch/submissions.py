"""Submissions of arrays: made, noted in the folder of results, and found again in Slurm's queue.

A submission is a folder, `slurm/NUMBER/` in the folder of results: `job.sh`, the script; `submission.json`, what was
asked for and the number of the job; `runs.txt`, the planned runs, a line each; and what each element prints, `1.out`.
The note is written before sbatch is called: where its answer is lost, the job's name, which no other has, finds it.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from results import files
from results.asked import without_secrets
from results.escape import visible
from results.record import RunSpec
from suite.launch.slurm import array_size, element_command, script
from suite.launch.slurm_programs import Element, NotAnswered, queue, submit_script
from suite.launch.slurm_programs import cancel as cancel_jobs

if TYPE_CHECKING:
    from suite.launch.places import Slurm

SUBMISSIONS, SCRIPT, NOTE, RUNS = "slurm", "job.sh", "submission.json", "runs.txt"
MOST_SUBMISSIONS = 200
"""The newest ones are looked at."""


class Submission(BaseModel):
    """One array that was submitted, or was about to be.

    Attributes:
        time: ISO 8601 in UTC.
        host: where sbatch was called.
        command: the words behind the program's name, without secrets.
        name: of the job.
        elements: of the array.
        planned, to_do: runs of the plan, and those of them that were not done.
        job: its number; "" where sbatch has given none (yet).
        cluster: as sbatch says, "" for the only one.
        found: the number is squeue's, since sbatch's answer was lost.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    time: str
    host: str = ""
    command: tuple[str, ...] = ()
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")
    elements: int
    planned: int
    to_do: int
    job: str = Field(default="", pattern=r"^[0-9]{0,20}$")
    cluster: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,80}$")
    found: bool = False


def submit(
    options: Slurm,
    words: Sequence[str],
    folder: Path,
    specs: Iterable[RunSpec],
    to_do: int,
    threads: int = 1,
) -> tuple[int, Submission, list[str]]:
    """Write the batch script of an array into a folder of results, and submit it.

    Args:
        options: of the place.
        words: of the command that is given, behind the program's name.
        folder: of results; made if missing.
        specs: the planned runs.
        to_do: how many of them are not done; above 0.
        threads: of a run.

    Returns:
        (its number in the folder, what was submitted, lines for the user: earlier submissions that go on, or whose
        answer was lost).

    Raises:
        ValueError: sbatch is not here or refuses, with its own words; or whether it submitted anything is not known.
        OSError: the folder can not be written to.
    """
    folder = folder.resolve()
    said = _before(folder)
    runs = [f"{spec.task}/{spec.norm}/{spec.key}" for spec in specs]
    number, own = _new_folder(folder)
    name = _job_name(folder)
    elements = array_size(options, to_do)
    try:
        text = script(options, element_command(words, options, threads), own, name, elements)
        files.write_text(own / SCRIPT, text)
        files.write_text(own / RUNS, "".join(f"{run}\n" for run in runs))
        asked = Submission(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
            command=tuple(without_secrets(words)),
            name=name,
            elements=elements,
            planned=len(runs),
            to_do=to_do,
        )
        _write(own, asked)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise
    try:
        job, cluster = submit_script(own / SCRIPT)
    except NotAnswered as error:
        try:
            known = find_lost(own, asked)
        except ValueError:
            known = None
        if known is not None and known.job:
            return number, known, [*said, f"sbatch's answer was lost ({error}); squeue knows the job: {known.job}"]
        if error.refused and known is not None:
            shutil.rmtree(own, ignore_errors=True)
            raise ValueError(f"sbatch refuses: {error}") from error
        raise ValueError(
            f"whether the job was submitted is not known: {error}. `status {shlex.quote(str(folder))}` looks for it, "
            "and so does the same command before it submits again"
        ) from error
    except ValueError:  # no sbatch
        shutil.rmtree(own, ignore_errors=True)
        raise
    done = asked.model_copy(update={"job": job, "cluster": cluster})
    _write(own, done)
    return number, done, said


def preview(options: Slurm, words: Sequence[str], folder: Path, to_do: int, threads: int = 1) -> str:
    """The batch script that `submit` would write next; nothing is written. Arguments and ValueError as of `submit`."""
    folder = folder.resolve()
    own = folder / SUBMISSIONS / str((_numbers(folder) or [0])[-1] + 1)
    command = element_command(words, options, threads)
    return script(options, command, own, _job_name(folder), array_size(options, to_do))


def submissions(folder: Path, damaged: list[str] | None = None) -> dict[int, Submission]:
    """number -> submission, of a folder of results; the newest last.

    Args:
        folder: of results.
        damaged: takes a line for each note that can not be read.
    """
    found: dict[int, Submission] = {}
    for number in _numbers(folder)[-MOST_SUBMISSIONS:]:
        file = folder / SUBMISSIONS / str(number) / NOTE
        try:
            found[number] = Submission.model_validate_json(files.read_bytes(file, 2**20))
        except FileNotFoundError:  # of a command that is just writing it
            continue
        except (OSError, ValidationError) as error:
            why = "not the note of a submission" if isinstance(error, ValidationError) else error.strerror or str(error)
            if damaged is not None:
                damaged.append(visible(f"{file}: {why}"))
    return found


def planned_runs(folder: Path, number: int) -> list[str]:
    """The runs of a submission's plan as "task/norm/key"; none where that can not be read."""
    try:
        text = files.read_bytes(folder / SUBMISSIONS / str(number) / RUNS).decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.count("/") == 2]


def look_up(found: Mapping[int, Submission]) -> dict[int, list[Element]]:
    """number -> the elements that wait or run, as squeue tells. Raises ValueError as `queue`."""
    elements: dict[int, list[Element]] = {number: [] for number in found}
    numbers = {each.name: number for number, each in found.items()}
    by_cluster: dict[str, list[str]] = {}
    for each in found.values():
        by_cluster.setdefault(each.cluster, []).append(each.name)
    for cluster, names in by_cluster.items():
        for element in queue(names, cluster):
            if element.name in numbers:
                elements[numbers[element.name]].append(element)
    return elements


def in_queue(folder: Path, damaged: list[str] | None = None) -> dict[int, tuple[Submission, list[Element]]]:
    """number -> (submission, its elements that wait or run), of those that have any. damaged: as of `submissions`.
    Raises ValueError as `queue`."""
    found = submissions(folder, damaged)
    if not found:
        return {}
    for number, each in found.items():
        if not each.job:
            found[number] = find_lost(folder / SUBMISSIONS / str(number), each)
    return {number: (found[number], elements) for number, elements in look_up(found).items() if elements}


def cancel(found: Mapping[int, tuple[Submission, list[Element]]]) -> None:
    """End what `in_queue` found. Raises ValueError as `slurm_programs.cancel`."""
    by_cluster: dict[str, list[str]] = {}
    for each, elements in found.values():
        by_cluster.setdefault(each.cluster, []).extend(dict.fromkeys(element.job for element in elements))
    for cluster, jobs in by_cluster.items():
        cancel_jobs(jobs, cluster)


def find_lost(own: Path, asked: Submission) -> Submission:
    """A submission without a job's number, with the number that squeue has for its name, if it has one; it is noted.

    Args:
        own: folder of the submission.
        asked: what its note says.

    Raises:
        ValueError: squeue is not here or does not answer.
    """
    jobs = [element.job for element in queue([asked.name], asked.cluster) if element.name == asked.name]
    if not jobs:
        return asked
    known = asked.model_copy(update={"job": jobs[0], "found": True})
    with contextlib.suppress(OSError):  # a folder that can only be read
        _write(own, known)
    return known


def _before(folder: Path) -> list[str]:
    """What is to be said of earlier submissions before another one. Raises ValueError where one may be on its way."""
    lines = []
    found = submissions(folder)
    for number, each in list(found.items()):
        own = folder / SUBMISSIONS / str(number)
        if each.job:
            continue
        try:
            found[number] = find_lost(own, each)
        except NotAnswered as error:
            raise ValueError(
                f"whether slurm/{number} ({each.time}) was submitted is not known, and {error}; try again later, or "
                f"remove {shlex.quote(str(own))} to submit another one whatever became of it"
            ) from error
        if found[number].job:
            lines.append(f"sbatch's answer for slurm/{number} was lost; squeue knows it: job {found[number].job}")
        else:
            lines.append(
                f"sbatch's answer for slurm/{number} ({each.time}) was lost, and squeue knows no job of its name: it "
                "was never submitted, or has ended"
            )
    with contextlib.suppress(NotAnswered):
        for number, elements in look_up(found).items():
            if elements:
                lines.append(
                    f"{len(elements)} element{'s' if len(elements) > 1 else ''} of slurm/{number} (job "
                    f"{found[number].job}) wait or run still; the new ones share the runs with them"
                )
    return lines


def _job_name(folder: Path) -> str:
    """A name that no other job has; squeue takes several of them with commas between."""
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name)[:30].strip("-") or "runs"
    return f"normsuite-{called}-{secrets.token_hex(6)}"


def _numbers(folder: Path) -> list[int]:
    try:
        names = [path.name for path in (folder / SUBMISSIONS).iterdir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,8}", name))


def _new_folder(folder: Path) -> tuple[int, Path]:
    """(number, folder) of a submission that no other command has."""
    (folder / SUBMISSIONS).mkdir(parents=True, exist_ok=True)
    for number in itertools.count((_numbers(folder) or [0])[-1] + 1):
        own = folder / SUBMISSIONS / str(number)
        try:
            own.mkdir()
        except FileExistsError:
            continue
        return number, own
    raise AssertionError("numbers have no end")


def _write(own: Path, submission: Submission) -> None:
    files.write_text(own / NOTE, submission.model_dump_json(by_alias=True, indent=1) + "\n")
