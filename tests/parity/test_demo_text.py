"""Real text on the trained demo models: ends of sequence, stop strings, samples, chats; and `generate_many`."""

from __future__ import annotations

import json

import pytest
import torch

import hf_paged
from tests.helpers import FAMILIES, ROOT, demo_model, demo_tokenizer, native_calls
from tests.parity.equality import assert_equal_output, seeded_generate


def prompts(count: int) -> list[str]:
    lines = (ROOT / "examples" / "prompts" / "mixed.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


OPTIONS = {
    "greedy": {"do_sample": False, "max_new_tokens": 60},
    "sampled": {"do_sample": True, "max_new_tokens": 40, "temperature": 0.8},
    "stop_strings": {"do_sample": False, "max_new_tokens": 60, "stop_strings": ["\n\n", "self"]},
    "sampled_stop_strings": {"do_sample": True, "max_new_tokens": 40, "stop_strings": ["return", ". "]},
    "penalised": {
        "do_sample": False,
        "max_new_tokens": 40,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
    },
    "no_eos": {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_equal(family, option):
    plain, enabled, tokenizer = demo_model(family), demo_model(family), demo_tokenizer(family)
    inputs = dict(tokenizer(prompts(12), return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    kwargs = inputs | OPTIONS[option]
    if "stop_strings" in kwargs:
        kwargs["tokenizer"] = tokenizer
    expected = seeded_generate(plain, 7, **kwargs)
    with hf_paged.enabled(enabled), native_calls(enabled):
        actual = seeded_generate(enabled, 7, **kwargs)
    assert_equal_output(plain, kwargs, 7, expected, actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_many_equals_one_by_one(family):
    model, tokenizer = demo_model(family), demo_tokenizer(family)
    texts = [tokenizer(p)["input_ids"] for p in prompts(20)]
    expected = [
        model.generate(torch.tensor([t]), max_new_tokens=50, do_sample=False)[0, len(t) :].tolist()
        for t in texts
    ]
    with hf_paged.enabled(model), native_calls(model, len(texts)):
        results = hf_paged.generate_many(model, texts, max_new_tokens=50, do_sample=False)
    for text, want, result in zip(texts, expected, results, strict=True):
        kwargs = {"input_ids": torch.tensor([text]), "max_new_tokens": 50, "do_sample": False}
        whole = torch.tensor([text + result.token_ids])
        assert_equal_output(model, kwargs, None, torch.tensor([text + want]), whole)
        assert result.prompt_length == len(text)
        assert result.finish_reason == (
            "stop" if len(want) < 50 or want[-1] == tokenizer.eos_token_id else "length"
        )


def test_sampled_generate_many_repeats_with_the_seed_whatever_the_batching():
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    texts = [tokenizer(p)["input_ids"] for p in prompts(8)]
    runs = []
    for seqs in (8, 3, 1):
        with hf_paged.enabled(model, max_num_seqs=seqs):
            torch.manual_seed(5)
            runs.append(
                [r.token_ids for r in hf_paged.generate_many(model, texts, max_new_tokens=20, do_sample=True)]
            )
    assert runs[0] == runs[1] == runs[2]
