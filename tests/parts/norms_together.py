"""Small networks of one norm, trained for a few steps by one process or by one of several workers, to be compared.

A `Case` says the norm and how it is trained. `trained(case, workers)` gives everything that the norm's numbers show in,
of this worker's part; `of_rank(rank, size, cases)` all cases, and what else needs workers, in
one of the processes of parts.worker_processes.together; `mismatches` what differs from one process alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norms.bases.batch_statistics import BatchStatistics
from norms.kernels.moments import batch_moments
from norms.registry import make_norm, norm_info, norm_names, register
from norms.running import RunningStatistics
from norms.situation import after_update, hold, situation
from norms.workers import ALONE, Workers

CHANNELS = 4
OUTPUTS, GRADIENTS, STATISTICS = 1e-12, 1e-10, 1e-12
"""What must hold in float64: the largest difference, of numbers near 1."""


@dataclass(frozen=True)
class Case:
    """One norm, trained by W workers and by one process.

    Attributes:
        norm: the registered name.
        options: of make_norm.
        sync: moments of all workers.
        slices: norm batches of each worker.
        batches: sizes of the whole batches, one for each step.
        affine: weight and bias.
        side: positions along each of two axes.
        mixed: domains are told per sample, in no order; else one for each batch.
        centre: mean of the inputs.
        last: channels innermost in the memory of inputs.
    """

    norm: str
    options: dict[str, Any] = field(default_factory=dict)
    sync: bool = False
    slices: int = 1
    batches: tuple[int, ...] = (16, 16, 16)
    affine: bool = True
    side: int = 3
    mixed: bool = True
    centre: float = 0.0
    last: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format

    def __str__(self) -> str:
        told = [f"{k}={v}" for k, v in self.options.items()]
        told += ["sync"] * self.sync + [f"slices={self.slices}"] * (self.slices > 1) + ["no affine"] * (not self.affine)
        told += [f"batches={self.batches}"] * (len(set(self.batches)) > 1 or self.batches[0] != 16)
        told += [f"side={self.side}"] * (self.side != 3) + ["one domain"] * (not self.mixed)
        told += [f"centre={self.centre}"] * bool(self.centre) + ["last"] * self.last
        return ", ".join([self.norm, *told])


def network(case: Case, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions, each with the norm after it, alike in every process."""
    torch.manual_seed(0)
    info = norm_info(case.norm)
    more = {"activation": nn.ReLU()} if "activation" in info.needs else {}
    norms = [make_norm(case.norm, **case.options)(CHANNELS, affine=case.affine, **more) for _ in range(2)]
    layers = [nn.Conv2d(2, CHANNELS, 1), norms[0], nn.Tanh(), nn.Conv2d(CHANNELS, CHANNELS, 1), norms[1]]
    net = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64).to(dtype) * 0.3)
    return net


def batch(case: Case, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | int | None]:
    """Inputs (N, 2, side, side), what the outputs are weighted by in the loss, and the domains."""
    torch.manual_seed(100 + step)
    n = case.batches[step]
    x = torch.randn(n, 2, case.side, case.side, dtype=torch.float64) * (1 + torch.arange(n)[:, None, None, None] / n)
    pull = torch.randn(n, CHANNELS, case.side, case.side, dtype=torch.float64)
    domain: Tensor | int | None = None
    if "domain" in norm_info(case.norm).needs:
        domain = torch.arange(n) * 7 // 3 % 2 if case.mixed else step % 2
    return (x + case.centre).to(dtype).contiguous(memory_format=case.layout), pull.to(dtype), domain


