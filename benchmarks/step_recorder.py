"""Watches the forwards of an engine's steps from outside: when each began and ended, and what was in it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_paged.engine.model_runner import ModelRunner


@dataclass
class Step:
    """One forward. Times are `perf_counter` seconds."""

    began: float
    ended: float
    num_tokens: int
    num_logits: int
    seq_lens: list[int]
    arguments: tuple[Any, ...]  # of ModelRunner.forward, to run it again

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Recording:
    """The steps of a run, in order."""

    steps: list[Step] = field(default_factory=list)

    @property
    def forward_seconds(self) -> float:
        return sum(s.seconds for s in self.steps)

    def host_seconds(self, num_sequences: int) -> list[float]:
        """Time between two forwards that both ran exactly `num_sequences` decodes.

        That is: sample, bookkeep, plan the next step and build its inputs. What a forward returned is let go of at
        the start of the next one: giving 50 MB of logits back to the system takes longer than all of that.
        """
        gaps = []
        for before, after in itertools.pairwise(self.steps):
            sizes = {len(before.seq_lens), len(after.seq_lens), before.num_tokens, after.num_tokens}
            if sizes == {num_sequences}:
                gaps.append(after.began - before.ended)
        return gaps


@contextlib.contextmanager
def recorded_steps() -> Iterator[Recording]:
    """Records every step of every engine of this process while it is open."""
    recording = Recording()
    original = ModelRunner.forward

    kept: list[Any] = []

    def forward(self: ModelRunner, model: Any, inputs: Any, ambient: Any) -> Any:
        began = time.perf_counter()
        kept.clear()
        logits = original(self, model, inputs, ambient)
        ended = time.perf_counter()
        kept.append(logits)
        seq_lens = inputs.metadata.seq_lens_list
        arguments = (self, model, inputs, ambient)
        recording.steps.append(
            Step(
                began,
                ended,
                inputs.input_ids.shape[1],
                inputs.logits_indices.shape[0],
                list(seq_lens),
                arguments,
            )
        )
        return logits

    ModelRunner.forward = forward  # type: ignore[method-assign]
    try:
        yield recording
    finally:
        ModelRunner.forward = original  # type: ignore[method-assign]
