"""Backbones: shapes, known sizes, equal initial weights for every norm, and the pairing of conv, norm, activation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from parts.norm_choices import TIER1
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from norms import registry
from norms.protocol import NormInfo, norm_modules
from norms.registry import make_norm
from tasks.base import RunContext
from tasks.nets.blocks import conv_norm_act
from tasks.nets.init import initialize
from tasks.nets.models import MODELS, build_net
from tasks.nets.resnet import CIFAR_DEPTHS, BasicBlock
from tasks.nets.torchvision import TORCHVISION

OWN = (*CIFAR_DEPTHS, "resnet18_narrow", "resnet18_cifar")


def norm_named(name):
    """A tier-1 factory whose options suit the narrow nets."""
    options = {"gn": {"num_groups": 8}, "bgn": {"num_groups": 4}}
    return make_norm(name, **options.get(name, {}))


def generator(seed):
    return RunContext(torch.device("cpu"), seed, None, None).generator


@pytest.fixture
def own_norms():
    """Norms of a user, known to the registry for one test only."""

    @registry.register(name="odd", source="test", mixes_samples=False, keeps_stats=False)
    class Odd(nn.Module):
        """Learned parts with other names, shapes and random draws of their own."""

        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.inner = nn.Linear(num_channels, num_channels)
            self.table = nn.Parameter(torch.randn(num_channels, 3))

        def forward(self, x):
            return x + self.inner(x.mean((2, 3)))[..., None, None] * self.table.sum()

    @registry.register(
        name="fused", source="test", mixes_samples=False, keeps_stats=False, needs=frozenset({"activation"})
    )
    class Fused(nn.Module):
        def __init__(self, num_channels, *, activation=None, affine: bool = True):
            super().__init__()
            if activation is None:
                raise ValueError("fused needs an activation right after it")
            self.activation = activation

        def forward(self, x):
            return self.activation(x - 1) + 1

    @registry.register(
        name="sees_weight", source="test", mixes_samples=False, keeps_stats=False, needs=frozenset({"conv_weight"})
    )
    class SeesWeight(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x, *, weight):
            return x + weight.mean((1, 2, 3))[:, None, None]

    @registry.register(name="doubles_weight", source="test", mixes_samples=False, keeps_stats=False)
    class DoublesWeight(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def transform_weight(self, weight):
            return 2 * weight

        def forward(self, x):
            return x


@pytest.mark.parametrize("name", TIER1)
@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow"])
def test_own_nets_give_one_logit_per_class_in_both_modes(model, name):
    net = build_net(model, norm_named(name), num_classes=7, in_channels=1, generator=generator(0))
    x = torch.randn(4, 1, 32, 32)
    assert net(x).shape == (4, 7)
    assert net.eval()(x).shape == (4, 7)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_and_runs_on_meta_with_our_norms_only(model):
    net = build_net(model, make_norm("bn"), num_classes=5, in_channels=3, device="meta")
    assert net(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)
    ours = {id(part) for _, norm in norm_modules(net) for part in norm.modules()}
    foreign = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    assert ours
    assert not [m for m in net.modules() if isinstance(m, foreign) and id(m) not in ours]


@pytest.mark.parametrize(
    ("model", "classes", "parameters"),
    [
        # He et al. 2015, table 6 (0.27M, 0.46M, 0.66M, 0.85M, 1.7M), exact numbers for shortcuts without parameters
        ("resnet20", 10, 269_722),
        ("resnet32", 10, 464_154),
        ("resnet44", 10, 658_586),
        ("resnet56", 10, 853_018),
        ("resnet110", 10, 1_727_962),
        # the number that training logs of ResNet-18 on CIFAR-10 commonly print
        ("resnet18_cifar", 10, 11_173_962),
        # torchvision's own documentation
        ("resnet18", 1000, 11_689_512),
        ("resnet50", 1000, 25_557_032),
    ],
)
def test_known_parameter_counts(model, classes, parameters):
    net = build_net(model, make_norm("bn"), num_classes=classes, in_channels=3, device="meta")
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("width", [4, 32])
def test_width_scales_every_stage(width):
    net = build_net("resnet18_narrow", make_norm("bn"), num_classes=5, in_channels=1, width=width, device="meta")
    channels = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert min(channels) == width
    assert max(channels) == 8 * width


@pytest.mark.parametrize("model", OWN)
def test_no_convolution_has_a_bias_and_no_activation_is_in_place(model):
    net = build_net(model, make_norm("none"), num_classes=5, in_channels=3, device="meta")
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    assert not any(getattr(m, "inplace", False) for m in net.modules())


@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow", "resnet18", "mobilenet_v3_small"])
def test_initial_weights_do_not_depend_on_the_norm(model, own_norms):
    def weights(name):
        torch.manual_seed(len(name))  # the caller's stream must not matter
        net = build_net(model, make_norm(name), num_classes=3, in_channels=1, generator=generator(5))
        inside = {id(p) for _, norm in norm_modules(net) for p in norm.parameters()}
        return {n: p for n, p in net.named_parameters() if id(p) not in inside}

    reference = weights("bn")
    assert len(reference) >= 9
    for name in ("none", "pn", "odd"):
        other = weights(name)
        assert other.keys() == reference.keys()
        assert all(torch.equal(p, reference[n]) for n, p in other.items()), name


def test_initial_weights_follow_seed_and_name():
    def build(seed):
        return build_net("resnet8", make_norm("bn"), num_classes=3, in_channels=16, generator=generator(seed))

    first, same, other = build(0), build(0), build(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    stem, block = first.stem.conv.weight, first.blocks[0].first.conv.weight
    assert stem.shape == block.shape
    assert not torch.equal(stem, block)
    assert not torch.equal(stem, other.stem.conv.weight)


def test_convolutions_start_with_he_variance():
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(64, 64, 3, groups=8), nn.Linear(400, 500))
    initialize(net, generator(0))
    assert net[0].weight.var().item() == pytest.approx(2 / (128 * 9), rel=0.03)
    assert net[1].weight.var().item() == pytest.approx(2 / (8 * 9), rel=0.06)
    assert net[2].weight.abs().max().item() == pytest.approx(0.05, rel=0.01)
    assert all(not m.bias.any() for m in net)


def test_a_norms_own_parameters_keep_their_values(own_norms):
    net = build_net("resnet8", make_norm("odd"), num_classes=3, in_channels=1, generator=generator(0))
    assert net.stem.norm.inner.bias.abs().sum() > 0  # initialize would have set a linear layer's bias to zero


def test_building_leaves_the_global_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build_net("resnet8", make_norm("bn"), num_classes=3, in_channels=1, generator=generator(0))
    assert torch.equal(torch.rand(3), expected)


def test_conv_norm_act_is_activation_of_norm_of_conv():
    block = conv_norm_act(3, 8, 3, 2, norm=make_norm("gn", num_groups=2), activation=nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    expected = F.relu(F.group_norm(F.conv2d(x, block.conv.weight, stride=2, padding=1), 2))
    torch.testing.assert_close(block(x), expected)


def test_a_fused_norm_applies_its_activation_once(own_norms):
    block = conv_norm_act(3, 8, 1, norm=make_norm("fused"), activation=nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(block(x), F.relu(F.conv2d(x, block.conv.weight) - 1) + 1)
    with pytest.raises(ValueError, match="fused needs an activation"):
        conv_norm_act(3, 8, 1, norm=make_norm("fused"), activation=None)
    with pytest.raises(ValueError, match="fused needs an activation"):
        build_net("resnet8", make_norm("fused"), num_classes=3, in_channels=1)


def test_the_conv_weight_reaches_the_norm_by_call_and_carries_gradient(own_norms):
    block = conv_norm_act(3, 8, 3, norm=make_norm("sees_weight"), activation=None)
    x = torch.zeros(2, 3, 5, 5)
    block(x).sum().backward()
    torch.testing.assert_close(block.conv.weight.grad, torch.full_like(block.conv.weight, 50 / 27))
    clone = copy.deepcopy(block)
    with torch.no_grad():
        clone.conv.weight.fill_(2.0)
    torch.testing.assert_close(clone(x), torch.full((2, 8, 5, 5), 2.0))


def test_the_norms_weight_transform_is_applied(own_norms):
    block = conv_norm_act(3, 8, 3, norm=make_norm("doubles_weight"), activation=None)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(block(x), F.conv2d(x, 2 * block.conv.weight, padding=1))


@pytest.mark.parametrize("name", ["sees_weight", "fused", "doubles_weight"])
def test_torchvision_refuses_norms_that_need_more_than_x(name, own_norms):
    with pytest.raises(ValueError, match=f'norm "{name}".*torchvision'):
        build_net("resnet18", make_norm(name), num_classes=3, in_channels=3, device="meta")


@pytest.mark.parametrize("name", TIER1)
def test_zero_gamma_makes_residual_blocks_pass_their_shortcut(name):
    net = build_net(
        "resnet8", norm_named(name), num_classes=3, in_channels=1, zero_init_last_gamma=True, generator=generator(0)
    )
    x = torch.rand(2, 16, 8, 8)
    blocks = [m for m in net.modules() if isinstance(m, BasicBlock)]
    assert len(blocks) == 3
    torch.testing.assert_close(blocks[0](x), x)


@pytest.mark.parametrize(("model", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_zero_gamma_reaches_torchvisions_blocks(model, blocks):
    net = build_net(model, make_norm("gn"), num_classes=3, in_channels=3, zero_init_last_gamma=True)
    zero = [n for n, m in norm_modules(net) if not m.weight.any()]
    last = "bn3" if model == "resnet50" else "bn2"
    assert len(zero) == blocks
    assert all(n.endswith(last) for n in zero)


def test_zero_gamma_without_a_gamma_is_refused(own_norms):
    with pytest.raises(ValueError, match='norm "odd" has no parameter named weight'):
        build_net("resnet8", make_norm("odd"), num_classes=3, in_channels=1, zero_init_last_gamma=True)
    with pytest.raises(ValueError, match="mobilenet_v2"):
        build_net("mobilenet_v2", make_norm("bn"), num_classes=3, in_channels=3, zero_init_last_gamma=True)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models_take_any_number_of_channels(model, channels):
    net = build_net(model, make_norm("bn"), num_classes=3, in_channels=channels, device="meta")
    assert net(torch.empty(2, channels, 32, 32, device="meta")).shape == (2, 3)
    assert not any(getattr(m, "inplace", False) for m in net.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet19"}, 'unknown model "resnet19".*did you mean'),
        ({"model": "resnet18", "width": 8}, "no width option"),
        ({"model": "resnet8", "width": 0}, "at least 1"),
    ],
)
def test_wrong_models_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_net(norm=make_norm("bn"), num_classes=3, in_channels=3, **arguments)


def test_a_norm_that_is_no_factory_is_refused():
    with pytest.raises(ValueError, match="not a factory from make_norm"):
        build_net("resnet8", nn.BatchNorm2d, num_classes=3, in_channels=3)


@pytest.mark.parametrize("name", TIER1)
@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow", "resnet18"])
def test_a_forward_on_a_fake_cuda_device_makes_no_tensor_elsewhere(model, name):
    with FakeTensorMode():
        net = build_net(model, norm_named(name), num_classes=5, in_channels=1, device="cuda:0")
        x = torch.empty(4, 1, 64, 64, device="cuda:0")
        for training in (True, False):
            assert net.train(training)(x).device == torch.device("cuda:0")


def test_every_norm_of_a_net_carries_its_stamp():
    net = build_net("resnet8", make_norm("bn"), num_classes=5, in_channels=1)
    infos = [norm.norm_info for _, norm in norm_modules(net)]
    assert len(infos) == 7
    assert all(isinstance(info, NormInfo) and info.name == "bn" for info in infos)
    assert set(TORCHVISION) < set(MODELS)
