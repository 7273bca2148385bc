"""The two things that cross seams in a step: what the scheduler decided and what the model is given.

`StepPlan` is plain data from the scheduler (no tensors). `StepInputs` are the tensors made of it by `engine.batch`.
While the model runs, the attention layers find their `StepInputs` through `current_step()`: it is per thread, set only
around the forward of an engine step, and carries the `owner` whose layers may use it. Everywhere else (training, plain
forwards, another thread, another model) `current_step()` is None or has another owner, and a layer runs what it ran
before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hf_paged.engine.adapters import Selection
    from hf_paged.engine.request import Sequence
    from hf_paged.kernels.metadata import PagedMetadata


#: Runs the model on the inputs of a step: logits [R, V].
Forward = Callable[[], "Tensor"]


@dataclass
class StepPlan:
    """What one step computes. Sequences with one new token come first (`num_decodes` of them)."""

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]  # new tokens of each sequence, >= 1
    num_decodes: int
    #: Blocks to copy before the forward because a shared block is about to be written (copy-on-write).
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    #: Indices into `sequences` of those that reach their last known token in this step and so need a next token.
    sample_indices: list[int] = field(default_factory=list)
    #: How many of each sequence's tokens, the last ones, are drafts (`Sequence.draft`); empty: there are none.
    #: The token before the first draft and each draft get a row of logits.
    num_drafts: list[int] = field(default_factory=list)
    #: Every sequence has tokens of its own already and wants one more, and nothing else is to be looked after: no
    #: drafts, beams, adapters, recordings or callers that choose. What only those need is not looked for then.
    is_plain: bool = False

    @property
    def logits_counts(self) -> list[int]:
        """Rows of logits of each sequence in `sample_indices`."""
        if not self.num_drafts:
            return [1] * len(self.sample_indices)
        return [1 + self.num_drafts[i] for i in self.sample_indices]

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


@dataclass
class AdapterRuns:
    """Which adapters (a `Selection`; None: those of the model) the tokens of a step run with: (selection, first, end).

    A layer sees either the T tokens of the step or the R rows that get logits. Where both are as many, they
    are the same.
    """

    tokens: list[tuple[Selection | None, int, int]]
    rows: list[tuple[Selection | None, int, int]]
    #: While a layer runs for one selection only: a list that holds it, for layers within that layer.
    within: list[Selection | None] = field(default_factory=list)
    #: What layers need for `tokens`, by id of the layer: made for all of them when the first one asks.
    prepared: dict[int, Any] = field(default_factory=dict)
    #: Scratch memory of their products, which follow one another.
    room: list[Tensor] = field(default_factory=list)

    def of(self, count: int) -> list[tuple[Selection | None, int, int]]:
        """The runs of an input of `count` tokens."""
        for runs in (self.tokens, self.rows):
            if runs and runs[-1][2] == count:
                return runs
        if not count:  # no row of this step gets logits
            return []
        raise ValueError(f"an adapter layer got {count} tokens, in a step of {self.tokens[-1][2]}")


@dataclass
class StepRecording:
    """What a step hands out besides logits. The scheduler's plan decides what; the forward fills it in."""

    wants_hidden_states: bool
    #: Index of a sequence -> how many of its tokens in the step, the last ones, whose attention is wanted.
    attention_of: dict[int, int]
    hidden_states: tuple[Tensor, ...] = ()  # of each layer [1, T, E], the embedding first
    #: Layer number -> index of a sequence -> probabilities [H, tokens, all tokens of the sequence].
    attentions: dict[int, dict[int, Tensor]] = field(default_factory=dict)


@dataclass
class StepInputs:
    """The packed tensors of one step: T tokens of S sequences, R rows of logits."""

    owner: object  # whose layers this step is for: `AppliedPatch.owner`
    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, restarting per sequence
    logits_indices: Tensor  # [R] int64 into T: last tokens of each sequence, as `StepPlan.logits_counts` says
    metadata: PagedMetadata
    backend: str  # "reference" | "cpu" | "triton"
    #: layer number -> (k_cache, v_cache), each [num_blocks, block_size, H_kv, D]
    kv_layer: Callable[[int], tuple[Tensor, Tensor]]
    #: layer number -> (k_scales, v_scales) of an int8 cache, each float32 [num_blocks, block_size, H_kv]
    kv_scales: Callable[[int], tuple[Tensor | None, Tensor | None]] = lambda layer: (None, None)
    adapters: AdapterRuns | None = None  # None: every token runs with whatever the model's layers have active
    #: (first place among the T tokens, rows [n, E]): embeddings that stand in for ids there.
    embeds: list[tuple[int, Tensor]] = field(default_factory=list)
    recording: StepRecording | None = None  # None: nothing but logits is wanted
    #: Runs the forward in its own way (as a captured graph) and gives the logits of the step; None: it is just run.
    around: Callable[[Forward], Tensor] | None = None
    #: The R rows of logits as a step of their own, their keys and values already stored: what is left of the sequences
    #: once the last block has those of all tokens. None where that would be no smaller by much.
    tail: PagedMetadata | None = None


class _Active(threading.local):
    inputs: StepInputs | None = None


_active = _Active()


def current_step() -> StepInputs | None:
    """The step this thread is running the model for, or None outside of one."""
    return _active.inputs


@contextmanager
def active_step(inputs: StepInputs) -> Iterator[StepInputs]:
    """Makes `inputs` the current step of this thread; always reset, never nested."""
    if _active.inputs is not None:
        raise RuntimeError("a step is already running in this thread: steps do not nest")
    _active.inputs = inputs
    try:
        yield inputs
    finally:
        _active.inputs = None


@contextmanager
def stands_in(inputs: StepInputs | None) -> Iterator[None]:
    """Makes `inputs` the current step within a step: a part of it."""
    before, _active.inputs = _active.inputs, inputs
    try:
        yield
    finally:
        _active.inputs = before


def suspended_step() -> AbstractContextManager[None]:
    """Hides the current step from the layers, e.g. for user code called from within a step."""
    return stands_in(None)
