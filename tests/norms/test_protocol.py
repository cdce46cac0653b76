"""norms.protocol against the layers that have its hooks and the code that reads them."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from norms import protocol
from norms.protocol import HOOKS, AfterUpdate, Attributes, OnlyLooks, hook
from norms.registry import make_norm, norm_info, norm_names

ROOT = Path(protocol.__file__).parents[1]
READERS = [
    file
    for place in ("norms", "tasks", "suite/bench")
    for file in sorted((ROOT / place).rglob("*.py"))
    if file.relative_to(ROOT).parts[1] not in ("layers", "bases", "kernels")
]
ASKING = [
    file
    for place in ("norms/conformance", "norms/convert", "tasks/nets", "suite/bench")
    for file in sorted((ROOT / place).rglob("*.py"))
] + [ROOT / "norms" / f"{name}.py" for name in ("channels", "factory", "fuse", "protocol", "running", "situation")]
"""Files whose questions by a name in quotes are of layers, or of the things in OTHER."""
OTHER = {
    "__index__": "a number of channels",
    "__name__": "a function",
    "__qualname__": "a constructor",
    "_check_input_dim": "a norm of torch",
    "running_mean": "a norm of torch",
    "_fields": "a named tuple",
    "return_indices": "a pooling",
    "inplace": "an activation",
    "downsample": "a block of torchvision",
    "conversion": "a network (tasks.nets.guests)",
    "bn2": "a block of torchvision",
    "bn3": "a block of torchvision",
}
STAMPS = {"norm_info", "situation"}


def layers():
    """name -> a layer of each norm, as built with every input that it may need."""
    for name in norm_names():
        options = {"norm_batch_size": 8} if name == "bgn" else {}
        activation = nn.ReLU() if "activation" in norm_info(name).needs else None
        yield name, make_norm(name, **options)(32, activation=activation)


def having(kind):
    return [name for name, layer in layers() if hook(layer, kind) is not None]


def documented(text):
    """The names after "Layers:" in a documentation, up to the end of the sentence."""
    return re.search(r"Layers: ([^.]*)\.", " ".join(text.split())).group(1)


@pytest.mark.parametrize("kind", HOOKS, ids=HOOKS.get)
def test_a_hook_is_documented_with_the_layers_that_have_it(kind):
    said = documented(kind.__doc__)
    if said.startswith("all of the suite"):
        expected = norm_names()
    elif said.startswith("those with running statistics"):
        expected = [name for name in norm_names() if norm_info(name).keeps_stats or name == "tasknorm"]
    else:
        expected = said.split(", ")
    assert sorted(having(kind)) == sorted(expected)


@pytest.mark.parametrize("attribute", ["equivalent_to", "progress"])
def test_an_attribute_is_documented_with_the_layers_that_have_it(attribute):
    said = documented(Attributes.__doc__.partition(f" {attribute}: ")[2])
    assert sorted(said.split(", ")) == sorted(name for name, layer in layers() if hasattr(layer, attribute))


def test_every_question_to_a_layer_by_name_is_documented():
    known = {*HOOKS.values(), *Attributes.__annotations__, *OnlyLooks.__annotations__, *STAMPS}
    asked = {name: file for file in ASKING for name in _names_in_quotes(file)}
    assert {name: str(file) for name, file in asked.items() if name not in known | set(OTHER)} == {}


def test_every_documented_hook_and_attribute_is_read():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in READERS if file.name != "protocol.py"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert {kind.__name__ for kind in HOOKS} - {node.id for node in nodes if isinstance(node, ast.Name)} == set()
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(Attributes.__annotations__) - read == set()


def test_a_hook_that_is_set_to_none_is_no_hook():
    class Follows(nn.Module):
        def after_update(self, progress):
            self.told = progress

    class FollowsNot(Follows):
        after_update = None

    layer = Follows()
    assert hook(layer, AfterUpdate) is layer
    assert hook(FollowsNot(), AfterUpdate) is None
    assert hook(nn.BatchNorm2d(3), AfterUpdate) is None


def test_hooks_are_asked_in_a_compiled_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make_norm("ws_gn", num_groups=1)(2)

        def forward(self, x):
            return x * 2 if hook(self.norm, protocol.TransformWeight) is not None else x

    net = torch.compile(Net(), backend="eager", fullgraph=True)
    assert torch.equal(net(torch.ones(2)), torch.full((2,), 2.0))


def _is_call(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _names_in_quotes(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (_is_call(node, "getattr") or _is_call(node, "hasattr")) and isinstance(node.args[1], ast.Constant):
            yield node.args[1].value
