"""Answers that are followed by a client who may go away: events as they come, and work that ends when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from hf_paged.server.errors import APIError, as_api_error, logger

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`await work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _stop(working, watching)


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancels `tasks` and returns when all have ended: what they clean up is clean then."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of OpenAI's form.

    Ends with `[DONE]`; an error on the way becomes an event of its own, after which nothing comes but `[DONE]`.

    Args:
        events: closed when the stream ends, in whatever way.
        resources: closed after that, also where nobody took a single event.
        timeout: seconds for all of it.
        write_timeout: seconds the client has to take an event off a full connection.
        failed: called with the status of an error that the client is told of.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        resources: AsyncExitStack,
        *,
        timeout: float,
        write_timeout: float,
        failed: Callable[[int], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._resources = resources
        self._timeout = timeout
        self._write_timeout = write_timeout
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        patience = _Patience(self._write_timeout)
        writing = asyncio.ensure_future(self._write(send, patience))
        watching = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({writing, watching, patience.over}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            elif patience.over.done():
                # Returning without the last part closes the connection.
                logger.info("a client took nothing for %g s and was disconnected", self._write_timeout)
        finally:
            patience.end()
            await _stop(writing, watching)
            await self._events.aclose()
            await self._resources.aclose()

    async def _write(self, send: Send, patience: _Patience) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout
        with patience:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (chunk := await self._next(deadline)) is not None:
            with patience:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        with patience:
            await send({"type": "http.response.body", "body": DONE})

    async def _next(self, deadline: float) -> bytes | None:
        """The next event; what goes wrong as an event, the last one; None after the last."""
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(self._events)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            error = APIError(504, f"the request did not end within {self._timeout:g} s", code="timeout")
        except Exception as reason:
            error = as_api_error(reason)
        return await self._failure(error)

    async def _failure(self, error: APIError) -> bytes:
        """Ends the events; the one that tells the client why."""
        await self._events.aclose()
        self._failed(error.status)
        return event(error.body)


class _Patience:
    """A watch over the writes of one stream: one timer for all of them, which costs a write next to nothing.

        with patience:
            await send(...)

    Args:
        seconds: that one write may take.

    Attributes:
        over: done once one has taken longer.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._since: float | None = None  # when the write that runs began
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._timer = self._loop.call_later(seconds, self._look)

    def __enter__(self) -> None:
        self._since = self._loop.time()

    def __exit__(self, *_error: object) -> None:
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._seconds
        if due > now:
            self._timer = self._loop.call_at(due, self._look)
        elif not self.over.done():
            self.over.set_result(None)

    def end(self) -> None:
        """Stops watching."""
        self._timer.cancel()
        self.over.cancel()
