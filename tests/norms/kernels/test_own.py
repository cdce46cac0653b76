"""Sums and gradients of layers with a backward of their own, against literal float64 versions."""

import pytest
import torch

from norms.kernels import by_moments, own

SHAPES = [(6, 3), (6, 3, 5), (6, 8, 4, 3), (6, 2, 2, 3, 2)]


def tensors(shape, far=0.0, dtype=torch.float32):
    """dy and x, and tables (K, C) for K rows."""
    draw = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    x = (x + far).to(dtype)
    if len(shape) == 4:
        dy, x = (t.to(memory_format=torch.channels_last) for t in (dy, x))
    return dy.to(dtype), own.lying(x)


def tables(rows, channels, far=0.0):
    draw = torch.Generator().manual_seed(1)
    found = [torch.randn(rows, channels, generator=draw, dtype=torch.float64) for _ in range(4)]
    found[1] += far  # the centre
    return found


def literal(dy, x, factor, centre, slope, rest):
    """Sums of dy * (x - centre) and dy, and the blend, sample by sample in float64."""
    rows, product, total, y = (
        len(centre),
        torch.zeros_like(centre),
        torch.zeros_like(centre),
        torch.zeros_like(x).double(),
    )
    for n in range(len(x)):
        k = n % rows
        for c in range(x.shape[1]):
            pull, away = dy[n, c].double(), x[n, c].double() - centre[k, c]
            product[k, c] += (pull * away).sum()
            total[k, c] += pull.sum()
            y[n, c] = factor[k, c] * pull + slope[k, c] * away + rest[k, c]
    return product, total, y


@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["first", "differentiable"])
def test_sums_and_blend_are_their_definitions_where_nothing_large_is_subtracted(shape, rows, far, again):
    dy, x = tensors(shape, far)
    factor, centre, slope, rest = tables(rows, shape[1], far)
    product, total, expected = literal(dy, x, factor, centre, slope, rest)
    with torch.set_grad_enabled(again):
        found = own.sums(dy, x, centre)
        y = own.blend(dy, x, factor, centre, slope, rest)
    torch.testing.assert_close(found, (product, total), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_both_have_derivatives_where_they_are_asked_for(shape):
    dy, x = (t.requires_grad_() for t in tensors(shape, dtype=torch.float64))
    given = tables(2, shape[1])
    assert torch.autograd.gradcheck(lambda dy, x: own.sums(dy, x, given[1]), (dy, x))
    assert torch.autograd.gradcheck(lambda dy, x: own.blend(dy, x, *given), (dy, x))


def test_a_part_of_no_samples_has_an_output_of_none_sample_by_sample():
    x = torch.zeros(0, 3, 4, requires_grad=True)
    y, mean, var = by_moments(x, lambda mean, var: (torch.rsqrt(var + 1), -mean))
    assert y.shape == x.shape
    assert mean.shape == var.shape == (0, 3)
    y.sum().backward()
    assert x.grad is not None
