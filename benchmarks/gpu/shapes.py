"""The shapes that are measured: attention heads, and whole models with random weights in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Heads:
    """Of one attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_size: int


#: The most important first.
HEADS = (
    Heads("llama-3-8b 32/8x128", 32, 8, 128),
    Heads("llama-2-7b 32/32x128", 32, 32, 128),
    Heads("gpt2 12/12x64", 12, 12, 64),
    Heads("starcoderbase-1b 16/1x128", 16, 1, 128),
    Heads("gpt2-xl 25/25x64", 25, 25, 64),
    Heads("starcoder 48/1x128", 48, 1, 128),
    Heads("32/4x64", 32, 4, 64),
    Heads("32/8x64", 32, 8, 64),
    Heads("64/8x128", 64, 8, 128),
)
TINY_HEADS = (Heads("tiny 4/2x16", 4, 2, 16),)


@dataclass(frozen=True)
class ModelShape:
    """A model of a published shape."""

    name: str
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)


def _llama(**config: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32} | config


MODELS = (
    ModelShape(
        "llama-3-8b",
        "LlamaConfig",
        _llama(
            intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192
        ),
    ),
    ModelShape(
        "llama-2-7b",
        "LlamaConfig",
        _llama(
            intermediate_size=11008, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096
        ),
    ),
    ModelShape("gpt2-124m", "GPT2Config"),
    ModelShape(
        "starcoderbase-1b",
        "GPTBigCodeConfig",
        {"n_layer": 24, "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_positions": 8192}
        | {"vocab_size": 49152, "multi_query": True},
    ),
    ModelShape("gpt2-xl", "GPT2Config", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
)
TINY_MODELS = (
    ModelShape(
        "llama-tiny",
        "LlamaConfig",
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "max_position_embeddings": 128, "vocab_size": 64},
    ),
    ModelShape(
        "gpt2-tiny",
        "GPT2Config",
        {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": 64},
    ),
)


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on `device` in `dtype`, in eval mode, without an end of sequence."""
    import transformers

    config = getattr(transformers, shape.config_class)(
        **shape.config,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_bytes(model: Any) -> int:
    """Bytes of weights a decode step reads: all but tables of which it looks up single rows.

    An embedding that is also the output projection is read whole.
    """
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    output = model.get_output_embeddings().weight
    looked_up = {id(m.weight): m.weight for m in tables if m.weight is not output}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in looked_up)


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values of one token in all layers."""
    from hf_paged.patches import registry

    spec = registry.find(model)
    shapes = [spec.attention_shape(layer) for layer in spec.find_attention_layers(model)]
    return sum(2 * s.num_kv_heads * s.head_dim for s in shapes) * model.dtype.itemsize
