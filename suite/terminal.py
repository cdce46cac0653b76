"""Standard output and standard error as people have them: of any encoding, closed, full, or no longer read by anybody.

What a command prints never decides how it ends: a grid goes on when `| head` has seen enough. What others have written
(labels, reasons, file names) can not reach into the terminal: between the line breaks only characters that show are
printed, everything else as U+XXXX.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from results.escape import spell, visible


class Output:
    """A stream of text that takes everything and never raises.

    Args:
        stream: where to print; None is nowhere.
        escape: show control characters as U+XXXX. Without, for what moves the cursor on purpose.

    Attributes:
        lost: the first error by which output was lost; None where there was none.
    """

    def __init__(self, stream: TextIO | None, escape: bool = True):
        self.stream: TextIO = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._nowhere = stream is None
        self.escape = escape
        self.lost: OSError | ValueError | None = None

    @property
    def encoding(self) -> str:
        """Of the characters that can be printed."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Print a text, as far as this stream can."""
        shown = "\n".join(map(visible, text.split("\n"))) if self.escape else text
        with self._noting():
            self.stream.write(spell(shown, self.encoding))
        return len(text)

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
