"""Every norm of a foreign model is swapped or listed with the reason why not."""

import copy
import pickle

import pytest
import torch
import torchvision
from parts.convert_parts import register_own_norms, trained
from torch import nn
from torch.nn.utils.prune import random_unstructured
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from norms.convert import Audit, Changed, Left, Removed, Rewired, Size, Swapped, audit_norms, convert_norms, converted
from norms.protocol import equivalent, norm_modules
from norms.registry import make_norm, norm_names
from norms.running import recalibrate

SWAPPED = [
    (nn.BatchNorm1d(6), (4, 6, 5)),
    (nn.BatchNorm2d(6), (4, 6, 3, 3)),
    (nn.BatchNorm2d(6, affine=False), (4, 6, 3, 3)),
    (nn.BatchNorm3d(6, track_running_stats=False), (4, 6, 2, 2, 2)),
    (nn.SyncBatchNorm(6), (4, 6, 3, 3)),
    (nn.GroupNorm(2, 6), (4, 6, 3, 3)),
    (nn.InstanceNorm1d(6), (4, 6, 5)),
    (nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 3)),
    (nn.InstanceNorm3d(6), (4, 6, 2, 2, 2)),
    (LayerNorm2d(6), (4, 6, 3, 3)),
    (FrozenBatchNorm2d(6), (4, 6, 3, 3)),
]

LEFT = [
    (nn.LayerNorm(6), "channels-last"),
    (nn.LayerNorm((6, 3, 3)), "several last axes"),
    (nn.RMSNorm(6), "channels-last"),
    (nn.LocalResponseNorm(2), "local response"),
    (nn.LazyBatchNorm2d(), "not known before a first forward"),
    (type("FancyNorm2d", (nn.Module,), {})(), "not a norm class of torch"),
    (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(6)), "computes its weight anew"),
    (random_unstructured(nn.GroupNorm(2, 6), "bias", 0.5), "computes its bias anew"),
]


def one_image(old, path):
    """What is said of an instance norm, which took one image without a batch axis, too."""
    axes = {nn.InstanceNorm1d: "C, L", nn.InstanceNorm2d: "C, H, W", nn.InstanceNorm3d: "C, D, H, W"}.get(type(old))
    return [Changed(path, f"refuses one image without a batch axis, ({axes}), which the old norm took")] * bool(axes)


def name_of(value):
    return type(value).__name__ if isinstance(value, nn.Module) else ""


@pytest.mark.parametrize(("old", "shape"), SWAPPED, ids=name_of)
@pytest.mark.parametrize("mode", [True, False])
def test_a_channelwise_norm_is_swapped_in_place(old, shape, mode):
    net = nn.Sequential(nn.Identity(), copy.deepcopy(old).train(mode)).to(torch.float64)
    audit = convert_norms(net, make_norm("ln"))
    affine = ("weight", "bias") if getattr(old, "weight", None) is not None else ()
    constant = [Changed("1", "trains weight, bias; the old norm trained nothing")]
    changed = constant if isinstance(old, FrozenBatchNorm2d) else one_image(old, "1")
    assert audit == Audit([Swapped("1", type(old).__name__, 6, affine)], [], [("1", "ln")], changed=changed)
    assert audit.complete
    assert net[1].training is mode
    assert (net[1].weight is None) is (getattr(old, "weight", None) is None)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(net(x), nn.functional.group_norm(x, 1))


@pytest.mark.parametrize(("old", "why"), LEFT, ids=name_of)
def test_a_norm_that_can_not_be_swapped_is_listed_with_the_reason(old, why):
    net = nn.ModuleDict({"part": nn.Sequential(old)})
    audit = convert_norms(net, make_norm("bn"))
    assert net["part"][0] is old
    assert audit.swapped == audit.ours == []
    assert not audit.complete
    ((path, cls, reason),) = audit.left
    assert (path, cls) == ("part.0", type(old).__name__)
    assert why in reason


def test_channels_last_norms_are_told_apart():
    net = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm((4, 4)), nn.LocalResponseNorm(2), nn.BatchNorm2d(4))
    audit = convert_norms(net, make_norm("bn"))
    assert [left.path for left in audit.left] == ["0", "1", "2"]
    assert [left.path for left in audit.channels_last] == ["0"]


