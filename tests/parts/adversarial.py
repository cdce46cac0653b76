"""What tests of adversarial training share: planted bars, tiny options, a built network and a batch."""

import pytest
import torch
from parts.planted import bars, known

from norms.registry import make_norm, norm_names, norm_option_defaults
from tasks.adversarial.networks import build
from tasks.adversarial.options import AdversarialOptions
from tasks.adversarial.training import scaled
from tasks.base import RunContext
from tasks.inputs import facts_of

NORM_OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
SHAPE, CLASSES = (1, 16, 16), 4
TINY = {
    "dataset": "planted",
    "width": 4,
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.4,
    "augmentation": "none",
    "steps": 2,
    "attack_images": 40,
    "pgd_steps": 3,
    "pgd_restarts": 2,
    "autoattack": ("apgd_ce", "square"),
    "apgd_steps": 3,
    "square_queries": 5,
}


def planted():
    return bars((256, 64, 80), SHAPE, CLASSES)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """The planted data under its name."""
    return known(monkeypatch, planted()).value


def context(tmp_path, seed=0):
    return RunContext(torch.device("cpu"), seed, tmp_path, tmp_path)


def options(**given):
    return AdversarialOptions(**{**TINY, **given})


def norm(name):
    return make_norm(name, **NORM_OPTIONS.get(name, {}))


def built(name, data, opts, tmp_path):
    return build(norm(name), opts, facts_of(data), generator=context(tmp_path).generator)


def batch(data, opts, n=16):
    images = scaled(data.train.images[:n], opts)
    return images, data.train.labels[:n]
