"""vLLM's gRPC service over an engine. Everything here runs in the worker's event loop, the engine in a thread of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, NoReturn

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from glmjax.glm import GLM
from glmjax.serving.engine import Engine
from glmjax.serving.events import LostError
from glmjax.serving.stream import Stream
from glmjax.worker.cache_events import followed
from glmjax.worker.live import Live, LiveRequest
from glmjax.worker.metrics import Metrics
from glmjax.worker.profiling import Profiler
from glmjax.worker.protocol import Asked, Telling, asked_of, input_logprobs
from glmjax.worker.statuses import REASON, NotServingError, status_of
from glmjax.worker.threads import in_thread
from glmjax.worker.throughput import Throughput
from glmjax.worker.tokenizer_files import CHUNK_BYTES, packed
from glmjax.worker.tracing import NoTraces, Span, Traces

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT = 24 * 3600.0
_SETTLING_SECONDS = 2.0
"""For the engine to let go of requests whose clients have left."""
_BEGINNERS = 4
"""Requests whose texts and grammars are read at a time: the engine's thread wants its share of the processor."""
_REASONING_PARSER = "glm45"
"""What vLLM and the gateway call the form of GLM's thoughts."""
_UNEXPECTED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What the service tells of its model.

    Attributes:
        model_path: directory of the checkpoint.
        tokenizer_path: of its tokenizer.
        served_model_name: by which clients ask for it.
        default_sampling_params_json: what to sample with where a client says nothing, by the checkpoint's
            generation_config.json; "" for nothing.
    """

    model_path: str
    tokenizer_path: str
    served_model_name: str
    default_sampling_params_json: str = ""


class Service(vllm_engine_pb2_grpc.VllmEngineServicer):
    """The calls of `vllm.grpc.engine.VllmEngine`.

    It takes requests from `serve` until `drain`; before and afterwards they are told to go elsewhere.

    Args:
        card: what it tells of its model.
        holdback: tokens of a stream that are kept back, so that an anomaly among them can be mended or retried unseen.
        traces: where requests' spans go.

    Attributes:
        live: requests under way.
        metrics: what is counted of them.
    """

    def __init__(self, card: ModelCard, holdback: int = 0, traces: Traces | None = None):
        self._traces = traces or NoTraces()
        self.live = Live()
        self.metrics = Metrics(card.served_model_name, lambda: self._engine and self._engine.stats())
        self._card, self._holdback = card, holdback
        self._engine: Engine | None = None
        self._refusal: NotServingError | None = NotServingError("starting")
        self._began, self._received = time.time(), 0.0
        self._profiler, self._throughput = Profiler(), Throughput()
        self._beginners = ThreadPoolExecutor(_BEGINNERS, "beginner")

    def serve(self, engine: Engine) -> None:
        """Take requests from now on."""
        self._engine, self._refusal = engine, None

    def refuse(self, reason: str) -> None:
        """Take no more of them; those under way go on."""
        self._refusal = NotServingError(reason)

    # Requests

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Tokens as they come, or all of them in the end."""
        self._received, name = time.time(), request.request_id or uuid.uuid4().hex
        span, failed = self._traces.request(name, context.invocation_metadata()), "cancelled"
        whole = True
        try:
            async for response in self._generated(request, name, span, context):
                whole &= response.complete.finish_reason != "abort"
                yield response
            failed = None if whole else failed
        except Exception as error:
            failed = dict(status_of(error).metadata)[REASON]
            await _end(context, error)
        finally:  # also where the client has left
            span.end(failed)
            if failed is not None:
                self.metrics.aborted(failed)

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """End requests where they are. Ids that are not under way are passed over: they may have just ended."""
        for name in request.request_ids:
            self.live.abort(name)
        return pb.AbortResponse()

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> NoReturn:
        """Not served."""
        await _end(context, NotImplementedError("this model generates text; it was not trained to give embeddings"))

    async def _generated(
        self, request: pb.GenerateRequest, name: str, span: Span, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        engine = await self._serving()
        live = self.live.enter(name)
        # However the call ends: its generator may be left at a `yield` that nobody comes back to.
        context.add_done_callback(lambda _: live.leave())
        asked = asked_of(request, engine.max_model_len)
        ids, stream = await self._begin(engine, live, asked, request.stream, context.time_remaining())
        eos = frozenset() if asked.params.ignore_eos else engine.glm.stops.token_ids
        timed, scored = self.metrics.request(asked.n), asked.params.prompt_logprobs is not None
        telling = [Telling(i, stream=request.stream, eos=eos) for i in range(asked.n)]
        async for chunk in stream:
            if scored and telling[chunk.index].prompt is None and len(stream.prompt_scores) == len(ids) - 1:
                telling[chunk.index].prompt = await asyncio.to_thread(input_logprobs, ids, stream.prompt_scores)
            timed.push(chunk)
            span.push(chunk)
            for response in telling[chunk.index].responses(chunk):
                yield response

    async def _begin(
        self, engine: Engine, live: LiveRequest, asked: Asked, stream: bool, timeout: float | None
    ) -> tuple[list[int], Stream]:
        """Hand a request to the engine, from a thread: text and grammars take their time. The prompt's tokens, and what comes."""

        def begin() -> tuple[list[int], Stream]:
            ids, params = _fitted(engine.glm, asked, engine.max_model_len)
            holdback = self._holdback if stream else math.inf
            return ids, engine.generate(ids, params, n=asked.n, timeout=timeout, holdback=holdback)

        begun = asyncio.get_running_loop().run_in_executor(self._beginners, begin)
        # Also when nobody waits for it any more: then it is cancelled.
        begun.add_done_callback(lambda begun: begun.exception() or live.attach(begun.result()[1]))
        return await asyncio.shield(begun)

    async def _serving(self) -> Engine:
        if self._refusal is not None:
            raise self._refusal
        return self._engine

    # What there is to know

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Whether requests are taken. Before there is an engine the call fails: gateways register whom they get an answer from."""
        await self._told(context)
        refusal = self._refusal
        return pb.HealthCheckResponse(healthy=refusal is None, message="serving" if refusal is None else str(refusal))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What the gateway must know to make requests of messages."""
        engine = await self._told(context)
        config = engine.glm.config
        return pb.GetModelInfoResponse(
            **dataclasses.asdict(self._card),
            is_generation=True,
            max_context_length=engine.max_model_len,
            max_req_input_len=engine.max_model_len - 1,
            vocab_size=config.vocab_size,
            model_type="glm_moe_dsa",
            architectures=["GlmMoeDsaForCausalLM"],
            eos_token_ids=sorted(engine.glm.stops.token_ids),
            pad_token_id=config.pad_token_id or 0,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """How the worker is set up."""
        engine = await self._told(context)
        return pb.GetServerInfoResponse(
            active_requests=len(self.live),
            is_paused=self._refusal is not None,
            last_receive_timestamp=self._received,
            uptime_seconds=time.time() - self._began,
            server_type="vllm-grpc",
            data_parallel_size=1,
            kv_cache_dtype=str(engine.glm.kv_cache_dtype),
            block_size=engine.config.page_size,
            model_dtype=str(engine.glm.weights.dtype),
            max_num_seqs=engine.config.max_num_seqs,
            **_constrained(engine),
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadsResponse:
        """Who runs and who waits."""
        engine = await self._told(context)
        stats, size = engine.stats(), engine.config.page_size
        load = pb.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            gen_throughput=self._throughput(stats.new_tokens),
            num_used_tokens=stats.held_pages * size,
            max_total_num_tokens=stats.pages * size,
            token_usage=stats.usage,
            cache_hit_rate=stats.hit_rate,
            utilization=stats.running / engine.config.max_num_seqs,
            max_running_requests=engine.config.max_num_seqs,
        )
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=version("glmjax"), dp_rank_count=1, loads=[load])

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.KvEventBatch]:
        """What comes into the cache and leaves it, without end."""
        engine = await self._told(context)
        start = request.start_sequence_number
        try:
            if not engine.config.prefix_cache:
                raise NotImplementedError("nothing is shared between requests here (--disable-radix-cache)")
            if start:
                engine.events.after(start)  # refused at once, where the gateway expects it
            await context.send_initial_metadata(())  # else who subscribes waits for the first batch
            async for batch in followed(engine, start):
                start = batch.sequence_number
                yield batch
        except LostError as error:
            code = grpc.StatusCode.OUT_OF_RANGE if start == request.start_sequence_number else grpc.StatusCode.DATA_LOSS
            await context.abort(code, str(error), ((REASON, "lost"),))
        except Exception as error:
            await _end(context, error)

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        """The tokenizer's files in a ZIP archive, for who cannot read them from the disk."""
        try:
            content, digest = await asyncio.to_thread(packed, self._card.tokenizer_path)
        except FileNotFoundError as error:
            await _end(context, NotImplementedError(str(error)))
        for begin in range(0, len(content), CHUNK_BYTES):
            last = begin + CHUNK_BYTES >= len(content)
            data = content[begin : begin + CHUNK_BYTES]
            yield common_pb2.GetTokenizerChunk(data=data, sha256=digest if last else "")

    # What operators do

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        """Let go of all cached pages, once nothing is under way."""
        engine, wait = await self._told(context), min(max(0.0, request.timeout_s), _LONGEST_WAIT)
        end = time.monotonic() + max(wait, _SETTLING_SECONDS)
        await self.live.idle(wait)
        while not (busy := len(self.live)):
            if await in_thread(engine.flush):
                return common_pb2.FlushCacheResponse(success=True, message="the cache is empty")
            if time.monotonic() > end:
                busy = max(1, engine.stats().running + engine.stats().waiting)
                break
            await asyncio.sleep(_SETTLING_SECONDS / 100)
        text = f"{busy} requests are under way; send it again with a longer timeout_s, or when they have ended"
        return common_pb2.FlushCacheResponse(success=False, message=text)

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        """Begin a trace of the device."""
        engine = await self._told(context)
        if request.start_step or request.profile_by_stage:
            text = "start_step and profile_by_stage are not served; start the trace when it should begin"
            return common_pb2.ProfileResponse(success=False, message=text)
        try:
            folder = await self._profiler.start(
                request.output_dir, max(request.num_steps, 0), lambda: engine.stats().dispatches
            )
        except (ValueError, OSError, RuntimeError) as error:
            return common_pb2.ProfileResponse(success=False, message=str(error))
        return common_pb2.ProfileResponse(success=True, message=f"tracing to {folder}")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        """End it."""
        try:
            folder = await self._profiler.stop()
        except (ValueError, RuntimeError) as error:
            return common_pb2.ProfileResponse(success=False, message=str(error))
        return common_pb2.ProfileResponse(success=True, message=f"the trace is in {folder}")

    async def _told(self, context: grpc.aio.ServicerContext) -> Engine:
        """The engine, while draining too; before there is one, the caller is told to come again."""
        if self._engine is None:
            await _end(context, self._refusal)
        return self._engine


