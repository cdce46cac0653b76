"""The parameters of a norm's constructor, and a pydantic model of its options."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, create_model, field_validator
from pydantic.errors import PydanticSchemaGenerationError
from torch import nn

from norms.values import exact

CONTRACT = {"affine", "device", "dtype", "activation"}


@functools.cache
def constructor_parameters(build: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a constructor, without num_channels."""
    parameters = list(inspect.signature(build).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        raise ValueError(f"{called(build)}: *args and **kwargs hide misspelt options; name each option")
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ValueError(f"{called(build)}: the first parameter must be positional, the number of channels")
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters[1:]):
        raise ValueError(f"{called(build)}: options are passed by name, so they can not be positional-only")
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
def options_model(build: Callable[..., nn.Module]) -> Any:
    function = build.func if isinstance(build, functools.partial) else build
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, AttributeError) as error:
        # the usual cause: a name imported under TYPE_CHECKING only
        raise ValueError(f"{called(build)}: an annotation of its constructor can not be read: {error}") from error
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), p.default)
        for p in constructor_parameters(build).values()
        if p.name not in CONTRACT
    }
    try:
        return create_model(f"{called(build)}Options", __base__=_Exact, **fields)
    except PydanticSchemaGenerationError as error:
        raise ValueError(
            f"{called(build)}: options are numbers, texts or lists of them, since they are stored in records; "
            f"{str(error).splitlines()[0]}"
        ) from error


def called(build: Callable[..., nn.Module]) -> str:
    return getattr(build.func if isinstance(build, functools.partial) else build, "__qualname__", repr(build))
