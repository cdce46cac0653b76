"""Running statistics, shared by every norm that keeps them, and their re-estimation on fresh batches.

Conventions are torch's: `running_mean`, `running_var` (unbiased) and `num_batches_tracked` are buffers, changed in
place under no_grad; `momentum` is the weight of the new value and None means the average of all batches so far.
Statistics of K norm batches that one forward computed at once move the buffers as if the batches had come one after
the other:

    r_K = (1 - m)^K r_0 + sum_j m (1 - m)^(K - 1 - j) s_j          momentum m
    r_K = (n r_0 + sum_j s_j) / (n + K)                            momentum None, n batches before

Differences to torch: the running statistics are float32 also where the parameters are created in a smaller type
(`module.bfloat16()` still casts every buffer, as it does for torch's own layers); and a statistic that is not finite,
of a batch that overflowed, say, leaves the running one of that channel as it was, where torch's stays nan for ever.
The batch is counted all the same: in the equations above the running statistic stands in the place of the one that is
not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.protocol import norm_modules
from norms.situation import check_slices, situation, unshadow_forward


class RunningStatistics(nn.Module):
    """A module with running mean and variance; a norm inherits from it and calls `track` in training.

    Args:
        size: number of statistics (channels for bn, groups for bgn), or the shape of them.
        momentum: weight of the new value in [0, 1]; None: the average of all batches so far.
        device: where the buffers live.
        dtype: of the parameters; the statistics take it where it is float32 or better, else float32.

    Attributes:
        tracks_parts: a norm batch may be handed to `track` in parts, each with statistics of its own (ghost), so that
            recalibration must take them there: the buffers would show the last one only.

    Raises:
        ValueError: a momentum outside [0, 1].
    """

    tracks_parts: bool = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        size: int | tuple[int, ...],
        momentum: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: it is the weight of the new value, in [0, 1], or None")
        self.momentum = momentum
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no batch seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Take in the statistics of K norm batches, in order.

        Args:
            mean: (K, size) batch means.
            var: (K, size) unbiased batch variances.
            count: values that entered each of them (running statistics do not need it, recalibration does).
        """
        with torch.no_grad():
            k = mean.shape[0]
            self.num_batches_tracked.add_(k)
            sound = self.sound(mean, var)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                new = torch.where(sound, new, running)
                if self.momentum is None:
                    # on the device, without reading the counter: no synchronization, no graph break
                    running.add_((new - running).sum(0).div_(self.num_batches_tracked))
                elif k == 1:
                    running.copy_(torch.lerp(running, new[0].to(running.dtype), self.momentum))  # lerp_ has no vmap
                else:
                    kept = 1 - self.momentum
                    age = torch.arange(k - 1, -1, -1, device=new.device, dtype=new.dtype)
                    weight = self.momentum * torch.pow(torch.full_like(age, kept), age)
                    running.mul_(kept**k).add_((weight[:, None] * new).sum(0))

    def sound(self, mean: Tensor, var: Tensor) -> Tensor:
        """Which statistics of a batch may be kept: those that are finite in the type of the running ones.

        Where the mean is not finite, the variance is not either, so that one comparison does for both, since small
        operations count; but not in a smaller type (`module.half()`). A recalibration is shown what there is.
        """
        if "recalibrating" in self.__dict__:
            return torch.ones_like(var, dtype=torch.bool)
        kept = self.running_var.dtype
        found = var.to(kept) < math.inf
        return found if mean.dtype == kept else found & (mean.to(kept).abs() < math.inf)

    def train_tracked(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, row: int | None = None
    ) -> Tensor:
        """torch's batch normalization of x (N, C, *) in training, which moves the running statistics itself.

        Args:
            x: of which the running statistics have the type, or a smaller one.
            weight: (C,) in the type of the running statistics, and bias likewise; or both None.
            eps: added to the variance.
            row: of running statistics (D, C); None where they are (C,).
        """
        running = (self.running_mean, self.running_var)
        running = running if row is None else (running[0][row], running[1][row])
        # copies: torch's kernel changes what it is given without a check, and keeps it for the backward
        mean, var = (t.clone() for t in running)
        y = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, eps)  # type: ignore[arg-type]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            sound = self.sound(mean, var)
            for kept, new in zip(running, (mean, var), strict=True):
                kept.copy_(torch.where(sound, new, kept))
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As torch's batch normalization does it: states from before torch 0.4.1, of frozen layers and of other
        # libraries have no counter.
        key = prefix + "num_batches_tracked"
        tracked = self.num_batches_tracked
        if key not in state_dict and prefix + "running_mean" in state_dict and tracked is not None:
            state_dict[key] = torch.zeros_like(tracked, device="cpu") if tracked.is_meta else tracked
        super()._load_from_state_dict(state_dict, prefix, *args)


