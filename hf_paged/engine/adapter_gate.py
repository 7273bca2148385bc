"""Who may start: a sequence whose adapters are in the model, or can be brought in beside those of the running ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_paged.engine.adapters import Selection
    from hf_paged.engine.request import Call, Sequence


class Resident(Protocol):
    """The part of `AdapterHost` that is asked here."""

    def bring_in(self, selections: Iterable[Selection], in_use: Iterable[Selection]) -> bool: ...
    def num_loads(self, selection: Selection) -> int: ...


class AdapterGate:
    """Asked by the scheduler before it starts a sequence. Used by the holder of the crank only.

    Others may overtake a sequence that waits for its adapter, but not for ever: after `_PATIENCE` plans nobody with
    an adapter starts before it, until the running ones have left it room.

    Args:
        host: moves adapters.
        renew: gives a sequence the prefix namespace of its weights as they are now.
    """

    _PATIENCE = 64

    def __init__(self, host: Resident, renew: Callable[[Sequence], object]) -> None:
        self._host, self._renew = host, renew
        #: Calls whose adapters could not be read, with the error.
        self.failed: list[tuple[Call, Exception]] = []
        self.moved = False  # adapters went or came since somebody looked
        self._first: Sequence | None = None  # the oldest that was refused in the last plan
        self._refusals = 0
        self._refused: Sequence | None = None

    def begin(self) -> None:
        """A plan is made."""
        if self._refused is not self._first:
            self._first, self._refusals = self._refused, 0
        self._refused = None

    def admits(self, starting: list[Sequence], running: Iterable[Sequence]) -> bool:
        """Whether the sequences of `starting`, which start together, may do so beside `running`."""
        wanted = dict.fromkeys(s.adapters for s in starting if s.adapters is not None and s.adapters.names)
        if not wanted:
            return True
        if self._refused is not None and self._refusals > self._PATIENCE:
            return False
        in_use = {s.adapters for s in running if s.adapters is not None}
        before = [self._host.num_loads(selection) for selection in wanted]
        try:
            admitted = self._host.bring_in(wanted, in_use)
        except Exception as error:
            self.failed.append((starting[0].call, error))
            self.moved = True
            return False
        if not admitted:
            if self._refused is None:
                self._refused = starting[0]
                self._refusals += self._refused is self._first
            return False
        self.moved |= before != [self._host.num_loads(selection) for selection in wanted]
        for seq in {other for s in starting for other in s.call.sequences if other.adapters in wanted}:
            loads = self._host.num_loads(seq.adapters)  # type: ignore[arg-type]
            if seq.adapter_loads != loads:
                seq.adapter_loads = loads
                self._renew(seq)
        return True
