"""What layers keep: in buffers of one shape that travel, from states of other versions, and reset to the start."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from norms.channels import Reading
from norms.convert import converted
from norms.layers.bgn import ONE
from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from norms.situation import situation
from tasks.nets.blocks import conv_norm_act

SPLIT = {"num_groups": 16}  # of 8 channels: groups are runs of positions


def conv_bgn():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make_norm("bgn", **SPLIT)(8))


# --- bgn's trained size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["averaged before training", "averaged after"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_bgn_refuses_the_size_that_the_network_refuses(before, use_buffers):
    net = conv_bgn()
    if not before:
        net(torch.randn(4, 3, 6, 6))
    average = AveragedModel(net, use_buffers=use_buffers)
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6))
        average.update_parameters(net)
    for one in (net.eval(), average.eval()):
        one(torch.randn(2, 3, 6, 6))
        with pytest.raises(ValueError, match=r"trained size \(6, 6\); given \(12, 12\)"):
            one(torch.randn(2, 3, 12, 12))
    assert average.module[1].trained_size == (6, 6)


@pytest.mark.parametrize("before", [True, False], ids=["averaged before training", "averaged after"])
@pytest.mark.parametrize("decay", [0.9, 0.996, 0.9998, 0.9999])
def test_a_moving_average_of_buffers_keeps_the_guard(decay, before):
    # sizes that a moving average in float32 rounds to the next smaller number
    for size in (3, 6, 12, 29, 39):
        net = nn.Sequential(make_norm("bgn", **SPLIT)(8))
        if not before:
            net(torch.randn(2, 8, size, 2))
        averages = [AveragedModel(net, avg_fn=get_ema_avg_fn(decay), use_buffers=True), ModelEmaV2(net, decay=decay)]
        averages += [AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)]
        averages += [ModelEmaV3(net, decay=decay)]
        for _ in range(10):
            net(torch.randn(2, 8, size, 2))
            for average in averages:
                (average.update_parameters if isinstance(average, AveragedModel) else average.update)(net)
        assert [average.module[0].trained_size for average in averages] == [(size, 2)] * 4


def test_the_guard_stands_in_the_buffers_that_a_functional_call_brings():
    layer = make_norm("bgn", **SPLIT)(8)
    brought = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    functional_call(layer, brought, (torch.randn(4, 8, 6, 6),))
    assert layer.trained_size is None
    with pytest.raises(ValueError, match=r"trained size \(6, 6\)"):
        functional_call(layer, brought, (torch.randn(4, 8, 4, 4),))
    layer(torch.randn(4, 8, 4, 4))


def test_a_vmapped_ensemble_is_guarded():
    layers = [make_norm("bgn", **SPLIT)(8) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    call = torch.func.vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))
    call(parameters, buffers, torch.randn(2, 4, 8, 6, 6))
    assert buffers["trained_shape"].tolist() == [[6 * ONE, 6 * ONE, 0, 0, ONE]] * 2
    with pytest.raises(ValueError, match=r"trained size \(6, 6\)"):
        call(parameters, buffers, torch.randn(2, 4, 8, 4, 4))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_compiled_bgn_refuses_another_size_when_it_runs(mode):
    layer = make_norm("bgn", **SPLIT)(8)
    layer(torch.randn(4, 8, 6, 6))
    layer.train(mode)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6)
    torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))
    with pytest.raises(RuntimeError, match="trained size"):
        compiled(torch.randn(4, 8, 4, 4))
    torch._dynamo.reset()


def test_more_spatial_axes_than_the_guard_can_keep_are_refused():
    with pytest.raises(ValueError, match="at most 4 spatial axes"):
        make_norm("bgn", **SPLIT)(8)(torch.randn(2, 8, 2, 2, 2, 2, 2))


@pytest.mark.parametrize(
    ("options", "old", "size"),
    [
        (SPLIT, torch.tensor([6, 6]), (6, 6)),
        (SPLIT, torch.empty(0, dtype=torch.long), None),
        ({"num_groups": 4}, torch.empty(0, dtype=torch.long), None),
    ],
    ids=["trained", "untrained", "without a guard"],
)
def test_states_of_bgn_from_before_0_6_load_strictly(options, old, size):
    layer = make_norm("bgn", **options)(8)
    state = {name: value for name, value in layer.state_dict().items() if name != "trained_shape"}
    layer.load_state_dict({**state, "_extra_state": old}, strict=True)
    assert layer.trained_size == size


def test_states_of_tasknorm_from_before_0_6_load_strictly():
    layer = make_norm("tasknorm")(8)
    with situation(layer, part="context"):
        layer(torch.randn(5, 8, 4, 4))
    state = layer.state_dict()
    size = state.pop("context_size")
    twin = make_norm("tasknorm")(8)
    twin.load_state_dict({**state, "_extra_state": size}, strict=True)
    x = torch.randn(3, 8, 4, 4)
    with situation(layer, part="query"), situation(twin, part="query"):
        assert torch.equal(layer(x), twin(x))


# --- a buffer that is read ------------------------------------------------------------------------------------------


def test_a_reading_follows_every_change_and_no_copy_trusts_the_originals():
    read, buffer = Reading(), torch.zeros(2, dtype=torch.long)
    assert read(buffer) == [0, 0]
    buffer[1] = 3
    assert read(buffer) == [0, 3]
    assert read(torch.tensor([5, 6])) == [5, 6]
    for _ in range(3):
        buffer.add_(1)
    assert read(buffer) == [3, 6]
    twin, copied = copy.deepcopy((read, buffer))
    while copied._version < buffer._version:  # as many changes as the original has counted
        copied.add_(1)
    assert twin(copied) == copied.tolist()
    assert read(buffer.to("meta")) is None
    with torch.inference_mode():
        inference = buffer + 1
        assert read(inference) == [4, 7]


# --- cbn's history --------------------------------------------------------------------------------------------------


def test_cbns_buffers_have_their_final_shape_from_the_start_beside_a_convolution():
    net = conv_norm_act(3, 8, 3, norm=make_norm("cbn", burn_in=0.0), activation=nn.ReLU())
    before = {name: buffer.shape for name, buffer in net.named_buffers()}
    average = AveragedModel(net)
    for _ in range(2):
        net(torch.randn(4, 3, 8, 8))
        average.update_parameters(net)
    assert {name: buffer.shape for name, buffer in net.named_buffers()} == before
    for (name, one), two in zip(net.named_buffers(), average.module.buffers(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("mode", [True, False], ids=["plain phase", "evaluation"])
def test_else_from_the_first_forward_on(mode):
    layer = make_norm("cbn", burn_in=0.5)(8).train(mode)
    weight = torch.randn(8, 3, 3, 3)
    layer(torch.randn(4, 8, 4, 4), weight=weight)
    assert layer.past_weight.shape == (3, 8, 27)


def test_a_functional_call_fills_the_history_that_it_brings_whatever_its_size_was():
    layer, conv = make_norm("cbn", burn_in=0.0)(8), nn.Conv2d(3, 8, 3)
    brought = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for _ in range(2):
        functional_call(layer, brought, (conv(torch.randn(4, 3, 8, 8)),), {"weight": conv.weight})
    assert brought["past_weight"].shape == (3, 8, 27)
    assert brought["past_count"] == 2
    assert layer.past_count == 0


# --- states of other libraries --------------------------------------------------------------------------------------


def with_counter():
    return [name for name in norm_names() if "num_batches_tracked" in dict(built(name).named_buffers())]


def built(name):
    options = {"num_groups": 4} if "num_groups" in norm_option_defaults(name) else {}
    needs = {"activation": nn.ReLU()} if name.startswith("evonorm") or name in ("frn", "proxy") else {}
    return make_norm(name, **options)(8, **needs)


@pytest.mark.parametrize("name", with_counter())
def test_a_state_without_a_counter_loads_strictly_and_leaves_the_layers_own(name):
    layer = built(name)
    layer.num_batches_tracked.fill_(7)
    state = {key: value + 1 for key, value in layer.state_dict().items() if key != "num_batches_tracked"}
    assert layer.load_state_dict(state, strict=True).missing_keys == []
    assert (layer.num_batches_tracked == 7).all()
    torch.testing.assert_close(layer.running_mean, state["running_mean"])


def test_an_evonorm_without_statistics_refuses_them_by_name():
    layer = make_norm("evonorm_b0")(8)
    with pytest.raises(RuntimeError, match="running_mean"):
        layer.load_state_dict({**layer.state_dict(), "running_mean": torch.zeros(8)}, strict=True)


def test_a_state_without_any_statistics_is_still_refused():
    layer = make_norm("bn")(8)
    with pytest.raises(RuntimeError, match="running_mean"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=True)


# --- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gn", "ws_gn", "bcn", "proxy", "evonorm_s0"])
@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (32, 32), (40, 20), (48, 24), (37, 1), (120, 30), (1280, 32)])
def test_auto_groups_are_the_largest_divisor_that_is_not_above_32(name, channels, groups):
    needs = {"activation": nn.ReLU()} if name in ("proxy", "evonorm_s0") else {}
    layer = make_norm(name, num_groups="auto")(channels, **needs)
    assert getattr(layer, "channel_groups", layer.num_groups) == groups


@pytest.mark.parametrize("name", ["gn", "ws_gn", "bcn", "proxy", "evonorm_s0"])
def test_a_number_of_groups_that_divides_nothing_is_one_line_with_what_is_allowed(name):
    needs = {"activation": nn.ReLU()} if name in ("proxy", "evonorm_s0") else {}
    with pytest.raises(ValueError, match=r'^num_groups=5 does not divide 8 channels; allowed: 1, 2, 4, 8, or "auto"$'):
        make_norm(name, num_groups=5)(8, **needs)


@pytest.mark.parametrize("channels", [8.0, "8", None, True])
def test_a_factory_called_with_no_whole_number_says_so(channels):
    with pytest.raises(ValueError, match=r'^norm "bn": num_channels=.*: a whole number of channels is needed$'):
        make_norm("bn")(channels)


def test_a_converted_cbn_has_its_final_shape_before_the_first_forward():
    net, _ = converted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), make_norm("cbn", burn_in=0.0))
    average = AveragedModel(net)
    net(torch.randn(4, 3, 8, 8))
    average.update_parameters(net)


# --- what is kept stays finite, and nothing is kept of nothing ------------------------------------------------------


def small(name, **arguments):
    options = {"num_groups": 4, "ghost_batch_size": 2}
    options = {key: value for key, value in options.items() if key in norm_option_defaults(name)}
    fused = {"activation": nn.ReLU()} if "activation" in norm_info(name).needs else {}
    return make_norm(name, **options)(8, **arguments, **fused)


def called(norm, x):
    extra = {"weight": torch.ones(8, 4, dtype=x.dtype)} if "conv_weight" in norm.norm_info.needs else {}
    with situation(norm, domain=0, part="context"):
        return norm(x, **extra)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", norm_names())
def test_an_empty_batch_needs_no_affine(name, training):
    norm = small(name, affine=False).train(training)
    x = torch.randn(0, 8, 4, 4, requires_grad=True)
    y = called(norm, x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None


@pytest.mark.parametrize(
    ("buffers", "given", "far"),
    [(torch.float16, torch.float16, 1e3), (torch.float16, torch.float32, 1e6), (torch.float32, torch.float64, 1e25)],
)
@pytest.mark.parametrize("name", [name for name in norm_names() if norm_info(name).keeps_stats])
def test_statistics_that_the_buffers_type_can_not_hold_are_not_kept(name, buffers, given, far):
    norm = small(name).to(buffers)
    x = (torch.randn(8, 8, 4, 4, dtype=torch.float64) * far).to(given).requires_grad_()
    called(norm, x).float().sum().backward()
    assert all(b.isfinite().all() for b in norm.buffers())


@pytest.mark.parametrize("far", [1e6, 1e10, 1e25])
def test_a_batch_of_large_numbers_leaves_online_trainable(far):
    for seed in range(20):  # how far the errors go depends on the draw
        draw, norm = torch.Generator().manual_seed(seed), make_norm("online")(8)
        for value in (1.0, far, 1.0):
            x = (value * torch.randn(64, 8, 1, 1, generator=draw)).requires_grad_()
            (norm(x) * torch.randn(x.shape, generator=draw)).sum().backward()
        assert x.grad.isfinite().all()
        assert all(b.isfinite().all() for b in norm.buffers())
