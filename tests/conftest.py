"""Every test runs on the CPU unless told otherwise, and every annotated shape is checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("glmjax", "beartype.beartype")

import pytest


def pytest_collection_modifyitems(items):
    """Tests marked gpu run where JAX was told to use one (`make gpu`)."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu"))
