"""What a caller asks of a conversion and of the new layers: norms that stay, optional inputs, the shapes of x."""

import copy
import pickle
import re

import pytest
import timm
import torch
import torchvision
from parts.convert_parts import register_own_norms, trained
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from norms.convert import Left, audit_norms, convert_norms, converted
from norms.registry import make_norm, norm_names, register


@pytest.fixture
def own_norms():
    register_own_norms()


# --- shapes -----------------------------------------------------------------------------------------------------------


class Relaxed(nn.BatchNorm2d):
    """A class with a check of its own: what it takes is not known."""

    def _check_input_dim(self, x):
        pass


AXES = [
    (nn.BatchNorm1d(8), (2, 3)),
    (nn.BatchNorm2d(8), (4,)),
    (nn.BatchNorm3d(8), (5,)),
    (nn.InstanceNorm1d(8), (3,)),
    (nn.InstanceNorm2d(8), (4,)),
    (nn.InstanceNorm3d(8), (5,)),
    (LayerNorm2d(8), (4,)),
    (FrozenBatchNorm2d(8), (4,)),
    (timm.layers.BatchNormAct2d(8), (4,)),
    (timm.layers.LayerNorm2d(8), (4,)),
    (nn.GroupNorm(2, 8), (3, 4, 5)),
    (nn.SyncBatchNorm(8), (3, 4, 5)),
    (Relaxed(8), (3, 4, 5)),
]


@pytest.mark.parametrize(("old", "axes"), AXES, ids=lambda value: type(value).__name__)
def test_a_new_layer_takes_the_numbers_of_axes_of_the_old_norm_and_refuses_all_others(old, axes):
    net, _ = converted(nn.Sequential(copy.deepcopy(old)), make_norm("bn"))
    for dim in (2, 3, 4, 5):
        x = torch.randn((8,) * dim)
        if dim in axes:
            assert net(x).shape == x.shape
        elif len(axes) < 3:
            with pytest.raises(
                ValueError, match=rf"^x must be \(N, 8.* given \(8, .*the place of {type(old).__name__}"
            ):
                net(x)


def test_one_image_is_told_how_it_gets_its_batch_axis():
    net, audit = converted(nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8)), make_norm("in"))
    message = "the place of InstanceNorm2d; x[None] gives one image its batch axis"
    with pytest.raises(ValueError, match=rf"^x must be \(N, 8, H, W\), given \(8, 8, 8\): .*{re.escape(message)}$"):
        net(torch.randn(3, 8, 8))
    (changed,) = audit.changed
    assert changed.what == "refuses one image without a batch axis, (C, H, W), which the old norm took"
    assert net(torch.randn(3, 8, 8)[None]).shape == (1, 8, 8, 8)


@pytest.mark.parametrize("name", norm_names())
def test_every_registered_norm_refuses_one_image(name):
    old = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU())
    net, _ = converted(old, make_norm(name, **{"num_groups": 8} if name == "bgn" else {}))
    with pytest.raises(ValueError, match=r"^x must be \(N, 32, H, W\), given \(32, 32, 8\)"):
        net(torch.randn(3, 32, 8))


def test_a_plugins_class_without_our_base_refuses_it_too_wherever_it_is_put():
    @register(name="bare", source="test", mixes_samples=False, keeps_stats=False)
    class Bare(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(num_channels))

        def forward(self, x):
            return x * self.scale[:, None, None]

    net, _ = converted(nn.Sequential(nn.BatchNorm2d(8)), make_norm("bare"))
    parameters, one, batch = dict(net.named_parameters()), torch.randn(8, 8, 8), torch.randn(2, 8, 8, 8)
    forwards = {
        "itself": net,
        "copy": copy.deepcopy(net),
        "average": torch.optim.swa_utils.AveragedModel(net),
        "traced": torch.fx.symbolic_trace(net),
        "compiled": torch.compile(net, backend="aot_eager", fullgraph=True),
        "functional_call": lambda x: torch.func.functional_call(net, parameters, (x,)),
    }
    for name, forward in forwards.items():
        torch.testing.assert_close(forward(batch), batch)
        if name != "traced":  # a graph without modules of ours
            with pytest.raises((ValueError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)):
                forward(one)


