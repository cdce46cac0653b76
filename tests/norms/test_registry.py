"""The registry: names and options are checked, factories stamp what they build, plugins come in whole or not at all."""

import functools
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from norms import registry
from norms.factory import factory_info
from norms.generators import forked_generators
from norms.protocol import Situation, norm_modules
from norms.registry import (
    load_plugin,
    make_norm,
    norm_info,
    norm_names,
    norm_option_defaults,
    register,
    resolve_norm_options,
)
from norms.situation import situation

OPTIONS = {"bgn": {"norm_batch_size": 4}}  # what a norm needs to be built outside a run

PLUGIN = """
from __future__ import annotations
from typing import Literal
import torch
from torch import nn
from norms.generators import forked_generators
from norms.registry import register

@register(name="mine", source="test", mixes_samples=False, keeps_stats=False)
class Mine(nn.Module):
    def __init__(self, num_channels: int, *, rate: float = 1, kind: Literal["a", "b"] = "a",
                 sizes: tuple[int, ...] = (1,), limit: float | None = None,
                 norm_batch_size: int | None = None, affine: bool = True):
        super().__init__()
        self.rate, self.kind, self.sizes, self.limit = rate, kind, sizes, limit
        self.start = nn.Parameter(torch.randn(num_channels))

    def forward(self, x):
        return x * self.rate
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    norm_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield
    for name in [name for name in sys.modules if name.startswith("normsuite_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path):
    def write(text=PLUGIN, name="my_norms.py"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def a_norm(name="fresh", **facts):
    @register(name=name, source="test", mixes_samples=False, keeps_stats=False, **facts)
    class Fresh(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return x

    return Fresh


# --- names and options ------------------------------------------------------------------------------------------------


def test_tier_one_is_registered():
    assert {"none", "bn", "in", "ln", "gn", "pn", "bgn"} <= set(norm_names())


@pytest.mark.parametrize("ask", [norm_info, norm_option_defaults, make_norm, lambda n: resolve_norm_options(n, {})])
def test_an_unknown_norm_is_named_with_the_nearest(ask):
    with pytest.raises(ValueError, match=r'unknown norm "bgnn".*did you mean "bgn"') as caught:
        ask("bgnn")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("norm", "options", "words"),
    [
        ("gn", {"num_group": 4}, ['"num_group"', 'did you mean "num_groups"']),
        ("gn", {"num_groups": "many"}, ['"num_groups"', "'many'", "integer"]),
        ("gn", {"num_groups": 2.5}, ['"num_groups"', "2.5"]),
        ("bn", {"eps": "tiny"}, ['"eps"', "'tiny'"]),
        ("bn", {"eps": float("nan")}, ['"eps"', "finite"]),
        ("bn", {"momentum": float("inf")}, ['"momentum"', "finite"]),
        ("in", {"affine": False}, ['unknown option "affine"']),
        ("none", {"eps": 1}, ["it has none"]),
    ],
)
def test_a_wrong_option_is_one_line_naming_it(norm, options, words):
    with pytest.raises(ValueError, match=f'norm "{norm}"') as caught:
        make_norm(norm, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(ValueError, match="unknown option") as caught:
        resolve_norm_options("gn", {"num_groups": "x", "epsilon": 1})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("norm", "option", "value", "words"),
    [
        ("bn", "eps", "1e-3", "a number is needed, not text; write 1e-3 without quotes"),
        ("bn", "eps", True, "given true: a number is needed, not true or false"),
        ("bn", "eps", float("inf"), "inf is no finite number"),
        ("gn", "num_groups", "yes", 'an integer or "auto" is needed, not text'),
        ("gn", "num_groups", "8", 'an integer or "auto" is needed, not text; write 8 without quotes'),
        ("gn", "num_groups", False, 'an integer or "auto" is needed, not true or false'),
        ("gn", "num_groups", 1.5, "an integer"),
        ("gn", "num_groups", 10**400, "more than 64 bits"),
        ("gn", "num_groups", 10**5000, "more than 64 bits"),
    ],
    ids=range(9),
)
def test_neither_text_nor_true_becomes_a_number(norm, option, value, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        resolve_norm_options(norm, {option: value})
    assert len(str(caught.value)) < 300


def test_an_integral_float_is_an_integer_and_negative_zero_is_zero():
    assert repr(resolve_norm_options("gn", {"num_groups": 1e1})["num_groups"]) == "10"
    assert repr(resolve_norm_options("bn", {"eps": -0.0})["eps"]) == "0.0"


@pytest.mark.parametrize("name", norm_names())
def test_options_are_complete_and_resolving_them_again_changes_nothing(name):
    options = resolve_norm_options(name, {})
    assert set(options) == set(norm_option_defaults(name))
    assert resolve_norm_options(name, options) == options


def test_the_setting_fills_what_a_constructor_names_and_what_the_user_gave_wins(plugin):
    load_plugin(plugin())
    setting = {"norm_batch_size": 16, "num_domains": 3, "image_shape": (3, 8, 8)}
    assert resolve_norm_options("mine", {}, setting)["norm_batch_size"] == 16
    assert resolve_norm_options("mine", {"norm_batch_size": 2}, setting)["norm_batch_size"] == 2
    assert "norm_batch_size" not in resolve_norm_options("bn", {}, setting)


def test_equal_options_are_equal_in_json_whatever_their_spelling(plugin):
    """They enter a run's key: 1 and 1.0, and a tuple and a list, must not be different runs."""
    load_plugin(plugin())
    default = resolve_norm_options("mine", {})
    for given in ({"rate": 1}, {"rate": 1.0}, {"sizes": [1]}, {"sizes": (1,)}):
        assert repr(resolve_norm_options("mine", given)) == repr(default)
    assert make_norm("mine", sizes=[2, 3])(4).sizes == [2, 3]


