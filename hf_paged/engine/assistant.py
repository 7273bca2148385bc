"""An assistant model that drafts: all sequences of a step at once, over a paged KV cache of its own.

Each sequence has a *shadow* here, with the same tokens and its drafts behind them:

    sequence   | known ........... t |
    shadow     | known ........... t | d1 d2 d3      computed: known .. d2

The first forward of a step computes what shadows lack (a prompt, or what was accepted since), and each further one a
token more for those that shall draft more. After the step a shadow keeps what came true and forgets the rest. A
shadow that does not get blocks drafts nothing: the sequence itself is not concerned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from hf_paged.config import PagedConfig
from hf_paged.engine import batch
from hf_paged.engine.draws import PeekedDraws
from hf_paged.engine.request import Call, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.engine.sampling import SamplingSpec
from hf_paged.engine.scheduler import make_plan

_NEWEST_WEIGHT = 0.2
#: Schedules of upstream's that lengthen drafts which were right and shorten others.
_ADAPTING = ("heuristic", "heuristic_transient")
_STEP_UP, _STEP_DOWN = 2, 1


class Lease(Protocol):
    """A model whose attention layers are paged for as long as this is not released."""

    patch: Any  # what the step loop needs of a patch
    position_limit: int | None

    def release(self) -> None: ...


class AssistantHost(Protocol):
    """Patches assistant models for a time; `enable` gives the engine one."""

    def borrow(self, model: nn.Module) -> Lease: ...

    def problems(self, model: nn.Module) -> list[str]:
        """Why `model` cannot be borrowed; empty when it can."""
        ...


class NoAssistants:
    """For an engine that was given no host."""

    def borrow(self, model: nn.Module) -> Lease:
        raise NotImplementedError("this engine was made without a host for assistant models")

    def problems(self, model: nn.Module) -> list[str]:
        return ["this engine runs none"]


@dataclass
class _Shadow:
    sequence: Sequence  # of a call of the assistant's own
    num_known: int  # tokens the sequence had when it drafted last
    num_tokens: float  # to draft at a time, as upstream's schedule has it


class Assistant:
    """Drafts for the sequences of any calls that name `model` as their assistant.

    Args:
        model: the assistant; its `generation_config` says how much to draft, as upstream reads it.
        host: patches it.
        config: block size, backend and budget of its cache, those of the engine.
    """

    def __init__(self, model: nn.Module, host: AssistantHost, config: PagedConfig) -> None:
        self._model = model
        self._config = config
        self._lease = host.borrow(model)
        self._runtime: Runtime | None = None
        self._calls: dict[Call, Call] = {}  # of the engine -> its shadow
        self._shadows: dict[Sequence, _Shadow] = {}
        self._options = _Options.of(model)
        self.seconds_a_depth = 0.0

    # --- what the speculator asks -------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence, most: int) -> int:
        shadow = self._shadows.get(sequence)
        most = min(most, int(self._options.num_tokens if shadow is None else shadow.num_tokens))
        limit = self._lease.position_limit
        return most if limit is None else max(0, min(most, limit - sequence.num_tokens))

    def draft(self, wanted: list[tuple[Sequence, int]]) -> dict[Sequence, BaseException]:
        runtime = self._ready()
        counts = {self._follow(sequence): (sequence, count) for sequence, count in wanted}
        start, depth = time.perf_counter(), 0
        failed: dict[Sequence, BaseException] = {}
        chosen, copies = self._catch_up(runtime, counts)
        while chosen:
            depth += 1
            going: dict[Sequence, int] = {}
            for shadow, token in self._forward(runtime, chosen, copies):
                sequence, count = counts[shadow]
                if isinstance(token, BaseException):
                    failed[sequence] = token
                elif self._take(sequence, shadow, token) and len(sequence.draft) < count:
                    going[shadow] = 1
            chosen = going  # room was made for all of them at once
            copies = {shadow: [] for shadow in going}
        if depth > 1 or not self.seconds_a_depth:
            seconds = (time.perf_counter() - start) / max(1, depth)
            self.seconds_a_depth += (_NEWEST_WEIGHT if self.seconds_a_depth else 1.0) * (
                seconds - self.seconds_a_depth
            )
        return failed

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        if self._options.schedule in _ADAPTING and (shadow := self._shadows.get(sequence)) is not None:
            all_right = num_accepted == num_drafted
            shadow.num_tokens = max(1, shadow.num_tokens + (_STEP_UP if all_right else -_STEP_DOWN))

    def forget(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is None:
            return
        if self._runtime is not None:
            self._runtime.manager.free(shadow.sequence)
        self._options.ended(self._model, shadow.num_tokens)
        if sequence.call in self._calls and not any(s in self._shadows for s in sequence.call.sequences):
            del self._calls[sequence.call]

    def close(self) -> None:
        """Gives the cache back and takes the patch off."""
        self._shadows.clear()
        self._calls.clear()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        self._lease.release()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _ready(self) -> Runtime:
        if self._runtime is None:
            self._runtime = Runtime(tuple(self._lease.patch.layer_geometry()), self._config)
        return self._runtime

    def _follow(self, sequence: Sequence) -> Sequence:
        """The shadow of `sequence`, with its tokens and nothing else behind them."""
        known = self._shadows.get(sequence)
        if known is None:
            call = self._calls.get(sequence.call)
            if call is None:
                call = self._calls[sequence.call] = _shadow_call(sequence.call, self._options.threshold > 0)
            shadow = Sequence(
                call,
                sequence.row,
                list(sequence.token_ids),
                sequence.prompt_len,
                sequence.max_new_tokens,
                num_pad=sequence.num_pad,
            )
            self._shadows[sequence] = _Shadow(shadow, sequence.num_tokens, self._options.num_tokens)
            return shadow
        shadow, common = known.sequence, known.num_known
        new = sequence.token_ids[common:]
        for drafted, token in zip(shadow.token_ids[common:], new, strict=False):
            if drafted != token:
                break
            common += 1
        shadow.token_ids[common:] = sequence.token_ids[common:]
        # The last token is computed again where nothing new came: its logits are needed.
        shadow.num_computed = min(shadow.num_computed, common, shadow.num_tokens - 1)
        shadow.call.sampling.rewind(shadow.row, common - shadow.prompt_len)
        known.num_known = sequence.num_tokens
        return shadow

    def _catch_up(
        self, runtime: Runtime, counts: dict[Sequence, tuple[Sequence, int]]
    ) -> tuple[dict[Sequence, int], dict[Sequence, list[tuple[int, int]]]]:
        """What the first forward computes, within one step's budget; the rest of a long prompt has to wait."""
        budget = runtime.scheduler.max_num_batched_tokens
        chosen: dict[Sequence, int] = {}
        copies: dict[Sequence, list[tuple[int, int]]] = {}
        for shadow, (_, count) in sorted(counts.items(), key=lambda item: item[0].num_uncomputed):
            if budget <= 0:
                break
            made = runtime.manager.allocate(shadow, shadow.num_tokens + count)
            if made is None:
                self._free_preempted(runtime)
                made = runtime.manager.allocate(shadow, shadow.num_tokens + count)
            if made is None:
                runtime.manager.free(shadow)
                continue
            chosen[shadow], copies[shadow] = min(shadow.num_uncomputed, budget), made
            budget -= chosen[shadow]
        return chosen, copies

    def _free_preempted(self, runtime: Runtime) -> None:
        for sequence, shadow in self._shadows.items():
            if sequence.status is not Status.RUNNING:
                runtime.manager.free(shadow.sequence)

    def _forward(
        self, runtime: Runtime, chosen: dict[Sequence, int], copies: dict[Sequence, list[tuple[int, int]]]
    ) -> list[tuple[Sequence, int | BaseException]]:
        """One forward of the assistant, and a token for each shadow that reached its last one."""
        plan = make_plan(chosen, copies)
        inputs = batch.build(
            plan,
            block_size=runtime.manager.block_size,
            owner=self._lease.patch.owner,
            backend=runtime.backend,
            device=runtime.device,
            kv_layer=runtime.cache.layer,
            kv_scales=runtime.cache.scales,
        )
        ambient = plan.sequences[0].call.ambient
        logits = runtime.runner.forward(self._model, inputs, ambient)
        runtime.stepped()
        for shadow, count in zip(plan.sequences, plan.num_scheduled_tokens, strict=True):
            shadow.num_computed += count
        sampled = [plan.sequences[i] for i in plan.sample_indices]
        if not sampled:
            return []
        with ambient.enter():
            return list(zip(sampled, runtime.sampler.sample(logits, sampled), strict=True))

    def _take(self, sequence: Sequence, shadow: Sequence, token: int) -> bool:
        """Puts a token on the draft. Returns whether to draft on."""
        records = shadow.call.sampling.token_logprobs[shadow.row]
        sure = not records or math.exp(records.pop().logprob) >= self._options.threshold
        if token in sequence.call.sampling.eos_token_ids:
            return False
        shadow.token_ids.append(token)
        sequence.draft.append(token)
        # As upstream's `ConfidenceCriteria` has it, an unsure token is still drafted, and the last.
        return sure