@pytest.mark.parametrize("build", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny"])
def test_models_of_torchvision_are_read_whole(build):
    with torch.device("meta"):
        net = getattr(torchvision.models, build)()
        before = audit_norms(net)
        assert before.ours == []
        assert {why for _, _, why in before.left if "channels-last" not in why} <= {"not swapped"}
        audit = convert_norms(net, make_norm("gn", num_groups=1))
        y = net(torch.empty(2, 3, 64, 64))
    assert y.shape == (2, 1000)
    assert len(audit.swapped) == len(audit.ours) == len(before.left) - len(audit.left) > 4
    # ConvNeXt's blocks normalize the last axis of a permuted tensor
    assert audit.complete is (build != "convnext_tiny")
    assert {left.old for left in audit.left} <= {"LayerNorm"}
    assert audit_norms(net) == Audit([], audit.left, audit.ours)
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))


def test_a_converted_model_is_the_model_built_with_the_factory():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3)
    convert_norms(net, make_norm("gn", num_groups=8))
    torch.manual_seed(0)
    built = torchvision.models.resnet18(num_classes=3, norm_layer=make_norm("gn", num_groups=8))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), built(x))


def test_a_shared_norm_stays_shared():
    norm = nn.BatchNorm2d(4)
    net = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    audit = convert_norms(net, make_norm("bn"))
    assert net["a"] is net["b"][0]
    assert net["a"] is not norm
    assert [(s.path, s.old, s.num_channels) for s in audit.swapped] == [("a", "BatchNorm2d", 4)]
    assert audit.complete


def test_norms_of_ours_and_their_parts_are_left_alone():
    ours = make_norm("bn")(4)
    ours.inner = nn.BatchNorm2d(4)
    net = nn.Sequential(ours, nn.BatchNorm2d(4))
    audit = convert_norms(net, make_norm("none"))
    assert net[0] is ours
    assert type(ours.inner) is nn.BatchNorm2d
    assert audit == Audit([Swapped("1", "BatchNorm2d", 4, ("weight", "bias"))], [], [("0", "bn"), ("1", "none")])


def test_a_layer_that_refuses_leaves_the_model_unchanged_and_is_named():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(6)))
    before = list(net.modules())
    with pytest.raises(ValueError, match=r"1\.0 \(BatchNorm2d\): .*num_groups=4.*allowed: 1, 2, 3, 6"):
        convert_norms(net, make_norm("gn", num_groups=4))
    assert list(net.modules()) == before


def test_what_can_not_be_converted_is_refused():
    with pytest.raises(ValueError, match="wrap it"):
        convert_norms(nn.BatchNorm2d(4), make_norm("bn"))
    with pytest.raises(ValueError, match="make_norm"):
        convert_norms(nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d)


def test_a_norm_at_the_root_is_seen():
    assert audit_norms(nn.BatchNorm2d(4)).left == [Left("", "BatchNorm2d", "not swapped")]
    assert audit_norms(make_norm("bn")(4)).ours == [("", "bn")]


def test_equivalent_names_another_norm_only_if_every_layer_is_that_norm():
    bgn = make_norm("bgn", num_groups=8)
    assert equivalent(nn.Sequential(bgn(8), bgn(8))) == "bn"
    assert equivalent(nn.Sequential(bgn(8), bgn(16))) is None
    assert equivalent(nn.Sequential(make_norm("bn")(8))) is None
    assert equivalent(nn.Sequential(nn.Conv2d(3, 3, 1))) is None
    assert len(list(norm_modules(nn.Sequential(bgn(8), bgn(16))))) == 2


