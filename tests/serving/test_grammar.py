"""Text follows its grammar, is drawn as the model says given that, and nobody else notices."""

import dataclasses
import functools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glmjax.glm import GLM
from glmjax.model.grammar import Matcher, words_of
from glmjax.model.sampling import allow, noisy, observe
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.errors import GrammarError
from glmjax.serving.programs import Log
from glmjax.serving.recorder import load
from glmjax.serving.replay import Replay
from glmjax.serving.shapes import Shapes
from tests.serving.paper_device import expected
from tests.serving.test_scheduler import Bench
from tests.serving.tiny import CONFIG as TINY
from tests.serving.tiny import tiny

VOCAB, LENGTH = 320, 192
CONFIG = EngineConfig(
    max_model_len=LENGTH,
    max_num_seqs=2,
    page_size=8,
    pages=34,
    chunk_tokens=8,
    num_draft=1,
    adapts_draft=False,
    max_rounds=4,
    grammars=True,
    debug=True,
)
PROMPT = "give me "
SAMPLED = {"temperature": 1.2, "seed": 3, "max_new_tokens": 90}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@functools.cache
def glm():
    """Random weights over bytes and a few pairs of them; the head has room for more."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(['{"name": "Ann", "age": 12, "tags": [true, false]}'] * 5, trainer)
    config = dataclasses.replace(TINY, vocab_size=VOCAB, max_position_embeddings=LENGTH)
    stops = Stops(frozenset({raw.token_to_id("<|endoftext|>"), raw.token_to_id("<|user|>")}))
    return GLM(Transformer(config, dtype=np.float32, rngs=random_source(0)), Tokenizer(raw), None, stops)


@pytest.fixture(scope="module")
def engine():
    with Engine(glm(), CONFIG) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    stats = engine.stats()
    while stats.running or stats.waiting:
        stats = engine.stats()
    assert stats.free_pages + stats.cached_pages == stats.pages


def one(engine, prompt=PROMPT, **fields):
    [result] = engine.generate(prompt, **SAMPLED | fields).finish()
    return result


def matcher(**fields):
    return glm().grammars.matcher(SamplingParams(**fields))


def allowed_by(matcher, chain=()):
    """Token ids after the chain."""
    bits = np.unpackbits(matcher.allowed(chain)[-1:].view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


# What may come next


def test_a_token_is_allowed_where_some_text_goes_on_with_it():
    a, b, c = glm().encode("abc")
    found = matcher(regex="ab*c")
    assert allowed_by(found) == {a}
    assert allowed_by(found, [a]) == allowed_by(found, [a, b]) == {b, c}
    assert allowed_by(found) == {a}  # looking ahead leaves it where it was


def test_a_turn_may_end_exactly_where_the_text_may():
    a, b = glm().encode("ab")
    found = matcher(regex="ab*")
    assert not allowed_by(found) & glm().stops.token_ids
    assert allowed_by(found, [a]) == {b} | glm().stops.token_ids


def test_what_is_forced_is_all_that_is_allowed():
    found = matcher(json_schema=PERSON)
    for token in glm().encode('{"name": "x", "age": 7}'):
        if found.forced:
            assert found.forced[0] == token
            assert allowed_by(found) == {token}
        assert token in allowed_by(found)
        found.push(token)
    assert found.ended


def test_a_matcher_can_be_had_as_it_was():
    ids, found = glm().encode('{"name": "Ann"'), matcher(json_schema=PERSON)
    states = [allowed_by(found)]
    for token in ids:
        found.push(token)
        states.append(allowed_by(found))
    assert [allowed_by(found.at(n)) for n in range(len(ids) + 1)] == states


def test_a_mask_leaves_the_logits_of_what_it_allows():
    logits_BV = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    bits_BV = np.random.default_rng(1).random((2, VOCAB)) < 0.5
    words_BW = np.packbits(bits_BV, axis=1, bitorder="little").view(np.int32)
    np.testing.assert_array_equal(
        allow(jnp.array(logits_BV), jnp.array(words_BW)), np.where(bits_BV, logits_BV, -np.inf)
    )


# The text


def random_schema(rng, depth=2):
    """A schema whose texts take 90 tokens at most, and whether a value is what it describes."""
    kind = rng.choice(["object", "array"] if depth == 2 else ["integer", "boolean", "enum", "string"])
    if kind == "object":
        parts = {name: random_schema(rng, depth - 1) for name in rng.sample(["a", "name", "of it"], 2)}
        schema = {"type": kind, "properties": {name: part for name, (part, _) in parts.items()}}
        return schema | {
            "required": list(parts),
            "additionalProperties": False,
        }, lambda value: value.keys() == parts.keys() and all(fits(value[name]) for name, (_, fits) in parts.items())
    if kind == "array":
        item, fits = random_schema(rng, depth - 1)
        least, most = rng.randint(0, 1), rng.randint(1, 2)
        return {
            "type": kind,
            "items": item,
            "minItems": least,
            "maxItems": most,
        }, lambda value: least <= len(value) <= most and all(map(fits, value))
    if kind == "enum":
        return {"enum": ["red", 5, None]}, lambda value: value in ("red", 5, None)
    if kind == "integer":
        low = rng.randint(-99, 99)
        return {
            "type": kind,
            "minimum": low,
            "maximum": low + 40,
        }, lambda value: type(value) is int and low <= value <= low + 40
    if kind == "string":
        return {"type": kind, "maxLength": 4}, lambda value: type(value) is str and len(value) <= 4
    return {"type": kind}, lambda value: type(value) is bool


def test_json_is_what_its_schema_describes(engine):
    asked = [random_schema(random.Random(seed)) for seed in range(16)]
    streams = [
        engine.generate(PROMPT, json_schema=schema if n % 2 else json.dumps(schema), **SAMPLED | {"seed": n})
        for n, (schema, _) in enumerate(asked)
    ]
    for stream, (schema, fits) in zip(streams, asked, strict=True):
        [result] = stream.finish()
        assert result.finish_reason == "stop"
        assert fits(json.loads(result.text)), (schema, result.text)


@pytest.mark.parametrize("regex", ["[a-f]{2,5}x", "(ab|cd)+!", r"\d{3}-\d{2}", "é[^a-z]{3}"])
def test_all_of_a_text_matches_its_regular_expression(engine, regex):
    result = one(engine, regex=regex)
    assert result.finish_reason == "stop"
    assert re.fullmatch(regex, result.text)


def test_one_of_several_texts_is_chosen(engine):
    texts = ("yes", "no", 'a "quoted"\nline')
    chosen = {one(engine, choice=texts, seed=seed).text for seed in range(12)}
    assert chosen <= set(texts)
    assert len(chosen) > 1


def test_behind_a_trigger_its_tag_is_obeyed(engine):
    tag = {"begin": "a=", "schema": {"type": "integer", "minimum": 10, "maximum": 99}, "end": ";"}
    asked = json.dumps({"structures": [tag], "triggers": ["a"]})
    likely = {glm().tokenizer.token_id("a"): 4.0}
    text = one(engine, structural_tag=asked, logit_bias=likely, min_new_tokens=90).text
    pieces = text.split("a")[1:]
    assert len(pieces) > 1
    assert all(re.match(r"=[1-9][0-9];", piece) for piece in pieces[:-1])


def test_a_least_length_does_not_go_on_where_nothing_may_follow(engine):
    result = one(engine, choice=("ab",), min_new_tokens=10)
    assert (result.text, result.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" (start | DIGIT) ")"\nDIGIT: /[0-9]/', 'root ::= "(" (root | [0-9]) ")"'],
    ids=["Lark", "GBNF"],
)
def test_a_grammar_may_be_recursive(engine, grammar):
    text = one(engine, grammar=grammar, temperature=0.5, max_new_tokens=150).text
    assert re.fullmatch(r"\(+\d?\)*", text)
    assert text.count("(") == text.count(")") or len(text) > 100


def test_a_text_ends_where_nothing_may_follow(engine):
    result = one(engine, regex="[ab]{3}", ignore_eos=True)
    assert (len(result.text), result.finish_reason) == (3, "stop")
    assert not glm().stops.token_ids.intersection(result.ids)


def test_limits_and_stop_strings_end_it_before(engine):
    short = one(engine, regex="[a-f]{20}", max_new_tokens=5)
    assert (len(short.ids), short.finish_reason) == (5, "length")
    stopped = one(engine, regex="abcd[a-f]*", stop=("cd",))
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")


def test_several_sequences_follow_it_each_for_itself(engine):
    results = engine.generate(PROMPT, n=3, json_schema=PERSON, **SAMPLED).finish()
    for i, result in enumerate(results):
        assert result.ids == one(engine, json_schema=PERSON, seed=SAMPLED["seed"] + i).ids


# What is drawn


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0}, {"top_p": 0.7, "min_p": 0.01, "frequency_penalty": 0.8, "repetition_penalty": 1.3}],
    ids=["sampled", "greedy", "processed"],
)
def test_tokens_are_drawn_from_what_is_allowed_with_the_noise_of_their_position(engine, fields):
    """The largest of processed masked logits and noise, the first token included; logprobs are the model's own."""
    params = SamplingParams(**SAMPLED | fields, json_schema=PERSON, logprobs=0)
    [result] = engine.generate(PROMPT, params).finish()
    prompt = glm().encode(PROMPT)
    padded = [*prompt, *result.ids, *[0] * (LENGTH - len(prompt) - len(result.ids))]
    logits_SV = np.asarray(_logits(padded))[len(prompt) - 1 :]
    state = SamplingState.from_params([params], [prompt], VOCAB, glm().tokenizer.vocab_size)
    found = matcher(json_schema=PERSON)
    for n, token in enumerate(result.ids):
        scores_BV = _scores(logits_SV[n : n + 1], found.allowed(), state, np.int32([len(prompt) + n]))
        assert token == int(scores_BV.argmax())
        logprob = jax.nn.log_softmax(logits_SV[n])[token]
        assert result.scores[n].logprob == pytest.approx(float(logprob), abs=1e-3)
        state = observe(state, jnp.int32([token]), jnp.array([True]))
        found.push(token)
    assert found.ended


