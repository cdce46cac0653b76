"""What stands in a report, as values: gathered from a folder by one module, written as HTML by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from results.figures.drawing import Drawing
from results.tables.table import Table

LARGEST = 5 * 10**6
"""Bytes of a report of 10,000 records, at most."""


@dataclass(frozen=True)
class Card:
    """One norm of the folder.

    Attributes:
        label: its row's label, with options: "bgn(num_groups=8)".
        norm: the registered name.
        source: the paper.
        about: its definition in words and symbols, as its class says; "" if the folder does not say.
        facts: (what, value) of what it declares: axes, mixes samples, keeps statistics, needs, ...
        checks: (fact, declared, measured, verdict) as `check` measured them, verdict "holds", "false", "not tried" or
            "note"; none if it was not checked.
        checked: a sentence: when and by which version it was checked, or how to do it.
        cost: (what, value) of its seconds and memory, relative to the reference norm where both were measured.
        health: (sign, runs) such as ("diverged", "2 of 40"), ("one constant output", "1 of 40"); none if all is well.
        axes: letters of "NCHW" over which a statistic is shared; None: not declared.
    """

    label: str
    norm: str
    source: str = ""
    about: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    checks: tuple[tuple[str, str, str, str], ...] = ()
    checked: str = ""
    cost: tuple[tuple[str, str], ...] = ()
    health: tuple[tuple[str, str], ...] = ()
    axes: str | None = None


@dataclass(frozen=True)
class Content:
    """A whole report.

    Attributes:
        title: the folder's name.
        facts: (what, value) of the overview: command, config, runs by status, seeds, time, commit, versions, devices,
            data, budget.
        warnings: sentences that a reader must see before any number: holes, evidence, what cells differ in.
        headline: the one table of norms by tasks, each by its headline metric; None where there is none.
        tables: per task its table and sweeps, then the ranking: those of `render_all`, with their captions.
        drawings: the figures.
        refused: (figure, reason) of those that this folder can not support.
        cards: the norms, in the order of rows.
        runs: every run, in columns. A column is a list with one entry a run, or {"values": [...], "of": [index or None
            a run]} where few different values stand in many runs. Columns: "key", "task", "norm" (its label), "setting"
            (the options that vary, as text), "options" (all, as text), "seed", "status", "reason", "finished",
            "seconds", "made" (commit, torch, device and the like, as text), "folder" (relative to the results folder).
            Besides: "metrics": {name: {"title": heading, "scale": s, "digits": d, "values": [number or None a run]}};
            "curves": one entry a run, {quantity: [[x, ...], [y or None, ...]]} or None; "artifacts": one entry a run,
            a list of {"name": file, "kind": "svg" | "text" | "file", "text": content, where it is embedded}.
        left_out: sentences about what was thinned or left out, so that the page stays small.
        config: the config's text as it was planned; "" if the folder does not hold it.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    headline: Table | None = None
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    cards: tuple[Card, ...] = ()
    runs: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: str = ""
