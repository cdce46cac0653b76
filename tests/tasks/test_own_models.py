"""Models and optimizers of users, and timm's models: what is built of them, and what is said where none can be."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tasks
from norms.factory import factory_info
from norms.protocol import norm_modules
from norms.registry import make_norm
from tasks.admission import Host, refusal
from tasks.base import RunContext
from tasks.classification.options import ClassificationOptions
from tasks.nets.blocks import conv_norm_act
from tasks.nets.guests import conversion
from tasks.nets.models import build_net, check_model, register_model, without_head
from tasks.schedule import register_optimizer

CLASSES = {"num_classes": 5, "in_channels": 2}
BN, GN = make_norm("bn"), make_norm("gn", num_groups=2)


def plain(norm, num_classes, in_channels, width=4):
    conv = nn.Conv2d(in_channels, width, 3, bias=False)
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    return nn.Sequential(conv, norm(width), nn.ReLU(inplace=True), nn.ConvTranspose2d(width, width, 2), *last)


def generator(seed=0):
    return RunContext(torch.device("cpu"), seed, Path(), Path()).generator


def built(model="mine", norm=BN, **more):
    return build_net(model, norm, **CLASSES, **more)


def why_not(norm, size=8):
    host = Host("test", build_net, {"model": "mine", **CLASSES}, (2, size, size), norm_batch=4)
    return refusal(norm, factory_info(norm), host)


def test_a_users_model_has_equal_initial_weights_for_every_norm_and_works_not_in_place():
    register_model("mine")(plain)
    torch.manual_seed(1)
    one, state = built(generator=generator()), torch.get_rng_state()
    torch.manual_seed(2)
    two = built(norm=GN, generator=generator())
    other = built(generator=generator(1))
    assert {norm.norm_info.name for _, norm in norm_modules(two)} == {"gn"}
    for index in (0, 3, 6):  # a transposed convolution is drawn by its constructor, from the run's seed, too
        assert torch.equal(one[index].weight, two[index].weight)
        assert not torch.equal(one[index].weight, other[index].weight)
    assert not one[2].inplace
    assert one(torch.zeros(3, 2, 8, 8)).shape == (3, 5)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's stream does not move"


def forward_fails(norm, num_classes, in_channels):
    return nn.Sequential(plain(norm, num_classes, in_channels), nn.Linear(77, num_classes))


BAD = {
    "not logits": (
        lambda norm, num_classes, in_channels: nn.Sequential(norm(in_channels)),
        r"gives \(4, 2, 8, 8\) for 4",
    ),
    "other classes": (
        lambda norm, num_classes, in_channels: plain(norm, 7, in_channels),
        r"\(4, 7\) .* logits \(4, 5\)",
    ),
    "a tuple": (
        lambda norm, num_classes, in_channels: type("T", (nn.Sequential,), {"forward": lambda self, x: (x,)})(norm(2)),
        "gives a tuple for 4 images",
    ),
    "no floating-point numbers": (
        lambda norm, num_classes, in_channels: type("T", (nn.Sequential,), {"forward": lambda self, x: self[0](x) > 0})(
            plain(norm, num_classes, in_channels)
        ),
        "gives torch.bool; logits of a floating-point type are needed",
    ),
    "no norm": (
        lambda norm, num_classes, in_channels: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5)),
        "has no norm of the factory",
    ),
    "a norm that is not used": (
        lambda norm, num_classes, in_channels: type(
            "T", (nn.Sequential,), {"forward": lambda self, x: self[3](x.mean((2, 3)))}
        )(norm(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5)),
        "its forward uses none",
    ),
    "its own norm": (
        lambda norm, num_classes, in_channels: nn.Sequential(norm(2), nn.BatchNorm2d(2)),
        "keeps norms of its own, 1 in all: 1 is a BatchNorm2d",
    ),
    "no module": (lambda norm, num_classes, in_channels: 3, "returned a int"),
    "raises": (lambda norm, num_classes, in_channels: {}["missing"], "model \"mine\": KeyError: 'missing'"),
    "raises in its forward": (forward_fails, 'with model "mine": RuntimeError: mat1 and mat2'),
    "another kind in its forward": (
        lambda norm, num_classes, in_channels: type("T", (nn.Sequential,), {"forward": lambda self, x: x["a"]})(
            norm(2)
        ),
        'with model "mine": IndexError|with model "mine": TypeError',
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("size", [8, 200])
def test_a_model_that_can_not_serve_is_a_reason_in_one_line(kind, size):
    build, said = BAD[kind]
    register_model("mine")(build)

    reason = why_not(BN, size)
    assert re.search(said.replace("8, 8", f"{size}, {size}").replace("4", "[24]"), reason), reason
    assert "\n" not in reason


def test_a_model_that_may_be_built_as_it_is_is_no_reason():
    register_model("mine")(plain)
    assert why_not(BN) is None


def test_a_norm_that_transforms_weights_needs_its_convolution():
    register_model("mine")(plain)
    with pytest.raises(ValueError, match=r'"ws_bn" transforms .* has no place for it at 1: tasks\.nets\.blocks'):
        built(norm=make_norm("ws_bn"))

    @register_model("paired")
    def paired(norm, num_classes, in_channels):
        layer = conv_norm_act(in_channels, 4, 3, norm=norm, activation=nn.ReLU())
        return nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    assert built("paired", make_norm("ws_bn"))(torch.zeros(2, 2, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("name", ["cbn", "evonorm_b0"])
def test_a_norm_that_needs_what_a_bare_layer_is_not_told_is_skipped_with_the_reason(name):
    register_model("mine")(plain)
    assert re.search("weight|activation", why_not(make_norm(name)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "mine", "width": 8}, 'model "mine" is not the suite\'s own and has no width option'),
        ({"model": "timm:test_resnet", "width": 8}, "has no width option"),
        ({"model": "mien"}, 'unknown model "mien"; models: .*mine, timm:NAME; did you mean "mine"'),
        ({"model": "timm:test_resnt"}, 'unknown model "timm:test_resnt"; .*did you mean "timm:test_resnet'),
        ({"optimizer": "adaw"}, 'unknown optimizer "adaw"; optimizers: sgd, adamw, signs; did you mean "adamw"'),
    ],
)
def test_options_that_no_model_or_optimizer_has_are_refused(given, said):
    register_model("mine")(plain)
    register_optimizer("signs")(lambda groups, learning_rate: torch.optim.SGD(groups, learning_rate))
    with pytest.raises(ValueError, match=said):
        ClassificationOptions(**given)


def test_the_last_gamma_of_a_users_model_is_the_users():
    register_model("mine")(plain)
    with pytest.raises(ValueError, match='zero_init_last_gamma: model "mine" is not the suite\'s own'):
        built(zero_init_last_gamma=True)


def test_a_model_without_a_linear_layer_has_no_features_and_one_whose_last_is_not_its_head_is_found_out():
    register_model("mine")(plain)
    net = built()
    assert without_head(net) == 4
    assert net(torch.zeros(3, 2, 8, 8)).shape == (3, 4)

    @register_model("turned")
    def turned(norm, num_classes, in_channels):
        net = plain(norm, num_classes, in_channels)
        net.append(nn.Linear(num_classes, num_classes))
        net[-1], net[-2] = nn.Identity(), net[-2]
        net.spare = nn.Linear(3, 3)
        return nn.Sequential(net, nn.Identity())

    net = built("turned")
    without_head(net)
    with pytest.raises(
        ValueError, match=r"gives \(3, 5\) .*the features that its last nn.Linear, 0.spare, takes \(3, 3\)"
    ):
        net(torch.zeros(3, 2, 8, 8))
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        without_head(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("build", [lambda norm: None, lambda norm, num_classes, in_channels, depth: None, 3])
def test_a_function_of_other_arguments_is_no_model(build):
    with pytest.raises(ValueError, match='model "mine": a function of norm, num_classes, in_channels is needed'):
        register_model("mine")(build)


# --- timm -------------------------------------------------------------------------------------------------------------


def test_a_model_of_timm_has_our_norms_and_says_how_many():
    one, two = (build_net("timm:test_resnet", norm, **CLASSES, generator=generator()) for norm in (BN, GN))
    assert conversion(nn.Sequential(two)) == {
        "conversion": {"timm": two.conversion["timm"], "swapped": 15, "left": 0, "changed": 0}
    }
    assert conversion(built_of_ours()) == {}
    assert {norm.norm_info.name for _, norm in norm_modules(two)} == {"gn"}
    assert torch.equal(one.conv1[0].weight, two.conv1[0].weight)
    assert two(torch.zeros(2, 2, 32, 32)).shape == (2, 5)


def built_of_ours():
    return build_net("resnet8", BN, **CLASSES, width=4)


def test_a_model_of_timm_that_keeps_a_norm_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r'"timm:test_vit" keeps norms of its own, \d+ in all: \S+ is a LayerNorm'):
        built("timm:test_vit")


def test_without_timm_there_is_a_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r'model "timm:test_resnet" needs timm: .*-m pip install timm'):
        check_model("timm:test_resnet")


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_a_users_optimizer_gets_the_groups_that_ours_get():
    seen = []

    @register_optimizer("signs")
    def signs(groups, learning_rate):
        seen.append(([(len(group["params"]), group["weight_decay"]) for group in groups], learning_rate))
        return torch.optim.RMSprop(groups, learning_rate)

    options = ClassificationOptions(optimizer="signs", batch_size=64, momentum=0.5, betas=[0.1, 0.2], weight_decay=0.01)
    assert (options.momentum, options.betas) == (0.9, None), "no other optimizer's options make a run of their own"
    net = built_of_ours()
    optimizer = options.trained_by(net)
    own, ours = seen[0][0], ClassificationOptions(weight_decay=0.01).trained_by(net).param_groups
    assert own == [(len(group["params"]), group["weight_decay"]) for group in ours]
    assert seen[0][1] == 0.05 == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda groups, learning_rate: None, "returned a NoneType; a torch.optim.Optimizer is needed"),
        (lambda groups, learning_rate: torch.optim.SGD(groups[:1], learning_rate), r"moves \d+ of the \d+ parameters"),
    ],
)
def test_an_optimizer_that_leaves_parameters_or_is_none_is_refused(build, said):
    register_optimizer("signs")(build)
    with pytest.raises(ValueError, match=f'optimizer "signs" {said}'):
        ClassificationOptions(optimizer="signs").trained_by(built_of_ours())


# --- names ------------------------------------------------------------------------------------------------------------


class OwnTask:
    name, version, options, metrics = "mine", 1, tasks.Options, ("top1",)
    setting = data_checksum = why_not = run = print


def register(kind, name, **more):
    if kind == "task":
        tasks.register_task(type("Named", (OwnTask,), {"name": name})(), **more)
    else:
        {"model": register_model, "optimizer": register_optimizer}[kind](name, **more)(plain)


@pytest.mark.parametrize(("kind", "own"), [("model", "resnet8"), ("optimizer", "sgd"), ("task", "classification")])
def test_a_name_is_free_or_replaced_on_purpose_and_the_suites_stay(kind, own):
    register(kind, "mine")
    with pytest.raises(ValueError, match=f'{kind} "mine" is already registered; choose another name; replace=True'):
        register(kind, "mine")
    register(kind, "mine", replace=True)
    for more in ({}, {"replace": True}):
        with pytest.raises(ValueError, match=f'{kind} "{own}" is already registered; choose another name$'):
            register(kind, own, **more)
    with pytest.raises(ValueError, match=f'{kind} name "No such": lower case'):
        register(kind, "No such")
