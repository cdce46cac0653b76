"""The state of a layer, copied, stored, averaged and reset: averages, replicas, old files, new starts."""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from norms.conformance.subject import (
    Finding,
    Net,
    Subject,
    close,
    line,
    mode_name,
    noise,
    same,
    short,
    state,
    twins,
)
from norms.protocol import ResetParameters, ResetRunningStats, hook
from norms.situation import after_update, hold

Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


def form_of_buffers_kept(s: Subject) -> Finding:
    """Shape and type of all state stay from the first training forward on; and no graph is kept."""
    expected, changed = "from the first forward on", []
    for dtype in (torch.float64, torch.float32):
        layer = s.layer(dtype=dtype)
        s.call(layer.train(), s.x(1, dtype=dtype).requires_grad_())
        first = _form(layer)
        graphs = [name for name, b in layer.named_buffers() if b.requires_grad]
        if graphs and "context" not in s.info.needs:  # the loss of queries is to reach the context
            return Finding(expected, "kept with a gradient graph", ", ".join(graphs))
        s.train(layer, s.x(2, dtype=dtype), s.x(3, n=6, dtype=dtype))
        other = torch.float32 if dtype == torch.float64 else torch.bfloat16
        with contextlib.suppress(Exception):  # that a layer takes another type is another fact
            s.train(layer, s.x(4, dtype=other))
        s.call(layer.eval(), s.x(5, dtype=dtype))
        now = _form(layer)
        changed += [
            f"{name}: {_words(first.get(name))} -> {_words(now.get(name))}"
            for name in first | now
            if first.get(name) != now.get(name)
        ]
    return Finding(expected, "changes" if changed else expected, "; ".join(dict.fromkeys(changed)))


def _form(layer: nn.Module) -> Form:
    return {name: (tuple(t.shape), t.dtype) for name, t in state(layer).items() if isinstance(t, Tensor)}


