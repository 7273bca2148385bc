"""How long the GPU stands idle between decode steps, by its own clock.

A mark is put on the stream where a step's forward begins, its inputs already there, and one behind the copy of its
tokens to the host. From the end of a step to the beginning of the next the GPU has a few copies of inputs to make, and
else waits for the host: that is the share given here. Gaps between the kernels of a step that is launched kernel by
kernel are not in it; a graph has none.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_paged.engine import host_copy
from hf_paged.engine.model_runner import ModelRunner

__all__ = ["IdleShare", "idle_share"]


@dataclass
class IdleShare:
    """The marks of the decode steps of `num_sequences`, in order."""

    device: torch.device
    num_sequences: int
    begins: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)  # None for a step whose tokens have not gone back

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def percent(self) -> float:
        """Of the time from the first step to the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = [(b, e) for b, e in zip(self.begins, self.ends, strict=True) if e is not None]
        if len(steps) < 2:
            raise RuntimeError(f"{len(steps)} steps of {self.num_sequences} sequences: no gap to measure")
        idle = sum(_seconds(end, begin) for (_, end), (begin, _) in itertools.pairwise(steps))
        return 100 * idle / _seconds(steps[0][0], steps[-1][1])


def _seconds(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else 1e-3 * first.elapsed_time(last)


@contextlib.contextmanager
def idle_share(device: torch.device, num_sequences: int) -> Iterator[IdleShare]:
    """Marks the steps that decode one token for each of `num_sequences`, as long as it is open."""
    share = IdleShare(device, num_sequences)
    forward, copy = ModelRunner.forward, host_copy.PendingCopy.__init__

    def marked_forward(runner: ModelRunner, model: Any, inputs: Any, ambient: Any) -> Any:
        is_wanted = inputs.metadata.num_decodes == inputs.metadata.num_seqs >= num_sequences
        if is_wanted:
            share.begins.append(share.mark())
            share.ends.append(None)
        return forward(runner, model, inputs, ambient)

    def marked_copy(pending: host_copy.PendingCopy, tensor: Any) -> None:
        copy(pending, tensor)
        if share.ends and share.ends[-1] is None:
            share.ends[-1] = share.mark()

    ModelRunner.forward = marked_forward  # type: ignore[method-assign]
    host_copy.PendingCopy.__init__ = marked_copy  # type: ignore[method-assign]
    try:
        yield share
    finally:
        ModelRunner.forward = forward  # type: ignore[method-assign]
        host_copy.PendingCopy.__init__ = copy  # type: ignore[method-assign]
