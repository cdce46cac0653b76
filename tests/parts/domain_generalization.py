"""What tests of domain generalization share: four planted domains, tiny options."""

import pytest
import torch
from parts.planted import bars

from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from tasks import data as datasets
from tasks.base import RunContext
from tasks.domain_generalization.options import DomainGeneralizationOptions

NORM_OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
NEEDS_KNOWN_DOMAIN = ("dsbn", "dual_bn", "transnorm", "sabn")
SHAPE, CLASSES = (3, 16, 16), 4
NAMES = ("mnist", "uci", "fonts", "blend")
TINY = {"width": 4, "epochs": 2, "batch_size": 16, "learning_rate": 0.8, "augmentation": "crop"}


def planted(contrast, seed, size=96):
    return bars((size, 40, 60), SHAPE, CLASSES, seed, contrast)


@pytest.fixture
def domains(monkeypatch):
    """Planted domains of different contrast and size in the place of the digits'; a test may change them."""
    held = {name: planted(1 - 0.2 * i, i, 96 - 16 * i) for i, name in enumerate(NAMES)}
    monkeypatch.setattr(datasets, "load", lambda name, folder, domain, classes=None: held[domain])
    return held


def options(**given):
    return DomainGeneralizationOptions(**{**TINY, **given})


def context(tmp_path, seed=0):
    return RunContext(torch.device("cpu"), seed, tmp_path, tmp_path)


def norm(name, domains=3):
    facts = {"num_domains": domains} if "domain" in norm_info(name).needs else {}
    return make_norm(name, **NORM_OPTIONS.get(name, {}), **facts)
