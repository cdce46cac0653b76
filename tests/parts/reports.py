"""A report planted by hand: small, with every kind of thing that can stand in one, and names that would break out."""

import random
from dataclasses import replace

from results.escape import visible
from results.figures.drawing import Drawing
from results.figures.style import looks, new_figure, say, style
from results.metrics import METRICS
from results.report.content import Card, Content
from results.tables.overall import RANK
from results.tables.table import Cell, Column, Row, Table

EVIL = "</script><img src=x onerror=alert(1)>"
ODD = (EVIL, "$\\alpha_{1}$ & 50%", "אבג \u202eright to left", "bell\x07 \x1b[31m", "<!-- \u2028 --> {{ 7 * 7 }}")
"""Names of norms with markup, LaTeX, right-to-left letters and marks, control characters, comments and a template."""


def drawing(names, task="classification", name="curve"):
    """Accuracy against the norm batch: a line per name."""
    xs, looked = [2, 8, 64], looks(names)
    data = [{"norm": n, "norm batch": x, "top-1 (%)": 60.5 + 3 * i + x / 10} for i, n in enumerate(names) for x in xs]
    with style():
        figure, axes = new_figure()
        for n in names:
            axes.plot(xs, [d["top-1 (%)"] for d in data if d["norm"] == n], label=visible(n), **looked[n].plot)
        axes.set(xlabel="images per norm batch", ylabel="top-1 (%)")
        axes.legend()
        say(axes, "n = 2; seeds 0, 1")
    alt = f"Lines of {' and '.join(names)}: each rises with the norm batch."
    return Drawing(name, "Accuracy against the norm batch", figure, alt, ("Mean over seeds.",), tuple(data), task)


def report(names=("bn", "gn(num_groups=8)", "ln"), text="plain", artifacts=True):
    """A report of two settings and two seeds per name; `text` stands wherever a report has a free text."""
    top1, seconds = METRICS["top1"], METRICS["step_seconds"]
    runs = {name: [] for name in ("key", "norm", "setting", "seed", "status", "reason", "folder", "curves")}
    values, made, rows = [], [], []
    for batch in (2, 64):
        for i, norm in enumerate(names):
            keys, own = [], []
            for seed in (0, 1):
                key = f"{batch:02}{i:02}{seed:020}"
                lost = batch == 2 and i == 1 and seed == 1
                values.append(None if lost else 0.625 + 0.05 * i + batch / 1000 + seed / 100)
                own += [] if lost else [values[-1]]
                keys.append(key)
                runs["key"].append(key)
                runs["norm"].append(norm)
                runs["setting"].append(f"norm_batch_size={batch}")
                runs["seed"].append(seed)
                runs["status"].append("diverged" if lost else "ok")
                runs["reason"].append(f"loss was nan: {text}" if lost else "")
                runs["folder"].append(f"runs/classification/bn/{key}")
                losses = [[1, 2, 3], [1.5, None if lost else 1.25, 1.0]]
                runs["curves"].append({"train_loss": losses, "two_trainings": [[1, 2, 1, 2], [4, 3, 2, 1]]})
                script = f'<script>alert("{key}")</script>'
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{script}</svg>'
                made.append(
                    [{"name": "a.svg", "kind": "svg", "text": svg}, {"name": "a.txt", "kind": "text", "text": text}]
                    if artifacts
                    else []
                )
            first = i == len(names) - 1
            cell = Cell(mean=sum(own) / len(own), std=0.007 if len(own) > 1 else None, n=len(own), keys=tuple(keys))
            cell = cell if len(own) > 1 else Cell(mean=own[0], n=1, diverged=1, reason=text, keys=tuple(keys))
            cell = Cell(**{**vars(cell), "best": True, "significant": True}) if first else cell
            hole = Cell(failed=2, reason=text, keys=tuple(keys))
            step = Cell(mean=0.03 - 0.001 * i, std=0.002, n=2, keys=tuple(keys)) if i else hole
            note = ("does not mix samples",) if i == 1 else ()
            setting = (("norm_batch_size", str(batch)),)
            rows.append(Row(norm, (cell, step), norm, setting, f"norm_batch_size={batch}", note))
    runs["task"] = {"values": ["classification"], "of": [0] * len(values)}
    runs["options"] = {"values": [f"learning_rate=0.1, note={text}"], "of": [0] * len(values)}
    runs["made"] = {"values": [None, "torch 2.6, cpu"], "of": [1] * len(values)}
    runs["seconds"], runs["finished"] = [12.5] * len(values), ["2026-01-01 12:00"] * len(values)
    runs["artifacts"] = made
    runs["metrics"] = {
        "top1": {"title": top1.heading, "scale": top1.scale, "digits": top1.digits, "values": values},
        "step_seconds": {"title": seconds.heading, "scale": 1000.0, "digits": 1, "values": [0.03] * len(values)},
    }
    caption = (
        "Values: mean ± sample standard deviation (n - 1); n = 2.",
        "Runs: 12, of which 11 ok.",
        f"Common: {text}.",
    )
    columns = (Column(top1, top1.heading), Column(seconds, seconds.heading))
    task = Table("classification", "classification", columns, tuple(rows), caption, "classification", short=caption[:1])
    swept = [Row(norm, tuple(row.cells[0] for row in rows if row.label == norm), norm) for norm in names]
    over = tuple(Column(top1, str(b), "norm_batch_size", (("norm_batch_size", str(b)),)) for b in (2, 64))
    sweep = Table("by_batch", f"classification: {text} by norm batch", over, tuple(swept), caption, "classification")
    ranks = [Row(norm, (Cell(mean=1.5 + i, n=2),), norm) for i, norm in enumerate(names)]
    overall = Table("overall", "Overall: average rank", (Column(RANK, "all tasks"),), tuple(ranks), ("Ranks.",))
    cards = [
        Card(
            norm,
            norm,
            f"Paper of {text}",
            f"y = (x - mean) / sqrt(var + eps)\nwhere {text}",
            (("mixes samples", "yes"), ("keeps statistics", text)),
            (("mixes samples", "yes", "yes", "holds"), ("exact gradient", "yes", "no", "false")),
            f"Checked by 0.9.0: {text}",
            (("seconds per step", "1.2 of bn"),),
            (("diverged", "1 of 4"),) if i == 1 else (),
            "NHW" if i == 0 else None,
        )
        for i, norm in enumerate(names)
    ]
    return Content(
        title=f"report of {text}",
        facts=(("command", f"run_suite.py run {text}"), ("runs", "12: 11 ok, 1 diverged"), ("seeds", "0, 1")),
        warnings=("1 of 12 runs diverged.", f"Synthetic data: {text}"),
        headline=Table(
            "headline",
            "Norms by tasks",
            columns[:1],
            tuple(Row(r.label, r.cells[:1], r.norm) for r in rows[: len(names)]),
        ),
        tables=(task, sweep, overall),
        drawings=(drawing(names), drawing(names[:2], "", "both")),
        refused=(("critical differences", f"3 blocks are needed: {text}"),),
        cards=tuple(cards),
        runs=runs,
        left_out=(f"Curves are thinned: {text}",),
        config=f"tasks:\n\t- classification\n# {text}\n",
    )


