"""A bounded number of adapters in the model, of any number that are registered from folders.

An adapter that came by `load_adapter` can be read again. So of these only `max_resident_adapters` are in the model at a
time: the least recently used one that no running request needs is taken out for one that is needed, to host memory
while that has room (`peft_parking`), else to where it came from. Only the holder of the crank moves them, between two
steps; loading, replacing and unloading happen while nothing runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hf_paged.engine.adapters import AdapterPart
from hf_paged.engine.weights import adapters_version
from hf_paged.errors import InvalidRequestError
from hf_paged.integrations.peft_parking import HostMover, Mover, Parked, host_budget
from hf_paged.resolve import resolve_model

__all__ = ["Registration", "Residency"]


class Registration:
    """An adapter that can be read from its folder again. Equal to itself only: replaced, it is another one.

    Args:
        name: requests choose it by this.
        holder: the PeftModel, or model, that it was loaded into; held weakly.
        path: its folder.
        served: how its tokens are computed, for `explain`.
    """

    def __init__(self, name: str, holder: Any, path: Path, served: str) -> None:
        self.name, self.path, self.served = name, path, served
        self.holder = weakref.ref(holder)
        self.is_current = True  # it was not unloaded or replaced
        self.part: AdapterPart | None = None  # in the model; None while it is out
        self.parked: Parked | None = None  # in host memory, while it is out of the model
        self.version = (
            b""  # of its weights when they came into the model; empty: they are not those of the folder
        )
        self.num_loads = 0
        self.stamp = _stamp(path)

    @property
    def is_present(self) -> bool:
        return self.is_current and (self.part is None or self.part.is_present)


class Residency:
    """Which registered adapters of one model are in it.

    Args:
        most: how many may be, besides active ones.
        layers: gives the adapter layers of the model.
        part_of: gives a part of an adapter that is in the model.
        host_bytes: of host memory for adapters that are out of it; None: `host_budget` decides.
        mover: moves them there and back.
    """

    def __init__(
        self,
        most: int,
        layers: Callable[[], list[Any]],
        part_of: Callable[[str], AdapterPart],
        host_bytes: int | None = None,
        mover: Mover | None = None,
    ) -> None:
        self.most = most
        self._host_bytes, self._mover = host_bytes, mover or HostMover()
        self._layers, self._part_of = layers, part_of
        self._known: dict[str, Registration] = {}  # least recently used first

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, one in tuple(self._known.items()) if one.is_present)

    def get(self, name: str) -> Registration | None:
        """The registration of `name`; None too where its user has removed it from the model."""
        found = self._known.get(name)
        return found if found is not None and found.is_present else None

    def register(self, name: str, holder: Any, path: Path, served: str) -> None:
        """Adapter `name` was just loaded from `path`; others leave if there are too many now. Nothing runs."""
        self.forget(name)
        added = self._known[name] = Registration(name, holder, path, served)
        self._came_in(added)
        self._make_room([added], {name}, ())

    def forget(self, name: str) -> None:
        """It was unloaded or replaced: requests that were made for it are told so."""
        gone = self._known.pop(name, None)
        if gone is not None:
            gone.is_current = False

    def bring_in(self, names: Collection[str], in_use: Collection[str]) -> bool:
        """Puts adapters into the model that are needed next, and takes others out for them.

        Args:
            names: needed together.
            in_use: adapters of running requests, which stay.

        Returns:
            False, with nothing changed, where too many others are in use.

        Raises:
            InvalidRequestError: one cannot be read any more.
        """
        wanted = [r for name in names if (r := self._known.get(name)) is not None]
        for one in wanted:
            self._known[one.name] = self._known.pop(one.name)
        missing = [one for one in wanted if one.part is None]
        if missing and not self._make_room(wanted, names, in_use):
            return False
        for one in missing:
            self._read(one)
        return True

    def _make_room(self, wanted: list[Registration], names: Collection[str], in_use: Collection[str]) -> bool:
        active = {name for layer in self._layers() for name in layer.active_adapters}
        others = [r for r in self._known.values() if r.part is not None and r.name not in names]
        others = [r for r in others if r.name not in active]
        room = self.most - sum(1 for r in wanted if r.name not in active)
        idle = [r for r in others if r.name not in in_use]
        if len(others) - len(idle) > room:
            return False
        for one in idle[: max(0, len(others) - room)]:
            self._take_out(one)
        return True

    def num_loads(self, names: Collection[str]) -> int:
        """Grows when one of `names` is read again, by which its weights become other tensors."""
        return sum(r.num_loads for name in names if (r := self._known.get(name)) is not None)

    def _came_in(self, one: Registration) -> None:
        one.part = self._part_of(one.name)
        one.version = self._version(one.name)
        one.num_loads += 1

    def _version(self, name: str) -> bytes:
        return adapters_version(self._layers(), (name,))

    def _take_out(self, one: Registration) -> None:
        holder = one.holder()
        if holder is None or not one.is_present or self._version(one.name) != one.version:
            # Trained, edited or removed here: it is not what lies in the folder any more, so it stays.
            del self._known[one.name]
            return
        one.part = None
        self._host_bytes = host_budget(resolve_model(holder).device, self._host_bytes)
        if self._host_bytes:
            one.parked = Parked.take_out(holder, one.name, self._layers(), self._mover)
        if one.parked is None:
            holder.delete_adapter(one.name)
        self._keep_within_budget()

    def _keep_within_budget(self) -> None:
        """Lets go of what was used least recently; it is read from its folder next time."""
        parked = [r for r in self._known.values() if r.parked is not None]
        too_much = sum(r.parked.num_bytes for r in parked if r.parked) - (self._host_bytes or 0)
        for one in parked:
            if too_much > 0 and one.parked is not None and not one.parked.has_changed():
                too_much -= one.parked.num_bytes
                one.parked = None

    def _read(self, one: Registration) -> None:
        holder = one.holder()
        if holder is None:
            raise InvalidRequestError(
                f"adapter {one.name!r}: the model it was loaded into does not exist any more"
            )
        if _stamp(one.path) != one.stamp:
            raise InvalidRequestError(
                f"adapter {one.name!r}: {one.path} has changed since it was loaded; load it again with replace=True"
            )
        if one.parked is not None and self._unpark(one, one.parked, holder):
            return
        _read_folder(one, holder)
        self._came_in(one)

    def _unpark(self, one: Registration, parked: Parked, holder: Any) -> bool:
        has_changed = parked.has_changed()
        if not parked.put_back(holder, self._layers()):
            if has_changed:
                raise InvalidRequestError(
                    f"adapter {one.name!r}: its weights were changed while it was out of the model, which has other "
                    "layers now; load it again with replace=True"
                )
            one.parked = None
            return False
        one.parked = None
        self._came_in(one)
        if has_changed:
            one.version = b""
        return True


def _read_folder(one: Registration, holder: Any) -> None:
    from hf_paged.integrations.peft_checkpoints import active_adapters, check_values, load_into, set_active

    check_values(one.path)
    active = active_adapters(holder)
    load_into(holder, one.path, one.name)
    if active_adapters(holder) != active:
        set_active(holder, active)


def _stamp(path: Path) -> tuple[Any, ...]:
    """What differs when the files of a checkpoint were written again; empty where they are gone."""
    from hf_paged.integrations.peft_checkpoints import CONFIG, WEIGHTS

    try:
        facts = [(path / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return ()
    return tuple((fact.st_size, fact.st_mtime_ns, fact.st_ino) for fact in facts)
