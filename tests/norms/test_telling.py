"""A norm that follows the course of training, in a loop that does not tell it of its updates."""

import copy
import warnings

import pytest
import torch
from torch import nn

from norms.registry import make_norm, norm_info, norm_names
from norms.situation import after_update, hold
from norms.telling import UNTOLD
from tasks.nets.blocks import conv_norm_act

LONG = UNTOLD + 2
FOLLOWING = ["mbn", "cbn", "brn", "mabn"]


def network(name, layers=2):
    norm = make_norm(name)
    blocks = [conv_norm_act(4, 4, 3, norm=norm, activation=nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*blocks)


def train(net, steps, tell):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(steps):
        x = torch.randn(4, 4, 5, 5)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        if tell:
            after_update(net, lambda x=x: net(x), (step + 1) / steps)


def test_the_norms_that_follow_are_those_that_the_tests_name():
    def follows(name):
        norm = network(name, 1)[0].norm
        return norm_info(name).keeps_stats and hasattr(norm, "after_update")

    plain = [name for name in norm_names(without=["domain", "context"]) if name not in ("evonorm_s0", "proxy")]
    with_groups = {"gn", "ws_gn", "bcn", "bgn"}
    assert [name for name in plain if name not in with_groups and follows(name)] == FOLLOWING


@pytest.mark.parametrize("name", FOLLOWING)
def test_one_warning_stands_for_a_network_and_names_the_call(name):
    with pytest.warns(UserWarning, match=rf'norm "{name}".*norms\.after_update\(net, again, progress\)') as caught:
        train(network(name), LONG, tell=False)
    assert len(caught) == 1


@pytest.mark.parametrize("name", [*FOLLOWING, "bn", "online"])
def test_nothing_is_said_where_the_loop_tells_or_nothing_is_to_be_told(name):
    train(network(name), LONG, tell=name in FOLLOWING)


def test_each_factory_warns_by_itself_and_copies_of_a_network_do_not_share_their_counts():
    for _ in range(2):
        net = network("brn")
        twin = copy.deepcopy(net)
        with pytest.warns(UserWarning, match="brn"):
            train(net, LONG, tell=False)
        with pytest.warns(UserWarning, match="brn"):
            train(twin, LONG, tell=False)


def test_trials_inside_hold_and_forwards_without_gradient_are_no_updates():
    net = network("brn")
    with warnings.catch_warnings(), hold(net):
        warnings.simplefilter("error")
        train(net, LONG, tell=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(LONG):
            net(torch.randn(4, 4, 5, 5))
            for parameter in net.parameters():
                parameter.mul_(0.9)


def test_a_copy_made_inside_hold_is_watched():
    net = network("brn")
    with hold(net):
        twin = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="brn"):
        train(twin, 12, tell=False)


def test_several_forwards_before_one_update_are_one_update():
    net = network("brn")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(UNTOLD):  # one update less can be seen
            for _ in range(2):
                net(torch.randn(4, 4, 5, 5)).square().sum().backward()
            optimizer.step()


def test_an_optimizer_that_tries_weights_within_a_step_is_told_once_a_step():
    net, x = network("brn"), torch.randn(4, 4, 5, 5)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = net(x).square().sum()
        value.backward()
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.step(loss)
            after_update(net, lambda: net(x), (step + 1) / 3)
