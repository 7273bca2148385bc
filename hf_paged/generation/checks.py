"""Which reasons a call has to fall back: early ones, known before anything ran, and late ones, after it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache, GenerationConfig

from hf_paged.generation import given_cache, speculation
from hf_paged.generation.beams import beam_reasons
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.input_checks import input_reasons, length_reasons
from hf_paged.generation.lockstep import unserved_parts
from hf_paged.generation.prepared import Prepared, argument
from hf_paged.generation.returned_cache import UnfilledCache, fill
from hf_paged.generation.states import state_reasons
from hf_paged.generation.view import DECODING_METHODS, GenerativeModel
from hf_paged.step import current_step

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: Fields of `GenerationConfig` whose meaning for `_sample` is known and respected: natively, by a reason
#: below, or because they only act through the processors and criteria that upstream builds of them.
KNOWN_OPTIONS = frozenset(
    """
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
    do_sample num_beams use_mtp use_cache cache_implementation cache_config max_cache_len
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids renormalize_logits
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale
    watermarking_config num_return_sequences output_attentions output_hidden_states output_scores
    output_logits return_dict_in_generate pad_token_id bos_token_id eos_token_id
    encoder_no_repeat_ngram_size decoder_start_token_id is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
    max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile
    continuous_batching_config low_memory penalty_alpha dola_layers diversity_penalty
    num_beam_groups constraints force_words_ids prefill_chunk_size transformers_version
    """.split()  # noqa: SIM905 - eighty names read better without quotes
)

#: Methods the decoding loop calls on the model; one that is not upstream's own may do anything.
_LOOP_METHODS = (
    *DECODING_METHODS,
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prefill",
    "_has_unfinished_sequences",
)

#: Keyword arguments of a loop that are checked one by one, or without effect there: tokenizers only serve the
#: preparation; `labels` come from evaluation loops, and upstream takes them out again before each forward.
_LOOP_KWARGS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "use_cache",
        "logits_to_keep",
        "labels",
        "tokenizer",
        "assistant_model",  # these three are looked at where drafts are
        "assistant_tokenizer",
        "inputs_tensor",
        "output_attentions",  # generation_config has them too
        "output_hidden_states",
    }
)


def early_reasons(
    model: GenerativeModel, replaced: Any, engine: PagedEngine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[FallbackReason]:
    """Reasons that are plain before upstream's preparation runs, which may touch a streamer or a hub."""
    if os.environ.get("HF_PAGED_DISABLE", "") not in ("", "0"):
        return [reason("disabled")]
    problem = None
    if engine.adapters is not None:
        engine.adapters.sync()
        problem = engine.adapters.problem()
    # Adapters per row are the engine's own business, as long as it looks after adapters.
    served = () if engine.adapters is None else ("adapter_names",)
    found = [FallbackReason(code, text) for code, text in engine.patch.reasons() if code not in served]
    if problem is not None:
        found.append(reason("adapter_kind", problem))
    if replaced is not None:
        found.append(reason("foreign_generate"))
    found.extend(reason("decoding_overridden", name) for name in _overridden(model))
    if current_step() is not None:
        found.append(reason("nested"))

    def given(name: str) -> Any:
        return argument(model, args, kwargs, name)

    if given("custom_generate") is not None:
        found.append(reason("custom_generate"))
    if given("synced_gpus"):
        found.append(reason("synced_gpus"))
    if given("negative_prompt_ids") is not None or given("negative_prompt_attention_mask") is not None:
        found.append(reason("negative_prompt"))
    cache = given("past_key_values")
    if isinstance(cache, UnfilledCache):
        fill(cache)
    elif cache is not None and type(cache) is not DynamicCache:
        found.append(reason("past_key_values", type(cache).__name__))
    # Rerouted before any decoding loop.
    if _option(model, kwargs, given, "cache_implementation") == "paged":
        found.append(reason("cache_implementation", "'paged'"))
    return found


