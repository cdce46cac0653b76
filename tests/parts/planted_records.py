"""Frames of runs with planted values, for tests of what is made from frames."""

from results.frame import from_records
from results.record import RunRecord, RunSpec


def planted(values, task="classification", metric="top1", **options):
    """Records of one setting. values: norm -> one entry per seed: a value, a status as text, or None (not made)."""
    return [
        RunRecord(
            spec=RunSpec(
                task=task,
                norm=norm,
                norm_options={},
                task_options=options,
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="d",
                norm_label="",
            ),
            status=value if isinstance(value, str) else "ok",
            reason="loss is not finite" if value == "diverged" else "",
            metrics={} if isinstance(value, str) else {metric: value},
            environment={"commit": "c0ffee", "torch": "2", "device": "cpu", "threads": 1},
            evidence={"data": "real", "budget": "reduced", "selection": "last epoch", "equals": None},
        )
        for norm, each in values.items()
        for seed, value in enumerate(each)
        if value is not None
    ]


def frame(*records):
    """The frame of several lists of records."""
    return from_records([record for some in records for record in some])


def texts(drawing):
    """Everything that is written in a figure, as it is drawn."""
    from matplotlib.text import Text

    drawing.figure.canvas.draw()
    return "\n".join(t.get_text() for t in drawing.figure.findobj(Text) if t.get_visible())
