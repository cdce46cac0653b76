"""norms.fuse: one convolution that computes norm(conv(x)), or a refusal that says what else the norm depends on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import norms
from norms.registry import norm_info, norm_names, norm_option_defaults, register

CHANNELS = 8
NORMS = norm_names()
MAPS = {
    *("none", "bn", "bgn", "ghost", "ebn", "ws_bn", "mbn", "cbn", "brn", "mabn"),
    *("dsbn", "dual_bn", "bne", "transnorm", "sabn"),
}
"""The registered norms that are one scale and shift per channel in evaluation, where no activation follows them."""


def build(name, *, activation=None, spatial=2, bias=True, **options):
    """(convolution, norm) in float64, trained by a few steps, so that nothing is as it was initialized."""
    info, defaults = norm_info(name), norm_option_defaults(name)
    options = {k: v for k, v in {"num_groups": 4, "num_domains": 2}.items() if k in defaults} | options
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](3, CHANNELS, 3, bias=bias).double()
    norm = norms.make_norm(name, **options)(CHANNELS, activation=activation).double()
    net = nn.ModuleList([conv, norm])
    optimizer = torch.optim.SGD(net.parameters(), 0.003)
    facts = {}
    if "domain" in info.needs:
        facts["domain"] = torch.arange(8) % 2
    if "context" in info.needs:
        facts["part"] = "context"
    for step in range(4):
        x = torch.randn(8, 3, *(7,) * spatial, dtype=torch.float64) + 1
        with norms.situation(net, **facts):
            y = both(conv, norm, x)
            optimizer.zero_grad()
            (y * torch.randn_like(y)).sum().backward()
            optimizer.step()
            norms.after_update(net, lambda x=x: both(conv, norm, x), step / 4)
    return conv.eval(), norm.eval()


def both(conv, norm, x):
    """norm(conv(x)), with what the norm wants of the convolution's weight."""
    weight = norm.transform_weight(conv.weight) if hasattr(norm, "transform_weight") else conv.weight
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    y = convolve(x, weight, conv.bias)
    return norm(y, weight=weight) if "conv_weight" in norm.norm_info.needs else norm(y)


def domain_for(name):
    return 1 if "domain" in norm_info(name).needs else None


@torch.no_grad()
def assert_fuses(name, conv, norm, spatial=2):
    fused = norms.fuse(conv, norm, domain=domain_for(name))
    assert type(fused) is type(conv)
    assert not fused.training
    for samples, size, offset in ((1, 3, 0.0), (5, 9, 0.0), (2, 6, 1000.0)):
        x = torch.randn(samples, 3, *range(size, size + spatial), dtype=torch.float64) + offset
        with norms.situation(norm, domain=domain_for(name)):
            expected = both(conv, norm, x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_trained_norm_is_fused_exactly_or_refused_by_name(name, bias):
    activation = nn.ReLU() if "activation" in norm_info(name).needs else None
    conv, norm = build(name, activation=activation, bias=bias)
    if name in MAPS:
        assert_fuses(name, conv, norm)
    else:
        with pytest.raises(ValueError, match=rf'^norm "{name}" is not one scale and shift per channel in evaluation: '):
            norms.fuse(conv, norm, domain=domain_for(name))


@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("name", ["bn", "bgn", "ws_bn", "transnorm"])
def test_sequences_and_volumes_fuse_as_images_do(name, spatial):
    assert_fuses(name, *build(name, spatial=spatial), spatial=spatial)


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_evonorm_fuses_where_no_activation_follows_for_it_is_an_affine_there(name):
    assert_fuses(name, *build(name))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("in", {}, "an output depends on other positions"),
        ("gn", {}, "an output depends on other channels"),
        ("iebn", {}, "an output depends on other positions"),
        ("bgn", {"num_groups": 3}, r"an input \(3, 8, 4, 4\) gives .*num_groups=3"),
        ("bgn", {"num_groups": 200}, "an input"),
        ("tasknorm", {}, "an input .* gives tasknorm needs to be told"),
        ("dsbn", {}, "an input .* gives .*domain"),
    ],
)
def test_the_refusal_says_what_was_measured(name, options, reason):
    conv, norm = build(name, **options) if "num_groups" not in options else built_untrained(name, **options)
    with pytest.raises(ValueError, match=f'^norm "{name}" is not one scale and shift .*: {reason}'):
        norms.fuse(conv, norm)


def built_untrained(name, **options):
    return nn.Conv2d(3, CHANNELS, 3).eval(), norms.make_norm(name, **options)(CHANNELS).eval()


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_bgn_fuses_for_every_number_of_groups_that_divides_the_channels(groups):
    assert_fuses("bgn", *build("bgn", num_groups=groups))


def test_online_norm_fuses_only_without_the_compensation_that_its_evaluation_has():
    for compensation in ("layer_scaling", "clamp"):
        conv, norm = build("online", compensation=compensation)
        with pytest.raises(ValueError, match="an output "):
            norms.fuse(conv, norm)
    assert_fuses("online", *build("online", compensation="none"))


@pytest.mark.parametrize("conv", [
    nn.Conv2d(4, CHANNELS, (3, 1), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4),
    nn.Conv2d(4, CHANNELS, 3, padding="same", padding_mode="circular", bias=False),
    nn.Conv2d(4, CHANNELS, 3, padding=1, padding_mode="reflect"),
], ids=["grouped", "circular", "reflect"])  # fmt: skip
@torch.no_grad()
def test_every_way_to_convolve_is_kept(conv):
    norm = trained_bn()
    conv = conv.double().eval()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(norms.fuse(conv, norm)(x), norm(conv(x)), rtol=1e-10, atol=1e-10)


