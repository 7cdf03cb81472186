"""Ask workers from Python: `Client` in threads, `AsyncClient` in event loops."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import tempfile
import uuid
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from glmjax.client.answers import Answer, Piece, Reading
from glmjax.client.channel import Target
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.tokenizer import Tokenizer
from glmjax.wire import message_of


class Client:
    """Of one or several workers that serve the same model.

        with glmjax.Client("127.0.0.1:50051") as client:
            for piece in client.stream("def fibonacci(n):", temperature=0, max_new_tokens=64):
                print(piece.text, end="", flush=True)
            [answer] = client.generate("def area(r):", max_new_tokens=32)

    Calls that end before their first message because a worker is gone, leaving or full are made again, by gRPC.

    Args:
        *addresses: host:port of each worker; several must be numeric. Default this machine's.
        **target: other fields of `glmjax.client.channel.Target`: ``api_key``, ``ca``, ``certificate``, ``key``.
    """

    def __init__(self, *addresses: str, **target: Any):
        self._target = Target(**({"addresses": addresses} if addresses else {}), **target)
        self._channel = self._target.channel(grpc)
        self._stub = vllm_engine_pb2_grpc.VllmEngineStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        **fields: Any,
    ) -> list[Answer]:
        """Whole answers.

        Args:
            prompt: text, or token ids.
            params: how to sample and when to stop.
            n: sequences.
            timeout: seconds after which it is not worth going on.
            **fields: fields of `SamplingParams`, instead of or over those of `params`.

        Raises:
            grpc.RpcError: its `code` says what to do, `details` why.
        """
        request, reading = self._asked(prompt, params, n, fields, stream=False)
        responses = self._stub.Generate(request, timeout=timeout, metadata=self._target.metadata)
        told = sorted((response.complete for response in responses), key=lambda complete: complete.index)
        return [reading.answer(complete) for complete in told]

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        **fields: Any,
    ) -> Iterator[Piece]:
        """Pieces as they come; leaving the loop cancels the request. The rest is as for `generate`."""
        request, reading = self._asked(prompt, params, n, fields, stream=True)
        call = self._stub.Generate(request, timeout=timeout, metadata=self._target.metadata)
        try:
            for response in call:
                yield reading.piece(response)
        finally:
            call.cancel()

    @functools.cached_property
    def info(self) -> pb.GetModelInfoResponse:
        """Of the model."""
        return self._stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._target.metadata, wait_for_ready=True)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The workers'; None where they have none."""
        try:
            return _unpacked(self._stub.GetTokenizer(common_pb2.GetTokenizerRequest(), metadata=self._target.metadata))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise

    def loads(self) -> pb.SchedulerLoad:
        """Who runs and who waits, on one of the workers."""
        [load] = self._stub.GetLoads(pb.GetLoadsRequest(), metadata=self._target.metadata).loads
        return load

    def close(self) -> None:
        """End; requests under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _asked(
        self, prompt: str | Sequence[int], params: SamplingParams | None, n: int, fields: dict[str, Any], stream: bool
    ) -> tuple[pb.GenerateRequest, Reading]:
        return _asked(prompt, params, n, fields, stream, self.tokenizer, self.info)


class AsyncClient:
    """As `Client`, in an event loop.

    async with glmjax.AsyncClient() as client:
        async for piece in client.stream("def fibonacci(n):"):
            print(piece.text, end="", flush=True)
    """

    def __init__(self, *addresses: str, **target: Any):
        self._target = Target(**({"addresses": addresses} if addresses else {}), **target)
        self._channel = self._target.channel(grpc.aio)
        self._stub = vllm_engine_pb2_grpc.VllmEngineStub(self._channel)
        self._known: tuple[Tokenizer | None, pb.GetModelInfoResponse] | None = None

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        **fields: Any,
    ) -> list[Answer]:
        """Whole answers; see `Client.generate`."""
        request, reading = _asked(prompt, params, n, fields, False, *await self._worker())
        call = self._stub.Generate(request, timeout=timeout, metadata=self._target.metadata)
        told = sorted([response.complete async for response in call], key=lambda complete: complete.index)
        return [reading.answer(complete) for complete in told]

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        **fields: Any,
    ) -> AsyncIterator[Piece]:
        """Pieces as they come; see `Client.stream`."""
        request, reading = _asked(prompt, params, n, fields, True, *await self._worker())
        call = self._stub.Generate(request, timeout=timeout, metadata=self._target.metadata)
        try:
            async for response in call:
                yield reading.piece(response)
        finally:
            call.cancel()

    async def info(self) -> pb.GetModelInfoResponse:
        """Of the model."""
        _, info = await self._worker()
        return info

    async def tokenizer(self) -> Tokenizer | None:
        """The workers'; None where they have none."""
        tokenizer, _ = await self._worker()
        return tokenizer

    async def loads(self) -> pb.SchedulerLoad:
        """Who runs and who waits, on one of the workers."""
        [load] = (await self._stub.GetLoads(pb.GetLoadsRequest(), metadata=self._target.metadata)).loads
        return load

    async def close(self) -> None:
        """End; requests under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def _worker(self) -> tuple[Tokenizer | None, pb.GetModelInfoResponse]:
        """The tokenizer and what is known of the model."""
        if self._known is None:
            metadata = self._target.metadata
            info = await self._stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata, wait_for_ready=True)
            try:
                call = self._stub.GetTokenizer(common_pb2.GetTokenizerRequest(), metadata=metadata)
                tokenizer = _unpacked([chunk async for chunk in call])
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                tokenizer = None
            self._known = tokenizer, info
        return self._known


def _asked(
    prompt: str | Sequence[int],
    params: SamplingParams | None,
    n: int,
    fields: dict[str, Any],
    stream: bool,
    tokenizer: Tokenizer | None,
    info: pb.GetModelInfoResponse,
) -> tuple[pb.GenerateRequest, Reading]:
    """A request, and what reads its responses.

    Raises:
        ValueError: a parameter out of range.
    """
    params = dataclasses.replace(params or SamplingParams(), **fields)
    params.validate(info.vocab_size)
    request = pb.GenerateRequest(request_id=uuid.uuid4().hex, stream=stream, sampling_params=message_of(params, n))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.input_ids.extend(prompt)
    eos = () if params.ignore_eos else info.eos_token_ids
    ends = frozenset((*eos, *params.stop_token_ids))
    return request, Reading(tokenizer, ends, params)


def _unpacked(chunks: Iterable[common_pb2.GetTokenizerChunk]) -> Tokenizer:
    """The tokenizer in an archive.

    Raises:
        ValueError: it is not what was sent.
    """
    chunks = list(chunks)
    content = b"".join(chunk.data for chunk in chunks)
    if hashlib.sha256(content).hexdigest() != chunks[-1].sha256:
        raise ValueError("the tokenizer's archive was damaged on its way; try again")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if name in archive.namelist():
                (Path(folder) / name).write_bytes(archive.read(name))
        return Tokenizer.from_dir(folder)
