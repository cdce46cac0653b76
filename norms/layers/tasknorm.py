"""tasknorm: moments of a task's context set and of each sample, mixed by a learned weight.

Bronskill et al. 2020, arXiv:2003.03284 (TaskNorm-I). Axes: N sample, C channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from norms.channels import PerChannel, Reading, changeable, check_arguments, transformed
from norms.kernels import affine, by_moments, moments, plain
from norms.kernels.moments import pooled
from norms.registry import register


@register(
    name="tasknorm",
    source="Bronskill et al. 2020, arXiv:2003.03284",
    mixes_samples=True,
    mixes_samples_in_eval=True,
    keeps_stats=False,
    axes="NHW",
    needs="context",
    variance="biased",
)
class TaskNorm(PerChannel):
    """TaskNorm-I: moments of the context set of a task and of each sample itself, mixed.

        alpha   = sigmoid(a |context| + b)                      |context| images
        mean_nc = alpha mean_ctx,c + (1 - alpha) mean_inst,nc
        var_nc  = alpha (var_ctx,c + (mean_ctx,c - mean_nc)^2) + (1 - alpha) (var_inst,nc + (mean_inst,nc - mean_nc)^2)
        y_n     = (x_n - mean_nc) / sqrt(var_nc + eps) * weight_c + bias_c

    mean_ctx, var_ctx are over all samples and positions of the context set, mean_inst, var_inst over the positions of
    the sample; both variances are biased (of one position: 0). Training and evaluation are the same. A forward of
    `situation(net, part="context")` normalizes the context set and keeps its moments; a forward of part "query" uses
    the kept ones, so queries do not see each other. The moments are kept with their graph: the loss of queries reaches
    the context's images, as in the official code. As there, a and b start at 0, that is alpha = 1/2.

    Differences from the official code: its variances are unbiased; it takes a forward in training mode for the context
    and one in evaluation mode for the queries, where here the task tells.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: weight and bias (C,); the scalars `a` and `b` stay without it.

    Attributes:
        context_mean, context_var: (C,), of the last context set.
        context_size: its number of images, 0 before the first one.

    All three are buffers changed in place, so that they stay in the buffers that `functional_call` brings. A context
    that is not finite makes its queries nan; the next one takes its place.
    """

    a: nn.Parameter
    b: nn.Parameter
    context_mean: Tensor
    context_var: Tensor
    context_size: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_arguments(eps=eps, num_channels=num_channels)
        self.add_channels(num_channels, eps, affine, device, dtype)
        for name in ("a", "b"):
            self.add_parameter(name, 0.0, (), device, dtype)
        kept = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in ("context_mean", "context_var"):
            self.register_buffer(name, torch.zeros(num_channels, device=device, dtype=kept))
        self.register_buffer("context_size", torch.zeros((), device=device, dtype=torch.long))
        self._reading = Reading()

    def reset_running_stats(self) -> None:
        """As after construction: no context."""
        for buffer in (self.context_mean, self.context_var, self.context_size):
            buffer.detach_().zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype.

        Raises:
            ValueError: another number of channels; neither "context" nor "query" was told; a query before any context;
                a context set of one value per channel.
        """
        self.check_channels(x)
        part = self.situation.part
        if part is None:
            raise ValueError("tasknorm needs to be told context or query (situation(net, part=...)); neither was")
        if x.shape[0] == 0:
            return self.empty(x)
        if part == "context" and x.shape[0] * math.prod(x.shape[2:]) < 2:
            raise ValueError(
                f"tasknorm: more than one value per channel of the context is needed, given x of shape {tuple(x.shape)}"
            )
        if part == "query":
            self._check_context()
            return by_moments(x, self._coefficients, *self._mixed_with(x))[0]
        # twice over memory more than `by_moments`, since queries have a gradient through these moments, too
        mean, var = moments(x)
        self._keep(mean, var)
        return affine(x, *self._coefficients(mean, var, *self._mixed_with(x)))

    def _mixed_with(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The weight alpha () of the context, its mean and variance (C,), weight and bias."""
        kind = plain.table_type(x)
        # copied, since the next context changes the buffers while this forward's graph may still be needed
        context_mean, context_var = (t.to(kind, copy=True) for t in (self.context_mean, self.context_var))
        alpha = torch.sigmoid(self.a.to(kind) * self.context_size.to(kind) + self.b.to(kind))
        return alpha, context_mean, context_var, self.weight, self.bias

    def _coefficients(
        self,
        mean: Tensor,
        var: Tensor,
        alpha: Tensor,
        context_mean: Tensor,
        context_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """scale and shift (N, C) from the moments of samples (N, C) and what `_mixed_with` gives."""
        # the class's formula in the distance of the two means alone, so that no large means are subtracted again
        apart = context_mean - mean
        mean = mean + alpha * apart
        var = alpha * context_var + (1 - alpha) * var + alpha * (1 - alpha) * apart.square()
        scale = torch.rsqrt(var + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias

    def _keep(self, mean: Tensor, var: Tensor) -> None:
        """The moments of the context set, from those of its samples (N, C), by Chan's formula."""
        context_mean, context_var = (t[0] for t in pooled(mean, var))
        self._let_go()
        size = torch.full_like(self.context_size, mean.shape[0])
        for name, new in (("context_mean", context_mean), ("context_var", context_var), ("context_size", size)):
            kept = self.get_buffer(name)
            if changeable(kept):
                kept.copy_(new)
            else:
                setattr(self, name, new.to(kept.dtype))

    def _check_context(self) -> None:
        missing = "tasknorm: a query before any context; forward the support with part context first"
        if torch.compiler.is_compiling():  # values can not be looked at while a graph is made
            torch._assert_async(self.context_size > 0, missing)
        elif self._reading(self.context_size) == [0]:
            raise ValueError(missing)

    def _let_go(self) -> None:
        for kept in (self.context_mean, self.context_var):
            if kept.requires_grad and changeable(kept) and not transformed():  # the graph of an earlier context
                kept.detach_()

    def after_update(self, progress: float) -> None:
        """Let go of the graph of the step's last context."""
        self._let_go()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = state_dict.pop(prefix + "_extra_state", None)  # where versions before 0.6 kept the size
        if isinstance(old, Tensor):
            state_dict.setdefault(prefix + "context_size", old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take no tensor that has a graph."""
        kept = {name: None if b is None else b.detach() for name, b in self._buffers.items()}
        return {**self.__dict__, "_buffers": kept}

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}"
