"""The facts that a norm declares in its NormInfo, measured."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from norms.conformance.subject import (
    BATCH,
    TIGHT,
    Finding,
    Subject,
    batch,
    close,
    grad,
    gradients,
    listed,
    mode_name,
    noise,
    same,
    state,
    yes,
)
from norms.situation import after_update, hold, situation


def train_and_eval(s: Subject) -> Finding:
    layer, x = s.trained(), s.x()
    outputs = []
    for mode in (True, False):
        with hold(layer):  # one block each: evaluation by a memory of which x is the newest entry is training's output
            outputs.append(s.call(layer.train(mode), x))
    same = close(outputs[0], outputs[1])
    expected = "differ" if s.info.keeps_stats or s.info.mixes_samples != s.info.mixes_samples_in_eval else "same"
    return Finding(expected, "same" if same else "differ")


def mixes_samples_in_train(s: Subject) -> Finding:
    return _mixing(s, True, s.info.mixes_samples)


def mixes_samples_in_eval(s: Subject) -> Finding:
    return _mixing(s, False, s.info.mixes_samples_in_eval)


def _mixing(s: Subject, mode: bool, declared: bool) -> Finding:
    layer, mixes, changes = s.trained().train(mode), False, []
    for n in (BATCH, 64):  # a layer may treat small batches in another way
        x = s.x(n=n)
        # the last sample, since a layer may go from one to the next
        other = torch.cat([3 * s.x(9, n=n)[1:] + 2, x[-1:]])
        with hold(layer):
            one = s.call(layer, x)[-1]
        with hold(layer):
            two = s.call(layer, other)[-1]
        mixes |= not close(one, two)
        changes.append(f"{(one - two).abs().max().item():.2g} (N={n})")
    return Finding(yes(declared), yes(mixes), f"other batch mates change a sample by {', '.join(changes)}")


def axes(s: Subject) -> Finding:
    """Along which axes the value at the last sample, first channel and first position depends on others."""
    measured = measured_axes(s)
    if s.info.axes is None:
        return Finding("-", measured or "none", "", True)
    less = s.configured and set(measured) <= set(s.info.axes)
    return Finding(s.info.axes or "none", measured or "none", "with these options" * less, less or None)


def measured_axes(s: Subject) -> str:
    found = set()
    # a group may be a single channel; a fused activation may clip one value, or show it one statistic of two
    for channels, seed in itertools.product((s.channels, 2 * s.channels), range(0, 12, 2)):
        layer, x = s.layer(channels), batch((BATCH, channels, 4, 4), seed, torch.float64)
        s.train(layer, batch(tuple(x.shape), seed + 1, torch.float64))
        places = {"N": (slice(0, -1),), "C": (-1, slice(1, None)), "HW": (-1, 0, slice(1, None))}
        with hold(layer):
            base = s.call(layer, x)[-1, 0, 0, 0]
        for letters, place in places.items():
            offset = torch.zeros_like(x)
            offset[place] = 1 + noise(offset[place].shape, 3, x.dtype)
            with hold(layer):
                if not close(base, s.call(layer, x, offset=offset)[-1, 0, 0, 0]):
                    found.add(letters)
    return "".join(letters for letters in ("N", "C", "HW") if letters in found)


def earlier_iterations(s: Subject) -> Finding:
    """A norm may declare less than it does: batch renormalization moves with its running statistics, too."""
    x, outputs = s.x(), []
    for past in ((s.x(1), s.x(2)), (3 * s.x(1) + 2, 2 * s.x(2) - 1)):
        outputs.append(s.call(s.train(s.layer(), *past), x))
    depends = not close(outputs[0], outputs[1])
    missing = s.info.across_iterations and not depends
    less = missing and s.configured
    return Finding(yes(s.info.across_iterations), yes(depends), "with these options" * less, less or not missing)


def keeps_statistics(s: Subject) -> Finding:
    layer = s.layer()
    start = state(layer)
    s.train(layer, s.x(1), s.x(2))
    moved = not same(start, state(layer))
    if "context" in s.info.needs:
        # the moments of a context set are replaced by the next one's: a statistic outlives it
        moved = not same(state(layer), state(s.train(s.layer(), s.x(3), s.x(2))))
    layer.eval()
    before = state(layer)
    with torch.no_grad():
        s.call(layer, s.x(3))
    # a query set is normalized by what its context set left behind, in evaluation too
    moved_in_eval = not same(before, state(layer)) and "context" not in s.info.needs
    measured = yes(moved) + (", and evaluation moves them" if moved_in_eval else "")
    return Finding(yes(s.info.keeps_stats), measured, ", ".join(start))


def running_statistics_used_in_eval(s: Subject) -> Finding:
    x = s.x()
    one = s.call(s.train(s.layer(), s.x(1), s.x(2)).eval(), x)
    two = s.call(s.train(s.layer(), 3 * s.x(1) + 2, 2 * s.x(2) - 1).eval(), x)
    return Finding(yes(s.info.keeps_stats), yes(not close(one, two)), "evaluation after two different histories")


def gradient_first_order(s: Subject) -> Finding:
    return _gradient(s, second=False)


def gradient_second_order(s: Subject) -> Finding:
    return _gradient(s, second=True)


def _gradient(s: Subject, second: bool) -> Finding:
    """Against finite differences along random directions, for the input and every parameter, in both modes.

    gradcheck's fast mode projects too, but allows an error that grows with the number of entries, and so lets a
    variance that takes no gradient pass; its slow mode needs thousands of forwards.
    """
    if not s.info.exact_gradient:
        return Finding("not exact", "not tried", "compare it with a literal transcription instead", True)
    wrong = []
    for mode in (True, False):
        layer = s.trained().train(mode)
        names = ("x", *(name for name, _ in layer.named_parameters()))
        inputs = [s.x(n=2), *(p.detach() for p in layer.parameters())]

        def output(*values: Tensor, layer: nn.Module = layer, names: tuple[str, ...] = names) -> Tensor:
            with hold(layer):  # every call starts from the same state
                y = s.call(layer, values[0], parameters=dict(zip(names[1:], values[1:], strict=True)))
            return (y * noise(y.shape, 50, y.dtype)).sum()

        def slope(*values: Tensor, output: Callable[..., Tensor] = output) -> Tensor:
            values = tuple(v if v.requires_grad else v.detach().requires_grad_() for v in values)
            grads = gradients(output(*values), values, create_graph=True)
            return sum((g * noise(g.shape, 60 + i, g.dtype)).sum() for i, g in enumerate(grads))  # type: ignore[return-value]

        for name, error in zip(names, _errors(slope if second else output, inputs), strict=True):
            if not error < 1e-6:
                wrong.append(f"in {mode_name(mode)} with respect to {name}: off by {error:.2g} of its norm")
    if wrong and _rounds(s):
        wrong.insert(0, "computed in float32")
    return Finding("exact", "not exact" if wrong else "exact", "; ".join(wrong))


def _rounds(s: Subject) -> bool:
    """Whether what float64 has beyond float32 is lost of the input or the output: then differences are of rounding."""
    layer, x = s.trained().eval(), s.x(n=2)
    y = s.call(layer, x)
    return torch.equal(y, s.call(layer, x.float().double())) or torch.equal(y, y.float().double())


def _errors(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[float]:
    """For each input of a scalar f, how far the derivative along random directions is off, relative to the gradient."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = f(*leaves)
    # Fourth order, since two values that share a statistic can lie close and bend the function sharply; so small that
    # few of an activation's kinks are crossed. Rounding is about 1e-10 of the value here.
    step = 1e-5
    errors = []
    for i, gradient in enumerate(gradients(value, leaves)):
        error = 0.0
        for seed in range(3):
            direction = noise(inputs[i].shape, 70 + seed, inputs[i].dtype)
            near, back, far, far_back = (
                f(*inputs[:i], inputs[i] + h * step * direction, *inputs[i + 1 :]).item() for h in (1, -1, 2, -2)
            )
            measured = (8 * (near - back) - (far - far_back)) / (12 * step)
            scale = max(gradient.norm().item(), abs(measured), 1e-3 * (1 + abs(value.item())))
            error = max(error, abs(measured - (gradient * direction).sum().item()) / scale)
        errors.append(error)
    return errors


