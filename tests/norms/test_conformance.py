"""Every registered norm passes every check, and every check catches the lie it is there for."""

import copy
import sys
import textwrap

import pytest
import torch
from parts.norm_choices import one_of_each_kind
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from norms import conformance, registry
from norms.conformance import ELSEWHERE, FACTS, Check, check_like, check_norm, tracing
from norms.conformance.hints import HINTS
from norms.conformance.like import COMPARISONS, load_formula
from norms.registry import load_plugin, make_norm, norm_names, resolve_norm_options
from norms.situation import situation
from tasks.nets.blocks import conv_norm_act

# A well-behaved instance norm; the lies below override what they lie about.
HONEST = '''
import copy
import warnings
import torch
import torch.nn.functional as F
from torch import nn
from norms.registry import register


class Honest(nn.Module):
    def __init__(self, num_channels, *, affine: bool = True, activation=None):
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0)):
            self.register_parameter(name, nn.Parameter(torch.full((num_channels,), start)) if affine else None)

    def reset_parameters(self):
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x):
        if isinstance(x, torch.fx.Proxy):
            return self.leaf(x)
        self.check(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.scaled(self.normalized(wide)).to(x.dtype)

    def leaf(self, x, **inputs):
        """What a tracer records of this layer: a call of it."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), inputs)

    def check(self, x):
        if not x.is_floating_point():
            raise ValueError(f"a floating-point input is needed, given {x.dtype}")

    def moments(self, x):
        return x.mean(self.axes(x), keepdim=True), x.var(self.axes(x), correction=0, keepdim=True)

    def axes(self, x):
        return tuple(range(2, x.dim()))

    def normalized(self, x):
        mean, var = self.moments(x)
        return (x - mean) * torch.rsqrt(var + 1e-5)

    def scaled(self, x):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x if self.weight is None else x * self.weight.to(x).view(shape) + self.bias.to(x).view(shape)


class Running(Honest):
    """The honest batch norm."""

    def __init__(self, num_channels, *, affine: bool = True):
        super().__init__(num_channels, affine=affine)
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def reset_parameters(self):
        super().reset_parameters()
        self.reset_running_stats()

    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, x):
        return super().forward(x) if isinstance(x, torch.fx.Proxy) or x.shape[0] else x.clone()

    def axes(self, x):
        return (0, *range(2, x.dim()))

    def moments(self, x):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        if not self.training:
            return self.running_mean.view(shape), self.running_var.view(shape)
        mean, var = super().moments(x)
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"{tuple(x.shape)}: more than one value per channel is needed")
        self.move(mean.detach().flatten(), var.detach().flatten() * count / (count - 1))
        return mean, var

    def move(self, mean, var):
        fine = (mean + var).isfinite().all()
        for kept, new in ((self.running_mean, mean), (self.running_var, var)):
            kept.copy_(torch.where(fine, torch.lerp(kept, new.to(kept), self.momentum), kept))
'''

NO_STATS = "mixes_samples=False, keeps_stats=False"
STATS = "mixes_samples=True, keeps_stats=True"

