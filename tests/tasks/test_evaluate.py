"""tasks.evaluate: accuracy and loss, composition shift, recalibrated copies."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parts import steps as small
from parts.norm_choices import TIER1
from parts.steps import batch, build, steps

from norms.protocol import norm_modules
from tasks.base import Diverged
from tasks.evaluate import composition_shift, evaluate, keeps_stats, recalibrated

pytestmark = pytest.mark.usefixtures("one_thread")
own_norms = small.own_norms


@pytest.mark.parametrize("name", TIER1)
def test_evaluation_does_not_depend_on_the_batch_size(name):
    net = build(name)
    steps(net)
    x, y = batch(24, seed=9)
    whole = evaluate(net, [(x, y)])
    for size in (1, 5, 24):
        parts = evaluate(net, zip(x.split(size), y.split(size), strict=True))
        assert parts.top1 == whole.top1
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    logits = net.eval()(x)
    assert whole.top1 == (logits.argmax(1) == y).double().mean().item()
    assert whole.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_evaluation_restores_every_modules_mode():
    net = build()
    net.blocks[0].eval()
    before = [m.training for m in net.modules()]
    evaluate(net, [batch()])
    assert [m.training for m in net.modules()] == before


def test_evaluation_sees_a_constant_output_and_refuses_no_images():
    net = build()
    assert not evaluate(net, [batch(64)]).constant or not net.head.weight.any()
    with torch.no_grad():
        net.head.weight.zero_()
    assert evaluate(net, [batch(64)]).constant
    with pytest.raises(ValueError, match="no images"):
        evaluate(net, [])


@pytest.mark.parametrize("name", TIER1)
def test_composition_shift_is_float_noise_where_evaluation_does_not_mix(name):
    net = build(name)
    steps(net)
    assert composition_shift(net, batch(17)[0]) < 1e-5


def test_composition_shift_finds_mixing_in_evaluation(own_norms):
    assert composition_shift(build("mixer"), batch(16)[0]) > 0.01


def test_evaluation_that_is_not_finite_diverges():
    net, (x, y) = build(), batch()
    with torch.no_grad():
        net.head.bias[0] = math.nan
    with pytest.raises(Diverged, match=r"evaluation: the loss is nan; not finite: parameters head.bias; outputs head"):
        evaluate(net, [(x, y)])


# Recalibration


@pytest.mark.parametrize("slices", [1, 4])
def test_recalibration_mends_corrupted_statistics_on_a_copy(slices):
    net = build()
    steps(net, count=20)
    images = torch.cat([batch(seed=s)[0] for s in range(20)])
    good = recalibrated(net, images.split(16), slices).eval()(images)
    for _, norm in norm_modules(net):
        norm.running_mean += 3
        norm.running_var *= 100
    bad = net.eval()(images)
    net.train()
    corrupted = copy.deepcopy(net.state_dict())
    mended = recalibrated(net, images.split(16), slices)
    assert all(torch.equal(b, corrupted[n]) for n, b in net.state_dict().items())
    torch.testing.assert_close(mended.eval()(images), good)
    assert (bad - good).abs().max() > 0.5


def test_measurements_run_in_the_precision_of_the_run():
    net, (x, y) = build("bn"), batch()
    seen = []
    net.stem.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        evaluate(net, [(x, y)], precision)
        composition_shift(net, x, precision)
        recalibrated(net, [x], 2, precision)
        assert set(seen) == {dtype}
        assert len(seen) == 4
        seen.clear()


@pytest.mark.parametrize(("name", "keeps"), [("bn", True), ("bgn", True), ("gn", False), ("none", False)])
def test_keeps_stats_reads_the_stamp(name, keeps):
    assert keeps_stats(build(name)) is keeps
