"""The service as clients meet it: through a channel, from a process' own worker, whose engine is a real one."""

import dataclasses
import hashlib
import io
import re
import threading
import time
import zipfile

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from glmjax.serving.engine import Engine
from glmjax.worker import lifecycle
from glmjax.worker.batch_log import BatchLog
from glmjax.worker.protocol import SERVICE
from tests.serving.test_events import Follower
from tests.serving.test_grammar import CONFIG, LENGTH, glm
from tests.worker.running import (
    NOT_SERVING,
    PROMPT,
    SERVING,
    Running,
    alone,
    asked,
    before_plans,
    complete,
    endless,
    failure,
    until,
)


@pytest.fixture(autouse=True)
def nothing_is_left(running):
    yield
    until(lambda: not len(running.worker.service.live))
    until(lambda: running.engine.stats().running + running.engine.stats().waiting == 0)
    stats = running.engine.stats()
    assert stats.free_pages + stats.cached_pages == stats.pages


# Generate


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_those_of_generate(running, stream):
    [whole] = complete(running, asked(stream=stream))
    assert list(whole.output_ids) == alone()
    assert (whole.finish_reason, whole.completion_tokens) == ("length", 12)
    assert whole.prompt_tokens == len(glm().encode(PROMPT))


def test_a_streams_chunks_come_to_the_whole(running):
    *chunks, last = running.stub.Generate(asked(stream=True, max_tokens=40))
    assert len(chunks) > 1
    assert [token for r in chunks for token in r.chunk.token_ids] == list(last.complete.output_ids)


def test_tokens_may_be_given_instead_of_text(running):
    request = asked()
    request.tokenized.input_ids.extend(glm().encode(PROMPT))
    assert list(complete(running, request)[0].output_ids) == alone()


def test_several_sequences_follow_one_seed(running):
    found = {c.index: list(c.output_ids) for c in complete(running, asked(n=3, stream=True))}
    assert found == {
        i: glm().generate(PROMPT, temperature=1.2, seed=3 + i, max_new_tokens=12).finish().ids for i in range(3)
    }


def test_a_schema_is_followed(running):
    [whole] = complete(running, asked(json_schema='{"enum": ["red", "blue"]}', max_tokens=30))
    assert glm().tokenizer.decode(list(whole.output_ids)) in ('"red"', '"blue"')


def test_a_stop_string_is_told(running):
    text = glm().tokenizer.decode(alone())
    [whole] = complete(running, asked(stop=[text[4]]))
    assert (whole.finish_reason, whole.matched_stop_str) == ("stop", text[4])


@pytest.mark.parametrize("skip", [False, True])
def test_a_stop_string_may_be_a_special_tokens_name(running, skip):
    end = glm().tokenizer.raw.id_to_token(min(glm().stops.token_ids))
    forced = {"logit_bias": {min(glm().stops.token_ids): 100.0}, "ignore_eos": True}
    [whole] = complete(running, asked(stop=[end], skip_special_tokens=skip, **forced))
    assert (whole.finish_reason, whole.matched_stop_str) == (("length", "") if skip else ("stop", end))


@pytest.mark.parametrize(("ignore", "told"), [(False, 0), (True, 1)])
def test_a_token_that_ends_it_by_request_is_told(running, ignore, told):
    end = min(glm().stops.token_ids)
    forced = {"logit_bias": {end: 100.0}, "stop_token_ids": [end], "ignore_eos": ignore}
    [whole] = complete(running, asked(**forced))
    assert list(whole.output_ids) == [end]
    assert (whole.HasField("matched_token_id"), whole.matched_token_id) == (bool(told), told and end)


