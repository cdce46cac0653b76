"""few_shot, stopped in training and inside its episodes, equals a run that is not stopped, to the last bit."""

import pytest
import torch
from parts import few_shot as few
from parts.resuming import Stopped, reread, results
from torch import nn

from norms.protocol import norm_modules
from norms.registry import make_norm, norm_names, register
from tasks.base import RunContext
from tasks.few_shot.maml import StepStatistics
from tasks.few_shot.networks import build
from tasks.few_shot.task import TASK
from tasks.journal import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread", "data")
data = few.data

TENTHS = {"steps": 30, "test_episodes": 4, "val_episodes": 3, "query_augmentation": "affine", "queries": 3}
SMALL = {"way": 2, "width": 4, "meta_batch_size": 1}
STOPS = (
    *(("step", step) for step in (4, 5, 18, 26)),
    ("val episodes", 0),
    ("val episodes", 2),
    ("test episodes", 1),
    ("test episodes", 1),
)
"""After an update: twice within the second tenth, at the end of the sixth, within the ninth; inside an episode, which
is then measured again, and stopped in again."""


class StoppedAnywhere(Stopped):
    """Told to leave after each of the given updates, and at the end of each of the given items, before its result is
    kept; in this order."""

    def each(self, name, items, measure):
        def stopping(numbered):
            number, item = numbered
            result = measure(item)
            if self.stops and self.stops[0] == (name, number):
                self.stops.pop(0)
                self.leave()
            return result

        return super().each(name, list(enumerate(items)), stopping)


def run(norm, options, stops=()):
    """The outcome of a run with networks of its own in each of its parts, its state read from a file in between."""
    state, stops = None, list(stops)
    while True:
        journal = StoppedAnywhere(state, stops)
        before = len(stops)
        try:
            outcome = TASK.run(norm, options, RunContext(torch.device("cpu"), 0, None, None, journal=journal))
        except Interrupted:
            assert len(stops) == before - 1
            state = reread(journal.stored)
        else:
            assert not stops
            return outcome


def check(name, **given):
    spec, norm = few.options(**(TENTHS | SMALL | given)), few.norm(name) if isinstance(name, str) else name
    assert results(run(norm, spec, STOPS)) == results(run(norm, spec))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("prototypical", "tasknorm"),
        ("prototypical", "mbn"),
        ("imprinting", "cbn"),
        ("imprinting", "tasknorm"),
    ],
)
def test_a_run_goes_on_in_training_and_inside_its_episodes(method, name):
    check(name, method=method)


@pytest.mark.parametrize(
    ("name", "order", "kind"),
    [
        pytest.param("mbn", "second", "shared", marks=pytest.mark.slow),
        ("cbn", "first", "per_step"),
        pytest.param("brn", "first", "none", marks=pytest.mark.slow),
        ("tasknorm", "second", "per_step"),
    ],
)
def test_maml_goes_on_with_the_statistics_of_every_step(name, order, kind):
    check(name, method="maml", order=order, inner_statistics=kind)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_with_another_optimizer_and_precision(optimizer):
    check("bn", optimizer=optimizer, precision="bfloat16", gradient_clip=0.5, inductive_statistics="support")


@pytest.mark.slow
@pytest.mark.parametrize("name", norm_names(without=["domain"]))
@pytest.mark.parametrize("seed", [0, 1])
def test_every_norm_goes_on_with_every_method(name, seed):
    given = {"inductive_statistics": ("running", "support")[seed], "shot": 1 + seed}
    for method in ("prototypical", "imprinting"):
        check(name, method=method, meta_batch_size=2, **given)
    for kind in ("shared", "per_step", "none"):
        check(name, method="maml", order=("first", "second")[seed], inner_statistics=kind, meta_batch_size=2, **given)


