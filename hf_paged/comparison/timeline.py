"""What ran at once and how much KV it took, over the time of a run.

hf_paged's engine records its steps. Of transformers' arms it follows from shapes and token times: `generate` keeps keys
and values for rows x (prompt width + tokens so far), finished rows and pads included; continuous batching keeps whole
pages for each request between its first and its last token (what it holds while a prompt is computed is not seen).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_POINTS = 150
_GRID = 2000


@dataclass(frozen=True)
class Moment:
    """The state from `seconds` on. `slots` are tokens of room taken, `tokens` those that are wanted."""

    seconds: float
    running: int
    slots: int
    tokens: int


@dataclass(frozen=True)
class Timeline:
    """Moments in time order; `slots` and `tokens` times `bytes_per_token` are bytes of keys and values."""

    moments: tuple[Moment, ...]
    bytes_per_token: int

    @property
    def mean_running(self) -> float:
        """Mean over the moments in which anything ran."""
        running = [m.running for m in self.moments if m.running]
        return sum(running) / len(running) if running else 0.0

    @property
    def waste(self) -> float:
        """Share of the taken slots that held nothing wanted."""
        slots = sum(m.slots for m in self.moments)
        return max(1 - sum(m.tokens for m in self.moments) / slots, 0.0) if slots else 0.0

    @property
    def peak_kv_bytes(self) -> int:
        return max(m.slots for m in self.moments) * self.bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        """At most 150 moments, evenly taken, peaks kept: {seconds, running, kv_bytes}."""
        chosen = _thinned(self.moments)
        return {
            "seconds": [round(m.seconds, 4) for m in chosen],
            "running": [m.running for m in chosen],
            "kv_bytes": [m.slots * self.bytes_per_token for m in chosen],
        }


def of_batch(
    start: float, step_times: Sequence[float], prompts: Sequence[int], outputs: Sequence[int]
) -> list[Moment]:
    """A padded batch from its start to its last step. `outputs` are the wanted tokens of the rows."""
    rows, width = len(prompts), max(prompts)
    moments = [Moment(start, rows, rows * width, sum(prompts))]
    for step, seconds in enumerate(step_times, start=1):
        alive = [p for p, n in zip(prompts, outputs, strict=True) if n >= step]
        moments.append(
            Moment(seconds, len(alive), rows * (width + step - 1), sum(alive) + len(alive) * (step - 1))
        )
    return moments


def of_token_times(
    prompts: Sequence[int], token_times: Sequence[Sequence[float]], page_size: int, seconds: float
) -> list[Moment]:
    """Requests that come and go by themselves, each in whole pages from its first to its last token."""
    moments = []
    for k in range(_GRID):
        now = seconds * (k + 0.5) / _GRID
        running = slots = tokens = 0
        for prompt, times in zip(prompts, token_times, strict=True):
            if times and times[0] <= now <= times[-1]:
                held = prompt + bisect.bisect_right(times, now) - 1
                running += 1
                tokens += held
                slots += math.ceil(held / page_size) * page_size
        moments.append(Moment(now, running, slots, tokens))
    return moments


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values of one token in all layers, from the config of a plain HF model."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None:
        heads = 1 if getattr(config, "multi_query", False) else config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def _thinned(moments: Sequence[Moment]) -> list[Moment]:
    """One moment of each of equal stretches: the one with most slots, so that peaks stay."""
    if len(moments) <= _MAX_POINTS:
        return list(moments)
    step = len(moments) / _MAX_POINTS
    parts = [moments[int(k * step) : int((k + 1) * step)] for k in range(_MAX_POINTS)]
    return [max(part, key=lambda m: m.slots) for part in parts]
