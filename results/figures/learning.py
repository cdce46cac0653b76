"""Quantities of the training over its epochs, one line per norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.figures import style
from results.figures.asked import MOST_PANELS, check_panels, the_task, varying_columns
from results.figures.drawing import Drawing
from results.figures.lines import NORM_LINES, SEED_LINES, Line, Panel, draw_panels
from results.figures.words import (
    drawn,
    drawn_names,
    finite,
    listed,
    n_text,
    printed,
    seeds_text,
    sources,
    spread_words,
)
from results.metrics import VALIDATION, Metric, metric_or_plain, nearest
from results.norm_batches import in_every_norm_batch
from results.rows import current, is_nothing, natural, value_text

LOSS = "train_loss"
_FIXED = ("task", "norm", "norm_label", "row", "seed", "status", "key", "epoch")
_TITLES = {
    LOSS: Metric(LOSS, "train loss", "nats", False),
    "learning_rate": Metric("learning_rate", "learning rate"),
    "seconds": Metric("seconds", "time", "s"),
}
_Points = dict[float, float]
"""epoch -> value of one run, in printed units."""


def learning_curves(
    history: pd.DataFrame,
    quantity: str | None = None,
    task: str | None = None,
    df: pd.DataFrame | None = None,
    reference: str = "bn",
) -> Drawing:
    """A quantity of each epoch: mean over the seeds that ended well, a band of one sample standard deviation.

    A run that diverged or failed has no part in the mean; it is a dotted line that ends in a cross. Each setting has a
    panel, so `df` is needed where runs of a norm and seed differ in options.

    Args:
        history: from `results.load_history`, or a part of it.
        quantity: one of its columns; None: the training loss, and the validation metric where there is one.
        task: None: the only one.
        df: from `results.load`, of the same runs or of those to draw: it says which options they have.
        reference: label or name of the norm that comes first.

    Raises:
        ValueError: nothing to draw; an unknown task or quantity (with the nearest); several settings without `df`, or
            more than a figure holds.
    """
    name = the_task(history, task)
    part = history[history["task"] == name]
    quantities = _quantities(part, quantity, name)
    settings, runs = _settings(part, df, name)
    phases = _phases(part)
    columns = {column: part[column].tolist() for column in ("epoch", *quantities)}
    if part["epoch"].nunique() < 2:
        raise ValueError(f"{name}: each run has a single epoch, which makes no curve")
    combinations = [(s, p, q) for s in settings for p in phases if settings[s] & phases[p].keys() for q in quantities]
    order = _order(part, reference)
    marks: list[dict[str, Any]] = []
    lost: dict[str, str] = {}
    without_epoch = 0
    panels = []
    for setting, phase, wanted in combinations:
        subject = _title(wanted)
        members = settings[setting]
        lines = []
        of_label: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for run, places in phases[phase].items():
            if run in members:
                of_label[runs[run][0]][run] = places
        for label in order:
            where = ", ".join(filter(None, (setting, phase)))
            line = _line(label, of_label[label], runs, columns, subject, where, marks)
            lines += [line] if line is not None else []
        if any(line.end is not None for line in lines):
            panels.append(
                Panel(drawn(", ".join(filter(None, (setting, phase))), style.TITLE), tuple(lines), subject.heading)
            )
        if len(panels) > MOST_PANELS:  # thousands of runs would be averaged for nothing
            check_panels(len(combinations), f"{name}, learning curves")
    if not panels:
        raise ValueError(f"{name}: no run has finite values of {' or '.join(quantities)}")
    with_epochs = set(part["key"])
    for key, (label, seed, status) in runs.items():
        if status not in ("ok", "skipped") and key not in with_epochs:
            without_epoch += 1
            lost[f"{cut(one_line(label), 60)}, seed {seed}"] = f"{status} before its first epoch ended"
    counts = [mark["n"] for mark in marks if mark["n"]]
    stopped = {mark["key"]: (mark["norm"], mark["seed"], mark["status"]) for mark in marks if "key" in mark}
    early = len(stopped) + without_epoch
    labels = [label for label in order if any(line.label == label for panel in panels for line in panel.lines)]
    thin = len(labels) <= NORM_LINES and 1 < max(counts, default=0) <= SEED_LINES
    foot = f"{name}: {n_text(counts)} ({seeds_text(seed for _, seed, _ in runs.values())}); {spread_words(counts)}"
    foot += "; thin: single seeds" if thin else ""
    foot += "; dotted to ×: a run that ended early" if stopped else ""
    foot += f"; {without_epoch} run{'s' * (without_epoch != 1)} without any epoch" if lost else ""
    epochs = sorted({mark["epoch"] for mark in marks})
    ticks = [float(e) for e in epochs] if len(epochs) <= 6 else None
    first = next(
        (label for label in order if label == reference), order[0] if _is_norm(part, order, reference) else None
    )
    with style.style():
        figure = draw_panels(
            panels,
            style.looks(order),
            drawn_names(order),
            first,
            "epoch",
            {"value": "linear"},
            ticks,
            thin,
            drawn(foot, 400),
        )
    what = " and ".join(_title(q).title for q in quantities)
    caption = [
        f"{what} over epochs: mean over the runs that ended well ({n_text(counts)})"
        + (", band: mean ± sample standard deviation." if max(counts, default=0) > 1 else "; one seed shows no spread.")
    ]
    if stopped:
        texts = {f"{cut(one_line(label), 60)}, seed {seed}": status for label, seed, status in sorted(stopped.values())}
        caption.append(f"Not in any mean, dotted to a cross: {listed(texts)}.")
    if lost:
        caption.append(f"Runs without a curve: {listed(lost)}.")
    if df is not None:
        caption += sources(current(df)[current(df)["task"] == name])
    return Drawing(
        name=f"{name}_learning" + (f"_{quantity}" if quantity else ""),
        title=f"{cut(one_line(name), 60)}: learning curves",
        figure=figure,
        alt=f"Line chart of {what} against epochs on {one_line(name)}, one "
        f"line for each of {len(labels)} norms, {n_text(counts)}; {early} run{'s' * (early != 1)} ended early. "
        f"{_last(marks, quantities)}",
        caption=tuple(caption),
        data=tuple(marks),
        task=name,
    )


def quantities_of(history: pd.DataFrame) -> list[str]:
    """The columns of a history that hold numbers of epochs, in its order."""
    found = [str(c) for c in history.columns if c not in _FIXED]
    return [c for c in found if pd.api.types.is_numeric_dtype(history[c]) and history[c].notna().any()]


def _quantities(part: pd.DataFrame, asked: str | None, task: str) -> list[str]:
    there = quantities_of(part)
    if asked is not None:
        if asked not in there:
            few = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "") or "none"
            raise ValueError(f'{task}: unknown quantity "{asked}"; of each epoch: {few}{nearest(asked, there)}')
        return [asked]
    validation = [name for name in VALIDATION if name in there] or [n for n in there if n.startswith("val_")]
    found = [name for name in (LOSS, *validation[:1]) if name in there] or there[:1]
    if not found:
        raise ValueError(f"{task}: its runs recorded no numbers of epochs")
    return found


def _settings(
    part: pd.DataFrame, df: pd.DataFrame | None, task: str
) -> tuple[dict[str, set[str]], dict[str, tuple[str, int, str]]]:
    """setting in words -> keys of its runs; key -> (label, seed, status) of every run."""
    rows = part.drop_duplicates("key")
    told = _told(rows)
    if df is None:
        twice = rows[rows.duplicated(["row", "seed"])]
        if len(twice):
            raise ValueError(
                f"{task}: {twice['norm_label'].iloc[0]} has several runs of one seed, so they differ in options; "
                "give df=results.load(folder), and each setting is a panel"
            )
        return {"": set(told)}, told
    whole = current(df)
    whole = in_every_norm_batch(whole[whole["task"] == task])
    columns = varying_columns(whole)
    told = _told(whole)
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for run in whole[["key", *columns]].to_dict("records"):
        found[tuple(None if is_nothing(run[c]) else run[c] for c in columns)].add(run["key"])
    if not set(told) & set(rows["key"]):
        raise ValueError(f"{task}: the history and the frame have no run in common; are they of one folder?")
    names = [c.removeprefix("option.") for c in columns]
    order = sorted(found, key=lambda place: tuple(natural(v) for v in place))
    texts = [
        ", ".join(f"{one_line(n)}={cut(one_line(value_text(n, v)), 30)}" for n, v in zip(names, place, strict=True))
        for place in order
    ]
    return {text: found[place] for text, place in zip(texts, order, strict=True)}, told


def _told(runs: pd.DataFrame) -> dict[str, tuple[str, int, str]]:
    """key -> (label, seed, status)."""
    records = runs[["key", "norm_label", "seed", "status"]].to_dict("records")
    return {str(r["key"]): (str(r["norm_label"]), int(r["seed"]), str(r["status"])) for r in records}


def _phases(part: pd.DataFrame) -> dict[str, dict[str, list[int]]]:
    """phase in words -> key -> places of its rows. A run whose epochs start again (a search, then a retraining) has
    several."""
    found: dict[int, dict[str, list[int]]] = defaultdict(dict)
    last: dict[str, tuple[int, float]] = {}  # key -> its phase, and the epoch before
    for place, (key, epoch) in enumerate(zip(part["key"].tolist(), part["epoch"].tolist(), strict=True)):
        number, before = last.get(key, (0, epoch - 1))
        number += epoch <= before
        last[key] = (number, epoch)
        found[number].setdefault(key, []).append(place)
    most = max(found, default=0)
    return {f"part {n + 1} of {most + 1}" if most else "": found[n] for n in sorted(found)}


def _order(part: pd.DataFrame, reference: str) -> list[str]:
    norms = dict(zip(part["norm_label"], part["norm"], strict=True))
    return sorted(map(str, norms), key=lambda label: (label != reference, norms[label] != reference, natural(label)))


def _is_norm(part: pd.DataFrame, order: list[str], reference: str) -> bool:
    return bool((part["norm"][part["norm_label"] == order[0]] == reference).any())


def _line(
    label: str,
    own: Mapping[str, Sequence[int]],
    runs: Mapping[str, tuple[str, int, str]],
    histories: Mapping[str, Sequence[Any]],
    subject: Metric,
    where: str,
    marks: list[dict[str, Any]],
) -> Line | None:
    """One norm in one panel; None if it has no run there. Adds its epochs and runs that stopped to `marks`.

    own: key -> places of its rows in `histories`.
    """
    numbers, found = histories["epoch"], histories[subject.name]
    values: dict[str, _Points] = {}
    for key, places in own.items():
        pairs = ((numbers[i], found[i]) for i in places)
        values[key] = {float(e): float(v) for e, v in pairs if not is_nothing(v) and not is_nothing(e)}
    well = {key: points for key, points in values.items() if runs[key][2] == "ok" and points}
    epochs = sorted({epoch for points in well.values() for epoch in points})
    means = [printed(subject, _at(well.values(), epoch)) for epoch in epochs]
    for epoch, (mean, std, n) in zip(epochs, means, strict=True):
        seeds = tuple(sorted(runs[key][1] for key, points in well.items() if epoch in points))
        marks.append(
            {
                "norm": label,
                "setting": where,
                "quantity": subject.name,
                "epoch": epoch,
                "mean": mean,
                "std": std,
                "n": n,
            }
            | {"seeds": seeds}
        )
    stops = []
    for key, points in sorted(values.items()):
        path = [(e, y) for e, v in sorted(points.items()) if (y := finite(v * subject.scale)) is not None and y == y]
        if runs[key][2] == "ok" or not path:
            continue
        stops.append(tuple(path))
        marks.append(
            {"norm": label, "setting": where, "quantity": subject.name, "epoch": path[-1][0], "mean": None, "std": None}
            | {"n": 0, "stopped": path[-1][1], "key": key, "seed": runs[key][1], "status": runs[key][2]}
        )
    if not epochs and not stops:
        return None
    lines = {
        runs[key][1]: tuple(finite(points[e] * subject.scale) if e in points else None for e in epochs)
        for key, points in well.items()
    }
    drawn_at = (tuple(mean for mean, _, _ in means), tuple(std for _, std, _ in means), tuple(n for _, _, n in means))
    return Line(label, tuple(epochs), *drawn_at, ("",) * len(epochs), lines, tuple(stops))


def _at(runs: Iterable[_Points], epoch: float) -> list[float]:
    return [points[epoch] for points in runs if epoch in points and not math.isnan(points[epoch])]


def _title(quantity: str) -> Metric:
    return _TITLES.get(quantity) or metric_or_plain(quantity)


def _last(marks: list[dict[str, Any]], quantities: list[str]) -> str:
    """The range of means at the last epoch, in words."""
    texts = []
    for name in quantities:
        found = [m for m in marks if m["quantity"] == name and m["mean"] is not None]
        if found:
            last = max(m["epoch"] for m in found)
            values = [m["mean"] for m in found if m["epoch"] == last]
            texts.append(f"{_title(name).title} at epoch {last:g}: means from {min(values):.4g} to {max(values):.4g}.")
    return " ".join(texts)