# name of the lie: declared facts, base class, what it does instead, the checks that must say so
LIES = {
    "mixes samples in secret": (
        NO_STATS,
        "Honest",
        "def axes(self, x): return (0, *range(2, x.dim()))",
        {"mixes samples in train", "mixes samples in eval", "slices"},
    ),
    "claims to mix samples": ("mixes_samples=True, keeps_stats=False", "Honest", "", {"mixes samples in train"}),
    "claims other axes": ("mixes_samples=False, keeps_stats=False, axes='CHW'", "Honest", "", {"axes"}),
    "claims a memory over iterations": (f"{STATS}, across_iterations=True", "Running", "", {"earlier iterations"}),
    "claims to mix samples in evaluation": (
        f"{STATS}, mixes_samples_in_eval=True",
        "Running",
        "",
        {"mixes samples in eval"},
    ),
    "claims statistics": (
        "mixes_samples=False, keeps_stats=True",
        "Honest",
        "",
        {"keeps statistics", "running statistics used in eval", "train and eval", "recalibrate"},
    ),
    "keeps statistics in secret": (
        "mixes_samples=True, keeps_stats=False",
        "Running",
        "",
        {"keeps statistics", "running statistics used in eval"},
    ),
    "does not use its statistics": (
        f"{STATS}, mixes_samples_in_eval=True",
        "Running",
        """
        def moments(self, x):
            super().moments(x)
            return Honest.moments(self, x)
        """,
        {"running statistics used in eval", "train and eval"},
    ),
    "moves its statistics in evaluation": (
        STATS,
        "Running",
        """
        def moments(self, x):
            mean, var = (m.clone() for m in super().moments(x))
            with torch.no_grad():
                self.running_mean += 0.01
            return mean, var
        """,
        {"keeps statistics"},
    ),
    "resets nothing": (STATS, "Running", "reset_running_stats = None", {"recalibrate"}),
    "detaches the variance": (
        NO_STATS,
        "Honest",
        """
        def moments(self, x):
            mean, var = super().moments(x)
            return mean, var.detach()
        """,
        {"gradient first order"},
    ),
    "detaches inside its backward": (
        NO_STATS,
        "Honest",
        """
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x ** 3

            @staticmethod
            def backward(ctx, g):
                return g * 3 * ctx.saved_tensors[0].detach() ** 2

        def scaled(self, x): return self.Cube.apply(super().scaled(x))
        """,
        {"gradient second order"},
    ),
    "draws from the global generator": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) + 0.1 * torch.randn(x.shape[1:], dtype=x.dtype)",
        {"global generator untouched"},
    ),
    "does not compile": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) if x.sum().item() > -1e30 else x",
        {"compiles"},
    ),
    "compiles to something else": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) * (2 if torch.compiler.is_compiling() else 1)",
        {"compiles"},
    ),
    "loses channels_last": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x).contiguous()",
        {"channels last kept"},
    ),
    "loses the dtype": (NO_STATS, "Honest", "def forward(self, x): return super().forward(x.float())", {"dtype kept"}),
    "writes into its input": (
        NO_STATS,
        "Honest",
        """
        def forward(self, x):
            y = super().forward(x)
            if not self.training:
                x.data.zero_()
            return y
        """,
        {"input untouched"},
    ),
    "mixes samples in large batches only": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) if len(x) < 16 else super().scaled(x - x.mean(0, keepdim=True))",
        {"mixes samples in train", "mixes samples in eval"},
    ),
    "loses the shape": (
        NO_STATS,
        "Honest",
        "def forward(self, x): return super().forward(x).flatten(2)",
        {"shape kept"},
    ),
    "statistics in 16 bits": (
        NO_STATS,
        "Honest",
        "def forward(self, x): return self.scaled(self.normalized(x)).to(x.dtype)",
        {"autocast"},
    ),
    "divides by zero": (
        NO_STATS,
        "Honest",
        "def normalized(self, x): return x / x.var((2, 3), keepdim=True)",
        {"constant input", "maps of one position"},
    ),
    "keeps its weight without affine": (
        NO_STATS,
        "Honest",
        "def __init__(self, num_channels, *, affine: bool = True): super().__init__(num_channels)",
        {"affine false"},
    ),
    "another name for its weight": (
        NO_STATS,
        "Honest",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            if affine:
                self.gain = nn.Parameter(torch.ones(num_channels))
        """,
        {"affine false"},
    ),
    "state in an attribute": (
        STATS,
        "Running",
        """
        calls = 0
        def moments(self, x):
            if self.training:
                self.calls += 1
            mean, var = super().moments(x)
            return mean + 0.01 * self.calls, var
        """,
        {"state dict round trip", "freeze"},
    ),
    "running statistics in attributes": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            mean, var = self.running_mean, self.running_var
            del self.running_mean, self.running_var
            self.running_mean, self.running_var = mean, var
        """,
        {"keeps statistics", "state dict round trip", "recalibrate"},
    ),
    "a buffer that no state dict has": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("running_mean", self.running_mean, persistent=False)
        """,
        {"state dict round trip"},
    ),
    "buffers shared by copies": (
        STATS,
        "Running",
        "def __deepcopy__(self, memo): return copy.copy(self)",
        {"deepcopy"},
    ),
    "can not be pickled": (
        NO_STATS,
        "Honest",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.scale = lambda x: 2 * x
        """,
        {"pickled"},
    ),
    "state that hold can not see": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.history = [torch.zeros(num_channels)]

        def get_extra_state(self): return torch.stack(self.history[-1:])
        def set_extra_state(self, state): pass
        def moments(self, x):
            if self.training:
                self.history.append(self.running_mean.clone())
            return super().moments(x)
        """,
        {"freeze", "state dict round trip"},
    ),
    "slices not at once": (f"{STATS}, slices_at_once=True", "Running", "", {"slices"}),
    "crashes on one image": (
        NO_STATS,
        "Honest",
        """
        def forward(self, x):
            assert len(x) > 1
            return super().forward(x)
        """,
        {"batch of one"},
    ),
    "refuses without a reason": (
        NO_STATS,
        "Honest",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            if num_channels % 8:
                raise ValueError
            super().__init__(num_channels, affine=affine)
        """,
        {"odd channel counts"},
    ),
    "crashes on volumes": (
        NO_STATS,
        "Honest",
        "def axes(self, x): n, c, h, w = x.shape; return (2, 3)",
        set(),  # a failed unpacking is a ValueError with a text: defined, if not friendly
    ),
    "crashes on sequences": (NO_STATS, "Honest", "def axes(self, x): return (2, 3)", {"other spatial ranks"}),
    "claims to need a domain": (f"{NO_STATS}, needs={{'domain'}}", "Honest", "", {"needs"}),
    "claims to need the weight": (f"{NO_STATS}, needs={{'conv_weight'}}", "Honest", "", {"builds"}),
    "claims to fuse an activation": (f"{NO_STATS}, needs={{'activation'}}", "Honest", "", {"needs"}),
    "reads a domain in secret": (
        NO_STATS,
        "Honest",
        """
        def scaled(self, x):
            domain = self.situation.domain
            return super().scaled(x) if domain is None else super().scaled(x) + domain.view(-1, *[1] * (x.dim() - 1))
        """,
        {"needs"},
    ),
    "statistics of half the batch": (
        f"{STATS}, variance='biased', running_variance='unbiased'",
        "Running",
        "def moments(self, x): return super().moments(x[: max(1, len(x) // 2)] if self.training else x)",
        {"every sample counts", "recalibrate"},
    ),
    "running statistics of every second sample": (
        STATS,
        "Running",
        """
        def moments(self, x):
            if self.training:
                super().moments(x[::2])
            return Honest.moments(self, x) if self.training else super().moments(x)
        """,
        {"every sample counts", "recalibrate"},
    ),
    "momentum of the old value": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                kept.mul_(self.momentum).add_((1 - self.momentum) * new)
        """,
        {"momentum", "recalibrate"},
    ),
    "unbiased variance in the formula": (
        f"{STATS}, variance='biased', running_variance='unbiased'",
        "Running",
        """
        def moments(self, x):
            mean, var = super().moments(x)
            count = x.numel() // x.shape[1]
            return mean, var * count / (count - 1) if self.training else var
        """,
        {"variance in training"},
    ),
    "claims an unbiased variance": (f"{NO_STATS}, variance='unbiased'", "Honest", "", {"variance in training"}),
    "biased variance in the running statistics": (
        f"{STATS}, variance='biased', running_variance='unbiased'",
        "Running",
        """
        def moments(self, x):
            mean, var = Honest.moments(self, x)
            if not self.training:
                return super().moments(x)
            self.move(mean.detach().flatten(), var.detach().flatten())
            return mean, var
        """,
        {"variance in running statistics"},
    ),
    "a deviation in the running statistics": (
        f"{STATS}, running_variance='unbiased'",
        "Running",
        "def move(self, mean, var): super().move(mean, var.sqrt())",
        {"variance in running statistics", "recalibrate"},
    ),
    "no derivative in forward mode": (
        NO_STATS,
        "Honest",
        """
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(x): return 2 * x

            @staticmethod
            def setup_context(ctx, inputs, output): pass

            @staticmethod
            def backward(ctx, g): return 2 * g

        def scaled(self, x): return self.Double.apply(super().scaled(x))
        """,
        {"forward mode derivatives", "stacked under vmap"},
    ),
    "a wrong derivative in forward mode": (
        NO_STATS,
        "Honest",
        """
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(x): return 2 * x

            @staticmethod
            def setup_context(ctx, inputs, output): pass

            @staticmethod
            def backward(ctx, g): return 2 * g

            @staticmethod
            def jvp(ctx, t): return t

        def scaled(self, x): return self.Double.apply(super().scaled(x))
        """,
        {"forward mode derivatives"},
    ),
    "evaluates by the buffers themselves": (
        STATS,
        "Running",
        """
        def normalized(self, x):
            if self.training:
                return super().normalized(x)
            return F.batch_norm(x, self.running_mean.to(x), self.running_var.to(x), eps=1e-5)
        """,
        {"backward after training"},
    ),
    "crashes without samples": (
        NO_STATS,
        "Honest",
        """
        def forward(self, x):
            assert isinstance(x, torch.fx.Proxy) or len(x)
            return super().forward(x)
        """,
        {"empty batch"},
    ),
    "counts an empty batch": (
        STATS,
        "Running",
        """
        def forward(self, x):
            with torch.no_grad():
                self.running_mean += 0.01 * self.training
            return super().forward(x)
        """,
        {"empty batch"},
    ),
    "keeps an infinity": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                kept.lerp_(new.to(kept), self.momentum)
        """,
        {"infinity or nan in a batch"},
    ),
    # with check_channels a layer says that it looks at its input itself; for any other make_norm does
    "takes images of bytes": (
        NO_STATS,
        "Honest",
        """
        check_channels = None

        def check(self, x): pass
        """,
        {"other types refused"},
    ),
    "counts before it refuses": (
        STATS,
        "Running",
        """
        check_channels = None

        def check(self, x):
            with torch.no_grad():
                self.running_var += 0.01 * self.training
            super().check(x)
        """,
        {"other types refused"},
    ),
    "refuses images of bytes for another reason": (
        NO_STATS,
        "Honest",
        """
        check_channels = None

        def check(self, x):
            if not x.is_floating_point():
                raise ValueError("no")
        """,
        {"other types refused"},
    ),
    "does not train in mixed types": (
        NO_STATS,
        "Honest",
        "def normalized(self, x): return F.instance_norm(x, weight=self.weight, bias=self.bias)",
        {"float64 on smaller input"},
    ),
    "does not load without its counter": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        """,
        {"state dict without counter"},
    ),
    "loads without anything": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

        def _load_from_state_dict(self, state, prefix, *args):
            for name, buffer in self.named_buffers():
                state.setdefault(prefix + name, buffer.clone())
            super()._load_from_state_dict(state, prefix, *args)
        """,
        {"state dict without counter"},
    ),
    "extra state that is no tensor": (
        STATS,
        "Running",
        """
        def get_extra_state(self): return {"calls": 3}
        def set_extra_state(self, state): pass
        """,
        {"safetensors round trip"},
    ),
    "a buffer that grows": (
        STATS,
        "Running",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("means", torch.zeros(0, num_channels))

        def move(self, mean, var):
            super().move(mean, var)
            self.means = torch.cat((self.means, mean[None].to(self.means)))
        """,
        {"form of buffers kept", "averaged model", "reset running stats", "functional call keeps state"},
    ),
    "running statistics with a graph": (
        STATS,
        "Running",
        """
        def moments(self, x):
            if not self.training:
                return super().moments(x)
            mean, var = Honest.moments(self, x)
            self.running_mean = torch.lerp(self.running_mean, mean.flatten().to(self.running_mean), self.momentum)
            self.running_var = torch.lerp(self.running_var, var.flatten().to(self.running_var), self.momentum)
            return mean, var
        """,
        {"form of buffers kept"},
    ),
    "a method bound to the original": (
        NO_STATS,
        "Honest",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.affine_of = self.scaled

        def forward(self, x):
            if isinstance(x, torch.fx.Proxy):
                return super().forward(x)
            self.check(x)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.affine_of(self.normalized(wide)).to(x.dtype)
        """,
        {"data parallel replica"},
    ),
    "takes no integer for a domain": (
        f"{NO_STATS}, needs={{'domain'}}",
        "Honest",
        """
        def scaled(self, x):
            return super().scaled(x) + self.situation.domain.view(-1, *[1] * (x.dim() - 1)).to(x)
        """,
        {"empty batch", "exported"},
    ),
    "no reset_parameters": (NO_STATS, "Honest", "reset_parameters = None", {"reset parameters"}),
    "resets its weight only": (
        STATS,
        "Running",
        "def reset_parameters(self): Honest.reset_parameters(self)",
        {"reset parameters"},
    ),
    "resets half of its statistics": (
        STATS,
        "Running",
        "def reset_running_stats(self): self.running_mean.zero_()",
        {"reset running stats"},
    ),
    "waits for after_update in silence": (
        STATS,
        "Running",
        """
        def after_update(self, progress): pass

        def register_forward_pre_hook(self, *hook): pass  # that which make_norm gives a norm that is told of updates
        """,
        {"warns when never told"},
    ),
    "warns of after_update at every step": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            super().move(mean, var)
            warnings.warn("call norms.situation.after_update", stacklevel=2)

        def after_update(self, progress): pass
        """,
        {"warns when never told"},
    ),
    "a new tensor for each statistic": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            self.running_mean = torch.lerp(self.running_mean, mean.to(self.running_mean), self.momentum)
            self.running_var = torch.lerp(self.running_var, var.to(self.running_var), self.momentum)
        """,
        {"functional call keeps state", "stacked under vmap"},
    ),
    "reads a value": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) if x.sum().item() > -1e30 else x",
        {"stacked under vmap", "compiles", "exported"},
    ),
    "rounds to float32": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x.float()).to(x)",
        {"gradient first order", "gradient second order"},
    ),
    "rounds its input to float32": (
        NO_STATS,
        "Honest",
        "def forward(self, x): return super().forward(x if isinstance(x, torch.fx.Proxy) else x.float().to(x))",
        {"gradient first order", "gradient second order"},
    ),
    "asks for the length of a batch": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) if len(x) else x",
        {"exported"},
    ),
    "claims not to work in transforms": (f"{STATS}, functional=False", "Running", "", {"stacked under vmap"}),
    "compiles for one batch size": (
        NO_STATS,
        "Honest",
        """
        def scaled(self, x):
            parts = max(1, len(x) // 32)
            longer = len(x) % parts
            if not longer:
                return super().scaled(x)
            order = sorted(range(len(x)), key=lambda i: i % parts >= longer)
            return super().scaled(x[order])[sorted(range(len(x)), key=order.__getitem__)]
        """,
        {"compiles"},
    ),
    "not a leaf for tracers": (
        NO_STATS,
        "Honest",
        """
        def __getattribute__(self, name):
            return "mine" if name == "__module__" else super().__getattribute__(name)

        def forward(self, x):
            self.check(x)
            return self.scaled(self.normalized(x.to(torch.promote_types(x.dtype, torch.float32)))).to(x.dtype)
        """,
        {"traced by fx"},
    ),
    "can not be built": (
        NO_STATS,
        "Honest",
        "def __init__(self, num_channels, *, affine: bool = True): raise TypeError('no')",
        {"builds"},
    ),
}

