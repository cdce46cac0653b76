"""Models of torchvision and timm with a norm of ours in them, and the audit of that as lines of text.

What `convert-report` does: built, converted and forwarded here, printed by suite.cli.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import nn

from norms.convert import Audit, converted
from norms.registry import NormFactory, nearest, norm_info
from norms.situation import situation
from suite.progress import columns


def convert_model(model: str, factory: NormFactory, norm: str) -> Audit:
    """Build a model with random weights, put a norm into it, forward it once in both modes, and return the audit.

    All of it on torch's meta device where model and norm can be (nothing is computed then), else on the CPU.

    Args:
        model: a name of torchvision, or timm:NAME.
        factory: from `make_norm`.
        norm: what the norm is called, for messages.

    Raises:
        ValueError: an unknown model; one without a norm that can be swapped; what `converted` or a layer refuses.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                net, shape = _build(model)
                net, audit = converted(net, factory)
                if audit.swapped:
                    # some facts, for norms that need to be told them; the others do not look
                    with situation(net, domain=0, part="context"):
                        for mode in (True, False):
                            _forward(net.train(mode), torch.zeros(4, *shape))
            break
        except ValueError as error:
            raise ValueError(f'"{model}" with norm "{norm}": {error}' if model not in str(error) else error) from error
        except (NotImplementedError, RuntimeError):  # values are read somewhere, and there are none on "meta"
            if device == "cpu":
                raise
    if not audit.swapped:
        left = ", ".join(f"{found.path} ({found.old})" for found in audit.left)
        why = (
            "all its norms are channels-last, which no norm here can replace" if audit.channels_last else "none can be"
        )
        raise ValueError(f'"{model}": {why}: {left}' if left else f'"{model}" has no norm to swap')
    return audit


def _forward(net: nn.Module, x: torch.Tensor) -> None:
    try:
        net(x)
    except TypeError as error:  # a norm that is not called as it declares
        raise ValueError(f"its forward fails: TypeError: {error}") from error


def audit_lines(audit: Audit, model: str, norm: str) -> Iterator[str]:
    """The audit of `model` with `norm` in it, in words: counts first, and last whether norms were left."""
    yield f"{model} -> {norm}: {len(audit.swapped)} norms swapped, {len(audit.left)} left"
    kinds = Counter((found.old, ", ".join(found.carried) or "nothing") for found in audit.swapped)
    yield from columns([("swapped", "", "carried over"), *((old, str(n), what) for (old, what), n in kinds.items())])
    if audit.left:
        yield from columns([("left", "", "why"), *audit.left])
    if audit.before is not None and audit.after is not None:
        sizes = zip(audit.before._fields, audit.before, audit.after, strict=True)
        rows = [(name.replace("norm_", "of norms: "), f"{old:,}", f"{new:,}") for name, old, new in sizes]
        yield from columns([("elements", "before", "after"), *rows])
    where: dict[str, list[str]] = {}
    for changed in audit.changed:
        where.setdefault(changed.what, []).append(changed.norm)
    for what, paths in where.items():
        if len(paths) == len(audit.swapped):
            yield f"each of the {len(paths)} new norms {what}"
        else:
            yield f"each of {len(paths)} new norms {what}:"
            yield from paths
    if audit.unhooked:
        yield f"{len(audit.unhooked)} modules that lost their hooks:"
        yield from (path or "the network itself" for path in audit.unhooked)
    if audit.removed:
        pairs = [(removed.activation, f"after {removed.norm}") for removed in audit.removed]
        yield from columns([(f"{len(pairs)} activations that the norm brings", ""), *pairs])
    if audit.rewired:
        pairs = [(rewired.conv, f"{rewired.how} for {rewired.norm}") for rewired in audit.rewired]
        yield from columns([(f"{len(pairs)} convolutions whose weight is", ""), *pairs])
    if audit.bare:
        yield f"{len(audit.bare)} norms that no activation directly follows, so that they bring none:"
        yield from audit.bare
    if audit.plain:
        yield f"{len(audit.plain)} norms without a convolution before them, whose weight they would transform:"
        yield from audit.plain
    needs = {need for name in {name for _, name in audit.ours} for need in norm_info(name).needs}
    facts = [fact for need, fact in (("domain", "domain=..."), ("context", "part=...")) if need in needs]
    if facts:
        yield f"to be told in every forward: `with norms.situation.situation(net, {', '.join(facts)}):`"
    if not audit.complete:
        yield f"incomplete: {len(audit.left)} norms of {model} are not ours"


def _build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model of torchvision or timm without trained weights, and the shape of its images."""
    if name.startswith("timm:"):
        try:
            import timm
        except ImportError as error:
            raise ValueError(f'model "{name}" needs timm: {sys.executable} -m pip install timm') from error
        known = [f"timm:{each}" for each in timm.list_models()]
        if name.partition(".")[0] not in known:
            raise ValueError(f'unknown model "{name}"; see timm.list_models(){nearest(name, known)}')
        net: Any = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        return net, tuple(net.pretrained_cfg["input_size"])
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(
            f'unknown model "{name}"; torchvision.models.list_models(), or timm:NAME{nearest(name, known)}'
        )
    # the two whose constructors warn that their own initialization is slow
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **quick), (3, size, size)
