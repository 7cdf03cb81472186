"""What `make compile-check` compiles of the network: a slice of GLM-5.1 at full width, for an H200."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glmjax.model.assemble import abstract
from glmjax.model.cache import ContiguousCache
from glmjax.model.config import Fp8Format, GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.pallas.aot import Check, Limits

_CONTEXT = 8192


def glm_5_1_slice(*, fp8: bool = False) -> GlmConfig:
    """GLM-5.1 with one dense and one sparse layer, every width as published."""
    return GlmConfig(
        vocab_size=154880,
        hidden_size=6144,
        num_hidden_layers=2,
        num_attention_heads=64,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        intermediate_size=12288,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        mlp_layer_types=("dense", "sparse"),
        indexer_types=("full", "full"),
        index_topk=2048,
        index_n_heads=32,
        index_head_dim=128,
        rope_theta=1e6,
        quantization=Fp8Format() if fp8 else None,
    )


def forward(
    model: Transformer, cache: ContiguousCache, ids_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, ContiguousCache]:
    """Logits of the last token, and the cache with the tokens' rows."""
    out = model.backbone(ids_BT, cache, cache.step(positions_BT))
    return model.head(out.hidden_BTD[:, -1:]), out.cache


def checks() -> list[Check]:
    """Decode of one token and prefill of a chunk: no expert stack may be copied, the cache stays in place.

    An expert stack of the slice is 12.9 GB in bf16, so a limit of 512 MiB of temporaries tells. In FP8, XLA dequantises
    the matrices it reads into temporaries of their own size; kernels will not.
    """
    found = []
    for fp8, name, length in ((False, "decode T=1", 1), (False, "prefill T=512", 512), (True, "decode T=1", 1)):
        config = glm_5_1_slice(fp8=fp8)
        model = abstract(config, jnp.bfloat16, mtp=False, fp8=fp8)
        cache = jax.eval_shape(lambda: ContiguousCache.create(glm_5_1_slice(), 1, _CONTEXT, jnp.bfloat16))
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        title = f"glm-5.1 slice {'fp8' if fp8 else 'bf16'} {name}"
        limits = Limits(temporary_bytes=512 << 20)
        found.append(
            Check(title, forward, (model, cache, tokens, tokens), limits, mosaic=("rms_norm",), donate_argnums=(1,))
        )
    return found