# What a norm may need, each used as it should be.
TRUTHS = {
    "instance norm": (NO_STATS, "Honest", ""),
    "batch norm": (STATS, "Running", ""),
    "batch norm that adds the conv weight": (
        f"{STATS}, needs={{'conv_weight'}}",
        "Running",
        """
        def forward(self, x, *, weight):
            if isinstance(x, torch.fx.Proxy):
                return self.leaf(x, weight=weight)
            return super().forward(x) + weight.sum().to(x.dtype)
        """,
    ),
    "standardized weights": (NO_STATS, "Honest", "def transform_weight(self, weight): return 2 * weight"),
    "fused activation": (
        f"{NO_STATS}, needs={{'activation'}}",
        "Honest",
        """
        def __init__(self, num_channels, *, activation=None, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            if activation is None:
                raise ValueError("an activation must follow")
            self.activation = activation

        def scaled(self, x): return self.activation(super().scaled(x))
        """,
    ),
    "an offset per domain": (
        f"{NO_STATS}, needs={{'domain'}}",
        "Honest",
        """
        def __init__(self, num_channels, *, num_domains: int = 1, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.offset = nn.Parameter(torch.zeros(num_domains, num_channels))

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.zeros_(self.offset)

        def scaled(self, x):
            offset = self.offset[self.situation.domain].to(x)
            return super().scaled(x) + offset.view(*offset.shape, *[1] * (x.dim() - 2))
        """,
    ),
    "a context set's mean": (
        "mixes_samples=True, mixes_samples_in_eval=True, keeps_stats=False, needs={'context'}",
        "Honest",
        """
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("mean", torch.zeros(()))

        def reset_parameters(self):
            super().reset_parameters()
            self.mean.zero_()

        def normalized(self, x):
            mean = self.mean
            if self.situation.part == "context":
                mean = x.mean()
                self.mean.copy_(mean.detach())
            return super().normalized(x) + mean
        """,
    ),
    "the statistics after the update": (
        f"{STATS}, needs={{'second_look'}}",
        "Running",
        """
        seen, looked, warned = None, False, False

        def moments(self, x):
            if self.training and self.situation.again:
                mean = x.detach().mean(self.axes(x))
                self.running_mean.copy_(torch.where(mean.isfinite(), mean, self.running_mean))
                self.looked = True
            elif self.training and self.weight is not None and not torch.compiler.is_compiling():
                self.notice()
            return super().moments(x)

        def notice(self):
            version = self.weight._version
            if self.seen is not None and version > self.seen and not self.looked and not self.warned:
                self.warned = True
                warnings.warn("call norms.situation.after_update", stacklevel=2)
            self.seen, self.looked = version, False
        """,
    ),
    "not the derivative, and says so": (
        f"{NO_STATS}, exact_gradient=False",
        "Honest",
        "def scaled(self, x): return super().scaled(x) + x.detach()",
    ),
    "not compiled, and says so": (
        f"{NO_STATS}, compiles=False, functional=False",
        "Honest",
        "def scaled(self, x): return x if self.training and x.sum().item() < -1e30 else super().scaled(x)",
    ),
}


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check(facts, base, body): the checks of a plugin norm, forgotten after the test."""
    norm_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def write_and_check(facts, base, body, only=None):
        lines = [line.removeprefix("        ") for line in body.strip("\n").splitlines()] or ["pass"]
        if not body.startswith("\n"):
            lines = [body or "pass"]
        text = f'{HONEST}\n\n@register(name="mine", source="test", {facts})\nclass Mine({base}):\n'
        file = tmp_path / "my_norms.py"
        file.write_text(text + "\n".join(f"    {line}" for line in lines) + "\n")
        assert load_plugin(file) == ["mine"]
        if only:  # the rest of the checks is left out to save time
            monkeypatch.setattr(conformance, "FACTS", [f for f in FACTS if f.__name__.replace("_", " ") in only])
        return check_norm("mine")

    yield write_and_check
    for name in [name for name in sys.modules if name.startswith("normsuite_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def one_batch_size(monkeypatch):
    """Compiled for one size alone. Any size takes half of all the time of the checks, and is a slow test of its own."""
    monkeypatch.setattr(tracing, "BATCHES", (64, 64))


def false(checks):
    return {c.fact: f"{c.measured}: {c.detail}" for c in checks if not c.ok}


KINDS = one_of_each_kind(norm_names())


@pytest.mark.usefixtures("one_batch_size")
@pytest.mark.parametrize("name", norm_names())
def test_every_registered_norm_keeps_its_word(monkeypatch, name):
    """Whether the others compile, which is half of the time, is the slow test's."""
    facts = [f for f in FACTS if f is not tracing.compiles or name in KINDS]
    monkeypatch.setattr(conformance, "FACTS", facts)
    generator = torch.get_rng_state()
    checks = check_norm(name)
    assert false(checks) == {}
    assert [c.fact for c in checks] == [f.__name__.replace("_", " ") for f in facts]
    assert all(isinstance(c, Check) and c.norm == name and c.measured for c in checks)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("bn", "frn") else pytest.mark.slow) for n in norm_names()]
)
def test_every_registered_norm_compiles_for_any_batch_size(monkeypatch, name):
    monkeypatch.setattr(conformance, "FACTS", (tracing.compiles,))
    (found,) = check_norm(name)
    assert found.ok, found
    assert found.measured == found.declared


