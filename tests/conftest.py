"""Every test runs on the CPU unless told otherwise, and every annotated shape is checked."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("glmjax", "beartype.beartype")

import jax
import pytest

from tests.mapped_memory import crowded


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    yield
    if crowded():
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu run where JAX was told to use one (`make gpu`), those marked soak where asked for (`make soak`)."""
    for item in items:
        if item.get_closest_marker("gpu") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu"))
        if item.get_closest_marker("soak") and "soak" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes many minutes: make soak"))
