"""The vocabulary of metrics: unit, direction, digits and title of every number that a table may print.

Stored values are in base units (fractions in [0, 1], seconds, megabytes) and full precision; `scale` and `digits` act
only when a value is printed. A task of one's own adds its metrics with `add_metric`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from results.escape import cut

_LONGEST = 1e12  # a number of more digits is not read digit by digit


@dataclass(frozen=True)
class Metric:
    """How one number is read and printed.

    Args:
        name: the key in a record's metrics.
        title: as in a table's heading, without unit.
        unit: of the printed value; "" for a pure number.
        higher_is_better: True or False where one direction is better, None where there is none (never marked best).
        digits: after the decimal point, or significant ones where `significant`.
        scale: printed value = stored value * scale (100 prints a fraction in percent).
        significant: print `digits` significant digits (for values that span orders of magnitude).
        description: one sentence for `list metrics`.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    digits: int = 3
    scale: float = 1.0
    significant: bool = False
    description: str = ""

    @property
    def heading(self) -> str:
        """Title, unit and an arrow towards the better values: 'top-1 (%) ↑'."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.title}{f' ({self.unit})' if self.unit else ''}{arrow}"

    def text(self, value: float) -> str:
        """A stored value as printed: scaled, rounded, without unit; from 1e12 on with an exponent, as 1.0e+310."""
        if not math.isfinite(value):
            return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
        scaled = value * self.scale
        if (abs(scaled) >= _LONGEST and not self.significant) or math.isinf(scaled):
            return f"{Decimal(value) * Decimal(self.scale):.{max(1, self.digits)}e}"  # a percentage may leave float
        text = f"{scaled:.{self.digits}{'g' if self.significant else 'f'}}"
        return text.removeprefix("-") if float(text) == 0 else text

    def with_digits(self, digits: int | None) -> Metric:
        """This metric printed with so many digits after the decimal point; None, or one without a direction or printed
        with significant digits, stays as it is."""
        if digits is None or self.higher_is_better is None or self.significant:
            return self
        return replace(self, digits=digits)


def _percent(name: str, title: str, description: str) -> Metric:
    return Metric(name, title, "%", higher_is_better=True, digits=1, scale=100.0, description=description)


_VOCABULARY = (
    _percent("top1", "top-1", "Test accuracy of the reported checkpoint."),
    _percent(
        "top1_recalibrated",
        "top-1 recal.",
        "Test accuracy with running statistics re-estimated at fixed weights on augmented training images.",
    ),
    _percent(
        "top1_recalibrated_plain",
        "top-1 recal. plain",
        "The same with statistics from training images without augmentation.",
    ),
    _percent(
        "target_top1",
        "target top-1",
        "Accuracy on the target after the last epoch: its test images, or all of a held-out domain and then the mean "
        'over these; "target_top1/<domain>" is that of one.',
    ),
    Metric(
        "gain",
        "gain",
        "points",
        True,
        1,
        scale=100.0,
        description="Target top-1 less that of the same norm, seed and options trained on the source only.",
    ),
    _percent("worst_domain_top1", "worst domain", "Lowest target top-1 over the held-out domains, seed by seed."),
    _percent("target_top1_source_val", "target top-1 src. val", "The same at the epoch that source validation chose."),
    _percent(
        "target_top1_im",
        "target top-1 IM",
        "The same at the epoch that information maximization chose, without any label of the target.",
    ),
    _percent(
        "target_top1_adabn",
        "target top-1 AdaBN",
        "The same with running statistics re-estimated on unlabelled training images of the target.",
    ),
    Metric(
        "target_top1_oracle",
        "target top-1 oracle",
        "%",
        None,  # chosen by target labels: no result, and never ranked
        1,
        scale=100.0,
        description="The same at the epoch that labels of the target's validation images chose: what the other rules "
        "leave, no result.",
    ),
    _percent("source_top1", "source top-1", "Accuracy on the test images of the source; of several sources the mean."),
    _percent(
        "robust_top1", "robust top-1", "Test images right without attack and under every attack, each at its worst."
    ),
    Metric(
        "robust_ci95",
        "robust ±95%",
        "points",
        None,
        1,
        scale=100.0,
        description="Half width of Wilson's 95 % interval of robust top-1, over the attacked images of one run.",
    ),
    _percent("clean_top1", "clean top-1", "Accuracy on the attacked test images as they are."),
    _percent("fgsm_top1", "FGSM top-1", "Test images right without and under FGSM."),
    _percent("pgd_top1", "PGD top-1", "Test images right without and under PGD, over all its restarts."),
    _percent("autoattack_top1", "AutoAttack top-1", "Test images right without and under every part of AutoAttack."),
    _percent(
        "acc_inductive", "inductive", "Mean accuracy over test episodes; each query is predicted without the others."
    ),
    _percent(
        "acc_transductive",
        "transductive",
        "The same episodes with the statistics of support and queries together, where samples mix.",
    ),
    Metric(
        "leak",
        "leak",
        "points",
        None,
        1,
        scale=100.0,
        description="Transductive less inductive accuracy: what the other queries tell.",
    ),
    Metric(
        "ci95",
        "±95%",
        "points",
        None,
        2,
        scale=100.0,
        description="Half width of the 95 % interval of inductive accuracy over episodes of one run; it ignores that "
        "episodes share images.",
    ),
    _percent("random_top1", "random top-1", "Test accuracy of random architectures, trained in the same way."),
    Metric(
        "gain_over_random",
        "gain",
        "points",
        True,
        1,
        scale=100.0,
        description="Test accuracy of the found architecture less that of random ones, in percentage points.",
    ),
    _percent("val_top1", "val top-1", "Accuracy on the validation part; the only one that may choose anything."),
    Metric(
        "im_score",
        "IM score",
        "nats",
        True,
        3,
        description="Information maximization on the target's validation images, without labels: entropy of the mean "
        "prediction less mean entropy of the predictions.",
    ),
    _percent("val_pgd_top1", "val PGD top-1", "Validation images right without and under PGD."),
    _percent("val_acc", "val acc.", "Mean inductive accuracy over validation episodes."),
    _percent("train_top1", "train top-1", "Accuracy on the training part."),
    _percent("search_val_top1", "search val top-1", "Accuracy of the search network on the validation part."),
    Metric("test_loss", "test loss", "nats", False, 3, description="Mean cross-entropy on the test part."),
    Metric("parameters", "params", "M", None, 3, scale=1e-6, description="Learned numbers in the retrained network."),
    Metric("skip_connections", "skips", "", None, 1, description="Skip connections among a genotype's 16 operations."),
    Metric(
        "composition_shift",
        "comp. shift",
        "",
        None,
        2,
        significant=True,
        description="Largest change of one image's evaluation logits when its batch mates change; above float noise "
        "the norm mixes samples at test time.",
    ),
    Metric("search_seconds", "search", "s", False, 0, description="Wall time of the architecture search."),
    Metric(
        "step_seconds",
        "step",
        "ms",
        False,
        1,
        scale=1000.0,
        description="Median time of a training step (architecture search: of a search step) after warm-up.",
    ),
    Metric("peak_memory_mb", "peak memory", "MB", False, 0, description="Peak memory while training."),
    Metric("norm_parameters", "norm params", "", None, 0, description="Learned numbers in all norms."),
    Metric("norm_buffers", "norm buffers", "", None, 0, description="Kept but not learned numbers in all norms."),
)

METRICS: dict[str, Metric] = {m.name: m for m in _VOCABULARY}
"""Every known metric by name, in the order in which tables show them."""

VALIDATION = ("val_pgd_top1", "val_acc", "val_top1")
"""Metrics of validation data. Where a task does not declare its own, the first of these that it measured may choose a
hyper-parameter."""

TARGET, GAIN, WORST = "target_top1", "gain", "worst_domain_top1"

RANKS: dict[str, str] = {}
"""Task -> the metric that ranks norms in it, as `add_metric` was told; a task's own declaration goes before."""
VALIDATES: dict[str, str] = {}
"""Task -> the metric that may choose hyper-parameters in it, likewise."""

