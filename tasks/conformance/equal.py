"""The comparison of two runs: everything but times and memory, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.conformance.subject import TIMED, Made


def differing(
    one: Made,
    other: Made,
    metrics: frozenset[str] = frozenset(),
    columns: frozenset[str] = frozenset(),
    artifacts: frozenset[str] = frozenset(),
    evidence: bool = True,
) -> list[str]:
    """The names in which two runs differ, to the last bit, without times, memory and the given names."""
    first, second = one.ok, other.ok
    found = keys_that_differ(untimed(first.metrics), untimed(second.metrics), metrics)
    rows = [[untimed(row) for row in outcome.history] for outcome in (first, second)]
    if len(rows[0]) != len(rows[1]):
        found.append(f"history of {len(rows[0])} and {len(rows[1])} rows")
    for number, pair in enumerate(zip(*rows, strict=False), 1):
        found += [f"{name} of row {number}" for name in keys_that_differ(pair[0], pair[1], columns)]
    found += [f"artifact {name}" for name in keys_that_differ(one.files, other.files, artifacts)]
    if evidence:
        found += [f"evidence {name}" for name in keys_that_differ(first.evidence, second.evidence)]
    if first.trained is not None and second.trained is not None:
        weights = [outcome.trained.weights for outcome in (first, second) if outcome.trained is not None]
        found += [f"weights {name}" for name in keys_that_differ(weights[0], weights[1])]
        if first.trained.facts != second.trained.facts:
            found.append("facts of the trained network")
    return found


def untimed(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not name.endswith(TIMED)}


def keys_that_differ(one: Mapping[str, Any], two: Mapping[str, Any], but: frozenset[str] = frozenset()) -> list[str]:
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
