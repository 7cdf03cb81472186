"""Generation, as its users see it: the tokens, the text, where it stops, and what a token costs."""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from glmjax import decoding
from glmjax.glm import GLM, load
from glmjax.model import sampling
from glmjax.model.cache import ContiguousCache
from glmjax.model.chat import ChatTemplate
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer

SPARSE = Path(__file__).parent / "golden" / "sparse"
VOCABULARY, TEXTS = 160, 150  # rows of the head, and tokens of the tokenizer: the rest is padding
CONTEXT = 64  # of the model, and so of every cache and whole-sequence forward here: few programs to compile
PROMPT = [3, 141, 59, 26, 53]
MARGIN = 1e-4  # of logits: closer than this, another order of sums may choose another token


def tiny_tokenizer() -> Tokenizer:
    """Printable ASCII, the two bytes of é, and pairs of letters that are generated but never encoded."""
    tokens = ["<bos>", "<eos>", "Ġ", "Ċ", *map(chr, range(0x21, 0x7F)), "Ã", "©"]
    tokens += [a + b for a in "abcdef" for b in "uvwxyzkl"][: TEXTS - len(tokens)]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(tokens[:2])
    return Tokenizer(raw)


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory) -> GLM:
    directory = tmp_path_factory.mktemp("model")
    shutil.copytree(SPARSE, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    return load(directory)


@pytest.fixture(scope="module")
def glm(ids_only) -> GLM:
    return GLM(ids_only.weights, tiny_tokenizer(), None, ids_only.stops)


def with_(glm: GLM, **parts) -> GLM:
    kept = {name: getattr(glm, name) for name in ("weights", "tokenizer", "chat_template", "stops")}
    return GLM(**kept | parts)


def run(glm: GLM, prompt=PROMPT, **fields) -> decoding.Generation:
    return glm.generate(prompt, SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True} | fields)).finish()


def greedy(glm: GLM, prompt=PROMPT, **fields) -> decoding.Generation:
    return run(glm, prompt, temperature=0, **fields)


def predictions(glm: GLM, generation: decoding.Generation) -> np.ndarray:
    """Logits [new tokens, V] that a forward over the whole sequence has where each token was generated."""
    ids = generation.prompt_ids + generation.ids
    logits = np.asarray(glm.forward([ids + [0] * (CONTEXT - len(ids))]).logits_BTV[0])  # causal: padding is not seen
    return logits[len(generation.prompt_ids) - 1 : len(ids) - 1]


def assert_best(scores: np.ndarray, ids: list[int]) -> None:
    """Every token is its row's best one, or within the margin of it."""
    assert len(scores) == len(ids) > 0
    lost = scores.max(axis=1) - scores[np.arange(len(ids)), ids]
    assert lost.max() <= MARGIN, f"token {lost.argmax()} is {lost.max()} below the best"


# Greedy generation


@pytest.mark.parametrize("length", [1, 5, 16])  # with 24 new tokens, all pass index_topk = 8
def test_greedy_tokens_are_the_argmax_of_the_whole_sequence_forward(ids_only, length):
    generation = greedy(ids_only, list(range(40, 40 + length)))
    assert_best(predictions(ids_only, generation), generation.ids)


@pytest.mark.parametrize(("smallest", "largest"), [(4, 4), (16, 16), (1, 32)])
def test_prefill_in_chunks_of_any_size_gives_the_same_tokens(ids_only, monkeypatch, smallest, largest):
    monkeypatch.setattr(decoding, "_SMALLEST_CHUNK", smallest)
    monkeypatch.setattr(decoding, "_LARGEST_CHUNK", largest)
    program, before = decoding.prefill, decoding.prefill._cache_size()
    shapes = spy(monkeypatch, "prefill", lambda model, cache, ids, positions: ids.shape[1])
    generation = greedy(ids_only, list(range(30, 51)))  # 21 tokens: the last chunk is partly padding
    assert_best(predictions(ids_only, generation), generation.ids)
    assert shapes == [largest] * math.ceil(21 / largest)
    assert program._cache_size() <= before + 1  # the first chunk's program is that of the others


def spy(monkeypatch, name: str, keep) -> list:
    """What `keep` makes of the arguments of each call of a program."""
    kept, program = [], getattr(decoding, name)

    def called(*args):
        kept.append(keep(*args))
        return program(*args)

    monkeypatch.setattr(decoding, name, called)
    return kept


