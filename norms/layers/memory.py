"""Norms that add the statistics of earlier iterations to the batch's own: cbn, mbn.

    cbn  the last batches' statistics, carried over to the present weights   Yao et al. 2021, arXiv:2002.05712,
         by their derivatives                                                "Cross-Iteration Batch Normalization"
    mbn  the last batches' statistics, older ones with less weight, each     Guo et al. 2018, arXiv:2010.04947,
         taken once more after its update                                    "Memorized Batch Normalization"

    y = (x - M) / sqrt(V + eps) * weight_c + bias_c
    M = sum_i alpha_i mean_i        V = sum_i alpha_i (var_i + (mean_i - M)^2)        sum_i alpha_i = 1

i = 0 is the batch itself, through which alone gradients flow; the others are constants. All variances are biased.

How: with d = M - mean_0, which differences of means give, y is bn's own kernel with other coefficients,

    y = (x - mean_0) / sqrt(var_0 + eps) * a + (bias - g d),   g = weight / sqrt(V + eps),   a = g sqrt(var_0 + eps)

so nothing here takes a difference of large numbers, and second derivatives are torch's.

Axes: N sample, C channel, B entries of the past, K weights of one output channel of the convolution.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from norms.channels import transformed, vmapped
from norms.grouping import evaluate
from norms.layers.batch import BatchNorm
from norms.registry import register
from norms.running import finite_or


class _Remembering(BatchNorm):
    """bn in evaluation; in training what the two norms share."""

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """x (N, C, *) in float32 or better, its mean and biased variance (C,), and how many values each is of.

        Raises:
            ValueError: another number of channels, fewer than two values per channel.
        """
        self.check_channels(x)
        count = self.values(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, (0, *range(2, x.dim())), correction=0)
        return values, mean, var, count

    def _normalized(self, values: Tensor, mean: Tensor, var: Tensor, shift: Tensor, rstd: Tensor) -> Tensor:
        """values (N, C, *) by other statistics than its own: (values - mean - shift) * rstd, then weight and bias.

        Args:
            values: in float32 or better.
            mean: (C,), its mean.
            var: (C,), its biased variance.
            shift: (C,), the mean to normalize by less its own.
            rstd: (C,).
        """
        scale, bias = rstd, -rstd * shift
        if self.weight is not None and self.bias is not None:
            scale = rstd * self.weight.to(values.dtype)
            bias = self.bias.to(values.dtype) - scale * shift
        if transformed():  # there torch's kernel gives wrong second derivatives, without a word
            shape = (-1, *[1] * (values.dim() - 2))
            return (values - mean.view(shape)) * scale.view(shape) + bias.view(shape)
        return F.batch_norm(values, None, None, scale * torch.sqrt(var + self.eps), bias, True, 0.0, self.eps)


class _Past(NamedTuple):
    """Earlier batches as one, without gradient."""

    total: Tensor  # (C,) or (1,), their weight, where the batch itself has 1
    mean: Tensor  # (C,)
    var: Tensor  # (C,)

    @classmethod
    def of(cls, means: Tensor, variances: Tensor, weights: Tensor) -> _Past:
        """means, variances: (B, C); weights: (B, C) or (B, 1), all zero where there is nothing."""
        total = weights.sum(0)
        share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
        mean = (share * means).sum(0)
        return cls(total, mean, (share * (variances + (means - mean).square())).sum(0))

    def joined_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """M - mean and V, both (C,), of these together with the batch's mean and var (C,)."""
        share = self.total / (1 + self.total)
        step = self.mean - mean
        return share * step, (1 - share) * var + share * (self.var + (1 - share) * step.square())


