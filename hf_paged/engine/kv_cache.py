"""The KV cache's memory: K and V blocks of all layers, which grow with the work and go back.

On a CPU each tensor is address space reserved to the budget. Pages come when blocks are first written and go
back with `madvise`, so growing copies nothing and every tensor made from a layer stays valid. On other devices a
tensor grows by allocating a larger one, copying, and dropping the old one, tensor by tensor, so that no more than
one exists twice; `generation` counts such moves, for whoever recorded addresses.

Knows nothing of requests or of which blocks are used: that is `hf_paged.engine.block_manager`.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged.engine.host_copy import to_device
from hf_paged.errors import KVCacheOutOfMemory
from hf_paged.kernels import ops
from hf_paged.kernels.quantised import quantise
from hf_paged.kernels.reference import gather_sequence

__all__ = ["KVCache", "LayerSpec"]

#: Block ids are int32 in block tables.
_MAX_BLOCK_IDS = 2**31 - 1
#: Linux's value: the mmap module names it only since Python 3.13.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer keeps per token: K and V, each [num_kv_heads, head_dim], and of int8 a scale a head."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def has_scales(self) -> bool:
        return self.dtype == torch.int8

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of K, or of V, with its scales."""
        head_bytes = self.head_dim * self.dtype.itemsize + 4 * self.has_scales
        return block_size * self.num_kv_heads * head_bytes


class KVCache:
    """K and V blocks of all layers. It holds no memory until `grow`, and none after `release`.

        blocks   | usable .................. | not yet taken ......... |
                 0                      num_blocks                max_blocks

    Tensors from `layer` describe the usable blocks of the moment they were asked for: ask again after `grow` or
    `shrink`. Not thread-safe: one engine owns it.
    """

    def __init__(self, layer_specs: Sequence[LayerSpec], block_size: int, budget_bytes: int) -> None:
        """
        Args:
            layer_specs: one for each attention layer.
            block_size: tokens a block holds.
            budget_bytes: most bytes all layers may take together.
        """
        if not layer_specs:
            raise ValueError("layer_specs is empty: a KV cache needs at least one layer")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.block_size = block_size
        self.bytes_per_block = sum(2 * spec.block_bytes(block_size) for spec in layer_specs)
        self.max_blocks = min(max(0, budget_bytes) // self.bytes_per_block, _MAX_BLOCK_IDS)
        self.num_blocks = 0
        self.generation = 0
        self._budget_bytes = budget_bytes
        self._pools = [self._make_pools(spec) for spec in layer_specs]
        self._views: list[tuple[Tensor, ...]] = []
        self._closed = False
        self._refresh_views()

    @property
    def held_bytes(self) -> int:
        """Bytes of usable blocks. On a CPU the memory taken may be less: pages come as blocks are written."""
        return sum(pool.held_bytes for pools in self._pools for pool in pools)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, each [num_blocks, block_size, H_kv, D]; unwritten slots hold anything, even NaN."""
        return self._views[index][0], self._views[index][1]

    def scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """The scales of an int8 layer's K and V, each float32 [num_blocks, block_size, H_kv]; else None."""
        views = self._views[index]
        return (views[2], views[3]) if len(views) == 4 else (None, None)

    def read(self, index: int, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [num_tokens, H_kv, D] of a layer, of a sequence with these blocks ([M]); of int8 in float32."""
        return gather_sequence(*self.layer(index), block_table, num_tokens, *self.scales(index))

    def grow(self, num_blocks: int) -> int:
        """Makes at least `num_blocks` usable, or `max_blocks` if that is fewer. Old contents stay.

        Returns:
            The number of usable blocks, which is never above `max_blocks` and never less than before.

        Raises:
            KVCacheOutOfMemory: the budget has no room for a single block, or the system refused. What was usable
                still is.
        """
        if self._closed:
            raise RuntimeError("the KV cache is closed")
        target = min(num_blocks, self.max_blocks)
        if self.max_blocks == 0 and num_blocks > 0:
            raise KVCacheOutOfMemory(
                f"the KV budget of {self._budget_bytes} bytes is less than one block of {self.bytes_per_block} "
                "bytes; raise kv_cache_memory or lower block_size"
            )
        if target <= self.num_blocks:
            return self.num_blocks
        try:
            moved = [pool.resize(target) for pools in self._pools for pool in pools]
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            # Tensors which did grow keep their room: a smaller attempt finds it taken already.
            self._refresh_views()
            raise KVCacheOutOfMemory(
                f"could not take {(target - self.num_blocks) * self.bytes_per_block} more bytes of KV cache "
                f"({self.num_blocks} -> {target} blocks): {error}"
            ) from error
        self._set_usable(target, moved=any(moved))
        return target

    def shrink(self, num_blocks: int) -> None:
        """Gives back all blocks with ids from `num_blocks` on; contents of the others stay."""
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks}: must not be negative")
        if num_blocks >= self.num_blocks or self._closed:
            return
        moved = [pool.resize(num_blocks) for pools in self._pools for pool in pools]
        self._set_usable(num_blocks, moved=any(moved))

    def release(self) -> None:
        """Gives all memory back. The cache stays usable: `grow` starts again from nothing."""
        self.shrink(0)

    def close(self) -> None:
        """Gives all memory back for good. Reserved addresses go with the last tensor made from them."""
        self.release()
        self._views, self._pools, self._closed = [], [], True

    def write(self, block_table: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Writes keys and values, each [n, H_kv, D] a layer, into the first n slots of a sequence's blocks."""
        for views, pair in zip(self._views, layers, strict=True):
            device = views[0].device
            blocks = torch.tensor(block_table, dtype=torch.int64, device=device)
            offsets = torch.arange(self.block_size, device=device)
            slots = (blocks[:, None] * self.block_size + offsets).flatten()[: len(pair[0])]
            numbers: Sequence[Tensor] = pair
            if len(views) == 4:
                (keys, k_scales), (values, v_scales) = map(quantise, pair)
                numbers = keys, values, k_scales, v_scales
            for view, new in zip(views, numbers, strict=True):
                view.flatten(0, 1).index_copy_(0, slots, new)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], backend: str) -> None:
        """Copies block `src` to block `dst` in all layers, for each (src, dst) of `pairs`."""
        if not pairs:
            return
        # Before they are a tensor: each of its operations may hand the interpreter to another thread.
        named = list(itertools.chain.from_iterable(pairs))
        if min(named) < 0 or max(named) >= self.num_blocks:
            raise ValueError(f"copy_blocks: pairs {pairs!r} name blocks outside of 0..{self.num_blocks - 1}")
        indices = torch.tensor(pairs, dtype=torch.int64)
        on_device: dict[torch.device, Tensor] = {}
        for index in range(len(self._views)):
            k_cache, v_cache = self.layer(index)
            k_scales, v_scales = self.scales(index)
            if k_cache.device not in on_device:
                on_device[k_cache.device] = to_device(indices.t().contiguous(), k_cache.device)
            src, dst = on_device[k_cache.device]
            ops.copy_blocks(k_cache, v_cache, src, dst, k_scales=k_scales, v_scales=v_scales, backend=backend)

    def _make_pools(self, spec: LayerSpec) -> list[_HostPool | _DevicePool]:
        """Of K and V, then of their scales if they have them."""
        tokens = (self.block_size, spec.num_kv_heads)
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [((*tokens, spec.head_dim), spec.dtype)] * 2
        if spec.has_scales:
            kinds += [(tokens, torch.float32)] * 2
        if spec.device.type == "cpu":
            return [_HostPool(shape, dtype, self.max_blocks) for shape, dtype in kinds]
        return [_DevicePool(shape, dtype, spec.device) for shape, dtype in kinds]

    def _set_usable(self, num_blocks: int, *, moved: bool) -> None:
        self.num_blocks = num_blocks
        self.generation += moved
        self._refresh_views()

    def _refresh_views(self) -> None:
        # Made outside of inference mode, or a later call outside of it could not write to them.
        with torch.inference_mode(False):
            self._views = [tuple(p.view(self.num_blocks) for p in pools) for pools in self._pools]


