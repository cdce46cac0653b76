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

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.errors import PydanticSchemaGenerationError
from torch import Tensor, nn

from norms.telling import Once, Telling
from norms.values import exact, shown

NEEDS = frozenset({"conv_weight", "activation", "domain", "context", "second_look"})
VARIANCES = ("biased", "unbiased")
AXES = tuple("".join(parts) for parts in itertools.product(("", "N"), ("", "C"), ("", "HW")))
SETTING_FIELDS = ("norm_batch_size", "num_domains", "image_shape")
"""Facts of a run that a constructor may ask for by naming a parameter so; the plan fills them in before hashing."""

_BUILTIN = (
    "sample",
    "batch",
    "pooled",
    "adaptive",
    "activated",
    "weights",
    "memory",
    "streaming",
    "online",
    "domain",
    "conditional",
)
_CONTRACT = {"affine", "device", "dtype", "activation"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class NormInfo:
    """What a norm declares about itself; the conformance checks measure every field.

    Args:
        name: the registered name: lower case letters, digits and underscores.
        source: the paper the definition follows.
        version: raised with every change of results; the file's hash for a plugin.
        mixes_samples: in training, one sample's output depends on the others of its batch.
        keeps_stats: has running statistics that training moves and evaluation uses.
        mixes_samples_in_eval: the same dependence in evaluation mode.
        exact_gradient: the backward is the derivative of the forward (so gradcheck applies).
        compiles: `torch.compile(fullgraph=True)` works and gives the eager result.
        needs: what a call must bring beside x: any of "conv_weight" (called as norm(y, weight=w)), "activation"
            (takes `activation=` at build and applies it), "domain", "context" (read from `self.situation`),
            "second_look" (asks `after_update` to show it the batch again).
        axes: letters of "NCHW", the axes along which a value's training output depends on other values: "NHW" for bn,
            "CHW" for gn, "" for none. None: not declared.
        across_iterations: the statistics of earlier iterations enter the training output in the place of a larger
            batch. Several norm batches per update would look like several iterations, so tasks skip such a norm there.
        slices_at_once: the layer itself honours `self.situation.slices`; any other layer that mixes samples is called
            once per slice (see norms.situation).
        functional: training works inside torch.func's transforms (vmap, grad, jvp), with the buffers that
            functional_call brings. A norm that declares False raises a RuntimeError under vmap and jvp. Evaluation
            always works.
        variance: "biased" (divided by the count) or "unbiased" (by the count less one), the variance in the training
            formula; None: not declared, or there is none.
        running_variance: the same of the variance that running statistics take in.
    """

    name: str
    source: str
    version: int | str
    mixes_samples: bool
    keeps_stats: bool
    mixes_samples_in_eval: bool = False
    exact_gradient: bool = True
    compiles: bool = True
    needs: frozenset[str] = frozenset()
    axes: str | None = None
    across_iterations: bool = False
    slices_at_once: bool = False
    functional: bool = True
    variance: str | None = None
    running_variance: str | None = None


@dataclass(frozen=True)
class Situation:
    """What a training loop says to every norm of a network (see norms.situation.situation)."""

    domain: int | Tensor | None = None
    part: str | None = None
    slices: int = 1
    again: bool = False


@dataclass(frozen=True)
class _Entry:
    info: NormInfo
    build: Callable[..., nn.Module]
    file: str


@dataclass(frozen=True, eq=False)  # compared and hashed as an object: libraries put what they are given into sets
class _Layers:
    """Builds layers of one norm with one set of options; see NormFactory, which binds it. `once`: see norms.telling."""

    info: NormInfo
    build: Callable[..., nn.Module]
    options: Mapping[str, Any]
    once: Once = field(default_factory=Once, repr=False)

    @property
    def __name__(self) -> str:
        return f"norms.{self.info.name}"  # timm looks for a norm that it knows under a name; it is to find none

    def __call__(
        self,
        num_channels: int,
        *,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: nn.Module | Callable[[Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """See NormFactory."""
        return _build(self, num_channels, affine, device, dtype, activation)


class NormFactory(functools.partial[nn.Module]):
    """Builds layers of one norm with one set of options; what `make_norm` returns.

        factory(num_channels, *, affine=True, device=None, dtype=None, activation=None) -> nn.Module

    The layer is for x (N, num_channels, *), keeps its shape, and is stamped with `norm_info` and a neutral `situation`.

    A partial that binds no arguments: timm accepts nothing but classes, functions and partials as `norm_layer=`, and
    takes a partial apart into `func` and keywords. It gets what builds the layers, whole. `func` is no function on
    purpose, since timm takes a function for a norm with the activation in it, and would leave the activation out.

    Args of a call:
        num_channels: C.
        affine: weight and bias per channel.
        device: of parameters and buffers; None: torch's default.
        dtype: of the parameters; None: torch's default.
        activation: what directly follows the norm, for a norm that fuses one; None: nothing does.

    Attributes:
        info: the declared facts of the norm.
        build: its class, or what was registered in the place of one.
        options: every option of the norm with its value.

    Raises:
        ValueError: (a call) a number of channels that is no whole number of at least 1; an activation for a norm that
            fuses none; what the layer refuses.
    """

    func: _Layers

    @property
    def info(self) -> NormInfo:
        return self.func.info

    @property
    def build(self) -> Callable[..., nn.Module]:
        return self.func.build

    @property
    def options(self) -> Mapping[str, Any]:
        return self.func.options

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"make_norm({self.info.name!r}{options})"


_REGISTRY: dict[str, _Entry] = {}
_plugin_version: str | None = None  # set while a plugin file is being imported


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """': did you mean "x"?' or ''; the shared tail of every unknown-name message here."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def register(
    *,
    name: str,
    source: str,
    mixes_samples: bool,
    keeps_stats: bool,
    version: int | str = 1,
    **facts: Any,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Class decorator: put a normalization layer into the registry under `name`.

    The class is called as `cls(num_channels, *, affine=True, **options)`; every option has a default and an annotation.
    `device` and `dtype` are passed where the constructor names them, else applied around and after it.

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
        if name in _REGISTRY:
            raise ValueError(
                f'norm "{name}" is already registered by {_REGISTRY[name].file}; {file} must choose another name'
            )
        parameters = _parameters(build)
        if "affine" not in parameters:
            raise ValueError(f'norm "{name}": its constructor must accept affine=True')
        if "activation" in facts["needs"] and "activation" not in parameters:
            raise ValueError(f'norm "{name}" needs an activation, so its constructor must accept activation=None')
        bare = [p.name for p in parameters.values() if p.default is p.empty]
        if bare:
            raise ValueError(f'norm "{name}": options without a default: {", ".join(bare)}')
        untyped = [p.name for p in parameters.values() if p.annotation is p.empty and p.name not in _CONTRACT]
        if untyped:
            raise ValueError(f'norm "{name}": options without a type annotation: {", ".join(untyped)}')
        info = NormInfo(name, source, _plugin_version or version, mixes_samples, keeps_stats, **facts)
        _REGISTRY[name] = _Entry(info, build, file)
        return build

    return add


def norm_names(without: Collection[str] = ()) -> list[str]:
    """All registered names, in order of registration, less the norms that need any of `without` (see NormInfo)."""
    _import_builtin()
    return [name for name, entry in _REGISTRY.items() if not entry.info.needs & set(without)]


def norm_info(name: str) -> NormInfo:
    """The declared facts of a norm. Raises ValueError with the nearest name for an unknown one."""
    return _entry(name).info


def norm_option_defaults(name: str) -> dict[str, Any]:
    """The norm's own options with their defaults (without affine, device, dtype, activation)."""
    return {p.name: p.default for p in _parameters(_entry(name).build).values() if p.name not in _CONTRACT}


def norm_option_types(name: str) -> dict[str, Any]:
    """The norm's own options with their annotations."""
    return {key: field.annotation for key, field in _options_model(_entry(name).build).model_fields.items()}


def resolve_norm_options(
    name: str, options: Mapping[str, Any], setting: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`options` checked, converted to their annotated types and completed with defaults and the run's setting.

    Args:
        name: a registered norm.
        options: what the user gave; true, numbers and texts are not turned into each other (see norms.values).
        setting: values for the SETTING_FIELDS that the constructor names; a value the user gave wins.

    Raises:
        ValueError: unknown norm or option (with the nearest), or a value of the wrong type; one line per mistake.
    """
    build = _entry(name).build
    parameters = {k: p for k, p in _parameters(build).items() if k not in _CONTRACT}
    mistakes = [
        f'norm "{name}": unknown option "{key}"; it has {", ".join(parameters) or "none"}{nearest(key, parameters)}'
        for key in options
        if key not in parameters
    ]
    given = {k: v for k, v in (setting or {}).items() if k in parameters and k in SETTING_FIELDS and v is not None}
    given.update((k, v) for k, v in options.items() if k in parameters)
    try:
        values = _options_model(build)(**given).model_dump(mode="json")
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}  # option -> what it should be, one for each of several types
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
    `norm_info` and a neutral `situation` on what it builds.

    Raises:
        ValueError: unknown norm or option, wrong type; from the factory: what the layer itself refuses.
    """
    entry = _entry(name)
    return NormFactory(_Layers(entry.info, entry.build, resolve_norm_options(name, options)))


def factory_info(norm: NormFactory) -> NormInfo:
    """The declared facts of the norm that a factory from `make_norm` builds. ValueError for any other callable."""
    if not isinstance(norm, NormFactory):
        raise ValueError(f"{norm!r} is not a factory from make_norm")
    return norm.info


def norm_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every stamped norm in `net`, in definition order; nested stamped parts are not repeated."""
    inside: tuple[str, ...] = ()
    for name, module in net.named_modules():
        if isinstance(getattr(module, "norm_info", None), NormInfo) and not (inside and name.startswith(inside)):
            inside = (*inside, f"{name}." if name else "")
            yield name, module
            if not name:
                return


def equivalent(net: nn.Module) -> str | None:
    """The name X when every norm of ours in `net` says `equivalent_to == X` (a BGN with G = C says "bn"), else None."""
    names = {getattr(norm, "equivalent_to", None) for _, norm in norm_modules(net)}
    return names.pop() if len(names) == 1 else None


def load_plugin(path: str | Path) -> list[str]:
    """Import a user's file of registered norms; its norms' version is the hash of the file.

    Returns the names it registered (none, where the file adds other things than norms). Loading the same file twice is
    a no-op that returns the same names; loading it after an edit replaces what it registered before. Only the file
    itself is hashed: a norm whose formula lives in a second file does not change its version with that one.

    Raises:
        ValueError: the file is missing, fails to import or registers a name that is taken; nothing of it stays then.
    """
    global _plugin_version
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f'plugin "{path}": no such file')
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f'plugin "{path}": {error.strerror}') from error
    digest = hashlib.sha256(content).hexdigest()[:16]
    module_name = f"normsuite_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    loaded = sys.modules.get(module_name)
    if loaded is not None and getattr(loaded, "__digest__", None) == digest:
        return list(loaded.__norms__)
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f'plugin "{path}": not a Python file')
    _import_builtin()
    before, outer = dict(_REGISTRY), _plugin_version
    for name in getattr(loaded, "__norms__", ()):
        _REGISTRY.pop(name, None)
    kept = set(_REGISTRY)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: pickling and dataclasses look their module up here
    _plugin_version = digest
    try:
        # Compiled from the bytes that were hashed, so the version can not belong to another text than the one that
        # runs; dont_inherit, else this file's own __future__ imports would apply to the user's.
        exec(compile(content, str(file), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        _REGISTRY.clear()
        _REGISTRY.update(before)
        if loaded is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = loaded
        if isinstance(error, Exception | SystemExit):
            raise ValueError(f'plugin "{path}": {type(error).__name__}: {" ".join(str(error).split())}') from error
        raise
    finally:
        _plugin_version = outer
    names = [n for n in _REGISTRY if n not in kept]
    module.__dict__.update(__digest__=digest, __norms__=names)
    return names


def _build(
    layers: _Layers,
    num_channels: int,
    affine: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    activation: nn.Module | Callable[[Tensor], Tensor] | None,
) -> nn.Module:
    info, build, options = layers.info, layers.build, layers.options
    if isinstance(num_channels, bool) or not hasattr(num_channels, "__index__"):
        raise ValueError(f'norm "{info.name}": num_channels={num_channels!r}: a whole number of channels is needed')
    parameters = _parameters(build)
    contract: dict[str, Any] = {"affine": affine}
    contract |= {k: v for k, v in (("device", device), ("dtype", dtype)) if k in parameters}
    if "activation" in info.needs:
        contract["activation"] = activation  # None says that no activation follows, so a default must not step in
    elif activation is not None:
        raise ValueError(f'norm "{info.name}" fuses no activation, so it takes none at build')
    where = torch.device(device or torch.get_default_device())
    with forked_generators(where), where:
        module = build(num_channels, **contract, **options)
    if dtype is not None and "dtype" not in parameters:
        module = module.to(dtype)
    module.norm_info = info  # type: ignore[assignment]
    module.situation = Situation()  # type: ignore[assignment]
    # By a name like this torch.fx and what is built on it (feature extractors of torchvision and timm) know torch's own
    # norms to be one step, and do not look into their forwards. Ours branch on shapes, which can not be followed.
    module.__dict__["__module__"] = f"torch.nn.{type(module).__module__}"
    if not hasattr(module, "check_channels"):  # ours ask first of all
        module.register_forward_pre_hook(_RefuseOtherTypes())
    if info.keeps_stats and hasattr(module, "after_update"):
        telling = module.__dict__["telling"] = Telling(layers.once)
        module.register_forward_pre_hook(telling)
    return module


class _RefuseOtherTypes:
    """A forward pre-hook of a user's norm: integers would come out as rounded numbers, without a word."""

    only_looks = True

    def __call__(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point():
            raise ValueError(
                f"{type(norm).__name__}: x must hold floating-point numbers, given {inputs[0].dtype}; convert it "
                "first, for example x.float()"
            )


def forked_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restores the generators that a layer on this device can draw from: the CPU's, and an accelerator's own."""
    if device.type in ("cpu", "meta", "mps"):  # fork_rng has no mps; torch's layers draw nothing there by themselves
        return torch.random.fork_rng(devices=[])
    if not torch.get_device_module(device).is_available():  # a fake device: shapes are checked, nothing is drawn
        return torch.random.fork_rng(devices=[])
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return torch.random.fork_rng(devices=[index], device_type=device.type)


def _entry(name: str) -> _Entry:
    _import_builtin()
    if name not in _REGISTRY:
        raise ValueError(f'unknown norm "{name}"; registered: {", ".join(_REGISTRY)}{nearest(name, _REGISTRY)}')
    return _REGISTRY[name]


@functools.cache
def _parameters(build: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a constructor, without num_channels."""
    parameters = list(inspect.signature(build).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        raise ValueError(f"{_called(build)}: *args and **kwargs hide misspelt options; name each option")
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ValueError(f"{_called(build)}: the first parameter must be positional, the number of channels")
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters[1:]):
        raise ValueError(f"{_called(build)}: options are passed by name, so they can not be positional-only")
    return {p.name: p for p in parameters[1:]}


class _Exact(BaseModel):
    """Base of the models of norms' options."""

    # inf and nan have no JSON. Defaults are validated too, so that `eps: float = 1` and a given 1.0 are one key.
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _unconverted(cls, given: Any, info: ValidationInfo) -> Any:
        return exact(cls.model_fields[info.field_name or ""].annotation, given)


@functools.cache
def _options_model(build: Callable[..., nn.Module]) -> Any:
    function = build.func if isinstance(build, functools.partial) else build
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, AttributeError) as error:
        # the usual cause: a name imported under TYPE_CHECKING only
        raise ValueError(f"{_called(build)}: an annotation of its constructor can not be read: {error}") from error
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), p.default) for p in _parameters(build).values() if p.name not in _CONTRACT
    }
    try:
        return create_model(f"{_called(build)}Options", __base__=_Exact, **fields)
    except PydanticSchemaGenerationError as error:
        raise ValueError(
            f"{_called(build)}: options are numbers, texts or lists of them, since they are stored in records; "
            f"{str(error).splitlines()[0]}"
        ) from error


def _called(build: Callable[..., nn.Module]) -> str:
    return getattr(build.func if isinstance(build, functools.partial) else build, "__qualname__", repr(build))


def _file_of(build: Callable[..., nn.Module]) -> str:
    try:
        return inspect.getsourcefile(build.func if isinstance(build, functools.partial) else build) or "?"
    except (TypeError, OSError):  # a class written at a prompt has no file
        return "<interactive>"


def _import_builtin() -> None:
    # Imported here and not at the top: the layer modules import this one to register themselves.
    for module in _BUILTIN:
        importlib.import_module(f"norms.{module}")
