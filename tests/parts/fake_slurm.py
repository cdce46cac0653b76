"""Programs with the names of Slurm's, as small shell scripts."""

import os
import shlex

from suite.launch import slurm_programs


class Programs:
    """Scripts in a folder; each notes its arguments before it does anything.

    `set(squeue="exit 1")` gives a program another body; `calls("squeue")` are the lines in which it was called.
    """

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.log = folder, folder / "log"
        self.set(sbatch="echo 12", squeue="", scancel="", scontrol="")

    def set(self, **bodies):
        for name, body in bodies.items():
            file = self.folder / name
            file.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>{shlex.quote(str(self.log))}\n{body}\n')
            file.chmod(0o755)

    def calls(self, name):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] == name]


def on_path(folder, monkeypatch):
    """Programs before all others on PATH, with ten seconds to answer."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_programs, "PATIENCE", 10.0)
    return Programs(folder)


def queue_line(name, element="12_1", state="RUNNING", reason="None", node="n1", start="N/A", restarts=0):
    """A line of squeue for one element of a job of this name."""
    values = (element, state, reason, node, "0:10", start, str(restarts), name)
    return "".join(f"{v:<{w}}" for v, (_, w) in zip(values, slurm_programs.FIELDS, strict=True))


def answers(folder, *lines):
    """The body of a squeue that says these lines; NAME in them is the name of the folder's newest submission."""
    notes = f"{shlex.quote(str(folder))}/slurm"
    find = f"""name=$(sed -n 's/.*"name": "\\(.*\\)",/\\1/p' {notes}/$(ls {notes} | tail -1)/submission.json)"""
    rows = "".join(f"\n{line}" for line in lines)
    return f'{find}\nsed "s/NAME/$name/" <<END{rows}\nEND'
