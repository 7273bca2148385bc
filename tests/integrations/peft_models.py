"""Tiny models with PEFT adapters of every kind, whose weights are large enough to change what is generated."""

from __future__ import annotations

from typing import Any

import peft
import torch

from tests.helpers import left_pad, make_model

_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
}
#: Some tuners want square layers, or layers of one shape.
_SQUARE = {"gpt2": ["attn.c_proj"], "gpt_bigcode": ["attn.c_proj"], "llama": ["q_proj", "o_proj"]}
_EMBEDDING = {"gpt2": "wte", "gpt_bigcode": "wte", "llama": "embed_tokens"}
_FINAL_NORM = {"gpt2": "ln_f", "gpt_bigcode": "ln_f", "llama": "norm"}
_FIRST_NORM = {"gpt2": "ln_1", "gpt_bigcode": "ln_1", "llama": "input_layernorm"}
_MLP = {"gpt2": "mlp", "gpt_bigcode": "mlp", "llama": "mlp"}

#: LoRA and what it can be combined with: `adapter_names` of PEFT itself serves most of them.
LORA = [
    "lora",
    "rslora",
    "lora_bias",
    "patterns",
    "pissa",
    "orthogonal",
    "olora",
    "embedding",
    "lm_head",
    "dora",
    "modules_to_save",
    "norm_to_save",
    "mlp_to_save",
    "tokens",
]
OTHERS = ["ia3", "adalora", "vera", "oft", "boft", "loha", "lokr", "hra", "fourierft", "ln_tuning"]
#: The rest of what PEFT has, and rarer kinds of LoRA.
RARE = [
    *(
        "adamss",
        "beft",
        "bdlora",
        "c3a",
        "deft",
        "delora",
        "frod",
        "glora",
        "gralora",
        "hira",
        "kasa",
        "mica",
        "miss",
    ),
    *("monteclora", "osf", "peanut", "psoft", "pvera", "qalora", "randlora", "road", "shira", "supertuning"),
    *("tinylora", "trainable_tokens", "unilora", "vblora", "velora", "waveft"),
]
#: Named fallbacks: experts mixed by the mean over all tokens; weights replaced while the layer runs.
NOT_BY_TOKEN = ["lily", "target_parameters"]
#: Virtual tokens before each prompt: named fallbacks.
PROMPT_LEARNING = ["prompt", "prefix", "p_tuning", "cpt", "cartridge"]
#: Tuners whose PEFT serves `adapter_names`, each by itself and mixed with the base.
ADAPTER_NAMES = {
    *LORA, "bdlora", "glora", "kasa", "mica", "monteclora", "qalora", "road", "velora",
} - {"dora", "modules_to_save", "norm_to_save", "mlp_to_save", "tokens"}  # fmt: skip
_NO_CONV1D = {
    *(
        "adamss",
        "olora",
        "oft",
        "boft",
        "loha",
        "lokr",
        "hra",
        "beft",
        "bdlora",
        "c3a",
        "delora",
        "glora",
        "kasa",
        "lily",
        "miss",
    ),
    *("osf", "peanut", "psoft", "road", "shira", "supertuning", "target_parameters"),
}


def supported(family: str, tuner: str) -> bool:
    """Whether PEFT itself can put `tuner` on the family: several do not know GPT-2's `Conv1D`."""
    if tuner == "trainable_tokens":
        return family == "llama"  # elsewhere PEFT's own head is tied to it and fails
    return not (family == "gpt2" and tuner in _NO_CONV1D)


