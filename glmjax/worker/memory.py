"""How many pages of cache a device has room for beside the model."""

from __future__ import annotations

import os

import jax

from glmjax.glm import GLM
from glmjax.serving.pages import PagedCache


def fitting_pages(glm: GLM, page_size: int, fraction: float) -> int:
    """Pages that fit into what the model leaves of a share of the device's memory.

    Args:
        glm: the model.
        page_size: A.
        fraction: of the memory, for the model and its cache; the rest is for what programs need while they run.

    Raises:
        ValueError: not even the model fits.
    """
    total, weights = device_bytes(), sum(leaf.nbytes for leaf in jax.tree.leaves(glm.weights))
    room = int(total * fraction) - weights
    if room <= 0:
        raise ValueError(
            f"the model takes {weights / 1e9:.1f} GB, more than --mem-fraction-static {fraction} of the device's "
            f"{total / 1e9:.1f} GB; raise it, or take a larger device"
        )
    return room // page_bytes(glm, page_size)


def page_bytes(glm: GLM, page_size: int) -> int:
    """Of a page with the rows of all layers.

    Args:
        glm: the model.
        page_size: A.
    """
    made = jax.eval_shape(
        lambda: PagedCache.create(
            glm.config,
            1,
            page_size,
            glm.kv_cache_dtype,
            tail_dtype=glm.weights.dtype,
            mtp=glm.weights.mtp is not None,
        )
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))


def device_bytes() -> int:
    """Memory of the device; of the machine, where that is a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
