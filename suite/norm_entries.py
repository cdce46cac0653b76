"""The norms of a config and those that --norms names: entries -> norms with options, and all their mistakes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from norms.protocol import SETTING_FIELDS, NormInfo
from norms.registry import (
    norm_info,
    norm_label,
    norm_names,
    norm_option_defaults,
    norm_option_types,
    resolve_norm_options,
)
from norms.values import cut, nearest, sequence_depth, shown
from results.escape import one_line
from suite.config import kind
from suite.naming import has_options, named_norm

MOST_COMBINATIONS = 100_000
"""Settings of one block, or options of one norm: a grid of more is refused before it is expanded."""


@dataclass(frozen=True)
class Norm:
    """One norm with options as given (not yet completed by a run's setting)."""

    name: str
    options: Mapping[str, Any]
    label: str
    info: NormInfo

    @property
    def resolved(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Its options with defaults, and those that a run's setting would have given otherwise."""
        given = frozenset(key for key in self.options if key in SETTING_FIELDS)
        return resolve_norm_options(self.name, self.options), given


class NormEntries:
    """Reads the norms of a config.

    Args:
        wanted: the texts of --norms, in the place of the config's norms; empty: the config's.
        added: names that are added to every list of norms (not where some are wanted).

        mistakes: where each mistake is added, one line each.
    """

    def __init__(self, mistakes: list[str], wanted: Sequence[str] = (), added: Sequence[str] = ()):
        self.mistakes, self.wanted, self.added = mistakes, wanted, added

    def of(self, given: Any, where: str) -> list[Norm]:
        """The norms of one task: those of its list that are wanted.

        Args:
            given: what the config says under `norms`.
            where: what stands before each mistake.
        """
        if given is None and not self.wanted:
            self.mistakes.append(f"{where}norms: missing; registered: {', '.join(norm_names())}")
            return []
        entries = self.entries(given if given is not None else [], where)
        if self.wanted:
            chosen = [e for text in self.wanted for e in self._selected(text, entries, where)]
            return list({(e.label, repr(e.options)): e for e in chosen}.values())
        present = {e.name for e in entries}
        entries += self.entries([n for n in self.added if n not in present], where)
        if not entries and given == []:
            self.mistakes.append(f"{where}norms: an empty list leaves nothing to run")
        return entries

    def _selected(self, text: str, entries: Sequence[Norm], where: str) -> list[Norm]:
        """The entries that a name, a label or a name with options selects, else the norm itself."""
        if matching := [e for e in entries if text in (e.name, e.label)]:
            return matching
        if not has_options(text):
            return self.entries([text] if text in norm_names() else [], where)
        found: list[Norm] = []
        for new in NormEntries([])._written(text):  # whose mistakes `check_wanted` notes
            same = [e for e in entries if e.name == new.name and e.resolved == new.resolved]
            found += same or [new]
        return found

    def _written(self, text: str) -> list[Norm]:
        """The norms that a text such as "gn(num_groups=4)" describes; its mistakes are noted."""
        try:
            name, options = named_norm(text)
        except ValueError as error:
            self.mistakes.append(f"--norms {error}")
            return []
        return list(self._grid(name, options, f'--norms "{cut(text, 80)}": '))

    def check_wanted(self, lists: Sequence[Any]) -> None:
        """Note what --norms names that is neither registered, with options or without, nor an entry's label.

        Args:
            lists: what the selected tasks say under `norms`.
        """
        if not self.wanted:
            return
        quiet = NormEntries([])  # these entries' mistakes are reported where they are read
        known = {*norm_names(), *(e.label for each in lists for e in quiet.entries(each, ""))}
        for name in self.wanted:
            if name not in known and has_options(name):
                self._written(name)
            elif name not in known:
                self.mistakes.append(
                    f'--norms "{name}": unknown; known: {", ".join(sorted(known))}{nearest(name, known)}'
                )

    def entries(self, given: Any, where: str) -> list[Norm]:
        """Every entry of a list of norms; an option that is given as an axis makes several."""
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list):
            self.mistakes.append(f"{where}norms: a list of names is needed, not {kind(given)}")
            return []
        entries: list[Norm] = []
        for item in given:
            if isinstance(item, str):
                name, options = item, None
            elif isinstance(item, dict) and len(item) == 1:
                name, options = next(iter(item.items()))
            else:
                self.mistakes.append(f"{where}norms: {shown(item)}: a name or {{name: {{option: value}}}} is needed")
                continue
            entries += self._grid(name, options if options is not None else {}, where)
        return entries

    def _grid(self, name: Any, options: Any, where: str) -> Iterator[Norm]:
        try:
            info, defaults, types = norm_info(name), norm_option_defaults(name), norm_option_types(name)
        except ValueError as error:
            self.mistakes.append(as_list(f"{where}{error}", {"norms": name}))
            return
        if not isinstance(options, dict):
            self.mistakes.append(f'{where}norm "{name}": a mapping of options is needed, not {kind(options)}')
            return
        axes = {}
        for key, value in options.items():
            one = max(depth(defaults.get(key)), sequence_depth(types.get(key)))  # a default of None tells nothing
            axes[key] = value if depth(value) > one else [value]
        if many := too_many(axes):
            self.mistakes.append(f'{where}norm "{name}": {many}')
            return
        for key, values in axes.items():
            if not values:
                self.mistakes.append(f'{where}norm "{name}": option "{key}": an empty list leaves nothing to run')
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                yield Norm(name, chosen, norm_label(name, chosen), info)
            except ValueError as error:
                self.mistakes += [f"{where}{one_line(line)}" for line in str(error).splitlines()]


def depth(value: Any) -> int:
    """How deep lists are nested: 0 for a plain value, 1 for a list of plain values."""
    return 1 + max(map(depth, value), default=0) if isinstance(value, list | tuple) else 0


def as_list(line: str, given: Mapping[str, Any]) -> str:
    """A line about something in `given`, which says how a list is written where it quotes a text with commas."""
    for value in given.values():
        if isinstance(value, str) and "," in value and value in line and "a list is written" not in line:
            items = ", ".join(item.strip() for item in value.split(","))
            return f"{line}; a list is written [{cut(items, 60)}]"
    return line


def too_many(axes: Mapping[str, Collection[Any]]) -> str | None:
    """The reason why these axes are too many to expand, or None."""
    count = math.prod(map(len, axes.values()))
    if count <= MOST_COMBINATIONS:
        return None
    sizes = " x ".join(f"{len(values)} {key}" for key, values in axes.items() if len(values) > 1)
    number = f"{count:,}" if count < 10**12 else "more than 10^12"
    return f"{number} combinations ({cut(sizes, 100)}); at most {MOST_COMBINATIONS:,} are planned"
