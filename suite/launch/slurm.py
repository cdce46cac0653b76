"""An array of Slurm that makes the runs of a folder: its batch script.

Every element runs the command of its submission on the same folder and makes what no one else makes: claims tell runs
apart, not indices, so elements may end, be lost, be begun again or be ended in any order, and the submitting process is
not needed. No state of a job is watched for that; the folder's records are the only truth.

Slurm tells an element some time before its limit (SIGUSR1). Its runs then make checkpoints and leave, and the script
asks for the element to be begun again, so that a grid goes on over any number of limits. The queue holds such an
element for about two minutes (BeginTime). After `scancel` (SIGTERM) it stays ended.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from results.escape import visible
from suite.environment import ROOT, now

if TYPE_CHECKING:
    from suite.launch.places import Slurm

ELEMENT = ("--no-wait",)
"""What an element's command has beside the words of its submission, without --on."""


def element_command(words: Sequence[str], options: Slurm, threads: int = 1) -> list[str]:
    """The words of an element's command from those of the command that submits it.

    Args:
        words: behind the program's name: ["run", "configs/quick.yaml", "--on", "slurm"].
        options: of the place.
        threads: of a run.
    """
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--retry":  # once, whenever an element begins, and how often
            kept += ["--retry-before", now()]
            continue
        if word == "--on":
            next(rest, None)
        elif not word.startswith("--on="):
            kept.append(word)
    jobs = options.jobs
    if jobs is None and options.gpus is None and not _names(kept, "--jobs"):
        jobs = max(1, (options.cpus or 1) // threads)
    given = [] if jobs is None else ["--jobs", str(jobs)]
    if options.runs_per_device is not None:
        given += ["--runs-per-device", str(options.runs_per_device)]
    return [*kept, *given, *ELEMENT]


def notes(options: Slurm, device: str, todo: int) -> Iterator[str]:
    """Lines about what a user may have meant otherwise."""
    if options.gpus is not None and device == "cpu":
        yield f"each element asks for gpus={options.gpus}, and its runs compute on the CPU; --device cuda uses them"
    if options.gpus is None and device.startswith("cuda") and "gpus-per-task" not in options.extra:
        yield f"--device {device}, and no gpus=NUMBER: most clusters then show an element no accelerator"
    if todo and options.elements > todo:
        yield f"array={options.array}: {todo} elements are enough for {todo} runs"


def array_size(options: Slurm, todo: int) -> int:
    """Elements that are submitted: no more than there are runs to do."""
    return max(1, min(options.elements, todo))


def script(
    options: Slurm, words: Sequence[str], folder: Path, name: str, elements: int, working: Path | None = None
) -> str:
    """The batch script of an array.

    Args:
        options: of the place.
        words: of an element's command, see `element_command`.
        folder: of the submission, absolute; what elements print goes there.
        name: of the job.
        elements: how many; each has its number from 1.
        working: the folder that relative paths of the command start from; None: the one of this process.

    Raises:
        ValueError: the path of a folder holds what Slurm or a script can not name.
    """
    working = Path.cwd() if working is None else working
    for path in (folder, working):
        if visible(str(path)) != str(path) or "\\" in str(path):
            raise ValueError(
                f'the path "{visible(str(path))}" holds a backslash or a character that does not show; Slurm can not '
                "name a file in it: choose another --out"
            )
    printed = f"{str(folder).replace('%', '%%')}/%a.out"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_option(key, value)}" for key, value in _asked(options, name, elements, printed)),
    ]
    program = [str(ROOT / "run_suite.py")] if (ROOT / "run_suite.py").is_file() else ["-P", "-m", "suite"]
    command = shlex.join([sys.executable, *program, *words])
    body = _BODY.format(
        setup="\n".join(["", *options.setup, ""]) if options.setup else "",
        working=shlex.quote(str(working)),
        command=command,
        requeues=options.requeues,
    )
    return "\n".join(lines) + "\n" + body


_BODY = r"""
# Made by NormSuite. Every element runs the same command on the same folder and makes what nobody else makes.
# Some time before the limit Slurm sends SIGUSR1 to this script: the runs make checkpoints and leave, and the element is
# begun again; so it is when they take longer and the limit itself comes. After scancel it stays ended.
me=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # of the last element the job's number alone means the whole array
restarts=${{SLURM_RESTART_COUNT:-0}}
command= told= stopped= heard= asked=
tell() {{ heard=1; [ -z "$command" ] || kill "-$1" "$command" 2>/dev/null; }}
again() {{
  [ -z "$asked" ] || return
  asked=1
  if [ "$restarts" -lt {requeues} ]; then
    echo "$(date '+%F %T'): time is over, and element $me asks to begin again"
    scontrol requeue "$me"
  else
    echo "$(date '+%F %T'): time is over, and requeues={requeues}; the same command submits an array that goes on"
  fi
}}
at_limit() {{ scontrol show job "$me" 2>/dev/null | grep -q "Reason=TimeLimit"; }}
trap 'told=1; tell USR1' USR1
trap 'tell TERM; if at_limit; then again; else stopped=1; fi' TERM
echo "$(date '+%F %T'): element $me on $(hostname), begun again $restarts times"
{setup}
cd -- {working} || exit 2
code=130
if [ -z "$told$stopped" ]; then
  {command} &
  command=$!
  while true; do  # a signal ends `wait`, not the command
    heard=
    wait "$command"
    ended=$?
    [ "$ended" -eq 127 ] || code=$ended
    [ -n "$heard" ] || break
  done
fi
echo "$(date '+%F %T'): element $me leaves with exit code $code"
if [ -n "$told" ] && [ -z "$stopped" ] && [ "$code" -eq 130 ]; then again; fi
exit "$code"
"""


def _asked(options: Slurm, name: str, elements: int, printed: str) -> Iterator[tuple[str, str | None]]:
    """The options of sbatch, in the order of the script."""
    most = options.at_once
    yield "job-name", name
    yield "array", f"1-{elements}" + (f"%{most}" if most is not None and most < elements else "")
    yield "output", printed
    yield "open-mode", "append"
    yield "requeue", None
    yield "signal", f"B:USR1@{options.notice}"
    yield "nodes", options.extra.get("nodes") or "1"
    for key in ("partition", "account", "qos", "constraint", "nodelist", "exclude", "time"):
        if (value := getattr(options, key)) is not None:
            yield key, value
    if options.cpus is not None:
        yield "cpus-per-task", str(options.cpus)
    if options.memory is not None:
        yield "mem", f"{-(-options.memory // 2**20)}M"
    if options.gpus is not None:
        yield "gres", f"gpu:{options.gpus}"
    yield from ((key, value) for key, value in options.extra.items() if key != "nodes")


def _option(key: str, value: str | None) -> str:
    """sbatch reads quotes in such a line as a shell does, expands nothing, and takes a # outside them for a comment."""
    return f"--{key}" if value is None else f"--{key}={shlex.quote(value)}"


def _names(words: Sequence[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in words)