@pytest.mark.usefixtures("one_batch_size")
@pytest.mark.parametrize(
    "truth", [pytest.param(truth, marks=pytest.mark.slow if i % 2 else ()) for i, truth in enumerate(TRUTHS)]
)
def test_an_honest_norm_of_any_kind_passes(check, truth):
    assert false(check(*TRUTHS[truth])) == {}


def test_what_a_norm_does_not_claim_is_not_tried_and_not_reported_as_measured(check):
    """A norm that is better than its word passes."""
    facts = {"gradient first order": "not exact", "gradient second order": "not exact", "compiles": "no"}
    found = check(f"{NO_STATS}, exact_gradient=False, compiles=False", "Honest", "pass", only=set(facts))
    assert {c.fact: (c.declared, c.measured, c.ok) for c in found} == {
        fact: (declared, "not tried", True) for fact, declared in facts.items()
    }


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_by_the_check_that_names_it_with_a_hint_of_one_line(check, lie):
    *norm, expected = LIES[lie]
    checks = check(*norm, only=expected)
    found = false(checks)
    assert expected <= found.keys(), found
    assert all((c.hint == "") == c.ok and "\n" not in c.hint and len(c.hint) < 160 for c in checks)


# What each cause reads like: the lie, the fact that it makes false, and what its hint says.
CAUSES = [
    ("momentum of the old value", "recalibrate", "the two weights are swapped"),
    ("momentum of the old value", "momentum", "the two weights are swapped"),
    ("statistics of half the batch", "recalibrate", "a part of the batch"),
    ("statistics of half the batch", "every sample counts", "a part of the batch"),
    ("running statistics of every second sample", "recalibrate", "a part of the batch"),
    ("unbiased variance in the formula", "variance in training", "in the training formula: torch.var divides by n - 1"),
    ("biased variance in the running statistics", "variance in running statistics", "in running_var: torch.var"),
    ("a deviation in the running statistics", "variance in running statistics", "a deviation?"),
    ("running statistics with a graph", "form of buffers kept", "under torch.no_grad()"),
    ("a buffer that grows", "form of buffers kept", "their final shape"),
    ("state in an attribute", "state dict round trip", "a Python counter"),
    ("state in an attribute", "freeze", "a Python counter"),
    ("writes into its input", "input untouched", "in place on x"),
    ("mixes samples in secret", "mixes samples in eval", "read the running ones"),
    ("detaches the variance", "gradient first order", "detached"),
    ("counts before it refuses", "other types refused", "refuse first"),
    ("takes images of bytes", "other types refused", "a floating-point input is needed"),
    ("reads a value", "stacked under vmap", "torch.where"),
    ("no derivative in forward mode", "stacked under vmap", "generate_vmap_rule"),
    ("no derivative in forward mode", "forward mode derivatives", "without jvp"),
    ("compiles for one batch size", "compiles", "a symbol at the second size"),
    ("does not compile", "compiles", "no .item()"),
    ("running statistics in attributes", "recalibrate", "a Python counter"),
    ("rounds to float32", "gradient first order", "x.float() rounds a float64 input"),
    ("rounds its input to float32", "gradient second order", "x.float() rounds a float64 input"),
    ("asks for the length of a batch", "exported", "x.shape[0] is any"),
    ("warns of after_update at every step", "warns when never told", "have the weights changed"),
    ("waits for after_update in silence", "warns when never told", "warnings.warn, once"),
]


