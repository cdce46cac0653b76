"""What tests of steps, schedules and evaluation share: a small network, a batch, a few updates, own norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from norms import registry
from norms.registry import make_norm
from tasks.base import RunContext
from tasks.nets.models import build_net
from tasks.schedule import sgd
from tasks.step import StepOptions, train_step

OPTIONS = {"gn": {"num_groups": 8}, "bgn": {"num_groups": 4}}


def build(name="bn", model="resnet8", **options):
    generator = RunContext(torch.device("cpu"), 0, None, None).generator
    options = {"num_classes": 3, "in_channels": 1, "width": 8, "generator": generator, **options}
    return build_net(model, make_norm(name, **OPTIONS.get(name, {})), **options)


def batch(size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 16, 16, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def steps(net, count=3, slices=1, lr=0.05, seed=0):
    optimizer = sgd(net, learning_rate=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(count):
        loss, _ = train_step(net, optimizer, *batch(seed=seed + step), StepOptions(slices), step=step)
        losses.append(loss.item())
    return losses


@pytest.fixture
def own_norms():
    """Norms of a user, known to the registry for one test only."""

    @registry.register(name="odd", source="test", mixes_samples=False, keeps_stats=False)
    class Odd(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.table = nn.Parameter(torch.ones(num_channels, 3))
            self.inner = nn.Linear(3, 1)

        def forward(self, x):
            return x * self.inner(self.table)[:, :, None]

    @registry.register(name="mixer", source="test", mixes_samples=True, keeps_stats=False, mixes_samples_in_eval=True)
    class Mixer(nn.Module):
        """Batch statistics in both modes, on which slices are not honoured by the layer itself."""

        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    @registry.register(
        name="looker",
        source="test",
        mixes_samples=False,
        keeps_stats=False,
        needs=frozenset({"second_look"}),
    )
    class Looker(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.register_buffer("looks", torch.zeros(2))
            self.progress = []

        def forward(self, x):
            with torch.no_grad():
                self.looks[int(self.situation.again)] += 1
            return x

        def after_update(self, progress):
            self.progress.append(progress)

    @registry.register(name="copycat", source="test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    def copycat(num_channels, *, affine: bool = True, device=None, dtype=None):
        return make_norm("bn")(num_channels, affine=affine, device=device, dtype=dtype)