def _words(form: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if form is None else f"{form[0]} of {short(form[1])}"


def averaged_model(s: Subject) -> Finding:
    """torch's AveragedModel, made after the first forward: the mean of the parameters, with copied or mean buffers."""
    for use_buffers in (False, True):
        what = f"use_buffers={use_buffers}"
        net = Net(s, s.layer(), 1).train()  # torch's average takes no network without parameters
        net(s.x(1))
        average = AveragedModel(net, use_buffers=use_buffers)
        seen: list[list[Tensor]] = []
        for seed in (2, 3, 4):
            with torch.no_grad():
                for i, parameter in enumerate(net.parameters()):
                    parameter.add_(noise(parameter.shape, 10 * seed + i, parameter.dtype), alpha=0.1)
            net(s.x(seed))
            after_update(net, lambda: net(s.x(seed)), seed / 4)  # noqa: B023 - called at once
            average.update_parameters(net)
            seen.append([p.detach().clone() for p in net.parameters()])
        means = [torch.stack(values).mean(0) for values in zip(*seen, strict=True)]
        if not all(close(p, mean) for p, mean in zip(average.module.parameters(), means, strict=True)):
            return Finding("the mean", "other parameters", what)
        if not use_buffers and not same(dict(average.module.named_buffers()), dict(net.named_buffers())):
            return Finding("the mean", "other buffers", what)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, mean in zip(twin.parameters(), means, strict=True):
                parameter.copy_(mean)
            for buffer, its in zip(twin.buffers(), average.module.buffers(), strict=True):
                buffer.copy_(its)
        if not close(average.eval()(s.x(5)), twin.eval()(s.x(5))):
            return Finding("the mean", "another evaluation", what)
    return Finding("the mean", "the mean")


def data_parallel_replica(s: Subject) -> Finding:
    """The replicas that torch.nn.DataParallel makes of a layer, inside situation(slices=2) and inside hold."""
    for inside in ("situation(slices=2)", "hold"):
        for mode in (True, False):
            layer, x = s.trained().train(mode), s.x()
            own = s.train(s.layer(), 2 * s.x(4) + 1)
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.mul_(3)
            own.train(mode)
            twin, before = copy.deepcopy(own), state(layer)
            slices = 2 if inside != "hold" else 1
            labels = torch.arange(len(x)) // 2  # both domains in either norm batch
            with s.told(twin, x, labels, slices=slices):
                expected = s.bare(twin, _seeded(x))
            with (
                s.told(layer, x, labels, slices=slices),
                hold(layer) if inside == "hold" else warnings.catch_warnings(),
            ):
                replica = _replica(layer, own)
                y = s.bare(replica, _seeded(x))
            where = f"{inside}, {mode_name(mode)}"
            if not close(y, expected):
                return Finding("its own", "the original's", where)
            if not same(before, state(layer)):
                return Finding("its own", "the original's buffers move", where)
    return Finding("its own", "its own", "weights and buffers")


def _seeded(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return x.clone().requires_grad_()


def _replica(layer: nn.Module, own: nn.Module) -> nn.Module:
    """A replica of `layer` with the parameters and buffers of `own`, as they would lie on another device."""
    replica: nn.Module = layer._replicate_for_data_parallel()
    for name, parameter in own._parameters.items():
        replica._parameters[name] = parameter
    for name, buffer in own._buffers.items():
        replica._buffers[name] = buffer
    for name, child in layer._modules.items():
        if child is not None:
            replica._modules[name] = _replica(child, own.get_submodule(name))
    return replica


def state_dict_without_counter(s: Subject) -> Finding:
    """A state_dict without num_batches_tracked (torch before 0.4.1, frozen norms) loads strictly, as torch's does."""
    layer, fresh, x = s.trained(), s.layer(), s.x()
    given = dict(layer.state_dict())
    counters = [name for name in given if name.rpartition(".")[2] == "num_batches_tracked"]
    if not counters:
        return Finding("-", "no counter", "", True)
    old = {name: t for name, t in given.items() if name not in counters}
    before = {name: t.clone() for name, t in fresh.state_dict().items() if name in counters}
    try:
        fresh.load_state_dict(old, strict=True)
    except RuntimeError as error:
        return Finding("loads", "refused", line(error))
    now = fresh.state_dict()
    if not all(torch.equal(now[name], before[name]) for name in counters):
        return Finding("loads", "loads, and changes the counter")
    if not same({n: t for n, t in now.items() if n in old}, old):
        return Finding("loads", "loads something else")
    if not close(s.call(fresh.eval(), x), s.call(layer.eval(), x)):
        return Finding("loads", "evaluates to something else")
    for missing in (name for name in old if name.rpartition(".")[2].startswith("running_")):
        try:
            fresh.load_state_dict({n: t for n, t in old.items() if n != missing}, strict=True)
        except RuntimeError:
            continue
        return Finding("loads", f"loads without {missing}, too")
    return Finding("loads", "loads")


def safetensors_round_trip(s: Subject) -> Finding:
    """Through the bytes of a .safetensors file, strictly, and with the same future in training."""
    try:
        storage: Any = importlib.import_module("safetensors.torch")
    except ImportError:
        return Finding("-", "not tried", "safetensors is not installed", True)
    layer, fresh = s.trained(), s.layer()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.123)
    try:
        fresh.load_state_dict(storage.load(storage.save(layer.state_dict())), strict=True)
    except Exception as error:  # noqa: BLE001 - safetensors has errors of its own
        return Finding("same", "refused", line(error))
    return twins(s, layer, fresh, s.x())


def reset_parameters(s: Subject) -> Finding:
    """After to_empty from the meta device, and after training: a new layer, up to its draws."""
    expected = "as new"
    new, again = (_drawn(s, seed) for seed in (0, 1))
    drawn = [name for name in new if isinstance(new[name], Tensor) and not same(new[name], again[name])]
    meta = s.fresh(device="meta")
    if hook(meta, ResetParameters) is None:
        return Finding(expected, "no reset_parameters()")
    empty = meta.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for t in (*empty.parameters(), *empty.buffers()):
            t.fill_(7)  # what to_empty leaves is not defined, and must not happen to be right
    trained = s.trained()
    after_update(trained, lambda: None, 0.0)
    for what, layer in (("from the meta device", empty), ("after training", trained)):
        layer.reset_parameters()  # type: ignore[operator]
        found = {**state(layer), **{name: p.detach() for name, p in layer.named_parameters()}}
        for name, value in new.items():
            got = found.get(name)
            random = name in drawn and isinstance(got, Tensor) and bool(((got != 7) & got.isfinite()).all())
            if not (random or (name not in drawn and same(got, value))):
                return Finding(expected, f"another {name}", what)
    return Finding(expected, expected, f"drawn: {', '.join(drawn)}" if drawn else "")


def _drawn(s: Subject, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    layer = s.fresh()
    return {**state(layer), **{name: p.detach() for name, p in layer.named_parameters()}}


def reset_running_stats(s: Subject) -> Finding:
    """All state that training made, back to a new layer's; parameters and the progress that was told stay."""
    if not s.info.keeps_stats:
        return Finding("-", "no statistics", "", True)
    layer = s.trained()
    s.call(layer, s.x(5).requires_grad_()).sum().backward()  # some keep numbers of the backward
    after_update(layer, lambda: None, 0.0)  # as a new layer: progress is no statistic
    parameters = [p.detach().clone() for p in layer.parameters()]
    keeping = hook(layer, ResetRunningStats)
    if keeping is None:
        return Finding("as new", "no reset_running_stats()")
    keeping.reset_running_stats()
    if not all(torch.equal(a, b) for a, b in zip(parameters, layer.parameters(), strict=True)):
        return Finding("as new", "changes parameters")
    new, now = state(s.layer()), state(layer)
    left = [name for name in new if not same(new[name], now.get(name))]
    if left:
        return Finding("as new", "something stays", ", ".join(left))
    like_new = s.layer()
    with torch.no_grad():  # some draw their weights
        for mine, its in zip(like_new.parameters(), layer.parameters(), strict=True):
            mine.copy_(its)
    one, two = (s.call(each.train(), s.x(8)) for each in (layer, like_new))
    return Finding("as new", "as new" if close(one, two) else "trains to something else")
