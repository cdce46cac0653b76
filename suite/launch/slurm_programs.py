"""Slurm's own programs, as far as the suite calls them: sbatch, squeue, scancel.

Each is called with a list of arguments and a limit of time, in a session of its own: Ctrl-C does not break into a
submission, and a program that hangs is ended with all that it started. What it answers is text of a program that may be
a site's own wrapper: banners, rubbish and silence are expected.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from results.escape import cut, one_line

PATIENCE = 60.0
"""Seconds that a program of Slurm may take; a busy controller answers within ten."""
_MOST = 64 * 2**20  # bytes of an answer that are read

FIELDS = (
    *(("JobArrayID", 48), ("State", 24), ("Reason", 80), ("NodeList", 80), ("TimeUsed", 24), ("StartTime", 32)),
    *(("RestartCnt", 12), ("Name", 80)),
)
"""What squeue is asked for: Slurm's names of the fields, and how many characters each takes in a line."""
_ID = re.compile(r"([0-9]+)(?:_([0-9]+))?")


class NotAnswered(ValueError):
    """A program of Slurm was started and gave no usable answer.

    Args:
        text: what it said, or how it ended.
        refused: it said no, and nothing was done.
    """

    def __init__(self, text: str, refused: bool = False):
        super().__init__(text)
        self.refused = refused


@dataclass(frozen=True)
class Element:
    """One element of an array, as long as the queue knows it.

    Attributes:
        job: number of the array.
        index: its own number in it; None for what is no element.
        state: Slurm's word: PENDING, RUNNING, COMPLETING, ...
        reason: why it waits, Slurm's word; "None" where it does not.
        node: where it runs; "" elsewhere.
        elapsed, start: its time so far, and when it began or shall begin, as Slurm writes them.
        restarts: how often it was begun again.
        name: of the job.
    """

    job: str
    index: int | None
    state: str
    reason: str
    node: str
    elapsed: str
    start: str
    restarts: int
    name: str


def submit_script(file: Path) -> tuple[str, str]:
    """(number of the job, cluster or "") that sbatch answers for a batch script.

    Raises:
        ValueError: sbatch is not here.
        NotAnswered: it refuses (`refused`), dies, hangs or says something else; the job may have been submitted.
    """
    code, out, err = _call(["sbatch", "--parsable", str(file)])
    for line in reversed(out.splitlines()):  # a site's banner may stand before
        if code == 0 and (match := re.fullmatch(r"([0-9]{1,20})(?:;([\w.-]{1,80}))?", line.strip(), re.ASCII)):
            return match[1], match[2] or ""
    said = _said(err) or _said(out)
    if code is not None and code > 0 and said and "timed out" not in said.lower():
        raise NotAnswered(said, refused=True)
    raise NotAnswered(f"sbatch {_ended(code)}{' and said: ' + said if said else ' without a number of a job'}")


def queue(names: Sequence[str], cluster: str = "") -> list[Element]:
    """What waits and runs of the jobs with these names.

    Raises:
        ValueError: squeue is not here.
        NotAnswered: it refuses, dies, hangs, or says what is no list of jobs.
    """
    if not names:
        return []
    layout = ",".join(f"{name}:{width}" for name, width in FIELDS)
    where = [f"--clusters={cluster}"] if cluster else []
    code, out, err = _call(
        ["squeue", *where, "--noheader", "--array", f"--name={','.join(names)}", f"--Format={layout}"]
    )
    if code != 0:
        raise NotAnswered(f"squeue {_ended(code)}{': ' + said if (said := _said(err) or _said(out)) else ''}")
    return list(_elements(out))


def cancel(jobs: Sequence[str], cluster: str = "") -> None:
    """End jobs by their numbers. One that has ended already is no mistake.

    Raises:
        ValueError: scancel is not here.
        NotAnswered: it refuses, dies or hangs; some of the jobs may have been ended.
    """
    where = [f"--clusters={cluster}"] if cluster else []
    code, out, err = _call(["scancel", *where, *jobs])
    if code != 0 and "invalid job id" not in (err + out).lower():
        raise NotAnswered(f"scancel {_ended(code)}{': ' + said if (said := _said(err) or _said(out)) else ''}")


def _elements(text: str) -> Iterator[Element]:
    for line in text.splitlines():
        if not line.strip() or line.startswith("CLUSTER:"):
            continue
        values, at = [], 0
        for _, width in FIELDS:
            values.append(one_line(line[at : at + width]))
            at += width
        number, state, reason, node, elapsed, start, restarts, name = values
        match = _ID.match(number)
        if match is None or not re.fullmatch(r"[A-Z_]+", state):
            raise NotAnswered(f"squeue said what is no list of jobs: {cut(one_line(line), 200)}")
        yield Element(
            job=match[1],
            index=int(match[2]) if match[2] else None,
            state=state,
            reason=reason,
            node=node,
            elapsed=elapsed,
            start=start,
            restarts=int(restarts) if restarts.isdecimal() else 0,
            name=name,
        )


def _call(arguments: Sequence[str]) -> tuple[int | None, str, str]:
    """(exit code, None where it hung and was ended; standard output; standard error)"""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # pipes would wait for all that it started
        try:
            process = subprocess.Popen(
                list(arguments), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except FileNotFoundError:
            raise ValueError(
                f"{arguments[0]} is not here: this machine has no Slurm, or its programs are not on PATH; call this on "
                "a login node of the cluster, or make the runs on this machine with --on local"
            ) from None
        except OSError as error:
            raise ValueError(f"{arguments[0]} can not be started: {error.strerror or error}") from error
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:  # Ctrl-C: what it was asked may be done by now, and its answer is nobody's
            _end(process)
            raise
        if code is None:
            _end(process)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read(_MOST).decode("utf-8", "replace"))
    return code, texts[0], texts[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(code: int | None) -> str:
    if code is None:
        return f"did not answer within {PATIENCE:g} s"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _said(text: str) -> str:
    """What a program said, its name at the beginning of each line left out, in one line."""
    lines = [
        re.sub(r"^(sbatch|squeue|scancel|slurm_\w+)?(: )?(error|fatal)?: ", "", line) for line in text.splitlines()
    ]
    return cut(one_line("; ".join(filter(None, map(str.strip, lines)))), 500)
