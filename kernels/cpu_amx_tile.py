"""What `hf_paged.kernels.cpu_amx_kernel` is made of: float32 numbers cut in three, and Intel's AMX instructions.

A float32 number has 24 bits of precision, a bfloat16 eight. Cut after eight and sixteen bits it is a sum of three
bfloat16 numbers, exactly:

    x = high + middle + low        |middle| < 2**-7 |x|, |low| < 2**-15 |x|

A product of two such sums has nine products; the three smallest together are below 2**-20 of the whole, in the mean
below the half last bit that a float32 product is rounded by, and are left out. An AMX tile instruction makes 8,192
products of bfloat16 and adds them up in float32, in the time of 512 float32 ones by AVX-512: six of them in place of
one are 2.7 times as fast.

A *tile* is a register of sixteen rows of 64 bytes: sixteen float32 sums, or sixteen pairs of bfloat16. Pair p of 32
numbers along K is p and p + 16: any order of K will do that weights and rows share, and this one packs two vectors
with a shift. A *block* is a number's three parts in memory, one tile each: `BLOCK` bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_paged.kernels.cpu_memory import prefetch

__all__ = [
    "ACROSS",
    "ALONG",
    "BLOCK",
    "TILE",
    "WIDTH",
    "add_tile",
    "begin_tiles",
    "end_tiles",
    "lies_across",
    "multiply",
    "split_pairs",
    "transpose",
]

LANES = 16
#: Bytes of a tile and of a block.
TILE, BLOCK = 1024, 3072
#: Rows and columns of the square of weights that is gone through at a time, and steps of K in it.
WIDTH, _STEPS = 64, 2
_LINES = WIDTH * WIDTH * 4 // 64
#: Types of the tags for how rows of weights lie: along K, or across it.
ALONG, ACROSS = types.int16, types.int8
_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR, _BITS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VOID = ir.VoidType()
#: What `ldtilecfg` reads: palette 1, then from byte 16 the bytes a row and from byte 48 the rows of each tile.
_LAYOUT = bytes([1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [LANES] * 8 + [0] * 8)
#: Tiles in registers: four sums, [row block, column block]; two of rows of x; two of weights.
_SUMS, _ROWS, _WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)
#: Which part of x meets which part of the weights, in an order that loads few tiles twice. Largest products first.
_PARTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (2, 0))


@intrinsic
def begin_tiles(typing_context):
    """Gives this thread's tile registers their shape: eight of sixteen rows of 64 bytes."""

    def generate(context, builder, signature, args):
        layout = cgutils.global_constant(
            builder, "amx_layout", ir.Constant(ir.ArrayType(_I8, 64), bytearray(_LAYOUT))
        )
        _call(builder, "llvm.x86.ldtilecfg", builder.bitcast(layout, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def end_tiles(typing_context):
    """Empties the tile registers, so that the system need not save them."""

    def generate(context, builder, signature, args):
        _call(builder, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def lies_across(typing_context, layout):
    """Whether rows of weights lie across K: a constant, so that a kernel holds one of two branches."""
    across = int(layout == ACROSS)
    return types.boolean(layout), lambda context, builder, signature, args: ir.IntType(1)(across)


@intrinsic
def split_pairs(typing_context, first, second, target):
    """Cuts sixteen float32 at `first` and at `second` in three, and writes one row of a block: pairs of bfloat16."""

    def generate(context, builder, signature, args):
        first, second, target = args
        low, high = (builder.load(_pointer(builder, at, _VECTOR), align=4) for at in (first, second))
        for part in range(3):
            packed, low, high = _take_upper_halves(builder, low, high)
            builder.store(packed, _pointer(builder, builder.add(target, _I64(part * TILE)), _BITS), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def transpose(typing_context, tile):
    """Exchanges rows and columns of a tile of numbers of 32 bits at an address."""

    def generate(context, builder, signature, args):
        (tile,) = args
        rows = _transposed(
            builder, [builder.load(_row(builder, tile, r, _BITS), align=64) for r in range(LANES)]
        )
        for r, row in enumerate(rows):
            builder.store(row, _row(builder, tile, r, _BITS), align=64)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def add_tile(typing_context, sums, row, base, target, check):
    """target[c] = base[c] + sums[row, c] for sixteen float32; `check` becomes NaN where that is not finite.

    Addresses; a `base` of 0 adds nothing.
    """

    def generate(context, builder, signature, args):
        sums, row, base, target, check = args
        total = builder.load(
            _pointer(builder, builder.add(sums, builder.mul(row, _I64(64))), _VECTOR), align=64
        )
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        added = cgutils.alloca_once_value(builder, zero)
        with builder.if_then(builder.icmp_signed("!=", base, _I64(0))):
            builder.store(builder.load(_pointer(builder, base, _VECTOR), align=4), added)
        total = builder.fadd(total, builder.load(added))
        builder.store(total, _pointer(builder, target, _VECTOR), align=4)
        place = _pointer(builder, check, _VECTOR)
        seen = builder.load(place, align=64)
        builder.store(builder.fadd(seen, builder.fsub(total, total)), place, align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def multiply(
    typing_context, x, w, w_step, sums, sums_row, has_two, is_first, ahead, ahead_row, line, lines, layout
):
    """Adds `_STEPS` steps of K to the sums of one or two blocks of rows by two blocks of columns.

    Addresses: x, of blocks [row block, step]; w, of blocks [step, column block] `w_step` apart; sums, of tiles
    [row block, column block] with rows `sums_row` apart; [column, row] each if weights lie along K, where x is turned
    as well. `is_first`: sums begin at zero. Meanwhile `lines` cache lines for each group of products are asked for,
    from `line` of the `WIDTH` rows at `ahead`, `ahead_row` apart.
    """

    def generate(context, builder, signature, args):
        x, w, w_step, sums, sums_row, has_two, is_first, ahead, ahead_row, line, lines, _layout = args
        blocks = [None, has_two]
        places = [_sum_places(builder, sums, sums_row, r) for r in range(2)]
        _for_blocks(builder, blocks, lambda r: _begin_sums(builder, places[r], is_first))
        for step in range(_STEPS):
            held = (-1, -1)
            for group, parts in enumerate(_PARTS):
                if parts[1] != held[1]:
                    _load_weights(builder, builder.add(w, builder.mul(w_step, _I64(step))), parts[1])
                begin = builder.add(line, builder.mul(lines, _I64(step * len(_PARTS) + group)))
                _ask_for(builder, ahead, ahead_row, begin, lines)

                def add(
                    r: int, step: int = step, part: int | None = parts[0] if parts[0] != held[0] else None
                ) -> None:
                    if part is not None:
                        place = builder.add(x, _I64((r * _STEPS + step) * BLOCK + part * TILE))
                        _tile_memory(builder, "tileloadd64", _ROWS[r], place)
                    for c in range(2):
                        tiles = (_ROWS[r], _WEIGHTS[c])
                        _tiles(
                            builder,
                            "tdpbf16ps",
                            _SUMS[2 * r + c],
                            *(tiles if layout == ACROSS else reversed(tiles)),
                        )

                _for_blocks(builder, blocks, add)
                held = parts
        _for_blocks(
            builder, blocks, lambda r: [_tile_memory(builder, "tilestored64", *place) for place in places[r]]
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.boolean, types.boolean, *[types.int64] * 4, layout), generate


def _for_blocks(builder: Any, blocks: list[Any], emit: Any) -> None:
    """Code for each row block: of those with a condition, only where it is true."""
    for r, condition in enumerate(blocks):
        if condition is None:
            emit(r)
        else:
            with builder.if_then(condition, likely=True):
                emit(r)


def _sum_places(builder: Any, sums: Any, sums_row: Any, r: int) -> list[tuple[int, Any]]:
    """The sums of a row block, each a tile and its address."""
    row = builder.add(sums, builder.mul(sums_row, _I64(r)))
    return [(_SUMS[2 * r + c], builder.add(row, _I64(c * TILE))) for c in range(2)]


def _begin_sums(builder: Any, places: list[tuple[int, Any]], is_first: Any) -> None:
    with builder.if_else(is_first) as (first, later):
        with first:
            for tile, _place in places:
                _tiles(builder, "tilezero", tile)
        with later:
            for tile, place in places:
                _tile_memory(builder, "tileloadd64", tile, place)


def _load_weights(builder: Any, step: Any, part: int) -> None:
    for c in range(2):
        _tile_memory(builder, "tileloadd64", _WEIGHTS[c], builder.add(step, _I64(c * BLOCK + part * TILE)))


def _ask_for(builder: Any, rows: Any, row_bytes: Any, begin: Any, lines: Any) -> None:
    """Lines `begin` to `begin + lines` of `WIDTH` rows of numbers, to the second cache."""
    with cgutils.for_range(builder, lines) as loop:
        line = builder.add(begin, loop.index)
        line = builder.select(builder.icmp_signed("<", line, _I64(_LINES)), line, _I64(_LINES - 1))
        row, place = builder.lshr(line, _I64(2)), builder.and_(line, _I64(3))
        at = builder.add(rows, builder.add(builder.mul(row, row_bytes), builder.mul(place, _I64(64))))
        prefetch(builder, at, 2)


def _take_upper_halves(builder: Any, low: Any, high: Any) -> tuple[Any, Any, Any]:
    """The upper sixteen bits of two vectors of float32 in one of pairs, and what is left of each."""
    mask, sixteen = ir.Constant(_BITS, [-0x10000] * LANES), ir.Constant(_BITS, [16] * LANES)
    uppers = [builder.and_(builder.bitcast(vector, _BITS), mask) for vector in (low, high)]
    packed = builder.or_(builder.lshr(uppers[0], sixteen), uppers[1])
    rests = [
        builder.fsub(vector, builder.bitcast(upper, _VECTOR))
        for vector, upper in zip((low, high), uppers, strict=True)
    ]
    return packed, rests[0], rests[1]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Rows become columns: four rounds that exchange halves of pairs of rows, each at half the distance."""
    distance = LANES // 2
    while distance:
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        for r in range(LANES):
            if not r & distance:
                pair = rows[r], rows[r + distance]
                rows[r] = builder.shuffle_vector(*pair, _mask(low))
                rows[r + distance] = builder.shuffle_vector(*pair, _mask(high))
        distance //= 2
    return rows


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _row(builder: Any, tile: Any, row: int, kind: ir.Type) -> Any:
    return _pointer(builder, builder.add(tile, _I64(64 * row)), kind)


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(_VOID, [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _tiles(builder: Any, name: str, *tiles: int) -> None:
    _call(builder, f"llvm.x86.{name}", *map(_I8, tiles))


def _tile_memory(builder: Any, name: str, tile: int, place: Any) -> None:
    """Loads or stores a tile whose rows lie one after another."""
    _call(builder, f"llvm.x86.{name}", _I8(tile), _pointer(builder, place, _I8), _I64(64))
