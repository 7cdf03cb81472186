"""The package from outside: what an import costs, which names there are, and that imports go one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmjax

PACKAGE = Path(glmjax.__file__).parent
LAYERS = ("pallas", "model", "mesh", "serving", "worker")  # each may import itself and those before it
BESIDE = {  # libraries that a layer builds on
    "serving": ("glm", "kept_programs", "speculation", "nano"),
    "worker": ("glm", "kept_programs", "nano", "wire"),
}
ABOVE_MODEL = (
    "client",
    "decoding",
    "kept_programs",
    "sampling_flags",
    "speculation",
    "glm",
    "training",
    "evaluation",
    "mesh",
    "serving",
    "wire",
    "worker",
)  # libraries; every other module is an entry point


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_neither_jax_nor_flax_nor_numpy():
    heavy = run("import sys, glmjax; dir(glmjax); print(*{'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules))")
    assert heavy.split() == []


def test_a_name_is_imported_when_it_is_used():
    code = "import sys, glmjax; glmjax.SamplingParams; print('glmjax.glm' in sys.modules, 'jax' in sys.modules)"
    assert run(code).split() == ["False", "False"]  # clients have no JAX


@pytest.mark.parametrize("name", glmjax.__all__)
def test_public_names_resolve(name):
    value = getattr(glmjax, name)
    assert value.__name__ == name
    assert value.__doc__


def test_star_import_gives_the_public_names():
    names: dict = {}
    exec("from glmjax import *", names)
    assert set(glmjax.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error_that_says_so():
    with pytest.raises(AttributeError, match="module 'glmjax' has no attribute 'lode'"):
        _ = glmjax.lode
    assert not hasattr(glmjax, "lode")


def test_dir_lists_the_public_names_before_they_are_used():
    assert set(glmjax.__all__) <= set(run("import glmjax; print(*dir(glmjax))").split())


# Imports go one way


def imports() -> Iterator[tuple[str, str]]:
    """Pairs (module, what it imports), imports within functions and for type checkers included."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ["glmjax", *file.relative_to(PACKAGE).with_suffix("").parts]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = [*parts[: -node.level], node.module] if node.level else [node.module]
                names = [".".join([*filter(None, base), alias.name]) for alias in node.names]
            else:
                continue
            for name in names:
                yield ".".join(parts), name


IMPORTS = list(imports())


def own(prefix: str) -> list[tuple[str, str, str]]:
    """Imports of glmjax's own modules by those below `prefix`: (module, imported, its first part)."""
    return [
        (module, name, name.split(".")[1])
        for module, name in IMPORTS
        if f"{module}.".startswith(f"glmjax.{prefix}.") and name.startswith("glmjax.")
    ]


def test_the_parser_sees_imports():
    assert ("glmjax.model.cache", "glmjax.pallas.rows.Rows") in IMPORTS
    assert len(own("model")) > 50


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if (PACKAGE / layer).is_dir()])
def test_a_layer_imports_itself_and_those_below_only(layer):
    allowed = (*LAYERS[: LAYERS.index(layer) + 1], *BESIDE.get(layer, ()))
    assert [(module, name) for module, name, first in own(layer) if first not in allowed] == []


@pytest.mark.parametrize("module", [name for name in ABOVE_MODEL if list(PACKAGE.glob(f"{name}*"))])
def test_libraries_do_not_import_entry_points(module):
    wrong = [(by, name) for by, name, first in own(module) if first not in (*LAYERS, *ABOVE_MODEL, "nano")]
    assert wrong == []


def test_decoding_knows_no_handle_and_no_training():
    assert {first for *_, first in own("decoding")} <= {"pallas", "model"}


def test_speculation_knows_the_network_only():
    assert {first for *_, first in own("speculation")} <= {"pallas", "model"}


def test_evaluation_is_imported_by_entry_points_only():
    by = {module for module, name in IMPORTS if f"{name}.".startswith("glmjax.evaluation.")}
    assert {module for module in by if not module.startswith("glmjax.evaluation.")} == {
        "glmjax.eval",
        "glmjax.training.__main__",
    }


def test_measuring_a_checkpoint_needs_no_data_pipeline():
    heavy = run("import sys, glmjax.eval; print('grain' in sys.modules)")
    assert heavy.split() == ["False"]


def test_nothing_imports_the_inside_of_jax():
    inside = [(module, name) for module, name in IMPORTS if name.startswith("jax._") or "._src" in name]
    assert inside == []
