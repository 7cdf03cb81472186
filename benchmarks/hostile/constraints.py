"""Grammars, schemas and structural tags that are none, allow nothing, or are larger and deeper than anybody needs."""

from __future__ import annotations

import json


def nested(begin: str, middle: str, end: str, depth: int) -> str:
    """Something inside of itself, so many times."""
    return begin * depth + middle + end * depth


def schemas(depth: int) -> tuple[str, ...]:
    """JSON schemas.

    Args:
        depth: of those that are deep, and size of those that are wide.
    """
    objects = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(min(depth, 3000))}}
    chained = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(depth)} | {f"a{depth}": {}}
    return (
        *("", "{", "[]", "5", "null", "false", '{"type": 5}', '{"$ref": "#/nowhere"}', '{"$ref": "#"}', '{"enum": []}'),
        *('{"minLength": 1000000000}', '{"type": "array", "minItems": 100000000}', '{"x-guidance": 5}', '{"a": 1e400}'),
        *('{"minimum": 5, "maximum": 1, "type": "integer"}', '{"const": "\\ud800"}', f'{{"const": {"9" * 5000}}}'),
        *('{"type": "string", "pattern": "(a{0,1000}){0,1000}"}', '{"type": "number", "multipleOf": 1e-300}'),
        *(json.dumps(objects), json.dumps({"anyOf": [{"const": n} for n in range(depth)]})),
        *(json.dumps({"$ref": "#/$defs/a0", "$defs": chained}), nested('{"items":', "{}", "}", depth), "[" * depth),
    )


def regexes(depth: int) -> tuple[str, ...]:
    """Regular expressions, some of exponential size; `depth` as for schemas."""
    return (
        *(
            "",
            "(",
            "(?=a)b",
            "(a)\\1",
            "[^\\s\\S]",
            "(x+x+)+y",
            ".*a.{30}",
            "(.*a){50}",
            "\\p{L}{1,5000}",
            ".{0,100000}",
        ),
        *("((a{0,100}){0,100}){0,100}", "(a|b|ab)*" * 20, "\\ud800", "\0", "a" * 10 * depth),
        *("|".join(f"x{n}y" for n in range(depth)), nested("(", "a", ")", depth)),
    )


def grammars(depth: int) -> tuple[str, ...]:
    """In Lark's notation or as GBNF; `depth` as for schemas."""
    chain = "".join(f"a{n}: a{n + 1}\n" for n in range(depth))
    return (
        *(
            "",
            "start: ",
            "start: start",
            'x: "a"',
            "start: @0",
            "root ::= root",
            '{"grammars": [5]}',
            "\0",
            "start: <x>",
        ),
        *('start: start start start | "a" | ', 'start: "a"{100000}', 'start: (("a"?){1000}){1000}', 'start: ""'),
        *('%llguidance {"x": 1}\nstart: "a"', 'start: %json {"type": }', "start: /[^\\s\\S]/", "%import nonsense"),
        *(f'start: a0\n{chain}a{depth}: "x"', nested("start: " + "(" * depth, '"a"', ")", 1) + ")" * (depth - 1)),
        "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(min(depth, 1000))) + 'a1000 ::= "x"',
    )


def structural_tags(depth: int) -> tuple[str, ...]:
    """JSON, mostly; `depth` as for schemas."""
    empty = {"type": "const_string", "value": ""}
    formats = (
        *(5, {"type": ["a"]}, {"type": "or", "elements": []}, {"type": "any_text", "excludes": [""]}),
        *({"type": "any_text", "excludes": [5]}, {"type": "json_schema", "json_schema": 5}),
        *({"type": "const_string", "value": {"a": [1]}}, {"type": "const_string", "value": "\ud800"}),
        *({"type": "regex", "pattern": None}, {"type": "grammar", "grammar": "start: @part_0"}),
        {"type": "json_schema", "style": "glm_xml", "json_schema": {"properties": 5}},
        {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": []},
        {"type": "star", "content": {"type": "star", "content": empty}},
    )
    deep = nested('{"type": "optional", "content": ', "0", "}", depth)
    stars = nested('{"type": "star", "content": ', json.dumps(empty), "}", min(depth, 300))
    structures = ({"begin": "", "schema": {}, "end": ""}, {"begin": {"a": 1}, "schema": {}, "end": "x"})
    return (
        *("", "{}", "[]", "null", "5", '{"structures": [], "triggers": []}'),
        *(json.dumps({"format": format}) for format in formats),
        *(json.dumps({"structures": [structure], "triggers": ["", "a"]}) for structure in structures),
        *(f'{{"format": {format}}}' for format in (deep, stars)),
    )
