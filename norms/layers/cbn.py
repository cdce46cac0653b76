"""cbn: the last batches' statistics, carried over to the present weights by their derivatives.

Yao et al. 2021, arXiv:2002.05712, "Cross-Iteration Batch Normalization".

    y = (x - M) / sqrt(V + eps) * weight_c + bias_c
    M = sum_i alpha_i mean_i        V = sum_i alpha_i (var_i + (mean_i - M)^2)        sum_i alpha_i = 1

i = 0 is the batch itself, through which alone gradients flow; the others are constants. All variances are biased.

Axes: N sample, C channel, B entries of the past, K weights of one output channel of the convolution.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from norms.channels import vmapped
from norms.kernels import affine, by_moments, plain
from norms.kernels.grouping import evaluate
from norms.kernels.moments import Past
from norms.layers.bn import BatchNorm
from norms.registry import register

_UNRELATED = "cbn: x does not depend on the weight that was passed, as far as autograd knows"
_TRANSFORMED = (
    "cbn takes derivatives with respect to the convolution's weight in its forward, so it does not train under "
    "torch.func.vmap and in forward-mode derivatives; it evaluates there"
)
_PER_WEIGHT = ("past_weight", "past_dmean", "past_dvar")
"""Buffers (B, C, K) of cbn's history."""


