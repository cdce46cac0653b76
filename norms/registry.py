"""Names -> factories of normalization layers, with the facts each layer declares about itself.

A norm is one class, decorated once:

    @register(name="bgn", source="Zhou et al. 2020, arXiv:2012.02782", version=1, mixes_samples=True, keeps_stats=True)
    class BatchGroupNorm(nn.Module):
        def __init__(self, num_channels, *, num_groups="auto", affine=True, device=None, dtype=None): ...

Its options are its keyword arguments with defaults. `make_norm` binds them and returns a factory that a backbone (or
torchvision's `norm_layer=`) calls with a number of channels. Everything that later needs to know whether a module is a
norm (weight decay, `hold`, recalibration, audits) asks for the stamp that the factory leaves, never for a class name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from norms import layers, plugins
from norms.constructor import CONTRACT, constructor_parameters, options_model
from norms.factory import Layers, NormFactory
from norms.plugins import load_plugin as load_plugin
from norms.protocol import AXES, NEEDS, SETTING_FIELDS, VARIANCES, NormInfo
from norms.values import nearest, shown

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class _Entry:
    info: NormInfo
    build: Callable[..., nn.Module]
    file: str


_REGISTRY: dict[str, _Entry] = {}


def register(
    *,
    name: str,
    source: str,
    mixes_samples: bool,
    keeps_stats: bool,
    version: int | str = 1,
    replace: bool = False,
    **facts: Any,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Class decorator: put a normalization layer into the registry under `name`.

    The class is called as `cls(num_channels, *, affine=True, **options)`; every option has a default and an annotation.
    `device` and `dtype` are passed where the constructor names them, else applied around and after it. `replace=True`
    is for notebooks, where a cell is executed again: what was registered at the prompt, or by a program, is replaced.

    Raises:
        ValueError: the name is malformed or taken, a fact is unknown, or an option has no default.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f'norm name "{name}": lower case letters, digits and underscores, starting with a letter')
    unknown = set(facts) - set(NormInfo.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f'norm "{name}": unknown facts {sorted(unknown)}; allowed: {sorted(NormInfo.__dataclass_fields__)}'
        )
    needs = facts.get("needs", ())
    facts["needs"] = frozenset([needs] if isinstance(needs, str) else needs)
    if facts["needs"] - NEEDS:
        raise ValueError(f'norm "{name}": needs {sorted(facts["needs"] - NEEDS)} is unknown; allowed: {sorted(NEEDS)}')
    axes = facts.get("axes")
    if axes is not None and axes not in AXES:
        raise ValueError(f'norm "{name}": axes "{axes}" are unknown; allowed: {", ".join(filter(None, AXES))} and ""')
    for fact in ("variance", "running_variance"):
        if facts.get(fact) not in (None, *VARIANCES):
            raise ValueError(f'norm "{name}": {fact} "{facts[fact]}" is unknown; allowed: {", ".join(VARIANCES)}')

    def add(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        file = _file_of(build)
        if not _of_the_suite(build):
            _import_builtin()  # whose names are taken, though nobody may have asked for one so far
        if name in _REGISTRY:
            entry = _REGISTRY[name]
            plugins.check_free("norm", name, entry.file, replace=replace, of_the_suite=_of_the_suite(entry.build))
        parameters = constructor_parameters(build)
        if "affine" not in parameters:
            raise ValueError(f'norm "{name}": its constructor must accept affine=True')
        if "activation" in facts["needs"] and "activation" not in parameters:
            raise ValueError(f'norm "{name}" needs an activation, so its constructor must accept activation=None')
        bare = [p.name for p in parameters.values() if p.default is p.empty]
        if bare:
            raise ValueError(f'norm "{name}": options without a default: {", ".join(bare)}')
        untyped = [p.name for p in parameters.values() if p.annotation is p.empty and p.name not in CONTRACT]
        if untyped:
            raise ValueError(f'norm "{name}": options without a type annotation: {", ".join(untyped)}')
        plugin = plugins.registered("norm", name, lambda: _REGISTRY)
        its = version if plugin is None else plugin.version
        _REGISTRY[name] = _Entry(NormInfo(name, source, its, mixes_samples, keeps_stats, **facts), build, file)
        return build

    return add


def _of_the_suite(build: Callable[..., nn.Module]) -> bool:
    return build.__module__.startswith("norms.layers.")


def norm_names(without: Collection[str] = ()) -> list[str]:
    """All registered names, less the norms that need any of `without` (see NormInfo).

    The suite's own come first, as norms.layers.LAYERS lists them, then the others in order of registration.
    """
    _import_builtin()
    place = {name: number for number, name in enumerate(layers.LAYERS)}
    names = sorted(_REGISTRY, key=lambda name: place.get(name, len(place)))
    return [name for name in names if not _REGISTRY[name].info.needs & set(without)]


def norm_info(name: str) -> NormInfo:
    """The declared facts of a norm. Raises ValueError with the nearest name for an unknown one."""
    return _entry(name).info


def norm_definition(name: str) -> str:
    """The docstring of the norm's class, without indentation: words, equation, options. "" if it has none."""
    build = _entry(name).build
    said = (build.func if isinstance(build, functools.partial) else build).__doc__  # not that of a class above it
    return inspect.cleandoc(said) if isinstance(said, str) else ""


