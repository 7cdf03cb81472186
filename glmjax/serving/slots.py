"""What the device keeps of running sequences between dispatches: a slot each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """W slots, donated to every program that changes them.

    A slot belongs to one request at a time, its generation says to which: a plan that names another generation finds an
    idle slot.

    Attributes:
        generation_B: int32.
        position_B: int32, of the newest token, which has no rows yet; −1 before the prompt has been read and after a stop token.
        token_B: int32, the newest token.
        tail_BD: hidden state after the final norm of the token before it.
        sampling: parameters and counts.
    """

    generation_B: Any
    position_B: Any
    token_B: Any
    tail_BD: Any
    sampling: SamplingState

    @classmethod
    def create(cls, slots: int, width: int, vocab: int, dtype: Any) -> Slots:
        """Idle slots.

        Args:
            slots: W.
            width: D.
            vocab: V.
            dtype: the model's.
        """
        idle = SamplingState.from_params([SamplingParams(temperature=0)] * slots, [()] * slots, vocab)
        return cls(
            generation_B=jnp.zeros(slots, jnp.int32),
            position_B=jnp.full(slots, -1, jnp.int32),
            token_B=jnp.zeros(slots, jnp.int32),
            tail_BD=jnp.zeros((slots, width), dtype),
            sampling=idle,
        )

    def __len__(self) -> int:
        return self.position_B.shape[0]

    def owned(self, slot_B: Int[Array, "B"], generation_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether slots are there and of these generations."""
        at_B = jnp.clip(slot_B, 0, len(self) - 1)
        return (slot_B == at_B) & (self.generation_B[at_B] == generation_B)

    def take(self, slot_B: Int[Array, "B"]) -> Slots:
        """Some slots; any slot's where the index is out of range."""
        at_B = jnp.clip(slot_B, 0, len(self) - 1)
        return jax.tree.map(lambda array: array[at_B], self)

    def put(self, slot_B: Int[Array, "B"], slots: Slots, keep_B: Bool[Array, "B"]) -> Slots:
        """With some of them written back, those to keep."""
        to_B = jnp.where(keep_B, slot_B, len(self))
        return jax.tree.map(lambda array, new: array.at[to_B].set(new, mode="drop"), self, slots)


def admit(slots: Slots, slot: Int[Array, ""], generation: Int[Array, ""], sampling: SamplingState) -> Slots:
    """With a slot given to a request, which has not read its prompt yet.

    Args:
        slots: donated.
        slot: which.
        generation: its new one.
        sampling: of one sequence; with counts of what it has emitted where it goes on.
    """
    idle = Slots(
        generation_B=generation[None],
        position_B=jnp.full(1, -1, jnp.int32),
        token_B=jnp.zeros(1, jnp.int32),
        tail_BD=jnp.zeros_like(slots.tail_BD[:1]),
        sampling=sampling,
    )
    return slots.put(slot[None], idle, jnp.ones(1, bool))
