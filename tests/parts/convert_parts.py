"""What the tests of norms.convert share: norms for what built-in ones do not show alone, and a net off its start."""

import torch
from torch import nn

from norms.layers.bn import BatchNorm
from norms.registry import register


class DoublesNot(nn.Module):
    def __init__(self, num_channels, *, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, x):
        return x * self.weight[:, None, None]


class DoublesWeight(DoublesNot):
    def transform_weight(self, weight):
        return 2 * weight


def register_own_norms():
    """bn_act, sees_weight, holds_bn, doubles, doubles_not, fake_memory, fake_alike, until the test ends (conftest)."""
    facts = {"source": "test", "mixes_samples": True, "keeps_stats": True, "axes": "NHW"}

    @register(name="bn_act", needs="activation", slices_at_once=True, **facts)
    class BatchNormAct(BatchNorm):
        """Exactly batch normalization and then its activation."""

        equivalent_to = "bn"

        def __init__(self, num_channels, *, eps: float = 1e-5, affine: bool = True, activation=None):
            super().__init__(num_channels, eps=eps, affine=affine)
            self.activation = activation

        def forward(self, x):
            y = super().forward(x)
            return y if self.activation is None else self.activation(y)

    @register(name="sees_weight", needs="conv_weight", slices_at_once=True, **facts)
    class SeesWeight(BatchNorm):
        """Batch normalization that adds up the weight it was given, so that a wrong one shows."""

        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)

        def forward(self, x, *, weight):
            return super().forward(x) + weight.sum(tuple(range(1, weight.dim())))[:, None, None]

    @register(name="holds_bn", slices_at_once=True, **facts)
    class HoldsBatchNorm(nn.Module):
        """Batch normalization whose parameters and statistics a part holds, too."""

        equivalent_to = "bn"

        def __init__(self, num_channels, *, eps: float = 1e-5, affine: bool = True):
            super().__init__()
            self.part = nn.BatchNorm2d(num_channels, eps, affine=affine)
            self.weight, self.bias = self.part.weight, self.part.bias
            for name, buffer in self.part.named_buffers():
                self.register_buffer(name, buffer)

        def forward(self, x):
            return self.part(x)

    plain = {"source": "test", "mixes_samples": False, "keeps_stats": False}
    register(name="doubles", **plain)(DoublesWeight)
    register(name="doubles_not", **plain)(DoublesNot)
    register(name="fake_memory", across_iterations=True, **facts)(type("Memory", (BatchNorm,), {}))
    register(name="fake_alike", **facts)(type("Alike", (BatchNorm,), {}))


def trained(net, seed=0):
    """Every parameter and statistic as training might leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() < 2:
                low, high = (0.5, 2) if name.endswith(("running_var", "weight")) else (-1, 1)
                tensor.uniform_(low, high, generator=generator)
    return net
