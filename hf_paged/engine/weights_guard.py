"""Noticing, while requests run, that weights changed under them."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_paged.engine.adapters import Selection, base_modules
from hf_paged.engine.weights import Samples, adapters_version, optimizer_steps, weights_version
from hf_paged.engine.weights_snapshot import WeightsSnapshot

if TYPE_CHECKING:
    from hf_paged.engine.request import Sequence


def versions(model: nn.Module, selection: Selection | None, samples: Samples | None = None) -> bytes:
    """What a namespace begins with: it differs when weights that `selection` runs with do."""
    names = None if selection is None else selection.names
    modules = tuple(base_modules(model))
    return b"\0".join((weights_version(modules, samples), adapters_version(modules, names), b""))


class WeightsGuard:
    """Looks after the weights of running sequences, step by step.

    What leaves a trace (in-place edits, optimizer steps) is looked for at every step: a few microseconds. What
    leaves none (edits of `.data`, of an adapter's scaling) is looked for so seldom that it takes at most a fiftieth
    of the time: in a snapshot where one will do, which is quick; else, and where the snapshot or a trace says that
    something changed, by comparing versions.
    """

    _SHARE = 50
    _FIRST_AFTER_S = 0.05  # a full look and its snapshot take 1 ms on the smallest models

    def __init__(self) -> None:
        self._samples = Samples()
        self._running = False  # a step was made since nothing ran
        self._watched: list[Tensor] | None = None
        self._trace = (0, 0)
        self._next_check = 0.0
        self._snapshot: WeightsSnapshot | None = None
        self._known: set[bytes] = set()  # namespaces that belong to the weights of the snapshot

    def changed(self, model: nn.Module, sequences: Collection[Sequence]) -> list[Sequence]:
        """Those of `sequences` whose weights are not those they started with. Asked after each forward."""
        if not self._is_due(model):
            return []
        started = time.perf_counter()
        stale = [] if self._is_as_known(sequences) else self._compare(model, sequences)
        now = time.perf_counter()
        self._next_check = now + self._SHARE * (now - started)
        return stale

    def forget(self) -> None:
        """Nothing runs any more: holds no tensor."""
        self._watched, self._running = None, False
        self._drop_snapshot()

    def watch_again(self) -> None:
        """The model has other tensors now: those that left are let go, and the next look is a full one."""
        self._watched, self._next_check = None, 0.0
        self._drop_snapshot()

    def _is_as_known(self, sequences: Collection[Sequence]) -> bool:
        if self._snapshot is None or not self._snapshot.holds():
            return False
        return all(seq.namespace in self._known or not seq.namespace for seq in sequences)

    def _compare(self, model: nn.Module, sequences: Collection[Sequence]) -> list[Sequence]:
        self._drop_snapshot()
        snapshot = WeightsSnapshot.of(model)  # before the versions: nothing can change unseen between the two
        current: dict[Selection | None, bytes] = {}
        stale, known = [], set()
        for seq in sequences:
            if not seq.namespace:
                continue
            if seq.adapters not in current:
                current[seq.adapters] = versions(model, seq.adapters, self._samples)
            if seq.namespace.startswith(current[seq.adapters]):
                known.add(seq.namespace)
            else:
                stale.append(seq)
        self._snapshot, self._known = snapshot, known
        return stale

    def _drop_snapshot(self) -> None:
        self._snapshot, self._known = None, set()

    def _is_due(self, model: nn.Module) -> bool:
        if not self._running:
            # Most calls of one step end here. Between the start of a call and now anything may have happened.
            self._running = True
            self._next_check = time.perf_counter() + self._FIRST_AFTER_S
            return False
        if self._watched is None:
            self._watch(model)
        if self._look() != self._trace:
            self._watch(model)
            self._drop_snapshot()
            return True
        return time.perf_counter() >= self._next_check

    def _watch(self, model: nn.Module) -> None:
        self._watched = [p for p in model.parameters() if not p.is_inference()]
        self._trace = self._look()

    def _look(self) -> tuple[int, int]:
        assert self._watched is not None
        return optimizer_steps(), sum([p._version for p in self._watched])
