"""The compile check: reading what the compilers print, limits, the table, the command. No compiler runs here."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from glmjax.pallas import aot
from glmjax.pallas.aot import Check, Kernel, Limits, Report

MOSAIC_LOG = """\
ptxas /tmp/glmjax-1, line 224; info    : Potential out of bound access while accessing symbol '__dynamic_shmem__0'.
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rms_norm_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for rms_norm_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 21.571 ms
"""
RESOURCES = (
    "Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0, barrier_counts=Counter(), scoped_gmem_semaphores={})"
)
TWO_KERNELS = """\
ptxas info    : 24 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    40 bytes stack frame, 72 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 48 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for __internal_trig_reduction_slowpath
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 17 registers, used 0 barriers
"""
THUNKS = """\
001: kCustomCall   [source       | next=002 (1)] kCustomCall
002: kCustomKernel [prev=001 (1) | next=003 (1)] second grid: [4, 1, 1] threads: [128, 1, 1]  shared_memory: 64 bytes
003: kCustomKernel [prev=002 (1) | sink        ] second grid: [256, 1, 1] threads: [128, 1, 1]  shared_memory: 96 bytes
"""
SPILLING = Kernel("first", "xla", 255, 76, 76, 48, 48, 0)
GOOD = Kernel("rms_norm", "mosaic", 80, 0, 0, 0, 1, 2048)
REPORT = Report("norm", (GOOD, SPILLING), 970_756, 12_288, 4, 0, 0.42)


def test_every_entry_function_of_a_log_is_a_kernel_and_answers_for_what_it_calls():
    assert aot.parse_ptxas(TWO_KERNELS) == [SPILLING, Kernel("second", "xla", 17, 0, 0, 0, 0, 0)]
    assert aot.parse_ptxas("ptxas info    : 0 bytes gmem\n") == []


def test_dynamic_shared_memory_is_the_most_that_any_launch_asks_for():
    assert aot.parse_launches(THUNKS) == {"second": 96}
    assert aot.parse_launches("001: kGemm [source | sink] gemm") == {}


def test_a_folder_of_dumps_gives_the_kernels_of_both_compilers(tmp_path, monkeypatch):
    (tmp_path / "rms_norm_0.ptxas").write_text(MOSAIC_LOG)
    (tmp_path / "rms_norm_0.resources.txt").write_text(RESOURCES)
    (tmp_path / "rms_norm_0.ptx").write_text("Mosaic's own, assembled already")
    (tmp_path / "module_0001.jit_f.1.ptx").write_text("")
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(THUNKS)
    assembled = []
    run = lambda command, **_: assembled.append(command) or SimpleNamespace(stderr=TWO_KERNELS)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    assert aot.read_kernels(tmp_path) == (GOOD, SPILLING, Kernel("second", "xla", 17, 0, 0, 0, 0, 96))
    assert [command[3] for command in assembled] == [str(tmp_path / "module_0001.jit_f.1.ptx")]


def test_a_report_within_its_limits_passes():
    assert aot.exceeded(REPORT, Limits(spill_bytes=152, temporary_bytes=4), ["rms_norm"]) == []
    assert aot.exceeded(REPORT, Limits(None, None, None, None)) == []


def test_what_exceeds_a_limit_is_named_with_value_limit_and_remedy():
    problems = aot.exceeded(REPORT, Limits(registers=96, shared_bytes=2048, temporary_bytes=0), ["top_k"])
    assert [problem.split(";")[0] for problem in problems] == [
        "norm: kernel rms_norm: bytes of shared memory 2,049, limit 2,048",
        "norm: kernel first: registers 255, limit 96",
        "norm: kernel first: spilled bytes 152, limit 0",
        "norm: bytes of temporaries 4, limit 0",
        "norm: no Mosaic kernel top_k",
    ]
    assert all("; " in problem for problem in problems)


def test_a_kernel_of_xla_does_not_pass_for_one_of_mosaic():
    assert len(aot.exceeded(REPORT, Limits(spill_bytes=None), ["first"])) == 1


def test_the_table_has_a_line_for_each_kind_of_kernel():
    lines = aot.table([REPORT, Report("constant", (), 0, 4, 0, 0, 0.1)]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "check kernel registers spills stack shared arguments temporaries aliased seconds",
        "norm 1 rms_norm 80 0 0 2,049 970,756 4 0 0.4",
        "1 of XLA 255 152 48 48",
        "constant none 0 0 0 0.1",
    ]
    assert len({len(line) for line in lines[:2] + lines[3:]}) == 1


@pytest.fixture
def checks(monkeypatch):
    """A module of two checks, and a compiler that returns REPORT's kernels for the one and fails on the other."""

    def compile_for_h200(f, *avals, name, **_):
        if name == "broken":
            raise ValueError("smem_bytes=288808 > max_smem_bytes=232448")
        return Report(name, (GOOD,), 0, 0, 0, 0, 0.1)

    declared = [Check("norm", len, ((),))]
    monkeypatch.setitem(sys.modules, "declared", SimpleNamespace(checks=lambda: declared))
    monkeypatch.setattr(aot, "compile_for_h200", compile_for_h200)
    monkeypatch.setattr(aot, "h200_mesh", lambda: None)
    monkeypatch.setattr(aot, "_find_toolkit", lambda: None)
    return declared


