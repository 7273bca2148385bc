"""The thread-local state a forward depends on, captured from the caller and entered by whichever thread runs
the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ambient:
    """Autocast and inference mode of a caller. Calls whose `Ambient` differs never share a step."""

    device_type: str
    inference_mode: bool
    autocast_dtype: torch.dtype | None  # None: autocast is off
    autocast_cache: bool

    @classmethod
    def capture(cls, device_type: str) -> Ambient:
        """The state of the calling thread for a model on `device_type`."""
        enabled = torch.is_autocast_enabled(device_type)
        return cls(
            device_type,
            torch.is_inference_mode_enabled(),
            torch.get_autocast_dtype(device_type) if enabled else None,
            torch.is_autocast_cache_enabled() if enabled else True,
        )

    def enter(self) -> AbstractContextManager[None]:
        """Sets this state for the calling thread, gradients off, and puts the thread's own back."""
        # Mostly nothing differs, and a step costs little more than the model's own calls then.
        is_set = (
            torch.is_inference_mode_enabled() == self.inference_mode
            and not torch.is_grad_enabled()
            and self.autocast_dtype is None
            and not torch.is_autocast_enabled(self.device_type)
        )
        return nullcontext() if is_set else self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            # Only what differs is switched.
            if torch.is_inference_mode_enabled() != self.inference_mode:
                stack.enter_context(torch.inference_mode(self.inference_mode))
            if torch.is_grad_enabled():
                stack.enter_context(torch.no_grad())
            enabled = torch.is_autocast_enabled(self.device_type)
            if enabled != (self.autocast_dtype is not None) or enabled:
                stack.enter_context(
                    torch.autocast(
                        self.device_type,
                        dtype=self.autocast_dtype or torch.get_autocast_dtype(self.device_type),
                        enabled=self.autocast_dtype is not None,
                        cache_enabled=self.autocast_cache,
                    )
                )
            yield
