"""Why a call goes to the original `generate()`, and what is said about it.

Every reason has a code from `REASONS`: it is what `stats` counts, what warnings name and what
`docs/generate_support.md` lists. `hf_paged.generation.checks` finds the reasons of a call.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_paged.engine.adapters import row_adapters
from hf_paged.errors import FallbackError

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: code -> what it says when nothing more specific is known. Codes of the model itself (hooks, dropout,
#: compiled forwards) come from its patch and are not listed here.
REASONS: dict[str, str] = {
    "disabled": "HF_PAGED_DISABLE is set",
    "foreign_generate": "`generate` of this model was replaced by somebody else",
    "decoding_overridden": "the model overrides a method of the decoding loop",
    "nested": "generate was called from within a step of an engine",
    "adapter_kind": "a kind of adapter that cannot share a step",
    "custom_generate": "custom_generate is given",
    "hub_decoding": "this decoding mode is not one of transformers' own loops",
    "beam_search": "these beams cannot advance together",
    "assisted_decoding": "a kind of assisted decoding that is not served",
    "streamer": "a streamer is given for a request",
    "synced_gpus": "synced_gpus=True",
    "token_healing": "a request would have to heal its prompt",
    "negative_prompt": "a negative prompt is given",
    "use_cache": "use_cache=False",
    "cache_implementation": "a kind of cache is asked for",
    "prefill_chunk_size": "prefill_chunk_size is not a positive int",
    "output_attentions": "output_attentions=True",
    "unknown_option": "a generation option of this transformers version is not known to hf_paged",
    "past_key_values": "past_key_values is given",
    "inputs_embeds": "inputs_embeds cannot be taken as it is",
    "position_ids": "position_ids other than the usual ones are given",
    "model_kwargs": "keyword arguments for the model's forward are given",
    "input_ids": "input_ids is no int64 tensor of shape [rows, length] with at least one token",
    "token_range": "a token id is outside of the embedding",
    "attention_mask": "attention_mask is no left padding",
    "input_device": "input_ids is on another device than the model",
    "processors": "a logits processor or stopping criterion is not supported here",
    "no_length_limit": "no max_length",
    "rope_limit": "the call may cross the length at which the model's rotary embedding changes",
    "kv_budget": "the KV cache cannot hold a row of this call",
}


@dataclass(frozen=True)
class FallbackReason:
    """Why a call is served by the original `generate()`: `code` is stable, `text` is for people."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def reason(code: str, detail: str | None = None) -> FallbackReason:
    """The reason `code`, with what is particular to the call appended."""
    text = REASONS[code]
    return FallbackReason(code, f"{text} ({detail})" if detail else text)


@dataclass(frozen=True)
class Explanation:
    """What would happen to a call. It is true when the call is native."""

    native: bool
    reasons: tuple[FallbackReason, ...] = ()
    #: In what a native call's results differ from those of the original `generate`, by the user's own choice.
    notes: tuple[str, ...] = ()
    #: Adapter name -> how tokens of rows that choose it are computed: "grouped" (one product with the base for
    #: all rows, low-rank products for each group), "by adapter" (PEFT's own layers, one adapter's tokens after
    #: another), or "original" (the original `generate()`).
    adapters: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __bool__(self) -> bool:
        return self.native

    def __str__(self) -> str:
        text = "; ".join(("native", *self.notes))
        if not self.native:
            text = "falls back: " + "; ".join(map(str, self.reasons))
        if self.adapters:
            text += ". Adapters: " + ", ".join(f"{name} {path}" for name, path in self.adapters.items())
        return text


class HfPagedFallbackWarning(UserWarning):
    """A call was served by the original `generate()`. Shown once a reason and model."""


_warned: weakref.WeakKeyDictionary[PagedEngine, set[str]] = weakref.WeakKeyDictionary()
_warned_lock = threading.Lock()


def report_fallback(engine: PagedEngine, reasons: Sequence[FallbackReason]) -> None:
    """Counts, warns or raises, as `PagedConfig.fallback` says, before the original `generate()` runs.

    Args:
        engine: whose call it is.
        reasons: all reasons found, at least one; the first is the one counted.

    Raises:
        FallbackError: where the config forbids it, or with `adapter_names` that only the engine knows of. The user's
            own switch, HF_PAGED_DISABLE, never raises otherwise, nor warns.
    """
    rows = row_adapters.get()
    if rows is not None and rows.ours and rows.model is engine.model:
        raise FallbackError(
            "adapter_names needs the engine here, and the call cannot be served natively: "
            + "; ".join(map(str, reasons)),
            tuple(reasons),
        )
    if reasons[0].code == "disabled":
        engine.count_fallback("disabled")
        return
    if engine.config.forbids_fallback:
        listed = "; ".join(map(str, reasons))
        message = f"this call cannot be served natively and {engine.config.fallback_rule}: {listed}"
        raise FallbackError(message, tuple(reasons))
    engine.count_fallback(reasons[0].code)
    if engine.config.fallback == "warn":
        _warn_once(engine, reasons)


def _warn_once(engine: PagedEngine, reasons: Sequence[FallbackReason]) -> None:
    with _warned_lock:
        seen = _warned.setdefault(engine, set())
        new = [r for r in reasons if r.code not in seen]
        seen.update(r.code for r in new)
    if new:
        message = (
            "hf_paged: this call runs on the original generate(): "
            + "; ".join(map(str, new))
            + ". Further calls for the same reason are only counted in hf_paged.stats(model)."
        )
        warnings.warn(message, HfPagedFallbackWarning, stacklevel=_callers_stacklevel())


def _callers_stacklevel() -> int:
    """The `stacklevel`, for the function that calls this one, of the first frame that is no library's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in ("hf_paged", "transformers", "torch", "peft", "contextlib"):
            break
        frame, level = frame.f_back, level + 1
    return level