def test_logprobs_are_those_of_the_engine(running):
    [whole] = complete(running, asked(logprobs=2))
    [result] = running.engine.generate(PROMPT, temperature=1.2, seed=3, max_new_tokens=12, logprobs=2).finish()
    assert list(whole.output_logprobs.token_logprobs) == pytest.approx([score.logprob for score in result.scores])
    assert [list(top.token_ids) for top in whole.output_logprobs.top_logprobs] == [
        [i for i, _ in score.top] for score in result.scores
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_the_prompt_are_told_once(running, stream):
    responses = [*running.stub.Generate(asked(prompt_logprobs=1, stream=stream))]
    [result] = running.engine.generate(PROMPT, prompt_logprobs=1, max_new_tokens=1).finish()
    *chunks, complete = (getattr(response, response.WhichOneof("response")) for response in responses)
    ids = glm().encode(PROMPT)
    for told in (*chunks[:1], complete):
        assert list(told.input_logprobs.token_ids) == ids
        assert not told.input_logprobs.token_logprobs[0].HasField("value")
        values = [score.value for score in told.input_logprobs.token_logprobs[1:]]
        assert values == pytest.approx([score.logprob for score in result.prompt_scores])
        tops = [list(zip(top.token_ids, top.values, strict=True)) for top in told.input_logprobs.top_logprobs]
        assert [len(top) for top in tops] == [0, *[1] * (len(ids) - 1)]
    assert not any(chunk.HasField("input_logprobs") for chunk in chunks[1:])


def test_without_a_limit_it_goes_to_the_end_of_the_context_and_never_beyond(running):
    request = asked(ignore_eos=True, max_tokens=2**31)
    request.sampling_params.ClearField("max_tokens")
    for limit in (None, 10**6):
        if limit:
            request.sampling_params.max_tokens = limit
        [whole] = complete(running, request)
        assert whole.prompt_tokens + whole.completion_tokens == LENGTH
        assert whole.finish_reason == "length"


def test_a_prompt_can_be_cut_to_its_end(running):
    ids = glm().encode("something before " + PROMPT)
    keep = len(glm().encode(PROMPT))
    request = asked(truncate_prompt_tokens=keep)
    request.tokenized.input_ids.extend(ids)
    assert complete(running, request)[0].prompt_tokens == keep


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (pb.GenerateRequest(), "has no input"),
        (asked(top_p=1.5), "top_p 1.5 is outside"),
        (asked("x" * 10**6), "a text of 1000000 characters"),
        (asked("a b c " * 100), "leave no room in the context of 192"),
        (asked(regex="(a"), "unclosed group"),
        (asked(stop_token_ids=[10**6]), "stop_token_ids has token id 1000000"),
        (asked(min_tokens=13), "min_new_tokens 13 exceeds max_new_tokens 12"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[5, 10**6])), "1000000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_with_value_and_limit(running, request_, complaint):
    before = running.engine.stats()
    code, reason, details = failure(running.stub.Generate(request_))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid")
    assert complaint in details
    assert running.engine.stats().prompt_tokens == before.prompt_tokens


def test_text_for_a_model_without_a_tokenizer_is_the_clients_fault(running, monkeypatch):
    monkeypatch.setattr(running.engine.glm, "tokenizer", None)
    code, reason, details = failure(running.stub.Generate(asked()))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid")
    assert "without a tokenizer; give token ids" in details


# Leaving


@pytest.fixture
def slow(running, monkeypatch):
    """An engine that takes its time: what is endless does not come to its end by itself."""
    before_plans(monkeypatch, running.engine, lambda: time.sleep(0.05))


def aborted(running, reason):
    """How many requests are counted as aborted for a reason."""
    labels = {"model_name": running.worker.service.metrics._model, "reason": reason}
    return running.worker.service.metrics.registry.get_sample_value("glmjax:aborted_requests_total", labels) or 0


def test_a_client_that_leaves_leaves_nothing_behind(running, slow):
    before, count = running.engine.stats().finished, aborted(running, "cancelled")
    call = running.stub.Generate(endless())
    next(call)
    call.cancel()
    until(lambda: running.engine.stats().running == 0)
    assert running.engine.stats().finished == before
    until(lambda: aborted(running, "cancelled") == count + 1)