_scores = jax.jit(lambda logits_BV, allowed_BW, state, at_B: noisy(allow(logits_BV, allowed_BW), state, at_B))


def _logits(ids):
    return glm().forward([ids]).logits_BTV[0]


def test_forced_tokens_come_in_one_dispatch_and_are_no_drafts(engine):
    """One is drawn with the end of the prompt, seven with the next."""
    before = engine.stats()
    result = one(engine, regex="bcdfghjk")
    after = engine.stats()
    assert (result.text, len(result.ids)) == ("bcdfghjk", 8)
    assert after.dispatches - before.dispatches == 2
    assert after.forced - before.forced == 7
    assert (after.rounds, after.drafted, after.accepted) == (before.rounds, before.drafted, before.accepted)


# The others


def test_neighbours_get_what_they_get_without_a_grammar_beside_them(engine):
    fields = SAMPLED | {"max_new_tokens": 60, "use_cache": False}
    alone = [engine.generate(prompt, **fields).finish()[0].ids for prompt in ("one", "and two")]
    for prompt, ids in zip(("one", "and two"), alone, strict=True):
        beside = engine.generate(PROMPT, json_schema=PERSON, **SAMPLED)
        assert engine.generate(prompt, **fields).finish()[0].ids == ids
        assert beside.finish()[0].finish_reason == "stop"