# --- what is carried over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "name", "options"),
    [
        (nn.BatchNorm2d(6, eps=1e-2, momentum=0.3), "bn", {}),
        (nn.BatchNorm2d(6, eps=1e-2, momentum=0.3, affine=False), "bn", {}),
        (nn.BatchNorm2d(6, eps=1e-2, momentum=None), "bgn", {"num_groups": 6}),
        (nn.SyncBatchNorm(6, eps=1e-2), "bn", {}),
        (FrozenBatchNorm2d(6, eps=1e-2), "bn", {}),
        (nn.GroupNorm(3, 6, eps=1e-2), "gn", {"num_groups": 3}),
        (nn.GroupNorm(1, 6, eps=1e-2), "ln", {}),
        (nn.GroupNorm(6, 6, eps=1e-2), "in", {}),
        (nn.InstanceNorm2d(6, eps=1e-2, affine=True), "in", {}),
        (nn.InstanceNorm2d(6, eps=1e-2), "gn", {"num_groups": 6}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_same_norm_is_the_same_function_and_trains_alike(old, name, options):
    net = trained(nn.Sequential(copy.deepcopy(old))).double()
    new = copy.deepcopy(net)
    (swapped,) = convert_norms(new, make_norm(name, **options)).swapped
    assert "eps" in swapped.carried
    x = 2 * torch.randn(4, 6, 5, 5, dtype=torch.float64) + 1
    # a frozen norm does not train as a learned one does, and torch's synchronized one not on the CPU
    if not isinstance(old, FrozenBatchNorm2d | nn.SyncBatchNorm):
        assert torch.allclose(net(x), new(x), rtol=1e-9)
        if isinstance(old, nn.BatchNorm2d):
            assert all(torch.allclose(t, new[0].get_buffer(n)) for n, t in net[0].named_buffers())
    assert torch.allclose(net.eval()(x), new.eval()(x), rtol=1e-9)


@pytest.mark.parametrize(
    ("old", "name", "options", "carried"),
    [
        (nn.BatchNorm2d(6, eps=1e-2), "gn", {"num_groups": 3}, "weight bias"),
        (nn.BatchNorm2d(6, eps=1e-2), "bgn", {"num_groups": 3}, "weight bias"),
        (nn.BatchNorm2d(6, track_running_stats=False), "bn", {}, "weight bias"),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), "bn", {}, "weight bias"),
        (nn.InstanceNorm2d(6, track_running_stats=True), "in", {}, ""),
        (nn.GroupNorm(2, 6), "gn", {"num_groups": 3}, "weight bias"),
        (LayerNorm2d(6), "pn", {}, "weight bias"),
        (nn.BatchNorm2d(6), "dsbn", {}, ""),
        (FrozenBatchNorm2d(6), "bn", {}, "weight bias running_mean running_var eps"),
        (nn.BatchNorm2d(6), "bn", {"eps": 0.5}, "weight bias running_mean running_var num_batches_tracked momentum"),
        (nn.BatchNorm2d(6), "fake_memory", {}, "weight bias"),
        (nn.BatchNorm2d(6), "fake_alike", {}, "weight bias running_mean running_var num_batches_tracked"),
    ],
)
def test_nothing_is_carried_over_that_means_something_else(own_norms, old, name, options, carried):
    net = trained(nn.Sequential(copy.deepcopy(old)))
    before = copy.deepcopy(net[0])
    (swapped,) = convert_norms(net, make_norm(name, **options)).swapped
    assert swapped.carried == tuple(carried.split())
    fresh = make_norm(name, **options)(6)
    for key in ("weight", "bias", "running_mean", "running_var", "eps"):
        if hasattr(fresh, key) and getattr(net[0], key) is not None:
            expected, found = getattr(before if key in swapped.carried else fresh, key), getattr(net[0], key)
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), key


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float64"), ("cpu", "bfloat16"), ("meta", "float32")])
@pytest.mark.parametrize("name", norm_names())
def test_a_new_layer_has_the_mode_device_and_dtype_of_the_old_norm(name, device, dtype):
    dtype = getattr(torch, dtype)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32))
    net.to(device, dtype)[1].eval()
    new, _ = converted(net, make_norm(name, **{"num_groups": 8} if name == "bgn" else {}))
    for path, mode in (("1", False), ("4", True)):
        layer = new.get_submodule(path)
        assert layer.norm_info.name == name
        assert {part.training for part in layer.modules()} == {mode}
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} <= {device}
        assert {p.dtype for p in layer.parameters()} <= {dtype}
        statistics = {b.dtype for b in layer.buffers() if b.is_floating_point()}
        assert statistics <= {torch.promote_types(dtype, torch.float32)}


# --- what changes beyond the norms ------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two norms with one weight, which a third holder has, too; and each a bias of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.b.weight = self.scale = self.a.weight

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(self.conv(x))))) * self.scale[:, None, None]


