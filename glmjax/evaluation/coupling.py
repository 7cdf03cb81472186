"""What shared noise costs: how often it accepts a draft, and how often token-level rejection sampling would.

A draft is drawn from q and the target's token from p. Both ways of accepting below emit exactly p; they differ in how
they couple the two draws, which is to say in the probability that draft and target are both token i.

**Rejection sampling** accepts draft i with probability min(1, pᵢ / qᵢ), so both are i with probability min(pᵢ, qᵢ). No
coupling accepts more often: the sum over i is 1 − the total variation distance of p and q. What it emits depends on
whether and how far one speculates.

**Shared noise**, ours, takes one Gumbel vector g and draws argmaxⱼ (log qⱼ + gⱼ) and argmaxⱼ (log pⱼ + gⱼ). Both are i
where for every j

    gⱼ − gᵢ ≤ min(log pᵢ − log pⱼ, log qᵢ − log qⱼ) = −log max(pⱼ / pᵢ, qⱼ / qᵢ).

So i is the argmax of gⱼ + log max(pⱼ / pᵢ, qⱼ / qᵢ), whose entry i is gᵢ + 0, and by Gumbel's rule (the argmax of
gⱼ + log wⱼ is i with probability wᵢ / Σⱼ wⱼ) that has the probability

    1 / Σⱼ max(pⱼ / pᵢ, qⱼ / qᵢ).

It is 0 where pᵢ or qᵢ is. The sum over i is at least (1 − d) / (1 + d) with the total variation distance d. Sorted by
qⱼ / pⱼ, the tokens up to i give pⱼ / pᵢ to the sum and those after it qⱼ / qᵢ, so that all entries take one sort.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from glmjax.evaluation.loops import before_loop
from glmjax.evaluation.rollout import Continued
from glmjax.glm import GLM
from glmjax.model.cache import ContiguousCache
from glmjax.model.transformer import Transformer
from glmjax.speculation import prefill


def rejection(p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The probability that both draws are each token, under rejection sampling.

    Args:
        p_BV: the target's probabilities.
        q_BV: the draft's.
    """
    return jnp.minimum(p_BV, q_BV)


