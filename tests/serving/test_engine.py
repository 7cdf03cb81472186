"""What the engine gives is what `generate` gives alone, whatever else goes on; and whoever leaves leaves nothing behind."""

import asyncio
import dataclasses
import functools
import gc

import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.serving.compiled import Programs
from glmjax.serving.engine import Engine
from glmjax.serving.errors import ClosedError, DeadlineError, QueueFullError, UnavailableError
from glmjax.serving.pages import PagedCache
from glmjax.serving.running import MOST_RETIRED
from glmjax.serving.scheduler import STOP_IDS
from glmjax.serving.shapes import Shape, Shapes
from glmjax.serving.slots import Slots
from tests.serving.tiny import ENGINE, tiny

CONFIG = dataclasses.replace(ENGINE, max_num_seqs=4, pages=22, num_draft=2, adapts_draft=True, max_queued=8, debug=True)
SAMPLED = {"temperature": 2.0, "seed": 5, "max_new_tokens": 20}
PENALISED = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3, "top_p": 0.9, "min_p": 0.02}


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny(), CONFIG) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    stats = engine.stats()
    while stats.running or stats.waiting:  # the last log of a request is read after its last chunk
        stats = engine.stats()
    assert stats.free_pages + stats.cached_pages == stats.pages


@functools.cache
def alone(prompt, **fields):
    return tiny().generate(prompt, **fields).finish().ids


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 16, length).tolist())


# The same tokens


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 33, 44])
def test_one_request_gives_what_generate_gives(engine, length):
    [result] = engine.generate(prompt(length), **SAMPLED).finish()
    assert list(result.ids) == alone(prompt(length), **SAMPLED)
    assert result.finish_reason == "length"


def test_many_requests_give_what_each_gives_alone(engine):
    """Four at a time, with too few pages for all: some wait, some are preempted."""
    asked = [
        (prompt(3 + 5 * n % 29, n), {"temperature": n % 3, "seed": n, "max_new_tokens": 5 + 4 * n, **PENALISED})
        for n in range(8)
    ]
    streams = [engine.generate(ids, **fields) for ids, fields in asked]
    for stream, (ids, fields) in zip(streams, asked, strict=True):
        assert list(stream.finish()[0].ids) == alone(ids, **fields)


def test_what_is_cached_gives_the_same(engine):
    fields = SAMPLED | PENALISED
    for _ in range(2):
        [result] = engine.generate(prompt(40, 3), **fields).finish()
        assert list(result.ids) == alone(prompt(40, 3), **fields)
    assert result.statistics.cached_tokens == 40
    [unwilling] = engine.generate(prompt(40, 3), use_cache=False, **fields).finish()
    assert unwilling.ids == result.ids
    assert unwilling.statistics.cached_tokens == 0


def test_several_sequences_of_a_prompt_follow_one_seed(engine):
    results = engine.generate(prompt(17, 4), n=3, **SAMPLED).finish()
    for i, result in enumerate(results):
        assert list(result.ids) == alone(prompt(17, 4), **SAMPLED | {"seed": 5 + i})
    assert [result.statistics.cached_tokens for result in results] == [0, 16, 16]


def test_logprobs_are_those_of_generate(engine):
    fields = SAMPLED | {"logprobs": 3}
    [result] = engine.generate(prompt(9), **fields).finish()
    for score, token in zip(result.scores, tiny().generate(prompt(9), **fields), strict=True):
        assert score.logprob == pytest.approx(token.logprob, abs=1e-4)
        assert score.rank == token.rank
        assert [i for i, _ in score.top] == [i for i, _ in token.top_logprobs]


def opinions(ids):
    """What one forward of the whole prompt thinks of its tokens from the second on."""
    logits_TV = np.asarray(tiny().forward([ids]).logits_BTV[0], np.float64)
    logprob_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return logprob_TV[:-1]


@pytest.mark.parametrize("length", [1, 2, 8, 9, 33, 44])
def test_logprobs_of_a_prompt_are_those_of_one_forward(engine, length):
    ids = prompt(length, 7)
    for _ in range(2):  # what is cached has no logprobs: all of it is read again
        [result] = engine.generate(ids, prompt_logprobs=2, **SAMPLED).finish()
        assert list(result.ids) == alone(ids, **SAMPLED)
        assert result.statistics.cached_tokens == 0
        assert len(result.prompt_scores) == length - 1
        for score, token, logprob_V in zip(result.prompt_scores, ids[1:], opinions(ids), strict=True):
            assert score.logprob == pytest.approx(logprob_V[token], abs=1e-4)
            assert score.rank == 1 + (logprob_V > logprob_V[token]).sum()
            assert [i for i, _ in score.top] == np.argsort(-logprob_V, kind="stable")[:2].tolist()
    [after] = engine.generate(ids, **SAMPLED).finish()
    assert after.statistics.cached_tokens == length // 8 * 8
    assert after.prompt_scores == ()