def test_a_deadline_ends_a_request(running, slow):
    before = running.engine.stats().finished
    code, *_ = failure(running.stub.Generate(endless(), timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: not len(running.worker.service.live) and running.engine.stats().running == 0)
    assert running.engine.stats().finished == before


@pytest.mark.parametrize("n", [1, 2])
def test_another_call_can_abort_a_request(running, slow, n):
    count = aborted(running, "cancelled")
    request = endless("mine")
    request.sampling_params.n = n
    call = running.stub.Generate(request)
    next(call)
    running.stub.Abort(pb.AbortRequest(request_ids=["unknown", "mine"]))
    ends = [response.complete for response in call if response.HasField("complete")]
    assert [end.finish_reason for end in ends] == ["abort"] * n
    assert all(end.completion_tokens < LENGTH - 10 for end in ends)
    until(lambda: aborted(running, "cancelled") == count + 1)


def test_who_is_aborted_before_the_first_token_is_told_no_logprobs(running, monkeypatch):
    go, begun = threading.Event(), threading.Event()
    before_plans(monkeypatch, running.engine, lambda: (begun.set(), go.wait(30)))
    call = running.stub.Generate(asked(name="mine", prompt_logprobs=1))
    assert begun.wait(30)
    running.stub.Abort(pb.AbortRequest(request_ids=["mine"]))
    go.set()
    [response] = call
    assert (response.complete.finish_reason, list(response.complete.output_ids)) == ("abort", [])
    assert not response.complete.HasField("input_logprobs")


def test_an_id_is_one_requests_at_a_time(running):
    call = running.stub.Generate(endless("mine"))
    next(call)
    code, _, details = failure(running.stub.Generate(asked(name="mine")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'mine' is under way already" in details
    call.cancel()
    until(lambda: not len(running.worker.service.live))
    assert complete(running, asked(name="mine"))


def test_a_reader_who_does_not_read_keeps_nobody_waiting(running):
    options = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(running.address, options=options) as channel:
        request = endless()
        request.sampling_params.logprobs = 20
        calls = [vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request) for _ in range(4)]
        assert list(complete(running, asked())[0].output_ids) == alone()
        until(lambda: running.engine.stats().running + running.engine.stats().waiting == 0)
        assert len(running.worker.service.live) == 4  # whose answers are not on their way yet
        for call in calls:
            call.cancel()


# What there is to know


def test_the_model_and_the_server_tell_what_they_are(running):
    model = running.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.max_context_length, model.vocab_size, model.is_generation) == (LENGTH, 320, True)
    assert set(model.eos_token_ids) == glm().stops.token_ids
    server = running.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.max_num_seqs, server.block_size) == ("vllm-grpc", 2, 8)
    assert server.constrained_decoding_start == "first_token"  # of a model without tokens for thoughts
    assert running.stub.HealthCheck(pb.HealthCheckRequest()).healthy


def test_loads_count_who_runs(running):
    call = running.stub.Generate(endless())
    next(call)
    [load] = running.stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.max_running_requests) == (1, 2)
    assert 0 < load.token_usage <= 1
    assert load.num_used_tokens == load.token_usage * load.max_total_num_tokens
    assert load.gen_throughput >= 0
    call.cancel()


def test_the_tokenizer_comes_in_pieces(running):
    chunks = list(running.stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    content = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks][-1] == hashlib.sha256(content).hexdigest()
    assert not any(chunk.sha256 for chunk in chunks[:-1])
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(
        zipfile.ZipFile(io.BytesIO(content)).namelist()
    )


def test_embeddings_are_not_served(running):
    with pytest.raises(grpc.RpcError) as error:
        running.stub.Embed(pb.EmbedRequest())
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "was not trained to give embeddings" in error.value.details()


def test_a_generic_client_finds_the_service_and_calls_it(running):
    database = ProtoReflectionDescriptorDatabase(running.channel)
    assert SERVICE in database.get_services()
    found = descriptor_pool.DescriptorPool(database).FindServiceByName(SERVICE).methods_by_name["Generate"]
    asked_, answer = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
    assert found.containing_service.file.package == "vllm.grpc.engine"
    call = running.channel.unary_stream(f"/{SERVICE}/Generate", asked_.SerializeToString, answer.FromString)
    sampling = {"temperature": 1.2, "seed": 3, "max_tokens": 12}
    [response] = call(asked_(text=PROMPT, sampling_params=sampling))
    assert list(response.complete.output_ids) == alone()


