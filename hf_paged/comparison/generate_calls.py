"""One call of `model.generate` on a left-padded batch, and a clock for its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.workloads import Request


class TokenClock(BaseStreamer):
    """Notes when the tokens of each step come; `generate` hands a streamer the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []  # perf_counter seconds, one a step
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


def pad_batch(requests: Sequence[Request], context: ArmContext) -> dict[str, Any]:
    """Arguments of `generate` for a left-padded batch: ids and mask [rows, longest prompt] int64."""
    width = max(len(r.prompt) for r in requests)
    ids = torch.full((len(requests), width), context.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    device = context.model.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "max_new_tokens": max(r.max_new_tokens for r in requests),
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": context.pad_id,
    }


def generate_batch(
    model: Any, batch: dict[str, Any], streamer: BaseStreamer | None = None
) -> list[list[int]]:
    """The new tokens of each row, pads and all."""
    extra = {} if streamer is None else {"streamer": streamer}
    with torch.no_grad():
        out = model.generate(**batch, **extra)
    return out[:, batch["input_ids"].shape[1] :].tolist()