def _fitted(glm: GLM, asked: Asked, limit: int) -> tuple[list[int], Any]:
    """The prompt's tokens, and parameters that ask for no more than fits beside them.

    Args:
        glm: the model.
        asked: by the client.
        limit: most tokens of a sequence.

    Raises:
        ValueError: the prompt leaves no room, or cannot be encoded.
    """
    longest = limit * glm.tokenizer.longest if glm.tokenizer is not None else math.inf
    if isinstance(asked.prompt, str) and len(asked.prompt) > longest:
        raise ValueError(f"a text of {len(asked.prompt)} characters is more than {limit} tokens; shorten it")
    ids = glm.encode(asked.prompt)
    if asked.keep is not None:
        ids = ids[-min(limit - 1 if asked.keep == -1 else asked.keep, len(ids)) :]
    if len(ids) >= limit:
        raise ValueError(f"the prompt's {len(ids)} tokens leave no room in the context of {limit}; shorten it")
    room, wanted = limit - len(ids), asked.params.max_new_tokens
    return ids, dataclasses.replace(asked.params, max_new_tokens=room if wanted is None else min(wanted, room))


def _constrained(engine: Engine) -> dict[str, str]:
    """Where grammars begin, so that the gateway asks for calls of tools and leaves thoughts to the worker."""
    if not engine.config.grammars:
        return {}
    if not engine.glm.grammars.knows_thoughts:
        return {"constrained_decoding_start": "first_token"}
    return {"constrained_decoding_start": "after_reasoning", "engine_reasoning_parser": _REASONING_PARSER}


async def _end(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End a call with what went wrong."""
    status = status_of(error)
    if status.code in _UNEXPECTED:
        _LOG.error("a call failed", exc_info=error)
    await context.abort(*status)
