"""Requests that start at once and give their tokens as they come. Run: python examples/streaming.py [MODEL]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "llama")
tokenizer = AutoTokenizer.from_pretrained(name)
model = hf_paged.enable(AutoModelForCausalLM.from_pretrained(name))
engine = hf_paged.engine(model)

first, second = (
    engine.submit(tokenizer(text)["input_ids"], max_new_tokens=24, do_sample=False)
    for text in ("The statement", "import os")
)
for token in first:  # the second runs beside it, watched or not
    print(tokenizer.decode([token]), end="", flush=True)
print()
print(repr(tokenizer.decode(second.result(timeout=60).token_ids)))
