"""Small networks of one norm, trained for a few steps by one process or by one of several workers, to be compared.

A `Case` says the norm and how it is trained. `trained(case, workers)` gives everything that the norm's numbers show in,
of this worker's part; `of_rank(rank, size, cases)` all cases in one of the processes of
parts.worker_processes.together; `mismatches` what differs from one process alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norms.registry import make_norm, norm_info
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
        layout: of the inputs.
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
    layout: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        told = [f"{k}={v}" for k, v in self.options.items()]
        told += ["sync"] * self.sync + [f"slices={self.slices}"] * (self.slices > 1) + ["no affine"] * (not self.affine)
        told += [f"batches={self.batches}"] * (len(set(self.batches)) > 1 or self.batches[0] != 16)
        told += [f"side={self.side}"] * (self.side != 3) + ["one domain"] * (not self.mixed)
        told += [f"centre={self.centre}"] * bool(self.centre) + ["last"] * (self.layout != torch.contiguous_format)
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


def of_rank(rank: int, size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """`trained` of every case, by worker `rank`."""
    return [trained(case, Workers(rank, size, case.sync)) for case in cases]


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
