"""Noticing, while requests run, that weights changed under them."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_paged.engine.adapters import (
    Selection,
    adapter_facts,
    base_modules,
    containers,
    entries,
    is_adapter_layer,
)
from hf_paged.engine.weight_samples import Samples, version_of
from hf_paged.engine.weights import adapters_version, optimizer_steps, weights_version
from hf_paged.engine.weights_snapshot import WeightsSnapshot

if TYPE_CHECKING:
    from hf_paged.engine.request import Sequence


class _Watch:
    """Some tensors, and what tells whether they left a trace of a change since it was looked for last."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [t for t in tensors if not t.is_inference()]
        self._trace = self._look()

    def has_changed(self) -> bool:
        before, self._trace = self._trace, self._look()
        return before != self._trace

    def _look(self) -> tuple[int, int]:
        return optimizer_steps(), sum(map(version_of, self._tensors))


class WeightsGuard:
    """Looks after the weights of running sequences, step by step.

    What leaves a trace (in-place edits, optimizer steps) is looked for at every step, in the base model and in the
    adapters that the step ran with: a tenth of a microsecond a tensor, some more where caches are cold. An adapter that
    is not in a step is looked at again when it next is, against what was seen of it last. What
    leaves none (edits of `.data`, of an adapter's scaling) is looked for so seldom that it takes at most a fiftieth
    of the time: by comparing versions, and after a while in a snapshot where one will do, which is quick, until the
    snapshot or a trace says that something changed.

    Where no other thread of Python exists and nobody's code has run in this one since the last look, nothing can have
    been edited: no trace is looked for, and the rest a tenth as often, for the sake of other processes and signals.
    """

    _SHARE, _SHARE_ALONE = 50, 500
    _FIRST_AFTER_S = 0.02
    _SNAPSHOT_AFTER_S = 0.2  # it takes as long to make as several comparisons of versions

    def __init__(self) -> None:
        self._samples = Samples()
        self._running = False  # a step was made since nothing ran
        self._watched: _Watch | None = None  # the base model
        self._layers: list[nn.Module] = []  # that hold adapters
        self._adapters: dict[Selection | None, _Watch] = {}
        self._earliest = self._snapshot_from = 0.0
        self._checked_at = self._check_took = 0.0
        self._snapshot: WeightsSnapshot | None = None
        self._known: set[bytes] = set()  # namespaces that belong to the weights of the snapshot
        self._single = False  # there was no other thread at the last look
        self._alone = False  # and nothing could have been edited since the one before
        self._fresh: set[Selection | None] = set()  # those looked at since something could

    def changed(
        self,
        model: nn.Module,
        planned: Iterable[Sequence],
        live: Collection[Sequence],
        *,
        undisturbed: bool = False,
    ) -> list[Sequence]:
        """Those of `live` whose weights are not those they started with. Asked after each forward.

        Args:
            model: which runs them.
            planned: the sequences that were in the forward.
            live: these, and all others whose adapters are in the model: they may have stood by while it changed.
            undisturbed: no code but the engine's has run in this thread since this was asked last.
        """
        if not self._is_due(model, {seq.adapters for seq in planned}, undisturbed):
            return []
        started = time.perf_counter()
        stale = [] if self._is_as_known(live) else self._compare(model, live)
        if stale:
            self._stop_watching()
        self._checked_at = time.perf_counter()
        self._check_took = self._checked_at - started
        return stale

    def forget(self) -> None:
        """Nothing runs any more: holds no tensor."""
        self._running = False
        self._stop_watching()
        self._drop_snapshot()

    def watch_again(self) -> None:
        """The model has other tensors now: those that left are let go, and the next look is a full one."""
        self._earliest = self._check_took = 0.0
        self._stop_watching()
        self._drop_snapshot()

    def _is_as_known(self, sequences: Collection[Sequence]) -> bool:
        if self._snapshot is None or not self._snapshot.holds():
            return False
        return all(seq.namespace in self._known or not seq.namespace for seq in sequences)

    def _compare(self, model: nn.Module, sequences: Collection[Sequence]) -> list[Sequence]:
        self._drop_snapshot()
        # Before the versions: nothing can change unseen between the two.
        is_worth_it = not self._alone and time.perf_counter() >= self._snapshot_from
        snapshot = WeightsSnapshot.of(model) if is_worth_it else None
        modules = base_modules(model)
        base = weights_version(modules, self._samples)
        layers = [module for module in modules if is_adapter_layer(module)]
        # What a namespace begins with: see `NamespaceMaker.make`.
        current: dict[Selection | None, bytes] = {}
        stale, known = [], set()
        for seq in sequences:
            if not seq.namespace:
                continue
            if seq.adapters not in current:
                names = None if seq.adapters is None else seq.adapters.names
                current[seq.adapters] = b"\0".join((base, adapters_version(layers, names), b""))
            if seq.namespace.startswith(current[seq.adapters]):
                known.add(seq.namespace)
            else:
                stale.append(seq)
        self._snapshot, self._known = snapshot, known
        return stale

    def _drop_snapshot(self) -> None:
        self._snapshot, self._known = None, set()

    def _stop_watching(self) -> None:
        self._watched = None
        self._layers = []
        self._adapters.clear()

    def _is_due(self, model: nn.Module, selections: set[Selection | None], undisturbed: bool) -> bool:
        was_single, self._single = self._single, len(sys._current_frames()) == 1
        if not self._running:
            # Most calls of one step end here. Between the start of a call and now anything may have happened.
            self._running = True
            now = time.perf_counter()
            self._earliest, self._snapshot_from = now + self._FIRST_AFTER_S, now + self._SNAPSHOT_AFTER_S
            self._check_took = 0.0
            self._fresh = set()
            return False
        untouched = undisturbed and self._single and was_single
        self._alone = untouched and self._watched is not None and selections <= self._fresh
        share = self._SHARE_ALONE if self._alone else self._SHARE
        is_time = time.perf_counter() >= max(self._earliest, self._checked_at + share * self._check_took)
        if self._alone and not is_time:
            return False
        self._fresh = self._fresh | selections if untouched else selections
        if self._has_trace(model, selections):
            self._drop_snapshot()
            return True
        return is_time

    def _has_trace(self, model: nn.Module, selections: Iterable[Selection | None]) -> bool:
        """Whether the base model or one of `selections` changed, or may have before it was first looked at."""
        is_first = self._watched is None
        has_trace = self._watched is not None and self._watched.has_changed()
        if is_first or has_trace:
            # Other tensors may be in the model now. Who is not in this step is compared when next in one.
            self._watch_base(model)
        for selection in selections:
            watch = self._adapters.get(selection)
            if watch is None or watch.has_changed():
                self._adapters[selection] = _Watch(_adapter_tensors(self._layers, selection))
                has_trace |= not is_first
        return has_trace

    def _watch_base(self, model: nn.Module) -> None:
        self._stop_watching()
        modules = base_modules(model)
        self._layers = [module for module in modules if is_adapter_layer(module)]
        self._watched = _Watch(p for module in modules for p in module._parameters.values() if p is not None)


def _adapter_tensors(layers: Iterable[nn.Module], selection: Selection | None) -> Iterator[Tensor]:
    """All tensors of the adapters of `selection`; with None of all adapters there are."""
    for layer in layers:
        names: Iterable[str]
        if selection is None:
            names = dict.fromkeys(
                name for container in containers(layer) for name in tuple(entries(container))
            )
        else:
            names = selection.names
        for name in names:
            yield from adapter_facts(layer, name)[0]
