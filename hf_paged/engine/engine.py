"""`PagedEngine`: what callers ask of the engine of one model, from any thread.

Who turns the crank (`hf_paged.engine.crank`): the caller's own thread while it is alone, an engine thread as
soon as there is a second caller or a submitted request. Whoever holds the crank is the only one that touches
the step loop, its scheduler and its pool (`hf_paged.engine.loop`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_paged.config import PagedConfig
from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.adapters import AdapterHost, Selection
from hf_paged.engine.ambient import Ambient
from hf_paged.engine.assistant_host import AssistantHost
from hf_paged.engine.crank import Crank, Until
from hf_paged.engine.groups import most_blocks
from hf_paged.engine.loop import StepLoop
from hf_paged.engine.namespaces import NamespaceMaker, Namespaces, assign
from hf_paged.engine.positions import out_of_positions
from hf_paged.engine.request import Call, FinishReason, Sequence, SequenceGroup
from hf_paged.engine.stats import Counters, EngineStats, snapshot
from hf_paged.engine.weights import watch_optimizers
from hf_paged.errors import EngineStateError, InvalidRequestError
from hf_paged.kernels.cpu_workers import let_workers_go

if TYPE_CHECKING:
    from hf_paged.engine.call_table import Patch


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
        let_workers_go()  # who loads a model often leaves its requests to other threads
        self.patch = patch
        self.config = config
        self.position_limit = position_limit
        self.rope_limit = rope_limit
        self.adapters: AdapterHost | None = None  # set by `enable`; None: adapters are not looked after
        self.front: Any = None  # what `enable` put on the model itself, to be reverted with the patch
        self.replaced_generate: Any = None  # the instance's own `generate` before that
        self.shortening = threading.RLock()  # held by who makes the model shorter than it is for a while
        self._loop = StepLoop(model, patch, config)
        self._crank = Crank(self._loop, self._renew)
        self._namespaces = NamespaceMaker(config.cache_salt, self.invalidate)
        self._closed = False

    # --- the model as it is now -------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        return self._loop.model

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids must be below it."""
        return self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    def capacity_tokens(self) -> int:
        """Most tokens one sequence can hold in this pool, for the model as `patch.reasons` saw it last."""
        runtime = self._loop.runtime
        if runtime is None or runtime.geometry != self.patch.geometry:
            runtime = self._loop.ready()
        return runtime.capacity_tokens

    def layer_geometry(self) -> tuple:
        """Shape, dtype and device of each layer's keys and values, as the model is now."""
        return self._loop.ready().geometry

    def ambient(self) -> Ambient:
        """The calling thread's ambient state, for `Call.ambient`."""
        return Ambient.capture((self._loop.runtime or self._loop.ready()).device.type)

    def namespaces(self, selections: Iterable[Selection | None], salt: str = "") -> Namespaces:
        """The prefix-cache namespaces of calls made now: weights as they are, adapters and salt.

        When the base weights changed since the last call every cached prefix is dropped.

        Args:
            selections: of the sequences; None for what no selection can say.
            salt: prefixes are only shared between calls of one salt, besides `cache_salt` of the config.
        """
        return self._namespaces.make(self.model, selections, self._crank.num_pauses, salt)

    def _renew(self, call: Call) -> None:
        """Weights may have changed in a `paused()` block that began after the namespaces of `call` were made."""
        selections = {s.adapters for s in call.sequences if s.own_namespace is not None}
        if selections:
            assign(call, self.namespaces(selections, call.salt))

    def bound_adapters(self, host: AdapterHost) -> None:
        """Sequences start only once `host` has brought their adapters into the model."""
        self._loop.gate = AdapterGate(host, self._renew_one)

    @contextmanager
    def entered(self, selection: Selection | None) -> Iterator[None]:
        """Makes `selection` active in the model itself for a block, for what runs without the engine."""
        assert self.adapters is not None
        with ExitStack() as stack:
            if selection is not None and self.adapters.most_resident is not None:
                with self.paused():  # what is active stays in the model
                    self.adapters.bring_in([selection], ())
                    stack.enter_context(self.adapters.entered(selection))
            else:
                stack.enter_context(self.adapters.entered(selection))
            yield

    def _renew_one(self, seq: Sequence) -> None:
        if seq.own_namespace is not None:
            seq.own_namespace = self.namespaces([seq.adapters], seq.call.salt)[seq.adapters]

    def set_assistants(self, host: AssistantHost) -> None:
        """Who patches the assistant models of calls that speculate."""
        self._loop.assistants = host

    def assistant_problems(self, assistant: nn.Module) -> list[str]:
        """Why `assistant` cannot draft for calls of this model; empty when it can."""
        return self._loop.assistants.problems(assistant)

    # --- calls ------------------------------------------------------------------------------------------------------

    def run(self, call: Call) -> None:
        """Runs `call` to its end in the calling thread or beside others; raises what went wrong with it."""
        self.run_all([call])
        if call.error is not None:
            raise call.error

    def run_all(self, calls: SequenceOf[Call]) -> None:
        """Runs several calls together and returns when all have ended; each keeps its own error."""
        for call in calls:
            self.check(call)
        self._crank.run(calls)

    def attend(self, calls: SequenceOf[Call]) -> AbstractContextManager[Until]:
        """Runs `calls` while the calling thread looks after them inside: `with engine.attend([call]) as until:`.

        `until(ready)` returns when `ready()` is true. What is raised inside cancels the calls; what went wrong with
        them is in `Call.error`.
        """
        for call in calls:
            self.check(call)
        return self._crank.attend(calls)

    def answer(self, call: Call, tokens: list[int], reasons: list[FinishReason | None]) -> None:
        """For a lockstep call that is attended: its next tokens, one a row, and why rows end with them, if they do."""
        self._crank.answer(call, tokens, reasons)

    def submit(self, call: Call) -> None:
        """Takes `call` up and returns at once; it makes progress without anybody waiting. `call.done` tells the end."""
        self.submit_all([call])

    def submit_all(self, calls: SequenceOf[Call]) -> None:
        """As `submit`, for calls that shall begin together."""
        for call in calls:
            self.check(call)
        self._crank.submit(calls)

    def cancel(self, call: Call) -> None:
        """Ends `call` at the next step boundary; its blocks go back then."""
        self._crank.cancel(call)

    def drop(self, call: Call) -> None:
        """As `cancel`, for a call nobody can ask for any more; may be called by a finalizer."""
        self._crank.drop(call)

    def drain(self) -> None:
        """Returns when every call taken up so far has ended."""
        self._crank.drain()

    def paused(self) -> AbstractContextManager[None]:
        """Drains, then holds back new calls of other threads: weights may be changed inside."""
        return self._crank.paused()

    @property
    def is_paused_here(self) -> bool:
        """Whether the calling thread is inside of `paused`."""
        return self._crank.is_paused_here

    @property
    def is_idle(self) -> bool:
        return not self._loop.calls and self._crank.is_idle

    def trouble(self, stalled_after: float | None = None) -> str | None:
        """Why the engine does not work as things stand; None if nothing is known against it.

        Args:
            stalled_after: seconds after which a running step counts as hanging; None for never.
        """
        if self._closed:
            return "the model is not enabled any more"
        started, failure = self._loop.step_started, self._loop.failure
        if started is not None and stalled_after is not None:
            seconds = time.perf_counter() - started
            if seconds > stalled_after:
                return f"a step has been running for {seconds:.0f} s"
        return None if failure is None else f"the last step failed ({type(failure).__name__})"

    def check(self, call: Call) -> None:
        """What every call is asked when it comes.

        Raises:
            InvalidRequestError: it can never run. EngineStateError: the engine takes no calls any more.
        """
        if self._closed:
            raise EngineStateError("the model is not enabled any more")
        capacity = (self._loop.runtime or self._loop.ready()).capacity_tokens
        longest = max((s.prompt_len for s in call.sequences), default=0)
        if self.position_limit is not None and longest > self.position_limit:
            raise out_of_positions(longest, 0)
        for seq in call.sequences:
            if not seq.prompt_len:
                raise InvalidRequestError("input_ids is empty: at least one token is needed")
            total = seq.prompt_len + seq.max_new_tokens
            if total > capacity:
                raise InvalidRequestError(
                    f"a request of {seq.prompt_len} prompt tokens and max_new_tokens={seq.max_new_tokens} needs "
                    f"{total} tokens of KV cache; kv_cache_memory allows {capacity}"
                )
        for group in dict.fromkeys(s.group for s in call.sequences if s.group is not None):
            self._check_group(group, capacity)

    def _check_group(self, group: SequenceGroup, capacity: int) -> None:
        size = self.config.block_size
        lengths = [s.prompt_len for s in group.sequences[:: group.num_beams]]
        selections = {s.adapters for s in group.sequences if s.adapters is not None}
        names = {name for selection in selections for name in selection.names}
        most = None if self.adapters is None else self.adapters.most_resident
        if most is not None and len(names) > most:
            raise InvalidRequestError(
                f"beams that advance together use {len(names)} adapters; max_resident_adapters is {most}"
            )
        needed = size * most_blocks(lengths, group.sequences[0].max_new_tokens, group.num_beams, size)
        if needed > capacity or len(group.sequences) > self.config.max_num_seqs:
            raise InvalidRequestError(
                f"num_beams={group.num_beams}: {len(group.sequences)} beams advance together and need {needed} tokens "
                f"of KV cache; max_num_seqs is {self.config.max_num_seqs}, kv_cache_memory allows {capacity}"
            )

    # --- kept KV ----------------------------------------------------------------------------------------------------

    def gather_kv(self, seq: Sequence) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, H_kv, n, D] of each layer for the n computed tokens of a kept sequence, in the
        layer's own dtype."""
        runtime = self._loop.runtime
        if runtime is None:
            raise EngineStateError("the KV of this call was released")
        blocks = torch.tensor(seq.block_table, device=runtime.device)
        result = []
        for layer, geometry in enumerate(runtime.geometry):
            table = blocks.to(geometry.device)
            keys, values = runtime.cache.read(layer, table, seq.num_computed)
            keys, values = (x.to(geometry.dtype).transpose(0, 1)[None].contiguous() for x in (keys, values))
            result.append((keys, values))
        return result

    def release_kv(self, call: Call) -> None:
        """Gives back the blocks of a finished call made with `keep_kv`. May be called from any thread, more
        than once."""
        self._crank.call_soon(lambda: self._loop.release_kept(call))

    # --- memory -----------------------------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """Drops cached prefixes."""
        self._crank.call_soon(self._loop.drop_cached)

    def release_memory(self) -> None:
        """Waits for running calls, then gives all KV memory back, cached prefixes included."""
        self.drain()
        self._crank.call_soon(self._loop.release_memory)

    def close(self) -> None:
        """Fails what still runs and gives everything back. The engine takes no calls after."""
        self.stop(EngineStateError("the model was disabled while the request was running"))

    def stop(self, error: EngineStateError) -> None:
        """As `close`; what still runs fails with `error`. No thread is left."""
        self._closed = True
        self._crank.close(error)
        self._loop.close()

    def reset_after_fork(self) -> None:
        """In a forked child: the parent's calls are not ours, its threads do not exist here."""
        self._loop.restart_empty()
        self._crank = Crank(self._loop, self._renew)

    # --- numbers ----------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        return self._loop.counters

    def count_native(self) -> None:
        self.counters.native_calls += 1

    def count_fallback(self, code: str) -> None:
        self.counters.fallback_calls[code] = self.counters.fallback_calls.get(code, 0) + 1

    def stats(self) -> EngineStats:
        return snapshot(self.counters, self._loop.runtime)

    def reset_stats(self) -> None:
        self._loop.reset_counters()

    def check_integrity(self) -> None:
        """Raises AssertionError when a block was lost or counted wrongly. Call it while the engine is idle."""
        runtime = self._loop.runtime
        if runtime is not None:
            runtime.manager.check_integrity([*runtime.scheduler.running, *self._loop.kept])
