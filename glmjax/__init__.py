"""glmjax: GLM-5-class models in JAX.

    import glmjax
    glm = glmjax.load()                      # the model in the box; or a checkpoint's directory
    for token in glm.generate("def fibonacci(n):", temperature=0, max_new_tokens=64):
        print(token.text, end="", flush=True)

The public names are imported when they are first used, so that ``import glmjax`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmjax.client.client import AsyncClient, Client
    from glmjax.decoding import Generation, Statistics, Token
    from glmjax.glm import GLM, Output, Trace, load
    from glmjax.kept_programs import compilation_cache
    from glmjax.model.config import ConfigError, GlmConfig
    from glmjax.model.sampling_params import SamplingParams
    from glmjax.model.shards import CheckpointError
    from glmjax.serving.config import EngineConfig
    from glmjax.serving.engine import Engine
    from glmjax.serving.hooks import Hooks

_WHERE = {
    "load": "glmjax.glm",
    "GLM": "glmjax.glm",
    "Output": "glmjax.glm",
    "Trace": "glmjax.glm",
    "Generation": "glmjax.decoding",
    "Statistics": "glmjax.decoding",
    "Token": "glmjax.decoding",
    "SamplingParams": "glmjax.model.sampling_params",
    "GlmConfig": "glmjax.model.config",
    "ConfigError": "glmjax.model.config",
    "CheckpointError": "glmjax.model.shards",
    "Engine": "glmjax.serving.engine",
    "EngineConfig": "glmjax.serving.config",
    "Hooks": "glmjax.serving.hooks",
    "Client": "glmjax.client.client",
    "AsyncClient": "glmjax.client.client",
    "compilation_cache": "glmjax.kept_programs",
}
__all__ = [  # noqa: RUF022 (in order of importance)
    "load",
    "GLM",
    "SamplingParams",
    "Generation",
    "Token",
    "Statistics",
    "Output",
    "Trace",
    "GlmConfig",
    "ConfigError",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "Hooks",
    "Client",
    "AsyncClient",
    "compilation_cache",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'glmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
