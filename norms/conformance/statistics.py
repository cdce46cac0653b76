"""The statistics of a layer: of which samples, divided by which count, moved with which weight.

Axes: N samples, C channels, then space. d: deviations, an input of mean 0.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from norms.conformance.declared import measured_axes
from norms.conformance.subject import BATCH, Finding, Net, Subject, batch, close, line, noise, same, state
from norms.protocol import AfterUpdate, hook
from norms.situation import after_update
from norms.telling import UNTOLD

STEPS = UNTOLD + 5
"""Optimizer steps after which a norm that is never told of them must have warned."""


def every_sample_counts(s: Subject) -> Finding:
    """Another sample in one place changes what its batch mates come out as, and the running statistics.

    But for the last place in the outputs, since a layer may go from one sample to the next.
    """
    if not (s.info.mixes_samples or s.info.keeps_stats):
        return Finding("-", "no batch statistics", "", True)
    start = s.train(s.layer(), s.x(1)).train()
    same_domain = torch.zeros(BATCH, dtype=torch.long)
    base = copy.deepcopy(start)
    s.call(base, s.x(), same_domain)
    without: dict[str, list[int]] = {}
    if s.info.mixes_samples:
        unread = unread_samples(s, lambda x: s.call(copy.deepcopy(start), x, same_domain))
        without["the training formula"] = sorted(unread)
    if s.info.keeps_stats and not same(state(base), state(start)):  # that nothing is moved is another fact
        layers = [copy.deepcopy(start) for _ in range(BATCH)]
        for i, layer in enumerate(layers):
            s.call(layer, _with_another(s, i), same_domain)
        kept = [i for i, layer in enumerate(layers) if same(state(layer), state(base), 1e-9)]
        without["running statistics"] = kept
    said = [
        f"samples {', '.join(map(str, which))} of {BATCH} do not enter {what}"
        for what, which in without.items()
        if which
    ]
    return Finding("yes", "no" if said else "yes", "; ".join(said))


def unread_samples(s: Subject, f: Callable[[Tensor], Tensor]) -> set[int]:
    """The samples that change no other's output, but for the last one: a layer may go from one to the next."""
    plain, unread = f(s.x()), set()
    for i in range(BATCH - 1):
        y = f(_with_another(s, i))
        others = [j for j in range(BATCH) if j != i]
        if close(y[others], plain[others]):
            unread.add(i)
    return unread


def _with_another(s: Subject, i: int) -> Tensor:
    x = s.x()
    x[i] = 3 * s.x(9)[i] + 2
    return x


def momentum(s: Subject) -> Finding:
    """The weight of the new value, as torch's: a shift of one batch moves the running mean by momentum times it.

    Not every rule is such an average, so that only the old value's weight is FALSE.
    """
    layer = s.layer()
    parts = [part for part in layer.modules() if isinstance(getattr(part, "momentum", None), float)]
    if not s.info.keeps_stats or not parts:
        return Finding("-", "none", "", True)
    for part in parts:
        part.momentum = 0.25  # type: ignore[assignment]
    try:  # of one sample, since to some every sample is a batch
        found = [_moved_mean(s, layer, s.x(1, n=1), shift) for shift in (0.0, 1.0)]
    except ValueError:
        found = [_moved_mean(s, layer, s.x(1), shift) for shift in (0.0, 1.0)]
    moved = (found[1] - found[0]).abs().max().item()  # of several domains one is moved
    words = {0.25: "the new value's weight", 0.75: "the old value's weight", 0.0: "no running mean moves"}
    measured = next((text for weight, text in words.items() if abs(moved - weight) < 1e-6), "another rule")
    return Finding("the new value's weight", measured, f"{moved:.3g} at momentum 0.25", measured != words[0.75])


def _moved_mean(s: Subject, layer: nn.Module, x: Tensor, shift: float) -> Tensor:
    """Running means after a batch that is shifted."""
    one = copy.deepcopy(layer).train()
    s.call(one, x, offset=torch.full((), shift, dtype=x.dtype))
    return torch.cat([mean.flatten() for mean in _running(one, "running_mean").values()] or [torch.zeros(1)])


def _running(layer: nn.Module, start: str) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in layer.named_buffers() if n.rpartition(".")[2].startswith(start)}


# --- the variance's convention ------------------------------------------------------------------------------------


def variance_in_training(s: Subject) -> Finding:
    """Divided by the count ("biased") or by the count less one ("unbiased"), from the outputs alone.

    Every value twice leaves a variance divided by the count n as it is; divided by n - 1, it falls by the factor
    2 (n - 1) / (2 n - 1), which also gives n. Deviations are large, so that eps plays no part, and outputs are those
    of d less those of -d, so that a bias plays none. What divides by no variance (or by a mean square) is told by
    twice the deviations around a large mean, of either sign (a gate may close): they leave a normalized output as it
    is, and double any other.
    """
    axis = _axis(s)
    if axis is None:
        return _convention(s, s.info.variance, "none", "")
    try:
        if not any(_scale_free(s, _centred(s, axis), far) for far in (1e4, -1e4)):
            return _convention(s, s.info.variance, "none", "no variance, or a mean square")
        d = 1e3 * _centred(s, axis)
        first = tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(d.dim()))
        one, two = _odd(s, d), _odd(s, d.repeat_interleave(2, axis))[first]
    except ValueError as error:
        return _convention(s, s.info.variance, "not measured", line(error))
    return _convention(s, s.info.variance, *_divided_by(one.square(), two.square()))


