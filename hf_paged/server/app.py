"""`create_app`: a FastAPI app that serves one enabled model."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic.json_schema import models_json_schema

import hf_paged
from hf_paged.server import adapters, completions, protocol, utilities
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import install_handlers
from hf_paged.server.middleware import Guard
from hf_paged.server.state import ServerState


def create_app(model: Any, tokenizer: Any, config: ServerConfig | None = None, **overrides: Any) -> FastAPI:
    """An OpenAI-compatible ASGI app over a live model, for uvicorn or to mount into an app of your own.

    Requests share the batch with everything else that generates on this model in this process. The model is
    enabled if it is not yet, and then stays so.

    Args:
        model: an HF model of a supported family, a PeftModel or a pipeline around one.
        tokenizer: its tokenizer, a fast one.
        config: names and limits; `overrides` replace single fields of it.

    Raises:
        ConfigError: a field that is not allowed, or a tokenizer that cannot decode token by token.
        UnsupportedModelError: no model of a supported family inside.
    """
    config = dataclasses.replace(config or ServerConfig(), **overrides)
    if not hf_paged.is_enabled(model):
        hf_paged.enable(model)
    state = ServerState(model, tokenizer, config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        state.close()

    # No /docs: those pages load scripts from elsewhere.
    app = FastAPI(
        title="hf_paged", version=hf_paged.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.hf_paged = state
    install_handlers(app, state.metrics.failed)
    app.include_router(completions.router(state))
    app.include_router(utilities.router(state))
    if config.adapter_root is not None:
        app.include_router(adapters.router(state, config.adapter_root))
    app.add_middleware(
        Guard,
        keys=config.api_keys,
        max_body_bytes=config.max_body_bytes,
        failed=state.metrics.failed,
    )
    if config.cors_origins:
        # Outermost: a browser asks for permission without the key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    _describe_bodies(app)
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Adds the bodies that routes read by themselves to the OpenAPI schema."""
    models = [
        value
        for value in vars(protocol).values()
        if isinstance(value, type) and issubclass(value, protocol.Body) and value is not protocol.Body
    ]
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = build()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