@pytest.mark.parametrize(("name", "options"), [("bn", {}), ("gn", {"num_groups": 2}), ("bn_act", {}), ("holds_bn", {})])
def test_tied_affines_stay_tied(own_norms, name, options):
    net = trained(Tied())
    old = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # of before the swap: it holds the same parameters
    new, audit = converted(net, make_norm(name, **options))
    assert all({"weight", "bias"} <= set(swapped.carried) for swapped in audit.swapped)
    assert audit.changed == []
    x = torch.randn(4, 3, 5, 5)
    if name != "gn":
        assert torch.allclose(new(x), old(x), atol=1e-5)
    for each in (new, copy.deepcopy(new)):
        assert each.a.weight is each.b.weight is each.scale
        assert each.a.bias is not each.b.bias
    new(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(new.scale, old.scale)
    assert not torch.equal(new.a.bias, old.a.bias)


def test_tied_affines_that_can_not_stay_tied_are_named():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.LayerNorm(4))
    net[1].weight, net[3].bias = net[0].weight, net[2].bias
    kept = copy.deepcopy(net)
    untied = "is untied: the old norm shared {} with other modules"
    audit = convert_norms(net, make_norm("dsbn"))  # weight and bias of each domain
    assert [changed for changed in audit.changed if "untied" in changed.what] == [
        *(Changed("0", untied.format("weight")), Changed("1", untied.format("weight"))),
        Changed("2", untied.format("bias")),
    ]
    assert convert_norms(kept, make_norm("ln")).changed == []
    assert kept[0].weight is kept[1].weight
    assert kept[3].bias is kept[2].bias  # a norm that is left


def test_frozen_parameters_stay_frozen():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    net[0].requires_grad_(False)
    audit = convert_norms(net, make_norm("gn", num_groups=2))
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    assert audit.changed == []


def frozen(norm, *names):
    for name in names:
        norm.get_parameter(name).requires_grad_(False)
    return norm


GATES = "trains gate_weight, gate_bias; the old norm trained "


@pytest.mark.parametrize(
    ("old", "name", "expected"),
    [
        (frozen(nn.BatchNorm2d(4), "weight", "bias"), "iebn", GATES + "nothing"),
        (frozen(nn.BatchNorm2d(4), "bias"), "iebn", GATES + "only weight"),
        (nn.BatchNorm2d(4, affine=False), "iebn", GATES + "nothing"),
        (nn.BatchNorm2d(4), "iebn", None),  # a norm's own parameters, in a network that trains
        (frozen(nn.BatchNorm2d(4), "weight", "bias"), "bn", None),
        (nn.BatchNorm2d(4, affine=False), "bn", None),
        (frozen(nn.BatchNorm2d(4), "weight", "bias"), "dsbn", "trains weight, bias; the old norm trained nothing"),
        (frozen(LayerNorm2d(4, bias=False), "weight"), "ln", "trains bias; the old norm trained nothing"),
        (FrozenBatchNorm2d(4), "gn", "trains weight, bias; the old norm trained nothing"),
    ],
)
def test_what_trains_where_the_old_norm_did_not_is_named(old, name, expected):
    net = nn.Sequential(copy.deepcopy(old))
    audit = convert_norms(net, make_norm(name, **{"num_groups": 2} if name == "gn" else {}))
    assert [what for _, what in audit.changed if what.startswith("trains")] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("old", "name", "options", "fresh"),
    [
        (nn.BatchNorm2d(4), "bn", {}, False),
        (nn.BatchNorm2d(4), "bgn", {"num_groups": 4}, False),
        (nn.BatchNorm2d(4), "bgn", {"num_groups": 2}, True),
        (nn.BatchNorm2d(4), "dsbn", {}, True),
        (nn.BatchNorm2d(4), "gn", {"num_groups": 2}, False),
        (nn.GroupNorm(2, 4), "bn", {}, True),
        (nn.InstanceNorm2d(4, track_running_stats=True), "bn", {}, True),  # per sample, then averaged
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_layer_that_starts_without_statistics_is_named(old, name, options, fresh):
    audit = convert_norms(nn.Sequential(copy.deepcopy(old)), make_norm(name, **options))
    expected = Changed("0", "starts without running statistics: train or recalibrate before evaluating")
    assert audit.changed == [expected] * fresh + one_image(old, "0")


def test_a_batch_norm_that_keeps_no_statistics_is_swapped_and_its_new_way_to_evaluate_named():
    net = trained(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))).eval()
    new = copy.deepcopy(net)
    (changed,) = convert_norms(new, make_norm("bn")).changed
    assert changed.norm == "0"
    assert changed.what.startswith("starts without running statistics: train or recalibrate")
    assert changed.what.endswith("the old norm evaluated with those of its batch")
    assert convert_norms(copy.deepcopy(net), make_norm("ln")).changed == []  # evaluates with no batch's, by its meaning
    # what the words say is so: another function until it is recalibrated, then that of the batch
    x = 3 * torch.randn(16, 4, 8, 8) + 2
    assert torch.allclose(new.train()(x), net(x), atol=1e-5)
    new[0].reset_running_stats()
    assert (new.eval()(x) - net(x)).abs().max() > 1
    recalibrate(new, [x])
    assert torch.allclose(new(x), net(x), atol=0.05)


