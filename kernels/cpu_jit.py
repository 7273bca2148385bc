"""Numba for the CPU kernels: how they are compiled and how they read and write numbers in memory.

Kernels take addresses (int64) and not arrays: an array of bfloat16 does not exist in numpy. A kernel that `launch`
runs has one form, `kernel(index, bins, arguments)`: it does part `index` of `bins`, and `arguments` is the address of
its arguments, eight bytes each. So one small parallel loop serves all kernels, calling them by address: none is
compiled a second time to run on several threads. The type of a *tag* says what lies at an address:

    float32   a float32 number
    uint16    the upper half of one: bfloat16
    int16     float16
    int8      an integer which a scale elsewhere multiplies (`hf_paged.kernels.quantised`)

All arithmetic is in float32.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from numba import types
from numba.core.caching import FunctionCache

__all__ = ["FASTMATH", "Kernel", "dtype_tag", "emits", "entry", "helper", "kernel_by_dtype"]

#: Sums may be reordered, which is what lets loops use vectors. NaN and infinity keep their meaning.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

_TAGS = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.int8: np.int8(0),
}


def helper(**options: Any) -> Callable[[Callable], Callable]:
    """Compiles a function which kernels call, as a part of each kernel.

    As a function of its own it would exist twice, once as it was compiled and once in the kernel, optimised again. The
    process that compiles the kernel would run the first, those that find it in the cache the second: other machine
    code, with other last bits (docs/decisions.md).
    """
    return numba.njit(nogil=True, error_model="numpy", forceinline=True, **options)


def entry(**options: Any) -> Callable[[Callable], Callable]:
    """Compiles a kernel: it releases the GIL and is cached on disk, or in memory where nothing can be written."""

    def decorate(function: Callable) -> Callable:
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        # Numba finds no place for its cache in a read-only installation without a home folder.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher._cache = _KernelCache(function)
        return dispatcher

    return decorate


class Kernel:
    """A compiled kernel: `run(index, bins, arguments)` from Python, `address` for other compiled code."""

    __slots__ = ("address", "run")

    def __init__(self, dispatcher: Any) -> None:
        dispatcher.compile((types.int64, types.int64, types.int64))
        (compiled,) = dispatcher.overloads.values()
        self.run = dispatcher
        self.address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)


def kernel_by_dtype(make: Callable[..., Any]) -> Callable[..., Kernel]:
    """`make(*tags)`, which returns an `entry`, as a function of dtypes that compiles each kernel once a process."""
    lock = threading.Lock()
    kernels: dict[tuple[torch.dtype, ...], Kernel] = {}

    @functools.wraps(make)
    def kernel(*dtypes: torch.dtype) -> Kernel:
        found = kernels.get(dtypes)
        if found is None:
            with lock:
                found = kernels.get(dtypes)
                if found is None:
                    found = kernels[dtypes] = Kernel(make(*map(dtype_tag, dtypes)))
        return found

    return kernel


class _KernelCache(FunctionCache):
    """Numba's cache on disk, made safe to ship.

    Numba takes a cached kernel for fresh if its own file has not changed. Here the helpers in other files count too, by
    content: package managers may give all versions of a file one time stamp. And no error of the disk is worth a
    failed call: what cannot be read is compiled, what cannot be written is not kept.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _source_digest()

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except Exception:
            # A damaged index would also keep everything compiled from now on from being saved.
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *args: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(*args)


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def dtype_tag(dtype: torch.dtype) -> Any | None:
    """The tag for numbers of `dtype`; None for one which these kernels cannot read on this machine."""
    if dtype == torch.float16 and not _converts_float16():
        return None
    return _TAGS.get(dtype)


def _converts_float16() -> bool:
    # Without an instruction LLVM calls a library function which may not be there.
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return emits("f16c")


def emits(*features: str) -> bool:
    """Whether numba makes code for a processor with these features.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may name fewer than there are, and LLVM ends the process over an instruction
    that it was told is not there.
    """
    chosen: str | None = numba.config.CPU_FEATURES
    if chosen is None:
        host = llvm.get_host_cpu_features()
        return all(host.get(name) for name in features)
    return {f"+{name}" for name in features} <= {name.strip() for name in chosen.split(",")}
