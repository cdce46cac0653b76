"""The runs of a folder in columns, with their curves and files, thinned until a page can hold them."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from results import files
from results.escape import cut, one_line
from results.facts import every_task
from results.figures.drawing import Drawing
from results.history import Epochs, Whole
from results.rows import distinct, plain_records, value_text

MOST_RUNS = 10_000
"""Runs that are listed one by one: the newest."""
MOST_FOLDERS = 3_000
"""Runs up to which each says its folder, which follows from its task, norm and key."""
MOST_FILES, LARGEST_FILE = 400_000, 100_000
"""Bytes of all artifacts whose content stands in the page, and of one of them."""
MOST_QUANTITIES = 10
"""Curves of a run; with more, those of single parts (a dot in the name: "normal.2.0.none") are left out first."""
LEVELS = (200, 100, 50, 25, 12, 8, 5)
"""Points of a curve that are tried, until all runs fit."""
_OF_MARK, _MOST_MARKS = 150, 200  # bytes of a row of a figure's numbers in a page, and rows that it shows
_LONGEST_TEXT = 2_000
_SAMPLE = 300  # runs whose curves are packed to estimate the size of all

_CODED = ("task", "norm", "setting", "options", "status", "reason", "made")


@dataclass(frozen=True)
class Listed:
    """The runs as `Content.runs`, and sentences about what was left out."""

    runs: dict[str, Any]
    left_out: tuple[str, ...]


def list_runs(folder: Path, whole: Whole, room: int) -> Listed:
    """Every run of the frame. Metrics have full precision.

    Args:
        folder: of results.
        whole: what it holds.
        room: bytes of the page that all runs may take, packed; curves and then the oldest runs give way.
    """
    df, left_out = whole.df, []
    if len(df) > MOST_RUNS:
        df = df.sort_values("finished", kind="stable").tail(MOST_RUNS).sort_index()
        left_out.append(f"Of {len(whole.df):,} runs the newest {MOST_RUNS:,} are listed; tables are of all.")
    columns = _columns(df)
    if (size := packed_size(columns)) > room:
        most = max(100, int(len(df) * room / size))
        df = df.sort_values("finished", kind="stable").tail(most).sort_index()
        left_out = [f"Of {len(whole.df):,} runs the newest {len(df):,} are listed; tables are of all."]
        columns = _columns(df)
    if len(df) > MOST_FOLDERS:
        columns["folder"] = [None] * len(df)
        left_out.append("The folder of a run is runs/TASK/NORM/KEY, with the norm's name without options.")
    artifacts, told = _artifacts(folder, df, whole.artifacts)
    left_out += told
    columns["artifacts"] = artifacts
    curves, told = _curves([whole.epochs.get(key, ()) for key in columns["key"]], room - packed_size(columns))
    columns["curves"] = curves
    return Listed(columns, (*left_out, *told))


def packed_size(value: Any) -> int:
    """Bytes of a value in a page, about: JSON, deflated, in base64."""
    text = json.dumps(value, separators=(",", ":"), default=str)
    return len(base64.b64encode(zlib.compress(text.encode(errors="replace"), 6)))


def _columns(df: pd.DataFrame) -> dict[str, Any]:
    names = list(map(str, df.columns))
    options = [c for c in names if c.startswith("option.")]
    of_norm = [c for c in names if c.startswith("norm.")]
    made = [
        c for c in ("commit", "torch", "device", "device_name", "threads", "kernels", "environment.parts") if c in names
    ]
    needed = ["key", "task", "norm", "norm_label", "row", "seed", "status", "reason", "finished", "seconds"]
    runs = plain_records(df, [*needed, *made, *options, *of_norm])
    varying = (
        {
            task: [c for c in options if len(distinct(df[c][df["task"] == task].tolist())) > 1]
            for task in distinct(df["task"])
        }
        if len(df)
        else {}
    )
    texts: dict[str, list[Any]] = {
        "key": [r["key"] for r in runs],
        "task": [r["task"] for r in runs],
        "norm": [r["norm_label"] or r["row"] for r in runs],
        "setting": [_text(r, varying[r["task"]], everything=True) for r in runs],
        "options": [f"norm: {_text(r, of_norm) or 'no options'}; task: {_text(r, options)}" for r in runs],
        "seed": [r["seed"] for r in runs],
        "status": [r["status"] for r in runs],
        "reason": [cut(one_line(r["reason"] or ""), _LONGEST_TEXT) for r in runs],
        "finished": [r["finished"].strftime("%Y-%m-%d %H:%M:%S") if r["finished"] is not None else "" for r in runs],
        "seconds": [None if r["seconds"] is None else round(r["seconds"], 1) for r in runs],
        "made": [_made(r, made) for r in runs],
        "folder": [f"runs/{r['task']}/{r['norm']}/{r['key']}" for r in runs],
    }
    columns: dict[str, Any] = {name: _coded(v) if name in _CODED else v for name, v in texts.items()}
    columns["metrics"] = _metrics(df)
    return columns


def _text(run: Mapping[str, Any], columns: Iterable[str], *, everything: bool = False) -> str:
    """Options as one text; with `everything` also those without a value, which say that a run does without."""
    pairs = ((column.partition(".")[2], run[column]) for column in columns)
    shown = [f"{k}={cut(one_line(value_text(k, v)), 100)}" for k, v in pairs if everything or v is not None]
    return cut(", ".join(shown), _LONGEST_TEXT)


def _made(run: Mapping[str, Any], columns: Iterable[str]) -> str:
    words = {"environment.parts": "processes", "device_name": "hardware"}
    pairs = [(words.get(c, c), run[c]) for c in columns if run[c] is not None]
    return ", ".join(f"{k} {cut(one_line(str(v)), 100)}" for k, v in pairs)


def _coded(values: Sequence[Any]) -> dict[str, Any]:
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return {"values": list(places), "of": [places[value] for value in values]}


def _metrics(df: pd.DataFrame) -> dict[str, Any]:
    """name -> how it is printed, and a number or None for each run."""
    found: dict[str, Any] = {}
    for facts in every_task(df).values():
        for name in facts.in_order(facts.present):
            if name in found:
                continue
            metric = facts.metric(name)
            values = [None if value != value else value for value in df[name].tolist()]
            form = {"title": metric.heading, "scale": metric.scale, "digits": metric.digits}
            found[name] = {**form, "significant": metric.significant, "values": values}
    return found


def _curves(epochs: Sequence[Epochs], room: int) -> tuple[list[Any], list[str]]:
    """The curves of each run, with as many points as fit, and what was left out."""
    longest = max(map(len, epochs), default=0)
    if not longest:
        return [None] * len(epochs), []
    chosen = [_quantities(rows) for rows in epochs]
    dropped = sum(map(len, (lost for _, lost in chosen)))
    told = []
    if dropped:
        example = next(lost[0] for _, lost in chosen if lost)
        told.append(
            f"Of runs with more than {MOST_QUANTITIES} quantities an epoch some have no curve here (such as "
            f"{cut(one_line(example), 80)}); the records have them."
        )
    few = _only_main(name for names, _ in chosen for name in names)
    tries: list[tuple[int, Callable[[str], bool]]] = [(points, lambda name: True) for points in LEVELS]
    tries += [(points, lambda name: name in few) for points in LEVELS[-3:]]
    step = max(1, len(epochs) // _SAMPLE)
    for points, kept in tries:
        sample = [
            _thinned(rows, filter(kept, names), points)
            for rows, (names, _) in zip(epochs[::step], chosen[::step], strict=True)
        ]
        if packed_size(sample) * len(epochs) / len(sample) > room:
            continue
        if points < longest:
            told.append(f"Curves are thinned to {points} of up to {longest:,} points, so that the page stays small.")
        if lost := sorted({name for names, _ in chosen for name in names if not kept(name)}):
            told.append(f"Curves are shown of {', '.join(sorted(few))}; the records have {', '.join(lost[:12])}, too.")
        return [
            _thinned(rows, filter(kept, names), points) for rows, (names, _) in zip(epochs, chosen, strict=True)
        ], told
    return [None] * len(epochs), [f"The curves of {len(epochs):,} runs are left out; the records have them."]


def _quantities(rows: Epochs) -> tuple[list[str], list[str]]:
    """The quantities of a run that are drawn, and the others."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("epoch", "step")]
    if len(names) <= MOST_QUANTITIES:
        return names, []
    kept = [*(name for name in names if "." not in name), *(name for name in names if "." in name)][:MOST_QUANTITIES]
    kept = [name for name in kept if "." not in name] or kept
    return kept, [name for name in names if name not in kept]


