"""What the engine works on: a `Call` of the user and its `Sequence`s, one running stream of tokens each.

No tensors and no torch here. The regions of a sequence, half-open, in tokens:

    0            prompt_len                                  num_tokens
    | prompt ... | generated ...                             |
    | computed: KV is in blocks ......... | num_computed ... |   (to compute: what the next steps schedule)

There are no phases: a step gives a sequence some of the tokens between `num_computed` and `num_tokens`; the step that
reaches `num_tokens` yields a next token. Prompt chunks, recomputation after preemption and decode are all that.
"""

from __future__ import annotations

import enum
import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_paged.engine.adapters import Selection
    from hf_paged.engine.given_kv import GivenKV
    from hf_paged.engine.wake import Wake


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"
    TIMEOUT = "timeout"  # max_time
    CANCELLED = "cancelled"
    ERROR = "error"


class Status(enum.Enum):
    WAITING = enum.auto()  # holds no blocks
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """One stream: a prompt and what was generated for it.

    `num_pad` is the number of left pads `generate()` would show before the prompt: they are never computed, but
    count in the lengths and histories that logits processors and stopping criteria see.
    """

    call: Call
    row: int  # index in the call's batch, `num_return_sequences` expanded
    token_ids: list[int]
    prompt_len: int
    max_new_tokens: int  # >= 1
    num_pad: int = 0
    #: Adapters it runs with; None: whatever the model runs with when a step comes.
    adapters: Selection | None = None
    adapter_loads: int | None = (
        None  # `AdapterHost.num_loads` when its namespace was made; None: not asked yet
    )
    #: Its own prefix-cache namespace, where rows of a call have different adapters.
    own_namespace: bytes | None = None
    #: Another sequence of the call with the same prompt: its blocks are forked when its prompt is computed.
    fork_of: Sequence | None = None
    group: SequenceGroup | None = None  # the beams it is one of

    num_computed: int = 0
    #: 1 while its newest token is known to the device only (`engine.ahead`): it is not in `token_ids` yet.
    num_ahead: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full blocks
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    #: Tokens generated when it finished; `token_ids` may go on with pads in a call that runs on (`Call.run_on`).
    num_kept: int | None = None
    num_cached_prompt: int = 0  # prompt tokens found in the prefix cache at first admission
    arrival: int = -1  # order of admission to the engine; set by the scheduler
    #: Guesses of the tokens that come next: the next step computes them too, and those that prove right are kept.
    draft: list[int] = field(default_factory=list)
    #: Keys and values of its first tokens, from outside: they are written into blocks instead of computed.
    given_kv: GivenKV | None = None
    #: [prompt_len, E]: what the model is given in place of the prompt's ids, which mean nothing then.
    embeds: Any = None
    drafting: Any = None  # `engine.drafting.Drafting`
    #: In a lockstep call: the logits of its next token are made, and nothing is to compute until that is chosen.
    handed_over: bool = False

    @property
    def namespace(self) -> bytes | None:
        return self.call.namespace if self.own_namespace is None else self.own_namespace

    @property
    def prefix_namespace(self) -> bytes | None:
        """`namespace` where cached prefixes may serve it and its own may serve others; else None.

        Not where all its tokens have to be computed, or where its KV is more than what its token ids tell.
        """
        alone = self.call.states is not None or self.given_kv is not None or self.embeds is not None
        return None if alone else self.namespace

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_chosen(self) -> int:
        """`num_generated`, and the token that only the device knows."""
        return len(self.token_ids) - self.prompt_len + self.num_ahead

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) + self.num_ahead - self.num_computed

    @property
    def will_be_forked(self) -> bool:
        """Whether its blocks will be those of `fork_of`, which has no token yet."""
        parent = self.fork_of
        return (
            parent is not None
            and self.num_generated == 0
            and parent.num_generated == 0
            and not parent.handed_over
            and parent.finish_reason is None
            and parent.status is not Status.FINISHED
        )

    @property
    def ends_at(self) -> float:
        """Tokens generated with which it ends whatever they are."""
        return math.inf if self.call.position_bound else self.max_new_tokens

    @property
    def generated_ids(self) -> list[int]:
        """The tokens a user gets: without what was run on after the finish."""
        end = self.num_tokens if self.num_kept is None else self.prompt_len + self.num_kept
        return self.token_ids[self.prompt_len : end]


