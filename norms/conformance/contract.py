"""The facts that hold of every norm: kept by all, or (odd channel counts, 1x1 maps, ...) defined for each.

"Defined" means that the layer works, or refuses with a ValueError that gives a reason.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from norms import running
from norms.conformance.subject import (
    BATCH,
    Finding,
    Net,
    Subject,
    batch,
    close,
    line,
    mode_name,
    same,
    short,
    state,
    twins,
    yes,
)
from norms.protocol import TransformWeight, hook, norm_modules
from norms.situation import hold


def shape_kept(s: Subject) -> Finding:
    layer, x = s.trained(), s.x()
    shapes = {tuple(s.call(layer.train(mode), x).shape) for mode in (True, False)}
    return Finding("yes", yes(shapes == {tuple(x.shape)}), f"{tuple(x.shape)} -> {sorted(shapes)}")


def dtype_kept(s: Subject) -> Finding:
    changed = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, x = s.trained(dtype=dtype), s.x(dtype=dtype)
        got = {s.call(layer.train(mode), x).dtype for mode in (True, False)}
        if got != {dtype}:
            changed.append(f"{short(dtype)} -> {', '.join(sorted(map(short, got)))}")
    return Finding("yes", yes(not changed), "; ".join(changed) or "float64, float32, bfloat16")


def input_untouched(s: Subject) -> Finding:
    layer, written = s.trained(), []
    for mode in (True, False):
        x = s.x()
        s.call(layer.train(mode), x)
        if not torch.equal(x, s.x()):
            written.append(mode_name(mode))
    return Finding("yes", yes(not written), f"written to in {', '.join(written)}" if written else "")


def batch_of_one(s: Subject) -> Finding:
    return _defined(s, {"": s.x(n=1)})


def maps_of_one_position(s: Subject) -> Finding:
    return _defined(s, {f"N={n}": s.x(n=n)[..., :1, :1].contiguous() for n in (BATCH, 1)})


def other_spatial_ranks(s: Subject) -> Finding:
    shapes = {"(N, C, L)": (16,), "(N, C, D, H, W)": (2, 2, 4)}
    return _defined(s, {name: batch((BATCH, s.channels, *space), 0, torch.float64) for name, space in shapes.items()})


def odd_channel_counts(s: Subject) -> Finding:
    return _defined(s, {f"C={c}": batch((BATCH, c, 4, 4), 0, torch.float64) for c in (7, 13)})


def _defined(s: Subject, cases: dict[str, Tensor]) -> Finding:
    """Each case in both modes: a finite output of the input's shape, or a ValueError with a reason."""
    outcomes: dict[str, list[str]] = {}  # what happened -> where
    ok = True
    for name, x in cases.items():
        for mode in (True, False):
            try:
                layer = s.layer(channels=x.shape[1])
                if not mode and x.shape[1] == s.channels:
                    s.train(layer, s.x(1))
                y = s.call(layer.train(mode), x)
            except ValueError as error:
                outcome = f"ValueError: {line(error)}" if str(error).strip() else "ValueError without a reason"
                ok &= bool(str(error).strip())
            except Exception as error:  # noqa: BLE001 - "never another exception" is the fact
                outcome, ok = line(error), False
            else:
                outcome = "works" if y.isfinite().all() else "not finite"
                if y.shape != x.shape:
                    outcome = f"{tuple(y.shape)} instead of {tuple(x.shape)}"
                ok &= outcome == "works"
            outcomes.setdefault(outcome, []).append(" ".join(filter(None, (name, mode_name(mode)))))
    kinds = {"works" if text == "works" else "ValueError" for text in outcomes}
    measured = " or ".join(sorted(kinds, reverse=True)) if ok else "undefined"
    detail = "; ".join(f"{', '.join(where)}: {text}" for text, where in outcomes.items()) * (kinds != {"works"})
    return Finding("-", measured, detail, ok)


def constant_input(s: Subject) -> Finding:
    bad = []
    for value in (0.0, 3.0):
        for mode in (True, False):
            layer = s.train(s.layer(dtype=torch.float32), s.x(1, dtype=torch.float32)).train(mode)
            x = torch.full_like(s.x(dtype=torch.float32), value).requires_grad_()
            y = s.call(layer, x)
            grads = torch.autograd.grad(y.sum() + (y * y).sum(), [x, *layer.parameters()], allow_unused=True)
            if not all(t.isfinite().all() for t in (y, *grads) if t is not None):
                bad.append(f"x = {value:g} in {mode_name(mode)}")
    return Finding("finite", "not finite" if bad else "finite", ", ".join(bad))


