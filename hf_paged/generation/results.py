"""What a request of `generate_many` or `submit` ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_paged.engine.beam_state import FinishedBeam, finished_beams
from hf_paged.engine.request import FinishReason

if TYPE_CHECKING:
    from hf_paged.engine.request import Call
    from hf_paged.engine.sampling import TokenLogprobs


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds since a request was handed to the engine; None where it did not come to that."""

    queued: float | None = None  # until a step first computed some of it
    time_to_first_token: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class GenerationResult:
    """One generated sequence.

    Attributes:
        token_ids: the new tokens, an end-of-sequence token included.
        finish_reason: "stop", "length", "timeout", "cancelled" or "error".
        error: what went wrong, with "error" and "cancelled"; `token_ids` are those made before.
        prompt_length: tokens of the prompt.
        cached_length: those of them that were found in the prefix cache.
        beams: with beam search, the `num_return_sequences` best, the best first: `token_ids` are those of the first.
        logprobs: for each new token its log-probability and the likeliest ones, if they were asked for.
        metrics: times of this request.
    """

    token_ids: list[int]
    finish_reason: str
    error: BaseException | None = None
    prompt_length: int = 0
    logprobs: list[TokenLogprobs] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    cached_length: int = 0
    beams: list[FinishedBeam] | None = None


def result_of(call: Call) -> GenerationResult:
    """The result of a finished call of one prompt."""
    sequence = call.sequences[0]
    spec = call.sampling
    beams = None
    token_ids = sequence.generated_ids
    if spec.beams is not None and sequence.group is not None:
        ended = call.error is None and sequence.finish_reason is not None
        beams = finished_beams(sequence.group)[0] if ended else []
        token_ids = beams[0].token_ids if beams else []
    return GenerationResult(
        token_ids=token_ids,
        finish_reason=str(sequence.finish_reason or FinishReason.ERROR),
        error=call.error,
        prompt_length=sequence.prompt_len,
        logprobs=None if spec.logprobs is None else spec.token_logprobs[0][: len(token_ids)],
        metrics=RequestMetrics(
            _since(call, call.first_scheduled_at),
            _since(call, call.first_token_at),
            _since(call, call.finished_at),
        ),
        cached_length=sequence.num_cached_prompt,
        beams=beams,
    )


def _since(call: Call, moment: float | None) -> float | None:
    return None if moment is None else moment - call.submitted_at
