"""What an engine asks of whoever patches the models that draft for it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Lease(Protocol):
    """A model whose attention layers are paged for as long as this is not released."""

    patch: Any  # what the step loop needs of a patch
    position_limit: int | None

    def release(self) -> None: ...


class AssistantHost(Protocol):
    """Patches assistant models for a time; `enable` gives the engine one."""

    def borrow(self, model: nn.Module) -> Lease: ...

    def first_layers(self, model: nn.Module, patch: Any, num_layers: int) -> tuple[nn.Module, Lease]:
        """What is left of `model`, which has `patch`, when it ends after its first layers."""
        ...

    def problems(self, model: nn.Module) -> list[str]:
        """Why `model` cannot be borrowed; empty when it can."""
        ...


class NoAssistants:
    """For an engine that was given no host."""

    def borrow(self, model: nn.Module) -> Lease:
        raise NotImplementedError("this engine was made without a host for assistant models")

    def first_layers(self, model: nn.Module, patch: Any, num_layers: int) -> tuple[nn.Module, Lease]:
        raise NotImplementedError("this engine was made without a host for assistant models")

    def problems(self, model: nn.Module) -> list[str]:
        return ["this engine runs none"]
