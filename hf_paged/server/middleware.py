"""What every request passes before the app sees it: keys, and how large a body may be. Plain ASGI."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_paged.server.errors import APIError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Open without a key, exactly as spelled: everything else needs one, also routes that do not exist.
OPEN_PATHS = frozenset({"/health"})


def key_digests(keys: tuple[str, ...]) -> tuple[bytes, ...]:
    """What is kept of keys: equal lengths, so that comparing takes equally long."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Guard:
    """Asks for a key, bounds the body, and numbers the requests (header `x-request-id`).

    The key's digest is left in `scope["state"]["cache_salt"]`: requests of different keys share no cached prefix,
    whose presence one could otherwise measure.
    """

    def __init__(
        self, app: ASGIApp, *, keys: tuple[str, ...], max_body_bytes: int, failed: Callable[[int], None]
    ) -> None:
        self._failed = failed
        self._app = app
        self._digests = key_digests(keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route takes a websocket
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            state["cache_salt"] = self._authorize(scope)
            self._check_announced(scope)
        except APIError as error:
            self._failed(error.status)
            await error.response()(scope, receive, numbered)
            return
        await self._app(scope, self._bounded(receive), numbered)

    def _authorize(self, scope: Scope) -> str:
        """The cache salt of the key that was given.

        Raises:
            APIError: 401.
        """
        if not self._digests:
            return ""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, so that the time tells nothing of which one was near.
        right = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(right):
            return digest.hex()
        if scope["path"] in OPEN_PATHS:
            return ""
        raise APIError(
            401,
            "a valid key is needed, as the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )

    def _check_announced(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > self._max_body_bytes):
                raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what arrives: a chunked body announces nothing."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> APIError:
        return APIError(413, f"the body may have at most {self._max_body_bytes} bytes")
