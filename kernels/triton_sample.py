"""Choose the next token of each row on the device: penalties, temperature, top-k, top-p, min-p, greedy or a draw.

No sort and no word to the host. The thresholds of top-k and top-p are found digit by digit over the bits of the
logits, which order like integers: 16 passes of two bits end at the exact value, whatever the distribution. The draw
is an exponential race with counter-based noise (Philox of seed, position and token): a row's token depends on its
own logits, seed and position only. Ties with the threshold are all kept, as upstream's top-k keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton_checks import check_dtype, check_tensors
from hf_paged.kernels.triton_launch import gpu_of, launch

__all__ = ["Penalties", "sample"]

#: Tokens a program looks at together; 2,048 cost registers and bring nothing.
_BLOCK = 1024


@dataclass(frozen=True)
class Penalties:
    """Penalties of S rows, and the R rows of state they look at. 1, 0 and 0 switch a row's penalties off."""

    repetition: (
        Tensor  # [S] float32: logits of tokens seen in prompt or output are divided (if < 0 multiplied) by it
    )
    presence: Tensor  # [S] float32: subtracted from the logits of generated tokens
    frequency: Tensor  # [S] float32: subtracted once for each time a token was generated
    prompt_mask: Tensor  # [R, V] bool: tokens of the prompt
    counts: Tensor  # [R, V] int32: how often each token was generated; the chosen one is counted here
    state_rows: Tensor | None = None  # [S] int32: which row of state each row has; None: its own number


