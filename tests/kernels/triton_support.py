"""What the tests of the Triton kernels share: where they run, poisoned caches, ragged steps, and their truth.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is first imported
(`tests/conftest.py` does it for the whole run). With one, the same tests run the compiled kernels.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

triton = pytest.importorskip("triton", reason="Triton is not installed (it is in the `test` extra)")

from hf_paged.kernels.metadata import PagedMetadata  # noqa: E402 - after the choice of the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

if not INTERPRETED and DEVICE.type == "cpu":
    raise RuntimeError("Triton kernels cannot run here: set TRITON_INTERPRET=1 before anything imports triton")
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
    """One layer's inputs of one step, on `DEVICE`; `keys` and `values` are what each sequence has seen, in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: PagedMetadata
    keys: list[Tensor]
    values: list[Tensor]


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
    width = max(1, max(-(-length // block_size) for length in seq_lens))
    num_blocks = 2 + width * len(seq_lens)
    order = torch.randperm(num_blocks - 1, generator=generator) + 1
    tables = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    shape = (num_blocks, block_size, kv_heads, head_size)
    k_cache, v_cache = (torch.full(shape, float("nan")) for _ in range(2))
    num_tokens = sum(query_lens)
    fused = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_size, generator=generator).to(dtype)
    query, key, value = fused.split([heads * head_size, kv_heads * head_size, kv_heads * head_size], dim=1)
    key, value = (x.view(num_tokens, kv_heads, head_size) for x in (key, value))
    slots = torch.full((num_tokens,), -1, dtype=torch.int64)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    keys, values, taken = [], [], 0
    for index, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        used = -(-seq_len // block_size)
        context = max(0, seq_len - query_len)
        # A shared block was filled before the step, by the first sequence too.
        shared = min(shared_blocks, context // block_size, (seq_lens[0] - query_lens[0]) // block_size)
        own = order[taken : taken + used].to(torch.int32)
        taken += used
        tables[index, :used] = own
        if index:
            tables[index, :shared] = tables[0, :shared]
        positions = torch.arange(seq_len)
        slot = tables[index, positions // block_size].long() * block_size + positions % block_size
        written = slice(shared * block_size if index else 0, context)
        for cache in (k_cache, v_cache):
            fresh = torch.randn(written.stop - written.start, kv_heads, head_size, generator=generator)
            cache.flatten(0, 1)[slot[written]] = fresh.to(dtype).float()
        new = slice(int(starts[index]), int(starts[index + 1]))
        if seq_len:
            slots[new] = slot[context:]
        keys.append(torch.cat([k_cache.flatten(0, 1)[slot[:context]], key[new].float()]))
        values.append(torch.cat([v_cache.flatten(0, 1)[slot[:context]], value[new].float()]))
    metadata = PagedMetadata(
        slot_mapping=slots.to(DEVICE),
        block_tables=tables.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        query_start_loc=starts.to(DEVICE),
        num_decodes=num_decodes,
        query_lens_list=list(query_lens),
        seq_lens_list=list(seq_lens),
    )
    fused = fused.to(DEVICE)
    query, key, value = fused.split([heads * head_size, kv_heads * head_size, kv_heads * head_size], dim=1)
    return Step(
        query.view(num_tokens, heads, head_size),
        key.view(num_tokens, kv_heads, head_size),
        value.view(num_tokens, kv_heads, head_size),
        k_cache.to(DEVICE, dtype),
        v_cache.to(DEVICE, dtype),
        metadata,
        keys,
        values,
    )


def exact_attention(
    step: Step, scale: float, sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """[T, H, D] float64 on the CPU: attention written without blocks, from what each sequence has seen."""
    query = step.query.double().cpu()
    heads, kv_heads = query.shape[1], step.key.shape[1]
    output = torch.zeros_like(query)
    start = 0
    lengths = zip(step.metadata.query_lens_list, step.metadata.seq_lens_list, strict=True)
    for index, (query_len, seq_len) in enumerate(lengths):
        rows = slice(start, start + query_len)
        start += query_len
        if seq_len == 0:
            continue
        keys, values = (x[index].double().repeat_interleave(heads // kv_heads, 1) for x in (step.keys, step.values))
        scores = torch.einsum("qhd,khd->hqk", query[rows], keys) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        distance = torch.arange(seq_len - query_len, seq_len)[:, None] - torch.arange(seq_len)
        hidden = (distance < 0) | (distance >= (sliding_window or seq_len + 1))
        scores = scores.masked_fill(hidden, float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.double().cpu()[:, None, None])
        output[rows] = torch.einsum("hqk,khd->qhd", (scores - total).exp(), values)
    return output


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
