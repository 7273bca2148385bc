"""`docs/generate_support.md` says what happens to every option: here that is held against transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation import StoppingCriteria

import hf_paged
from hf_paged.generation.checks import KNOWN_OPTIONS
from hf_paged.generation.fallback import REASONS
from tests.helpers import ROOT, demo_model, demo_tokenizer

NEWEST = (5, 23)
_ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<served>[^|]+) \|")
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def sections() -> dict[str, dict[str, set[str]]]:
    """Heading -> name -> what the row says: "native" and codes."""
    found: dict[str, dict[str, set[str]]] = {}
    for line in (ROOT / "docs" / "generate_support.md").read_text().splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], {})
        elif match := _ROW.match(line):
            rows[match["name"]] = {part.strip().strip("`") for part in match["served"].split(",")}
    return found


SECTIONS = sections()
PARAMETERS = SECTIONS["Parameters of `generate()`"]
FIELDS = SECTIONS["Fields of `GenerationConfig`"]
ARGUMENTS = SECTIONS["Arguments for the model and for preparation"]
OTHER = SECTIONS["Other reasons"]


def installed_fields() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


class _UserProcessor(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class _UserCriterion(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def hooked_model() -> Any:
    """One that cannot be anybody's assistant."""
    model = demo_model("gpt2")
    model.transformer.h[0].register_forward_hook(lambda module, args, output: output)
    return model


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.ones_like(IDS)
HOLE = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
HUB = {"trust_remote_code": True}


