"""Beam search over the protocol: vLLM's `use_beam_search`, with the search that `generate(num_beams=...)` is.

The width is `best_of`, or `n`; the answer has the `n` best texts, the best first. They are known at the end only.
"""

from __future__ import annotations

import asyncio
import dataclasses
from copy import deepcopy

from hf_paged.server.choice import Choice, Piece, queue_timeout_error
from hf_paged.server.errors import bad_request
from hf_paged.server.jobs import Job
from hf_paged.server.protocol import Sampling

#: Fields that beams leave no place for, with the values that ask for nothing.
_OF_SINGLE_TEXTS: dict[str, tuple[object, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "stop": ([],),
    "logprobs": (False,),
    "stream": (False,),
    "echo": (False,),
}
#: Scores are divided by length ** penalty; beyond, float32 overflows for lengths that are served.
_MOST_PENALTY = 10.0


def check_beams(request: Sampling) -> bool:
    """Whether `request` asks for beam search.

    Raises:
        APIError: 400, what beam search cannot do, or what only it can.
    """
    if not request.use_beam_search:
        for name, default in (("length_penalty", 1), ("early_stopping", False)):
            value = getattr(request, name)
            if value is not None and value != default:
                raise bad_request(f"{name}: only with use_beam_search", name)
        return False
    for name, nothing in _OF_SINGLE_TEXTS.items():
        value = getattr(request, name, None)
        if value is not None and value not in nothing:
            raise bad_request(f"{name}: {value!r:.40}: not with use_beam_search", name)
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_request("response_format: not with use_beam_search", "response_format")
    penalty = request.length_penalty
    if penalty is not None and abs(penalty) > _MOST_PENALTY:
        raise bad_request(
            f"length_penalty: {penalty:g} is outside of {-_MOST_PENALTY:g} to {_MOST_PENALTY:g}",
            "length_penalty",
        )
    return True


def beam_jobs(jobs: list[Job], request: Sampling, *, width: int, kept: int) -> list[Job]:
    """One search for each prompt in place of its `width` jobs."""
    searches = []
    for job in jobs[::width]:
        config = deepcopy(job.config)
        config.do_sample = False
        config.num_beams, config.num_return_sequences = width, kept
        if request.length_penalty is not None:
            config.length_penalty = float(request.length_penalty)
        if request.early_stopping is not None:
            config.early_stopping = request.early_stopping
        searches.append(dataclasses.replace(job, config=config, seed=None, logprobs=None, sequences=width))
    return searches


async def best_beams(choice: Choice, first_within: float | None) -> list[Piece]:
    """The texts of an ended search, the best first.

    Args:
        first_within: seconds until the search has to have begun.

    Raises:
        APIError: 503, it has not.
        Exception: what the search failed with.
    """
    ending = asyncio.ensure_future(_ended(choice))
    try:
        await asyncio.wait({ending}, timeout=first_within)
        if not ending.done() and choice.handle.partial().metrics.queued is None:
            raise queue_timeout_error()
        return await ending
    finally:
        ending.cancel()


async def _ended(choice: Choice) -> list[Piece]:
    result = await choice.handle
    # A search of one beam is greedy decoding: there are no beams to tell apart.
    found = [result.token_ids] if result.beams is None else [beam.token_ids for beam in result.beams]
    pieces = [choice.replayed(token_ids) for token_ids in found]
    choice.num_tokens = sum(len(piece.token_ids) for piece in pieces)
    return pieces
