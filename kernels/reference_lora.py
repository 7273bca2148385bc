"""`lora_add_` in plain torch, group by group, in float32 at least: the specification of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_paged.kernels.lora_matmul import LoraGroup, products_in


def lora_add_(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    wide = torch.float64 if output.dtype is torch.float64 else torch.float32
    total = output.to(wide, copy=True)
    for group in groups:
        total[group.first : group.end] += products_in(wide, x, group)
    output.copy_(total)
