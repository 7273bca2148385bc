"""Float32 matrix products on CPUs where torch's default library, MKL, leaves a part of the machine unused.

On processors of other makers than Intel MKL stays with AVX2 kernels. oneDNN, also part of torch, generates AVX-512
code on any of them: on a Zen 5 core it is 2 to 2.5 times as fast from two rows up, and 1.5 to 3 times for one row of
GPT-2's layers, with the weights as they lie in memory.

On Intel's MKL uses AVX-512. Where the processor has AMX, six products of parts in bfloat16 take a half to three
quarters of the time of one in float32 and are as exact (`cpu_amx_linear`). For the few rows of a decode step, and where
there is no AMX, MKL takes up to 1.9 times as long as our own tiles (`cpu_row_linear`). For one row all are as fast as
memory.

The sums are float32 in all four (docs/decisions.md has the measurements).
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.kernels import cpu_amx_linear, cpu_row_linear, cpu_runtime

__all__ = ["has_faster_products", "least_input", "linear", "load_products", "onednn_is_faster"]

#: A call takes about 15 us more than torch's own: worth it for weights that do not fit a core's cache, whatever the
#: number of rows, and for many rows of smaller ones (measured, docs/decisions.md).
_MIN_WEIGHT, _MIN_WORK = 1 << 18, 3_000_000
#: Below this MKL is as fast with any number of rows.
_TINY_WEIGHT = 80_000
_PLAIN_TENSORS = (Tensor, nn.Parameter)
#: Rows for which our tiles beat MKL's AVX-512 kernels, and numbers a thread's share of the weights must have: where
#: they lie along K, and across it, as in GPT-2's layout (measured, docs/decisions.md).
_TILES_ALONG, _MIN_ALONG = range(4, 33), 1 << 19
_TILES_ACROSS, _MIN_ACROSS = range(2, 17), 1 << 18
#: Rows from which on AMX is faster: for large weights along K, and for others. Their sides and their number must not be
#: below the last two.
_ROWS_LARGE, _LARGE, _ROWS = 8, 1 << 19, 17
_MIN_SIDE, _MIN_WEIGHT_OF_AMX = 256, 180_000
#: Set once our kernels are compiled.
_tiles_are_ready, _amx_is_ready = threading.Event(), threading.Event()


@functools.cache
def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this process runs where MKL does not use AVX-512 and oneDNN does, and oneDNN's op works here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return _maker_of_avx512(cpuinfo) not in ("", "GenuineIntel") and _op_works()


@functools.cache
def tiles_are_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this process runs where MKL uses AVX-512 and our tiles do, and so are worth it for a few rows."""
    return _maker_of_avx512(cpuinfo) == "GenuineIntel" and cpu_row_linear.missing() is None


@functools.cache
def amx_is_faster() -> bool:
    """Whether this process runs on a processor with AMX, and may use it."""
    return _maker_of_avx512(Path("/proc/cpuinfo")) == "GenuineIntel" and cpu_amx_linear.missing() is None


def has_faster_products() -> bool:
    """Whether `linear` is worth a question here."""
    return onednn_is_faster() or tiles_are_faster() or amx_is_faster()


def _maker_of_avx512(cpuinfo: Path) -> str:
    """The maker's name of a processor on which torch uses AVX-512; empty for any other."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ""
    try:
        vendor = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return ""
    return vendor.partition(":")[2].strip()


def load_products() -> None:
    """Compiles our kernels in the background where they are worth it; until then products are MKL's."""
    if tiles_are_faster() or amx_is_faster():
        cpu_runtime.load_in_background("float32 products", _compile_products)


def _compile_products() -> None:
    tiles: Any = cpu_runtime.kernel_module("cpu_row_linear_kernel") if tiles_are_faster() else None
    if tiles is not None:
        tiles.linear_along(torch.float32)
        tiles.linear_across(torch.float32)
        _tiles_are_ready.set()
    amx: Any = cpu_runtime.kernel_module("cpu_amx_kernel") if amx_is_faster() else None
    if amx is not None and amx.can_compile():
        amx.linear_across(torch.float32)
        amx.linear_along(torch.float32)
        _amx_is_ready.set()


def least_input(weight: Tensor) -> int | None:
    """How many numbers an input must have to be worth a product with `weight` [N, K] by `linear`; None: it never is."""
    if tiles_are_faster() or amx_is_faster():
        tiles, amx = _rows_of_tiles(weight), _least_of_amx(weight)
        least = [*tiles[:1], *([] if amx is None else [amx])]
        return min(least) * weight.shape[1] if least else None
    return _least_of_onednn(weight)


def _least_of_onednn(weight: Tensor) -> int | None:
    """`least_input` where oneDNN is the faster one."""
    if weight.numel() < _TINY_WEIGHT:
        return None
    return 0 if weight.numel() >= _MIN_WEIGHT else -(-_MIN_WORK // max(1, weight.shape[0]))


def _rows_of_tiles(weight: Tensor) -> range:
    """For how many rows our tiles are faster than MKL with `weight` [N, K]."""
    if not tiles_are_faster():
        return range(0)
    rows, least = (_TILES_ALONG, _MIN_ALONG) if weight.stride(1) == 1 else (_TILES_ACROSS, _MIN_ACROSS)
    return rows if weight.numel() >= least * torch.get_num_threads() else range(0)


def _least_of_amx(weight: Tensor) -> int | None:
    """Rows from which on AMX is faster than MKL with `weight` [N, K]; None: with no number."""
    if not amx_is_faster() or min(weight.shape) < _MIN_SIDE or weight.numel() < _MIN_WEIGHT_OF_AMX:
        return None
    return _ROWS_LARGE if weight.numel() >= _LARGE and weight.stride(1) == 1 else _ROWS


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
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
        or not x.is_contiguous()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
    ):
        return None
    if onednn_is_faster():
        least = _least_of_onednn(weight)
        return None if least is None or x.numel() < least else _product(x, weight, bias)
    if cpu_runtime.is_loading(torch.float32) or not _are_dense(x, weight, bias):
        return None
    return _by_our_kernels(x, weight, bias)


def _are_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernels, which go by addresses, can take them; what to say of the others is for the library."""
    return (
        x.shape[-1] == weight.shape[1]
        and 1 in weight.stride()
        and (
            bias is None
            or (
                type(bias) in _PLAIN_TENSORS
                and bias.dtype is torch.float32
                and bias.device.type == "cpu"
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
            )
        )
    )


def _by_our_kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    rows = x.numel() // weight.shape[1]
    along = weight.stride(1) == 1
    if (least := _least_of_amx(weight)) is not None and rows >= least and _amx_is_ready.is_set():
        return cpu_amx_linear.multiply(x, weight, bias, along)
    if rows in _rows_of_tiles(weight) and _tiles_are_ready.is_set():
        return cpu_row_linear.multiply(x, weight, bias, along)
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
