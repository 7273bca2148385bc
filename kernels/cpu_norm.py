"""`rms_norm` in one pass over memory, where torch's operator is a chain of five on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.kernels.cpu_runtime import float_bits, launch, loaded_kernels, num_bins

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension, summed in float32 and rounded once.

    Args:
        x: [..., E]. weight: [E] of the same dtype. eps: added to the mean square.
    """
    kernels = loaded_kernels("cpu_norm_kernel", x.dtype)
    if (
        kernels is None
        or weight.dtype is not x.dtype
        or x.shape[-1:] != weight.shape
        or x.device.type != "cpu"
        or not (x.is_contiguous() and weight.is_contiguous())
    ):
        return F.rms_norm(x, weight.shape, weight, eps)
    size = weight.shape[0]
    output = torch.empty_like(x)
    arguments = (
        x.data_ptr(), weight.data_ptr(), output.data_ptr(), x.numel() // size, size, float_bits(eps)
    )  # fmt: skip
    launch(kernels.rms_norm_rows(x.dtype), num_bins(2 * x.numel() * x.element_size()), arguments)
    return output
