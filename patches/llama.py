"""LLaMA: separate projections, grouped KV heads, rotary positions.

Keys are rotated before they are stored, so the cache holds what attention reads. The frequencies of `dynamic`
and `longrope` depend on the longest position of the whole forward: packing is exact only below the length
where they switch (`rope_limit`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_paged.kernels import cpu_rope
from hf_paged.patches import direct
from hf_paged.patches.attention import attend, rotates_in_kernel, store
from hf_paged.patches.registry import AttentionShape, PatchSpec, register, unwrapped
from hf_paged.patches.rotary import STATIC_ROPE
from hf_paged.step import StepInputs

_MODELING = "transformers.models.llama.modeling_llama"
#: Upstream's own rotates [1, T, H, D] as it stands, up to twice as fast; one patched in may only know [1, H, T, D].
_ROTATES_ANY_LAYOUT = apply_rotary_pos_emb.__module__ == _MODELING
_BLOCK, _ATTENTION = f"{_MODELING}.LlamaDecoderLayer", f"{_MODELING}.LlamaAttention"


def paged_forward(
    module: Any,
    step: StepInputs,
    layer: int,
    hidden_states: Tensor,  # [1, T, E]
    position_embeddings: tuple[Tensor, Tensor],  # cos and sin, each [1, T, D]
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    by_head = (hidden_states.shape[1], -1, module.head_dim)
    query = direct.call(module.q_proj, hidden_states).view(by_head)
    key = direct.call(module.k_proj, hidden_states).view(by_head)
    value = direct.call(module.v_proj, hidden_states).view(by_head)
    rotary = None
    if _ROTATES_ANY_LAYOUT and rotates_in_kernel(step, query, key):
        cos, sin = position_embeddings
        rotary = cos[0], sin[0]
    else:
        query, key = _rotated(query, key, *position_embeddings)
    attended = attend(step, layer, query, key, value, module.scaling, rotary)
    return direct.call(module.o_proj, attended), None


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [T, heads, D] after RoPE by `cos` and `sin` [1, T, D]."""
    if _ROTATES_ANY_LAYOUT and query.device.type == "cpu" and query.dtype is key.dtype:
        rotated = cpu_rope.rotate(query, key, cos[0], sin[0])
        if rotated is not None:
            return rotated
    if _ROTATES_ANY_LAYOUT:
        query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
        return query[0], key[0]
    query, key = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


def store_new_kv(
    block: Any,
    step: StepInputs,
    layer: int,
    hidden_states: Tensor,  # [1, T, E]
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> None:
    module: Any = unwrapped(block.self_attn)
    normed = direct.call(block.input_layernorm, hidden_states)
    by_head = (normed.shape[1], -1, module.head_dim)
    key = direct.call(module.k_proj, normed).view(by_head)
    value = direct.call(module.v_proj, normed).view(by_head)
    key, _ = _rotated(key, key[:, :0], *position_embeddings)
    store(step, layer, key, value)


def blocks(model: Any) -> Sequence[nn.Module]:
    return unwrapped(model.model).layers


def structure(model: Any) -> list[tuple[nn.Module, str]]:
    decoder = unwrapped(model.model)
    parts = [
        (model, f"{_MODELING}.LlamaForCausalLM"),
        (decoder, f"{_MODELING}.LlamaModel"),
        (decoder.rotary_emb, f"{_MODELING}.LlamaRotaryEmbedding"),
    ]
    for block in map(unwrapped, decoder.layers):
        parts += [(block, _BLOCK), (unwrapped(block.self_attn), _ATTENTION)]
    return parts


def find_attention_layers(model: Any) -> list[nn.Module]:
    # Upstream runs the first `num_hidden_layers` of the layers it has.
    blocks = itertools.islice(model.model.layers, model.config.num_hidden_layers)
    return [unwrapped(block.self_attn) for block in blocks]


def attention_shape(module: Any) -> AttentionShape:
    config = module.config
    return AttentionShape(config.num_attention_heads, config.num_key_value_heads, module.head_dim)


def check(model: Any) -> str | None:
    rope_type = model.model.rotary_emb.rope_type
    if rope_type not in (*STATIC_ROPE, "dynamic", "longrope"):
        return f"rope_type={rope_type!r} is not known to be exact for packed sequences"
    return None


def rope_limit(model: Any) -> int | None:
    rotary = model.model.rotary_emb
    if rotary.rope_type == "dynamic":
        # Frequencies grown by a longer forward are only reset by one that is shorter than the original
        # length.
        return rotary.original_max_seq_len - 1
    if rotary.rope_type == "longrope":
        return rotary.config.rope_parameters["original_max_position_embeddings"]
    return None


register(
    PatchSpec(
        model_types=("llama",),
        model_class=f"{_MODELING}.LlamaForCausalLM",
        structure=structure,
        find_attention_layers=find_attention_layers,
        blocks=blocks,
        attention_shape=attention_shape,
        key_projection=lambda module: module.k_proj,
        paged_forward=paged_forward,
        store_new_kv=store_new_kv,
        check=check,
        position_limit=lambda model: None,
        rope_limit=rope_limit,
        attention_dropout=lambda module: module.attention_dropout,
    )
)
