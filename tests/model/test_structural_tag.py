"""Forms that gateways ask for, and which texts follow them."""

import functools
import json
from pathlib import Path

import pytest

import glmjax
from glmjax.model.grammar import Grammars
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer

NANO = Path(glmjax.__file__).parent / "nano"
END = "<|endoftext|>"


@functools.cache
def known():
    tokenizer = Tokenizer.from_dir(NANO)
    return tokenizer, Grammars(tokenizer, Stops(frozenset({tokenizer.token_id(END)})), 4096)


def follows(text, prompt="", **params):
    """How much of a text, which may end with a mark of its end, follows a grammar."""
    tokenizer, grammars = known()
    matcher = grammars.matcher(SamplingParams(**params), tokenizer.encode(prompt))
    taken = []
    for token in tokenizer.encode(text):
        if not matcher.allowed()[0, token // 32] >> token % 32 & 1:
            break
        matcher.push(token)
        taken.append(token)
    return tokenizer.decode(taken, skip_special_tokens=False)


def fits(format, text):
    return follows(text + END, structural_tag=json.dumps({"format": format})) == text + END


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def text(value):
    return {"type": "const_string", "value": value}


ANY, A, B = {"type": "any_text"}, text("a"), text("b")
PAIR = {"type": "sequence", "elements": [A, B]}


@pytest.mark.parametrize(
    ("format", "fitting", "others"),
    [
        (A, ["a"], ["", "b", "aa"]),
        ({"type": "regex", "pattern": "a+/b"}, ["a/b", "aaa/b"], ["/b", "a"]),
        ({"type": "grammar", "grammar": 'root ::= "a" root | "b"'}, ["b", "aab"], ["a", "ba"]),
        ({"type": "json_schema", "json_schema": {"type": "integer"}}, ["12", "-3"], ["a", "1.5"]),
        (ANY, ["", "a\nb <tool_call> c"], []),
        (ANY | {"excludes": ["</", "x"]}, ["a < b /"], ["a </", "x"]),
        (PAIR, ["ab"], ["a", "b", "abb"]),
        ({"type": "sequence", "elements": [ANY, text("</think>"), A]}, ["hm </thin </think>a"], ["hm", "</think>b"]),
        ({"type": "sequence", "elements": [A, ANY, text(";")]}, ["a;", "abc;"], ["a", "a;b"]),
        ({"type": "or", "elements": [PAIR, B]}, ["ab", "b"], ["a", ""]),
        ({"type": "optional", "content": A}, ["", "a"], ["aa"]),
        ({"type": "plus", "content": A}, ["a", "aaa"], ["", "ab"]),
        ({"type": "star", "content": PAIR}, ["", "abab"], ["aba"]),
        (tag("<x>", ANY, "</x>"), ["<x></x>", "<x>a<b</x>"], ["<x>", "<x></x>a", "a<x></x>"]),
        (tag("(", PAIR, [")", "]"]), ["(ab)", "(ab]"], ["(ab", "ab)"]),
        (tag("(", tag("<", ANY, ">"), ")"), ["(<>)", "(<)>)"], ["(<))"]),
        (
            {"type": "tags_with_separator", "tags": [tag("(", A, ")"), tag("[", B, "]")], "separator": ","},
            ["", "(a)", "(a),[b],(a)"],
            ["(a),", "(a)(a)"],
        ),
        (
            {"type": "tags_with_separator", "tags": [tag("(", A, ")")], "separator": ",", "at_least_one": True},
            ["(a)", "(a),(a)"],
            [""],
        ),
        (
            {"type": "tags_with_separator", "tags": [tag("(", A, ")")], "separator": ",", "stop_after_first": True},
            ["", "(a)"],
            ["(a),(a)"],
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_a_format_is_followed(format, fitting, others):
    assert [one for one in fitting if not fits(format, one)] == []
    assert [one for one in others if fits(format, one)] == []


@pytest.mark.parametrize(
    ("more", "fitting", "others"),
    [
        ({}, ["", "free text", "see <f>a</f> and <g>b</g>, so"], ["<f>b", "<x", "<f>a</f> <g>a"]),
        ({"at_least_one": True}, ["<f>a</f>", "<g>b</g> and <f>a</f>."], ["", "free", "<f>a"]),
        ({"stop_after_first": True}, ["", "free", "see <f>a</f>"], ["<f>a</f>.", "<f>a</f><f>a</f>"]),
        ({"at_least_one": True, "stop_after_first": True}, ["<f>a</f>"], ["", "x<f>a</f>", "<f>a</f>."]),
        ({"excludes": ["never"]}, ["often <f>a</f>"], ["never", "<f>a</f> never"]),
    ],
    ids=str,
)
def test_triggers_begin_tags(more, fitting, others):
    format = {"type": "triggered_tags", "triggers": ["<"], "tags": [tag("<f>", A, "</f>"), tag("<g>", B, "</g>")]}
    assert [one for one in fitting if not fits(format | more, one)] == []
    assert [one for one in others if fits(format | more, one)] == []


def test_triggered_tags_may_be_inside_a_tag():
    inner = {"type": "triggered_tags", "triggers": ["["], "tags": [tag("[f]", A, "[/f]")]}
    format = tag("<out>", inner, "</out>")
    assert fits(format, "<out>free [f]a[/f] text</out>")
    assert not fits(format, "<out>free [x</out>")
    assert not fits(format, "<out>free")


# GLM's calls of tools

ARGUMENTS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F", 3]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "note": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    },
    "required": ["city", "tags"],
    "$defs": {"Tag": {"type": "string", "maxLength": 2}},
}


def call(name, **arguments):
    written = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    return f"<tool_call>{name}{written}</tool_call>"


def tools(**schemas):
    """As the gateway asks for calls of one of some tools."""
    tags = [
        tag(f"<tool_call>{name}", {"type": "json_schema", "json_schema": schema, "style": "glm_xml"}, "</tool_call>")
        for name, schema in schemas.items()
    ]
    return {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": tags, "at_least_one": True}


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Leipzig\n<b>", "tags": '["a", "b"]'},
        {"city": "", "days": 3, "tags": "[]"},
        {"city": '{"x": 1}', "unit": "C", "tags": "[]", "code": "AB", "note": "abc"},
        {"city": "x", "unit": 3, "tags": "[]", "note": "null"},
    ],
    ids=str,
)
def test_a_call_of_a_tool_is_what_its_schema_describes(arguments):
    assert fits(tools(weather=ARGUMENTS), call("weather", **arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Leipzig"},
        {"tags": "[]", "city": "x"},
        {"city": "x", "days": 10, "tags": "[]"},
        {"city": "x", "unit": "K", "tags": "[]"},
        {"city": "x", "tags": '["abc"]'},
        {"city": "x", "tags": "[]", "code": "ABC"},
        {"city": "x", "tags": "[]", "note": "abcd"},
        {"city": "x", "tags": "[]", "other": 1},
    ],
    ids=str,
)
def test_nothing_else_is_a_call_of_it(arguments):
    assert not fits(tools(weather=ARGUMENTS), call("weather", **arguments))


def test_tools_may_have_names_that_begin_alike():
    both = tools(get={"type": "object", "properties": {}}, get_all={"type": "object", "properties": {"n": True}})
    assert fits(both, call("get"))
    assert fits(both, call("get_all", n="what one likes") + call("get"))
    assert not fits(both, call("get_al"))


def test_a_tool_whose_arguments_are_not_described_takes_any():
    for schema in ({}, {"type": "object"}, {"type": "object", "properties": {}, "additionalProperties": True}):
        assert fits(tools(f=schema), call("f"))
        assert fits(tools(f=schema), call("f", a="1", b="text"))
    more = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}
    assert fits(tools(f=more), call("f", a=1, b="true"))
    assert not fits(tools(f=more), call("f", b=1))


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [("b", "abc", "ac"), ("^b", "bc", "ab"), ("b$", "ab", "ba"), (r"\$", "a$b", "ab"), ("^a|b$", "a", "x")],
)
def test_patterns_are_searched_for(pattern, fitting, other):
    asked = tools(f={"properties": {"x": {"type": "string", "pattern": pattern}}, "required": ["x"]})
    assert fits(asked, call("f", x=fitting))
    assert not fits(asked, call("f", x=other))


