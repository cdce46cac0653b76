"""Conversion of the models that people have: torchvision's and timm's, on the meta device, a few with real numbers."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from norms import registry
from norms.convert import Untraceable, audit_norms, converted
from norms.layers.bn import BatchNorm
from norms.protocol import norm_modules
from norms.registry import make_norm, register

TORCHVISION = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2"),
    *("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5"),
    *("shufflenet_v2_x1_0", "googlenet", "inception_v3", "vgg11_bn", "vgg16_bn", "regnet_x_400mf", "regnet_y_400mf"),
    *("convnext_tiny", "maxvit_t", "vit_b_16", "swin_t"),
)
TIMM = (
    *("resnet18", "resnet50d", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "convnext_atto"),
    *("densenet121", "ghostnet_100", "dla34", "hrnet_w18_small", "res2net50_26w_4s", "resnetv2_50", "vgg11_bn"),
    *("test_efficientnet_gn", "test_efficientnet_ln", "vit_tiny_patch16_224"),
)
MODELS = (*TORCHVISION, *(f"timm:{name}" for name in TIMM))
PARTIAL = {"convnext_tiny": 18, "maxvit_t": 45, "vit_b_16": 25, "swin_t": 29, "timm:vit_tiny_patch16_224": 25}
"""Channels-last norms, which are left."""
CONTROL_FLOW = {"timm:vgg11_bn"}
"""Its head pads maps that are too small, so torch.fx can not follow it."""
NO_CONVOLUTION = {"densenet121", "timm:resnetv2_50", "timm:convnext_atto"}
"""Some norm stands before its convolution, or after a sum."""
FOLLOWED = (
    *("resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("mnasnet0_5", "shufflenet_v2_x1_0", "googlenet", "inception_v3", "vgg11_bn", "regnet_y_400mf", "convnext_tiny"),
    *("timm:resnet18", "timm:mobilenetv3_small_100", "timm:regnety_002", "timm:convnext_atto", "timm:ghostnet_100"),
    *("timm:dla34", "timm:res2net50_26w_4s", "timm:resnetv2_50", "timm:test_efficientnet_gn"),
)
LIKE_OTHERS = {
    *("resnext50_32x4d", "mobilenet_v2", "mnasnet0_5", "inception_v3", "timm:resnet18", "timm:regnety_002"),
    *("timm:res2net50_26w_4s", "timm:mobilenetv3_small_100"),
    *("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn", "deeplabv3_resnet50"),
}
"""Whose blocks another model has, too: followed, and their feature maps compared, by slow tests."""
PAIRED = (
    *("resnet18", "densenet121", "mobilenet_v3_small", "googlenet", "vgg11_bn", "timm:resnet50d", "timm:regnety_002"),
    *("timm:ghostnet_100", "timm:dla34", "timm:vgg11_bn", "timm:resnetv2_50", "timm:test_efficientnet_ln"),
    *("timm:convnext_atto",),
)
GATES = {"Sigmoid", "Hardsigmoid", "Tanh"}


def quick_ones(names):
    """Parameters of a test: those like others are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in names]


def build(name, device="meta"):
    """With random weights; built on the CPU first where the constructor reads values."""
    with torch.device("cpu" if name.startswith("regnet_") else device), torch.random.fork_rng(devices=[]):
        if name.startswith("timm:"):
            return timm.create_model(name.removeprefix("timm:"), pretrained=False)
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **quick).to(device)


def size_for(name):
    return 224 if any(part in name for part in ("vit", "swin")) else 299 if name == "inception_v3" else 96


def old_norms(net):
    """Norms on (N, C, H, W), by class name and base class; path -> module."""
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    return {
        path: module
        for path, module in net.named_modules()
        if isinstance(module, kinds) or type(module).__name__ in ("LayerNorm2d", "LayerNormAct2d")
    }


def first_output(y):
    return y if isinstance(y, torch.Tensor) else y[0]  # GoogLeNet and Inception give their auxiliary heads, too


