"""The table of tiles: which shape of work each Triton attention kernel uses on which GPU, and how decode is split.

Nothing is tuned at run time: an autotuner would retune on unseen shapes, cannot run inside a CUDA graph and makes
the order of sums depend on the batch. A row is looked up by (GPU generation, op, head size bucket, group bucket).
Everything here depends on shapes alone, never on the lengths of sequences, so that a captured graph stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["ARCHS", "DecodeSplits", "Tile", "decode_splits", "head_tile", "lookup", "next_power_of_2"]

#: GPU generations with rows of their own. "interpreter" is Triton's numpy interpreter: small tiles, many edges.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")

#: No launch has more splits by itself; past this the empty programs of short sequences cost more than they bring.
MAX_SPLITS = 64
#: Below this many splits one long sequence in a large batch of short ones would run alone on a few SMs.
MIN_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """One row of the table.

    `block_m` rows of queries (tokens times packed heads) meet `block_n` keys at a time. `chunk` is the number of keys
    of one decode split, a multiple of `block_n`; prefill has none.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk: int = 0


@dataclass(frozen=True)
class DecodeSplits:
    """A sequence is cut at multiples of `min_chunk`, doubled until `max_splits` chunks cover it."""

    max_splits: int
    min_chunk: int


# Decode keeps three or more stages on NVIDIA: with two, the pipeliner does not prefetch the load of the block table.
# A group above 16 gets 64 rows (a whole warp group's MMA) at once; 32 rows are slower than either 16 or 64.
_DECODE = {
    # (arch, head size up to, group up to): tile
    ("sm_90", 64, 8): Tile(16, 64, 4, 4, chunk=256),
    ("sm_90", 64, 16): Tile(16, 64, 4, 4, chunk=512),
    ("sm_90", 64, 64): Tile(64, 64, 4, 3, chunk=1024),
    ("sm_90", 128, 8): Tile(16, 64, 4, 3, chunk=256),
    ("sm_90", 128, 16): Tile(16, 64, 4, 3, chunk=512),
    ("sm_90", 128, 64): Tile(64, 64, 4, 3, chunk=1024),
    ("sm_90", 256, 8): Tile(16, 32, 4, 3, chunk=256),
    ("sm_90", 256, 16): Tile(16, 32, 4, 3, chunk=512),
    ("sm_90", 256, 64): Tile(64, 32, 8, 3, chunk=1024),
    # 64 rows fill all 255 registers of 4 warps on Ampere.
    ("sm_80", 64, 8): Tile(16, 64, 4, 4, chunk=256),
    ("sm_80", 64, 16): Tile(16, 64, 4, 4, chunk=512),
    ("sm_80", 64, 64): Tile(64, 64, 8, 3, chunk=1024),
    ("sm_80", 128, 8): Tile(16, 64, 4, 3, chunk=256),
    ("sm_80", 128, 16): Tile(16, 64, 4, 3, chunk=512),
    ("sm_80", 128, 64): Tile(64, 64, 8, 3, chunk=1024),
    ("sm_80", 256, 8): Tile(16, 32, 4, 3, chunk=256),
    ("sm_80", 256, 16): Tile(16, 32, 4, 3, chunk=512),
    ("sm_80", 256, 64): Tile(64, 32, 8, 2, chunk=1024),
    # 64 KiB of LDS, and the AMD pipeliner counts stages differently: two.
    ("gfx942", 64, 8): Tile(16, 64, 4, 2, chunk=256),
    ("gfx942", 64, 16): Tile(16, 64, 4, 2, chunk=512),
    ("gfx942", 64, 64): Tile(64, 64, 4, 2, chunk=1024),
    ("gfx942", 128, 8): Tile(16, 64, 4, 2, chunk=256),
    ("gfx942", 128, 16): Tile(16, 64, 4, 2, chunk=512),
    ("gfx942", 128, 64): Tile(64, 32, 4, 2, chunk=1024),
    ("gfx942", 256, 8): Tile(16, 32, 4, 2, chunk=256),
    ("gfx942", 256, 16): Tile(16, 32, 4, 2, chunk=512),
    ("gfx942", 256, 64): Tile(64, 32, 8, 2, chunk=1024),
}

