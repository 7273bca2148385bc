"""Calls of upstream's assisted decoding: which of them the engine speculates for, and with what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_paged.engine.drafting import Speculation
from hf_paged.engine.prompt_lookup import PromptLookup
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

METHOD = "_assisted_decoding"
_DEFAULT_NGRAM = 2  # as upstream's, where the config leaves it open


def speculation_reasons(engine: PagedEngine, prepared: Prepared) -> Iterator[FallbackReason]:
    """Why the drafts of an assisted call cannot be made here; other reasons are those of any call."""
    config, arguments = prepared.config, prepared.model_kwargs
    assistant = arguments.get("assistant_model")

    def assisted(detail: str) -> FallbackReason:
        return reason("assisted_decoding", detail)

    if config.assistant_early_exit is not None:
        layers = config.assistant_early_exit
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            yield assisted(f"assistant_early_exit={layers!r}")
    elif config.prompt_lookup_num_tokens is not None:
        yield from map(assisted, _lookup_problems(config))
    elif getattr(config, "use_mtp", None):
        yield assisted("use_mtp")
    elif assistant is not None:
        if getattr(config, "speculation_type", None) is not None:
            yield assisted(f"speculation_type={config.speculation_type!r}")
        for text in engine.assistant_problems(assistant):
            yield assisted(f"assistant_model: {text}")
    # It relaxes which tokens are right, so that they depend on how many are drafted.
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        yield assisted("assistant_ensemble_weight")


def _lookup_problems(config: Any) -> Iterator[str]:
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        value = getattr(config, name)
        if name == "max_matching_ngram_size" and not value:
            continue
        if not isinstance(value, int) or value < 1:
            yield f"{name}={value!r}"


def speculation_of(prepared: Prepared) -> Speculation | None:
    """How tokens are drafted for a prepared call that has no reason to fall back; None for a plain one."""
    if prepared.method != METHOD:
        return None
    config, arguments = prepared.config, prepared.model_kwargs
    if config.assistant_early_exit is not None:
        return Speculation(num_layers=config.assistant_early_exit)
    if config.prompt_lookup_num_tokens is None:
        tokenizers = arguments.get("tokenizer"), arguments.get("assistant_tokenizer")
        return Speculation(
            assistant_model=arguments["assistant_model"],
            tokenizers=None if None in tokenizers else tokenizers,  # as upstream has it
        )
    eos = config._eos_token_tensor
    return Speculation(
        PromptLookup(
            config.prompt_lookup_num_tokens,
            config.max_matching_ngram_size or _DEFAULT_NGRAM,
            frozenset() if eos is None else frozenset(eos.reshape(-1).tolist()),
        )
    )
