"""Preparations that other requests may use, as long as nothing they were made of has changed.

Upstream takes about a millisecond to prepare a request, for the same result wherever options and configs are equal.
A preparation is shared where none of its parts belongs to one prompt, and beyond one caller's requests only where
upstream has nothing to say while it prepares: what it warns of, it shall warn of each time.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process as upstream
from transformers.generation import stopping_criteria

from hf_paged.generation.config_memo import ModelConfig, content, is_plain
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: Built-ins without a state, a prompt or a length of their own: one object may serve all requests of a
#: config.
_FREE = frozenset(
    {
        upstream.EpsilonLogitsWarper,
        upstream.EtaLogitsWarper,
        upstream.InfNanRemoveLogitsProcessor,
        upstream.LogitNormalization,
        upstream.MinPLogitsWarper,
        upstream.NoRepeatNGramLogitsProcessor,
        upstream.RepetitionPenaltyLogitsProcessor,
        upstream.SuppressTokensLogitsProcessor,
        upstream.TemperatureLogitsWarper,
        upstream.TopKLogitsWarper,
        upstream.TopPLogitsWarper,
        upstream.TypicalLogitsWarper,
        stopping_criteria.EosTokenCriteria,
        stopping_criteria.MaxLengthCriteria,  # made anew for each length
        stopping_criteria.StopStringCriteria,
    }
)
#: The same, but made for prompts of one length.
_BOUND_TO_LENGTH = frozenset(
    {
        upstream.ExponentialDecayLengthPenalty,
        upstream.ForcedBOSTokenLogitsProcessor,
        upstream.ForcedEOSTokenLogitsProcessor,
        upstream.MinLengthLogitsProcessor,
        upstream.MinNewTokensLengthLogitsProcessor,
        upstream.SuppressTokensAtBeginLogitsProcessor,
    }
)
#: Arguments of which upstream makes nothing but parts in `_FREE`, and says nothing each time.
_KNOWN = frozenset(
    """
    max_new_tokens do_sample temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
    no_repeat_ngram_size renormalize_logits remove_invalid_values suppress_tokens eos_token_id pad_token_id
    """.split()  # noqa: SIM905 - names read better without quotes
)
_MOST = 64  # sets of options to remember for a model
_PREPARING = ("_prepare_", "_get_", "_validate_", "_extract_", "_expand_", "_supports_", "_maybe_", "_merge_")
#: Upstream's methods that take part in a preparation.
_METHODS = ("generate", *(name for name in vars(GenerationMixin) if name.startswith(_PREPARING)))
#: Older transformers say of every request whose config has no pad token which one they take.
_NAMES_PADS = "batch_size" not in inspect.signature(GenerationMixin._prepare_special_tokens).parameters


class Preparations:
    """Those of requests whose arguments are equal but for the prompt, its length and `max_new_tokens`.

    Args:
        lasting: they serve more than one caller.
    """

    def __init__(self, *, lasting: bool = False) -> None:
        self._lasting = lasting
        #: By the config's other options, `max_new_tokens` and prompt length; None: for every limit and length.
        self._known: dict[tuple[Hashable, int | None, int | None], Prepared] = {}

    def find(self, options: Hashable, limit: int | None, length: int) -> Prepared | None:
        """One for these options and, where it matters, this limit and length of the prompt."""
        if limit is None:
            return None
        return self._known.get((options, None, None)) or self._known.get((options, limit, length))

    def keep(self, prepared: Prepared, options: Hashable, limit: int | None, length: int) -> None:
        """Remembers `prepared`, a native one, if others may use it."""
        # Beam search reads more than its criteria from the config, which is made for one length.
        if limit is None or prepared.max_length != length + limit or prepared.method == "_beam_search":
            return
        parts = {type(part) for part in (*prepared.processors, *prepared.criteria)}
        if self._lasting:
            if parts <= _FREE and prepared.method == "_sample" and not _is_spoken_of(prepared):
                self._known[options, None, None] = prepared
        elif parts <= _FREE:
            self._known[options, None, None] = prepared
        elif parts <= _FREE | _BOUND_TO_LENGTH:
            self._known[options, limit, length] = prepared


@dataclass(frozen=True)
class _Entry:
    model_config: ModelConfig
    preparations: Preparations


_entries: weakref.WeakKeyDictionary[PagedEngine, dict[Hashable, _Entry]] = weakref.WeakKeyDictionary()


def preparations_of(
    model: GenerativeModel,
    engine: PagedEngine,
    config: GenerationConfig | None,
    kwargs: Mapping[str, Any],
) -> Preparations:
    """Where requests of `model` with `config` and `kwargs` find those of earlier ones; a new place if there is none."""
    key = _key(model, config, kwargs)
    if key is None:
        return Preparations()
    entries = _entries.get(engine)
    if entries is None:
        entries = _entries.setdefault(engine, {})
    entry = entries.get(key)
    if entry is None or not entry.model_config.is_still(model.config):
        if len(entries) >= _MOST:
            entries.clear()
        entry = entries[key] = _Entry(ModelConfig.of(model.config), Preparations(lasting=True))
    return entry.preparations


def _key(
    model: GenerativeModel, config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> Hashable | None:
    """Equal for requests that upstream prepares alike; None where that cannot be told."""
    own = model.generation_config
    if any(c is not None and _is_length_spoken_of(c) for c in (own, config)):
        return None
    if not kwargs.keys() <= _KNOWN or not all(map(is_plain, kwargs.values())):
        return None
    contents = (content(own), None if config is None else _without_limit(content(config)))
    if contents[0] is None or (config is not None and contents[1] is None):
        return None
    methods = tuple([getattr(type(model), name) for name in _METHODS])
    if not all(m.__module__.startswith("transformers.") for m in methods) or _is_overridden(model):
        return None
    options = tuple(
        [
            (name, tuple(value) if type(value) is list else value, type(value))
            for name, value in kwargs.items()
            if name != "max_new_tokens"
        ]
    )
    # Tensors made in inference mode may be of no use outside of it.
    return (type(model), methods, model.device, torch.is_inference_mode_enabled(), *contents, options)


def _is_length_spoken_of(config: GenerationConfig) -> bool:
    """Whether upstream warns of lengths: of two that are given, or of a least one beyond the greatest."""
    if any(getattr(config, name, None) is not None for name in ("max_length", "min_new_tokens")):
        return True
    return bool(getattr(config, "min_length", None))


def _without_limit(options: tuple[Any, ...] | None) -> Hashable | None:
    """The `content` of a config, the same whatever its `max_new_tokens`."""
    if options is None:
        return None
    names, values, types = options
    return (
        names,
        tuple([None if n == "max_new_tokens" else v for n, v in zip(names, values, strict=True)]),
        types,
    )


def _is_overridden(model: GenerativeModel) -> bool:
    """Whether the instance has preparing methods of its own, beside the `generate` of an enabled one."""
    return any(name in vars(model) for name in _METHODS[1:])


def _is_spoken_of(prepared: Prepared) -> bool:
    """Whether upstream warns each time it prepares such a request."""
    eos = prepared.config._eos_token_tensor
    if eos is None:
        return False
    return min(eos.tolist()) < 0 or (_NAMES_PADS and prepared.config.pad_token_id is None)