def finite_or(new: Tensor, kept: Tensor) -> Tensor:
    """`new`, and where that is infinite or nan `kept`, which broadcasts to it."""
    return torch.where(new.abs() < math.inf, new, kept.to(new.dtype))


class DomainStatistics(RunningStatistics):
    """Running statistics of each domain: `running_mean`, `running_var` (D, C) and `num_batches_tracked` (D,).

    Arguments and errors as RunningStatistics, with the shape (D, C) as size.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        momentum: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(shape, momentum, device, dtype)
        self.register_buffer("num_batches_tracked", torch.zeros(shape[0], device=device, dtype=torch.long))

    @property
    def observed(self) -> bool:
        """Whether a recalibration takes what `track` is given, in the place of the buffers."""
        return "track" in self.__dict__

    def track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:  # type: ignore[override]
        """Take in the statistics of K norm batches, in order; a domain without values in one is not moved by it.

        Args:
            mean: (K, D, C) means.
            var: (K, D, C) unbiased variances.
            count: (K, D, 1) values that entered each of them.
        """
        with torch.no_grad():
            held = (count > 0).to(mean.dtype)
            seen = held.sum(0)  # (D, 1)
            self.num_batches_tracked.add_(seen[:, 0].long())
            sound = self.sound(mean, var)
            pairs = [
                (running, torch.where(sound, new, running))
                for running, new in ((self.running_mean, mean), (self.running_var, var))
            ]
            if self.momentum is None:
                total = self.num_batches_tracked[:, None].clamp(min=1)
                for running, new in pairs:
                    running.add_((held * (new - running)).sum(0).div_(total))
                return
            age = seen - held.cumsum(0)  # norm batches of the same domain that come after
            kept = 1 - self.momentum
            weight = held * self.momentum * torch.pow(torch.full_like(age, kept), age)
            left = torch.pow(torch.full_like(seen, kept), seen)
            for running, new in pairs:
                running.mul_(left).add_((weight * new).sum(0))


@dataclass
class _Pool:
    """Moments of all values seen so far, from the moments of each norm batch. Counts: one for all, or one per row."""

    count: int | Tensor = 0
    batches: int | Tensor = 0  # norm batches that held any value
    mean: Tensor | None = None
    squares: Tensor | None = None  # sum of squared deviations from the mean

    def add(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        # Chan, Golub and LeVeque: no difference of large sums
        mean, var = (t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in (mean, var))
        squares = var * _at_least(count - 1, 0)
        self.batches = self.batches + (count > 0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        step, share = mean - self.mean, count / _at_least(total, 1)
        self.mean = self.mean + step * share
        self.squares = self.squares + squares + step.square() * (self.count * share)
        self.count = total


def _at_least(value: int | Tensor, least: int) -> int | Tensor:
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)


def recalibrate(
    net: nn.Module,
    batches: Iterable[Tensor],
    slices: int = 1,
    forward: Callable[[Tensor], Any] | None = None,
    domain: int | None = None,
) -> None:
    """Estimate the running statistics of every norm anew, from fresh batches and with fixed weights.

    Moments are pooled: after it, `running_mean` and `running_var` are the mean and the unbiased variance of *all*
    values that a statistic saw, as if they had been one sample (law of total variance):

        n = sum_b m_b      mean = sum_b m_b mean_b / n
        var = (sum_b (m_b - 1) var_b + sum_b m_b (mean_b - mean)^2) / (n - 1)

    with m_b the values of norm batch b that enter one statistic. The alternative, momentum=None (what
    `torch.optim.swa_utils.update_bn` does), averages var_b and so leaves out the variance between norm batches, which
    is large where a norm batch is one or two images. The activations themselves still come from forwards that use each
    norm batch's own statistics.

    Norms that keep statistics are in training mode for its length, everything else is in evaluation mode: the estimate
    is for the network that is evaluated, without dropout, and draws no random numbers. Modes and momentum are restored.
    Nothing else is changed; if anything fails, the old statistics are back.

    A norm of any class takes part if it has `reset_running_stats()` and `momentum` (weight of the new value). Pairs of
    buffers `running_mean*`, `running_var*` are pooled; a norm without `momentum` or without such a pair is reset and
    then estimates by its own rule. Of statistics per domain (DomainStatistics) those of domains that no batch holds are
    kept: AdaBN on the target leaves the source's alone.

    Args:
        net: holds norms built by `make_norm`; without one that keeps statistics nothing is forwarded.
        batches: inputs (N, C, *), prepared as in training, on the network's device.
        slices: norm batches in each of them: slice k is x[k::slices].
        forward: called with each batch in place of `net`.
        domain: of all batches, for norms that ask; None: not told (or told by `forward`).

    Raises:
        ValueError: no batches, a batch that `slices` does not divide, a norm that declares statistics but has no
            `reset_running_stats`.
    """
    norms = [(name, norm) for name, norm in norm_modules(net) if norm.norm_info.keeps_stats]  # type: ignore[union-attr]
    if not norms:
        return
    for name, norm in norms:
        if not callable(getattr(norm, "reset_running_stats", None)):
            raise ValueError(f'norm "{name}" ({type(norm).__name__}) keeps statistics but has no reset_running_stats()')
    modes = [(module, module.training) for module in net.modules()]
    old = [(part, key, b, b.clone()) for _, n in norms for part in n.modules() for key, b in _buffers(part)]
    extra = [
        (part, part.get_extra_state())
        for _, norm in norms
        for part in norm.modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]
    pools: list[tuple[nn.Module, dict[str, _Pool]]] = []
    momenta: list[tuple[Any, Any]] = []
    try:
        net.eval()
        seen = 0
        with torch.no_grad(), situation(net, domain=domain, slices=slices):
            for _, norm in norms:
                norm.train()
                if not isinstance(norm, DomainStatistics):  # there a norm may look at the other domains' meanwhile
                    _reset_statistics(norm)
                momenta += [(part, part.momentum) for part in norm.modules() if hasattr(part, "momentum")]
                pools.append((norm, {}))
            for part, _ in momenta:
                part.momentum = 1.0  # so that the buffers hold each norm batch's own statistics
            with _observed(pools, slices):
                call = forward or (net.module if isinstance(net, nn.DataParallel) else net)  # replicas would pool apart
                for x in batches:
                    check_slices(x, slices)
                    call(x)
                    seen += 1
        if not seen:
            raise ValueError("recalibrate: no batches given, so there is nothing to estimate from")
        for norm, pool in pools:
            _write(norm, pool)
    except BaseException:
        for part, key, buffer, value in old:
            part._buffers[key] = buffer
            buffer.copy_(value)
        for part, state in extra:
            part.set_extra_state(state)
        raise
    finally:
        for part, momentum in momenta:
            part.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _reset_statistics(norm: nn.Module) -> None:
    """Everything that `norm` keeps is reset, but how far training has come, which `after_update` has told it."""
    told = [(part, part.progress) for part in norm.modules() if hasattr(part, "progress")]
    told = [(part, value.clone() if isinstance(value, Tensor) else value) for part, value in told]
    norm.reset_running_stats()  # type: ignore[operator]
    for part, value in told:
        if isinstance(value, Tensor):
            part.progress.copy_(value)  # type: ignore[operator]
        else:
            part.progress = value


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]


def _pairs(norm: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path of the mean, mean, variance) of every pair of buffers running_mean*, running_var* inside a norm."""
    buffers = dict(norm.named_buffers())
    for path, mean in buffers.items():
        head, _, last = path.rpartition(".")
        if last.startswith("running_mean"):
            twin = buffers.get(f"{head}.".lstrip(".") + last.replace("running_mean", "running_var", 1))
            if twin is not None and twin.shape == mean.shape:
                yield path, mean, twin


