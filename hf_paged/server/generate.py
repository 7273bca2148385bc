"""What completions and chat have in common once the body is read: submit, follow, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from hf_paged.server.answers import Form, usage
from hf_paged.server.beams import beam_jobs, best_beams, check_beams
from hf_paged.server.choice import Choice, Piece
from hf_paged.server.errors import APIError, bad_request
from hf_paged.server.jobs import make_jobs, stops_of
from hf_paged.server.protocol import Sampling
from hf_paged.server.state import ServerState
from hf_paged.server.streaming import ClientGone, EventStream, event, unless_gone

#: What a client that went away is "answered" with, for logs: nginx's number for it.
_CLIENT_GONE = 499


async def answer(
    request: Request,
    state: ServerState,
    body: Sampling,
    prompts: list[list[int]],
    form: Form,
    *,
    copies: int,
    best_of: int | None = None,
    max_tokens: int | None,
    logprobs: int | None,
) -> Response:
    """Generates `best_of` texts for each prompt and answers with the best `copies` of them.

    Args:
        best_of: None for `copies`.
        max_tokens: None for as many as fit.

    Raises:
        APIError: the request is refused, or fails before its answer has begun.
    """
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: only with stream", "stream_options")
    tried = best_of or copies
    searching = check_beams(body)
    choosing = tried > copies and not searching
    if choosing and body.stream:
        raise bad_request("best_of: the best can only be told at the end, so not with stream", "best_of")
    stops = stops_of(body, state.served, state.config)
    grammar = await state.grammar_of(body)
    jobs = make_jobs(
        body,
        prompts,
        state.served,
        state.config,
        copies=tried,
        max_tokens=max_tokens,
        logprobs=0 if choosing and logprobs is None else logprobs,
        stops=stops,
        grammar=grammar,
        key_salt=request.state.cache_salt,
    )
    if searching:
        jobs = beam_jobs(jobs, body, width=tried, kept=copies)
    async with AsyncExitStack() as resources:
        choices = await resources.enter_async_context(state.runs.started(jobs, stops))
        state.metrics.asked(len(jobs))
        if body.stream:
            include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(
                _events(state, choices, form, copies, include_usage),
                resources.pop_all(),
                timeout=state.config.request_timeout,
                write_timeout=state.config.write_timeout,
                failed=state.metrics.failed,
            )
        try:
            pieces = await unless_gone(request, _all(state, choices, searching=searching))
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)
        if choosing:
            pieces = _best(pieces, tried, copies)
        return JSONResponse(form.whole(pieces, usage(choices, 1 if searching else tried)))


async def _all(state: ServerState, choices: list[Choice], *, searching: bool) -> list[Piece]:
    first_within = state.config.queue_timeout
    try:
        async with asyncio.timeout(state.config.request_timeout):
            if searching:
                found = await asyncio.gather(*(best_beams(c, first_within) for c in choices))
                pieces = [piece for beams in found for piece in beams]
            else:
                pieces = await asyncio.gather(*(c.whole(first_within) for c in choices))
    except TimeoutError:
        seconds = state.config.request_timeout
        raise APIError(504, f"the request did not end within {seconds:g} s", code="timeout") from None
    for piece in pieces:
        state.metrics.finished(piece.finish_reason or "")
    return pieces


def _best(pieces: list[Piece], tried: int, kept: int) -> list[Piece]:
    """Of each prompt's `tried` texts the `kept` with the highest mean log-probability, the best first."""

    def mean(piece: Piece) -> float:
        return sum(entry.logprob for entry in piece.logprobs) / max(1, len(piece.logprobs))

    best = []
    for start in range(0, len(pieces), tried):
        best += sorted(pieces[start : start + tried], key=mean, reverse=True)[:kept]
    return best


async def _events(
    state: ServerState, choices: list[Choice], form: Form, copies: int, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    # OpenAI: with include_usage every chunk has the field, null in all but the last.
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    for index in range(len(choices)):
        first = form.first_chunk(index)
        if first is not None:
            yield event(form.chunk([first], **extra))
    merged = _merged(choices, state)
    try:
        async for index, piece in merged:
            yield event(form.chunk([form.piece_chunk(index, piece)], **extra))
            if piece.finish_reason is not None:
                state.metrics.finished(piece.finish_reason)
    finally:
        await merged.aclose()
    if include_usage:
        yield event(form.chunk([], usage=usage(choices, copies)))


async def _merged(choices: list[Choice], state: ServerState) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all choices as they come, each with its choice's number. The first error ends all."""
    if len(choices) == 1:
        async with _paced(choices[0], state) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def follow(index: int, choice: Choice) -> None:
        try:
            async with _paced(choice, state) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait(error)

    following = [asyncio.ensure_future(follow(i, choice)) for i, choice in enumerate(choices)]
    try:
        running = len(choices)
        while running:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            running -= item[1].finish_reason is not None
            yield item
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


@asynccontextmanager
async def _paced(choice: Choice, state: ServerState) -> AsyncIterator[AsyncGenerator[Piece, None]]:
    """The pieces of a choice, which is a stream while the block runs: as often as the number of streams allows."""
    with state.pace.stream():
        async with aclosing(choice.pieces(state.config.queue_timeout, state.pace.pause)) as pieces:
            yield pieces
