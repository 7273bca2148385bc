"""`argmax_rows`: the index of the largest number of each row, on a CPU at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import launch, loaded_kernels, num_bins

__all__ = ["argmax_rows"]


def argmax_rows(logits: Tensor) -> Tensor:
    """`torch.argmax(logits, dim=-1)` of CPU logits, bit for bit: the first of equals, and NaN above all numbers.

    Args:
        logits: [R, V] with V >= 1; any strides.

    Returns:
        [R] int64.

    Raises:
        ValueError: logits are not a matrix with at least one column.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"argmax_rows: logits of shape {tuple(logits.shape)}; expected [R, V] with V >= 1")
    kernels = loaded_kernels("cpu_argmax_kernel", logits.dtype)
    if kernels is None or logits.device.type != "cpu":
        return torch.argmax(logits, dim=-1)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    indices = torch.empty(logits.shape[0], dtype=torch.int64, device="cpu")
    bins = min(num_bins(logits.numel() * logits.element_size()), max(1, logits.shape[0]))
    arguments = (logits.data_ptr(), logits.stride(0), logits.shape[1], indices.data_ptr(), logits.shape[0])
    launch(kernels.argmax_part(logits.dtype), bins, arguments)
    return indices