@pytest.mark.parametrize(("lie", "fact", "words"), CAUSES, ids=lambda v: v[:40])
def test_the_hint_tells_the_cause(check, lie, fact, words):
    *norm, _ = LIES[lie]
    (found,) = check(*norm, only={fact})
    assert words in found.hint


def test_statistics_that_no_buffer_shows_are_not_taken_for_those_of_a_part_of_the_batch(check):
    *norm, _ = LIES["running statistics in attributes"]
    assert false(check(*norm, only={"every sample counts"})) == {}


@pytest.mark.parametrize("fact", [*FACTS, *COMPARISONS], ids=lambda fact: fact.__name__)
def test_every_fact_has_a_hint_for_whatever_is_measured(fact):
    assert list(HINTS[fact.__name__])[-1] == ""


@pytest.mark.parametrize("fact", [fact.__name__ for fact in FACTS])
def test_every_fact_has_a_lie_that_it_catches(fact):
    assert any(fact.replace("_", " ") in expected for *_, expected in LIES.values())


@pytest.mark.usefixtures("one_batch_size")
@pytest.mark.parametrize("groups", [1, pytest.param(256, marks=pytest.mark.slow)])
def test_bgn_keeps_its_word_at_any_number_of_groups(groups):
    assert false(check_norm("bgn", num_groups=groups)) == {}