def affine_false(s: Subject) -> Finding:
    names = [{name for name, _ in s.layer(affine=affine).named_parameters()} for affine in (True, False)]
    layer = s.train(s.layer(affine=False), s.x(1))
    for mode in (True, False):
        s.call(layer.train(mode), s.x())
    removed, added = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    detail = f"left: {', '.join(sorted(names[1])) or 'no parameter'}" + (f"; added: {', '.join(added)}" * bool(added))
    return Finding("removes bias, weight", f"removes {', '.join(removed) or 'nothing'}", detail)


def state_dict_round_trip(s: Subject) -> Finding:
    """Through a file as torch.load reads it by default, strictly, and with the same future in training."""
    layer, fresh, x = s.trained(), s.layer(), s.x()
    with torch.no_grad():  # so that nothing agrees by having the same start
        for parameter in fresh.parameters():
            parameter.fill_(0.123)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    hidden = _changed_attributes(layer, fresh)  # before the two go on
    found = twins(s, layer, fresh, x)
    if hidden and found.measured != "same":
        return found._replace(detail=f"neither in buffers nor in extra state: {', '.join(hidden)}")
    return found


def _changed_attributes(layer: nn.Module, other: nn.Module) -> list[str]:
    """Plain attributes, by name, in which two modules of one class differ."""
    own = vars(nn.Module()).keys()
    return [
        f"{path}.{name}" if path else name
        for (path, part), (_, twin) in zip(layer.named_modules(), other.named_modules(), strict=True)
        for name, value in vars(part).items()
        if name not in own and repr(value) != repr(vars(twin).get(name))
    ]


def deepcopy(s: Subject) -> Finding:
    layer, x = s.trained(), s.x()
    twin = copy.deepcopy(layer)
    before = state(layer)
    s.train(copy.deepcopy(layer), s.x(5))
    if not same(before, state(layer)):
        return Finding("same", "shares its buffers with the copy")
    return twins(s, layer, twin, x)


def pickled(s: Subject) -> Finding:
    layer = s.trained()
    kind = type(layer)
    if (
        not hasattr(sys.modules.get(kind.__module__), kind.__qualname__.split(".")[0])
        or "<locals>" in kind.__qualname__
    ):
        return Finding("-", "class not importable", f"{kind.__module__}.{kind.__qualname__}", True)
    twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 - bytes written one call earlier, in this process
    if [norm.norm_info for _, norm in norm_modules(twin)] != [s.info]:
        return Finding("same", "the stamp is lost")
    return twins(s, layer, twin, s.x())


def freeze(s: Subject) -> Finding:
    for mode in (True, False):
        layer, x = s.trained().train(mode), s.x()
        free = copy.deepcopy(layer)
        before, tensors = state(layer), [id(b) for b in layer.buffers()]
        with hold(layer):
            y = s.call(layer, x)
        if not same(before, state(layer)) or tensors != [id(b) for b in layer.buffers()]:
            return Finding("same", f"state moves in {mode_name(mode)}")
        # the layer once more: state that no buffer and no extra state shows has moved if it differs now
        if not torch.equal(y, s.call(free, x)) or not torch.equal(y, s.call(layer, x)):
            return Finding("same", f"another output in {mode_name(mode)}")
    return Finding("same", "same", "inside hold: the mode's output, and no buffer moves")


