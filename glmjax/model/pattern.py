"""The layer pattern: which layers are alike, so that one traced body serves many of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from glmjax.model.config import GlmConfig, IndexerKind, MlpKind


@dataclasses.dataclass(frozen=True)
class LayerIndex:
    """Where a layer's weights and cache rows lie in their stacks.

    Attributes:
        mlp: dense or sparse; static.
        indexer: full or shared; static.
        layer: index among all layers (attention, norms, latents), an int or a traced int32.
        mlp_ordinal: index among the layers of its MLP kind.
        index_ordinal: index among the layers with an indexer; for a shared layer that of the next one, never used.
    """

    mlp: MlpKind
    indexer: IndexerKind
    layer: Any
    mlp_ordinal: Any
    index_ordinal: Any


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers: a period of layer kinds, repeated.

    Attributes:
        first: the layers of the first period.
        repeats: how many periods.
    """

    first: tuple[LayerIndex, ...]
    repeats: int

    def at(self, repeat: Any) -> tuple[LayerIndex, ...]:
        """The layers of one period; ordinals are affine in the (traced) number of the period."""
        mlps = {kind: sum(i.mlp == kind for i in self.first) for kind in ("dense", "sparse")}
        full = sum(i.indexer == "full" for i in self.first)
        return tuple(
            dataclasses.replace(
                i,
                layer=i.layer + repeat * len(self.first),
                mlp_ordinal=i.mlp_ordinal + repeat * mlps[i.mlp],
                index_ordinal=i.index_ordinal + repeat * full,
            )
            for i in self.first
        )


def layer_indices(config: GlmConfig) -> tuple[LayerIndex, ...]:
    """Every decoder layer's place in the stacks, MTP not included."""
    seen = {"dense": 0, "sparse": 0, "full": 0, "shared": 0}
    indices = []
    for layer, (mlp, indexer) in enumerate(config.layers):
        indices.append(LayerIndex(mlp, indexer, layer, seen[mlp], seen["full"]))
        seen[mlp] += 1
        seen[indexer] += 1
    return tuple(indices)


def mtp_index(config: GlmConfig) -> LayerIndex:
    """The MTP layer's place: after the last of every stack; it is sparse and has its own indexer."""
    sparse, full = config.mlp_layer_types.count("sparse"), config.indexer_types.count("full")
    return LayerIndex("sparse", "full", config.num_hidden_layers, sparse, full)


@functools.cache
def segments(config: GlmConfig) -> tuple[Segment, ...]:
    """A cover of the layers by repeated periods that traces the fewest layers, then has the fewest segments.

    GLM-5.2: three dense full layers, three sparse shared ones, then eighteen times (one full, three shared).
    """
    kinds, indices = config.layers, layer_indices(config)
    total = len(kinds)
    # best[i]: (layers traced, segments, where the first segment's period ends, its repeats) for the layers from i on
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (total + 1)
    for start in range(total - 1, -1, -1):
        options = []
        for period in range(1, total - start + 1):
            repeats, end = 1, start + period
            while True:
                traced, count, _, _ = best[end]
                options.append((traced + period, count + 1, period, repeats))
                if kinds[end : end + period] != kinds[start : start + period]:
                    break
                repeats, end = repeats + 1, end + period
        best[start] = min(options)
    cover, start = [], 0
    while start < total:
        _, _, period, repeats = best[start]
        cover.append(Segment(indices[start : start + period], repeats))
        start += period * repeats
    return tuple(cover)
