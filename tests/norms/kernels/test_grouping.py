"""norms.kernels.grouping: its two ways to the same numbers."""

import pytest
import torch

from norms.kernels.blocks import Blocks
from norms.kernels.grouping import _Normalize, _plain, _plain_backward

EPS = 1e-5
CASES = [(1, 1), (2, 1), (6, 1), (12, 1), (8, 1), (4, 2), (3, 2), (24, 2)]  # (G, K) for x (4, 6, 4, 2)


@pytest.mark.parametrize(("groups", "slices"), CASES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_fast_and_the_plain_way_agree(groups, slices, channels_last):
    """`_plain` serves compilation, second derivatives and fake tensors; `_Normalize` everything else."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 6, 4, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 6, 4, 2, dtype=torch.float64)
    blocks = Blocks.of(x, groups, slices)
    fast, plain = _Normalize.apply(x, weight, bias, blocks, EPS), _plain(x, weight, bias, blocks, EPS)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert fast[0].stride() == plain[0].stride()
    grads = [torch.autograd.grad(y[0], (x, weight, bias), dy) for y in (fast, plain)]
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], _plain_backward(dy, x, weight, blocks, EPS))
