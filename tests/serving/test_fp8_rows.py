"""Rows kept as FP8: what an engine gives is what `generate` gives on such rows, however it is served, in half the bytes."""

import functools
import inspect
import json
import queue
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax
from benchmarks.invariance import Case, alone, cases, compare, served
from glmjax.evaluation.agreement import agreement
from glmjax.evaluation.rows import scored_rows
from glmjax.glm import GLM
from glmjax.model.cache import FP8
from glmjax.model.config import GlmConfig
from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.pages import PagedCache
from glmjax.serving.recorder import load
from glmjax.serving.records import joined, split
from glmjax.serving.replay import Replay
from tests.serving.tiny import tiny

CONFIG = EngineConfig(
    max_model_len=64,
    max_num_seqs=2,
    page_size=8,
    pages=14,
    chunk_tokens=16,
    num_draft=2,
    adapts_draft=False,
    max_rounds=6,
    offload_bytes=1 << 24,
    debug=True,
)
NEW = 24


@functools.cache
def glm():
    whole = tiny()
    return GLM(whole.weights, None, None, whole.stops, "fp8")


@functools.cache
def requests():
    rng = np.random.default_rng(1)
    return cases([rng.integers(0, 16, 64) for _ in range(12)], [1, 8, 17, 40, 40, 33, 9, 40, 23, 16, 32, 24], NEW)


@functools.cache
def references():
    return [alone(glm(), case) for case in requests()]


@pytest.fixture(scope="module")
def engine():
    with Engine(glm(), CONFIG) as engine:
        yield engine


def holds(engine, **fields):
    found = compare(glm(), requests(), references(), served(engine, requests(), np.random.default_rng(2), **fields))
    assert found.holds, "\n".join(map(str, found.differences))


# Output


def test_batches_chunks_and_drafts_change_nothing(engine):
    holds(engine, use_cache=False)
    assert engine.stats().accepted > 0


def test_cached_prefixes_and_the_hosts_memory_change_nothing(engine):
    before = engine.stats()
    for _ in range(2):
        holds(engine)
        engine._offload.flush()
    after = engine.stats()
    assert after.cached_tokens > before.cached_tokens
    assert after.landed > before.landed
    assert after.corrupt == 0


def test_a_replay_gives_the_recorded_tokens(engine, tmp_path):
    holds(engine)
    engine.record(tmp_path / "flight.json.gz")
    header, recordings = load(tmp_path / "flight.json.gz")
    parts = list(Replay(glm(), header).run(recordings[-1]))
    assert sum(len(again.tokens) for again in parts) > 100
    assert all(again.same for again in parts)


# Pages


def test_a_page_takes_what_its_bytes_come_to():
    """On top of the rows, a float32 hidden state of 32."""
    config = tiny().config
    pages = [PagedCache.create(config, 5, 8, kept, tail_dtype=jnp.float32, mtp=True) for kept in (jnp.float32, FP8)]
    latents, keys, tail = 3, 2, 4 * 32  # layers with the MTP layer's; the second one shares its selection
    assert pages[0].page_bytes == 8 * 4 * (latents * 24 + keys * 16) + tail
    assert pages[1].page_bytes == 8 * (latents * (16 + 4 + 2 * 8) + keys * (16 + 4)) + tail


def test_pages_of_glm_5_take_little_more_than_half():
    config = GlmConfig.from_dict(json.loads((Path(__file__).parents[2] / "configs/glm-5.1.json").read_text()))

    def size(dtype):
        cache = jax.eval_shape(lambda: PagedCache.create(config, 2, 64, dtype, tail_dtype=jnp.bfloat16, mtp=True))
        return sum(
            rows.values_LGAC.size * rows.values_LGAC.dtype.itemsize for rows in (cache.latents, cache.index_keys)
        )

    assert size(FP8) / size(jnp.bfloat16) == pytest.approx((656 + 132) / (1152 + 256))  # 0.56


def test_records_are_bytes_and_are_taken_apart_and_put_together(engine):
    holds(engine)
    engine._offload.flush()
    records = list(engine._offload._store._records.values())[:3]
    assert len(records) == 3
    for record in records:
        assert record.page.latents.values_LGAC.dtype == np.uint8
        assert record.size == pytest.approx(engine._cache.page_bytes, abs=8)
        record.checked(record.prefix)
    for record, again in zip(records, split(joined([record.page for record in records])), strict=True):
        jax.tree.map(np.testing.assert_array_equal, record.page, again)


# What it costs


def test_the_model_in_the_box_mostly_finds_the_same_token_most_likely():
    """Measured over all held-out modules: `python -m glmjax.eval agreement --stdlib --dtype float32 --kv-cache-dtype fp8`."""
    whole = glmjax.load()
    text = np.array(whole.encode(inspect.getsource(queue)), np.int32)[:512]
    rows = list(scored_rows([text], 1, batch_size=1, seq_len=512, context=256))
    found = agreement(whole.weights, whole.weights, rows, "fp8")
    assert found.top_1 > 0.95
    assert 0 < found.kl < 0.01


def test_the_model_in_the_box_gives_in_an_engine_what_it_gives_alone():
    narrow = glmjax.load(kv_cache_dtype="fp8")
    text = np.array(narrow.encode(inspect.getsource(queue)), np.int32)
    asked = [
        Case(text[begin : begin + length].tolist(), SamplingParams(temperature=0, max_new_tokens=16))
        for begin, length in [(0, 70), (100, 130), (300, 64)]
    ]
    expected = [alone(narrow, case) for case in asked]
    sizes = EngineConfig(
        max_model_len=192, max_num_seqs=1, chunk_tokens=64, num_draft=1, max_rounds=8, adapts_draft=False
    )
    with Engine(narrow, sizes) as engine:
        for _ in range(2):
            found = compare(narrow, asked, expected, served(engine, asked, np.random.default_rng(0)))
            assert found.holds, "\n".join(map(str, found.differences))


def test_what_cannot_be_cached_in_is_refused():
    with pytest.raises(ValueError, match="kv_cache_dtype is int8; rows are cached in"):
        GLM(tiny().weights, None, None, tiny().stops, "int8")
