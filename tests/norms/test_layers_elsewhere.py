"""docs/layers-elsewhere.md: what tools of torch and timm do to a norm of ours, and that the way around is right."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import norms
from norms.protocol import norm_modules
from norms.registry import norm_info, norm_names, norm_option_defaults

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "layers-elsewhere.md").read_text(encoding="utf-8")
NORMS = norm_names()
ALONE = norm_names(without={"conv_weight"})
KEEPING = [name for name in ALONE if norm_info(name).keeps_stats]
REMEMBERING = {"cbn", "mbn", "brn", "mabn", "online"}
"""Norms whose training output depends on earlier batches."""


def layer(name, channels=8):
    info, defaults = norm_info(name), norm_option_defaults(name)
    options = {k: v for k, v in {"num_groups": 4, "num_domains": 2}.items() if k in defaults}
    activation = nn.ReLU() if "activation" in info.needs else None
    return norms.make_norm(name, **options)(channels, activation=activation)


def network(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), layer(name), nn.Conv2d(8, 4, 1))


def told(net, name):
    needs = norm_info(name).needs
    return norms.situation(net, domain=0 if "domain" in needs else None, part="context" if "context" in needs else None)


def batch(offset=1.0):
    return torch.randn(8, 3, 7, 7) + offset


def state(net):
    return {key: value.clone() for key, value in net.named_buffers()}


def row_of(tool):
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and tool in line.split("|")[1]]
    return row


@pytest.mark.parametrize("name", NORMS)
def test_no_norm_of_ours_is_an_instance_of_torchs_batch_norm_and_is_converted_to_sync(name):
    kinds = [type(part) for part in layer(name).modules()]
    assert not any(issubclass(kind, _BatchNorm) for kind in kinds)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer(name)))
    assert [type(part) for part in converted[0].modules()] == kinds


def test_the_page_lists_the_norms_that_torchattacks_takes_for_batch_norm():
    ours = {n for n in NORMS if any("BatchNorm" in type(part).__name__ for part in layer(n).modules())}
    listed, others = row_of("torchattacks").split("class name:")[1].split(", and not")
    assert set(re.findall(r"`(\w+)`", listed)) == ours
    assert not set(re.findall(r"`(\w+)`", others.split("...")[0])) & ours


@pytest.mark.parametrize("name", KEEPING)
def test_update_bn_does_nothing_and_recalibrate_does(name):
    net = network(name)
    with told(net, name):
        net(batch())
        before = state(net)
        update_bn([batch(5.0)], net)
        assert all(torch.equal(value, before[key]) for key, value in net.named_buffers())
        norms.recalibrate(net, [batch(5.0)] * 4, domain=net[1].situation.domain)
    assert not all(torch.equal(value, before[key]) for key, value in net.named_buffers())


@pytest.mark.parametrize("name", KEEPING)
def test_an_averaged_model_is_evaluated_with_its_own_statistics_after_recalibrate(name):
    net = network(name)
    with told(net, name):
        net(batch())
        average = AveragedModel(net)
        for _ in range(2):
            with torch.no_grad():
                net[0].weight.mul_(3)
            net(batch())
            average.update_parameters(net)
    before = state(average)
    needs = norm_info(name).needs
    norms.recalibrate(average, [batch() for _ in range(4)], domain=0 if "domain" in needs else None)
    assert not all(torch.equal(value, before[key]) for key, value in average.named_buffers())
    with told(average, name):
        assert average.eval()(batch()).isfinite().all()


def gradients(net, forward, name):
    net.zero_grad()
    with told(net, name):
        forward().square().sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def assert_equal_gradients(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)


def trained(name):
    net = network(name)
    for _ in range(3):
        with told(net, name):
            net(batch())
    norms.after_update(net, lambda: None, progress=1.0)
    return net


@pytest.mark.parametrize("name", [name for name in ALONE if name not in REMEMBERING])
def test_checkpointing_moves_statistics_once_where_the_second_forward_is_held(name):
    net = trained(name)
    twin, held, x = copy.deepcopy(net), copy.deepcopy(net), batch()
    expected = gradients(net, lambda: net(x), name)
    found = gradients(twin, lambda: checkpoint(twin, x, use_reentrant=False), name)
    assert_equal_gradients(found, expected)
    if name in KEEPING and norm_info(name).mixes_samples and hasattr(net[1], "num_batches_tracked"):
        assert not torch.equal(twin[1].num_batches_tracked, net[1].num_batches_tracked)

    def contexts():
        return contextlib.nullcontext(), norms.hold(held)

    found = gradients(held, lambda: checkpoint(held, x, use_reentrant=False, context_fn=contexts), name)
    assert_equal_gradients(found, expected)
    for key, value in held.named_buffers():
        torch.testing.assert_close(value, net.get_buffer(key))


@pytest.mark.parametrize("name", ALONE)
def test_checkpointing_inside_hold_has_right_gradients_for_every_norm_and_moves_nothing(name):
    net = trained(name)
    twin, x = copy.deepcopy(net), batch()
    expected = gradients(net, lambda: net(x), name)
    before = state(twin)
    with norms.hold(twin):
        found = gradients(twin, lambda: checkpoint(twin, x, use_reentrant=False), name)
    assert_equal_gradients(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in twin.named_buffers())


def test_the_page_lists_what_timm_decays_of_our_norms_and_how_to_spare_it():
    decayed = {}
    for name in NORMS:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), layer(name))
        names = {id(p): key.split(".")[1] for key, p in net[1:].named_parameters()}
        for group in param_groups_weight_decay(net, 0.1):
            if group["weight_decay"]:
                found = {names[id(p)] for p in group["params"] if id(p) in names}
                decayed |= {name: found} if found else {}
        spared = {p for _, norm in norm_modules(net) for p in norm.parameters()}
        assert spared == set(net[1].parameters())
    assert decayed == {
        "dsbn": {"weight"},
        "dual_bn": {"weight"},
        "sabn": {"domain_weight", "domain_bias"},
    }
    assert all(f"`{name}`" in row_of("param_groups_weight_decay") for name in decayed)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ALONE)
def test_a_parametrized_or_pruned_norm_computes_with_the_new_weight_and_keeps_its_stamp(name):
    x = batch()
    for change in ("parametrize", "prune"):
        net = network(name)
        with torch.no_grad():
            net[1].weight.copy_(torch.linspace(0.5, 2, net[1].weight.numel()).view_as(net[1].weight))
        plain = copy.deepcopy(net)
        with torch.no_grad():
            if change == "parametrize":
                parametrize.register_parametrization(net[1], "weight", Doubled())
                plain[1].weight.mul_(2)
            else:
                prune.l1_unstructured(net[1], "weight", 0.5)
                plain[1].weight.mul_(net[1].weight_mask)
        with told(net, name), told(plain, name):
            torch.testing.assert_close(net(x), plain(x))
        assert [norm.norm_info.name for _, norm in norm_modules(net)] == [name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NORMS)
def test_fuse_modules_refuses_every_norm_of_ours(name):
    with pytest.raises((AssertionError, NotImplementedError), match="did not find fuser method"):
        fuse_modules(nn.Sequential(nn.Conv2d(3, 8, 3), layer(name)).eval(), [["0", "1"]])


def fused_by_torch(net, name):
    """Whether fuse_conv_bn_eval computes the same as the two layers; None where it raises."""
    conv, norm = net.eval()[0], net[1]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        try:
            fused = fuse_conv_bn_eval(conv, norm)
        except (AttributeError, RuntimeError):
            return None
        x = batch()
        weight = norm.transform_weight(conv.weight) if hasattr(norm, "transform_weight") else conv.weight
        with told(norm, name):
            return torch.allclose(fused(x), norm(F.conv2d(x, weight)), atol=1e-4)


def test_the_page_lists_the_norms_that_torch_fuses_into_another_function():
    wrong, right = row_of("fuse_conv_bn_eval").split("another function:")[1].split(". Right:")
    found = {name: fused_by_torch(trained(name), name) for name in ALONE}
    assert {name for name, same in found.items() if same is False} == set(re.findall(r"`(\w+)`", wrong))
    right = set(re.findall(r"`(\w+)`", right.split("where G = C")[0]))
    assert {name for name, same in found.items() if same} == right - {"bgn"}
    whole = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norms.make_norm("bgn", num_groups=8)(8))
    whole(batch())
    assert fused_by_torch(whole, "bgn")
