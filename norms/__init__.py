"""Normalization layers for any network on (N, C, *), by name, and the calls of a training loop to them.

    import torch
    from torch import nn
    from torchvision.models import resnet18

    import norms

    bgn = norms.make_norm("bgn", num_groups=8)  # a factory: bgn(16) is a layer for 16 channels
    conv = nn.Conv2d(3, 16, 3, bias=False)
    net = nn.Sequential(conv, bgn(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    images = torch.rand(8, 3, 32, 32)
    with norms.situation(net, slices=2):  # no layer sees that: two norm batches of four images
        loss = net(images).logsumexp(dim=1).mean()
    loss.backward()
    optimizer.step()
    norms.after_update(net, again=lambda: net(images), progress=0.1)  # a tenth of the training is done

    with norms.hold(net):  # a forward that must not move running statistics
        net(images)
    norms.recalibrate(net, [images])  # the running statistics anew, from these batches
    net.eval()
    logits = norms.predict(net, images)
    fused = norms.fuse(net[0], net[1])  # the convolution that computes both

    model, audit = norms.converted(resnet18(), bgn)  # any model of torchvision, timm or your own
    net = resnet18(norm_layer=bgn)  # or where a constructor takes a norm

Layers
    norm_names()          the registered names; norm_info("bgn") is what one declares about itself
    make_norm(name, ...)  a factory of layers, with the norm's options
    register(...)         the decorator that adds a class of yours
    load_plugin(file)     a file with such classes, as --plugin loads it
    converted(net, norm)  a network with its norms replaced, and the audit of the swaps
    fuse(conv, norm)      the convolution that computes norm(conv(x)) in evaluation

In a training loop, the same calls for every norm; most norms make nothing of them
    situation(net, ...)   facts about a batch: domain, context or query, number of norm batches
    hold(net)             no norm changes its statistics
    after_update(net, again, progress)       after each optimizer step
    predict(net, x)       the evaluation forward
    recalibrate(net, batches)                running statistics estimated anew

The first four are explained by `help(norms.situation)`: it is their module, too, so that
`from norms.situation import hold` is the same function as `norms.hold`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from norms.fuse import fuse
from norms.plugins import load_plugin
from norms.registry import make_norm, norm_info, norm_names, register
from norms.running import recalibrate
from norms.situation import after_update, hold, predict

if TYPE_CHECKING:
    from norms.convert import converted
    from norms.situation import situation

__all__ = [
    "after_update",
    "converted",
    "fuse",
    "hold",
    "load_plugin",
    "make_norm",
    "norm_info",
    "norm_names",
    "predict",
    "recalibrate",
    "register",
    "situation",
]


class _Situation(ModuleType):
    """The module norms.situation, which is also called as its function of that name.

    Python binds a submodule to its name in the package when it is first imported. The function in its place would break
    `import norms.situation` for `norms.situation.hold`, the module alone `norms.situation(net)`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.situation(*args, **kwargs)


sys.modules["norms.situation"].__class__ = _Situation


def __getattr__(name: str) -> Any:
    if name == "converted":  # torchvision takes longer to import than all else here
        from norms.convert import converted

        globals()[name] = converted
        return converted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
