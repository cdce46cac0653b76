"""frn, evonorm_b0, evonorm_s0, proxy against literal float64 transcriptions; their places in a network; B0's memory."""

import copy
import io
import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from norms.protocol import equivalent, norm_modules
from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import hold, situation
from tasks.nets.blocks import ConvNormAct
from tasks.nets.models import build_net

EPS = 1e-5
NAMES = ["frn", "evonorm_b0", "evonorm_s0", "proxy"]
GROUPED = {"evonorm_s0": {"num_groups": 2}, "proxy": {"num_groups": 2}}
SHAPES = [(3, 6, 5), (3, 6, 4, 5), (2, 6, 3, 2, 2)]


def build(name, channels=6, *, activation=F.softplus, **contract):
    """A layer whose parameters are all off their start."""
    options = {**GROUPED.get(name, {}), **contract.pop("options", {})}
    layer = make_norm(name, **options)(channels, activation=activation, **contract)
    starts = {
        "weight": (0.5, 1.5),
        "bias": (1, -1),
        "tau": (-0.8, 0.9),
        "v": (1.6, -0.6),
        "proxy_mean": (-0.5, 0.5),
        "proxy_scale": (0.4, -0.4),
    }
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            parameter.copy_(torch.linspace(*starts[key], channels))
    return layer


def biased(values):
    mean = values.sum() / values.numel()
    return ((values - mean) ** 2).sum() / values.numel()


def literal(name, layer, x, activation=F.softplus, running_var=None, slices=1, groups=2):
    """The papers' equations, value by value; x (N, C, *) float64. `running_var`: evaluation of evonorm_b0."""
    flat = x.reshape(*x.shape[:2], -1)
    n, c, p = flat.shape
    ones, zeros = torch.ones(c, dtype=x.dtype), torch.zeros(c, dtype=x.dtype)
    w, b = (ones, zeros) if layer.weight is None else (layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    phi = activation
    if name == "proxy" and activation is not None:
        means, variances = torch.stack(
            [torch.stack(proxy_moments(layer.proxy_mean[j], layer.proxy_scale[j], w[j], b[j], phi)) for j in range(c)],
            dim=1,
        )
    y = []
    for i, j, k in ((i, j, k) for i in range(n) for j in range(c) for k in range(p)):
        value = flat[i, j, k]
        members = range(j // (c // groups) * (c // groups), (j // (c // groups) + 1) * (c // groups))
        group = flat[i, members.start : members.stop]
        if name == "frn":
            out = w[j] * value / torch.sqrt((flat[i, j] ** 2).sum() / p + 1e-6) + b[j]
            out = out if activation is None else torch.maximum(out, layer.tau[j])
        elif name in ("evonorm_b0", "evonorm_s0") and activation is None:
            out = w[j] * value + b[j]
        elif name == "evonorm_b0":
            var = biased(flat[i % slices :: slices, j]) if running_var is None else running_var[j]
            instance = torch.sqrt(biased(flat[i, j]) + EPS)
            out = w[j] * value / torch.maximum(torch.sqrt(var + EPS), layer.v[j] * value + instance) + b[j]
        elif name == "evonorm_s0":
            out = w[j] * value / (1 + torch.exp(-layer.v[j] * value)) / torch.sqrt(biased(group) + EPS) + b[j]
        else:
            z = w[j] * (value - group.sum() / group.numel()) / torch.sqrt(biased(group) + EPS) + b[j]
            out = z if phi is None else (phi(z) - means[j]) / torch.sqrt(variances[j] + 0.03)
        y.append(out)
    return torch.stack(y).reshape(x.shape)


def proxy_moments(mean, scale, w, b, phi, samples=200):
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / samples) for i in range(samples)], dtype=torch.float64)
    activated = phi(w * ((1 + scale) * quantiles + mean) + b)
    return activated.sum() / samples, biased(activated)


def lay(x, layout):
    return x.contiguous(memory_format=layout)


