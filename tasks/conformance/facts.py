"""The facts of a task: one function measures one of them and returns a Finding; FACTS has their order in the table."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from norms.conformance.subject import Finding, line, yes
from norms.factory import NormFactory
from norms.values import shown
from tasks.conformance.cases import HIDDEN, Labels
from tasks.conformance.equal import differing, keys_that_differ, untimed
from tasks.conformance.planted import DOMAINS, plant
from tasks.conformance.subject import Made, Stop, Subject, reread
from tasks.options import newer_options


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _equal(names: Sequence[str], detail: str = "") -> Finding:
    return Finding("same", "same" if not names else "differs", _few(names) or detail)


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
    changed = keys_that_differ(one.model_dump(), two.model_dump())
    return _equal(changed, f"{len(newer)} newer options")


def diverges_as_a_result(s: Subject) -> Finding:
    """Norms give NaN once an epoch is finished (or from the start on, where there is one epoch)."""
    first = s.whole.journal.ends[:1] if len(s.whole.journal.ends) > 1 else []
    found = s.run(breaks=lambda journal: journal.steps_done > first[0] if first else True)
    if found.diverged is None:
        return Finding("Diverged", "ends well")
    kept = found.diverged.history or found.journal.rows
    rows = [untimed(row) for row in kept]
    if rows[: len(first)] != [untimed(row) for row in s.whole.ok.history[: len(first)]]:
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
"""fact -> the usual cause of a false one."""