def test_ghost_compiles_for_a_batch_that_its_small_sub_batches_do_not_divide(monkeypatch):
    monkeypatch.setattr(conformance, "FACTS", [f for f in FACTS if f.__name__ == "compiles"])
    assert false(check_norm("ghost", ghost_batch_size=5)) == {}


@pytest.mark.parametrize(("name", "options"), [("pn", {"unbiased": False}), ("bgn", {"num_groups": 1})])
def test_the_declared_variance_is_that_of_the_default_options(monkeypatch, name, options):
    monkeypatch.setattr(conformance, "FACTS", [f for f in FACTS if f.__name__ == "variance_in_training"])
    (found,) = check_norm(name, **options)
    assert (found.measured, found.ok) == ("biased", True)


def test_options_are_checked_and_a_norm_that_fits_no_width_is_a_finding():
    with pytest.raises(ValueError, match="did you mean"):
        check_norm("gnn")
    with pytest.raises(ValueError, match="unknown option"):
        check_norm("gn", groups=4)
    (only,) = check_norm("gn", num_groups=0)
    assert only.fact == "builds"
    assert not only.ok
    assert "num_groups=0" in only.detail


def test_a_number_of_groups_that_divides_no_usual_width_is_checked_at_one_that_it_divides():
    assert all(c.ok for c in check_norm("gn", num_groups=7))


def test_a_refusal_is_reported_with_its_reason():
    found = {c.fact: c for c in check_norm("gn")}
    assert found["odd channel counts"].measured == "ValueError"
    assert "allowed: 1, 7" in found["odd channel counts"].detail
    assert found["odd channel counts"].ok


def test_the_attribute_that_holds_secret_state_is_named_and_no_domain_is_suspected(check):
    body = """
        calls = 0
        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + 0.1 * self.calls)
    """
    found = false(check(NO_STATS, "Honest", textwrap.dedent(body), only={"state dict round trip", "needs"}))
    assert found["state dict round trip"].endswith("neither in buffers nor in extra state: calls")
    assert "domain" not in found.get("needs", "")


