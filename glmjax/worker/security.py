"""Who may call: certificates for the connection, and a token for the call."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import grpc

_OPEN = "/grpc.health.v1.Health/"
"""Probes carry no token."""


def credentials(certificate: Path | None, key: Path | None, clients: Path | None) -> grpc.ServerCredentials | None:
    """TLS, mutual where a CA for clients is given; None without a certificate.

    Args:
        certificate: chain of the server's, PEM.
        key: its private key, PEM.
        clients: certificates of the CAs that clients must be known to, PEM.

    Raises:
        ValueError: one is given without the others that it needs.
        OSError: a file cannot be read.
    """
    if certificate is None and key is None and clients is None:
        return None
    if certificate is None or key is None:
        raise ValueError("TLS needs both --ssl-certfile and --ssl-keyfile; give the other one, too")
    pair = key.read_bytes(), certificate.read_bytes()
    roots = None if clients is None else clients.read_bytes()
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


class Bearer(grpc.aio.ServerInterceptor):
    """Lets calls pass whose metadata have ``authorization: Bearer TOKEN``, and probes.

    Args:
        token: the secret.
    """

    def __init__(self, token: str):
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's handler, or one that refuses it."""
        handler = await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        known = hmac.compare_digest(given, self._expected)
        if handler is None or known or handler_call_details.method.startswith(_OPEN):
            return handler
        return _refusing(handler)


def _refusing(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same kind that refuses."""

    async def refuse(_: object, context: grpc.aio.ServicerContext) -> NoReturn:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "the call has no valid token; send authorization: Bearer TOKEN"
        )

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    kind = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return kind(refuse, handler.request_deserializer, handler.response_serializer)