def norm_constructor(name: str) -> Callable[..., nn.Module]:
    """The class, or the function, that was registered under a name."""
    return _entry(name).build


def norm_option_defaults(name: str) -> dict[str, Any]:
    """The norm's own options with their defaults (without affine, device, dtype, activation)."""
    return {p.name: p.default for p in constructor_parameters(_entry(name).build).values() if p.name not in CONTRACT}


def norm_option_types(name: str) -> dict[str, Any]:
    """The norm's own options with their annotations."""
    return {key: field.annotation for key, field in options_model(_entry(name).build).model_fields.items()}


def resolve_norm_options(
    name: str, options: Mapping[str, Any], setting: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`options` checked, converted to their annotated types and completed with defaults and the run's setting.

    Args:
        name: a registered norm.
        options: given by the user; true, numbers and texts are not turned into each other (see norms.values).
        setting: values for the SETTING_FIELDS that the constructor names; a value the user gave wins.

    Raises:
        ValueError: unknown norm or option (with the nearest), or a value of the wrong type; one line per mistake.
    """
    build = _entry(name).build
    parameters = {k: p for k, p in constructor_parameters(build).items() if k not in CONTRACT}
    mistakes = [
        f'norm "{name}": unknown option "{key}"; it has {", ".join(parameters) or "none"}{nearest(key, parameters)}'
        for key in options
        if key not in parameters
    ]
    given = {k: v for k, v in (setting or {}).items() if k in parameters and k in SETTING_FIELDS and v is not None}
    given.update((k, v) for k, v in options.items() if k in parameters)
    try:
        values = options_model(build)(**given).model_dump(mode="json")
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}  # option -> its mistakes, one for each of several types
        for e in error.errors():
            wrong.setdefault(".".join(map(str, e["loc"][:1])), []).append(e["msg"].removeprefix("Value error, "))
        given = norm_option_defaults(name) | given
        mistakes += [
            f'norm "{name}": option "{k}" given {shown(given[k])}: {", or ".join(m)}' for k, m in wrong.items()
        ]
        values = {}
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return values


def norm_label(name: str, options: Mapping[str, Any]) -> str:
    """The name, followed by the given options that differ from the norm's defaults: "bgn(num_groups=8)"."""
    defaults, given = resolve_norm_options(name, {}), resolve_norm_options(name, options)
    different = [f"{key}={given[key]}" for key in defaults if key in options and given[key] != defaults[key]]
    return f"{name}({','.join(different)})" if different else name


def make_norm(name: str, **options: Any) -> NormFactory:
    """A factory of layers: `make_norm("bgn", num_groups=4)(64)` is a BGN layer for 64 channels.

    The factory takes `(num_channels, *, affine=True, device=None, dtype=None)` (and `activation=` for a norm that fuses
    one), forks the global random generators so that a norm's own draws never move the backbone's, and stamps
    `norm_info` and a neutral `situation` on each layer.

    Raises:
        ValueError: unknown norm or option, wrong type; from the factory: arguments that the layer itself refuses.
    """
    entry = _entry(name)
    return NormFactory(Layers(entry.info, entry.build, resolve_norm_options(name, options)))


def _entry(name: str) -> _Entry:
    _import_builtin()
    if name not in _REGISTRY and not plugins.load_offered("norm", name):
        raise ValueError(f'unknown norm "{name}"; registered: {", ".join(norm_names())}{nearest(name, _REGISTRY)}')
    return _REGISTRY[name]


def _file_of(build: Callable[..., nn.Module]) -> str:
    try:
        return inspect.getsourcefile(build.func if isinstance(build, functools.partial) else build) or "?"
    except (TypeError, OSError):  # a class written at a prompt has no file
        return "<interactive>"


@functools.cache
def _import_builtin() -> None:
    """Import every file of norms/layers, which registers its norms."""
    # Imported here and not at the top: the layers' files import this one to register themselves.
    with plugins.of_the_suite():  # a plugin that is being loaded may be the first to ask
        for file in pkgutil.iter_modules(layers.__path__, f"{layers.__name__}."):
            importlib.import_module(file.name)
