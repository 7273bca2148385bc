"""Tiles of a matrix product in registers whose every sum has one order, however many rows are beside it.

A sum is made by `llvm.fma` without leave to reorder, so what a row gets is decided by IEEE 754 and not by how a
compiler or library splits the work: the same for any number of rows, threads and processors with that instruction.

    along K   weights [N, K]   lane l of sixteen sums k = l, l + 16, ...; then lanes l and l + 8, l + 4, l + 2, l + 1
    across N  weights [K, N]   each lane is a column of its own and sums k = 0, 1, 2, ...

For bfloat16 some processors have an instruction that adds two products to a lane. What it rounds is the processor's
affair and depends on these numbers alone: the order is fixed there too, with pairs of k in place of single ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_paged.kernels.cpu_memory import prefetch

__all__ = [
    "LANES",
    "add_across",
    "add_along",
    "add_block",
    "add_pairs_across",
    "add_pairs_along",
    "fma",
    "pair_columns",
]

LANES = 16
_F32, _F16 = ir.FloatType(), ir.HalfType()
_I64, _I32, _I16 = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_VECTOR, _PAIRS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def add_along(rows: int, columns: int) -> Callable[..., Any]:
    """`sums[r, c] = x[r] . w[c]` over the first LANES * chunks numbers, for that many rows and columns.

    Addresses: x of float32, w of `tag`, sums float32 [rows, columns]; strides in numbers.
    """

    @intrinsic
    def tile(typing_context, x, x_stride, w, w_stride, chunks, sums, tag):
        def generate(context, builder, signature, args):
            x, x_stride, w, w_stride, chunks, sums, _tag = args
            totals = [_zero(builder) for _ in range(rows * columns)]
            sources = [_step(builder, x, x_stride, r, 4) for r in range(rows)]
            targets = [_step(builder, w, w_stride, c, _bytes(tag)) for c in range(columns)]
            with cgutils.for_range(builder, chunks) as loop:
                first = builder.mul(loop.index, _I64(LANES))
                ws = [_load(builder, _step(builder, at, first, 1, _bytes(tag)), LANES, tag) for at in targets]
                for r, source in enumerate(sources):
                    xs = _load(builder, _step(builder, source, first, 1, 4), LANES, types.float32)
                    for c in range(columns):
                        total = totals[r * columns + c]
                        builder.store(_fma(builder, xs, ws[c], builder.load(total)), total)
            _store_sums(builder, [builder.load(total) for total in totals], sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6, tag), generate

    return tile


def add_across(rows: int, vectors: int) -> Callable[..., Any]:
    """`sums[r, c] += x[r, k] * w[k, c]` for k = 0 to count, of that many rows and vectors of columns.

    Addresses: x and sums of float32, w of `tag`; strides in numbers.
    """

    @intrinsic
    def tile(typing_context, x, x_stride, w, w_stride, count, sums, sums_stride, tag):
        def generate(context, builder, signature, args):
            x, x_stride, w, w_stride, count, sums, sums_stride, _tag = args
            sources = [_step(builder, x, x_stride, r, 4) for r in range(rows)]
            places = [
                _pointer(
                    builder,
                    _step(builder, _step(builder, sums, sums_stride, r, 4), _I64(LANES), v, 4),
                    _VECTOR,
                )
                for r in range(rows)
                for v in range(vectors)
            ]
            totals = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
            with cgutils.for_range(builder, count) as loop:
                line = _step(builder, w, builder.mul(loop.index, w_stride), 1, _bytes(tag))
                ws = [
                    _load(builder, _step(builder, line, _I64(LANES), v, _bytes(tag)), LANES, tag)
                    for v in range(vectors)
                ]
                for r, source in enumerate(sources):
                    number = _load(builder, _step(builder, source, loop.index, 1, 4), 1, types.float32)
                    xs = _splat(builder, number)
                    for v in range(vectors):
                        total = totals[r * vectors + v]
                        builder.store(_fma(builder, xs, ws[v], builder.load(total)), total)
            for place, total in zip(places, totals, strict=True):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, tag), generate

    return tile


def add_block(rows: int, depth: int) -> Callable[..., Any]:
    """`sums[r, c] += x[r, k] * w[k, c]` for k = 0 to `depth`, of that many rows and one vector of columns.

    As `add_across`, with no loop. The cache line at `ahead` and those of its next rows are asked for meanwhile.
    """

    @intrinsic
    def tile(typing_context, x, x_stride, w, w_stride, ahead, sums, sums_stride, tag):
        def generate(context, builder, signature, args):
            x, x_stride, w, w_stride, ahead, sums, sums_stride, _tag = args
            places = [
                _pointer(builder, _step(builder, sums, sums_stride, r, 4), _VECTOR) for r in range(rows)
            ]
            totals = [builder.load(place, align=4) for place in places]
            for k in range(depth):
                line = _load(builder, _step(builder, w, w_stride, k, _bytes(tag)), LANES, tag)
                prefetch(builder, _step(builder, ahead, w_stride, k, _bytes(tag)), 1)
                for r in range(rows):
                    source = builder.add(_step(builder, x, x_stride, r, 4), _I64(4 * k))
                    number = _splat(builder, _load(builder, source, 1, types.float32))
                    totals[r] = _fma(builder, number, line, totals[r])
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, tag), generate

    return tile


def add_pairs_along(rows: int, columns: int) -> Callable[..., Any]:
    """As `add_along` for x and w of bfloat16, over the first 2 * LANES * chunks numbers."""

    @intrinsic
    def tile(typing_context, x, x_stride, w, w_stride, chunks, sums):
        def generate(context, builder, signature, args):
            x, x_stride, w, w_stride, chunks, sums = args
            totals = [_zero(builder) for _ in range(rows * columns)]
            sources = [_step(builder, x, x_stride, r, 2) for r in range(rows)]
            targets = [_step(builder, w, w_stride, c, 2) for c in range(columns)]
            with cgutils.for_range(builder, chunks) as loop:
                first = builder.mul(loop.index, _I64(4 * LANES))
                ws = [_load_pairs(builder, builder.add(at, first)) for at in targets]
                for r, source in enumerate(sources):
                    xs = _load_pairs(builder, builder.add(source, first))
                    for c in range(columns):
                        total = totals[r * columns + c]
                        builder.store(_add_pairs(builder, xs, ws[c], builder.load(total)), total)
            _store_sums(builder, [builder.load(total) for total in totals], sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


def add_pairs_across(rows: int, vectors: int) -> Callable[..., Any]:
    """As `add_across` for x of bfloat16 and `count` pairs of k, with w as `pair_columns` leaves it."""

    @intrinsic
    def tile(typing_context, x, x_stride, w, w_stride, count, sums, sums_stride):
        def generate(context, builder, signature, args):
            x, x_stride, w, w_stride, count, sums, sums_stride = args
            sources = [_step(builder, x, x_stride, r, 2) for r in range(rows)]
            places = [
                _pointer(
                    builder,
                    _step(builder, _step(builder, sums, sums_stride, r, 4), _I64(LANES), v, 4),
                    _VECTOR,
                )
                for r in range(rows)
                for v in range(vectors)
            ]
            totals = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
            with cgutils.for_range(builder, count) as loop:
                line = _step(builder, w, builder.mul(loop.index, w_stride), 1, 4)
                ws = [_load_pairs(builder, _step(builder, line, _I64(LANES), v, 4)) for v in range(vectors)]
                for r, source in enumerate(sources):
                    at = _pointer(builder, _step(builder, source, loop.index, 1, 4), _I32)
                    xs = _splat(builder, builder.load(at, align=2))
                    for v in range(vectors):
                        total = totals[r * vectors + v]
                        builder.store(_add_pairs(builder, xs, ws[v], builder.load(total)), total)
            for place, total in zip(places, totals, strict=True):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


@intrinsic
def pair_columns(typing_context, first, second, target):
    """LANES columns of two rows of bfloat16 side by side: column by column first, second. Addresses."""

    def generate(context, builder, signature, args):
        first, second, target = args
        pairs = ir.VectorType(_I32, LANES)
        low, high = (
            builder.zext(builder.load(_pointer(builder, at, ir.VectorType(_I16, LANES)), align=2), pairs)
            for at in (first, second)
        )
        both = builder.or_(low, builder.shl(high, ir.Constant(pairs, [16] * LANES)))
        builder.store(both, _pointer(builder, target, pairs), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c in float32, rounded once."""
    return types.float32(
        types.float32, types.float32, types.float32
    ), lambda context, builder, signature, args: _fma(builder, *args)