def trained(
    case: Case, workers: Workers = ALONE, slices: int | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Steps of gradient descent, of all workers' gradients: outputs and gradients of this worker's inputs in each of
    them, and at the end parameters, their gradients, buffers, and outputs in evaluation. As lists of numpy arrays."""
    net = network(case, dtype)
    outputs, gradients = [], []
    for step in range(len(case.batches)):
        x, pull, domain = batch(case, step, dtype)
        # sliced, so of another memory format than dense ones
        x = workers.share(x).contiguous(memory_format=case.layout).requires_grad_()
        domain = workers.share(domain) if isinstance(domain, Tensor) else domain
        with situation(net, domain=domain, slices=slices or case.slices, workers=workers):
            with hold(net):
                net(x.detach())  # must move nothing
            y = net(x)
            (y * workers.share(pull)).sum().backward()
        outputs.append(y.detach().numpy())
        gradients.append(x.grad.numpy())
        with torch.no_grad():
            for p in net.parameters():
                p.grad = workers.total(p.grad)
                last = p.grad.clone()
                p.sub_(0.002 * last)
                gradients.append(last.numpy()) if step == len(case.batches) - 1 else None
                p.grad = None
        after_update(net, lambda: None, progress=0.5)
    net.eval()
    x, _, domain = batch(case, 0, dtype)
    with torch.no_grad(), situation(net, domain=domain, workers=workers):
        evaluated = net(x).numpy()
    return {
        "outputs": outputs,
        "gradients": gradients,
        "statistics": [b.double().numpy() for b in net.buffers()],
        "evaluated": [evaluated],
    }


def of_rank(rank: int, size: int, cases: list[Case]) -> dict[str, Any]:
    """By worker `rank`: "cases", `trained` of every case, and the functions below, by their names."""
    users_norms()
    own, merged = Workers(rank, size), Workers(rank, size, sync=True)
    return {
        "cases": [trained(case, Workers(rank, size, case.sync)) for case in cases],
        "in_turn": {name: in_turn(name, own) for name in IN_TURN},
        "far_from_zero": {name: far_from_zero(name, merged) for name in FAR},
        "twice_differentiated": twice_differentiated(merged) if size == 2 else None,
        "too_few": too_few(merged) if size == 2 else None,
    }


IN_TURN = ("bn", "ghost", "brn", "evonorm_b0", "dsbn", "sabn")
FAR = ("bn", "bgn", "ghost", "ebn", "iebn", "sn", "brn", "evonorm_b0", "dsbn")


def in_turn(name: str, workers: Workers, size: int = 1) -> Any:
    """Running statistics of a norm, in training on batches of 7, 2 and 1 samples: some parts are shorter or empty.

    One process forwards the parts of `size` workers, one after the other.
    """
    info = norm_info(name)
    options = {"ghost_batch_size": 2} if name == "ghost" else {}
    more = {"activation": nn.ReLU()} if "activation" in info.needs else {}
    norm = make_norm(name, momentum=0.5, **options)(CHANNELS, **more).double()
    for step, n in enumerate((7, 2, 1, 7)):
        torch.manual_seed(step)
        x, domain = torch.randn(n, CHANNELS, 2, 2, dtype=torch.float64), torch.arange(n) % 2
        for r in range(size):
            rank, of = (workers.rank, workers.size) if size == 1 else (r, size)
            if len(x[rank::of]) == 0 and size > 1:
                continue
            told = domain[rank::of] if "domain" in info.needs else None
            with situation(norm, domain=told, workers=workers):
                norm(x[rank::of])
        after_update(norm, lambda: None, progress=0.5)
    return [b.double().numpy() for b in norm.buffers()]


def far_from_zero(name: str, workers: Workers, dtype: torch.dtype = torch.float32) -> Any:
    """Output of a norm for values near 1,000 whose deviation is 1."""
    info = norm_info(name)
    options = {"ghost_batch_size": 3} if name == "ghost" else {"num_groups": 2} if name == "bgn" else {}
    more = {"activation": nn.ReLU()} if "activation" in info.needs else {}
    norm = make_norm(name, **options)(CHANNELS, **more).to(dtype)
    torch.manual_seed(0)
    x = 1000 + torch.randn(7, CHANNELS, 4, 4)
    domain = torch.arange(7) % 2 if "domain" in info.needs else None
    domain = workers.share(domain) if domain is not None else None
    with situation(norm, domain=domain, workers=workers), torch.no_grad():
        y = norm(workers.share(x).to(dtype))
    # of evonorm x is not centred; its variance is what could be lost
    return (y / workers.share(x).to(dtype) if name == "evonorm_b0" else y).double().numpy()


def twice_differentiated(workers: Workers) -> Any:
    """Gradients of a penalty on a bn's gradient, for its inputs and its weight."""
    norm = make_norm("bgn", num_groups=2)(CHANNELS).double()
    torch.manual_seed(0)
    x = workers.share(torch.randn(5, CHANNELS, 2, 2, dtype=torch.float64)).requires_grad_()
    with situation(norm, workers=workers):
        y = norm(x)
    (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return [x.grad.numpy(), workers.total(norm.weight.grad).numpy()]


def too_few(workers: Workers) -> dict[str, str]:
    """What norms say to one value per channel of all workers."""
    said = {}
    for name in ("bn", "ghost", "ebn", "iebn", "brn", "sabn"):
        norm = make_norm(name)(CHANNELS)
        domain = 0 if name == "sabn" else None
        try:
            with situation(norm, domain=domain, workers=workers):
                norm(workers.share(torch.randn(1, CHANNELS)))
        except ValueError as e:
            said[name] = str(e)
    return said


def compiled(rank: int, size: int) -> Any:
    """By worker `rank`: running means of a norm that was compiled alone, trained with workers; and what vmap says."""
    workers = Workers(rank, size)
    torch.manual_seed(0)
    x = torch.randn(8, CHANNELS, 2, 2)
    norm = make_norm("bn", momentum=1.0)(CHANNELS)
    fast = torch.compile(norm, backend="eager")
    fast(x)
    with situation(norm, slices=1, workers=workers):
        fast(workers.share(x))
        try:
            torch.func.vmap(norm)(x[None])
        except RuntimeError as e:
            return norm.running_mean.numpy(), str(e)
    return norm.running_mean.numpy(), ""


def users_norms() -> None:
    """Two norms as a user writes them: "mine" merges its moments itself, "mine_too" computes them in a way of its own,
    and both give them to `track`; "heir" inherits a forward."""
    if "mine" in norm_names():
        return

    @register(name="mine", source="a test", mixes_samples=True, keeps_stats=True)
    class Mine(BatchStatistics):
        syncs = True

        def __init__(self, num_channels: int, *, affine: bool = True, momentum: float | None = 0.1):
            super().__init__(num_channels, num_channels, 1e-5, momentum, affine, None, None)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            _, var = batch_moments(x, self.merging)
            return self.train_on(x, self.weight, self.bias) * torch.sqrt(var + 1).view(-1, 1, 1)

    @register(name="heir", source="a test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    class Heir(BatchStatistics):
        def __init__(self, num_channels: int, *, affine: bool = True, momentum: float | None = 0.1):
            super().__init__(num_channels, num_channels, 1e-3, momentum, affine, None, None)

    @register(name="mine_too", source="a test", mixes_samples=True, keeps_stats=True)
    class MineToo(RunningStatistics):
        def __init__(self, num_channels: int, *, affine: bool = True, momentum: float | None = 0.1):
            super().__init__(num_channels, momentum)

        def forward(self, x: Tensor) -> Tensor:
            mean, var = self.running_mean, self.running_var
            if self.training:
                var, mean = torch.var_mean(x, (0, 2, 3))
                self.track(mean.detach()[None], var.detach()[None], x.numel() // x.shape[1])
            return (x - mean.view(-1, 1, 1)) / torch.sqrt(var + 1e-5).view(-1, 1, 1)


def mismatches(case: Case, found: list[dict[str, Any]], one: dict[str, Any]) -> list[str]:
    """What workers have otherwise than one process, in words; `found` in the order of ranks."""
    steps, size = len(case.batches), len(found)
    wrong = []
    for kind, within in (
        ("outputs", OUTPUTS),
        ("gradients", GRADIENTS),
        ("statistics", STATISTICS),
        ("evaluated", 1e-11),
    ):
        for rank, of in enumerate(found):
            for i, (own, other) in enumerate(zip(of[kind], one[kind], strict=True)):
                shared = kind in ("outputs", "gradients") and i < steps
                expected = other[rank::size] if shared else other
                apart = abs(own - expected).max(initial=0.0) / max(1.0, abs(expected).max(initial=0.0))
                if own.shape != expected.shape or not apart <= within:
                    wrong.append(f"{case}: {kind} {i} of worker {rank}: {apart:.1e}")
    return wrong
