"""Standard output and standard error as people have them: of any encoding, closed, full, or no longer read by anybody.

What a command prints never decides how it ends: a grid goes on when `| head` has seen enough. What others have written
(labels, reasons, file names) can not reach into the terminal: between the line breaks only characters that show are
printed, everything else as U+XXXX. Colours are the one exception: `paint` puts marks into a text that nobody else can
write, since they hold a number drawn by this process, and an `Output` in colour turns these alone into codes.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from results.escape import spell, visible

LOOKS = {"bold": 1, "underline": 4, "red": 31, "green": 32, "yellow": 33}
"""Name -> number of its code (ECMA-48, SGR)."""

_SECRET = os.urandom(16).hex()
_MARK = re.compile(rf"\x1b{_SECRET}\[([0-9]+)m")


def wants_colours(stream: Any) -> bool:
    """Whether texts on a stream are coloured: on a terminal, or with FORCE_COLOR; never with NO_COLOR or on a dumb one.

    NO_COLOR (no-color.org) and FORCE_COLOR count where they are not empty; FORCE_COLOR=0 forces nothing.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # no stream, or one that is closed
        return False


def in_colours(stream: Any) -> bool:
    """Whether what `paint` marks is coloured on this stream."""
    return bool(getattr(stream, "colours", False))


def paint(text: str, look: str, stream: Any = None) -> str:
    """A text that an `Output` in colour shows in this look; as it is where the stream (None: stdout) is in none.

    Paint last: what makes control characters visible, cuts or measures a text takes the marks for a part of it.
    """
    if not in_colours(sys.stdout if stream is None else stream):
        return text
    return f"\x1b{_SECRET}[{LOOKS[look]}m{text}\x1b{_SECRET}[0m"


def codes(text: str) -> str:
    """A painted text with the codes of a terminal in the place of its marks."""
    return _MARK.sub(lambda mark: f"\x1b[{mark[1]}m", text)


class Output:
    """A stream of text that takes everything and never raises.

    Args:
        stream: where to print; None is nowhere.
        escape: show control characters as U+XXXX. Without, for what moves the cursor on purpose.

    Attributes:
        lost: the first error by which output was lost; None where there was none.
        colours: whether marks of `paint` become codes.
    """

    def __init__(self, stream: TextIO | None, escape: bool = True):
        self.stream: TextIO = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._nowhere = stream is None
        self.escape = escape
        self.lost: OSError | ValueError | None = None
        self.colours = stream is not None and wants_colours(stream)

    @property
    def encoding(self) -> str:
        """Of the characters that can be printed."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Print a text, as far as this stream can."""
        shown = self._shown(text) if self.escape else text
        with self._noting():
            self.stream.write(spell(shown, self.encoding))
        return len(text)

    def _shown(self, text: str) -> str:
        parts = _MARK.split(text) if self.colours else [text]  # texts, with the numbers of codes between them
        parts[::2] = ["\n".join(map(visible, part.split("\n"))) for part in parts[::2]]
        parts[1::2] = [f"\x1b[{number}m" for number in parts[1::2]]
        return "".join(parts)

    def flush(self) -> None:
        with self._noting():
            self.stream.flush()

    def leave(self) -> None:
        """Flush for the last time: what still can not be printed is dropped, or Python would complain at its exit."""
        if self._nowhere:
            self.stream.close()
            return
        with self._noting():
            self.stream.flush()
            return
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile
            self.lost = self.lost or error


@contextlib.contextmanager
def steady() -> Iterator[tuple[Output, Output]]:
    """While inside, sys.stdout and sys.stderr are an `Output` each."""
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        out.leave()
        err.leave()


@contextlib.contextmanager
def as_they_are() -> Iterator[None]:
    """While inside, sys.stdout and sys.stderr are the process's own streams, for a debugger and for what a user's code
    prints on purpose."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (each.stream if isinstance(each, Output) else each for each in before)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _fill_descriptors() -> None:
    """Let 0, 1 and 2 lead to nowhere where they were closed at the start (`>&-`): the next file would get the number,
    and be printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
