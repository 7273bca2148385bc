"""A text-generation pipeline over a dataset: one stream of requests, results in order as they are ready.

Run: python examples/pipeline_dataset.py [MODEL]
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "gpt2")
pipe = pipeline("text-generation", model=name)
model = hf_paged.enable(pipe).model  # the one line; without it each prompt runs alone

dataset = Dataset.from_dict({"text": [f"Section {i}: the " for i in range(1, 33)]})
for i, records in enumerate(pipe(KeyDataset(dataset, "text"), max_new_tokens=16, do_sample=False)):
    print(i, repr(records[0]["generated_text"]))

stats = hf_paged.stats(model)
print(f"{stats.native_calls} requests, up to {stats.peak_running} at once")
