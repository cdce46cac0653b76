"""A run on a machine that shares no folder with the command: made here, in a folder of its own, and told message by
message. No word of Ray: who calls it gives the way back.

The run is made as on any machine, by suite.launch.local, so whatever its code does to its process stays its own, and
its exit code is known. What it writes (checkpoints, history, output, trackers' files, artifacts) is sent while it
goes or at its end. The folder is removed afterwards; one whose maker was killed, by the next run on that machine.

Messages, numbered from 1 by `Sent`:

    "started"                                  the run is made
    "note", "progress", "trouble"              as suite.launch.launcher.Kind
    "refused"                                  why no run is made here; the command ends
    "beat"                                     nothing is new
    "grown"   {file, first, data}              what was written behind the end of a file; `first`: it begins anew
    "part"    {file, first, last, data}        of a file that is complete: a checkpoint, an artifact
    "end"     {record, left, code}             the record's JSON or None, whether it has left, the exit code

`file` is relative to the folder of results.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from results import files
from results.claims import CLAIM
from results.record import DONE, LARGEST, RECORD, RecordError, RunRecord, RunSpec, parse_record
from results.store import run_folder
from suite.checkpoints import BEFORE, NEWEST
from suite.launch import code
from suite.launch.devices import VISIBLE, Devices
from suite.launch.launcher import LaunchError
from suite.launch.local import LocalLauncher, LocalRun
from suite.launch.travelling import Carried
from suite.live import HISTORY, born
from suite.output import OUTPUT, trim
from suite.torchrun import workers_of

PART = 4 * 2**20
"""Bytes of a file that travel in one message."""
TRACKING = "tracking"
"""Of suite.trackers."""

Answer = Literal["", "leave", "gone"]
"""What a message is answered: "leave": the run shall save and leave; "gone": nobody waits for it any more."""
Post = Callable[[int, str, Any], Answer]
"""Sends a message by its number, its kind and its value; waits until it has arrived."""

_POLL = 0.5  # seconds between looks at what the run has written
_BEAT = 2.0  # seconds without a message after which one says so, and asks whether the run shall leave
_TOLD = 1.0  # seconds between two messages of progress, and between two requests to leave
_LEAVE = 5.0  # seconds in which a process has to end once its record is stored
_PREFIX = "normsuite-run-"
_OWN = {RECORD, HISTORY, OUTPUT, NEWEST, BEFORE, CLAIM}  # in a run's folder, beside artifacts


def make(job: Mapping[str, Any], post: Post, fetch: Callable[[Any], bytes]) -> None:
    """Make a run and tell all of it.

    Args:
        job: see suite.launch.ray.RayLauncher.start.
        post: see `Post`; what it raises ends the run.
        fetch: gives the bytes of what `job` only refers to.
    """
    sent = Sent(post)
    spec = RunSpec.model_validate(job["spec"])
    here = code.here()
    if here["fingerprint"] != job["code"]["fingerprint"]:
        # no failure of the run, nor of any other that waits
        theirs, ours = code.in_words(here), code.in_words(job["code"])
        sent.say("refused", f"{here['host']} has other code: {theirs}; the command began with {ours}")
        return
    with _folder() as out:
        folder = run_folder(out, spec)
        folder.mkdir(parents=True)
        if job["checkpoint"] is not None:
            (folder / NEWEST).write_bytes(job["checkpoint"])
        data_dir, missing = placed(job["data"], out / "data", fetch)
        if missing:
            sent.end(trouble=missing)
            return
        launcher = LocalLauncher(1, _devices(spec, job["gpus"]))
        try:
            launcher.open(Carried(job["run_one"], str(data_dir)), out)
            with _no_main():
                run = launcher.start(spec, None)
            _Watched(launcher, run, spec, out, sent).until_its_end()
        except LaunchError as error:
            sent.end(trouble=f"{here['host']}: {error}")
        finally:
            launcher.close()


class Sent:
    """The messages of one run."""

    def __init__(self, post: Post):
        self._post, self._number = post, 0
        self.answer: Answer = ""
        self.at = time.monotonic()
        """When the last one was sent."""
        self._grown: dict[str, tuple[int, int]] = {}  # file -> (inode, bytes) that were sent
        self._whole: dict[str, tuple[int, int, int]] = {}  # file -> (inode, bytes, time) of the one that was sent

    def say(self, kind: str, value: Any = None) -> None:
        self._number += 1
        self.answer = self._post(self._number, kind, value)
        self.at = time.monotonic()

    def end(
        self,
        *,
        text: str | None = None,
        left: bool = False,
        code: int = 0,
        trouble: str = "",
    ) -> None:
        """The last message."""
        if trouble:
            self.say("trouble", trouble)
        self.say("end", {"record": text, "left": left, "code": code or int(bool(trouble))})

    def grown(self, out: Path, file: Path) -> None:
        """Send what a file that is written line by line has more than before."""
        with _open(file) as stream:
            if stream is None:
                return
            name, found = file.relative_to(out).as_posix(), os.fstat(stream.fileno())
            inode, done = self._grown.get(name, (0, 0))
            if inode != found.st_ino or found.st_size < done:  # begun anew, or its middle was cut out
                inode, done = found.st_ino, -1
            stream.seek(max(done, 0))
            while found.st_size > done and (data := stream.read(PART)):
                self.say("grown", {"file": name, "first": done < 0, "data": data})
                done = max(done, 0) + len(data)
                self._grown[name] = inode, done

    def whole(self, out: Path, file: Path) -> None:
        """Send a file that takes its place in one step, unless this very one was sent before."""
        with _open(file) as stream:
            if stream is None:
                return
            name, found = file.relative_to(out).as_posix(), os.fstat(stream.fileno())
            mark = found.st_ino, found.st_size, found.st_mtime_ns
            if self._whole.get(name) == mark:
                return
            first, left = True, found.st_size
            while first or left > 0:
                data = stream.read(min(PART, left))
                left = left - len(data) if data else 0
                self.say("part", {"file": name, "first": first, "last": left <= 0, "data": data})
                first = False
            self._whole[name] = mark

    def known(self, out: Path, file: Path) -> None:
        """This one has come from where it would be sent to."""
        with _open(file) as stream:
            if stream is not None:
                found = os.fstat(stream.fileno())
                self._whole[file.relative_to(out).as_posix()] = found.st_ino, found.st_size, found.st_mtime_ns


class _Watched:
    """A run from its start to its last message."""

    def __init__(self, launcher: LocalLauncher, run: LocalRun, spec: RunSpec, out: Path, sent: Sent):
        self.launcher, self.run, self.spec, self.out, self.sent = launcher, run, spec, out, sent
        self.folder = run_folder(out, spec)
        self.code: int | None = None
        self.left = False
        self._end: float | None = None  # when the process has to have ended
        self._told = self._asked = 0.0
        self._progress: Any = None  # that is not sent yet
        sent.known(out, self.folder / NEWEST)

    def until_its_end(self) -> None:
        while self.code is None:
            for _, kind, value in self.launcher.news([self.run], _POLL, []):
                self._heard(kind, value)
            self._send(final=False)
            if self.sent.answer == "gone" or (self._end is not None and time.monotonic() > self._end):
                self.launcher.kill(self.run)
            elif self.sent.answer == "leave" and time.monotonic() - self._asked >= _TOLD and self.code is None:
                self._asked = time.monotonic()
                self.launcher.leave(self.run)
            if self.sent.answer == "gone":
                return
        text, record = self._record()
        self._send(final=True, done=record is not None and record.status in DONE)
        self.sent.end(text=text, left=self.left, code=self.code)

    def _heard(self, kind: str, value: Any) -> None:
        if kind == "ended":
            self.code = value
        elif kind in ("stored", "left"):
            self.left = kind == "left"
            self._end = time.monotonic() + _LEAVE
        elif kind == "progress" and "row" not in value and "text" not in value:
            self._progress = value
        elif kind in ("started", "note", "progress", "trouble"):
            self.sent.say(kind, value)

    def _send(self, *, final: bool, done: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._told >= _TOLD and not final:
            self.sent.say("progress", self._progress)
            self._told, self._progress = now, None
        trim(self.folder / OUTPUT)
        for file in (self.folder / HISTORY, self.folder / OUTPUT, *_below(self.out / TRACKING)):
            self.sent.grown(self.out, file)
        if not done:
            self.sent.whole(self.out, self.folder / NEWEST)
        if final:
            for file in _below(self.folder):
                if file.name not in _OWN and not file.name.startswith("."):
                    self.sent.whole(self.out, file)
        elif time.monotonic() - self.sent.at >= _BEAT:
            self.sent.say("beat")

    def _record(self) -> tuple[str | None, RunRecord | None]:
        """The record that the run's process has stored, as text and as a value."""
        file = self.folder / RECORD
        try:
            content = files.read_bytes(file, LARGEST)
            return content.decode(), parse_record(file, content)
        except (OSError, ValueError, RecordError):
            return None, None


