"""What the ops of `hf_paged.kernels.ops` check before any work: errors name the op, the value and what is allowed."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata

__all__ = ["check_attention", "check_cache", "check_indices", "check_new_kv", "is_interpreted"]

MAX_HEAD_SIZE = 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE_DTYPES = (*_DTYPES, torch.float64)
_SUPPORTED = "float32, bfloat16, float16 (and float64 by the reference backend)"
_FP8 = torch.float8_e4m3fn
#: Cache dtypes that one backend alone has.
_CACHES_OF = {"reference": (torch.float64,), "triton": (_FP8,)}
_SUPPORTED_CACHES = (
    "float32, bfloat16, float16, int8 (float64 by the reference backend, float8_e4m3fn by the Triton one)"
)


def is_interpreted(kind: str) -> bool:
    """Whether Triton's interpreter runs the very kernels on tensors of the CPU."""
    return kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def check_cache(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    backend: str,
) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; "
            "both must be [N, B, H_kv, D]"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.device != v_cache.device:
        raise ValueError(f"{op}: k_cache and v_cache must have one dtype and one device")
    allowed = (*_DTYPES, torch.int8, *_CACHES_OF.get(backend, ()))
    if k_cache.dtype not in allowed:
        raise ValueError(f"{op}: k_cache of dtype {k_cache.dtype}; supported: {_SUPPORTED_CACHES}")
    _check_scales(op, k_cache, k_scales, v_scales)
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ValueError(f"{op}: k_cache and v_cache must be contiguous")
    kind = k_cache.device.type
    interpreted = backend == "triton" and is_interpreted(kind)
    if backend != "reference" and kind != {"cpu": "cpu", "triton": "cuda"}[backend] and not interpreted:
        raise ValueError(f"{op}: k_cache on device {k_cache.device}, which backend={backend!r} cannot read")
    if not 1 <= k_cache.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: head size {k_cache.shape[3]}; supported: 1 to {MAX_HEAD_SIZE}")


def _check_scales(op: str, k_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    shape = {torch.int8: k_cache.shape[:3], _FP8: k_cache.shape[2:3]}.get(k_cache.dtype)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if shape is None and scales is None:
            continue
        if shape is None or scales is None:
            found = "none" if scales is None else str(tuple(scales.shape))
            expected = "none" if shape is None else f"float32 {list(shape)}"
            raise ValueError(f"{op}: {name} {found} with a cache of {k_cache.dtype}; expected {expected}")
        if (scales.dtype, scales.shape) != (torch.float32, shape) or not scales.is_contiguous():
            raise ValueError(
                f"{op}: {name} of dtype {scales.dtype} and shape {tuple(scales.shape)} with a cache of "
                f"{k_cache.dtype}; expected contiguous float32 {list(shape)}"
            )
        if scales.device != k_cache.device:
            raise ValueError(
                f"{op}: {name} on device {scales.device}, k_cache on {k_cache.device}; must be one device"
            )


def check_new_kv(op: str, key: Tensor, value: Tensor, k_cache: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[0] != key.shape[0] or tensor.shape[1:] != k_cache.shape[2:]:
            raise ValueError(
                f"{op}: {name} of shape {tuple(tensor.shape)}; expected [T, H_kv, D] with "
                f"H_kv, D = {tuple(k_cache.shape[2:])} as in k_cache"
            )
        _check_packed(op, name, tensor, k_cache)
    if key.dtype != value.dtype:
        raise ValueError(f"{op}: key of dtype {key.dtype} with value of dtype {value.dtype}; must be equal")


def _check_packed(op: str, name: str, tensor: Tensor, k_cache: Tensor) -> None:
    if tensor.dtype not in _REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} of dtype {tensor.dtype}; supported: {_SUPPORTED}")
    if tensor.device != k_cache.device:
        raise ValueError(
            f"{op}: {name} on device {tensor.device}, k_cache on {k_cache.device}; must be one device"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(
            f"{op}: {name} with strides {tensor.stride()}; its last dimension must be contiguous"
        )


def check_indices(op: str, name: str, indices: Tensor, count: int, k_cache: Tensor) -> None:
    if indices.dtype != torch.int64 or indices.shape != (count,):
        raise ValueError(
            f"{op}: {name} of dtype {indices.dtype} and shape {tuple(indices.shape)}; expected int64 [{count}]"
        )
    if indices.device != k_cache.device:
        raise ValueError(
            f"{op}: {name} on device {indices.device}, k_cache on {k_cache.device}; must be one device"
        )


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    metadata: PagedMetadata,
    sliding_window: int | None,
    softcap: float | None,
    backend: str,
) -> None:
    """All layers of a step mostly look alike, and a full check costs as much as a small layer's attention."""
    plan = metadata.plan
    seen = (
        (query.shape, query.stride(), query.dtype, query.device),
        (key.shape, key.stride(), key.dtype, value.shape, value.stride(), value.dtype),
        (k_cache.shape, k_cache.dtype, k_cache.device, v_cache.shape, sliding_window, softcap, backend),
        None if k_scales is None else (k_scales.shape, k_scales.dtype),
        None if v_scales is None else (v_scales.shape, v_scales.dtype),
    )
    if plan.get("ops.checked") != seen:
        _check_step(
            query,
            key,
            value,
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            metadata,
            sliding_window,
            softcap,
            backend,
        )
        plan["ops.checked"] = seen


def _check_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    metadata: PagedMetadata,
    sliding_window: int | None,
    softcap: float | None,
    backend: str,
) -> None:
    op = "paged_attention"
    check_cache(op, k_cache, v_cache, k_scales, v_scales, backend)
    check_new_kv(op, key, value, k_cache)
    tokens, kv_heads, head_size = key.shape
    if query.dim() != 3 or query.shape[0] != tokens or query.shape[2] != head_size:
        raise ValueError(f"{op}: query of shape {tuple(query.shape)}; expected [{tokens}, H, {head_size}]")
    if query.shape[1] % kv_heads:
        raise ValueError(f"{op}: {query.shape[1]} query heads; must be a multiple of the {kv_heads} KV heads")
    _check_packed(op, "query", query, k_cache)
    if backend != "reference" and query.dtype not in _DTYPES:
        raise ValueError(f"{op}: query of dtype {query.dtype}; supported: {_SUPPORTED}")
    check_indices(op, "metadata.slot_mapping", metadata.slot_mapping, tokens, k_cache)
    num_seqs = metadata.num_seqs
    shapes = {"block_tables": (num_seqs, metadata.block_tables.shape[-1]), "seq_lens": (num_seqs,)}
    shapes["query_start_loc"] = (num_seqs + 1,)
    for name, shape in shapes.items():
        tensor = getattr(metadata, name)
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape or tensor.device != k_cache.device:
            raise ValueError(
                f"{op}: metadata.{name} of dtype {tensor.dtype}, shape {tuple(tensor.shape)}, "
                f"device {tensor.device}; expected int32 {list(shape)} on {k_cache.device}"
            )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{op}: sliding_window={sliding_window}; must be at least 1, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap={softcap}; must be above 0, or None")