@register(
    name="mbn",
    source="Guo et al. 2018, arXiv:2010.04947",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="second_look",
    across_iterations=True,
    variance="biased",
    running_variance="biased",
)
class MemorizedBatchNorm(_Remembering):
    """Memorized batch normalization: statistics of the last batches, older ones with less weight, by double forward.

        alpha_i = (1 - momentum)^i / sum_j (1 - momentum)^j        i = 0 the batch, 1 the one before, ... memory - 1
        M = sum_i alpha_i mean_i        V = sum_i alpha_i (var_i + (mean_i - M)^2)
        y = (x - M) / sqrt(V + eps) * weight_c + bias_c

    After each update the step's batch is forwarded again without gradient, and the statistics that it has then take
    the place of the ones that it had (norms.situation.after_update). Of a step with several forwards the j-th look is
    of the j-th forward; a look without such a forward, or whose entry has left the memory, changes nothing. In a look
    the batch is normalized as it was in the step: with its own new entry and those older than it. While the memory
    fills, alpha is over the entries that there are.

    Evaluation uses M and V of the memory, the same rule: `running_mean`, `running_var` hold them, so that here the
    variance is biased. With momentum=1 there is no memory, and the layer is bn with momentum 1, the unbiased buffer
    included, which is what `norms.running.recalibrate` asks for.

    From memory of the paper, not confirmed: the weights alpha, that they fall off geometrically, and M and V; its
    abstract says that several recent batches are considered, that training and inference follow one rule, and the
    second forward. Our choices: the defaults, what a look is normalized by, steps with several forwards. A set of
    context images (MAML's support) enters the memory, but is not looked at again: MAML's look is of the queries.

    Args:
        num_channels: C.
        memory: batches that statistics are of, the present one included; 1 is bn in training.
        eps: added to the variance.
        momentum: each batch of age takes the share `momentum` of an entry's weight; 0: all weigh the same.
        affine: weight and bias per channel.

    Raises:
        ValueError: memory < 1, momentum None (entries would have to leave the memory for an average of all batches);
            (forward, training) one value per channel.
    """

    memory_mean: Tensor
    memory_var: Tensor
    memory_number: Tensor
    forwards: Tensor
    forwards_updated: Tensor
    next_look: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        memory: int = 3,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if memory < 1:
            raise ValueError(f"mbn: memory={memory}: at least 1, the batch itself, is needed")
        if momentum is None:
            raise ValueError("mbn: momentum=None: the memory holds no average of all batches; give a number in [0, 1]")
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.memory = memory
        kept = self.running_mean.dtype
        # newest first; the number of the training forward that an entry is of: 0 no entry, -1 none that is looked at
        self.register_buffer("memory_mean", torch.zeros(memory, num_channels, device=device, dtype=kept))
        self.register_buffer("memory_var", torch.zeros(memory, num_channels, device=device, dtype=kept))
        self.register_buffer("memory_number", torch.zeros(memory, device=device, dtype=torch.long))
        # training forwards so far, those before the last update, and the one that the next look is of
        for name in ("forwards", "forwards_updated", "next_look"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, an empty memory."""
        super().reset_running_stats()
        for name in ("memory_mean", "memory_var", "memory_number", "forwards", "forwards_updated", "next_look"):
            self.get_buffer(name).zero_()

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        """An optimizer step was taken; the looks that follow are of the forwards since the one before."""
        torch.add(self.forwards_updated, 1, out=self.next_look)
        self.forwards_updated.copy_(self.forwards)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype.

        Raises:
            ValueError: another number of channels, one value per channel in training.
        """
        if not self.training or self.is_empty(x):
            return super().forward(x)
        values, mean, var, count = self._moments(x)
        again = self.situation.again
        with torch.no_grad():
            rows = torch.arange(self.memory, device=x.device)
            looked_at = (self.memory_number == self.next_look) & (self.memory_number > 0)
            # the row of the entry that a look replaces; -1 is that of a batch which is new
            row = ((rows + 1) * looked_at).sum() - 1 if again else -1
            past = self._pooled(rows - row, (rows > row) & (rows - row < self.memory), mean.dtype)
        shift, combined = past.joined_by(mean, var)
        y = self._normalized(values, mean, var, shift, torch.rsqrt(combined + self.eps))
        mean, var = mean.detach(), var.detach()  # forward-mode derivatives do not heed no_grad
        with torch.no_grad():
            if again:
                self._replace(looked_at, mean, var)
            else:
                self._push(mean, var)
            whole = self._pooled(rows, rows >= 0, mean.dtype)
            # without a memory bn, whose buffer is unbiased; recalibration relies on it
            factor = count / (count - 1) if self.momentum == 1 else 1.0
            for kept, new in ((self.running_mean, whole.mean), (self.running_var, whole.var * factor)):
                if "recalibrating" not in self.__dict__:
                    new = finite_or(new.to(kept.dtype), kept)  # the memory's means may be far apart
                kept.copy_(torch.where(looked_at.any(), new, kept) if again else new)
        return y.to(x.dtype)

    def _pooled(self, age: Tensor, counted: Tensor, dtype: torch.dtype) -> _Past:
        """The entries of the memory as one.

        Args:
            age: (memory,), in batches; it gives an entry's weight.
            counted: (memory,), whether an entry is to be counted, if there is one.
            dtype: to compute in.
        """
        decay = torch.full((self.memory,), 1.0 - self.momentum, device=age.device, dtype=dtype)  # type: ignore[operator]
        weights = torch.pow(decay, age.clamp(min=0)) * (counted & (self.memory_number != 0))
        return _Past.of(self.memory_mean.to(dtype), self.memory_var.to(dtype), weights[:, None])

    def _push(self, mean: Tensor, var: Tensor) -> None:
        """A new entry; the oldest leaves."""
        number = torch.full_like(self.forwards, -1)
        # a look is of forwards that an update follows
        if self.situation.part != "context" and "recalibrating" not in self.__dict__:
            number = self.forwards.add_(1)
        self.num_batches_tracked.add_(1)
        sound = self.sound(mean, var)
        mean, var = torch.where(sound, mean, self.running_mean), torch.where(sound, var, self.running_var)
        for name, new in (("memory_mean", mean), ("memory_var", var), ("memory_number", number)):
            kept = self.get_buffer(name)
            self._write(name, torch.cat([new[None].to(kept.dtype), kept[:-1]]))

    def _replace(self, where: Tensor, mean: Tensor, var: Tensor) -> None:
        """The entry that `where` (memory,) marks, if any."""
        self.next_look.add_(1)
        where = where[:, None] & self.sound(mean, var)
        for name, new in (("memory_mean", mean), ("memory_var", var)):
            kept = self.get_buffer(name)
            self._write(name, torch.where(where, new.to(kept.dtype), kept))

    def _write(self, name: str, value: Tensor) -> None:
        """Change a buffer in place. In a compiled graph it is replaced: there the backward may compute anew what the
        forward took from it, and would find the new values."""
        if torch.compiler.is_compiling():
            setattr(self, name, value)
        else:
            self.get_buffer(name).copy_(value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, memory={self.memory}"


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
class CrossIterationBatchNorm(_Remembering):
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
        invalid: what to do with an entry whose nu' < mean'^2, per channel: "drop" it, or "clamp" nu' to mean'^2.
        eps_outside: divide by sqrt(V) + eps.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Attributes:
        progress: what `after_update` told last. Extra state and no buffer: reading a buffer would wait for the device
            in every forward.

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
        plain = self.buffer_num == 0 or self.progress < self.burn_in
        if plain and not self.eps_outside:
            return super().forward(x)
        values, mean, var, count = self._moments(x)
        shift, combined = torch.zeros_like(mean), var
        if not plain:
            shift, combined = self._past(weight, mean.dtype).joined_by(mean, var)
        if self.eps_outside:
            rstd = 1 / (combined.clamp(min=torch.finfo(var.dtype).tiny).sqrt() + self.eps)  # sqrt has no slope at 0
        else:
            rstd = torch.rsqrt(combined + self.eps)
        y = self._normalized(values, mean, var, shift, rstd).to(x.dtype)
        mean, var = mean.detach(), var.detach()
        if not plain and differentiable:
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
    def _past(self, weight: Tensor, dtype: torch.dtype) -> _Past:
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
        # what is not used may be of any size, and 0 times infinity is no number
        return _Past.of(torch.where(use, mean + moved, 0), torch.where(use, var, 0), use.to(dtype))

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
            over_var = ((x - mean.view(-1, *[1] * (x.dim() - 2))) * (2 * unit)).to(x.dtype)
        found = []
        for pull in (over_mean, over_var):
            (derivative,) = torch.autograd.grad(x, weight, pull, retain_graph=True, allow_unused=True)
            if derivative is None:
                raise ValueError(_UNRELATED)
            found.append(derivative * (1 / (count * unit)))
        return found[0], found[1]

    @torch.no_grad()
    def make_room(self, weight: Tensor) -> None:
        """Buffers for weights (C, *) of this size; what another size has left is forgotten.

        Whoever builds the layer beside its convolution calls this, so that buffers have their final shape before copies
        are made of them; else the first forward does.
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


_UNRELATED = "cbn: x does not depend on the weight that was passed, as far as autograd knows"
_TRANSFORMED = (
    "cbn takes derivatives with respect to the convolution's weight in its forward, so it does not train under "
    "torch.func.vmap and in forward-mode derivatives; it evaluates there"
)
_PER_WEIGHT = ("past_weight", "past_dmean", "past_dvar")
"""Buffers (B, C, K) of cbn's history."""