def slices(s: Subject) -> Finding:
    """situation(slices=2) against a literal loop over x[k::2]: outputs, gradients, everything kept."""
    trained = s.trained()
    labels = torch.arange(BATCH) // 2  # both domains in either norm batch
    for mode in (True, False):
        layer, literal = copy.deepcopy(trained).train(mode), copy.deepcopy(trained).train(mode)
        x, z = s.x().requires_grad_(), s.x().requires_grad_()
        with situation(layer, slices=2):
            y = s.call(layer, x, labels)
        expected = torch.empty_like(y)
        for k in range(2):
            expected[k::2] = s.call(literal, z[k::2], labels[k::2])
        pull = noise(y.shape, 7, y.dtype)
        parts = (y, expected), (grad(y, x, pull), grad(expected, z, pull))
        for what, (one, two) in zip(("output", "gradient"), parts, strict=True):
            if not close(one, two):
                return Finding("one by one", f"another {what} in {mode_name(mode)}")
        if not same(state(layer), state(literal), TIGHT):
            return Finding("one by one", f"other statistics after {mode_name(mode)}")
    return Finding("one by one", "one by one", "at once" if s.info.slices_at_once else "")


def needs(s: Subject) -> Finding:
    """The inputs that a norm needs, by their effect: outputs change with domain, context set or activation."""
    found = {
        "conv_weight": "weight" in inspect.signature(s.layer().forward).parameters,
        "activation": _fuses_activation(s),
        "domain": _reads_domain(s),
        "context": _reads_context(s),
        "second_look": _looks_again(s),
    }
    measured = listed(name for name, yes in found.items() if yes)
    if found["context"] and _queries_see_each_other(s):
        measured += ", and queries see each other"  # then the context would not be all that they are normalized by
    less = s.configured and {name for name, yes in found.items() if yes} < s.info.needs
    return Finding(listed(s.info.needs), measured, "with these options" * less, less or None)