class _HostPool:
    """One tensor of blocks in reserved address space.

    The tensor keeps the mapping alive and the mapping unmaps itself when it is dropped, so that a tensor which
    outlives the cache reads zeros and never unmapped memory. The mapping is private: a forked child gets a copy.
    """

    def __init__(self, block_shape: tuple[int, ...], dtype: torch.dtype, max_blocks: int) -> None:
        self._block_shape, self._dtype, self._max_blocks = block_shape, dtype, max_blocks
        self._block_bytes = torch.Size(block_shape).numel() * dtype.itemsize
        self._mapping: mmap.mmap | None = None
        self._tensor: Tensor | None = None
        self._num_blocks = 0

    @property
    def held_bytes(self) -> int:
        return self._num_blocks * self._block_bytes

    def resize(self, num_blocks: int) -> bool:
        """True if the storage moved, which here it does only when it comes into being."""
        created = self._mapping is None and num_blocks > 0
        if created:
            self._reserve()
        if num_blocks < self._num_blocks and self._mapping is not None:
            start = -(-num_blocks * self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if start < len(self._mapping):
                self._mapping.madvise(mmap.MADV_DONTNEED, start, len(self._mapping) - start)
        self._num_blocks = num_blocks
        return created

    def view(self, num_blocks: int) -> Tensor:
        if self._tensor is None:
            return torch.empty((0, *self._block_shape), dtype=self._dtype)
        return self._tensor[:num_blocks]

    def _reserve(self) -> None:
        size = self._max_blocks * self._block_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        mapping = mmap.mmap(-1, size, flags=flags)
        # A huge page would be taken whole for the first token of each tensor: 2 MiB times twice the layers.
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        with torch.inference_mode(False):
            flat = torch.frombuffer(mapping, dtype=self._dtype, count=size // self._dtype.itemsize)
            self._tensor = flat.view(self._max_blocks, *self._block_shape)
        self._mapping = mapping


class _DevicePool:
    """One tensor of blocks in device memory, replaced by another when its size changes."""

    def __init__(self, block_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._tensor = torch.empty((0, *block_shape), dtype=dtype, device=device)

    @property
    def held_bytes(self) -> int:
        return self._tensor.numel() * self._tensor.element_size()

    def resize(self, num_blocks: int) -> bool:
        """True if the storage moved."""
        old = self._tensor
        if num_blocks == old.shape[0]:
            return False
        kept = min(num_blocks, old.shape[0])
        with torch.inference_mode(False):
            self._tensor = old.new_empty((num_blocks, *old.shape[1:]))
            self._tensor[:kept].copy_(old[:kept])
        return True

    def view(self, num_blocks: int) -> Tensor:
        return self._tensor[:num_blocks]
