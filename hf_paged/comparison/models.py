"""Models to compare on: a path, a hub id, or a named shape with random weights ("random:gpt2-124m").

Random weights are right for speed and wrong for text: they never end by themselves (no EOS), so every request
runs to its limit and the lengths of a workload are exact. They say nothing about quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_paged.integrations.peft_checkpoints import base_of, is_checkpoint, load_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

#: name -> (model class, config class, config arguments). The names say how many parameters there are.
RANDOM_SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2-124m": ("GPT2LMHeadModel", "GPT2Config", {}),
    "gpt2-5m": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 6144},
    ),
    "gpt2-tiny": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 256},
    ),
    "gpt_bigcode-111m": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {"multi_query": True}),
    "gpt_bigcode-tiny": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 256, "multi_query": True},
    ),
    "llama-125m": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
    ),
    "llama-tiny": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 256,
        },
    ),
}


@dataclass
class LoadedModel:
    """A model ready to generate, with its tokenizer where there is one."""

    name: str
    model: Any
    tokenizer: Any | None
    random_weights: bool


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype from its name or short name.

    Raises:
        ValueError: not one of float32, bfloat16, float16.
    """
    full = _ALIASES.get(name, name)
    if full not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of {', '.join([*DTYPES, *_ALIASES])}")
    return DTYPES[full]


def load_model(
    spec: str, *, dtype: str | None = None, device: str | None = None, seed: int = 0
) -> LoadedModel:
    """Loads `spec`: a folder, a hub id, or "random:NAME" with NAME in `RANDOM_SHAPES`.

    A folder may be a PEFT checkpoint: its base model is loaded, with the adapter active under the name "default".

    Args:
        spec: what to load.
        dtype: weights' dtype; None is float32 for random weights and the checkpoint's own for others.
        device: where to put it; None is CUDA where there is one, else the CPU.
        seed: of random weights.

    Raises:
        ValueError: an unknown shape or dtype, or a model that cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if spec.startswith("random:"):
        model = build_random(spec.removeprefix("random:"), parse_dtype(dtype or "float32"), seed)
        return LoadedModel(spec, model.to(device), None, True)
    from transformers import AutoModelForCausalLM

    if is_checkpoint(spec):
        loaded = load_model(base_of(spec), dtype=dtype, device=device)
        load_adapter(loaded.model, spec, "default")
        return LoadedModel(spec, loaded.model.eval(), _load_tokenizer(spec) or loaded.tokenizer, False)
    looks_local = spec.startswith((".", "/", "~")) or Path(spec).exists()
    if looks_local and not (Path(spec).expanduser() / "config.json").is_file():
        raise ValueError(f"{spec}: no config.json there, so not a saved model")
    source = str(Path(spec).expanduser()) if looks_local else spec
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=parse_dtype(dtype) if dtype else "auto")
    except (OSError, ValueError) as error:
        # Upstream's messages run over many lines; the first says what is wrong.
        raise ValueError(f"cannot load {spec!r}: {str(error).strip().splitlines()[0]}") from None
    return LoadedModel(spec, model.eval().to(device), _load_tokenizer(source), False)


def build_random(name: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of a named shape with weights drawn from `seed`, in eval mode on the CPU, without any EOS.

    Raises:
        ValueError: an unknown name; the message lists those there are.
    """
    import transformers

    if name not in RANDOM_SHAPES:
        raise ValueError(
            f"random:{name}: unknown shape; there are {', '.join('random:' + n for n in RANDOM_SHAPES)}"
        )
    model_class, config_class, arguments = RANDOM_SHAPES[name]
    config = getattr(transformers, config_class)(
        **arguments, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
    _widen_weights(model)
    return model.to(dtype).eval()


def _widen_weights(model: Any) -> None:
    """Makes greedy texts wander.

    As initialised, layers add so little that a model with tied embeddings repeats its last token for ever;
    equal tokens would then say nothing. Here each matrix about keeps the size of what it is given, and
    positions outweigh tokens.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or any(part in name for part in ("wte", "embed_tokens", "lm_head")):
                continue
            if "wpe" in name:
                parameter.mul_(3.0)
            else:
                parameter.mul_(1.5 / math.sqrt(min(parameter.shape)) / parameter.std())


def _load_tokenizer(source: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None