@dataclass
class _Options:
    """What an assistant's `generation_config` says of drafting."""

    num_tokens: int
    schedule: str
    threshold: float

    @classmethod
    def of(cls, model: Any) -> _Options:
        config = model.generation_config
        defaults_of: Callable[[], dict[str, Any]] = getattr(config, "_get_default_generation_params", dict)
        defaults = defaults_of()

        def option(name: str) -> Any:
            value = getattr(config, name, None)
            return defaults.get(name) if value is None else value

        return cls(
            int(option("num_assistant_tokens")),
            str(option("num_assistant_tokens_schedule")),
            float(option("assistant_confidence_threshold") or 0.0),
        )

    def ended(self, model: Any, num_tokens: float) -> None:
        """A sequence ended with this many tokens at a time: one schedule starts there with the next call."""
        if self.schedule == "heuristic":
            model.generation_config.num_assistant_tokens = int(num_tokens)


def _shadow_call(call: Call, records_confidence: bool) -> Call:
    """A call whose tokens are chosen as those of `call` will be: same processors, same random numbers."""
    spec: SamplingSpec = call.sampling
    return Call(
        sampling=SamplingSpec(
            prompt_ids=spec.prompt_ids,
            processors=list(spec.processors),
            do_sample=spec.do_sample,
            draws=None if spec.draws is None else PeekedDraws(spec.draws),
            logprobs=0 if records_confidence else None,
        ),
        ambient=call.ambient,
        namespace=None,
    )