@contextmanager
def _observed(pools: list[tuple[nn.Module, dict[str, _Pool]]], slices: int) -> Iterator[None]:
    """Within the block the statistics of every norm batch are pooled.

    A norm that computes all slices at once, or has parts of a norm batch, hands them to `track`, where they are taken;
    any other is called once per norm batch, and its buffers are read after each call.
    """
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    tracking = []
    for norm, pool in pools:
        norm.__dict__["recalibrating"] = True  # inside `hold`, too, one batch is to follow the other
        at_once = slices > 1 and norm.norm_info.slices_at_once  # type: ignore[union-attr]
        if isinstance(norm, DomainStatistics) or (
            isinstance(norm, RunningStatistics) and (at_once or norm.tracks_parts)
        ):
            norm.__dict__["track"] = _Tracker(norm, pool)
            tracking.append(norm)
            continue
        norm.situation = replace(norm.situation, slices=1)  # type: ignore[type-var]
        before.append((norm, unshadow_forward(norm)))
        if any(hasattr(part, "momentum") for part in norm.modules()):
            norm.__dict__["forward"] = _Observer(norm, pool, slices)
        elif slices > 1:
            norm.__dict__["forward"] = _Observer(norm, None, slices)
    try:
        yield
    finally:
        for norm, _ in pools:
            norm.__dict__.pop("recalibrating", None)
        for norm in tracking:
            del norm.__dict__["track"]
        for norm, shadow in before:
            unshadow_forward(norm)
            norm.__dict__.update(shadow)


