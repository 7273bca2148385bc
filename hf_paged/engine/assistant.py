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
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_paged.config import PagedConfig
from hf_paged.engine import batch
from hf_paged.engine.assistant_host import AssistantHost, Lease
from hf_paged.engine.draft_vocabulary import (
    OtherVocabulary,
    SameVocabulary,
    Shadow,
    Vocabulary,
    drafting_option,
    own_tokenizer,
)
from hf_paged.engine.drafting import Speculation
from hf_paged.engine.plans import make_plan
from hf_paged.engine.request import Call, Sequence, Status
from hf_paged.engine.runtime import Runtime

_NEWEST_WEIGHT = 0.2
#: Schedules of upstream's that lengthen drafts which were right and shorten others.
_ADAPTING = ("heuristic", "heuristic_transient")
_STEP_UP, _STEP_DOWN = 2, 1


def make_assistant(
    speculation: Speculation, host: AssistantHost, model: Any, patch: Any, config: PagedConfig
) -> Assistant:
    """The assistant of calls with this speculation.

    Args:
        model, patch: for which it drafts.
    """
    if speculation.num_layers is not None:
        short, lease = host.first_layers(model, patch, speculation.num_layers)
        return Assistant(short, lease, SameVocabulary(chooses_adapters=True), config)
    assistant = speculation.assistant_model
    vocabulary: Vocabulary = SameVocabulary()
    if speculation.tokenizers is not None:
        own, theirs = map(own_tokenizer, speculation.tokenizers)
        vocabulary = OtherVocabulary(own, theirs, assistant, model.get_input_embeddings().num_embeddings)
    return Assistant(assistant, host.borrow(assistant), vocabulary, config)


class Assistant:
    """Drafts for the sequences of any calls that name `model` as their assistant.

    Args:
        model: the assistant; its `generation_config` says how much to draft, as upstream reads it.
        lease: the patch it runs with.
        vocabulary: whose token ids it has.
        config: block size, backend and budget of its cache, those of the engine.
    """

    def __init__(self, model: nn.Module, lease: Lease, vocabulary: Vocabulary, config: PagedConfig) -> None:
        self._model = model
        self._config = config
        self._lease = lease
        self._vocabulary = vocabulary
        self._runtime: Runtime | None = None
        self._calls: dict[Call, Call] = {}  # of the engine -> its shadow
        self._shadows: dict[Sequence, Shadow] = {}
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
        counts = self._counts(wanted)
        drafted = dict.fromkeys(counts, 0)
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
                    continue
                # As upstream's `ConfidenceCriteria` has it, an unsure token is still drafted, and the last.
                is_sure = self._is_sure(shadow)
                if not self._vocabulary.ends(sequence, token):
                    shadow.token_ids.append(token)
                    drafted[shadow] += 1
                    if is_sure and drafted[shadow] < count:
                        going[shadow] = 1
            chosen = going  # room was made for all of them at once
            copies = {shadow: [] for shadow in going}
        for shadow, (sequence, count) in counts.items():
            if drafted[shadow]:
                sequence.draft = self._vocabulary.drafts(sequence, shadow, drafted[shadow])[:count]
        self._learn_time(time.perf_counter() - start, depth)
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

    def _counts(self, wanted: list[tuple[Sequence, int]]) -> dict[Sequence, tuple[Sequence, int]]:
        """Shadow -> its sequence and how much to draft, for those that have a token and positions left."""
        counts = {}
        limit = self._lease.position_limit
        for sequence, count in wanted:
            shadow = self._follow(sequence)
            most = count if limit is None else min(count, limit - shadow.num_tokens)
            if shadow.num_tokens and most > 0:
                counts[shadow] = sequence, most
        return counts

    def _follow(self, sequence: Sequence) -> Sequence:
        """The shadow of `sequence`, with its tokens and nothing else behind them."""
        known = self._shadows.get(sequence)
        if known is None:
            call = self._calls.get(sequence.call)
            if call is None:
                records = self._options.threshold > 0
                call = self._calls[sequence.call] = self._vocabulary.call(sequence.call, records)
            shadow = self._vocabulary.start(sequence, call)
            self._shadows[sequence] = Shadow(shadow, sequence.num_tokens, self._options.num_tokens)
            return shadow
        common, shadow = self._vocabulary.follow(sequence, known), known.sequence
        # The last token is computed again where nothing new came: its logits are needed.
        shadow.num_computed = max(0, min(shadow.num_computed, common, shadow.num_tokens - 1))
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

    def _is_sure(self, shadow: Sequence) -> bool:
        """Of the token it has just drafted."""
        records = shadow.call.sampling.token_logprobs[shadow.row]
        return not records or math.exp(records.pop().logprob) >= self._options.threshold

    def _learn_time(self, seconds: float, depth: int) -> None:
        if depth > 1 or not self.seconds_a_depth:
            weight = _NEWEST_WEIGHT if self.seconds_a_depth else 1.0
            self.seconds_a_depth += weight * (seconds / max(1, depth) - self.seconds_a_depth)


@dataclass
class _Options:
    """What an assistant's `generation_config` says of drafting."""

    num_tokens: int
    schedule: str
    threshold: float

    @classmethod
    def of(cls, model: Any) -> _Options:
        config = model.generation_config
        return cls(
            int(drafting_option(config, "num_assistant_tokens")),
            str(drafting_option(config, "num_assistant_tokens_schedule")),
            float(drafting_option(config, "assistant_confidence_threshold") or 0.0),
        )

    def ended(self, model: Any, num_tokens: float) -> None:
        """A sequence ended with this many tokens at a time: one schedule starts there with the next call."""
        if self.schedule == "heuristic":
            model.generation_config.num_assistant_tokens = int(num_tokens)
