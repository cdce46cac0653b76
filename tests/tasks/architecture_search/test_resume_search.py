"""An architecture search that is stopped anywhere equals one that is not, to the last bit."""

import pytest
import torch
from parts import architecture_search as searched
from parts.resuming import Stopped, reread, results, resumed

from norms.registry import norm_names
from tasks.architecture_search import task as architecture_search
from tasks.architecture_search import training
from tasks.architecture_search.genotype import PUBLISHED
from tasks.architecture_search.task import TASK
from tasks.base import Diverged, RunContext
from tasks.journal import Interrupted, Journal

pytestmark = pytest.mark.usefixtures("one_thread", "data")
data = searched.data

# a search epoch has 3 steps, one of a retraining 6
SHORT = searched.TINY | {
    "augmentation": "crop_flip",
    "search_epochs": 2,
    "search_max_steps": 5,
    "search_cutout": 2,
    "norm_batch_size": 16,
    "retrain_epochs": 2,
    "retrain_max_steps": 7,
}
SEARCH, RETRAINING = 5, 7
# where no search is looked at
FEW = {"search_max_steps": 2, "retrain_max_steps": 2}


@pytest.fixture(autouse=True)
def few_images(data):
    data.value = searched.planted((100, 16, 16))


def whole(norm, options, folder, keep=False):
    folder.mkdir()
    return TASK.run(norm, options, RunContext(torch.device("cpu"), 0, None, folder, keep_weights=keep))


def files(folder, outcome):
    return {name: (folder / name).read_bytes() for name in outcome.artifacts}


