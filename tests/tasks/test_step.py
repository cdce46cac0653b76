"""tasks.step: one update, norm batches inside it, precision, and what a loss that is not finite says."""

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
from tasks.schedule import sgd
from tasks.step import StepOptions, describe_non_finite, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
own_norms = small.own_norms


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
        losses.append(F.cross_entropy(logits, y[k::4]))
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
    assert "every parameter and layer output is finite" in describe_non_finite(net, x, StepOptions(2))
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_an_absurd_learning_rate_diverges():
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        steps(build("none"), count=40, lr=1e6)