# The cache


class Batches:
    """What a subscription brings, in the words of the engine's own events."""

    def __init__(self, running, start=0):
        self.call = running.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(start_sequence_number=start))
        self._found = {}

    def held(self, pages):
        """Tokens of blocks by their hash, once there are so many, and the number of the batch."""
        found = self._found
        while True:
            batch = next(self.call)
            for event in batch.events:
                if event.HasField("cleared"):
                    found.clear()
                for block in event.stored.blocks:
                    found[block.block_hash] = list(block.token_ids)
                for gone in event.removed.block_hashes:
                    del found[gone]
            if len(found) == pages:
                return dict(found), batch.sequence_number


def test_followers_know_what_is_cached(running):
    running.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=5))
    following = Batches(running)
    assert following.held(0)[0] == {}
    complete(running, asked("abcdefgh" * 3, max_tokens=1))
    pages = running.engine.stats().cached_pages
    held, number = following.held(pages)
    assert held == Batches(running).held(pages)[0]
    assert len(held) == len(Follower(running.engine.cached()).pages) == pages > 1
    late = Batches(running, start=number)
    running.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=5))
    assert following.held(0)[1] == number + 1
    assert next(late.call).sequence_number == number + 1
    lost = Batches(running, start=7)
    assert failure(lost.call)[0] is grpc.StatusCode.OUT_OF_RANGE
    following.call.cancel()
    late.call.cancel()


def test_followers_are_told_when_the_worker_leaves():
    running = Running().ready()
    following = Batches(running)
    assert following.held(0)[0] == {}
    running.leave()
    assert failure(following.call)[:2] == (grpc.StatusCode.UNAVAILABLE, "closed")
    assert running.closed() == 0


def test_where_nothing_is_shared_there_is_nothing_to_follow(running, monkeypatch):
    monkeypatch.setattr(running.engine, "config", dataclasses.replace(CONFIG, prefix_cache=False))
    assert failure(Batches(running).call)[0] is grpc.StatusCode.UNIMPLEMENTED
    for _ in range(2):
        [whole] = complete(running, asked("abcdefgh" * 4))
        assert whole.cached_tokens == 0


def test_a_cache_in_use_is_not_flushed(running):
    call = running.stub.Generate(endless())
    next(call)
    flushed = running.stub.FlushCache(common_pb2.FlushCacheRequest())
    assert not flushed.success
    assert "1 requests are under way" in flushed.message
    call.cancel()


def test_a_cache_is_flushed_once_the_engine_has_let_go_of_who_has_left(running, slow):
    call = running.stub.Generate(endless())
    next(call)
    call.cancel()
    until(lambda: not len(running.worker.service.live))
    flushed = running.stub.FlushCache(common_pb2.FlushCacheRequest())
    assert flushed.success, flushed.message
    assert running.engine.stats().cached_pages == 0


# Traces


def test_a_trace_can_be_had(running, tmp_path):
    assert not running.stub.StopProfile(common_pb2.StopProfileRequest()).success
    started = running.stub.StartProfile(common_pb2.StartProfileRequest(output_dir=str(tmp_path)))
    assert started.success, started.message
    assert not running.stub.StartProfile(common_pb2.StartProfileRequest()).success
    complete(running, asked())
    stopped = running.stub.StopProfile(common_pb2.StopProfileRequest())
    assert stopped.success, stopped.message
    assert list(tmp_path.rglob("*.xplane.pb"))


# A worker's life


def test_before_it_is_ready_and_when_it_leaves_requests_go_elsewhere():
    go = threading.Event()

    def make():
        assert go.wait(60)
        return Engine(glm(), CONFIG)

    running = Running(make=make)
    assert (running.serving(""), running.serving()) == (SERVING, NOT_SERVING)
    assert failure(running.stub.Generate(asked()))[:2] == (grpc.StatusCode.UNAVAILABLE, "starting")
    go.set()
    call = running.ready().stub.Generate(endless())
    next(call)
    running.leave()
    until(lambda: running.serving() == NOT_SERVING)
    assert failure(running.stub.Generate(asked()))[:2] == (grpc.StatusCode.UNAVAILABLE, "draining")
    *_, last = call  # who was there before may end
    assert last.complete.completion_tokens + last.complete.prompt_tokens == LENGTH
    assert running.closed() == 0


