"""Which implementation of an op runs, decided while it is traced.

Every op has a `reference` in plain XLA and may have a Mosaic GPU kernel for Hopper (compute capability 9.x). The
kernel lives in a module of its own, which is imported only where it is chosen: the CPU path never loads Pallas GPU.
Such a module defines `supports` and `mosaic`, and both take exactly the arguments of `reference`:

    def rms_norm(x, weight_LD, layer, *, eps):
        return dispatch.choose(reference, mosaic="glmjax.pallas.rms_norm_mosaic")(x, weight_LD, layer, eps=eps)
"""

import importlib
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import jax
from jax import lax
from jax.extend.backend import get_default_device

Implementation = Literal["reference", "mosaic"]

VARIABLE = "GLMJAX_OPS"
"""Environment variable that overrides the choice; read at every trace, so set it before the first one."""

_HOPPER_KIND = re.compile(r"\bG?H(20|100|200|800)\b")
_override = jax.make_user_context(None)  # part of jit's cache key: another implementation is another trace


def implementation(name: str) -> AbstractContextManager[None]:
    """A context in which ops are traced for one implementation whatever the device: "reference" or "mosaic".

    Wins over the environment variable. A function that is jitted already is traced again when it changes.

    Raises:
      ValueError: `name` is not an implementation.
    """
    return _override(_checked(name, "implementation"))


def current() -> Implementation:
    """The implementation chosen here and now: the context's, else `GLMJAX_OPS`', else the device's.

    The device is the one of the mesh in context (which may be abstract: compiling for GPUs that are not there), else
    JAX's default device. Arrays that were committed to another device are not seen; use `implementation` for those.
    `mosaic` on a device other than Hopper fails when the kernel is lowered.

    Raises:
      ValueError: `GLMJAX_OPS` is not an implementation.
    """
    if _override.value is not None:
        return _override.value
    if name := os.environ.get(VARIABLE):
        return _checked(name, VARIABLE)
    device = jax.sharding.get_abstract_mesh().abstract_device or get_default_device()
    return "mosaic" if is_hopper(device) else "reference"


def is_hopper(device: Any) -> bool:
    """Whether a `jax.Device` or `jax.sharding.AbstractDevice` has compute capability 9.x.

    An abstract one does not tell; it is known by its name.
    """
    capability = getattr(device, "compute_capability", None)
    return capability.startswith("9.") if capability else bool(_HOPPER_KIND.search(device.device_kind))


def choose[**P, R](reference: Callable[P, R], *, mosaic: str) -> Callable[P, R]:
    """The implementation to call: `reference`, or on Hopper the kernel in module `mosaic` where it supports the call.

    A kernel may give its result the type of any of its arrays: all vary over the same axes of `shard_map`. It has no
    gradient; differentiate inside `implementation("reference")`.

    Args:
      reference: the op in XLA.
      mosaic: name of the module with the kernel's `supports` and `mosaic`.
    """
    if current() == "reference":
        return reference

    def supported(*args: P.args, **kwargs: P.kwargs) -> R:
        kernel = importlib.import_module(mosaic)
        if not kernel.supports(*args, **kwargs):
            return reference(*args, **kwargs)
        args, kwargs = _varying_together((args, kwargs))
        return kernel.mosaic(*args, **kwargs)

    return supported


def _varying_together(arguments: Any) -> Any:
    """Under `shard_map` all arrays are marked as varying over the axes that any varies over, as XLA's operations do."""

    def axes(x: Any) -> frozenset:
        return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()

    union = frozenset().union(*map(axes, jax.tree.leaves(arguments)))

    def cast(x: Any) -> Any:
        missing = union - axes(x) if isinstance(x, jax.Array) else None
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, arguments)


def _checked(name: str, source: str) -> Implementation:
    if name not in get_args(Implementation):
        raise ValueError(f"{source} is {name!r}; it must be one of: {', '.join(get_args(Implementation))}")
    return name
