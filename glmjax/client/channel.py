"""The way to one or several workers, which gRPC itself balances and tries again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

_MESSAGE_BYTES = 64 << 20
_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Target:
    """Where workers are, and how to speak to them.

    Attributes:
        addresses: host:port of each; calls go to all of them in turn.
        api_key: that calls carry, or None.
        ca: PEM of the CA that the workers' certificates are from: TLS; None for none.
        certificate: PEM of the client's own, for mutual TLS.
        key: PEM of its private key.
    """

    addresses: tuple[str, ...] = ("127.0.0.1:50051",)
    api_key: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def channel(self, kind: Any) -> Any:
        """A channel of `grpc` or `grpc.aio`.

        Raises:
            OSError: a file cannot be read.
        """
        name = _name(self.addresses)
        if self.ca is None:
            return kind.insecure_channel(name, options=_OPTIONS)
        pair = [None if path is None else path.read_bytes() for path in (self.key, self.certificate)]
        return kind.secure_channel(name, grpc.ssl_channel_credentials(self.ca.read_bytes(), *pair), options=_OPTIONS)


def _name(addresses: Sequence[str]) -> str:
    """As gRPC resolves it: several addresses must be numeric."""
    if not addresses:
        raise ValueError("there are no addresses; give host:port of a worker")
    return addresses[0] if len(addresses) == 1 else f"ipv4:{','.join(addresses)}"


_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "vllm.grpc.engine.VllmEngine"}],
            # What ends before its first message is tried again, elsewhere where there are others.
            "retryPolicy": {
                "maxAttempts": _ATTEMPTS,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}
_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
)
