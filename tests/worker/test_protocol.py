"""vLLM's messages: zeros mean what they mean there, and what cannot be served is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smg_grpc_proto import vllm_engine_pb2 as pb

from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.stream import Chunk, Score, Statistics
from glmjax.wire import MAX_STOPS, MAX_TOKENS_NAMED, message_of, sampling_params_of
from glmjax.worker.protocol import Telling, asked_of, input_logprobs

VOCAB = 4096


def request(**fields):
    return pb.GenerateRequest(text="a", **fields)


def sampling(**fields):
    return sampling_params_of(pb.SamplingParams(**fields))


# Requests


def test_a_message_of_defaults_samples_as_vllm_does():
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    assert sampling() == SamplingParams(**defaults)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"temperature": 0.0}, "temperature", 0.0),  # it tells presence, so this is greedy
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 7}, "top_k", 7),
        ({"min_p": 0.25}, "min_p", 0.25),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"frequency_penalty": -1.0}, "frequency_penalty", -1.0),
        ({"presence_penalty": 2.0}, "presence_penalty", 2.0),
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"max_tokens": 0}, "max_new_tokens", 0),  # set, and refused by `validate`
        ({"min_tokens": 5}, "min_new_tokens", 5),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop_token_ids": [3, 4]}, "stop_token_ids", (3, 4)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", True),
        ({"skip_special_tokens": True}, "skip_special_tokens", True),
        ({"logit_bias": {3: 1.5}}, "logit_bias", {3: 1.5}),
        ({"seed": 0}, "seed", 0),
        ({"seed": -2}, "seed", 2**32 - 2),
        ({"seed": -1}, "seed", None),
        ({"logprobs": 0}, "logprobs", 0),
        ({"logprobs": 20}, "logprobs", 20),
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"json_object": True}, "json_schema", '{"type": "object"}'),
        ({"json_object": False}, "json_schema", None),
        ({"regex": "a*"}, "regex", "a*"),
        ({"grammar": "start: x"}, "grammar", "start: x"),
        ({"structural_tag": "{}"}, "structural_tag", "{}"),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, "choice", ("a", "b")),
    ],
    ids=str,
)
def test_every_field_arrives(given, field, value):
    assert getattr(sampling(**given), field) == value


@pytest.mark.parametrize("kind", ["text", "tokenized"])
def test_a_prompt_is_text_or_tokens(kind):
    given = {"text": "abc"} if kind == "text" else {"tokenized": pb.TokenizedInput(input_ids=[1, 2], original_text="x")}
    assert asked_of(pb.GenerateRequest(**given), 8).prompt == ("abc" if kind == "text" else [1, 2])


@pytest.mark.parametrize("keep", [-1, 8, 2])
def test_of_a_prompt_that_may_be_cut_the_last_that_fit_are_taken(keep):
    given = pb.SamplingParams(truncate_prompt_tokens=keep)
    asked = asked_of(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=range(20)), sampling_params=given), 8)
    assert asked.prompt == [*range(12, 20)]
    assert asked.keep == keep


@pytest.mark.parametrize(("n", "sequences"), [(0, 1), (1, 1), (3, 3), (128, 128)])
def test_no_n_is_one(n, sequences):
    assert asked_of(request(sampling_params=pb.SamplingParams(n=n)), 8).n == sequences


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.GenerateRequest(), "has no input"),
        (pb.GenerateRequest(text=""), "text is empty"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput()), "tokenized is empty"),
        (request(mm_inputs=pb.MultimodalInputs()), "mm_inputs is set"),
        (request(media_refs=pb.MediaRefs()), "media_refs is set"),
        (request(extra_mm_inputs=[pb.MultimodalInputs()]), "extra_mm_inputs"),
        (request(kv_transfer_params=pb.KvTransferParams()), "kv_transfer_params is set"),
        (request(kv_transfer_params_json="{}"), "kv_transfer_params_json"),
        (request(data_parallel_rank=1), "data_parallel_rank 1"),
        (request(sampling_params=pb.SamplingParams(n=129)), "n 129 exceeds 128"),
        (request(sampling_params=pb.SamplingParams(logprobs=21)), "logprobs 21 is outside 0..20"),
        (request(sampling_params=pb.SamplingParams(logprobs=-1)), "logprobs -1 is outside 0..20"),
        (request(sampling_params=pb.SamplingParams(prompt_logprobs=-1)), "prompt_logprobs -1 is outside"),
        (request(sampling_params=pb.SamplingParams(truncate_prompt_tokens=0)), "truncate_prompt_tokens 0"),
        (request(sampling_params=pb.SamplingParams(stop=["a"] * (MAX_STOPS + 1))), "stop has 65 strings"),
        (request(sampling_params=pb.SamplingParams(stop=["a" * 2000])), "of up to 2000 characters"),
        (request(sampling_params=pb.SamplingParams(stop_token_ids=[1] * (MAX_TOKENS_NAMED + 1))), "stop_token_ids has"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1] * 9)), "prompt's 9 tokens are more than the 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_by_name(message, complaint):
    with pytest.raises(ValueError, match=complaint):
        asked_of(message, 8)


FLOATS = st.floats(width=32)
UINT32, INT32 = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1)


@st.composite
def messages(draw):
    fields = {
        "temperature": FLOATS,
        "top_p": FLOATS,
        "min_p": FLOATS,
        "frequency_penalty": FLOATS,
        "presence_penalty": FLOATS,
        "repetition_penalty": FLOATS,
        "top_k": UINT32,
        "max_tokens": UINT32,
        "min_tokens": UINT32,
        "n": UINT32,
        "seed": INT32,
        "logprobs": INT32,
        "prompt_logprobs": INT32,
        "truncate_prompt_tokens": INT32,
        "stop": st.lists(st.text(max_size=4), max_size=3),
        "stop_token_ids": st.lists(UINT32, max_size=3),
        "logit_bias": st.dictionaries(INT32, FLOATS, max_size=3),
        "ignore_eos": st.booleans(),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), unique=True))
    kind = draw(st.sampled_from(["", "json_schema", "regex", "grammar", "structural_tag", "json_object"]))
    constraint = {kind: draw(st.booleans() if kind == "json_object" else st.text(max_size=8))} if kind else {}
    ids = draw(st.lists(UINT32, max_size=4))
    params = pb.SamplingParams(**{name: draw(fields[name]) for name in chosen}, **constraint)
    return pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params)


@settings(max_examples=300, deadline=None)
@given(messages())
def test_a_message_gives_parameters_that_hold_or_a_value_error(message):
    try:
        asked = asked_of(message, 8)
        asked.params.validate(VOCAB)
    except ValueError:
        return
    assert 0 <= asked.params.temperature < float("inf")
    assert 1 <= asked.n <= 128
    assert all(0 <= token < VOCAB for token in asked.params.stop_token_ids)


HALVES = st.floats(0.125, 2, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_new_tokens": st.integers(1, 2**31),
            "min_new_tokens": st.integers(0, 9),
            "temperature": HALVES | st.just(0.0),
            "top_k": st.integers(0, 2**31),
            "top_p": st.floats(0.125, 1, width=32),
            "min_p": st.floats(0, 1, width=32),
            "repetition_penalty": HALVES,
            "frequency_penalty": HALVES,
            "presence_penalty": HALVES,
            "logit_bias": st.dictionaries(st.integers(0, VOCAB), HALVES, max_size=2),
            "seed": st.integers(0, 2**32 - 2),
            "logprobs": st.integers(0, 20),
            "prompt_logprobs": st.integers(0, 20),
            "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2).map(tuple),
            "stop_token_ids": st.lists(st.integers(0, VOCAB), max_size=2).map(tuple),
            "ignore_eos": st.booleans(),
            "include_stop_str_in_output": st.booleans(),
            "skip_special_tokens": st.booleans(),
            "grammar_from_first_token": st.booleans(),
        },
    ),
    st.sampled_from(
        [{}, {"json_schema": "{}"}, {"regex": "a"}, {"grammar": "x"}, {"choice": ("a", "b")}, {"structural_tag": "{}"}]
    ),
)
def test_parameters_come_back_from_their_message(fields, constraint):
    params = SamplingParams(**fields, **constraint)
    assert sampling_params_of(message_of(params)) == params


def test_the_seed_that_means_none_is_not_sent():
    with pytest.raises(ValueError, match="seed 4294967295 cannot be told"):
        message_of(SamplingParams(seed=2**32 - 1))


# Responses


def statistics():
    counts = dict.fromkeys(("new_tokens", "rounds", "preemptions", "replays", "seed"), 0)
    seconds = dict.fromkeys(("queue_seconds", "first_token_seconds", "seconds"), 0.0)
    return Statistics(prompt_tokens=9, cached_tokens=8, drafted=6, accepted=4, **counts, **seconds)


def chunk(*ids, end=None, matched=None, scores=()):
    return Chunk(ids, "", 1, scores, end, matched, statistics())


def told(chunks, stream, prompt=None):
    telling = Telling(1, stream=stream, eos=frozenset({0}))
    telling.prompt = prompt
    return [response for chunk in chunks for response in telling.responses(chunk)]


def test_a_stream_tells_tokens_as_they_come_and_all_of_them_in_the_end():
    *chunks, last = told([chunk(5, 6), chunk(7, end="length")], stream=True)
    assert [list(response.chunk.token_ids) for response in chunks] == [[5, 6], [7]]
    assert [response.chunk.completion_tokens for response in chunks] == [2, 1]
    assert {(r.chunk.prompt_tokens, r.chunk.cached_tokens, r.chunk.index) for r in chunks} == {(9, 8, 1)}
    complete = last.complete
    assert (list(complete.output_ids), complete.completion_tokens, complete.index) == ([5, 6, 7], 3, 1)
    assert (complete.finish_reason, complete.prompt_tokens, complete.cached_tokens) == ("length", 9, 8)
    assert (complete.spec_accepted_tokens, complete.spec_draft_tokens) == (4, 6)


def test_without_a_stream_there_is_one_message():
    [response] = told([chunk(5, 6), chunk(7, end="stop")], stream=False)
    assert list(response.complete.output_ids) == [5, 6, 7]


@pytest.mark.parametrize(
    ("end", "matched", "reason", "told_as"),
    [
        ("stop", 0, "stop", None),  # the model's own end of turn, as vLLM
        ("stop", 7, "stop", ("matched_token_id", 7)),
        ("stop", "ab", "stop", ("matched_stop_str", "ab")),
        ("length", None, "length", None),
        ("cancelled", None, "abort", None),
    ],
)
def test_why_it_ended(end, matched, reason, told_as):
    [response] = told([chunk(7, end=end, matched=matched)], stream=False)
    assert response.complete.finish_reason == reason
    which = response.complete.WhichOneof("matched_stop")
    assert (which and (which, getattr(response.complete, which))) == told_as


def test_an_end_without_tokens_is_no_chunk():
    [response] = told([chunk(end="cancelled")], stream=True)
    assert response.WhichOneof("response") == "complete"


SCORES = (Score(-1.0, 1, ((5, -1.0), (6, -2.0))), Score(-3.0, 2, ((6, -0.5), (7, -3.0))))


def test_logprobs_come_with_their_tokens():
    first, second, last = told([chunk(5, scores=SCORES[:1]), chunk(7, end="stop", scores=SCORES[1:])], stream=True)
    assert list(first.chunk.output_logprobs.token_logprobs) == [-1.0]
    assert list(second.chunk.output_logprobs.token_ids) == [7]
    assert list(second.chunk.output_logprobs.top_logprobs[0].token_ids) == [6, 7]
    assert not last.complete.HasField("output_logprobs")
    [whole] = told([chunk(5, scores=SCORES[:1]), chunk(7, end="stop", scores=SCORES[1:])], stream=False)
    assert list(whole.complete.output_logprobs.token_ids) == [5, 7]
    assert [list(top.values) for top in whole.complete.output_logprobs.top_logprobs] == [[-1.0, -2.0], [-0.5, -3.0]]


def test_without_alternatives_none_are_told():
    [response] = told([chunk(5, end="stop", scores=(Score(-1.0, 1, ()),))], stream=False)
    assert list(response.complete.output_logprobs.token_logprobs) == [-1.0]
    assert not response.complete.output_logprobs.top_logprobs


def test_a_prompts_first_token_has_no_logprob():
    prompt = input_logprobs([4, 5, 7], SCORES)
    assert [score.HasField("value") for score in prompt.token_logprobs] == [False, True, True]
    assert list(prompt.token_ids) == [4, 5, 7]
    assert [len(top.values) for top in prompt.top_logprobs] == [0, 2, 2]
    first, second, last = told([chunk(5), chunk(6, end="stop")], stream=True, prompt=prompt)
    assert first.chunk.HasField("input_logprobs")
    assert not second.chunk.HasField("input_logprobs")
    assert last.complete.HasField("input_logprobs")


def test_schemas_are_text_that_json_reads():
    assert json.loads(sampling(json_object=True).json_schema) == {"type": "object"}
