"""The front door of the kernels: three ops, one name each, dispatched by a backend's name.

    store_kv          write new keys and values into their slots
    paged_attention   store, then attend every new token to all keys of its sequence
    copy_blocks       copy whole blocks (copy-on-write)

A backend is a module with functions of the same names and signatures (less `backend`). It is imported the first
time it is asked for, so that importing this file imports neither numba nor triton. Arguments are checked here,
before any work; backends trust them. Knows no model, no request and no engine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata

__all__ = ["BACKENDS", "copy_blocks", "paged_attention", "resolve_backend", "store_kv"]

#: Name -> module. The module is imported at its first use.
BACKENDS = {
    "reference": "hf_paged.kernels.reference",
    "cpu": "hf_paged.kernels.cpu_backend",
    "triton": "hf_paged.kernels.triton_backend",
}

MAX_HEAD_SIZE = 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE_DTYPES = (*_DTYPES, torch.float64)
_SUPPORTED = "float32, bfloat16, float16 (and float64 by the reference backend)"


def store_kv(
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    slot_mapping: Tensor,  # [T] int64
    *,
    backend: str,
) -> None:
    """Writes each token's key and value into its slot, cast to the cache's dtype.

    Args:
        key, value: new keys and values; any strides with a contiguous last dimension.
        k_cache, v_cache: one layer's blocks, written in place.
        slot_mapping: block * B + offset of each token. A token whose slot is -1 is not stored.
        backend: "reference", "cpu" or "triton".

    Raises:
        ValueError: a shape, dtype, device or backend that is not supported.
    """
    module = _backend(backend)
    _check_cache("store_kv", k_cache, v_cache, backend)
    _check_new_kv("store_kv", key, value, k_cache)
    _check_indices("store_kv", "slot_mapping", slot_mapping, key.shape[0], k_cache)
    module.store_kv(key, value, k_cache, v_cache, slot_mapping)


def paged_attention(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    metadata: PagedMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
    backend: str,
) -> Tensor:
    """Stores the step's keys and values, then attends each new token to its sequence up to itself.

    Args:
        query, key, value: packed tokens of the step; any strides with a contiguous last dimension. Query head h
            reads KV head h // (H / H_kv).
        k_cache, v_cache: one layer's blocks, written in place.
        metadata: which token belongs to which sequence, slot and block.
        scale: factor on the dot products.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None sees all.
        softcap: scores become `softcap * tanh(score / softcap)` after scaling.
        sinks: one logit per query head which takes part in the softmax and has no value.
        backend: "reference", "cpu" or "triton".

    Returns:
        [T, H, D] in the query's dtype, contiguous. Rows of tokens that belong to no sequence are zero.

    Raises:
        ValueError: a shape, dtype, device, option or backend that is not supported.
    """
    module = _backend(backend)
    plan = metadata.plan
    # All layers of a step mostly look alike, and a full check costs as much as a small layer's attention.
    seen = (
        (query.shape, query.stride(), query.dtype, query.device),
        (key.shape, key.stride(), key.dtype, value.shape, value.stride(), value.dtype),
        (k_cache.shape, k_cache.dtype, k_cache.device, v_cache.shape, sliding_window, softcap, backend),
    )
    if plan.get("ops.checked") != seen:
        _check_attention(query, key, value, k_cache, v_cache, metadata, sliding_window, softcap, backend)
        plan["ops.checked"] = seen
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"paged_attention: sinks of shape {tuple(sinks.shape)}; expected [{query.shape[1]}]")
    return module.paged_attention(
        query,
        key,
        value,
        k_cache,
        v_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )


def copy_blocks(
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    src: Tensor,  # [n] int64
    dst: Tensor,  # [n] int64
    *,
    backend: str,
) -> None:
    """Copies block `src[i]` to block `dst[i]`, in K and V. All sources are read before any target is written.

    Raises:
        ValueError: a shape, dtype, device or backend that is not supported.
    """
    module = _backend(backend)
    _check_cache("copy_blocks", k_cache, v_cache, backend)
    _check_indices("copy_blocks", "src", src, src.shape[0], k_cache)
    _check_indices("copy_blocks", "dst", dst, src.shape[0], k_cache)
    module.copy_blocks(k_cache, v_cache, src, dst)


def resolve_backend(device: torch.device | str, requested: str = "auto") -> str:
    """The backend for tensors on `device`: "auto" is "cpu" on the CPU and "triton" on CUDA.

    Where the package behind an automatic choice is missing, the answer is "reference", with one warning. A forked child
    keeps "cpu": that backend then stays on one thread, which is safe, and faster than the reference.

    Raises:
        ValueError: an unknown backend, or one which cannot run on the device.
    """
    kind = torch.device(device).type
    if requested == "reference":
        return requested
    native = {"cpu": "cpu", "cuda": "triton"}.get(kind)
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: must be 'auto', {', '.join(map(repr, BACKENDS))}")
    if requested not in ("auto", native):
        raise ValueError(
            f"backend={requested!r}: cannot run on {kind!r}; supported there: {native!r}, 'reference'"
        )
    if native is None:
        return "reference"
    package = {"cpu": "numba", "triton": "triton"}[native]
    if importlib.util.find_spec(package) is None:
        if requested == "auto":
            _warn_once(f"{package} is not installed: attention uses the slow reference backend")
            return "reference"
        raise ValueError(f"backend={requested!r}: needs the package {package!r}, which is not installed")
    return native


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@functools.cache
def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    return importlib.import_module(BACKENDS[name])


def _check_cache(op: str, k_cache: Tensor, v_cache: Tensor, backend: str) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; "
            "both must be [N, B, H_kv, D]"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.device != v_cache.device:
        raise ValueError(f"{op}: k_cache and v_cache must have one dtype and one device")
    allowed = _REFERENCE_DTYPES if backend == "reference" else _DTYPES
    if k_cache.dtype not in allowed:
        raise ValueError(f"{op}: k_cache of dtype {k_cache.dtype}; supported: {_SUPPORTED}")
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ValueError(f"{op}: k_cache and v_cache must be contiguous")
    kind = k_cache.device.type
    # The Triton interpreter runs the very kernels on CPU tensors.
    interpreted = backend == "triton" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend != "reference" and kind != {"cpu": "cpu", "triton": "cuda"}[backend] and not interpreted:
        raise ValueError(f"{op}: k_cache on device {k_cache.device}, which backend={backend!r} cannot read")
    if not 1 <= k_cache.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: head size {k_cache.shape[3]}; supported: 1 to {MAX_HEAD_SIZE}")


def _check_new_kv(op: str, key: Tensor, value: Tensor, k_cache: Tensor) -> None:
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


def _check_indices(op: str, name: str, indices: Tensor, count: int, k_cache: Tensor) -> None:
    if indices.dtype != torch.int64 or indices.shape != (count,):
        raise ValueError(
            f"{op}: {name} of dtype {indices.dtype} and shape {tuple(indices.shape)}; expected int64 [{count}]"
        )
    if indices.device != k_cache.device:
        raise ValueError(
            f"{op}: {name} on device {indices.device}, k_cache on {k_cache.device}; must be one device"
        )


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: PagedMetadata,
    sliding_window: int | None,
    softcap: float | None,
    backend: str,
) -> None:
    op = "paged_attention"
    _check_cache(op, k_cache, v_cache, backend)
    _check_new_kv(op, key, value, k_cache)
    tokens, kv_heads, head_size = key.shape
    if query.dim() != 3 or query.shape[0] != tokens or query.shape[2] != head_size:
        raise ValueError(f"{op}: query of shape {tuple(query.shape)}; expected [{tokens}, H, {head_size}]")
    if query.shape[1] % kv_heads:
        raise ValueError(f"{op}: {query.shape[1]} query heads; must be a multiple of the {kv_heads} KV heads")
    _check_packed(op, "query", query, k_cache)
    if backend != "reference" and query.dtype not in _DTYPES:
        raise ValueError(f"{op}: query of dtype {query.dtype}; supported: {_SUPPORTED}")
    _check_indices(op, "metadata.slot_mapping", metadata.slot_mapping, tokens, k_cache)
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
