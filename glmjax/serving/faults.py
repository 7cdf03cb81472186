"""Races made on purpose, to see what becomes of them: a simulation, for tests and campaigns, off unless asked for.

Programs on one cache are ordered by data flow, so an engine on its own has none of these. In systems whose transfers run
beside the forward they have happened: sglang #24527, #27372 (a transfer writes into pages that have changed hands),
#22811 (a forward reads before the load has ended), #36738 (pages are freed while they are being copied).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glmjax.serving.records import Record


@dataclasses.dataclass(frozen=True)
class FaultRates:
    """How often each fault happens, of the times it could.

    Attributes:
        late_landing: a request gives up its pages while they are loaded, and the load lands all the same.
        forward_before_ready: what follows a prefix is read before the prefix has landed.
        retire_during_transfer: pages are retired, and change hands, before they have been collected.
        bit_flip: a bit of a stored record changes.
        delay: dispatches by which a landing or a collection comes late.
        versioned: whether leases, readiness and checksums are looked at. Without, this is an engine as others are.
        seed: of what happens when.
    """

    late_landing: float = 0.0
    forward_before_ready: float = 0.0
    retire_during_transfer: float = 0.0
    bit_flip: float = 0.0
    delay: int = 3
    versioned: bool = True
    seed: int = 0

    def __post_init__(self):
        rates = self.late_landing, self.forward_before_ready, self.retire_during_transfer, self.bit_flip
        if not all(0 <= rate <= 1 for rate in rates) or rates[0] + rates[1] > 1:
            raise ValueError(f"rates {rates} must be within 0..1, and the first two together, too")
        if self.delay < 1:
            raise ValueError(f"delay {self.delay} must be at least 1 dispatch")


class Faults:
    """What happens, drawn from a seed.

    Args:
        rates: how often.

    Attributes:
        made: how often each has happened, by name.
    """

    def __init__(self, rates: FaultRates | None):
        self._rates = rates or FaultRates()
        self._rng = np.random.default_rng(self._rates.seed)
        self.made = dict.fromkeys(("late_landing", "forward_before_ready", "retire_during_transfer", "bit_flip"), 0)

    @property
    def delay(self) -> int:
        """See `FaultRates`."""
        return self._rates.delay

    @property
    def versioned(self) -> bool:
        """See `FaultRates`."""
        return self._rates.versioned

    def of_landing(self) -> str | None:
        """What happens to a load that is about to land, or None."""
        return self._one_of("late_landing", "forward_before_ready")

    def of_collection(self) -> str | None:
        """What happens to a page that is about to be collected, or None."""
        return self._one_of("retire_during_transfer")

    def of_record(self, record: Record) -> Record:
        """The record as it is in memory, after whatever has happened to it."""
        if self._one_of("bit_flip") is None:
            return record
        latents = np.array(record.page.latents.values_LGAC)
        bits = latents.reshape(-1).view(np.uint8)
        bits[self._rng.integers(len(bits))] ^= np.uint8(1 << self._rng.integers(8))
        rows = dataclasses.replace(record.page.latents, values_LGAC=latents)
        return dataclasses.replace(record, page=dataclasses.replace(record.page, latents=rows))

    def _one_of(self, *names: str) -> str | None:
        drawn = self._rng.random() if any(getattr(self._rates, name) for name in names) else 1.0
        for name in names:
            if drawn < (rate := getattr(self._rates, name)):
                self.made[name] += 1
                return name
            drawn -= rate
        return None
