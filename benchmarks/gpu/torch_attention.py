"""The same prompts through torch's attention: every SDPA backend that takes them, and flex_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.attention_inputs import Inputs
from benchmarks.gpu.bench import seconds_of

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_TINY_BACKENDS = {"math": SDPBackend.MATH}


def sdpa_seconds(inputs: Inputs, rows: int, length: int, device: torch.device) -> dict[str, float | None]:
    """Seconds by backend; None where the backend does not take these tensors."""
    query, key, value = _dense(inputs, rows, length)
    seconds: dict[str, float | None] = {}
    for name, backend in (_BACKENDS if device.type == "cuda" else _TINY_BACKENDS).items():

        def work(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        try:
            seconds[name] = seconds_of(work, device, graph=False)
        except RuntimeError as error:
            # That is how torch says "no available kernel"; anything else (out of memory, say) is a failure.
            if "kernel" not in str(error).lower():
                raise
            seconds[name] = None
    return seconds


def flex_seconds(inputs: Inputs, rows: int, length: int, device: torch.device) -> float:
    """Seconds of compiled flex_attention with a causal mask (in tiny runs not compiled)."""
    query, key, value = _dense(inputs, rows, length)

    def causal(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(causal, None, None, length, length, device=str(device))
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return seconds_of(
        lambda: attend(query, key, value, block_mask=mask, enable_gqa=True), device, graph=False
    )


def _dense(inputs: Inputs, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [rows, heads, length, D]; the numbers do not matter for their speed."""
    heads, head_size = inputs.query.shape[1:]
    kv_heads = inputs.k_cache.shape[2]
    shapes = [(rows, count, length, head_size) for count in (heads, kv_heads, kv_heads)]
    made = [torch.randn(s, dtype=inputs.query.dtype, device=inputs.query.device) for s in shapes]
    return made[0], made[1], made[2]
