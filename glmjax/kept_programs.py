"""Where compiled programs are kept between processes, so that the next start is quick.

There are two layers in one folder. JAX's persistent compilation cache, set up so that it keeps everything, spares compiling:
JAX by itself keeps nothing, and once told where, only what took a second; of an engine's programs on small models, that is
few. It is found by a program's text, so a start still traces every program to find it. What `compiled` keeps spares that,
too: whole executables, found by all that the text is made of, the source of this package included; and by the text, for the
first start with another source.

The library writes nowhere unasked; the commands of the terminal keep programs in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from glmjax.pallas import dispatch

_EVERYTHING = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_FOLDER = "executables"
_DISUSED_SECONDS = 7 * 24 * 3600.0
"""After which executables of other sources or another machine are removed."""
_LOG = logging.getLogger(__name__)
_asked = False  # whether this process keeps programs; like JAX's cache, it is the process's
_thread = threading.local()  # .loaded: whether JAX's cache had the program that was compiled last


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
    global _asked
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
    if not _asked:
        jax.monitoring.register_event_listener(_listen)
    _asked = True
    return Path(path)


def compiled(lower: Callable[[], jax.stages.Lowered], *identity: Any) -> jax.stages.Compiled:
    """An executable that was kept, else a new one, which is kept where `compilation_cache` was asked for.

    It is found by `identity` and by what every program depends on: the source of this package, versions, the devices,
    JAX's settings and XLA's. So the program must be made by this package alone. Where the source is another one, it is
    traced, and found by its text. Of what JAX's cache had nothing is kept.

    Args:
        lower: traces the program.
        identity: all that its text depends on beside: values whose `repr` tells them apart.
    """
    if not _asked or jax.config.jax_compilation_cache_dir is None:
        return lower().compile()
    by_source, by_text = _folders()
    path = by_source / _name(identity)
    if (program := _loaded(path)) is not None:
        for folder in (by_source, by_text):  # they are in use
            with contextlib.suppress(FileNotFoundError):
                os.utime(folder)
        return program
    lowered = lower()
    same = by_text / _name((lowered.as_text(), lowered.in_tree, lowered.out_tree))
    program = _loaded(same)
    if new := program is None:
        _thread.loaded = False
        program = lowered.compile()
        if _thread.loaded:  # XLA for CPUs forgets functions of what it has loaded: a copy of a copy does not run
            return program
    try:
        if new:
            _write(same, pickle.dumps(serialize_executable.serialize(program)))
        _write(path, same.read_bytes())
    except (OSError, ValueError, NotImplementedError) as error:  # a full disk, a device that cannot
        _LOG.warning("a program could not be kept (%s: %s)", type(error).__name__, error)
    return program


def described(tree: Any) -> str:
    """The structure of a tree of arrays, their shapes, dtypes and shardings: what a program sees of its arguments."""
    leaves, structure = jax.tree.flatten(tree)
    return f"{structure} {[(jax.typeof(leaf), getattr(leaf, 'sharding', None)) for leaf in leaves]}"


def _listen(event: str, **_: Any) -> None:
    """Of JAX's monitoring, in the thread that compiles."""
    if event == "/jax/compilation_cache/cache_hits":
        _thread.loaded = True


def _loaded(path: Path) -> jax.stages.Compiled | None:
    """What is kept there, if it is of any use."""
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is in the file: it is only a copy
        _LOG.warning("a kept program is of no use (%s: %s); compiling it again", type(error).__name__, error)
    return None


def _folders() -> tuple[Path, Path]:
    """Of programs of this source, and of the same whatever source they are of."""
    root = Path(jax.config.jax_compilation_cache_dir) / _FOLDER
    surroundings = _surroundings()
    return root / _name((_source(), surroundings))[:16], root / _name(surroundings)[:16]


def _name(identity: Any) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _surroundings() -> tuple[Any, ...]:
    """What every program depends on, the source of this package aside."""
    names = sorted(name for name in jax.config.values if not name.startswith(("jax_compilation", "jax_persistent")))
    settings = {name: getattr(jax.config, name, None) for name in names}
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("XLA_", "GLMJAX_"))}
    devices = [(device.platform, device.device_kind, device.client.platform_version) for device in jax.devices()]
    return _versions(), _machine(), settings, variables, devices, dispatch.current()


@functools.cache
def _versions() -> list[str]:
    """Of what this package calls."""
    return [version(name) for name in ("jax", "jaxlib", "flax", "numpy")]


@functools.cache
def _source() -> str:
    """Of this package."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _machine() -> str:
    """The processor: what is compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, whoever writes beside; and remove what has not been used for long."""
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in path.parent.parent.iterdir():
            if other.stat().st_mtime < time.time() - _DISUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
