"""What grids cost beside their runs: the engine, two jobs, planning and tables of many runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results.record import RunRecord, RunSpec
from results.store import record_files, write_record
from suite.environment import ROOT

NOTHING = """
    from tasks import register_task
    from tasks.base import Options, Outcome, Setting

    class NothingOptions(Options):
        index: int = 0

    class Nothing:
        name, version, options, metrics = "nothing", 1, NothingOptions, ("top1",)

        def setting(self, options):
            return Setting()

        def data_checksum(self, options, data_dir):
            return "none"

        def why_not(self, norm, info, options):
            return None

        def run(self, norm, options, context):
            return Outcome({"top1": 0.5})

    register_task(Nothing())
"""
"""A task that does nothing, so that what a run of it takes is the engine's."""


def engine(few: int = 10, many: int = 60) -> Iterator[str]:
    """What the engine adds to a run: wall seconds of a grid of do-nothing runs, one job, per further run."""
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder, "nothing.py")
        plugin.write_text(textwrap.dedent(NOTHING))
        seconds = {}
        for runs in (few, many):
            config = Path(folder, f"{runs}.yaml")
            config.write_text(json.dumps({"norms": ["bn"], "seeds": list(range(runs)), "tasks": {"nothing": {}}}))
            arguments = [str(config), "--plugin", str(plugin), "--out", str(Path(folder, str(runs))), "--jobs", "1"]
            seconds[runs] = _command("run", *arguments)[0]
        yield f"engine: {many} do-nothing runs, one job, in {seconds[many]:.1f} s, {few} in {seconds[few]:.1f} s"
        yield f"  {(seconds[many] - seconds[few]) / (many - few):.3f} s per run (its process included)"
        again = _command("run", *arguments)[0]
        yield f"  the same command again, nothing left to do: {again:.1f} s"


