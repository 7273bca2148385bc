"""Which of upstream's logits processors run row by row, and all those of a call over rows of many calls.

The table says of each type of what kind it is (`processor_rules`) and which parameters must agree for rows of
different calls to go through one object together. Every row sees what it would see in upstream's loop: the
padded prompt of its call, then what was generated for it.

    rule = rule_of(processor)        # None: not a type of this table, exactly
    scores = run(lines, scores)      # rows whose calls have equal `signature(processors)`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as upstream

from hf_paged.engine.processor_rules import (
    BatchRule,
    HistoryRule,
    LengthRule,
    Line,
    NGramRule,
    RepetitionRule,
    Rule,
    SortRule,
)


def rule_of(processor: object) -> Rule | None:
    """How to run `processor` on some rows; None if its type, exactly, is not known here."""
    return _RULES.get(type(processor))


class Signature:
    """Equal for calls whose rows can go through `run` together."""

    def __init__(self, *values: Hashable) -> None:
        self._values = values
        # Keys can be long lists of banned words, and are looked up for every row of every step.
        self._hash = hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Signature) and self._hash == other._hash and self._values == other._values


def signature(processors: Sequence[object]) -> Signature:
    """The signature of a call with `processors`, which must all have a rule."""
    return Signature(*((type(p), _RULES[type(p)].key(p)) for p in processors))


def need_history(processors: Sequence[object]) -> bool:
    """Whether any of `processors` wants to see a row's newest token on the host."""
    return any(_RULES[type(p)].needs_history for p in processors)


def prepare(processors: Sequence[Any]) -> list[Any]:
    """`processors`, with what the host reads of them on the host."""
    return [_RULES[type(p)].prepare(p) for p in processors]


def run(lines: list[Line], scores: Tensor) -> Tensor:
    """All processors of `lines`, in order.

    Args:
        lines: of calls with equal `signature`.
        scores: [len(lines), vocab] float32; not written to.

    Returns:
        [len(lines), vocab]; `scores` itself where nothing changed it.
    """
    for stage, processor in enumerate(lines[0].processors):
        scores = _RULES[type(processor)].apply(stage, lines, scores)
    return scores


def _attributes(*names: str) -> Callable[[Any], Hashable]:
    """A key of these attributes, tensors by value."""

    def key(processor: Any) -> Hashable:
        values = (getattr(processor, name) for name in names)
        return tuple(_by_value(v.tolist()) if isinstance(v, Tensor) else v for v in values)

    return key


def _by_value(value: Any) -> Hashable:
    return tuple(_by_value(v) for v in value) if isinstance(value, list) else value


def _bias_key(processor: Any) -> Hashable:
    return tuple(processor.sequence_bias.items())


def _bias_window(processor: Any) -> int:
    # Not the longest prefix: transformers before 5.17 ignores a sequence longer than the context, prefix or
    # not.
    return max(len(sequence) for sequence in processor.sequence_bias)


def _select_encoder_ids(held: list[tuple[Any, int]]) -> Callable[[Tensor, Tensor], Tensor]:
    merged = copy.copy(held[0][0])
    rows = [processor.encoder_input_ids[row] for processor, row in held]
    width = max(len(ids) for ids in rows)
    # Only the set of tokens counts: a short prompt repeats its last one.
    merged.encoder_input_ids = torch.stack(
        [torch.cat([ids, ids[-1:].expand(width - len(ids))]) if len(ids) < width else ids for ids in rows]
    )
    return merged


def _select_ngrams(held: list[tuple[Any, int]]) -> Callable[[Tensor, Tensor], Tensor]:
    merged = copy.copy(held[0][0])
    merged.generated_ngrams = [processor.generated_ngrams[row] for processor, row in held]
    merged.batch_size = len(held)
    return merged


_EOS = _attributes("eos_token_id")
_MIN_KEPT = ("filter_value", "min_tokens_to_keep")

_RULES: dict[type, Rule] = {
    upstream.TemperatureLogitsWarper: Rule(_attributes("temperature")),
    upstream.TopKLogitsWarper: Rule(_attributes("top_k", *_MIN_KEPT)),
    upstream.TopPLogitsWarper: SortRule(_attributes("top_p", *_MIN_KEPT)),
    upstream.TopHLogitsWarper: Rule(_attributes("top_h", "top_n", "filter_value")),
    upstream.MinPLogitsWarper: Rule(_attributes("min_p", *_MIN_KEPT)),
    upstream.TypicalLogitsWarper: SortRule(_attributes("mass", *_MIN_KEPT)),
    upstream.EpsilonLogitsWarper: Rule(_attributes("epsilon", *_MIN_KEPT)),
    upstream.EtaLogitsWarper: Rule(_attributes("epsilon", *_MIN_KEPT)),
    upstream.InfNanRemoveLogitsProcessor: Rule(_attributes()),
    upstream.LogitNormalization: Rule(_attributes()),
    upstream.SuppressTokensLogitsProcessor: Rule(_attributes("suppress_tokens")),
    upstream.BarkEosPrioritizerLogitsProcessor: Rule(_attributes("eos_token_id", "min_eos_p")),
    upstream.MinLengthLogitsProcessor: LengthRule(_EOS, lambda p, n: n < p.min_length or None),
    upstream.MinNewTokensLengthLogitsProcessor: LengthRule(
        _EOS, lambda p, n: n - p.prompt_length_to_skip < p.min_new_tokens or None
    ),
    upstream.ForcedBOSTokenLogitsProcessor: LengthRule(
        _attributes("bos_token_id"), lambda p, n: n == 1 or None
    ),
    upstream.ForcedEOSTokenLogitsProcessor: LengthRule(_EOS, lambda p, n: n == p.max_length - 1 or None),
    upstream.ExponentialDecayLengthPenalty: LengthRule(
        _attributes("regulation_factor", "eos_token_id"),
        lambda p, n: n - p.regulation_start if n > p.regulation_start else None,
    ),
    upstream.SuppressTokensAtBeginLogitsProcessor: LengthRule(
        _attributes("begin_suppress_tokens"), lambda p, n: n == p.begin_index or None
    ),
    upstream.AlternatingCodebooksLogitsProcessor: LengthRule(
        _attributes("input_start_len", "semantic_vocab_size", "codebook_size"), lambda p, n: n
    ),
    upstream.SequenceBiasLogitsProcessor: HistoryRule(_bias_key, _bias_window),
    upstream.NoBadWordsLogitsProcessor: HistoryRule(_bias_key, _bias_window),
    upstream.NoRepeatNGramLogitsProcessor: NGramRule(_attributes("ngram_size"), lambda p: None),
    upstream.RepetitionPenaltyLogitsProcessor: RepetitionRule(_attributes("penalty")),
    upstream.WatermarkLogitsProcessor: HistoryRule(
        _attributes(
            "vocab_size",
            "greenlist_size",
            "bias",
            "hash_key",
            "seeding_scheme",
            "context_width",
            "table_size",
        ),
        lambda p: p.context_width,
    ),
    upstream.WhisperTimeStampLogitsProcessor: HistoryRule(id, lambda p: None),
    upstream.EncoderRepetitionPenaltyLogitsProcessor: BatchRule(
        _attributes("penalty"),
        lambda p: 0,
        lambda p: len(p.encoder_input_ids),
        _select_encoder_ids,
    ),
    upstream.EncoderNoRepeatNGramLogitsProcessor: BatchRule(
        _attributes("ngram_size"), lambda p: p.ngram_size, lambda p: p.batch_size, _select_ngrams
    ),
}
