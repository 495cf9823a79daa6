"""Schemas that guided texts must keep to, and what checks that they do."""

from __future__ import annotations

import re
from typing import Any

WORD = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def entity(**properties: Any) -> dict[str, Any]:
    """An object that has all these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def many(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


# Every text of theirs is short, so that a random model comes to an end.
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    DIGIT,
    {"type": "integer", "minimum": -20, "maximum": 20},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    {"type": "integer", "minimum": 0, "maximum": 50, "multipleOf": 5},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, "one", None, True, [1, 2], {"a": 1}]},
    {"const": "only"},
    {"const": {"a": [1, {"b": None}]}},
    WORD,
    {"type": "string", "minLength": 2, "maxLength": 2},
    {"type": "string", "pattern": "^[a-c]{3}$"},
    {"type": "string", "pattern": "^(über|naïve|世界|🎉)$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "time"},
    {"enum": ["größe", "世界", "🎉", 'a"b\\c\n']},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 3},
    many(DIGIT),
    many(DIGIT, 4, 4),
    many({"type": "boolean"}, 5, 2),
    many(many(DIGIT, 2), 2),
    many({"enum": ["a", "b"]}, 3, 1),
    {"type": "array", "prefixItems": [DIGIT, {"type": "boolean"}], "items": False, "minItems": 2},
    entity(a=DIGIT),
    entity(a=DIGIT, b={"type": "boolean"}, c={"type": "null"}),
    entity(name=WORD, age=DIGIT),
    entity(inner=entity(inner=entity(inner=entity(x=DIGIT)))),
    entity(items=many(entity(id=DIGIT, tag={"enum": ["x", "y"]}), 2)),
    entity(größe=DIGIT, **{"naïve key": {"type": "boolean"}, "世界": {"type": "null"}}),
    entity(**{'with "quotes"': DIGIT, "with\\slash": DIGIT}),
    entity(a={"const": 1}, b={"const": "two"}, c={"const": None}),
    {"type": "object", "properties": {"a": DIGIT, "b": WORD}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": DIGIT, "b": DIGIT, "c": DIGIT},
        "required": ["b"],
        "additionalProperties": False,
    },
    {"anyOf": [DIGIT, {"type": "boolean"}]},
    {"anyOf": [entity(kind={"const": "n"}, n=DIGIT), entity(kind={"const": "b"}, b={"enum": [0]})]},
    entity(value={"anyOf": [{"type": "null"}, DIGIT, many(DIGIT, 2)]}),
    many({"anyOf": [DIGIT, {"enum": ["x"]}]}, 3, 1),
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]},
    {"$defs": {"d": DIGIT}, **entity(a={"$ref": "#/$defs/d"}, b={"$ref": "#/$defs/d"})},
    {
        "$defs": {"leaf": entity(v=DIGIT), "node": entity(l={"$ref": "#/$defs/leaf"}, r=DIGIT)},
        "$ref": "#/$defs/node",
    },
    entity(tool={"enum": ["search", "open"]}, arguments=entity(q=WORD, top=DIGIT)),
    entity(date={"type": "string", "format": "date"}, ok={"type": "boolean"}),
    entity(phone={"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"}),
    entity(point={"type": "array", "prefixItems": [DIGIT, DIGIT], "items": False, "minItems": 2}),
    entity(matrix=many(many(DIGIT, 2, 2), 2, 2)),
    entity(title={"type": "string", "title": "Title", "description": "no rule", "maxLength": 3}),
    {"type": "object", "additionalProperties": False},
    entity(a=many({"type": "null"}, 0)),
]

_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
}  # fmt: skip
_FORMATS = {
    "date": r"\d{4}-\d\d-\d\d", "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "time": r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
}  # fmt: skip


def _has_type(value: Any, name: str) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "integer":
        return is_number and float(value).is_integer()
    return is_number if name == "number" else isinstance(value, _TYPES[name])


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON: True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_valid(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value is what a schema says, of the words that SCHEMAS use."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema

    def holds(inner: Any, part: Any) -> bool:
        return is_valid(inner, part, root)

    checks = []
    for word, rule in schema.items():
        if word == "type":
            checks.append(any(_has_type(value, n) for n in ([rule] if type(rule) is str else rule)))
        elif word in ("const", "enum"):
            checks.append(any(_same(value, one) for one in ([rule] if word == "const" else rule)))
        elif word == "$ref":
            part = root
            for key in rule.removeprefix("#/").split("/"):
                part = part[key]
            checks.append(holds(value, part))
        elif word in ("anyOf", "oneOf", "allOf"):
            count = sum(holds(value, part) for part in rule)
            checks.append({"anyOf": count > 0, "oneOf": count == 1}.get(word, count == len(rule)))
    if isinstance(value, dict):
        checks += _object_checks(value, schema, holds)
    elif isinstance(value, list):
        first = schema.get("prefixItems", [])
        checks += [holds(item, part) for item, part in zip(value, first, strict=False)]
        checks += [holds(item, schema.get("items", True)) for item in value[len(first) :]]
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9))
    elif isinstance(value, str):
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9))
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
        checks.append(
            re.fullmatch(_FORMATS.get(schema.get("format"), ".*"), value, re.S) is not None
        )
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
        checks.append(schema.get("exclusiveMinimum", value - 1) < value)
        checks.append(value < schema.get("exclusiveMaximum", value + 1))
        checks.append(value % schema.get("multipleOf", 1) == 0 or "multipleOf" not in schema)
    return all(checks)


def _object_checks(value: dict[str, Any], schema: dict[str, Any], holds: Any) -> list[bool]:
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    checks = [key in value for key in schema.get("required", [])]
    return checks + [holds(inner, known.get(key, more)) for key, inner in value.items()]
