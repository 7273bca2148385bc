"""The front door of the kernels: four ops, one name each, dispatched by a backend's name.

    store_kv                write new keys and values into their slots
    paged_attention         store, then attend every new token to all keys of its sequence
    rotary_paged_attention  rotate queries and keys by their positions, then the same (reference and triton)
    copy_blocks             copy whole blocks (copy-on-write)

A backend is a module with functions of the same names and signatures (less `backend`). It is imported the first
time it is asked for, so that importing this file imports neither numba nor triton. Arguments are checked here,
before any work; backends trust them. Knows no model, no request and no engine.

A cache narrower than the model comes with `k_scales` and `v_scales`, both float32: of int8 one a token and KV head,
[N, B, H_kv], which storing computes and writes (see `quantised`); of float8_e4m3fn (Triton only) one a KV head, [H_kv],
which is given and read.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.op_checks import (
    check_attention,
    check_cache,
    check_indices,
    check_new_kv,
    is_interpreted,
)

__all__ = [
    "BACKENDS",
    "copy_blocks",
    "paged_attention",
    "resolve_backend",
    "rotary_paged_attention",
    "store_kv",
]

#: Name -> module. The module is imported at its first use.
BACKENDS = {
    "reference": "hf_paged.kernels.reference",
    "cpu": "hf_paged.kernels.cpu_backend",
    "triton": "hf_paged.kernels.triton_backend",
}


def store_kv(
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    slot_mapping: Tensor,  # [T] int64
    *,
    k_scales: Tensor | None = None,  # [N, B, H_kv], or [H_kv]
    v_scales: Tensor | None = None,
    backend: str,
) -> None:
    """Writes each token's key and value into its slot, cast or quantised to the cache's dtype.

    Args:
        key, value: new keys and values; any strides with a contiguous last dimension.
        k_cache, v_cache: one layer's blocks, written in place.
        slot_mapping: block * B + offset of each token. A token whose slot is -1 is not stored.
        k_scales, v_scales: of an int8 or fp8 cache; see above.
        backend: "reference", "cpu" or "triton".

    Raises:
        ValueError: a shape, dtype, device or backend that is not supported.
    """
    module = _backend(backend)
    check_cache("store_kv", k_cache, v_cache, k_scales, v_scales, backend)
    check_new_kv("store_kv", key, value, k_cache)
    check_indices("store_kv", "slot_mapping", slot_mapping, key.shape[0], k_cache)
    module.store_kv(key, value, k_cache, v_cache, slot_mapping, k_scales=k_scales, v_scales=v_scales)


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
    k_scales: Tensor | None = None,  # [N, B, H_kv], or [H_kv]
    v_scales: Tensor | None = None,
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
        k_scales, v_scales: of an int8 or fp8 cache; see above. The step's own keys are read as they were stored.
        backend: "reference", "cpu" or "triton".

    Returns:
        [T, H, D] in the query's dtype, contiguous. Rows of tokens that belong to no sequence are zero.

    Raises:
        ValueError: a shape, dtype, device, option or backend that is not supported.
    """
    module = _backend(backend)
    check_attention(
        query, key, value, k_cache, v_cache, k_scales, v_scales, metadata, sliding_window, softcap, backend
    )
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
        k_scales=k_scales,
        v_scales=v_scales,
    )


def rotary_paged_attention(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    cos: Tensor,  # [T, R]
    sin: Tensor,  # [T, R]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    metadata: PagedMetadata,
    *,
    scale: float,
    k_scales: Tensor | None = None,  # [N, B, H_kv], or [H_kv]
    v_scales: Tensor | None = None,
    backend: str,
) -> Tensor:
    """`paged_attention` of queries and keys that are still to be rotated by their positions (RoPE, LLaMA's halves).

    Args:
        query, key, value, k_cache, v_cache, metadata, scale, k_scales, v_scales: as for `paged_attention`.
        cos, sin: of each token's angles, as LLaMA makes them: the second half repeats the first. The first R elements
            of a head are rotated.
        backend: "reference" or "triton"; the CPU's kernels rotate apart.

    Returns:
        [T, H, D] in the query's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or backend that is not supported.
    """
    op = "rotary_paged_attention"
    if backend not in ("reference", "triton"):
        raise ValueError(f"{op}: backend={backend!r}; must be 'reference' or 'triton'")
    module = _backend(backend)
    check_attention(query, key, value, k_cache, v_cache, k_scales, v_scales, metadata, None, None, backend)
    rotated = cos.shape[-1]
    if cos.shape != (key.shape[0], rotated) or sin.shape != cos.shape:
        raise ValueError(
            f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [{key.shape[0]}, R]"
        )
    if rotated % 2 or rotated > key.shape[2]:
        raise ValueError(
            f"{op}: {rotated} rotated elements; must be even and at most the head size {key.shape[2]}"
        )
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    return module.rotary_paged_attention(
        query, key, value, cos, sin, k_cache, v_cache, metadata, scale=scale, **scales
    )


def copy_blocks(
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    src: Tensor,  # [n] int64
    dst: Tensor,  # [n] int64
    *,
    k_scales: Tensor | None = None,  # [N, B, H_kv], or [H_kv]
    v_scales: Tensor | None = None,
    backend: str,
) -> None:
    """Copies block `src[i]` to block `dst[i]`, in K and V and an int8 cache's scales.

    All sources are read before any target is written.

    Raises:
        ValueError: a shape, dtype, device or backend that is not supported.
    """
    module = _backend(backend)
    check_cache("copy_blocks", k_cache, v_cache, k_scales, v_scales, backend)
    check_indices("copy_blocks", "src", src, src.shape[0], k_cache)
    check_indices("copy_blocks", "dst", dst, src.shape[0], k_cache)
    module.copy_blocks(k_cache, v_cache, src, dst, k_scales=k_scales, v_scales=v_scales)


def resolve_backend(device: torch.device | str, requested: str = "auto") -> str:
    """The backend for tensors on `device`: "auto" is "cpu" on the CPU and "triton" on CUDA.

    With TRITON_INTERPRET=1 in the environment "triton" may be asked for on the CPU, to try it without a GPU.

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
    if requested == "triton" and is_interpreted(kind):
        native = requested
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
