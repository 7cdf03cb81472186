"""Arguments of a tool as GLM writes them: a pair of tags for each key and value, texts as they are, all else as JSON.

    <arg_key>city</arg_key><arg_value>Leipzig</arg_value><arg_key>days</arg_key><arg_value>3</arg_value>

Source: the chat templates of GLM-4.7 and GLM-5, whose calls these are, between `<tool_call>name` and `</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from glmjax.model.lark import Lark, either, json_value, literal, other_than, pattern, without

_KEY, _VALUE, _END = "<arg_key>", "</arg_key><arg_value>", "</arg_value>"
_TYPED = (
    "properties",
    "items",
    "prefixItems",
    "required",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "not",
    "allOf",
)

type Schema = Mapping[str, Any] | bool


def arguments(lark: Lark, schema: Schema) -> str:
    """What a JSON schema of an object describes, in this form.

    Keys come in the schema's order, those that are not required may be left out; others are written where it has an
    "additionalProperties", or no "properties".

    Args:
        lark: the grammar that this is for.
        schema: of the arguments.

    Raises:
        ValueError: it describes no object, or refers to what it does not have.
    """
    root = schema if isinstance(schema, Mapping) else {}
    schema = _resolved(schema, root)
    if schema is False or (schema is not True and schema.get("type", "object") != "object"):
        raise ValueError(f"{json.dumps(schema)[:200]} describes no object; a tool's parameters are one")
    given = {} if schema is True else schema
    properties, others = given.get("properties", {}), given.get("additionalProperties", "properties" not in given)
    required = set(given.get("required", ()))
    if missing := required - properties.keys():
        properties = {**properties, **dict.fromkeys(sorted(missing), True if others is False else others)}
    written = [
        f"({literal(_KEY + name + _VALUE)} {_value(lark, value, root)}){'' if name in required else '?'}"
        for name, value in properties.items()
    ]
    if others is not False:
        key = lark.lexeme("/[^<>]+/", *(other_than([name]) for name in properties))
        written.append(f"({literal(_KEY)} {key} {literal(_VALUE)} {_value(lark, others, root)})*")
    return lark.rule(" ".join(written))


def _value(lark: Lark, schema: Schema, root: Mapping[str, Any]) -> str:
    """What a schema describes, and the tag behind it."""
    kinds = [_kind(lark, kind, root) for kind in _alternatives(schema, root)]
    return lark.until([_END]) if None in kinds else either(kinds)


def _alternatives(schema: Schema, root: Mapping[str, Any]) -> list[Schema]:
    schema = _resolved(schema, root)
    if isinstance(schema, bool):
        return [schema]
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return [kind for one in schema[name] for kind in _alternatives(one, root)]
    if len(every := schema.get("allOf", ())) == 1:
        return _alternatives(every[0], root)
    if isinstance(types := schema.get("type"), list):
        return [{**schema, "type": one} for one in types]
    return [schema]


def _kind(lark: Lark, schema: Schema, root: Mapping[str, Any]) -> str | None:
    """One alternative, and the tag behind it; None for any text at all."""
    if schema is True:
        return None
    if schema is False:
        raise ValueError("an argument's schema is false, which nothing fits; leave the argument out")
    if "const" in schema or "enum" in schema:
        fitting = [one for one in schema.get("enum", [schema.get("const")]) if _fits(one, schema.get("type"))]
        return either(json.dumps((one if isinstance(one, str) else json.dumps(one)) + _END) for one in fitting)
    if "type" not in schema and not any(name in schema for name in _TYPED):
        return None
    if schema.get("type") != "string":
        defined = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return f"{json_value({**defined, **schema})} {literal(_END)}"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    rules = []
    if "pattern" in schema:
        rules.append(pattern(_searched(schema["pattern"])))
    if least or most != "":
        rules.append(f"/(?s:.{{{least},{most}}})/")
    return lark.until([_END], lark.lexeme(*rules, without([_END]))) if rules else None


def _fits(value: Any, kind: str | None) -> bool:
    return kind is None or isinstance(value, str) == (kind == "string")


def _searched(regex: str) -> str:
    """A regular expression for all of a text in which another one is found."""
    begin, middle, end = re.fullmatch(r"(\^?)(.*?)((?<!\\)\$)?", regex, re.DOTALL).groups()
    return f"{'' if begin else '(?s:.*)'}({middle}){'' if end else '(?s:.*)'}"


def _resolved(schema: Schema, root: Mapping[str, Any]) -> Schema:
    """A schema that refers to no other."""
    for _ in range(len(json.dumps(root))):
        if isinstance(schema, bool) or "$ref" not in schema:
            return schema
        reference = schema["$ref"]
        found: Any = root
        for name in reference.removeprefix("#").split("/")[1:]:
            found = found.get(name) if isinstance(found, Mapping) else None
        if not reference.startswith("#") or found is None:
            raise ValueError(f"the schema refers to {reference!r}, which it does not have; define it under $defs")
        schema = found
    raise ValueError("a schema refers to itself and says nothing else")
