"""tasks.schedule: which parameters are decayed, and the learning rate of every schedule."""

import pytest
import torch
from parts import steps as small
from parts.norm_choices import TIER1
from parts.steps import build
from torch import nn

from tasks.schedule import learning_rate_at, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")
own_norms = small.own_norms


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