_COSTS = frozenset({"ns", "us", "µs", "ms", "s", "min", "h", "kB", "KB", "MB", "GB", "KiB", "MiB", "GiB"})
_OURS = frozenset(METRICS)
LONGEST_TITLE = 80
"""Characters of a title that comes from a record or a results folder, and not from this vocabulary."""


def metric(name: str) -> Metric:
    """The metric of this name. Raises ValueError with the nearest name for an unknown one."""
    found = METRICS.get(name) or _of_domain(name)
    if found is None:
        raise ValueError(f'unknown metric "{name}"; metrics: {", ".join(METRICS)}{nearest(name, METRICS)}')
    return found


def add_metric(
    new: Metric, primary_of: str | None = None, validation_of: str | None = None, *, replace: bool = False
) -> Metric:
    """Add a metric of one's own.

    Args:
        new: its name must be free (or hold an equal metric, so that a plugin may be loaded twice).
        primary_of: a task that it ranks; one's own task says so itself (`headline` in tasks.base).
        validation_of: a task in which it may choose hyper-parameters; likewise (`validation`).
        replace: take the place of a metric of one's own, for notebooks.

    Raises:
        ValueError: the name is taken by another metric.
    """
    if METRICS.get(new.name, new) != new and (not replace or new.name in _OURS):
        hint = "" if new.name in _OURS else "; replace=True replaces it"
        raise ValueError(f'metric "{new.name}" is already defined as {METRICS[new.name]}; choose another name{hint}')
    METRICS[new.name] = new
    if primary_of is not None:
        RANKS[primary_of] = new.name
    if validation_of is not None:
        VALIDATES[validation_of] = new.name
    return new


def metric_or_plain(name: str) -> Metric:
    """The metric of this name, or (for a plugin's metric whose plugin is not loaded) one without unit and direction."""
    found = METRICS.get(name) or _of_domain(name)
    return found or Metric(name, cut(name, LONGEST_TITLE).replace("_", " "), digits=4, significant=True)


def is_cost(name: str) -> bool:
    """Whether a metric is a time or memory: what it took, which no two runs share, and no result."""
    return metric_or_plain(name).unit in _COSTS


def domain_of(name: str) -> str:
    """The domain of a metric "<metric>/<domain>"; "" for any other metric."""
    return name.partition("/")[2]


def of_domain(base: Metric, name: str) -> Metric:
    """The metric "<metric>/<domain>": `base` where a single domain is held out."""
    domain = cut(domain_of(name), LONGEST_TITLE)
    said = f"{base.title[:1].upper()}{base.title[1:]} where {domain} is held out."
    return replace(base, name=name, title=domain, description=said)


def _of_domain(name: str) -> Metric | None:
    base, _, domain = name.partition("/")
    return of_domain(METRICS[base], name) if domain and base in METRICS else None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """': did you mean "x"?' or ''; the tail of every unknown-name message of this package."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