# --- registering ------------------------------------------------------------------------------------------------------


def test_one_class_may_have_two_names():
    cls = a_norm("first")
    register(name="second", source="test", mixes_samples=True, keeps_stats=False)(cls)
    assert isinstance(make_norm("first")(4), cls)
    assert isinstance(make_norm("second")(4), cls)
    assert make_norm("first")(4).norm_info.name == "first"
    assert make_norm("second")(4).norm_info.mixes_samples


def test_a_partial_of_a_class_may_be_registered(plugin):
    bound = functools.partial(type(make_norm("gn")(32)), num_groups=2)
    register(name="gn2", source="test", mixes_samples=False, keeps_stats=False)(bound)
    assert make_norm("gn2")(8).num_groups == 2
    assert make_norm("gn2", num_groups=4)(8).num_groups == 4


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("self, num_channels, *, affine=True, **options", "hide misspelt options"),
        ("self, num_channels, *options, affine=True", "hide misspelt options"),
        ("self, num_channels, *, rate: float, affine=True", "without a default: rate"),
        ("self, num_channels, *, rate=1.0, affine=True", "without a type annotation: rate"),
        ("self, num_channels", "must accept affine"),
        ("self, *, num_channels=4, affine=True", "first parameter must be positional"),
        ("self, num_channels, affine=True, /", "positional-only"),
    ],
)
def test_a_constructor_that_breaks_the_contract_is_refused_when_registered(signature, message):
    namespace = {"nn": nn}
    exec(f"class Odd(nn.Module):\n def __init__({signature}): super().__init__()", namespace)
    before = norm_names()
    with pytest.raises(ValueError, match=message):
        register(name="odd", source="test", mixes_samples=False, keeps_stats=False)(namespace["Odd"])
    assert norm_names() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Not-A-Name"}, "lower case"),
        ({"name": "bn"}, "already registered"),
        ({"mix": True}, "unknown facts"),
        ({"variance": "unbaised"}, 'variance "unbaised" is unknown; allowed: biased, unbiased'),
        ({"running_variance": "n - 1"}, 'running_variance "n - 1" is unknown'),
        ({"needs": {"weights"}}, "needs .*weights.* unknown"),
        ({"needs": {"activation"}}, "must accept activation"),
    ],
)
def test_a_wrong_registration_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        a_norm(**arguments)


def test_one_need_may_be_given_as_text():
    a_norm("asks", needs="domain")
    assert norm_info("asks").needs == frozenset({"domain"})


def test_an_option_that_no_record_can_hold_is_refused():
    @register(name="holds", source="test", mixes_samples=False, keeps_stats=False)
    class Holds(nn.Module):
        def __init__(self, num_channels, *, inner: nn.Module | None = None, affine: bool = True):
            super().__init__()

    with pytest.raises(ValueError, match="stored in records"):
        make_norm("holds")


# --- factories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", norm_names())
def test_a_factory_stamps_what_it_builds(name):
    factory = make_norm(name, **OPTIONS.get(name, {}))
    layer = factory(32)
    assert factory_info(factory) is layer.norm_info is norm_info(name)
    assert layer.situation == Situation()
    assert [(path, type(norm)) for path, norm in norm_modules(nn.Sequential(nn.Conv2d(3, 32, 1), layer))] == [
        ("1", type(layer))
    ]


