"""A forward traced by torch.fx that leaves the network as it was, and what such a trace does not keep.

torch.fx runs the forward once with stand-ins for tensors and records the operations on them. All else happens then and
never again: a counter that counts, a buffer that is updated, a random number that is drawn, a block of `torch.no_grad`
or `torch.autocast`. All changes by the forward are put back, and everything that a rewritten forward would
lose is reported.

A module in which nothing is looked for is kept whole: the graph holds one call of it, and what it does in that call
stays its own. The forward around it goes on with what the call returns, so the call is tried first, with stand-ins, and
what the trial did is thrown away. Of its result only the structure is kept: the lists, tuples and dicts, the names in
them and what is None. A forward that iterates over a dict of feature maps, or asks whether a head returned None, then
decides as it does with tensors. Two kinds are traced through all the same: a module that changes the lists and dicts
that it is given, for which a call in a graph would do so to copies, and one that is given or returns what a graph can
not hold (an object, a generator).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from norms.convert.arguments import arguments, optional_arguments
from norms.convert.audit import is_channelwise, is_ours
from norms.convert.calls import fixed, given, ordered_dict
from norms.convert.layers import ACTIVATIONS, HOOKS
from norms.convert.nested import containers, leaves, mapped, structured
from norms.convert.state import State, changed_keys

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Trace(NamedTuple):
    """A forward as it was read.

    Attributes:
        graph: the operations on tensors.
        constants: tensors that the forward computed from no input, by the attribute of the network under which the
            graph expects them.
        scopes: each node's module path.
        blocks: paths of modules whose forward works under `torch.no_grad`, `torch.autocast` or the like.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    scopes: dict[fx.Node, str]
    blocks: list[str]


class Untraceable(ValueError):
    """The forward of a network does something that a graph can not hold."""


def trace(net: nn.Module, inputs: Collection[str] = ()) -> Trace:
    """Trace the forward of `net` in its current mode; `net`, its tensors and all random generators stay as they are.

    Hooks do not run: they were written for tensors.

    Args:
        net: the network.
        inputs: optional arguments of the forward that are inputs of the graph. The others keep their defaults.

    Raises:
        Untraceable: the forward can not be traced, since it depends on values or shapes (with torch.fx's own words), or
            it changes something or draws random numbers while traced; it was set on the network itself.
    """
    name = type(net).__name__
    if "forward" in vars(net):
        raise Untraceable(
            f"{name} has a forward that was set on it, and torch.fx would follow that of its class; "
            "let it be the method of a class, or take a norm that needs no more than x"
        )
    with _without_hooks(net):
        state = State(net)
        try:
            # gradients on, in every mode of the caller: else a forward's own no_grad could not be told from it
            with torch.inference_mode(False), torch.enable_grad():
                tracer = _Tracer(state, inputs)
                graph = tracer.trace(net)
            graph._tracer_cls = fx.Tracer  # which follows a pickled network again, where nothing is left to be decided
            constants = {key: vars(net).pop(key) for key in tracer.constants}
            changed, drawn = state.changed(), state.drawn()
        except Exception as error:
            raise Untraceable(
                f"{name} can not be traced by torch.fx, so what surrounds its norms is not known: "
                f"{type(error).__name__}: {' '.join(str(error).split())}; convert the parts that it can follow (a "
                "detector's backbone), or take a norm that needs no more than x"
            ) from error
        finally:
            state.restore()
    if changed:
        raise Untraceable(
            f"the forward of {name} changes {', '.join(changed)}, which torch.fx does not follow; {_KEPT_WHOLE}"
        )
    if drawn:
        raise Untraceable(
            f"the forward of {name} draws random numbers ({', '.join(drawn)}) that depend on no tensor, which would "
            f"be the same ever after; {_KEPT_WHOLE}"
        )
    return Trace(graph, constants, tracer.scopes, list(tracer.blocks))


_KEPT_WHOLE = (
    "let a module of its own do that, one without convolutions, norms and activations (such modules are kept whole), "
    "or take a norm that needs no more than x"
)


def is_looked_for(module: nn.Module) -> bool:
    return is_ours(module) or is_channelwise(module) or isinstance(module, CONVOLUTIONS + ACTIVATIONS)


class _Part:
    """A place in the result of a call at which the graph has to take what the call returns there."""


class _Trial(NamedTuple):
    """The findings of a trial of a call.

    Attributes:
        structure: the result, with stand-ins or `_Part` for what only the call itself knows; no container: nothing is
            known of it.
        through: the module has to be traced through.
    """

    structure: Any = _Part()
    through: bool = False


