import datetime
import json

import pytest

from glmjax.model.chat import ChatTemplate

# In the style of GLM's templates, for these tests only: a checkpoint brings its own.
GLM_STYLE = """\
[gMASK]<sop>
{%- if tools %}<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif %}
{%- macro visible(content) %}
    {%- if content is string %}{{ content }}
    {%- else %}
        {%- for part in content if part.type == "text" %}{{ part.text }}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- set turn = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set turn.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}<|observation|><tool_response>{{ visible(message.content) }}</tool_response>
    {%- elif message.role == "assistant" %}<|assistant|>
        {%- if message.reasoning_content and not (clear_thinking and loop.index0 < turn.last_user) %}
            {{- "<think>" + message.reasoning_content + "</think>" }}
        {%- else %}{{ "</think>" }}{% endif %}
        {{- visible(message.content).strip() }}
        {%- for call in message.tool_calls or [] %}
            {{- "<tool_call>" + call.function.name }}
            {%- for key, value in call.function.arguments.items() -%}
                <arg_key>{{ key }}</arg_key><arg_value>{{ value if value is string else value | tojson }}</arg_value>
            {%- endfor %}
            {{- "</tool_call>" }}
        {%- endfor %}
    {%- else %}{{ "<|" + message.role + "|>" + visible(message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ "</think>" if enable_thinking is false else "<think>" }}{% endif %}
"""
HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, *args, **kwargs) -> str:
    return ChatTemplate(source).render(*(args or (HELLO,)), **kwargs)


# Where the template comes from


def test_the_jinja_file_comes_before_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert ChatTemplate.from_dir(tmp_path).render(HELLO) == "config"
    (tmp_path / "chat_template.jinja").write_text("日本", encoding="utf-8")
    assert ChatTemplate.from_dir(str(tmp_path)).render(HELLO) == "日本"


def test_of_several_templates_default_is_taken(tmp_path):
    entry = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert ChatTemplate.from_dir(tmp_path).source == "yes"


def test_several_templates_without_default_are_refused(tmp_path):
    entry = [{"name": "tool_use", "template": "no"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ValueError, match=r"has the templates \['tool_use'\], but none named \"default\""):
        ChatTemplate.from_dir(tmp_path)


@pytest.mark.parametrize("entry", [3, ["default"]])
def test_an_entry_of_another_type_is_refused(tmp_path, entry):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ValueError, match="expected a string or a list"):
        ChatTemplate.from_dir(tmp_path)


def test_a_model_without_template_gives_none(tmp_path):
    assert ChatTemplate.from_dir(tmp_path) is None


def test_special_tokens_of_tokenizer_config_are_given_by_name(tmp_path):
    config = {"bos_token": "[gMASK]", "eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}{{ eos_token }}")
    assert ChatTemplate.from_dir(tmp_path).render(HELLO) == "[gMASK]<|endoftext|>"


# What a template in GLM's style renders


def test_a_turn_ends_with_the_generation_prompt():
    assert render(GLM_STYLE) == "[gMASK]<sop><|user|>Hello<|assistant|><think>"
    assert render(GLM_STYLE, add_generation_prompt=False) == "[gMASK]<sop><|user|>Hello"


def test_further_arguments_reach_the_template():
    assert render(GLM_STYLE, enable_thinking=False) == "[gMASK]<sop><|user|>Hello<|assistant|></think>"
    past = [*HELLO, {"role": "assistant", "content": "Hi", "reasoning_content": "Greet."}, *HELLO]
    assert "<think>Greet.</think>Hi" in render(GLM_STYLE, past)
    assert "<|assistant|></think>Hi" in render(GLM_STYLE, past, clear_thinking=True)


def test_content_may_be_a_list_of_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert render(GLM_STYLE, [{"role": "user", "content": parts}]) == render(GLM_STYLE)


def test_tools_calls_and_results():
    call = {"function": {"name": "add", "arguments": {"a": 1, "to": "<é>"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    assert render(GLM_STYLE, messages, [{"name": "ädd"}], add_generation_prompt=False) == (
        '[gMASK]<sop><|system|>\n# Tools\n{"name": "ädd"}\n<|assistant|></think><tool_call>add'
        "<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>to</arg_key><arg_value><é></arg_value></tool_call>"
        "<|observation|><tool_response>3</tool_response>"
    )


# Hugging Face's conventions


def test_blocks_leave_no_whitespace_of_their_lines():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loops_can_break_and_continue():
    assert (
        render(
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        )
        == "02"
    )


def test_tojson_escapes_neither_html_nor_unicode():
    assert render("{{ x | tojson }}", x={"b": "<é> & 'q'", "a": 1}) == """{"b": "<é> & 'q'", "a": 1}"""


def test_tojson_takes_the_arguments_of_json():
    assert render("{{ x | tojson(ensure_ascii=True) }}", x="é") == r'"\u00e9"'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_strftime_now_formats_the_time():
    assert datetime.datetime.strptime(render("{{ strftime_now('%Y-%m-%d') }}"), "%Y-%m-%d").year >= 2025


def test_the_generation_tag_prints_its_body():
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHellob"


def test_text_is_not_escaped_and_not_evaluated():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "<b>{{ 1 }}"}]) == "<b>{{ 1 }}"


# Errors


def test_a_syntax_error_names_its_line():
    with pytest.raises(ValueError, match="chat template, line 2, is not a Jinja template"):
        ChatTemplate("ok\n{% if %}")


def test_a_refusal_of_the_template_gives_its_reason():
    with pytest.raises(ValueError, match=r"refuses the conversation: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_failure_names_file_and_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("\n\n{{ messages[0].content + 1 }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja, line 3, failed on this conversation: TypeError"):
        ChatTemplate.from_dir(tmp_path).render(HELLO)


@pytest.mark.parametrize("source", ["{{ nothing.attribute }}", "{{ nothing | tojson }}", "{{ 1 // 0 }}", "{{ f() }}"])
def test_whatever_fails_is_a_value_error(source):
    with pytest.raises(ValueError, match=r"line 1, failed on this conversation: \w+Error"):
        render(source)


def test_a_message_without_role_is_named():
    with pytest.raises(ValueError, match=r"messages\[1\] has the role None"):
        render(GLM_STYLE, [*HELLO, {"content": "Hello"}])


# The sandbox


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages['__class__'].__name__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ range(100000000) | list }}",
    ],
)
def test_python_internals_are_out_of_reach(attack):
    with pytest.raises(ValueError, match=r"(SecurityError|UndefinedError|OverflowError)"):
        render(attack)


def test_an_unsafe_attribute_alone_prints_nothing():
    assert render("{{ ''.__class__ }}{{ messages.__len__ }}") == ""


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{% do messages.append(1) %}",
    ],
)
def test_the_conversation_cannot_be_changed(attack):
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match=r"(SecurityError|not a Jinja template)"):
        render(attack, messages)
    assert messages == HELLO


def test_one_rendering_leaves_nothing_behind_for_the_next():
    template = ChatTemplate("{{ left }}{% set left = 'behind' %}{% set ns = namespace(a=1) %}{% set ns.a = 2 %}")
    assert template.render(HELLO) == template.render(HELLO) == ""
