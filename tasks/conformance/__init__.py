"""The checks that every task must pass, built-in or a user's own: what it promises against what small runs of it do.

One function measures one fact and returns a Finding; FACTS lists them in the order of the table. Runs are of the
options in SMALL (of a task of one's own: of its attribute `small`, else of its defaults) on a few planted images
(tasks.conformance.planted); a task that has no option `dataset`, or refuses those images, reads its own data. Every
run has an empty folder, a journal that can be told to leave anywhere, and global generators in another state, so that
"the same" means that nothing but seed, options and data decides.

Of a user's plugin it is a note and no mistake where a run can not go on after an interruption: it begins anew.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from norms.conformance.subject import Finding, line, yes
from norms.factory import NormFactory
from norms.registry import make_norm, norm_info, resolve_norm_options
from norms.values import shown
from tasks import get_task
from tasks.base import check_names
from tasks.conformance.planted import DOMAINS, known, plant
from tasks.conformance.subject import TIMED, Made, Stop, Stopped, Subject, TooLong, reread
from tasks.options import NormChoice, newer_options

__all__ = ["FACTS", "Check", "Stopped", "TooLong", "check_task", "differing", "reread", "small_options", "subjects"]

_SUPERVISED: dict[str, Any] = {
    "model": "resnet8",
    "width": 4,
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.4,
    "augmentation": "crop_flip",
}
SMALL: dict[str, dict[str, Any]] = {
    "classification": {**_SUPERVISED, "recalibration_images": 16},
    "adversarial": {
        **_SUPERVISED,
        "steps": 2,
        "attack_images": 16,
        "pgd_steps": 2,
        "pgd_restarts": 2,
        "autoattack": ["apgd_ce", "square"],
        "apgd_steps": 2,
        "square_queries": 3,
    },
    "domain_adaptation": {**_SUPERVISED, "source": DOMAINS[0], "target": DOMAINS[1], "adabn_images": 16},
    "domain_generalization": {**_SUPERVISED, "domains": list(DOMAINS), "held_out": DOMAINS[2]},
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


@dataclass(frozen=True)
class Labels:
    """Labels that a run may use for its scores and for nothing else.

    Attributes:
        of: in words.
        where: (domain, part) of their images; the domain of a set without is "".
        metrics, columns: of the outcome and of the history, which these labels may move.
        artifacts: which hold such scores.
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


@dataclass(frozen=True)
class Check:
    """One fact of one task; the form is that of norms.conformance.Check.

    Attributes:
        task: the registered name.
        fact: what was looked at, in words.
        declared: what the task (or the contract) says; "-" where nothing is declared.
        measured: what its runs did.
        ok: False when the two contradict each other, or the check could not be carried out.
        detail: why, or what else there is to say; one line.
        hint: what usually causes it, where ok is False; one line.
        note: to be known, and no mistake.
    """

    task: str
    fact: str
    declared: str
    measured: str
    ok: bool
    detail: str = ""
    hint: str = ""
    note: bool = False

    @property
    def false(self) -> bool:
        """A mistake."""
        return not (self.ok or self.note)


def check_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    norm: Any = "bn",
    data_dir: Path = Path("data"),
    limit: float = 60.0,
) -> list[Check]:
    """Measure every fact of a registered task, with one norm, on the CPU. About ten small runs.

    Args:
        name: of the task.
        options: in the place of the small ones.
        norm: "gn" or {"gn": {"num_groups": 2}}.
        data_dir: where a task finds data of its own.
        limit: seconds that one run may take.

    Returns:
        One Check per fact, or the single check "runs" where no run came to its end.

    Raises:
        ValueError: unknown task, norm or option, a norm that can not serve, or a run that takes longer than `limit`.
    """
    with subjects(data_dir) as find:
        subject = find(name, options or {}, norm, limit)
        if reason := subject.task.why_not(subject.norm, subject.info, subject.options):
            raise ValueError(f'norm "{subject.info.name}" can not serve in {name}: {reason}; choose another one')
        try:
            subject.whole.ok  # noqa: B018 - the run is made once, and all facts are measured against it
        except TooLong:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a task under test raises is the finding
            return [Check(name, "runs", "yes", "no", False, line(error), HINTS["runs"])]
        return [_measure(subject, fact) for fact in FACTS]