def test_parts_of_a_norm_are_not_norms_of_the_network():
    @register(name="outer", source="test", mixes_samples=True, keeps_stats=True)
    class Outer(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.parts = nn.ModuleList([make_norm("bn")(num_channels), make_norm("ln")(num_channels)])

    net = nn.ModuleDict({"a": make_norm("outer")(8), "ab": make_norm("bn")(8)})
    assert [name for name, _ in norm_modules(net)] == ["a", "ab"]
    assert [name for name, _ in norm_modules(net["a"])] == [""]


@pytest.mark.parametrize("name", norm_names())
def test_stamped_modules_and_factories_can_be_pickled(name):
    factory = pickle.loads(pickle.dumps(make_norm(name, **OPTIONS.get(name, {}))))  # noqa: S301 - our own bytes
    layer = pickle.loads(pickle.dumps(factory(32)))  # noqa: S301
    assert layer.norm_info == norm_info(name)


def test_an_activation_is_taken_only_by_a_norm_that_fuses_one_and_none_means_none():
    with pytest.raises(ValueError, match="fuses no activation"):
        make_norm("bn")(8, activation=nn.ReLU())

    @register(name="fuses", source="test", mixes_samples=False, keeps_stats=False, needs={"activation"})
    class Fuses(nn.Module):
        def __init__(self, num_channels, *, activation=torch.relu, affine: bool = True):
            super().__init__()
            self.activation = activation

    assert make_norm("fuses")(8, activation=torch.tanh).activation is torch.tanh
    assert make_norm("fuses")(8).activation is None


@pytest.mark.parametrize("name", norm_names(without=["conv_weight"]))
def test_a_factory_serves_as_norm_layer_of_torchvision(name):
    with torch.device("meta"):
        net = torchvision.models.resnet18(norm_layer=make_norm(name, **OPTIONS.get(name, {})))
        with situation(net, domain=0, part="context"):
            y = net(torch.empty(4, 3, 64, 64))
    assert y.is_meta
    assert y.shape == (4, 1000)
    assert len(list(norm_modules(net))) == 20
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("name", [n for n in norm_names() if "conv_weight" in norm_info(n).needs])
def test_a_norm_that_nobody_passes_the_convolutions_weight_to_says_so(name):
    with torch.device("meta"):
        net = torchvision.models.resnet18(norm_layer=make_norm(name))
        with pytest.raises(ValueError, match=f"{name}.* needs .*convolution before it"):
            net(torch.empty(4, 3, 64, 64))


@pytest.mark.parametrize("name", norm_names())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("slices", [1, 2])
def test_an_activation_in_place_may_follow_in_training(name, layout, slices):
    """As in torchvision's networks: what a norm returns may be changed, whatever its backward has kept."""
    options = {"num_groups": 8} if "num_groups" in norm_option_defaults(name) else {}
    needs = norm_info(name).needs
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(4, 16, 4, 4, generator=draw, dtype=torch.float64).to(memory_format=layout)
    kernel, pull = (torch.randn(16, 16, *side, generator=draw, dtype=torch.float64) for side in ((1, 1), (4, 4)))
    found = []
    for activation in (torch.relu, torch.relu_):
        layer = make_norm(name, **options)(
            16, dtype=torch.float64, **({"activation": nn.Softplus()} if "activation" in needs else {})
        )
        x, w = start.clone().requires_grad_(), kernel.clone().requires_grad_()
        weight = layer.transform_weight(w) if hasattr(layer, "transform_weight") else w
        z = nn.functional.conv2d(x, weight)
        with situation(layer, domain=torch.arange(4) // 2, part="context", slices=slices):
            y = layer(z, **({"weight": weight} if "conv_weight" in needs else {}))
        (activation(y) * pull[:4]).sum().backward()
        found.append([x.grad, w.grad, *(p.grad for p in layer.parameters())])
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_device_and_dtype_reach_layers_that_do_not_name_them(plugin):
    load_plugin(plugin())
    layer = make_norm("mine")(4, device="meta", dtype=torch.float64)
    assert layer.start.is_meta
    assert layer.start.dtype == torch.float64


def test_a_norms_own_draws_never_move_the_backbones(plugin):
    load_plugin(plugin())
    weights = []
    for name in ("none", "mine"):
        torch.manual_seed(0)
        net = torchvision.models.resnet18(norm_layer=make_norm(name), num_classes=2)
        weights.append({k: v for k, v in net.state_dict().items() if "conv" in k or "fc" in k})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("device", "available", "forked"),
    [
        ("cpu", True, {"devices": []}),
        ("meta", True, {"devices": []}),
        ("cuda", True, {"devices": [3], "device_type": "cuda"}),  # the process's current device, not the first
        ("cuda:1", True, {"devices": [1], "device_type": "cuda"}),
        ("cuda", False, {"devices": []}),  # a fake device
    ],
)
def test_the_generator_of_the_device_that_a_layer_is_built_on_is_forked(monkeypatch, device, available, forked):
    module = types.SimpleNamespace(is_available=lambda: available, current_device=lambda: 3)
    calls = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **arguments: calls.append(arguments))
    forked_generators(torch.device(device))
    assert calls == [forked]


