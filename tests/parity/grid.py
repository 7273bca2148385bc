"""The seeded grid of the parity tests: families and variants, prompts, options of `generate`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from transformers import SequenceBiasLogitsProcessor, WatermarkingConfig  # noqa: F401 - proves the names exist

from tests.helpers import EOS, MAX_POSITIONS, PAD, VOCAB_SIZE

_WATERMARK: dict[str, Any] = {"greenlist_ratio": 0.5, "bias": 2.0, "hashing_key": 7}
#: The oldest transformers fail on a dict here.
_TAKES_DICTS = Version(transformers.__version__) >= Version("5.17")

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "default": {},
        "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
        "unscaled": {"scale_attn_weights": False},
        "upcast_eager": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        "relu": {"activation_function": "relu"},
        "silu_inner": {"activation_function": "silu", "n_inner": 40},
        "untied": {"tie_word_embeddings": False},
        "six_heads": {"n_head": 6},
    },
    "gpt_bigcode": {
        "multi_query": {},
        "multi_head": {"multi_query": False},
        "unscaled": {"scale_attn_weights": False},
        "fp32_softmax_off": {"attention_softmax_in_fp32": False, "scale_attention_softmax_in_fp32": False},
        "untied": {"tie_word_embeddings": False},
    },
    "llama": {
        "grouped": {},
        "multi_head": {"num_key_value_heads": 4},
        "multi_query": {"num_key_value_heads": 1},
        "bias": {"attention_bias": True, "mlp_bias": True},
        "head_dim": {"head_dim": 24},
        "tied": {"tie_word_embeddings": True},
        "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "rope_yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "rope_llama3": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_longrope": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            }
        },
    },
}

#: Options of one processor or warper each; all are drawn alone and in combinations.
PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [9, 7], [11]]},
    "min_length": {"min_length": 30},
    "min_new_tokens": {"min_new_tokens": 6},
    "forced_bos": {"forced_bos_token_id": 17},
    "forced_eos": {"forced_eos_token_id": 33},
    "sequence_bias": {"sequence_bias": [[[12], 3.0], [[13, 14], 5.0]]},
    "suppress": {"suppress_tokens": [3, 4, 5, 6]},
    "begin_suppress": {"begin_suppress_tokens": [7, 8, 9]},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.3)},
    "remove_invalid": {"remove_invalid_values": True},
    "watermark": {"watermarking_config": _WATERMARK if _TAKES_DICTS else WatermarkingConfig(**_WATERMARK)},
    "renormalize": {"renormalize_logits": True},
    "eos_list": {"eos_token_id": [EOS, 40, 41, 42]},
}
WARPERS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "hot": {"temperature": 1.8},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "top_h": {"top_h": 0.5, "top_k": 0},
    "typical": {"typical_p": 0.7, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.01, "top_k": 0},
    "eta": {"eta_cutoff": 0.01, "top_k": 0},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95},
}


@dataclass(frozen=True)
class Case:
    """One call to compare. `pool` is the size of the KV pool: "default", or "tight" for constant preemption."""

    family: str
    variant: str
    lengths: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    pool: str
    seed: int

    def __str__(self) -> str:
        named = ",".join(f"{k}={v}" for k, v in self.options if k not in ("pad_token_id",))
        return (
            f"{self.family}.{self.variant}-{'+'.join(map(str, self.lengths))}-{named}-{self.pool}-{self.seed}"
        )

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.options)


def draw_case(source: random.Random) -> Case:
    """One random case."""
    family = source.choice(list(VARIANTS))
    variant = source.choice(list(VARIANTS[family]))
    rows = source.choice([1, 1, 2, 3, 4, 6, 8, 16])
    new_tokens = source.choice([1, 2, 5, 12, 20])
    longest = source.choice([1, 3, 15, 16, 17, 33, 60, MAX_POSITIONS - new_tokens])
    lengths = tuple(source.randint(1, longest) for _ in range(rows - 1)) + (longest,)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "pad_token_id": PAD,
        "do_sample": source.random() < 0.5,
    }
    names = source.sample(list(PROCESSORS), source.choice([0, 0, 1, 1, 2, 3]))
    for name in names:
        options |= PROCESSORS[name]
    if options["do_sample"]:
        options |= WARPERS[source.choice(list(WARPERS))]
        if source.random() < 0.3 and rows <= 4:
            options["num_return_sequences"] = source.choice([2, 3])
    # Upstream's exponential decay cannot be built without an end of sequence.
    if source.random() < 0.2 and "exponential_decay" not in names:
        options["eos_token_id"] = None
    pool = source.choice(["default", "default", "tight"])
    seed = source.randrange(2**31)
    return Case(
        family, variant, lengths, tuple(sorted(options.items(), key=lambda item: item[0])), pool, seed
    )


def cases(seed: int, count: int) -> list[Case]:
    source = random.Random(seed)
    return [draw_case(source) for _ in range(count)]


def every_option_alone() -> list[Case]:
    """Each processor greedy and sampled, each warper, in each family."""
    found = []
    for number, family in enumerate(VARIANTS):
        variant = next(iter(VARIANTS[family]))
        shared = {"max_new_tokens": 10, "pad_token_id": PAD}
        for name, options in PROCESSORS.items():
            for sample in (False, True):
                merged = shared | options | {"do_sample": sample}
                found.append(_case(family, variant, merged, 100 * number + len(name)))
        for name, options in WARPERS.items():
            found.append(
                _case(family, variant, shared | options | {"do_sample": True}, 7 * number + len(name))
            )
    return found


def every_variant() -> list[Case]:
    """Each variant of each family, greedy over ragged prompts, in a pool that preempts and in one that does not."""
    return [
        Case(
            family,
            variant,
            (1, 17, 40, 9),
            (("do_sample", False), ("max_new_tokens", 12), ("pad_token_id", PAD)),
            pool,
            5,
        )
        for family, variants in VARIANTS.items()
        for variant in variants
        for pool in ("default", "tight")
    ]


def _case(family: str, variant: str, options: dict[str, Any], seed: int) -> Case:
    return Case(family, variant, (4, 19, 1), tuple(sorted(options.items())), "default", seed)


assert max(max(w) for w in ([3, 4, 5, 6], [40, 41, 42], [33, 17])) < VOCAB_SIZE
