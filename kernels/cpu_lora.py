"""`lora_add_` with torch's matrix products: two a group, the second one adds into the output's own rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.kernels.lora_matmul import LoraGroup, products_in


def lora_add_(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    autocast = torch.is_autocast_enabled(output.device.type)
    for group in groups:
        first, end, a, b, bias, scaling = group
        rows = output[first:end]
        if autocast or not (output.dtype is a.dtype is b.dtype is x.dtype):
            # The sum is in the wider dtype, as PEFT's, and rounded once.
            rows.copy_(rows + products_in(a.dtype, x, group))
            continue
        rows.addmm_(F.linear(x[first:end], a), b.t(), alpha=scaling)
        if bias is not None:
            rows.add_(bias, alpha=scaling)