def test_constant_statistics_that_become_running_ones_are_named():
    net = trained(nn.Sequential(FrozenBatchNorm2d(4)))
    x = torch.randn(8, 4, 5, 5)
    before = [net.train(mode)(x) for mode in (False, True)]
    audit = convert_norms(net, make_norm("bn"))
    assert [what for _, what in audit.changed][1:] == [
        "normalizes with its batch's statistics in training; those of the old norm were constant"
    ]
    assert torch.allclose(net.eval()(x), before[0], atol=1e-5)
    assert not torch.allclose(net.train()(x), before[1], atol=0.1)


@pytest.mark.parametrize(
    "hook",
    [
        lambda norm: norm.register_forward_hook(lambda module, x, y: y * 2),
        lambda norm: norm.register_forward_pre_hook(lambda module, x: None),
        lambda norm: norm.register_full_backward_hook(lambda module, x, y: None),
        lambda norm: norm.register_full_backward_pre_hook(lambda module, y: None),
    ],
)
def test_lost_hooks_are_named(hook):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    hook(net[1])
    assert convert_norms(net, make_norm("bn")).changed == [Changed("1", "lost the hooks of the old norm")]


def test_a_bias_without_a_weight_is_carried_over():
    net = trained(nn.Sequential(nn.BatchNorm2d(4))).eval()
    net[0].weight = None
    new = copy.deepcopy(net)
    assert "bias" in convert_norms(new, make_norm("bn")).swapped[0].carried
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(new(x), net(x), atol=1e-6)


# --- norms of timm, by their structure --------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """As timm's: the norm itself applies what follows."""

    def __init__(self, channels, act, drop=None):
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNormAct2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-2
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 1)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize(
    "old",
    [NormAct(4, nn.SiLU(inplace=True)), NormAct(4, nn.Identity()), NormAct(4, nn.Sigmoid()), FrozenBatchNormAct2d(4)],
    ids=["silu", "identity", "sigmoid", "frozen"],
)
@pytest.mark.parametrize("name", ["bn", "bn_act"])
def test_a_norm_with_its_own_activation_keeps_the_function(own_norms, old, name):
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 1), copy.deepcopy(old), nn.Identity(), nn.ReLU())).eval()
    new, audit = converted(copy.deepcopy(net), make_norm(name))
    assert audit.complete
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(new(x), net(x), atol=1e-6)
    inside = [] if name == "bn" or isinstance(old.act, nn.Sigmoid) else [f"1.act ({type(old.act).__name__})"]
    # what follows a norm that ends in a gate is not the norm's; a norm without an activation of its own has the next
    expected = [r for r in inside if "Identity" not in r] or (["3 (ReLU)"] if inside else [])
    assert audit.removed == [Removed(activation, "1") for activation in expected]


def test_a_class_that_is_named_as_a_frozen_norm_and_holds_what_one_holds_is_swapped():
    class FrozenBatchNorm(FrozenBatchNormAct2d):
        def __init__(self, channels):
            super().__init__(channels)
            del self.drop, self.act

        def forward(self, x):
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )

    net = nn.Sequential(FrozenBatchNorm(4)).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = net(x)
    assert convert_norms(net, make_norm("bn")).complete
    assert torch.allclose(net.eval()(x), expected, atol=1e-6)


def test_a_dropout_inside_a_norm_stays_between_norm_and_activation(own_norms):
    net = nn.Sequential(NormAct(4, nn.ReLU(), nn.Dropout(0.5)))
    for name in ("bn", "bn_act"):
        new, audit = converted(copy.deepcopy(net), make_norm(name))
        assert audit.removed == []
        assert [type(part).__name__ for part in new[0].children()][1:] == ["Dropout", "ReLU"]


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_norms():
    register_own_norms()