def test_greedy_ignores_the_seed(ids_only):
    assert greedy(ids_only, seed=1).ids == greedy(ids_only, seed=2).ids


def test_prompts_may_be_arrays(ids_only):
    wanted = greedy(ids_only).ids
    assert greedy(ids_only, np.asarray(PROMPT)).ids == wanted
    assert greedy(ids_only, jnp.asarray(PROMPT)).ids == wanted


def test_text_is_encoded(glm):
    generation = greedy(glm, "ab c")
    assert generation.prompt_ids == glm.tokenizer.encode("ab c")
    assert generation.ids == greedy(glm, generation.prompt_ids).ids


def test_messages_go_through_the_template(glm):
    template = ChatTemplate("{% for m in messages %}<bos>{{ m.content }}{% endfor %}{% if hint %}{{ hint }}{% endif %}")
    chat = with_(glm, chat_template=template)
    messages = [{"role": "user", "content": "ab"}]
    assert chat.encode(messages) == [0, *glm.tokenizer.encode("ab")]
    params = SamplingParams(max_new_tokens=1)
    generation = chat.generate(messages, params, template={"hint": "!"})
    assert generation.prompt_ids == [0, *glm.tokenizer.encode("ab!")]


# Sampling


def test_a_seed_fixes_the_output(ids_only):
    first, again, other = (run(ids_only, seed=seed).ids for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_without_a_seed_one_is_drawn_and_reported(ids_only):
    generations = [run(ids_only) for _ in range(2)]
    seeds = [generation.statistics.seed for generation in generations]
    assert seeds[0] != seeds[1]
    assert run(ids_only, seed=seeds[0]).ids == generations[0].ids


def test_a_sampled_token_is_the_argmax_of_logits_and_noise_of_its_position(ids_only):
    generation = run(ids_only, seed=3, temperature=0.7)
    positions = len(PROMPT) + jnp.arange(len(generation.ids))
    noise = sampling.gumbel_noise(jnp.full(len(generation.ids), 3, jnp.uint32), positions, VOCABULARY)
    assert_best(predictions(ids_only, generation) / 0.7 + np.asarray(noise), generation.ids)


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}],
    ids=lambda fields: next(iter(fields)),
)
def test_truncation_to_the_best_token_is_greedy(ids_only, fields):
    assert run(ids_only, seed=5, **fields).ids == greedy(ids_only).ids


def test_logit_bias_forces_a_token(ids_only):
    assert run(ids_only, logit_bias={7: 1000.0}).ids == [7] * 24


def test_a_large_repetition_penalty_prevents_tokens_of_prompt_and_output(ids_only):
    generation = greedy(ids_only, repetition_penalty=1e6)
    assert len({*PROMPT, *generation.ids}) == len(PROMPT) + len(generation.ids)


@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, 2.0), (-2.0, 1.0)])
def test_frequency_and_presence_penalties_count_the_output(ids_only, frequency, presence):
    generation = greedy(ids_only, frequency_penalty=frequency, presence_penalty=presence)
    assert generation.ids != greedy(ids_only).ids
    emitted = np.eye(VOCABULARY)[generation.ids]
    counts = np.cumsum(emitted, axis=0) - emitted  # before each token
    scores = predictions(ids_only, generation) - frequency * counts - presence * (counts > 0)
    assert_best(scores, generation.ids)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"seed": 1}, {"temperature": 3e38, "seed": 1}])
def test_tokens_beyond_the_tokenizer_are_never_sampled(glm, fields):
    beyond = dict.fromkeys(range(TEXTS, VOCABULARY), 1000.0)
    assert max(run(glm, max_new_tokens=None, logit_bias=beyond, **fields).ids) < TEXTS


# Logprobs


def test_logprobs_are_those_of_the_forward(ids_only):
    generation = ids_only.generate(
        PROMPT, seed=2, temperature=1.5, logprobs=3, max_new_tokens=24, ignore_eos=True, presence_penalty=1
    )
    tokens = list(generation)
    wanted = np.asarray(jax.nn.log_softmax(predictions(ids_only, generation)))
    rows = np.arange(len(tokens))
    emitted = wanted[rows, generation.ids]
    np.testing.assert_allclose([token.logprob for token in tokens], emitted, atol=MARGIN)
    found = wanted[rows[:, None], [[i for i, _ in token.top_logprobs] for token in tokens]]
    np.testing.assert_allclose([[p for _, p in token.top_logprobs] for token in tokens], found, atol=MARGIN)
    np.testing.assert_allclose(found, np.sort(wanted)[:, :-4:-1], atol=MARGIN)
    for row, value, token in zip(wanted, emitted, tokens, strict=True):
        assert 1 + (row > value + MARGIN).sum() <= token.rank <= 1 + (row > value - MARGIN).sum()
    assert max(token.rank for token in tokens) > 1


