"""Swap the norms of any existing model for a registered one, with an audit of every norm, swapped or left.

A model of another library is comparable only if every one of its norms is ours: `converted` replaces what it knows how
to replace and lists the rest with the reason, `audit_norms` reads a network without changing it. What means the same in
the old norm and the new layer is carried over (see norms.convert.layers); all else starts anew. Biases of convolutions
before a norm are left as they are.

A norm that brings an activation takes the place of the norm and of the activation that directly follows it, and a norm
that works with the convolution's weight is paired with the convolution before it, as in tasks.nets.blocks. What follows
and precedes is read from the network's graph (norms.convert.graph). The network stays the same object unless its
forward has to change (a functional or reused activation, a weight to pass); then a torch.fx.GraphModule with the same
modules under the same names takes its place. A forward that does what a graph does not hold (norms.convert.trace)
is refused.

audit.py      the norms of a network: what each is, what became of it, and why the rest stays
layers.py     one new layer in the place of an old norm, with what means the same in both
graph.py      what stands before and after a norm, and the graph rewritten around the new one
trace.py      a forward traced by torch.fx, and what such a trace does not keep
modes.py      a graph for each mode of a network
calls.py      functions that a rewritten graph calls
nested.py     nested dicts, lists and tuples
state.py      tensors, attributes and generators of a network: remembered, compared, put back
arguments.py  the arguments of a forward, and a caller's choices among them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from norms.convert.arguments import check_inputs, check_names, optional_arguments
from norms.convert.audit import (
    KEPT,
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
    looks_like_a_norm,
    num_channels,
    size,
    why_left,
)
from norms.convert.graph import Graphs, wants
from norms.convert.layers import has_hooks, own_activation, replacement
from norms.convert.trace import Untraceable
from norms.factory import NormFactory, factory_info
from norms.values import nearest

__all__ = [
    "Audit",
    "Changed",
    "Left",
    "Removed",
    "Rewired",
    "Size",
    "Swapped",
    "Untraceable",
    "audit_norms",
    "convert_norms",
    "converted",
]


Keep = Collection[str] | Callable[[str, nn.Module], bool]
"""Old norms that stay: their paths, or a function that is asked with the path and the module of each."""


class _Place(NamedTuple):
    path: str
    parent: nn.Module
    name: str
    old: nn.Module


def convert_norms(net: nn.Module, factory: NormFactory, *, keep: Keep = (), inputs: Collection[str] = ()) -> Audit:
    """Convert `net` as `converted` does, but in place; for norms that need only x, or for which x suffices here.

    Raises:
        ValueError: as `converted`; or the forward of `net` itself would have to change (`net` is unchanged then).
    """
    return _convert(net, factory, keep, inputs, in_place=True)[1]


def converted(
    net: nn.Module, factory: NormFactory, *, keep: Keep = (), inputs: Collection[str] = ()
) -> tuple[nn.Module, Audit]:
    """Replace every channel-wise norm of `net` by a layer of `factory`.

    The new layer has the old one's number of channels, device, dtype, mode and `affine` (a FrozenBatchNorm2d, whose
    affine is constant, becomes a learned one), and what means the same in both: its weight and bias are the old norm's
    own Parameters, tied and frozen as they were. A norm that is used in several places stays one shared layer. What
    changes all the same is said in the audit's `changed`. It refuses an x with a number of axes that the old norm
    refused, and one image without a batch axis. Norms built by `make_norm` are left as they are. Everything is looked
    up and built before the first layer is put in, so a refusal leaves `net` unchanged.

    Args:
        net: any module; itself a norm only if it holds it as a child (`nn.Sequential(norm)`).
        factory: from `make_norm`.
        keep: old norms that stay, as paths or as a function `(path, module) -> bool` that is asked for each; a norm
            with several paths stays if one of them is kept. They stand in `audit.left`, and the audit is not complete.
        inputs: optional arguments of the forward (`mask=None`) that a rewritten network still takes. The others keep
            their default there, and any other value is refused. A rewritten network is the forward for one answer to
            `if mask is not None`: with "mask" in `inputs` that for a mask, which then has to be given, else that
            without one. A default that is a number or text still holds where an input is not given; a forward that
            decides on its value can not be traced.

    Returns:
        The network and the audit. The network is `net` itself, changed in place, or a torch.fx.GraphModule that holds
        its modules; `net` must not be used any more then. Such a network is the old one's forward and no more. It lacks
        the other methods, also of the modules between, and all hooks of these and of `net` (`audit.unhooked`);
        attributes that are no tensors count as they were when it was converted (numbers and text can still be read);
        optional arguments are as `inputs` says; checkpointing of activations is gone.

    Raises:
        ValueError: `net` itself is such a norm; a factory that is not from `make_norm`; arguments that a layer refuses
            (with the path of the norm it was to replace); a DistributedDataParallel; a path in `keep` that is no norm,
            a name in `inputs` that is no argument of the forward (with the nearest). For a norm that needs its
            surroundings: a network that is wrapped (DataParallel, torch.compile); one that would have to be rewritten
            and uses torch.no_grad, torch.autocast or the like. For a norm that needs the convolution's weight: a norm
            that no convolution directly precedes.
        Untraceable: a ValueError; for a norm that needs its surroundings, a network that torch.fx can not trace, or
            whose forward changes buffers or attributes or draws random numbers outside modules that are kept whole.
            Parts of it may be converted one by one (a detector's `backbone`).
    """
    return _convert(net, factory, keep, inputs, in_place=False)


def _convert(
    net: nn.Module, factory: NormFactory, keep: Keep, inputs: Collection[str], in_place: bool
) -> tuple[nn.Module, Audit]:
    info, before = factory_info(factory), size(net)
    if is_channelwise(net) and not is_ours(net):
        raise ValueError(f"{type(net).__name__} is a norm itself and has no parent to be swapped in; wrap it")
    _refuse_distributed(net)
    check_inputs(net, inputs)
    places = _places(net)
    stay = _kept(net, places, keep)
    places = [place for place in places if place.old not in stay]
    paths: dict[nn.Module, str] = {}
    for place in places:
        paths.setdefault(place.old, place.path)

    # looked up and built first: a refusal leaves the network as it was
    fuses = "activation" in info.needs
    graphs = Graphs(net, inputs) if paths and info.needs & {"activation", "conv_weight"} else None
    activations = graphs.activations(paths) if graphs is not None and fuses else {}
    tied = _tied(net)
    built = {
        old: replacement(path, old, factory, activations.get(old), _around(net, path), tied)
        for old, path in paths.items()
    }
    if graphs is None and any(any(wants(layer)) for layer, _, _ in built.values()):
        graphs = Graphs(net, inputs)
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
        # the graph is that of one choice of these: other activations may follow the norms for another
        optional = list(optional_arguments(net)) if removal.whole else []
        rewrite = bool(pairs or optional) or removal.in_graph
        if rewrite and in_place:
            why = f", whose activations may be others for another {' or '.join(optional)}" if optional else ""
            raise ValueError(
                f'norm "{info.name}" changes the forward of {type(net).__name__}{why}, which can not be done in place; '
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
    stays = [each._replace(why=KEPT) if result.get_submodule(each.path) in stay else each for each in found.left]
    return result, replace(
        found,
        swapped=swapped,
        left=[each for each in stays if (each.path, each.old) not in said] + left,
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


def _kept(net: nn.Module, places: list[_Place], keep: Keep) -> set[nn.Module]:
    """The old norms that the caller keeps. ValueError for modules that are no norms, one line each."""
    if callable(keep):
        return {place.old for place in places if keep(place.path, place.old)}
    name, modules = type(net).__name__, dict(net.named_modules(remove_duplicate=False))
    norms = [path for path, module in modules.items() if is_channelwise(module) or looks_like_a_norm(module)]
    mistakes = []
    for path in check_names("keep", keep, "paths of norms, or a function of path and module"):
        if path in modules and path not in norms:
            inside = any(norm.startswith(f"{path}.") for norm in norms)
            hint = f'; for all those in it, give a function: lambda path, norm: path.startswith("{path}.")'
            mistakes.append(f'keep: "{path}" is a {type(modules[path]).__name__} and no norm{hint if inside else ""}')
        elif path not in norms:
            mistakes.append(f'keep: {name} has no norm "{path}"{nearest(path, norms)}')
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return {place.old for place in places if place.path in keep}


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
