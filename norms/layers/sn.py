"""sn: learned mixtures of the means and of the variances of in, ln and bn; Luo et al. 2019, arXiv:1806.10779.

Axes: N sample, K norm batch, M sample of a norm batch, C channel, P position (of any number of spatial dimensions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from norms.bases.batch_statistics import BatchMoments
from norms.kernels import by_moments
from norms.layers.bn import BatchNorm
from norms.registry import register


@register(
    name="sn",
    source="Luo et al. 2019, arXiv:1806.10779",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class SwitchableNorm(BatchNorm):
    """Switchable normalization: weighted means and, separately, variances of in, ln and bn, in this order.

        mean_nc = sum_k u_k mean_k        var_nc = sum_k v_k var_k         k = in (n, c), ln (n), bn (c)
        u = softmax(mean_logits), v = softmax(var_logits), all logits 1 at the start
        y = (x - mean_nc) / sqrt(var_nc + eps) * weight_c + bias_c

    All variances are biased; those of ln and bn follow from in's moments by the law of total variance, with the
    variance of the means in the place of a difference of squares. Evaluation takes bn's part from the running
    statistics. Differences to the official code: it takes in's variance unbiased (and composes the others from that),
    its running variance is of the biased kind and starts at 0, where ours is unbiased and starts at 1, as bn's; its
    momentum 0.9 is our 0.1. Its other way to evaluate, averages over a number of batches, is `recalibrate`.

    At one position in has nothing to normalize, and the layer refuses it as in does.

    Args:
        num_channels: C.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel; the logits stay without it.

    Raises:
        ValueError: (forward) fewer than two positions, in training and in evaluation.
    """

    syncs = True
    mean_logits: nn.Parameter
    var_logits: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        for name in ("mean_logits", "var_logits"):
            self.add_parameter(name, 1.0, (3,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *), at least two positions -> the same shape and dtype."""
        if self.is_empty(x) and self.merging is None:
            return self.empty(x)
        positions = math.prod(x.shape[2:])
        if positions < 2:
            raise ValueError(
                f"SwitchableNorm: more than one position is needed, given x of shape {tuple(x.shape)}; "
                "its part of instance normalization has no variance there"
            )
        batch = BatchMoments(self, x)

        def line(
            mean: Tensor,
            var: Tensor,
            mean_logits: Tensor,
            var_logits: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            """By the moments (N, C) of samples, which are those of in."""
            batch_mean, batch_var = batch(mean, var)
            mean, var = batch.per_sample(mean), batch.per_sample(var)
            layer_mean = mean.mean(2, keepdim=True)
            layer_var = (var + (mean - layer_mean).square()).mean(2, keepdim=True)
            mixed = _mixed(mean_logits, mean, layer_mean, batch_mean)
            scale = torch.rsqrt(_mixed(var_logits, var, layer_var, batch_var) + self.eps)
            if weight is not None:
                scale = scale * weight
            shift = -mixed * scale if bias is None else torch.addcmul(bias, mixed, scale, value=-1)
            return scale.flatten(0, 1), shift.flatten(0, 1)

        y = by_moments(x, line, self.mean_logits, self.var_logits, self.weight, self.bias)[0]
        batch.track()
        return y


def _mixed(logits: Tensor, own: Tensor, layer: Tensor, batch: Tensor) -> Tensor:
    """The parts' sum, weighted by softmax(logits): (M, K, C), (M, K, 1) and (K, C) or (C,)."""
    first, second, third = torch.softmax(logits.to(own.dtype), dim=0).unbind()
    return torch.addcmul(second * layer, first, own) + third * batch