def test_without_logprobs_tokens_have_none(ids_only):
    tokens = list(ids_only.generate(PROMPT, temperature=0, max_new_tokens=2))
    assert [(token.logprob, token.rank, token.top_logprobs) for token in tokens] == [(None, None, ())] * 2


# Stops


@pytest.fixture(scope="module")
def endless(glm) -> decoding.Generation:
    """A varied output that nothing stops."""
    return run(glm, seed=11)


def first_at(ids: list[int], index: int) -> int:
    """A token at `index` or later that did not come before."""
    return next(i for i in range(index, len(ids)) if ids[i] not in ids[:i])


def test_the_text_is_the_decoded_ids(glm, endless):
    assert endless.finish_reason == "length"
    assert len(endless.ids) == 24
    assert endless.text == glm.tokenizer.decode(endless.ids)


def test_the_models_end_of_sequence_stops_and_is_not_shown(glm, endless):
    at = first_at(endless.ids, 9)
    eos = with_(glm, stops=Stops(frozenset({endless.ids[at]})))
    generation = run(eos, seed=11, ignore_eos=False)
    assert generation.finish_reason == "stop"
    assert generation.ids == endless.ids[: at + 1]
    assert generation.text == glm.tokenizer.decode(endless.ids[:at])
    assert run(eos, seed=11, ignore_eos=True).ids == endless.ids


def test_the_checkpoints_end_of_sequence_is_known(ids_only):
    generation = run(ids_only, logit_bias={1: 1000.0}, ignore_eos=False)
    assert (generation.ids, generation.finish_reason) == ([1], "stop")


def test_stop_token_ids_stop_even_where_eos_is_ignored(glm, endless):
    at = first_at(endless.ids, 9)
    generation = run(glm, seed=11, stop_token_ids=(endless.ids[at],), ignore_eos=True)
    assert generation.finish_reason == "stop"
    assert generation.ids == endless.ids[: at + 1]


def test_stop_tokens_wait_for_the_least_length(glm, endless):
    stops, at = (endless.ids[9], endless.ids[14]), first_at(endless.ids, 9)
    least = run(glm, seed=11, stop_token_ids=stops, min_new_tokens=12)
    assert least.ids[:at] == endless.ids[:at]
    assert not set(least.ids[:12]).intersection(stops)
    assert len(least.ids) > 12


def test_stop_strings_wait_for_the_least_length(glm, endless):
    early = run(glm, seed=11, stop=(endless.text[3],))
    assert len(early.ids) < 8
    late = run(glm, seed=11, stop=(endless.text[3],), min_new_tokens=len(endless.ids) - 1)
    assert late.ids == endless.ids
    assert late.text.startswith(endless.text[: len(early.text) + 1])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_stops(glm, endless, include):
    pieces = [glm.tokenizer.decode([token]) for token in endless.ids]
    at = next(i for i in range(8, 24) if pieces[i - 1] and pieces[i] and pieces[i - 1][-1].isascii())
    stop = pieces[at - 1][-1] + pieces[at][0]
    begin = endless.text.index(stop)
    generation = run(glm, seed=11, stop=(stop,), include_stop_str_in_output=include)
    assert generation.finish_reason == "stop"
    assert generation.text == endless.text[: begin + include * len(stop)]
    assert generation.ids == endless.ids[: len(generation.ids)]
    assert stop in glm.tokenizer.decode(generation.ids)
    assert stop not in glm.tokenizer.decode(generation.ids[:-1])


def test_the_beginning_of_a_stop_string_is_shown_in_the_end(glm, endless):
    generation = run(glm, seed=11, stop=(endless.text[-2:] + "☃",))
    assert (generation.text, generation.finish_reason) == (endless.text, "length")


