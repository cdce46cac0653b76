"""Running statistics: their base class, for plugins, and their estimation anew from fresh batches.

from norms.running import RunningStatistics        what norms.bases.running_statistics explains
norms.recalibrate(net, batches)                    the statistics of all norms of a network anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from norms.bases.running_statistics import DomainStatistics, RunningStatistics
from norms.protocol import ResetRunningStats, hook, norm_modules
from norms.situation import check_slices, situation, unshadow_forward

__all__ = ["DomainStatistics", "RunningStatistics", "recalibrate"]


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
        if hook(norm, ResetRunningStats) is None:
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
