"""Memory that products on the CPU work in: kept for each thread, since new pages would cost more than a product."""

from __future__ import annotations

import threading

import torch

__all__ = ["scratch_address"]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.size, self.address = 0, 0
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def grow(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the user's default
        self.size, self.address = size, self.memory.data_ptr()


_scratch = _Scratch()


def scratch_address(size: int) -> int:
    """The address of `size` bytes that belong to the calling thread until it asks again."""
    if _scratch.size < size:
        _scratch.grow(size)
    return _scratch.address
