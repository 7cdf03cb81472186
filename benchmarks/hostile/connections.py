"""What is sent on connections by who does not speak gRPC, or only nearly."""

from __future__ import annotations

import random
import struct

from benchmarks.hostile.attack import GENERATE, Attack, Source

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _CONTINUATION = 0, 1, 3, 4, 6, 9
"""Frames of HTTP/2 (RFC 9113, section 6)."""


def sockets(source: Source) -> Attack:
    """No HTTP/2, or the first bytes of it."""
    knocks = tuple(source.rng.choices(_beginnings(source.rng), k=8))
    return Attack("sockets", knocks=knocks, hold=source.patience)


def http2(source: Source) -> Attack:
    """Frames of HTTP/2 that make no sense."""
    told = _sequences(source.rng, GENERATE, source.request().SerializeToString())
    return Attack("HTTP/2", knocks=tuple(source.rng.choices(told, k=4)), hold=source.patience / 2)


def _beginnings(rng: random.Random) -> tuple[bytes, ...]:
    """No HTTP/2, or the first bytes of it.

    Args:
        rng: of those that are random.
    """
    hello = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + rng.randbytes(193)  # of TLS
    return (
        *(b"", _PREFACE[:10], _PREFACE, _PREFACE + bytes(3), hello, bytes(10_000), rng.randbytes(1000)),
        *(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", _PREFACE + rng.randbytes(1000)),
    )


def _sequences(rng: random.Random, path: str, message: bytes) -> tuple[bytes, ...]:
    """Frames of HTTP/2 that make no sense, and messages that their prefix is wrong about.

    Args:
        rng: of those that are random.
        path: of a method that streams.
        message: that it takes.
    """
    opened = _PREFACE + _frame(_SETTINGS, 0, 0, b"")
    call, length = opened + _headers(path, 1), struct.pack(">I", len(message))
    sent = _frame(_DATA, 1, 1, b"\0" + length + message)
    compressed = _frame(_DATA, 1, 1, b"\1" + length + message)
    many = range(1, 401, 2)
    return (
        call + _frame(_DATA, 1, 1, b"\0\xff\xff\xff\xff" + message),  # longer than what comes
        call + _frame(_DATA, 1, 1, 2 * (b"\0" + length + message) + b"\0\0"),  # two and a half
        call + _frame(_DATA, 0, 1, (b"\0" + length + message)[:7]),  # the rest never comes
        call + compressed,  # by nothing
        opened + _headers(path, 1, flags=5),  # no message
        opened + _headers(path, 1, grpc_timeout="99999999999H") + sent,
        opened + _headers(path, 1, grpc_timeout="-1x") + sent,
        opened + _headers(path, 1, grpc_encoding="nonsense") + compressed,
        opened + _headers(path, 1, content_type="text/html") + sent,
        opened + _headers(path, 2) + _headers(path, 1) + _frame(_DATA, 1, 3, b"x"),
        opened + b"".join(_headers(path, n) + _frame(_RESET, 0, n, b"\0\0\0\x08") for n in many),  # rapid reset
        opened + b"".join(_headers(path, n) for n in many),  # streams that stay
        opened + _frame(_PING, 0, 0, bytes(8)) * 500,
        opened + _frame(_SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),  # a window that is too large
        opened + _frame(_SETTINGS, 0, 0, b"\0\x04\0\0\0\0") + _headers(path, 1) + sent,  # and one of nothing
        opened + _frame(_CONTINUATION, 0, 1, b"x" * 16_000) * 10,  # of nothing
        opened + b"".join(_frame(rng.randrange(16), rng.randrange(256), 1, b"xxxx") for _ in range(50)),
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(path: str, stream: int, flags: int = 4, **more: str) -> bytes:
    """A frame of literals that are not indexed (RFC 7541, section 6.2.2)."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {name.replace("_", "-"): value for name, value in ({"content_type": "application/grpc"} | more).items()}
    block = (bytes([0, len(name)]) + name.encode() + bytes([len(of)]) + of.encode() for name, of in fields.items())
    return _frame(_HEADERS, flags, stream, b"".join(block))
