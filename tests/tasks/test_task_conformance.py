"""Every task keeps what tasks.conformance measures, and every one of its facts can be false."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

import tasks
from norms.generators import forked_generators
from results.metrics import METRICS
from suite.cli import checks
from tasks import data as datasets
from tasks.admission import Host, refusal
from tasks.base import Diverged, Outcome, Setting, Trained
from tasks.conformance import FACTS, Stopped, check_task, differing, facts, subjects
from tasks.conformance.cases import HIDDEN, SMALL
from tasks.conformance.check import measure
from tasks.conformance.facts import HINTS
from tasks.data.batches import normalize
from tasks.data.reading import stream
from tasks.evaluate import evaluate
from tasks.loop import Loop, epoch_ends
from tasks.options import NEWER, Options
from tasks.schedule import sgd
from tasks.step import StepOptions, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


LONG = {"architecture_search"}  # its runs are of several trainings; test_resume_matrix has one in `make test`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in tasks.task_names()]
)
def test_every_task_keeps_what_tasks_promise(name):
    found = check_task(name)
    assert [c.fact for c in found] == [fact.__name__.replace("_", " ") for fact in FACTS]
    assert [(c.fact, c.measured, c.detail) for c in found if c.false] == []
    assert set(tasks.get_task(name).metrics) <= METRICS.keys()


def test_a_run_stopped_twice_in_one_place_goes_on_from_there_and_not_from_its_start():
    with subjects() as find:
        subject = find("classification")
        end = subject.whole.journal.steps_done
        last = subject.whole.evaluations  # after the loop, so that the next process makes no newer state
        stopped = subject.run(stops=[("evaluation", end, last), ("evaluation", end, 1), ("evaluation", end, 1)])
        assert (stopped.processes, stopped.updates) == (4, subject.whole.updates)
        assert differing(subject.whole, stopped) == []


def test_there_are_small_options_hidden_labels_and_hints_for_all():
    every = [name for name in tasks.task_names() if type(tasks.get_task(name)).__module__.startswith("tasks.")]
    assert set(every) == set(SMALL) == set(HIDDEN)
    assert set(HINTS) == {"runs", *(fact.__name__ for fact in FACTS)}


# A task whose every promise can be broken

ROOT = Path(__file__).resolve().parents[2]
COUNT = itertools.count()


class OwnOptions(Options):
    dataset: str = "fashion_mnist_mini"
    epochs: int = 3
    batch_size: int = 16
    later: Annotated[int, NEWER] = 1
    doubled: int = 0

    @model_validator(mode="before")
    @classmethod
    def _broken(cls, given):
        return {**given, "doubled": 2} if Own.defect == "newer" and "later" in given else given


class OwnNet(nn.Module):
    def __init__(self, norm, classes, device=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False, device=device), norm(4, device=device)
        self.head = nn.Linear(4, classes, device=device)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Own:
    """A whole task, in as few lines as one needs; `defect` breaks it in one place."""

    name, version, options, metrics = "own", 1, OwnOptions, ("top1", "own_loss")
    defect = ""

    def setting(self, options):
        return Setting(norm_batch_size=options.batch_size)

    def data_checksum(self, options, data_dir):
        datasets.check_classifiable(options.dataset, data_dir)
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm, info, options):
        reason = refusal(norm, info, Host(self.name, OwnNet, {"classes": 4}, (3, 8, 8), options.batch_size))
        broken = {"plans all": None, "two lines": f"{reason}\nwhatever", "own words": "no"}
        return broken.get(self.defect, reason) if reason else None

    def steps(self, options, data_dir):
        return options.epochs * 4 + (self.defect == "miscounts")

    def network(self, norm, options, facts):
        return OwnNet(norm, facts["classes"] + (self.defect == "another network")), lambda images: images

    def run(self, norm, options, context):
        try:
            return self._run(norm, options, context)
        except Diverged as error:
            if self.defect == "swallows":
                return Outcome({"top1": 0.0, "own_loss": 1.0})
            if self.defect == "loses history":
                raise Diverged(str(error), history=[{"epoch": 1.0}]) from error
            raise

    def _run(self, norm, options, context):
        defect = self.defect
        data = datasets.load(options.dataset, context.data_dir)
        seeded = (
            context.generator if defect != "one seed" else lambda purpose: torch.Generator().manual_seed(len(purpose))
        )
        with forked_generators(context.device):
            torch.manual_seed(seeded("weights").initial_seed())
            net = OwnNet(norm, data.num_classes)
        optimizer = sgd(net, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
        part = data.test if defect == "trains on the test part" else data.train
        batches = stream(part, 6 if part is data.test else options.batch_size, seeded("order"))
        loop = Loop(
            context,
            "training",
            ends=epoch_ends(options.epochs, 4),
            rates={} if defect == "optimizer not kept" else {optimizer: lambda progress: 0.1 * (1 - progress)},
            keeps={} if defect == "weights not kept" else {"net": net},
        )
        draws = torch.Generator().manual_seed(seeded("noise").initial_seed())
        for epoch in loop.epochs():
            for step, (images, labels) in epoch.steps(batches):
                images = normalize(images, data.mean, data.std)
                if defect == "global generator":
                    images += 0.1 * torch.randn_like(images)
                if defect == "a generator of its own":
                    images += 0.1 * torch.randn(images.shape, generator=draws)
                with step:
                    loss, right = train_step(net, optimizer, images, labels, StepOptions(), step=step.number)
                step.saw(len(labels), right, train_loss=loss)
            if defect == "chooses by the test part":
                epoch.row["chosen"] = self._measure(net, data).loss
            if defect == "tensor in a row":
                epoch.row["weight"] = net.head.bias.sum().detach()
        if defect == "trains after the loop":
            images, labels = normalize(data.train.images, data.mean, data.std), data.train.labels
            train_step(net, optimizer, images, labels, StepOptions())
        found = context.journal.once("test", lambda: self._scores(net, data))
        if defect == "another number each time":
            found["own_loss"] = float(next(COUNT))
        if defect == "undeclared":
            found["other"] = 1.0
        if defect == "infinite":
            found["own_loss"] = float("inf")
        if defect == "writes elsewhere":
            Path("left.txt").write_text("x")
        if defect == "beyond one":
            context.report(2.0)
        trained = Trained(net.state_dict(), {"classes": data.num_classes})
        return Outcome(found, context.journal.rows, trained=None if defect == "forgets the network" else trained)

    def _scores(self, net, data):
        found = self._measure(net, data)
        return {"top1": found.top1, "own_loss": found.loss}

    @staticmethod
    def _measure(net, data):
        return evaluate(net, [(normalize(data.test.images, data.mean, data.std), data.test.labels)])


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(Own, "defect", "")
    tasks.register_task(Own())
    return monkeypatch


def test_a_task_of_ones_own_passes(own):
    found = check_task("own")
    assert [(c.fact, c.measured, c.detail) for c in found if not c.ok] == []
    assert {c.declared for c in found} > {"12"}


@pytest.mark.parametrize(
    ("defect", "fact", "measured"),
    [
        ("undeclared", "metrics_returned", "others"),
        ("infinite", "metrics_returned", "others"),
        ("tensor in a row", "history_is_of_numbers", "others"),
        ("another number each time", "same_twice", "differs"),
        ("global generator", "global_generators_do_not_matter", "no"),
        ("one seed", "another_seed_is_another_run", "same"),
        ("trains on the test part", "labels_are_for_scores", "more than scores"),
        ("chooses by the test part", "labels_are_for_scores", "more than scores"),
        ("swallows", "diverges_as_a_result", "ends well"),
        ("loses history", "diverges_as_a_result", "the history before is lost"),
        ("plans all", "skips_with_a_reason", "no"),
        ("two lines", "skips_with_a_reason", "no"),
        ("own words", "skips_with_a_reason", "no"),
        ("optimizer not kept", "goes_on_between_steps", "differs"),
        ("weights not kept", "goes_on_between_steps", "differs"),
        ("a generator of its own", "goes_on_between_steps", "differs"),
        ("trains after the loop", "goes_on_in_evaluation", "trains again"),
        ("forgets the network", "trained_network_is_kept", "no"),
        ("another network", "trained_network_is_kept", "raises"),
        ("miscounts", "steps_as_told", "12"),
        ("newer", "newer_options_at_their_defaults", "differs"),
        ("beyond one", "progress", "falls, or leaves [0, 1]"),
        ("writes elsewhere", "nothing_written_elsewhere", "no"),
    ],
)
def test_each_fact_can_be_false(defect, fact, measured, own):
    own.setattr(Own, "defect", defect)
    with subjects() as find:
        check = measure(find("own"), getattr(facts, fact))
    assert check.false
    assert check.measured == (measured if measured != "raises" else check.measured)
    assert check.hint == HINTS[fact]


def test_a_task_without_a_loop_begins_anew_which_is_a_note(own):
    own.setattr(Stopped, "steps_done", property(lambda self: 0, lambda self, value: None), raising=False)
    with subjects() as find:
        check = measure(find("own"), facts.goes_on_between_steps)
    assert (check.measured, check.note, check.false) == ("begins anew", True, False)


def test_a_run_that_raises_is_the_only_fact(own):
    own.setattr(Own, "steps", None)
    own.setattr(Own, "_measure", staticmethod(lambda net, data: 1 / 0))
    (check,) = check_task("own")
    assert check.false
    assert (check.fact, check.detail) == ("runs", "ZeroDivisionError: division by zero")


def test_a_run_that_takes_too_long_says_what_to_do(own):
    with pytest.raises(ValueError, match=r"a run of own with these options takes more than 0 s; .* --option"):
        check_task("own", limit=0.0)


@pytest.mark.parametrize(
    ("options", "norm", "message"),
    [
        ({"epoch": 1}, "bn", 'unknown option of own "epoch"; .*did you mean "epochs"'),
        ({"epochs": "x"}, "bn", "own: epochs: "),
        ({}, "bm", 'unknown norm "bm"'),
        ({}, {"gn": {"num_groups": 3}}, 'norm "gn" can not serve in own: .* does not divide 4 channels'),
    ],
)
def test_what_can_not_be_checked_is_said(options, norm, message, own):
    with pytest.raises(ValueError, match=message):
        check_task("own", options, norm=norm)


def command(*arguments):
    found = subprocess.run(
        [sys.executable, str(ROOT / "run_suite.py"), "check", *map(str, arguments)], capture_output=True, text=True
    )
    return found.returncode, found.stdout, found.stderr


def test_the_command_checks_a_task_of_a_plugin_and_a_false_fact_fails_it(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from tasks import register_task\n"
        "from tasks.classification.task import Classification\n\n\n"
        "class Other(Classification):\n"
        '    name = "other"\n'
        '    metrics = (*Classification.metrics, "more")\n\n\n'
        "register_task(Other())\n"
    )
    code, out, error = command(
        "--task", "other", "--plugin", file, "--option", "epochs=2", "--norm", "{gn: {num_groups: 2}}"
    )
    assert (code, "false: other: runs: declared yes, measured no" in error) == (1, True), (out, error)
    assert "KeyError: 'more'" in out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "clasification"}, 'did you mean "classification"'),
        ({"task": "classification", "norms": ["bn"]}, "--task checks one task; norms is for norms"),
        ({"task": "classification", "device": "cuda"}, "checked on the cpu"),
        ({"norms": ["bn"], "norm": "gn"}, "--norm is for --task"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(given, message):
    without = {"norms": None, "all_norms": False, "device": "cpu", "data_dir": Path("data")}
    with pytest.raises(ValueError, match=message):
        checks.check(**{**without, **given})
