"""A network with a graph for each mode, and the parts of a network that its graph does not hold."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torchvision.models.feature_extraction import DualGraphModule


class GraphOfEachMode(DualGraphModule):
    """A network that has one graph for training and one for evaluation; `train()` chooses.

    A copy stays in its mode and keeps the modules that no graph calls, which torchvision's does not. Pickled, one of
    the graphs would be lost, so this raises a TypeError; its state_dict has the names of the network it stands for.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphOfEachMode:
        new = super().__deepcopy__(memo)
        complete(new, self, modes_of(self), memo)
        return new

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} has a graph for each mode and can not be pickled; save its state_dict")


def modes_of(net: nn.Module) -> dict[str, bool]:
    """path -> whether the module there is in training mode."""
    return {path: module.training for path, module in net.named_modules()}


def complete(module: fx.GraphModule, of: nn.Module, modes: dict[str, bool], memo: dict[int, Any] | None = None) -> None:
    """Give `module` these modes, and what `of` holds and no graph asks for, so that no name of its state is lost.

    That is modules, parameters and buffers, second names of the same one included, and attributes that are numbers,
    text or containers of such (a detector asks its backbone for `out_channels`); copied where a memo is given.
    """

    def taken(part: Any) -> Any:
        return part if memo is None else copy.deepcopy(part, memo)

    for path, part in of.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        if path and not _has(module, path) and _has(module, parent):
            setattr(module.get_submodule(parent), attribute, taken(part))
    module.train(modes[""])
    for path, part in of.named_modules():
        if not _has(module, path):
            continue
        twin = module.get_submodule(path)
        twin.training = modes[path]
        for name, parameter in part._parameters.items():
            if name not in twin._parameters:
                twin.register_parameter(name, taken(parameter))
        for name, buffer in part._buffers.items():
            if name not in twin._buffers:
                twin.register_buffer(name, taken(buffer), persistent=name not in part._non_persistent_buffers_set)
        plain = {name: value for name, value in vars(part).items() if name[0] != "_" and not hasattr(twin, name)}
        plain = {name: taken(value) for name, value in plain.items() if _is_plain(value)}
        vars(twin).update(plain)
        if twin is module and not isinstance(module, GraphOfEachMode):  # a copy keeps no other attributes
            module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, tuple | list | set):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _has(net: nn.Module, path: str) -> bool:
    try:
        net.get_submodule(path)
    except AttributeError:
        return False
    return True