@pytest.fixture
def own_norms(monkeypatch):
    registry.norm_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    facts = {"source": "test", "mixes_samples": True, "keeps_stats": True, "axes": "NHW", "slices_at_once": True}

    @register(name="bn_act", needs="activation", **facts)
    class BatchNormAct(BatchNorm):
        """Exactly batch normalization and then its activation."""

        equivalent_to = "bn"

        def __init__(self, num_channels, *, eps: float = 1e-5, affine: bool = True, activation=None):
            super().__init__(num_channels, eps=eps, affine=affine)
            self.activation = activation

        def forward(self, x):
            y = super().forward(x)
            return y if self.activation is None else self.activation(y)

    @register(name="sees_weight", needs="conv_weight", **facts)
    class SeesWeight(BatchNorm):
        equivalent_to = "bn"
        seen = None

        def __init__(self, num_channels, *, eps: float = 1e-5, affine: bool = True):
            super().__init__(num_channels, eps=eps, affine=affine)

        def forward(self, x, *, weight):
            assert weight.shape[0] == x.shape[1]
            self.seen = x, weight
            return super().forward(x)

    @register(name="standardizes", **facts)
    class Standardizes(BatchNorm):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)

        def transform_weight(self, weight):
            return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_swapped_or_left_with_a_reason_and_the_model_works(name):
    net = build(name)
    old, names = old_norms(net), set(net.state_dict())
    parameters = sum(p.numel() for p in net.parameters())
    same, audit = converted(net, make_norm("bn"))
    assert same is net
    assert {swapped.path for swapped in audit.swapped} == set(old)
    assert len(audit.ours) == len(old)
    unlike = {path for path, norm in old.items() if not isinstance(norm, nn.BatchNorm2d)}  # they keep no statistics
    assert {path for path, _ in audit.changed} == unlike
    assert [left.why[:13] for left in audit.left] == ["channels-last"] * PARTIAL.get(name, 0)
    assert audit.complete is (name not in PARTIAL)
    assert not old_norms(net).keys() & set(old) or not old
    assert audit.before.parameters == parameters == audit.after.parameters == sum(p.numel() for p in net.parameters())
    inside = tuple(f"{path}." for path in old)
    assert {key for key in names if not key.startswith(inside)} == {
        key for key in net.state_dict() if not key.startswith(inside)
    }
    assert audit_norms(net).left == audit.left
    if old:
        side = size_for(name)
        for mode in (True, False):
            y = first_output(net.train(mode)(torch.empty(2, 3, side, side, device="meta")))
            assert y.shape == (2, 1000 if name.startswith("timm:") else 10)


class Consumers(TorchFunctionMode):
    """What the output of each norm goes to, seen while the model runs: path of the norm -> names of functions.

    Independent of any graph: the outputs are recognized by identity in the arguments of every torch function.
    """

    ACTIVATIONS = frozenset({"relu", "relu_", "relu6", "silu", "hardswish", "gelu", "leaky_relu", "hardtanh"})

    def __init__(self, net):
        super().__init__()
        self.found, self.outputs = {}, {}
        for path, norm in old_norms(net).items():
            norm.register_forward_hook(lambda _, x, y, path=path: self.take(path, y))
        for module in net.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # else the output of the activation could not be told from that of the norm

    def take(self, path, y):
        self.outputs[id(y)] = path, y  # held, so that no other tensor gets its id
        self.found[path] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        if name in self.ACTIVATIONS:
            kwargs.pop("inplace", None)
            args = args[:1] if name == "relu" else args
        if name not in ("__get__", "size", "dim"):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and id(tensor) in self.outputs:
                    self.found[self.outputs[id(tensor)][0]].append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", quick_ones(FOLLOWED))