def test_who_takes_too_long_to_leave_is_sent_elsewhere():
    running = Running(drain_seconds=0.0).ready()
    call = running.stub.Generate(endless())
    next(call)
    running.leave()
    assert failure(call)[:2] == (grpc.StatusCode.UNAVAILABLE, "engine")
    assert running.closed() == 0


def test_a_worker_that_leaves_early_does_not_wait_for_its_programs():
    forever = threading.Event()
    running = Running(make=forever.wait)
    running.leave()
    assert running.closed() == 0
    forever.set()


def test_an_engine_that_cannot_go_on_ends_the_worker(monkeypatch):
    running = Running().ready()
    monkeypatch.setattr(running.engine, "_make_state", lambda: 1 / 0)  # what a failed step needs
    monkeypatch.setattr(running.engine._scheduler, "plan", lambda now: 1 / 0)
    code, reason, details = failure(running.stub.Generate(asked()))
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "engine")
    assert details
    assert running.closed() == 1


@pytest.fixture
def hanging(monkeypatch):
    """Makes a worker whose engine hangs in a step from the next request on; what is under way is a call."""
    go, engines = threading.Event(), []

    def make(**flags):
        running = Running(**flags).ready()
        engines.append(running.engine)
        begun = threading.Event()
        before_plans(monkeypatch, running.engine, lambda: (begun.set(), go.wait()))
        call = running.stub.Generate(asked(stream=True), timeout=30)
        assert begun.wait(60)
        return running, call

    yield make
    go.set()
    for engine in engines:
        engine.close()


def test_a_step_that_does_not_end_ends_the_worker(hanging):
    running, call = hanging(watchdog_timeout=0.2)
    assert failure(call)[0] is grpc.StatusCode.UNAVAILABLE
    assert running.closed() == 1


def test_a_worker_is_ended_while_its_recorder_waits_for_the_same_step(hanging, tmp_path):
    config = dataclasses.replace(CONFIG, recorded_dispatches=8)
    flags = {"watchdog_timeout": 1.5, "flight_recorder": tmp_path}
    running, call = hanging(make=lambda: Engine(glm(), config), **flags)
    running.engine._running.counts["aborts"] += 1  # an output was garbled: it is to be recorded
    assert failure(call)[0] is grpc.StatusCode.UNAVAILABLE
    assert running.closed() == 1


def test_a_worker_leaves_during_a_step_that_does_not_end(hanging, monkeypatch):
    monkeypatch.setattr(lifecycle, "_LAST_STEP_SECONDS", 0.2)
    running, call = hanging(drain_seconds=0.2)
    running.leave()
    assert failure(call)[0] is grpc.StatusCode.UNAVAILABLE
    assert running.closed() == 1


def test_batches_are_told_in_the_log(caplog):
    with caplog.at_level("INFO", "glmjax.worker.batch_log"):
        running = Running(make=lambda: Engine(glm(), CONFIG, observer=BatchLog(every=2))).ready()
        complete(running, asked("abcdefgh" * 2))
        complete(running, asked("abcdefgh" * 2 + "x"))
    lines = [record.getMessage() for record in caplog.records if record.name == "glmjax.worker.batch_log"]
    prefills, decodes = ([line for line in lines if line.startswith(kind)] for kind in ("Prefill", "Decode"))
    assert sum(int(re.search(r"#new-seq: (\d+)", line)[1]) for line in prefills) == 2
    assert any("#cached-token: 8" in line or "#cached-token: 16" in line for line in prefills)
    assert all(re.search(r"accept len: \d\.\d\d, gen throughput \(token/s\): [1-9]", line) for line in decodes)
    assert decodes
    running.leave()
    assert running.closed() == 0
