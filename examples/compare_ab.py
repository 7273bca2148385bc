"""The same prompts through transformers and through hf_paged: equal tokens, and how long each took.

Run: python examples/compare_ab.py [MODEL]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "gpt2")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

prompts = [
    tokenizer(f"{word} ")["input_ids"]
    for word in ("import", "The", "class", "for", "A", "if", "return", "def")
]
report = hf_paged.compare(model, prompts, max_new_tokens=24, arms=("loop", "hf_paged"), repeats=1)
print(report)
