"""The checks that every registered norm must pass, built-in or a user's own: each declared fact against a measured one.

One function measures one fact on a small real input and returns a Finding; FACTS lists them in the order of the
table. What NormInfo declares must be measured so (declared.py); what it has no field for must hold of every norm, or
be defined (contract.py). subject.py makes, calls and trains the layer. Further facts by what they are about: which
samples enter a statistic and how its variance is divided (statistics.py), inputs from outside the benchmark
(inputs.py), copies, files and new starts (copies.py), torch.func and autograd (transforms.py), tools that read programs
(tracing.py). Inputs are float64 unless the fact is about another type, so that "the same" means equal up to 1e-9 and no
tolerance hides a small dependence. Each false fact carries what usually causes it (hints.py). `check_like` compares a
norm with a formula of its author's (like.py).

A norm of a user's plugin is not asked to hold wherever the built-in ones do (ELSEWHERE): there a false fact is a note.

A norm that declares exact_gradient=False or compiles=False asks for less, so these two are then "not tried": a norm
that is better than its word passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from norms.conformance import contract, copies, declared, inputs, like, statistics, tracing, transforms
from norms.conformance.hints import hint_for
from norms.conformance.like import Formula
from norms.conformance.subject import BATCH, Finding, Subject, find_subject, line
from norms.registry import make_norm, norm_info, resolve_norm_options

FACTS: tuple[Callable[[Subject], Finding], ...] = (
    contract.shape_kept,
    contract.dtype_kept,
    contract.input_untouched,
    declared.train_and_eval,
    declared.mixes_samples_in_train,
    declared.mixes_samples_in_eval,
    declared.axes,
    statistics.every_sample_counts,
    statistics.variance_in_training,
    declared.earlier_iterations,
    declared.keeps_statistics,
    declared.running_statistics_used_in_eval,
    statistics.variance_in_running_statistics,
    statistics.momentum,
    declared.gradient_first_order,
    declared.gradient_second_order,
    transforms.forward_mode_derivatives,
    transforms.backward_after_training,
    contract.batch_of_one,
    inputs.empty_batch,
    contract.maps_of_one_position,
    contract.other_spatial_ranks,
    contract.odd_channel_counts,
    contract.constant_input,
    inputs.infinity_or_nan_in_a_batch,
    inputs.other_types_refused,
    inputs.float64_on_smaller_input,
    contract.affine_false,
    contract.state_dict_round_trip,
    copies.state_dict_without_counter,
    copies.safetensors_round_trip,
    contract.deepcopy,
    contract.pickled,
    copies.form_of_buffers_kept,
    copies.averaged_model,
    copies.data_parallel_replica,
    copies.reset_parameters,
    copies.reset_running_stats,
    contract.freeze,
    contract.recalibrate,
    statistics.warns_when_never_told,
    declared.slices,
    transforms.functional_call_keeps_state,
    transforms.stacked_under_vmap,
    tracing.compiles,
    tracing.traced_by_fx,
    tracing.exported,
    contract.autocast,
    contract.global_generator_untouched,
    contract.channels_last_kept,
    declared.needs,
)


_ONE_DOMAIN_TOO = (
    transforms.forward_mode_derivatives,
    transforms.backward_after_training,
    transforms.stacked_under_vmap,
    inputs.empty_batch,
    inputs.infinity_or_nan_in_a_batch,
    inputs.float64_on_smaller_input,
    copies.data_parallel_replica,
    tracing.compiles,
    tracing.traced_by_fx,
    tracing.exported,
)
"""Measured once more with an integer as the domain, which norms that need one often serve by other code."""


ELSEWHERE = (
    transforms.forward_mode_derivatives,
    transforms.backward_after_training,
    transforms.functional_call_keeps_state,
    transforms.stacked_under_vmap,
    inputs.empty_batch,
    inputs.infinity_or_nan_in_a_batch,
    inputs.float64_on_smaller_input,
    copies.state_dict_without_counter,
    copies.safetensors_round_trip,
    copies.averaged_model,
    copies.data_parallel_replica,
    copies.reset_parameters,
    tracing.exported,
)
"""About tools and places outside this suite: no table of it depends on them."""


@dataclass(frozen=True)
class Check:
    """One fact of one norm.

    Attributes:
        norm: the registered name.
        fact: the property that was looked at, in words.
        declared: what NormInfo (or the contract, for what holds of every norm) says; "-" where nothing is declared.
        measured: the layer's behaviour.
        ok: False when the two contradict each other, or the check could not be carried out.
        detail: why, or what else there is to say; one line.
        hint: what usually causes it, where ok is False; one line.
        note: it would matter outside the suite alone, and is not asked of a user's norm: to be known, no mistake.
    """

    norm: str
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


def check_norm(name: str, /, **options: Any) -> list[Check]:
    """Measure every fact of a registered norm, as configured by `options`, on torch's default device.

    A second or a few, mostly compiling.

    A norm that asks for facts of a run (norm_batch_size, num_domains, image_shape) gets those of the checks, where
    `options` does not name them; what it declares to need (conv_weight, activation, domain, context) is supplied.

    Returns one Check per fact, or the single check "builds" where no layer could be made. The global random generator
    is left as it was.

    Raises:
        ValueError: unknown norm or option, or an option of the wrong type.
    """
    with torch.random.fork_rng(devices=[]):
        subject = _subject(name, options)
        return [subject] if isinstance(subject, Check) else [_measure(subject, fact) for fact in FACTS]


def check_like(name: str, formula: Formula, /, **options: Any) -> list[Check]:
    """Compare a registered norm with its author's reference function, in float64 (norms.conformance.like).

    Returns one Check each for training and evaluation, or "builds" as check_norm.

    Raises:
        ValueError: as check_norm; a function that asks for what the norm has not, fails, or returns another shape.
    """
    with torch.random.fork_rng(devices=[]):
        subject = _subject(name, options)
        if isinstance(subject, Check):
            return [subject]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_judged(name, compare.__name__, compare(subject, formula)) for compare in like.COMPARISONS]


def _subject(name: str, options: dict[str, Any]) -> Subject | Check:
    """How layers of this norm are made, or why they can not be."""
    setting = {"norm_batch_size": BATCH, "num_domains": 2, "image_shape": (3, 4, 4)}
    info = norm_info(name)
    resolved = resolve_norm_options(name, options, setting)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return find_subject(info, make_norm(name, **resolved), bool(options))
    except Exception as error:  # noqa: BLE001 - every error of a norm under test is the finding
        return Check(name, "builds", "yes", "no", False, line(error), hint_for("builds", "no", line(error)))


def _measure(subject: Subject, fact: Callable[[Subject], Finding]) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fact that is about warnings looks for itself
            found = fact(subject)
            if "domain" in subject.info.needs and fact in _ONE_DOMAIN_TOO and _holds(found):
                found = fact(replace(subject, one_domain=True))
                if not _holds(found):
                    found = found._replace(detail=f"one domain for the whole batch: {found.detail}")
    except Exception as error:  # noqa: BLE001 - a norm under test may raise anything; one failed check, not a crash
        found = Finding("works", "raises", line(error), False)
    plugin = isinstance(subject.info.version, str)
    return replace(_judged(subject.info.name, fact.__name__, found), note=plugin and fact in ELSEWHERE)


def _holds(found: Finding) -> bool:
    return found.declared == found.measured if found.ok is None else found.ok


def _judged(norm: str, fact: str, found: Finding) -> Check:
    declared, measured, detail, _ = found
    ok = _holds(found)
    hint = "" if ok else hint_for(fact, measured, detail)
    return Check(norm, fact.replace("_", " "), declared, measured, ok, detail, hint)
