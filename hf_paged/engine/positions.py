"""Learned positions: a model has so many, and a row that needs one more ends its call as upstream ends it.

Upstream's rows advance together, those that are finished too, so the longest prompt of a call decides how many tokens
all of its rows can get. The last of these is never fed back: it needs no position.
"""

from __future__ import annotations

from hf_paged.engine.request import Sequence


def most_new_tokens(limit: int | None, longest_prompt: int, wanted: int) -> int:
    """Tokens that rows can get before the model runs out of positions, at most `wanted`; below 1 if none fits.

    Args:
        limit: positions the model has; None for a model that counts them without an end.
        longest_prompt: of the call, in tokens, pads not counted.
    """
    return wanted if limit is None else min(wanted, limit - longest_prompt + 1)


def needs_another(sequence: Sequence) -> bool:
    """Whether `sequence` goes on though no position is left for its newest token."""
    return (
        sequence.call.position_bound
        and sequence.finish_reason is None
        and sequence.num_generated >= sequence.max_new_tokens
    )


def out_of_positions(prompt_len: int, num_generated: int) -> IndexError:
    """What upstream's embedding raises on a CPU, and a note of what it means."""
    error = IndexError("index out of range in self")
    error.add_note(
        f"{prompt_len} prompt tokens and {num_generated} new ones need more positions than the model has learned "
        "(max_position_embeddings of its config). Give fewer prompt tokens or a smaller max_new_tokens"
    )
    return error
