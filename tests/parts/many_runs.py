"""A folder of results with as many records as asked for, of two tasks, planted without training.

PYTHONPATH=.:tests python -m parts.many_runs FOLDER [RECORDS]
"""

import json
import random
import sys
from pathlib import Path

from results.record import RECORD, RunRecord, RunSpec, as_text
from results.store import run_folder

NORMS = ("bn", "gn", "ln", "in", "bgn", "frn", "pn", "brn", "ebn", "rms", "sn", "mbn")
TASKS = (("classification", "top1"), ("few_shot", "acc_inductive"))
SEEDS, EPOCHS = 5, 30


def plant(folder, records=10_000, epochs=EPOCHS):
    """Write that many records below a folder: norms x norm batches x learning rates x seeds, 1 of 50 diverged."""
    draw = random.Random(0)
    for number in range(records):
        text, place = _one(number, epochs, draw)
        home = run_folder(folder, place)
        home.mkdir(parents=True)
        (home / RECORD).write_text(text, encoding="utf-8")
    return folder


def _one(number, epochs, draw):
    rest, seed = divmod(number, SEEDS)
    rest, which = divmod(rest, len(NORMS))
    rest, task = divmod(rest, len(TASKS))
    rest, batch = divmod(rest, 5)
    task, headline = TASKS[task]
    spec = RunSpec(
        task=task,
        norm=NORMS[which],
        norm_options={"eps": 1e-05},
        task_options={
            "dataset": "made_up",
            "model": "resnet18_narrow",
            "epochs": epochs,
            "batch_size": 64,
            "norm_batch_size": 2 ** (batch + 1),
            "learning_rate": round(0.01 * (rest + 1), 4),
            **{f"option_{i}": None for i in range(20)},
        },
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="c",
        norm_label=NORMS[which],
    )
    good = number % 50 != 7
    names = (headline, "val_top1", "test_loss", "composition_shift", "step_seconds", "peak_memory_mb")
    record = RunRecord(
        spec=spec,
        status="ok" if good else "diverged",
        reason="" if good else "loss not finite in step 7",
        metrics={name: draw.random() for name in (*names, "norm_parameters", "norm_buffers")} if good else {},
        history=[
            {
                "epoch": epoch,
                "train_loss": draw.random(),
                "train_top1": draw.random(),
                "learning_rate": draw.random(),
                "seconds": draw.random(),
                "val_top1": draw.random(),
            }
            for epoch in range(1, epochs + 1)
        ],
        seconds=draw.uniform(5, 50),
        environment={
            "commit": "0" * 40,
            "torch": "2.14.1",
            "device": "cpu",
            "device_name": "a processor",
            "threads": 1,
            "platform": "a platform",
            "clock": {"steps": 186, "seconds": 8.0, "total": 186},
            "finished": f"2026-11-28T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}.000+00:00",
        },
        evidence={"budget": "reduced", "data": "synthetic", "selection": "last epoch", "mixes_samples": which % 2 == 0},
    )
    return as_text(record), spec


if __name__ == "__main__":
    plant(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
    print(json.dumps({"planted": sys.argv[1]}))
