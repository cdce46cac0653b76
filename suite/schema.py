"""A JSON schema of configs (draft 2020-12), for editors: the names, types, ranges and meanings of all that one may say.

It is made of the same models that planning checks with, and refuses no config that planning takes. The reverse does
not hold: what depends on two values (a norm batch that divides the batch, domains of a data set) only planning knows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from norms.constructor import options_model
from norms.registry import norm_constructor, norm_info, norm_names
from norms.values import LARGEST
from suite.blocks import BUDGETS, MOST_THREADS
from tasks import get_task, task_names
from tasks.data import dataset_names
from tasks.nets.models import MODELS
from tasks.options import NormChoice
from tasks.schedule import OPTIMIZERS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
"""The name of the draft, by which an editor knows it; nothing is fetched."""

Schema = dict[str, Any]
_MEANINGLESS = ("title",)  # pydantic's, made of the field's name


def config_schema() -> Schema:
    """The schema of a config, with the norms, tasks and data sets that are registered now: load plugins before.

    A task's option is a value or a list of values, which is an axis of the grid; one that is itself a list has a list
    of lists as its axis. An unknown key, an unknown name, a wrong type and a number out of range are refused.
    """
    tasks = task_names()
    definitions: Schema = {
        "norm": _norm(),
        "norms": {
            "description": "Norms: names, or {name: {option: value}}.",
            "anyOf": [_ref("norm"), _list(_ref("norm"))],
        },
        "seeds": _seeds(),
        "dataset": _dataset(),
    }
    for name in norm_names():
        definitions[f"norm.{name}"] = _norm_options(name)
    for name in tasks:
        definitions |= _task(name)
    block = {name: _nullable(_ref(f"task.{name}")) for name in tasks}
    return {
        "$schema": DRAFT,
        "title": "NormSuite config",
        "description": "A grid of runs: every task's settings x norms x seeds.",
        "type": "object",
        "required": ["tasks"],
        "additionalProperties": False,
        "patternProperties": {"^x-": {"description": "Anything, for anchors."}},
        "properties": {
            "budget": {
                "enum": list(BUDGETS),
                "default": "reduced",
                "description": "How tables call the size of the runs.",
            },
            "norms": _ref("norms"),
            "seeds": _ref("seeds"),
            "threads": {
                "type": "integer",
                "minimum": 1,
                "maximum": MOST_THREADS,
                "description": "Threads of each run.",
            },
            "plugins": {"type": "array", "items": {"type": "string"}, "description": "Files, relative to the config."},
            "tasks": {
                "anyOf": [
                    _list({"enum": tasks}),
                    {
                        "type": "object",
                        "minProperties": 1,
                        "additionalProperties": False,
                        "properties": {
                            name: {"anyOf": [*each["anyOf"], _list(_nullable(_ref(f"task.{name}")))]}
                            for name, each in block.items()
                        },
                    },
                ]
            },
        },
        "$defs": definitions,
    }


def described(documentation: str | None) -> dict[str, str]:
    """name -> text of each entry under "Attributes:" or "Args:" of a docstring."""
    found: dict[str, str] = {}
    inside = False
    names: tuple[str, ...] = ()
    for line in inspect.cleandoc(documentation or "").splitlines():
        if not line.startswith(" "):
            inside = line.strip() in ("Attributes:", "Args:") or (inside and not line.strip())
            names = ()
        elif inside and (entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)):
            names = tuple(entry[1].split(", "))
            found |= dict.fromkeys(names, entry[2])
        elif inside:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _texts(kind: Any) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its options; that of the class itself wins."""
    texts: dict[str, str] = {}
    for each in reversed(getattr(kind, "__mro__", (kind,))):
        texts |= described(each.__dict__.get("__doc__"))
    return texts