class _Tracker:
    """Stands in for `RunningStatistics.track`: pools the statistics of K norm batches at once."""

    def __init__(self, norm: RunningStatistics, pool: dict[str, _Pool]):
        self.norm, self.pool = norm, pool.setdefault("running_mean", _Pool())

    def __call__(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        mean, var = mean.detach(), var.detach()
        if isinstance(count, Tensor):  # statistics per domain, of which each norm batch may lack some
            for one in zip(mean, var, count, strict=True):
                self.pool.add(*one)
            return
        centre = mean.mean(dim=0)
        # the K norm batches as one sample: their own deviations and those of their means, unbiased
        squares = var.sum(dim=0) * (count - 1) + (mean - centre).square_().sum(dim=0) * count
        total = count * mean.shape[0]
        self.pool.add(centre, squares / (total - 1), total)
        self.norm.num_batches_tracked.add_(mean.shape[0])


class _Observer:
    def __init__(self, norm: nn.Module, pool: dict[str, _Pool] | None, slices: int):
        self.norm, self.forward, self.pool, self.slices = norm, norm.forward, pool, slices

    def __call__(self, x: Tensor, **inputs: Any) -> Tensor:
        parts = []
        for k in range(self.slices):
            part = x[k :: self.slices]
            parts.append(self.forward(part, **inputs))
            if self.pool is not None:
                for path, mean, var in _pairs(self.norm):
                    self.pool.setdefault(path, _Pool()).add(mean, var, part.numel() // mean.numel())
        return parts[0] if self.slices == 1 else torch.stack(parts, dim=1).reshape(x.shape)


def _write(norm: nn.Module, pools: dict[str, _Pool]) -> None:
    for path, mean, var in _pairs(norm):
        pool = pools.get(path)
        if pool is None or pool.mean is None or pool.squares is None:
            continue  # never forwarded (an unused branch), or a norm with a rule of its own
        pooled = (pool.mean, pool.squares / _at_least(pool.count - 1, 1))
        if isinstance(norm, DomainStatistics):
            held = torch.as_tensor(pool.count > 0, device=mean.device)
            pooled = (torch.where(held, pooled[0], mean), torch.where(held, pooled[1], var))
            tracked = norm.num_batches_tracked
            tracked.copy_(torch.where(held[:, 0], torch.as_tensor(pool.batches)[:, 0], tracked))
        mean.copy_(pooled[0])
        var.copy_(pooled[1])
