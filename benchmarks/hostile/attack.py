"""What an attack is, and what it is drawn from."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from smg_grpc_proto import vllm_engine_pb2 as pb

from glmjax.worker.protocol import SERVICE

GENERATE = f"/{SERVICE}/Generate"
SECONDS = 20.0
"""The deadline of most calls."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as it goes over the wire.

    Attributes:
        path: of the method.
        message: bytes that need not be one.
        seconds: its deadline.
        reads: messages after which the client reads no more; None to read all.
        metadata: headers.
    """

    path: str
    message: bytes
    seconds: float = SECONDS
    reads: int | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()


@dataclasses.dataclass(frozen=True)
class Attack:
    """Calls and connections that belong together.

    Attributes:
        kind: in the report.
        calls: to make.
        knocks: what is sent on connections that are not gRPC's.
        at_once: begin all calls before any is read; otherwise one ends before the next.
        hold: seconds that knocks, and calls that are not read to their end, stay open.
        closes: the calls have a channel of their own, which is closed while they are under way.
    """

    kind: str
    calls: tuple[Call, ...] = ()
    knocks: tuple[bytes, ...] = ()
    at_once: bool = True
    hold: float = 0.0
    closes: bool = False

    def __len__(self) -> int:
        return len(self.calls) + len(self.knocks)


@dataclasses.dataclass(frozen=True)
class Source:
    """What attacks are drawn from.

    Attributes:
        rng: whose seed fixes them.
        vocab: V of the model.
        context: most tokens of a sequence.
        folder: for traces; nothing is written elsewhere.
        patience: seconds that slow clients take.
        depth: of the deepest grammars.
    """

    rng: random.Random
    vocab: int
    context: int
    folder: Path
    patience: float = 2.0
    depth: int = 10_000

    def request(self, length: int = 12, **sampling: object) -> pb.GenerateRequest:
        """A valid one, unless `sampling` is not."""
        ids = [self.rng.randrange(self.vocab) for _ in range(self.rng.randint(1, length))]
        fields = {"max_tokens": self.rng.randint(1, 8), "seed": self.rng.randrange(1 << 30)} | sampling
        return pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(**fields),
            stream=self.rng.random() < 0.5,
        )

    def endless(self, name: str = "") -> bytes:
        """A long stream of large messages."""
        request = self.request(max_tokens=self.context, ignore_eos=True, logprobs=20)
        request.stream, request.request_id = True, name
        return request.SerializeToString()
