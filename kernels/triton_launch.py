"""How every Triton kernel here starts: the GPU is known and supported, and one function launches.

All launches pass through `launch`, so that the ahead-of-time checks see the very arguments, constants and tiles of a
real call (`hf_paged.kernels.triton_compile` records them from tensors without storage).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

__all__ = ["Gpu", "compute_dtype", "gpu_of", "launch", "recording"]

_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Gpu:
    """What the kernels need to know of a device. `arch` is a key of the table of tiles."""

    arch: str
    num_sms: int
    has_fp8: bool


#: Called in place of a launch while `recording` is active: (kernel, grid, args, constants, options).
Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], dict[str, int]], None]
_recorder: tuple[Recorder, Gpu] | None = None


@contextlib.contextmanager
def recording(recorder: Recorder, gpu: Gpu) -> Iterator[None]:
    """Launches inside call `recorder` instead, as if on `gpu`; tensors may be on the meta device. Not for threads."""
    global _recorder
    outer, _recorder = _recorder, (recorder, gpu)
    try:
        yield
    finally:
        _recorder = outer


def gpu_of(op: str, device: torch.device) -> Gpu:
    """The GPU behind `device`.

    Raises:
        ValueError: not a CUDA or ROCm device (nor a CPU under Triton's interpreter), or one too old.
    """
    if _recorder is not None:
        return _recorder[1]
    if device.type == "cuda":
        return _describe(op, device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return Gpu("interpreter", num_sms=4, has_fp8=True)
    raise ValueError(f"{op}: tensors on {str(device)!r}; the Triton kernels run on CUDA and ROCm devices")


@functools.cache
def _describe(op: str, index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    num_sms = properties.multi_processor_count
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        if name not in ("gfx940", "gfx941", "gfx942", "gfx950"):
            raise ValueError(f"{op}: GPU generation {name}; supported: gfx942 and gfx950")
        return Gpu("gfx942", num_sms, has_fp8=True)
    major, minor = properties.major, properties.minor
    if major < 8:
        raise ValueError(f"{op}: GPU of compute capability {major}.{minor}; supported: 8.0 and newer")
    # 12.x (workstation Blackwell) has Ampere's MMA instructions and about 100 KiB of shared memory.
    arch = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
    return Gpu(arch, num_sms, has_fp8=(major, minor) >= (8, 9))


def compute_dtype(gpu: Gpu, query: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """The dtype in which queries, keys and values are multiplied: theirs if they agree, else float32.

    A one-byte cache is widened to the dtype of the queries. The interpreter has no bfloat16 arithmetic (it works on
    the bits as integers), so there it is float32.
    """
    if (cache.itemsize > 1 and cache != query) or (query == torch.bfloat16 and gpu.arch == "interpreter"):
        return tl.float32
    return _TL_DTYPES[query]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Runs `kernel` over `grid` on `device`; `args` are its run-time arguments in order, `constants` its constexprs."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorder is not None:
        _recorder[0](kernel, grid, args, constants, options)
        return
    if 0 in grid:
        return
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)
