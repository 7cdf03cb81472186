"""Messages that are none, and calls that nobody serves."""

from __future__ import annotations

from benchmarks.hostile.attack import GENERATE, Attack, Call, Source
from glmjax.worker.protocol import SERVICE

_SAFE = ("Generate", "Embed", "HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer")
"""Methods that may be sent anything: whatever it is read as, nothing is written anywhere."""


def random_bytes(source: Source) -> Attack:
    """To a method that takes messages."""
    path = f"/{SERVICE}/{source.rng.choice(_SAFE)}"
    return Attack("random bytes", (Call(path, source.rng.randbytes(source.rng.choice((0, 1, 2, 10, 100, 10_000)))),))


def mutated(source: Source) -> Attack:
    """A valid request with some bytes changed, left out, put in, cut off or doubled."""
    rng = source.rng
    request = source.request(temperature=0.7, stop=["x", "yz"], logit_bias={1: 1.0}, json_schema='{"type": "object"}')
    message = bytearray(request.SerializeToString())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(message)) if message else 0
        match rng.randrange(5):
            case 0 if message:
                message[at] ^= 1 << rng.randrange(8)
            case 1:
                del message[at : at + rng.randint(1, 4)]
            case 2:
                message[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                del message[at:]
            case _:
                message += message[at:]
    return Attack("mutated", (Call(GENERATE, bytes(message)),))


def bad_text(source: Source) -> Attack:
    """Strings that are not UTF-8, in a field of every depth."""
    bad = source.rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"a\xf4\x90\x80\x80", b"\xe2\x82"))
    text = bytes([source.rng.choice((0x1A, 0x0A)), len(bad)]) + bad  # text, request_id
    regex = b"\x8a\x01" + bytes([len(bad)]) + bad
    nested = b"\x1a\x01x" + b"\x22" + bytes([len(regex)]) + regex  # sampling_params.regex
    return Attack("bad UTF-8", (Call(GENERATE, source.rng.choice((text, nested))),))


def methods(source: Source) -> Attack:
    """Calls of methods that are not there, and of others with a message that is not theirs."""
    odd = (f"/{SERVICE}/Nothing", f"/{SERVICE}/", f"{GENERATE}/", f"/{'a' * 4000}/b")
    paths = ("/", "/x/y/z", "/\xe4/b", GENERATE, *odd)
    calls = (
        Call(source.rng.choice(paths), source.request().SerializeToString()),
        Call(f"/{SERVICE}/{source.rng.choice(_SAFE)}", source.request().SerializeToString()),
    )
    return Attack("methods", calls)


def metadata(source: Source) -> Attack:
    """Headers that are too long, too many, or none."""
    odd = (
        (("x", "y" * 7000),),
        (("x", "y" * 100_000),),
        tuple((f"x{n}", "y") for n in range(300)),
        (("traceparent", "00-zz-zz-zz"),),
        (("traceparent", f"00-{'0' * 32}-{'0' * 16}-ff"), ("tracestate", "=,=,")),
        (("x-bin", b"\x00\xff\xfe"),),
        (("authorization", "Bearer "), ("authorization", "Basic \x7e")),
    )
    return Attack("metadata", (Call(GENERATE, source.request().SerializeToString(), metadata=source.rng.choice(odd)),))
