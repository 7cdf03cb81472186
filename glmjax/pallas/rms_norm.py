"""RMS normalisation of rows (model-spec.md, RMSNorm)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from glmjax.pallas import dispatch
from glmjax.pallas.stack import take


def rms_norm(
    x: Float[Array, "*rows D"], weight_LD: Float[Array, "L D"], layer: int | Int[Array, ""], *, eps: float
) -> Float[Array, "*rows D"]:
    """Scale every row of `x` to a root mean square of one, then by its layer's weights.

    In float32, x · rsqrt(mean x² + eps); rounded to x's dtype, and only then multiplied by the weight. Squares that
    overflow float32 (elements above about 1e19) make the row 0, as in Hugging Face's implementation.

    Args:
      x: rows, bfloat16 or float32; any number of them, none included.
      weight_LD: the weights of all layers, in x's dtype. The stack goes in whole, so that no layer is copied.
      layer: which one to use, 0 <= layer < L; may be traced, and is not checked then.
      eps: added to the mean square; static.

    Raises:
      ValueError: the dtypes differ, or a static `layer` is outside of the stack.
    """
    if weight_LD.dtype != x.dtype:
        raise ValueError(f"weight_LD is {weight_LD.dtype} but x is {x.dtype}; cast the weights when they are loaded")
    if isinstance(layer, int) and not 0 <= layer < weight_LD.shape[0]:
        raise ValueError(f"layer {layer} is outside of a stack of {weight_LD.shape[0]}; pass 0 <= layer < L")
    with jax.named_scope("rms_norm"):
        return dispatch.choose(reference, mosaic="glmjax.pallas.rms_norm_mosaic")(x, weight_LD, layer, eps=eps)


def reference(
    x: Float[Array, "*rows D"], weight_LD: Float[Array, "L D"], layer: int | Int[Array, ""], *, eps: float
) -> Float[Array, "*rows D"]:
    """`rms_norm` in plain XLA."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * take(weight_LD, layer)
