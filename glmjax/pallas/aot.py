"""Compile for an H200 on a machine that has none, and hold every kernel to its limits.

    PYTHONPATH=.aot python -m glmjax.pallas.aot [--dump FOLDER] [MODULE ...]

runs the checks that the modules declare in a function `checks() -> list[Check]` (by default those in `CHECKED`), prints
registers, spills, shared memory and temporaries, and exits with status 1 if a limit is exceeded, naming it.

Needs JAX's CUDA plugin, of which no GPU is asked: `jax-cuda13-plugin` and `jax-cuda13-pjrt` on the path, best in a
folder of their own (`make compile-check` uses `.aot`); and from CUDA 13 `ptxas` and `libdevice`, of /usr/local/cuda or
of the wheels `nvidia-cuda-nvcc` and `nvidia-nvvm` in the same folder. Compiled is not run: only a GPU shows deadlocks,
races and wrong addresses. Kernels of XLA get default configurations where there is no GPU to tune them on.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CHECKED = ("glmjax.pallas.rms_norm_mosaic", "glmjax.pallas.gather_mosaic", "glmjax.model.compile_checks")
"""Modules whose `checks()` the command runs; append yours."""

TOOLKITS = (Path("/usr/local/cuda"), Path("/opt/cuda"))
"""Where CUDA's compilers are looked for, beside the plugin's own folder."""

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a thread block may have on Hopper."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one GPU kernel takes.

    Attributes:
      name: of its entry function; of the Python function that is the body, for a Mosaic kernel.
      compiler: "mosaic" or "xla".
      registers: per thread.
      spill_stores: bytes per thread written to local memory because registers ran out.
      spill_loads: bytes per thread read back.
      stack: bytes per thread.
      static_shared: bytes per block that the code declares.
      dynamic_shared: bytes per block that the launch asks for.
    """

    name: str
    compiler: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    dynamic_shared: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory per block."""
        return self.static_shared + self.dynamic_shared


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled function takes; bytes are per device.

    Attributes:
      name: of the function or check.
      kernels: each distinct kernel once, Mosaic's first; calls of cuBLAS and other libraries are not among them.
      argument_bytes: of the arguments, donated ones included.
      output_bytes: of the results, aliased ones included.
      temporary_bytes: beside arguments and results.
      alias_bytes: of results that take the place of donated arguments.
      seconds: to trace, lower and compile.
    """

    name: str
    kernels: tuple[Kernel, ...]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a function may take; None: anything.

    Attributes:
      registers: per thread, of every kernel.
      spill_bytes: stores and loads together, of every kernel.
      shared_bytes: static and dynamic, of every kernel.
      temporary_bytes: of the function.
    """

    registers: int | None = 255
    spill_bytes: int | None = 0
    shared_bytes: int | None = SHARED_MEMORY
    temporary_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """A function to compile, and its limits.

    Attributes:
      name: shown in the table.
      function: jitted or not.
      avals: its arguments; pytrees of `jax.ShapeDtypeStruct`.
      limits: what it may take.
      mosaic: names of Mosaic kernels that must be in it, lest a silent fallback to the reference pass the check.
      devices: GPUs compiled for.
      donate_argnums: as for `jax.jit`.
    """

    name: str
    function: Callable[..., Any]
    avals: tuple[Any, ...]
    limits: Limits = Limits()
    mosaic: tuple[str, ...] = ()
    devices: int = 1
    donate_argnums: tuple[int, ...] = ()


def h200_mesh(devices: int = 1, axis: str = "device"):
    """A `jax.sharding.Mesh` of H200s that are not there, one axis of 1 to 8 on one machine.

    Raises:
      RuntimeError: JAX's CUDA plugin is not on the path.
    """
    from jax.experimental import topologies

    return topologies.make_mesh(_topology(devices), (devices,), (axis,))


@functools.cache  # devices of two topologies are different ones
def _topology(devices: int):
    from jax.experimental import topologies

    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise RuntimeError(
            "JAX's CUDA plugin is not on the path, so nothing can be compiled for an H200; run `make compile-check`, or "
            "`pip install --no-deps --target .aot jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2` and set PYTHONPATH=.aot"
        )
    target = Path(__file__).with_name("h200.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{devices}", target_config=target)


def compile_for_h200(
    f: Callable[..., Any],
    *avals: Any,
    devices: int = 1,
    donate_argnums: tuple[int, ...] = (),
    name: str | None = None,
    dump: Path | None = None,
) -> Report:
    """Compile a function for H200s that are not there and report what it takes.

    JAX must run on the CPU: set `JAX_PLATFORMS=cpu`. What the compilers print is kept in the dump, and shown only if
    they fail. Not thread-safe: Mosaic takes its dump's folder from the environment.

    Args:
      f: jitted or not; ops inside choose their Hopper kernels.
      avals: arguments, pytrees of `jax.ShapeDtypeStruct`; a leaf without a sharding is replicated on all devices.
        Shardings, and meshes of `shard_map`, are to be made with `h200_mesh(devices)`.
      devices: GPUs of one machine.
      donate_argnums: as for `jax.jit`.
      name: of the report; default the function's.
      dump: new or empty folder in which PTX, HLO and Mosaic's intermediate code are left; default none.

    Raises:
      RuntimeError: the plugin, `ptxas` or libdevice is missing.
      ValueError: the dump's folder has something in it, which would be taken for this compilation's.
    """
    if dump and dump.exists() and any(dump.iterdir()):
        raise ValueError(f"dump folder {dump} is not empty; remove it or name another")

    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

    _find_toolkit()
    replicated = NamedSharding(h200_mesh(devices), PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or replicated)

    arguments = jax.tree.map(placed, avals)
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with contextlib.ExitStack() as stack:
        folder = Path(dump or stack.enter_context(tempfile.TemporaryDirectory(prefix="glmjax-aot-")))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_environment("MOSAIC_GPU_DUMP_TO", str(folder)))
        stack.enter_context(_native_stderr(folder / "stderr.txt"))
        stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)))
        start = time.perf_counter()
        lowered = jax.jit(f, donate_argnums=donate_argnums).trace(*arguments).lower()
        compiled = lowered.compile({"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"})
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        return Report(
            name=name or getattr(f, "__name__", "function"),
            kernels=read_kernels(folder),
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            seconds=seconds,
        )


def read_kernels(folder: Path) -> tuple[Kernel, ...]:
    """The kernels in a folder of dumps: Mosaic's with their recorded `ptxas` output, XLA's assembled here from PTX."""
    kernels = []
    for log in sorted(folder.glob("*.ptxas")):
        resources = log.with_suffix(".resources.txt").read_text()
        dynamic = int(re.search(r"smem_scratch_bytes=(\d+)", resources).group(1))
        kernels += [
            dataclasses.replace(
                k, name=k.name.removesuffix("_mosaic_gpu_kernel"), compiler="mosaic", dynamic_shared=dynamic
            )
            for k in parse_ptxas(log.read_text())
        ]
    launches = "\n".join(path.read_text() for path in sorted(folder.glob("*.thunk_sequence.txt")))
    dynamic_shared = parse_launches(launches)
    for ptx in sorted(folder.glob("module_*.ptx")):
        command = ["ptxas", "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        kernels += [dataclasses.replace(k, dynamic_shared=dynamic_shared.get(k.name, 0)) for k in parse_ptxas(log)]
    return tuple(kernels)


def parse_ptxas(log: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`; spills and stack include those of functions that a kernel calls."""

    def total(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    kernels = []
    for part in log.split("Compiling entry function ")[1:]:
        kernels.append(
            Kernel(
                name=re.match(r"'([^']+)'", part).group(1),
                compiler="xla",
                registers=int(re.search(r"Used (\d+) registers", part).group(1)),
                spill_stores=total(r"(\d+) bytes spill stores", part),
                spill_loads=total(r"(\d+) bytes spill loads", part),
                stack=total(r"(\d+) bytes stack frame", part),
                static_shared=total(r"(\d+) bytes smem", part),
                dynamic_shared=0,
            )
        )
    return kernels


def parse_launches(thunks: str) -> dict[str, int]:
    """Bytes of dynamic shared memory by kernel name, the most of its launches, from XLA's thunk sequence."""
    shared: dict[str, int] = {}
    for name, size in re.findall(r"(\S+) grid: \[.*?\] threads: \[.*?\]\s+shared_memory: (\d+) bytes", thunks):
        shared[name] = max(shared.get(name, 0), int(size))
    return shared


def exceeded(report: Report, limits: Limits, mosaic: Iterable[str] = ()) -> list[str]:
    """One line for every limit that a report exceeds, and for every Mosaic kernel that it lacks; none: it passes."""
    problems = []

    def hold(what: str, value: int, limit: int | None, remedy: str) -> None:
        if limit is not None and value > limit:
            problems.append(f"{report.name}: {what} {value:,}, limit {limit:,}; {remedy}")

    for kernel in report.kernels:
        who = f"kernel {kernel.name}:"
        hold(f"{who} registers", kernel.registers, limits.registers, "make a thread's share of the tile smaller")
        spills = kernel.spill_stores + kernel.spill_loads
        hold(f"{who} spilled bytes", spills, limits.spill_bytes, "make a thread's share of the tile smaller")
        hold(f"{who} bytes of shared memory", kernel.shared, limits.shared_bytes, "take fewer stages or smaller tiles")
    hold("bytes of temporaries", report.temporary_bytes, limits.temporary_bytes, "look for a copy in the HLO (--dump)")
    present = {kernel.name for kernel in report.kernels if kernel.compiler == "mosaic"}
    for name in mosaic:
        if name not in present:
            problems.append(f"{report.name}: no Mosaic kernel {name}; see its `supports` and GLMJAX_OPS")
    return problems


def table(reports: Iterable[Report]) -> str:
    """The reports as text: for all launches of a Mosaic kernel, and for all of XLA's own, the most that any takes."""
    head = (
        "check",
        "kernel",
        "registers",
        "spills",
        "stack",
        "shared",
        "arguments",
        "temporaries",
        "aliased",
        "seconds",
    )
    rows = [head]
    for report in reports:
        sizes = [f"{n:,}" for n in (report.argument_bytes, report.temporary_bytes, report.alias_bytes)]
        outer = (report.name, (*sizes, f"{report.seconds:.1f}"))
        groups: dict[str, list[Kernel]] = {}
        for kernel in report.kernels:
            groups.setdefault(kernel.name if kernel.compiler == "mosaic" else "of XLA", []).append(kernel)
        for name, kernels in [(f"{len(group)} {name}", group) for name, group in groups.items()] or [("none", [])]:
            taken = [(k.registers, k.spill_stores + k.spill_loads, k.stack, k.shared) for k in kernels]
            most = [f"{max(column):,}" for column in zip(*taken, strict=True)] or [""] * 4
            rows.append((outer[0], name, *most, *outer[1]))
            outer = ("", ("",) * 4)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Run the checks of the modules named on the command line; 1 if any of them fails."""
    parser = argparse.ArgumentParser(prog="python -m glmjax.pallas.aot", description="compile for an H200 without one")
    parser.add_argument("modules", nargs="*", default=CHECKED, metavar="MODULE", help="with a function checks()")
    parser.add_argument("--dump", type=Path, help="leave PTX, HLO and logs here, a folder per check")
    options = parser.parse_args(argv)

    import jax

    jax.config.update("jax_platforms", "cpu")  # before the first use of a device, or the plugin looks for a GPU
    try:
        _find_toolkit()
        h200_mesh()
    except RuntimeError as error:
        sys.exit(str(error))
    reports, problems = [], []
    for check in [c for module in options.modules for c in importlib.import_module(module).checks()]:
        try:
            report = compile_for_h200(
                check.function,
                *check.avals,
                devices=check.devices,
                donate_argnums=check.donate_argnums,
                name=check.name,
                dump=options.dump and options.dump / re.sub(r"\W+", "-", check.name),
            )
        except Exception as error:  # the other checks still have something to say
            traceback.print_exc()
            problems.append(f"{check.name}: {type(error).__name__}, see above")
            continue
        reports.append(report)
        problems += exceeded(report, check.limits, check.mosaic)
    print(table(reports))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _find_toolkit() -> None:
    """Put `ptxas` on PATH, where alone Mosaic looks for it; without libdevice Mosaic would abort the process."""
    wheels = [Path(p) / "nvidia" / "cu13" for p in sys.path if (Path(p) / "jax_plugins").exists()]
    roots = [*TOOLKITS, *wheels]  # where XLA and Mosaic look for libdevice
    if not shutil.which("ptxas"):
        found = [str(root / "bin") for root in roots if (root / "bin" / "ptxas").exists()]
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *found])
    missing = [] if shutil.which("ptxas") else ["ptxas"]
    if not any((root / "nvvm" / "libdevice" / "libdevice.10.bc").exists() for root in roots):
        missing.append("libdevice")
    if missing:
        raise RuntimeError(
            f"no {' and no '.join(missing)} of CUDA 13; install its toolkit in {TOOLKITS[0]}, or beside JAX's CUDA plugin "
            "`pip install --no-deps --target .aot nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88`"
        )


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


@contextlib.contextmanager
def _native_stderr(path: Path) -> Iterator[None]:
    """Send what compilers write to file descriptor 2 to a file (Mosaic misses nvdisasm and says so for every kernel)."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with path.open("wb") as log:
            os.dup2(log.fileno(), 2)
        yield
    except BaseException:
        os.write(saved, path.read_bytes())
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)


if __name__ == "__main__":
    from glmjax.pallas.aot import main as imported  # the module that the checks import, not its copy __main__

    sys.exit(imported())
