"""Messages that are none: whoever sends them is told so, as of any other request that cannot be served."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from glmjax.worker.statuses import REASON


class Malformed(NamedTuple):
    """Stands for a message that could not be read.

    Attributes:
        reason: in protobuf's words.
    """

    reason: str


class Decoding(grpc.aio.ServerInterceptor):
    """Refuses what cannot be read as INVALID_ARGUMENT; by itself gRPC would call it UNKNOWN, as if the worker were broken."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's handler, which gets messages that can be read."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        read = _reading(handler.request_deserializer)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _of_stream(handler.stream_stream), read, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _of_one(handler.unary_stream), read, handler.response_serializer
            )
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_of_one(handler.unary_unary), read, handler.response_serializer)
        return handler


def _reading(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tried(message: bytes) -> Any:
        try:
            return read(message)
        except DecodeError as error:
            return Malformed(str(error))

    return tried


def _of_one(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """What a method does with a message that could be read."""

    async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await _check(request, context)
        return await behaviour(request, context)

    async def answers(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await _check(request, context)
        async for response in behaviour(request, context):
            yield response

    return answers if inspect.isasyncgenfunction(behaviour) else answer


def _of_stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """What a method does with those of several messages that come before one that could not be read."""

    async def answers(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async def checked() -> AsyncIterator[Any]:
            async for request in requests:
                await _check(request, context)
                yield request

        async for response in behaviour(checked(), context):
            yield response

    return answers


async def _check(request: Any, context: grpc.aio.ServicerContext) -> None:
    if isinstance(request, Malformed):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason, ((REASON, "invalid"),))
