"""Steps for kernel tests: ragged sequences over permuted blocks, and NaN in every slot that must not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_paged.kernels import ops
from hf_paged.kernels.metadata import PagedMetadata


@dataclass
class PagedCase:
    """The arguments of one `paged_attention` call. `lengths` are (new tokens, all tokens) a sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    lengths: list[tuple[int, int]]

    def metadata(self) -> PagedMetadata:
        query_lens = [new for new, _ in self.lengths]
        seq_lens = [total for _, total in self.lengths]
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        tables = self.block_tables
        return PagedMetadata(
            self.slot_mapping,
            tables,
            torch.tensor(seq_lens, dtype=torch.int32),
            starts,
            num_decodes,
            query_lens,
            seq_lens,
        )

    def run(self, backend: str, *, metadata: PagedMetadata | None = None, **options: object) -> Tensor:
        """Output of `backend`; the caches of the case are written."""
        options.setdefault("scale", self.query.shape[-1] ** -0.5)
        metadata = metadata or self.metadata()
        tensors = (self.query, self.key, self.value, self.k_cache, self.v_cache)
        return ops.paged_attention(*tensors, metadata, backend=backend, **options)

    def copy(self, dtype: torch.dtype | None = None) -> PagedCase:
        """The same numbers in tensors of their own, as `dtype`."""
        names = ("query", "key", "value", "k_cache", "v_cache")
        return replace(self, **{name: getattr(self, name).to(dtype, copy=True) for name in names})

    def truth(self, **options: object) -> Tensor:
        """What float64 says of these very numbers."""
        if options.get("sinks") is not None:
            options["sinks"] = options["sinks"].double()
        return self.copy(torch.float64).run("reference", **options)


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    kv_heads: int = 2,
    group: int = 1,
    head_size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared_blocks: int = 0,
    fused: bool = True,
    seed: int = 0,
) -> PagedCase:
    """A step of sequences given as (new tokens, all tokens), those with one new token first.

    Blocks are permuted over the pool; the first `shared_blocks` blocks are the same for all sequences (where they are
    cached); every other slot is NaN. With `fused`, query, key and value are slices of one tensor.
    """
    rng = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths, key=lambda pair: pair[0] != 1)
    num_blocks = [-(-total // block_size) for _, total in lengths]
    pool = sum(num_blocks) + shared_blocks + 3
    ids = torch.randperm(pool, generator=rng).tolist()
    shape = (pool, block_size, kv_heads, head_size)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    tables = torch.zeros(len(lengths), max(num_blocks, default=0) + 2, dtype=torch.int32)
    shared = [ids.pop() for _ in range(shared_blocks)]
    slots: list[int] = []
    for index, (new, total) in enumerate(lengths):
        usable = min(len(shared), (total - new) // block_size)
        blocks = shared[:usable] + [ids.pop() for _ in range(num_blocks[index] - usable)]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(total):
            block, offset = blocks[position // block_size], position % block_size
            if position < total - new:
                for cache in (k_cache, v_cache):
                    cache[block, offset] = torch.randn(kv_heads, head_size, generator=rng).to(dtype)
            else:
                slots.append(block * block_size + offset)
    tokens, heads = len(slots), kv_heads * group
    if fused:
        packed = torch.randn(tokens, (heads + 2 * kv_heads) * head_size, generator=rng).to(dtype)
        parts = packed.split([heads * head_size, kv_heads * head_size, kv_heads * head_size], dim=1)
        query, key, value = (part.unflatten(1, (-1, head_size)) for part in parts)
    else:
        # As after `view(...).transpose(1, 2)`: heads are the outer axis in memory.
        sizes = (heads, kv_heads, kv_heads)
        made = [torch.randn(size, tokens, head_size, generator=rng).to(dtype) for size in sizes]
        query, key, value = (part.transpose(0, 1) for part in made)
    return PagedCase(
        query, key, value, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64), tables, lengths
    )


def sdpa_error(case: PagedCase, truth: Tensor) -> float:
    """Largest error of torch's own SDPA, in the case's dtype, on the same sequences: the yardstick for 16 bits."""
    worst, start = 0.0, 0
    filled = case.copy()
    filled.run("reference")
    heads, kv_heads = case.query.shape[1], case.key.shape[1]
    for index, (new, total) in enumerate(case.lengths):
        blocks = filled.block_tables[index, : -(-total // filled.k_cache.shape[1])]
        keys, values = (
            cache[blocks].flatten(0, 1)[:total].repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
            for cache in (filled.k_cache, filled.v_cache)
        )
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        rows = slice(start, start + new)
        query = case.query[rows].transpose(0, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        worst = max(worst, (output.transpose(0, 1).double() - truth[rows]).abs().max().item())
        start += new
    return worst
