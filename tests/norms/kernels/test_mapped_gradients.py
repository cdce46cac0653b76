"""A first backward whose gradients are no ordinary memory: mapped after a forward without vmap, or negated views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from norms.kernels import affine, by_moments, moments
from norms.kernels.curves import gated
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.rows import normalize_rows


def _line(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight * torch.rsqrt(var + 1e-5)
    return scale, bias - mean * scale


def _gate(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight, torch.rsqrt(var + 1e-5), bias


def _moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = moments(x, 2)
    return mean * weight + var * bias


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "normalize": lambda x, w, b: normalize(x, w, b, 2, 2, 1e-5)[0],
    "uneven": lambda x, w, b: normalize(x, w, b, 4, 3, 1e-5)[0],
    "pooled": lambda x, w, b: normalize(x, w, b, 4, 2, 1e-5, pooled=2)[0],
    "evaluate": lambda x, w, b: evaluate(x, torch.zeros(4), torch.ones(4), w, b, 4, 1e-5),
    "affine": affine,
    "by_moments": lambda x, w, b: by_moments(x, _line, w, b, rows=2)[0],
    "gated": lambda x, w, b: gated(x, _gate, w, b, rows=2)[0],
    "rows": lambda x, w, b: normalize_rows(x, w, b, 1e-5),
    "moments": _moments,
}


@pytest.fixture(params=FORMS)
def output(request: pytest.FixtureRequest) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 4, 3, 5), (4,), (4,))]
    return FORMS[request.param](*inputs), inputs


def test_mapped_gradients_are_those_one_by_one(output):
    y, inputs = output
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    mapped = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    single = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys), strict=True)
    for found, expected in zip(mapped, single, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_a_gradient_that_is_a_negated_view_counts_with_its_sign(output):
    y, inputs = output
    dy = torch.randn_like(y)
    negated = torch._neg_view(-dy)
    assert negated.is_neg()
    found = torch.autograd.grad(y, inputs, negated, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(y, inputs, dy))
