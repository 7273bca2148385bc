"""Hidden states and attentions that a call returns: kept as its tokens are computed, sorted into steps at its end.

recording = start(plan)          # before a step; None if no call of it wants any
... the step ...
keep(plan, recording)            # before its sequences advance
call.states.hidden_states_of(...)  # when the call has ended
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_paged.engine.request import Call, Sequence
from hf_paged.step import StepPlan, StepRecording


@dataclass(frozen=True)
class _Span:
    """Positions of one row that a step computed for the first time, and their places among the tokens kept."""

    row: int
    first: int
    count: int
    place: int

    def split(self, prompt_len: int) -> list[tuple[int, int, int]]:
        """(step of the call, first position, count): all of the prompt is of step 0, then each token has its own."""
        end = self.first + self.count
        parts = [(0, self.first, min(end, prompt_len) - self.first)] if self.first < prompt_len else []
        return parts + [(p - prompt_len + 1, p, 1) for p in range(max(self.first, prompt_len), end)]


@dataclass(eq=False)
class StateRecord:
    """Of one call (`Call.states`). What is computed again after a preemption is not recorded again."""

    hidden_states: bool
    attentions: bool
    spans: list[list[_Span]] = field(default_factory=list)  # of each step that computed tokens of the call
    #: [step][layer]: [n, E], of all spans of the step.
    hidden: list[list[Tensor]] = field(default_factory=list)
    #: [step][span][layer]: probabilities [H, count, first + count].
    probabilities: list[list[list[Tensor]]] = field(default_factory=list)
    num_recorded: dict[int, int] = field(default_factory=dict)  # row -> positions, those skipped included

    def first_new(self, sequence: Sequence) -> int:
        return max(sequence.num_computed, self.num_recorded.get(sequence.row, 0))


@dataclass(frozen=True)
class Columns:
    """The steps of upstream's loop: which columns of the padded batch each of them computes.

    Args:
        first: columns that were computed before the call, or by earlier chunks of its prompt.
        width: columns of the padded prompt.
    """

    first: int
    width: int
    num_steps: int

    def of(self, step: int) -> tuple[int, int]:
        if not step:
            return self.first, self.width
        return self.width + step - 1, self.width + step


def start(plan: StepPlan) -> StepRecording | None:
    """What the step should hand out besides logits."""
    calls = {s.call for s in plan.sequences if s.call.states is not None}
    if not calls:
        return None
    attention_of = {}
    for index, (seq, count) in enumerate(zip(plan.sequences, plan.num_scheduled_tokens, strict=True)):
        states: StateRecord | None = seq.call.states
        if states is not None and states.attentions:
            new = seq.num_computed + count - states.first_new(seq)
            if new > 0:
                attention_of[index] = new
    return StepRecording(any(call.states.hidden_states for call in calls), attention_of)


def keep(plan: StepPlan, recording: StepRecording) -> None:
    """Gives the calls of the step what they want of it; their sequences have not advanced yet."""
    taken: dict[Call, list[tuple[int, _Span, int]]] = {}  # index in the plan, span, first token in the step
    offset = 0
    for index, (seq, count) in enumerate(zip(plan.sequences, plan.num_scheduled_tokens, strict=True)):
        states: StateRecord | None = seq.call.states
        if states is not None:
            first, end = states.first_new(seq), seq.num_computed + count
            if first < end:
                items = taken.setdefault(seq.call, [])
                place = sum(span.count for _, span, _ in items)
                span = _Span(seq.row, first, end - first, place)
                items.append((index, span, offset + first - seq.num_computed))
                states.num_recorded[seq.row] = end
        offset += count
    for call, items in taken.items():
        _keep_of(call.states, items, recording)


def _keep_of(states: StateRecord, items: list[tuple[int, _Span, int]], recording: StepRecording) -> None:
    states.spans.append([span for _, span, _ in items])
    if states.hidden_states:
        tokens = torch.cat([torch.arange(at, at + span.count) for _, span, at in items])
        # Indexing copies: the rest of the step is let go.
        states.hidden.append([layer[0][tokens.to(layer.device)] for layer in recording.hidden_states])
    if states.attentions:
        layers = [recording.attentions[number] for number in sorted(recording.attentions)]
        states.probabilities.append([[layer[index] for layer in layers] for index, _, _ in items])


def hidden_states_of(call: Call, columns: Columns) -> tuple[tuple[Tensor, ...], ...]:
    """For each step of upstream's loop and each layer, [rows, columns of the step, E]; zeros at left pads."""
    states: StateRecord = call.states
    if not states.hidden:
        return ()
    layers = []
    for number in range(len(states.hidden[0])):
        like = states.hidden[0][number]
        shape = (len(call.sequences), columns.width + columns.num_steps - 1, like.shape[-1])
        whole = like.new_zeros(shape)
        for spans, kept in zip(states.spans, states.hidden, strict=True):
            for span in spans:
                at = call.sequences[span.row].num_pad + span.first
                whole[span.row, at : at + span.count] = kept[number][span.place : span.place + span.count]
        _share_prompts(call, columns, whole)
        layers.append(whole)
    steps = [columns.of(step) for step in range(columns.num_steps)]
    return tuple(tuple(layer[:, a:b].contiguous() for layer in layers) for a, b in steps)


def attentions_of(call: Call, columns: Columns) -> tuple[tuple[Tensor, ...], ...]:
    """For each step of upstream's loop and each layer, [rows, H, columns of the step, all columns so far]."""
    states: StateRecord = call.states
    if not states.probabilities:
        return ()
    num_layers, rows = len(states.probabilities[0][0]), len(call.sequences)
    steps: list[tuple[Tensor, ...]] = []
    for step in range(columns.num_steps):
        begin, end = columns.of(step)
        like = states.probabilities[0][0]
        shape = (rows, like[0].shape[0], end - begin, end)
        steps.append(tuple(like[n].new_zeros(shape) for n in range(num_layers)))
    for spans, kept in zip(states.spans, states.probabilities, strict=True):
        for span, layers in zip(spans, kept, strict=True):
            seq = call.sequences[span.row]
            for step, position, count in span.split(seq.prompt_len):
                begin = columns.of(step)[0]
                # Of a prompt in chunks upstream returns the last one.
                skipped = max(0, begin - seq.num_pad - position)
                if step >= columns.num_steps or skipped >= count:
                    continue
                row = seq.num_pad + position + skipped - begin
                own = slice(position + skipped - span.first, position + count - span.first)
                for whole, layer in zip(steps[step], layers, strict=True):
                    part = layer[:, own, : position + count]
                    to = slice(seq.num_pad, seq.num_pad + part.shape[2])
                    whole[span.row, :, row : row + part.shape[1], to] = part
    for layer in steps[0] if steps else ():
        _share_prompts(call, columns, layer, attentions=True)
    return tuple(steps)


def _share_prompts(call: Call, columns: Columns, whole: Tensor, *, attentions: bool = False) -> None:
    """Rows whose prompt was computed as another's get what was recorded of that one."""
    states: StateRecord = call.states
    own = {
        span.row for spans in states.spans for span in spans
        if span.first < call.sequences[span.row].prompt_len
    }  # fmt: skip
    for seq in call.sequences:
        if seq.row in own:
            continue
        source = max((row for row in own if row < seq.row), default=None)
        if source is None:
            continue
        prompt: Callable[[Tensor], Tensor] = (lambda x: x) if attentions else (lambda x: x[: columns.width])
        prompt(whole[seq.row]).copy_(prompt(whole[source]))
