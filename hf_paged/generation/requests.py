"""From a prepared call to an engine `Call`: pads stripped, copies of a prompt forked, random numbers set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import MaxLengthCriteria, MaxTimeCriteria

from hf_paged.engine.draws import Draws, LockstepDraws
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampling import SamplingSpec
from hf_paged.generation.checks import num_prompt_tokens
from hf_paged.generation.prepared import Prepared

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def build_call(
    engine: PagedEngine,
    prepared: Prepared,
    *,
    draws: Draws | None = None,
    logprobs: int | None = None,
    adapter: str | None = None,
    priority: int = 0,
    keep_kv: bool = False,
    run_on: bool = False,
    on_token: Callable[[Sequence, int], None] | None = None,
    on_finish: Callable[[Call], None] | None = None,
) -> Call:
    """The engine call for a prepared call that has no reason to fall back.

    Args:
        draws: random numbers of a sampled call; by default the global generator's, in upstream's order.
        logprobs: how many of the likeliest tokens to report beside the chosen one; None for none.
        keep_kv: blocks stay with the sequences after the end.
        run_on: finished rows go on with pads, as upstream's do; needed for scores and a returned cache.
    """
    config, ids = prepared.config, prepared.input_ids
    num_rows = len(ids)
    if config.do_sample and draws is None:
        draws = LockstepDraws(num_rows)
    spec = SamplingSpec(
        prompt_ids=ids.cpu(),
        processors=prepared.processors,
        criteria=prepared.criteria,
        do_sample=bool(config.do_sample),
        draws=draws,
        pad_token_id=pad_token_id(prepared),
        output_scores=bool(config.return_dict_in_generate and config.output_scores),
        output_logits=bool(config.return_dict_in_generate and config.output_logits),
        logprobs=logprobs,
    )
    call = Call(
        sampling=spec,
        ambient=engine.ambient(),
        namespace=engine.namespace(adapter),
        priority=priority,
        run_on=run_on or rows_go_on(prepared),
        keep_kv=keep_kv,
        on_token=on_token,
        on_finish=on_finish,
    )
    copies = config.num_return_sequences or 1
    rows = zip(ids.tolist(), num_prompt_tokens(prepared).tolist(), strict=True)
    for row, (tokens, length) in enumerate(rows):
        first = row - row % copies
        call.add_row(
            tokens[len(tokens) - length :],
            prepared.max_new_tokens,
            num_pad=len(tokens) - length,
            fork_of=first if first != row else None,
        )
    return call


def has_eos(prepared: Prepared) -> bool:
    """Whether finished rows are filled with pads: upstream looks for a criterion that has EOS tokens."""
    return any(hasattr(criterion, "eos_token_id") for criterion in prepared.criteria)


def pad_token_id(prepared: Prepared) -> int | None:
    """What finished rows are filled with; None where upstream lets them go on with tokens of their own."""
    pad = prepared.config._pad_token_tensor
    return int(pad) if pad is not None and has_eos(prepared) else None


def rows_go_on(prepared: Prepared) -> bool:
    """Whether rows that are finished keep getting real tokens: without EOS, e.g. after a stop string."""
    if has_eos(prepared) or len(prepared.input_ids) == 1:
        return False
    return any(not isinstance(c, MaxLengthCriteria | MaxTimeCriteria) for c in prepared.criteria)
