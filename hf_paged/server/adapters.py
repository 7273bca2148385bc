"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, vLLM's. They exist only where the owner named a folder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from hf_paged.errors import InvalidRequestError
from hf_paged.integrations.peft_checkpoints import CONFIG, WEIGHTS, check_name, load_adapter, unload_adapter
from hf_paged.server.body import openapi_body, read_body
from hf_paged.server.errors import APIError, Route, bad_request
from hf_paged.server.protocol import LoadAdapterRequest, UnloadAdapterRequest
from hf_paged.server.state import ServerState


def router(state: ServerState, root: Path) -> APIRouter:
    """The routes that change which adapters there are.

    Args:
        root: adapters are loaded from folders below it, and from nowhere else.
    """
    routes = APIRouter(route_class=Route)
    served, config = state.served, state.config
    one_at_a_time = asyncio.Lock()

    @routes.post("/v1/load_lora_adapter", openapi_extra=openapi_body(LoadAdapterRequest))
    async def load(request: Request) -> PlainTextResponse:
        """Loads a PEFT checkpoint, after the requests that run; new ones wait meanwhile."""
        body = await read_body(request, LoadAdapterRequest, config.body_timeout)
        name, replace = body.lora_name, bool(body.load_inplace)
        folder = checkpoint_below(root, body.lora_path)
        check_rank(folder, config.max_adapter_rank)
        async with one_at_a_time:
            present = served.adapters()
            if name in served.names or name in served.standing:
                raise bad_request(f"lora_name: {name!r} is a name of the base model", "lora_name")
            if name in present and not replace:
                raise bad_request(
                    f"lora_name: {name!r} is loaded already; load_inplace replaces it", "lora_name"
                )
            if name not in present and len(present) >= config.max_adapters:
                raise bad_request(
                    f"lora_name: {len(present)} adapters are loaded, as many as may be", "lora_name"
                )
            async with state.runs.held_back():
                await asyncio.to_thread(_load, served.model, folder, name, replace, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", openapi_extra=openapi_body(UnloadAdapterRequest))
    async def unload(request: Request) -> PlainTextResponse:
        """Removes an adapter, after the requests that run."""
        body = await read_body(request, UnloadAdapterRequest, config.body_timeout)
        name = body.lora_name
        async with one_at_a_time:
            if name not in served.adapters():
                raise APIError(
                    404, f"the adapter {name!r} is not loaded", param="lora_name", code="model_not_found"
                )
            async with state.runs.held_back():
                await asyncio.to_thread(unload_adapter, served.model, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes


def _load(model: Any, folder: Path, name: str, replace: bool, shown: str) -> None:
    try:
        check_name(name)
        load_adapter(model, folder, name, replace=replace)
    except InvalidRequestError as error:
        # Where the folder lies is not the client's business.
        raise bad_request(str(error).replace(str(folder), shown), "lora_path") from None


def checkpoint_below(root: Path, path: str) -> Path:
    """The folder `path` below `root`, links followed.

    Raises:
        APIError: 400: it leads elsewhere, or holds no checkpoint in safetensors.
    """
    refused = bad_request(f"lora_path: {path!r} is no checkpoint in the folder for adapters", "lora_path")
    given = Path(path)
    if "\0" in path or given.is_absolute() or ".." in given.parts or path.startswith("~"):
        raise refused
    base = root.resolve()
    folder = (base / given).resolve()
    files = [(folder / name).resolve() for name in (CONFIG, WEIGHTS)]
    if not all(file.is_relative_to(base) for file in (folder, *files)) or not (folder / CONFIG).is_file():
        raise refused
    return folder


def check_rank(folder: Path, most: int) -> None:
    """Raises APIError (400) where the config of a checkpoint cannot be read or asks for more than rank `most`."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
        highest = max(int(rank) for rank in ranks)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise bad_request(f"lora_path: its {CONFIG} cannot be read", "lora_path") from None
    if highest > most:
        raise bad_request(f"lora_path: rank {highest}; at most {most}", "lora_path")