def shared_noise(p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The probability that both draws are each token, under shared Gumbel noise: the module's formula.

    Args:
        p_BV: the target's probabilities; any of them may be 0, as after top-p.
        q_BV: the draft's.
    """
    ratio_BV = jnp.where((p_BV > 0) | (q_BV > 0), q_BV / p_BV, 0)  # a token that neither draws adds nothing anywhere
    order_BV = jnp.argsort(ratio_BV, axis=1)
    p_BV, q_BV = (jnp.take_along_axis(x, order_BV, axis=1) for x in (p_BV, q_BV))
    until_BV = jnp.cumsum(p_BV, axis=1)
    after_BV = jnp.pad(jnp.cumsum(q_BV[:, :0:-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    both_BV = jnp.where((p_BV > 0) & (q_BV > 0), 1 / (until_BV / p_BV + after_BV / q_BV), 0)
    return jnp.zeros_like(both_BV).at[jnp.arange(len(both_BV))[:, None], order_BV].set(both_BV)


COUPLINGS = {"shared noise": shared_noise, "rejection": rejection}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What one way of accepting comes to on given text.

    Attributes:
        after_accepted: share of drafts accepted at each position, of those before which all were; None without any.
        accept_length: tokens per verify step; None without a step.
    """

    after_accepted: tuple[float | None, ...]
    accept_length: float | None


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Ways of accepting, on the same text.

    Attributes:
        expected: of each way, by its name.
        observed: what happened when the text was made, under shared noise.
        rounds: how many were observed.
    """

    expected: dict[str, Expected]
    observed: Expected
    rounds: int

    @property
    def gain(self) -> float | None:
        """By what factor rejection sampling would emit more tokens per verify step."""
        ours, other = (self.expected[name].accept_length for name in COUPLINGS)
        return other / ours if ours else None


def coupling(
    glm: GLM, prompts: Sequence[np.ndarray], sequences: Sequence[Continued], num_draft: int, new_tokens: int
) -> Coupling:
    """Compare the ways of accepting on text that was sampled at temperature 1, without any sampling of drafts.

    Every emitted token of every sequence is the newest of a possible round. Of each such round the draft distributions
    are computed along the emitted text, which is what the drafts before are as long as they are accepted. Given the
    text, whether a draft is accepted is independent of the others: the emitted token i was the draft's, too, with
    probability both(i) / pᵢ. From this follows with what probability a round begins at each token, where the one before
    it ended, and so what a round accepts and emits on average. Nothing is estimated but the mean over texts, which are
    the same for all ways.

    Only rounds whose drafts all stand before the sequence loops are looked at.

    Args:
        glm: the model, with its MTP layer.
        prompts: tokens of each sequence's prompt, equally many.
        sequences: what was sampled after each.
        num_draft: drafts of a round.
        new_tokens: of each sequence to look at.
    """
    ends = np.array([before_loop(ids, new_tokens) for ids, _ in sequences])
    rounds = np.maximum(ends - num_draft, 0)  # possible ones: the first begins with the first emitted token
    observed = _observed(sequences, rounds, num_draft)
    ids_BT = np.stack(
        [
            np.array([*prompt, *ids, *[0] * new_tokens], np.int32)[: len(prompt) + new_tokens]
            for prompt, (ids, _) in zip(prompts, sequences, strict=True)
        ]
    )
    vocab = glm.tokenizer.vocab_size if glm.tokenizer else glm.config.vocab_size
    found = _along(glm.weights, ids_BT, prompt=len(prompts[0]), num_draft=num_draft, vocab=vocab)
    expected = {
        name: _expected(*(np.asarray(x, np.float64).transpose(2, 0, 1) for x in found[name]), rounds)
        for name in COUPLINGS
    }
    return Coupling(expected, *observed)


@functools.partial(jax.jit, static_argnames=("prompt", "num_draft", "vocab"))
def _along(
    model: Transformer, ids_BT: Int[Array, "B T"], *, prompt: int, num_draft: int, vocab: int
) -> dict[str, tuple[Float[Array, "S N B"], Float[Array, "S N B"]]]:
    """Of drafts n of rounds at newest tokens s, for each way: P(accepted), and P(accepted | the emitted token)."""
    batch, length = ids_BT.shape
    cache = ContiguousCache.create(model.config, batch, length, model.dtype, mtp=True)
    step = cache.step(jnp.broadcast_to(jnp.arange(length), ids_BT.shape))
    target_BTD, cache = prefill(model, cache, cache.tail_BD, ids_BT, step)

    def at(x: jax.Array, position: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, position, 1, axis=1)

    def probabilities(hidden_B1D: jax.Array) -> jax.Array:
        logits_BV = model.head(hidden_B1D)[:, 0]
        return jax.nn.softmax(jnp.where(jnp.arange(logits_BV.shape[1]) < vocab, logits_BV, -jnp.inf), axis=1)

    def one_round(cache: ContiguousCache, newest: jax.Array) -> tuple[ContiguousCache, Any]:
        """As `glmjax.speculation` drafts, but along the text; the first draft's row is the one that is committed."""
        hidden_B1D, selected = at(target_BTD, newest - 1), None
        out: dict[str, list[tuple[jax.Array, jax.Array]]] = {name: [] for name in COUPLINGS}
        for n in range(num_draft):
            step = cache.step(jnp.full((batch, 1), newest + n))
            drafted = model.draft(at(ids_BT, newest + n), hidden_B1D, cache, step, selected=selected)
            cache, hidden_B1D = drafted.cache, drafted.hidden_BTD
            if model.config.index_share_for_mtp_iteration:
                selected = drafted.selected
            p_BV, q_BV = probabilities(at(target_BTD, newest + n)), probabilities(hidden_B1D)
            emitted_B1 = at(ids_BT, newest + n + 1)
            emitted_p_B = jnp.maximum(jnp.take_along_axis(p_BV, emitted_B1, axis=1)[:, 0], jnp.finfo(p_BV.dtype).tiny)
            for name, both in COUPLINGS.items():
                both_BV = both(p_BV, q_BV)
                given_B = jnp.take_along_axis(both_BV, emitted_B1, axis=1)[:, 0] / emitted_p_B
                out[name].append((jnp.sum(both_BV, axis=1), given_B))
        return cache, {name: tuple(map(jnp.stack, zip(*each, strict=True))) for name, each in out.items()}

    return lax.scan(one_round, cache, jnp.arange(prompt, length - num_draft))[1]


def _expected(accept_BSN: np.ndarray, given_BSN: np.ndarray, rounds_B: np.ndarray) -> Expected:
    """Means over the rounds that there will be."""
    batch, starts, num_draft = accept_BSN.shape
    reached_BSN = np.cumprod(np.concatenate([np.ones((batch, starts, 1)), given_BSN], axis=2), axis=2)
    emits_BSN = reached_BSN - np.pad(reached_BSN[..., 1:], ((0, 0), (0, 0), (0, 1)))  # n + 1 tokens
    begins_BS = np.zeros((batch, starts + num_draft + 1))
    begins_BS[:, 0] = 1
    for s in range(starts):
        begins_BS[:, s + 1 : s + num_draft + 2] += begins_BS[:, s, None] * emits_BSN[:, s]
    begins_BS = begins_BS[:, :starts] * (np.arange(starts) < rounds_B[:, None])
    proposed_BSN = begins_BS[..., None] * reached_BSN[..., :-1]  # those that count, all before them being accepted
    accepted_BSN = proposed_BSN * accept_BSN
    proposed, accepted = proposed_BSN.sum((0, 1)), accepted_BSN.sum((0, 1))
    return _summary(float(begins_BS.sum()), proposed, accepted)


def _observed(sequences: Sequence[Continued], rounds_B: np.ndarray, num_draft: int) -> tuple[Expected, int]:
    """What the sequences' own rounds were, and how many."""
    counts = [
        count
        for (_, counts), rounds in zip(sequences, rounds_B, strict=True)
        for begin, count in zip(np.cumsum([0, *counts]), counts, strict=False)
        if begin < rounds
    ]
    reached = np.array([sum(count > n for count in counts) for n in range(num_draft + 1)], np.float64)
    return _summary(float(len(counts)), reached[:-1], reached[1:]), len(counts)


def _summary(rounds: float, proposed_N: np.ndarray, accepted_N: np.ndarray) -> Expected:
    shares = tuple(float(a / of) if of else None for a, of in zip(accepted_N, proposed_N, strict=True))
    return Expected(shares, float(1 + accepted_N.sum() / rounds) if rounds else None)
