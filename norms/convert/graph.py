"""The surroundings of a norm in the network's graph (torch.fx), and the graph rewritten around the new norms.

The graph is traced in training and in evaluation mode, since a forward may ask for the mode (GoogLeNet's auxiliary
heads, functional dropout); where the two differ the rewritten network keeps both and `train()` chooses.

Functions that normalize, and norms that no forward calls, are found here, too: they have to be left.

Followed through: containers, convolution blocks, functional and method calls, modules used in several places, and
`nn.Identity`. Kept whole: norms, convolutions, activations, and every module without any of them inside, so that its
own dependence on mode or values (stochastic depth) stays its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule

from norms.convert.audit import Left, Removed, Rewired, own_parts
from norms.convert.layers import ACTIVATIONS, NormDropAct, does_nothing, out_of_place, own_activation
from norms.convert.modes import GraphOfEachMode, complete, modes_of
from norms.convert.trace import CONVOLUTIONS, trace
from norms.protocol import MakeRoom, NormInfo, TransformWeight, hook

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, OptimizedModule)
_NORM_FUNCTIONS = {
    *(F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm, F.local_response_norm),
    *(torch.batch_norm, torch.instance_norm, torch.group_norm, torch.layer_norm),
}

_FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.celu: nn.CELU,
    F.selu: nn.SELU,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.hardtanh: nn.Hardtanh,
    F.softplus: nn.Softplus,
}
"""Each module's constructor takes what its function takes after x, in the same order and under the same names."""
_METHODS: Mapping[Any, type[nn.Module]] = {"relu": nn.ReLU, "relu_": nn.ReLU}


class Removal(NamedTuple):
    """Activations to take out.

    Attributes:
        removed: what to say of them.
        nodes: their calls.
        whole: modules of which no other call remains, so that an `nn.Identity` may take their place.
        in_graph: there is more than these: functions, or modules that are used elsewhere, too.
    """

    removed: list[Removed]
    nodes: dict[fx.Node, fx.Graph]
    whole: set[nn.Module]
    in_graph: bool


class Pair(NamedTuple):
    graph: fx.Graph
    call: fx.Node
    conv: fx.Node
    old: nn.Module
    layer: nn.Module


