"""What GPT-2 and GPTBigCode have in common: blocks in `transformer.h`, learned positions in `transformer.wpe`."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_paged.patches.registry import unwrapped

__all__ = ["check", "find_attention_layers", "position_limit"]


def find_attention_layers(model: Any) -> list[nn.Module]:
    return [unwrapped(block.attn) for block in model.transformer.h]


def check(model: Any) -> str | None:
    if getattr(model.config, "add_cross_attention", False):
        return "the model has cross-attention layers (add_cross_attention=True)"
    return None


def position_limit(model: Any) -> int:
    return model.transformer.wpe.weight.shape[0]