def variance_in_running_statistics(s: Subject) -> Finding:
    """The same of the step of `running_var*` by one training batch: from its values at d, 2 d, and d with doubles."""
    axis = _axis(s)
    if axis is None or not _running(s.fresh(), "running_var"):
        return _convention(s, s.info.running_variance, "none", "")
    d, found = 10 * _centred(s, axis), []
    try:
        for x in (d, 2 * d, d.repeat_interleave(2, axis), 2 * d.repeat_interleave(2, axis)):
            layer = s.fresh(x.shape[1]).train()
            s.call(layer, x)
            found.append(torch.cat([v.flatten() for v in _running(layer, "running_var").values()]))
    except ValueError as error:
        return _convention(s, s.info.running_variance, "not measured", line(error))
    one, two = found[1] - found[0], found[3] - found[2]  # the start's share drops out
    moved = one.abs() > 1e-9
    if one.shape != two.shape or not moved.any():
        return _convention(s, s.info.running_variance, "none", "not moved by a batch")
    return _convention(s, s.info.running_variance, *_divided_by(two[moved], one[moved]))


def _convention(s: Subject, declared: str | None, measured: str, detail: str) -> Finding:
    if declared is None:
        return Finding("-", measured, detail, True)
    other = s.configured and measured != declared  # facts are declared of the default options
    return Finding(declared, measured, ", ".join(filter(None, (detail, "with these options" * other))), other or None)


def _axis(s: Subject) -> int | None:
    """The axis along which values that share a statistic are repeated; None: there are none."""
    axes = measured_axes(s) if s.info.axes is None else s.info.axes
    return next((axis for letters, axis in (("HW", 3), ("N", 0), ("C", 1)) if letters in axes), None)


def _centred(s: Subject, axis: int) -> Tensor:
    """Few values, with mean 0 along `axis`."""
    x = batch((BATCH, s.channels, 2, 2), 0, torch.float64)
    return x - x.mean(axis, keepdim=True)


def _scale_free(s: Subject, d: Tensor, far: float) -> bool:
    """Whether outputs around this mean are as far apart at 2 d as at d."""
    small, large = (_odd(s, factor * d, far).norm().item() for factor in (1, 2))
    return 0 < large < 1.5 * small


def _odd(s: Subject, d: Tensor, far: float = 0.0) -> Tensor:
    """Half of the difference between the training outputs of a new layer at d and at -d, around a mean."""
    offset = torch.full((), far, dtype=d.dtype) if far else None
    torch.manual_seed(0)  # some draw their weights
    layer = s.fresh(d.shape[1]).train()
    up, down = (s.call(copy.deepcopy(layer), x, offset=offset) for x in (d, -d))
    return (up - down).detach() / 2


def _divided_by(one: Tensor, two: Tensor) -> tuple[str, str]:
    """The convention and the count, from reciprocals of the variances of d and of its values twice, up to a factor."""
    seen = one.abs() > 1e-3 * one.abs().max()
    ratios = two[seen] / one[seen]  # (2 n - 1) / (2 n - 2) where n - 1 divides
    ratio = ratios.mean().item()
    if not (ratios - ratio).abs().max() < 1e-6:
        return "neither", "more than one kind of variance"
    if abs(ratio - 1) < 1e-6:
        return "biased", ""
    count = (2 * ratio - 1) / (2 * ratio - 2)
    if ratio < 1 or abs(count - round(count)) > 1e-2:
        return "neither", f"a value twice changes the variance by the factor {1 / ratio:.4g}"
    return "unbiased", f"of {round(count)} values"


# --- told of updates ----------------------------------------------------------------------------------------------


def warns_when_never_told(s: Subject) -> Finding:
    """A loop of optimizer steps without after_update: one warning that names it, from norms that wait for it alone."""
    waits = s.info.keeps_stats and (hook(s.layer(), AfterUpdate) is not None or "second_look" in s.info.needs)
    loops = {"never told": waits, "told": False, "without steps": False}
    found = {loop: _warnings(s, loop) for loop in loops}
    wrong = [f"{found[loop]} warnings in a loop {loop}" for loop, due in loops.items() if found[loop] != due]
    expected = "once" if waits else "never"
    return Finding(expected, "not so" if wrong else expected, "; ".join(wrong))


def _warnings(s: Subject, loop: str) -> int:
    net = Net(s, s.layer(), 1).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            x = s.x(step)
            optimizer.zero_grad()
            y = net(x)
            (y * noise(y.shape, 7, y.dtype)).mean().backward()
            if loop != "without steps":
                optimizer.step()
            if loop == "told":
                after_update(net, lambda x=x: net(x), (step + 1) / STEPS)  # type: ignore[misc]
    return sum("after_update" in str(warning.message) for warning in caught)