class _Tracer(fx.Tracer):
    """Traces a network that a `State` follows.

    Attributes:
        inputs: optional arguments of the forward that are inputs.
        constants: names of the tensors that the forward made itself.
        scopes: the path of the module in which each node was made.
        blocks: paths of modules that work under a block, as keys.
    """

    def __init__(self, state: State, inputs: Collection[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.constants: list[str] = []
        self.scopes: dict[fx.Node, str] = {}
        self.blocks: dict[str, None] = {}
        self._outside = _blocks_around()
        self._states = [state]  # of the network, and of the modules whose calls are being tried
        self._through: list[nn.Module] = []
        self._caches: list[dict[str, fx.Proxy]] = []

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root_fn, args = super().create_args_for_root(root_fn, is_module)
        optional = optional_arguments(self.root)
        for place, name in enumerate(arguments(self.root), start=1):
            if name in optional and name not in self.inputs:
                self.create_proxy("call_function", fixed, (args[place], name, optional[name]), {})
                args[place] = optional[name]
            elif name in optional and optional[name] is None:
                args[place] = self.create_proxy("call_function", given, (args[place], name), {})
        return root_fn, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._through and (
            is_looked_for(m)
            or super().is_leaf_module(m, module_qualified_name)
            or not any(is_looked_for(part) for part in m.modules())
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path) or is_looked_for(m):
            return super().call_module(m, forward, args, kwargs)
        if super().is_leaf_module(m, path):  # a module of torch, whose forward asks for more than stand-ins tell
            return structured(_of_torch(m, args, kwargs), super().call_module(m, forward, args, kwargs))
        trial = self._try(m, forward, args, kwargs)
        if not trial.through:
            return structured(trial.structure, super().call_module(m, forward, args, kwargs))
        self._through.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._through.remove(m)

    def _try(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trial:
        """Trace a call of `m` into a graph of its own, and put everything back."""
        before = self.graph, self.module_stack.copy(), dict(self.num_calls), dict(self.blocks)
        state, constants = State(m), len(self.constants)
        self._states.append(state)
        self._caches.append({})
        self.graph = fx.Graph(tracer_cls=type(self))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the call itself will say it
                return self._tried(state, forward, args, kwargs)
        except Exception:  # noqa: BLE001  # stand-ins do not serve there: nothing is known of the result
            return _Trial()
        finally:
            for node in reversed(self.graph.nodes):
                self.graph.erase_node(node)  # which a node of the outer graph may have as a user
            self.graph, self.module_stack, self.num_calls, self.blocks = before
            for name in self.constants[constants:]:
                del self.tensor_attrs[vars(self.root).pop(name)]
            del self.constants[constants:]
            self._caches.pop()
            self._states.pop()
            touched = state.restore()
            for outer in self._states:
                outer.settle(touched)

    def _tried(self, state: State, forward: Callable[..., Any], args: Any, kwargs: Any) -> _Trial:
        try:
            self.create_arg((args, kwargs))
        except NotImplementedError:  # an argument that no call in a graph can have
            return _Trial(through=True)
        names: dict[fx.Node, fx.Proxy] = {}

        def stand_in(value: Any) -> Any:
            if not isinstance(value, fx.Proxy):
                return value
            if value.node not in names:
                names[value.node] = self.create_proxy("placeholder", value.node.name, (), {})
            return names[value.node]

        args, kwargs = mapped((args, kwargs), stand_in)
        before = [(container, copy.copy(container)) for container in containers((args, kwargs))]
        blocks = dict(self.blocks)
        result = forward(*args, **kwargs)
        if any(changed_keys(*each) for each in before):
            return _Trial(through=True)
        if state.changed() or state.drawn():  # another call may return another name, or none
            return _Trial(mapped(result, lambda part: _Part()))
        unknown = not all(isinstance(part, fx.Proxy | Tensor | str | int | float | None) for part in leaves(result))
        return _Trial(result, through=unknown and self.blocks == blocks)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # a stand-in for a parameter belongs to the graph in which it was made
        return super().getattr(attr, attr_val, self._caches[-1] if self._caches else parameter_proxy_cache)

    def get_fresh_qualname(self, prefix: str) -> str:
        name = super().get_fresh_qualname(prefix)
        self.constants.append(name)
        return name

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return self.create_node("call_function", ordered_dict, (self.create_arg(list(a.items())),), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.target in (fixed, given, ordered_dict):
            node.meta["is_wrapped"] = True
        self.scopes[node] = self.scope.module_path
        if _blocks_around() != self._outside:
            self.blocks[self.scope.module_path] = None
        return node


def _of_torch(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The structure of the result of a module of torch."""
    one = _Part()
    if isinstance(m, nn.LSTM):
        return one, (one, one)
    if isinstance(m, nn.MultiheadAttention):
        needs_weights = kwargs.get("need_weights", args[4] if len(args) > 4 else True)
        return one, None if needs_weights is False else one
    if isinstance(m, nn.RNNBase | nn.LSTMCell) or getattr(m, "return_indices", False):  # pooling with its indices
        return one, one
    return one


def _blocks_around() -> tuple[bool, bool, int]:
    # counted, since a block that switches autocast off, or one for a device that is absent, leaves no other sign
    torch.autocast_increment_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.autocast_decrement_nesting()


@contextlib.contextmanager
def _without_hooks(net: nn.Module) -> Iterator[None]:
    held = [hooks for module in net.modules() for name in HOOKS if (hooks := getattr(module, name))]
    kept = [dict(hooks) for hooks in held]
    try:
        for hooks in held:
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(held, kept, strict=True):
            hooks.update(before)
