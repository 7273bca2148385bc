"""GRPO with TRL: rollouts share one running batch and their prompt's blocks; nothing else in the trainer changes.

Run: python examples/grpo.py [MODEL]      needs trl
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "llama")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name)
hf_paged.enable(model)  # the one line; the weights train between calls


def reward(completions: list[str], **columns: object) -> list[float]:
    """Short lines are good."""
    return [-float(len(text.partition("\n")[0])) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("import", "The", "class", "A")]),
        args=GRPOConfig(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=16,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            # Or through the other door, which hf_paged serves as well:
            # use_transformers_continuous_batching=True,
        ),
    )
    trainer.train()

stats = hf_paged.stats(model)
print(
    f"{stats.native_calls} native calls, {stats.requests} rollouts, {stats.fallback_calls or 'no'} fallbacks"
)
