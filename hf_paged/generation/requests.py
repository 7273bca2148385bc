"""From a prepared call to an engine `Call`: pads stripped, copies of a prompt forked, random numbers set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import MaxLengthCriteria

from hf_paged.engine.adapters import Selection
from hf_paged.engine.draws import Draws, LockstepDraws
from hf_paged.engine.lockstep import Lockstep
from hf_paged.engine.namespaces import Namespaces, assign
from hf_paged.engine.positions import most_new_tokens
from hf_paged.engine.request import Call
from hf_paged.engine.sampling import LogitsEdit, SamplingSpec
from hf_paged.generation.beams import advances_whole, beam_options, group_rows
from hf_paged.generation.given_cache import given_kv
from hf_paged.generation.lockstep import is_lockstep, row_criteria
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.speculation import speculation_of
from hf_paged.generation.states import state_record

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def build_call(
    engine: PagedEngine,
    prepared: Prepared,
    adapters: Sequence[Selection | None],
    *,
    draws: Draws | None = None,
    logprobs: int | None = None,
    raw_logprobs: bool = False,
    edit: LogitsEdit | None = None,
    namespaces: Namespaces | None = None,
    priority: int = 0,
    outputs: bool = True,
) -> Call:
    """The engine call for a prepared call that has no reason to fall back.

    Args:
        adapters: what each row runs with.
        draws: random numbers of a sampled call, of its prompts where these have beams; by default the global
            generator's, in upstream's order.
        namespaces: from `engine.namespaces`, for many calls at one moment; by default as of now.
        logprobs: how many of the likeliest tokens to report beside the chosen one; None for none.
        raw_logprobs, edit: see `SamplingSpec`.
        outputs: respect `return_dict_in_generate` of the prepared config: record scores and logits, keep the
            blocks, and let finished rows go on with pads as upstream does, for its scores and its cache.
    """
    config, ids = prepared.config, prepared.input_ids
    num_rows = len(ids)
    outputs = outputs and bool(config.return_dict_in_generate)
    filled_on = prepared.given_cache is not None
    beams = beam_options(prepared)
    copies = prepared.num_copies
    if config.do_sample and draws is None:
        draws = LockstepDraws(num_rows if beams is None else num_rows // copies)
    lockstep = is_lockstep(prepared)
    criteria, stop_sequences = row_criteria(prepared)
    spec = SamplingSpec(
        prompt_ids=ids.cpu(),
        # In lockstep the caller runs them.
        processors=[] if lockstep else prepared.processors,
        criteria=[] if lockstep else criteria,
        stop_sequences=stop_sequences,
        do_sample=bool(config.do_sample),
        draws=draws,
        pad_token_id=pad_token_id(prepared),
        output_scores=bool(outputs and config.output_scores and not lockstep),
        output_logits=bool(outputs and config.output_logits and not lockstep),
        logprobs=logprobs,
        raw_logprobs=raw_logprobs,
        edit=edit,
        beams=beams,
    )
    if namespaces is None and not _leaves_nothing(engine, prepared, outputs):
        namespaces = engine.namespaces(adapters)
    states = state_record(engine, prepared) if outputs else None
    call = Call(
        sampling=spec,
        ambient=engine.ambient(),
        namespace=None if namespaces is None else namespaces[adapters[0]],
        priority=priority,
        run_on=beams is None and (outputs or filled_on or lockstep or rows_go_on(prepared)),
        keep_kv=outputs or filled_on,
        lockstep=Lockstep(num_rows) if lockstep else None,
        states=states,
        speculation=None if lockstep or states is not None else speculation_of(prepared),
    )
    lengths = prepared.prompt_lengths
    # At least 1: what has no position for its first token the engine refuses as it is.
    most = max(1, most_new_tokens(engine.position_limit, max(lengths), prepared.max_new_tokens))
    call.position_bound = most < prepared.max_new_tokens
    embeds = prepared.inputs_embeds
    # Ids that stand for embeddings are looked at by nobody.
    all_tokens = ids.tolist() if embeds is None else [[0] * prepared.prompt_width] * num_rows
    for row, (tokens, length) in enumerate(zip(all_tokens, lengths, strict=True)):
        first = row - row % copies
        num_pad = len(tokens) - length
        given = given_kv(prepared, row, num_pad)
        sequence = call.add_row(
            tokens[num_pad:],
            most,
            num_pad=num_pad,
            fork_of=first if first != row and beams is None and given is None else None,
        )
        sequence.adapters = adapters[row]
        sequence.own_namespace = None if namespaces is None else namespaces[adapters[row]]
        sequence.given_kv = given
        sequence.embeds = None if embeds is None else embeds[row, num_pad:].detach()
    if namespaces is not None:
        assign(call, namespaces)
    if beams is not None:
        group_rows(call, copies, whole=outputs or advances_whole(prepared))
    return call


def _leaves_nothing(engine: PagedEngine, prepared: Prepared, outputs: bool) -> bool:
    """Whether a call makes one token of a prompt too short to be worth caching.

    It ends with its first step and leaves no KV, so nobody asks which weights it was computed with.
    """
    short = prepared.prompt_width <= 2 * engine.config.block_size
    return short and prepared.max_new_tokens == 1 and not outputs


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
    return any(not isinstance(c, MaxLengthCriteria) for c in prepared.criteria)
