"""norms.kernels.curves: native loops and operations of torch against the equations, value by value, in float64."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from norms.kernels import native, plain
from norms.kernels.curves import divided, gated
from norms.kernels.moments import moments

CURVES = {"gated": (native.GATE, plain.gated, gated, 3), "divided": (native.DIVIDE, plain.divided, divided, 5)}
SHAPES = [
    (1, 1, 1),
    (1, 7, 1),
    (5, 1, 3),
    (1, 1, 1031),
    (3, 17, 13),
    (4, 8, 64),
    (2, 9, 5, 7),
    (3, 37, 3, 2, 2),
    (7, 5),
]
LAYOUTS = ["contiguous", "channels innermost"]


def tensor(shape, layout="contiguous", dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def tables(name, rows, channels, seed=5):
    """As an evonorm has them: what is under the line is above 0."""
    drawn = torch.randn(CURVES[name][3], rows, channels, generator=torch.Generator().manual_seed(seed)).double()
    if name == "divided":
        drawn[1:3] = drawn[1:3].abs() + 0.3
    return drawn


def value(name, x, k):
    """One value, by its equation; k are the numbers of its cell."""
    if name == "gated":
        z = k[0] * x
        sigmoid = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
        return x * sigmoid * k[1] + k[2]
    return x / max(k[2], k[0] * x + k[1]) * k[3] + k[4]


def literal(name, x, k):
    """x (N, C, *) float64 and tables (numbers, K, C)."""
    flat, y = x.reshape(*x.shape[:2], -1), torch.empty_like(x).reshape(*x.shape[:2], -1)
    for n in range(flat.shape[0]):
        for c in range(flat.shape[1]):
            numbers = k[:, n % k.shape[1], c].tolist()
            for p, one in enumerate(flat[n, c].tolist()):
                y[n, c, p] = value(name, one, numbers)
    return y.reshape(x.shape)


def derivatives(name, x, k, dy):
    """The gradients of x and of the tables, of plain operations in float64, which `literal` has the values of."""
    x, k = x.double().requires_grad_(), k.clone().requires_grad_()
    return torch.autograd.grad(CURVES[name][1](x, *k), (x, k), dy.double())


@pytest.mark.native
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_loops_are_the_equations_and_their_derivatives(name, shape, layout, dtype):
    kind, in_torch = CURVES[name][:2]
    x, dy = tensor(shape, layout, dtype), tensor(shape, layout, dtype, seed=1)
    small = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    close = partial(torch.testing.assert_close, rtol=small, atol=small, check_dtype=False)
    for rows in {1, shape[0]}:
        k = tables(name, rows, shape[1])
        truth = literal(name, x.double(), k)
        y = native.curve(kind, x, *k)
        assert y.dtype == dtype
        assert y.stride() == x.stride()
        close(y.double(), truth)
        close(in_torch(x, *k).double(), truth)
        want_x, want_k = derivatives(name, x, k, dy)
        close(native.curve_blend(kind, dy, x, *k).double(), want_x)
        # sums are of many terms, whatever is left of them
        size = max(1, x.numel() // (rows * shape[1])) ** 0.5 if dtype != torch.float64 else 1
        torch.testing.assert_close(torch.stack(native.curve_sums(kind, dy, x, *k)), want_k, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gate_is_exact_to_the_last_digits_over_the_whole_range(layout, dtype):
    line = torch.cat((torch.linspace(-87, 87, 4096, dtype=torch.float64), torch.logspace(-30, 38, 4096).double()))
    x = torch.cat((line, -line)).to(dtype).reshape(1, 64, -1)
    x = x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)
    k = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)[:, None, None].expand(3, 1, 64).contiguous()
    wide = x.double()
    truth = wide * torch.where(wide > 0, 1 / (1 + torch.exp(-wide)), torch.exp(wide) / (1 + torch.exp(wide)))
    truth = torch.where(wide < -700, 0, truth)  # exp(-700) / 1 there
    rtol = 4e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(native.curve(native.GATE, x, *k).double(), truth, rtol=rtol, atol=1e-37)


@pytest.mark.native
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_extreme_values_give_what_torch_gives(name, layout, dtype):
    kind, in_torch, _, numbers = CURVES[name]
    inf, nan = math.inf, math.nan
    extreme = torch.tensor([1e4, -1e4, 1e30, -1e30, inf, -inf, nan, 0.0, 90.0, -90.0, 104.0, -104.0, 1e-30])
    x = extreme.to(dtype).reshape(1, 1, -1).repeat(1, 3, 1)
    x = x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)
    k = torch.ones(numbers, 1, 3, dtype=torch.float64)
    k[0, 0] = torch.tensor([1.0, -1.0, 0.0])
    given, dy = x.clone(memory_format=torch.preserve_format).requires_grad_(), torch.ones_like(x)
    y = in_torch(given, *k)
    dx = torch.autograd.grad(y, given, dy)[0]
    small = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(native.curve(kind, x, *k), y.detach(), **small)
    got = native.curve_blend(kind, dy, x, *k)
    assert got[x.isnan()].isnan().all()
    sound = y.isfinite()  # inf / inf is none, and torch's derivative there is none either, where the loop's may be 0
    torch.testing.assert_close(got[sound], dx[sound], **small)


@pytest.mark.native
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_thread_and_two_give_the_same_bits(name, layout):
    kind = CURVES[name][0]
    x, dy = (tensor((6, 37, 41, 17), layout, torch.float32, seed) for seed in (0, 1))
    k, own = tables(name, 6, 37), tuple(torch.randn(3, 6, 37, dtype=torch.float64))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                (
                    native.curve(kind, x, *k),
                    *native.curve_sums(kind, dy, x, *k),
                    native.curve_blend(kind, dy, x, *k, moments=own),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def rule(name, mean, var, *parameters):
    """An evonorm's: the moments of each sample are in the numbers, some of which have one row only."""
    if name == "gated":
        gate, weight, bias = parameters
        return gate, torch.rsqrt(var + mean.square() + 0.1) * weight, bias
    gate, weight, bias, more = parameters
    return gate, torch.sqrt(var + 0.1), torch.sqrt(var.mean(0, keepdim=True) + more.square()), weight, bias + 0 * mean