def large(count, seeds=5, metrics=8, epochs=20):
    """A report of `count` runs: norms by settings by seeds, with a curve of two quantities each; numbers are drawn."""
    draw = random.Random(0)
    subjects = [replace(METRICS["top1"], name=f"metric{i}", title=f"metric {i}") for i in range(metrics)]
    norms = [f"norm{i}(num_groups={i})" for i in range(20)]
    settings = [f"learning_rate={i}" for i in range(-(-count // (seeds * len(norms))))]
    runs = {name: [] for name in ("key", "seed", "status", "folder", "seconds", "curves")}
    values, rows = {subject.name: [] for subject in subjects}, []
    for setting in settings:
        for norm in norms:
            start = len(runs["key"])
            for seed in range(seeds):
                key = f"{draw.getrandbits(96):024x}"
                runs["key"].append(key)
                runs["seed"].append(seed)
                runs["status"].append("ok")
                runs["folder"].append(f"runs/classification/{norm}/{key}")
                runs["seconds"].append(round(draw.uniform(10, 100), 3))
                y = [round(draw.random(), 4) for _ in range(epochs)]
                runs["curves"].append({"train_loss": [[*range(epochs)], y], "val_top1": [[*range(epochs)], y[::-1]]})
                for each in values.values():
                    each.append(draw.random())
            keys = tuple(runs["key"][start:])
            cells = tuple(Cell(mean=sum(v[start:]) / seeds, std=0.01, n=seeds, keys=keys) for v in values.values())
            rows.append(Row(norm, cells, norm, (("learning_rate", setting),), setting))
    runs["metrics"] = {
        s.name: {"title": s.heading, "scale": 100.0, "digits": 1, "values": values[s.name]} for s in subjects
    }
    columns = tuple(Column(subject, subject.heading) for subject in subjects)
    table = Table("classification", "classification", columns, tuple(rows), ("Values: drawn.",), "classification")
    return Content("large", tables=(table,), runs=runs, cards=tuple(Card(norm, norm) for norm in norms))
