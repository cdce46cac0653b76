"""ws_gn and ws_bn against literal float64 transcriptions, with the convolution before them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from norms.registry import make_norm
from norms.situation import situation
from tasks.nets.blocks import ConvNormAct, conv_norm_act
from tasks.nets.models import build_net

NAMES = ["ws_gn", "ws_bn"]
OPTIONS = {"ws_gn": {"num_groups": 2}, "ws_bn": {}}


def build(name, channels=6, **contract):
    layer = make_norm(name, **OPTIONS[name])(channels, **contract)
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
            layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer


def literal_weight(weight):
    """(W - mean) / (std + 1e-5) of each output filter, std unbiased, in a loop."""
    filters = []
    for w in weight:
        mean = w.sum() / w.numel()
        std = torch.sqrt(((w - mean) ** 2).sum() / (w.numel() - 1))
        filters.append((w - mean) / (std + 1e-5))
    return torch.stack(filters)


def literal(name, layer, x, weight, groups=1):
    """A convolution with the literal weight, then torch's own norm."""
    y = F.conv2d(x, literal_weight(weight), padding=weight.shape[2] // 2, groups=groups)
    if name == "ws_gn":
        return F.group_norm(y, 2, layer.weight, layer.bias)
    return F.batch_norm(y, None, None, layer.weight, layer.bias, True)


def apply(layer, x, weight, groups=1):
    return layer(F.conv2d(x, layer.transform_weight(weight), padding=weight.shape[2] // 2, groups=groups))


@pytest.mark.parametrize(
    "shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3), (6, 2, 5), (6, 2, 3, 2, 2), (6, 3)], ids=str
)
def test_the_weight_is_standardized_per_filter_with_the_unbiased_deviation(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(shape, dtype=torch.float64)
    for name in NAMES:
        got, want = build(name).transform_weight(weight), literal_weight(weight)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, weight, pull), torch.autograd.grad(want, weight, pull), atol=1e-9, rtol=1e-6
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (1, 1), (3, 4)])
def test_with_its_convolution_is_the_equation_in_outputs_and_gradients(name, affine, kernel, groups):
    torch.manual_seed(0)
    channels = 4 if groups == 4 else 6
    layer = build(name, channels, affine=affine, dtype=torch.float64)
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 4 // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    y, truth = apply(layer, x, weight, groups), literal(name, layer, x, weight, groups)
    torch.testing.assert_close(y, truth)
    inputs, dy = [x, weight, *layer.parameters()], torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(truth, inputs, dy), atol=1e-9, rtol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives_reach_the_raw_weight_exactly(name):
    torch.manual_seed(0)
    layer = build(name, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(x, weight):
        return apply(layer, x, weight)

    assert torch.autograd.gradcheck(f, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, weight), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_shift_of_a_filter_change_nothing(name):
    torch.manual_seed(0)
    layer = build(name, dtype=torch.float64)
    x, weight = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    a = torch.linspace(0.5, 4, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    b = torch.linspace(-2, 2, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    # the 1e-5 beside standard deviations of about 1 is what the difference may be
    torch.testing.assert_close(apply(layer, x, a * weight + b), apply(layer, x, weight), atol=5e-5, rtol=5e-5)
    plain = make_norm(name.removeprefix("ws_"), **OPTIONS[name])(6).double()
    convolved = [F.conv2d(x, w, padding=1) for w in (a * weight + b, weight)]
    assert (plain(convolved[0]) - plain(convolved[1])).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_standardized_weight_is_left_alone_and_the_norm_is_then_plain(name):
    torch.manual_seed(0)
    layer = build(name)
    plain = make_norm(name.removeprefix("ws_"), **OPTIONS[name])(6)
    plain.load_state_dict(layer.state_dict())
    weight = torch.randn(6, 4, 3, 3)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    x = torch.randn(3, 4, 5, 5)
    # the filter's deviation of 1 becomes 1 / (1 + 1e-5)
    torch.testing.assert_close(layer.transform_weight(weight), weight / (1 + 1e-5), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(apply(layer, x, weight), plain(F.conv2d(x, weight, padding=1)), atol=5e-5, rtol=5e-5)
    # called on what no convolution made, it is gn or bn exactly
    y = torch.randn(3, 6, 4, 4)
    plain.load_state_dict(layer.state_dict())
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(y), plain.train(mode)(y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_standardized_in_float32_or_better_and_keep_type_and_layout(name, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(6, 4, 3, 3) + 50).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = weight.clone()
    got = build(name).transform_weight(weight)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, kept)
    torch.testing.assert_close(got, literal_weight(weight.double()).to(dtype), atol=1e-4, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_filter_becomes_zero_with_finite_gradients(name):
    weight = torch.full((6, 4, 3, 3), 0.3, requires_grad=True)
    got = build(name).transform_weight(weight)
    torch.testing.assert_close(got, torch.zeros_like(got), atol=5e-3, rtol=0)
    (grad,) = torch.autograd.grad(got.square().sum() + got.sum(), weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_of_one_weight_is_a_clear_value_error(name):
    with pytest.raises(ValueError, match=r"more than one weight per output filter .* \(6, 1, 1, 1\)"):
        build(name).transform_weight(torch.randn(6, 1, 1, 1))
    with pytest.raises(ValueError, match="more than one weight per output filter"):
        conv_norm_act(6, 6, 1, groups=6, norm=make_norm(name, **OPTIONS[name]), activation=None)(
            torch.randn(2, 6, 4, 4)
        )


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("ws_gn")(48), "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (lambda: make_norm("ws_bn", momentum=2.0)(4), "momentum=2.0"),
        (lambda: build("ws_gn")(torch.randn(2, 5, 3, 3)), "6 channels"),
        (lambda: build("ws_bn")(torch.randn(2, 5, 3, 3)), "6 channels"),
        (lambda: build("ws_bn")(torch.randn(1, 6, 1, 1)), "more than 1 value per channel"),
        (lambda: make_norm("ws_gn", num_groups=6)(6)(torch.randn(2, 6)), "more than one value"),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()


def test_ws_bn_keeps_and_slices_statistics_as_bn():
    torch.manual_seed(0)
    layer, plain = build("ws_bn"), make_norm("bn")(6)
    plain.load_state_dict(layer.state_dict())
    for slices in (1, 2, 3):
        x = torch.randn(6, 6, 4, 4) + 2
        with situation(layer, slices=slices), situation(plain, slices=slices):
            assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_network_convolves_with_standardized_weights_wherever_a_norm_follows(name):
    torch.manual_seed(0)
    options = {"num_groups": 8} if name == "ws_gn" else {}
    net = build_net("resnet8", make_norm(name, **options), num_classes=10, in_channels=1)
    x, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    literal_net = build_net("resnet8", make_norm(name[3:], **options), num_classes=10, in_channels=1)
    literal_net.load_state_dict(net.state_dict())
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for twin, ours in zip(literal_net.modules(), changed.modules(), strict=True):
            if isinstance(twin, ConvNormAct):
                twin.conv.weight.copy_(literal_weight(ours.conv.weight))
                ours.conv.weight.mul_(3).add_(0.1)
    for mode in (True, False):
        y = net.train(mode)(x)
        torch.testing.assert_close(y, literal_net.train(mode)(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.train()(x), changed.train()(x), atol=5e-3, rtol=5e-3)
