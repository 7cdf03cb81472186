"""The network: one forward for training, prefill, decode, verification and drafting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from glmjax.model.attention import Attention
from glmjax.model.cache import Cache, Step
from glmjax.model.config import GlmConfig
from glmjax.model.indexer import Indexer
from glmjax.model.layers import Rope, swiglu
from glmjax.model.moe import Experts
from glmjax.model.pattern import LayerIndex, layer_indices, mtp_index, segments
from glmjax.model.weights import Declare
from glmjax.pallas.project import project
from glmjax.pallas.rms_norm import rms_norm
from glmjax.pallas.selection import Selection, nothing
from glmjax.pallas.stack import Stack


@dataclasses.dataclass(frozen=True)
class LayerView:
    """What happened in a layer, for those who look: traces, research, the indexer's distillation.

    Attributes:
        index: which layer.
        hidden_BTD: the residual stream after it.
        selected: what its attention read.
        choice_BTX: its router's experts; None in a dense layer.
        normed_BTD: the attention's input.
        latent_BTQ: the query latent.
        attention_BTD: the attention's contribution.
        mlp_BTD: the MLP's or experts' contribution.
        cache: the cache after the layer wrote its rows.
        step: of the forward, as this layer sees it.
        rope: rotary tables of the tokens.
    """

    index: LayerIndex
    hidden_BTD: jax.Array
    selected: Selection
    choice_BTX: jax.Array | None
    normed_BTD: jax.Array
    latent_BTQ: jax.Array
    attention_BTD: jax.Array
    mlp_BTD: jax.Array
    cache: Any
    step: Step
    rope: Rope


Observer = Callable[[LayerView], Any]
"""Looks at a layer while it is traced and returns what to keep of it: any pytree, or None."""

Patch = Callable[[LayerView], jax.Array]
"""Returns another residual stream [B, T, D] for what comes after a layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """Choices to take instead of a layer's own, for comparisons in which rounding must not flip them.

    Attributes:
        selected: what to attend to.
        choice_BTX: experts; None in a dense layer.
    """

    selected: Selection
    choice_BTX: jax.Array | None = None


class Hidden(NamedTuple):
    """What a forward comes back with.

    Attributes:
        hidden_BTD: after the final norm; what `Transformer.head` takes.
        cache: with the tokens' rows.
        observed: what the observer kept, an entry per layer.
        selected: by the last layer.
    """

    hidden_BTD: jax.Array
    cache: Any
    observed: tuple[Any, ...]
    selected: Selection


class Mtp(nnx.Module):
    """What the MTP layer has beside a decoder layer (which is the last entry of the stacks)."""

    def __init__(self, declare: Declare):
        self.projection_D2D = declare.plain("D2D", columns="2D")
        self.embedding_norm_D = declare.norm("D")
        self.hidden_norm_D = declare.norm("D")
        self.norm_D = declare.norm("D")


