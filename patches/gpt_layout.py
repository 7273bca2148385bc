"""What GPT-2 and GPTBigCode have in common: blocks in `transformer.h`, learned positions in `transformer.wpe`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_paged.patches.attention import store
from hf_paged.patches.registry import unwrapped
from hf_paged.step import StepInputs

__all__ = ["blocks", "check", "find_attention_layers", "position_limit", "store_new_kv"]

#: (attention module, hidden states after the norm [1, T, E]) -> query, key, value, each [T, heads, D]
SplitHeads = Callable[[Any, Tensor], Sequence[Tensor]]


def blocks(model: Any) -> Sequence[nn.Module]:
    return model.transformer.h


def store_new_kv(split_heads: SplitHeads) -> Callable[..., None]:
    """`PatchSpec.store_new_kv` of a family by how its one projection is laid out."""

    def store_new_kv(block: Any, step: StepInputs, layer: int, hidden_states: Tensor, **kwargs: Any) -> None:
        _, key, value = split_heads(unwrapped(block.attn), block.ln_1(hidden_states))
        store(step, layer, key, value)

    return store_new_kv


def find_attention_layers(model: Any) -> list[nn.Module]:
    return [unwrapped(block.attn) for block in model.transformer.h]


def check(model: Any) -> str | None:
    if getattr(model.config, "add_cross_attention", False):
        return "the model has cross-attention layers (add_cross_attention=True)"
    return None


def position_limit(model: Any) -> int:
    return model.transformer.wpe.weight.shape[0]
