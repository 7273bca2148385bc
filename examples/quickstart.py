"""One line makes `generate()` paged. Run: python examples/quickstart.py [MODEL]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "llama")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name)

hf_paged.enable(model)  # the one line

inputs = tokenizer(["import os", "The statement", "A class is"], padding=True, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=24, do_sample=False)

for text in tokenizer.batch_decode(outputs, skip_special_tokens=True):
    print(repr(text))
print(hf_paged.stats(model))