def placed(data: Mapping[str, Any], into: Path, fetch: Callable[[Any], bytes]) -> tuple[Path, str]:
    """A folder with the prepared data sets that a run needs: this machine's own where its sets are the same, else one
    with what was sent, and links to the rest.

    Args:
        data: `data_dir` on this machine, and `sets`: name of a folder -> its `manifest` (bytes) and its `files` (name
            -> references to its parts), None where they are not sent, with the reason `why`.
        into: a folder that is made where it is needed.

    Returns:
        The folder, and what is missing, in one line: "" for nothing.
    """
    own = Path(data["data_dir"])
    other = {
        name: each for name, each in data["sets"].items() if not _same(own / name / "manifest.json", each["manifest"])
    }
    if not other:
        return own, ""
    into.mkdir()
    for name, each in other.items():
        if each["files"] is None:
            return into, f'data set "{name}" is not in {own} of this node, or is another one there, and {each["why"]}'
        (into / name).mkdir()
        for file, parts in each["files"].items():
            with files.open_new(into / name / file) as stream:
                for part in parts:
                    stream.write(fetch(part))
    for beside in own.iterdir() if own.is_dir() else ():
        if not (into / beside.name).exists():
            (into / beside.name).symlink_to(beside)
    return into, ""


def _same(manifest: Path, content: bytes) -> bool:
    try:
        return files.read_bytes(manifest) == content
    except OSError:
        return False


def _devices(spec: RunSpec, gpus: float) -> Devices | None:
    """The accelerators that were given to this process, for the run's."""
    names = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    if not gpus or not names:
        return None
    return Devices(names, runs_each=max(1, workers_of(spec)))


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """A process started inside does not import this one's main module: that of a Ray worker takes longer than a run."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is removed at the end; those that killed makers have left go first."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        process, _, rest = left.name.removeprefix(_PREFIX).partition("-")
        with contextlib.suppress(OSError, ValueError):
            if left.stat().st_uid == os.getuid() and born(int(process)) != rest.partition("-")[0]:
                shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{born(os.getpid())}-", dir=place))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A regular file to read, None where there is none."""
    try:
        stream = os.fdopen(
            os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)), "rb"
        )
    except OSError:
        yield None
        return
    with stream:
        yield stream if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else None


def _below(folder: Path) -> Sequence[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