def recalibrate(s: Subject) -> Finding:
    """With the statistics of one batch, evaluation gives that batch the output that training, gone on with, gives it.

    Training after the recalibration, since earlier iterations may enter a training output, and evaluation is not to
    know them. Larger maps and one per cent of tolerance: buffers hold the unbiased variance, formulas the biased, and a
    statistic may be of a fraction of a channel (bgn). No more than 32 samples, which ghost takes as one whole by
    default: its parts have statistics of their own.
    """
    shape = (16, s.channels, 8, 8)
    x = torch.cat([batch(shape, 1, torch.float64), batch(shape, 2, torch.float64) + 1])
    layer = s.trained()
    before = state(layer)
    if not s.info.keeps_stats:
        running.recalibrate(Net(s, layer), [x])
        return Finding("no-op", "no-op" if same(before, state(layer)) else "changes buffers")
    for batches in ([x], [x[:16], x[16:]]):
        net = Net(s, copy.deepcopy(layer))
        running.recalibrate(net, batches)
        if not net.training:
            return Finding("statistics of the batches", "the mode is not put back")
        expected = s.call(copy.deepcopy(net.norm), x)
        if not close(s.call(net.norm.eval(), x), expected, 1e-2):
            measured = _other_statistics(s, layer, x)
            # options may make training take other statistics than the whole batch's (ghost's small sub-batches)
            allowed = s.configured and measured == "others"
            detail = "with these options" if allowed else f"estimated from {len(batches)} x {len(batches[0])} samples"
            return Finding("statistics of the batches", measured, detail, allowed)
    return Finding("statistics of the batches", "statistics of the batches")


def _other_statistics(s: Subject, layer: nn.Module, x: Tensor) -> str:
    """The estimates of a recalibration with x (N, C, *), where they are not the statistics of x."""

    def estimated(x: Tensor) -> dict[str, Any]:
        net = Net(s, copy.deepcopy(layer))
        running.recalibrate(net, [x])
        return {name: value for name, value in state(net.norm).items() if "running" in name}

    found, start = estimated(x), copy.deepcopy(layer)
    if not found:
        return "no buffers"
    start.reset_running_stats()  # type: ignore[operator]
    if all(same(value, state(start)[name]) for name, value in found.items()):
        return "unmoved"
    for part in (slice(16), slice(16, None), slice(0, None, 2), slice(1, None, 2)):
        other = x.clone()
        other[part] = 3 * other[part] + 2
        if same(found, estimated(other)):
            return "of a part of the batch"
    return "others"


def autocast(s: Subject) -> Finding:
    """Input of mean 100 and deviation 2 in bfloat16, against float64: 16-bit statistics would be far off."""
    layer, exact = s.layer(dtype=torch.float32), s.layer(dtype=torch.float64)
    with torch.no_grad():
        for one, two in zip(layer.parameters(), exact.parameters(), strict=True):
            two.copy_(one)
    x = (100 + 2 * s.x()).to(torch.bfloat16)
    worst, got = 0.0, x.dtype
    # a transformed weight is no identity, and the convolution rounds it and its result to 16 bits: not the norm's doing
    alone = hook(layer, TransformWeight) is not None and "conv_weight" not in s.info.needs
    call = (lambda layer, x: layer(x)) if alone else s.call
    for mode in (True, False):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = call(layer.train(mode), x)
        expected = call(exact.train(mode), x.double())
        got = y.dtype
        if not y.isfinite().all():
            return Finding("right", f"not finite in {mode_name(mode)}")
        # two roundings to bfloat16 (8 bits) of the result itself are allowed
        allowed = 2**-7 * expected.abs() + 0.03
        worst = max(worst, ((y.double() - expected).abs() / allowed).max().item())
    low = [name for name, b in layer.named_buffers() if b.is_floating_point() and b.dtype.itemsize < 4]
    measured = "off" if worst > 1 else f"kept in 16 bits: {', '.join(low)}" if low else "right"
    return Finding("right", measured, f"worst error {worst:.2g} of what rounding allows; output {short(got)}")


def global_generator_untouched(s: Subject) -> Finding:
    layer, x = s.trained(), s.x()
    steps: dict[str, Callable[[], Any]] = {
        "building": s.layer,
        "training": lambda: s.call(layer.train(), x, seed=None),
        "evaluation": lambda: s.call(layer.eval(), x, seed=None),
    }
    moved = []
    for name, step in steps.items():
        before = torch.get_rng_state()
        step()
        if not torch.equal(before, torch.get_rng_state()):
            moved.append(name)
    return Finding("yes", yes(not moved), f"moved by {', '.join(moved)}" if moved else "")


def channels_last_kept(s: Subject) -> Finding:
    layer = s.trained()
    x = s.x().to(memory_format=torch.channels_last)
    lost = [
        mode_name(mode)
        for mode in (True, False)
        if not s.call(layer.train(mode), x).is_contiguous(memory_format=torch.channels_last)
    ]
    return Finding("yes", yes(not lost), f"lost in {', '.join(lost)}" if lost else "")