class Block(nn.Module):
    """Activations of every kind: a function, a method, a module used twice, one after a sum, one after a fork."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.relu = nn.ReLU(inplace=True)
        self.silu = nn.Sequential(nn.Identity(), nn.SiLU())

    def forward(self, x):
        c, n = self.convs, self.norms
        a = nn.functional.leaky_relu(n[0](c[0](x)), 0.3)
        b = n[1](c[1](a)).relu()
        d = self.relu(n[2](c[2](b)))
        e = self.silu(n[3](c[3](d)))
        f = n[4](c[4](e))
        g = torch.sigmoid(n[5](c[5](f)))
        return self.relu(f + e) * torch.relu(f) * g


def test_exactly_the_directly_following_activations_are_removed_and_the_function_stays(own_norms):
    net = trained(Block())
    new, audit = converted(copy.deepcopy(net), make_norm("bn_act"))
    assert audit.removed == [
        Removed("leaky_relu", "norms.0"),
        Removed("relu", "norms.1"),
        Removed("relu (ReLU)", "norms.2"),
        Removed("silu.1 (SiLU)", "norms.3"),
    ]
    brought = [str(norm.activation) for _, norm in norm_modules(new)]
    assert brought == ["LeakyReLU(negative_slope=0.3)", "ReLU()", "ReLU()", "SiLU()", "None", "None"]
    assert isinstance(new, torch.fx.GraphModule)
    assert new.state_dict().keys() == net.state_dict().keys()
    x = torch.randn(4, 4, 5, 5)
    for mode in (True, False):
        assert torch.allclose(new.train(mode)(x), net.train(mode)(x), atol=1e-5)


def test_activations_that_are_modules_of_their_own_are_removed_in_place(own_norms):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    expected = copy.deepcopy(net)
    audit = convert_norms(net, make_norm("bn_act"))
    assert audit.removed == [Removed("2 (ReLU)", "1")]
    assert [type(part).__name__ for part in net] == ["Conv2d", "BatchNormAct", "Identity", "BatchNormAct"]
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(net(x), expected(x), atol=1e-6)


def test_a_shared_norm_brings_the_activation_only_if_it_follows_everywhere(own_norms):
    class Shared(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.norm, self.first, self.second = nn.BatchNorm2d(4), nn.ReLU(), second

        def forward(self, x):
            return self.second(self.norm(self.first(self.norm(x))))

    for second, removed in ((nn.ReLU(), 2), (nn.SiLU(), 0), (nn.Identity(), 0)):
        net = Shared(second).eval()
        new, audit = converted(copy.deepcopy(net), make_norm("bn_act"))
        assert len(audit.removed) == removed
        x = torch.randn(2, 4, 3, 3)
        assert torch.allclose(new(x), net(x), atol=1e-6)


class ByMode(nn.Module):
    """Another graph in each mode, and a part that only one of them uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.extra, self.unused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Linear(2, 2)

    def forward(self, x, scale=None):
        x = nn.functional.relu(self.norm(self.conv(x)))
        if self.training:
            x = nn.functional.relu(self.extra(x))
        return x if scale is None else x * scale


def test_a_forward_that_asks_for_the_mode_keeps_both(own_norms):
    for mode in (True, False):
        net = trained(ByMode()).train(mode)
        net.extra.eval()
        net.norm.train(not mode)
        new, audit = converted(copy.deepcopy(net), make_norm("bn_act"))
        assert len(audit.removed) == 2
        for each in (new, copy.deepcopy(new)):
            assert all(each.get_submodule(path).training is part.training for path, part in net.named_modules())
        assert new.state_dict().keys() == net.state_dict().keys()
        x = torch.randn(4, 3, 5, 5)
        for again in (True, False, True):
            assert torch.allclose(new.train(again)(x), net.train(again)(x), atol=1e-5)
            clone = copy.deepcopy(new)
            assert torch.allclose(clone(x), copy.deepcopy(net)(x), atol=1e-5)
            assert {path: part.training for path, part in clone.named_modules()} == {
                path: part.training for path, part in new.named_modules()
            }
            assert clone.state_dict().keys() == net.state_dict().keys()
        with pytest.raises(TypeError, match="state_dict"):
            pickle.dumps(new)


