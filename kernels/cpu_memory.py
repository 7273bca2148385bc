"""How the CPU kernels read and write memory, and the arithmetic numba has no vectors for (see `kernels.cpu_jit`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_paged.kernels.cpu_jit import FASTMATH, helper

__all__ = [
    "argument",
    "call_at",
    "copy_bits",
    "exp",
    "float_argument",
    "float_bits",
    "float_from_bits",
    "has_scales",
    "item_bytes",
    "load",
    "load_f32",
    "load_f64",
    "load_i32",
    "load_i64",
    "ordered_bits",
    "prefetch",
    "store",
    "store_f32",
    "store_f64",
    "store_i32",
    "store_i64",
    "store_integer",
]


def _pointer(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def prefetch(builder: Any, address: Any, level: int) -> None:
    """Code that asks for the cache line at `address`, to be read, in the first or second cache."""
    pointer = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    name = f"llvm.prefetch.{pointer.type.intrinsic_name}"
    # LLVM counts from 3, nearest, down; the last number says data.
    arguments = [pointer, _I32(0), _I32(4 - level), _I32(1)]
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


_F32, _F16 = ir.FloatType(), ir.HalfType()
_I64, _I32, _I16, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_BYTES = {types.float32: 4, types.uint16: 2, types.int16: 2, types.int8: 1}


@intrinsic
def load(typing_context, address, index, tag):
    """The number at `address[index]` as float32."""

    def generate(context, builder, signature, args):
        address, index, _tag = args
        if tag == types.float32:
            return builder.load(_pointer(builder, address, index, _F32), align=4)
        if tag == types.int8:
            return builder.sitofp(builder.load(_pointer(builder, address, index, _I8), align=1), _F32)
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
    size = _BYTES[tag]
    return types.int64(tag), lambda context, builder, signature, args: _I64(size)


@intrinsic
def has_scales(typing_context, tag):
    """Whether numbers of this kind come with scales: a constant, so that a kernel holds one of two branches."""
    is_int8 = tag == types.int8
    return types.boolean(tag), lambda context, builder, signature, args: ir.IntType(1)(int(is_int8))


@intrinsic
def store_integer(typing_context, address, index, number):
    """Writes the float32 `number`, between -127 and 127, to `address[index]` as int8: to the nearest, ties to even."""

    def generate(context, builder, signature, args):
        address, index, number = args
        # Where float32 numbers are integers apart, the last bits of the sum are those of the rounded number.
        shifted = builder.bitcast(builder.fadd(number, _F32(12582912.0)), _I32)
        builder.store(builder.trunc(shifted, _I8), _pointer(builder, address, index, _I8), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def copy_bits(typing_context, source, target, index, tag):
    """`target[index] = source[index]` without looking at the number."""

    def generate(context, builder, signature, args):
        source, target, index, _tag = args
        size = _BYTES[tag]
        bits = builder.load(_pointer(builder, source, index, ir.IntType(8 * size)), align=size)
        builder.store(bits, _pointer(builder, target, index, ir.IntType(8 * size)), align=size)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, tag), generate


@intrinsic
def float_argument(typing_context, arguments, place):
    """The float32 that `cpu_runtime.float_bits` put at `place`."""

    def generate(context, builder, signature, args):
        bits = builder.trunc(builder.load(_pointer(builder, *args, _I64), align=8), _I32)
        return builder.bitcast(bits, _F32)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def call_at(typing_context, address, index, bins, arguments):
    """Calls the kernel at `address`."""

    def generate(context, builder, signature, args):
        address, *passed = args
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        builder.call(builder.inttoptr(address, kind.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def load_i32(typing_context, address, index):
    """The int32 at `address[index]`."""

    def generate(context, builder, signature, args):
        return builder.sext(builder.load(_pointer(builder, *args, _I32), align=4), _I64)

    return types.int64(types.int64, types.int64), generate


def _loader(number, element, align):
    @intrinsic
    def load_number(typing_context, address, index):
        def generate(context, builder, signature, args):
            return builder.load(_pointer(builder, *args, element), align=align)

        return number(types.int64, types.int64), generate

    return load_number


def _storer(number, element, align):
    @intrinsic
    def store_number(typing_context, address, index, value):
        def generate(context, builder, signature, args):
            address, index, value = args
            builder.store(value, _pointer(builder, address, index, element), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number), generate

    return store_number


#: The int64, or the float32, at `address[index]`; and writing one there.
load_i64, store_i64 = _loader(types.int64, _I64, 8), _storer(types.int64, _I64, 8)
load_f32, store_f32 = _loader(types.float32, _F32, 4), _storer(types.float32, _F32, 4)
#: Writes the lower half of an int64 to `address[index]`.
store_i32 = _storer(types.int32, _I32, 4)
#: The float64 at `address[index]`; and writing one there.
load_f64, store_f64 = _loader(types.float64, ir.DoubleType(), 8), _storer(types.float64, ir.DoubleType(), 8)
#: The int64 among a kernel's arguments at a place.
argument = load_i64


@intrinsic
def float_bits(typing_context, number):
    """The 32 bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], _I32
    )


@intrinsic
def float_from_bits(typing_context, bits):
    """The float32 of 32 bits."""
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
    return y * float_from_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@helper(inline="always")
def ordered_bits(x):
    """An int32 that orders as `x` does in torch: -0 equals 0, and every NaN is equal and above all numbers."""
    bits = float_bits(x + np.float32(0.0))
    key = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return np.int32(0x7FFFFFFF) if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000) else key
