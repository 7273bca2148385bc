"""Beam search: from upstream's preparation to groups of sequences, and from these back to what upstream returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import EosTokenCriteria, MaxLengthCriteria
from transformers.generation import GenerateBeamDecoderOnlyOutput

from hf_paged.engine import groups
from hf_paged.engine.beam_state import BeamOptions
from hf_paged.engine.request import Call, SequenceGroup
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.returned_cache import UnfilledCache
from hf_paged.generation.states import state_fields
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: What upstream's loop calls on the model besides what all loops do.
_METHODS = (
    "_flatten_beam_dim",
    "_unflatten_beam_dim",
    "_gather_beams",
    "_check_early_stop_heuristic",
    "_beam_search_has_unfinished_sequences",
    "_get_top_k_continuations",
    "_get_running_beams_for_next_iteration",
    "_update_finished_beams",
)


def beam_reasons(model: GenerativeModel, engine: PagedEngine, prepared: Prepared) -> Iterator[FallbackReason]:
    """Reasons that only beam search has."""
    for name in (*_METHODS, "_reorder_cache"):
        method = getattr(model, name, None)
        if method is not None and not method.__module__.startswith("transformers.generation"):
            yield reason("decoding_overridden", name)
    config = prepared.config
    if prepared.given_cache is not None:
        yield reason("past_key_values", "with beams")
    if getattr(config, "low_memory", None):
        yield reason("beam_search", "low_memory")
    if prepared.max_length is not None and prepared.max_length > config.max_length:
        yield reason("beam_search", "a length criterion beyond max_length")
    rows = len(prepared.input_ids) if advances_whole(prepared) else config.num_beams
    if rows > engine.config.max_num_seqs:
        yield reason(
            "beam_search", f"{rows} beams to advance together, max_num_seqs={engine.config.max_num_seqs}"
        )


def most_tokens(prepared: Prepared, prompt_lens: list[int], new_tokens: int, block_size: int) -> int:
    """Tokens of KV cache that what has to advance together may need, in whole blocks.

    Args:
        prompt_lens: of each row of the prepared call, pads not counted.
        new_tokens: most that a beam can get.
    """
    beams = prepared.config.num_beams
    lens = prompt_lens[::beams]
    parts = [lens] if advances_whole(prepared) else [[length] for length in lens]
    return block_size * max(groups.most_blocks(part, new_tokens, beams, block_size) for part in parts)


def advances_whole(prepared: Prepared) -> bool:
    """Whether the beams of all prompts advance together.

    Upstream's prompts run on until the last one is done. That shows where scores and caches are returned, and where
    a prompt may have no beam left to go on with, or find a better one after its own end.
    """
    config = prepared.config
    if config.return_dict_in_generate:
        return True
    if len(prepared.input_ids) == config.num_beams:
        return False
    known = set() if config._eos_token_tensor is None else set(config._eos_token_tensor.reshape(-1).tolist())
    for criterion in prepared.criteria:
        if type(criterion) is EosTokenCriteria:
            if not set(criterion.eos_token_id.reshape(-1).tolist()) <= known:
                return True
        elif type(criterion) is not MaxLengthCriteria:
            return True
    return config.length_penalty < 0 and bool(prepared.processors)


def beam_options(prepared: Prepared) -> BeamOptions | None:
    """What the engine must know of a beam search; None for other calls."""
    if prepared.method != "_beam_search":
        return None
    config = prepared.config
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    # As upstream has it: a pad token of 0 gives way to the end of sequence.
    fill = (pad or eos[0]) if eos is not None else -1
    return BeamOptions(
        num_beams=config.num_beams,
        num_returned=config.num_return_sequences,
        num_candidates=max(2, 1 + (0 if eos is None else eos.shape[0])) * config.num_beams,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        max_steps=config.max_length - prepared.input_ids.shape[1],
        fill_token=int(fill),
        do_sample=bool(config.do_sample),
    )


def group_rows(call: Call, num_beams: int, *, whole: bool) -> None:
    """Makes the rows of `call` the beams they are: one group a prompt, or one for all."""
    prompts = list(range(len(call.sequences) // num_beams))
    for part in [prompts] if whole else [[prompt] for prompt in prompts]:
        rows = call.sequences[part[0] * num_beams : (part[-1] + 1) * num_beams]
        group = SequenceGroup(call, num_beams, part, rows)
        for sequence in rows:
            sequence.group = group


def beam_sequences(prepared: Prepared, call: Call) -> Tensor:
    """[prompts * num_return_sequences, padded length + longest result] int64."""
    return _results(prepared, call)[0]


def assemble_beams(
    engine: PagedEngine, prepared: Prepared, call: Call
) -> Tensor | GenerateBeamDecoderOnlyOutput:
    """What upstream's `_beam_search` returns for the same call."""
    sequences, scores, beam_indices = _results(prepared, call)
    config = prepared.config
    if not config.return_dict_in_generate:
        return sequences
    (group,) = _groups(call)
    cache = prepared.model_kwargs.get("past_key_values")
    fields: dict[str, Any] = {
        **state_fields(prepared, call, group.num_steps),
        "sequences": sequences,
        "sequences_scores": scores if config.output_scores else None,
        "scores": _on(group.state.scores, sequences.device) if config.output_scores else None,
        "logits": _on(group.state.logits, sequences.device) if config.output_logits else None,
        "beam_indices": beam_indices,
        "past_key_values": None if cache is None else UnfilledCache(cache, engine, call),
    }
    return GenerateBeamDecoderOnlyOutput(**fields)


def _groups(call: Call) -> list[SequenceGroup]:
    return list(dict.fromkeys(s.group for s in call.sequences if s.group is not None))


def _results(prepared: Prepared, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [R, width] int64, their scores [R] float32, and the beams of the tokens [R, longest] int32."""
    options: BeamOptions = call.sampling.beams
    states = [group.state for group in _groups(call)]
    most = max(state.finished.shape[-1] for state in states)
    device = prepared.input_ids.device

    def gathered(name: str, fill: int) -> Tensor:
        parts = [getattr(state, name)[:, : options.num_returned].to(device) for state in states]
        return torch.cat([nn.functional.pad(p, (0, most - p.shape[-1]), value=fill) for p in parts]).flatten(
            0, 1
        )

    scores = torch.cat([s.finished_scores[:, : options.num_returned].to(device).flatten() for s in states])
    beams, tokens = gathered("finished_beams", -1), gathered("finished", options.fill_token)
    longest = int((beams >= 0).sum(dim=1).max())
    prompts = prepared.input_ids[:: options.num_beams].repeat_interleave(options.num_returned, dim=0)
    first = (
        torch.arange(len(prompts), device=device, dtype=beams.dtype)
        // options.num_returned
        * options.num_beams
    )
    beams = torch.where(beams >= 0, beams + first[:, None], beams)
    return torch.cat([prompts, tokens[:, :longest]], dim=-1), scores, beams[:, :longest]


def _on(steps: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(step.to(device) for step in steps)
