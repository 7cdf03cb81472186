"""Research hooks: look at what chosen requests compute in every layer, or change it, while others are served beside them.

Hooks are functions of a layer's view, traced into every program when an engine is made. A request is chosen by a number,
its treatment; those that are not chosen are computed as without hooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from glmjax.model.cache import Cache, Step
from glmjax.model.transformer import Hidden, LayerView
from glmjax.pallas.selection import positions


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What an engine does with its layers beside running them.

    Arrays that the functions refer to become constants of every program; what is to be chosen later can be a table of
    them, of which a request's treatment picks a row. Neither function sees the MTP layer: it drafts, and what is emitted
    is decided by the others.

    Attributes:
        capture: from a layer's view to what is kept of it: a tree of arrays [B, T, …] whose further axes are the same in
            every program, or None. It sees what the patch has made of the hidden state. Programs keep it for all their
            sequences and rounds.
        patch: from a layer's view and the treatments, int32 [B, T], 0 where nobody is chosen, to the hidden state after
            the layer, [B, T, D]. It must depend on nothing but a token, those before it and the treatment: pages are
            shared between requests of one treatment.
        layers: whose captures are kept, from 0; None for all.
    """

    capture: Callable[[LayerView], Any] | None = None
    patch: Callable[[LayerView, jax.Array], jax.Array] | None = None
    layers: tuple[int, ...] | None = None

    def namespace(self, salt: Hashable, treatment: int) -> Hashable:
        """What must be the same, beside the tokens, for pages of a request to be shared."""
        return Patched(salt, treatment) if self.patch is not None and treatment else salt


class Patched(NamedTuple):
    """A namespace of pages whose rows a patch has had a part in.

    Attributes:
        salt: the request's own.
        treatment: which.
    """

    salt: Hashable
    treatment: int


def treatment_of(namespace: Hashable) -> int:
    """The treatment under which a namespace's pages have been filled; 0 for none."""
    return namespace.treatment if isinstance(namespace, Patched) else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Hooked:
    """A network under hooks, within one program: a `glmjax.speculation.Network`.

    Attributes:
        model: the network.
        hooks: what is done with its layers.
        hook_B: each sequence's treatment; 0 for none.
    """

    model: Any
    hooks: Hooks
    hook_B: jax.Array

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def dtype(self) -> Any:
        """The model's."""
        return self.model.dtype

    @property
    def mtp(self) -> Any:
        """The model's."""
        return self.model.mtp

    def backbone(self, ids_BT: jax.Array, cache: Cache, step: Step) -> Hidden:
        """All layers, patched; `observed` is what was captured, by layer."""
        hooks, shape = self.hooks, ids_BT.shape
        hook_BT = jnp.where(step.positions_BT >= 0, self.hook_B[:, None], 0)

        def capture(view: LayerView) -> Any:
            found = hooks.capture(view)
            for leaf in jax.tree.leaves(found):
                if leaf.shape[:2] != shape:
                    raise ValueError(f"a capture has shape {leaf.shape}; it must begin with [B, T], here {list(shape)}")
            return found

        def patch(view: LayerView) -> jax.Array:
            hidden_BTD, patched_BTD = view.hidden_BTD, hooks.patch(view, hook_BT)
            if patched_BTD.shape != hidden_BTD.shape:
                raise ValueError(
                    f"a patch gives a hidden state of shape {patched_BTD.shape}; it must keep {hidden_BTD.shape}"
                )
            return jnp.where((hook_BT != 0)[..., None], patched_BTD.astype(hidden_BTD.dtype), hidden_BTD)

        out = self.model.backbone(ids_BT, cache, step, observe=hooks.capture and capture, patch=hooks.patch and patch)
        if hooks.capture is None:
            return out._replace(observed={})
        chosen = range(len(out.observed)) if hooks.layers is None else hooks.layers
        if wrong := set(chosen).difference(range(len(out.observed))):
            raise ValueError(f"hooks of layers {sorted(wrong)}: the model has layers 0..{len(out.observed) - 1}")
        return out._replace(observed={layer: out.observed[layer] for layer in chosen})

    def draft(
        self, ids_BT: jax.Array, previous_BTD: jax.Array, cache: Cache, step: Step, *, selected: Any = None
    ) -> Hidden:
        """The MTP layer, as it is."""
        return self.model.draft(ids_BT, previous_BTD, cache, step, selected=selected)

    def head(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, as they are."""
        return self.model.head(hidden_BTD)


def hooked(model: Any, hooks: Hooks | None, hook_B: Any) -> Any:
    """The network under hooks; itself where there are none."""
    return model if hooks is None else Hooked(model, hooks, jnp.asarray(hook_B))


def selected(view: LayerView, most: int) -> Int32[Array, "B T K"]:
    """What a layer's attention read, for captures: positions, ascending, −1 after them, in `most` places in every program.

    Args:
        view: of the layer.
        most: index_topk.
    """
    found_BTK = positions(view.selected, most)
    missing = most - found_BTK.shape[2]
    return jnp.pad(found_BTK, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