@pytest.fixture
def replacing():
    """A norm that replaces its buffers instead of changing them, one of which begins as None, and counts in its extra
    state."""

    @register(name="replacing", source="test", mixes_samples=True, keeps_stats=True)
    class Replacing(nn.Module):
        momentum = 0.1

        def __init__(self, num_channels: int, *, affine: bool = True):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(num_channels))
            self.register_buffer("first", None)
            self.seen = 0

        def reset_running_stats(self):
            self.running_mean = torch.zeros_like(self.running_mean)

        def forward(self, x):
            if not self.training:
                return x - self.running_mean[:, None, None]
            mean = x.mean((0, 2, 3))
            self.seen += 1
            self.running_mean = torch.lerp(self.running_mean, mean.detach(), 0.1)
            if self.first is None and self.lazy:
                self.first = mean.detach().sum()
            return x * (1 + 0.01 * self.seen) - mean[:, None, None] - (0 if self.first is None else self.first)

        lazy = True

        def get_extra_state(self):
            return torch.tensor(self.seen)

        def set_extra_state(self, state):
            self.seen = int(state)

    return Replacing


@pytest.mark.parametrize("kind", ["shared", "per_step"])
def test_buffers_that_a_norm_replaces_and_its_extra_state_go_on(kind, replacing):
    replacing.lazy = kind == "per_step"  # torch loads no tensor into a network's buffer that is None
    check(make_norm("replacing"), method="maml", inner_statistics=kind)


def test_statistics_of_steps_are_loaded_as_copies_and_of_equal_norms_only():
    bn, gn = (build(few.norm(name), few.options(method="maml"), few.SHAPE, 3) for name in ("bn", "gn"))
    saved, other = StepStatistics(bn, 2), StepStatistics(bn, 2)
    with saved.step(bn, 1):
        bn(torch.randn(4, *few.SHAPE))
    state = reread(saved.state_dict())
    other.load_state_dict(state)
    for step in range(3):
        for part, buffers in other.sets[step].items():
            assert all(torch.equal(b, saved.sets[step][part][key]) for key, b in buffers.items())
    with other.step(bn, 1):
        bn(torch.randn(4, *few.SHAPE))
    name = next(iter(other.sets[1]))
    assert torch.equal(state["sets"][1][name]["running_mean"], saved.sets[1][name]["running_mean"])
    assert not torch.equal(other.sets[1][name]["running_mean"], saved.sets[1][name]["running_mean"])
    for wrong in (StepStatistics(bn, 1), StepStatistics(gn, 2)):
        with pytest.raises(ValueError, match="statistics of"):
            wrong.load_state_dict(state)


# What stays of a run


@pytest.mark.parametrize(
    ("method", "kind", "name"),
    [
        ("prototypical", None, "gn"),
        ("imprinting", None, "bn"),
        ("maml", "shared", "bn"),
        ("maml", "per_step", "bn"),
        ("maml", "per_step", "mbn"),
    ],
)
def test_the_network_that_a_run_leaves_is_built_without_data_and_gives_its_numbers(method, kind, name):
    spec, norm = (
        few.options(method=method, inner_statistics=kind, steps=3, test_episodes=2, val_episodes=2),
        few.norm(name),
    )
    outcome = run(norm, spec)
    net, prepare = TASK.network(norm, spec, reread(dict(outcome.trained.facts)))
    net.load_state_dict(reread(dict(outcome.trained.weights)))
    images = prepare(few.planted().test.images[:64])
    if name != "gn":
        counts = {int(norm.num_batches_tracked) for _, norm in norm_modules(net)}
        # 3 updates of two episodes; MAML's support moves the one set of all steps, too
        assert counts == {{"imprinting": 3, "prototypical": 6}.get(method, 6 if kind == "per_step" else 18)}
    probes, mates = images.chunk(2)
    net.eval()
    with torch.no_grad():
        seen = [net(torch.cat([probes, sign * mates]))[: len(probes)].double() for sign in (1, -1)]
    assert float((seen[0] - seen[1]).abs().max()) == outcome.metrics["composition_shift"]
    assert net.embedding(probes).shape == (len(probes), 8)
    assert seen[0].shape[1] == {"prototypical": 8, "imprinting": 10, "maml": 3}[method]


def test_progress_and_length_are_those_of_the_steps():
    spec, told = few.options(steps=12, test_episodes=2, val_episodes=2), []
    assert TASK.steps(spec, None) == 12
    TASK.run(few.norm("ln"), spec, RunContext(torch.device("cpu"), 0, None, None, told.append))
    assert told == sorted(told)
    assert told[-1] == 1.0
