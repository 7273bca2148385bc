"""Sixteen columns of a low-rank product in registers: what the loops of `cpu_lora_kernel` cost most without.

B lies column after column of the output, with the ranks of each side by side, so a vector over columns is scattered. A
tile is read as sixteen vectors, turned by Eklundh's recursive exchange of blocks (IEEE Trans. Computers C-21, 1972,
page 801), and stays in the vector registers while all rows of a group are multiplied with it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["SIDE", "add_tile"]

#: Columns, and ranks, of a tile.
SIDE = 16
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, SIDE)
_FLAGS = ("contract", "reassoc", "nsz")


@intrinsic
def add_tile(typing_context, b, b_stride, products, products_stride, output, stride, rows):
    """output[row, c] += sum over r of products[row, r] * b[c, r] for SIDE columns c and ranks r, and all `rows`.

    Addresses of float32; strides in numbers, between columns of b and between rows.
    """

    def generate(context, builder, signature, args):
        b, b_stride, products, products_stride, output, stride, rows = args
        lines = [
            _load(builder, _at(builder, b, builder.mul(_I64(c), b_stride)), _VECTOR) for c in range(SIDE)
        ]
        turned = _turn(builder, lines)
        with cgutils.for_range(builder, rows) as loop:
            source = _at(builder, products, builder.mul(loop.index, products_stride))
            target = _at(builder, output, builder.mul(loop.index, stride))
            # Four sums at a time: one would wait for each addition before the next.
            sums: list[Any] = [_load(builder, target, _VECTOR), None, None, None]
            for r, line in enumerate(turned):
                number = _load(builder, _at(builder, source, _I64(r)), _F32)
                product = builder.fmul(_splat(builder, number), line, flags=_FLAGS)
                so_far = sums[r % 4]
                sums[r % 4] = product if so_far is None else builder.fadd(so_far, product, flags=_FLAGS)
            total = builder.fadd(
                builder.fadd(sums[0], sums[1], flags=_FLAGS),
                builder.fadd(sums[2], sums[3], flags=_FLAGS),
                flags=_FLAGS,
            )
            builder.store(total, builder.inttoptr(target, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _at(builder: Any, address: Any, numbers: Any) -> Any:
    return builder.add(address, builder.shl(numbers, _I64(2)))


def _load(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _splat(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, _mask([0] * SIDE))


def _turn(builder: Any, lines: list[Any]) -> list[Any]:
    """The transpose of sixteen vectors: at each step the off-diagonal blocks of twice the size change places."""
    size = 1
    while size < SIDE:
        upper = _mask([lane if not lane & size else SIDE + lane - size for lane in range(SIDE)])
        lower = _mask([lane + size if not lane & size else SIDE + lane for lane in range(SIDE)])
        for i in (i for i in range(SIDE) if not i & size):
            first, second = lines[i], lines[i + size]
            lines[i] = builder.shuffle_vector(first, second, upper)
            lines[i + size] = builder.shuffle_vector(first, second, lower)
        size *= 2
    return lines


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, SIDE), lanes)
