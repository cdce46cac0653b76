"""Records by hand for tests of figures, and what stands in a figure."""

import math

import pandas as pd

from results.frame import from_records
from results.record import RunRecord, RunSpec


def run(norm="bn", seed=0, value=0.5, status="ok", label="", task="classification", **more):
    """A record; keywords that are no option of the task: metrics, reason, history."""
    metrics = more.pop("metrics", {"top1": value, "step_seconds": 0.01 + 0.001 * len(norm) + 0.0001 * seed})
    reason, history = more.pop("reason", ""), more.pop("history", ())
    return RunRecord(
        spec=RunSpec(
            task=task,
            norm=norm,
            norm_options={},
            task_options=more,
            seed=seed,
            norm_version="1",
            task_version="1",
            data_checksum="d",
            norm_label=label,
        ),
        status=status,
        reason=reason,
        metrics=metrics if status == "ok" else {},
        environment={"commit": "c0ffee", "torch": "2", "device": "cpu", "threads": 1},
        evidence={"data": "real", "budget": "reduced", "selection": "last epoch"},
        history=list(history),
    )


def sweep(norms=("bn", "gn", "ln"), seeds=3, values=(1, 4, 16), option="norm_batch_size", **more):
    """Runs of every norm, seed and value of an option; no two have the same value."""
    return [
        run(norm, seed, 0.4 + 0.05 * i + 0.011 * seed * (i + 1) + 0.003 * k, **{option: value}, **more)
        for i, norm in enumerate(norms)
        for seed in range(seeds)
        for k, value in enumerate(values)
    ]


def frame(records):
    return from_records(records)


def history(records):
    """The frame that `results.load_history` makes of the same records in a folder."""
    rows = []
    for record in records:
        spec = record.spec
        label = spec.norm_label or spec.norm
        who = {"task": spec.task, "norm": spec.norm, "norm_label": label, "row": spec.norm, "seed": spec.seed}
        rows += [{**who, "status": record.status, "key": spec.key, **entry} for entry in record.history]
    return pd.DataFrame(rows)


def texts(figure):
    """Every text in a figure that is seen."""
    from matplotlib.text import Text

    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


def said(figure):
    return " ".join(" ".join(t.get_text() for t in texts(figure)).split())


def drawn(figure, kind):
    """The artists of a kind: "mean", "band", "seed", "hollow", "none", ...; behind it stands the norm."""
    artists = [*figure.findobj(), *(each for axes in figure.axes for each in axes.containers)]
    labelled = [a for a in artists if hasattr(a, "get_label")]
    return [a for a in labelled if str(a.get_label()) == kind or str(a.get_label()).startswith(f"{kind} ")]


def points(line):
    """x -> y of a line, without its gaps."""
    pairs = zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)
    return {x: y for x, y in pairs if not math.isnan(y)}


def inches(figure):
    """The width of the file that the figure becomes: what leaves its column makes it wider."""
    figure.draw_without_rendering()
    return figure.get_tightbbox().width
