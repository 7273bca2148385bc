"""Which reasons to fall back lie in the prompts of a call: their ids or embeddings, masks, positions and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.positions import most_new_tokens
from hf_paged.generation.beams import most_tokens
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def input_reasons(
    engine: PagedEngine, model: GenerativeModel, prepared: Prepared
) -> Iterator[FallbackReason]:
    """Reasons that lie in the prompts; where there are none, `length_reasons` may be asked."""
    ids, embeds = prepared.input_ids, prepared.inputs_embeds
    if ids.ndim != 2 or ids.dtype != torch.int64 or not (ids.numel() or embeds is not None):
        yield reason("input_ids", f"{ids.dtype}, {tuple(ids.shape)}")
        return
    if embeds is not None:
        problem = _embeds_problem(model, prepared, embeds)
        if problem is not None:
            yield reason("inputs_embeds", problem)
            return
    if ids.device != model.device:
        yield reason("input_device", f"{ids.device}, not {model.device}")
    vocab_size = engine.vocab_size
    if ids.numel():
        numbers = ids.cpu().numpy()  # on small inputs many times as fast as torch
        if numbers.view(np.uint64).max() >= vocab_size:  # a negative one is very large there
            low, high = int(numbers.min()), int(numbers.max())
            yield reason("token_range", f"{low if low < 0 else high}, vocabulary of {vocab_size}")
    pad = prepared.config._pad_token_tensor
    # Upstream feeds pads to the model for rows that finish before others.
    if pad is not None and len(ids) > 1 and not 0 <= int(pad) < vocab_size:
        yield reason("token_range", f"pad_token_id={int(pad)}")
    mask, shape = prepared.attention_mask, (len(ids), prepared.prompt_width)
    if mask is not None and not _is_left_padding(prepared, mask, shape):
        yield reason("attention_mask")
    elif not _usual_positions(prepared.model_kwargs.get("position_ids"), prepared.attended, shape[1]):
        yield reason("position_ids")


def _embeds_problem(model: GenerativeModel, prepared: Prepared, embeds: Tensor) -> str | None:
    """Why these embeddings of prompts cannot be taken as upstream takes them; None if they can."""
    weight = model.get_input_embeddings().weight
    shape = (len(prepared.input_ids), embeds.shape[1] if embeds.ndim == 3 else -1, weight.shape[1])
    if tuple(embeds.shape) != shape or not embeds.shape[1]:
        return f"its shape is {tuple(embeds.shape)}"
    if embeds.dtype != weight.dtype or embeds.device != model.device:
        return f"{embeds.dtype} on {embeds.device}, the model's are {weight.dtype} on {model.device}"
    if prepared.method == "_assisted_decoding":
        return "with assisted decoding"
    if prepared.config.prefill_chunk_size is not None:
        return "with prefill_chunk_size"
    return None


def _is_left_padding(prepared: Prepared, mask: Tensor, shape: tuple[int, int]) -> bool:
    """Whether `mask` is of this shape, each row zeros, then at least one one, and nothing else."""
    if tuple(mask.shape) != shape or mask.is_complex():
        return False
    ones = prepared.attended
    if ones is None:
        return True
    known = ones | (mask == 0).cpu().numpy()
    return bool(known.all() and ones[:, -1].all() and (ones[:, 1:] | ~ones[:, :-1]).all())


def _usual_positions(positions: Tensor | None, attended: np.ndarray | None, width: int) -> bool:
    """Whether positions are those of a batch with this left padding."""
    if positions is None:
        return True
    given = positions.cpu().numpy()
    if attended is None:
        return given.shape[1:] == (width,) and bool((given == np.arange(width)).all())
    expected = (attended.cumsum(-1) - 1).clip(0)
    return given.shape == expected.shape and bool((given == expected).all())


def length_reasons(engine: PagedEngine, prepared: Prepared) -> Iterator[FallbackReason]:
    """Reasons that lie in the number of tokens alone."""
    limit = prepared.max_length
    if limit is None or not math.isfinite(limit):
        yield reason("no_length_limit")
        return
    lengths = prepared.prompt_lengths
    longest = max(lengths)
    # The last token made is never fed back: it needs no position.
    positions = longest + prepared.max_new_tokens - 1
    if engine.rope_limit is not None and positions > engine.rope_limit:
        yield reason("rope_limit", f"{positions} positions, limit {engine.rope_limit}")
    new_tokens = most_new_tokens(engine.position_limit, longest, prepared.max_new_tokens)
    if new_tokens < 1:
        return  # the engine raises upstream's error before anything runs
    capacity, size = engine.capacity_tokens(), engine.config.block_size
    needed = longest + new_tokens
    if prepared.method == "_beam_search":
        needed = max(needed, most_tokens(prepared, lengths, new_tokens, size))
    elif prepared.config.return_dict_in_generate or prepared.given_cache is not None:
        # Keys and values of all rows stay to the end.
        together = len(prepared.input_ids) * -(-needed // size) * size
        if needed <= capacity < together:
            yield reason("kv_budget", f"{together} tokens of all rows, room for {capacity}")
    if capacity < needed:
        yield reason("kv_budget", f"{needed} tokens, room for {capacity}")
