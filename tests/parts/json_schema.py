"""The keywords of JSON schema (draft 2020-12) that suite.schema uses, by their definitions."""

import re
from typing import Any

KNOWN = {
    *("$schema", "$defs", "title", "description", "default", "examples"),  # which refuse nothing
    *("$ref", "anyOf", "enum", "const", "type", "pattern"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("items", "prefixItems", "minItems", "maxItems"),
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
}


def valid(value: Any, schema: Any, whole: Any) -> bool:
    """Whether a value is what a schema allows. whole: the document to which references point."""
    unknown = set(schema) - KNOWN
    assert not unknown, f"keywords that nobody looks at: {unknown}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    checks = {
        "$ref": lambda name: valid(value, whole["$defs"][name.removeprefix("#/$defs/")], whole),
        "anyOf": lambda several: any(valid(value, each, whole) for each in several),
        "enum": lambda allowed: any(same(value, each) for each in allowed),
        "const": lambda allowed: same(value, allowed),
        "type": lambda kind: is_a(value, kind),
        "pattern": lambda text: not isinstance(value, str) or re.search(text, value) is not None,
        "minimum": lambda least: not number or value >= least,
        "maximum": lambda most: not number or value <= most,
        "exclusiveMinimum": lambda least: not number or value > least,
        "exclusiveMaximum": lambda most: not number or value < most,
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "maxItems": lambda most: not isinstance(value, list) or len(value) <= most,
        "prefixItems": lambda each: (
            not isinstance(value, list) or all(valid(v, s, whole) for v, s in zip(value, each, strict=False))
        ),
        "items": lambda item: (
            not isinstance(value, list)
            or all(valid(v, item, whole) for v in value[len(schema.get("prefixItems", ())) :])
        ),
        "required": lambda names: not isinstance(value, dict) or set(names) <= set(value),
        "minProperties": lambda least: not isinstance(value, dict) or len(value) >= least,
        "maxProperties": lambda most: not isinstance(value, dict) or len(value) <= most,
    }
    if not all(check(schema[keyword]) for keyword, check in checks.items() if keyword in schema):
        return False
    return not isinstance(value, dict) or all(property_is(value[name], name, schema, whole) for name in value)


def property_is(value: Any, name: str, schema: Any, whole: Any) -> bool:
    of_patterns = [each for text, each in schema.get("patternProperties", {}).items() if re.search(text, name)]
    named = [schema["properties"][name]] if name in schema.get("properties", {}) else []
    if not (named or of_patterns):
        rest = schema.get("additionalProperties", True)
        return rest if isinstance(rest, bool) else valid(value, rest, whole)
    return all(valid(value, each, whole) for each in [*named, *of_patterns])


def is_a(value: Any, kind: str) -> bool:
    if kind == "integer":
        return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value % 1 == 0))
    kinds = {"number": int | float, "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, kinds[kind]) and (kind != "number" or not isinstance(value, bool))


def same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