def test_the_activations_removed_are_those_seen_to_follow_a_norm_when_the_model_runs(own_norms, name):
    net = build(name)
    side = size_for(name)
    x = torch.empty(2, 3, side, side, device="meta")
    own = {p: type(m.act).__name__ for p, m in old_norms(net).items() if hasattr(m, "act")}
    own = {path: act for path, act in own.items() if act != "Identity"}
    assert not GATES & set(own.values())
    watched = copy.deepcopy(net)
    seen = Consumers(watched)
    with seen:
        watched(x)
    expected = {
        path
        for path, names in seen.found.items()
        if path not in own and len(names) == 1 and names[0] in Consumers.ACTIVATIONS
    } | set(own)
    new, audit = converted(net, make_norm("bn_act"))
    assert {removed.norm for removed in audit.removed} == expected
    assert len(expected) > 0 or "convnext" in name
    for path, norm in norm_modules(new):
        assert (norm.activation is not None) is (path in expected)
    assert first_output(new(x)).shape[0] == 2


@pytest.mark.parametrize("name", PAIRED)
def test_norms_that_work_with_the_weight_get_it_or_the_model_is_refused(own_norms, name):
    net = build(name)
    names, modules = set(net.state_dict()), list(net.modules())
    if name in CONTROL_FLOW | NO_CONVOLUTION:
        with pytest.raises(ValueError, match="control flow" if name in CONTROL_FLOW else "no convolution before it"):
            converted(net, make_norm("sees_weight"))
        assert list(net.modules()) == modules
        if name in CONTROL_FLOW:
            return
        new, audit = converted(net, make_norm("standardizes"))
        assert 0 < len(audit.plain) == len(audit.swapped) - len({rewired.norm for rewired in audit.rewired})
    else:
        new, audit = converted(net, make_norm("sees_weight"))
        assert len(audit.rewired) == len(audit.swapped)
        assert audit.plain == []
    paths = {swapped.path for swapped in audit.swapped}
    inside = tuple(f"{path}." for path in paths)
    assert {k for k in names if not k.startswith(inside)} == {k for k in new.state_dict() if not k.startswith(inside)}
    x = torch.empty(2, 3, 96, 96, device="meta")
    for mode in (True, False):
        assert first_output(new.train(mode)(x)).shape[0] == 2


# --- networks of many outputs, and their parts ------------------------------------------------------------------------

DENSE = {
    "fasterrcnn_resnet50_fpn": ("backbone", 53),
    "fasterrcnn_mobilenet_v3_large_fpn": ("backbone", 46),
    "maskrcnn_resnet50_fpn_v2": ("backbone", 61),
    "retinanet_resnet50_fpn": ("backbone", 53),
    "fcos_resnet50_fpn": ("backbone", 53),
    "ssdlite320_mobilenet_v3_large": ("backbone", 58),
    "deeplabv3_resnet50": ("", 60),
    "lraspp_mobilenet_v3_large": ("", 47),
    "r3d_18": ("", 20),
}
"""The part that torch.fx can follow, and its norms."""


def dense(name):
    """On the CPU, with every parameter and statistic as training might leave it."""
    torch.manual_seed(0)
    options = {} if name == "r3d_18" else {"weights_backbone": None}
    return as_trained(torchvision.models.get_model(name, weights=None, num_classes=3, **options))


@pytest.mark.parametrize("name", quick_ones(DENSE))
def test_a_network_that_returns_feature_maps_by_name_keeps_its_function(own_norms, name):
    part, norms = DENSE[name]
    net = dense(name).get_submodule(part)
    expected = copy.deepcopy(net)
    new, audit = converted(net, make_norm("bn_act"))
    assert len(audit.swapped) == norms
    assert audit.complete
    assert (getattr(new, "out_channels", None)) == getattr(expected, "out_channels", None)
    # 1 x 1 maps in training have no statistics of one batch to compare
    shape = (2, 3, 4, 56, 56) if name == "r3d_18" else (2, 3, 160, 160)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for mode, tolerance in ((False, 1e-5), (True, 1e-2)):  # batch statistics of deep layers amplify rounding
            torch.manual_seed(3)  # dropout
            ours = new.train(mode)(x)
            torch.manual_seed(3)
            theirs = expected.train(mode)(x)
            assert type(ours) is type(theirs)
            if isinstance(theirs, dict):
                assert list(ours) == list(theirs)
            for y, z in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
                assert (y - z).abs().max() <= tolerance * z.abs().max()


