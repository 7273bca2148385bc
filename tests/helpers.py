"""Tiny models, prompts and checks shared by the tests.

Random models are built from a config with seeded weights, never downloaded. Their weights are so large that
greedy output wanders and its best two tokens are far apart: equality of tokens means something.
The demo models under `examples/models` are trained: use them where a test needs EOS, text or stop strings.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODELS = ROOT / "examples" / "models"
FAMILIES = ("gpt2", "gpt_bigcode", "llama")

VOCAB_SIZE = 128
MAX_POSITIONS = 128
BOS, EOS, PAD = 0, 1, 2
IDLE_WITHIN_S = 5.0

_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_GPT_SHAPE = {"n_positions": MAX_POSITIONS, "n_embd": 48, "n_layer": 2, "n_head": 4}
_LLAMA_SHAPE = {
    "max_position_embeddings": MAX_POSITIONS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_BUILDERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT_SHAPE),
    "gpt_bigcode": (GPTBigCodeConfig, GPTBigCodeForCausalLM, _GPT_SHAPE | {"multi_query": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, _LLAMA_SHAPE),
}


def make_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> PreTrainedModel:
    """Build a random two-layer model of a family, in eval mode, on the CPU.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights; the global generator is left as it was.
        dtype: Dtype of the parameters, drawn in float32 and rounded.
        **config_overrides: Fields of the family's own config class, over the tiny defaults.
    """
    config_class, model_class, shape = _BUILDERS[family]
    config = config_class(**(_TOKENS | shape | config_overrides))
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
        _draw_weights(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    # Wide enough that logits spread over several units and attention is far from uniform. Positions outweigh
    # tokens, else with tied embeddings a token mostly predicts itself. Zero biases would hide a lost one.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_norm_weight = name.endswith("weight")
                parameter.copy_(1.0 + 0.1 * noise if is_norm_weight else 0.1 * noise)
            elif any(part in name for part in ("wte", "embed_tokens", "lm_head")):
                parameter.copy_(0.5 * noise)
            elif "wpe" in name:
                parameter.copy_(1.5 * noise)
            else:
                parameter.copy_(noise * (1.5 / math.sqrt(min(parameter.shape))))


def demo_model(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the trained demo model of a family from `examples/models`, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODELS / family, dtype=dtype, local_files_only=True)
    return model.eval()


def demo_tokenizer(family: str) -> Any:
    """Load the tokenizer of a demo model; it pads on the left, as generation wants."""
    return AutoTokenizer.from_pretrained(DEMO_MODELS / family, local_files_only=True, padding_side="left")


def random_prompts(
    lengths: Sequence[int], *, seed: int = 0, vocab_size: int = VOCAB_SIZE, reserved: int = 3
) -> list[list[int]]:
    """Draw one prompt a length; ids below `reserved` (BOS, EOS, PAD) do not occur."""
    source = random.Random(seed)
    return [[source.randrange(reserved, vocab_size) for _ in range(length)] for length in lengths]


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int = PAD) -> dict[str, torch.Tensor]:
    """Batch ragged prompts as `generate` takes them.

    Returns:
        `input_ids` and `attention_mask`, both [rows, longest] int64.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}


def assert_same_tokens(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two outputs of `generate` and name the first row and column that differ."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    differing = (actual != expected).nonzero()
    if len(differing):
        row, column = differing[0].tolist()
        raise AssertionError(
            f"row {row} differs first at column {column} of {actual.shape[1]}:\n"
            f"  got      {actual[row].tolist()}\n  expected {expected[row].tolist()}"
        )


@contextmanager
def native_calls(model: Any, calls: int = 1) -> Iterator[None]:
    """Fail unless exactly `calls` native calls and no fallback happen inside: parity alone proves nothing."""
    import hf_paged

    before = hf_paged.stats(model)
    yield
    after = hf_paged.stats(model)
    assert after.fallback_calls == before.fallback_calls, f"fell back: {after.fallback_calls}"
    happened = after.native_calls - before.native_calls
    assert happened == calls, f"{happened} native calls, expected {calls}"


def check_engines(engines: Sequence[Any]) -> None:
    """Raise AssertionError unless every engine is idle with all its blocks accounted for.

    An engine thread may still be about to end after the result was handed out; it gets a moment.
    """
    deadline = time.monotonic() + IDLE_WITHIN_S
    for engine in engines:
        while not engine.is_idle and time.monotonic() < deadline:
            time.sleep(0.005)
        assert engine.is_idle, f"{engine!r} still has requests: one was not finished, cancelled or freed"
        engine.check_integrity()
