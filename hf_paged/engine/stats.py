"""Counters of one engine, as users see them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hf_paged.engine.runtime import Runtime
    from hf_paged.engine.scheduler import Scheduler


@dataclass
class EngineStats:
    """What an enabled model has done since `enable` or `reset_stats`, and how its KV cache stands now."""

    native_calls: int = 0  # calls served by the engine
    fallback_calls: dict[str, int] = field(
        default_factory=dict
    )  # reason -> calls given to the original generate
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
    kv_shared: float = 0.0  # share of the blocks of sequences that sharing saved, mean over steps
    mean_running: float = 0.0  # sequences in a step, mean over steps
    drafted_tokens: int = 0  # by prompt lookup or an assistant model, and computed
    accepted_tokens: int = 0  # drafted tokens that were right
    graph_captures: int = 0  # decode steps captured as CUDA graphs, since memory was last released
    graph_replays: int = 0  # steps that were a replay of one
    steps_ahead: int = 0  # launched while the step before was still running, since memory was last released

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class StepRecord(NamedTuple):
    """One step as it ended."""

    ended_at: float  # perf_counter, seconds
    num_sequences: int  # in the step
    blocks_used: int
    tokens_held: int  # by the running sequences; of a shared block each holder counts its own


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
    used_blocks: int = 0
    unshared_blocks: int = 0  # what sequences would use if none shared any
    peak_blocks_used: int = 0
    peak_blocks_if_unshared: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions_before: int = 0  # the scheduler's counters at the last reset
    prefix_hits_before: int = 0
    #: One record a step, if somebody put a list here.
    trace: list[StepRecord] | None = None

    @classmethod
    def starting_at(cls, runtime: Runtime | None) -> Counters:
        """Counters that begin now, whatever the scheduler of `runtime` has counted before."""
        if runtime is None:
            return cls()
        scheduler = runtime.scheduler
        return cls(
            preemptions_before=scheduler.num_preemptions, prefix_hits_before=scheduler.prefix_hit_tokens
        )

    def count_step(self, scheduler: Scheduler, num_sequences: int) -> None:
        """After a step of `num_sequences` sequences, before its finished ones leave."""
        manager, running = scheduler.manager, scheduler.running
        self.steps += 1
        self.sum_running += num_sequences
        self.peak_running = max(self.peak_running, len(running))
        blocks = tokens = 0
        for seq in running:
            blocks += len(seq.block_table)
            tokens += seq.num_computed
        self.used_slots += blocks * manager.block_size
        self.waste_slots += blocks * manager.block_size - tokens
        used = manager.num_used
        self.used_blocks += used
        self.unshared_blocks += blocks
        if self.trace is not None:
            self.trace.append(StepRecord(time.perf_counter(), num_sequences, used, tokens))
        if used >= self.peak_blocks_used:
            self.peak_blocks_used = used
            self.peak_blocks_if_unshared = max(self.peak_blocks_if_unshared, blocks)


def snapshot(counters: Counters, runtime: Runtime | None) -> EngineStats:
    """The counters, and the KV cache as it stands."""
    c = counters
    stats = EngineStats(
        native_calls=c.native_calls,
        fallback_calls=dict(c.fallback_calls),
        requests=c.requests,
        prompt_tokens=c.prompt_tokens,
        generated_tokens=c.generated_tokens,
        steps=c.steps,
        peak_running=c.peak_running,
        kv_waste=c.waste_slots / c.used_slots if c.used_slots else 0.0,
        peak_blocks_used=c.peak_blocks_used,
        peak_blocks_if_unshared=c.peak_blocks_if_unshared,
        kv_shared=max(0.0, 1 - c.used_blocks / c.unshared_blocks) if c.unshared_blocks else 0.0,
        mean_running=c.sum_running / c.steps if c.steps else 0.0,
        drafted_tokens=c.drafted_tokens,
        accepted_tokens=c.accepted_tokens,
    )
    if runtime is not None:
        scheduler, manager = runtime.scheduler, runtime.manager
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.preemptions = scheduler.num_preemptions - c.preemptions_before
        stats.prefix_hit_tokens = scheduler.prefix_hit_tokens - c.prefix_hits_before
        stats.kv_blocks_total, stats.kv_blocks_used = manager.num_blocks, manager.num_used
        stats.kv_blocks_cached, stats.kv_blocks_free = manager.num_cached, manager.num_free
        stats.kv_bytes = runtime.cache.held_bytes
        if runtime.graphs is not None:
            stats.graph_captures = runtime.graphs.num_captures
            stats.graph_replays = runtime.graphs.num_replays
        if runtime.ahead is not None:
            stats.steps_ahead = runtime.ahead.num_steps
    return stats
