"""All kinds of attack, and how often each is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from benchmarks.hostile import calls, connections, crowds, demands, messages
from benchmarks.hostile.attack import GENERATE, Attack, Call, Source

_OVERSIZED = (16 << 20) + 1  # bytes, one more than a worker takes


def attacks(source: Source, requests: int) -> Iterator[Attack]:
    """So many requests; two of them are larger than a worker takes.

    Args:
        source: what they are drawn from.
        requests: calls and connections in all.
    """
    kinds, weights = zip(*_WEIGHTS.items(), strict=True)
    left, attack = requests, Attack("oversized", (Call(GENERATE, bytes(_OVERSIZED)),) * 2, at_once=False)
    while left > 0:
        attack = dataclasses.replace(attack, calls=attack.calls[:left], knocks=attack.knocks[:left])
        yield attack
        left -= len(attack)
        attack = source.rng.choices(kinds, weights)[0](source)


_WEIGHTS: dict[Callable[[Source], Attack], float] = {
    messages.random_bytes: 8,
    messages.mutated: 10,
    messages.bad_text: 4,
    messages.methods: 4,
    messages.metadata: 4,
    demands.fields: 25,
    demands.parameters: 10,
    demands.prompts: 10,
    demands.grammars: 20,
    crowds.aborts: 2,
    crowds.same_id: 2,
    crowds.cancelled: 3,
    crowds.deadlines: 3,
    crowds.floods: 1,
    crowds.slow_readers: 1,
    crowds.closed_channels: 2,
    connections.sockets: 1,
    connections.http2: 2,
    calls.other_calls: 8,
    calls.health_and_reflection: 4,
    calls.profiles: 0.3,
}
"""How often each is drawn. Those of many calls are drawn less often, and so are traces, which slow everything down."""