def test_decoding_runs_the_same_programs():
    without = dataclasses.replace(CONFIG, grammars=False)
    shapes = [
        {shape for shape in Shapes(config, LENGTH, VOCAB) if shape.kind == "decode"} for config in (CONFIG, without)
    ]
    assert shapes[0] == shapes[1]
    assert not any(shape.words for shape in shapes[0])
    assert {shape.words for shape in Shapes(without, LENGTH, VOCAB)} == {0}
    assert words_of(VOCAB) == 10


ONE_ROUND = Log(**dict.fromkeys((field.name for field in dataclasses.fields(Log)), 1))


class Anything(Matcher):
    """Everything follows it."""

    forced, ended, error = (), False, ""

    def __init__(self):
        pass

    def at(self, length):
        return self

    def push(self, token):
        pass


def test_a_grammar_takes_its_share_of_the_others_time_and_no_more():
    """Half a second for each round of its own, of which a twentieth is allowed: nine and a half of the others' come between."""
    bench, endless = Bench(), [[n] for n in range(20) if len(expected([n], 60)) == 60]
    bench.add(endless[0], 30, matcher=Anything())
    bench.add(endless[1], 60)
    planned = 0
    while bench.step():
        for plan in bench.plans[planned:]:
            if plan.shape is not None:
                seconds = {"read": 0.1, "decode": 1.0, "verify": 0.5}[plan.shape.kind]
                bench.scheduler.learn(plan, ONE_ROUND, seconds)
        planned = len(bench.plans)
    kinds = "".join(plan.shape.kind[0] for plan in bench.plans if plan.shape is not None)
    beside, alone = kinds[: kinds.rindex("d") + 1], kinds[kinds.rindex("d") + 1 :]
    assert {len(decodes) for decodes in beside.split("v")[1:-1]} == {10}
    assert len(beside.split("v")) > 2
    assert alone == "v" * len(alone) != ""


# Whatever happens

LONG = {"regex": "([a-z ]{1,9}, )*;", "max_new_tokens": 140, "seed": 1}


def interrupted(engine, interrupt, **fields):
    """A request to which something happens on the engine's thread after its first chunk."""
    stream = engine.generate(PROMPT, **SAMPLED | fields)
    chunks = [next(stream)]
    engine._command(lambda now: [interrupt(s, now) for s in engine._running.sequences if s.leaving is None])
    chunks += stream
    return tuple(token for chunk in chunks for token in chunk.ids)


