"""What load is sent to: a worker by gRPC, or a gateway by HTTP; and how a request went, as its client saw it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import grpc
import openai
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from benchmarks.serve.workload import Asked

_TIMEOUT = 600.0


@dataclasses.dataclass
class Seen:
    """Of one request.

    Attributes:
        due: `time.monotonic()` at which it was to be sent: what follows is counted from there.
        answer: token ids by gRPC, text by HTTP; None where it failed.
        times: when each piece of the answer came; of what is not streamed one.
        tokens: of the answer.
        failure: the status, or "".
    """

    due: float
    answer: tuple[int, ...] | str | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    failure: str = ""

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.due

    @property
    def whole(self) -> float:
        """Seconds until the last."""
        return self.times[-1] - self.due

    @property
    def between(self) -> float:
        """Seconds from token to token, on average."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds from piece to piece."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Target(Protocol):
    """What is asked."""

    async def ask(self, asked: Asked, due: float) -> Seen:
        """Send a request, and read its answer."""


class Worker:
    """By gRPC.

    Args:
        address: host:port.
    """

    def __init__(self, address: str):
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = vllm_engine_pb2_grpc.VllmEngineStub(self._channel)

    async def ask(self, asked: Asked, due: float) -> Seen:
        """See `Target`."""
        seen = Seen(due)
        params = pb.SamplingParams(temperature=1.0, seed=asked.seed, max_tokens=asked.new_tokens, ignore_eos=True)
        request = pb.GenerateRequest(text=asked.text, stream=asked.stream, sampling_params=params)
        try:
            async for response in self._stub.Generate(request, timeout=_TIMEOUT):
                if response.HasField("chunk") or not asked.stream:
                    seen.times.append(time.monotonic())
                if response.HasField("complete"):
                    seen.answer = tuple(response.complete.output_ids)
                    seen.tokens = len(seen.answer)
        except grpc.aio.AioRpcError as error:
            seen.failure = error.code().name
        return seen

    async def loads(self) -> tuple[int, int]:
        """Who runs and who waits."""
        [load] = (await self._stub.GetLoads(pb.GetLoadsRequest(), timeout=_TIMEOUT)).loads
        return load.num_running_reqs, load.num_waiting_reqs

    async def flush(self) -> None:
        """Begin with an empty cache."""
        await self._stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=60), timeout=_TIMEOUT)

    async def close(self) -> None:
        """Leave."""
        await self._channel.close()


class Gateway:
    """By HTTP, with OpenAI's package.

    Args:
        url: of the gateway.
        model: the served model's name.
    """

    def __init__(self, url: str, model: str):
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=_TIMEOUT)
        self._model = model

    async def ask(self, asked: Asked, due: float) -> Seen:
        """See `Target`."""
        seen = Seen(due, tokens=asked.new_tokens)
        fields = {"model": self._model, "prompt": asked.text, "max_tokens": asked.new_tokens, "seed": asked.seed}
        try:
            told = await self._client.completions.create(
                **fields, stream=asked.stream, temperature=1.0, extra_body={"ignore_eos": True}
            )
            if not asked.stream:
                seen.times.append(time.monotonic())
                seen.answer = told.choices[0].text
                return seen
            seen.answer = ""
            async for chunk in told:
                if chunk.choices and chunk.choices[0].text:
                    seen.times.append(time.monotonic())
                    seen.answer += chunk.choices[0].text
            seen.times = seen.times or [time.monotonic()]  # an answer may have no text
        except (openai.APIError, json.JSONDecodeError) as error:
            seen.failure, seen.answer = type(error).__name__, None
        return seen

    async def close(self) -> None:
        """Leave."""
        await self._client.close()


async def watched(worker: Worker, every: float) -> AsyncIterator[tuple[int, int]]:
    """Who runs and who waits, now and then, until nobody looks any more."""
    while True:
        yield await worker.loads()
        await asyncio.sleep(every)


def outcomes(seen: Sequence[Seen], alone: Sequence[Seen]) -> str:
    """What became of requests, in words.

    Args:
        seen: how they went.
        alone: how each went while nobody else was there.
    """
    found: Counter[str] = Counter()
    for one, expected in zip(seen, alone, strict=True):
        if one.answer is not None:
            found["answered as alone" if one.answer == expected.answer else "answered wrongly"] += 1
        else:
            found[f"{'had begun' if one.times else 'had not begun'} and failed ({one.failure})"] += 1
    return ", ".join(f"{count} {what}" for what, count in found.most_common()) or "none"
