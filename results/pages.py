"""Pages of Markdown of which commands made a part: blocks between markers, and what people wrote around them.

    <!-- made by: python run_suite.py tables runs/quick --page docs/findings/quick.md -->
    ...
    <!-- end -->

A command replaces what is inside its own block and leaves every other line of the page as it is. A marker is a whole
line; inside fenced code it is a text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results import files
from results.escape import one_line

TEXT, END_OF_TEXT = "<!-- text -->", "<!-- end text -->"
"""Around the sentences of people on a new page: an invitation to write them there."""
_BEGIN, _END = re.compile(r"<!-- made by: (.+) -->"), "<!-- end -->"
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class Block:
    """A part of a page that a command made.

    Attributes:
        command: as the marker has it.
        content: what stands between the markers, without the line breaks around it.
        first, last: numbers of the marker's lines, from 0.
    """

    command: str
    content: str
    first: int
    last: int


def blocks(text: str) -> list[Block]:
    """The blocks of a page, from top to bottom.

    Raises:
        ValueError: a marker without its end, or an end without its beginning, with the number of the line.
    """
    found: list[Block] = []
    lines, fence, open_ = text.split("\n"), "", None
    for number, line in enumerate(lines):
        if fence:
            fence = "" if line.strip().startswith(fence) and not line.strip().strip(fence[0]) else fence
        elif mark := _FENCE.match(line):
            fence = mark[1]
        elif begin := _BEGIN.fullmatch(line):
            if open_ is not None:
                raise ValueError(
                    f'line {number + 1}: a block begins inside that of line {open_[0] + 1}; "{_END}" first'
                )
            open_ = number, begin[1]
        elif line == _END:
            if open_ is None:
                raise ValueError(f'line {number + 1}: "{_END}" ends no block')
            content = "\n".join(lines[open_[0] + 1 : number]).strip("\n")
            found.append(Block(open_[1], content, open_[0], number))
            open_ = None
    if open_ is not None:
        raise ValueError(f'line {open_[0] + 1}: the block has no end; "{_END}" is needed')
    return found


def block_lines(command: str, content: str) -> list[str]:
    """A block as lines of a page. Whatever the command holds, the marker stays one line and one comment."""
    return [f"<!-- made by: {_spelled(command)} -->", "", *content.strip("\n").split("\n"), "", _END]


def _spelled(command: str) -> str:
    return one_line(command).replace("-->", "--U+003E")


def with_block(text: str, command: str, content: str, mine: Callable[[str], bool] | None = None) -> str:
    """The page with this content in its block of the command, at the page's end where it has none.

    Args:
        text: the page.
        command: the marker's.
        content: Markdown without markers.
        mine: other commands whose block it is, too, where the page has exactly one such block (a command that was
            given other options before); None: of this command alone.

    Raises:
        ValueError: what `blocks` refuses; several blocks could be meant.
    """
    made = block_lines(command, content)
    there = blocks(text)
    same = [block for block in there if block.command == _spelled(command)]
    if not same and mine is not None:
        same = [block for block in there if mine(block.command)]
    if len(same) > 1:
        raise ValueError(f"lines {', '.join(str(block.first + 1) for block in same)}: one block is needed to write to")
    lines = text.split("\n")
    if same:
        lines[same[0].first : same[0].last + 1] = made
        return "\n".join(lines)
    return "\n".join([*text.rstrip("\n").split("\n"), "", *made, ""])


def new_page(title: str) -> str:
    """A page with a title and a place for the sentences of people."""
    return f"# {title}\n\n{TEXT}\n{END_OF_TEXT}\n"


def with_title(text: str, title: str) -> str:
    """The page with this line as its first heading."""
    return re.sub(r"\A# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE)


def write_block(
    file: str | Path,
    command: str,
    content: str,
    title: str,
    mine: Callable[[str], bool] | None = None,
    beside: Callable[[str], bool] | None = None,
    retitle: bool = False,
) -> Path:
    """`with_block` on a file; a new one gets the title and an empty place for people's sentences.

    A file that is there and has no such block is somebody's, and is not touched: a pair of markers in it makes a place.

    Args:
        file: of Markdown; missing folders are made.
        command, content, mine: see `with_block`.
        title: of a new page, as Markdown.
        beside: commands that share their page: where one has a block, another one is added at the end. None: none.
        retitle: an old page gets the title, too.

    Raises:
        ValueError: the file is there and has no block for this command, or not exactly one; it is not text.
        OSError: it can not be read or written.
    """
    file = Path(file)
    text = new_page(title)
    try:
        if file.exists():
            text = file.read_text(encoding="utf-8")
            there = [block.command for block in blocks(text)]
            rules = [rule for rule in (mine, beside) if rule is not None]
            if not any(other == _spelled(command) or any(rule(other) for rule in rules) for other in there):
                raise ValueError(
                    "it is there, and no part of it is made by such a command; the lines "
                    f'"<!-- made by: {_spelled(command)} -->" and "{_END}" make a place for it, or give another file'
                )
            if retitle:
                text = with_title(text, title)
        text = with_block(text, command, content, mine)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    return files.write_text(file, text)
