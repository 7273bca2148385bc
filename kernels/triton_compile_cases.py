"""The calls that are compiled ahead of time: each op in the shapes of the supported families, on storage-less tensors.

Names read op/shape/variant. A call goes through the op's public function under `triton_launch.recording`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.triton_activation import gelu, silu_mul
from hf_paged.kernels.triton_copy_blocks import copy_blocks
from hf_paged.kernels.triton_layer_norm import layer_norm
from hf_paged.kernels.triton_lora import LoraTable, lora_add_table_
from hf_paged.kernels.triton_paged_decode import paged_decode
from hf_paged.kernels.triton_paged_prefill import paged_prefill
from hf_paged.kernels.triton_rms_norm import rms_norm
from hf_paged.kernels.triton_sample import Penalties, sample
from hf_paged.kernels.triton_seeded_uniform import seeded_uniform
from hf_paged.kernels.triton_store_kv import store_kv
from hf_paged.kernels.triton_store_kv_rope import store_kv_rope

__all__ = ["CASES"]

_BF16 = torch.bfloat16
_NUM_BLOCKS, _BLOCK_SIZE, _TABLE_WIDTH = 4096, 16, 512


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and head size of a family."""

    heads: int
    kv_heads: int
    head_size: int


FAMILIES = {
    "gpt2": Heads(12, 12, 64),
    "gpt2-xl": Heads(25, 25, 64),
    "bigcode-16": Heads(16, 1, 128),
    "bigcode-48": Heads(48, 1, 128),
    "llama-32-4x64": Heads(32, 4, 64),
    "llama-32-8x128": Heads(32, 8, 128),
    "llama-32-32x128": Heads(32, 32, 128),
    # No family of ours, but supported: padded heads and the largest.
    "odd-8-2x80": Heads(8, 2, 80),
    "odd-8-4x256": Heads(8, 4, 256),
    "odd-32-1x256": Heads(32, 1, 256),
}

#: Those with other caches and options too: one of few rows, one of many, one between.
_EVERY_VARIANT = ("gpt2", "bigcode-48", "llama-32-8x128")

#: Variant -> (dtype of the model, dtype of the cache, options of attention)
VARIANTS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "bf16": (_BF16, _BF16, {}),
    "fp32": (torch.float32, torch.float32, {}),
    "window": (_BF16, _BF16, {"sliding_window": 1024}),
    "softcap-sinks": (_BF16, _BF16, {"softcap": 50.0, "sinks": True}),
    "int8": (_BF16, torch.int8, {}),
    "fp8": (_BF16, torch.float8_e4m3fn, {}),
}


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _fused_qkv(tokens: int, shape: Heads, dtype: torch.dtype = _BF16) -> list[Tensor]:
    """Query, key and value as views into one projection's output."""
    widths = [shape.heads * shape.head_size, *[shape.kv_heads * shape.head_size] * 2]
    return [
        part.view(tokens, -1, shape.head_size)
        for part in _meta(tokens, sum(widths), dtype=dtype).split(widths, dim=1)
    ]