def small_options(name: str) -> dict[str, Any]:
    """What a task is checked with, beside the data."""
    task = get_task(name)
    if name in SMALL:
        return dict(SMALL[name])
    own = getattr(task, "small", None)
    if own is not None:
        return dict(own)
    fields = task.options.model_fields
    return dict(_SUPERVISED) if _SUPERVISED.keys() <= fields.keys() else {}


class subjects:
    """Within the block: (name, options, norm, limit) -> the Subject. Planted data are written once for all of them."""

    def __init__(self, data_dir: Path = Path("data")):
        self.data_dir = data_dir.resolve()

    def __enter__(self) -> Callable[..., Subject]:
        self._temporary = tempfile.TemporaryDirectory(prefix="normsuite-check-")
        self.folder = Path(self._temporary.name).resolve()
        self._known = known(self.folder)
        self._threads = torch.get_num_threads()
        self._generators = random.getstate(), torch.get_rng_state()
        torch.set_num_threads(1)  # on so little a second one costs more than it computes
        self.names = self._known.__enter__()
        for kind, name in self.names.items():
            plant(self.folder / "data", kind, name)
        return self.find

    def __exit__(self, *error: Any) -> None:
        self._known.__exit__(*error)
        torch.set_num_threads(self._threads)
        random.setstate(self._generators[0])
        torch.set_rng_state(self._generators[1])
        self._temporary.cleanup()

    def find(
        self, name: str, options: Mapping[str, Any] | None = None, norm: Any = "bn", limit: float = math.inf
    ) -> Subject:
        """See check_task."""
        task, given = get_task(name), dict(options or {})
        check_names(given, task.options.model_fields, f"option of {name}")
        kind, resolved = self._options(task, name, given)
        choice = NormChoice.model_validate(norm)
        facts = asdict(task.setting(resolved))
        made = make_norm(choice.name, **resolve_norm_options(choice.name, choice.options, facts))
        where = self.folder / "data" if kind else self.data_dir
        return Subject(task, made, norm_info(choice.name), resolved, kind, where, self.folder, limit)

    def _options(self, task: Any, name: str, given: dict[str, Any]) -> tuple[str, BaseModel]:
        """The planted data that the task takes, and its options with them."""
        if "dataset" in task.options.model_fields and "dataset" not in given:
            refused: Exception | None = None
            for kind, dataset in self.names.items():
                try:
                    options = task.options(**{**small_options(name), "dataset": dataset, **given})
                    task.data_checksum(options, self.folder / "data")
                except (ValueError, TypeError) as error:
                    refused = refused or error
                else:
                    return kind, options
            if name in SMALL and refused is not None:
                raise ValueError(_one_line(refused)) from refused
        own = given if name not in SMALL and getattr(task, "small", None) is None else {**small_options(name), **given}
        try:
            options = task.options(**own)
        except ValidationError as error:
            raise ValueError(f"{name}: {_one_line(error)}") from error
        task.data_checksum(options, self.data_dir)
        return "", options


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return str(error)


# What equal runs are


def differing(
    one: Made,
    other: Made,
    metrics: frozenset[str] = frozenset(),
    columns: frozenset[str] = frozenset(),
    artifacts: frozenset[str] = frozenset(),
    evidence: bool = True,
) -> list[str]:
    """What two runs differ in, to the last bit, beside times and memory and the names that are given."""
    first, second = one.ok, other.ok
    found = _keys_that_differ(_untimed(first.metrics), _untimed(second.metrics), metrics)
    rows = [[_untimed(row) for row in outcome.history] for outcome in (first, second)]
    if len(rows[0]) != len(rows[1]):
        found.append(f"history of {len(rows[0])} and {len(rows[1])} rows")
    for number, pair in enumerate(zip(*rows, strict=False), 1):
        found += [f"{name} of row {number}" for name in _keys_that_differ(pair[0], pair[1], columns)]
    found += [f"artifact {name}" for name in _keys_that_differ(one.files, other.files, artifacts)]
    if evidence:
        found += [f"evidence {name}" for name in _keys_that_differ(first.evidence, second.evidence)]
    if first.trained is not None and second.trained is not None:
        weights = [outcome.trained.weights for outcome in (first, second) if outcome.trained is not None]
        found += [f"weights {name}" for name in _keys_that_differ(weights[0], weights[1])]
        if first.trained.facts != second.trained.facts:
            found.append("facts of the trained network")
    return found


