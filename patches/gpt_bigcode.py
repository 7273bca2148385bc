"""GPTBigCode (StarCoder, SantaCoder): one fused projection `c_attn`, learned positions.

With `multi_query` it is laid out as [all q | one k | one v]; without, as [q k v] head by head, unlike GPT-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_paged.patches import direct
from hf_paged.patches.attention import attend
from hf_paged.patches.gpt_layout import blocks, check, find_attention_layers, position_limit, store_new_kv
from hf_paged.patches.registry import AttentionShape, PatchSpec, register, unwrapped
from hf_paged.step import StepInputs

_MODELING = "transformers.models.gpt_bigcode.modeling_gpt_bigcode"
_BLOCK, _ATTENTION = f"{_MODELING}.GPTBigCodeBlock", f"{_MODELING}.GPTBigCodeAttention"


def paged_forward(
    module: Any,
    step: StepInputs,
    layer: int,
    hidden_states: Tensor,  # [1, T, E]
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    query, key, value = split_heads(module, hidden_states)
    output = direct.call(module.c_proj, attend(step, layer, query, key, value, module.scaling))
    return direct.call(module.resid_dropout, output), None


def split_heads(module: Any, hidden_states: Tensor) -> Sequence[Tensor]:
    """Query [T, H, D], key and value [T, H_kv, D]."""
    tokens, heads, head_dim = hidden_states.shape[1], module.num_heads, module.head_dim
    qkv = direct.call(module.c_attn, hidden_states)
    if module.multi_query:
        return qkv.view(tokens, heads + 2, head_dim).split((heads, 1, 1), dim=1)
    return qkv.view(tokens, heads, 3, head_dim).unbind(2)


def structure(model: Any) -> list[tuple[nn.Module, str]]:
    transformer = unwrapped(model.transformer)
    parts = [(model, f"{_MODELING}.GPTBigCodeForCausalLM"), (transformer, f"{_MODELING}.GPTBigCodeModel")]
    for block in map(unwrapped, transformer.h):
        parts += [(block, _BLOCK), (unwrapped(block.attn), _ATTENTION)]
    return parts


def attention_shape(module: Any) -> AttentionShape:
    return AttentionShape(module.num_heads, module.kv_heads, module.head_dim)


register(
    PatchSpec(
        model_types=("gpt_bigcode",),
        model_class=f"{_MODELING}.GPTBigCodeForCausalLM",
        structure=structure,
        find_attention_layers=find_attention_layers,
        blocks=blocks,
        attention_shape=attention_shape,
        key_projection=lambda module: module.c_attn,
        paged_forward=paged_forward,
        store_new_kv=store_new_kv(split_heads),
        check=check,
        position_limit=position_limit,
        rope_limit=lambda model: None,
        attention_dropout=lambda module: module.attn_pdrop,
    )
)
