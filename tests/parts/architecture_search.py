"""What tests of architecture search share: planted quarters, a tiny run, own norms."""

import pytest
import torch
from parts.planted import known
from torch import nn

from norms import registry
from norms.factory import factory_info
from norms.registry import make_norm, norm_names, norm_option_defaults
from tasks.architecture_search.task import TASK
from tasks.base import RunContext
from tasks.data.images import Split, make_data
from tasks.journal import Journal

GROUPS = {n: {"num_groups": 2} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
SHAPE, CLASSES = (1, 8, 8), 4
TINY = {
    "dataset": "planted",
    "augmentation": "none",
    "search_channels": 2,
    "search_cells": 3,
    "search_epochs": 1,
    "search_max_steps": 3,
    "search_batch_size": 16,
    "order": "first",
    "architecture_learning_rate": 0.1,
    "retrain_channels": 2,
    "retrain_cells": 3,
    "retrain_epochs": 1,
    "retrain_max_steps": 2,
    "retrain_batch_size": 16,
    "auxiliary_weight": 0,
    "drop_path": 0.2,
    "retrain_cutout": 2,
    "recalibration_images": 32,
}


def planted(sizes=(130, 32, 48), side=SHAPE[1]):
    """Classes differ by which quarter of the image is bright."""
    draw = torch.Generator().manual_seed(0)
    parts = {}
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        labels = torch.arange(size) % CLASSES
        images = torch.randint(60, (size, 1, side, side), generator=draw)
        half = side // 2
        for i, label in enumerate(labels.tolist()):
            y, x = half * (label // 2), half * (label % 2)
            images[i, 0, y : y + half, x : x + half] += 150
        parts[part] = Split(images.to(torch.uint8), labels)
    return make_data("planted", "planted", parts, kind="synthetic", checksum="0", num_classes=CLASSES)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """The planted data under its name; a test may put other data into `data.value`."""
    return known(monkeypatch, planted())


@pytest.fixture
def own_norms():
    """Norms of a user, until the test ends (conftest)."""

    @registry.register(name="copycat", source="test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    def copycat(num_channels, *, affine: bool = True, device=None, dtype=None):
        return make_norm("bn")(num_channels, affine=affine, device=device, dtype=dtype)

    @registry.register(name="fused", source="test", mixes_samples=False, keeps_stats=False, needs={"activation"})
    class Fused(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True, activation=None):
            super().__init__()
            if activation is None:
                raise ValueError("fused: there is no form without an activation")

    @registry.register(name="needs_affine", source="test", mixes_samples=False, keeps_stats=False)
    class NeedsAffine(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            if not affine:
                raise ValueError("needs_affine: it has no form without affine")

        def forward(self, x):
            return x

    @registry.register(name="sees_weight", source="test", mixes_samples=False, keeps_stats=False, needs={"conv_weight"})
    class SeesWeight(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x, weight):
            return x

    @registry.register(name="domains", source="test", mixes_samples=True, keeps_stats=True, needs={"domain"})
    class Domains(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()


def factory(name):
    return make_norm(name, **GROUPS.get(name, {}))


def run(folder, name="bn", seed=0, report=lambda fraction: None, journal=None, **options):
    folder.mkdir(exist_ok=True)
    context = RunContext(torch.device("cpu"), seed, None, folder, report, journal or Journal())
    return TASK.run(factory(name), TASK.options(**(TINY | options)), context)


def why_not(name, **options):
    norm = factory(name)
    return TASK.why_not(norm, factory_info(norm), TASK.options(**(TINY | options)))


TIMED = {"step_seconds", "search_seconds", "peak_memory_mb"}


def results(outcome):
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in outcome.history]
    return {k: v for k, v in outcome.metrics.items() if k not in TIMED}, history


def is_nothing_alone(name):
    """Whether a norm, built without an activation, says that only its affine is left."""
    return getattr(factory(name)(8), "equivalent_to", None) == "none"


SERVED = [n for n in norm_names(without=["domain", "context", "conv_weight"]) if not is_nothing_alone(n)]