class Graphs:
    """The graph of `net`, which stays as it is: one, or one for training and one for evaluation where they differ.

    Arguments of the forward that have a default of None, a number or text are fixed to it, less those of `inputs`.

    Args:
        net: the network with its old norms.
        inputs: as norms.convert.trace.trace.

    Raises:
        Untraceable: as norms.convert.trace.trace.
        ValueError: a net that is wrapped (DataParallel, torch.compile) or holds what is.
    """

    def __init__(self, net: nn.Module, inputs: Collection[str] = ()):
        self.net = net
        for path, module in net.named_modules():
            if isinstance(module, WRAPPERS):
                raise ValueError(
                    f"{path or 'the network'} is wrapped in {type(module).__name__}, into which torch.fx does not see; "
                    "convert the module inside and wrap the result"
                )
        modes = {module: module.training for module in net.modules()}
        self._constants: dict[str, Any] = {}
        self._scopes: dict[fx.Node, str] = {}
        self._blocks: dict[str, None] = {}
        graphs = []
        try:
            for mode in (True, False):
                net.train(mode)
                vars(net).update(self._constants)  # so that the next graph names its own anew
                found = trace(net, inputs)
                graphs.append(found.graph)
                self._constants |= found.constants
                self._scopes |= found.scopes
                self._blocks |= dict.fromkeys(found.blocks)
        finally:
            for name in self._constants:
                vars(net).pop(name, None)
            net.train(modes[net])  # a network of one graph for each mode changes them there
            for module, mode in modes.items():
                module.training = mode
        train, evaluation = graphs
        same = train.python_code("self").src == evaluation.python_code("self").src
        self.graphs: Sequence[fx.Graph] = [train] if same else [train, evaluation]
        self._paths = {module: path for path, module in net.named_modules()}

    def check_rewritable(self) -> None:
        """Raise a ValueError for a forward that does more than its graph says."""
        if self._blocks:
            where = ", ".join(path or "the network itself" for path in self._blocks)
            raise ValueError(
                f"{type(self.net).__name__} would lose what its forward does under torch.no_grad, torch.autocast or "
                f"the like (in {where}), since torch.fx records no such block; use detach() or a cast of the tensors, "
                "or take a norm that needs no more than x"
            )

    def uncalled(self, norms: Iterable[nn.Module]) -> list[nn.Module]:
        """Those of `norms` that no forward calls, in order: their tensors may be used by a function."""
        targets = {str(node.target) for graph in self.graphs for node in graph.find_nodes(op="call_module")}
        called = {part for path in targets for part in self.net.get_submodule(path).modules()}
        return [norm for norm in norms if norm not in called]

    def functions(self) -> list[Left]:
        """The calls of functions that normalize, by the module whose forward calls them."""
        why = "a function that the forward calls, so that there is no module to swap"
        calls = [node for graph in self.graphs for node in graph.nodes if node.target in _NORM_FUNCTIONS]
        return list(dict.fromkeys(Left(self._scopes[call], call.target.__name__, why) for call in calls))

    def activations(self, norms: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
        """norm -> the activation that directly follows it, as a new module, for each of `norms` that one follows.

        "Directly" is: the norm's output goes nowhere else, at every place where the norm is called. A norm that applies
        an activation itself is no member: nothing after it is its.
        """
        found = {}
        for norm in norms:
            if _applies_something(norm):
                continue
            following = [self._activation(self._follower(call)) for _, call in self._calls(norm)]
            if following and following[0] is not None and len({repr(module) for module in following}) == 1:
                found[norm] = following[0]
        return found

    def removal(self, norms: Iterable[nn.Module]) -> Removal:
        """How to take the activations that follow `norms` out of the network; nothing is changed yet."""
        calls = [(norm, graph, call) for norm in norms for graph, call in self._calls(norm)]
        nodes = {node: graph for _, graph, call in calls if (node := self._follower(call)) is not None}
        modules = {module for node in nodes if (module := self._module(node)) is not None}
        whole = {module for module in modules if all(call in nodes for _, call in self._calls(module))}
        names: dict[Removed, None] = {}
        for norm, _, call in calls:
            node = self._follower(call)
            assert node is not None
            module = self._module(node)
            name = getattr(node.target, "__name__", str(node.target))
            name = name if module is None else f"{node.target} ({type(module).__name__})"
            names[Removed(name, self._paths[norm])] = None
        return Removal(list(names), nodes, whole, in_graph=any(self._module(node) not in whole for node in nodes))

    def pairs(self, new: Mapping[nn.Module, nn.Module]) -> tuple[list[Pair], list[str]]:
        """The convolutions that feed the old norms, whose new layers work with their weights; nothing is changed yet.

        A convolution directly precedes a norm if its output goes there and nowhere else, identities passed over.

        Args:
            new: old norm -> new layer.

        Returns:
            The pairs, and the paths of the norms that no convolution precedes at some call.

        Raises:
            ValueError: a layer that is called with the weight, and finds none, several, or one that is not simply
                convolved with.
        """
        pairs, without = [], []
        for old, layer in new.items():
            transforms, passes = wants(layer)
            calls = list(self._calls(old)) if transforms or passes else []
            fed = [(graph, call, self._feeding(call)) for graph, call in calls]
            found = [Pair(graph, call, conv, old, layer) for graph, call, conv in fed if conv is not None]
            for pair in found:
                if "weight" not in self.net.get_submodule(str(pair.conv.target))._parameters:
                    raise ValueError(
                        f'norm "{inner_norm(layer).norm_info.name}" works with the weight of the convolution before '  # type: ignore[union-attr]
                        f"it; that of {pair.conv.target} is computed anew in each forward (weight or spectral norm)"
                    )
            if passes:
                self._check_passed(old, layer, found, fed)
            pairs += found
            without += [self._paths[old]] if len(found) < len(fed) else []
        return pairs, without

    def remove(self, removal: Removal) -> None:
        for node, graph in removal.nodes.items():
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)

    def join(self, pairs: Iterable[Pair]) -> list[Rewired]:
        """Let each pair be computed as one, by `convolved_and_normalized`."""
        rewired: dict[Rewired, None] = {}
        for graph, call, conv, old, layer in pairs:
            path = self._paths[old]
            with graph.inserting_before(call):
                parts = (graph.get_attr(str(conv.target)), graph.get_attr(path), conv.args[0])
                node = graph.call_function(convolved_and_normalized, parts)
            node.meta["is_wrapped"] = True  # stays one node where a pickled network is traced again
            call.replace_all_uses_with(node)
            while call is not conv:  # and identities between
                (before,) = call.all_input_nodes
                graph.erase_node(call)
                call = before
            graph.erase_node(conv)
            sized = hook(inner_norm(layer), MakeRoom)
            if sized is not None:
                sized.make_room(self.net.get_submodule(str(conv.target)).weight)  # type: ignore[arg-type]
            how = [word for word, true in zip(("transformed", "passed"), wants(layer), strict=True) if true]
            rewired[Rewired(str(conv.target), path, " and ".join(how))] = None
        return list(rewired)

    def build(self) -> fx.GraphModule:
        """The network with the graph as it is now: the same modules under the same names."""
        vars(self.net).update(self._constants)
        for graph in self.graphs:
            graph.lint()
        name, modes = type(self.net).__name__, modes_of(self.net)  # read first: a new GraphOfEachMode sets all to train
        if len(self.graphs) == 1:
            module = fx.GraphModule(self.net, self.graphs[0], class_name=name)
        else:
            module = GraphOfEachMode(self.net, *self.graphs, class_name=name)
        complete(module, self.net, modes)
        return module

    def _check_passed(self, old: nn.Module, layer: nn.Module, found: list[Pair], fed: Sequence[Any]) -> None:
        info = inner_norm(layer).norm_info
        assert isinstance(info, NormInfo)
        what = f'norm "{info.name}" needs the weight of the convolution before it; {self._paths[old]}'
        if len(found) < len(fed):
            raise ValueError(f"{what} ({type(old).__name__}) has no convolution before it that feeds it alone")
        if len(fed) > len(self.graphs):
            raise ValueError(f"{what} ({type(old).__name__}) is called in several places")
        for pair in found:
            conv = self.net.get_submodule(str(pair.conv.target))
            if type(conv).forward not in [kind.forward for kind in CONVOLUTIONS]:
                raise ValueError(
                    f"{what} follows {pair.conv.target}, a {type(conv).__name__}, whose own forward may convolve with "
                    "another weight than it holds"
                )

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _calls(self, module: nn.Module) -> Iterator[tuple[fx.Graph, fx.Node]]:
        path = self._paths[module]
        for graph in self.graphs:
            for node in graph.find_nodes(op="call_module", target=path):
                yield graph, node

    def _follower(self, node: fx.Node) -> fx.Node | None:
        """The one node that takes the output of `node`, identities passed over; None where several or none do."""
        while len(node.users) == 1:
            (node,) = node.users
            if not isinstance(self._module(node), nn.Identity):
                return node
        return None

    def _feeding(self, call: fx.Node) -> fx.Node | None:
        """The call of a convolution whose output goes to `call` and nowhere else."""
        node = call
        while len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
            module = self._module(node)
            if len(node.users) > 1 or len(node.args) != 1:
                return None
            if isinstance(module, CONVOLUTIONS):
                return node
            if not isinstance(module, nn.Identity):
                return None
        return None

    def _activation(self, node: fx.Node | None) -> nn.Module | None:
        """The activation that a node applies to its one input, as a new module."""
        if node is None:
            return None
        options = dict(node.kwargs)
        first = node.args[0] if node.args else options.pop("input", None)
        if node.all_input_nodes != [first]:  # another tensor takes part
            return None
        module = self._module(node)
        if module is not None:
            return out_of_place(module) if isinstance(module, ACTIVATIONS) else None
        functions = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
        kind = functions.get(node.target)
        return None if kind is None else out_of_place(kind(*node.args[1:], **options))


def convolved_and_normalized(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), with the convolution's weight going through or to the norm as the norm asks for it.

    The weight is passed by call and never stored: a cloned network would see the stale one.
    """
    transforms, passes = wants(norm)
    weight: Any = conv.weight
    if transforms:
        weight = inner_norm(norm).transform_weight(weight)  # type: ignore[operator]
    # as modules, so that hooks and a forward of their own (timm's padding "same") count
    y = torch.func.functional_call(conv, {"weight": weight}, (x,)) if transforms else conv(x)
    return norm(y, weight=weight) if passes else norm(y)


fx.wrap("convolved_and_normalized")


def inner_norm(layer: nn.Module) -> nn.Module:
    return layer.norm if isinstance(layer, NormDropAct) else layer


def wants(layer: nn.Module) -> tuple[bool, bool]:
    """(it transforms the convolution's weight, it is called with the weight)."""
    norm = inner_norm(layer)
    info = norm.norm_info
    assert isinstance(info, NormInfo)
    return hook(norm, TransformWeight) is not None, "conv_weight" in info.needs


def _applies_something(norm: nn.Module) -> bool:
    parts = own_parts(norm)
    return parts is not None and (own_activation(norm) is not None or not all(does_nothing(part) for part in parts))