def request_reasons(
    model: GenerativeModel, replaced: Any, engine: PagedEngine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[FallbackReason]:
    """`early_reasons` of requests: a preparation may serve several, and must not generate itself."""
    found = early_reasons(model, replaced, engine, args, kwargs)
    if _option(model, kwargs, functools.partial(argument, model, args, kwargs), "token_healing"):
        found.append(reason("token_healing"))
    return found


def _option(model: GenerativeModel, kwargs: Mapping[str, Any], given: Any, name: str) -> Any:
    """A generation option as upstream will merge it: keyword, then config given, then the model's config."""
    for value in (
        kwargs.get(name),
        getattr(given("generation_config"), name, None),
        getattr(getattr(model, "generation_config", None), name, None),
    ):
        if value is not None:
            return value
    return None


def _overridden(model: GenerativeModel) -> Iterator[str]:
    for name in _LOOP_METHODS:
        if name in model.__dict__:
            yield name
            continue
        method = getattr(type(model), name, None)
        if method is not None and not method.__module__.startswith("transformers."):
            yield name


def late_reasons(
    model: GenerativeModel, engine: PagedEngine, prepared: Prepared, *, attended: bool = False
) -> list[FallbackReason]:
    """All reasons of a prepared call; empty when the engine serves it.

    Args:
        attended: a thread will be there to run what the user made, once a step: streamers, processors, criteria.
    """
    if prepared.method not in ("_sample", "_beam_search", speculation.METHOD):
        return [reason("hub_decoding", prepared.method)]
    if prepared.method == "_beam_search" and prepared.config.num_beams < 1:
        return [reason("beam_search", f"num_beams={prepared.config.num_beams}")]
    found = [*_mode_reasons(prepared, attended), *_option_reasons(prepared), *_kwargs_reasons(prepared)]
    if not found and (text := given_cache.problem_with(engine, prepared)) is not None:
        found.append(reason("past_key_values", text))
    if prepared.method == speculation.METHOD:
        found += speculation.speculation_reasons(engine, prepared)
    inputs = list(input_reasons(engine, model, prepared))
    found += inputs
    found += state_reasons(engine, prepared)
    if (text := unserved_parts(prepared, attended)) is not None:
        found.append(reason("processors", text))
    if prepared.method == "_beam_search":
        found += beam_reasons(model, engine, prepared)
    if not inputs:
        found += length_reasons(engine, prepared)
    return found


def _mode_reasons(prepared: Prepared, attended: bool) -> Iterator[FallbackReason]:
    if prepared.streamer is not None and not attended:
        yield reason("streamer")
    if prepared.synced_gpus:
        yield reason("synced_gpus")


def _option_reasons(prepared: Prepared) -> Iterator[FallbackReason]:
    config = prepared.config
    if not prepared.model_kwargs.get("use_cache", config.use_cache):
        yield reason("use_cache")
    if config.cache_implementation not in _dynamic_caches(prepared):
        yield reason("cache_implementation", repr(config.cache_implementation))
    for name in ("cache_config", "max_cache_len"):
        if getattr(config, name, None) is not None:
            yield reason("cache_implementation", name)
    chunk = config.prefill_chunk_size
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        yield reason("prefill_chunk_size", repr(chunk))
    for name in _unknown_options():
        if getattr(config, name, None) is not None:
            yield reason("unknown_option", name)


def _dynamic_caches(prepared: Prepared) -> tuple[str | None, ...]:
    # Older transformers set the last one themselves for assisted calls and assistants: a cache that can be cut.
    drafted = prepared.method == speculation.METHOD or prepared.config.is_assistant
    return (None, "dynamic", *(("dynamic_full",) if drafted else ()))


def _unknown_options() -> frozenset[str]:
    """Fields of the installed `GenerationConfig` that these checks have no answer to."""
    global _unknown
    if _unknown is None:
        _unknown = frozenset(n for n in vars(GenerationConfig()) if not n.startswith("_")) - KNOWN_OPTIONS
    return _unknown


_unknown: frozenset[str] | None = None


def _kwargs_reasons(prepared: Prepared) -> Iterator[FallbackReason]:
    kwargs = prepared.model_kwargs
    cache = kwargs.get("past_key_values")
    asked_for = prepared.config.cache_implementation not in _dynamic_caches(prepared)
    if (
        cache is not None
        and not asked_for
        and prepared.given_cache is None
        and type(cache) is not DynamicCache
    ):
        yield reason("past_key_values")
    # An int only says how many positions get logits, of which the loop reads the last.
    if not isinstance(kwargs.get("logits_to_keep", 0), int):
        yield reason("model_kwargs", "logits_to_keep")
    for name in sorted(kwargs.keys() - _LOOP_KWARGS):
        if kwargs[name] is not None:
            yield reason("model_kwargs", name)