def test_the_command_prints_the_table_and_succeeds(checks, capsys):
    assert aot.main(["declared"]) == 0
    out, err = capsys.readouterr()
    assert "rms_norm" in out
    assert err == ""


def test_the_command_fails_naming_what_exceeded_and_still_runs_the_other_checks(checks, capsys):
    checks[:] = [Check("broken", len, ((),)), Check("norm", len, ((),), Limits(registers=64))]
    assert aot.main(["declared"]) == 1
    out, err = capsys.readouterr()
    assert "norm " in out
    assert "max_smem_bytes=232448" in err
    assert "broken: ValueError, see above" in err
    assert "norm: kernel rms_norm: registers 80, limit 64" in err


def test_without_the_plugin_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(aot, "_find_toolkit", lambda: None)
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    aot._topology.cache_clear()
    with pytest.raises(SystemExit, match="make compile-check"):
        aot.main([])


def test_the_toolkit_is_found_beside_the_plugin_or_asked_for(tmp_path, monkeypatch):
    root = tmp_path / "nvidia" / "cu13"
    ptxas, libdevice = root / "bin" / "ptxas", root / "nvvm" / "libdevice" / "libdevice.10.bc"
    for path in (ptxas, libdevice, tmp_path / "jax_plugins"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(aot, "TOOLKITS", (tmp_path / "none",))
    monkeypatch.setattr(aot.sys, "path", [str(tmp_path)])
    aot._find_toolkit()
    assert os.environ["PATH"] == f"/nowhere{os.pathsep}{ptxas.parent}"
    libdevice.unlink()
    with pytest.raises(RuntimeError, match=r"no libdevice of CUDA 13.*nvidia-nvvm"):
        aot._find_toolkit()
    monkeypatch.setenv("PATH", "/nowhere")
    ptxas.unlink()
    with pytest.raises(RuntimeError, match=r"no ptxas and no libdevice of CUDA 13.*nvidia-cuda-nvcc"):
        aot._find_toolkit()


def test_an_older_dump_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "rms_norm_0.ptxas").write_text(MOSAIC_LOG)
    with pytest.raises(ValueError, match="is not empty; remove it or name another"):
        aot.compile_for_h200(len, dump=tmp_path)


def test_what_compilers_print_is_shown_only_if_they_fail(tmp_path, capfd):
    def compile_and(reason):
        with aot._native_stderr(tmp_path / "log"):
            os.write(2, b"reason")
            if reason:
                raise reason

    compile_and(None)
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError):
        compile_and(KeyError())
    assert capfd.readouterr().err == "reason"


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("GLMJAX_TEST", "before")
    with aot._environment("GLMJAX_TEST", "inside"):
        assert os.environ["GLMJAX_TEST"] == "inside"
    assert os.environ["GLMJAX_TEST"] == "before"
    monkeypatch.delenv("GLMJAX_TEST")
    with aot._environment("GLMJAX_TEST", "inside"):
        pass
    assert "GLMJAX_TEST" not in os.environ


def test_the_target_is_a_hopper_with_the_limit_that_the_checks_use():
    text = aot.Path(aot.__file__).with_name("h200.txtpb").read_text()
    assert "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }" in text
    assert f"shared_memory_per_block_optin: {aot.SHARED_MEMORY}\n" in text
    assert text.count("{") == text.count("}")


def test_the_command_line_module_imports_without_jax():
    program = "import sys; import glmjax.pallas.aot; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
