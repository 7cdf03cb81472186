"""``python -m glmjax.client``: have a worker complete a prompt."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import grpc
import tyro

from glmjax.client.client import Client
from glmjax.sampling_flags import SamplingFlags

_INTERRUPTED = 130  # the shell's exit status for Ctrl-C


@dataclasses.dataclass(frozen=True)
class Arguments(SamplingFlags):
    """Complete a prompt by a worker; the text streams to standard output, a line of statistics ends it on standard error.

    Attributes:
        prompt: text to complete; if absent, standard input without its last newline.
        address: host:port of a worker, default 127.0.0.1:50051; may be given several times, with numeric hosts.
        api_key: that the worker asks for; default GLMJAX_API_KEY, else none.
        ca: PEM of the CA that the worker's certificate is from; without it the connection is not encrypted.
        certificate: PEM of a certificate of one's own, for mutual TLS.
        key: PEM of its private key.
        timeout: seconds after which to give up.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="PROMPT")]] = None
    address: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    api_key: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Ask; returns the exit status: 0, 1 after a message where the worker does not answer, 2 where it cannot, 130 after Ctrl-C.

    Args:
        argv: the command line; default the process's own.

    Raises:
        SystemExit: after --help (0) or flags that cannot be read (2).
    """
    arguments = tyro.cli(Arguments, prog="python -m glmjax.client", args=argv)
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt is None else arguments.prompt
    api_key = arguments.api_key or os.environ.get("GLMJAX_API_KEY") or None
    tls = {name: getattr(arguments, name) for name in ("ca", "certificate", "key")}
    try:
        with Client(*arguments.address, api_key=api_key, **tls) as client:
            print(prompt, end="", flush=True)
            return _told(client, prompt, arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"glmjax.client: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"\nglmjax.client: {error.code().name}: {error.details()}", file=sys.stderr)
        return 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1


def _told(client: Client, prompt: str, arguments: Arguments) -> int:
    began, first, count, piece = time.monotonic(), None, 0, None
    for piece in client.stream(prompt, arguments.sampling(), timeout=arguments.timeout):
        print(piece.text, end="", flush=True)
        count += len(piece.ids)
        first = first or time.monotonic()
    print(flush=True)
    seconds = time.monotonic() - began
    print(
        f"[{piece.prompt_tokens} prompt tokens, {piece.cached_tokens} of them cached, {count} new ({piece.finish_reason}); "
        f"first token after {first - began:.3f} s, {count / seconds:.1f} tokens/s]",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
