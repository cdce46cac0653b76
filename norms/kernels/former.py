"""What layers still use that are not on the kernels yet. To be deleted with the last of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flattened(x: Tensor) -> Tensor:
    """x (N, C, *) as (N, C, P), in float32 or better. A view for every dense memory format, which operations keep."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift: x (N, C, P), scale and shift of any shape that broadcasts to it, or both None."""
    if scale is None or shift is None:
        return x
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))