@dataclass(eq=False)
class SequenceGroup:
    """Beams: sequences that take each step together, after which each goes on from one of them.

    Mostly the beams of one prompt; those of all prompts of a call where upstream's batch shows in the result.
    Before the first choice the beams of a prompt are alike, so only the first of them is computed.
    """

    call: Call
    num_beams: int  # of each prompt
    prompts: list[int]  # their numbers in the call
    sequences: list[Sequence] = field(default_factory=list)  # prompt after prompt
    num_steps: int = 0  # choices made so far
    state: Any = None  # what `engine.beam_state` keeps of it
    #: Sequence -> (sequence, tokens): whose computed tokens it takes over before its own are computed again.
    forks: dict[Sequence, tuple[Sequence, int]] = field(default_factory=dict)

    @property
    def active(self) -> list[Sequence]:
        """Those that are computed."""
        return self.sequences if self.num_steps else self.sequences[:: self.num_beams]

    def take(self, sources: list[int], tokens: list[int]) -> None:
        """A step was made: beam i is now what beam `sources[i]` was, and `tokens[i]`."""
        histories = [self.sequences[source].token_ids for source in sources]
        for seq, history, token in zip(self.sequences, histories, tokens, strict=True):
            seq.token_ids = [*history, token]
        self.num_steps += 1


_call_ids = itertools.count()


@dataclass(eq=False)
class Call:
    """One user call: rows that share options, ambient state and fate of exceptions.

    `sampling` is opaque here: `engine.sampler` knows it. `namespace` separates prefixes in the cache (adapter, weights
    version, salt); None opts out of the prefix cache.
    """

    sampling: Any
    ambient: Any = None  # hashable; sequences of different ambient state never share a step
    namespace: bytes | None = b""
    num_pauses: int = 0  # see `engine.namespaces.Namespaces`
    salt: str = ""
    priority: int = 0  # lower runs first
    #: Finished rows go on with pad tokens until all rows are finished, as upstream does, for scores and
    #: returned caches.
    run_on: bool = False
    speculation: Any = None  # `engine.drafting.Speculation`: how tokens are drafted; None: they are not
    #: `engine.lockstep.Lockstep` of a call whose rows advance together, by tokens that its caller chooses.
    lockstep: Any = None
    attended: bool = False  # a lockstep call whose caller has the logits of all rows and is choosing
    states: Any = None  # `engine.states.StateRecord`: hidden states and attentions to return; None: none are
    #: `max_new_tokens` of its rows is all that positions allow, and less than was asked for: a row that has so many and
    #: does not end with the last fails the call (`engine.positions`).
    position_bound: bool = False
    keep_kv: bool = False  # blocks stay with the finished sequences until `PagedEngine.release_kv`
    #: Copies the kept blocks out and gives them back; None until the call is in the hands of its user.
    spill: Callable[[], object] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    call_id: int = field(default_factory=lambda: next(_call_ids))
    error: BaseException | None = None
    cancelled: bool = False
    #: Called with each new token (sequence, token) by the thread that runs the steps; must not raise or block.
    on_token: Callable[[Sequence, int], None] | None = None
    #: Called once with the call when its last sequence is finished, before blocks are freed.
    on_finish: Callable[[Call], None] | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    done: threading.Event = field(default_factory=threading.Event)
    wake: Wake | None = None  # set when the thread that waits for the call should look at it

    def add_row(
        self, prompt: list[int], max_new_tokens: int, *, num_pad: int = 0, fork_of: int | None = None
    ) -> Sequence:
        """Appends a sequence for `prompt` (unpadded token ids)."""
        parent = None if fork_of is None else self.sequences[fork_of]
        sequence = Sequence(
            self,
            len(self.sequences),
            list(prompt),
            len(prompt),
            max_new_tokens,
            num_pad=num_pad,
            fork_of=parent,
        )
        self.sequences.append(sequence)
        return sequence

    def mark_unfinished(self, reason: FinishReason) -> None:
        """Says of the sequences that had not finished how they ended."""
        for seq in self.sequences:
            if seq.finish_reason is None:
                seq.finish_reason = reason
                seq.num_kept = seq.num_generated

    def look(self) -> None:
        """Tells the thread that waits for the call that something has changed."""
        if self.wake is not None:
            self.wake.set()

    def end(self) -> None:
        """Tells everybody that the call has ended."""
        self.done.set()
        self.look()

    @property
    def unfinished(self) -> bool:
        return any(s.finish_reason is None for s in self.sequences)

    @property
    def run_on_width(self) -> int:
        """Generated tokens up to which finished rows go on for now: no row is ever longer than the result."""
        return max(
            s.num_generated + 1 if s.finish_reason is None else s.num_kept or 0 for s in self.sequences
        )

    @property
    def has_run_out(self) -> bool:
        """All rows are finished and, as upstream's do, have gone on to the step in which the last one finished."""
        if self.unfinished:
            return False
        width = max(s.num_kept or 0 for s in self.sequences)
        if self.keep_kv and any(s.num_uncomputed > 1 for s in self.sequences):
            return False  # it was preempted, and its KV is still to be made again
        return all(s.num_generated >= width for s in self.sequences)