# --- each is its equation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("activation", [F.softplus, None], ids=["activation", "none"])
def test_is_the_equation_in_outputs_and_gradients(name, shape, affine, activation):
    torch.manual_seed(0)
    layer = build(name, affine=affine, activation=activation, dtype=torch.float64)
    x = (torch.randn(shape, dtype=torch.float64) + 0.3).requires_grad_()
    dy = torch.randn_like(x)
    for training in (True, False):
        var = getattr(layer, "running_var", None)  # of one training step in evaluation
        y = layer.train(training)(x)
        truth = literal(name, layer, x, activation, running_var=None if training else var)
        torch.testing.assert_close(y, truth)
        inputs = [x, *layer.parameters()]
        torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(truth, inputs, dy))
    assert (layer.weight is None) == (layer.bias is None) == (not affine)


@pytest.mark.parametrize(
    ("name", "kept", "without"),
    [
        ("frn", {"tau"}, set()),
        ("evonorm_b0", {"v"}, set()),
        ("evonorm_s0", {"v"}, set()),
        ("proxy", {"proxy_mean", "proxy_scale"}, set()),
    ],
)
def test_affine_removes_weight_and_bias_alone_and_no_activation_what_belongs_to_it(name, kept, without):
    for activation, others in ((nn.ReLU(), kept), (None, without)):
        factory = make_norm(name, **GROUPED.get(name, {}))
        layers = {affine: factory(6, affine=affine, activation=activation) for affine in (True, False)}
        assert {key for key, _ in layers[False].named_parameters()} == others
        assert {key for key, _ in layers[True].named_parameters()} == others | {"weight", "bias"}
        for key, parameter in layers[True].named_parameters():
            assert parameter.shape == (6,)
            assert torch.equal(parameter, torch.full((6,), float(key in ("weight", "v"))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives_are_exact(name, training):
    torch.manual_seed(0)
    layer = build(name, 4, dtype=torch.float64).train(training)
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in layer.named_parameters()]

    def f(x, *values):
        with hold(layer):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


# --- types, layouts, sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_keeps_dtype_and_computes_in_float32_or_better(name, dtype):
    torch.manual_seed(0)
    layer = build(name)  # float32 parameters whatever the input
    x = (torch.randn(2, 6, 4, 4) + 3).to(dtype)
    y, truth = layer(x), literal(name, layer, x.double())
    assert y.dtype == dtype
    rtol = torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    torch.testing.assert_close(y, truth.to(dtype), atol=5e-6, rtol=rtol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_survives_large_means_in_float32(name, layout):
    torch.manual_seed(0)
    layer = build(name)
    x = lay(torch.randn(3, 6, 4, 5) + 1e4, layout)
    dy = lay(torch.randn(3, 6, 4, 5), layout)
    twin, wide = copy.deepcopy(layer).double(), x.double().requires_grad_()
    truth, y = twin(wide), layer(x.requires_grad_())
    # x itself is rounded to 1e-3, and evonorm_s0 does not subtract a mean: y is as large as x
    torch.testing.assert_close(y.double(), truth, atol=5e-3, rtol=1e-3)
    got, want = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(truth, wide, dy.double())[0]
    torch.testing.assert_close(got.double(), want, atol=5e-3 * want.abs().max().item(), rtol=5e-3)
    # against the loops, so that the double above can not be wrong in the same way
    torch.testing.assert_close(truth, literal(name, twin, wide), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", [nn.ReLU(), None], ids=["activation", "none"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last_is_kept_and_gives_the_same(name, activation, layout):
    x = torch.randn((2, 6, 3, 4) if layout is torch.channels_last else (2, 6, 3, 2, 2))
    layer = build(name, activation=activation)
    y = layer(lay(x, layout))
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("affine", [True, False])
def test_an_inplace_activation_inside_or_after_it_leaves_the_input_alone(name, affine):
    for activation in (nn.ReLU(inplace=True), None):
        layer = build(name, affine=affine, activation=activation)
        x = torch.randn(2, 6, 4, 4)
        before = x.clone()
        F.relu(layer(x), inplace=True)
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_evonorms_work_on_inputs_without_positions(name):
    layer = build(name, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), literal(name, layer, x))
    torch.testing.assert_close(layer(x[..., None, None]), layer(x)[..., None, None])


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    layer = build(name).eval()  # training moves evonorm_b0's buffers, which vmap refuses
    x = torch.randn(3, 2, 6, 4, 4)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))
    gradient = torch.func.grad(lambda part: layer(part).square().sum())
    torch.testing.assert_close(
        torch.func.vmap(gradient)(x), torch.stack([gradient(part) for part in x]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_stays_on_meta(name):
    layer = build(name, device="meta")
    y = layer(torch.empty(2, 6, 4, 4, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.is_meta
    assert all(p.grad.is_meta for p in layer.parameters())


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("evonorm_s0")(48, activation=F.relu), "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (lambda: make_norm("evonorm_s0")(48, activation=None), "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (lambda: make_norm("proxy", num_groups=5)(6, activation=F.relu), "1, 2, 3, 6"),
        (lambda: make_norm("proxy", base="bn")(6, activation=F.relu), "'gn' or 'ln'"),
        (lambda: make_norm("proxy", proxy_eps=0.0)(32, activation=F.relu), "proxy_eps=0.0"),
        (lambda: make_norm("proxy", num_samples=1)(32, activation=F.relu), "num_samples=1"),
        (lambda: make_norm("frn", eps=0.0)(4, activation=F.relu), "eps=0.0"),
        (lambda: make_norm("evonorm_s0", eps=0.0)(32, activation=F.relu), "eps=0.0"),
        (lambda: make_norm("evonorm_b0", eps=0.0)(4, activation=F.relu), "eps=0.0"),
        (lambda: make_norm("evonorm_b0", momentum=2.0)(4, activation=F.relu), "momentum=2.0"),
        (lambda: build("frn")(torch.randn(2, 6, 1, 1)), "more than one value"),
        (lambda: build("frn").eval()(torch.randn(2, 6, 1, 1)), "more than one value"),
        (lambda: build("frn")(torch.randn(2, 6)), "more than one value"),
        (lambda: build("evonorm_b0")(torch.randn(1, 6, 1, 1)), "more than 1 value per channel"),
        (lambda: build("evonorm_s0", options={"num_groups": 6})(torch.randn(2, 6)), "more than one value"),
        (lambda: build("proxy", options={"num_groups": 6})(torch.randn(2, 6)), "more than one value"),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", [nn.ReLU(), None], ids=["activation", "none"])
def test_another_number_of_channels_is_a_clear_value_error(name, activation):
    layer = build(name, activation=activation)
    for x in (torch.randn(2, 5, 4, 4), torch.randn(6)):
        with pytest.raises(ValueError, match="6 channels"):
            layer(x)
    with pytest.raises(ValueError, match="num_channels=0"):
        make_norm(name, **({"num_groups": 1} if name in GROUPED else {}))(0, activation=activation)


# --- frn ----------------------------------------------------------------------------------------------------------


def test_frn_at_the_start_is_relu_of_the_input_over_its_root_mean_square():
    x = torch.randn(3, 6, 4, 5)
    y = make_norm("frn")(6, activation=F.gelu)(x)
    torch.testing.assert_close(y, F.relu(x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()))


def test_frn_without_an_activation_ignores_no_value():
    layer = build("frn", activation=None)
    assert layer.tau is None
    x = torch.randn(2, 6, 4, 4)
    offset = layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(-x) - offset, offset - layer(x))


def test_frn_does_not_change_with_the_scale_of_a_channel():
    layer = build("frn")
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(layer(x * torch.tensor([3.0, 50.0]).view(2, 1, 1, 1)), layer(x), atol=1e-4, rtol=1e-4)
    assert (layer(x + 3) - layer(x)).abs().max() > 0.1


# --- the evonorms -------------------------------------------------------------------------------------------------


def test_evonorm_b0_without_v_is_the_larger_of_two_deviations():
    layer = make_norm("evonorm_b0")(6, activation=F.relu)
    nn.init.zeros_(layer.v)
    x = torch.randn(5, 6, 4, 4)
    batch = (x.var((0, 2, 3), correction=0) + EPS).sqrt().view(1, -1, 1, 1)
    instance = (x.var((2, 3), correction=0, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(layer(x), x / torch.maximum(batch, instance))


def test_evonorm_s0_without_v_halves_and_far_positive_v_is_a_relu():
    layer = make_norm("evonorm_s0", num_groups=2)(6, activation=F.relu)
    x = torch.randn(5, 6, 4, 4)
    std = (x.reshape(5, 2, -1).var(2, correction=0) + EPS).sqrt().repeat_interleave(3, 1)[..., None, None]
    nn.init.zeros_(layer.v)
    torch.testing.assert_close(layer(x), x / std / 2)
    nn.init.constant_(layer.v, 1e6)
    torch.testing.assert_close(layer(x), F.relu(x) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_an_evonorm_without_activation_is_none(name):
    layer, plain = build(name, activation=None), make_norm("none")(6)
    plain.load_state_dict(layer.state_dict())  # neither v nor a buffer
    x = torch.randn(1, 6, 1, 1)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    with hold(layer):
        assert torch.equal(layer(x), plain(x))
    assert layer.equivalent_to == "none"
    assert build(name).equivalent_to is None
    assert equivalent(nn.Sequential(layer, copy.deepcopy(layer))) == "none"
    assert equivalent(nn.Sequential(layer, build(name))) is None


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_evonorm_b0_moves_running_statistics_as_bn(momentum):
    layer = make_norm("evonorm_b0", momentum=momentum)(6, activation=F.relu)
    bn = make_norm("bn", momentum=momentum)(6)
    for seed in range(3):
        x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 3
        layer(x)
        bn(x)
        for name, buffer in bn.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), buffer)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    with hold(layer.train()):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.reset_running_stats()
    torch.testing.assert_close(layer.state_dict(), make_norm("evonorm_b0")(6, activation=F.relu).state_dict())


@pytest.mark.parametrize("slices", [2, 3, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_evonorm_b0_on_slices_is_the_equation_of_each(slices, layout):
    torch.manual_seed(0)
    layer = build("evonorm_b0", dtype=torch.float64)
    one_by_one = copy.deepcopy(layer)
    x = lay(torch.randn(6, 6, 3, 2, dtype=torch.float64), layout).requires_grad_()
    dy = torch.randn_like(x)
    with situation(layer, slices=slices):
        y = layer(x)
    truth = literal("evonorm_b0", layer, x, slices=slices)
    torch.testing.assert_close(y, truth)
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(truth, inputs, dy))
    for k in range(slices):
        one_by_one(x[k::slices])
    torch.testing.assert_close(dict(layer.named_buffers()), dict(one_by_one.named_buffers()))
    with situation(layer, slices=4), pytest.raises(ValueError, match="4 norm batches"):
        layer(x)


def test_evonorm_b0_resumes_and_copies():
    def train(layer, seeds):
        for seed in seeds:
            layer(torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(seed)))
        return layer

    layer = train(build("evonorm_b0"), range(2))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    resumed, twin = build("evonorm_b0"), copy.deepcopy(layer)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    kept = copy.deepcopy(layer.state_dict())
    train(twin, range(2, 4))
    torch.testing.assert_close(layer.state_dict(), kept, rtol=0, atol=0)
    train(resumed, range(2, 4))
    torch.testing.assert_close(resumed.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_network_of_evonorms_with_and_without_activation_is_recalibrated(slices):
    net = nn.Sequential(build("evonorm_b0"), build("evonorm_b0", activation=None)).eval()
    before = copy.deepcopy(net[1].state_dict())
    batches = [torch.randn(4, 6, 5, 5) + k for k in range(3)]
    recalibrate(net, batches, slices=slices)
    x = torch.cat(batches)
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(net[0].running_var, x.var((0, 2, 3)))
    torch.testing.assert_close(net[1].state_dict(), before, rtol=0, atol=0)
    assert not list(net[1].buffers())


# --- proxy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gn", "ln"])
def test_proxy_at_the_start_is_the_known_shift_and_scale_of_relu(base):
    # the papers' two numbers, from its formula of the quantiles
    r = [math.sqrt(2) * torch.erfinv(torch.tensor(2 * (i + 0.5) / 200 - 1).double()).item() for i in range(200)]
    mean = sum(max(v, 0) for v in r) / 200
    var = sum((max(v, 0) - mean) ** 2 for v in r) / 200
    assert abs(mean - 0.39845) < 1e-5
    assert abs(var - 0.33803) < 1e-5
    x = torch.randn(3, 64, 4, 5)
    y = make_norm("proxy", base=base)(64, activation=nn.ReLU())(x)
    expected = (F.relu(make_norm(base)(64)(x)) - 0.39845) / math.sqrt(0.33803 + 0.03)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)


def test_proxy_on_ln_is_proxy_on_one_group():
    layer, one_group = (build("proxy", options=o) for o in ({"base": "ln"}, {"num_groups": 1}))
    x = torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(layer(x), one_group(x), rtol=0, atol=0)
    assert make_norm("proxy", base="ln")(7, activation=F.relu)(torch.randn(2, 7, 3)).shape == (2, 7, 3)


def test_proxy_standardizes_a_gaussian_input_whatever_the_affine():
    torch.manual_seed(0)
    layer = make_norm("proxy", base="ln", proxy_eps=1e-12, num_samples=20000)(8, activation=nn.SiLU())
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 8))
        layer.bias.copy_(torch.linspace(-1, 1, 8))
    y = layer(torch.randn(4, 8, 128, 128))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=0.02, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(8), atol=0.03, rtol=0)


def test_proxy_is_finite_where_a_large_bias_turns_all_of_a_channel_off_or_on():
    layer = build("proxy", activation=nn.ReLU())
    x = torch.randn(2, 6, 4, 4)
    for bias in (-1e3, 1e3):
        nn.init.constant_(layer.bias, bias)
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        assert all(t.isfinite().all() for t in (y, *grads))
        if bias < 0:
            assert torch.equal(y, torch.zeros_like(y))
        else:  # linear there: the base in units of the proxy
            base = (F.group_norm(x, 2) - layer.proxy_mean.view(-1, 1, 1)) * layer.weight.view(-1, 1, 1)
            spread = ((1 + layer.proxy_scale) * layer.weight).view(-1, 1, 1)
            # 200 quantiles of a normal variable have a variance a little below 1
            torch.testing.assert_close(y, base / torch.sqrt(spread**2 * 0.9936 + 0.03), atol=2e-3, rtol=2e-3)


def test_proxy_applies_a_module_with_parameters_per_channel_and_trains_them():
    prelu = nn.PReLU(6, 0.25)
    with torch.no_grad():
        prelu.weight.copy_(torch.linspace(0, 0.5, 6))
    layer = make_norm("proxy", num_groups=2)(6, activation=prelu).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    y = layer(x)
    for j in range(6):
        slope = prelu.weight[j].item()
        one = make_norm("proxy", num_groups=2)(6, activation=lambda t, a=slope: F.leaky_relu(t, a), dtype=torch.float64)
        torch.testing.assert_close(y[:, j], one(x)[:, j])
    y.square().sum().backward()
    assert prelu.weight.grad.abs().min() > 0


def test_proxys_quantiles_stay_exact_when_the_module_is_cast():
    layer = make_norm("proxy", num_groups=2)(6, activation=nn.ReLU())
    x = torch.randn(2, 6, 4, 4)
    cast = copy.deepcopy(layer).bfloat16().float()
    torch.testing.assert_close(cast(x), layer(x), rtol=0, atol=0)
    assert not list(layer.buffers())


# --- inside a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_network_trains_and_evaluates_with_no_activation_beside_the_norms(name):
    torch.manual_seed(0)
    options = {"num_groups": 8} if name in GROUPED else {}
    net = build_net("resnet8", make_norm(name, **options), num_classes=10, in_channels=1)
    blocks = [m for m in net.modules() if isinstance(m, ConvNormAct)]
    assert len(blocks) == 7
    assert all(block.activation is None for block in blocks)
    x, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = [p.clone() for p in net.parameters()]
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert net.eval()(x).isfinite().all()
    # the first norm of a block has its activation, the last has none
    fused = {"frn": "tau", "evonorm_b0": "v", "evonorm_s0": "v", "proxy": "activation"}[name]
    for path, norm in norm_modules(net):
        assert (getattr(norm, fused) is None) == path.endswith("second.norm"), path
    assert equivalent(net) is None
    recalibrate(net, [x])
    assert net(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_last_gamma_can_start_at_zero(name):
    options = {"num_groups": 8} if name in GROUPED else {}
    net = build_net("resnet8", make_norm(name, **options), num_classes=10, in_channels=1, zero_init_last_gamma=True)
    last = [norm for path, norm in norm_modules(net) if path.endswith("second.norm")]
    y = last[0](torch.randn(2, 16, 4, 4))
    torch.testing.assert_close(y, torch.zeros_like(y))