def parameters(name, channels):
    drawn = torch.randn(3 if name == "gated" else 4, channels, generator=torch.Generator().manual_seed(3)).double()
    return [p.clone().requires_grad_() for p in drawn]


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [None, 2])
def test_first_and_second_derivatives_through_the_moments(name, layout, rows):
    x = tensor((4, 3, 2, 2), layout).requires_grad_()

    def f(x, *given):
        return CURVES[name][2](x, partial(rule, name), *given, rows=rows)[0]

    given = (x, *parameters(name, 3))
    assert gradcheck(f, given, fast_mode=True)
    assert gradgradcheck(f, given, fast_mode=True)


@pytest.mark.native
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_native_and_torch_forms_agree_in_outputs_gradients_and_moments(name, layout, dtype, monkeypatch):
    x, dy = (tensor((4, 9, 5, 7), layout, dtype, seed) for seed in (0, 1))
    given = [x.requires_grad_(), *parameters(name, 9)]

    def both():
        y, mean, var = CURVES[name][2](x, partial(rule, name), *given[1:])
        return y, mean, var, *torch.autograd.grad(y, given, dy)

    fast = both()
    monkeypatch.setattr(native, "_library", None)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for one, other in zip(fast, both(), strict=True):
        torch.testing.assert_close(one, other, **tolerance)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("name", CURVES)
def test_gradients_that_nobody_wants_are_not_there_and_the_others_are_right(name):
    x, given = tensor((2, 3, 4)), parameters(name, 3)
    y = CURVES[name][2](x, partial(rule, name), *given)[0]
    alone = torch.autograd.grad(y.square().sum(), given)
    y = CURVES[name][2](x.requires_grad_(), partial(rule, name), *given)[0]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, *given])[1:], alone)
    with torch.no_grad():
        assert not CURVES[name][2](x, partial(rule, name), *given)[0].requires_grad


@pytest.mark.parametrize("name", CURVES)
def test_no_samples_and_no_positions_give_nothing(name):
    for shape in ((0, 3, 4), (2, 3, 0)):
        x, given = torch.zeros(shape, dtype=torch.float64, requires_grad=True), parameters(name, 3)
        y = CURVES[name][2](x, partial(rule, name), *given)[0]
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", CURVES)
def test_tables_of_another_shape_are_a_clear_value_error(name):
    x = tensor((4, 3, 2))
    with pytest.raises(ValueError, match="coefficients of shape"):
        CURVES[name][2](x, lambda mean, var: torch.ones(CURVES[name][3], 3, 3).unbind())
    with pytest.raises(ValueError, match="rows=3"):
        CURVES[name][2](x, partial(rule, name), *parameters(name, 3), rows=3)


@pytest.mark.parametrize("name", CURVES)
def test_the_moments_that_come_back_are_those_of_x(name):
    x = tensor((4, 3, 5, 2), "channels innermost", torch.float32)
    found = CURVES[name][2](x.requires_grad_(), partial(rule, name), *parameters(name, 3), rows=2)[1:]
    torch.testing.assert_close(found, moments(x.detach(), 2))
    assert not any(t.requires_grad for t in found)