def test_a_pickled_layer_refuses_the_same():
    net, _ = converted(nn.Sequential(nn.BatchNorm2d(8)), make_norm("ln"))
    with pytest.raises(ValueError, match=r"^x must be \(N, 8, H, W\)"):
        pickle.loads(pickle.dumps(net))(torch.randn(8, 8, 8))  # noqa: S301


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(input=self.conv(x)))


@pytest.mark.parametrize("name", ["bn", "bn_act", "sees_weight"])
def test_a_new_layer_is_called_as_the_old_norm_was(own_norms, name):
    net = trained(ByName())
    expected = copy.deepcopy(net)
    new, _ = converted(net, make_norm(name))
    x = torch.randn(4, 3, 5, 5)
    assert new(x).shape == (4, 4, 5, 5)
    if name != "sees_weight":
        torch.testing.assert_close(new(x), expected(x), rtol=1e-4, atol=1e-5)


# --- keep -------------------------------------------------------------------------------------------------------------


def pooled(path, norm):
    return path.endswith("convs.4.2")


@pytest.mark.parametrize("keep", [["classifier.0.convs.4.2"], {"classifier.0.convs.4.2"}, pooled], ids=type)
def test_norms_that_the_caller_keeps_stay_as_they_are(keep):
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    kept = net.classifier[0].convs[4][2]
    new, audit = converted(net, make_norm("frn"), keep=keep)
    assert new.get_submodule("classifier.0.convs.4.2") is kept
    assert audit.left == audit.kept == [Left("classifier.0.convs.4.2", "BatchNorm2d", "the caller keeps it")]
    assert len(audit.swapped) == 52
    assert not audit.complete  # the norm of that place is not ours
    assert new(torch.randn(2, 3, 64, 64))["out"].shape == (2, 21, 64, 64)  # frn has no meaning on maps of 1 x 1


def test_a_norm_of_several_names_is_kept_by_one_of_them_and_others_keep_their_reasons():
    norm = nn.BatchNorm2d(4)
    net = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.BatchNorm2d(4)), "c": nn.LayerNorm(4)})
    audit = convert_norms(net, make_norm("ln"), keep=["b.0", "c"])
    assert net["a"] is net["b"][0] is norm
    assert [swapped.path for swapped in audit.swapped] == ["b.1"]
    assert [(left.path, left.why[:16]) for left in audit.left] == [("a", "the caller keeps"), ("c", "channels-last: n")]
    assert convert_norms(net, make_norm("ln"), keep=lambda path, norm: True).swapped == []


def test_an_activation_after_a_norm_that_is_kept_stays(own_norms):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    audit = convert_norms(net, make_norm("bn_act"), keep=["0"])
    assert [type(part).__name__ for part in net] == ["BatchNorm2d", "ReLU", "BatchNormAct", "Identity"]
    assert [removed.norm for removed in audit.removed] == ["2"]


