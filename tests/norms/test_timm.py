"""The factory of make_norm as `norm_layer=` of timm, which takes a partial apart and a function for something else."""

import functools
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import get_norm_act_layer, get_norm_layer
from torch import nn

import norms
from norms.convert import audit_norms
from norms.factory import factory_info
from norms.protocol import norm_modules
from norms.registry import norm_info, norm_names, norm_option_defaults

BGN = norms.make_norm("bgn", num_groups=8)


def train_a_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    optimizer.step()
    return [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]


@pytest.mark.parametrize(
    "name", ["resnet18", "seresnet18", "resnest14d", "fasternet_t0", "test_resnet", "resnetblur18"]
)
def test_a_model_of_timm_has_our_norms_everywhere_and_trains(name):
    torch.manual_seed(0)
    net = timm.create_model(name, norm_layer=BGN, num_classes=4)
    audit = audit_norms(net)
    assert not audit.left
    assert len(audit.ours) > 10
    assert any(train_a_step(net))
    assert {int(norm.num_batches_tracked) for _, norm in norm_modules(net)} == {1}
    assert {norm.num_groups for _, norm in norm_modules(net)} == {8}


@pytest.mark.parametrize("name", norm_names())
def test_timm_hands_back_what_builds_the_same_layer(name):
    options = {"num_groups": 4} if "num_groups" in norm_option_defaults(name) else {}
    factory = norms.make_norm(name, **options)
    taken = get_norm_layer(factory)
    layer = taken(8, affine=False)
    assert layer.norm_info is norm_info(name) is factory_info(factory)
    assert repr(layer) == repr(factory(8, affine=False))


@pytest.mark.parametrize("name", ["efficientnet_b0", "densenet121", "regnetx_002", "resnetv2_50"])
def test_a_model_that_wants_the_activation_in_the_norm_is_refused_and_does_not_lose_its_activations(name):
    """timm takes any function for a norm with the activation in it. These go through norms.converted."""
    with pytest.raises(AssertionError, match=r"No equivalent norm_act layer for norms\.bgn"):
        timm.create_model(name, norm_layer=BGN)


@pytest.mark.parametrize("key", ["batchnorm", "batchnorm2d", "groupnorm", "layernorm", "rmsnorm"])
def test_no_norm_of_ours_is_taken_for_one_of_timms(key):
    assert get_norm_act_layer(key) is not None
    for name in norm_names():
        assert norms.make_norm(name).func.__name__ != key


def test_a_factory_takes_no_argument_that_it_does_not_know():
    for unknown in ({"eps": 1e-3}, {"inplace": True}, {"apply_act": False}, {"num_features": 8}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(unknown))}'"):
            BGN(8, **unknown)


def test_a_factory_is_a_partial_without_arguments_that_shows_its_signature():
    assert isinstance(BGN, functools.partial)
    assert (BGN.args, BGN.keywords) == ((), {})
    assert [*inspect.signature(BGN).parameters] == ["num_channels", "affine", "device", "dtype", "activation"]
    assert repr(norms.make_norm("gn", num_groups=4)) == "make_norm('gn', num_groups=4, eps=1e-05)"
    bare = functools.partial(BGN, affine=False)(8)
    assert (bare.weight, bare.num_groups) == (None, 8)


def test_factories_are_told_apart_as_objects():
    """timm and torchvision put what they are given into sets and dicts."""
    twin = norms.make_norm("bgn", num_groups=8)
    assert twin.options == BGN.options
    assert len({BGN, twin, nn.BatchNorm2d}) == 3