# --- plugins ----------------------------------------------------------------------------------------------------------


def test_a_plugins_norm_has_a_version_that_follows_its_text(plugin):
    file = plugin()
    assert load_plugin(file) == ["mine"]
    first = norm_info("mine").version
    assert isinstance(first, str)
    assert load_plugin(file) == ["mine"]
    assert norm_info("mine").version == first
    assert norm_info("bn").version != first

    file.write_text(PLUGIN + "# edited\n")
    assert load_plugin(file) == ["mine"]
    assert norm_info("mine").version == first

    file.write_text(PLUGIN + "edited = True\n")
    assert load_plugin(file) == ["mine"]
    assert norm_info("mine").version != first

    file.write_text(PLUGIN)
    load_plugin(file)
    assert norm_info("mine").version == first


def test_an_edited_plugin_replaces_what_it_registered(plugin):
    file = plugin()
    load_plugin(file)
    file.write_text(PLUGIN.replace("x * self.rate", "x + 7").replace('"mine"', '"yours"'))
    assert load_plugin(file) == ["yours"]
    assert "mine" not in norm_names()
    assert make_norm("yours")(1)(torch.zeros(1, 1)).item() == 7


def test_layers_of_a_plugin_can_be_pickled(plugin):
    load_plugin(plugin())
    layer = make_norm("mine", rate=3)(4)
    twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes
    assert torch.equal(twin.start, layer.start)
    assert twin.rate == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (PLUGIN.replace('"mine"', '"bn"'), '"bn" is already registered'),
        (PLUGIN.replace('"mine"', '"half"') + "\nraise KeyError('late')", "KeyError: 'late'"),
    ],
)
def test_a_plugin_that_fails_is_one_line_and_leaves_the_registry_as_it_was(plugin, text, message):
    file = plugin()
    load_plugin(file)
    before, modules = dict(registry._REGISTRY), sys.modules.copy()
    for target in (file, plugin(text, "other.py")):
        target.write_text(text)
        with pytest.raises(ValueError, match="plugin") as caught:
            load_plugin(target)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert dict(registry._REGISTRY) == before
        assert {k: v for k, v in sys.modules.items() if "normsuite_plugin" in k} == {
            k: v for k, v in modules.items() if "normsuite_plugin" in k
        }
    assert norm_info("none").version == 1  # versions are no longer a plugin's
    a_norm("later")
    assert norm_info("later").version == 1


@pytest.mark.parametrize(("name", "message"), [("missing.py", "no such file"), ("norms.txt", "not a Python file")])
def test_a_plugin_that_is_no_file_of_python_is_refused(tmp_path, name, message):
    (tmp_path / "norms.txt").write_text(PLUGIN)
    with pytest.raises(ValueError, match=message):
        load_plugin(tmp_path / name)


def test_a_plugin_does_not_inherit_our_future_imports(plugin):
    text = "class C:\n    x: int = 0\nassert C.__annotations__['x'] is int\n"
    assert load_plugin(plugin(text)) == []


def test_an_annotation_that_can_not_be_read_is_a_users_error(plugin):
    text = PLUGIN.replace("rate: float", "rate: Missing")
    load_plugin(plugin(text))
    with pytest.raises(ValueError, match=r"Mine.*annotation.*Missing"):
        make_norm("mine")


def test_a_cell_of_a_fresh_notebook_can_not_take_a_name_of_the_suite():
    cell = (
        "import torch\nfrom norms import make_norm, register\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self, num_channels, *, affine: bool = True): super().__init__()\n"
        "facts = dict(source='x', mixes_samples=False, keeps_stats=False, replace=True)\n"
        "try: register(name='bn', **facts)(Mine)\n"
        "except ValueError as error: print(error)\n"
        "print(type(make_norm('bn')(4)).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", cell], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    refused, made = done.stdout.splitlines()
    assert refused.startswith('norm "bn" is already registered by')
    assert refused.endswith("choose another name")
    assert made == "BatchNorm"
