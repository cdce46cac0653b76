"""What grids cost beside their runs: the engine, two jobs, planning and tables of many runs."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results.record import RunRecord, RunSpec
from results.store import write_record
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
