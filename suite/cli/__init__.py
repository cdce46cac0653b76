"""The command line: the only package that reads argv and chooses exit codes; suite.console prints.

app.py         the application, and what its commands share
completing.py  what a shell offers for an argument
runs.py        run, debug, watch
array.py       run --on slurm
tables.py      tables
figures.py     figures
report.py      report
folders.py     runs list, runs rm, merge, diff
configs.py     config ...
cluster.py     status, cancel
checks.py      check, convert-report, bench
lists.py       list ..., data ...
docs.py        docs

Exit codes: 0 done (diverged and skipped are results); 1 a run failed, or a norm does not keep what it declares; 2 a
mistake in what was given, nothing was run; 130 stopped by Ctrl-C or another signal, or a run was told to leave.

Modules that import torch or pandas are imported inside the commands that need them, so that `--help`, `tables` and
`list metrics` start without torch.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from suite import terminal
from suite.cli import (  # noqa: F401 - each adds its commands; ORDER is theirs
    checks,
    cluster,
    configs,
    docs,
    figures,
    folders,
    lists,
    report,
    runs,
    tables,
)
from suite.cli.app import app as app
from suite.cli.app import command_of, whole_command
from suite.cli.completing import is_asked
from suite.console import explain, fail, voice
from suite.environment import set_allocator
from suite.forked import watched

_WATCHED = ("check", "convert-report")
"""Commands that forward users' layers in this process."""


def main() -> None:
    """Entry point of `run_suite.py`, of `python -m suite` and of the console script."""
    try:
        if is_asked(sys.argv):  # by a shell, which reads scripts and words as they are
            whole_command()()
    except ValueError as error:
        sys.exit(fail(str(error)))
    set_allocator()  # before any command imports torch
    before = set(threading.enumerate())
    command = command_of(sys.argv[1:])
    voice.quiet = voice.verbose = False
    with terminal.steady() as (out, _):
        code = _watch_app() if _forwards_layers(sys.argv[1:]) else _run_app()
        out.flush()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):  # a reader that has seen enough is none
            missing = fail(f"standard output: {getattr(out.lost, 'strerror', None) or out.lost}")
            code = code or (0 if command == "run" else missing)
    if any(not thread.daemon for thread in set(threading.enumerate()) - before):
        atexit._run_exitfuncs()  # all of the interpreter's exit but that it would wait for a plugin's thread for ever
        os._exit(code)
    sys.exit(code)


def _forwards_layers(words: Sequence[str]) -> bool:
    command = command_of(words)
    return command in _WATCHED or (command == "report" and "--check" in words)


def _watch_app() -> int:
    """The command in a child: the layers that it forwards are users' code, and may end or crash their process."""
    try:
        code, ended = watched(_run_app)
    except KeyboardInterrupt:
        return 130
    return fail(f"{ended}, by a user's file or layer; the command is not finished") if code is None else code


def _run_app() -> int:
    """The command in this process; returns its exit code."""
    start = time.perf_counter()
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = whole_command()(standalone_mode=False)
    except usage_error as error:
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # what is needed is said by the help, which is no mistake's line
            print(error.format_message(), file=sys.stderr)
            return 2
        code = fail(error.format_message() if hasattr(error, "format_message") else str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except (ValueError, OSError) as error:  # by the rules of this house, what a user can mend
        if voice.verbose:
            traceback.print_exc()
        code = fail(str(error))
    except (
        SystemExit
    ) as error:  # nothing of ours raises it: a user's file or layer would end the command as if all was done
        code = fail(f"sys.exit({error.code!r:.40}) was called in {_innermost(error)}; the command is not finished")
    code = code if isinstance(code, int) else 0
    torch = "with torch" if "torch" in sys.modules else "without torch"
    explain(f"all of it: {time.perf_counter() - start:.2f} s, {torch}; exit code {code}")
    return code


def _innermost(error: BaseException) -> str:
    """The line of code at which an exception arose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "a user's file" if trace is None else f'"{trace.tb_frame.f_code.co_filename}", line {trace.tb_lineno}'
