"""none, in, ln, gn, pn, layer2d, rms against literal float64 transcriptions, and the identities between them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.convnext import LayerNorm2d

from norms.registry import make_norm


def literal(name, x, groups, eps=1e-5):
    """The papers' equations in loops; x (N, C, *) float64."""
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    y = torch.empty_like(flat)
    n, c, p = flat.shape
    for i in range(n):
        if name in ("pn", "layer2d", "rms"):
            for j in range(p):
                v = flat[i, :, j]
                squares = ((v - v.mean()) ** 2).sum()
                y[i, :, j] = {
                    "pn": (v - v.mean()) / torch.sqrt(squares / (c - 1) + eps),
                    "layer2d": (v - v.mean()) / torch.sqrt(squares / c + 1e-6),
                    "rms": v / torch.sqrt((v**2).sum() / c + eps),
                }[name]
            continue
        size = {"none": c, "in": 1, "ln": c, "gn": c // groups}[name]
        for start in range(0, c, size):
            v = flat[i, start : start + size]
            mean, var = v.mean(), ((v - v.mean()) ** 2).mean()
            y[i, start : start + size] = v if name == "none" else (v - mean) / torch.sqrt(var + eps)
    return y.reshape(x.shape)


def build(name, channels, groups=2, **contract):
    layer = make_norm(name, **({"num_groups": groups} if name == "gn" else {}))(channels, **contract)
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
            layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer


def per_channel(p, x):
    return p.view(-1, *[1] * (x.dim() - 2))


NAMES = ["none", "in", "ln", "gn", "pn", "layer2d", "rms"]
SHAPES = [(3, 6, 5), (3, 6, 4, 5), (2, 6, 3, 2, 2)]


CASES = [(name, shape) for name in NAMES for shape in SHAPES]
# in refuses one position, tested below
CASES += [(name, shape) for name in NAMES if name != "in" for shape in ((3, 6), (1, 6, 1, 1))]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_is_the_equation_in_outputs_and_gradients(name, shape, affine):
    torch.manual_seed(0)
    layer = build(name, 6, affine=affine, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    truth = literal(name, x, 2)
    if affine:
        truth = truth * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    y = layer(x)
    torch.testing.assert_close(y, truth)
    inputs = [x, *layer.parameters()]
    dy = torch.randn_like(x)
    for got, want in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(truth, inputs, dy), strict=True):
        torch.testing.assert_close(got, want)
    assert (layer.weight is None) == (layer.bias is None) == (not affine)
    torch.testing.assert_close(layer.eval()(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives_are_exact(name):
    torch.manual_seed(0)
    layer = build(name, 4, dtype=torch.float64)
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_keeps_dtype_and_computes_in_float32_or_better(name, dtype):
    torch.manual_seed(0)
    layer = build(name, 6)  # float32 parameters whatever the input
    x = (torch.randn(2, 6, 8, 8) + 3).to(dtype)
    y = layer(x)
    truth = literal(name, x.double(), 2) * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y, truth.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_input_type_back(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert build(name, 6)(torch.randn(2, 6, 4, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "rms")])  # which subtract nothing
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_survives_large_means_in_float32(name, layout):
    torch.manual_seed(0)
    x = (torch.randn(4, 64, 16, 16) + 1e4).contiguous(memory_format=layout)
    y = build(name, 64, groups=8, affine=False)(x)
    torch.testing.assert_close(y.double(), literal(name, x.double(), 8), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last_is_kept_and_gives_the_same(name, layout):
    shape = (2, 6, 3, 4) if layout is torch.channels_last else (2, 6, 3, 2, 2)
    x = torch.randn(shape)
    layer = build(name, 6)
    y = layer(x.contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    layer = build(name, 6)
    x = torch.randn(3, 2, 6, 4, 4)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name):
    torch.compiler.reset()
    layer = build(name, 6)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    dy = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(compiled(x), layer(x))
    got, want = (torch.autograd.grad(f(x), (x, layer.weight), dy) for f in (compiled, layer))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_reloads(name):
    layer = build(name, 6)
    x = torch.randn(2, 6, 4, 4)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    fresh = make_norm(name, **({"num_groups": 2} if name == "gn" else {}))(6)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(stream, weights_only=False), fresh):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**16))
def test_groups_of_gn_run_from_ln_to_in(n, c, h, w, seed):
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(build("gn", c, groups=1)(x), build("ln", c)(x))
    torch.testing.assert_close(build("gn", c, groups=c)(x), build("in", c)(x))


@pytest.mark.parametrize("name", ["in", "ln", "gn", "pn", "layer2d"])
def test_scale_and_shift_of_a_sample_change_nothing(name):
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    layer = build(name, 6)
    factor = torch.tensor([3.0, 7.0], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(layer(factor * x + 5), layer(x), atol=1e-3, rtol=1e-3)
    assert (layer(x * x) - layer(x)).abs().max() > 0.1


def test_rms_ignores_scale_alone():
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    layer = build("rms", 6)
    torch.testing.assert_close(layer(5 * x), layer(x), atol=1e-3, rtol=1e-3)
    assert (layer(x + 5) - layer(x)).abs().max() > 0.1


def gradients(layer, x, dy):
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


def test_layer2d_is_convnexts_layer_norm_in_outputs_and_gradients():
    ours, theirs = build("layer2d", 6), LayerNorm2d(6, eps=1e-6)
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(2, 6, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(gradients(ours, x, dy), gradients(theirs, x, dy))


def test_layer2d_is_pn_with_the_biased_variance_to_the_last_bit():
    x, dy = torch.randn(2, 6, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    ours, biased = build("layer2d", 6), make_norm("pn", unbiased=False, eps=1e-6)(6)
    biased.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), biased(x))
    assert all(map(torch.equal, gradients(ours, x, dy), gradients(biased, x, dy)))


def test_the_two_variances_of_pn_differ_by_their_factor():
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    unbiased = make_norm("pn", eps=1e-5)(6)
    biased = make_norm("pn", eps=1e-5 * 5 / 6, unbiased=False)(6)  # a variance 5/6 as large, eps with it
    torch.testing.assert_close(unbiased(x), biased(x) * (5 / 6) ** 0.5)
    assert "unbiased=False" in repr(biased)


def test_rms_is_torchs_over_the_channels():
    ours, theirs = make_norm("rms")(6), torch.nn.RMSNorm(6, eps=1e-5)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_independent_of_their_batch(name):
    x = torch.randn(4, 6, 4, 4)
    layer = build(name, 6)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize("name", NAMES)
def test_an_inplace_activation_after_it_leaves_the_input_alone(name):
    for affine in (True, False):
        x = torch.randn(2, 6, 4, 4)
        before = x.clone()
        F.relu(build(name, 6, affine=affine)(x), inplace=True)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("gn")(48), "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (lambda: make_norm("gn", num_groups=0)(4), "1, 2, 4"),
        (lambda: make_norm("pn")(1), "at least 2"),
        (lambda: make_norm("layer2d")(1), "at least 2"),
        (lambda: make_norm("rms")(1), "at least 2"),
        (lambda: make_norm("rms")(4)(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("in")(4)(torch.randn(2, 4, 1, 1)), "more than one value"),
        (lambda: make_norm("in")(4).eval()(torch.randn(2, 4, 1, 1)), "more than one value"),
        (lambda: make_norm("gn", num_groups=4)(4)(torch.randn(2, 4)), "more than one value"),
        (lambda: make_norm("ln")(4)(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("ln")(4)(torch.randn(4)), "4 channels"),
        (lambda: make_norm("none")(0), "num_channels=0"),
        (lambda: make_norm("ln", eps=-1.0)(4), "eps=-1.0"),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()
