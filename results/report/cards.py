"""Norms of a folder as cards: what they declare, what was measured of that, what they cost, how their runs ended."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.metrics import Metric
from results.report.content import Card
from results.rows import natural, plain_records, value_text
from results.tables.captions import FLOAT_NOISE
from results.tables.pivot import LONGEST_VALUE, Pivot

COMPARED = ("step_seconds", "peak_memory_mb")
COSTS = (*COMPARED, "norm_parameters", "norm_buffers")
MEASURE = "`run_suite.py report FOLDER --check` measures every declared fact"
_MACHINE = ("device", "device_name", "threads", "kernels")
_AXES = {"N": "samples", "C": "channels", "HW": "positions"}
_SEEN = ("norm", "norm_label", "row", "norm_version", "status", "key", "finished", *_MACHINE)
_SIGNS = ("evidence.constant_output", "evidence.masking", "composition_shift")


def make_cards(df: pd.DataFrame, pivots: Sequence[Pivot]) -> list[Card]:
    """A card for each row of the tables, the reference norm first, then by label. df: of `results.load`."""
    if df.empty:
        return []
    options = [c for c in map(str, df.columns) if c.startswith("norm.")]
    runs = plain_records(df, [c for c in (*_SEEN, *_SIGNS, *options) if c in df.columns])
    by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_row[run["row"]].append(run)
    for of_row in by_row.values():
        of_row.sort(key=lambda r: (r["finished"], str(r["key"])))  # the newest is last
    labels = {row: str(of_row[-1]["norm_label"] or row) for row, of_row in by_row.items()}
    for row, label in [*labels.items()]:
        if [*labels.values()].count(label) > 1 and row != label:
            labels[row] = f"{label} [{row}]"
    references = {pivot.reference for pivot in pivots}
    machines = {run["key"]: tuple(run.get(name) for name in _MACHINE) for run in runs}
    ordered = sorted(by_row, key=lambda row: (row not in references, natural(labels[row]), row))
    notes = df.attrs.get("norms", {})
    return [_card(row, labels[row], by_row[row], notes, pivots, machines) for row in ordered]


def _card(
    row: str,
    label: str,
    runs: Sequence[Mapping[str, Any]],
    notes: Mapping[str, Any],
    pivots: Sequence[Pivot],
    machines: Mapping[str, tuple[Any, ...]],
) -> Card:
    norm = str(runs[-1]["norm"])
    note = notes.get(norm)
    checks, checked = _checks(note, norm, str(runs[-1]["norm_label"] or row))
    return Card(
        label=label,
        norm=norm,
        source=note["source"] if note else "",
        about=note["about"] if note else "",
        facts=tuple(_facts(note, runs)),
        checks=checks,
        checked=checked,
        cost=tuple(_cost(row, pivots, machines)),
        health=tuple(_health(runs)),
        axes=note["axes"] if note else None,
    )


def _facts(note: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """What a norm declares, with the options of its runs. runs: the newest last."""
    yield "version", str(runs[-1]["norm_version"])
    columns = [c for c in runs[-1] if c.startswith("norm.")]
    values = {c.partition(".")[2]: list(dict.fromkeys(run[c] for run in runs)) for c in columns}
    options = {k: _option(found) for k, found in values.items() if found != [None]}
    yield "options", ", ".join(f"{k}={text}" for k, text in options.items()) or "none"
    if note is None:
        return
    defaults = ", ".join(
        f"{k}={options[k] if v is None and k in options else cut(value_text('', v), LONGEST_VALUE)}"
        for k, v in note["options"].items()
    )
    yield "defaults", defaults or "no options"
    axes = note["axes"]
    over = [word for letters, word in _AXES.items() if letters in (axes or "")]
    yield (
        "statistics over",
        "not declared" if axes is None else f"{_and(over)} ({axes})" if over else "nothing: each value by itself",
    )
    for what, name in (
        ("mixes samples in training", "mixes_samples"),
        ("mixes samples in evaluation", "mixes_samples_in_eval"),
        ("keeps running statistics", "keeps_stats"),
        ("exact gradient", "exact_gradient"),
        ("compiles", "compiles"),
    ):
        yield what, {True: "yes", False: "no"}.get(note[name], "not declared")
    yield "needs besides x", ", ".join(n.replace("_", " ") for n in note["needs"]) or "nothing"


def _option(values: Sequence[Any]) -> str:
    """An option of a row, which a run's setting may fill in."""
    if len(values) > 1:
        return "the run's"
    return cut(one_line(str(values[0])), LONGEST_VALUE)


