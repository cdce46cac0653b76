"""Backbones, each taking a NormFactory, and the one place that pairs convolution, norm and activation.

`resnet8` ... `resnet110`: the CIFAR ResNets of He et al. 2015 (arXiv:1512.03385, section 4.2): 6n+2 layers, three
stages 16-32-64 wide, shortcuts without parameters (option A: every second pixel, missing channels zero).
`resnet18_narrow`: ResNet-18's four stages of two blocks, 16-32-64-128 wide, with a 3x3 stem of stride 2 and projection
shortcuts; at 32x32 its last maps are 2x2.
`resnet18_cifar`: the same with a stem of stride 1 and 64-128-256-512 channels (11,173,962 parameters for 10 classes),
as adversarial training on CIFAR-10 uses it.
`resnet18`, `resnet50`, ...: torchvision's constructors through `norm_layer`.

Differences from the papers: no activation works in place (a norm may need its output for the backward pass), and
initial weights are drawn by parameter name, so that they are the same whatever the norm.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory, NormInfo, factory_info, forked_generators, nearest, norm_modules

CIFAR_DEPTHS = {f"resnet{depth}": (depth - 2) // 6 for depth in (8, 20, 32, 44, 56, 110)}
TORCHVISION = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
)
MODELS = (*CIFAR_DEPTHS, "resnet18_narrow", "resnet18_cifar", *TORCHVISION)
BASE_WIDTH = 16
"""Channels of the first stage of our own nets where no width is given; of resnet18_cifar 64."""


class ConvNormAct(nn.Module):
    """activation(norm(conv(x))): x (N, C_in, H, W) -> (N, C_out, H', W'). Build it with `conv_norm_act`.

    The convolution's weight first goes through `norm.transform_weight` where the norm has one, and reaches the norm as
    `norm(y, weight=w)` where its info says so. It is passed by call and never stored: a cloned network would see the
    stale one.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module | None):
        super().__init__()
        info = norm.norm_info
        assert isinstance(info, NormInfo)
        self.conv, self.norm = conv, norm
        self.activation = None if "activation" in info.needs else activation
        self._passes_weight = "conv_weight" in info.needs
        self._transforms_weight = hasattr(norm, "transform_weight")

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.conv.weight
        if self._transforms_weight:
            weight = self.norm.transform_weight(weight)  # type: ignore[operator]
        y = self.convolve(x, weight)
        y = self.norm(y, weight=weight) if self._passes_weight else self.norm(y)
        return y if self.activation is None else self.activation(y)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x with `weight`, which is its own or what the norm made of it."""
        conv = self.conv
        if weight is conv.weight:
            return conv(x)  # as a module, so that hooks see it
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    *,
    norm: NormFactory,
    activation: nn.Module | None,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    affine: bool = True,
    device: torch.device | str | None = None,
) -> ConvNormAct:
    """A convolution without bias, its norm, and the activation that directly follows.

    Args:
        in_channels: C_in.
        out_channels: C_out, the channels that the norm sees.
        kernel: side of the square kernel.
        stride: of the convolution.
        norm: a factory from `make_norm`. One that fuses the activation is built with it and no other is applied.
        activation: None where none follows directly (the last norm of a residual block).
        padding: None keeps the size at stride 1.
        dilation: of the convolution.
        groups: of the convolution.
        affine: handed to the norm.
        device: of all parameters and buffers.

    Raises:
        ValueError: what the norm refuses, a missing activation included.
    """
    if padding is None:
        padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False, device=device)
    fused = activation if "activation" in factory_info(norm).needs else None
    layer = norm(out_channels, affine=affine, device=device, activation=fused)
    if hasattr(layer, "make_room"):
        layer.make_room(conv.weight)  # type: ignore[operator]
    return ConvNormAct(conv, layer, activation)


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, and zeros for the channels that x has not.

    x: (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        missing = out_channels - in_channels
        self.stride, self.pad = stride, (missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)): (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        norm: NormFactory,
        projection: bool,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.first = conv_norm_act(in_channels, out_channels, 3, stride, norm=norm, activation=nn.ReLU(), device=device)
        self.second = conv_norm_act(out_channels, out_channels, 3, norm=norm, activation=None, device=device)
        self.shortcut: nn.Module
        if same:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = conv_norm_act(
                in_channels, out_channels, 1, stride, norm=norm, activation=None, device=device
            )
        else:
            self.shortcut = PadShortcut(in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.second.norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: (N, C, H, W) -> logits (N, K).

    Args:
        blocks: blocks per stage.
        widths: channels per stage.
        norm: a factory from `make_norm`.
        in_channels: C.
        num_classes: K.
        stem_stride: stride of the 3x3 stem; stages after the first begin with stride 2.
        projection: shortcuts that change the shape are a 1x1 convolution with its norm; else `PadShortcut`.
        device: of all parameters and buffers.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        norm: NormFactory,
        in_channels: int,
        num_classes: int,
        stem_stride: int = 1,
        projection: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.stem = conv_norm_act(
            in_channels, widths[0], 3, stem_stride, norm=norm, activation=nn.ReLU(), device=device
        )
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(channels, width, stride, norm=norm, projection=projection, device=device))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build_net(
    model: str,
    norm: NormFactory,
    *,
    num_classes: int,
    in_channels: int,
    width: int | None = None,
    zero_init_last_gamma: bool = False,
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> nn.Module:
    """A backbone whose every norm comes from `norm`, in training mode.

    Args:
        model: one of MODELS.
        norm: a factory from `make_norm`.
        num_classes: K, the width of the logits.
        in_channels: channels of the images; torchvision's first convolution is replaced where it expects others.
        width: channels of the first stage of our own nets (None: 16, of resnet18_cifar 64); torchvision's have no such
            option.
        zero_init_last_gamma: start with `weight` = 0 in the last norm of every residual block.
        device: where it is built; on "meta" nothing is initialized.
        generator: purpose -> CPU generator (RunContext.generator); the parameter at `path` is drawn from
            generator("weights/<path>"). None leaves the constructor's own weights.

    Raises:
        ValueError: unknown model, a width for a torchvision model, what the norm refuses, a norm that needs what
            torchvision's models do not pass, or no last gamma to set to zero.
    """
    check_model(model, width)
    device = torch.device(device)
    # The constructors' own draws are overwritten by name below; they must not move the caller's stream.
    with forked_generators(device):
        if model in TORCHVISION:
            net = _torchvision_net(model, norm, num_classes, in_channels, device)
        else:
            net = _own_net(model, norm, num_classes, in_channels, width, device)
    if generator is not None and device.type != "meta":
        initialize(net, generator)
    if zero_init_last_gamma:
        _zero_last_gammas(net, model)
    return net


def without_head(net: nn.Module) -> int:
    """Replace a backbone's last linear layer, which gives the logits, by the identity: (N, C, H, W) -> features (N, F).

    Returns F.
    """
    name, head = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    return head.in_features


def check_model(model: str, width: int | None = None) -> None:
    """ValueError for an unknown model (with the nearest), or a width where the model has none."""
    if model not in MODELS:
        raise ValueError(f'unknown model "{model}"; models: {", ".join(MODELS)}{nearest(model, MODELS)}')
    if width is not None and model in TORCHVISION:
        raise ValueError(f'model "{model}" is torchvision\'s and has no width option; leave width unset')
    if width is not None and width < 1:
        raise ValueError(f"width={width}: at least 1 is needed")


@torch.no_grad()
def initialize(net: nn.Module, generator: Callable[[str], torch.Generator]) -> None:
    """Draw every convolution's and linear layer's weight from a CPU generator named by the parameter's path.

    Convolutions: He et al. 2015, normal with variance 2 / fan_out; linear layers: uniform within 1 / sqrt(fan_in);
    their biases are zero. Norms and all other parameters keep what their constructors gave them.
    """
    inside_norms = {id(part) for _, norm in norm_modules(net) for part in norm.modules()}
    for name, module in net.named_modules():
        if id(module) in inside_norms or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight
        draw = torch.empty(weight.shape, dtype=torch.float32)
        if isinstance(module, nn.Conv2d):
            fan_out = weight.shape[0] * weight[0, 0].numel() // module.groups
            draw.normal_(0, math.sqrt(2 / fan_out), generator=generator(f"weights/{name}.weight"))
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            draw.uniform_(-bound, bound, generator=generator(f"weights/{name}.weight"))
        weight.copy_(draw)
        if module.bias is not None:
            module.bias.zero_()


def _own_net(
    model: str,
    norm: NormFactory,
    num_classes: int,
    in_channels: int,
    width: int | None,
    device: torch.device,
) -> nn.Module:
    cifar = model == "resnet18_cifar"
    eighteen = cifar or model == "resnet18_narrow"
    base = width or (64 if cifar else BASE_WIDTH)
    return ResNet(
        (2, 2, 2, 2) if eighteen else (CIFAR_DEPTHS[model],) * 3,
        [base * 2**stage for stage in range(4 if eighteen else 3)],
        norm=norm,
        in_channels=in_channels,
        num_classes=num_classes,
        stem_stride=2 if model == "resnet18_narrow" else 1,
        projection=eighteen,
        device=device,
    )


def _torchvision_net(
    model: str, norm: NormFactory, num_classes: int, in_channels: int, device: torch.device
) -> nn.Module:
    import torchvision  # only where one of its models is asked for: importing it takes a second

    from norms.convert import audit_norms

    info = factory_info(norm)
    missing = sorted(info.needs & {"conv_weight", "activation"})
    if missing:
        raise ValueError(
            f'norm "{info.name}" needs {" and ".join(missing)}, which torchvision\'s "{model}" does not pass to it'
        )

    with torch.device(device):
        net: nn.Module = torchvision.models.get_model(model, weights=None, num_classes=num_classes, norm_layer=norm)
    for _, module in norm_modules(net):
        if hasattr(module, "transform_weight"):
            raise ValueError(
                f'norm "{info.name}" transforms the convolution\'s weight; torchvision\'s "{model}" has no place for it'
            )
    left = audit_norms(net).left
    if left:
        raise ValueError(f'model "{model}" keeps a norm of its own: {left[0].path} is a {left[0].old}')
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != in_channels:
        parent, _, attribute = name.rpartition(".")
        replacement = nn.Conv2d(
            in_channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
            device=device,
        )
        setattr(net.get_submodule(parent), attribute, replacement)
    return net


def _zero_last_gammas(net: nn.Module, model: str) -> None:
    for norm in _last_norms(net.modules(), model):
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, nn.Parameter):
            info = norm.norm_info
            assert isinstance(info, NormInfo)
            raise ValueError(f'norm "{info.name}" has no parameter named weight, which zero_init_last_gamma sets')
        nn.init.zeros_(weight)


def _last_norms(modules: Iterable[nn.Module], model: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in modules:
        if isinstance(module, BasicBlock):
            found.append(module.last_norm)
        elif model in TORCHVISION and hasattr(module, "downsample") and hasattr(module, "bn2"):
            found.append(module.bn3 if hasattr(module, "bn3") else module.bn2)  # type: ignore[arg-type]
    if not found:
        raise ValueError(f'zero_init_last_gamma: model "{model}" has no residual block with a known last norm')
    return found
