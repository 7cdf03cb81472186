"""Expressions and rules of llguidance's Lark notation."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llguidance import regex_to_lark

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of JSON, where a schema has no "x-guidance" of its own: as `json.dumps` sets it."""
TEXT = "/(?s:.*)/"
"""Any."""
_RULE = re.compile(r"^[^\n:\"/]*:", re.MULTILINE)
_WRITTEN = ""  # name of the part that `Lark` writes


class Lark:
    """A grammar that is being written. Its methods give expressions, some of which are names of rules they have added."""

    def __init__(self):
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []
        self._numbers = itertools.count()

    def grammar(self, start: str) -> str:
        """All of it, for llguidance.

        Args:
            start: the expression that texts follow.
        """
        rules = "\n".join([f"start: {start}", *self._rules])
        return json.dumps(
            {"grammars": [{"name": _WRITTEN, "lark_grammar": f"%llguidance {{}}\n{rules}\n"}, *self._parts]}
        )

    def part(self, grammar: str) -> str:
        """What follows a grammar of its own.

        Args:
            grammar: as llguidance takes it, in Lark or as JSON.
        """
        first, *others = parts_of(grammar)
        name = f"part_{next(self._numbers)}"
        self._parts += [{**first, "name": name}, *others]
        return f"@{name}"

    def rule(self, expression: str) -> str:
        """What an expression describes, under a name."""
        name = f"rule_{next(self._numbers)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def lexeme(self, *regular: str) -> str:
        """What all of some regular expressions match at once."""
        name = f"LEXEME_{next(self._numbers)}"
        self._rules.append(f"{name}: {' & '.join(regular)}")
        return name

    def until(self, ends: Iterable[str], text: str = TEXT) -> str:
        """The shortest text with one of some endings, which is part of it.

        Args:
            ends: none of them empty.
            text: what is before.
        """
        name = f"until_{next(self._numbers)}"
        self._rules.append(f"{name}[lazy]: {text} {either(map(literal, ends))}")
        return name


def parts_of(grammar: str) -> list[dict[str, Any]]:
    """Those that a grammar for llguidance, in Lark or as JSON, consists of; the first one is where it begins."""
    if grammar.lstrip().startswith("{"):
        return json.loads(grammar)["grammars"]
    return [{"lark_grammar": grammar}]


def names_in(grammar: str) -> int:
    """How many rules somebody has given it, and how many references to definitions of JSON schemas it has.

    Args:
        grammar: as llguidance takes it, in Lark or as JSON.
    """
    count = 0
    for part in parts_of(grammar):
        text = part.get("lark_grammar") or json.dumps(part.get("json_schema"))
        count += text.count('"$ref"') + (0 if part.get("name") == _WRITTEN else len(_RULE.findall(text)))
    return count


def either(expressions: Iterable[str]) -> str:
    """One of them."""
    return f"({' | '.join(expressions)})"


def literal(text: str) -> str:
    """Exactly a text."""
    return json.dumps(text) if text else ""


def pattern(regex: str) -> str:
    """What all of a regular expression matches."""
    return f"/{regex_to_lark(regex, 'd')}/"


def without(texts: Iterable[str]) -> str:
    """Text in which none of some others occur."""
    return f"~/(?s:.*({_one_of(texts)}).*)/"


def other_than(texts: Iterable[str]) -> str:
    """Text that is none of some others."""
    return f"~/({_one_of(texts)})/"


def _one_of(texts: Iterable[str]) -> str:
    return "|".join("".join(f"\\x{{{ord(letter):x}}}" for letter in text) for text in texts)


def json_value(schema: Mapping[str, Any] | bool) -> str:
    """JSON that a schema describes."""
    if isinstance(schema, Mapping):
        schema = {"x-guidance": SPACING, **schema}
    return f"%json {json.dumps(schema)}"
