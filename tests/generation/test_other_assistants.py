"""Assistants with tokenizers of their own, first layers that draft, and enabled models that draft for others."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

import hf_paged
from hf_paged.engine.draft_vocabulary import OtherVocabulary
from tests.helpers import (
    FAMILIES,
    PAD,
    assert_same_tokens,
    demo_model,
    demo_tokenizer,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)
from tests.parity.equality import seeded_generate
from tests.parity.test_generate_parity import pool_bytes

BLOCK = 4
pytestmark = pytest.mark.usefixtures("eager")
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n",
    "import os\nimport sys\nimport",
    "The é and the 中文 of a string: 'naïve' ",
    "    for name in names:\n        if name not in seen:\n            seen.add(name)\n        ",
    "x",
]


def other_tokenizer(family: str) -> Any:
    """The demo tokenizer without its later merges: texts in more pieces, all of them known to the model."""
    data = json.loads(demo_tokenizer(family).backend_tokenizer.to_str())
    merges = data["model"]["merges"]
    data["model"]["merges"] = merges[: len(merges) // 2]
    from tokenizers import Tokenizer

    plain = demo_tokenizer(family)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        padding_side="left",
    )


def other_assistant(family: str) -> Any:
    """The demo model with a few ids more, as upstream only takes tokenizers where the vocabularies differ in size."""
    model = demo_model(family)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


def prompts(family: str, texts: list[str]) -> dict[str, torch.Tensor]:
    inputs = demo_tokenizer(family)(texts, return_tensors="pt", padding=True, padding_side="left")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool", ["default", "tight"])
@pytest.mark.parametrize("lookbehind", [10, 0])
def test_an_assistant_with_another_tokenizer(family: str, pool: str, lookbehind: int) -> None:
    model, assistant, tokenizer = demo_model(family), other_assistant(family), demo_tokenizer(family)
    if lookbehind == 0:
        assistant.generation_config.target_lookbehind = 0
        assistant.generation_config.assistant_lookbehind = 0
    inputs, config = prompts(family, TEXTS), {}
    cases = [{}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "repetition_penalty": 1.3}]
    expected = [seeded_generate(model, 3, **inputs, max_new_tokens=48, **case) for case in cases]
    if pool == "tight":
        config["kv_cache_memory"] = pool_bytes(model, -(-(inputs["input_ids"].shape[1] + 48) // BLOCK) + 1)
    drafts = {
        "assistant_model": assistant,
        "tokenizer": tokenizer,
        "assistant_tokenizer": other_tokenizer(family),
    }
    before = json.dumps(assistant.generation_config.to_dict(), default=str)
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error", **config):
        for case, tokens in zip(cases, expected, strict=True):
            with native_calls(model):
                actual = seeded_generate(model, 3, **inputs, max_new_tokens=48, **case, **drafts)
            assert_same_tokens(actual, tokens)
        stats = hf_paged.stats(model)
    assert 0.2 < stats.accepted_tokens / stats.drafted_tokens <= 1
    assert json.dumps(assistant.generation_config.to_dict(), default=str) == before


@pytest.mark.skipif(
    not hasattr(GenerationConfig(), "assistant_ensemble_weight"),
    reason="transformers before it fails where the tokenizers cut the text in other places",
)
def test_upstream_makes_the_same_text_of_another_tokenizer() -> None:
    model, assistant = demo_model("llama"), other_assistant("llama")
    inputs = prompts("llama", TEXTS[:1])
    kwargs = {**inputs, "max_new_tokens": 40, "tokenizer": demo_tokenizer("llama")}
    kwargs |= {"assistant_model": assistant, "assistant_tokenizer": other_tokenizer("llama")}
    expected = model.generate(**kwargs)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        assert_same_tokens(model.generate(**kwargs), expected)


def test_ids_without_an_embedding_are_neither_read_nor_drafted() -> None:
    model, assistant = demo_model("gpt2"), other_assistant("gpt2")
    own, theirs = demo_tokenizer("gpt2"), other_tokenizer("gpt2")
    own.add_tokens(["import"])
    theirs.add_tokens(["return"])
    beyond = model.config.vocab_size
    inputs = prompts("gpt2", ["def f():\n    return 1\nimport os\n", "import"])
    kwargs = {**inputs, "max_new_tokens": 24}
    expected = model.generate(**kwargs)
    assert len(own) > beyond
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        actual = model.generate(
            **kwargs, assistant_model=assistant, tokenizer=own, assistant_tokenizer=theirs
        )
    assert_same_tokens(actual, expected)


def test_one_tokenizer_for_both_with_more_ids_than_the_assistant() -> None:
    model, assistant, tokenizer = demo_model("llama"), demo_model("llama"), demo_tokenizer("llama")
    beyond = model.config.vocab_size
    tokenizer.add_tokens(["import"])
    model.resize_token_embeddings(beyond + 8)
    ids = torch.tensor([tokenizer("import os\nimport sys\n")["input_ids"]])
    assert ids.max() >= beyond, "the assistant would know all of it"
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16}
    expected = model.generate(**kwargs)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        actual = model.generate(
            **kwargs, assistant_model=assistant, tokenizer=tokenizer, assistant_tokenizer=tokenizer
        )
    assert_same_tokens(actual, expected)


def test_the_callers_tokenizers_are_never_used_by_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, assistant = demo_model("llama"), other_assistant("llama")
    own, theirs = demo_tokenizer("llama"), other_tokenizer("llama")
    seen: list[Any] = []
    original = OtherVocabulary.__init__

    def spy(self: Any, *args: Any) -> None:
        seen.extend(args[:2])
        original(self, *args)

    monkeypatch.setattr(OtherVocabulary, "__init__", spy)
    with hf_paged.enabled(model, fallback="error"):
        for _ in range(2):
            model.generate(
                **prompts("llama", TEXTS[:2]),
                max_new_tokens=8,
                assistant_model=assistant,
                tokenizer=own,
                assistant_tokenizer=theirs,
            )
    assert len(seen) == 4
    assert not any(t is own or t is theirs for t in seen)
    assert seen[:2] == seen[2:], "one copy each"


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_early_exit_never_shortens_what_others_see(layers: int) -> None:
    model, inputs = make_model("llama"), left_pad(random_prompts([5, 9, 2]))
    expected = model.generate(**inputs, max_new_tokens=30, pad_token_id=PAD)
    logits, depth = model(**inputs).logits, model.config.num_hidden_layers
    wrong: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if model.config.num_hidden_layers != depth or len(model.model.layers) != depth:
                wrong.append("shortened")
            if not torch.equal(model(**inputs).logits, logits):
                wrong.append("other logits")

    with hf_paged.enabled(model, block_size=BLOCK, fallback="error"):
        thread = threading.Thread(target=look)
        thread.start()
        try:
            with native_calls(model):
                actual = model.generate(
                    **inputs, max_new_tokens=30, pad_token_id=PAD, assistant_early_exit=layers
                )
            stats = hf_paged.stats(model)
        finally:
            done.set()
            thread.join()
    assert not wrong
    assert_same_tokens(actual, expected)
    assert stats.drafted_tokens > 0
    if layers >= depth:
        assert stats.accepted_tokens == stats.drafted_tokens, "the whole model is always right"


def test_early_exit_drafts_with_the_adapter_of_each_row() -> None:
    peft_model = get_peft_model(
        make_model("llama"),
        LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "first",
    )
    peft_model.add_adapter(
        "second", LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    peft_model.eval()
    inputs, names = left_pad(random_prompts([5, 9, 2])), ["first", "__base__", "second"]
    kwargs: dict[str, Any] = {**inputs, "max_new_tokens": 24, "pad_token_id": PAD, "adapter_names": names}
    depth = peft_model.config.num_hidden_layers
    with hf_paged.enabled(peft_model, block_size=BLOCK, fallback="error"):
        expected = peft_model.generate(**kwargs)
        assert_same_tokens(peft_model.generate(**kwargs, assistant_early_exit=1), expected)
        before = hf_paged.stats(peft_model)
        assert_same_tokens(peft_model.generate(**kwargs, assistant_early_exit=depth), expected)
        after = hf_paged.stats(peft_model)
    drafted = after.drafted_tokens - before.drafted_tokens
    assert after.accepted_tokens - before.accepted_tokens == drafted > 0, "drafted with other adapters"


def test_an_enabled_model_drafts_for_one_that_is_not() -> None:
    model, assistant = make_model("llama"), make_model("llama")
    prompt = left_pad(random_prompts([7]))
    for options in ({}, {"assistant_confidence_threshold": 0.2}):
        for name, value in options.items():
            setattr(assistant.generation_config, name, value)
        expected = model.generate(**prompt, max_new_tokens=24, assistant_model=assistant)
        with hf_paged.enabled(assistant, fallback="error"):
            actual = model.generate(**prompt, max_new_tokens=24, assistant_model=assistant)
            assert hf_paged.stats(assistant).native_calls > 1
        assert_same_tokens(actual, expected)
