"""norms.kernels.moments, affine, by_moments and grouping.normalize against literal loops, in every place of use."""

import contextlib
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from norms.kernels import affine, by_moments, moments, native, plain
from norms.kernels.grouping import normalize

# of torch's own, when it first takes forward-mode derivatives
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

EPS = 0.1


def literal_moments(x, rows):
    x, (samples, channels) = x.double(), x.shape[:2]
    rows = samples if rows is None else rows
    mean, var = (torch.zeros(rows, channels, dtype=torch.float64) for _ in range(2))
    for k, c in itertools.product(range(rows), range(channels)):
        values = x[k::rows, c].flatten().tolist()
        mean[k, c] = sum(values) / len(values)
        var[k, c] = sum((v - float(mean[k, c])) ** 2 for v in values) / len(values)
    return mean, var


def literal_affine(x, scale, shift, floor=None):
    y = x.double().clone()
    for n, c in itertools.product(*map(range, x.shape[:2])):
        row = n % len(scale)
        y[n, c] = scale[row, c] * y[n, c] + shift[row, c]
        if floor is not None:
            y[n, c] = y[n, c].clamp(min=float(floor[row, c]))
    return y


def literal_normalize(x, weight, bias, groups, sets, eps=EPS):
    flat = x.double().reshape(len(x), groups, -1)
    y, mean, var = torch.empty_like(flat), *(torch.empty(sets, groups, dtype=torch.float64) for _ in range(2))
    for k, g in itertools.product(range(sets), range(groups)):
        values = flat[k::sets, g]
        mean[k, g], var[k, g] = values.mean(), values.var()  # unbiased
        y[k::sets, g] = (values - mean[k, g]) / torch.sqrt(values.var(unbiased=False) + eps)
    y = y.reshape(x.shape)
    if weight is not None:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        y = y * weight.double().view(shape) + bias.double().view(shape)
    return y, mean, var


LAYOUTS = {
    "contiguous": lambda n, c, *p: torch.randn(n, c, *p),
    "channels last": lambda n, c, *p: torch.randn(n, *p, c).movedim(-1, 1),
    "offset": lambda n, c, *p: torch.randn(n * c * torch.Size(p).numel() + 3)[3:].view(n, c, *p),
    "sliced": lambda n, c, *p: torch.randn(n, 2 * c, *p, 2)[:, ::2, ..., 1],
    "transposed": lambda n, c, *p: torch.randn(c, n, *p).transpose(0, 1),
    "reversed": lambda n, c, *p: torch.randn(*reversed((n, c, *p))).permute(*reversed(range(2 + len(p)))),
    "expanded": lambda n, c, *p: torch.randn(1, c, *[1] * len(p)).expand(n, c, *p),
}
SHAPES = [(4, 3, 2, 3), (4, 3), (6, 1, 5), (2, 11, 7), (2, 5, 1, 1), (4, 2, 2, 3, 2), (1, 3, 13)]


def input_of(layout, shape=(4, 3, 2, 3), dtype=torch.float64):
    return LAYOUTS[layout](*shape).to(dtype)


def tables(rows=2, channels=3, how_many=3):
    made = torch.randn(how_many, rows, channels, dtype=torch.float64)
    return [t.clone().requires_grad_() for t in made]


def whiten(mean, var, weight, bias):
    """The rule of a batch norm."""
    scale = torch.rsqrt(var + EPS)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moments_and_maps_of_every_layout_are_the_literal_ones(layout, shape, dtype):
    x = input_of(layout, shape, dtype)
    for rows in (k for k in (None, *range(1, len(x) + 1)) if k is None or len(x) % k == 0):
        found = moments(x, rows)
        for t, expected in zip(found, literal_moments(x, rows), strict=True):
            assert t.dtype == torch.float64
            torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)
        scale, shift, floor = (t.detach() for t in tables(rows or len(x), shape[1]))
        for low in (None, floor):
            y = affine(x, scale, shift, low)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            close = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
            torch.testing.assert_close(y.double(), literal_affine(x, scale, shift, low), rtol=close, atol=close)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 2, 5), (4, 3, 2, 2, 5)], ids=str)
def test_channels_innermost_stay_innermost(shape):
    """Of one spatial axis, too, for which torch has no name."""
    x = input_of("channels last", shape, torch.float32)
    for y in (
        affine(x, torch.ones(3), torch.ones(3)),
        by_moments(x, whiten, None, None, rows=1)[0],
        normalize(x, None, None, 3, 2, EPS)[0],
    ):
        assert y.stride() == x.stride()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(by_moments(x, whiten, None, None, rows=2)[0].square().sum(), x)
    assert dx.stride() == x.stride()


