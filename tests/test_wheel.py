"""The wheel is all that is needed: the package, the model in the box, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "glmjax", source / "glmjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source]
    subprocess.run(command, check=True, timeout=300)
    [path] = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_package_is_in_it_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "glmjax").rglob("*.py")}
    data = {f"glmjax/nano/{name}" for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")}
    data |= {
        "glmjax/nano/config.json",
        *(f"glmjax/pallas/{path.name}" for path in (ROOT / "glmjax/pallas").glob("*.txtpb")),
    }
    assert packed == files | data


def test_it_says_what_may_be_installed_beside_it(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert {"gateway", "gpu", "otel", "train"} <= set(metadata.get_all("Provides-Extra"))
    assert any(line.startswith("jax==") for line in metadata.get_all("Requires-Dist"))


def test_the_model_in_the_box_is_loaded_from_it(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import glmjax; print(glmjax.__file__); print(len(glmjax.load().encode('def area(r):')))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    file, tokens = told.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert int(tokens) > 0
