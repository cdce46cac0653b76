"""The checks that every registered norm must pass, built-in or a user's own: each declared fact against a measured one.

One function measures one fact on a small real input and returns a Finding; FACTS lists them in the order of the
table. What NormInfo declares must be measured so (declared.py); what it has no field for must hold of every norm, or
be defined (contract.py). Inputs are float64 unless the fact is about another type, so that "the same" means equal up
to 1e-9 and no tolerance hides a small dependence.

A norm that declares exact_gradient=False or compiles=False asks for less, so these two are then "not tried": a norm
that is better than its word passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from norms.conformance import contract, declared
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
    declared.earlier_iterations,
    declared.keeps_statistics,
    declared.running_statistics_used_in_eval,
    declared.gradient_first_order,
    declared.gradient_second_order,
    contract.batch_of_one,
    contract.maps_of_one_position,
    contract.other_spatial_ranks,
    contract.odd_channel_counts,
    contract.constant_input,
    contract.affine_false,
    contract.state_dict_round_trip,
    contract.deepcopy,
    contract.pickled,
    contract.freeze,
    contract.recalibrate,
    declared.slices,
    declared.compiles,
    contract.autocast,
    contract.global_generator_untouched,
    contract.channels_last_kept,
    declared.needs,
)


@dataclass(frozen=True)
class Check:
    """One fact of one norm.

    Attributes:
        norm: the registered name.
        fact: what was looked at, in words.
        declared: what NormInfo (or the contract, for what holds of every norm) says; "-" where nothing is declared.
        measured: what the layer did.
        ok: False when the two contradict each other, or the check could not be carried out.
        detail: why, or what else there is to say; one line.
    """

    norm: str
    fact: str
    declared: str
    measured: str
    ok: bool
    detail: str = ""


def check_norm(name: str, **options: Any) -> list[Check]:
    """Measure every fact of a registered norm, as configured by `options`, on torch's default device.

    A second or a few, mostly compiling.

    A norm that asks for facts of a run (norm_batch_size, num_domains, image_shape) gets those of the checks, where
    `options` does not name them; what it declares to need (conv_weight, activation, domain, context) is supplied.

    Returns one Check per fact, or the single check "builds" where no layer could be made. The global random generator
    is left as it was.

    Raises:
        ValueError: unknown norm or option, or an option of the wrong type.
    """
    setting = {"norm_batch_size": BATCH, "num_domains": 2, "image_shape": (3, 4, 4)}
    info = norm_info(name)
    given, options = options, resolve_norm_options(name, options, setting)
    with torch.random.fork_rng(devices=[]):
        try:
            subject = find_subject(info, make_norm(name, **options), bool(given))
        except Exception as error:  # noqa: BLE001 - whatever a norm under test raises is the finding
            return [Check(name, "builds", "yes", "no", False, line(error))]
        return [_measure(subject, fact) for fact in FACTS]


def _measure(subject: Subject, fact: Callable[[Subject], Finding]) -> Check:
    label = fact.__name__.replace("_", " ")
    try:
        declared, measured, detail, ok = fact(subject)
    except Exception as error:  # noqa: BLE001 - a norm under test may raise anything; one failed check, not a crash
        return Check(subject.info.name, label, "works", "raises", False, line(error))
    return Check(subject.info.name, label, declared, measured, declared == measured if ok is None else ok, detail)
