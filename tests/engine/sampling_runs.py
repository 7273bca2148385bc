"""Upstream's own `_sample` recorded, and replayed through our sampler with its rows out of step.

`record` runs `model.generate` and keeps what its loop was given and saw: the prepared lists, each step's logits, the
result and the generator states around it. `replay` makes a call of that and lets a random choice of rows advance each
step, as chunked prefill and preemption would.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_paged.engine.draws import Draws, LockstepDraws
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.sampling import SamplingSpec


@dataclass
class Recording:
    """One run of upstream's loop."""

    input_ids: Tensor  # [rows, width]
    attention_mask: Tensor  # [rows, width]
    processors: Any
    criteria: Any
    config: Any
    rng_before: Tensor
    rng_after: Tensor
    logits: list[Tensor] = field(default_factory=list)  # a step: [rows, vocab] of the model's dtype
    sequences: Tensor | None = None  # [rows, width + steps]
    scores: tuple[Tensor, ...] = ()
    raw_logits: tuple[Tensor, ...] = ()

    @property
    def num_steps(self) -> int:
        return len(self.logits)


def record(model: Any, inputs: dict[str, Tensor], seed: int = 0, **kwargs: Any) -> Recording:
    """`model.generate(**inputs, **kwargs)` after `seed`, with its scores."""
    given: dict[str, Any] = {}
    logits: list[Tensor] = []
    original = type(model)._sample

    def spy(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ):
        mask = rest.get("attention_mask")
        given.update(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids) if mask is None else mask,
            # The loop changes its own objects.
            processors=copy.deepcopy(logits_processor),
            criteria=stopping_criteria,
            config=generation_config,
            rng_before=torch.get_rng_state(),
        )
        handle = self.register_forward_hook(
            lambda module, args, out: logits.append(out.logits[:, -1].clone())
        )
        try:
            return original(self, input_ids, logits_processor, stopping_criteria, generation_config, **rest)
        finally:
            handle.remove()

    torch.manual_seed(seed)
    type(model)._sample = spy
    try:
        out = model.generate(
            **inputs, **kwargs, return_dict_in_generate=True, output_scores=True, output_logits=True
        )
    finally:
        del type(model)._sample  # it was inherited
    return Recording(
        **given,
        rng_after=torch.get_rng_state(),
        logits=logits,
        sequences=out.sequences,
        scores=out.scores,
        raw_logits=out.logits,
    )


@dataclass
class Replay:
    """A recording as a call of ours."""

    recording: Recording
    call: Call

    @classmethod
    def of(
        cls, recording: Recording, draws: Draws | None = None, records: bool = True, **spec: Any
    ) -> Replay:
        do_sample = bool(recording.config.do_sample)
        if do_sample and draws is None:
            draws = LockstepDraws(len(recording.input_ids))
        pad = recording.config._pad_token_tensor
        sampling = SamplingSpec(
            recording.input_ids,
            copy.deepcopy(recording.processors),
            recording.criteria,
            do_sample=do_sample,
            draws=draws if do_sample else None,
            pad_token_id=None if pad is None else int(pad),
            output_scores=records,
            output_logits=records,
            **spec,
        )
        call = Call(sampling, run_on=records or not sampling.has_eos)
        width = recording.input_ids.shape[1]
        for ids, mask in zip(recording.input_ids.tolist(), recording.attention_mask.tolist(), strict=True):
            num_pad = mask.index(1)
            call.add_row(ids[num_pad:], recording.config.max_length - width, num_pad=num_pad)
        return cls(recording, call)

    def ready(self) -> list[Sequence]:
        """Rows that may take a step: unfinished ones, and finished ones of a call that runs on to the longest row."""
        rows = self.call.sequences
        reached = max(s.num_generated + 1 if s.num_kept is None else s.num_kept for s in rows)
        return [s for s in rows if s.num_kept is None or (self.call.run_on and s.num_generated < reached)]

    def logits(self, sequence: Sequence) -> Tensor:
        return self.recording.logits[sequence.num_generated][sequence.row]

    def tokens(self) -> list[list[int]]:
        """Generated tokens, padded to the longest row as upstream's result is."""
        steps = max(s.num_generated for s in self.call.sequences)
        pad = self.call.sampling.pad_token_id
        generated = [s.token_ids[s.prompt_len :] for s in self.call.sequences]
        return [row + [pad] * (steps - len(row)) for row in generated]

    def check(self) -> None:
        width = self.recording.input_ids.shape[1]
        assert self.tokens() == self.recording.sequences[:, width:].tolist()
        if self.call.sampling.output_scores:
            for ours, theirs in (
                (self.call.sampling.take_scores(), self.recording.scores),
                (self.call.sampling.take_logits(), self.recording.raw_logits),
            ):
                assert len(ours) == len(theirs) == self.recording.num_steps
                for mine, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, equal_nan=True)


def run(replays: list[Replay], seed: int = 0, lag: float = 0.5, sampler: Sampler | None = None) -> None:
    """Steps all calls together to their ends; each row takes part in a step with probability 1 - `lag`."""
    source = random.Random(seed)
    sampler = sampler or Sampler()
    while True:
        ready = [(replay, s) for replay in replays for s in replay.ready()]
        if not ready:
            return
        chosen = [pair for pair in ready if source.random() >= lag] or [source.choice(ready)]
        source.shuffle(chosen)
        step(sampler, chosen)


def step(sampler: Sampler, chosen: list[tuple[Replay, Sequence]]) -> None:
    sequences = [s for _, s in chosen]
    tokens = sampler.sample(torch.stack([replay.logits(s) for replay, s in chosen]), sequences)
    for sequence, token in zip(sequences, tokens, strict=True):
        if isinstance(token, BaseException):
            raise token
        sequence.token_ids.append(token)
    for sequence, reason in zip(sequences, sampler.stops(sequences), strict=True):
        if sequence.finish_reason is None and reason is not None:
            sequence.finish_reason = reason
            sequence.num_kept = sequence.num_generated