def config(family: str, tuner: str = "lora", **options: Any) -> Any:
    """A PEFT config of `tuner` for the family."""
    targets, square = _TARGETS[family], _SQUARE[family]
    fan = {"fan_in_fan_out": family == "gpt2"}
    lora: dict[str, dict[str, Any]] = {
        "lora": {},
        "rslora": {"use_rslora": True, "lora_alpha": 4},
        "lora_bias": {"lora_bias": True},
        "patterns": {"rank_pattern": {targets[0]: 8}, "alpha_pattern": {targets[1]: 32}},
        "pissa": {"init_lora_weights": "pissa"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "olora": {"init_lora_weights": "olora"},
        "embedding": {"target_modules": [*targets, _EMBEDDING[family]]},
        "lm_head": {"target_modules": [*targets, "lm_head"]},
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "norm_to_save": {"modules_to_save": [_FINAL_NORM[family]]},
        "mlp_to_save": {
            "target_modules": ["c_attn" if family != "llama" else "q_proj"],
            "modules_to_save": [_MLP[family]],
        },
        "tokens": {"trainable_token_indices": [3, 4, 5, 6, 7, 8]},
    }
    if tuner in lora:
        merged = {"r": 4, "init_lora_weights": False, "target_modules": targets} | fan | lora[tuner] | options
        return peft.LoraConfig(task_type="CAUSAL_LM", **merged)
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        "ia3": (
            peft.IA3Config,
            {"target_modules": targets, "feedforward_modules": [targets[-1]], "init_ia3_weights": False}
            | fan,
        ),
        "adalora": (
            peft.AdaLoraConfig,
            {"target_modules": targets, "total_step": 9, "init_lora_weights": False} | fan,
        ),
        "vera": (peft.VeraConfig, {"target_modules": square, "r": 4, "init_weights": False} | fan),
        "oft": (peft.OFTConfig, {"target_modules": targets, "oft_block_size": 4, "init_weights": False}),
        "boft": (peft.BOFTConfig, {"target_modules": square, "boft_block_size": 4, "init_weights": False}),
        "loha": (peft.LoHaConfig, {"target_modules": targets, "r": 4, "init_weights": False}),
        "lokr": (peft.LoKrConfig, {"target_modules": targets, "r": 4, "init_weights": False}),
        "hra": (peft.HRAConfig, {"target_modules": square, "r": 4, "init_weights": False}),
        "fourierft": (
            peft.FourierFTConfig,
            {"target_modules": targets, "n_frequency": 20, "init_weights": False} | fan,
        ),
        "ln_tuning": (peft.LNTuningConfig, {"target_modules": [_FIRST_NORM[family]]}),
        "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
        "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
        "p_tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    }
    if tuner in others:
        kind, defaults = others[tuner]
    else:
        kind, defaults = _rare(family, tuner)
    return kind(task_type="CAUSAL_LM", **(defaults | options))


def _rare(family: str, tuner: str) -> tuple[Any, dict[str, Any]]:
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    fan = {"fan_in_fan_out": family == "gpt2"}
    many, square = {"target_modules": _TARGETS[family]}, {"target_modules": _SQUARE[family]}
    drawn = {"init_weights": False}
    lora = many | fan | {"r": 4, "init_lora_weights": False}
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "adamss": ("AdamssConfig", square | {"r": 8, "num_subspaces": 2}),
        "bdlora": (
            "LoraConfig",
            lora | {"use_bdlora": BdLoraConfig(nblocks=2, target_modules_bd_a=_TARGETS[family])},
        ),
        "beft": ("BeftConfig", many | drawn),
        "c3a": ("C3AConfig", square | drawn | {"block_size": 16}),
        "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 4}),
        "cpt": (
            "CPTConfig",
            {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1] * 4},
        ),
        "deft": ("DeftConfig", many | drawn | fan | {"r": 4}),
        "delora": ("DeloraConfig", many | drawn | {"r": 4}),
        "frod": ("FrodConfig", square | drawn | fan | {"progressbar": False}),
        "glora": ("GloraConfig", many | drawn | {"r": 4}),
        "gralora": ("GraloraConfig", many | drawn | fan | {"r": 4, "gralora_k": 2}),
        "hira": ("HiraConfig", many | drawn | fan | {"r": 4}),
        "kasa": ("LoraConfig", lora | {"kasa_config": KasaConfig()}),
        "lily": ("LilyConfig", square | drawn | {"r": 4, "num_B": 2}),
        "mica": ("LoraConfig", lora | {"init_lora_weights": "mica"}),
        "miss": ("MissConfig", many | drawn | {"r": 4}),
        "monteclora": ("LoraConfig", lora | {"monteclora_config": MontecloraConfig()}),
        "osf": ("OSFConfig", many | {"effective_rank": 8}),
        "peanut": ("PeanutConfig", many | drawn | {"r": 4}),
        "psoft": ("PsoftConfig", many | drawn | fan | {"r": 4}),
        "pvera": ("PveraConfig", square | drawn | fan | {"r": 4}),
        "qalora": ("LoraConfig", lora | {"use_qalora": True, "qalora_group_size": 8}),
        "randlora": ("RandLoraConfig", square | drawn | fan | {"r": 4}),
        "road": ("RoadConfig", many | drawn | {"group_size": 8}),
        "shira": ("ShiraConfig", many | drawn | fan | {"r": 4, "random_seed": 3}),
        "supertuning": ("SupertuningConfig", many | {"sparsity": 0.9}),
        "target_parameters": (
            "LoraConfig",
            lora
            | {
                "target_modules": [],
                "target_parameters": ["q_proj.weight" if family == "llama" else "c_fc.weight"],
            },
        ),
        "tinylora": ("TinyLoraConfig", many | fan | {"r": 2, "u": 8}),
        "trainable_tokens": (
            "TrainableTokensConfig",
            {
                "token_indices": [3, 4, 5, 6, 7, 8],
                "target_modules": [_EMBEDDING[family]],
                "init_weights": False,
            },
        ),
        "unilora": ("UniLoraConfig", many | drawn | fan | {"r": 4, "theta_d_length": 32}),
        "vblora": ("VBLoRAConfig", square | fan | {"r": 4, "num_vectors": 16, "vector_length": 8}),
        "velora": ("LoraConfig", lora | {"velora_config": VeloraConfig(num_groups=4)}),
        "waveft": ("WaveFTConfig", many | drawn | fan | {"n_frequency": 40}),
    }
    name, options = table[tuner]
    return getattr(peft, name), options


def peft_model(family: str, configs: dict[str, Any], *, strength: float = 0.3, **overrides: Any) -> Any:
    """A PeftModel with one adapter a config, in eval mode; the first one is active. The same at each call.

    Args:
        strength: of the noise on the adapters' weights, next to their size.
        overrides: as for `make_model`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        names = list(configs)
        model = peft.get_peft_model(make_model(family, **overrides), configs[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, configs[name])
        model.eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if set(names) & set(name.split(".")) and parameter.is_floating_point():
                    size = strength * parameter.abs().mean().clamp(min=0.1)
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def alone(model: Any, prompt: list[int], adapter: Any, **options: Any) -> list[int]:
    """New tokens of PEFT's own `generate` for one prompt with one adapter, or with "__base__"."""
    kwargs = left_pad([prompt]) | {"max_new_tokens": 8, "do_sample": False} | options
    if adapter == "__base__":
        with model.disable_adapter():
            output = model.generate(**kwargs)
    else:
        if hasattr(model, "set_adapter"):
            model.set_adapter(adapter)
        output = model.generate(**kwargs)
    return output[0, len(prompt) :].tolist()
