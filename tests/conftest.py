"""Every test runs on the CPU, and every annotated shape is checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("glmjax", "beartype.beartype")