def trained_bn():
    norm = norms.make_norm("bn")(CHANNELS).double()
    norm(3 * torch.randn(64, CHANNELS, dtype=torch.float64) + 2)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm.eval()


def test_neither_argument_is_changed_and_the_result_shares_nothing_with_them():
    conv, norm = build("cbn")
    before = copy.deepcopy((conv.state_dict(), norm.state_dict()))
    fused = norms.fuse(conv, norm)
    with torch.no_grad():
        fused.weight.zero_()
        fused.bias.zero_()
    for kept, module in zip(before, (conv, norm), strict=True):
        for key, value in module.state_dict().items():
            assert torch.equal(value, kept[key]) if isinstance(value, torch.Tensor) else value == kept[key]


def test_the_result_has_the_convolutions_type_is_rounded_once_and_draws_nothing():
    conv, norm = nn.Conv2d(3, CHANNELS, 3).to(torch.bfloat16).eval(), trained_bn().float()
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    fused = norms.fuse(conv, norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.weight.dtype == fused.bias.dtype == torch.bfloat16
    assert not fused.weight.requires_grad
    wide = norms.fuse(copy.deepcopy(conv).double(), norm)
    assert torch.equal(fused.weight, wide.weight.to(torch.bfloat16))


def test_a_convolution_whose_weight_is_computed_is_fused_with_the_computed_weight():
    conv, norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, CHANNELS, 3).double()), trained_bn()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
        fused = norms.fuse(conv.eval(), norm)
        torch.testing.assert_close(fused(x), norm(conv(x)))
    assert type(fused) is nn.Conv2d


def test_a_plugins_norm_is_judged_by_what_it_does(registry_copy):
    class Shifted(nn.Module):
        def __init__(self, num_channels: int, *, bend: float = 0.0, affine: bool = True):
            super().__init__()
            self.bend = bend
            self.weight = nn.Parameter(torch.arange(1.0, num_channels + 1)) if affine else None

        def forward(self, x):
            return x * self.weight.view(-1, 1, 1) + 3 + self.bend * x.square()

    register(name="shifted_of_fuse", source="here", mixes_samples=False, keeps_stats=False)(Shifted)
    conv, x = nn.Conv2d(3, CHANNELS, 3).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    straight = norms.make_norm("shifted_of_fuse")(CHANNELS).double().eval()
    torch.testing.assert_close(norms.fuse(conv, straight)(x), straight(conv(x)))
    bent = norms.make_norm("shifted_of_fuse", bend=1e-6)(CHANNELS).eval()
    with pytest.raises(ValueError, match=r'"shifted_of_fuse".*not linear in its value'):
        norms.fuse(conv, bent)


@pytest.fixture
def registry_copy(monkeypatch):
    from norms import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def bn(channels=CHANNELS, **options):
    return norms.make_norm("bn", **options)(channels).eval()


def conv2d(out=CHANNELS):
    return nn.Conv2d(3, out, 3).eval()


def nan_statistics():
    norm = bn()
    norm.running_var[2] = float("nan")
    return norm


def tiny_statistics():
    norm = bn()
    norm.running_var.zero_()
    norm.running_mean.fill_(1e6)
    return norm


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (conv2d, lambda: bn().train(), 'norm "bn" is in training mode; .* call eval'),
        (lambda: conv2d().train(), bn, "the convolution is in training mode"),
        (lambda: conv2d(4), bn, 'norm "bn" is for 8 channels, and the convolution has 4 outputs'),
        (lambda: nn.Linear(3, 8).eval(), bn, "only Conv1d, Conv2d, Conv3d can be fused, given Linear"),
        (lambda: nn.ConvTranspose2d(3, 8, 3).eval(), bn, "given ConvTranspose2d"),
        (lambda: nn.LazyConv2d(8, 3).eval(), bn, "given LazyConv2d"),
        (lambda: OwnForward(3, 8, 3).eval(), bn, "OwnForward has a forward of its own, so it is no plain Conv2d"),
        (conv2d, lambda: nn.BatchNorm2d(8).eval(), "a norm built by make_norm, given BatchNorm2d"),
        (lambda: hooked(conv2d()), bn, "the convolution has forward hooks"),
        (conv2d, lambda: hooked(bn()), 'norm "bn" has forward hooks'),
        (lambda: nn.Conv2d(3, 8, 3, device="meta").eval(), bn, "the convolution is on the meta device"),
        (conv2d, nan_statistics, "it gives values that are not finite"),
        (lambda: conv2d().half(), tiny_statistics, "the fused bias has values that torch.float16 can not hold"),
        (conv2d, lambda: norms.make_norm("dsbn", num_domains=2)(8).eval(), "domain"),
    ],
)
def test_what_can_not_be_fused_is_refused_in_words(conv, norm, message):
    with pytest.raises(ValueError, match=message):
        norms.fuse(conv(), norm())


def test_an_unknown_domain_is_refused_and_a_told_one_is_used():
    conv, norm = build("dsbn")
    with pytest.raises(ValueError, match=r'norm "dsbn".*domain'):
        norms.fuse(conv, norm, domain=7)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with norms.situation(norm, domain=0), torch.no_grad():
        torch.testing.assert_close(norms.fuse(conv, norm)(x), norm(conv(x)))
