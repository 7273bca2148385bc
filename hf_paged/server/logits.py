"""What a request changes of its own logits: biases, penalties, allowed tokens and its grammar's mask."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_paged.server.protocol import Sampling


class Mask(Protocol):
    """Follows one text and forbids what may not come next."""

    def apply(self, generated: list[int], logits: Tensor) -> None:
        """Sets the logits [vocab] of forbidden tokens to -inf, in place."""
        ...


class Grammar(Protocol):
    """What a text must look like; compiled once and shared by all choices."""

    def follow(self) -> Mask:
        """A mask for one text."""
        ...


class OwnLogits:
    """The `logits_edit` of one request: `logits + bias - penalties`, then the mask.

    The penalties are OpenAI's: for each token that was generated already, `presence` once and `frequency` each
    time.
    """

    def __init__(self, bias: Tensor, presence: float, frequency: float, mask: Mask | None) -> None:
        self._bias = bias  # [vocab] float32 on the CPU; the penalties so far are taken off it
        self._presence = presence
        self._frequency = frequency
        self._mask = mask
        self._seen: set[int] = set()
        self._num_counted = 0

    @classmethod
    def of(cls, request: Sampling, vocab_size: int, grammar: Grammar | None) -> OwnLogits | None:
        """The edits that `request` asks for; None for none."""
        presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
        asked = (request.logit_bias, request.allowed_token_ids, presence, frequency, grammar)
        if not any(asked):
            return None
        allowed = request.allowed_token_ids
        bias = torch.full((vocab_size,), 0.0 if allowed is None else -torch.inf)
        if allowed is not None:
            bias[allowed] = 0.0
        for name, value in (request.logit_bias or {}).items():
            bias[int(name)] += value
        return cls(bias, presence, frequency, None if grammar is None else grammar.follow())

    def __call__(self, generated: list[int], logits: Tensor) -> None:
        if self._presence or self._frequency:
            for token in generated[self._num_counted :]:
                self._bias[token] -= self._frequency + (0.0 if token in self._seen else self._presence)
                self._seen.add(token)
            self._num_counted = len(generated)
        logits[: len(self._bias)] += self._bias.to(logits.device)
        logits[len(self._bias) :] = -torch.inf  # ids without an embedding: they could not be fed back
        if self._mask is not None:
            self._mask.apply(generated, logits)
