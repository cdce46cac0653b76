"""Training and evaluation steps: decay groups, schedules, norm batches, divergence, evaluation, recalibration, cost."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parts.norm_choices import TIER1
from torch import nn

from norms import registry
from norms.protocol import norm_modules
from norms.registry import make_norm
from tasks import cost
from tasks import evaluate as fit
from tasks.base import Diverged, RunContext
from tasks.nets.models import build_net
from tasks.schedule import learning_rate_at, parameter_groups, sgd
from tasks.step import StepOptions, train_step

OPTIONS = {"gn": {"num_groups": 8}, "bgn": {"num_groups": 4}}


def build(name="bn", model="resnet8", **options):
    generator = RunContext(torch.device("cpu"), 0, None, None).generator
    options = {"num_classes": 3, "in_channels": 1, "width": 8, "generator": generator, **options}
    return build_net(model, make_norm(name, **OPTIONS.get(name, {})), **options)


def batch(size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 16, 16, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def steps(net, count=3, slices=1, lr=0.05, seed=0):
    optimizer = sgd(net, learning_rate=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(count):
        loss, _ = train_step(net, optimizer, *batch(seed=seed + step), StepOptions(slices), step=step)
        losses.append(loss.item())
    return losses


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own_norms():
    """Norms of a user, known to the registry for one test only."""

    @registry.register(name="odd", source="test", mixes_samples=False, keeps_stats=False)
    class Odd(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.table = nn.Parameter(torch.ones(num_channels, 3))
            self.inner = nn.Linear(3, 1)

        def forward(self, x):
            return x * self.inner(self.table)[:, :, None]

    @registry.register(name="mixer", source="test", mixes_samples=True, keeps_stats=False, mixes_samples_in_eval=True)
    class Mixer(nn.Module):
        """Batch statistics in both modes, on which slices are not honoured by the layer itself."""

        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    @registry.register(
        name="looker",
        source="test",
        mixes_samples=False,
        keeps_stats=False,
        needs=frozenset({"second_look"}),
    )
    class Looker(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.register_buffer("looks", torch.zeros(2))
            self.progress = []

        def forward(self, x):
            with torch.no_grad():
                self.looks[int(self.situation.again)] += 1
            return x

        def after_update(self, progress):
            self.progress.append(progress)

    @registry.register(name="copycat", source="test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    def copycat(num_channels, *, affine: bool = True, device=None, dtype=None):
        return make_norm("bn")(num_channels, affine=affine, device=device, dtype=dtype)


# Weight decay


def decayed_names(net, **options):
    groups = parameter_groups(net, 0.1, **options)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    return {name for name, p in net.named_parameters() if id(p) in decayed}


@pytest.mark.parametrize("name", [*TIER1, "odd"])
def test_decay_reaches_weights_and_no_parameter_of_a_norm(name, own_norms):
    names = decayed_names(build(name))
    assert names == {n for n, _ in build("bn").named_parameters() if "norm" not in n and not n.endswith("bias")}
    assert len(names) == 8


@pytest.mark.parametrize("name", ["bn", "odd"])
def test_one_option_decays_every_parameter_of_every_norm(name, own_norms):
    net = build(name)
    names = decayed_names(net, norm_weight_decay=True)
    assert names == {n for n, _ in net.named_parameters()} - {"head.bias"}


def test_frozen_parameters_are_in_no_group():
    net = build()
    net.head.weight.requires_grad_(False)
    assert all(p is not net.head.weight for group in parameter_groups(net, 0.1) for p in group["params"])


# Learning rate


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 0.0),
        ("cosine", 0.1, 0.2),
        ("cosine", 0.2, 0.4),
        ("cosine", 0.6, 0.2),
        ("cosine", 1.0, 0.0),
        ("onecycle", 0.0, 0.016),
        ("onecycle", 0.1, 0.208),
        ("onecycle", 0.2, 0.4),
        ("onecycle", 0.6, 0.2000008),
        ("onecycle", 1.0, 0.0000016),
        ("constant", 0.1, 0.2),
        ("constant", 0.9, 0.4),
    ],
)
def test_learning_rate_values(schedule, progress, expected):
    assert learning_rate_at(progress, 0.4, schedule, 0.2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.9])
def test_learning_rate_never_leaves_zero_to_peak(schedule, warmup):
    rates = [learning_rate_at(i / 50, 0.3, schedule, warmup) for i in range(51)]
    assert min(rates) >= 0
    assert max(rates) == pytest.approx(0.3)


def test_onecycle_is_torchs_without_the_cycle_of_momentum():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=101, pct_start=0.3, cycle_momentum=False)
    for step in range(101):
        # torch's peak falls on step 29 of 100, 0.3 * 101 - 1
        progress = step / 29.3 * 0.3 if step <= 29.3 else 0.3 + 0.7 * (step - 29.3) / (100 - 29.3)
        assert learning_rate_at(progress, 0.1, "onecycle", 0.3) == pytest.approx(torchs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if step < 100:
            torchs.step()


# One step


@pytest.mark.parametrize("name", ["bn", "bgn", "copycat", "mixer"])
def test_norm_batches_of_4_in_16_equal_gradients_accumulated_slice_by_slice(name, own_norms):
    net = build(name).double()
    literal = copy.deepcopy(net)
    x, y = batch()
    x = x.double()
    optimizer = sgd(net, learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    loss, correct = train_step(net, optimizer, x, y, StepOptions(slices=4))

    optimizer = sgd(literal, learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    losses, right = [], 0
    for k in range(4):
        logits = literal(x[k::4])
        losses.append(F.cross_entropy(logits.float(), y[k::4]))
        right += int((logits.argmax(1) == y[k::4]).sum())
        (losses[-1] / 4).backward()
    optimizer.step()

    torch.testing.assert_close(loss, torch.stack(losses).mean().detach())
    assert int(correct) == right
    for (path, new), old in zip(net.state_dict().items(), literal.state_dict().values(), strict=True):
        if isinstance(new, torch.Tensor):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", ["gn", "in", "ln", "pn", "none"])
def test_slices_change_nothing_where_samples_do_not_mix(name):
    whole, sliced = build(name), build(name)
    assert steps(whole, slices=1) == steps(sliced, slices=8)


@pytest.mark.parametrize("name", TIER1)
def test_the_same_steps_twice_are_bit_identical(name):
    first, second = build(name), build(name)
    assert steps(first, slices=2) == steps(second, slices=2)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_a_norm_under_two_names_ties_exactly(own_norms):
    assert steps(build("bn"), slices=4) == steps(build("copycat"), slices=4)


def test_label_smoothing_enters_the_loss():
    net, (x, y) = build("gn"), batch()
    expected = F.cross_entropy(net(x), y, label_smoothing=0.2)
    loss, _ = train_step(net, sgd(net, learning_rate=0.1, momentum=0, weight_decay=0), x, y, StepOptions(1, 0.2))
    torch.testing.assert_close(loss, expected.detach())


def test_a_norm_is_told_of_every_update_and_gets_its_second_look(own_norms):
    net = build("looker")
    optimizer = sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=0)
    for step in range(1, 4):
        train_step(net, optimizer, *batch(), progress=step / 3)
    for _, norm in norm_modules(net):
        assert norm.looks.tolist() == [3, 3]
        assert norm.progress == [1 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize("name", TIER1)
def test_bfloat16_steps_learn_with_float32_weights(name):
    net = build(name)
    optimizer = sgd(net, learning_rate=0.05, momentum=0.9, weight_decay=0)
    losses = [train_step(net, optimizer, *batch(), StepOptions(precision="bfloat16"))[0].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("name", TIER1)
@pytest.mark.parametrize("slices", [1, 4])
def test_a_whole_training_step_stays_on_the_meta_device(name, slices):
    net = build(name, device="meta", generator=None)
    optimizer = sgd(net, learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = torch.empty(16, 1, 16, 16, device="meta"), torch.empty(16, dtype=torch.long, device="meta")
    for _ in range(2):
        loss, correct = train_step(net, optimizer, x, y, StepOptions(slices), progress=0.5)
    assert loss.is_meta
    assert correct.is_meta
    assert all(p.grad.is_meta for p in net.parameters())


# Divergence


def test_a_loss_that_is_not_finite_names_step_and_layers():
    net = build()
    with torch.no_grad():
        net.blocks[1].first.conv.weight[0, 0, 0, 0] = math.inf
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Diverged) as caught:
        train_step(net, sgd(net, learning_rate=0.1, momentum=0.9, weight_decay=0), *batch(), step=17)
    text = str(caught.value)
    assert text.startswith("step 17: the loss is nan")
    assert "parameters blocks.1.first.conv.weight" in text
    assert "outputs blocks.1.first.conv" in text
    assert "stem" not in text
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_an_input_that_is_not_finite_is_named():
    net, (x, y) = build("gn"), batch()
    x[3, 0, 0, 0] = math.nan
    with pytest.raises(Diverged, match=r"inputs images; outputs stem\.conv"):
        train_step(net, sgd(net, learning_rate=0.1, momentum=0.9, weight_decay=0), x, y)


def test_looking_for_the_layer_moves_no_statistics():
    net, (x, _) = build(), batch()
    before = copy.deepcopy(net.state_dict())
    assert "every parameter and layer output is finite" in fit.describe_non_finite(net, x, StepOptions(2))
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_an_absurd_learning_rate_diverges():
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        steps(build("none"), count=40, lr=1e6)


def test_evaluation_that_is_not_finite_diverges():
    net, (x, y) = build(), batch()
    with torch.no_grad():
        net.head.bias[0] = math.nan
    with pytest.raises(Diverged, match=r"evaluation: the loss is nan; not finite: parameters head.bias; outputs head"):
        fit.evaluate(net, [(x, y)])


# Evaluation


@pytest.mark.parametrize("name", TIER1)
def test_evaluation_does_not_depend_on_the_batch_size(name):
    net = build(name)
    steps(net)
    x, y = batch(24, seed=9)
    whole = fit.evaluate(net, [(x, y)])
    for size in (1, 5, 24):
        parts = fit.evaluate(net, zip(x.split(size), y.split(size), strict=True))
        assert parts.top1 == whole.top1
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    logits = net.eval()(x)
    assert whole.top1 == (logits.argmax(1) == y).double().mean().item()
    assert whole.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_evaluation_restores_every_modules_mode():
    net = build()
    net.blocks[0].eval()
    before = [m.training for m in net.modules()]
    fit.evaluate(net, [batch()])
    assert [m.training for m in net.modules()] == before


def test_evaluation_sees_a_constant_output_and_refuses_no_images():
    net = build()
    assert not fit.evaluate(net, [batch(64)]).constant or not net.head.weight.any()
    with torch.no_grad():
        net.head.weight.zero_()
    assert fit.evaluate(net, [batch(64)]).constant
    with pytest.raises(ValueError, match="no images"):
        fit.evaluate(net, [])


@pytest.mark.parametrize("name", TIER1)
def test_composition_shift_is_float_noise_where_evaluation_does_not_mix(name):
    net = build(name)
    steps(net)
    assert fit.composition_shift(net, batch(17)[0]) < 1e-5


def test_composition_shift_finds_mixing_in_evaluation(own_norms):
    assert fit.composition_shift(build("mixer"), batch(16)[0]) > 0.01


# Recalibration


@pytest.mark.parametrize("slices", [1, 4])
def test_recalibration_mends_corrupted_statistics_on_a_copy(slices):
    net = build()
    steps(net, count=20)
    images = torch.cat([batch(seed=s)[0] for s in range(20)])
    good = fit.recalibrated(net, images.split(16), slices).eval()(images)
    for _, norm in norm_modules(net):
        norm.running_mean += 3
        norm.running_var *= 100
    bad = net.eval()(images)
    net.train()
    corrupted = copy.deepcopy(net.state_dict())
    mended = fit.recalibrated(net, images.split(16), slices)
    assert all(torch.equal(b, corrupted[n]) for n, b in net.state_dict().items())
    torch.testing.assert_close(mended.eval()(images), good)
    assert (bad - good).abs().max() > 0.5


def test_measurements_run_in_the_precision_of_the_run():
    net, (x, y) = build("bn"), batch()
    seen = []
    net.stem.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        fit.evaluate(net, [(x, y)], precision)
        fit.composition_shift(net, x, precision)
        fit.recalibrated(net, [x], 2, precision)
        assert set(seen) == {dtype}
        assert len(seen) == 4
        seen.clear()


def test_the_clock_waits_for_every_kind_of_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name, times in (("cpu", 0), ("cuda:1", 2), ("mps", 2), ("xpu", 2)):
        with cost.StepClock(torch.device(name)):
            pass
        assert waited == [torch.device(name)] * times
        waited.clear()


@pytest.mark.parametrize(("name", "keeps"), [("bn", True), ("bgn", True), ("gn", False), ("none", False)])
def test_keeps_stats_reads_the_stamp(name, keeps):
    assert fit.keeps_stats(build(name)) is keeps


# Cost


def test_norm_sizes_count_values():
    channels = 8 + 8 + 8 + 16 + 16 + 32 + 32
    assert cost.norm_sizes(build("bn")) == (2 * channels, 2 * channels + 7)
    assert cost.norm_sizes(build("gn")) == (2 * channels, 0)
    assert cost.norm_sizes(build("none")) == (2 * channels, 0)


def test_the_clock_leaves_out_warm_up_and_takes_the_median():
    clock = cost.StepClock(torch.device("cpu"))
    with pytest.raises(ValueError, match="no step"):
        clock.median()
    with clock:
        pass
    assert len(clock.seconds) == 1
    clock.seconds = [9.0, 9, 9, 9, 9, 1, 3, 2, *[2.0] * 12]
    assert clock.median() == 2
    clock.seconds = [9.0, 1, 1, 1]
    assert clock.median() == 1


def test_peak_memory_sees_what_was_allocated_and_freed():
    memory = cost.PeakMemory(torch.device("cpu"))
    block = torch.ones(16 * 2**20)
    del block
    assert 60 < memory.megabytes() < 120
