"""docs/norms.md: every norm with what its class says and what it declares."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from norms.layers import LAYERS
from norms.protocol import SETTING_FIELDS, NormInfo
from norms.registry import make_norm, norm_info, norm_option_defaults
from suite.documents.docstrings import as_markdown, in_a_cell, parts_of

_NEEDS = {
    "conv_weight": "the weight of the convolution before it",
    "activation": "the activation that follows, which it brings",
    "domain": "the domain of each image",
    "context": "the context set of an episode",
    "second_look": "a second forward of the batch after each update",
}


def overview() -> str:
    """One row for each norm of the suite, in the order of tables."""
    rows = ["| name | statistics of | axes | running | needs | source |", "| --- | --- | --- | --- | --- | --- |"]
    for name in LAYERS:
        info = norm_info(name)
        needs = ", ".join(_NEEDS[need].split(",")[0] for need in sorted(info.needs))
        running = "yes" if info.keeps_stats else ""
        cells = (
            f"[`{name}`](#{name})",
            in_a_cell(LAYERS[name][1]),
            _axes(info),
            running,
            needs,
            in_a_cell(info.source),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def pages_of_norms() -> str:
    """A section for each norm of the suite: definition, facts, options."""
    return "\n".join(line for name in LAYERS for line in _section(name)).rstrip()


def _section(name: str) -> Iterator[str]:
    info, layer = norm_info(name), _class_of(name)
    said = parts_of(layer)
    yield from (f"## `{name}`", "", f"{in_a_cell(info.source)}.", "", as_markdown(said.words), "")
    yield from (*(f"- {fact}." for fact in _facts(info)), "")
    meanings: dict[str, str] = {}
    for base in reversed(inspect.getmro(layer)):  # a layer that only adds something leaves its options to its base
        if base.__module__.startswith("norms."):
            meanings |= parts_of(base).sections.get("Args", {})
    rows = [*_options(name, meanings)]
    if rows:
        yield from ("| option | default | meaning |", "| --- | --- | --- |", *rows, "")
    refused = _refused(layer)
    if refused:
        yield from (f"Refused with a ValueError: {in_a_cell(refused)}", "")


def _class_of(name: str) -> type:
    layer = make_norm(name).build
    assert isinstance(layer, type)  # the suite's own norms are classes
    return layer


def _facts(info: NormInfo) -> Iterator[str]:
    yield f"Statistics over: {_axes(info)}"
    if info.mixes_samples_in_eval:
        yield "Mixes samples in training and in evaluation"
    else:
        yield f"Mixes samples: {'in training' if info.mixes_samples else 'no'}"
    yield f"Running statistics: {'yes' if info.keeps_stats else 'no'}"
    if info.variance or info.running_variance:
        kinds = [f"{info.variance} in training" if info.variance else ""]
        kinds.append(f"{info.running_variance} in running statistics" if info.running_variance else "")
        yield f"Variance: {', '.join(kind for kind in kinds if kind)}"
    if info.needs:
        yield f"Needs: {'; '.join(_NEEDS[need] for need in sorted(info.needs))}"
    if not info.exact_gradient:
        yield "The backward is not the derivative of the forward"
    if info.across_iterations:
        yield "Takes statistics from earlier iterations, so an update has to be one norm batch"
    if not info.compiles:
        yield "`torch.compile(fullgraph=True)` does not serve"
    if not info.functional:
        yield "Does not train under `torch.func`'s `vmap` and `jvp`"
    yield f"Version: {info.version}"


def _axes(info: NormInfo) -> str:
    """Which values of (N, C, H, W) a value's output depends on."""
    if info.axes is None:
        return "not declared"
    return ", ".join(info.axes) or "nothing"


def _options(name: str, meanings: dict[str, str]) -> Iterator[str]:
    for option, value in norm_option_defaults(name).items():
        default = "by the run" if option in SETTING_FIELDS else f"`{json.dumps(value)}`"
        yield f"| `{option}` | {default} | {in_a_cell(meanings.get(option, ''))} |"


def _refused(layer: Any) -> str:
    text = inspect.cleandoc(layer.__doc__ or "")
    match = re.search(r"^Raises:\n((?:    .*\n?)+)", text, re.MULTILINE)
    inside = re.search(r"ValueError: (.*)", " ".join(match[1].split())) if match else None
    return inside[1] if inside else ""