def _bytes(tag: Any) -> int:
    return 4 if tag == types.float32 else 2


def _step(builder: Any, address: Any, stride: Any, times: int, size: int) -> Any:
    """`address` and `times` times `stride` numbers of `size` bytes."""
    return builder.add(address, builder.mul(stride, _I64(times * size)))


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _zero(builder: Any) -> Any:
    return cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))


def _load(builder: Any, address: Any, lanes: int, tag: Any) -> Any:
    """`lanes` numbers of `tag` as float32."""

    def of(kind: ir.Type) -> ir.Type:
        return ir.VectorType(kind, lanes) if lanes > 1 else kind

    if tag == types.float32:
        return builder.load(_pointer(builder, address, of(_F32)), align=4)
    if tag == types.int16:
        return builder.fpext(builder.load(_pointer(builder, address, of(_F16)), align=2), of(_F32))
    bits = builder.zext(builder.load(_pointer(builder, address, of(_I16)), align=2), of(_I32))
    shift = ir.Constant(of(_I32), [16] * lanes if lanes > 1 else 16)
    return builder.bitcast(builder.shl(bits, shift), of(_F32))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _load_pairs(builder: Any, address: Any) -> Any:
    """LANES pairs of bfloat16."""
    return builder.load(_pointer(builder, address, ir.VectorType(_I32, LANES)), align=2)


def _add_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(c.type, [c.type, a.type, b.type])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [c, a, b])


def _splat(builder: Any, number: Any) -> Any:
    one = builder.insert_element(
        ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined), number, _I32(0)
    )
    return builder.shuffle_vector(one, one, _mask([0] * LANES))


def _store_sums(builder: Any, totals: list[Any], sums: Any) -> None:
    """The sum over the lanes of each vector, one after another.

    Two vectors at a time are halved and put side by side, so that sixteen sums end in one vector.
    """
    count, width = len(totals), LANES
    while width > 1:
        pairs = [(totals[i], totals[min(i + 1, len(totals) - 1)]) for i in range(0, len(totals), 2)]
        starts = [base + group for base in (0, LANES) for group in range(0, LANES, width)]
        low = _mask([start + i for start in starts for i in range(width // 2)])
        high = _mask([start + width // 2 + i for start in starts for i in range(width // 2)])
        totals = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
            for a, b in pairs
        ]
        width //= 2
    (total,) = totals
    if count == LANES:
        builder.store(total, _pointer(builder, sums, total.type), align=4)
        return
    for i in range(count):
        place = _pointer(builder, builder.add(sums, _I64(4 * i)), _F32)
        builder.store(builder.extract_element(total, _I32(i)), place, align=4)


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