@pytest.mark.parametrize("mode", [True, False])
def test_a_network_of_two_graphs_inside_another_is_read_and_stays_in_its_mode(own_norms, mode):
    part, _ = converted(trained(ByMode()), make_norm("bn_act"))
    net = nn.Sequential(part, nn.BatchNorm2d(4)).train(mode)
    expected = copy.deepcopy(net)
    assert converted(net, make_norm("bn_act"))[0] is net
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(net(x), expected(x), atol=1e-5)


class Unasked(nn.Module):
    """State that no forward asks for, under every kind of name: of the root, of a part, a second one, of no record."""

    def __init__(self, dual):
        super().__init__()
        self.dual = dual
        self.part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.part.extra = nn.Parameter(torch.ones(3))
        self.part.register_buffer("kept", torch.ones(2))
        self.part.register_buffer("fleeting", torch.ones(2), persistent=False)
        self.unused, self.conv, self.again = nn.Linear(2, 2), self.part[0], nn.ModuleList([self.part[1]])
        self.alias = self.part[0].weight
        self.register_buffer("none", None)

    def forward(self, x):
        x = torch.relu(self.part(x))
        return x + 1 if self.dual and self.training else x


@pytest.mark.parametrize("dual", [False, True])
def test_a_rewritten_forward_keeps_every_name_of_the_state(own_norms, dual):
    net = Unasked(dual)
    new, _ = converted(copy.deepcopy(net), make_norm("bn_act"))
    assert isinstance(new, torch.fx.GraphModule)
    for rewritten in (new, copy.deepcopy(new)):
        assert rewritten.state_dict().keys() == net.state_dict().keys()
        assert {name for name, _ in rewritten.named_buffers()} == {name for name, _ in net.named_buffers()}
        assert rewritten.alias is rewritten.conv.weight is rewritten.part.get_submodule("0").weight
        assert rewritten.get_submodule("again.0") is rewritten.get_submodule("part.1")


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x).relu() if x.sum() > 0 else x


def test_what_can_not_be_followed_is_refused_and_nothing_changed(own_norms):
    net = nn.Sequential(Asks()).eval()
    with pytest.raises(ValueError, match=r"Sequential can not be traced by torch\.fx.*control flow"):
        converted(net, make_norm("bn_act"))
    block = Block()
    with pytest.raises(ValueError, match=r'norm "bn_act" changes the forward of Block.*converted'):
        convert_norms(block, make_norm("bn_act"))
    assert type(net[0].norm) is nn.BatchNorm2d
    assert not net[0].norm.training
    assert {type(norm) for norm in block.norms} == {nn.BatchNorm2d}
    assert converted(net, make_norm("gn", num_groups=2))[0] is net  # nothing has to be known of what surrounds it


# --- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [{"padding": 1}, {"padding": 1, "padding_mode": "circular", "bias": False}])
@pytest.mark.parametrize("between", [nn.Identity(), None])
def test_the_norm_is_given_the_weight_that_made_its_input(own_norms, padding, between):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, **padding), between or nn.Identity(), nn.BatchNorm2d(4), nn.ReLU())
    new, audit = converted(copy.deepcopy(net), make_norm("sees_weight"))
    assert audit.rewired == [Rewired("0", "2", "passed")]
    assert new.state_dict().keys() == net.state_dict().keys()
    x = torch.randn(4, 3, 5, 5)
    weight = net[0].weight
    expected = torch.relu(net[:3](x) + weight.sum((1, 2, 3))[:, None, None])
    assert torch.allclose(new(x), expected, atol=1e-5)
    (new(x).square().sum()).backward()
    expected.square().sum().backward()
    assert torch.allclose(new.get_parameter("0.weight").grad, weight.grad, atol=1e-3)


@pytest.mark.parametrize("name", ["sees_weight", "doubles"])
def test_a_copy_works_with_its_own_weight(own_norms, name):
    new, _ = converted(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), make_norm(name))
    x = torch.randn(4, 3, 5, 5)
    clone = copy.deepcopy(new)
    with torch.no_grad():
        clone.get_parameter("0.weight").fill_(3)
        clone.get_parameter("0.bias").fill_(0)
    y = clone(x)
    new.load_state_dict(clone.state_dict())
    assert torch.allclose(new(x), y, atol=1e-6)
    expected = 6 * x.sum(1, keepdim=True).expand(-1, 4, -1, -1) if name == "doubles" else None
    assert expected is None or torch.allclose(y, expected, atol=1e-4)


