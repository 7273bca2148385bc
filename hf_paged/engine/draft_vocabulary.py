"""Whose token ids an assistant reads and writes: those of the model it drafts for, or others with the same texts.

An assistant has a shadow of each sequence, in its own token ids. With another vocabulary (universal assisted decoding,
Timor et al., 2025, arXiv 2502.05202) texts go between the two:

    sequence   | settled ........... | tail | drafts     anchor = number of settled tokens
    shadow     | ids of that text .. | tail | drafted    settled ids stay, so that their keys and values do

Only the tail is encoded again as tokens come, and only drafts are decoded. Where both tokenizers cut the text in
different places a draft is worse, and nothing else: drafts never decide which tokens come.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hf_paged.engine.draws import PeekedDraws
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampling import SamplingSpec

#: The tail is settled but for its last tokens when it is so many times as long as these.
_SETTLE_AT = 4
#: What decoders write for bytes that are no character yet.
_INCOMPLETE = "\ufffd"


@dataclass
class Shadow:
    """What an assistant keeps of a sequence it drafts for."""

    sequence: Sequence  # of a call of the assistant's own
    num_known: int  # tokens the sequence had when it drafted last
    num_tokens: float  # to draft at a time, as upstream's schedule has it
    settled: list[int] = field(default_factory=list)  # leading ids of the shadow that stay as they are
    anchor: int = 0  # tokens of the sequence that these stand for


class Vocabulary(Protocol):
    """Turns sequences into shadows and drafts of the assistant into drafts of the model."""

    def call(self, call: Call, records_confidence: bool) -> Call:
        """A call of the assistant's for the shadows of `call`."""
        ...

    def start(self, sequence: Sequence, call: Call) -> Sequence:
        """A new shadow in the state that `follow` leaves an old one in."""
        ...

    def follow(self, sequence: Sequence, shadow: Shadow) -> int:
        """Makes the shadow stand for all tokens of `sequence`. Returns how many of its first ids are as before."""
        ...

    def ends(self, sequence: Sequence, token: int) -> bool:
        """Whether nothing is to be drafted from `token`, of the assistant, on."""
        ...

    def drafts(self, sequence: Sequence, shadow: Sequence, num_drafted: int) -> list[int]:
        """The last `num_drafted` ids of the shadow in ids of the model."""
        ...


class SameVocabulary:
    """The assistant's token ids are the model's: the choice can be that of the call itself."""

    def __init__(self, chooses_adapters: bool = False) -> None:
        self._chooses_adapters = chooses_adapters  # shadows run with the adapters of their sequences

    def call(self, call: Call, records_confidence: bool) -> Call:
        """Its tokens are chosen as those of `call` will be: same processors, same random numbers."""
        spec: SamplingSpec = call.sampling
        return Call(
            sampling=SamplingSpec(
                prompt_ids=spec.prompt_ids,
                processors=list(spec.processors),
                do_sample=spec.do_sample,
                draws=None if spec.draws is None else PeekedDraws(spec.draws),
                logprobs=0 if records_confidence else None,
            ),
            ambient=call.ambient,
            namespace=None,
        )

    def start(self, sequence: Sequence, call: Call) -> Sequence:
        shadow = Sequence(
            call,
            sequence.row,
            list(sequence.token_ids),
            sequence.prompt_len,
            sequence.max_new_tokens,
            num_pad=sequence.num_pad,
        )
        if self._chooses_adapters:
            shadow.adapters = sequence.adapters
        return shadow

    def follow(self, sequence: Sequence, shadow: Shadow) -> int:
        ids, common = shadow.sequence.token_ids, shadow.num_known
        common += _num_equal(ids[common:], sequence.token_ids[common:])
        ids[common:] = sequence.token_ids[common:]
        shadow.sequence.call.sampling.rewind(sequence.row, common - sequence.prompt_len)
        return common

    def ends(self, sequence: Sequence, token: int) -> bool:
        return token in sequence.call.sampling.eos_token_ids

    def drafts(self, sequence: Sequence, shadow: Sequence, num_drafted: int) -> list[int]:
        return shadow.token_ids[len(shadow.token_ids) - num_drafted :]