class Transformer(nnx.Module):
    """The weights of a model and its forward.

    Args:
        config: what to build.
        dtype: of weights and activations: float32 or bfloat16.
        rngs: for random initial weights.
        mtp: whether it has the MTP layer; default as the configuration says.
        fp8: keep the matrices of an FP8 checkpoint as FP8.
    """

    def __init__(self, config: GlmConfig, *, dtype: Any, rngs: nnx.Rngs, mtp: bool | None = None, fp8: bool = False):
        if fp8 and config.quantization is None:
            raise ValueError("fp8 is True, but the configuration has no quantization; set one, e.g. Fp8Format()")
        has_mtp = config.num_nextn_predict_layers > 0 if mtp is None else mtp
        extra = int(has_mtp)
        layers = config.num_hidden_layers + extra
        kinds = config.mlp_layer_types
        dense, sparse = kinds.count("dense"), kinds.count("sparse") + extra
        block = config.quantization.block if fp8 else None
        declare = Declare(_sizes(config), dtype, rngs, block).sized(L=layers)
        gain = (2 * layers) ** -0.5  # of what adds to the residual stream

        self.config = config
        self.embed_VD = declare.plain("VD", columns="D", gain=config.hidden_size**0.5)
        self.input_norm_LD = declare.norm("LD")
        self.post_attention_norm_LD = declare.norm("LD")
        self.attention = Attention(config, declare, layers)
        self.indexer = Indexer(config, declare, config.indexer_types.count("full") + extra)
        self.dense_gate_up_L2FD = declare.sized(L=dense).matrix("L2FD", rows="F", columns="D") if dense else None
        self.dense_down_LDF = declare.sized(L=dense).matrix("LDF", rows="D", columns="F", gain=gain) if dense else None
        self.experts = Experts(config, declare, sparse, gain) if sparse else None
        self.norm_D = declare.norm("D")
        self.head_VD = None if config.tie_word_embeddings else declare.plain("VD", columns="D")
        self.mtp = Mtp(declare) if has_mtp else None

    @property
    def dtype(self) -> Any:
        """Of weights and activations."""
        return self.embed_VD.values.dtype

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """Token embeddings [B, T, D], unscaled."""
        return self.embed_VD.array[ids_BT]

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of hidden states [B, T, D] after the final norm."""
        with jax.named_scope("head"):
            weight = (self.head_VD or self.embed_VD).array
            return project("BTD,VD->BTV", hidden, Stack(weight[None]), 0, out=jnp.float32)

    def backbone(
        self,
        ids_BT: jax.Array,
        cache: Cache,
        step: Step,
        *,
        observe: Observer | None = None,
        patch: Patch | None = None,
        remat: bool = False,
    ) -> Hidden:
        """All decoder layers and the final norm.

        Args:
            ids_BT: tokens; anything where `step` says padding.
            cache: holds the rows of earlier tokens; comes back with these tokens' rows.
            step: positions, from ``cache.step``.
            observe: looks at every layer; what it returns comes back, one entry per layer.
            patch: changes what every layer hands on; before it is observed.
            remat: recompute layers in the backward pass instead of keeping their intermediates.
        """
        rope = self._rope(step.positions_BT)
        selected = nothing(*ids_BT.shape, cache.capacity, self.config.index_topk)
        h_BTD = self.embed(ids_BT)
        observed: list[Any] = []

        for segment in segments(self.config):

            def period(carry: Any, _: None, segment: Any = segment) -> tuple[Any, Any]:
                n, h_BTD, selected, cache = carry
                seen = []
                for index in segment.at(n):
                    view = self._layer(index, h_BTD, selected, cache, step, rope)
                    if patch:
                        view = dataclasses.replace(view, hidden_BTD=patch(view))
                    h_BTD, selected, cache = view.hidden_BTD, view.selected, view.cache
                    seen.append(observe(view) if observe else None)
                return (n + 1, h_BTD, selected, cache), tuple(seen)

            body = jax.checkpoint(period) if remat else period
            carry = (jnp.int32(0), h_BTD, selected, cache)
            (_, h_BTD, selected, cache), seen = lax.scan(body, carry, length=segment.repeats)
            observed += [jax.tree.map(lambda x, n=n: x[n], layer) for n in range(segment.repeats) for layer in seen]
        return Hidden(self._norm(h_BTD, self.norm_D), cache, tuple(observed), selected)

    def draft(
        self,
        ids_BT: jax.Array,
        previous_BTD: jax.Array,
        cache: Cache,
        step: Step,
        *,
        selected: Selection | None = None,
        observe: Observer | None = None,
    ) -> Hidden:
        """The MTP layer: row p, made of token p and the hidden state of p − 1, predicts token p + 1.

        The textbook's slot t is row t + 1 here. Applied again, with its own output as `previous_BTD`, it drafts further.

        Args:
            ids_BT: tokens p.
            previous_BTD: hidden states p − 1 after the final norm; of an earlier draft step, its output.
            cache: with rows for the MTP layer.
            step: of the tokens, as for `backbone`.
            selected: what to attend to instead of choosing (`index_share_for_mtp_iteration`).
            observe: looks at the layer.

        Raises:
            ValueError: the model has no MTP layer.
        """
        config, mtp = self.config, self.mtp
        if mtp is None:
            raise ValueError("this model has no MTP weights; load a checkpoint that has layer num_hidden_layers")
        step = step.mtp()
        rope = self._rope(step.positions_BT - 1)
        with jax.named_scope("mtp"):
            embedded_BTD = self.embed(ids_BT)
            if config.mtp_zero_first_embedding:
                embedded_BTD = jnp.where((step.positions_BT == step.first_BT)[..., None], 0, embedded_BTD)
            parts = [self._norm(embedded_BTD, mtp.embedding_norm_D), self._norm(previous_BTD, mtp.hidden_norm_D)]
            pair_BT2D = jnp.stack(parts, axis=2)
            h_BTD = project("BTzD,EzD->BTE", pair_BT2D, Stack(mtp.projection_D2D.array[None]), 0)
            forced = None if selected is None else Forced(selected)
            index = mtp_index(config)
            view = self._layer(index, h_BTD, None, cache, step, rope, forced)
            observed = (observe(view),) if observe else ()
            return Hidden(self._norm(view.hidden_BTD, mtp.norm_D), view.cache, observed, view.selected)

    def each_layer(
        self, hidden: Sequence[jax.Array], cache: Cache, step: Step, forced: Sequence[Forced]
    ) -> Iterator[LayerView]:
        """Every layer by itself, from a given input and with given choices: for comparing numerics layer by layer.

        Args:
            hidden: input [B, T, D] of each layer.
            cache: of an own forward; the layers write into copies.
            step: of the tokens.
            forced: choices of each layer.
        """
        rope = self._rope(step.positions_BT)
        for index, h_BTD, choices in zip(layer_indices(self.config), hidden, forced, strict=True):
            yield self._layer(index, h_BTD, None, cache, step, rope, choices)

    def _layer(
        self,
        index: LayerIndex,
        h_BTD: jax.Array,
        selected: Selection | None,
        cache: Cache,
        step: Step,
        rope: Rope,
        forced: Forced | None = None,
    ) -> LayerView:
        """One decoder layer: norm, attention, norm, MLP or experts, each added to the residual stream."""
        layer, eps = index.layer, self.config.rms_norm_eps
        with jax.named_scope("attention"):
            x_BTD = rms_norm(h_BTD, self.input_norm_LD.array, layer, eps=eps)
            latent_BTQ = self.attention.query_latent(layer, x_BTD)
            cache = cache.append(layer, self.attention.row(layer, x_BTD, rope), step)
            if index.indexer == "full":
                with jax.named_scope("indexer"):
                    ordinal = index.index_ordinal
                    cache = cache.append_index(ordinal, self.indexer.key(ordinal, x_BTD, rope), step)
                    if forced is None:
                        query = self.indexer.query(ordinal, latent_BTQ, x_BTD, rope)
                        selected = cache.select(ordinal, *query, step, self.config.index_topk)
            if forced is not None:
                selected = forced.selected
            attention_BTD = self.attention(layer, latent_BTQ, selected, cache, step, rope)
            h_BTD = h_BTD + attention_BTD
        with jax.named_scope("mlp"):
            y_BTD = rms_norm(h_BTD, self.post_attention_norm_LD.array, layer, eps=eps)
            choice_BTX = None
            if index.mlp == "dense":
                mlp_BTD = swiglu(y_BTD, self.dense_gate_up_L2FD.stack, self.dense_down_LDF.stack, index.mlp_ordinal)
            else:
                choice_BTX = None if forced is None else forced.choice_BTX
                mlp_BTD, choice_BTX = self.experts(index.mlp_ordinal, y_BTD, step.positions_BT >= 0, choice_BTX)
            h_BTD = h_BTD + mlp_BTD
        return LayerView(
            index=index,
            hidden_BTD=h_BTD,
            selected=selected,
            choice_BTX=choice_BTX,
            normed_BTD=x_BTD,
            latent_BTQ=latent_BTQ,
            attention_BTD=attention_BTD,
            mlp_BTD=mlp_BTD,
            cache=cache,
            step=step,
            rope=rope,
        )

    def _rope(self, positions_BT: jax.Array) -> Rope:
        return Rope.at(positions_BT, self.config.qk_rope_head_dim, self.config.rope_theta)

    def _norm(self, x: jax.Array, weight: Any) -> jax.Array:
        return rms_norm(x, weight.array[None], 0, eps=self.config.rms_norm_eps)


def densely(model: Transformer) -> Transformer:
    """The same weights, attending to everything visible."""
    dense = nnx.merge(*nnx.split(model))
    dense.config = dataclasses.replace(model.config, index_topk=model.config.max_position_embeddings)
    return dense


def _sizes(config: GlmConfig) -> dict[str, int]:
    """The length of every letter that is the same throughout the model."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "E": config.n_routed_experts,
        "N": config.num_attention_heads,
        "Q": config.q_lora_rank,
        "R": config.kv_lora_rank,
        "H": config.qk_nope_head_dim,
        "Y": config.qk_head_dim,
        "O": config.v_head_dim,
        "C": config.cache_row_dim,
        "I": config.index_n_heads,
        "J": config.index_head_dim,
    }
