"""Running statistics shared by norms, and their recalibration, also for a norm of a user's own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from norms import registry
from norms.registry import make_norm, register
from norms.running import RunningStatistics, recalibrate


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99)),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_k_batches_at_once_are_k_batches_in_order(k, momentum, before, seed):
    generator = torch.Generator().manual_seed(seed)
    together, single = (RunningStatistics(3, momentum, dtype=torch.float64) for _ in range(2))
    for i in range(before + 1):
        n = k if i == before else 1
        mean, var = (torch.rand(n, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        together.track(mean, var, 2)
        for j in range(n):
            m = momentum if momentum is not None else 1 / (single.num_batches_tracked.item() + 1)
            for buffer, new in ((single.running_mean, mean[j]), (single.running_var, var[j])):
                buffer.copy_((1 - m) * buffer + m * new)
            single.num_batches_tracked += 1
    for name, value in single.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value)


def test_tracking_changes_buffers_in_place_and_keeps_no_graph():
    layer = RunningStatistics(3, 0.1)
    buffers = dict(layer.named_buffers())
    layer.track(torch.ones(1, 3, requires_grad=True), torch.ones(1, 3), 2)
    assert all(getattr(layer, name) is buffer and not buffer.requires_grad for name, buffer in buffers.items())
    assert layer.running_mean.tolist() == pytest.approx([0.1] * 3)


def net_of(*norms):
    """Norms in a chain on 4 channels with something random, something with buffers and a frozen norm beside them."""
    parts = [nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()) for norm in norms]
    return nn.Sequential(*parts, nn.Dropout(0.5), nn.BatchNorm2d(4))


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, 3, 3, generator=generator) * 2 + i for i in range(count)]


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "options", "groups"), [("bn", {}, 4), ("bgn", {"num_groups": 2}, 2)], ids=["bn", "bgn"]
)
def test_recalibrated_moments_are_those_of_all_values_however_they_were_sliced(name, options, groups, slices):
    layer = make_norm(name, **options)(4)
    recalibrate(layer, batches(), slices)
    values = torch.cat(batches()).double().reshape(24, groups, -1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean((0, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), values.var((0, 2)), atol=1e-5, rtol=1e-5)
    assert layer.num_batches_tracked == 3 * slices


def test_batches_of_unequal_size_are_weighted_by_their_values():
    layer = make_norm("bn")(4)
    parts = [torch.randn(n, 4, 3, 3) + n for n in (8, 3, 1)]
    recalibrate(layer, iter(parts))
    values = torch.cat(parts)
    torch.testing.assert_close(layer.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, values.var((0, 2, 3)))


def test_later_layers_see_activations_normalized_by_each_norm_batch():
    net = nn.Sequential(make_norm("bn")(4), make_norm("bn")(4))
    parts = batches()
    recalibrate(net, parts, slices=2)
    first = make_norm("bn")(4)
    values = torch.cat([first(x[k::2]) for x in parts for k in range(2)])
    torch.testing.assert_close(net[1].running_mean, values.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(net[1].running_var, values.var((0, 2, 3)), atol=1e-6, rtol=1e-5)


def test_nothing_but_running_statistics_of_norms_changes_and_no_random_number_is_drawn():
    norms = [
        make_norm("bn", momentum=0.3)(4),
        make_norm("bgn", num_groups=2, momentum=None)(4),
        make_norm("gn", num_groups=2)(4),
    ]
    net = net_of(*norms)
    net.train()
    norms[0].eval()  # a mode of its own, to be found again
    net(batches()[0])
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    buffers = {name: b.data_ptr() for name, b in net.named_buffers()}
    random = torch.get_rng_state()
    recalibrate(net, batches())
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"{i}.1.{b}" for i in (0, 1) for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert [m.training for m in net.modules()] == modes
    assert {name: b.data_ptr() for name, b in net.named_buffers()} == buffers
    assert torch.equal(torch.get_rng_state(), random)
    assert (norms[0].momentum, norms[1].momentum) == (0.3, None)
    assert all("forward" not in norm.__dict__ and norm.situation.slices == 1 for norm in norms)
    assert all(p.grad is None for p in net.parameters())


def test_the_result_depends_on_fresh_batches_only():
    net = net_of(make_norm("bn")(4), make_norm("bgn", num_groups=12)(4))
    other = copy.deepcopy(net)
    other(torch.randn(8, 4, 6, 6) * 9)  # another history, another trained size
    for n in (net, other):
        recalibrate(n, batches(), 2)
    for a, b in zip(net[:2].state_dict().values(), other[:2].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_forward_of_ones_own_prepares_the_batch():
    a, b = make_norm("bn")(4), make_norm("bn")(4)
    recalibrate(a, batches(), forward=lambda x: a(x / 2))
    recalibrate(b, [x / 2 for x in batches()])
    assert torch.equal(a.running_var, b.running_var)


@pytest.mark.parametrize("failing", ["empty", "slices", "halfway"])
def test_a_failure_leaves_everything_as_it_was(failing):
    net = net_of(make_norm("bn")(4), make_norm("bgn", num_groups=12)(4)).train()
    net(batches()[0])
    before, size = copy.deepcopy(net.state_dict()), net[1][1].trained_size
    given_batches, slices = {
        "empty": ([], 1),
        "slices": (batches(), 3),
        "halfway": ([*batches(), torch.randn(2, 5, 3, 3)], 1),
    }[failing]
    with pytest.raises(RuntimeError if failing == "halfway" else ValueError):
        recalibrate(net, given_batches, slices)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert net[1][1].trained_size == size
    assert net[0][1].momentum == 0.1


def test_without_statistics_nothing_is_forwarded():
    recalibrate(make_norm("gn", num_groups=2)(4), iter(lambda: pytest.fail("a batch was drawn"), None))


@pytest.fixture
def plugin(monkeypatch):
    """A norm written without any help of ours, under the contract of norms.protocol alone."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register(name="own", source="here", mixes_samples=True, keeps_stats=True)
    class Own(nn.Module):
        def __init__(self, num_channels, *, momentum: float = 0.2, affine: bool = True):
            super().__init__()
            self.momentum = momentum
            self.register_buffer("running_mean", torch.zeros(num_channels))
            self.register_buffer("running_var", torch.ones(num_channels))

        def reset_running_stats(self):
            self.running_mean.zero_()
            self.running_var.fill_(1)

        def forward(self, x):
            if self.training:
                var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
                unbiased = var * (x.numel() / x.shape[1]) / (x.numel() / x.shape[1] - 1)
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_var.lerp_(unbiased, self.momentum)
            else:
                mean, var = self.running_mean, self.running_var
            return (x - mean[:, None, None]) * torch.rsqrt(var[:, None, None] + 1e-5)

    @register(name="forgetful", source="here", mixes_samples=True, keeps_stats=True)
    class Forgetful(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return x

    return "own"


@pytest.mark.parametrize("slices", [1, 4])
def test_a_norm_of_ones_own_is_recalibrated_as_bn_is(plugin, slices):
    torch.manual_seed(0)
    own = net_of(make_norm(plugin)(4), make_norm(plugin)(4))
    bn = net_of(make_norm("bn")(4), make_norm("bn")(4))
    bn.load_state_dict(own.state_dict(), strict=False)
    for net in (own, bn):
        recalibrate(net, batches(), slices)
    for i in (0, 1):
        torch.testing.assert_close(own[i][1].running_mean, bn[i][1].running_mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own[i][1].running_var, bn[i][1].running_var, atol=1e-5, rtol=1e-5)
    assert own[0][1].momentum == 0.2


def test_declared_statistics_that_can_not_be_reset_are_a_value_error(plugin):
    with pytest.raises(ValueError, match=r"Forgetful.*reset_running_stats"):
        recalibrate(nn.Sequential(make_norm("forgetful")(4)), batches())