def test_half_a_character_is_shown_in_the_end(glm):
    half = glm.tokenizer.token_id("Ã")
    generation = run(glm, logit_bias={half: 1000.0}, max_new_tokens=3)
    assert generation.text == glm.tokenizer.decode([half] * 3) == "\ufffd" * 3


def test_a_stop_string_that_the_last_text_completes_is_a_stop(glm):
    half = glm.tokenizer.token_id("Ã")
    generation = run(glm, logit_bias={half: 1000.0}, max_new_tokens=3, stop=("\ufffd" * 3,))
    assert (generation.text, generation.finish_reason) == ("", "stop")


def test_special_tokens_are_not_shown(glm):
    assert run(glm, logit_bias={0: 1000.0}, max_new_tokens=3).text == ""


@pytest.mark.parametrize("new_tokens", [1, 2, 24])
def test_max_new_tokens_is_how_many_come(ids_only, new_tokens):
    generation = greedy(ids_only, max_new_tokens=new_tokens)
    assert (len(generation.ids), generation.finish_reason) == (new_tokens, "length")


def test_without_max_new_tokens_the_end_of_the_context_is_the_length(ids_only, monkeypatch):
    capacities = spy(monkeypatch, "decode", lambda model, cache, *_: cache.capacity)
    generation = greedy(ids_only, max_new_tokens=None)
    assert (len(generation.ids), generation.finish_reason) == (CONTEXT - len(PROMPT), "length")
    assert set(capacities) == {CONTEXT}  # no row that no token can have
    assert_best(predictions(ids_only, generation), generation.ids)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 320, 321, 511, 513, 576, 2112, 8256, 2**20 + 1])
def test_a_cache_has_few_sizes_and_few_rows_that_no_token_has(tokens):
    rows = decoding._capacity(tokens)
    assert tokens <= rows <= max(256, 1.25 * tokens)
    assert len({decoding._capacity(n) for n in range(rows, 2 * rows)}) <= 5
    assert decoding._capacity(rows) == rows


# Streaming


def test_the_pieces_are_the_text_and_only_the_last_has_a_reason(glm, endless):
    generation = glm.generate(PROMPT, seed=11, max_new_tokens=24, ignore_eos=True)
    tokens = list(generation)
    assert "".join(token.text for token in tokens) == generation.text == endless.text
    assert [token.id for token in tokens] == generation.ids
    assert [token.finish_reason for token in tokens] == [None] * 23 + ["length"]
    assert list(generation) == []
    assert generation.finish() is generation


def test_without_a_tokenizer_there_is_no_text(ids_only):
    generation = greedy(ids_only)
    assert generation.text == ""


def test_a_generation_under_way_knows_what_it_has(glm, endless):
    generation = glm.generate(PROMPT, seed=11, max_new_tokens=24, ignore_eos=True)
    assert (generation.ids, generation.finish_reason) == ([], None)
    token = next(generation)
    assert (generation.ids, generation.text) == ([token.id], token.text)
    assert generation.statistics.new_tokens == 1
    generation.finish()
    assert generation.text == endless.text


def test_generations_may_be_interleaved(ids_only):
    one, two = (ids_only.generate(PROMPT, seed=seed, max_new_tokens=8, ignore_eos=True) for seed in (1, 2))
    pairs = list(zip(one, two, strict=True))
    assert len(pairs) == 8
    assert one.ids == run(ids_only, seed=1, max_new_tokens=8).ids
    assert two.ids == run(ids_only, seed=2, max_new_tokens=8).ids


def test_statistics(ids_only, monkeypatch):
    clock = iter(range(100, 1000))
    generation = ids_only.generate(PROMPT, seed=4, max_new_tokens=6, ignore_eos=True)
    assert generation.statistics == decoding.Statistics(5, 0, 0.0, 0.0, 4)
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: float(next(clock)))
    statistics = generation.finish().statistics
    assert dataclasses.replace(statistics, decode_seconds=0.0) == decoding.Statistics(5, 6, 1.0, 0.0, 4)
    assert statistics.tokens_per_second == 4 / statistics.decode_seconds  # the first two tokens do not count


def test_too_few_tokens_have_no_speed(ids_only):
    assert greedy(ids_only, max_new_tokens=2).statistics.tokens_per_second == 0.0


# What a token costs