def _fuses_activation(s: Subject) -> bool:
    if "activation" not in s.info.needs:
        return False  # nothing is passed at build
    x = s.x()
    outputs = [s.call(s.layer(activation=f), x) for f in (nn.ReLU(), nn.Softplus())]
    # a norm may replace any activation that follows by its own, and may refuse a place that has none
    with contextlib.suppress(ValueError):
        outputs.append(s.call(s.layer(activation=None), x))
    return not all(close(outputs[0], other) for other in outputs[1:])


def _reads_domain(s: Subject) -> bool:
    layer, x = s.layer(), s.x()
    s.train(layer, s.x(1), s.x(2) + 2 * (torch.arange(BATCH) % 2).reshape(-1, 1, 1, 1))
    for mode in (True, False):
        outputs = []
        for domain in (torch.arange(BATCH) % 2, torch.arange(BATCH) // 2):
            # a copy each: a secret memory of a norm must not be taken for the domain
            outputs.append(s.call(copy.deepcopy(layer).train(mode), x, domain))
        if not close(outputs[0], outputs[1]):
            return True
    return False


def _reads_context(s: Subject) -> bool:
    outputs = []
    for context in (s.x(1), 3 * s.x(2) + 2):
        layer = s.layer().eval()
        s.call(layer, context, part="context")
        outputs.append(s.call(layer, s.x(), part="query"))
    return not close(outputs[0], outputs[1])


def _queries_see_each_other(s: Subject) -> bool:
    other = torch.cat([3 * s.x(9)[1:] + 2, s.x()[-1:]])
    for mode in (True, False):
        layer, outputs = s.layer().train(mode), []
        for x in (s.x(), other):
            s.call(layer, s.x(1), part="context")
            outputs.append(s.call(layer, x, part="query")[-1])
        if not close(outputs[0], outputs[1]):
            return True
    return False


def _looks_again(s: Subject) -> bool:
    looks = []
    layer = s.layer()
    s.call(layer, s.x())
    before = state(layer)
    after_update(layer, lambda: looks.append(s.call(layer, 2 * s.x() + 1)), 0.5)
    return bool(looks) and not same(before, state(layer))