@triton.jit
def _ordered(b_x):
    """uint32 keys that order like the float32 b_x; -0 and 0 are equal."""
    b_bits = (b_x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((b_bits >> 31) == 1, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)


@triton.jit
def _penalise(
    b_x, p_prompt, p_counts, o_v, m_v, repetition, presence, frequency
):  # [BLOCK] logits of tokens o_v; pointers advanced to the row of state
    b_count = tl.load(p_counts + o_v, mask=m_v, other=0)
    b_seen = (b_count > 0) | (tl.load(p_prompt + o_v, mask=m_v, other=0) > 0)
    b_x = tl.where(b_seen, tl.where(b_x < 0.0, b_x * repetition, b_x / repetition), b_x)
    return b_x - frequency * b_count.to(tl.float32) - tl.where(b_count > 0, presence, 0.0)


@triton.jit
def _threshold(
    p_x,  # [V] fp32 scaled logits of one row
    x_max,
    floor,  # uint32: keys below are not measured
    target,  # fp32: a number of tokens, or a share of the mass that is measured
    V: tl.constexpr,
    MASS: tl.constexpr,  # measure the sum of exp(x - x_max), else count
    BLOCK: tl.constexpr,
):
    """The largest uint32 key t such that the tokens with keys of at least t measure at least `target`."""
    if MASS:
        total = 0.0
        for i_v in range(0, V, BLOCK):
            o_v = i_v + tl.arange(0, BLOCK)
            b_x = tl.load(p_x + o_v, mask=o_v < V, other=float("-inf"))
            total += tl.sum(tl.where(_ordered(b_x) >= floor, tl.exp(b_x - x_max), 0.0), axis=0)
        target = target * total
    key = tl.full((), 0, tl.uint32)
    for i_digit in range(16):
        shift = (tl.full((), 30, tl.int32) - 2 * i_digit).to(tl.uint32)
        b_pivot = key | (tl.arange(0, 4).to(tl.uint32) << shift)
        b_sum = tl.zeros([4], dtype=tl.float32)
        for i_v in range(0, V, BLOCK):
            o_v = i_v + tl.arange(0, BLOCK)
            m_v = o_v < V
            b_x = tl.load(p_x + o_v, mask=m_v, other=float("-inf"))
            b_key = _ordered(b_x)
            if MASS:
                b_w = tl.exp(b_x - x_max)
            else:
                b_w = tl.full([BLOCK], 1.0, dtype=tl.float32)
            b_w = tl.where(m_v & (b_key >= floor), b_w, 0.0)
            b_sum += tl.sum(tl.where(b_key[:, None] >= b_pivot[None, :], b_w[:, None], 0.0), axis=0)
        # The measure falls with the pivot; digit 0 always passes.
        digit = tl.sum(((b_sum >= target) & (tl.arange(0, 4) > 0)).to(tl.uint32), axis=0)
        key = key | (digit.to(tl.uint32) << shift)
    return key


@triton.jit
def _log_exponential(i_first, seed, position, BLOCK: tl.constexpr):
    """[BLOCK] logarithms of standard exponential variates for the tokens from i_first, a multiple of 4."""
    o_four = (i_first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    b_low = (position & 0xFFFFFFFF).to(tl.uint32) + o_four * 0
    b_high = (position >> 32).to(tl.uint32) + o_four * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_four, b_low, b_high, o_four * 0)
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BLOCK])
    b_u = (b_bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Winners of the race have small variates: -log(1 - u) there by its series, or their tail would be 24 bits coarse.
    b_e = tl.where(b_u < 1e-3, b_u * (1.0 + b_u * (0.5 + b_u * 0.33333334)), -tl.log(1.0 - b_u))
    return tl.log(b_e)


@triton.jit
def _draw(p_x, x_max, floor, min_p, seed, position, V: tl.constexpr, BLOCK: tl.constexpr):
    """int32 token drawn by softmax of the logits whose keys reach `floor` and whose odds to the best reach min_p."""
    best = float("-inf")
    token = 0
    for i_v in range(0, V, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        m_v = o_v < V
        b_x = tl.load(p_x + o_v, mask=m_v, other=float("-inf"))
        m_keep = m_v & (_ordered(b_x) >= floor) & (tl.exp(b_x - x_max) >= min_p)
        # After top-k or top-p most stretches of the vocabulary hold nothing: spare them the noise.
        if tl.max(m_keep.to(tl.int32), axis=0) > 0:
            b_race = tl.where(m_keep, b_x - _log_exponential(i_v, seed, position, BLOCK), float("-inf"))
            b_best, b_token = tl.max(b_race, axis=0, return_indices=True)
            token = tl.where(b_best > best, i_v + b_token, token)
            best = tl.maximum(best, b_best)
    return token


@triton.jit
def sample_kernel(
    p_token,  # [S] int64
    p_work,  # [S, V] fp32 scratch
    p_logits,  # [S, V]
    p_temperature,  # [S] fp32
    p_seed,  # [S] int64
    p_position,  # [S] int64
    p_top_k,  # [S] int32, or None
    p_top_p,  # [S] fp32, or None
    p_min_p,  # [S] fp32, or None
    p_repetition,  # [S] fp32, or None: no penalties at all
    p_presence,
    p_frequency,
    p_prompt,  # [R, V] uint8
    p_counts,  # [R, V] int32
    p_state_rows,  # [S] int32, or None
    stride_logits,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S,): a row a program."""
    i_s = tl.program_id(0).to(tl.int64)
    temperature = tl.load(p_temperature + i_s)
    divisor = tl.where(temperature > 0.0, temperature, 1.0)
    p_x = p_work + i_s * V
    if p_repetition is not None:
        i_state = i_s
        if p_state_rows is not None:
            i_state = tl.load(p_state_rows + i_s).to(tl.int64)
        p_prompt += i_state * V
        p_counts += i_state * V
        repetition = tl.load(p_repetition + i_s)
        presence = tl.load(p_presence + i_s)
        frequency = tl.load(p_frequency + i_s)
    x_max = float("-inf")
    token = 0
    for i_v in range(0, V, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        m_v = o_v < V
        b_x = tl.load(p_logits + i_s * stride_logits + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        if p_repetition is not None:
            b_x = _penalise(b_x, p_prompt, p_counts, o_v, m_v, repetition, presence, frequency)
        b_x = b_x / divisor
        tl.store(p_x + o_v, b_x, mask=m_v)
        b_best, b_token = tl.max(b_x, axis=0, return_indices=True)
        token = tl.where(b_best > x_max, i_v + b_token, token)
        x_max = tl.maximum(x_max, b_best)
    # Other threads of the program read what these wrote.
    tl.debug_barrier()

    if temperature > 0.0:
        floor = tl.full((), 0, tl.uint32)
        if p_top_k is not None:
            top_k = tl.load(p_top_k + i_s)
            if (top_k > 0) & (top_k < V):
                floor = _threshold(p_x, x_max, floor, top_k.to(tl.float32), V, False, BLOCK)
        if p_top_p is not None:
            top_p = tl.load(p_top_p + i_s)
            if top_p < 1.0:
                key = _threshold(p_x, x_max, floor, top_p, V, True, BLOCK)
                # At least the best token stays, whatever top_p says and however the sums are rounded.
                floor = tl.maximum(floor, tl.minimum(key, _ordered(x_max)))
        min_p = 0.0
        if p_min_p is not None:
            min_p = tl.load(p_min_p + i_s)
        token = _draw(p_x, x_max, floor, min_p, tl.load(p_seed + i_s), tl.load(p_position + i_s), V, BLOCK)
    tl.store(p_token + i_s, token.to(tl.int64))
    if p_repetition is not None:
        tl.store(p_counts + token, tl.load(p_counts + token) + 1)


def sample(
    logits: Tensor,  # [S, V]
    temperature: Tensor,  # [S] float32
    seeds: Tensor,  # [S] int64
    positions: Tensor,  # [S] int64
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalties: Penalties | None = None,
) -> Tensor:
    """Chooses one token a row. The order is upstream's: penalties, temperature, top-k, top-p, min-p.

    Args:
        logits: any row stride; left as they are.
        temperature: 0 takes the largest penalised logit (the first of equals) and skips the rest.
        seeds, positions: name the noise of a row's draw.
        top_k: [S] int32; below 1 or at least V keeps all.
        top_p: [S] float32; 1 keeps all.
        min_p: [S] float32; 0 keeps all.
        penalties: state of at least V tokens a row; `penalties.counts` is updated with the tokens chosen. No two rows
            may share a row of state.

    Returns:
        [S] int64.

    Raises:
        ValueError: an unsupported dtype, shape, GPU or mix of devices.
    """
    op = "sample"
    gpu_of(op, logits.device)
    check_dtype(op, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"{op}: logits of shape {tuple(logits.shape)}; must be [S, V]")
    num_rows, vocab = logits.shape
    check_tensors(op, logits.device, logits=logits)
    floats, longs = (torch.float32,), (torch.int64,)
    _check_row(op, logits, floats, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_row(op, logits, longs, seeds=seeds, positions=positions)
    _check_row(op, logits, (torch.int32,), top_k=top_k)
    state: tuple[Tensor | None, ...] = (None,) * 6
    if penalties is not None:
        state = _check_penalties(op, logits, penalties)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    work = torch.empty(num_rows, vocab, dtype=torch.float32, device=logits.device)
    launch(
        sample_kernel,
        (num_rows,),
        logits.device,
        *(tokens, work, logits, temperature, seeds, positions, top_k, top_p, min_p),
        *(*state, logits.stride(0)),
        V=vocab,
        BLOCK=_BLOCK if gpu_of(op, logits.device).arch != "interpreter" else 64,
        num_warps=8,
        num_stages=1,
    )
    return tokens


def _check_row(op: str, logits: Tensor, dtypes: tuple[torch.dtype, ...], **rows: Tensor | None) -> None:
    check_tensors(op, logits.device, **rows)
    for name, row in rows.items():
        if row is not None:
            check_dtype(op, name, row, dtypes)
            if row.shape != logits.shape[:1]:
                raise ValueError(f"{op}: {name} of shape {tuple(row.shape)}; must be [{logits.shape[0]}]")


def _check_penalties(op: str, logits: Tensor, penalties: Penalties) -> tuple[Tensor | None, ...]:
    """The penalties' tensors in the kernel's order."""
    numbers = {name: getattr(penalties, name) for name in ("repetition", "presence", "frequency")}
    _check_row(op, logits, (torch.float32,), **numbers)
    _check_row(op, logits, (torch.int32,), state_rows=penalties.state_rows)
    counts, prompt = penalties.counts, penalties.prompt_mask
    check_tensors(op, logits.device, counts=counts, prompt_mask=prompt)
    check_dtype(op, "counts", counts, (torch.int32,))
    check_dtype(op, "prompt_mask", prompt, (torch.bool,))
    shape = (counts.shape[0], logits.shape[1])
    if (
        counts.shape != shape
        or prompt.shape != shape
        or not (counts.is_contiguous() and prompt.is_contiguous())
    ):
        raise ValueError(
            f"{op}: counts {tuple(counts.shape)} and prompt_mask {tuple(prompt.shape)}; "
            f"must both be contiguous [R, {logits.shape[1]}]"
        )
    return (*numbers.values(), prompt.view(torch.uint8), counts, penalties.state_rows)
