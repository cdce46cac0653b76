"""Every registered norm passes every check, and every check catches the lie it is there for."""

import sys
import textwrap

import pytest
import torch

from norms import conformance, registry
from norms.conformance import FACTS, Check, check_norm
from norms.registry import load_plugin, norm_names

# A well-behaved instance norm; the lies below override what they lie about.
HONEST = '''
import copy
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
        if isinstance(x, torch.fx.Proxy):  # a leaf for every tracer
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        self.check(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.scaled(self.normalized(wide)).to(x.dtype)

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
        return super().forward(x) if isinstance(x, torch.fx.Proxy) or len(x) else x.clone()

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
    "saves a view of its buffer for the backward": (
        STATS,
        "Running",
        "def normalized(self, x): return super().normalized(x * self.running_mean.exp().view(1, -1, *[1] * (x.dim() - 2)))",
        set(),  # exp makes a tensor of its own
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
    "takes images of bytes": (NO_STATS, "Honest", "def check(self, x): pass", {"other types refused"}),
    "counts before it refuses": (
        STATS,
        "Running",
        """
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
        "def after_update(self, progress): pass",
        {"warns when never told"},
    ),
    "warns of after_update at every step": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            super().move(mean, var)
            import warnings
            warnings.warn("call norms.situation.after_update")

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
    "statistics moved through a view that vmap copies": (
        STATS,
        "Running",
        """
        def move(self, mean, var):
            kept = torch.stack((self.running_mean, self.running_var))
            kept.lerp_(torch.stack((mean, var)).to(kept), self.momentum)
        """,
        {"stacked under vmap", "keeps statistics"},
    ),
    "reads a value": (
        NO_STATS,
        "Honest",
        "def scaled(self, x): return super().scaled(x) if x.sum().item() > -1e30 else x",
        {"stacked under vmap", "compiles", "exported"},
    ),
    "claims not to work in transforms": (f"{STATS}, functional=False", "Running", "", {"stacked under vmap"}),
    "compiles for one batch size": (
        NO_STATS,
        "Honest",
        """
        def scaled(self, x):
            order = sorted(range(len(x)), key=lambda i: i % 2 >= len(x) % 2)
            return super().scaled(x[order])[sorted(range(len(x)), key=order.__getitem__)]
        """,
        {"compiles"},
    ),
    "not a leaf for tracers": (
        NO_STATS,
        "Honest",
        """
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
        "def forward(self, x, *, weight): return super().forward(x) + weight.sum().to(x.dtype)",
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
        def moments(self, x):
            if self.training and self.situation.again:
                with torch.no_grad():
                    self.running_mean.copy_(x.mean(self.axes(x)))
            return super().moments(x)
        """,
    ),
    "not the derivative, and says so": (
        f"{NO_STATS}, exact_gradient=False",
        "Honest",
        "def scaled(self, x): return super().scaled(x) + x.detach()",
    ),
    "not compiled, and says so": (
        f"{NO_STATS}, compiles=False",
        "Honest",
        "def scaled(self, x): return super().scaled(x) if x.sum().item() > -1e30 else x",
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


def false(checks):
    return {c.fact: f"{c.measured}: {c.detail}" for c in checks if not c.ok}


@pytest.mark.parametrize("name", norm_names())
def test_every_registered_norm_keeps_its_word(name):
    generator = torch.get_rng_state()
    checks = check_norm(name)
    assert false(checks) == {}
    assert [c.fact for c in checks] == [f.__name__.replace("_", " ") for f in FACTS]
    assert all(isinstance(c, Check) and c.norm == name and c.measured for c in checks)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("truth", TRUTHS)
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
def test_a_lie_is_caught_by_the_check_that_names_it(check, lie):
    *norm, expected = LIES[lie]
    found = false(check(*norm, only=expected))
    assert expected <= found.keys(), found


@pytest.mark.parametrize("fact", [fact.__name__ for fact in FACTS])
def test_every_fact_has_a_lie_that_it_catches(fact):
    assert any(fact.replace("_", " ") in expected for *_, expected in LIES.values())


@pytest.mark.parametrize("groups", [1, 8, 256])
def test_bgn_keeps_its_word_at_any_number_of_groups(groups):
    assert false(check_norm("bgn", num_groups=groups)) == {}


def test_options_are_checked_and_a_norm_that_fits_no_width_is_a_finding():
    with pytest.raises(ValueError, match="did you mean"):
        check_norm("gnn")
    with pytest.raises(ValueError, match="unknown option"):
        check_norm("gn", groups=4)
    (only,) = check_norm("gn", num_groups=3)
    assert only.fact == "builds"
    assert not only.ok
    assert "num_groups=3" in only.detail


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