# --- against a formula of the author's ----------------------------------------------------------------------------

FORMULA = """
import torch

def reference(x, weight, bias, eps):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

def evaluation(x, running_mean, running_var, weight, bias, eps):
    mean, var, weight, bias = (t.view(1, -1, 1, 1) for t in (running_mean, running_var, weight, bias))
    return (x - mean) / (var + eps).sqrt() * weight + bias
"""


@pytest.fixture
def formula(tmp_path):
    """formula(text): a user's file of it, loaded."""

    def write_and_load(text):
        file = tmp_path / "formula.py"
        file.write_text(textwrap.dedent(text))
        return load_formula(file)

    return write_and_load


def test_a_norm_is_compared_with_its_formula_in_both_modes(formula):
    found = check_like("bn", formula(FORMULA))
    assert [(c.fact, c.measured, c.ok, c.hint) for c in found] == [
        ("training like reference", "same", True, ""),
        ("evaluation like reference", "same", True, ""),
    ]
    assert all("on 7 inputs" in c.detail for c in found)
    only_training = check_like("bn", formula(FORMULA.partition("def evaluation")[0]))
    assert [(c.measured, c.ok) for c in only_training] == [("same", True), ("not tried", True)]


WHOLE = {
    "gn": """
        def reference(x, weight, bias, num_groups, eps):
            n, c, h, w = x.shape
            g = x.reshape(n, num_groups, -1)
            y = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + eps).sqrt()
            return y.reshape(x.shape) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        """,
    "dsbn": """
        def reference(x, weight, bias, domain, eps):
            y = x.clone()
            for d in domain.unique():
                z = x[domain == d]
                z = (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), correction=0, keepdim=True) + eps).sqrt()
                y[domain == d] = z * weight[d].view(1, -1, 1, 1) + bias[d].view(1, -1, 1, 1)
            return y
        """,
    "frn": """
        def reference(x, weight, bias, tau, eps):
            w, b, t = (p.view(1, -1, 1, 1) for p in (weight, bias, tau))
            return (x / (x.square().mean((2, 3), keepdim=True) + eps).sqrt() * w + b).maximum(t)
        """,
    "ws_bn": FORMULA,
    "cbn": FORMULA,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_formula_may_ask_for_options_domains_and_every_parameter(formula, name):
    options = {"num_groups": 4} if name == "gn" else {}
    assert false(check_like(name, formula(WHOLE[name]), **options)) == {}


# the change of the formula, the comparison that fails, and the cause that is named
DIFFERENT = {
    "eps outside the root": ("(var + eps).sqrt()", "(var.sqrt() + eps)", "training", "eps: equal where deviations are"),
    "another eps": ("(var + eps)", "(var + 10 * eps)", "training", "eps: equal where deviations are large"),
    "unbiased variance": ("correction=0", "correction=1", "training", "variance: biased in the layer, unbiased in"),
    "twice the weight": (
        "* weight.view(1, -1, 1, 1)",
        "* 2 * weight.view(1, -1, 1, 1)",
        "training",
        "scale: 0.5 times",
    ),
    "no bias": ("+ bias.view(1, -1, 1, 1)", "", "training", "shift"),
    "other axes": ("x.var((0, 2, 3)", "x.var((2, 3)", "training", "in all places"),
    "one channel forgotten": (
        "return (x - mean)",
        "x = x.clone(); x[:, 3] = 0\n    return (x - mean)",
        "training",
        "channels 3 alone",
    ),
    "normalizes nothing": ("return (x - mean) / (var + eps).sqrt()", "return x", "training", "in all places"),
    "a root of a negative number": (
        "+ bias.view(1, -1, 1, 1)",
        "+ (x - 10).sqrt()",
        "training",
        "formula: not finite on (4, 8, 4, 4); largest difference inf",
    ),
    "evaluates with eps outside": (
        "sqrt() * weight + bias",
        "sqrt().add(eps) * weight + bias",
        "evaluation",
        "eps: equal",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_difference_is_found_and_its_cause_named(formula, difference):
    old, new, mode, cause = DIFFERENT[difference]
    assert old in FORMULA
    found = {c.fact: c for c in check_like("bn", formula(FORMULA.replace(old, new, 1)))}
    wrong = found[f"{mode} like reference"]
    assert not wrong.ok
    assert wrong.detail.startswith(cause), wrong.detail
    assert wrong.hint
    assert sum(not c.ok for c in found.values()) == 1


@pytest.mark.parametrize(
    ("lie", "cause"),
    [
        ("statistics of half the batch", "samples 2 of 4 do not enter its statistics"),
        ("unbiased variance in the formula", "variance: unbiased in the layer, biased in the formula, of 64 values"),
    ],
)
def test_a_wrong_layer_is_told_from_the_formula(check, formula, lie, cause):
    facts, base, body, _ = LIES[lie]
    check(facts, base, body, only={"shape kept"})
    text = FORMULA.replace(", eps)", ", eps=1e-5)")  # the planted layers have no such option
    training, _ = check_like("mine", formula(text))
    assert not training.ok
    assert training.detail.startswith(cause), training.detail


def test_evaluation_by_statistics_of_the_batch_is_named(check, formula):
    check(STATS, "Running", "def normalized(self, x): return Honest.normalized(self, x)", only={"shape kept"})
    body = """
        def moments(self, x):
            super().moments(x)
            return Honest.moments(self, x)
    """
    check(STATS, "Running", "\n" + body, only={"shape kept"})
    _, evaluation = check_like("mine", formula(FORMULA.replace(", eps)", ", eps=1e-5)")))
    assert evaluation.detail.startswith("it is the training formula")
    assert "running statistics" in evaluation.hint


BAD_FORMULAS = {
    "def refrence(x): return x": ["no function reference(x, weight, bias, ...)", "refrence", 'did you mean "refrence"'],
    "x = 1": ["it has no function"],
    "reference = 3": ["no function reference"],
    "def reference(x, wieght): return x": [
        '"wieght" is nothing that bn has',
        "x, eps, momentum, weight, bias",
        '"weight"',
    ],
    "def reference(weight): return weight": ["reference(weight)", "it asks for no x"],
    "def reference(x, *rest): return x": ["(x, *rest)", "arguments are passed by name"],
    "def reference(x, /): return x": ["(x, /)", "arguments are passed by name"],
    "def reference(x): return x[0]": ["returns (8, 4, 4)", "(4, 8, 4, 4)", "the same shape"],
    "def reference(x): return x.float()": ["torch.float32", "torch.float64, is needed"],
    "def reference(x): return x.numpy()": ["returns ndarray", "a torch tensor"],
    "def reference(x):\n    return x @ x.view(3)": ["fails for x of shape (4, 8, 4, 4)", "RuntimeError", "(line 2)"],
    "def reference(x: return x": ["SyntaxError"],
    "import no_such_module": ["ModuleNotFoundError", "no_such_module"],
    "import sys; sys.exit(0)": ["SystemExit"],
    "import sys\ndef reference(x): sys.exit(3)": ["fails for x of shape (4, 8, 4, 4)", "SystemExit: 3", "(line 2)"],
    "import torch\nreference = torch.relu": ["reference is no Python function", "names it asks for are unknown"],
}


@pytest.mark.parametrize("text", BAD_FORMULAS)
def test_a_bad_formula_is_one_line_that_says_what_is_allowed(formula, text):
    with pytest.raises(ValueError, match=r"^formula \".*formula.py\": ") as error:
        check_like("bn", formula(text))
    message = str(error.value)
    assert "\n" not in message
    for part in BAD_FORMULAS[text]:
        assert part in message


def test_a_formula_may_define_dataclasses(formula):
    before = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    a: int\n"
    assert false(check_like("bn", formula(before + FORMULA))) == {}


def test_a_missing_formula_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_formula(tmp_path / "none.py")


# --- what conformance can not ask for, since it knows no network of the tasks --------------------------------------


@pytest.mark.parametrize("name", norm_names())
def test_a_convolution_with_its_norm_and_activation_is_traced_by_stock_tools(name):
    options = resolve_norm_options(name, {}, {"norm_batch_size": 4, "num_domains": 2, "image_shape": (3, 4, 4)})
    torch.manual_seed(0)
    net = nn.Sequential(conv_norm_act(3, 32, 3, norm=make_norm(name, **options), activation=nn.ReLU())).train()
    twin = copy.deepcopy(net)
    traced = create_feature_extractor(net, ["0"])
    for mode in (True, False):
        results = []
        for one in (traced, twin):
            one.train(mode)
            with torch.no_grad():  # a trace that holds the weight as it was is caught here
                for parameter in one.parameters():
                    parameter.mul_(1.1)
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
            with situation(one, domain=0, part="context"):
                y = one(x)
            results.append(y["0"] if isinstance(y, dict) else y)
        torch.testing.assert_close(*results)


def test_an_averaged_bgn_refuses_the_size_that_the_network_refuses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make_norm("bgn", num_groups=16)(8))
    average = AveragedModel(net)
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6))
        average.update_parameters(net)
    assert average.eval()(torch.randn(2, 3, 6, 6)).shape == (2, 8, 6, 6)
    for one in (net, average):
        with pytest.raises(ValueError, match="trained size"):
            one.eval()(torch.randn(2, 3, 12, 12))


def test_what_matters_outside_the_suite_alone_is_a_note_for_a_norm_of_a_users_file(tmp_path):
    """torch's own batch normalization, registered as it is: nothing is false, and what it does not keep is said."""
    file = tmp_path / "my_bn.py"
    file.write_text(
        textwrap.dedent(
            """
            from torch import nn
            from norms import register

            @register(name="my_bn", source="torch", mixes_samples=True, keeps_stats=True, axes="NHW")
            class MyBatchNorm(nn.BatchNorm2d):
                def __init__(self, num_channels: int, *, affine: bool = True, device=None, dtype=None):
                    super().__init__(num_channels, affine=affine, device=device, dtype=dtype)
            """
        )
    )
    (name,) = load_plugin(file)
    found = check_norm(name)
    assert [c.fact for c in found if c.false] == []
    notes = {c.fact for c in found if c.note and not c.ok}
    assert {"backward after training", "empty batch", "infinity or nan in a batch"} <= notes
    assert notes <= {fact.__name__.replace("_", " ") for fact in ELSEWHERE}
    assert not any(c.note for c in check_norm("none"))