def test_a_pickled_network_still_transforms_the_weight_that_it_has(own_norms):
    new, _ = converted(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), make_norm("doubles"))
    again = pickle.loads(pickle.dumps(new))  # noqa: S301
    with torch.no_grad():
        again.get_parameter("0.weight").fill_(3)
    assert again(torch.ones(1, 3, 2, 2)).unique().tolist() == [18]


def test_a_weight_is_transformed_only_before_a_norm(own_norms):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in "abc")
            self.one, self.two, self.three = (nn.BatchNorm2d(4) for _ in "abc")

        def forward(self, x):
            x = self.one(self.a(x))
            y = self.b(x)
            return self.two(y) + y + self.three(self.c(x).relu())  # y goes to two places, and relu is no convolution

    net = Net()
    literal = copy.deepcopy(net)
    with torch.no_grad():
        literal.a.weight.mul_(2)
    convert_norms(literal, make_norm("doubles_not"))
    new, audit = converted(net, make_norm("doubles"))
    assert audit.rewired == [Rewired("a", "one", "transformed")]
    assert audit.plain == ["two", "three"]
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(new(x), literal(x), atol=1e-5)


def test_a_norm_that_finds_no_convolution_of_its_own_is_refused_by_its_path(own_norms):
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    def two_places():
        conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        return nn.Sequential(conv, norm, conv, norm)

    for net, message in (
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), r"; 2 \(BatchNorm2d\) has no convolution"),
        (nn.Sequential(Padded(3, 4, 1), nn.BatchNorm2d(4)), "; 1 follows 0, a Padded"),
        (two_places(), "called in several places"),
    ):
        with pytest.raises(ValueError, match=f'norm "sees_weight" needs the weight.*{message}'):
            converted(net, make_norm("sees_weight"))
        assert isinstance(net[-1], nn.BatchNorm2d)


def test_the_audit_counts_elements_before_and_after():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(7))
    audit = convert_norms(net, make_norm("gn", num_groups=2))
    assert audit.before == Size(16 + 8 + 14, 9, 22, 9)
    assert audit.after == Size(16 + 8 + 14, 0, 22, 0)


class ReluOf(nn.Module):
    """A norm whose output goes through a ReLU, called in the way that `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.how == "function":
            return torch.relu(input=y)
        if self.how == "module":
            return self.relu(input=y)
        nn.functional.relu_(y)  # its value is not used: nothing that follows is seen to take the activation's output
        return y


@pytest.mark.parametrize(("how", "found"), [("function", True), ("module", True), ("unassigned", False)])
def test_an_activation_that_takes_its_input_by_name_is_found_and_one_that_is_not_is_said(how, found):
    net, audit = converted(ReluOf(how), make_norm("frn"))
    assert [removed.norm for removed in audit.removed] == ["norm"] * found
    assert audit.bare == ["norm"] * (not found)
    assert net(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("norm", ["ws_bn", "mabn", "cbn"])
@pytest.mark.parametrize(
    "wrapped",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=["weight", "spectral"],
)
def test_a_weight_that_each_forward_computes_anew_is_refused_by_norms_that_work_on_it(norm, wrapped):
    net = nn.Sequential(wrapped(nn.Conv2d(3, 4, 3, bias=False)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=rf'norm "{norm}" works with the weight .*that of 0 is computed anew'):
        converted(net, make_norm(norm))
    audit = converted(net, make_norm("bn"))[1]
    assert [swapped.path for swapped in audit.swapped] == ["1"]
    assert audit.complete  # what normalizes a weight is none of the norms


def test_a_norm_without_a_tensor_of_its_own_is_replaced_where_the_network_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.InstanceNorm2d(4))).double()
    layer = converted(net, make_norm("bn"))[0][1][0]
    assert {t.dtype for t in layer.buffers() if t.is_floating_point()} == {torch.float64}
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)).to("meta")
    assert all(t.is_meta for t in converted(net, make_norm("sn"))[0].state_dict().values())


class KeepsItsInput(nn.Module):
    """What an activation in place does to the tensor that the shortcut takes is part of the function."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv, self.norm = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x * 1
        return self.norm(self.conv(self.relu(x))) + x


def test_an_activation_in_place_stays_one():
    net = KeepsItsInput().eval()
    x = torch.randn(2, 4, 5, 5)
    expected = net(x)
    torch.testing.assert_close(converted(net, make_norm("bn"))[0](x), expected)
