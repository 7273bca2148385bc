"""Float32 matrix products on CPUs where torch's default library leaves half of the machine unused.

torch hands float32 products to MKL, which on processors of other makers than Intel stays with AVX2 kernels.
oneDNN, also part of torch, generates AVX-512 code on any of them: on a Zen 5 core it is 2 to 2.5 times as fast
from two rows up, and 1.5 to 3 times for one row of GPT-2's layers, with the weights as they lie in memory
(docs/decisions.md). The sums are float32 in both.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["least_input", "linear", "onednn_is_faster"]

#: A call takes about 15 us more than torch's own: worth it for weights that do not fit a core's cache, whatever the
#: number of rows, and for many rows of smaller ones (measured, docs/decisions.md).
_MIN_WEIGHT, _MIN_WORK = 1 << 18, 3_000_000
#: Below this MKL is as fast with any number of rows.
_TINY_WEIGHT = 80_000
_PLAIN_TENSORS = (Tensor, nn.Parameter)


@functools.cache
def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this process runs where MKL does not use AVX-512 and oneDNN does, and oneDNN's op works here."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        vendor = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return False
    return "GenuineIntel" not in vendor and _op_works()


def least_input(weight: Tensor) -> int | None:
    """How many numbers an input must have to be worth a product with `weight` [N, K] by `linear`; None: it never is."""
    if weight.numel() < _TINY_WEIGHT:
        return None
    return 0 if weight.numel() >= _MIN_WEIGHT else -(-_MIN_WORK // max(1, weight.shape[0]))


def _op_works() -> bool:
    # The op is torch.compile's, not public: a release that changes it must not change results.
    x, weight, bias = (torch.arange(n, dtype=torch.float32).sin() for n in (6 * 40, 24 * 40, 24))
    x, weight = x.view(1, 6, 40), weight.view(40, 24).t()
    try:
        error = (_product(x, weight, bias) - torch.nn.functional.linear(x, weight, bias)).abs().max()
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(error < 1e-4)


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], either dimension contiguous
    bias: Tensor | None,  # [N]
) -> Tensor | None:
    """`torch.nn.functional.linear` for dense float32 on a CPU; None where it is not for this path or not worth it."""
    if (
        x.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or type(weight) not in _PLAIN_TENSORS
        or (least := least_input(weight)) is None
        or x.numel() < least
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
        or not x.is_contiguous()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
    ):
        return None
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