GROUPINGS = [  # of 3 x 8 values: (groups, sets)
    *itertools.product((1, 3, 2, 6, 4, 12, 8), (1, 2, 4)),  # 2 and 4 cut channels, 8 too: runs of 3 in a channel of 8
    (3, 3),  # sets of 2, 1 and 1 samples
]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize(("groups", "sets"), GROUPINGS, ids=str)
@pytest.mark.parametrize("parameters", [True, False], ids=["affine", "bare"])
def test_normalization_by_groups_and_sets_is_the_literal_one(layout, groups, sets, parameters):
    x = input_of(layout, (4, 3, 4, 2)).requires_grad_()
    weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind() if parameters else (None, None)
    weight, bias = (None if p is None else p.clone().requires_grad_() for p in (weight, bias))
    found, expected = normalize(x, weight, bias, groups, sets, EPS), literal_normalize(x, weight, bias, groups, sets)
    whole = slice(0, 4 % sets or None)  # of a single sample and one value per channel there is no unbiased variance
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].double(), expected[1])
    torch.testing.assert_close(found[2][whole].double(), expected[2][whole])
    leaves = [t for t in (x, weight, bias) if t is not None]
    factor = torch.randn(x.shape, dtype=torch.float64)
    own, other = (torch.autograd.grad((y[0].sin() * factor).sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("shape", "groups", "sets"),
    [((4, 3, 2, 2), g, k) for g, k in ((1, 1), (3, 1), (2, 2), (12, 2), (1, 4), (3, 3))] + [((16, 3, 2, 2), 4, 1)],
    ids=str,  # the last: few positions of a channel in a group, in many samples
)
def test_derivatives_of_normalization_are_right_twice(layout, shape, groups, sets):
    x = input_of(layout, shape).requires_grad_()
    weight, bias = (t[0].detach().requires_grad_() for t in tables(how_many=2))

    def call(x, weight, bias):
        return normalize(x, weight, bias, groups, sets, EPS)[0]

    assert torch.autograd.gradcheck(call, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: normalize(x, None, None, groups, sets, EPS)[0], (x,), fast_mode=True)


@pytest.mark.native
def test_given_moments_serve_in_the_place_of_computed_ones():
    """With the gradient of those of x, which they are."""
    x = input_of("channels last").requires_grad_()
    mean, var = (t.detach() for t in moments(x, 2))
    found, own = normalize(x, None, None, 3, 2, EPS, given=(mean, var)), normalize(x, None, None, 3, 2, EPS)
    torch.testing.assert_close(found, own)
    torch.testing.assert_close(*(torch.autograd.grad(y[0].pow(3).sum(), x)[0] for y in (found, own)))
    moved = normalize(x, None, None, 3, 2, EPS, given=(mean + 1, var))[0]
    torch.testing.assert_close(moved, own[0] - torch.rsqrt(var + EPS).repeat(2, 1)[..., None, None])


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_derivatives_of_moments_and_maps_are_right_twice(layout, rows):
    x = input_of(layout, (4, 3, 2, 2)).requires_grad_()
    scale, shift, floor = tables(rows or 4)
    for call, leaves in (
        (lambda x: moments(x, rows), (x,)),
        (affine, (x, scale, shift)),
        (affine, (x, scale, shift, floor)),
        (lambda x, scale: affine(x, scale, moments(x, rows)[0].square()), (x, scale)),
    ):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


RULES = {
    "whiten": (whiten, "both"),
    "without parameters": (whiten, "none"),
    "weight alone": (whiten, "first"),
    "constants": (lambda mean, var, *_: (torch.full_like(mean, 2), torch.ones_like(mean)), "none"),
    "one row": (lambda mean, var, w, b: (w, b), "both"),  # (C,), and nothing of x
    "of the variance alone": (lambda mean, var, w, b: (w * torch.exp(-var), b), "both"),
    "of the mean alone": (lambda mean, var, w, b: (w + mean.tanh(), b), "both"),
    "floor": (lambda mean, var, w, b: (*whiten(mean, var, w, b), mean * w), "both"),
    "constant floor": (lambda mean, var, w, b: (*whiten(mean, var, w, b), torch.zeros_like(mean)), "both"),
}


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_what_moments_and_a_map_give(name, rows):
    rule, which = RULES[name]
    x = input_of("channels last", (4, 3, 2, 2)).requires_grad_()
    weight, bias = (t[0].detach().requires_grad_() for t in tables(how_many=2))
    inputs = {"both": (weight, bias), "none": (None, None), "first": (weight, None)}[which]

    def by_pair(x, *inputs):
        coefficients = rule(*moments(x, rows), *inputs)
        return affine(x, *(t.expand(rows or 4, 3) for t in coefficients))

    y, mean, var = by_moments(x, rule, *inputs, rows=rows)
    torch.testing.assert_close(y, by_pair(x, *inputs))
    torch.testing.assert_close((mean, var), tuple(t.detach() for t in moments(x, rows)))
    assert [mean.requires_grad, var.requires_grad] == [False, False]
    leaves = tuple(t for t in (x, *inputs) if t is not None)

    def call(x, *given):
        rest = iter(given)
        return by_moments(x, rule, *(None if t is None else next(rest) for t in inputs), rows=rows)[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_only_what_wants_a_gradient_gets_one():
    x, (scale, shift) = input_of("contiguous"), tables(1, how_many=2)
    for y in (affine(x, scale, shift), by_moments(x, whiten, scale[0], shift[0], rows=1)[0]):
        assert all(g is not None for g in torch.autograd.grad(y.square().sum(), (scale, shift)))
    fixed = scale[0].detach()
    x.requires_grad_()
    for y in (
        affine(x, fixed, shift[0]),
        by_moments(x, whiten, fixed, shift[0], rows=1)[0],
        normalize(x, fixed, shift[0], 3, 1, EPS)[0],
        normalize(x.detach(), fixed, shift[0], 3, 1, EPS)[0],
    ):
        (found,) = torch.autograd.grad(y.sum(), (shift,))
        torch.testing.assert_close(found[0], torch.full((3,), 24.0, dtype=torch.float64))
    with torch.no_grad():
        assert not by_moments(x, whiten, scale[0], shift[0], rows=1)[0].requires_grad
    assert not moments(x.detach())[0].requires_grad


class Norm(nn.Module):
    """Every kernel, one after the other."""

    def __init__(self, channels=3, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, channels, dtype=dtype))
        self.bias = nn.Parameter(torch.linspace(-1, 1, channels, dtype=dtype))

    def forward(self, x):
        mean, var = moments(x, 2)
        scale = self.weight * torch.rsqrt(var + EPS)
        y = affine(x, scale, self.bias - mean * scale, -2 * torch.ones_like(scale))
        y = by_moments(y + x, whiten, self.weight, self.bias, rows=1)[0]
        return normalize(y * x, self.weight, self.bias, 1, len(x), EPS)[0]


def literal(norm, x):
    """The same in operations of torch."""
    mean, var = plain.moments(x, 2)
    scale = norm.weight * torch.rsqrt(var + EPS)
    y = plain.affine(x, scale, norm.bias - mean * scale, -2 * torch.ones_like(scale)) + x
    y = plain.affine(y, *(t.reshape(1, -1) for t in whiten(*plain.moments(y, 1), norm.weight, norm.bias))) * x
    return plain.normalize(y, norm.weight, norm.bias, 1, len(x), EPS)[0]


def gradients(norm, y, x):
    return torch.autograd.grad(y.pow(3).sum(), (x, norm.weight, norm.bias))


def test_functional_calls_and_transforms_of_torch_func_are_right():
    norm, x = Norm(), torch.randn(5, 4, 3, 2, 3, dtype=torch.float64)
    weights = dict(norm.named_parameters())

    def loss(by, weights, x):
        called = Norm()
        if by is literal:
            for name, value in weights.items():
                del called._parameters[name]
                setattr(called, name, value)
            return literal(called, x).pow(3).sum()
        return torch.func.functional_call(called, weights, (x,)).pow(3).sum()

    def mine(weights, x):
        return loss(None, weights, x)

    def other(weights, x):
        return loss(literal, weights, x)

    for transform in (
        lambda f: torch.vmap(f, (None, 0))(weights, x),
        lambda f: torch.func.grad(f, (0, 1))(weights, x[0]),
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)), (None, 0))(weights, x),
        lambda f: torch.func.jvp(f, (weights, x[0]), ({k: v.detach() * 2 for k, v in weights.items()}, x[1])),
        lambda f: torch.func.hessian(lambda t: f(weights, x[0] + t))(torch.zeros((), dtype=torch.float64)),
    ):
        torch.testing.assert_close(transform(mine), transform(other))
    torch.testing.assert_close(mine(weights, x[0]), other(weights, x[0]))
    copies = torch.vmap(lambda x: moments(x, 2), 3)(x.movedim(0, 3))
    torch.testing.assert_close(copies, tuple(torch.stack(t) for t in zip(*(moments(e, 2) for e in x), strict=True)))


