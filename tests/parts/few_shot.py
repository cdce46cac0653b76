"""What tests of few-shot learning share: planted classes, tiny options, networks and episodes."""

import pytest
import torch
from parts.planted import known

from norms.registry import make_norm, norm_names, norm_option_defaults
from norms.situation import situation
from tasks.base import RunContext
from tasks.data.images import Split, make_data
from tasks.few_shot.networks import build_few_shot_net
from tasks.few_shot.options import FewShotOptions

NORM_OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
SHAPE, PER_CLASS = (1, 16, 16), 8
TINY = {
    "dataset": "planted",
    "width": 8,
    "way": 3,
    "queries": 4,
    "steps": 10,
    "test_episodes": 20,
    "val_episodes": 5,
    "query_augmentation": "none",
    "meta_batch_size": 2,
    "inner_steps": 2,
    "imprinting_batch_size": 16,
}
METHODS = ("prototypical", "maml", "imprinting")
PARTS = ("train", "val", "test")
COST = ("step_seconds", "peak_memory_mb")


def part_of(classes, first, generator, noise=False):
    """Every class is a picture of its own with a little noise; with `noise` nothing but noise."""
    labels = torch.arange(first, first + classes).repeat_interleave(PER_CLASS)
    pictures = torch.randint(50, 206, (classes, *SHAPE), generator=generator).float()
    images = pictures[labels - first] + torch.randint(-5, 6, (len(labels), *SHAPE), generator=generator)
    if noise:
        images = torch.randint(256, (len(labels), *SHAPE), generator=generator)
    return Split(images.clamp(0, 255).to(torch.uint8), labels)


def planted(noise=False, test_classes=6):
    g = torch.Generator().manual_seed(0)
    sizes = {"train": (10, 0), "val": (4, 10), "test": (test_classes, 14)}
    parts = {part: part_of(count, first, g, noise) for part, (count, first) in sizes.items()}
    return make_data("planted", "planted", parts, kind="synthetic", checksum="0", num_classes=40, disjoint_classes=True)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """The planted data under its name (a test may replace `value`)."""
    return known(monkeypatch, planted())


def context(tmp_path, seed=0):
    return RunContext(torch.device("cpu"), seed, tmp_path, tmp_path)


def options(**given):
    return FewShotOptions(**{**TINY, **given})


def norm(name):
    return make_norm(name, **NORM_OPTIONS.get(name, {}))


def network(name, method="prototypical", seed=0, **more):
    facts = {"image_shape": SHAPE, "num_classes": 3, "width": 8} | more
    return build_few_shot_net(
        "conv4", method, norm(name), generator=lambda p: torch.Generator().manual_seed(len(p) + seed), **facts
    )


def warmed(name, method="prototypical"):
    """A network whose running statistics are not the initial ones."""
    net = network(name, method)
    with situation(net, part="context"):
        for seed in range(3):
            net(3 * torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 1)
    return net


def episode_images(seed=0, support=6, queries=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(support, *SHAPE, generator=g), torch.randn(queries, *SHAPE, generator=g)