def check(name, stops, tmp_path, **given):
    """Stopped runs continue in an empty folder each time, as on another machine."""
    options, norm = TASK.options(**(SHORT | given)), searched.factory(name)
    expected = whole(norm, options, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    outcome, parts = resumed(TASK, norm, options, stops, tmp_path / "stopped")
    assert parts == len(stops) + 1
    assert results(outcome) == results(expected)
    assert files(tmp_path / "stopped", outcome) == files(tmp_path / "whole", expected)


def test_a_search_goes_on_within_an_epoch_and_between_its_parts(tmp_path):
    """Twice in the first epoch, in the second, at the end of the search, inside the retraining and inside the
    control."""
    inside = [SEARCH + 2, SEARCH + RETRAINING - 1, SEARCH + RETRAINING + 3]
    check("bgn", [1, 2, 4, SEARCH, *inside], tmp_path)


@pytest.mark.slow
def test_a_search_of_the_second_order_goes_on_within_an_epoch(tmp_path):
    check("bn", [1, 2, 4], tmp_path, order="second", retrain_max_steps=1, random_architectures=0)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", searched.SERVED)
def test_a_search_with_every_norm_goes_on(name, order, tmp_path):
    statistics = {"architecture_steps_move_statistics": order == "first"}
    check(name, [1, 2, 4, SEARCH + 2, SEARCH + 4, SEARCH + RETRAINING + 6], tmp_path, order=order, **statistics)


@pytest.mark.slow
@pytest.mark.parametrize("name", norm_names(without=["domain", "context"]))
def test_a_retraining_with_every_norm_goes_on(name, tmp_path):
    given = {"genotype": "DARTS_V2", "retrain_runs": 2, "random_architectures": 1}
    if TASK.why_not(norm := searched.factory(name), norm.info, TASK.options(**(SHORT | given))) is None:
        check(name, [2, 4, RETRAINING + 1, 2 * RETRAINING + 6], tmp_path, **given)


def test_a_retraining_with_auxiliary_head_goes_on(monkeypatch, data, tmp_path):
    data.value = searched.planted((40, 16, 16), side=32)
    given = {"genotype": "DARTS_V1", "auxiliary_weight": 0.4, "drop_path": 0.3, "random_architectures": 0}
    options = {"retrain_max_steps": 4, "dataset": "fashion_mnist_mini"}
    monkeypatch.setattr(architecture_search, "_load", lambda *arguments: data.value)
    check("bn", [1, 3], tmp_path, **given, **options)


def test_both_optimizers_schedules_and_precisions_are_kept(tmp_path):
    given = {"search_optimizer": "adamw", "retrain_optimizer": "adamw", "precision": "bfloat16"}
    schedules = {"search_schedule": "onecycle", "search_warmup": 0.3, "retrain_schedule": "steps"}
    sizes = {"search_max_steps": 3, "retrain_max_steps": 3, "random_architectures": 0}
    check("gn", [2, 4], tmp_path, **given, **schedules, **sizes)


def test_what_is_finished_is_not_repeated(monkeypatch, tmp_path):
    made = []
    for name in ("search", "retrain"):
        real = getattr(training, name)
        monkeypatch.setattr(
            architecture_search, name, lambda *given, real=real: made.append(real.__name__) or real(*given)
        )
    options = TASK.options(**(SHORT | FEW | {"random_architectures": 0}))
    resumed(TASK, searched.factory("bn"), options, [3], tmp_path)
    assert made == ["search", "retrain", "retrain"]


def test_a_control_that_diverged_is_not_repeated(monkeypatch, tmp_path):
    real, tried = training.retrain, []

    def breaks(*given):
        tried.append(given[-2:])
        if given[-2:] == (1, True):
            raise Diverged("the loss is nan")
        return real(*given)

    monkeypatch.setattr(architecture_search, "retrain", breaks)
    options = TASK.options(**(SHORT | FEW | {"random_architectures": 2}))
    outcome, _ = resumed(TASK, searched.factory("bn"), options, [5], tmp_path)
    assert outcome.evidence["random_diverged"] == ["the loss is nan"]
    assert tried == [(1, False), (1, True), (2, True), (2, True)]


@pytest.mark.parametrize("after", ["search", pytest.param("retraining 1", marks=pytest.mark.slow)])
def test_a_run_that_ends_right_after_a_last_epoch_measures_and_does_not_train_again(after, monkeypatch, tmp_path):
    """The state that a loop leaves is the one to go on from until its part is measured."""
    options, norm = TASK.options(**(SHORT | FEW | {"random_architectures": 0})), searched.factory("bn")
    expected = whole(norm, options, tmp_path / "whole")
    journal = Stopped(None, [])
    real = Journal.keep

    def keep(self, name, state):
        real(self, name, state)
        if name == after and self._state["loops"][name]["current"] is None:
            self.save()
            raise Interrupted

    monkeypatch.setattr(Journal, "keep", keep)
    with pytest.raises(Interrupted):
        TASK.run(norm, options, RunContext(torch.device("cpu"), 0, None, tmp_path, journal=journal))
    monkeypatch.setattr(Journal, "keep", real)
    stored = reread(journal.stored)
    again = Journal(stored)
    outcome = TASK.run(norm, options, RunContext(torch.device("cpu"), 0, None, tmp_path, journal=again))
    assert again.steps_done == 2 + 2
    assert results(outcome) == results(expected)


def test_the_network_that_is_kept_is_the_first_retrained_one(data, tmp_path):
    """Its weights outlive the process that trained it; built anew from the facts it classifies as it did."""
    options, norm = TASK.options(**(SHORT | FEW | {"retrain_norm": "ln"})), searched.factory("bn")
    state = None
    for stops in ([("step", 2 + 2 + 1)], []):  # inside the control, so that the process that ends has not trained it
        journal = Stopped(state, stops)
        context = RunContext(torch.device("cpu"), 0, None, tmp_path, journal=journal, keep_weights=True)
        try:
            outcome = TASK.run(norm, options, context)
        except Interrupted:
            state = reread(journal.stored)
    net, prepare = TASK.network(norm, options, outcome.trained.facts)
    net.load_state_dict(outcome.trained.weights)
    test = data.value.test
    with torch.no_grad():
        right = (net.eval()(prepare(test.images)).argmax(1) == test.labels).sum()
    assert float(right) / len(test) == outcome.metrics["top1"]
    assert whole(norm, options, tmp_path / "other").trained is None


def test_images_for_a_kept_network_are_averaged_down_as_the_data_set_was():
    options = TASK.options(**(searched.TINY | {"dataset": "fashion_mnist_mini", "image_size": 8}))
    genotype = {"genotype": training.Genotype.model_validate(PUBLISHED["DARTS_V2"]).model_dump(mode="json")}
    facts = genotype | {"in_channels": 1, "num_classes": 4, "mean": (0.5,), "std": (0.5,)}
    net, prepare = TASK.network(searched.factory("bn"), options, facts)
    large = torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    assert prepare(large).shape == (2, 1, 8, 8)
    assert torch.equal(prepare(large), prepare(large[..., ::4, ::4]))
    assert net.eval()(prepare(large)).shape == (2, 4)


def test_a_run_knows_its_steps_and_reports_them_all(tmp_path):
    options = TASK.options(**(SHORT | {"search_max_steps": 2, "retrain_runs": 2, "random_architectures": 1}))
    told = []
    total = TASK.steps(options, tmp_path)
    journal = Journal(steps=total, tell=lambda position, row: told.append(position))
    fractions = []
    context = RunContext(torch.device("cpu"), 0, None, tmp_path, fractions.append, journal)
    TASK.run(searched.factory("bn"), options, context)
    assert journal.steps_done == total == 2 + 3 * RETRAINING
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert {position.phase for position in told if position.of} == {
        "search",
        "retraining 1",
        "retraining 2",
        "control 1",
    }
    given = TASK.options(**(SHORT | {"genotype": "DARTS_V1"}))
    assert TASK.steps(given, tmp_path) == 2 * RETRAINING
