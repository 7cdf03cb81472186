"""Structural tags: text that is free in some places and follows a form in others, as gateways ask for calls of tools.

The forms are those of XGrammar, which vLLM and SGLang take: JSON of {"format": …}, or the older {"structures": …, "triggers": …}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import grammar_from

from glmjax.model.lark import TEXT, Lark, either, json_value, literal, without
from glmjax.model.tool_arguments import arguments

_SHOWN = 200


def structural_tag(text: str) -> str:
    """A grammar for llguidance.

    Args:
        text: of the structural tag.

    Raises:
        ValueError: it is none, or has a form that is not known; says which.
    """
    given = json.loads(text)
    writer = _Writer()
    try:
        return writer.lark.grammar(writer.write(_format(given), ()))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f'{text[:_SHOWN]!r} lacks {error}; give {{"format": …}} or {{"structures": [{{"begin", "schema", "end"}}], "triggers": […]}}'
        ) from error
    except RecursionError as error:
        raise ValueError(f"{text[:_SHOWN]!r} is too deep") from error


def _format(given: Any) -> Mapping[str, Any]:
    if "format" in given:
        return given["format"]
    if not given["structures"]:
        raise ValueError("it has no structures; leave it out")
    tags = [
        {
            "begin": structure["begin"],
            "content": {"type": "json_schema", "json_schema": structure["schema"]},
            "end": structure["end"],
        }
        for structure in given["structures"]
    ]
    return {"type": "triggered_tags", "triggers": given["triggers"], "tags": tags}


class _Writer:
    """Writes formats. Each is told which texts end it, and writes them, too: free text reaches up to there."""

    def __init__(self):
        self.lark = Lark()

    def write(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        """What a format describes, and one of its ends.

        Args:
            format: one of XGrammar's.
            ends: none for what the whole text ends with.
        """
        kind = format["type"]
        write: Callable[[Mapping[str, Any], Sequence[str]], str] | None = getattr(self, f"_{kind}", None)
        if write is None or kind not in _FORMATS:
            raise ValueError(f"the format {kind!r} is not known; use one of {', '.join(_FORMATS)}")
        return write(format, ends)

    def _ended(self, expression: str, ends: Sequence[str]) -> str:
        return f"{expression} {either(map(literal, ends)) if any(ends) else ''}"

    def _const_string(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(literal(format["value"]), ends)

    def _regex(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(self.lark.part(grammar_from("regex", format["pattern"])), ends)

    def _grammar(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(self.lark.part(grammar_from("grammar", format["grammar"])), ends)

    def _json_schema(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        schema, style = format["json_schema"], format.get("style", "json")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if style == "glm_xml":
            return self._ended(arguments(self.lark, schema), ends)
        if style != "json":
            raise ValueError(f"the style {style!r} of a json_schema is not what GLM writes; use json or glm_xml")
        return self._ended(json_value(schema), ends)

    def _any_text(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        excluded = format.get("excludes") or []
        text = self.lark.lexeme(TEXT, without(excluded)) if excluded else TEXT
        return self.lark.until(ends, text) if any(ends) else text

    def _sequence(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._series(format["elements"], ends)

    def _series(self, elements: Sequence[Mapping[str, Any]], ends: Sequence[str]) -> str:
        match elements:
            case []:
                return self._ended("", ends)
            case [last]:
                return self.write(last, ends)
            case [{"type": "any_text"} as text, {"type": "const_string", "value": value}, *rest]:
                return f"{self.write(text, [value])} {self._series(rest, ends)}"
            case [first, *rest]:
                return f"{self.write(first, ())} {self._series(rest, ends)}"
        raise TypeError(f"a list of elements in {elements!r}")

    def _or(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return either(self.write(element, ends) for element in format["elements"])

    def _optional(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(f"({self.write(format['content'], ())})?", ends)

    def _plus(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(f"({self.write(format['content'], ())})+", ends)

    def _star(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(f"({self.write(format['content'], ())})*", ends)

    def _tag(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        return self._ended(f"{literal(format['begin'])} {self._inside(format)}", ends)

    def _inside(self, tag: Mapping[str, Any]) -> str:
        end = tag["end"]
        return self.lark.rule(self.write(tag["content"], [end] if isinstance(end, str) else end))

    def _triggered_tags(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        triggers, tags = format["triggers"], format["tags"]
        behind: dict[str, list[str]] = {}
        whole = []
        for tag in tags:
            begin, inside = tag["begin"], self._inside(tag)
            trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"{begin!r} begins with none of the triggers {triggers!r}; add one")
            behind.setdefault(trigger, []).append(f"{literal(begin[len(trigger) :])} {inside}")
            whole.append(f"{literal(begin)} {inside}")
        if not tags:
            raise ValueError("triggered_tags has no tags; leave it out")
        text = self.lark.lexeme(TEXT, without([*triggers, *format.get("excludes", ())]))
        tag = self.lark.rule(
            either(f"{self.lark.until([trigger], text)} {either(insides)}" for trigger, insides in behind.items())
        )
        rest = self.lark.until(ends, text) if any(ends) else text
        first = either(whole) if format.get("at_least_one") else ""
        if not format.get("stop_after_first"):
            return f"{first} {tag}* {rest}"
        return self._ended(first, ends) if first else either([self._ended(tag, ends), rest])

    def _tags_with_separator(self, format: Mapping[str, Any], ends: Sequence[str]) -> str:
        tag = self.lark.rule(either(self._tag(tag, ()) for tag in format["tags"]))
        several = tag if format.get("stop_after_first") else f"{tag} ({literal(format['separator'])} {tag})*"
        return self._ended(f"({several})" if format.get("at_least_one") else f"({several})?", ends)


_FORMATS = (
    *("const_string", "json_schema", "regex", "grammar", "any_text", "sequence", "or", "optional", "plus", "star"),
    *("tag", "triggered_tags", "tags_with_separator"),
)
