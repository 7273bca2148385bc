"""From a finished engine `Call` back to what `generate()` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from hf_paged.generation.beams import assemble_beams, beam_sequences
from hf_paged.generation.given_cache import fill_on
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.requests import pad_token_id
from hf_paged.generation.returned_cache import UnfilledCache
from hf_paged.generation.states import state_fields

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call


@dataclass
class Records:
    """What upstream's loop records, float32 [rows, vocab] a step; None where it was not asked for."""

    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


def num_steps(call: Call) -> int:
    """Steps upstream's loop would have made: those of the longest row."""
    return max(s.num_generated if s.num_kept is None else s.num_kept for s in call.sequences)


def sequences_tensor(prepared: Prepared, call: Call) -> Tensor:
    """Padded prompts, new tokens, and pads to the longest row: [rows, padded length + steps] int64."""
    if call.sampling.beams is not None:
        return beam_sequences(prepared, call)
    steps, pad = num_steps(call), pad_token_id(prepared)
    rows = []
    for sequence in call.sequences:
        new = sequence.token_ids[sequence.prompt_len : sequence.prompt_len + steps]
        if len(new) < steps:
            assert pad is not None, "a row ended before the others, and there is nothing to fill it with"
            new += [pad] * (steps - len(new))
        rows.append(new)
    ids = prepared.input_ids
    return torch.cat([ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], dim=-1)


def assemble(
    engine: PagedEngine, prepared: Prepared, call: Call, records: Records | None = None
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """What upstream's loop returns for the same call.

    Args:
        records: scores and logits of a lockstep call; those of others are with the call.
    """
    if call.sampling.beams is not None:
        return assemble_beams(engine, prepared, call)
    sequences = sequences_tensor(prepared, call)
    config = prepared.config
    given = prepared.given_cache
    if given is not None:
        fill_on(given, engine, call)
        engine.release_kv(call)
    if not config.return_dict_in_generate:
        return sequences
    cache = prepared.model_kwargs.get("past_key_values") if given is None else None
    if records is None:
        spec = call.sampling
        records = Records(
            _on(spec.take_scores(), sequences.device) if config.output_scores else None,
            _on(spec.take_logits(), sequences.device) if config.output_logits else None,
        )
    fields: dict[str, Any] = {
        **state_fields(prepared, call, num_steps(call)),
        "sequences": sequences,
        "scores": records.scores,
        "logits": records.logits,
        "past_key_values": given if cache is None else UnfilledCache(cache, engine, call),
    }
    return GenerateDecoderOnlyOutput(**fields)


def _on(steps: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(step.to(device) for step in steps)