def test_tensors_without_memory_have_shapes_and_types():
    with FakeTensorMode():
        x = torch.empty(4, 3, 2, 3, requires_grad=True)
        y = Norm(dtype=torch.float32)(x)
        y.sum().backward()
        assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)
    x = torch.empty(4, 3, 2, 3, device="meta", requires_grad=True)
    y = Norm(dtype=torch.float32).to("meta")(x)
    y.sum().backward()
    assert (y.shape, y.device.type, x.grad.shape) == (x.shape, "meta", x.shape)
    assert [t.dtype for t in moments(x)] == [torch.float64] * 2


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "on the CPU", "twice", "deepcopied"])
def test_gradients_are_the_same_by_every_way_to_them(how):
    norm, x = Norm(), input_of("channels last", (4, 3, 2, 3)).requires_grad_()
    expected = gradients(norm, literal(norm, x), x)
    with torch.autograd.graph.save_on_cpu() if how == "on the CPU" else contextlib.nullcontext():
        if how == "deepcopied":
            norm(x)
            norm = copy.deepcopy(norm)
        y = checkpoint(norm, x, use_reentrant=how == "reentrant") if "reentrant" in how else norm(x)
    if how == "twice":
        torch.autograd.grad(y.sum(), (x, norm.weight), retain_graph=True)
    if how == "reentrant":  # which knows .backward() alone
        y.pow(3).sum().backward()
        found = x.grad, norm.weight.grad, norm.bias.grad
    else:
        found = gradients(norm, y, x)
    torch.testing.assert_close(found, expected)
    if how == "twice":
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            gradients(norm, y, x)