def launchers(few: int = 200, many: int = 1000, planned: int = 100_000) -> Iterator[str]:
    """What each launcher takes for a run: seconds between the records of do-nothing runs, without the start, and the
    memory of the command when few and when many are finished; then a plan of 100,000 runs.

    Ray and Slurm where they are here: a new Ray on this machine, and the Slurm that `squeue` knows. CPU seconds are
    those of the command; the runs' processes are not below it.
    """
    with tempfile.TemporaryDirectory() as folder:
        plugin, config = Path(folder, "nothing.py"), Path(folder, "nothing.yaml")
        plugin.write_text(textwrap.dedent(NOTHING))
        config.write_text(json.dumps({"norms": ["bn"], "seeds": [*range(many)], "tasks": {"nothing": {}}}))
        for name, place in {"local": "local", "ray": "ray:address=local", "slurm": "slurm:array=2"}.items():
            if name == "ray" and importlib.util.find_spec("ray") is None:
                yield "launchers: ray is not installed"
                continue
            if name == "slurm" and not _answers("squeue"):
                yield "launchers: no Slurm answers"
                continue
            out = Path(folder, name)
            cpu, resident = _watched("run", str(config), "--plugin", str(plugin), "--out", str(out), "--on", place)
            while name == "slurm" and _answers("squeue", "--noheader", words=True):
                time.sleep(0.5)
            stored = sorted(file.stat().st_mtime for file in record_files(out))
            if len(stored) != many:
                raise RuntimeError(f"{name}: {len(stored)} records of {many} runs")
            each = (stored[-1] - stored[few - 1]) / (many - few)
            yield f"launchers: {name}: {each:.3f} s per do-nothing run, of {many:,}; {cpu / many:.3f} CPU seconds"
            if few in resident and many in resident:
                yield (
                    f"  the command's memory: {resident[few]:.0f} MiB when {few} runs were finished, "
                    f"{resident[many]:.0f} MiB when {many:,} were"
                )
        axes = {name: [0.001 * k for k in range(1, 11)] for name in ("learning_rate", "weight_decay")}
        norms = ["none", "bn", "in", "ln", "pn", "frn", "brn", "ebn", "rms", "bgn"]
        seeds = [*range(planned // (100 * len(norms)))]
        task = {"dataset": "fashion_mnist_mini", "model": "resnet8", **axes}
        config.write_text(json.dumps({"norms": norms, "seeds": seeds, "tasks": {"classification": task}}))
        start = time.perf_counter()
        command = subprocess.Popen(
            _words("run", str(config), "--dry-run", "--out", str(Path(folder, "dry"))), stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(command.pid, 0)
        command.returncode = os.waitstatus_to_exitcode(status)
        cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20  # KiB on Linux
        seconds = time.perf_counter() - start
        yield f"launchers: dry run of {planned:,} runs: {seconds:.1f} s, {cpu:.1f} CPU seconds, {peak:.2f} GiB at most"


def _answers(*program: str, words: bool = False) -> bool:
    """Whether a program is here and ends well, and whether it prints something where `words` are wanted."""
    try:
        done = subprocess.run(program, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and (bool(done.stdout.strip()) or not words)


def _watched(*arguments: str) -> tuple[float, dict[int, float]]:
    """CPU seconds of a `run` command, and its resident MiB when so many runs were finished, by its own lines."""
    with tempfile.TemporaryFile() as errors:
        command = subprocess.Popen(_words(*arguments), stdout=subprocess.PIPE, stderr=errors, text=True)
        assert command.stdout is not None
        resident = {}
        for line in command.stdout:
            if (found := re.match(r"\[ *(\d+)/", line)) is not None:
                pages = int(Path(f"/proc/{command.pid}/statm").read_text().split()[1])
                resident[int(found[1])] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        _, status, usage = os.wait4(command.pid, 0)
        command.returncode = os.waitstatus_to_exitcode(status)
        if command.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(arguments)}: exit code {command.returncode}\n{text}")
    return usage.ru_utime + usage.ru_stime, resident


def _words(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_suite.py"), *arguments]


def jobs() -> Iterator[str]:
    """How much faster two jobs finish a grid of equal runs than one, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"dataset": "fashion_mnist_mini", "model": "resnet8", "epochs": 1}
        config = Path(folder, "jobs.yaml")
        config.write_text(json.dumps({"norms": ["bn"], "seeds": list(range(6)), "tasks": {"classification": options}}))
        one, two = (
            _command("run", str(config), "--jobs", str(n), "--out", str(Path(folder, str(n))))[0] for n in (1, 2)
        )
        yield f"jobs: 6 equal runs, one job {one:.1f} s, two jobs {two:.1f} s: {one / two:.2f} x faster, start included"


def scale(runs: int = 10_000) -> Iterator[str]:
    """A dry run over 10,000 runs; loading 10,000 made-up records and rendering every table."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "large.yaml")
        norms: list[Any] = [
            "none",
            "bn",
            "in",
            "ln",
            {"gn": {"num_groups": 8}},
            "pn",
            {"bgn": {"num_groups": [1, 2, 4, 8]}},
        ]
        axes = {"learning_rate": [0.01 * k for k in range(1, 11)], "dataset": "fashion_mnist_mini", "model": "resnet8"}
        config.write_text(json.dumps({"norms": norms, "seeds": "0-99", "tasks": {"classification": axes}}))
        seconds = _command("run", str(config), "--dry-run", "--out", str(Path(folder, "dry")))[0]
        yield f"scale: dry run of {len(norms) + 3} norms x 10 rates x 100 seeds = {runs:,} runs in {seconds:.1f} s"
        out = Path(folder, "records")
        for record in itertools.islice(_made_up_records(), runs):
            write_record(out, record)
        start = time.perf_counter()
        tables = subprocess.Popen(
            [sys.executable, str(ROOT / "run_suite.py"), "tables", str(out), "--format", "csv,latex,markdown"],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(tables.pid, 0)
        if status:
            raise RuntimeError(f"tables {out}: status {status}")
        seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 1024  # KiB on Linux
        yield f"  {runs:,} records loaded and every table rendered in {seconds:.1f} s, {peak:.0f} MiB resident at most"


def _made_up_records() -> Iterator[RunRecord]:
    draw = random.Random(0)
    norms = ["none", "bn", "in", "ln", "gn", "pn", "bgn", "mine", "yours", "theirs"]
    names = ["top1", "top1_recalibrated", "val_top1", "train_top1", "test_loss", "composition_shift", "step_seconds"]
    for seed in itertools.count():
        for norm, rate, batch in itertools.product(norms, (0.03, 0.1, 0.3), (1, 2, 4, 16, 64)):
            spec = RunSpec(
                task="classification",
                norm=norm,
                norm_options={"eps": 1e-5},
                task_options={"dataset": "made_up", "learning_rate": rate, "norm_batch_size": batch, "epochs": 20},
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="made up",
                norm_label=norm,
            )
            yield RunRecord(
                spec=spec,
                status="ok",
                metrics={name: draw.random() for name in names},
                history=[{"epoch": e, "train_loss": draw.random(), "val_top1": draw.random()} for e in range(20)],
                environment={"commit": "none", "torch": "none", "device": "cpu", "threads": 1},
                evidence={"data": "synthetic", "budget": "reduced", "selection": "last epoch"},
            )


def _command(*arguments: str) -> tuple[float, str]:
    """Wall seconds and output of a `run_suite.py` command, the interpreter's start included."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_suite.py"), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout
