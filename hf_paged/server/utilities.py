"""The routes beside generation: models, tokens, health, metrics, version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import hf_paged
from hf_paged.server.body import openapi_body, read_body
from hf_paged.server.errors import APIError, Route, bad_request
from hf_paged.server.metrics import CONTENT_TYPE
from hf_paged.server.protocol import DetokenizeRequest, TokenizeRequest
from hf_paged.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    """The routes that only look."""
    routes = APIRouter(route_class=Route)
    served, config = state.served, state.config

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model and its adapters."""
        return {"object": "list", "data": served.cards()}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        card = next((card for card in served.cards() if card["id"] == name), None)
        if card is None:
            served.adapter_of(name)  # says that there is none
            raise APIError(404, "the model does not exist", param="model", code="model_not_found")
        return card

    @routes.post("/tokenize", openapi_extra=openapi_body(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """The token ids of a text or of a conversation."""
        body = await read_body(request, TokenizeRequest, config.body_timeout)
        served.adapter_of(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("prompt: give either prompt or messages", "prompt")
        ids = await state.runs.in_thread(_token_ids, state, body)
        return {"count": len(ids), "max_model_len": served.max_len, "tokens": ids}

    @routes.post("/detokenize", openapi_extra=openapi_body(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        body = await read_body(request, DetokenizeRequest, config.body_timeout)
        served.adapter_of(body.model)
        served.check_ids(body.tokens, "tokens")
        text = await state.runs.in_thread(served.tokenizer.decode, body.tokens)
        return {"prompt": text}

    @routes.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while requests can be served, else 503."""
        trouble = await state.trouble()
        if trouble is None:
            return Response(status_code=200)
        return APIError(503, trouble, code="engine_unavailable").response()

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text form."""
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @routes.get("/version")
    async def version() -> JSONResponse:
        """Of hf_paged."""
        return JSONResponse({"version": hf_paged.__version__})

    return routes


def _token_ids(state: ServerState, body: TokenizeRequest) -> list[int]:
    tokenizer = state.served.tokenizer
    if body.messages is None:
        special = body.add_special_tokens is not False
        return tokenizer.encode(body.prompt, add_special_tokens=special)
    text = state.served.render(body.messages, add_generation_prompt=body.add_generation_prompt is not False)
    return tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