def test_who_is_preempted_goes_on_where_he_was(engine):
    alone, before = one(engine, **LONG), engine.stats()
    streams = [engine.generate(PROMPT, **SAMPLED | LONG) for _ in range(2)]
    assert [stream.finish()[0].ids for stream in streams] == [alone.ids] * 2
    assert engine.stats().preemptions > before.preemptions


def test_who_loses_his_pages_goes_on_where_he_was(engine):
    alone = one(engine, **LONG)
    assert interrupted(engine, lambda sequence, now: engine._outcome._replay(sequence, now), **LONG) == alone.ids


def test_who_is_suspected_is_confirmed_under_his_grammar(engine):
    """Tokens that a grammar has chosen against the model's opinion come again under its masks."""
    alone, before = one(engine, **LONG), engine.stats()
    assert interrupted(engine, lambda sequence, now: engine._running.suspect(sequence), **LONG) == alone.ids
    assert engine.stats().benign == before.benign + 1
    assert engine.stats().restarts == before.restarts


def test_who_cancels_leaves_nothing_behind(engine):
    stream = engine.generate(PROMPT, **SAMPLED | LONG)
    next(stream)
    stream.cancel()
    assert [*stream][-1].finish_reason == "cancelled"


def test_a_replay_gives_the_recorded_tokens(engine, tmp_path, monkeypatch):
    with monkeypatch.context() as short:
        short.setattr(engine._recorder, "_length", 1)  # begin another recording
        one(engine, regex="[ab]")
    begun = engine.generate(PROMPT, json_schema=PERSON, **SAMPLED | {"seed": 8})
    one(engine, regex="bcdfghjk")
    begun.finish()
    engine.record(tmp_path / "flight.json.gz")
    header, recordings = load(tmp_path / "flight.json.gz")
    parts = list(Replay(glm(), header).run(recordings[-1]))
    assert {again.kind for again in parts} == {"read", "verify"}
    assert all(again.same for again in parts)


def test_a_grammar_that_cannot_be_followed_fails_its_own_request_only(engine):
    neighbour = engine.generate("one", **SAMPLED)
    with pytest.raises(GrammarError, match="too complex"):  # as after too much work for one token
        interrupted(engine, lambda sequence, now: sequence.matcher and sequence.matcher.push(VOCAB - 1), **LONG)
    assert len(neighbour.finish()[0].ids) == SAMPLED["max_new_tokens"]


# What is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"grammar": "no grammar"}, "Expected ::= at line 1"),
        ({"json_schema": {"type": "nope"}}, "Invalid type: nope"),
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": "{nope"}, "Expecting property name"),
        ({"json_schema": "[]"}, "no JSON object"),
        ({"choice": ()}, "must be texts that are not empty"),
        ({"choice": ("a", "")}, "must be texts that are not empty"),
        ({"structural_tag": "[]"}, "lacks list indices"),
        ({"structural_tag": '{"triggers": [], "structures": []}'}, "has no structures"),
        (
            {"structural_tag": '{"triggers": ["<b>"], "structures": [{"begin": "a", "schema": {}, "end": ""}]}'},
            "begins with none",
        ),
        ({"structural_tag": '{"triggers": ["<"], "structures": [{"begin": "<a>", "schema": {}}]}'}, "lacks 'end'"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex are given"),
    ],
    ids=str,
)
def test_what_is_no_grammar_never_reaches_the_engine(engine, asked, message):
    before = engine.stats()
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPT, **asked)
    after = engine.stats()
    assert (after.running, after.waiting, after.prompt_tokens) == (0, 0, before.prompt_tokens)


def test_an_engine_without_grammars_says_how_to_have_them(engine, monkeypatch):
    monkeypatch.setattr(engine, "config", dataclasses.replace(CONFIG, grammars=False))
    with pytest.raises(ValueError, match="grammars=True"):
        engine.generate(PROMPT, regex="a")


def test_generate_alone_says_who_follows_grammars():
    with pytest.raises(ValueError, match="regex needs an engine"):
        glm().generate(PROMPT, regex="a")


def test_a_model_without_tokenizer_or_end_of_turn_cannot_serve_them():
    with pytest.raises(ValueError, match="need a tokenizer"):
        Engine(tiny(), dataclasses.replace(CONFIG, max_model_len=64))
    with pytest.raises(ValueError, match="ends a turn"):
        _ = GLM(glm().weights, glm().tokenizer, None, Stops()).grammars
