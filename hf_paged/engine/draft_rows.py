"""The logits behind drafts, and the tokens that are chosen from them as long as drafts prove right."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.engine.request import Sequence, Status
from hf_paged.engine.sampler import Sampler

#: A sequence, what was drafted for it, and the row of logits of the token before.
Going = tuple[Sequence, list[int], int]


class DraftRows:
    """The rows of logits of a step, chosen from in several goes."""

    def __init__(self, logits: Tensor, sampler: Sampler) -> None:
        self._logits = logits
        self._sampler = sampler

    def most_probable_runs(self, going: list[Going]) -> dict[Sequence, list[int]]:
        """The tokens that follow the newest one of each sequence which `is_simple`, where there are any."""
        with going[0][0].call.ambient.enter():
            tokens = self._sampler.most_probable(self._logits)
        runs: dict[Sequence, list[int]] = {}
        for sequence, draft, row in going:
            spec = sequence.call.sampling
            room = sequence.max_new_tokens - sequence.num_generated
            if spec.max_length is not None:
                room = min(room, spec.max_length - spec.prompt_width - sequence.num_generated)
            newest = sequence.token_ids[-1]
            run: list[int] = []
            for depth, guess in enumerate(draft, 1):
                if newest != guess or len(run) == room or newest in spec.eos_token_ids:
                    break
                newest = tokens[row + depth]
                run.append(newest)
            if run:
                runs[sequence] = run
        return runs

    def choose(self, rows: list[int], sequences: list[Sequence]) -> list[int | BaseException]:
        """The next token of each sequence by its row, or the exception its call fails with."""
        with sequences[0].call.ambient.enter():
            return self._sampler.sample(
                self._logits[torch.tensor(rows, device=self._logits.device)], sequences
            )


def is_simple(sequence: Sequence) -> bool:
    """Whether nothing but the logits and the tokens themselves decides what follows, and where it ends."""
    spec = sequence.call.sampling
    return spec.plain and spec.stop_rules.simple


def goes_on(sequence: Sequence, draft: list[int], depth: int, accepted: dict[Sequence, int]) -> bool:
    """Whether the newest token of a sequence was its draft at `depth`, and the one after it is wanted."""
    return (
        depth < len(draft)
        and sequence.status is Status.RUNNING
        # Rows that were finished before are given pads; they are not in `accepted`.
        and (sequence.finish_reason is None or sequence not in accepted)
        and sequence.token_ids[-1] == draft[depth]
    )
