"""The committed demo models are small, load offline and behave like trained ones.

Other tests lean on what is checked here: continuations that end by EOS, text that contains stop strings, chat
and padding tokens, and files small enough to live in the repository.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import DEMO_MODELS, FAMILIES, ROOT, demo_model, demo_tokenizer

PROMPTS = ROOT / "examples" / "prompts"
MAX_BYTES = 2_000_000
# Nats a token on the documents of mixed.jsonl, measured at 2.77, 3.08 and 3.17; guessing by frequency gives 5.9.
LOSS_BOUND = {"gpt2": 2.9, "gpt_bigcode": 3.2, "llama": 3.3}

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def loaded(family: str) -> tuple[PreTrainedModel, Any]:
    return demo_model(family), demo_tokenizer(family)


@functools.cache
def mixed_prompts() -> tuple[dict[str, str], ...]:
    lines = (PROMPTS / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def continuations(family: str, prompts: list[str], **kwargs: Any) -> torch.Tensor:
    """Continue prompts greedily; the new tokens, int64 [rows, longest]."""
    model, tokenizer = loaded(family)
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**batch, do_sample=False, tokenizer=tokenizer, **kwargs)
    return out[:, batch["input_ids"].shape[1] :]


def test_is_small_and_complete(family: str) -> None:
    folder = DEMO_MODELS / family
    assert (folder / "model.safetensors").stat().st_size <= MAX_BYTES
    model, tokenizer = loaded(family)
    assert model.config.model_type == family
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
    assert len(tokenizer) == model.config.vocab_size
    assert not [name for name, value in model.config.to_dict().items() if name.endswith("pdrop") and value]


@pytest.mark.parametrize("text", ["def f(a):\n    return a + 1\n", "naïve 東京 \t 12345 🙂", " leading", ""])
def test_tokenizer_round_trip(family: str, text: str) -> None:
    tokenizer = loaded(family)[1]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[:1] == [tokenizer.bos_token_id]) == (family == "llama")


def test_held_out_loss_is_that_of_a_trained_model(family: str) -> None:
    model, tokenizer = loaded(family)
    total, count = 0.0, 0
    with torch.no_grad():
        for entry in mixed_prompts():
            text = entry["prompt"] + entry["reference"] + tokenizer.eos_token
            ids = tokenizer(text, return_tensors="pt").input_ids
            total += model(ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert total / count < LOSS_BOUND[family]


def test_continuations_end_by_eos_and_differ(family: str) -> None:
    tokenizer = loaded(family)[1]
    rows = continuations(family, [entry["prompt"] for entry in mixed_prompts()[:16]], max_new_tokens=200)
    ended = (rows == tokenizer.eos_token_id).any(dim=1)
    assert ended.sum() >= 4
    lengths = {int((row != tokenizer.pad_token_id).sum()) for row in rows[ended]}
    assert len(lengths) >= 3


@pytest.mark.parametrize("stop", ["\n\n", "self"])
def test_stop_strings_are_hit(family: str, stop: str) -> None:
    tokenizer = loaded(family)[1]
    prompts = [entry["prompt"] for entry in mixed_prompts()[:32]]
    rows = continuations(family, prompts, max_new_tokens=60, stop_strings=[stop])
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert any(stop in text for text in texts)


def test_learned_positions_beyond_a_training_row_are_trained(family: str) -> None:
    """Rows of 256 tokens were trained on; a prompt of 512 still gets the loss of a trained model on what comes last."""
    model, tokenizer = loaded(family)
    joined = tokenizer.eos_token.join(entry["prompt"] + entry["reference"] for entry in mixed_prompts())
    ids = tokenizer(joined, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, 300:-1]
    assert torch.nn.functional.cross_entropy(logits, ids[0, 301:]).item() < LOSS_BOUND[family]


def test_chat_template_asks_for_an_answer(family: str) -> None:
    tokenizer = loaded(family)[1]
    if family != "llama":
        assert tokenizer.chat_template is None
        return
    chat = [{"role": "user", "content": "What does shlex.join do?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>What does shlex.join do?<|assistant|>"
    answer = continuations(family, [text.removeprefix(tokenizer.bos_token)], max_new_tokens=200)
    assert answer[0, -1] == tokenizer.eos_token_id
