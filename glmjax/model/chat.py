"""Messages to prompt text, by the checkpoint's own chat template. No template is written by hand here.

A chat template is a Jinja program that comes with the weights, so it runs sandboxed: it sees no Python internals and
cannot change what it is given. The environment follows Hugging Face's conventions (`apply_chat_template`), on which
published templates rely: `trim_blocks`, `lstrip_blocks`, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, and the `generation` tag, which marks what training masks keep and prints its body.
"""

import datetime
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmjax.model.tokenizer import named_special_tokens, read_json


class ChatTemplate:
    """A compiled chat template. Immutable and safe to share between threads.

    Text of messages goes into the prompt verbatim: control tokens that a user writes out become control tokens when the
    prompt is encoded with `parse_special=True`, as everywhere with such templates.

    Attributes:
        source: the template's text.
        origin: where it came from, for messages.
        special_tokens: given to the template by name (`bos_token`, …).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, origin: str = "chat template"):
        self.source = source
        self.origin = origin
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{origin}, line {error.lineno}, is not a Jinja template: {error.message}; fetch it again"
            ) from error

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> "ChatTemplate | None":
        """The template of a checkpoint directory, or None where the model has none.

        It is chat_template.jinja or else "chat_template" in tokenizer_config.json: a string, or a list of
        {"name", "template"} of which "default" is taken.

        Raises:
            ValueError: the entry is malformed, has no "default", or is not a Jinja template.
        """
        directory = Path(path)
        config_file, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = read_json(config_file)
        if file.is_file():
            source, origin = file.read_text(encoding="utf-8"), str(file)
        else:
            origin = f'"chat_template" of {config_file}'
            source = _default_template(config.get("chat_template"), origin)
        return None if source is None else cls(source, named_special_tokens(config), origin)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: the conversation, each with a "role"; what else is looked at is up to the template. GLM's goes
                through the items of a tool call's "arguments", so these must be an object, not JSON text.
            tools: JSON schemas of the tools on offer.
            add_generation_prompt: end with the beginning of the assistant's turn.
            **kwargs: further variables, such as `enable_thinking` or `clear_thinking`; a template ignores those that it
                does not know.

        Raises:
            ValueError: a message has no role, the template refuses the conversation, or it fails; the message names
                the line of the template.
        """
        for index, message in enumerate(messages):
            role = message.get("role")
            if not isinstance(role, str):
                raise ValueError(f'messages[{index}] has the role {role!r}; give "role" as a string')
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        try:
            return self._template.render(variables)
        except _RefusedError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # whatever Python raises inside, template and input are the cause
            raise ValueError(
                f"{self.origin}{_line(error)}, failed on this conversation: {type(error).__name__}: {error}; check the "
                "messages and tools against what the template expects"
            ) from error


class _RefusedError(jinja2.TemplateError):
    """Raised by the template itself, through `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: the body, as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way to declare them

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _default_template(entry: Any, origin: str) -> str | None:
    if entry is None or isinstance(entry, str):
        return entry
    if not isinstance(entry, list) or not all(isinstance(item, dict) for item in entry):
        raise ValueError(f"{origin} is a {type(entry).__name__}; expected a string or a list of {{name, template}}")
    templates = {item.get("name"): item.get("template") for item in entry}
    if not isinstance(templates.get("default"), str):
        raise ValueError(f'{origin} has the templates {list(templates)}, but none named "default"; name one so')
    return templates["default"]


def _line(error: Exception) -> str:
    """Jinja rewrites tracebacks so that frames of the template bear its line numbers."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""
