"""The choice of the reported epoch: the last one, and the choices of other rules from the same run.

Every epoch's network is measured; a rule is then a column of the history. Rules that need no target label see the
target without its labels; the oracle's column and the scores come from `score`, the only function that is given target
labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from norms.situation import predict, situation
from norms.workers import ALONE, Workers
from tasks.data.reading import Part, in_order
from tasks.domain_adaptation.losses import information
from tasks.domain_adaptation.options import SOURCE
from tasks.evaluate import EVALUATION_BATCH, Evaluation, evaluate, evaluating
from tasks.inputs import Prepare
from tasks.step import Precision, autocast
from tasks.workers import rows

RULES = {"source_val": "val_top1", "im": "im_score", "oracle": "target_val_top1"}
"""Selection rule -> the column of the history whose largest value it takes; the earliest of equal ones."""


def measure(
    net: nn.Module,
    part: Part,
    prepare: Prepare,
    domain: int,
    what: str,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> Evaluation:
    """`net` on one part of one domain, in stored order. Raises Diverged."""
    batches = ((prepare(images), labels) for images, labels in in_order(part, EVALUATION_BATCH, workers))
    return evaluate(net, batches, precision, what, domain, workers)


@torch.no_grad()
def observe(
    net: nn.Module,
    source_val: Part,
    target_val: Part,
    prepare: Prepare,
    domain: int,
    what: str,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> dict[str, float]:
    """The scores that may choose an epoch: source validation accuracy, and information maximization on target images.

    Args:
        net: evaluated as it is; in its mode afterwards.
        source_val: with labels.
        target_val: its labels are not looked at.
        prepare: images -> input.
        domain: told of target images.
        what: for the message of Diverged.
        precision: of the forwards.
        workers: that share the batches; each returns the scores of all.
    """
    inputs = (prepare(images) for images, _ in in_order(target_val, EVALUATION_BATCH, workers))
    with evaluating(net), situation(net, domain):
        found = [_logits(net, images, precision) for images in inputs]
    logits = rows(found, EVALUATION_BATCH, len(target_val), workers, next(net.parameters()).device).cpu()
    return {
        "val_top1": measure(net, source_val, prepare, SOURCE, f"source validation {what}", precision, workers).top1,
        "im_score": information(logits),
    }


def _logits(net: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    with autocast(images.device, precision):
        return predict(net, images).cpu()


def score(
    net: nn.Module,
    target_val: Part,
    target_test: Part,
    prepare: Prepare,
    domain: int,
    what: str,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> dict[str, float]:
    """With target labels: the oracle's column and the accuracy that is reported for an epoch. Chooses nothing."""
    return {
        name: measure(net, part, prepare, domain, f"target {kind} {what}", precision, workers).top1
        for name, part, kind in (
            ("target_val_top1", target_val, "validation"),
            ("target_top1", target_test, "test"),
        )
    }


def choose(history: Sequence[dict[str, float]]) -> Iterator[tuple[str, int]]:
    """(rule, position in the history) for each of RULES."""
    for rule, column in RULES.items():
        values = [row[column] for row in history]
        yield rule, values.index(max(values))