BAD = [
    ({"keep": ["layer1.0.bn"]}, r'^keep: ResNet has no norm "layer1\.0\.bn"; did you mean "layer1\.0\.bn\d"\?$'),
    (
        {"keep": ["layer1"]},
        r'^keep: "layer1" is a Sequential and no norm; for all those in it.*startswith\("layer1\."\)$',
    ),
    ({"keep": ["fc"]}, r'^keep: "fc" is a Linear and no norm$'),
    ({"keep": "bn1"}, r"^keep='bn1': it takes a list of paths of norms, or a function .*such as \['bn1'\]$"),
    ({"keep": 3}, r"^keep=3: it takes a list of paths"),
    ({"keep": [1]}, r"^keep=\[1\]: it takes a list of paths"),
    ({"inputs": ["y"]}, r'^inputs: the forward of ResNet has no argument "y"; it has x$'),
    ({"inputs": "x"}, r"^inputs='x': it takes a list of names of arguments, such as \['x'\]$"),
    ({"inputs": None}, r"^inputs=None: it takes a list"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("name", ["bn", "frn"])
def test_a_mistake_in_an_option_is_one_line_and_nothing_is_changed(name, options, message):
    with torch.device("meta"):
        net = torchvision.models.resnet18()
    with pytest.raises(ValueError, match=message):
        converted(net, make_norm(name), **options)
    assert audit_norms(net).ours == []


def test_each_mistake_in_a_list_has_its_line():
    with pytest.raises(ValueError, match=r"^keep: .*\nkeep: .*$"):
        convert_norms(nn.Sequential(nn.BatchNorm2d(4)), make_norm("bn"), keep=["1", "0", "2"])


# --- optional arguments -----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Optional arguments on which the forward decides, after its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, mask=None, *, scale=1.0, mode="plain"):
        y = torch.relu(self.norm(self.conv(x)))
        if mask is not None:
            y = y * mask
        return y + x.mean() if mode == "shifted" else y * scale


def test_an_optional_argument_that_is_named_stays_an_input(own_norms):
    net = trained(Masked())
    x, mask = torch.randn(4, 3, 5, 5), torch.rand(4, 1, 5, 5)
    new, _ = converted(copy.deepcopy(net), make_norm("bn_act"), inputs=["mask", "scale"])
    for each in (new.eval(), copy.deepcopy(new)):
        for arguments, options in (
            ((x, mask), {}),
            ((x,), {"mask": mask, "scale": 2.0}),
            ((x, mask), {"mode": "plain"}),
        ):
            expected = net.eval()(*arguments, **options)
            torch.testing.assert_close(each(*arguments, **options), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"^mask=None: .*mask among its inputs, so that it has to be given$"):
            each(x)
        with pytest.raises(
            ValueError, match=r"""^mode is given 'shifted', .*its default, mode='plain'; inputs=\["mode"\]"""
        ):
            each(x, mask, mode="shifted")


def test_an_optional_argument_that_is_not_named_keeps_its_name_and_its_default(own_norms):
    net = trained(Masked())
    x = torch.randn(4, 3, 5, 5)
    new, _ = converted(copy.deepcopy(net), make_norm("bn_act"))
    expected = net.eval()(x)
    for options in ({}, {"mask": None}, {"scale": 1.0, "mode": "plain"}, {"scale": 1}):
        torch.testing.assert_close(new.eval()(x, **options), expected, rtol=1e-4, atol=1e-5)
    for options in ({"mask": torch.ones(1)}, {"scale": 2.0}, {"scale": torch.ones(1)}):
        (name,) = options
        with pytest.raises(ValueError, match=f"^{name} is given .*default, {name}="):
            new(x, **options)


def test_a_decision_on_the_value_of_an_input_is_refused(own_norms):
    with pytest.raises(ValueError, match=r"can not be traced.*control flow"):
        converted(Masked(), make_norm("bn_act"), inputs=["mode"])


def test_a_pickled_network_asks_for_its_inputs():
    new, _ = converted(Masked(), make_norm("frn"), inputs=["mask"])
    again = pickle.loads(pickle.dumps(new))  # noqa: S301
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(again(x, mask=x[:, :1]), new(x, x[:, :1]))
    for options, message in (({}, "^mask=None"), ({"mask": x[:, :1], "scale": 2.0}, "^scale is given 2.0")):
        with pytest.raises(ValueError, match=message):
            again(x, **options)


class ScaledBetween(nn.Module):
    """The activation follows the norm directly only where no scale is given."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x, scale=None):
        x = self.norm(x)
        return self.relu(x if scale is None else x * scale)


def test_an_activation_that_follows_only_without_an_argument_is_not_lost_with_it(own_norms):
    net = ScaledBetween().eval()
    with pytest.raises(ValueError, match="whose activations may be others for another scale, which can not be done in"):
        convert_norms(net, make_norm("bn_act"))
    x, scale = torch.randn(4, 4, 5, 5), torch.tensor(-1.0)
    plain, _ = converted(copy.deepcopy(net), make_norm("bn_act"))
    torch.testing.assert_close(plain(x), net(x))
    with pytest.raises(ValueError, match=r"^scale is given a Tensor"):
        plain(x, scale)
    scaled, audit = converted(copy.deepcopy(net), make_norm("bn_act"), inputs=["scale"])
    assert audit.bare == ["norm"]
    torch.testing.assert_close(scaled(x, scale), net(x, scale))
