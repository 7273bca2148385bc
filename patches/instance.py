"""Attributes put on one module instance that can be taken back, and that copies never see.

`InstancePatch(module).set("forward", f)` shadows a method on this instance only; `revert()` leaves the
instance as it was. As long as anything is set, the instance also carries two hooks of its own, both looked up
on the instance by Python and
torch: `__getstate__` (copy, pickle, `torch.save`) and `_replicate_for_data_parallel`. They hand out a state
without our attributes and without themselves, so every copy is plain. Knows nothing of attention, models or
engines.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

from torch import nn

__all__ = ["InstancePatch"]

_GETSTATE = "__getstate__"
_REPLICATE = "_replicate_for_data_parallel"


class _Absent:
    """Marks that the instance had no attribute of a name."""


_ABSENT = _Absent()


class InstancePatch:
    """The attributes one user of a module (e.g. the attention patch) has set on it.

    Several users may patch one module, each name by one of them. Holds the module weakly: neither this object
    nor the hooks keep a dropped module alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._names: list[str] = []
        self._ledger: _Ledger | None = None

    def set(self, name: str, value: Any) -> None:
        """Shadows attribute `name` on the instance with `value`.

        Args:
            name: an attribute that lives in the instance's `__dict__` (no parameter, buffer or submodule).
            value: should not hold the module strongly, or dropping the module leaves a reference cycle.

        Raises:
            RuntimeError: another patch has set this name on this module and has not taken it back.
            ReferenceError: the module is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(f"cannot set {name!r}: the module is gone")
        ledger = _Ledger.of(module)
        if name in ledger.entries:
            raise RuntimeError(f"{type(module).__name__}.{name} is already patched on this instance")
        if self._ledger is not ledger:
            self.revert()
            self._ledger = ledger
        state = vars(module)
        ledger.entries[name] = (value, state.get(name, _ABSENT))
        self._names.append(name)
        state[name] = value

    def revert(self) -> None:
        """Takes back everything set here. May be called again, and after the module is gone.

        An attribute the instance did not have is deleted, one it had is put back. Where somebody else has
        replaced ours in the meantime, theirs stays.
        """
        module, ledger, names = self._module(), self._ledger, self._names
        self._ledger, self._names = None, []
        if module is None or ledger is None:
            return
        for name in names:
            ledger.take_back(module, name)
        ledger.close_if_empty(module)


class _Ledger:
    """What is set on one module by all its patches, and the two hooks that keep copies plain."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        #: name -> (what was set, what the instance had before)
        self.entries: dict[str, tuple[Any, Any]] = {}
        self._hooks = {_GETSTATE: self._make_getstate(), _REPLICATE: self._make_replicate()}
        self._before = {name: vars(module).get(name, _ABSENT) for name in self._hooks}
        vars(module).update(self._hooks)

    @classmethod
    def of(cls, module: nn.Module) -> _Ledger:
        hook = vars(module).get(_GETSTATE)
        ledger = getattr(hook, "hf_paged_ledger", None)
        return ledger if isinstance(ledger, cls) and ledger._module() is module else cls(module)

    def take_back(self, module: nn.Module, name: str) -> None:
        value, before = self.entries.pop(name)
        state = vars(module)
        # Wrappers such as accelerate's hooks move what they wrap to another attribute (`_old_forward`) and
        # back.
        for slot in [slot for slot, current in state.items() if current is value]:
            self._restore(module, state, slot, name, before)

    @staticmethod
    def _restore(module: nn.Module, state: dict[str, Any], slot: str, name: str, before: Any) -> None:
        if before is not _ABSENT:
            state[slot] = before
        elif slot == name:
            del state[slot]
        else:
            state[slot] = types.MethodType(getattr(type(module), name), module)

    def close_if_empty(self, module: nn.Module) -> None:
        if self.entries:
            return
        state = vars(module)
        for name, hook in self._hooks.items():
            if state.get(name) is hook:
                self._restore(module, state, name, name, self._before[name])

    def _plain(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """`state` as it would be had nothing been set."""
        plain = dict(state)
        entries = [(name, value, before) for name, (value, before) in self.entries.items()]
        entries += [(name, hook, self._before[name]) for name, hook in self._hooks.items()]
        for name, value, before in entries:
            for slot in [slot for slot, current in plain.items() if current is value]:
                self._restore(module, plain, slot, name, before)
        return plain

    def _make_getstate(self) -> Any:
        def getstate() -> Any:
            module = self._alive(_GETSTATE)
            before = self._before[_GETSTATE]
            state = type(module).__getstate__(module) if before is _ABSENT else before()
            if isinstance(state, dict):
                return self._plain(module, state)
            if (
                isinstance(state, tuple) and state and isinstance(state[0], dict)
            ):  # (dict, slots) of a class with slots
                return (self._plain(module, state[0]), *state[1:])
            return state

        getstate.hf_paged_ledger = self  # type: ignore[attr-defined]
        return getstate

    def _make_replicate(self) -> Any:
        def replicate() -> nn.Module:
            module = self._alive(_REPLICATE)
            before = self._before[_REPLICATE]
            replica = type(module)._replicate_for_data_parallel(module) if before is _ABSENT else before()
            replica.__dict__ = self._plain(replica, vars(replica))
            return replica

        return replicate

    def _alive(self, name: str) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(f"{name}: the module this was looked up on is gone")
        return module
