"""Swap the norms of any existing model for a registered one, and say what was swapped and what was not.

A model of another library is comparable only if every one of its norms is ours: `converted` replaces what it knows how
to replace and lists the rest with the reason, `audit_norms` reads a network without changing it. What means the same in
the old norm and the new layer is carried over (see norms.convert.layers); all else starts anew. Biases of convolutions
before a norm are left as they are.

A norm that brings an activation takes the place of the norm and of the activation that directly follows it, and a norm
that works with the convolution's weight is paired with the convolution before it, as tasks.nets.ConvNormAct does. What
follows and precedes is read from the network's graph (norms.convert.graph). The network stays the same object unless
its forward has to change (a functional or reused activation, a weight to pass); then a torch.fx.GraphModule with the
same modules under the same names takes its place. A forward that does what a graph does not hold (norms.convert.trace)
is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from norms.convert.audit import (
    Audit,
    Changed,
    Left,
    Removed,
    Rewired,
    Size,
    Swapped,
    audit_norms,
    inside_ours,
    is_channelwise,
    is_ours,
    num_channels,
    size,
    why_left,
)
from norms.convert.graph import Graphs, wants
from norms.convert.layers import has_hooks, own_activation, replacement
from norms.registry import NormFactory, factory_info

__all__ = [
    "Audit",
    "Changed",
    "Left",
    "Removed",
    "Rewired",
    "Size",
    "Swapped",
    "audit_norms",
    "convert_norms",
    "converted",
]


class _Place(NamedTuple):
    path: str
    parent: nn.Module
    name: str
    old: nn.Module


def convert_norms(net: nn.Module, factory: NormFactory) -> Audit:
    """As `converted`, in place: for every norm that needs no more than x, and for others where that is enough.

    Raises:
        ValueError: as `converted`; or the forward of `net` itself would have to change (`net` is unchanged then).
    """
    return _convert(net, factory, in_place=True)[1]


def converted(net: nn.Module, factory: NormFactory) -> tuple[nn.Module, Audit]:
    """Replace every channel-wise norm of `net` by a layer of `factory`.

    The new layer has the old one's number of channels, device, dtype, mode and `affine` (a FrozenBatchNorm2d, whose
    affine is constant, becomes a learned one), and what means the same in both: its weight and bias are the old norm's
    own Parameters, tied and frozen as they were. A norm that is used in several places stays one shared layer. What
    changes all the same is said in the audit's `changed`. Norms built by `make_norm` are left as they are. Everything
    is looked up and built before the first layer is put in, so a refusal leaves `net` unchanged.

    Args:
        net: any module; itself a norm only if it holds it as a child (`nn.Sequential(norm)`).
        factory: from `make_norm`.

    Returns:
        The network and the audit. The network is `net` itself, changed in place, or a torch.fx.GraphModule that holds
        its modules; `net` must not be used any more then. Such a network is the old one's forward and no more. It lacks
        the other methods, also of the modules between, and all hooks of these and of `net` (`audit.unhooked`);
        attributes that are no tensors count as they were when it was converted; arguments of the forward that have a
        default keep that and refuse any other value; checkpointing of activations is gone.

    Raises:
        ValueError: `net` itself is such a norm; a factory that is not from `make_norm`; what a layer refuses (with the
            path of the norm it was to replace); a DistributedDataParallel. For a norm that needs its surroundings: a
            network that torch.fx can not trace, or whose forward changes buffers or attributes or draws random numbers
            outside modules that are kept whole; one that is wrapped (DataParallel, torch.compile); one that would have
            to be rewritten and uses torch.no_grad, torch.autocast or the like. For a norm that needs the convolution's
            weight: a norm that no convolution directly precedes.
    """
    return _convert(net, factory, in_place=False)


def _convert(net: nn.Module, factory: NormFactory, in_place: bool) -> tuple[nn.Module, Audit]:
    info, before = factory_info(factory), size(net)
    if is_channelwise(net) and not is_ours(net):
        raise ValueError(f"{type(net).__name__} is a norm itself and has no parent to be swapped in; wrap it")
    _refuse_distributed(net)
    places = _places(net)
    paths: dict[nn.Module, str] = {}
    for place in places:
        paths.setdefault(place.old, place.path)

    # looked up and built first: a refusal leaves the network as it was
    fuses = "activation" in info.needs
    graphs = Graphs(net) if paths and info.needs & {"activation", "conv_weight"} else None
    activations = graphs.activations(paths) if graphs is not None and fuses else {}
    tied = _tied(net)
    built = {
        old: replacement(path, old, factory, activations.get(old), _around(net, path), tied)
        for old, path in paths.items()
    }
    if graphs is None and any(any(wants(layer)) for layer, _, _ in built.values()):
        graphs = Graphs(net)
    left = [] if graphs is None else graphs.functions()
    for old in [] if graphs is None else graphs.uncalled(paths):
        left.append(
            Left(paths.pop(old), type(old).__name__, "is never called as a module; functions may use its tensors")
        )
    new = {old: built[old][0] for old in paths}
    swapped = [Swapped(path, type(old).__name__, num_channels(old), built[old][1]) for old, path in paths.items()]
    changed = [Changed(path, what) for old, path in paths.items() for what in built[old][2]]
    removed = [
        Removed(f"{paths[old]}.act ({type(old.act).__name__})", paths[old])
        for old in paths
        if fuses and own_activation(old)
    ]
    result, rewired = net, []
    plain: list[str] = []
    rewrite = False
    if graphs is not None:
        removal = graphs.removal(activations)
        pairs, plain = graphs.pairs(new)
        rewrite = bool(pairs) or removal.in_graph
        if rewrite and in_place:
            raise ValueError(
                f'norm "{info.name}" changes the forward of {type(net).__name__}, which can not be done in place; '
                "norms.convert.converted returns the network that does it"
            )
        if rewrite:
            graphs.check_rewritable()
        removed += removal.removed
    hooked = {module: path for path, module in net.named_modules() if module not in paths and has_hooks(module)}
    for place in places:
        if place.old in new:
            setattr(place.parent, place.name, new[place.old])
    if graphs is not None:
        _put_identities(net, removal.whole)
        if rewrite:
            graphs.remove(removal)
            rewired = graphs.join(pairs)
            result = graphs.build()
    found, kept = audit_norms(result), set(result.modules())
    said = {(path, old) for path, old, _ in left}
    return result, replace(
        found,
        swapped=swapped,
        left=[each for each in found.left if (each.path, each.old) not in said] + left,
        removed=removed,
        rewired=rewired,
        plain=plain,
        bare=[path for old, path in paths.items() if fuses and not activations.get(old) and not own_activation(old)],
        changed=changed,
        unhooked=[path for module, path in hooked.items() if module not in kept],
        before=before,
    )


def _refuse_distributed(net: nn.Module) -> None:
    for path, module in net.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{path or 'the network'} is a DistributedDataParallel, which synchronizes the parameters that it was "
                "built with; convert the module inside and wrap the result"
            )


def _places(net: nn.Module) -> list[_Place]:
    """Every attribute that holds a norm to be swapped."""
    inside = inside_ours(net)
    return [
        _Place(f"{path}.{name}" if path else name, parent, name, child)
        for path, parent in net.named_modules(remove_duplicate=False)
        if parent not in inside
        for name, child in parent._modules.items()  # named_children would skip a second name of the same module
        if child is not None and child not in inside and is_channelwise(child) and why_left(child) is None
    ]


def _around(net: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold the one at `path`, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield net.get_submodule(path)


def _tied(net: nn.Module) -> set[nn.Parameter]:
    """The parameters that are held in several places."""
    held = Counter(p for module in net.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, places in held.items() if places > 1}


def _put_identities(net: nn.Module, modules: set[nn.Module]) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if child in modules:
                setattr(parent, name, nn.Identity())
