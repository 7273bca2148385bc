"""The numbers of seeded streams, made on the device: Philox 4x64-10, bit for bit numpy's.

A stream is named by a key of two words; a row and a step name a place in it. Word w of a place is made from counter
(w // 4 + 1, step, row, 0), and token v takes half v % 2 of word v // 2, the low one first: what
`hf_paged.engine.draws.SeededDraws` makes on the host, where 128,000 tokens take a millisecond a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton_checks import check_dtype, check_tensors
from hf_paged.kernels.triton_launch import gpu_of, launch

__all__ = ["seeded_uniform"]

#: Counters a program takes; each makes eight tokens.
_BLOCK = 128


@triton.jit
def _round(c_0, c_1, c_2, c_3, k_0, k_1):
    """One round of Philox 4x64 on uint64 tensors."""
    multiplier_0 = tl.full(c_0.shape, 0xD2E7470EE14C6C93, tl.uint64)
    multiplier_1 = tl.full(c_0.shape, 0xCA5A826395121157, tl.uint64)
    high_0 = tl.umulhi(multiplier_0, c_0)
    high_1 = tl.umulhi(multiplier_1, c_2)
    return high_1 ^ c_1 ^ k_0, multiplier_1 * c_2, high_0 ^ c_3 ^ k_1, multiplier_0 * c_0


@triton.jit
def _store_word(p_row, o_word, b_word, V: tl.constexpr):
    """The two tokens of each word as float32 uniforms."""
    o_v = o_word * 2
    low = b_word.to(tl.uint32)
    high = (b_word >> 32).to(tl.uint32)
    tl.store(p_row + o_v, low.to(tl.float32) * 2.3283064365386963e-10, mask=o_v < V)
    tl.store(p_row + o_v + 1, high.to(tl.float32) * 2.3283064365386963e-10, mask=o_v + 1 < V)


@triton.jit
def seeded_uniform_kernel(
    p_out,  # [n, V] fp32
    p_places,  # [n, 4] int64: key, key, step, row
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (n, ceil(V / (8 * BLOCK)))."""
    i_row = tl.program_id(0).to(tl.int64)
    o_counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = (o_counter * 0).to(tl.uint64)
    p_place = p_places + i_row * 4
    k_0 = zeros + tl.load(p_place).to(tl.uint64, bitcast=True)
    k_1 = zeros + tl.load(p_place + 1).to(tl.uint64, bitcast=True)
    c_0 = (o_counter + 1).to(tl.uint64)
    c_1 = zeros + tl.load(p_place + 2).to(tl.uint64, bitcast=True)
    c_2 = zeros + tl.load(p_place + 3).to(tl.uint64, bitcast=True)
    c_3 = zeros
    step_0 = tl.full(c_0.shape, 0x9E3779B97F4A7C15, tl.uint64)
    step_1 = tl.full(c_0.shape, 0xBB67AE8584CAA73B, tl.uint64)
    for _i_round in tl.static_range(10):
        c_0, c_1, c_2, c_3 = _round(c_0, c_1, c_2, c_3, k_0, k_1)
        k_0 += step_0
        k_1 += step_1
    p_row = p_out + i_row * V
    _store_word(p_row, o_counter * 4, c_0, V)
    _store_word(p_row, o_counter * 4 + 1, c_1, V)
    _store_word(p_row, o_counter * 4 + 2, c_2, V)
    _store_word(p_row, o_counter * 4 + 3, c_3, V)


def seeded_uniform(places: Tensor, vocab: int) -> Tensor:
    """Uniforms in [0, 1] of each place: the 32 bits of a token, rounded to float32, times 2**-32.

    Args:
        places: [n, 4] int64: the two words of the key, the step and the row of each.
        vocab: tokens a place has.

    Returns:
        [n, vocab] float32.

    Raises:
        ValueError: an unsupported dtype, shape or GPU.
    """
    op = "seeded_uniform"
    gpu = gpu_of(op, places.device)
    check_tensors(op, places.device, places=places)
    check_dtype(op, "places", places, (torch.int64,))
    if places.dim() != 2 or places.shape[1] != 4 or not places.is_contiguous():
        raise ValueError(f"{op}: places of shape {tuple(places.shape)}; must be contiguous [n, 4]")
    if vocab < 1:
        raise ValueError(f"{op}: vocab={vocab}; must be at least 1")
    out = torch.empty(places.shape[0], vocab, dtype=torch.float32, device=places.device)
    block = 16 if gpu.arch == "interpreter" else _BLOCK
    grid = (places.shape[0], -(-vocab // (8 * block)))
    launch(
        seeded_uniform_kernel,
        grid,
        places.device,
        out,
        places,
        V=vocab,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return out
