"""Every norm of a foreign model is swapped or listed with the reason why not."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from norms.convert import Audit, Left, Swapped, audit_norms, convert_norms
from norms.registry import equivalent, make_norm, norm_modules

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
    (nn.LayerNorm(6), "last axes"),
    (nn.LayerNorm((6, 3, 3)), "last axes"),
    (nn.RMSNorm(6), "last axes"),
    (nn.LocalResponseNorm(2), "local response"),
    (nn.LazyBatchNorm2d(), "not known before a first forward"),
    (type("FancyNorm2d", (nn.Module,), {})(), "not a norm class of torch"),
]


def name_of(value):
    return type(value).__name__ if isinstance(value, nn.Module) else ""


@pytest.mark.parametrize(("old", "shape"), SWAPPED, ids=name_of)
@pytest.mark.parametrize("mode", [True, False])
def test_a_channelwise_norm_is_swapped_in_place(old, shape, mode):
    net = nn.Sequential(nn.Identity(), copy.deepcopy(old).train(mode)).to(torch.float64)
    audit = convert_norms(net, make_norm("ln"))
    assert audit == Audit([Swapped("1", type(old).__name__, 6)], [], [("1", "ln")])
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


@pytest.mark.parametrize("build", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny"])
def test_models_of_torchvision_are_read_whole(build):
    with torch.device("meta"):
        net = getattr(torchvision.models, build)()
        before = audit_norms(net)
        assert before.ours == []
        assert {why for _, _, why in before.left if "last axes" not in why} <= {"not swapped"}
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
    assert audit.swapped == [Swapped("a", "BatchNorm2d", 4)]
    assert audit.complete


def test_norms_of_ours_and_their_parts_are_left_alone():
    ours = make_norm("bn")(4)
    ours.inner = nn.BatchNorm2d(4)
    net = nn.Sequential(ours, nn.BatchNorm2d(4))
    audit = convert_norms(net, make_norm("none"))
    assert net[0] is ours
    assert type(ours.inner) is nn.BatchNorm2d
    assert audit == Audit([Swapped("1", "BatchNorm2d", 4)], [], [("0", "bn"), ("1", "none")])


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