def test_logprobs_of_a_prompt_come_once_for_all_sequences_and_before_the_first_token(engine):
    ids = prompt(20, 8)
    stream = engine.generate(ids, n=3, prompt_logprobs=0, **SAMPLED)
    next(stream)
    assert [score.top for score in stream.prompt_scores] == [()] * 19
    assert {result.prompt_scores for result in stream.finish()} == {stream.prompt_scores}


def test_logprobs_of_prompts_come_while_others_take_pages_away(engine):
    """Four at a time, with too few pages for all: some are preempted, and read again."""
    asked = [(prompt(30 + n, 20 + n), {"seed": n, "max_new_tokens": 25}) for n in range(6)]
    streams = [engine.generate(ids, prompt_logprobs=0, **fields) for ids, fields in asked]
    before = engine.stats().preemptions
    for stream, (ids, fields) in zip(streams, asked, strict=True):
        [result] = stream.finish()
        assert list(result.ids) == alone(ids, **fields)
        expected = [row[token] for row, token in zip(opinions(ids), ids[1:], strict=True)]
        assert [score.logprob for score in result.prompt_scores] == pytest.approx(expected, abs=1e-4)
    assert engine.stats().preemptions > before


# Ends


def test_a_stop_token_ends_a_request(engine):
    ids = alone(prompt(9), **SAMPLED)
    [result] = engine.generate(prompt(9), stop_token_ids=(ids[7],), **SAMPLED).finish()
    assert list(result.ids) == ids[: ids.index(ids[7]) + 1]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("least", [1, 8, 20])
def test_no_stop_token_comes_before_the_least_length(engine, least):
    stops = tuple(range(0, 16, 3))  # of a vocabulary of 16
    fields = SAMPLED | {"min_new_tokens": least, "stop_token_ids": stops}
    [result] = engine.generate(prompt(9), **fields).finish()
    assert list(result.ids) == alone(prompt(9), **fields)
    assert not set(result.ids[:least]).intersection(stops)
    assert least <= len(result.ids) <= 20


def test_the_first_token_may_be_the_last(engine):
    ids = alone(prompt(9), **SAMPLED)
    [one] = engine.generate(prompt(9), **SAMPLED | {"max_new_tokens": 1}).finish()
    [stopped] = engine.generate(prompt(9), stop_token_ids=(ids[0],), **SAMPLED).finish()
    assert list(one.ids) == list(stopped.ids) == ids[:1]
    assert (one.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_more_stop_tokens_than_the_device_knows_are_looked_for_on_the_host(engine):
    ids = alone(prompt(9), **SAMPLED)
    stops = (*(token for token in range(16) if token not in ids), *ids[5:6])
    [result] = engine.generate(prompt(9), stop_token_ids=stops, **SAMPLED).finish()
    assert list(result.ids) == ids[: ids.index(ids[5]) + 1]


def test_who_cancels_gets_what_there_was(engine):
    stream = engine.generate(prompt(5), temperature=0, max_new_tokens=59)
    first = next(stream)
    stream.cancel()
    chunks = [first, *stream]
    ids = [token for chunk in chunks for token in chunk.ids]
    assert chunks[-1].finish_reason in ("cancelled", "length")
    assert ids == alone(prompt(5), temperature=0, max_new_tokens=59)[: len(ids)]
    stream.cancel()  # again, to no effect


def test_a_request_whose_time_is_over_fails(engine):
    with pytest.raises(DeadlineError, match="the deadline has passed"):
        engine.generate(prompt(5), timeout=0.0, **SAMPLED).finish()


def test_a_full_queue_refuses_and_loses_nothing(engine):
    streams = []

    def flood():
        for seed in range(40):
            streams.append(engine.generate(prompt(40, seed), temperature=0, max_new_tokens=20))

    with pytest.raises(QueueFullError, match="max_queued"):
        flood()
    for seed, stream in enumerate(streams):
        assert list(stream.finish()[0].ids) == alone(prompt(40, seed), temperature=0, max_new_tokens=20)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [99]}, "outside the vocabulary"),
        ({"prompt": [1] * 60, "max_new_tokens": 5}, "exceed"),
        ({"prompt": [1], "temperature": -1}, "temperature -1"),
        ({"prompt": [1], "n": 0}, "n 0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_input_never_reaches_the_engine(engine, asked, message):
    before = engine.stats()
    with pytest.raises(ValueError, match=message):
        engine.generate(**asked)
    assert engine.stats() == before


# Readers


def test_event_loops_and_threads_are_served_alike(engine):
    async def read(seed):
        return [token async for chunk in engine.generate(prompt(6, seed), **SAMPLED) for token in chunk.ids]

    async def several():
        return await asyncio.gather(*(read(seed) for seed in range(4)))

    for seed, ids in enumerate(asyncio.run(several())):
        assert ids == alone(prompt(6, seed), **SAMPLED)


def test_a_task_that_is_cancelled_cancels_its_request(engine):
    async def read():
        async for _ in engine.generate(prompt(6), temperature=0, max_new_tokens=58):
            await asyncio.sleep(3600)

    async def leave():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 0.2)

    asyncio.run(leave())


