"""One generated text of an answer: followed while the engine works on it, cut where it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_paged.engine.sampling import TokenLogprobs
from hf_paged.server.errors import APIError
from hf_paged.server.jobs import Job, Stops
from hf_paged.server.text import StopScanner, TokenText

if TYPE_CHECKING:
    from hf_paged import RequestHandle


@dataclass
class Piece:
    """A part of a text. All pieces of a choice together are its text; the last one has a `finish_reason`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop token; None for the model's own end


def queue_timeout_error() -> APIError:
    return APIError(503, "the request was not started in time; try again later", code="queue_timeout")


class Choice:
    """Follows one request of the engine."""

    def __init__(self, handle: RequestHandle, job: Job, stops: Stops, tokenizer: Any) -> None:
        self.handle = handle
        self.job = job
        self.num_tokens = 0
        self.seconds: float | None = None  # from here to its end, once it has ended
        self._started = time.perf_counter()
        self._stops = stops
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._text = TokenText(self._tokenizer, self.job.prompt, self._stops.skip_special_tokens)
        self._scanner = StopScanner(self._stops.strings, self._stops.include)

    async def pieces(
        self, first_within: float | None = None, pause: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The text as it comes.

        Args:
            first_within: seconds to the first token.
            pause: waited for between two pieces; the next then has all that came meanwhile.

        Raises:
            APIError: 503, it did not come.
            Exception: what the request failed with.
        """
        updates = self.handle.updates()
        piece = Piece()
        try:
            async with asyncio.timeout(first_within):
                tokens = await anext(updates, None)
            while tokens is not None:
                for token in tokens:
                    self._take(token, piece)
                    if piece.finish_reason is not None:
                        self.seconds = time.perf_counter() - self._started
                        self.handle.cancel()  # no effect where the engine stopped by itself
                        yield piece
                        return
                if piece.text:
                    yield piece
                    piece = Piece()
                    if pause is not None and not self.handle.done:
                        await pause()
                tokens = await anext(updates, None)
        except TimeoutError:
            raise queue_timeout_error() from None
        finally:
            await updates.aclose()
        yield self._ended(piece)

    async def whole(self, first_within: float | None = None) -> Piece:
        """The whole text at once."""
        whole = Piece()
        if not self._stops.strings and first_within is None:
            await self.handle  # wakes this task once, not once a token
        async for piece in self.pieces(first_within):
            whole.text += piece.text
            whole.token_ids += piece.token_ids
            whole.logprobs += piece.logprobs
            whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        return whole

    def replayed(self, tokens: list[int]) -> Piece:
        """The whole text that `tokens`, all of them, are."""
        self._begin()
        piece = Piece()
        for token in tokens:
            self._take(token, piece)
        if piece.finish_reason is None:
            return self._ended(piece)
        self.seconds = time.perf_counter() - self._started
        return piece

    def _take(self, token: int, piece: Piece) -> None:
        """Adds one token to `piece`, which it may end."""
        stops = self._stops
        self.num_tokens += 1
        piece.token_ids.append(token)
        if self.job.logprobs is not None:
            piece.logprobs.append(self.handle.logprobs[self.num_tokens - 1])
        if token in stops.token_ids:
            text = self._text.push(token) if stops.include else ""
            piece.text += self._scanner.push(text, look=False) + self._text.flush_if_pending()
            piece.text += self._scanner.flush()
            piece.finish_reason = "stop"
            piece.stop_reason = None if token in stops.eos_token_ids else token
            return
        piece.text += self._scanner.push(self._text.push(token), look=self.num_tokens > stops.min_tokens)
        if self._scanner.stopped_by is not None:
            piece.finish_reason, piece.stop_reason = "stop", self._scanner.stopped_by

    def _ended(self, piece: Piece) -> Piece:
        """`piece` as the last one, of a text that ran into its limit."""
        self.seconds = time.perf_counter() - self._started
        piece.text += self._scanner.push(self._text.flush_if_pending())
        piece.finish_reason, piece.stop_reason = "length", self._scanner.stopped_by
        if self._scanner.stopped_by is not None:
            piece.finish_reason = "stop"
        else:
            piece.text += self._scanner.flush()
        return piece
