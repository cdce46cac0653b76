"""What tests of classification share: planted bars, a tiny run, own norms."""

import pytest
import torch
import torch.nn.functional as F
from parts.planted import bars, known
from torch import nn

from norms import registry
from norms.factory import factory_info
from norms.registry import make_norm
from tasks.base import RunContext
from tasks.classification.task import TASK

OPTIONS = {"gn": {"num_groups": 8}, "bgn": {"num_groups": 4}}
SHAPE = (1, 16, 16)
CLASSES = 4
TINY = {
    "dataset": "planted",
    "model": "resnet8",
    "width": 8,
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.2,
    "augmentation": "none",
    "recalibration_images": 64,
}


def planted(sizes=(256, 64, 128), shuffled=False):
    return bars(sizes, SHAPE, CLASSES, shuffled=shuffled)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """The planted data under its name; a test may put other data into `data.value`."""
    return known(monkeypatch, planted())


@pytest.fixture
def own_norms():
    """Norms of a user, known to the registry for one test only."""

    @registry.register(name="copycat", source="test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    def copycat(num_channels, *, affine: bool = True, device=None, dtype=None):
        return make_norm("bn")(num_channels, affine=affine, device=device, dtype=dtype)

    @registry.register(name="peeker", source="test", mixes_samples=False, keeps_stats=False)
    class Peeker(nn.Module):
        """Looks at values, which the meta device has not, and refuses more than 16 channels."""

        def __init__(self, num_channels, *, most: int = 16, affine: bool = True):
            super().__init__()
            if num_channels > most:
                raise ValueError(f"peeker: {num_channels} channels are more than {most}")

        def forward(self, x):
            return x if x.abs().max().item() >= 0 else -x

    @registry.register(name="crowd", source="test", mixes_samples=True, keeps_stats=False)
    class Crowd(nn.Module):
        """Refuses norm batches below eight images."""

        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            if len(x) < 8:
                raise ValueError(f"crowd: 8 images are needed, given {len(x)}")
            return x

    @registry.register(name="blank", source="test", mixes_samples=False, keeps_stats=False)
    class Blank(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return 0 * x

    @registry.register(name="broken", source="test", mixes_samples=False, keeps_stats=False)
    class Broken(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            raise RuntimeError("a defect of this layer")

    @registry.register(name="mixer", source="test", mixes_samples=True, keeps_stats=False, mixes_samples_in_eval=True)
    class Mixer(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    @registry.register(name="domains", source="test", mixes_samples=True, keeps_stats=True, needs=frozenset({"domain"}))
    class Domains(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()


def factory(name):
    return make_norm(name, **OPTIONS.get(name, {}))


def run(name="bn", seed=0, report=lambda fraction: None, **options):
    context = RunContext(torch.device("cpu"), seed, None, None, report)
    return TASK.run(factory(name), TASK.options(**(TINY | options)), context)


def why_not(name, **options):
    norm = make_norm(name, **OPTIONS.get(name, {})) if isinstance(name, str) else name
    return TASK.why_not(norm, factory_info(norm), TASK.options(**(TINY | options)))


TIMED = ("step_seconds", "peak_memory_mb")


def results(outcome):
    """What must be equal in two equal runs: everything but time and memory."""
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in outcome.history]
    return {k: v for k, v in outcome.metrics.items() if k not in TIMED}, history
