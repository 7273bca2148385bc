"""Many prompts of all lengths, each with its own options, in one batch. Run: python examples/batch.py [MODEL]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "gpt2")
tokenizer = AutoTokenizer.from_pretrained(name)
model = hf_paged.enable(AutoModelForCausalLM.from_pretrained(name))

texts = ["import os", "The statement is executed", "A", "If an exception occurs during the loop, it"]
prompts = [tokenizer(text)["input_ids"] for text in texts]  # no padding
configs = [GenerationConfig(max_new_tokens=8 + 8 * i, do_sample=i % 2 == 1) for i in range(len(texts))]

for text, result in zip(
    texts, hf_paged.generate_many(model, prompts, generation_config=configs), strict=True
):
    print(
        f"{len(result.token_ids):3d} tokens, {result.finish_reason}: {text}|{tokenizer.decode(result.token_ids)}"
    )

stats = hf_paged.stats(model)
print(f"{stats.generated_tokens} tokens in {stats.steps} steps, {stats.peak_running} requests at once")
