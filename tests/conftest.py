"""Every test runs on the CPU unless told otherwise, and every annotated shape is checked.

What one process has compiled, the others load: programs are kept for as long as the tests run, or where
``JAX_COMPILATION_CACHE_DIR`` says, for those to come.
"""

import gc
import os
import tempfile
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it
        programs = tempfile.TemporaryDirectory(prefix="glmjax-programs-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(8 << 30))  # with a limit, files are locked

from jaxtyping import install_import_hook

install_import_hook("glmjax", "beartype.beartype")

import jax
import pytest

from glmjax.kept_programs import described
from glmjax.serving.compiled import Programs
from tests.mapped_memory import crowded


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """What is compiled once is there for every engine: programs depend on shapes, weights are arguments."""
    program, found = Programs._program, {}

    def once(self, name, cache, state):
        run, how, donated, arguments = self._parts(name, cache, state)
        key = run, *how.items(), donated, described(arguments)
        if key not in found:
            found[key] = program(self, name, cache, state)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_program", once)
        yield found


@pytest.fixture(scope="module", autouse=True)
def room_for_programs(compiled_once):
    yield
    if crowded():
        compiled_once.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def engines_are_closed():
    """What runs on would disturb the tests after it: checks of annotations draw numbers that Hypothesis sees."""
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("glmjax")]


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu run where JAX was told to use one (`make gpu`), those marked soak where asked for (`make soak`)."""
    for item in items:
        if item.get_closest_marker("gpu") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu"))
        if item.get_closest_marker("soak") and "soak" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes many minutes: make soak"))