@register(
    name="cbn",
    source="Yao et al. 2021, arXiv:2002.05712",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="conv_weight",
    exact_gradient=False,
    compiles=False,
    across_iterations=True,
    functional=False,
    variance="biased",
    running_variance="unbiased",
)
class CrossIterationBatchNorm(BatchNorm):
    """Cross-iteration batch normalization: the last batches' statistics, carried over to the present weights.

    W is the weight of the convolution that x comes from. Of each batch mean, nu = E[x^2] and their derivatives are
    kept; for the batch i iterations ago, at the weights W_i, a first-order Taylor expansion gives

        mean'_i = mean_i + <d mean_i / dW, W - W_i>        nu'_i = nu_i + <d nu_i / dW, W - W_i>

    per channel c over W[c] alone, since nothing else enters it. With (mean'_0, nu'_0) those of the batch,

        M = mean over i of mean'_i        V = mean over i of nu'_i - M^2
        y = (x - M) / sqrt(V + eps) * weight_c + bias_c

    and entries i > 0 with nu'_i < mean'_i^2 are left out of the channel's means. Computed as var'_i = nu'_i - mean'_i^2
    = var_i + <d var_i / dW, W - W_i> - (mean'_i - mean_i)^2 and V = mean(var') + var(mean'), which is the same
    and takes no difference of large numbers; so d var / dW is what is kept. Means are linear in W, so mean' is exact
    where nothing but this weight has changed; nu' is off by a square of the change.

    The history is constant: the backward is that of the batch's own statistics, and the dependence of mean', nu' on
    the present W takes no gradient. Running statistics are the batches' own, and evaluation is bn.

    An entry enters the history where its derivatives are known: not without gradients (probes, recalibration), where
    the history is used all the same. A weight that does not require a gradient does not change, so its derivatives
    are taken as zero. The history is forgotten where K changes.

    Differences to the published code: the variance is biased in the plain phase too, where the code takes bn's by
    torch.var, unbiased; eps is inside the root by default, where the code has it outside; `burn_in` is a fraction of
    training, where the code counts iterations (its default is none, the published detection configurations have some
    epochs; ours is a tenth, while the weights move too far for a first-order correction). As in the code
    nothing is kept during the burn-in. From memory of the paper, not confirmed: "clamp".

    Args:
        num_channels: C.
        buffer_num: batches of the past, B, so that the window is B + 1; 0 is bn.
        burn_in: fraction of training, as `after_update` tells it, before which the layer is bn.
        invalid: the treatment of an entry whose nu' < mean'^2, per channel: "drop" it, or "clamp" nu' to mean'^2.
        eps_outside: divide by sqrt(V) + eps.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Attributes:
        progress: the fraction of training that `after_update` told last. Extra state and no buffer: reading a buffer
            would wait for the device in every forward.

    Raises:
        ValueError: buffer_num < 0, burn_in outside [0, 1], another `invalid`; (forward) see there.
    """

    past_mean: Tensor
    past_var: Tensor
    past_weight: Tensor
    past_dmean: Tensor
    past_dvar: Tensor
    past_count: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        buffer_num: int = 3,
        burn_in: float = 0.1,
        invalid: Literal["drop", "clamp"] = "drop",
        eps_outside: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if buffer_num < 0:
            raise ValueError(f"cbn: buffer_num={buffer_num}: it must not be negative")
        if not 0 <= burn_in <= 1:
            raise ValueError(f"cbn: burn_in={burn_in}: it is a fraction of training, in [0, 1]")
        if invalid not in ("drop", "clamp"):
            raise ValueError(f'cbn: invalid="{invalid}": "drop" or "clamp"')
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.buffer_num, self.burn_in, self.invalid, self.eps_outside = buffer_num, burn_in, invalid, eps_outside
        self.progress = 0.0
        kept = self.running_mean.dtype
        for name in ("past_mean", "past_var"):
            self.register_buffer(name, torch.zeros(buffer_num, num_channels, device=device, dtype=kept))
        for name in _PER_WEIGHT:  # K is known once a weight is
            self.register_buffer(name, torch.zeros(buffer_num, num_channels, 0, device=device, dtype=kept))
        self.register_buffer("past_count", torch.zeros((), device=device, dtype=torch.long))  # entries so far

    @property
    def equivalent_to(self) -> str | None:
        """ "bn" without a history, else None."""
        return "bn" if self.buffer_num == 0 and not self.eps_outside else None

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no batch seen, no history, no progress of training."""
        super().reset_running_stats()
        for name in ("past_mean", "past_var", *_PER_WEIGHT, "past_count"):
            self.get_buffer(name).zero_()
        self.progress = 0.0

    def after_update(self, progress: float) -> None:
        """An optimizer step was taken; the fraction `progress` of training is done."""
        self.progress = float(progress)

    def get_extra_state(self) -> Tensor:
        """The progress as a tensor, so that tools which expect tensors in a state_dict work."""
        return torch.tensor(self.progress, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.progress = float(state)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x: (N, C, *), the output of the convolution with `weight` (C, *) -> the same shape and dtype.

        Raises:
            ValueError: no weight, or one of another number of output channels; x does not depend on it, as far as
                autograd knows; another number of channels, one value per channel in training.
        """
        if weight is None:
            raise ValueError("cbn: it needs the weight of the convolution before it, and none was passed to it")
        if weight.dim() < 2 or weight.shape[0] != self.num_channels:
            raise ValueError(
                f"cbn for {self.num_channels} channels: the convolution's weight must be ({self.num_channels}, *), "
                f"given {tuple(weight.shape)}"
            )
        empty = self.is_empty(x)
        self.make_room(weight)
        if empty:
            return self.empty(x)
        if not self.training:
            return self._evaluate(x)
        if vmapped(x, weight, self.running_mean) or forward_ad._current_level >= 0:
            raise RuntimeError(_TRANSFORMED)
        differentiable = self.buffer_num > 0 and torch.is_grad_enabled()
        if differentiable and weight.requires_grad and not x.requires_grad:
            raise ValueError(_UNRELATED)
        as_bn = self.buffer_num == 0 or self.progress < self.burn_in
        if as_bn and not self.eps_outside:
            return super().forward(x)
        count = self.values(x)
        past = None if as_bn else self._past(weight, plain.table_type(x))

        def rule(mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            """mean, var: (1, C)."""
            if past is not None:
                further, var = past.joined_by(mean, var)
                mean = mean + further
            if self.eps_outside:
                scale = 1 / (var.clamp(min=torch.finfo(var.dtype).tiny).sqrt() + self.eps)  # sqrt has no slope at 0
            else:
                scale = torch.rsqrt(var + self.eps)
            if gain is not None:
                scale = scale * gain
            shift = -mean * scale
            return scale, shift if bias is None else shift + bias

        y, *found = by_moments(x, rule, self.weight, self.bias, rows=1)
        mean, var = (t[0] for t in found)
        if not as_bn and differentiable:
            self._push(mean, var, weight.detach(), *self._derivatives(x, weight, mean, count))
        self.track(mean[None], var[None] * (count / (count - 1)), count)
        return y

    def _evaluate(self, x: Tensor) -> Tensor:
        if not self.eps_outside:
            return super().forward(x)
        self.check_channels(x)
        squared = (self.running_var.sqrt() + self.eps).square()
        return evaluate(x, self.running_mean, squared, self.weight, self.bias, self.num_channels, 0.0)

    @torch.no_grad()
    def _past(self, weight: Tensor, dtype: torch.dtype) -> Past:
        """The history, carried over to the present weight, as one."""
        mean, var, past, dmean, dvar = (
            t.to(dtype) for t in (self.past_mean, self.past_var, self.past_weight, self.past_dmean, self.past_dvar)
        )
        change = weight.reshape(self.num_channels, -1).to(dtype) - past
        moved = (dmean * change).sum(2)
        var = var + (dvar * change).sum(2) - moved.square()
        use = (torch.arange(self.buffer_num, device=weight.device) < self.past_count)[:, None].expand_as(var)
        if self.invalid == "drop":
            use = use & (var >= 0)
        else:
            var = var.clamp(min=0)
        # entries that are not used may be of any size, and 0 times infinity is no number
        return Past.of(torch.where(use, mean + moved, 0), torch.where(use, var, 0), use.to(dtype))

    @torch.no_grad()
    def _push(self, *entry: Tensor) -> None:
        """The batch's mean, variance, weight and their derivatives by it, in the place of the oldest entry.

        A channel whose numbers are not finite is entered with the running statistics, as of weights that do not count.
        """
        mean, var, weight, dmean, dvar = entry
        size = mean.abs() + var + dmean.abs().flatten(1).sum(1) + dvar.abs().flatten(1).sum(1)
        sound = size.to(self.past_mean.dtype) < math.inf
        each = sound.view(-1, *[1] * (weight.dim() - 1))
        mean = torch.where(sound, mean, self.running_mean.to(mean.dtype))
        var = torch.where(sound, var, self.running_var.to(var.dtype))
        dmean, dvar = torch.where(each, dmean, 0), torch.where(each, dvar, 0)
        entry = mean, var, weight, dmean, dvar
        place = (self.past_count % self.buffer_num)[None]  # an average has no order, so the buffers are a ring
        for name, new in zip(("past_mean", "past_var", *_PER_WEIGHT), entry, strict=True):
            kept = self.get_buffer(name)
            kept.index_copy_(0, place, new.reshape(1, *kept.shape[1:]).to(kept.dtype))
        self.past_count.add_(1)

    def _derivatives(self, x: Tensor, weight: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """d mean_c / dW_c and d var_c / dW_c, of the shape of `weight`.

        One backward of the convolution each, for all channels: x[:, c] depends on W[c] only, so that
        d(sum_c mean_c) / dW is row by row d mean_c / dW_c. d var = 2 / n * sum (x - mean) (dx - d mean), of which the
        second term sums to zero.
        """
        if not weight.requires_grad:
            return torch.zeros_like(weight), torch.zeros_like(weight)
        unit = 2.0 ** -math.floor(math.log2(count))  # near 1 / n, and exact in 16 bits
        with torch.no_grad():
            over_mean = torch.full_like(x, unit)
            over_var = affine(x.detach(), torch.full_like(mean, 2 * unit), mean * (-2 * unit))
        found = []
        for pull in (over_mean, over_var):
            (derivative,) = torch.autograd.grad(x, weight, pull, retain_graph=True, allow_unused=True)
            if derivative is None:
                raise ValueError(_UNRELATED)
            found.append(derivative * (1 / (count * unit)))
        return found[0], found[1]

    @torch.no_grad()
    def make_room(self, weight: Tensor) -> None:
        """Buffers for weights (C, *) of this size; a history of another size is forgotten.

        Called where the layer is built beside its convolution, so that buffers have their final shape before copies are
        made of them; else by the first forward.
        """
        size = weight.shape[1:].numel()
        if self.past_weight.shape[2] == size or vmapped(self.past_weight):
            return
        for name in _PER_WEIGHT:
            kept = self.get_buffer(name)
            kept.resize_(*kept.shape[:2], size).zero_()  # the tensor itself, which a functional call may have brought
        self.past_count.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _PER_WEIGHT:  # K of the given history, which may be unknown here or another
            given, kept = state_dict.get(prefix + name), self.get_buffer(name)
            if isinstance(given, Tensor) and given.dim() == 3 and given.shape[:2] == kept.shape[:2] != given.shape:
                self._buffers[name] = kept.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, buffer_num={self.buffer_num}, burn_in={self.burn_in}, invalid={self.invalid}, "
            f"eps_outside={self.eps_outside}"
        )
