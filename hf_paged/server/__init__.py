"""An OpenAI-compatible server over a live HuggingFace model, needs the extra `serve`.

    app = hf_paged.server.create_app(model, tokenizer)     # an ASGI app, for uvicorn or to mount in your own
    hf-paged serve MODEL_OR_PEFT_FOLDER                    # the same from the command line
    hf_paged.server.ray_app(MODEL_OR_PEFT_FOLDER, replicas=2)     # the same on Ray Serve, extra `ray`

Names are resolved at first use: importing this package alone needs no FastAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.server.app import create_app
    from hf_paged.server.config import ServerConfig
    from hf_paged.server.ray_data import RayGenerator
    from hf_paged.server.ray_serve import ray_app

__all__ = ["RayGenerator", "ServerConfig", "create_app", "ray_app"]

_HOME = {
    "create_app": "hf_paged.server.app",
    "ServerConfig": "hf_paged.server.config",
    "RayGenerator": "hf_paged.server.ray_data",
    "ray_app": "hf_paged.server.ray_serve",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
