"""suite.estimate: how long runs will take, from steps."""

import itertools

import pytest

from results.record import RunRecord, RunSpec
from results.store import run_folder
from suite import checkpoints
from suite.engine import Event
from suite.estimate import Estimate, Remaining, Steps, begun, left_to_do, task_steps
from suite.progress import Names, Progress, time_left

PER_EPOCH, PER_STEP, OTHER = 100, 0.1, 5.0  # so an epoch takes 10 s, and a run 5 s besides


def spec_of(epochs, norm="bn", seed=0, task="planted", **options):
    return RunSpec(
        task=task,
        norm=norm,
        norm_options={},
        task_options={"epochs": epochs, **options},
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="none",
    )


def steps_of(spec):
    return None if spec.task == "untold" else spec.task_options["epochs"] * PER_EPOCH


def record_of(spec, kind="clock", speed=1.0):
    """A finished run: with a clock, or as records were before there was one."""
    epochs = spec.task_options["epochs"]
    steps = epochs * PER_EPOCH
    took = steps * PER_STEP / speed
    clock = {"clock": {"steps": steps, "seconds": took, "total": steps}} if kind == "clock" else {}
    history = [{"seconds": took / epochs}] * epochs if kind == "history" else []
    return RunRecord(spec=spec, status="ok", seconds=took + OTHER, environment=clock, history=history)


@pytest.mark.parametrize("kind", ["clock", "history"])
def test_after_two_runs_of_one_epoch_the_time_of_thirty_is_known(kind):
    specs = [spec_of(epochs, norm, seed) for epochs in (1, 30) for norm in ("bn", "gn") for seed in (0, 1)]
    remaining = Remaining(
        2, [record_of(s, kind) for s in specs if s.seed == 0 and s.task_options["epochs"] == 1], steps_of
    )
    todo = [s for s in specs if (s.seed, s.task_options["epochs"]) != (0, 1)]
    truth = (2 * (OTHER + 10) + 4 * (OTHER + 300)) / 2
    assert left_to_do(remaining, todo, {}) == Estimate(pytest.approx(truth), False)


def test_a_record_without_seconds_of_steps_depends_on_steps_as_a_whole():
    remaining = Remaining(1, [record_of(spec_of(1), "nothing")], steps_of)
    assert left_to_do(remaining, [spec_of(30, seed=1)], {}).seconds == pytest.approx(30 * (10 + OTHER))


def test_a_run_of_a_task_that_can_not_tell_steps_counts_as_one():
    remaining = Remaining(1, [record_of(spec_of(1, task="untold"))], steps_of)
    assert left_to_do(remaining, [spec_of(1, seed=n, task="untold") for n in (1, 2)], {}).seconds == pytest.approx(30)


def test_the_closest_runs_count_and_learning_from_another_norm_is_better_than_nothing():
    remaining = Remaining(1, [record_of(spec_of(1, "bn")), record_of(spec_of(1, "gn"), speed=0.5)], steps_of)
    assert left_to_do(remaining, [spec_of(30, "bn")], {}).seconds == pytest.approx(OTHER + 300)
    assert left_to_do(remaining, [spec_of(30, "gn")], {}).seconds == pytest.approx(OTHER + 600)
    assert left_to_do(remaining, [spec_of(30, "in")], {}).seconds == pytest.approx(OTHER + 450)


def test_the_longest_run_is_waited_for_however_many_jobs_there_are():
    remaining = Remaining(8, [record_of(spec_of(1))], steps_of)
    assert left_to_do(remaining, [spec_of(30), spec_of(1, seed=1)], {}).seconds == pytest.approx(OTHER + 300)