def test_nothing_is_compiled_once_a_bucket_is_warm(glm, caplog):
    run(glm, seed=1)
    programs = decoding.prefill, decoding.first_token, decoding.decode
    before = [program._cache_size() for program in programs]
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        run(glm, [9], temperature=0.0)
        run(glm, list(range(2, 18)), seed=2, top_k=5, top_p=0.9, min_p=0.01, max_new_tokens=40)
        run(glm, "abc", seed=3, repetition_penalty=1.3, logit_bias={4: 1.0}, stop=("zz",), stop_token_ids=(3,))
    assert [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()] == []
    assert [program._cache_size() for program in programs] == before


def test_the_watch_for_compilations_sees_them(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        jax.jit(lambda x: x * 3)(jnp.ones(7))
    assert any("ompil" in record.getMessage() for record in caplog.records)


def test_a_step_takes_the_cache_over_in_place(ids_only, monkeypatch):
    caches = spy(monkeypatch, "decode", lambda model, cache, *_: jax.tree.leaves(cache))
    caches += spy(monkeypatch, "prefill", lambda model, cache, *_: jax.tree.leaves(cache))
    greedy(ids_only, max_new_tokens=4)
    assert len(caches) >= 2
    assert all(array.is_deleted() for cache in caches for array in cache)


@pytest.fixture
def unchecked():
    """Annotations off: JAX describes a program's arguments by trees of descriptions, which are no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_a_steps_memory_does_not_grow_with_the_cache(ids_only):
    """Neither with what is cached nor with the scores of the query, which passes over stretches of keys."""
    config, model = ids_only.config, ids_only.weights
    state = SamplingState.from_params([SamplingParams(temperature=0)], [PROMPT], VOCABULARY)

    def memory(capacity: int) -> tuple[int, int, int]:
        cache = ContiguousCache.create(config, 1, capacity, model.dtype)
        token = np.zeros(1, np.int32)
        steps, stops = np.int32(4), np.full(16, -1, np.int32)
        program = decoding.decode.lower(model, cache, state, token, token, steps, stops, None)
        found = program.compile().memory_analysis()
        return found.temp_size_in_bytes, found.alias_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    (small, *_), (large, aliased, size) = memory(65536), memory(131072)
    assert large == small < size / 10
    assert aliased >= size


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt has no tokens"),
        ([], "the prompt has no tokens"),
        ("a\ud800", "lone surrogate U\\+D800"),
        ([3, 160], r"token id 160 is outside the vocabulary, 0\.\.159"),
        ([-1], "token id -1 is outside"),
        (np.array([1.0, 2.0]), "token ids are float64; they must be integers"),
        (np.array([[1, 2]]), r"token ids have shape \(1, 2\); give one sequence"),
        ([{"role": "user", "content": "ab"}], "no chat template; give text or token ids"),
        ([5] * 60, "60 prompt tokens and 24 new ones exceed the model's context of 64"),
        ([5] * 65, "65 prompt tokens"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused_before_anything_runs(glm, prompt, message):
    with pytest.raises(ValueError, match=message):
        glm.generate(prompt, max_new_tokens=24)


def test_a_full_context_is_refused_without_a_limit_too(ids_only):
    with pytest.raises(ValueError, match="64 prompt tokens and 1 new ones exceed the model's context of 64"):
        ids_only.generate([5] * 64)


def test_text_needs_a_tokenizer(ids_only):
    with pytest.raises(ValueError, match="without a tokenizer; give token ids, or tokenizer_path"):
        ids_only.generate("ab")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        ids_only.generate(PROMPT, stop=("ab",))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, r"temperature -1.0 is outside \[0,"),
        ("max_new_tokens", 0, "max_new_tokens 0 is outside"),
        ("stop_token_ids", (160,), "stop_token_ids has token id 160"),
        ("logit_bias", {160: 1.0}, "logit_bias has token id 160"),
    ],
)
def test_a_bad_parameter_is_refused_before_anything_runs(glm, field, value, message):
    with pytest.raises(ValueError, match=message):
        glm.generate(PROMPT, **{field: value})


def test_fields_go_over_those_of_params(ids_only):
    params = SamplingParams(temperature=0, max_new_tokens=3)
    assert len(ids_only.generate(PROMPT, params, max_new_tokens=2).finish().ids) == 2
    assert params == dataclasses.replace(params, max_new_tokens=3)


def test_an_unknown_field_is_named(ids_only):
    with pytest.raises(TypeError, match="max_tokens"):
        ids_only.generate(PROMPT, max_tokens=3)