def _task(name: str) -> Schema:
    """The definitions of a task's options: of its block, and of the models that its options hold."""
    model = get_task(name).options
    given = model.model_json_schema(ref_template=f"#/$defs/task.{name}.{{model}}")
    texts = _texts(model)
    properties = {}
    for option, schema in given["properties"].items():
        value = _named(option, _plain(schema))
        about = {key: value.pop(key) for key in ("default",) if key in value}
        if option in texts:
            about["description"] = texts[option]
        axis = {**_list(value), "description": "An axis: a run for each of these values."}
        properties[option] = {**about, "anyOf": [value, axis]}
    definitions = {f"task.{name}.{inner}": _plain(schema) for inner, schema in given.get("$defs", {}).items()}
    choice = f"task.{name}.{NormChoice.__name__}"
    if choice in definitions:
        definitions[choice] = {
            "anyOf": [_ref("norm"), {"type": "object", "required": ["name", "version"]}]
        }  # a record's
    for key, model_of in _models(model).items():
        if f"task.{name}.{key}" in definitions and key != NormChoice.__name__ and _reads_otherwise(model_of):
            definitions[f"task.{name}.{key}"] = {}  # it takes further forms, which only it knows
    definitions[f"task.{name}"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"norms": _ref("norms"), "seeds": _ref("seeds"), **properties},
    }
    return definitions


def _models(model: Any) -> dict[str, Any]:
    """name -> each pydantic model that a field of a model holds."""
    found: dict[str, Any] = {}
    waiting = [field.annotation for field in model.model_fields.values()]
    while waiting:
        each = waiting.pop()
        waiting += getattr(each, "__args__", ())
        if inspect.isclass(each) and hasattr(each, "model_fields") and each.__name__ not in found:
            found[each.__name__] = each
            waiting += [field.annotation for field in each.model_fields.values()]
    return found


def _reads_otherwise(model: Any) -> bool:
    """Whether a model turns what is given into its fields before it looks at them."""
    return any(each.info.mode in ("before", "wrap") for each in model.__pydantic_decorators__.model_validators.values())


def _named(option: str, schema: Schema) -> Schema:
    """A plain text that names something registered gets its names: all of them, or examples where others may come."""
    if schema.get("type") != "string" or "enum" in schema:
        return schema
    default = {key: schema[key] for key in ("default",) if key in schema}
    kind = option.rpartition("_")[2]
    if kind == "dataset":
        return {**default, **_ref("dataset")}
    examples = {"model": MODELS, "optimizer": OPTIMIZERS}.get(kind)
    return {**schema, "examples": list(examples)} if examples else schema


def _norm() -> Schema:
    names = norm_names()
    options = {name: {"description": norm_info(name).source, **_nullable(_ref(f"norm.{name}"))} for name in names}
    one = {"minProperties": 1, "maxProperties": 1, "additionalProperties": False}
    return {"anyOf": [{"enum": names}, {"type": "object", **one, "properties": options}]}


def _norm_options(name: str) -> Schema:
    build = norm_constructor(name)
    model, texts = options_model(build), _texts(build)
    properties = {}
    for option, schema in model.model_json_schema().get("properties", {}).items():
        value = _plain(schema)
        about = {key: value.pop(key) for key in ("default",) if key in value}
        if option in texts:
            about["description"] = texts[option]
        properties[option] = {**about, "anyOf": [value, _list(value)]}
    return {
        "description": norm_info(name).source,
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _seeds() -> Schema:
    number = {"type": "integer", "minimum": 0, "maximum": LARGEST}
    part = r"\s*[0-9]{1,18}(\s*-\s*[0-9]{1,18})?\s*"
    text = {"type": "string", "pattern": f"^{part}(,{part})*$"}
    return {"description": 'Seeds: [0, 1], or "0-4".', "anyOf": [number, text, _list({"anyOf": [number, text]})]}


def _dataset() -> Schema:
    named = {"enum": dataset_names()}
    folder = {"type": "string", "pattern": "^folder:.", "description": "A folder of images, prepared or by its path."}
    return {"anyOf": [named, folder]}


def _plain(schema: Mapping[str, Any]) -> Schema:
    """A schema of pydantic's without its titles, at any depth."""
    return {key: _deeper(value) for key, value in schema.items() if key not in _MEANINGLESS or isinstance(value, dict)}


def _deeper(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _plain(value)
    return [_deeper(each) for each in value] if isinstance(value, list) else value


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
