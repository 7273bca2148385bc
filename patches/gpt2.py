"""GPT-2: one fused projection `c_attn` laid out as [q | k | v], learned positions.

Every scaling option (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`) is in the module's own
`scaling`. `reorder_and_upcast_attn` only asks for dot products in float32, which the paged kernels do always.
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

_MODELING = "transformers.models.gpt2.modeling_gpt2"
_BLOCK, _ATTENTION = f"{_MODELING}.GPT2Block", f"{_MODELING}.GPT2Attention"


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
    """Query, key and value, each [T, H, D]."""
    tokens = hidden_states.shape[1]
    return (
        direct.call(module.c_attn, hidden_states).view(tokens, 3, module.num_heads, module.head_dim).unbind(1)
    )


def structure(model: Any) -> list[tuple[nn.Module, str]]:
    transformer = unwrapped(model.transformer)
    parts = [(model, f"{_MODELING}.GPT2LMHeadModel"), (transformer, f"{_MODELING}.GPT2Model")]
    for block in map(unwrapped, transformer.h):
        parts += [(block, _BLOCK), (unwrapped(block.attn), _ATTENTION)]
    return parts


def attention_shape(module: Any) -> AttentionShape:
    return AttentionShape(module.num_heads, module.num_heads, module.head_dim)


register(
    PatchSpec(
        model_types=("gpt2",),
        model_class=f"{_MODELING}.GPT2LMHeadModel",
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
        attention_dropout=lambda module: module.attn_dropout.p,
    )
)
