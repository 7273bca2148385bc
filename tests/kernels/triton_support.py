"""What the tests of the Triton kernels share: where they run, poisoned caches, ragged steps, and their truth.

Without a GPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 chooses before Triton is first imported,
by us or by transformers: `tests/conftest.py` sets it. With a GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from hf_paged.kernels import reference
from hf_paged.kernels.metadata import PagedMetadata

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

if not INTERPRETED and DEVICE.type == "cpu":
    raise RuntimeError(
        "Triton kernels cannot run here: set TRITON_INTERPRET=1 before anything imports triton"
    )
if INTERPRETED and not isinstance(triton.language.max, triton.runtime.interpreter.InterpretedFunction):
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it in tests/conftest.py")


def _accept_numpy_24() -> None:
    """Triton 3.6 turns a loop bound of shape [1] into an int in a way which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


if INTERPRETED:
    _accept_numpy_24()


@dataclass
class Step:
    """One layer's inputs of one step, on `DEVICE`."""

    query: Tensor
    key: Tensor
    value: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: PagedMetadata


def make_step(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_decodes: int = 0,
    heads: int = 2,
    kv_heads: int = 1,
    head_size: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared_blocks: int = 0,
    seed: int = 0,
) -> Step:
    """A step with NaN in every slot that holds no token, blocks in random order, and queries cut from a fused QKV.

    A sequence of length 0 is padding: slot -1, an all-zero row of the table. The first `shared_blocks` blocks of all
    sequences are the same ones, as after a prefix hit.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(0, seq_len - new) for new, seq_len in zip(query_lens, seq_lens, strict=True)]
    width = max(1, max(-(-seq_len // block_size) for seq_len in seq_lens))
    num_blocks = 2 + width * len(seq_lens)
    blocks = 1 + torch.randperm(num_blocks - 1, generator=generator).to(torch.int32)
    tables = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    k_cache, v_cache = torch.full((2, num_blocks, block_size, kv_heads, head_size), float("nan"))
    slots = []
    for index, (context, seq_len) in enumerate(zip(contexts, seq_lens, strict=True)):
        used = -(-seq_len // block_size)
        tables[index, :used] = blocks[index * width : index * width + used]
        # A shared block was filled before the step, by the first sequence too.
        shared = min(shared_blocks, context // block_size, contexts[0] // block_size)
        tables[index, :shared] = tables[0, :shared]
        positions = torch.arange(seq_len)
        slot = tables[index, positions // block_size].long() * block_size + positions % block_size
        for cache in (k_cache, v_cache):
            fresh = torch.randn(context, kv_heads, head_size, generator=generator)
            cache.flatten(0, 1)[slot[:context]] = fresh
        slots.append(slot[context:] if seq_len else torch.full((query_lens[index],), -1))
    metadata = PagedMetadata(
        slot_mapping=torch.cat(slots).to(DEVICE),
        block_tables=tables.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        query_start_loc=torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int(),
        num_decodes=num_decodes,
        query_lens_list=list(query_lens),
        seq_lens_list=list(seq_lens),
    )
    fused = torch.randn(sum(query_lens), heads + 2 * kv_heads, head_size, generator=generator).to(
        DEVICE, dtype
    )
    qkv = fused.split([heads, kv_heads, kv_heads], dim=1)
    return Step(*qkv, k_cache.to(DEVICE, dtype), v_cache.to(DEVICE, dtype), metadata)


def exact_attention(
    step: Step, k_cache: Tensor | None = None, v_cache: Tensor | None = None, **options: Any
) -> Tensor:  # [T, H, D] float64
    """What the reference makes of the step in float64, or of caches given in full (new tokens stored already)."""
    slots = step.metadata.slot_mapping
    if k_cache is not None:
        slots = torch.full_like(slots, -1)
    metadata = dataclasses.replace(step.metadata, slot_mapping=slots, plan={})
    k_cache = step.k_cache if k_cache is None else k_cache
    v_cache = step.v_cache if v_cache is None else v_cache
    wide = [tensor.double() for tensor in (step.query, step.key, step.value, k_cache, v_cache)]
    return reference.paged_attention(*wide, metadata, **options)


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what the kernels' callers allocate with `torch.empty` with NaN: what is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within the dtype's tolerance, absolute and relative; NaN is never near."""
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), atol=tolerance, rtol=tolerance)