def _only_main(names: Iterable[str]) -> set[str]:
    """The two quantities of most runs that say how training went: of losses and of validation."""
    counts = Counter(names)
    groups = [[n for n in counts if "loss" in n], [n for n in counts if n.startswith("val")]]
    found = {max(group, key=lambda n: (counts[n], n)) for group in groups if group}
    return found or {name for name, _ in counts.most_common(1)}


def _thinned(rows: Epochs, names: Iterable[str], points: int) -> dict[str, Any] | None:
    """quantity -> [x, y]: the first, the last and evenly placed epochs between, numbers of five digits."""
    if not rows:
        return None
    last = len(rows) - 1
    places = range(len(rows)) if len(rows) <= points else [round(i * last / (points - 1)) for i in range(points)]
    xs = [_number(rows[i].get("epoch", rows[i].get("step", i + 1))) for i in places]
    found = {name: [xs, [_number(rows[i].get(name)) for i in places]] for name in names}
    return {name: line for name, line in found.items() if any(y is not None for y in line[1])} or None


def _number(value: float | None) -> float | int | None:
    """In few letters; whole numbers without a point."""
    if value is None:
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")


def _artifacts(
    folder: Path, df: pd.DataFrame, named: Mapping[str, Sequence[str]]
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """The files of each run: small texts and pictures with their content, the others by name."""
    room, lost = MOST_FILES, 0
    found = []
    for task, norm, key in zip(df["task"].tolist(), df["norm"].tolist(), df["key"].tolist(), strict=True):
        of_run = []
        for name in named.get(key, ()):
            kind = {".svg": "svg", ".json": "text", ".txt": "text", ".csv": "text"}.get(Path(name).suffix, "file")
            text = None
            if kind != "file" and Path(name).name == name:  # a record of a stranger may name a file anywhere
                text = _content(folder / "runs" / task / norm / key / name, kind)
            if text is not None and len(text) > room:
                text, lost = None, lost + 1  # a smaller one may still fit
            room -= len(text or "")
            of_run.append(
                {"name": name, "kind": kind, "text": text} if text is not None else {"name": name, "kind": "file"}
            )
        found.append(of_run)
    return found, [f"The contents of {lost} files of runs are left out, so that the page stays small."] if lost else []


def _content(file: Path, kind: str) -> str | None:
    try:
        text = files.read_bytes(file, LARGEST_FILE).decode("utf-8")
    except (OSError, ValueError):
        return None
    return text if kind == "text" or "<svg" in text[:2_000] else None


def drawings_that_fit(drawings: Sequence[Drawing], room: int) -> tuple[list[Drawing], list[str]]:
    """The figures that fit into so many bytes with their numbers, the largest left out first; and what was left out."""
    sizes = [len(d.svg().encode()) + _OF_MARK * min(len(d.data), _MOST_MARKS) for d in drawings]
    fitting = set()
    for place in sorted(range(len(drawings)), key=lambda i: sizes[i]):
        room -= sizes[place]
        fitting |= {place} if room >= 0 else set()
    kept = [drawing for place, drawing in enumerate(drawings) if place in fitting]
    lost = [drawing.title for place, drawing in enumerate(drawings) if place not in fitting]
    told = f"Figures left out, so that the page stays small: {'; '.join(lost)}. `run_suite.py figures` draws them."
    return kept, [told] if lost else []
