"""What the engine knows of adapters: which of them a sequence runs with, and whom it asks about them.

Nothing here imports PEFT. Its layers are told by what their classes declare (`adapter_layer_names`), and each keeps the
parts of its adapters in containers (`ModuleDict`, `ParameterDict`, ...) whose keys are the adapters' names.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

#: How PEFT calls the model without any adapter, where a name is asked for.
BASE = "__base__"


@dataclass(frozen=True)
class Selection:
    """The adapters a sequence runs with, whatever is active in the model by then; none of them: the base model.

    `parts` is the identity of one part of each adapter: an adapter that was removed and loaded again under its name is
    another one, and a selection made before does not silently turn into it.
    """

    names: tuple[str, ...]
    parts: tuple[Present, ...] = ()

    @property
    def is_present(self) -> bool:
        """Whether every adapter of it is still the one that was selected."""
        return all(part.is_present for part in self.parts)

    def __str__(self) -> str:
        return " + ".join(self.names) or BASE


class Present(Protocol):
    """What an adapter is told by."""

    @property
    def is_present(self) -> bool: ...


class AdapterPart:
    """One part of an adapter in one layer, held weakly. Equal to itself only."""

    def __init__(self, name: str, container: nn.Module, value: Any) -> None:
        self.name = name
        self._container = weakref.ref(container)
        self._value = weakref.ref(value)

    @property
    def is_present(self) -> bool:
        container, value = self._container(), self._value()
        return container is not None and value is not None and entries(container).get(self.name) is value


class AdapterHost(Protocol):
    """Answers for the adapters of one model, from any thread."""

    def sync(self) -> None:
        """Takes notice of adapter layers that came and went. Called before each call is looked at."""

    def current(self) -> Selection | None:
        """What the model runs with now; None where no selection can say it (no adapters, merged ones)."""

    def select(self, choice: Any) -> Selection | None:
        """The selection a user's choice stands for; None as the choice is `current()`."""

    def problem(self) -> str | None:
        """Why a step cannot run the adapter layers of the model, whatever is active; None where it can."""

    def paths(self) -> dict[str, str]:
        """Adapter name -> how its tokens are computed in a step: "grouped" or "by adapter"."""

    def bring_in(self, selections: Iterable[Selection], in_use: Iterable[Selection]) -> bool:
        """Puts the adapters of `selections` into the model. False where those `in_use` leave no room for them.

        Raises:
            InvalidRequestError: one cannot be read.
        """

    def num_loads(self, selection: Selection) -> int:
        """Grows when an adapter of it was brought in again."""

    @property
    def most_resident(self) -> int | None:
        """How many adapters may be in the model at a time; None for any number."""

    def row_choices(self) -> list[Any] | None:
        """The `adapter_names` PEFT was given for the `generate` of this thread, one a row."""

    def entered(self, selection: Selection | None) -> AbstractContextManager[None]:
        """Makes `selection` active in the model itself for a block, for what runs without the engine."""

    def revert(self) -> None:
        """Leaves the model as if it had not been there."""


@dataclass(frozen=True)
class RowAdapters:
    """`adapter_names` of the `generate` that a thread is in."""

    model: Any  # which it is for
    names: Any  # as the user gave them, a list with one a row is wanted; None for none
    ours: bool = False  # whether only we know of them: the original `generate` would drop them


row_adapters: ContextVar[RowAdapters | None] = ContextVar("row_adapters", default=None)


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's layers or wrappers that hold adapters."""
    cls: Any = type(module)
    return _holds_adapters(cls)


@functools.lru_cache(maxsize=1024)
def _holds_adapters(cls: Any) -> bool:
    return hasattr(cls, "adapter_layer_names")


def containers(layer: nn.Module) -> Iterator[nn.Module]:
    """The children of an adapter layer in which it keeps its adapters' parts by name."""
    for child in layer._modules.values():
        if child is None:
            continue
        if isinstance(child, nn.ModuleDict | nn.ParameterDict) or type(child).__name__ == "BufferDict":
            yield child


def entries(container: nn.Module) -> dict[str, Any]:
    """Adapter name -> its part in `container`."""
    for kind in (container._modules, container._parameters, container._buffers):
        if kind:
            return kind
    return {}


def base_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model` once, without what is inside of adapters' containers."""
    seen: set[nn.Module | None] = {None, model}
    found = [model]
    for module in found:
        children = module._modules
        if children:
            skipped = set(containers(module)) if is_adapter_layer(module) else ()
            new = [child for child in children.values() if child not in seen and child not in skipped]
            seen.update(new)
            found += new  # type: ignore[arg-type]
    return found


def adapter_facts(layer: nn.Module, name: str) -> tuple[list[Tensor], list[tuple[str, Any]]]:
    """Tensors and options (rank, scaling, ...) that adapter `name` has in `layer`."""
    tensors: list[Tensor] = []
    for container in containers(layer):
        part = entries(container).get(name)
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, nn.Module):
            tensors.extend(part.parameters())
            tensors.extend(part.buffers())
    options = []
    for option in getattr(layer, "other_param_names", ()):
        values = vars(layer).get(option)
        if isinstance(values, dict) and name in values and not isinstance(values[name], Tensor | nn.Module):
            options.append((option, values[name]))
    return tensors, options
