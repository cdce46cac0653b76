"""Timings as a page of Markdown: each benchmark in a block of its own, with its command, commit, machine and date."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from results.pages import write_block
from suite.bench.timings import BENCHMARKS
from suite.documents.docstrings import in_a_cell
from suite.environment import commit, cpu_count, describe, now

_COMMAND = "python run_suite.py bench {name} --page {file}"
_OURS = re.compile(r"python run_suite\.py bench (\w+) --page ")


def write_benchmark(file: str | Path, name: str, lines: Sequence[str]) -> Path:
    """Write what a benchmark printed into its block of a page; the other blocks and all other lines stay.

    Args:
        file: of Markdown; a new one is made.
        name: of the benchmark.
        lines: as it printed them.

    Raises:
        ValueError: the file is there and holds no benchmark.
        OSError: it can not be read or written.
    """
    command = _COMMAND.format(name=name, file=file)
    around = describe("cpu", torch.get_num_threads(), commit())
    code = around["commit"][:12] + ("+changes" if around["commit"].endswith("+changes") else "")
    facts = (
        f"Made by `{command}`.",
        f"Commit: {code}. Date: {now()[:10]}.",
        f"Machine: {around['cpu']}, {cpu_count()} cores; load at the end {_load()}.",
        f"With torch {around['torch']}; Python {around['python']}; allocator {around['allocator']}; "
        f"kernels {around['kernels']}.",
    )
    about = (inspect.getdoc(BENCHMARKS[name]) or "").split("\n\n")
    words = (in_a_cell(paragraph) for paragraph in about)
    content = [f"## {name}", "", *(f"{line}\n" for line in words), *(f"- {fact}" for fact in facts)]
    content += ["", "```", *lines, "```"]

    def another(other: str) -> bool:
        return _OURS.match(other) is not None

    def mine(other: str) -> bool:
        match = _OURS.match(other)
        return match is not None and match[1] == name

    return write_block(file, command, "\n".join(content), "Speed", mine, another)


def _load() -> str:
    """Processes that wanted to run over the last minute, on average: a busy machine spoils timings."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except (AttributeError, OSError):  # Windows has no such number
        return "unknown"
