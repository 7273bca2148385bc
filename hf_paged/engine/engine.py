"""`PagedEngine`: takes calls, runs steps, finishes sequences. One engine a model.

Who turns the crank (`hf_paged.engine.crank`): the caller's own thread while it is alone, an engine thread as soon as there
is a second caller or a submitted request. Whoever holds the crank is the only one that touches the scheduler and the pool.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_paged.config import PagedConfig
from hf_paged.engine import batch
from hf_paged.engine.ambient import Ambient
from hf_paged.engine.crank import Crank
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.engine.stats import Counters, EngineStats
from hf_paged.engine.weights import watch_optimizers, weights_version
from hf_paged.errors import EngineStateError, InvalidRequestError, RequestCancelledError
from hf_paged.step import StepPlan

if TYPE_CHECKING:
    from typing import Protocol

    class Patch(Protocol):
        """What the engine needs of `hf_paged.patches.apply.AppliedPatch`."""

        owner: object

        def layer_geometry(self) -> list: ...
        def reasons(self) -> list[tuple[str, str]]: ...
        def revert(self) -> None: ...


class PagedEngine:
    """Serves the calls of one model from one paged KV cache.

    Args:
        model: the HF model whose attention layers `patch` has bound; held weakly.
        patch: the applied patch.
        config: options.
        position_limit: most positions a sequence may have, for learned positions; None for no limit.
        rope_limit: most positions for which packing requests of different lengths is exact; None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        patch: Patch,
        config: PagedConfig,
        *,
        position_limit: int | None = None,
        rope_limit: int | None = None,
    ) -> None:
        watch_optimizers()
        self._model = weakref.ref(model)
        self.patch = patch
        self.config = config
        self.position_limit = position_limit
        self.rope_limit = rope_limit
        self.front: Any = None  # what `enable` put on the model itself, to be reverted with the patch
        self.counters = Counters()
        self._runtime: Runtime | None = None
        self._calls: dict[Call, None] = {}
        self._kept: set[Sequence] = set()  # finished, their blocks still wanted (`Call.keep_kv`)
        self._weights: bytes | None = None
        self._closed = False
        self._crank = Crank(self)

    # --- what callers ask -------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise EngineStateError("the model of this engine no longer exists")
        return model

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids must be below it."""
        return self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    @property
    def is_idle(self) -> bool:
        return not self._calls and self._crank.is_idle

    def capacity_tokens(self) -> int:
        """Most tokens one sequence can hold in this pool."""
        runtime = self._ready()
        return runtime.manager.max_blocks * runtime.manager.block_size

    def ambient(self) -> Ambient:
        """The calling thread's ambient state, for `Call.ambient`."""
        return Ambient.capture(self._ready().device.type)

    def namespace(self, adapter: str | None = None, salt: str = "") -> bytes:
        """The prefix-cache namespace of a call made now: weights as they are, adapter and salt.

        When the weights changed since the last call every cached prefix is dropped.
        """
        version = weights_version(self.model)
        if version != self._weights:
            if self._weights is not None and self._runtime is not None and self.is_idle:
                self._runtime.manager.drop_cached()
            self._weights = version
        return b"\0".join((version, repr((adapter, self.config.cache_salt, salt)).encode()))

    def run(self, call: Call) -> None:
        """Runs `call` to its end in the calling thread or beside others; raises what went wrong with it."""
        self.run_all([call])
        if call.error is not None:
            raise call.error

    def run_all(self, calls: SequenceOf[Call]) -> None:
        """Runs several calls together and returns when all have ended; each keeps its own error."""
        for call in calls:
            self._check(call)
        self._crank.run(calls)

    def submit(self, call: Call) -> None:
        """Takes `call` up and returns at once; it makes progress without anybody waiting. `call.done` tells the end."""
        self._check(call)
        self._crank.submit(call)

    def cancel(self, call: Call) -> None:
        """Ends `call` at the next step boundary; its blocks go back then."""
        self._crank.cancel(call)

    def drain(self) -> None:
        """Returns when every call taken up so far has ended."""
        self._crank.drain()

    def paused(self) -> AbstractContextManager[None]:
        """Drains, then holds back new calls of other threads: weights may be changed inside."""
        return self._crank.paused()

    def _check(self, call: Call) -> None:
        if self._closed:
            raise EngineStateError("the model is not enabled any more")
        runtime = self._runtime or self._ready()
        capacity = runtime.manager.max_blocks * runtime.manager.block_size
        for seq in call.sequences:
            if not seq.prompt_len:
                raise InvalidRequestError("input_ids is empty: at least one token is needed")
            total = seq.prompt_len + seq.max_new_tokens
            if total > capacity:
                raise InvalidRequestError(
                    f"a request of {seq.prompt_len} prompt tokens and max_new_tokens={seq.max_new_tokens} needs {total} "
                    f"tokens of KV cache; kv_cache_memory allows {capacity}"
                )

    # --- the life of a step (crank holder only) -----------------------------------------------------------------------

    def _ready(self) -> Runtime:
        """The runtime for the model as it is now: rebuilt when dtype, device or shapes changed while idle."""
        geometry = tuple(self.patch.layer_geometry())
        runtime = self._runtime
        if runtime is not None and runtime.geometry == geometry:
            return runtime
        if runtime is not None:
            if self._calls or self._kept:
                raise EngineStateError("the model's dtype, device or layers changed while requests were running")
            runtime.close()
        self._runtime = Runtime(geometry, self.config)
        return self._runtime

    def take_up(self, call: Call) -> None:
        """Called by the crank holder for each new call."""
        try:
            runtime = self._ready()
        except Exception as error:
            call.error = error
            call.done.set()
            return
        self._calls[call] = None
        self.counters.requests += len(call.sequences)
        self.counters.prompt_tokens += sum(s.prompt_len for s in call.sequences)
        runtime.scheduler.add(call)

    @property
    def has_work(self) -> bool:
        return self._runtime is not None and self._runtime.scheduler.has_work

    def step(self) -> None:
        """Plans and runs one step. An exception of the forward fails the calls that were in it, nobody else."""
        runtime = self._ready()
        plan = runtime.scheduler.schedule()
        if plan is None:
            self._fail_stuck(runtime)
            return
        now = time.perf_counter()
        for seq in plan.sequences:
            if seq.call.first_scheduled_at is None:
                seq.call.first_scheduled_at = now
        try:
            logits = self._forward(runtime, plan)
        except Exception as error:
            self.fail(dict.fromkeys(s.call for s in plan.sequences), error)
            return
        runtime.scheduler.advance(plan)
        self._count_step(runtime, plan)
        if plan.sample_indices:
            self._sample(runtime, plan, logits)

    def _forward(self, runtime: Runtime, plan: StepPlan) -> Tensor:
        if plan.block_copies:
            runtime.cache.copy_blocks(plan.block_copies, runtime.backend)
        inputs = batch.build(
            plan,
            block_size=runtime.manager.block_size,
            owner=self.patch.owner,
            backend=runtime.backend,
            device=runtime.device,
            kv_layer=runtime.cache.layer,
        )
        return runtime.runner.forward(self.model, inputs, plan.sequences[0].call.ambient)

    def _sample(self, runtime: Runtime, plan: StepPlan, logits: Tensor) -> None:
        """A next token for each sequence that reached its last one, and for those forked from it just now."""
        sequences = [plan.sequences[i] for i in plan.sample_indices]
        rows = list(range(len(sequences)))
        for row, seq in enumerate(tuple(sequences)):
            if seq.num_generated == 0 and len(seq.call.sequences) > 1:
                for child in runtime.scheduler.fork_children(seq):
                    sequences.append(child)
                    rows.append(row)
        if len(rows) > len(plan.sample_indices):
            logits = logits[torch.tensor(rows, device=logits.device)]
        with sequences[0].call.ambient.enter():
            tokens = runtime.sampler.sample(logits, sequences)
        failed: dict[Call, BaseException] = {}
        accepted: list[Sequence] = []
        now = time.perf_counter()
        for seq, token in zip(sequences, tokens, strict=True):
            if isinstance(token, BaseException):
                failed.setdefault(seq.call, token)
                continue
            seq.token_ids.append(token)
            accepted.append(seq)
            if seq.finish_reason is None:
                self.counters.generated_tokens += 1
            if seq.call.first_token_at is None:
                seq.call.first_token_at = now
            if seq.call.on_token is not None and seq.finish_reason is None:
                seq.call.on_token(seq, token)
        for call, error in failed.items():
            self.fail([call], error)
        self._finish(runtime, [s for s in accepted if s.call not in failed])

    def _finish(self, runtime: Runtime, sequences: list[Sequence]) -> None:
        """Ends the sequences whose new token was their last, and the calls whose last sequence ended."""
        ended: list[Sequence] = []
        touched: dict[Call, None] = {}
        for seq, reason in zip(sequences, runtime.sampler.stops(sequences), strict=True):
            if seq.finish_reason is None:
                if reason is None:
                    continue
                seq.finish_reason = reason
                seq.num_kept = seq.num_generated
                if not seq.call.run_on:
                    ended.append(seq)
            touched[seq.call] = None
        for call in touched:
            if call.run_on and call.has_run_out:
                ended.extend(call.sequences)
        if ended:
            self._retire(runtime, ended)
        for call in touched:
            if all(s.status is Status.FINISHED for s in call.sequences):
                self._complete(call)

    def _retire(self, runtime: Runtime, sequences: list[Sequence]) -> None:
        kept = [s for s in sequences if s.call.keep_kv]
        runtime.scheduler.remove(kept, keep_blocks=True)
        self._kept.update(kept)
        runtime.scheduler.remove(s for s in sequences if not s.call.keep_kv)

    def _complete(self, call: Call) -> None:
        self._calls.pop(call, None)
        call.finished_at = time.perf_counter()
        if call.on_finish is not None:
            call.on_finish(call)
        call.done.set()

    # --- endings ------------------------------------------------------------------------------------------------------

    def fail(self, calls: Iterable[Call], error: BaseException) -> None:
        """Ends `calls` with `error`; their blocks go back. Crank holder only."""
        for call in calls:
            if call not in self._calls:
                continue
            if self._runtime is not None:
                self._runtime.scheduler.remove(call.sequences)
            cancelled = isinstance(error, RequestCancelledError)
            for seq in call.sequences:
                if seq.finish_reason is None:
                    seq.finish_reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
                    seq.num_kept = seq.num_generated
            call.error = error
            self._complete(call)

    def fail_all(self, error: BaseException) -> None:
        self.fail(list(self._calls), error)

    def abandon(self, calls: SequenceOf[Call], error: BaseException) -> None:
        """After an interrupt anywhere in a step: starts from an empty runtime, since bookkeeping may be half-done.

        `calls` end with `error`; others, submitted a moment ago, start again from their prompts and tokens.
        """
        others = [c for c in self._calls if c not in calls]
        self._calls.clear()
        self._kept.clear()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        for seq in (s for c in (*calls, *others) for s in c.sequences):
            seq.block_table, seq.block_keys, seq.num_computed = [], [], 0
            if seq.status is Status.RUNNING:
                seq.status = Status.WAITING
        for call in calls:
            if not call.done.is_set():
                call.error = error
                call.done.set()
        for other in others:
            self._restart(other)

    def _restart(self, call: Call) -> None:
        self._calls[call] = None
        self._ready().scheduler.add(call)

    def _fail_stuck(self, runtime: Runtime) -> None:
        """Nothing can be scheduled though something waits: the pool shrank under it or kept blocks fill it."""
        stuck = dict.fromkeys(s.call for s in (*runtime.scheduler.running, *runtime.scheduler.waiting))
        if stuck:
            self.fail(
                stuck,
                InvalidRequestError(
                    f"no block is free for a waiting request: {runtime.manager.max_blocks} blocks, "
                    f"{sum(len(s.block_table) for s in self._kept)} of them kept for returned past_key_values"
                ),
            )

    def reset_after_fork(self) -> None:
        """In a forked child: the parent's calls are not ours, its threads do not exist here."""
        self._crank = Crank(self)
        self._calls.clear()
        self._kept.clear()
        if self._runtime is not None:
            self._runtime = None

    # --- kept KV --------------------------------------------------------------------------------------------------------

    def gather_kv(self, seq: Sequence) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, H_kv, n, D] of each layer for the n computed tokens of a kept sequence."""
        runtime = self._ready()
        blocks = torch.tensor(seq.block_table, device=runtime.device)
        result = []
        for layer in range(len(runtime.geometry)):
            pair = []
            for cache in runtime.cache.layer(layer):
                flat = cache.index_select(0, blocks.to(cache.device)).flatten(0, 1)[: seq.num_computed]
                pair.append(flat.transpose(0, 1)[None].contiguous())
            result.append((pair[0], pair[1]))
        return result

    def release_kv(self, call: Call) -> None:
        """Gives back the blocks of a finished call made with `keep_kv`. May be called from any thread, more than once."""
        self._crank.call_soon(lambda: self._release_kept(call))

    def _release_kept(self, call: Call) -> None:
        for seq in call.sequences:
            if seq in self._kept:
                self._kept.discard(seq)
                if self._runtime is not None:
                    self._runtime.manager.free(seq)

    # --- memory and numbers -----------------------------------------------------------------------------------------------

    def went_idle(self) -> None:
        """Called by the crank holder when nothing is left to run."""
        if self._runtime is not None:
            self._runtime.trim()

    def invalidate(self) -> None:
        """Drops cached prefixes."""
        self._crank.call_soon(lambda: self._runtime and self._runtime.manager.drop_cached())

    def release_memory(self) -> None:
        """Waits for running calls, then gives all KV memory back, cached prefixes included."""
        self.drain()
        self._crank.call_soon(self._release_memory)

    def _release_memory(self) -> None:
        if self._runtime is not None and not self._calls and not self._kept:
            self._runtime.close()
            self._runtime = None

    def close(self) -> None:
        """Fails what still runs and gives everything back. The engine takes no calls after."""
        self._closed = True
        self._crank.close(EngineStateError("the model was disabled while the request was running"))
        self._kept.clear()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    def count_native(self) -> None:
        self.counters.native_calls += 1

    def count_fallback(self, code: str) -> None:
        self.counters.fallback_calls[code] = self.counters.fallback_calls.get(code, 0) + 1

    def _count_step(self, runtime: Runtime, plan: StepPlan) -> None:
        counters, manager = self.counters, runtime.manager
        running = runtime.scheduler.running
        counters.steps += 1
        counters.sum_running += len(plan.sequences)
        counters.peak_running = max(counters.peak_running, len(running))
        blocks = tokens = 0
        for seq in running:
            blocks += len(seq.block_table)
            tokens += seq.num_computed
        used = manager.num_used
        counters.used_slots += blocks * manager.block_size
        counters.waste_slots += blocks * manager.block_size - tokens
        if used >= counters.peak_blocks_used:
            counters.peak_blocks_used = used
            counters.peak_blocks_if_unshared = max(counters.peak_blocks_if_unshared, blocks)

    def stats(self) -> EngineStats:
        c, runtime = self.counters, self._runtime
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
            mean_running=c.sum_running / c.steps if c.steps else 0.0,
        )
        if runtime is not None:
            scheduler, manager = runtime.scheduler, runtime.manager
            stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
            stats.preemptions = scheduler.num_preemptions - c.preemptions_before
            stats.prefix_hit_tokens = scheduler.prefix_hit_tokens - c.prefix_hits_before
            stats.kv_blocks_total, stats.kv_blocks_used = manager.num_blocks, manager.num_used
            stats.kv_blocks_cached, stats.kv_blocks_free = manager.num_cached, manager.num_free
            stats.kv_bytes = runtime.cache.held_bytes
        return stats

    def reset_stats(self) -> None:
        self.counters = Counters()
        if self._runtime is not None:
            self.counters.preemptions_before = self._runtime.scheduler.num_preemptions
            self.counters.prefix_hits_before = self._runtime.scheduler.prefix_hit_tokens

    def check_integrity(self) -> None:
        """Raises AssertionError when a block was lost or counted wrongly. Call it while the engine is idle."""
        if self._runtime is not None:
            self._runtime.manager.check_integrity([*self._runtime.scheduler.running, *self._kept])