def test_a_slow_reader_keeps_nobody_waiting(engine):
    slow = engine.generate(prompt(6), **SAMPLED)
    [fast] = engine.generate(prompt(7), **SAMPLED).finish()
    assert list(fast.ids) == alone(prompt(7), **SAMPLED)
    assert list(slow.finish()[0].ids) == alone(prompt(6), **SAMPLED)


# The engine


def test_statistics_add_up(engine):
    before = engine.stats()
    [result] = engine.generate(prompt(21, 7), temperature=0, max_new_tokens=30).finish()
    after = engine.stats()
    assert after.new_tokens - before.new_tokens == len(result.ids) == result.statistics.new_tokens
    assert after.rounds - before.rounds == result.statistics.rounds
    assert result.statistics.accepted + result.statistics.rounds >= len(result.ids) - 1
    assert sum(after.accepted_at) == after.accepted
    assert sum(after.drafted_at) == after.drafted
    assert after.rounds >= after.drafted_at[0] > after.drafted_at[1] > 0, "drafting does not adapt"
    assert result.statistics.queue_seconds <= result.statistics.first_token_seconds <= result.statistics.seconds


def test_a_failing_step_fails_those_who_run_and_nobody_after(engine, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine._programs, "dispatch", fails)
        with pytest.raises(UnavailableError, match="out of memory"):
            engine.generate(prompt(6), **SAMPLED).finish()
    assert "out of memory" in caplog.text
    [result] = engine.generate(prompt(6), **SAMPLED).finish()
    assert list(result.ids) == alone(prompt(6), **SAMPLED)


def programs(pages):
    """Of every kind, with drafts and without."""
    glm, config = tiny(), dataclasses.replace(CONFIG, pages=pages, adapts_draft=False)
    cache = PagedCache.create(glm.config, pages, config.page_size, jnp.float32, tail_dtype=jnp.float32, mtp=True)
    slots = Slots.create(config.max_num_seqs, glm.config.hidden_size, glm.config.vocab_size, jnp.float32)
    found = Programs(glm.weights, most_rounds=config.max_rounds, most_retired=MOST_RETIRED, stop_ids=STOP_IDS)
    plain = Shape("decode", 1, 1, config.max_model_len // config.page_size)
    found.compile([*Shapes(config, config.max_model_len), plain], cache, slots, offloads=True)
    return found


def test_no_programs_temporaries_grow_with_the_cache():
    once, twice = (programs(pages).temporary_bytes() for pages in (CONFIG.pages, 2 * CONFIG.pages))
    assert {name if isinstance(name, str) else name.kind for name in once} == {
        *("admit", "retire", "collect", "land"),
        *("read", "decode", "verify"),
    }
    assert once == twice


def test_a_closed_engine_says_so():
    engine = Engine(tiny(), dataclasses.replace(CONFIG, num_draft=0, max_num_seqs=1, max_model_len=32, chunk_tokens=8))
    stream = engine.generate(prompt(3), temperature=0, max_new_tokens=29)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match="the engine is closed"):
        engine.generate(prompt(3), **SAMPLED)
    with pytest.raises(UnavailableError, match="was closed"):
        stream.finish()
    gc.collect()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_len": 65}, "max_model_len 65 is outside 1..64"),
        ({"pages": 3}, "do not hold one sequence"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_serve_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), dataclasses.replace(CONFIG, **config))
