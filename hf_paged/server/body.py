"""From the bytes of a body to a checked model of it; errors name the field."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from hf_paged.server.errors import APIError, bad_request

M = TypeVar("M", bound=BaseModel)

#: Validation errors of one field that are told: a union lists one for each of its members.
_TOLD = 4


async def read_body(request: Request, model: type[M], timeout: float) -> M:
    """The body of `request` as a `model`.

    Args:
        timeout: seconds the client has to send it. How many bytes it may have is for the middleware.

    Raises:
        APIError: 400 with what is wrong, 408, or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, "the body must be JSON, with the header Content-Type: application/json")
    try:
        async with asyncio.timeout(timeout):
            body = await request.body()
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {timeout:g} s") from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _bad_body(error) from None


def _bad_body(error: ValidationError) -> APIError:
    details = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"{param}: this server does not support this field", param)
    same = [d for d in details if d["loc"][:1] == first["loc"][:1]][:_TOLD]
    messages = dict.fromkeys(d["msg"].removeprefix("Value error, ").strip() for d in same)
    return bad_request(f"{param or 'the body'}: {'; or: '.join(messages)}", param)


def _field(loc: tuple[int | str, ...]) -> str | None:
    """`messages[2].content` of ("messages", 2, "content", "str"): without the names of members of a union."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif name and not part.isidentifier():
            break
        else:
            name += f".{part}" if name else part
    for member in (".str", ".int", ".float", ".bool"):
        name = name.removesuffix(member)
    return name[:200] or None


def openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model` from its body by itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