def test_a_detector_detects_with_a_converted_backbone():
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(Untraceable, match=r"FasterRCNN can not be traced .*convert the parts.*a detector's backbone"):
        converted(net, make_norm("frn"))
    net.backbone, audit = converted(net.backbone, make_norm("frn"))
    assert audit.complete
    images = [torch.rand(3, 64, 64)]
    assert net.eval()(images)[0].keys() == {"boxes", "labels", "scores"}
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 20.0, 30.0]]), "labels": torch.tensor([1])}]
    assert all(loss.isfinite() for loss in net.train()(images, targets).values())
    built = torchvision.models.detection.FasterRCNN(net.backbone, num_classes=2)  # which asks for out_channels
    assert built.backbone is net.backbone


# --- real numbers -----------------------------------------------------------------------------------------------------

REAL = (
    "resnet18",
    "mobilenet_v3_small",
    "googlenet",
    "timm:test_efficientnet",
    "timm:test_resnet",
    "timm:ghostnet_100",
)


def trained(name):
    """On the CPU, with every parameter and statistic as training might leave it."""
    torch.manual_seed(0)
    return as_trained(build(name, "cpu").eval())


def as_trained(net):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.dim() == 1:
                low, high = (0.7, 1.4) if key.endswith(("running_var", "weight")) else (-0.2, 0.2)
                tensor.uniform_(low, high, generator=generator)
    return net


@pytest.mark.parametrize("norm", ["bn", "bn_act", "sees_weight"])
@pytest.mark.parametrize("name", REAL)
def test_batch_norm_by_another_name_keeps_the_function(own_norms, name, norm):
    net = trained(name)
    new, audit = converted(copy.deepcopy(net), make_norm(norm))
    assert {"running_mean", "running_var", "eps"} <= set(audit.swapped[0].carried)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = net(x)
        assert (new(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(copy.deepcopy(new)(x), new(x))
        if norm == "sees_weight":
            return
        torch.manual_seed(3)  # dropout
        expected = first_output(net.train()(x))
        torch.manual_seed(3)
        # batch statistics of deep layers amplify rounding
        assert (first_output(new.train()(x)) - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:test_efficientnet", "timm:dla34"])
def test_each_norm_is_given_the_weight_its_input_was_convolved_with(own_norms, name):
    new, audit = converted(trained(name), make_norm("sees_weight"))
    inputs = {}
    for rewired in audit.rewired:
        new.get_submodule(rewired.conv).register_forward_pre_hook(
            lambda conv, x, path=rewired.conv: inputs.__setitem__(path, (conv, x[0]))
        )
    new(torch.randn(2, 3, 64, 64))
    norms = {path.removesuffix(".norm"): norm for path, norm in norm_modules(new)}
    assert len(audit.rewired) == len(norms)
    for rewired in audit.rewired:
        conv, x = inputs[rewired.conv]
        y, weight = norms[rewired.norm].seen
        assert weight is conv.weight
        again = nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        assert torch.allclose(again, y, atol=1e-5)


def test_a_transformed_weight_is_as_if_it_had_been_written_into_the_convolutions(own_norms):
    net = trained("densenet121")
    literal = copy.deepcopy(net)
    new, audit = converted(net, make_norm("standardizes"))
    assert (len(audit.rewired), len(audit.plain)) == (59, 62)
    with torch.no_grad():
        for rewired in audit.rewired:
            weight = literal.get_submodule(rewired.conv).weight
            weight -= weight.mean((1, 2, 3), keepdim=True)
        literal, _ = converted(literal, make_norm("bn"))
        for norm in [m for _, m in norm_modules(literal)]:
            norm.reset_running_stats()  # those of the untransformed input mean something else
        x = torch.randn(2, 3, 64, 64)
        expected = literal(x)
        assert (new(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_at_least_twenty_models_of_torchvision_and_ten_of_timm_are_exercised():
    known = set(torchvision.models.list_models(torchvision.models))
    assert len(known & set(TORCHVISION)) == len(TORCHVISION) >= 20
    assert len([name for name in TIMM if timm.is_model(name)]) == len(TIMM) >= 10
