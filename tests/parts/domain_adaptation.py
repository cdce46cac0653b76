"""What tests of domain adaptation share: two planted domains, tiny options."""

import pytest
import torch
from parts.planted import bars

from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from tasks import data as datasets
from tasks.base import RunContext
from tasks.domain_adaptation.options import OF_METHODS, DomainAdaptationOptions
from tasks.domain_adaptation.task import TASK

METHODS = tuple(OF_METHODS)
NORM_OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
SHAPE, CLASSES = (3, 16, 16), 4
TINY = {"width": 4, "epochs": 2, "batch_size": 32, "learning_rate": 0.4, "augmentation": "crop", "mcd_steps": 1}
WITH_TARGET_LABELS = {"target_top1", "target_val_top1"}


def planted(contrast, seed):
    return bars((128, 40, 60), SHAPE, CLASSES, seed, contrast)


@pytest.fixture
def domains(monkeypatch):
    """The planted domains "mnist" and "blend" in the place of the data set's; a test may change them."""
    held = {"mnist": planted(1.0, 0), "blend": planted(0.8, 1)}
    monkeypatch.setattr(datasets, "load", lambda name, folder, domain, classes=None: held[domain])
    return held


def options(method="dann", **given):
    tiny = {k: v for k, v in TINY.items() if k not in OF_METHODS["mcd"] or method == "mcd"}
    return DomainAdaptationOptions(method=method, **{**tiny, **given})


def context(tmp_path, seed=0):
    return RunContext(torch.device("cpu"), seed, tmp_path, tmp_path)


def norm(name, spec):
    facts = {"num_domains": TASK.setting(spec).num_domains} if "domain" in norm_info(name).needs else {}
    return make_norm(name, **NORM_OPTIONS.get(name, {}), **facts)
