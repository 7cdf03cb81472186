"""Compiled programs are kept where one says, all of them, and a second start compiles nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from glmjax import kept_programs
from glmjax.kept_programs import compilation_cache, described
from glmjax.pallas import dispatch

ROOT = Path(__file__).parents[1]
START = """
import json, sys
import jax
from glmjax.kept_programs import _folders, compilation_cache

counts = {}
jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
compilation_cache(sys.argv[1])
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from tests.serving.tiny import tiny

config = EngineConfig(max_model_len=32, max_num_seqs=1, page_size=8, chunk_tokens=8, num_draft=1, offload_bytes=1 << 20)
with Engine(tiny(), config) as engine:
    [result] = engine.generate([3, 1, 4], temperature=0, max_new_tokens=5).finish()
    programs = len(engine._programs)
found = {name.rsplit("/")[-1]: count for name, count in counts.items() if "compilation_cache" in name}
folders = [folder.name for folder in _folders()]
print(json.dumps({"ids": result.ids, "programs": programs, "folders": folders, **found}))
"""


def start(folder):
    """What a fresh process does: what it generates, where it keeps programs, how often they were found and written."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = kept | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", START, folder]
    out = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("programs"))
    return folder, start(folder)


def test_a_second_start_neither_compiles_nor_traces_the_engines_programs(first):
    folder, before = first
    after = start(folder)
    assert after["ids"] == before["ids"]
    assert before["cache_misses"] >= before["programs"]
    assert "cache_misses" not in after
    assert after["compile_requests_use_cache"] <= before["compile_requests_use_cache"] - before["programs"]


def test_a_start_with_another_source_finds_programs_by_their_text(first, tmp_path):
    folder, before = first
    copy = shutil.copytree(folder, tmp_path / "copy")
    of_this_source = copy / "executables" / before["folders"][0]
    of_this_source.rename(of_this_source.with_name("other"))
    for _ in range(2):
        after = start(str(copy))
        assert after["ids"] == before["ids"]
        assert "cache_misses" not in after
        assert after["compile_requests_use_cache"] <= before["compile_requests_use_cache"] - before["programs"]
        assert len(list(of_this_source.iterdir())) == before["programs"]


def test_what_is_lost_or_broken_is_found_in_jaxs_cache(first, tmp_path):
    folder, before = first
    copy = shutil.copytree(folder, tmp_path / "copy")
    by_source, by_text = (copy / "executables" / name for name in before["folders"])
    shutil.rmtree(by_text)
    lost, broken, *_ = by_source.iterdir()
    lost.unlink()
    broken.write_bytes(b"no program")
    after = start(str(copy))
    assert after["ids"] == before["ids"]
    assert "cache_misses" not in after
    # What JAX has loaded is not kept again: it would not run.
    assert not lost.exists()
    assert broken.read_bytes() == b"no program"


def test_other_kernels_are_another_place(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    ours = kept_programs._folders()
    assert kept_programs._folders() == ours
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_programs, "_source", lambda: "edited")
        by_source, by_text = kept_programs._folders()
        assert by_source != ours[0]
        assert by_text == ours[1]
    with dispatch.implementation("mosaic"):
        assert not {*kept_programs._folders()} & {*ours}


def test_a_program_is_told_apart_by_all_it_is_made_of():
    array = np.zeros((2, 3), np.float32)
    told = {described(tree) for tree in ([array], (array,), [array, array], [array.astype(np.int32)], [array[0]])}
    assert len(told) == 5
    assert described([array + 1]) in told


def test_what_nobody_uses_for_long_goes(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    kept_programs._write(tmp_path / "now" / "program", b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "now"]
    assert (tmp_path / "now" / "program").read_bytes() == b"content"


# Where


@pytest.fixture
def settings(monkeypatch):
    """JAX's, as they are without variables, and as they were afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: [getattr(jax.config, name) for name in names]
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_a_folder_is_made_for_this_user_alone(settings, tmp_path):
    found = compilation_cache(tmp_path / "a" / "b")
    assert found == tmp_path / "a" / "b"
    assert found.stat().st_mode & 0o777 == 0o700
    assert settings() == [str(found), 0.0, -1]


def test_without_a_folder_it_is_the_users_cache(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache() == tmp_path / "glmjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation_cache() == tmp_path / ".cache" / "glmjax"


def test_what_the_user_has_told_jax_holds(settings, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    assert compilation_cache() == tmp_path / "mine"
    assert settings() == [str(tmp_path / "mine"), 3.0, -1]