def _checks(note: Mapping[str, Any] | None, norm: str, label: str) -> tuple[tuple[tuple[str, str, str, str], ...], str]:
    """The facts that `check` measured, and the sentence about when."""
    if note is None:
        return (), (
            "The folder does not say what this norm declares; `run_suite.py run` of its config adds it, and repeats no "
            "run."
        )
    own = label == norm or label in note["rows"]
    found = note["rows"].get(label, note)
    checked = found["checked"]
    if checked is None:
        return (), f"Not checked: {MEASURE}."
    when = ", ".join(
        part
        for part in (
            str(checked["time"])[:10],
            f"NormSuite {checked['version']}" if checked["version"] else "",
            f"commit {checked['commit'][:9]}" if checked["commit"] else "",
        )
        if part
    )
    if checked["norm_version"] != note["version"]:
        return (), (
            f"Measured at another version of the norm ({cut(checked['norm_version'], LONGEST_VALUE)}; its runs are of "
            f"{cut(note['version'], LONGEST_VALUE)}), so no fact is shown as holding; {MEASURE} anew."
        )
    how = "" if own else " with default options"
    checks = tuple((c["fact"], c["declared"], c["measured"], c["verdict"]) for c in found["checks"])
    return checks, f"Measured{how}{f' ({when})' if when else ''}, at the version of the runs."


def _cost(row: str, pivots: Sequence[Pivot], machines: Mapping[str, tuple[Any, ...]]) -> Iterable[tuple[str, str]]:
    """What a norm costs in each task: the range of its means, and the ratio to the reference norm over pairs of runs of
    one setting, seed and machine."""
    for pivot in pivots:
        measured = {m.name: m for m in pivot.metrics}
        for name in COSTS:
            if (metric := measured.get(name)) is None:
                continue
            blocks = [block for block in pivot.blocks if pivot.asked(row, block)]
            values = [pivot.values(row, block, metric) for block in blocks]
            means = [sum(found.values()) / len(found) for found in values if found]
            if not means:
                continue
            text = _range(metric, means)
            if name in COMPARED and pivot.reference not in (None, row):
                text += _relative(row, pivot, metric, machines)
            yield f"{pivot.task}: {metric.title}", text


def _range(metric: Metric, means: Sequence[float]) -> str:
    low, high = metric.text(min(means)), metric.text(max(means))
    return f"{low if low == high else f'{low} to {high}'} {metric.unit}".strip()


def _relative(row: str, pivot: Pivot, metric: Metric, machines: Mapping[str, tuple[Any, ...]]) -> str:
    ratios = []
    for block in pivot.blocks:
        own, reference = (pivot.values(name, block, metric) for name in (row, str(pivot.reference)))
        for seed in own.keys() & reference.keys():
            places = [
                [machines.get(key) for key in str(pivot.runs[name, block][seed]["key"]).split("+")]
                for name in (row, str(pivot.reference))
            ]
            if places[0] == places[1] and own[seed] > 0 and reference[seed] > 0:
                ratios.append(math.log(own[seed] / reference[seed]))
    if not ratios:
        return ""
    mean = math.exp(sum(ratios) / len(ratios))
    pairs = f"geometric mean of {len(ratios)} pairs" if len(ratios) > 1 else "one pair"
    return f"; {mean:.2f} × {cut(pivot.labels[str(pivot.reference)], LONGEST_VALUE)} ({pairs})"


def _health(runs: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Signs of trouble with the number of runs that show them, of those that could."""
    for status, said in (("diverged", "diverged"), ("failed", "failed"), ("skipped", "skipped: can not serve there")):
        if count := sum(run["status"] == status for run in runs):
            yield said, f"{count} of {len(runs)}"
    measures = (
        ("one constant output", "evidence.constant_output", lambda v: v is True),
        ("signs of gradient masking", "evidence.masking", bool),
        (f"composition shift above {FLOAT_NOISE:g}", "composition_shift", lambda v: v > FLOAT_NOISE),
    )
    for said, column, ill in measures:
        found = [run[column] for run in runs if run.get(column) is not None]
        if count := sum(map(ill, found)):
            yield said, f"{count} of {len(found)}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
