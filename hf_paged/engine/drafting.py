"""Who guesses tokens, and what is remembered of a sequence whose tokens are guessed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_paged.engine.draft_policy import Acceptance
from hf_paged.engine.request import Sequence


class Drafter(Protocol):
    """Guesses tokens. Only the holder of the crank calls it."""

    @property
    def seconds_a_depth(self) -> float:
        """What one more token for every sequence costs."""
        ...

    def offer(self, sequence: Sequence, most: int) -> int:
        """How many tokens, at most `most` (>= 1), it would draft for `sequence` now."""
        ...

    def draft(self, wanted: list[tuple[Sequence, int]]) -> dict[Sequence, BaseException]:
        """Sets the drafts of sequences: each at most as long as wanted. Returns what went wrong, by sequence."""
        ...

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None: ...

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        ...


@dataclass(eq=False)
class Speculation:
    """How tokens are drafted for the rows of a call (`Call.speculation`): by a drafter of its own, or by a model.

    Calls with equal `assistant_key` share one drafter.
    """

    drafter: Drafter | None = None
    assistant_model: Any = None
    tokenizers: tuple[Any, Any] | None = None  # of the model and of an assistant that has another one
    num_layers: int | None = None  # early exit: the model itself drafts, with its first layers

    @property
    def assistant_key(self) -> Hashable:
        """Of the drafter that a model is; None where it is none."""
        if self.num_layers is not None:
            return self.num_layers
        if self.assistant_model is None:
            return None
        return id(self.assistant_model), *map(id, self.tokenizers or ())  # all held by the call


@dataclass
class Drafting:
    """What is remembered of a sequence (`Sequence.drafting`)."""

    kind: int = 0  # of what the drafter offers now: drafts of other kinds are right more often, or less
    acceptances: dict[int, Acceptance] = field(default_factory=dict)  # by kind
    state: Any = None  # the drafter's
    padding: bool = False  # it was finished before this step, and is given pads because its call runs on

    @property
    def acceptance(self) -> Acceptance:
        return self.acceptances.setdefault(self.kind, Acceptance(self.kind))