@pytest.mark.native
@pytest.mark.parametrize(
    "call",
    [
        lambda x: moments(x)[1],
        lambda x: affine(x, torch.ones(3, requires_grad=True), torch.ones(3)),
        lambda x: by_moments(x, whiten, None, None)[0],
        lambda x: normalize(x, None, None, 3, 1, EPS)[0],
    ],
    ids=["moments", "affine", "by_moments", "normalize"],
)
def test_a_backward_after_its_input_was_changed_is_refused(call):
    x = torch.randn(4, 3, 5, requires_grad=True) * 1
    y = call(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_changes_nothing():
    norm, x = Norm(dtype=torch.float32), input_of("channels last", dtype=torch.float32).requires_grad_()
    plainly = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = norm(x)
        found = gradients(norm, cast, x)
        assert moments(x)[0].dtype == torch.float64
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plainly, rtol=0, atol=0)
    torch.testing.assert_close(found, gradients(norm, plainly, x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_with_sums_in_a_better_one(dtype):
    x = (torch.randn(4, 3, 30, 30) + 3).to(dtype).requires_grad_()
    norm = Norm(dtype=torch.float32)
    y = norm(x)
    exact = x.detach().double().requires_grad_()
    expected = literal(copy.deepcopy(norm).double(), exact)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(moments(x, 1)[1], literal_moments(x, 1)[1], rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == dtype


@pytest.mark.parametrize("training", [True, False], ids=["with gradient", "without"])
def test_compiled_functions_take_operations_of_torch(training):
    norm, x = Norm(), input_of("channels last").requires_grad_(training)
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
    if training:
        torch.testing.assert_close(gradients(norm, compiled(x), x), gradients(norm, norm(x), x))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (0, 3), (2, 0, 4)], ids=str)
def test_nothing_gives_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    mean, var = moments(x, 1)
    assert mean.shape == var.shape == (1, shape[1])
    parameters = torch.ones(shape[1], requires_grad=True), torch.ones(shape[1], requires_grad=True)
    y = affine(x, *parameters)
    z = by_moments(x, lambda mean, var, w, b: (w + var, b), *parameters, rows=1)[0]
    assert y.shape == z.shape == x.shape
    (y.sum() + z.sum()).backward()
    assert x.grad.shape == x.shape
    assert not parameters[0].grad.isnan().any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: moments(x, 3), r"rows=3: a divisor of the 4 samples is needed"),
        (lambda x: moments(x, 0), r"rows=0"),
        (lambda x: moments(x.long()), r"floating-point x \(N, C, \*\) is needed, given torch.int64"),
        (lambda x: moments(x[0, 0, 0]), r"given torch.float64 of shape \(3,\)"),
        (lambda x: affine(x, torch.ones(4), torch.ones(4)), r"coefficients of shape \(4,\), \(4,\) for x of shape"),
        (lambda x: affine(x, torch.ones(3, 3), torch.ones(3)), r"\(3,\) or \(K, 3\) with K a divisor"),
        (lambda x: affine(x, torch.ones(2, 3), torch.ones(4, 3)), r"coefficients of shape"),
        (lambda x: by_moments(x, whiten, None, None, rows=3), r"rows=3"),
        (lambda x: by_moments(x, lambda m, v: (m[:1], m), rows=4), None),
        (lambda x: by_moments(x, lambda m, v: (m[:2], m), rows=4), r"coefficients of shape \(2, 3\), \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, words):
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    if words is None:  # one row serves all
        call(x)
        return
    with pytest.raises(ValueError, match=words):
        call(x)


LARGE = [(16, 8, 40, 40), (3, 1, 70000), (2, 600, 9), (5, 7, 31, 37)]


@pytest.mark.native
@pytest.mark.parametrize("outlier", [False, True], ids=["even", "first block elsewhere"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_means_lose_nothing(shape, layout, outlier):
    """|mean| / std of 1e4 in float32."""
    means = 1e4 * torch.randn(shape[1], dtype=torch.float64).sign()
    x = (input_of(layout, shape) + means.view(-1, *[1] * (len(shape) - 2))).float()
    if outlier:
        x.flatten(2)[0, :, : max(1, x[0, 0].numel() // 1000)] = 0
    exact = x.double().requires_grad_()
    x.requires_grad_()
    for rows in (1, None) if shape[0] == 5 else (1, None, shape[0]):
        for found, expected in zip(moments(x, rows), plain.moments(exact, rows or len(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        factor = torch.randn(shape)
        y, z = (by_moments(t, lambda m, v: whiten(m, v + 1e-5 - EPS, None, None), rows=rows)[0] for t in (x, exact))
        torch.testing.assert_close(y.double(), z, rtol=1e-3, atol=1e-3)
        own, other = (torch.autograd.grad((t * factor).sum(), s)[0] for t, s in ((y, x), (z, exact)))
        torch.testing.assert_close(own.double(), other, rtol=1e-3, atol=1e-3)
    for groups, sets in ((1, shape[0]), (shape[1], 1), (shape[1], shape[0])):
        y, z = (normalize(t, None, None, groups, sets, 1e-5)[0] for t in (x, exact))
        torch.testing.assert_close(y.double(), z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=pytest.mark.native), "torch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-6, 1e-12, 0.0, -1e-30])
def test_the_weight_of_a_channel_that_training_gave_up_has_an_exact_gradient(weight, layout, kernels, monkeypatch):
    """scale * x + shift is 0 at -shift / scale, which is far from every x there."""
    if kernels == "torch":
        monkeypatch.setattr(native, "ready", lambda x: None)
    x = input_of(layout, (8, 3, 12, 12)).float() + 1
    factor = torch.randn(x.shape)

    def run(x):
        weights = torch.full((3,), weight, dtype=x.dtype, requires_grad=True)
        bias = torch.ones(3, dtype=x.dtype, requires_grad=True)
        x = x.detach().requires_grad_()
        found = []
        for y in (
            by_moments(x, whiten, weights, bias, rows=1)[0],
            affine(x, weights, bias),
            affine(x, weights, bias, torch.full((3,), 0.5)),
        ):
            found += [y, *torch.autograd.grad((y * factor.to(x.dtype)).sum(), (x, weights, bias))]
        return found

    for single, double in zip(run(x), run(x.double()), strict=True):
        largest = max(float(double.detach().abs().max()), 1e-37)
        torch.testing.assert_close(single.double() / largest, double / largest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=pytest.mark.native), "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_one_bad_value_stays_where_it_is(value, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(native, "ready", lambda x: None)
    for place in [(i, 1, j) for i in range(2) for j in range(5)]:
        x = torch.randn(2, 3, 5)
        changed = x.clone()
        changed[place] = value
        for scale in (1.5, 1e-20):
            y, other = (affine(t, torch.full((3,), scale), torch.ones(3)) for t in (changed, x))
            there = torch.zeros(x.shape, dtype=torch.bool)
            there[place] = True
            torch.testing.assert_close(y[~there], other[~there])
        for own, expected in zip(moments(changed, 1), moments(x, 1), strict=True):
            torch.testing.assert_close(own[:, ::2], expected[:, ::2])
            assert not abs(own[0, 1]) < 1e30


@pytest.mark.native
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_one_and_two_threads_give_the_same_bits(shape, layout, dtype):
    x = input_of(layout, shape, dtype).requires_grad_()
    weight, bias = torch.randn(2, shape[1])
    before, runs = torch.get_num_threads(), []
    factor = torch.randn(shape).to(dtype)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = [*moments(x), *moments(x, 1)]
            for y in (
                affine(x, weight, bias, bias.square()),
                by_moments(x, whiten, weight, bias, rows=1)[0],
                *(normalize(x, weight, bias, g, k, EPS)[0] for g in (1, shape[1]) for k in (1, shape[0])),
            ):
                found += [y, *torch.autograd.grad((y * factor).sum(), x)]
            runs.append(found)
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 17, 31, 33, 64, 67])


@pytest.mark.native
@settings(max_examples=150, deadline=None)
@given(
    per_row=st.integers(1, 5),
    rows=st.integers(1, 4),
    channels=sizes,
    positions=sizes,
    last=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    floor=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 2**31),
)
def test_the_library_gives_what_operations_of_torch_give(
    per_row, rows, channels, positions, last, kind, floor, mean, seed
):
    draws = torch.Generator().manual_seed(seed)
    shape = (per_row * rows, positions, channels) if last else (per_row * rows, channels, positions)
    x = (torch.randn(shape, generator=draws) + mean).to(kind)
    x = x.movedim(-1, 1) if last else x
    dy = torch.randn(x.shape, generator=draws).to(kind)
    close = {"rtol": 2e-2, "atol": 2e-2} if kind == torch.bfloat16 else {"rtol": 1e-3, "atol": 2e-3}
    scale, own_mean, d_mean, d_var, low = torch.randn(5, rows, channels, generator=draws, dtype=torch.float64)
    shift = low - mean * scale
    tables = scale, shift, low + 0.013 if floor else None
    own, other = moments(x, rows), plain.moments(x, rows)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native.affine(x, *tables), plain.affine(x, *tables), **close)
    # a value at the floor may fall to either side of it by rounding
    line = plain.affine(x.double(), *tables[:2])
    near = False if not floor else bool(((line - plain.affine(x.double(), 0 * scale, tables[2])).abs() < 1e-2).any())
    if not near:
        for a, b in zip(native.sums(dy, x, *tables), plain.sums(dy, x, *tables), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(
                    a, b, rtol=1e-3, atol=1e-2 * (1 + abs(mean)) * (1 + (kind == torch.bfloat16))
                )
        own_mean = own[0]
        for of in ((own_mean, d_mean, d_var), None):
            a, b = native.blend(dy, x, *tables, of), plain.blend(dy, x, *tables, *(of or ()))
            torch.testing.assert_close(a, b, **close)


@pytest.mark.native
@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(1, 18),
    channels=st.integers(1, 12),
    positions=st.sampled_from([1, 2, 3, 4, 6, 8, 9, 16, 30]),
    last=st.booleans(),
    data=st.data(),
)
def test_the_library_normalizes_as_operations_of_torch_do(samples, channels, positions, last, data):
    values = channels * positions
    sets = data.draw(st.integers(1, samples))
    divisors = [g for g in range(1, values + 1) if values % g == 0]
    groups = data.draw(st.sampled_from(divisors)) if samples % sets == 0 else channels
    shape = (samples, positions, channels) if last else (samples, channels, positions)
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=draws, dtype=torch.float64)
    x = x.movedim(-1, 1) if last else x
    dy = torch.randn(x.shape, generator=draws, dtype=torch.float64)
    weight, bias = torch.randn(2, channels, generator=draws, dtype=torch.float64)
    own = native.normalize(x, weight, bias, groups, sets, EPS)
    torch.testing.assert_close(own, plain.normalize(x, weight, bias, groups, sets, EPS))
    found = native.normalize_backward(dy, x, weight, own[1], (True, True), False, 0)
    torch.testing.assert_close(found, plain.normalize_backward(dy, x, weight, groups, sets, EPS))
