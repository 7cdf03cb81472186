"""From logits to tokens: penalties, truncation and Gumbel sampling for the slots of a step.

Everything here is a pure function of arrays. Parameters are data, so that one compiled step serves any mixture of
requests, and each row depends on its own slot alone. Letters: B slots, V vocabulary, U reported alternatives.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from glmjax.model.sampling_state import SamplingState

_FLOAT32 = jnp.finfo(jnp.float32)


class Logprobs(NamedTuple):
    """Log-probabilities at one position of B slots.

    Attributes:
      emitted_B: float32 [B], of the emitted token.
      rank_B: int32 [B], the emitted token's place among all, 1 = most likely; of equals, the lower id comes first.
      top_ids_BU: int32 [B, U], the U most likely tokens in that order.
      top_BU: float32 [B, U], their log-probabilities.
    """

    emitted_B: Float32[Array, "B"]
    rank_B: Int32[Array, "B"]
    top_ids_BU: Int32[Array, "B U"]
    top_BU: Float32[Array, "B U"]


@jax.named_scope("process_logits")
def process(logits_BV: Float[Array, "B V"], state: SamplingState) -> Float32[Array, "B V"]:
    """Logits after what each slot asked for, in this order.

    1. Repetition penalty over tokens of prompt or output: positive logits are divided by it, negative multiplied.
    2. Frequency penalty times occurrences in the output, and presence penalty if there are any, are subtracted.
    3. The logit bias is added.
    4. Temperature: divided by it. The row's maximum is subtracted first, which leaves the distribution as it is and
       keeps the noise of `sample` significant next to logits of any size; so a sampled slot's largest is 0.
    5. Top-k: the k largest stay; of equals, the lowest ids.
    6. Top-p: of what is left, the smallest set of most likely tokens whose mass reaches p, with the one that crosses it.
    7. Min-p: of what is left, tokens at least min_p times as likely as the most likely one.

    Excluded tokens become -inf; the most likely one (lowest id of equals) always stays. Greedy slots (temperature 0) end
    at step 3. Ranks are those before step 4, so rounding in the division makes no ties. The sort is done only in steps
    where some slot needs it. -inf in `logits_BV` stays -inf and never becomes NaN; a row of -inf alone stays as it is.

    Args:
      logits_BV: any float type; computed in float32. NaN is the caller's to catch: what becomes of such a row is not specified.
      state: B slots over the same V.
    """
    logits_BV = _bounded(logits_BV, logits_BV)
    penalised_BV = _bounded(_penalise(logits_BV, state), logits_BV)
    greedy_B = state.temperature_B == 0

    scaled_BV = _from_max(penalised_BV) / jnp.where(greedy_B, 1, state.temperature_B)[:, None]
    value_B, id_B = _last_kept(penalised_BV, scaled_BV, state)
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    keep_BV = (penalised_BV > value_B[:, None]) | ((penalised_BV == value_B[:, None]) & (ids_V <= id_B[:, None]))
    keep_BV &= scaled_BV >= jnp.log(state.min_p_B)[:, None]  # the largest is 0; log(0) = -inf keeps all
    return jnp.where(greedy_B[:, None], penalised_BV, jnp.where(keep_BV, scaled_BV, -jnp.inf))


@jax.named_scope("gumbel_noise")
def gumbel_noise(seed_B: UInt32[Array, "B"], position_B: Int[Array, "B"], vocab: int) -> Float32[Array, "B {vocab}"]:
    """One standard Gumbel vector per (seed, position), a function of these two alone.

    It does not depend on the slot, the batch or how many steps led here. Draft and target add the same vector at the
    same position, which is why speculation does not change what is sampled.

    The generator is named, not taken from JAX's configuration. Its mode "high" spends 64 bits on each value: 23 bits,
    the default, end at 16 and tie too often among 154,880 tokens.

    Args:
      seed_B: each sequence's seed.
      position_B: index in the sequence of the token that is drawn (the prompt's length for the first one).
      vocab: V.
    """

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position.astype(jnp.uint32))
        return jax.random.gumbel(key, (vocab,), jnp.float32, mode="high")

    return jax.vmap(row)(seed_B, position_B)


@jax.named_scope("sample")
def sample(logits_BV: Float[Array, "B V"], state: SamplingState, position_B: Int[Array, "B"]) -> Int32[Array, "B"]:
    """Draw one token per slot: argmax of the processed logits plus Gumbel noise, an exact sample of their softmax.

    Greedy slots get no noise. Of equals, the lowest id wins; a row of -inf alone gives token 0. A bias of -inf bars a
    token at every temperature. `position_B` is as for `gumbel_noise`.
    """
    return jnp.argmax(noisy(logits_BV, state, position_B), axis=1).astype(jnp.int32)


def noisy(logits_BV: Float[Array, "B V"], state: SamplingState, position_B: Int[Array, "B"]) -> Float32[Array, "B V"]:
    """What `sample` takes the largest of.

    Tokens that end a sequence are barred before its least length, unless nothing else is left: a grammar may be at its end.
    """
    barred_BV = state.bias_BV == -jnp.inf  # added to a logit, it would be bounded as every other bias is
    logits_BV = jnp.where(barred_BV, -jnp.inf, logits_BV)
    going_on_BV = jnp.where(state.ends_BV & (position_B < state.least_B)[:, None], -jnp.inf, logits_BV)
    goes_on_B = jnp.any(going_on_BV > -jnp.inf, axis=1)
    processed_BV = process(jnp.where(goes_on_B[:, None], going_on_BV, logits_BV), state)
    greedy_B = state.temperature_B == 0

    def with_noise() -> jax.Array:
        noise_BV = gumbel_noise(state.seed_B, position_B, logits_BV.shape[1])
        return processed_BV + jnp.where(greedy_B[:, None], 0, noise_BV)

    return jax.lax.cond(jnp.all(greedy_B), lambda: processed_BV, with_noise)


@jax.named_scope("allow")
def allow(logits_BV: Float[Array, "*B V"], allowed_BW: Int32[Array, "*B W"]) -> Float[Array, "*B V"]:
    """Logits of the tokens that a mask allows, -inf for the others: before everything else, it makes sampling that of the
    distribution given what is allowed.

    Args:
      logits_BV: what the model gave.
      allowed_BW: token v is bit v mod 32 of word v // 32.
    """
    bits_BW32 = (allowed_BW[..., None] >> jnp.arange(32)) & 1
    bits_BV = bits_BW32.reshape(*allowed_BW.shape[:-1], -1)[..., : logits_BV.shape[-1]]
    return jnp.where(bits_BV > 0, logits_BV, -jnp.inf)


@jax.named_scope("logprobs")
def logprobs(logits_BV: Float[Array, "B V"], token_B: Int[Array, "B"], n: int) -> Logprobs:
    """Log-softmax of the raw logits at the emitted tokens, and the `n` most likely tokens.

    Raw means before penalties, bias, temperature and truncation, as vLLM reports by default (`raw_logprobs`): the
    model's opinion, not the sampler's. A slot whose logits are all -inf reports -inf.

    Args:
      logits_BV: what the model gave, any float type.
      token_B: the emitted tokens.
      n: U, static, 0..V.

    Raises:
      ValueError: n is outside 0..V.
    """
    slots, vocab = logits_BV.shape
    if not 0 <= n <= vocab:
        raise ValueError(
            f"logprobs n {n} is outside [0, {vocab}]; ask for at most as many as the vocabulary has tokens"
        )
    logits_BV = _bounded(logits_BV, logits_BV)
    logits_BV = jnp.where(logits_BV == 0, 0, logits_BV)  # lax.top_k would put -0.0 after 0.0
    shifted_BV = _from_max(logits_BV)
    # The sum is at least 1 but for rows of -inf, where log(1) leaves -inf.
    logprob_BV = shifted_BV - jnp.log(jnp.maximum(jnp.exp(shifted_BV).sum(1, keepdims=True), 1))

    slots_B = jnp.arange(slots)
    value_B = logits_BV[slots_B, token_B]
    ids_V = jnp.arange(vocab)
    before_BV = (logits_BV > value_B[:, None]) | ((logits_BV == value_B[:, None]) & (ids_V < token_B[:, None]))
    _, top_ids_BU = jax.lax.top_k(logits_BV, n)
    return Logprobs(
        emitted_B=logprob_BV[slots_B, token_B],
        rank_B=1 + before_BV.sum(1, dtype=jnp.int32),
        top_ids_BU=top_ids_BU,
        top_BU=jnp.take_along_axis(logprob_BV, top_ids_BU, axis=1),
    )


def observe(state: SamplingState, token_B: Int[Array, "B"], active_B: Bool[Array, "B"]) -> SamplingState:
    """State after slots where `active_B` emitted `token_B`; the others stay as they are, whatever their token."""
    slots_B = jnp.arange(token_B.shape[0])
    return replace(state, counts_BV=state.counts_BV.at[slots_B, token_B].add(active_B.astype(jnp.int32)))


def _penalise(logits_BV: Float32[Array, "B V"], state: SamplingState) -> Float32[Array, "B V"]:
    """Steps 1 to 3 of `process`; may overflow to an infinity, never to NaN."""
    counts_BV = state.counts_BV
    repetition_B1 = state.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(state.prompt_BV | (counts_BV > 0), repeated_BV, logits_BV)
    penalty_BV = state.frequency_B[:, None] * counts_BV + state.presence_B[:, None] * (counts_BV > 0)
    return logits_BV - penalty_BV + state.bias_BV


def _bounded(values_BV: Float[Array, "B V"], logits_BV: Float[Array, "B V"]) -> Float32[Array, "B V"]:
    """Float32 with overflow clipped to the finite numbers, and -inf exactly where `logits_BV` is -inf."""
    values_BV = jnp.clip(values_BV.astype(jnp.float32), _FLOAT32.min, _FLOAT32.max)
    return jnp.where(logits_BV == -jnp.inf, -jnp.inf, values_BV)


def _from_max(logits_BV: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """Logits minus their row's maximum; a row of -inf alone stays -inf."""
    max_B = logits_BV.max(axis=1)
    return logits_BV - jnp.where(max_B == -jnp.inf, 0, max_B)[:, None]


def _last_kept(
    logits_BV: Float32[Array, "B V"], scaled_BV: Float32[Array, "B V"], state: SamplingState
) -> tuple[Float32[Array, "B"], Int32[Array, "B"]]:
    """Value and id of the last token that top-k and top-p keep in the order (value descending, id ascending).

    Both keep a prefix of that order, so its last element says all and nothing is scattered back.
    Slots that ask for neither get (-inf, V - 1), the end of any order.
    """
    slots, vocab = logits_BV.shape
    asks_B = (state.temperature_B > 0) & ((state.top_k_B < vocab) | (state.top_p_B < 1))
    end_B = (jnp.full(slots, -jnp.inf, jnp.float32), jnp.full(slots, vocab - 1, jnp.int32))

    def ranked() -> tuple[jax.Array, jax.Array]:
        ids_BV = jax.lax.broadcasted_iota(jnp.int32, (slots, vocab), 1)
        # Dividing by the temperature keeps the order, so the scaled logits come along sorted.
        key_BV, ids_BV, sorted_BV = jax.lax.sort((-logits_BV, ids_BV, scaled_BV), num_keys=1, is_stable=True)
        in_k_BV = jnp.arange(vocab) < state.top_k_B[:, None]
        mass_BV = jnp.cumsum(jnp.where(in_k_BV, jnp.exp(sorted_BV), 0), axis=1)
        before_BV = jnp.pad(mass_BV[:, :-1], ((0, 0), (1, 0)))
        reached_B = jnp.sum(before_BV < (state.top_p_B * mass_BV[:, -1])[:, None], axis=1)
        count_B = jnp.minimum(state.top_k_B, jnp.where(state.top_p_B < 1, reached_B, vocab))
        last_B1 = jnp.maximum(count_B, 1)[:, None] - 1
        value_B = -jnp.take_along_axis(key_BV, last_B1, axis=1)[:, 0]
        id_B = jnp.take_along_axis(ids_BV, last_B1, axis=1)[:, 0]
        return jnp.where(asks_B, value_B, end_B[0]), jnp.where(asks_B, id_B, end_B[1])

    return jax.lax.cond(jnp.any(asks_B), ranked, lambda: end_B)
