"""The model in the box: a checkpoint directory like any other, made by `glmjax.training`.

GLM-5's architecture with 7.7 million parameters, trained on the source of CPython's standard library (PSF-2.0).
"""

from pathlib import Path

NANO = Path(__file__).parent
"""Its directory."""
