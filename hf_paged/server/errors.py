"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from hf_paged.errors import (
    EngineStateError,
    FallbackError,
    InvalidRequestError,
    KVCacheOutOfMemory,
    RequestCancelledError,
    WeightsChangedError,
)

logger = logging.getLogger("hf_paged.server")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
#: Seconds after which a client that was turned away may try again.
RETRY_AFTER = 1


class APIError(Exception):
    """What a client is told. The message must hold nothing of the inside: no path, no object, no traceback."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event of a stream."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def overloaded(message: str) -> APIError:
    return APIError(429, message, code="overloaded")


def as_api_error(error: BaseException) -> APIError:
    """What a client is told about any exception. What it says of the inside goes to the log only."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequestError | FallbackError):
        return bad_request(str(error))
    if isinstance(error, KVCacheOutOfMemory):
        return APIError(503, "the KV cache is full; try again later", code="kv_cache_full")
    if isinstance(error, WeightsChangedError):
        return APIError(503, "the model or adapter changed while the request ran; try again")
    if isinstance(error, EngineStateError | RequestCancelledError):
        return APIError(503, "the engine ended this request; try again", code="engine_unavailable")
    logger.error("a request failed", exc_info=error)
    return APIError(500, "the engine failed while it worked on this request", code="internal_error")


class Route(APIRoute):
    """A route whose every failure is an `APIError`: what else it raises would end the connection."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException:
                raise
            except Exception as error:
                raise as_api_error(error) from error

        return handler


def install_handlers(app: FastAPI, failed: Callable[[int], None]) -> None:
    """Makes `app` answer all errors in this form, whoever raises them.

    Args:
        failed: told the status of each.
    """

    async def api_error(_request: Request, error: Exception) -> JSONResponse:
        answer = as_api_error(error)
        failed(answer.status)
        return answer.response()

    async def http_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {404: "there is no such route", 405: "this route does not take this method"}
        answer = APIError(error.status_code, messages.get(error.status_code, str(error.detail)))
        failed(answer.status)
        response = answer.response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(APIError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, api_error)
