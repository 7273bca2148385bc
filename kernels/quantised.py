"""What an int8 cache holds: integers from -127 to 127, and one float32 scale for each token and KV head.

    scale = max |x| / 127        integer = x * (127 / max |x|), to the nearest, ties to even        x ~ integer * scale

over the D numbers of one head of one token, in float32. A token's integers and scale depend on that token alone, so
what is read later does not depend on the batch, the chunk or the block it was stored from. A head with a number that is
not finite has the scale NaN: it comes out as NaN, as it would of a float cache. A head whose largest number is below
2**-100 is stored as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEAST", "dequantise", "quantise", "quantised"]

#: Below this a head is zero: 127 divided by it would leave float32 not far below.
LEAST = 2.0**-100


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., D] and float32 scales [...] of `x` [..., D] of any float dtype."""
    x = x.float()
    largest = x.abs().amax(-1)
    is_finite = largest.isfinite()
    usable = is_finite & (largest >= LEAST)
    # `127.0 / x` would be x's reciprocal times 127, which is rounded twice.
    factor = torch.where(usable, torch.full_like(largest, 127.0) / largest.where(usable, 1.0), 0.0)
    integers = torch.round(x * factor[..., None]).nan_to_num(0.0).to(torch.int8)
    return integers, torch.where(is_finite, largest / 127.0, float("nan"))


def dequantise(integers: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers [..., D] that int8 [..., D] with scales [...] stand for."""
    return integers.float() * scales[..., None]


def quantised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a cache of `dtype` gives it back; float32 for int8, else in `dtype`."""
    return dequantise(*quantise(x)) if dtype == torch.int8 else x.to(dtype)
