"""What beam search remembers between the steps of a group, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from hf_paged.engine.request import FinishReason, Sequence, SequenceGroup

#: One beam of a step: all tokens [n, K, t] and beams [n, K, t], its prompt and its number.
Place: TypeAlias = tuple[Tensor, Tensor, int, int]


@dataclass(frozen=True)
class BeamOptions:
    """What upstream's `_beam_search` takes from its config."""

    num_beams: int
    num_returned: int  # of each prompt
    num_candidates: int  # continuations looked at in a step, of each prompt
    length_penalty: float
    early_stopping: bool | str
    max_steps: int  # config.max_length less the padded prompt
    fill_token: int  # after the end of shorter results
    do_sample: bool


@dataclass(eq=False)
class BeamState:
    """Of one group: n prompts of one call, t steps made."""

    running: Tensor  # [n, beams, t] int64
    running_scores: Tensor  # [n, beams] float32, as all scores
    running_beams: Tensor  # [n, beams, t] int32: the beam each token was chosen from
    finished: Tensor  # [n, beams, t or less while `nothing_finished`], filled up with the fill token
    finished_scores: Tensor  # [n, beams]
    finished_beams: Tensor  # the same, filled up with -1
    is_finished: Tensor  # [n, beams] bool
    may_improve: Tensor  # [n, 1] bool
    #: No beam has finished, and any that does will be the first: what is said of finished ones is as at the start.
    nothing_finished: bool = True
    #: What is to be in `finished` and `finished_beams`, of each prompt and beam; empty: what is.
    untaken: list[list[Place]] = field(default_factory=list)
    #: Records of each step, [n * beams, vocab] float32.
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, num_prompts: int, num_beams: int, device: torch.device) -> BeamState:
        shape = (num_prompts, num_beams)
        running_scores = torch.zeros(shape, device=device)
        # Else the best token would be taken once for each of the beams, which are still alike.
        running_scores[:, 1:] = -1e9
        return cls(
            torch.zeros((*shape, 0), dtype=torch.int64, device=device),
            running_scores,
            torch.zeros((*shape, 0), dtype=torch.int32, device=device),
            torch.zeros((*shape, 0), dtype=torch.int64, device=device),
            torch.full(shape, -1e9, device=device),
            torch.zeros((*shape, 0), dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.ones((num_prompts, 1), dtype=torch.bool, device=device),
        )

    def places(self) -> list[list[Place]]:
        """What is or is to be in `finished`, of each prompt and beam."""
        if self.untaken:
            return self.untaken
        num_prompts, num_beams = self.finished_scores.shape
        return [
            [(self.finished, self.finished_beams, i, beam) for beam in range(num_beams)]
            for i in range(num_prompts)
        ]

    def settle(self, fill_token: int) -> None:
        """Writes what is to be in `finished`."""
        if not self.untaken:
            return
        places = [place for row in self.untaken for place in row]
        width = max(tokens.shape[-1] for tokens, *_ in places)
        shape = (*self.finished_scores.shape, width)
        finished, beams = self.finished.new_full(shape, fill_token), self.finished_beams.new_full(shape, -1)
        steps = {id(tokens): (tokens, sources) for tokens, sources, *_ in places}
        for tokens, sources in steps.values():
            mine = [i for i, place in enumerate(places) if place[0] is tokens]
            rows = [places[i][2] for i in mine], [places[i][3] for i in mine]
            finished.flatten(0, 1)[mine, : tokens.shape[-1]] = tokens[rows]
            beams.flatten(0, 1)[mine, : sources.shape[-1]] = sources[rows]
        self.finished, self.finished_beams, self.untaken = finished, beams, []


@dataclass(frozen=True)
class FinishedBeam:
    """One result of beam search."""

    token_ids: list[int]  # the new tokens, an end-of-sequence token included
    score: float  # sum of the log-probabilities over length ** length_penalty


def finished_beams(group: SequenceGroup) -> list[list[FinishedBeam]]:
    """For each prompt of an ended group its best beams, `num_returned` of them, the best first."""
    state: BeamState = group.state
    lengths = (state.finished_beams >= 0).sum(dim=-1).tolist()
    tokens, scores = state.finished.tolist(), state.finished_scores.tolist()
    return [
        [
            FinishedBeam(tokens[i][beam][: lengths[i][beam]], scores[i][beam])
            for beam in range(group.call.sampling.beams.num_returned)
        ]
        for i in range(len(tokens))
    ]


def most_tokens(sequence: Sequence) -> float:
    """New tokens with which the beams of the prompt of `sequence` come to their end."""
    spec = sequence.call.sampling
    most = sequence.ends_at
    return most if spec.max_length is None else min(most, spec.max_length - spec.prompt_width)


def finish_reason(sequence: Sequence, token_ids: list[int]) -> FinishReason:
    """Why a finished beam of the prompt of `sequence` ends where it does."""
    spec = sequence.call.sampling
    if token_ids and token_ids[-1] in spec.eos_token_ids:
        return FinishReason.STOP
    if len(token_ids) >= most_tokens(sequence):
        return FinishReason.LENGTH
    return FinishReason.STOP if spec.stop_rules.stop_strings else FinishReason.TIMEOUT
