"""The adapters of one model: which there are, which a request runs with, and its layers' part in engine steps."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from hf_paged.engine.adapters import (
    BASE,
    AdapterPart,
    Present,
    RowAdapters,
    Selection,
    base_modules,
    containers,
    entries,
    is_adapter_layer,
    row_adapters,
)
from hf_paged.errors import InvalidRequestError
from hf_paged.integrations.peft_groups import LoraLayers
from hf_paged.integrations.peft_layers import active_state, is_lora_linear, run_in_step
from hf_paged.integrations.peft_residency import Residency
from hf_paged.integrations.peft_tuners import BY_ADAPTER, GROUPED, is_grouped, problem_with
from hf_paged.patches.apply import AppliedPatch
from hf_paged.patches.instance import InstancePatch

_BASE_MODEL = Selection(())


class PeftAdapters:
    """The `AdapterHost` of a model patched with `applied`, whether or not it has adapters yet. Holds both weakly.

    Args:
        model: the HF model.
        applied: its patch; the layers bound here come off with it.
        most_resident: adapters loaded from folders that are in the model at a time; None for all.
        host_bytes: most bytes of host memory for others of them; None: by the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        applied: AppliedPatch,
        most_resident: int | None = None,
        host_bytes: int | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._applied = weakref.ref(applied)
        self._layers: dict[int, weakref.ref[nn.Module]] = {}  # by id
        self._lora = LoraLayers()
        self._parts: dict[str, AdapterPart] = {}
        self._tuner_patch: InstancePatch | None = None
        self._lock = threading.Lock()
        self.most_resident = most_resident
        self.residency = (
            None
            if most_resident is None
            else Residency(most_resident, self._tuners, self._part_in_model, host_bytes)
        )

    # --- layers -------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Binds adapter layers that are new and forgets those that are gone."""
        model, applied = self._model(), self._applied()
        if "peft" not in sys.modules or model is None or applied is None:
            return
        with self._lock:
            present = {id(layer): layer for layer in base_modules(model) if is_adapter_layer(layer)}
            for key, reference in list(self._layers.items()):
                layer = reference()
                if layer is None or layer is not present.get(key):
                    del self._layers[key]
                    self._lora.remove(key)
                    applied.release(key)
            self._lora.look_again()
            for key, layer in present.items():
                if key not in self._layers:
                    if is_lora_linear(layer):
                        self._lora.add(layer)
                    applied.adopt(layer, functools.partial(run_in_step, self._lora))
                    self._layers[key] = weakref.ref(layer)

    def _present(self) -> list[Any]:
        return [layer for reference in self._layers.values() if (layer := reference()) is not None]

    def _tuners(self) -> list[Any]:
        return [layer for layer in self._present() if hasattr(layer, "merged_adapters")]

    def follow(self, tuner: nn.Module) -> None:
        """Takes `adapter_names` from PEFT's own calls through `tuner`, thread by thread.

        Its hooks on the layers, which other threads see too, are then left to forwards outside of steps. Tuners without
        such hooks leave `adapter_names` unread; here they are served like the others.
        """
        method = getattr(type(tuner), "_enable_peft_forward_hooks", None)
        model, reference = self._model, weakref.ref(tuner)

        @contextmanager
        def enable_peft_forward_hooks(*args: Any, **kwargs: Any) -> Iterator[None]:
            names = kwargs.get("adapter_names")
            ours = method is None and bool(names)
            if names and self.residency is not None and (out := self._out_of_model(names)):
                # PEFT knows nothing of these. Its hooks serve forwards outside of steps only, and there are none.
                kwargs["adapter_names"], ours = [BASE if name in out else name for name in names], True
            rows = RowAdapters(model(), names, ours=ours)
            token = row_adapters.set(rows)
            try:
                hooks = nullcontext() if method is None else method(reference(), *args, **kwargs)
                hooks.__enter__()
                try:
                    yield
                finally:  # never told of an error: PEFT would leave its hooks on the layers then
                    hooks.__exit__(None, None, None)
            finally:
                row_adapters.reset(token)

        self.revert()
        self._tuner_patch = InstancePatch(tuner)
        self._tuner_patch.set("_enable_peft_forward_hooks", enable_peft_forward_hooks)

    def revert(self) -> None:
        """Takes off what `follow` put on; the layers come off with the patch."""
        if self._tuner_patch is not None:
            self._tuner_patch.revert()
            self._tuner_patch = None

    # --- selections ---------------------------------------------------------------------------------------------------

    def current(self) -> Selection | None:
        layers = self._present()
        tuners = [layer for layer in layers if hasattr(layer, "merged_adapters")]
        if not tuners or any(layer.merged_adapters for layer in tuners):
            return None
        names = _active(tuners[0])
        if any(_active(layer) != names for layer in tuners):
            return None
        for wrapper in layers:
            if not hasattr(wrapper, "merged_adapters"):
                own = tuple(name for name in names if name in wrapper._adapters)[:1]
                if _active(wrapper) != own:
                    return None
        # A layer applies only what it has; an adapter that no layer has changes nothing.
        known = self.names()
        return self._selection(tuple(name for name in names if name in known))

    def select(self, choice: Any) -> Selection | None:
        """The selection for None (as the model stands), an adapter's name, several names, or `"__base__"`.

        Raises:
            InvalidRequestError: no such adapter, an adapter that needs more than a name, or merged adapters.
        """
        if choice is None:
            selection = self.current()
            self._check_chooseable(() if selection is None else selection.names)
            return selection
        names = (
            (choice,)
            if isinstance(choice, str)
            else tuple(choice)
            if isinstance(choice, list | tuple)
            else None
        )
        if names is None or not all(isinstance(name, str) for name in names):
            raise InvalidRequestError(
                f"adapter {choice!r}: must be a name, a list of names, {BASE!r} or None"
            )
        names = tuple(dict.fromkeys(name for name in names if name != BASE))
        known = self.names()
        for name in names:
            if name not in known:
                raise InvalidRequestError(
                    f"adapter {name!r} is not loaded; loaded: {', '.join(map(repr, sorted(known))) or 'none'}"
                )
        for layer in self._present():
            merged = vars(layer).get("merged_adapters")
            if merged:
                raise InvalidRequestError(
                    f"adapter {choice!r}: {', '.join(merged)} merged into the weights; call unmerge_adapter() first"
                )
        self._check_chooseable(names)
        if self.most_resident is not None and len(names) > self.most_resident:
            raise InvalidRequestError(
                f"{len(names)} adapters for one request; max_resident_adapters is {self.most_resident}"
            )
        return self._selection(names)

    def _check_chooseable(self, names: tuple[str, ...]) -> None:
        problem = self.problem_of(names)
        if problem is not None:
            raise InvalidRequestError(problem)

    def problem_of(self, names: tuple[str, ...]) -> str | None:
        """Why requests cannot choose one of the adapters `names` of the model; None where they can."""
        for layer in self._present() if names else ():
            for name in names:
                variant = type(vars(layer).get("lora_variant", {}).get(name)).__name__
                if variant.startswith("ALora"):
                    return (
                        f"adapter {name!r} is an aLoRA, which looks for its invocation tokens in each prompt: "
                        "use generate() of the PeftModel"
                    )
        return None

    def names(self) -> set[str]:
        """The names of all adapters that a layer has a part of, or that can be brought in."""
        known = () if self.residency is None else self.residency.names()
        return {
            name
            for layer in self._present()
            for container in containers(layer)
            for name in tuple(entries(container))
        }.union(known)

    def bring_in(self, selections: Iterable[Selection], in_use: Iterable[Selection]) -> bool:
        if self.residency is None:
            return True
        wanted, used = ({name for s in some for name in s.names} for some in (selections, in_use))
        return self.residency.bring_in(wanted, used)

    def num_loads(self, selection: Selection) -> int:
        return 0 if self.residency is None else self.residency.num_loads(selection.names)

    def _out_of_model(self, names: Any) -> set[str]:
        assert self.residency is not None
        known = self.residency.names()
        found = (self.residency.get(name) for name in names if name in known)
        return {one.name for one in found if one is not None and one.part is None}

    def problem(self) -> str | None:
        return next((text for layer in self._present() if (text := problem_with(layer)) is not None), None)

    def paths(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for layer in self._present():
            for name in {name for container in containers(layer) for name in tuple(entries(container))}:
                if not is_grouped(layer, name):
                    found[name] = BY_ADAPTER
                found.setdefault(name, GROUPED)
        for name in () if self.residency is None else self.residency.names():
            registration = self.residency.get(name) if self.residency is not None else None
            if registration is not None:
                found.setdefault(name, registration.served)
        return dict(sorted(found.items()))

    def _selection(self, names: tuple[str, ...]) -> Selection:
        if not names:
            return _BASE_MODEL
        return Selection(names, tuple(self._part(name) for name in names))

    def _part(self, name: str) -> Present:
        registration = None if self.residency is None else self.residency.get(name)
        return self._part_in_model(name) if registration is None else registration

    def _part_in_model(self, name: str) -> AdapterPart:
        part = self._parts.get(name)
        if part is None or not part.is_present:
            container = next(
                c for layer in self._present() for c in containers(layer) if entries(c).get(name) is not None
            )
            part = self._parts[name] = AdapterPart(name, container, entries(container)[name])
        return part

    @contextmanager
    def entered(self, selection: Selection | None) -> Iterator[None]:
        """Makes `selection` active in every layer, for this and all other threads, and puts back what was."""
        before = []
        try:
            for layer in self._present() if selection is not None else ():
                state = vars(layer)
                kept = {
                    name: state[name] for name in ("_active_adapter", "_disable_adapters") if name in state
                }
                before.append((state, kept))
                state.update(active_state(layer, selection))  # type: ignore[arg-type]  # none without layers
            yield
        finally:
            for state, kept in before:
                for name in ("_active_adapter", "_disable_adapters"):
                    state.pop(name, None)
                state.update(kept)

    # --- adapters a row -----------------------------------------------------------------------------------------------

    def row_choices(self) -> list[Any] | None:
        """The `adapter_names` of the PEFT call this thread is in; None without any.

        Raises:
            InvalidRequestError: calls of several threads cannot be told apart.
        """
        followed = row_adapters.get()
        if followed is not None and followed.model is self._model():
            return followed.names
        if self._tuner_patch is not None:
            return None
        found: dict[int, list[Any]] = {}
        for layer in self._present():
            for hook in tuple(layer._forward_pre_hooks.values()):  # other threads add and remove theirs
                names = hook.keywords.get("adapter_names") if isinstance(hook, functools.partial) else None
                if names is not None:
                    found[id(names)] = names
        if len(found) > 1:
            raise InvalidRequestError(
                "several threads generate with adapter_names at once: enable the PeftModel itself, not the model inside"
            )
        return next(iter(found.values()), None)


def _active(layer: Any) -> tuple[str, ...]:
    """The adapters a layer or wrapper applies."""
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def find_tuner(obj: Any) -> nn.Module | None:
    """The tuner (`LoraModel` and the like) of the PeftModel that `obj` is or wraps."""
    for _ in range(16):
        if obj is None or any(
            cls.__module__.startswith("transformers.modeling_utils") for cls in type(obj).__mro__
        ):
            return None
        if any(
            cls.__module__.startswith("peft.") and cls.__name__ == "BaseTuner" for cls in type(obj).__mro__
        ):
            return obj
        state = vars(obj) if hasattr(obj, "__dict__") else {}
        children = state.get("_modules") or {}
        obj = next(
            (
                value
                for name in ("base_model", "_orig_mod", "module", "model")
                if (value := children.get(name) or state.get(name)) is not None
            ),
            None,
        )
    return None
