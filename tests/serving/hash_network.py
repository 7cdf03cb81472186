"""A network whose next token is a hash of everything before it, read back from the cache: any wrong row changes it.

It has the interface of `glmjax.model.transformer.Transformer` and every kind of row: latents of two layers, index keys of
both, and the MTP layer's. All of it is integers below 2²³, exact in float32, and can be had from the tokens alone
(`Oracle`).

    layer 0   row p holds residues of a hash of (token p, p); attention to all rows gives their mean, times their count
              the sum S of the prefix
    layer 1   row p and its index key hold residues of a hash of S; attention to the K best keys gives the sum Z of what
              was selected: another selection, or a wrong row in it, gives another Z
    token     a hash of S, moved on by 0, 1 or 2 as Z says
    draft     row p holds residues of a hash of (token p, S and Z of p − 1); the guess is the hash of S, moved on by 0, 1
              or 2 as the sum of these rows says, and so right one time in three. Z is known to the first step only, so
              rows of later steps are provisional
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.cache import Step
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Hidden

VOCAB, TOPK, WIDTH = 1021, 6, 9
CONFIG = GlmConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=1,
    q_lora_rank=4,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    intermediate_size=4,
    moe_intermediate_size=4,
    n_routed_experts=1,
    num_experts_per_tok=1,
    mlp_layer_types=("dense", "dense"),
    indexer_types=("full", "full"),
    index_topk=TOPK,
    index_n_heads=1,
    index_head_dim=2,
    max_position_embeddings=1024,
    num_nextn_predict_layers=1,
)
_PRIMES = (251, 241, 239, 233)


def mix(*parts: Any) -> Any:
    """A hash, uint32, of integers; of NumPy's or JAX's alike."""
    of = jnp if any(isinstance(part, jax.Array) for part in parts) else np
    code = of.full(1, 2166136261, of.uint32)
    for part in parts:
        code = (code ^ of.asarray(part).astype(of.uint32)) * of.uint32(16777619)
        code = code ^ (code >> of.uint32(13))
    return code if any(np.ndim(part) for part in parts) else code[0]


def residues(code: Any) -> list[Any]:
    """Four small numbers that tell hashes apart."""
    return [code % np.uint32(prime) for prime in _PRIMES]


def key_of(code: Any) -> list[Any]:
    """What an index key holds."""
    return [code % np.uint32(997), (code >> np.uint32(10)) % np.uint32(991)]


def query_of(code: Any) -> list[Any]:
    """What an index query holds."""
    return [1 + code % np.uint32(7), 1 + (code >> np.uint32(5)) % np.uint32(7)]


def moved_on(s_4: Any, z_4: Any) -> Any:
    """The token after a prefix."""
    return (mix(*s_4) + mix(*z_4) % np.uint32(3)) % np.uint32(VOCAB)


@dataclasses.dataclass(frozen=True)
class HashNetwork:
    """See the module. Hidden states are [S (4) | Z (4) | token]."""

    config: GlmConfig = CONFIG
    dtype: Any = jnp.float32
    mtp: bool = True

    def backbone(self, ids_BT: jax.Array, cache: Any, step: Step) -> Hidden:
        """As `Transformer.backbone`."""
        cache = _written(cache, 0, residues(mix(ids_BT, step.positions_BT)), [0, 0], step)
        s_4BT = _summed(cache, 0, cache.capacity, [1, 1], step)
        code_BT = mix(*s_4BT)
        cache = _written(cache, 1, residues(code_BT), key_of(code_BT), step)
        z_4BT = _summed(cache, 1, TOPK, query_of(code_BT), step)
        return Hidden(_stacked(*s_4BT, *z_4BT, moved_on(s_4BT, z_4BT)), cache, (), None)

    def draft(
        self, ids_BT: jax.Array, previous_BTD: jax.Array, cache: Any, step: Step, *, selected: Any = None
    ) -> Hidden:
        """As `Transformer.draft`."""
        step = step.mtp()
        before_8BT = list(jnp.moveaxis(previous_BTD[..., :8], -1, 0).astype(jnp.uint32))
        cache = _written(cache, 2, residues(mix(ids_BT, *before_8BT)), [0, 0], step)
        rows_4BT = _summed(cache, 2, cache.capacity, [1, 1], step)
        own_4BT = residues(mix(ids_BT, step.positions_BT))
        s_4BT = [before + own for before, own in zip(before_8BT[:4], own_4BT, strict=True)]
        unknown_4BT = [jnp.zeros_like(s_4BT[0])] * 4
        return Hidden(_stacked(*s_4BT, *unknown_4BT, moved_on(s_4BT, rows_4BT)), cache, (), None)

    def head(self, hidden: jax.Array) -> jax.Array:
        """As `Transformer.head`: the token stands out."""
        return 10.0 * jax.nn.one_hot(hidden[..., 8].astype(jnp.int32), VOCAB)


def _stacked(*parts: jax.Array) -> jax.Array:
    return jnp.stack([jnp.asarray(part).astype(jnp.float32) for part in parts], axis=-1)


def _written(cache: Any, layer: int, row: list[Any], key: list[Any], step: Step) -> Any:
    shape = step.positions_BT.shape
    row_BTC = _stacked(*(jnp.broadcast_to(part, shape) for part in [*row, 0, 0]))
    key_BTJ = _stacked(*(jnp.broadcast_to(part, shape) for part in key))
    return cache.append(layer, row_BTC, step).append_index(layer, key_BTJ, step)


def _summed(cache: Any, layer: int, k: int, query: list[Any], step: Step) -> list[jax.Array]:
    """The sum over the k best rows: attention with queries of zero is their mean."""
    shape = step.positions_BT.shape
    q_BT1J = _stacked(*(jnp.broadcast_to(part, shape) for part in query))[:, :, None]
    selected = cache.select(layer, q_BT1J, jnp.ones((*shape, 1)), step, k)
    count_BT = jnp.sum(selected if selected.dtype == bool else selected >= 0, axis=-1)
    mean_BT1R = cache.attend(layer, jnp.zeros((*shape, 1, 6)), selected, step, scale=1.0, value_width=4)
    sum_BTR = jnp.round(mean_BT1R[:, :, 0] * count_BT[..., None])
    return list(jnp.moveaxis(sum_BTR, -1, 0).astype(jnp.uint32))


class Known(NamedTuple):
    """What a cache holds of a sequence.

    Attributes:
        latents_LSR: of both layers and the MTP layer, without their rotary part.
        index_keys_LSJ: likewise.
        hidden_SD: after the final norm.
    """

    latents_LSR: np.ndarray
    index_keys_LSJ: np.ndarray
    hidden_SD: np.ndarray


class Oracle:
    """What the network says, from the tokens alone.

    Args:
        ids: a sequence.
    """

    def __init__(self, ids: Any):
        self.ids = np.asarray(ids, np.uint32)
        position_S = np.arange(len(self.ids), dtype=np.uint32)
        self.s_S4 = np.cumsum(np.stack(residues(mix(self.ids, position_S)), -1), axis=0, dtype=np.uint32)
        code_S = mix(*self.s_S4.T)
        row_S4, key_S2, query_S2 = (np.stack(of(code_S), -1).astype(np.int64) for of in (residues, key_of, query_of))
        chosen = [
            np.argsort(-(key_S2[: p + 1] @ query_S2[p]), kind="stable")[:TOPK] for p in range(len(self.ids))
        ]  # of equals, the lower position
        self.z_S4 = np.array([row_S4[best].sum(0) for best in chosen], np.uint32).reshape(-1, 4)
        self.token_S = moved_on(self.s_S4.T, self.z_S4.T)
        both_S8 = np.concatenate([self.s_S4, self.z_S4], 1)
        self._draft_S4 = np.stack(residues(mix(self.ids, *np.pad(both_S8, ((1, 0), (0, 0)))[:-1].T)), -1)
        own_S4, none_S2 = np.stack(residues(mix(self.ids, position_S)), -1), np.zeros_like(key_S2)
        self.known = Known(
            np.stack([own_S4, row_S4, self._draft_S4]).astype(np.float32),
            np.stack([none_S2, key_S2, none_S2]).astype(np.float32),
            np.concatenate([both_S8, self.token_S[:, None]], 1).astype(np.float32),
        )

    def following(self, count: int) -> list[int]:
        """The next tokens."""
        ids = self.ids.tolist()
        for _ in range(count):
            ids.append(int(Oracle(ids).token_S[-1]))
        return ids[len(self.ids) :]

    def round(self, num_draft: int) -> list[int]:
        """What one round emits where there is room: the right guesses, and one token more."""
        n, rows_4 = len(self.ids) - 1, self._draft_S4[1:].sum(0, dtype=np.uint32)
        s_4, guesses = self.s_S4[-1], []
        for i in range(num_draft):
            guesses.append(int(moved_on(s_4, rows_4)))
            rows_4 = rows_4 + np.array(residues(mix(guesses[-1], *s_4, *[0] * 4)), np.uint32)
            s_4 = s_4 + np.array(residues(mix(guesses[-1], n + 1 + i)), np.uint32)
        wanted = self.following(num_draft + 1)
        right = next((i for i in range(num_draft) if guesses[i] != wanted[i]), num_draft)
        return wanted[: right + 1]

    def along(self, guesses: list[int], forced: bool) -> tuple[list[int], list[bool]]:
        """What a chain of guesses gives where there is room, and which of it is what would have been drawn."""
        emitted, drawn = [], []
        for guess in [*guesses, None]:
            [wanted] = Oracle([*self.ids, *emitted]).following(1)
            emitted.append(wanted if guess is None or not forced else guess)
            drawn.append(emitted[-1] == wanted)
            if emitted[-1] != guess:
                break
        return emitted, drawn
