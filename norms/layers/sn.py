"""sn: learned mixtures of the means and of the variances of in, ln and bn; Luo et al. 2019, arXiv:1806.10779.

Axes: N sample, K norm batch, M sample of a norm batch, C channel, P position (of any number of spatial dimensions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from norms.kernels.moments import union_of_workers
from norms.layers.bn import BatchNorm
from norms.registry import register
from norms.situation import check_slices
from norms.workers import enough


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
        slices = self.situation.slices if self.training else 1
        samples = check_slices(x, slices)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide.reshape(samples, slices, self.num_channels, positions)  # norm batch k is x[k::K]
        mean = wide.mean(dim=3, keepdim=True)
        centred = wide - mean
        mean, var = mean.squeeze(3), centred.square().mean(dim=3)  # (M, K, C)
        if self.merging is not None:
            batch_mean, batch_var, images = union_of_workers(mean, var, self.merging)
            batch, total = (batch_mean, batch_var), images * positions
            enough(samples * positions, total, self.merging)
            self.track(batch[0].detach()[0], batch[1].detach()[0] * (total / (total - 1)), samples * positions)
            if samples == 0:  # the others' backward waits for this worker's, too
                return self.empty(x) + (0 * (batch_mean + batch_var).sum()).to(x.dtype)
        elif self.training:
            count = self.values(x, slices)
            batch = _union(mean, var, 0)
            self.track(batch[0].detach()[0], batch[1].detach()[0] * (count / (count - 1)), count)
        else:
            # copied as in norms.kernels.grouping.evaluate: the backward is to be by these
            mean_var = (self.running_mean, self.running_var)
            batch = tuple(t.to(wide.dtype, copy=True) for t in mean_var)  # type: ignore[assignment]
        means, variances = zip((mean, var), _union(mean, var, 2), batch, strict=True)
        mixed_mean, mixed_var = _mixed(self.mean_logits, means), _mixed(self.var_logits, variances)
        scale = torch.rsqrt(mixed_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(scale.dtype)
        shift = (mean - mixed_mean) * scale  # both means are near each other where x is far from 0
        if self.bias is not None:
            shift = shift + self.bias.to(scale.dtype)
        return torch.addcmul(shift[..., None], centred, scale[..., None]).reshape(x.shape).to(x.dtype)


def _union(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the union of equally large sets along a dimension, which is kept as 1."""
    return mean.mean(dim, keepdim=True), var.mean(dim, keepdim=True) + mean.var(dim, correction=0, keepdim=True)


def _mixed(logits: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """The parts' sum, weighted by softmax(logits)."""
    weights = torch.softmax(logits.to(parts[0].dtype), dim=0).unbind()
    first, second, third = (w * part for w, part in zip(weights, parts, strict=True))
    return first + second + third