def _caches(shape: Heads, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """K and V blocks and their scales."""
    k_cache, v_cache = (
        _meta(_NUM_BLOCKS, _BLOCK_SIZE, shape.kv_heads, shape.head_size, dtype=dtype) for _ in range(2)
    )
    dims = {
        torch.int8: (_NUM_BLOCKS, _BLOCK_SIZE, shape.kv_heads),
        torch.float8_e4m3fn: (shape.kv_heads,),
    }.get(dtype)
    scales = {name: _meta(*dims, dtype=torch.float32) if dims else None for name in ("k_scales", "v_scales")}
    return k_cache, v_cache, scales


def _metadata(num_decodes: int, query_lens: list[int]) -> PagedMetadata:
    num_seqs = len(query_lens)
    return PagedMetadata(
        slot_mapping=_meta(sum(query_lens), dtype=torch.int64),
        block_tables=_meta(num_seqs, _TABLE_WIDTH, dtype=torch.int32),
        seq_lens=_meta(num_seqs, dtype=torch.int32),
        query_start_loc=_meta(num_seqs + 1, dtype=torch.int32),
        num_decodes=num_decodes,
        query_lens_list=query_lens,
        seq_lens_list=[4096] * num_seqs,
    )


def _attention(
    shape: Heads, variant: str, op: Callable[..., None], num_decodes: int, query_lens: list[int]
) -> None:
    dtype, cache_dtype, options = VARIANTS[variant]
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = _meta(shape.heads)
    tokens = sum(query_lens)
    query = _fused_qkv(tokens, shape, dtype)[0]
    k_cache, v_cache, scales = _caches(shape, cache_dtype)
    metadata = _metadata(num_decodes, query_lens)
    output = _meta(*query.shape, dtype=dtype)
    op(output, query, k_cache, v_cache, metadata, scale=shape.head_size**-0.5, **options, **scales)


def _decode(shape: Heads, variant: str) -> None:
    _attention(shape, variant, paged_decode, 32, [1] * 32)


def _prefill(shape: Heads, variant: str) -> None:
    _attention(shape, variant, paged_prefill, 0, [512, 37])


def _store(shape: Heads, variant: str) -> None:
    k_cache, v_cache, scales = _caches(shape, VARIANTS[variant][1])
    _, key, value = _fused_qkv(64, shape)
    store_kv(key, value, k_cache, v_cache, _meta(64, dtype=torch.int64), **scales)


def _store_rope(shape: Heads, variant: str) -> None:
    k_cache, v_cache, scales = _caches(shape, VARIANTS[variant][1])
    query, key, value = _fused_qkv(64, shape)
    angles = _meta(64, shape.head_size)
    store_kv_rope(query, key, value, angles, angles, k_cache, v_cache, _meta(64, dtype=torch.int64), **scales)


def _copy(shape: Heads, variant: str) -> None:
    k_cache, v_cache, scales = _caches(shape, VARIANTS[variant][1])
    copy_blocks(k_cache, v_cache, _meta(8, dtype=torch.int64), _meta(8, dtype=torch.int64), **scales)


def _rms_norm(width: int) -> None:
    rms_norm(_meta(64, width), _meta(width), 1e-6, _meta(64, width))


def _layer_norm(width: int) -> None:
    layer_norm(_meta(64, width), _meta(width), _meta(width), 1e-5, _meta(64, width))


def _silu_mul(width: int) -> None:
    silu_mul(*_meta(64, 2 * width).chunk(2, dim=1))


def _gelu(width: int, approximate: Literal["none", "tanh"]) -> None:
    gelu(_meta(64, width), approximate)


def _lora(width: int, columns: int, dtype: torch.dtype, adapters: torch.dtype, rows: int, rank: int) -> None:
    table = LoraTable.empty(16, rows, rank, adapters, "meta")
    lora_add_table_(_meta(64, columns, dtype=dtype), _meta(64, width, dtype=dtype), table)


def _seeded_uniform(vocab: int) -> None:
    seeded_uniform(torch.empty(64, 4, dtype=torch.int64, device="meta"), vocab)


def _sample(vocab: int, everything: bool) -> None:
    rows = 32
    row, longs = _meta(rows, dtype=torch.float32), _meta(rows, dtype=torch.int64)
    logits = _meta(rows, vocab)
    if not everything:
        sample(logits, row, longs, longs)
        return
    penalties = Penalties(
        row,
        row,
        row,
        prompt_mask=_meta(64, vocab, dtype=torch.bool),
        counts=_meta(64, vocab, dtype=torch.int32),
        state_rows=_meta(rows, dtype=torch.int32),
    )
    top_k = _meta(rows, dtype=torch.int32)
    sample(logits, row, longs, longs, top_k=top_k, top_p=row, min_p=row, penalties=penalties)


def _all_cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}
    for family, shape in FAMILIES.items():
        for variant in VARIANTS if family in _EVERY_VARIANT else ("bf16",):
            cases[f"paged_decode/{family}/{variant}"] = functools.partial(_decode, shape, variant)
            cases[f"paged_prefill/{family}/{variant}"] = functools.partial(_prefill, shape, variant)
            if variant in ("bf16", "int8", "fp8"):
                cases[f"store_kv/{family}/{variant}"] = functools.partial(_store, shape, variant)
                if family.startswith("llama"):
                    cases[f"store_kv_rope/{family}/{variant}"] = functools.partial(
                        _store_rope, shape, variant
                    )
    cases["copy_blocks/llama-32-8x128/int8"] = functools.partial(_copy, FAMILIES["llama-32-8x128"], "int8")
    for width in (2048, 4096):
        cases[f"rms_norm/{width}/bf16"] = functools.partial(_rms_norm, width)
    for width in (768, 1600, 6144):
        cases[f"layer_norm/{width}/bf16"] = functools.partial(_layer_norm, width)
    cases["silu_mul/14336/bf16"] = functools.partial(_silu_mul, 14336)
    cases["gelu/3072/none"] = functools.partial(_gelu, 3072, "none")
    cases["gelu/3072/tanh"] = functools.partial(_gelu, 3072, "tanh")
    for name, rows in (("decode", 16), ("prefill", 512)):
        for width, columns in ((768, 2304), (4096, 14336)):
            for kind, types in (("bf16", (_BF16, _BF16)), ("bf16-fp32", (_BF16, torch.float32))):
                cases[f"lora/{width}-{columns}/{name}-{kind}"] = functools.partial(
                    _lora, width, columns, *types, rows, 16
                )
        cases[f"lora/4096-4096/{name}-rank-64"] = functools.partial(_lora, 4096, 4096, _BF16, _BF16, rows, 64)
        cases[f"lora/4096-4096/{name}-rank-4"] = functools.partial(_lora, 4096, 4096, _BF16, _BF16, rows, 4)
    for vocab in (50257, 128256):
        cases[f"seeded_uniform/{vocab}"] = functools.partial(_seeded_uniform, vocab)
        cases[f"sample/{vocab}/plain"] = functools.partial(_sample, vocab, False)
        cases[f"sample/{vocab}/everything"] = functools.partial(_sample, vocab, True)
    return cases


#: Name -> a call that records its launches.
CASES = _all_cases()