class OtherVocabulary:
    """The assistant has a tokenizer of its own. It drafts greedily: its scores mean nothing to the call's processors.

    Args:
        tokenizer, assistant_tokenizer: copies that only engines use, see `own_tokenizer`.
        assistant: whose `generation_config` says how far texts overlap and what ends them.
        vocab_size: token ids the model knows; a tokenizer may have more.
    """

    def __init__(self, tokenizer: Any, assistant_tokenizer: Any, assistant: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._theirs = assistant_tokenizer
        self._vocab_size = vocab_size
        self._their_vocab_size: int = assistant.get_input_embeddings().num_embeddings
        config = assistant.generation_config
        self._lookbehind = max(0, int(drafting_option(config, "target_lookbehind")))
        self._their_lookbehind = max(0, int(drafting_option(config, "assistant_lookbehind")))
        eos = getattr(config, "eos_token_id", None)
        self._eos = {assistant_tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def call(self, call: Call, records_confidence: bool) -> Call:
        no_prompt = torch.zeros(call.sampling.num_rows, 0, dtype=torch.int64)
        spec = SamplingSpec(prompt_ids=no_prompt, logprobs=0 if records_confidence else None)
        return Call(sampling=spec, ambient=call.ambient, namespace=None)

    def start(self, sequence: Sequence, call: Call) -> Sequence:
        ids = self._encode_theirs(self._text(sequence, 0), special=True)
        return Sequence(call, sequence.row, ids, len(ids), sequence.max_new_tokens)

    def follow(self, sequence: Sequence, shadow: Shadow) -> int:
        self._settle(sequence, shadow)
        text = self._text(sequence, shadow.anchor)
        ids = shadow.settled + self._encode_theirs(text, special=not shadow.anchor)
        common = _num_equal(shadow.sequence.token_ids, ids)
        shadow.sequence.token_ids[:] = ids
        return common

    def ends(self, sequence: Sequence, token: int) -> bool:
        return token in self._eos

    def drafts(self, sequence: Sequence, shadow: Sequence, num_drafted: int) -> list[int]:
        start = len(shadow.token_ids) - num_drafted
        text = _text_after(self._theirs, shadow.token_ids, start, self._their_lookbehind).rstrip(_INCOMPLETE)
        if not text:
            return []
        for width in range(min(self._lookbehind, sequence.num_tokens), -1, -1):
            window = sequence.token_ids[sequence.num_tokens - width :]
            ids = _encode(self._tokenizer, _decode(self._tokenizer, window) + text, special=False)
            if ids[:width] == window:  # as a rule at once; with no window always
                return _known(ids[width:], self._vocab_size)
        return []

    def _settle(self, sequence: Sequence, shadow: Shadow) -> None:
        """Makes the tail shorter where it is long, and no character is cut by that."""
        end = sequence.num_tokens - self._lookbehind
        if end - shadow.anchor < (_SETTLE_AT - 1) * max(1, self._lookbehind):
            return
        text = _text_after(self._tokenizer, sequence.token_ids[:end], shadow.anchor, self._lookbehind)
        if text.endswith(_INCOMPLETE):
            return
        shadow.settled = shadow.settled + self._encode_theirs(text, special=not shadow.anchor)
        shadow.anchor = end

    def _text(self, sequence: Sequence, start: int) -> str:
        return _text_after(self._tokenizer, sequence.token_ids, start, self._lookbehind)

    def _encode_theirs(self, text: str, *, special: bool) -> list[int]:
        return _known(_encode(self._theirs, text, special=special), self._their_vocab_size)


_copies: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_copying = threading.Lock()


def own_tokenizer(tokenizer: Any) -> Any:
    """A copy for threads that turn engines: the caller's own cannot be asked to pad while it encodes."""
    with _copying:
        known = _copies.get(tokenizer)
        if known is None or len(known) != len(tokenizer):
            known = copy.deepcopy(tokenizer)
            if (backend := getattr(known, "backend_tokenizer", None)) is not None:
                # So that no engine that encodes with it has to turn them off beside another.
                backend.no_padding()
                backend.no_truncation()
            _copies[tokenizer] = known
        return known


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _known(ids: list[int], vocab_size: int) -> list[int]:
    """`ids` up to the first that has no embedding."""
    return ids[: next((i for i, token in enumerate(ids) if token >= vocab_size), len(ids))]


def _text_after(tokenizer: Any, ids: list[int], start: int, context: int) -> str:
    """The text of `ids` from `start` on. Decoders may drop a space at the beginning, hence the context before it."""
    first = max(0, start - context)
    before, text = _decode(tokenizer, ids[first:start]), _decode(tokenizer, ids[first:])
    return text[len(before) :] if text.startswith(before) else _decode(tokenizer, ids[start:])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _num_equal(first: list[int], second: list[int]) -> int:
    """Leading items that are the same."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def drafting_option(config: Any, name: str) -> Any:
    """What an assistant's `generation_config` says of drafting: where it leaves an option open, upstream's default."""
    value = getattr(config, name, None)
    if value is None:
        defaults_of: Callable[[], dict[str, Any]] = getattr(config, "_get_default_generation_params", dict)
        value = defaults_of().get(name)
    return value