_PREFILL = {
    # (arch, head size up to): tile
    ("sm_90", 64): Tile(128, 64, 8, 3),
    ("sm_90", 128): Tile(128, 64, 8, 3),
    ("sm_90", 256): Tile(64, 32, 8, 3),
    ("sm_80", 64): Tile(128, 64, 8, 3),
    ("sm_80", 128): Tile(128, 32, 8, 3),
    ("sm_80", 256): Tile(64, 32, 8, 2),
    ("gfx942", 64): Tile(128, 64, 4, 2),
    ("gfx942", 128): Tile(128, 32, 4, 2),
    ("gfx942", 256): Tile(64, 32, 8, 2),
}

# Widening a one-byte cache takes registers which Ampere's MMA, with its operands in registers, does not have.
_PREFILL_ONE_BYTE = {
    ("sm_80", 64): Tile(128, 32, 8, 3),
    ("sm_80", 128): Tile(64, 32, 4, 3),
    ("sm_80", 256): Tile(32, 32, 8, 2),
}


def lookup(
    op: str, arch: str, head_size: int, *, group: int = 1, itemsize: int = 2, cache_itemsize: int = 2
) -> Tile:
    """The tile of `op` ("decode" or "prefill") for one GPU generation, head size and group.

    Args:
        arch: one of `ARCHS`.
        head_size: 1 to 256.
        group: query heads that share a KV head (decode only).
        itemsize: bytes of an element as it is multiplied; 4 (float32) gets smaller tiles.
        cache_itemsize: bytes of an element of the cache (prefill only).
    """
    if arch == "interpreter":
        return Tile(16, 16, 4, 1, chunk=32) if op == "decode" else Tile(16, 16, 4, 1)
    row_arch = "sm_90" if arch == "sm_100" else arch
    head = 64 if head_size <= 64 else 128 if head_size <= 128 else 256
    if op == "decode":
        tile = _DECODE[row_arch, head, 8 if group <= 8 else 16 if group <= 16 else 64]
    else:
        tile = _PREFILL[row_arch, head]
        if cache_itemsize == 1:
            tile = _PREFILL_ONE_BYTE.get((row_arch, head), tile)
    return _for_float32(tile) if itemsize == 4 else tile


def _for_float32(tile: Tile) -> Tile:
    """Float32 runs on plain FMA units out of registers and shared memory twice as wide: less of both a program."""
    return replace(tile, block_m=max(16, tile.block_m // 4), block_n=16, num_stages=2)


def decode_splits(
    tile: Tile, num_seqs: int, programs_per_seq: int, capacity: int, num_sms: int
) -> DecodeSplits:
    """How far decode is cut for a batch of this shape: finer where few sequences leave the GPU empty.

    Args:
        tile: the decode tile.
        num_seqs: rows of the launch, padding included.
        programs_per_seq: programs a sequence has without splits (KV heads times tiles of their group).
        capacity: tokens a row of the block table can hold; a bound on every length.
        num_sms: multiprocessors of the GPU.

    Returns:
        Bounds from shapes alone. The kernels derive each sequence's own number of splits from its length.
    """
    wanted = -(-4 * num_sms // max(1, num_seqs * programs_per_seq))
    wanted = min(MAX_SPLITS, max(MIN_SPLITS, wanted))
    finer = 4 if wanted > 2 * MIN_SPLITS else 1
    min_chunk = max(tile.block_n, tile.chunk // finer)
    return DecodeSplits(min(wanted, max(1, -(-capacity // min_chunk))), min_chunk)


def head_tile(head_size: int) -> int:
    """The power of two that holds a head; at least 16, which is the smallest matrix product."""
    return max(16, next_power_of_2(head_size))


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