def test_it_is_at_least_as_long_as_a_task_has_not_begun():
    specs = [spec_of(3), spec_of(3, seed=1), spec_of(3, task="other")]
    remaining, now = Remaining(1, (), steps_of), itertools.count(0, 0)
    progress = Progress(specs, Names(specs), {}, remaining, clock=lambda: next(now))
    assert progress.left() is None

    def epoch(spec, done):
        at = {"phase": "training", "done": done, "of": 3, "step": done * PER_EPOCH, "steps": 3 * PER_EPOCH}
        clock = (done * PER_EPOCH, done * 10.0)
        progress.take(Event("progress", spec, done / 3, position=at, row={"loss": 1.0}, clock=clock))

    progress.take(Event("started", specs[0]))
    assert progress.left() is None
    epoch(specs[0], 1)  # from the first finished epoch on
    assert progress.left() == Estimate(pytest.approx(50), True)
    epoch(specs[0], 3)
    assert progress.left() == Estimate(pytest.approx(30), True)
    line = progress.take(Event("finished", specs[0], record=record_of(specs[0])))
    assert progress.left() == Estimate(pytest.approx(OTHER + 30), True)
    assert line.endswith("[at least 35 s left]")
    progress.take(Event("started", specs[2]))
    epoch(specs[2], 1)
    assert progress.left() == Estimate(pytest.approx(OTHER + 30 + 20), True)  # nobody knows yet what follows its steps
    progress.take(Event("finished", specs[2], record=record_of(specs[2])))
    assert progress.left() == Estimate(pytest.approx(OTHER + 30), False)
    assert time_left(progress.left()) == "35 s"


def test_a_running_run_counts_once_and_what_it_has_done_after_its_steps_is_no_longer_to_do():
    spec, other = spec_of(3), spec_of(3, seed=1)
    remaining, now = Remaining(1, [record_of(other)], steps_of), [0.0]
    progress = Progress([spec], Names([spec]), {}, remaining, clock=lambda: now[0])
    progress.take(Event("started", spec))
    assert progress.left().seconds == pytest.approx(OTHER + 30)
    for done in (1, 2, 3):
        at = {"phase": "training", "step": done * PER_EPOCH}
        progress.take(Event("progress", spec, position=at, row={}, clock=(done * PER_EPOCH, done * 10.0)))
    now[0] = 30.0
    assert progress.left().seconds == pytest.approx(OTHER)
    now[0] = 33.0
    assert progress.left().seconds == pytest.approx(OTHER - 3)
    progress.take(Event("finished", spec, record=record_of(spec)))
    assert remaining.of(remaining.kind(spec_of(3, seed=2))).seconds == pytest.approx(OTHER + 30)


def test_a_run_that_goes_on_counts_what_is_left(tmp_path):
    spec, other = spec_of(30), spec_of(30, seed=1)
    folder = run_folder(tmp_path, spec)
    folder.mkdir(parents=True)
    note = checkpoints.Note(spec.key, {"step": 2000, "steps": 3000}, "epoch 21 of 30", 1.0)
    checkpoints.write(folder / checkpoints.NEWEST, {}, note)
    done = begun(tmp_path, [spec, other])
    assert done == {spec.key: 2000}
    remaining = Remaining(1, [record_of(spec_of(1))], steps_of)
    assert left_to_do(remaining, [spec, other], done).seconds == pytest.approx(2 * OTHER + 100 + 300)
    progress = Progress([spec], Names([spec]), {}, remaining, begun=done)
    assert progress.left().seconds == pytest.approx(OTHER + 100)


def test_a_resumed_runs_clock_is_of_its_last_process():
    spec = spec_of(30)
    clock = {"steps": 1000, "seconds": 100.0, "total": 3000}
    record = RunRecord(spec=spec, status="ok", seconds=300 + OTHER, environment={"clock": clock})
    remaining = Remaining(1, [record], steps_of)
    assert left_to_do(remaining, [spec_of(1)], {}).seconds == pytest.approx(OTHER + 10)


@pytest.mark.parametrize("clock", [3, {}, {"steps": "x"}, {"steps": 1e400}, {"steps": -1, "seconds": 2, "total": None}])
def test_a_clock_that_is_none_is_not_looked_at(clock):
    spec = spec_of(1)
    record = RunRecord(spec=spec, status="ok", seconds=15.0, environment={"clock": clock})
    assert left_to_do(Remaining(1, [record], steps_of), [spec_of(2)], {}).seconds == pytest.approx(30)


def test_steps_come_from_the_task_and_its_mistakes_cost_the_estimate_only(tmp_path):
    from suite.planning import plan_config

    options = {"epochs": [1, 30], "batch_size": 500, "max_steps": 100}
    runs = plan_config({"norms": ["bn"], "seeds": 0, "tasks": {"classification": options}}).runs
    steps = Steps({}, tmp_path)
    assert sorted(map(steps, runs)) == [12, 100]
    assert steps(spec_of(3, task="nowhere")) is None

    class Wrong:
        def steps(self, options, data_dir):
            raise RuntimeError("mine")

    assert task_steps(Wrong(), None, tmp_path) == 0
    assert task_steps(object(), None, tmp_path) == 0
