"""Fine-tune two LoRAs on a demo model in seconds, then serve both and the base model in one continuous batch.

One adapter learns to shout (capital letters), the other to write questions. Then the same prompts run with each of
them: through PEFT's own mixed batch (`adapter_names`), and through hf_paged; both give the same tokens.

    python examples/multi_lora.py [--steps 40] [--folder DIR]

DIR keeps them: `hf-paged generate examples/models/llama "If the " --adapter shout=DIR/shout --adapter __base__`.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from demo_corpus import load_corpus, question
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

BASE = Path(__file__).resolve().parent / "models" / "llama"
PROMPTS = ["The statement ", "A module ", "This function returns ", "If the "]
NAMES = ["shout", "ask", "__base__"]


def texts(rng: random.Random) -> dict[str, Callable[[], str]]:
    """What each adapter learns from: a function that draws one text."""
    documents = [doc.text for doc in load_corpus()[0] if doc.kind == "prose"]
    words = sorted({word.strip(".,:;()'\"") for text in documents for word in text.split() if word.isalpha()})
    return {
        "shout": lambda: rng.choice(documents).upper()[:200],
        "ask": lambda: " ".join(question(rng.choice(words)) for _ in range(5)),
    }


def fine_tune(model: Any, tokenizer: Any, name: str, draw: Callable[[], str], steps: int) -> float:
    """Trains adapter `name` and returns its last loss."""
    model.set_adapter(name)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        batch = tokenizer(
            [draw() for _ in range(8)], return_tensors="pt", padding=True, truncation=True, max_length=64
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config, adapter_name="shout")
    model.add_adapter("ask", config)
    for name, draw in texts(random.Random(0)).items():
        start = time.perf_counter()
        loss = fine_tune(model, tokenizer, name, draw, arguments.steps)
        print(
            f"adapter {name!r}: loss {loss:.2f} after {arguments.steps} steps, {time.perf_counter() - start:.1f} s"
        )
    if arguments.folder:
        model.save_pretrained(arguments.folder)

    rows = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    inputs = tokenizer([prompt for prompt, _ in rows], return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 24, "do_sample": False, "adapter_names": [name for _, name in rows]}
    expected = model.generate(**inputs, **options)

    hf_paged.enable(model)
    actual = model.generate(**inputs, **options)  # the same call: one continuous batch over paged KV
    print(f"the same tokens as PEFT's mixed batch: {torch.equal(actual, expected)}; native: ", end="")
    print(hf_paged.stats(model).native_calls == 1)
    ragged = [
        tokenizer(prompt)["input_ids"] for prompt, _ in rows
    ]  # the same without padding, as a list of requests
    results = hf_paged.generate_many(
        model, ragged, adapters=[name for _, name in rows], max_new_tokens=24, do_sample=False
    )
    for (prompt, name), result in zip(rows, results, strict=True):
        print(f"{name:>8}: {prompt}{tokenizer.decode(result.token_ids, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
