"""Folders of results, planted by hand: runs of a task that no process knows."""

from results.record import RunRecord, RunSpec
from results.store import run_folder, run_lock, write_record, write_versions


def spec(norm="bn", seed=0, version="1", task="mine", **options):
    return RunSpec(
        task=task,
        norm=norm,
        norm_options={},
        task_options={"learning_rate": 0.1, **options},
        seed=seed,
        norm_version=version,
        task_version="1",
        data_checksum="d",
        norm_label=norm,
    )


def record(of, status="ok", at=0, commit="c", files=(), **metrics):
    """at: the second at which it ended."""
    metrics = {"top1": 0.5, "test_loss": 1.0, "step_seconds": 0.01, **metrics}
    return RunRecord(
        spec=of,
        status=status,
        reason="" if status == "ok" else "it did",
        metrics=metrics if status == "ok" else {},
        seconds=1.0,
        environment={"finished": f"2026-01-01T00:00:{at:02}+00:00", "commit": commit},
        artifacts=list(files),
    )


def plant(out, *records, planned=True):
    for each in records:
        with run_lock(out, each.spec):
            write_record(out, each)
            for name in each.artifacts:
                (run_folder(out, each.spec) / name).write_text(f"{name} of {out.name}")
    if planned:
        write_versions(out, [each.spec for each in records])
    return out


def content(out):
    """Every file of a folder but locks: path below it -> bytes."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and not p.name.endswith(".claim"))
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}
