"""Counters of one engine, as users see them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EngineStats:
    """What an enabled model has done since `enable` or `reset_stats`, and how its KV cache stands now."""

    native_calls: int = 0  # calls served by the engine
    fallback_calls: dict[str, int] = field(default_factory=dict)  # reason -> calls given to the original generate
    requests: int = 0  # sequences taken up
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    peak_running: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0  # prompt tokens found in the prefix cache
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_free: int = 0
    kv_bytes: int = 0  # held from the operating system or device now
    kv_waste: float = 0.0  # share of slots in used blocks that held no token, mean over steps
    peak_blocks_used: int = 0
    peak_blocks_if_unshared: int = 0  # what the peak would have been had no two sequences shared a block
    mean_running: float = 0.0  # sequences in a step, mean over steps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Counters:
    """What the engine itself adds up between resets."""

    native_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    peak_running: int = 0
    sum_running: int = 0
    waste_slots: int = 0
    used_slots: int = 0
    peak_blocks_used: int = 0
    peak_blocks_if_unshared: int = 0
    preemptions_before: int = 0  # the scheduler's counters at the last reset
    prefix_hits_before: int = 0
