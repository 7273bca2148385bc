"""Numba for the CPU kernels: how they are compiled and how they read and write numbers in memory.

Kernels take addresses (int64) and not arrays: an address costs a tenth of a microsecond to pass, and an array of
bfloat16 does not exist in numpy. The type of a *tag* argument says what lies at an address:

    float32   a float32 number
    uint16    the upper half of one: bfloat16
    int16     float16

All arithmetic is in float32.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

__all__ = [
    "FASTMATH",
    "copy_bits",
    "dtype_tag",
    "entry",
    "exp",
    "helper",
    "item_bytes",
    "load",
    "load_f32",
    "ordered_bits",
    "store",
    "store_f32",
]

#: Sums may be reordered, which is what lets loops use vectors. NaN and infinity keep their meaning.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

_TAGS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}


def helper(**options: Any) -> Callable[[Callable], Callable]:
    """Compiles a function which kernels call."""
    return numba.njit(nogil=True, error_model="numpy", **options)


def entry(**options: Any) -> Callable[[Callable], Callable]:
    """Compiles a kernel: it releases the GIL and is cached on disk, or in memory where nothing can be written."""

    def decorate(function: Callable) -> Callable:
        dispatcher = helper(**options)(function)
        # Numba finds no place for its cache in a read-only installation without a home folder.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher._cache = _KernelCache(function)
        return dispatcher

    return decorate


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
    return bool(llvm.get_host_cpu_features().get("f16c"))


def _pointer(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


_F32, _I32, _I16, _F16 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.HalfType()


@intrinsic
def load(typing_context, address, index, tag):
    """The number at `address[index]` as float32."""

    def generate(context, builder, signature, args):
        address, index, _tag = args
        if tag == types.float32:
            return builder.load(_pointer(builder, address, index, _F32), align=4)
        bits = builder.load(_pointer(builder, address, index, _I16), align=2)
        if tag == types.int16:
            return builder.fpext(builder.bitcast(bits, _F16), _F32)
        return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)

    return types.float32(types.int64, types.int64, tag), generate


@intrinsic
def store(typing_context, address, index, number, tag):
    """Writes the float32 `number` to `address[index]`, rounded to nearest even."""

    def generate(context, builder, signature, args):
        address, index, number, _tag = args
        if tag == types.float32:
            builder.store(number, _pointer(builder, address, index, _F32), align=4)
        elif tag == types.int16:
            bits = builder.bitcast(builder.fptrunc(number, _F16), _I16)
            builder.store(bits, _pointer(builder, address, index, _I16), align=2)
        else:
            bits = builder.bitcast(number, _I32)
            last = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.lshr(builder.add(bits, builder.add(last, _I32(0x7FFF))), _I32(16))
            # Rounding up could carry a NaN over to another number.
            is_nan = builder.fcmp_unordered("uno", number, number)
            chosen = builder.select(is_nan, _I32(0x7FC0), rounded)
            builder.store(builder.trunc(chosen, _I16), _pointer(builder, address, index, _I16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, tag), generate


@intrinsic
def item_bytes(typing_context, tag):
    """Bytes of one number."""
    size = 4 if tag == types.float32 else 2
    return types.int64(tag), lambda context, builder, signature, args: ir.IntType(64)(size)


@intrinsic
def copy_bits(typing_context, source, target, index, tag):
    """`target[index] = source[index]` without looking at the number."""

    def generate(context, builder, signature, args):
        source, target, index, _tag = args
        element, align = (_F32, 4) if tag == types.float32 else (_I16, 2)
        bits = builder.load(_pointer(builder, source, index, element), align=align)
        builder.store(bits, _pointer(builder, target, index, element), align=align)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, tag), generate


@intrinsic
def load_f32(typing_context, address, index):
    """The float32 at `address[index]`."""

    def generate(context, builder, signature, args):
        return builder.load(_pointer(builder, *args, _F32), align=4)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def store_f32(typing_context, address, index, number):
    """Writes a float32 to `address[index]`."""

    def generate(context, builder, signature, args):
        address, index, number = args
        builder.store(number, _pointer(builder, address, index, _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def float_bits(typing_context, number):
    """The 32 bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], _I32
    )


@intrinsic
def _float_from_bits(typing_context, bits):
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], _F32
    )


@helper(inline="always", fastmath=FASTMATH)
def exp(x):
    """e**x in float32 for x <= 0; below -87 it stays at the least normal number."""
    # Written so that NaN passes the comparison and comes out as NaN.
    x = np.float32(-87.3) if x < np.float32(-87.3) else x
    # As 2**whole * 2**r, the second by its Taylor series for |r| <= 1/2.
    x = x * np.float32(1.4426950408889634)
    whole = np.floor(x + np.float32(0.5))
    r = x - whole
    y = np.float32(1.5252734e-5)
    y = y * r + np.float32(1.5403530e-4)
    y = y * r + np.float32(1.3333558e-3)
    y = y * r + np.float32(9.6181291e-3)
    y = y * r + np.float32(5.5504109e-2)
    y = y * r + np.float32(2.4022651e-1)
    y = y * r + np.float32(6.9314718e-1)
    y = y * r + np.float32(1.0)
    return y * _float_from_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@helper(inline="always")
def ordered_bits(x):
    """An int32 that orders as `x` does in torch: -0 equals 0, and every NaN is equal and above all numbers."""
    bits = float_bits(x + np.float32(0.0))
    key = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return np.int32(0x7FFFFFFF) if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000) else key
