"""README.md and docs/ as texts, and the commands on them."""

import re
import shlex

from suite.documents.made import page_files
from suite.environment import ROOT

PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in page_files(ROOT)}
INLINE = re.compile(r"`(python run_suite\.py[^`]*)`")
LINE = re.compile(r"^(?: *\$ | +|)(python run_suite\.py\b.*)$")


def command_lines(text):
    """Every command of a page: of fenced and indented lines, continued ones joined, and of code in sentences."""
    text = re.sub(r"^<!-- made by: .*$", "", text, flags=re.MULTILINE)
    inline = [" ".join(found.split()) for found in INLINE.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))]
    lines = re.sub(r" \\\n\s*", " ", text).split("\n")
    return inline + [match[1] for line in lines if "`" not in line and (match := LINE.match(line))]


COMMANDS = sorted({(name, line) for name, text in PAGES.items() for line in command_lines(text)})
"""(page, command line) pairs."""


def words_of(line):
    """The words behind the program's name."""
    return shlex.split(line, comments=True)[2:]
