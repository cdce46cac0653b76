"""Models of torchvision and timm with a norm of ours in them, and the audit of that as lines of text.

What `convert-report` does: built, converted and forwarded here, printed by suite.cli.

torchvision's detectors take lists of images and targets and decide on values, so that torch.fx can not follow them. For
a norm that needs its surroundings their largest parts that it can follow are converted one by one: the backbone, and
convolutions of the heads.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from norms.convert import Audit, Untraceable, converted
from norms.convert.audit import is_channelwise, is_ours
from norms.factory import NormFactory
from norms.protocol import norm_modules
from norms.registry import norm_info
from norms.situation import situation
from norms.values import nearest
from suite.progress import columns

IMAGES = 4
FRAMES = 16
"""Of a video: what the models of torchvision that fix a number were made for."""
DETECTED = 320
"""The side to which a detector is told to resize, where it can be told: enough for seven halvings, and quick."""


class Conversion(NamedTuple):
    """The result of `convert_model`.

    Attributes:
        parts: the audit of each part that was converted, by its path; "" is the whole model.
        why: what kept torch.fx from following the whole, or "".
    """

    parts: dict[str, Audit]
    why: str = ""

    @property
    def complete(self) -> bool:
        return all(audit.complete for audit in self.parts.values())


class _Model(NamedTuple):
    """A model of another library, and the shape of one of its images or videos; a detector takes lists of images."""

    net: nn.Module
    shape: tuple[int, ...]
    detects: bool = False


def convert_model(model: str, factory: NormFactory, norm: str, keep: Collection[str] = ()) -> Conversion:
    """Build a model with random weights, put a norm into it, and forward it once in both modes.

    All of it on torch's meta device where model and norm can be (nothing is computed then), else on the CPU.

    Args:
        model: a name of torchvision (classification, segmentation, detection, video), or timm:NAME.
        factory: from `make_norm`.
        norm: what the norm is called, for messages.
        keep: paths of old norms that stay.

    Raises:
        ValueError: an unknown model; one without a norm that can be swapped; what `converted` or a layer refuses.
    """
    _check_name(model)
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                built = _build(model)
                if built.detects and device == "meta":  # where they look for objects, they look at values
                    continue
                net, conversion = _converted(built.net, factory, keep)
                if built.detects and conversion.why:  # the first thing at which torch.fx stopped would mislead
                    conversion = conversion._replace(why="it takes lists of images, and targets in training")
                if any(audit.swapped for audit in conversion.parts.values()):
                    # some facts, for norms that need to be told them; the others do not look
                    with situation(net, domain=0, part="context"):
                        for mode in (True, False):
                            _forward(net.train(mode), built, device)
            break
        except ValueError as error:
            lines = str(error).splitlines()
            raise ValueError("\n".join(f'"{model}" with norm "{norm}": {line}' for line in lines)) from error
        except (NotImplementedError, RuntimeError):  # values are read somewhere, and there are none on "meta"
            if device == "cpu":
                raise
    _refuse_unswapped(model, conversion)
    return conversion


def _refuse_unswapped(model: str, conversion: Conversion) -> None:
    audits = conversion.parts.values()
    if any(audit.swapped or audit.kept for audit in audits):
        return
    left = ", ".join(f"{found.path} ({found.old})" for audit in audits for found in audit.left)
    why = (
        "all its norms are channels-last, which no norm here can replace"
        if any(audit.channels_last for audit in audits)
        else "none can be"
    )
    raise ValueError(f'"{model}": {why}: {left}' if left else f'"{model}" has no norm to swap')


def _converted(net: nn.Module, factory: NormFactory, keep: Collection[str]) -> tuple[nn.Module, Conversion]:
    """`net` with the norm in it, as a whole where that can be.

    Raises:
        ValueError: what `converted` refuses; for an Untraceable network, what it refuses of a part.
    """
    try:
        net, audit = converted(net, factory, keep=keep)
        return net, Conversion({"": audit})
    except Untraceable as error:
        parts: dict[str, Audit] = {}
        _convert_parts(net, "", factory, keep, parts, error)
        return net, Conversion(parts, " ".join(str(error.__cause__ or error).split()))


def _convert_parts(
    net: nn.Module, path: str, factory: NormFactory, keep: Collection[str], parts: dict[str, Audit], why: Untraceable
) -> None:
    """Convert the largest parts of `net` at `path` that torch.fx can follow; `why` it can not follow all of it."""
    for name, part in net.named_children():
        where = f"{path}.{name}" if path else name
        if not any(is_channelwise(module) and not is_ours(module) for module in part.modules()):
            continue
        if is_channelwise(part):  # what surrounds it, its parent alone knows
            raise why
        inside = [kept.removeprefix(f"{where}.") for kept in keep if kept.startswith(f"{where}.")]
        try:
            new, parts[where] = converted(part, factory, keep=inside)
        except Untraceable as error:
            _convert_parts(part, where, factory, keep, parts, error)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        else:
            setattr(net, name, new)


def _forward(net: nn.Module, model: _Model, device: str) -> None:
    """One forward of zeros, in the mode of `net`. ValueError for what a norm refuses, with its path."""
    entered = [""]
    handles = [
        norm.register_forward_pre_hook(lambda norm, inputs, path=path: entered.append(path))
        for path, norm in norm_modules(net)
    ]
    try:
        net(*_arguments(net, model))
    except ValueError as error:
        raise ValueError(f"{entered[-1]}: {error}; `--keep {entered[-1]}` leaves the old norm there") from error
    except (TypeError, AttributeError, RuntimeError, AssertionError) as error:
        if device == "meta" and isinstance(error, RuntimeError):
            raise
        raise ValueError(f"its forward fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        for handle in handles:
            handle.remove()


def _arguments(net: nn.Module, model: _Model) -> tuple[Any, ...]:
    if not model.detects:
        return (torch.zeros(IMAGES, *model.shape),)
    images = [torch.zeros(model.shape) for _ in range(2)]  # of 20 and more million weights, on the CPU
    height, width = model.shape[1:]
    target = {
        "boxes": torch.tensor([[0.0, 0.0, width / 2, height / 2]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, height, width, dtype=torch.uint8),
        "keypoints": torch.ones(1, 17, 3),
    }
    return (images, [target, target]) if net.training else (images,)


def conversion_lines(conversion: Conversion, model: str, norm: str) -> Iterator[str]:
    """The audits of `model` with `norm` in it, in words; why it was converted in parts first, if it was."""
    if conversion.why:
        parts = ", ".join(conversion.parts)
        yield f"{model} is converted in parts ({parts}), since torch.fx can not follow it as a whole: {conversion.why}"
    for path, audit in conversion.parts.items():
        yield from audit_lines(audit, f"{model}.{path}" if path else model, norm)


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


_FAMILIES = ("", "segmentation", "detection", "video")
"""Modules of torchvision.models; "" is classification."""


def _known(family: str) -> list[str]:
    return torchvision.models.list_models(getattr(torchvision.models, family, torchvision.models))


def _check_name(name: str) -> None:
    """ValueError for a name that neither library has."""
    if not name.startswith("timm:"):
        known = [each for family in _FAMILIES for each in _known(family)]
        if name not in known:
            raise ValueError(
                f'unknown model "{name}"; torchvision.models.list_models() of classification, segmentation, detection '
                f"and video, or timm:NAME{nearest(name, known)}"
            )
        return
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'model "{name}" needs timm: {sys.executable} -m pip install timm') from error
    known = [f"timm:{each}" for each in timm.list_models()]
    if name.partition(".")[0] not in known:
        raise ValueError(f'unknown model "{name}"; see timm.list_models(){nearest(name, known)}')


def _build(name: str) -> _Model:
    """A model of torchvision or timm without trained weights."""
    if name.startswith("timm:"):
        import timm

        try:
            net: Any = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        except RuntimeError as error:  # the name is known, what follows its dot is not
            raise ValueError(str(error)) from error
        return _Model(net, tuple(net.pretrained_cfg["input_size"]))
    family = next(family for family in _FAMILIES if name in _known(family))
    options: dict[str, Any] = {"weights_backbone": None} if family in ("segmentation", "detection") else {}
    if name in ("googlenet", "inception_v3"):  # their constructors warn that their own initialization is slow
        options["init_weights"] = False
    if family == "detection" and not name.startswith("ssd"):  # whose size is a part of it
        options |= {"min_size": DETECTED, "max_size": DETECTED}
    net = torchvision.models.get_model(name, weights=None, **options)
    if family == "video":
        size = torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]
        return _Model(net, (3, FRAMES, *size))
    size = DETECTED if family == "detection" else 299 if name == "inception_v3" else 224
    return _Model(net, (3, size, size), family == "detection")
