"""Numbers that cross between the host and a device without the host waiting for the device's other work.

On a CPU there is nothing to cross: both directions give what they got.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["PendingCopy", "to_device", "to_host"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the host on `device`; the copy comes in the order of the current stream's work.

    From pinned memory, which torch keeps until the copy is done: from any other the host would wait for the device.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> list[Any]:
    """The numbers of `tensor`, once the device has made them: other streams are not waited for."""
    return PendingCopy(tensor).wait() if tensor.device.type == "cuda" else tensor.tolist()


class PendingCopy:
    """A tensor of a device on its way to the host. Whoever wants the numbers waits for this copy and no more.

    Args:
        tensor: not written to before the copy is done, other than by later work of the current stream.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._stream = tensor, _stream(tensor.device)
        self._event: Any = None
        if self._stream is None:
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(self._stream)

    @property
    def is_in_order(self) -> bool:
        """Whether what the calling thread launches now runs after what the tensor was made by."""
        return self._stream is None or self._stream == torch.cuda.current_stream(self._stream.device)

    def wait(self) -> list[Any]:
        """The numbers. What went wrong on the device raises here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def _stream(device: torch.device) -> Any:
    """The stream on which the calling thread launches; None on a device without any."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