# Thoughts

SCHEMA = {"json_schema": {"type": "integer"}}


@pytest.mark.parametrize(
    "params",
    [
        *(SCHEMA, {"regex": "12"}, {"choice": ("12", "no")}, {"grammar": 'root ::= "12"'}, {"grammar": 'start: "12"'}),
        {"structural_tag": json.dumps({"format": text("12")})},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_grammar_begins_behind_the_thoughts(params):
    thought = f"it is 7, </thin no, 13</think>12{END}"
    assert follows(thought, "<|user|>how many?<|assistant|><think>", **params) == thought
    assert follows("hm</think>x", "<|assistant|><think>", **params) == "hm</think>"


@pytest.mark.parametrize(
    "prompt",
    ["", "<|assistant|>", "<|assistant|></think>", "<|assistant|><think>so</think>", "<think> is a tag<|assistant|>"],
)
def test_it_begins_at_once_where_nobody_thinks(prompt):
    assert follows("12x", prompt, **SCHEMA) == "12"


def test_it_may_begin_at_once_in_a_thought():
    assert follows("12x", "<|assistant|><think>", grammar_from_first_token=True, **SCHEMA) == "12"


# What is refused


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (text("x" * 300_000), "characters; simplify it"),
        ({"type": "odd"}, "the format 'odd' is not known"),
        ({"type": "ended"}, "the format 'ended' is not known"),
        ({"type": "sequence"}, "lacks 'elements'"),
        ({"type": "sequence", "elements": 3}, "lacks"),
        ({"value": "a"}, "lacks 'type'"),
        ({"type": "const_string", "value": 3}, "lacks"),
        ({"type": "regex", "pattern": "(a"}, "unclosed group"),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "'qwen_xml' .* is not what GLM writes"),
        ({"type": "triggered_tags", "triggers": ["<"], "tags": []}, "has no tags"),
        ({"type": "triggered_tags", "triggers": ["["], "tags": [tag("<f>", A, "</f>")]}, "begins with none"),
        (tools(f={"type": "array"}), "describes no object"),
        (tools(f={"properties": {"a": {"$ref": "#/$defs/A"}}}), "refers to '#/\\$defs/A', which it does not have"),
        (tools(f={"properties": {"a": {"$ref": "#/properties/a"}}}), "refers to itself"),
        (tools(f={"properties": {"a": False}}), "leave the argument out"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_format_is_refused(format, message):
    with pytest.raises(ValueError, match=message):
        fits(format, "a")


def chain(rules):
    return "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(rules)) + f'a{rules}: "x"'


def referring(definitions):
    chained = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(definitions)} | {f"a{definitions}": {}}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": chained})


@pytest.mark.parametrize(
    "asked",
    [
        {"grammar": chain(5000)},
        {"grammar": "root ::= a0\n" + "\n".join(f"a{n} ::= a{n + 1}" for n in range(5000)) + '\na5000 ::= "x"'},
        {"json_schema": referring(5000)},
        {"structural_tag": json.dumps({"format": {"type": "grammar", "grammar": chain(5000)}})},
    ],
    ids=["Lark", "GBNF", "JSON schema", "structural tag"],
)
def test_a_chain_that_would_take_all_of_the_stack_is_refused(asked):
    with pytest.raises(ValueError, match="rules and references; simplify it to at most 1000"):
        follows("x", **asked)


def test_a_long_chain_and_many_tools_are_not():
    assert follows("x", grammar=chain(900)) == "x"
    schema = {"properties": {f"p{n}": {"type": "string"} for n in range(10)}}
    many = tools(**{f"f{n}x": schema for n in range(200)})
    assert fits(many, call("f77x", p3="a"))


def test_too_many_choices_are_refused():
    with pytest.raises(ValueError, match="choice has 10001 texts; give at most 10000"):
        follows("1", choice=tuple(map(str, range(10_001))))


def test_what_is_too_deep_is_refused():
    deep = '{"type": "plus", "content": ' * 500 + '{"type": "const_string", "value": "a"}' + "}" * 500
    with pytest.raises(ValueError, match=r"too deep|cannot be followed|recursion"):
        follows("a", structural_tag=f'{{"format": {deep}}}')
