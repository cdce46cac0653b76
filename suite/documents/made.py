"""Blocks by name, and the pages that hold them: rewritten from the code, or compared with it.

A block is made by `python run_suite.py docs NAME`. Blocks of other commands in the same pages (tables of a results
folder, timings) are left alone: what they were made from is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from norms.values import nearest
from results import files
from results.pages import blocks, with_block
from suite.documents import commands, norms, tasks

COMMAND = "python run_suite.py docs "
BLOCKS: dict[str, Callable[[], str]] = {
    "norms": norms.pages_of_norms,
    "norms-table": norms.overview,
    "tasks": tasks.pages_of_tasks,
    "metrics": tasks.all_metrics,
    "datasets": tasks.all_datasets,
    "commands": commands.pages_of_commands,
    "configs": commands.all_configs,
}
"""name -> the Markdown of the block; the same on every machine."""


def page_files(root: Path) -> list[Path]:
    """README.md and every page below docs/, in a fixed order."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def remade(root: Path, names: Collection[str] = ()) -> dict[Path, str]:
    """file -> its text with fresh blocks, of those pages that are not as the code says.

    Args:
        root: the checkout.
        names: of blocks; none: all.

    Raises:
        ValueError: unknown name, here or in a marker (with the nearest); markers that do not match, with file and line.
    """
    for name in names:
        if name not in BLOCKS:
            raise ValueError(f'unknown block "{name}"; blocks: {", ".join(BLOCKS)}{nearest(name, BLOCKS)}')
    fresh: dict[str, str] = {}
    stale: dict[Path, str] = {}
    for file in page_files(root):
        if not file.is_file():
            continue
        before = text = file.read_text(encoding="utf-8")
        try:
            for block in blocks(before):
                name = block.command.removeprefix(COMMAND)
                if not block.command.startswith(COMMAND) or (names and name not in names):
                    continue
                if name not in BLOCKS:
                    raise ValueError(
                        f'line {block.first + 1}: unknown block "{name}"; blocks: {", ".join(BLOCKS)}'
                        f"{nearest(name, BLOCKS)}"
                    )
                if name not in fresh:
                    fresh[name] = BLOCKS[name]()
                text = with_block(text, block.command, fresh[name])
        except ValueError as error:
            raise ValueError(f"{file.relative_to(root)}: {error}") from error
        if text != before:
            stale[file] = text
    return stale


def rewrite(root: Path, names: Collection[str] = ()) -> list[Path]:
    """Bring the pages up to date; those that were not."""
    stale = remade(root, names)
    for file, text in stale.items():
        files.write_text(file, text)
    return list(stale)
