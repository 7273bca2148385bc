"""Prompts healed by upstream's own code, whose inner calls the engine serves too; and options without an effect."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import hf_paged
from tests.helpers import FAMILIES, assert_same_tokens, demo_model, demo_tokenizer, native_calls

TEXTS = ["import o", "def f(self, nam", "for x in rang"]


def inputs_of(family: str, texts: list[str]) -> dict[str, Any]:
    tokenizer = demo_tokenizer(family)
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"tokenizer": tokenizer}


@pytest.mark.parametrize("family", FAMILIES)
def test_healed_prompts_go_on_as_upstreams(family: str) -> None:
    model = demo_model(family)
    healed = 0
    for texts in [[text] for text in TEXTS] + [TEXTS]:
        kwargs = {**inputs_of(family, texts), "max_new_tokens": 12, "token_healing": True}
        expected = model.generate(**kwargs)
        healed += not torch.equal(expected[:, : kwargs["input_ids"].shape[1]], kwargs["input_ids"])
        with hf_paged.enabled(model, fallback="error"):
            assert hf_paged.explain(model, **kwargs).native
            assert hf_paged.stats(model).native_calls == 0, "explain has healed the prompt"
            actual = model.generate(**kwargs)
            assert hf_paged.stats(model).native_calls >= 1
        assert_same_tokens(actual, expected)
    assert healed, "nothing was healed: this shows nothing"


def test_healing_without_a_tokenizer_is_upstreams_error() -> None:
    model = demo_model("gpt2")
    ids = inputs_of("gpt2", TEXTS[:1])["input_ids"]
    with hf_paged.enabled(model), pytest.raises(ValueError, match="token healing"):
        model.generate(ids, max_new_tokens=3, token_healing=True)


def test_requests_do_not_heal() -> None:
    model, tokenizer = demo_model("gpt2"), demo_tokenizer("gpt2")
    prompt = tokenizer(TEXTS[0])["input_ids"]
    options = {"max_new_tokens": 5, "token_healing": True, "tokenizer": tokenizer}
    expected = model.generate(torch.tensor([prompt]), **options)[0].tolist()
    with hf_paged.enabled(model, fallback="silent"):
        with pytest.raises(hf_paged.FallbackError, match="token_healing"):
            hf_paged.engine(model).submit(prompt, **options)
        result = hf_paged.generate_many(model, [prompt], **options)[0]
        assert expected[-len(result.token_ids) :] == result.token_ids


def test_requests_whose_own_config_heals_are_healed_one_by_one() -> None:
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    config = GenerationConfig(token_healing=True, max_new_tokens=6)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = [
        model.generate(torch.tensor([p]), generation_config=config, tokenizer=tokenizer)[0].tolist()
        for p in prompts
    ]
    with hf_paged.enabled(model, fallback="silent"):
        results = hf_paged.generate_many(model, prompts, generation_config=[config] * 3, tokenizer=tokenizer)
        assert hf_paged.stats(model).fallback_calls == {"token_healing": 3}
    for result, ids in zip(results, expected, strict=True):
        assert ids[-len(result.token_ids) :] == result.token_ids


def test_compile_config_has_no_effect_and_says_so_as_upstream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kwargs = demo_model("gpt2"), {**inputs_of("gpt2", TEXTS), "max_new_tokens": 5}
    expected = model.generate(**kwargs)
    said: list[str] = []
    logger = logging.getLogger("transformers.generation.utils")
    monkeypatch.setattr(logger, "warning_once", lambda text, *args: said.append(text), raising=False)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        actual = model.generate(**kwargs, compile_config=CompileConfig())
    assert_same_tokens(actual, expected)
    assert any("Compilation will be skipped" in text for text in said)
