"""The CPU backend's functions, as `hf_paged.kernels.ops` asks for them."""

from __future__ import annotations

from hf_paged.kernels.reference import copy_blocks, paged_attention, store_kv

__all__ = ["copy_blocks", "paged_attention", "store_kv"]
