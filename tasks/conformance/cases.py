"""The cases of a check: options that make a task's runs small, and labels that its runs must not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks import get_task
from tasks.conformance.planted import DOMAINS

SUPERVISED: dict[str, Any] = {
    "model": "resnet8",
    "width": 4,
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.4,
    "augmentation": "crop_flip",
}
SMALL: dict[str, dict[str, Any]] = {
    "classification": {**SUPERVISED, "recalibration_images": 16},
    "adversarial": {
        **SUPERVISED,
        "steps": 2,
        "attack_images": 16,
        "pgd_steps": 2,
        "pgd_restarts": 2,
        "autoattack": ["apgd_ce", "square"],
        "apgd_steps": 2,
        "square_queries": 3,
    },
    "domain_adaptation": {**SUPERVISED, "source": DOMAINS[0], "target": DOMAINS[1], "adabn_images": 16},
    "domain_generalization": {**SUPERVISED, "domains": list(DOMAINS), "held_out": DOMAINS[2]},
    "few_shot": {
        "width": 4,
        "way": 3,
        "queries": 2,
        "steps": 40,
        "test_episodes": 6,
        "val_episodes": 4,
        "meta_batch_size": 2,
    },
    "architecture_search": {
        "augmentation": "crop_flip",
        "search_channels": 2,
        "search_cells": 3,
        "search_epochs": 2,
        "search_max_steps": 4,
        "search_batch_size": 10,
        "order": "first",
        "architecture_learning_rate": 0.1,
        "retrain_channels": 2,
        "retrain_cells": 3,
        "retrain_epochs": 2,
        "retrain_max_steps": 4,
        "retrain_batch_size": 20,
        "auxiliary_weight": 0,
        "retrain_cutout": 2,
        "recalibration_images": 20,
    },
}
"""task -> options that it is checked with; the planted data set comes to them."""


def small_options(name: str) -> dict[str, Any]:
    """The options that a task is checked with, beside the data."""
    task = get_task(name)
    if name in SMALL:
        return dict(SMALL[name])
    own = getattr(task, "small", None)
    if own is not None:
        return dict(own)
    fields = task.options.model_fields
    return dict(SUPERVISED) if SUPERVISED.keys() <= fields.keys() else {}


@dataclass(frozen=True)
class Labels:
    """Labels that a run may use for its scores and for nothing else.

    Attributes:
        of: in words.
        where: (domain, part) of their images; the domain of a set without is "".
        metrics, columns: of the outcome and of the history, which these labels may move.
        artifacts: files that hold such scores.
    """

    of: str
    where: Sequence[tuple[str, str]]
    metrics: frozenset[str]
    columns: frozenset[str] = frozenset()
    artifacts: frozenset[str] = frozenset()


def _labels(of: str, where: Sequence[tuple[str, str]], metrics: str, columns: str = "", artifacts: str = "") -> Labels:
    return Labels(of, where, frozenset(metrics.split()), frozenset(columns.split()), frozenset(artifacts.split()))


_TEST = [("", "test")]
HIDDEN: dict[str, list[Labels]] = {
    "classification": [_labels("test images", _TEST, "top1 test_loss top1_recalibrated top1_recalibrated_plain")],
    "adversarial": [
        _labels("test images", _TEST, "robust_top1 robust_ci95 clean_top1 fgsm_top1 pgd_top1 autoattack_top1")
    ],
    "domain_adaptation": [
        _labels(
            "target test images",
            [(DOMAINS[1], "test")],
            "target_top1 target_top1_adabn target_top1_source_val target_top1_im target_top1_oracle",
            "target_top1",
        ),
        _labels(
            "target training and validation images",
            [(DOMAINS[1], "train"), (DOMAINS[1], "val")],
            "target_top1_oracle",
            "target_val_top1",
        ),
    ],
    "domain_generalization": [
        _labels(
            "held-out images",
            [(DOMAINS[2], part) for part in ("train", "val", "test")],
            "target_top1 target_top1_source_val",
            "target_top1",
        )
    ],
    "few_shot": [_labels("test images", _TEST, "acc_inductive acc_transductive leak ci95")],
    "architecture_search": [
        _labels(
            "test images",
            _TEST,
            "top1 random_top1 gain_over_random top1_recalibrated test_loss",
            artifacts="random_genotypes.json",
        )
    ],
}
"""task -> the labels that its runs must not learn from. Other tasks: those of all test images, which may move every
metric, and columns that are named as metrics."""
