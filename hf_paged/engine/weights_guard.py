"""Noticing, while requests run, that weights changed under them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_paged.engine.adapters import Selection, base_modules
from hf_paged.engine.weights import Samples, adapters_version, optimizer_steps, weights_version

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
    leaves none (edits of `.data`, of an adapter's scaling) is found by the full comparison, which is made when
    there is a trace, and else so seldom that it takes at most a fiftieth of the time.
    """

    _SHARE = 50
    _FIRST_AFTER_S = 0.02

    def __init__(self) -> None:
        self._samples = Samples()
        self._running = False  # a step was made since nothing ran
        self._watched: list[Tensor] | None = None
        self._trace = (0, 0)
        self._next_check = 0.0

    def changed(self, model: nn.Module, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those of `sequences` whose weights are not those they started with. Asked after each forward."""
        if not self._is_due(model):
            return []
        started = time.perf_counter()
        current: dict[Selection | None, bytes] = {}
        stale = []
        for seq in sequences:
            if not seq.namespace:
                continue
            if seq.adapters not in current:
                current[seq.adapters] = versions(model, seq.adapters, self._samples)
            if not seq.namespace.startswith(current[seq.adapters]):
                stale.append(seq)
        now = time.perf_counter()
        self._next_check = now + self._SHARE * (now - started)
        return stale

    def forget(self) -> None:
        """Nothing runs any more: holds no tensor."""
        self._watched, self._running = None, False

    def _is_due(self, model: nn.Module) -> bool:
        if not self._running:
            # Most calls of one step end here. Between the start of a call and now anything may have happened.
            self._running = True
            self._next_check = time.perf_counter() + self._FIRST_AFTER_S
            return False
        if self._watched is None:
            self._watched = [p for p in model.parameters() if not p.is_inference()]
            self._trace = self._look()
        trace = self._look()
        if trace != self._trace:
            self._trace = trace
            self._watched = [p for p in model.parameters() if not p.is_inference()]
            self._trace = self._look()
            return True
        return time.perf_counter() >= self._next_check

    def _look(self) -> tuple[int, int]:
        assert self._watched is not None
        return optimizer_steps(), sum([p._version for p in self._watched])
