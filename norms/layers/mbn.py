"""mbn: statistics of the last batches, older ones with less weight, each taken once more after its update.

Guo et al. 2018, arXiv:2010.04947, "Memorized Batch Normalization".

    y = (x - M) / sqrt(V + eps) * weight_c + bias_c
    M = sum_i alpha_i mean_i        V = sum_i alpha_i (var_i + (mean_i - M)^2)        sum_i alpha_i = 1

i = 0 is the batch itself, through which alone gradients flow; the others are constants. All variances are biased.

Axes: N sample, C channel, B entries of the past.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.running_statistics import finite_or
from norms.kernels import by_moments, plain
from norms.kernels.moments import Past
from norms.layers.bn import BatchNorm
from norms.registry import register


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
class MemorizedBatchNorm(BatchNorm):
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
    included, which is what `norms.recalibrate` asks for.

    From memory of the paper, not confirmed: the weights alpha, that they fall off geometrically, and M and V; its
    abstract says that several recent batches are considered, that training and inference follow one rule, and the
    second forward. Our choices: the defaults, the statistics of a look, steps with several forwards. A set of
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
        count = self.values(x)
        again = self.situation.again
        with torch.no_grad():
            rows = torch.arange(self.memory, device=x.device)
            looked_at = (self.memory_number == self.next_look) & (self.memory_number > 0)
            # the row of the entry that a look replaces; -1 is that of a batch which is new
            row = ((rows + 1) * looked_at).sum() - 1 if again else -1
            past = self._pooled(rows - row, (rows > row) & (rows - row < self.memory), plain.table_type(x))

        def rule(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            """mean, var: (1, C)."""
            further, combined = past.joined_by(mean, var)
            scale = torch.rsqrt(combined + self.eps)
            if weight is not None:
                scale = scale * weight
            shift = -(mean + further) * scale
            return scale, shift if bias is None else shift + bias

        y, *found = by_moments(x, rule, self.weight, self.bias, rows=1)
        mean, var = (t[0] for t in found)
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
        return y

    def _pooled(self, age: Tensor, counted: Tensor, dtype: torch.dtype) -> Past:
        """The entries of the memory as one.

        Args:
            age: (memory,), in batches; it gives an entry's weight.
            counted: (memory,), whether an entry is to be counted, if there is one.
            dtype: to compute in.
        """
        decay = torch.full((self.memory,), 1.0 - self.momentum, device=age.device, dtype=dtype)  # type: ignore[operator]
        weights = torch.pow(decay, age.clamp(min=0)) * (counted & (self.memory_number != 0))
        return Past.of(self.memory_mean.to(dtype), self.memory_var.to(dtype), weights[:, None])

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
