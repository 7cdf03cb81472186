"""Where compiled programs are kept between processes: JAX's persistent compilation cache, set up so that it keeps them all.

JAX by itself keeps nothing, and once told where, only what took a second to compile; of an engine's programs on small
models, that is few. The library writes nowhere unasked; the commands of the terminal keep programs in the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

_EVERYTHING = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


def compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, of this whole process: the next one that compiles the same loads them.

    Call it before anything is compiled. What JAX's own environment variables say about which programs are worth keeping
    (``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS``, ``JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES``) holds; otherwise
    all are. A limit of bytes is ``JAX_COMPILATION_CACHE_MAX_SIZE``. Programs are of one version of JAX, one kind of
    device and one configuration: others lie beside them. Whoever can write to the folder can run code in this process.

    Args:
        folder: where; default ``JAX_COMPILATION_CACHE_DIR``, and without it ``glmjax`` in the user's cache
            (``XDG_CACHE_HOME``, else ``~/.cache``). It is made where it is missing, for this user alone.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be made.
    """
    before = jax.config.jax_compilation_cache_dir
    if folder is None and before is not None:
        path = before
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = str(home / "glmjax" if folder is None else Path(folder).absolute())
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    if path != before:
        jax_cache.set_cache_dir(path)
        jax_cache.reset_cache()  # else the folder of what was compiled before stays
    for name, value in _EVERYTHING.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return Path(path)