def _untimed(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not name.endswith(TIMED)}


def _keys_that_differ(one: Mapping[str, Any], two: Mapping[str, Any], but: frozenset[str] = frozenset()) -> list[str]:
    return [
        name
        for name in dict.fromkeys([*one, *two])
        if name not in but and not (name in one and name in two and _same(one[name], two[name]))
    ]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two):
        return True
    return bool(one == two)


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _equal(names: Sequence[str], detail: str = "") -> Finding:
    return Finding("same", "same" if not names else "differs", _few(names) or detail)


# The facts


def metrics_returned(s: Subject) -> Finding:
    declared, returned = list(s.task.metrics), s.whole.ok.metrics
    wrong = [f"{name} is missing" for name in declared if name not in returned]
    wrong += [f"{name} is not declared" for name in returned if name not in declared]
    for name, value in returned.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            wrong.append(f"{name} is a {type(value).__name__}")
        elif value is not None and not math.isfinite(value):
            wrong.append(f"{name} = {value}")
    return Finding("as declared", "others" if wrong else "as declared", _few(wrong) or f"{len(declared)}, all finite")


def history_is_of_numbers(s: Subject) -> Finding:
    wrong = [
        f"{name} = {shown(value)} in row {number}"
        for number, row in enumerate(s.whole.ok.history, 1)
        for name, value in row.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    rows = f"{len(s.whole.ok.history)} rows"
    return Finding("numbers", "others" if wrong else "numbers", _few(wrong) or rows)


def same_twice(s: Subject) -> Finding:
    # under other global generators, where that is enough
    names = differing(s.whole, s.again) and differing(s.whole, s.run())
    return _equal(names, "metrics, history, artifacts, evidence, weights")


def global_generators_do_not_matter(s: Subject) -> Finding:
    names = differing(s.whole, s.again)
    return Finding("yes", yes(not names), _few(names))


def another_seed_is_another_run(s: Subject) -> Finding:
    other = s.run(seed=1)
    names = differing(s.whole, replace(other, files={}))
    return Finding("differs", "differs" if names else "same", "" if names else "no metric, row or weight")


def nothing_written_elsewhere(s: Subject) -> Finding:
    return Finding("yes", yes(not s.whole.strays), _few(s.whole.strays))


def progress(s: Subject) -> Finding:
    given = s.whole.reports
    ok = given == sorted(given) and all(0 <= fraction <= 1 for fraction in given)
    detail = f"{len(given)} reports, the last of {given[-1]:g}" if given else "no report"
    return Finding("rises in [0, 1]", "rises in [0, 1]" if ok else "falls, or leaves [0, 1]", detail)


def steps_as_told(s: Subject) -> Finding:
    if not hasattr(s.task, "steps"):
        return Finding("-", "not told", "without `steps` the suite can not say how long a run takes", True)
    told, made = s.task.steps(s.options, s.data_dir), s.whole.journal.steps_done
    return Finding(str(told), str(made), "updates")


def newer_options_at_their_defaults(s: Subject) -> Finding:
    given = s.options.model_dump()
    newer = newer_options(s.task.options)
    without = {name: value for name, value in given.items() if name not in newer}
    one, two = s.task.options(**without), s.task.options(**{**without, **newer})
    changed = _keys_that_differ(one.model_dump(), two.model_dump())
    return _equal(changed, f"{len(newer)} newer options")


def diverges_as_a_result(s: Subject) -> Finding:
    """Norms give NaN once an epoch is finished (or from the start on, where there is one epoch)."""
    first = s.whole.journal.ends[:1] if len(s.whole.journal.ends) > 1 else []
    found = s.run(breaks=lambda journal: journal.steps_done > first[0] if first else True)
    if found.diverged is None:
        return Finding("Diverged", "ends well")
    kept = found.diverged.history or found.journal.rows
    rows = [_untimed(row) for row in kept]
    if rows[: len(first)] != [_untimed(row) for row in s.whole.ok.history[: len(first)]]:
        return Finding("Diverged", "the history before is lost", line(found.diverged))
    return Finding("Diverged", "Diverged", f"{line(found.diverged)}; {len(rows)} rows kept")


class _Refuses(nn.Module):
    """A layer that serves nowhere."""

    def __init__(self, num_channels: int, *, affine: bool = True):
        super().__init__()
        raise ValueError(_REASON)


class _RefusesInTraining(nn.Module):
    def __init__(self, num_channels: int, *, affine: bool = True):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError(_REASON)
        return x


_REASON = "this layer refuses every network"


def skips_with_a_reason(s: Subject) -> Finding:
    wrong = []
    for build in (_Refuses, _RefusesInTraining):
        layers = replace(s.norm.func, build=build, options={})
        reason = s.task.why_not(NormFactory(layers), s.info, s.options)
        if reason is None:
            when = "built" if build is _Refuses else "forwarded in training"
            wrong.append(f"a norm that refuses to be {when} would be trained")
        elif not isinstance(reason, str) or not reason.strip() or "\n" in reason:
            wrong.append(f"the reason is {shown(reason)}")
        elif _REASON not in reason:
            wrong.append(f'"{reason}" is not what the norm says')
    return Finding("yes", yes(not wrong), "; ".join(wrong))


def goes_on_between_steps(s: Subject) -> Finding:
    """Stopped twice in the first epoch, and later."""
    stops = between_steps(s.whole.journal.ends, s.whole.journal.steps_done)
    if not stops:
        return Finding("same", "begins anew", "no loop of tasks.loop tells the journal of its steps")
    return _resumed(s, [("step", step) for step in stops])


def goes_on_in_evaluation(s: Subject) -> Finding:
    """In the middle of what is measured after the last update, by a signal and after an item."""
    stops = in_evaluation(s.whole)
    if not stops:
        return Finding("-", "none", "no norm is forwarded in evaluation mode after the last update", True)
    if not s.whole.journal.steps_done:
        return Finding("same", "begins anew", "no loop of tasks.loop")
    return _resumed(s, stops)


def _resumed(s: Subject, stops: list[Stop]) -> Finding:
    made = s.run(stops=stops, ambient=3)
    if made.processes != len(stops) + 1:
        return Finding("same", "never left", f"{made.processes - 1} of {len(stops)} stops were reached")
    if names := differing(s.whole, made):
        return Finding("same", "differs", f"{_few(names)}; stopped at {_places(stops)}")
    if made.updates != s.whole.updates:
        more = made.updates - s.whole.updates
        return Finding("same", "trains again", f"{more} of {s.whole.updates} steps of optimizers are made twice")
    return Finding("same", "same", f"stopped at {_places(stops)}")


def _places(stops: Sequence[Stop]) -> str:
    return ", ".join(" ".join(map(str, stop)) for stop in stops)


def between_steps(ends: Sequence[int], total: int, seed: int = 0) -> list[int]:
    """Updates after which a run is stopped: two within one epoch and one in a later one, where there are so many."""
    draw = random.Random(seed)
    spans = [(start, end) for start, end in zip([0, *ends], [*ends, total], strict=True) if end - start > 1]
    twice = next((span for span in spans if span[1] - span[0] > 2), None)
    inside = sorted(draw.sample(range(twice[0] + 1, twice[1]), 2)) if twice else []
    later = [step for start, end in spans if not twice or start >= twice[1] for step in range(start + 1, end)]
    return inside + ([draw.choice(later)] if later else [])


def in_evaluation(whole: Made, most: int = 3, seed: int = 0) -> list[Stop]:
    """Places between epochs and after the last update: in forwards, and at most so many items that are measured."""
    draw, total = random.Random(seed), whole.journal.steps_done
    if not whole.evaluations:
        return []
    after = [("part", name, number) for name, number, steps in whole.journal.items if steps == total]
    chosen = sorted(draw.sample(range(len(after)), min(most, len(after))))
    return [("evaluation", total, 1), *(after[place] for place in chosen)]


def labels_are_for_scores(s: Subject) -> Finding:
    if not s.kind:
        return Finding("-", "not tried", "the task reads data of its own", True)
    wrong, moved = [], []
    every = frozenset(s.task.metrics)
    test = [(domain, "test") for domain in (DOMAINS if s.kind == "domains" else ("",))]
    hidden = HIDDEN.get(s.task.name) or [Labels("test images", test, every, every)]
    for number, labels in enumerate(hidden):
        data_dir = s.folder / f"hidden-{s.kind}-{s.task.name}-{number}"
        if not data_dir.exists():
            plant(data_dir, s.kind, s.options.dataset, labels.where)
        dealt = s.run(data_dir=data_dir)
        names = differing(s.whole, dealt, labels.metrics, labels.columns, labels.artifacts, evidence=False)
        wrong += [f"{name} follows the labels of {labels.of}" for name in names]
        if differing(s.whole, dealt, evidence=False):
            moved.append(labels.of)
    untouched = [labels.of for labels in hidden if labels.of not in moved]
    detail = _few(wrong) or (f"nothing at all follows those of {_few(untouched)}" if untouched else _few(moved))
    return Finding("scores alone", "more than scores" if wrong else "scores alone", detail)


def trained_network_is_kept(s: Subject) -> Finding:
    """The weights fit the network that the task builds without the data, and it forwards."""
    if not hasattr(s.task, "network"):
        return Finding("-", "not kept", "without `network` nobody can load what a run has trained", True)
    trained = s.whole.ok.trained
    if trained is None:
        return Finding("yes", "no", "the outcome holds no network although keep_weights is set")
    facts = json.loads(json.dumps(trained.facts))
    net, _ = s.task.network(s.norm, s.options, facts)
    net.load_state_dict(reread(dict(trained.weights)), strict=True)
    return Finding("yes", "yes", f"{sum(p.numel() for p in net.parameters())} parameters")


FACTS: tuple[Callable[[Subject], Finding], ...] = (
    metrics_returned,
    history_is_of_numbers,
    same_twice,
    global_generators_do_not_matter,
    another_seed_is_another_run,
    labels_are_for_scores,
    diverges_as_a_result,
    skips_with_a_reason,
    goes_on_between_steps,
    goes_on_in_evaluation,
    trained_network_is_kept,
    steps_as_told,
    newer_options_at_their_defaults,
    progress,
    nothing_written_elsewhere,
)
_ANEW = (goes_on_between_steps, goes_on_in_evaluation)
_LOOP = "keep what the steps change in Loop(keeps={...}), and draw from context.generator or a stream"

HINTS: dict[str, str] = {
    "runs": "with these options the task raises: give others with --option KEY=VALUE, or mend it",
    "metrics_returned": "Outcome.metrics holds exactly the names in the task's `metrics`, plain finite floats or None",
    "history_is_of_numbers": "a row maps names to floats: float(tensor)",
    "same_twice": "something else than the seed decides: time, a set's order, a generator without a seed",
    "global_generators_do_not_matter": "draw from context.generator(purpose); seed what a library draws globally "
    "inside forked_generators",
    "another_seed_is_another_run": "weights and order are drawn from context.generator(purpose)",
    "labels_are_for_scores": "a test part serves the last measurement: nothing is trained, chosen or calibrated by it",
    "diverges_as_a_result": "make every update by tasks.step.update, which raises Diverged; do not catch it",
    "skips_with_a_reason": "why_not asks the norm: tasks.admission.refusal, as classification's",
    "goes_on_between_steps": _LOOP,
    "goes_on_in_evaluation": f"what is measured after training goes by context.journal.once or each; {_LOOP}",
    "trained_network_is_kept": "`network` builds what `run` trains; Outcome.trained holds its state_dict",
    "steps_as_told": "`steps` counts the updates of all loops of a run",
    "newer_options_at_their_defaults": "an option marked NEWER at its default must be as if it were not there",
    "progress": "tell context.report fractions of the whole run; tasks.loop does",
    "nothing_written_elsewhere": "files go into context.folder, by names in Outcome.artifacts",
}
"""What usually causes a false fact."""


def _measure(subject: Subject, fact: Callable[[Subject], Finding]) -> Check:
    try:
        found = fact(subject)
    except TooLong:
        raise
    except Exception as error:  # noqa: BLE001 - a task under test may raise anything; one failed check, not a crash
        found = Finding("works", "raises", line(error), False)
    ok = found.declared == found.measured if found.ok is None else found.ok
    name, plugin = fact.__name__, subject.task.name not in SMALL
    anew = plugin and fact in _ANEW and found.measured == "begins anew"
    hint = "" if ok else HINTS[name]
    return Check(
        subject.task.name, name.replace("_", " "), found.declared, found.measured, ok, found.detail, hint, anew
    )