def samples(model: Any, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Name -> arguments that set it; together they show everything its row says."""
    sampled = {"do_sample": True}
    # All rows together are more than the pool of these tests holds, whatever the positions allow.
    whole = {"return_dict_in_generate": True, "input_ids": IDS.repeat(50, 1), "attention_mask": None}
    positions = torch.arange(4).expand(2, -1)
    table: dict[str, list[dict[str, Any]]] = {
        "inputs": [{"inputs": IDS, "input_ids": None, "attention_mask": None}],
        "generation_config": [{"generation_config": GenerationConfig(max_new_tokens=3)}],
        "logits_processor": [
            {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
            {"logits_processor": LogitsProcessorList([_UserProcessor()])},
        ],
        "stopping_criteria": [
            {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(7)])},
            {"stopping_criteria": StoppingCriteriaList([_UserCriterion()])},
        ],
        "prefix_allowed_tokens_fn": [{"prefix_allowed_tokens_fn": lambda row, ids: [5, 6]}],
        "synced_gpus": [{"synced_gpus": False}, {"synced_gpus": True}],
        "assistant_model": [
            {"assistant_model": model},
            {"assistant_model": hooked_model()},
        ],
        "streamer": [{"streamer": TextStreamer(tokenizer)}],
        "negative_prompt_ids": [{"negative_prompt_ids": IDS}],
        "negative_prompt_attention_mask": [{"negative_prompt_attention_mask": MASK}],
        "custom_generate": [
            {"custom_generate": hf_paged.generate},
            {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
        ],
        "max_length": [{"max_length": 9}, {"max_length": 100_000, **whole}],
        "max_new_tokens": [{"max_new_tokens": 3}, {"max_new_tokens": 100_000, **whole}],
        "min_length": [{"min_length": 6}],
        "min_new_tokens": [{"min_new_tokens": 2}],
        "early_stopping": [{"early_stopping": True}],
        "max_time": [{"max_time": 10.0}],
        "stop_strings": [{"stop_strings": ["stop", "\n"], "tokenizer": tokenizer}],
        "do_sample": [{"do_sample": True}, {"do_sample": False}],
        "num_beams": [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1000}],
        "use_mtp": [{"use_mtp": True}],
        "use_cache": [{"use_cache": True}, {"use_cache": False}],
        "cache_implementation": [
            {"cache_implementation": value} for value in ("dynamic", "static", "offloaded", "paged")
        ],
        "cache_config": [{"cache_config": {"nbits": 4}}],
        "max_cache_len": [{"max_cache_len": 64}],
        "temperature": [{"temperature": 0.7, **sampled}],
        "top_k": [{"top_k": 5, **sampled}],
        "top_p": [{"top_p": 0.9, **sampled}],
        "min_p": [{"min_p": 0.1, **sampled}],
        "top_h": [{"top_h": 0.4, **sampled}],
        "typical_p": [{"typical_p": 0.9, **sampled}],
        "epsilon_cutoff": [{"epsilon_cutoff": 1e-3, **sampled}],
        "eta_cutoff": [{"eta_cutoff": 1e-3, **sampled}],
        "repetition_penalty": [{"repetition_penalty": 1.2}],
        "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.2}],
        "length_penalty": [{"length_penalty": 2.0}],
        "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2}],
        "bad_words_ids": [{"bad_words_ids": [[5], [6, 7]]}],
        "renormalize_logits": [{"renormalize_logits": True}],
        "forced_bos_token_id": [{"forced_bos_token_id": 5}],
        "forced_eos_token_id": [{"forced_eos_token_id": 1}],
        "remove_invalid_values": [{"remove_invalid_values": True}],
        "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (1, 1.1)}],
        "suppress_tokens": [{"suppress_tokens": [5, 6]}],
        "begin_suppress_tokens": [{"begin_suppress_tokens": [5, 6]}],
        "sequence_bias": [{"sequence_bias": [[[5, 6], -1.0]]}],
        "token_healing": [{"token_healing": False}, {"token_healing": True, "tokenizer": tokenizer}],
        "guidance_scale": [{"guidance_scale": 1.0}, {"guidance_scale": 1.5}],
        "watermarking_config": [
            {"watermarking_config": WatermarkingConfig()},
            {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3), **sampled},
        ],
        "num_return_sequences": [{"num_return_sequences": 3, **sampled}],
        "output_attentions": [
            {"output_attentions": value, "return_dict_in_generate": True, **more}
            for value, more in ((False, {}), (True, {}), (True, {"prompt_lookup_num_tokens": 2}))
        ],
        "output_hidden_states": [
            {"output_hidden_states": value, "return_dict_in_generate": True} for value in (False, True)
        ],
        "output_scores": [{"output_scores": True, "return_dict_in_generate": True}],
        "output_logits": [{"output_logits": True, "return_dict_in_generate": True}],
        "return_dict_in_generate": [{"return_dict_in_generate": True}],
        "pad_token_id": [{"pad_token_id": 2}, {"pad_token_id": 10**6}],
        "bos_token_id": [{"bos_token_id": 3}],
        "eos_token_id": [{"eos_token_id": 5}, {"eos_token_id": [5, 6]}],
        "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 2}],
        "decoder_start_token_id": [{"decoder_start_token_id": 3}],
        "is_assistant": [{"is_assistant": False}, {"is_assistant": True}],
        "num_assistant_tokens": [{"num_assistant_tokens": 3, "assistant_model": model}],
        "num_assistant_tokens_schedule": [
            {"num_assistant_tokens_schedule": "heuristic", "assistant_model": model}
        ],
        "assistant_confidence_threshold": [{"assistant_confidence_threshold": 0.3, "assistant_model": model}],
        "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 0}],
        "max_matching_ngram_size": [{"max_matching_ngram_size": 3, "prompt_lookup_num_tokens": 3}],
        "assistant_early_exit": [{"assistant_early_exit": 1}, {"assistant_early_exit": 0}],
        "assistant_lookbehind": [{"assistant_lookbehind": 3}],
        "target_lookbehind": [{"target_lookbehind": 3}],
        "assistant_ensemble_weight": [
            {"assistant_ensemble_weight": 0.5},
            {"assistant_ensemble_weight": 0.5, "assistant_model": model},
        ],
        "speculation_type": [
            {"speculation_type": "dflash"},
            {"speculation_type": "dflash", "assistant_model": model},
        ],
        "compile_config": [{"compile_config": CompileConfig()}],
        "disable_compile": [{"disable_compile": True}],
        "continuous_batching_config": [{"continuous_batching_config": None}],
        "low_memory": [{"low_memory": True}, {"low_memory": True, "num_beams": 2}],
        "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4, **HUB}, {"penalty_alpha": 0.6, **sampled}],
        "dola_layers": [{"dola_layers": "high", **HUB}],
        "diversity_penalty": [{"diversity_penalty": 1.0}],
        "num_beam_groups": [{"num_beam_groups": 2}, {"num_beam_groups": 2, "num_beams": 4, **HUB}],
        "constraints": [{"constraints": [object()], "num_beams": 2, **HUB}],
        "force_words_ids": [{"force_words_ids": [[5]], "num_beams": 2, **HUB}],
        "prefill_chunk_size": [{"prefill_chunk_size": 2}, {"prefill_chunk_size": 0}],
        "transformers_version": [{"transformers_version": "5.0.0"}],
        "attention_mask": [{"attention_mask": value} for value in (None, MASK, LEFT, HOLE, LEFT.flip(-1))],
        "position_ids": [{"position_ids": positions}, {"position_ids": positions + 1}],
        "token_type_ids": [{"token_type_ids": torch.zeros_like(IDS)}],
        "inputs_embeds": [
            {"inputs_embeds": model.get_input_embeddings()(IDS).detach(), "input_ids": None, **more}
            for more in ({}, {"prefill_chunk_size": 2})
        ],
        "past_key_values": [
            {"past_key_values": DynamicCache()},
            {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        ],
        "logits_to_keep": [{"logits_to_keep": 2}],
        "labels": [{"labels": IDS}],
        "tokenizer": [{"tokenizer": tokenizer}],
    }
    return table


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = demo_model("gpt2")
    hf_paged.enable(model, backend="reference", fallback="silent", kv_cache_memory="8MiB")
    yield model
    hf_paged.disable(model)


@pytest.fixture(scope="module")
def table(model: Any) -> dict[str, list[dict[str, Any]]]:
    return samples(model, demo_tokenizer("gpt2"))


def outcome(model: Any, arguments: dict[str, Any]) -> set[str]:
    """What `explain` says to one set of arguments."""
    given = {"input_ids": IDS, "attention_mask": MASK, **arguments}
    if not {"max_length", "max_new_tokens", "generation_config"} & arguments.keys():
        given["max_new_tokens"] = 3
    explanation = hf_paged.explain(model, **{name: v for name, v in given.items() if v is not None})
    return {"native"} if explanation.native else {reason.code for reason in explanation.reasons}


def test_every_parameter_of_generate_has_a_row() -> None:
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert parameters <= PARAMETERS.keys(), "new in transformers: add rows"
    if _VERSION >= NEWEST:
        assert parameters == PARAMETERS.keys(), "superfluous rows"


def test_every_field_of_the_config_has_a_row() -> None:
    assert installed_fields() <= FIELDS.keys(), "new in transformers: add rows"
    if _VERSION >= NEWEST:
        assert installed_fields() == FIELDS.keys(), "superfluous rows"


def test_the_fields_taken_as_known_are_those_with_a_row() -> None:
    assert FIELDS.keys() == KNOWN_OPTIONS


def test_every_code_is_in_the_document_and_no_other() -> None:
    tables = (PARAMETERS, FIELDS, ARGUMENTS)
    named = {code for rows in tables for served in rows.values() for code in served} | OTHER.keys()
    assert named - {"native"} == REASONS.keys()


@pytest.mark.parametrize("name", [*PARAMETERS, *FIELDS, *ARGUMENTS])
def test_explain_agrees_with_the_row(name: str, model: Any, table: dict[str, list[dict[str, Any]]]) -> None:
    if name in FIELDS and name not in installed_fields():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    served = (PARAMETERS | FIELDS | ARGUMENTS)[name]
    seen = set().union(*(outcome(model, arguments) for arguments in table[name]))
    assert seen == served


def test_an_option_nobody_knows_falls_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_paged.generation.checks._unknown", frozenset({"from_the_future"}))
    config = GenerationConfig(max_new_tokens=3)
    config.from_the_future = 1
    explanation = hf_paged.explain(model, input_ids=IDS, attention_mask=MASK, generation_config=config)
    assert [reason.code for reason in explanation.reasons] == ["unknown_option"]
