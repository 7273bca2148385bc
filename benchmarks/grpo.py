"""TRL's GRPO with fast rollouts: 64 completions of ragged length a step by four ways, the same training by each pair.

`GRPOTrainer`, unedited, 8 prompts x 8 generations, 2 steps. Only the time within the trainer's own generation phase is
compared; a whole training is run first by each way and thrown away. Ways:

    generate                 TRL's default: padded `model.generate`
    continuous batching      `use_transformers_continuous_batching=True`: transformers' `generate_batch`
    hf_paged, generate       the default after hf_paged.enable(model)
    hf_paged, flag           the flag after hf_paged.enable(model)

Completions are sampled from a fixed seed and end at any of the ids of --ends (a share of the vocabulary), so they are
ragged; hf_paged draws the samples `generate` draws. A second training by each pair decodes greedily: losses must be the
same too. Every run is a row of --json, written at once.

    python benchmarks/grpo.py [--models llama,gpt2,gpt2-5m] [--repeats 3] [--json FILE [--resume]]
        [--minutes M]       needs trl
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rows import Rows, add_arguments

import hf_paged
from hf_paged.comparison.models import RANDOM_SHAPES, build_random, parse_dtype
from hf_paged.kernels import cpu_runtime

DEMO = Path(__file__).resolve().parent.parent / "examples" / "models"
PROMPTS = ("import", "The", "class", "A list is", "def f(x):", "If the", "The value of", "Note that")
#: TRL lets completions grow to 512 tokens; these end by themselves well before.
GENERATIONS, STEPS, LONGEST = 8, 2, 256
#: way -> (enabled, TRL's flag)
WAYS = {
    "generate": (False, False),
    "continuous batching": (False, True),
    "hf_paged, generate": (True, False),
    "hf_paged, flag": (True, True),
}
#: (ours, over) -> least wanted
TARGETS = {
    ("hf_paged, generate", "generate"): 2.0,
    ("hf_paged, flag", "continuous batching"): 3.0,
}
TOLERANCE = 1e-4
#: Of transformers' own continuous batching: pages of 256 tokens, two for each completion, and a large step.
POOL = {"num_blocks": 128, "max_batch_tokens": 512}


@functools.cache
def saved_shape(name: str) -> tempfile.TemporaryDirectory[str]:
    """A random shape without dropout, as a checkpoint: TRL loads the reference model by its path."""
    model = build_random(name, parse_dtype("float32"))
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, dropout, 0.0)
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder


def load(name: str, ends: int) -> tuple[Any, Any]:
    """A demo model or a random shape, and a tokenizer; completions end at any of `ends` ids over the vocabulary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        DEMO / ("llama" if name in RANDOM_SHAPES else name), padding_side="left"
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved_shape(name).name if name in RANDOM_SHAPES else DEMO / name
    )
    step = max(model.config.vocab_size // ends, 1)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *range(step - 1, model.config.vocab_size, step),
    ]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Length, and place in the batch: so that equal completions of a group are worth something too."""
    return [0.01 * len(ids) + float(i % GENERATIONS) for i, ids in enumerate(completion_ids)]


def train(name: str, way: str, arguments: argparse.Namespace, *, sample: bool) -> dict[str, Any]:
    """Two steps of a fresh model: seconds in the generation phase, what was logged, lengths of completions."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    enabled, flag = WAYS[way]
    model, tokenizer = load(name, arguments.ends)
    seconds: list[float] = []
    lengths: list[list[int]] = []

    class Timed(GRPOTrainer):
        """Looks at the clock around the generation phase."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            lengths.append([len(ids) for ids in result[0]])
            return result

    if enabled:
        hf_paged.enable(model, fallback="error")
    with tempfile.TemporaryDirectory() as folder:
        set_seed(7)
        trainer = Timed(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=arguments.micro_batch,
                gradient_accumulation_steps=len(PROMPTS) * GENERATIONS // arguments.micro_batch,
                num_generations=GENERATIONS,
                max_completion_length=LONGEST,
                generation_kwargs={"do_sample": sample},
                use_transformers_continuous_batching=flag,
                transformers_continuous_batching_config=POOL if flag else None,
                # Adam's first steps are signs of the gradient: it would make rounding as large as anything else.
                optim="sgd",
                learning_rate=0.05,
                beta=0.1,
                logging_steps=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
        if enabled:
            cpu_runtime.wait_for_loading()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    row = {
        "seconds": sum(seconds),
        "tokens": sum(map(sum, lengths)),
        "losses": [entry["loss"] for entry in logged],
        "grad_norms": [entry["grad_norm"] for entry in logged],
        "lengths": lengths,
    }
    if enabled:
        stats = hf_paged.stats(model)
        row |= {"native_calls": stats.native_calls, "requests": stats.requests, "steps": stats.steps}
        hf_paged.disable(model)
    return row


class Bench:
    """The rows that are there, and the others as they are wanted."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        targets = [{"arm": a, "against": b, "must": must} for (a, b), must in TARGETS.items()]
        about = {
            "kind": "grpo",
            "completions": len(PROMPTS) * GENERATIONS,
            "longest": LONGEST,
            "steps": STEPS,
        }
        about |= {
            "ends": arguments.ends,
            "micro_batch": arguments.micro_batch,
            "pool": POOL,
            "targets": targets,
        }
        self.rows = Rows(arguments, about)
        self.warm: set[tuple[str, str]] = set()

    def row(self, model: str, way: str, turn: int, *, sample: bool = True) -> dict[str, Any]:
        """The row of this training, from the file if it is there."""

        def run() -> dict[str, Any]:
            if (model, way) not in self.warm:
                train(model, way, self.arguments, sample=sample)
                self.warm.add((model, way))
            return train(model, way, self.arguments, sample=sample)

        return self.rows.get({"model": model, "way": way, "sample": sample, "round": turn}, run)


def same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two trainings had completions of the same lengths and the same losses and gradients, to rounding."""
    pairs = [*zip(ours["losses"], theirs["losses"], strict=True)]
    pairs += zip(ours["grad_norms"], theirs["grad_norms"], strict=True)
    near = all(abs(a - b) <= TOLERANCE * max(1.0, abs(b)) for a, b in pairs)
    return near and ours["lengths"] == theirs["lengths"]


def compare(bench: Bench, model: str, repeats: int) -> dict[str, Any]:
    """Runs what is missing for a model and says how the ways compare."""
    rows = {way: [bench.row(model, way, turn) for turn in range(repeats)] for way in WAYS}
    greedy = {way: bench.row(model, way, 0, sample=False) for way in WAYS}
    result: dict[str, Any] = {"ratios": {}, "same_training": {}}
    for ours, against in TARGETS:
        pairs = [b["seconds"] / a["seconds"] for a, b in zip(rows[ours], rows[against], strict=True)]
        result["ratios"][f"{ours} / {against}"] = {"median": statistics.median(pairs), "pairs": pairs}
        result["same_training"][f"greedy: {ours}"] = same_training(greedy[ours], greedy[against])
    # transformers' continuous batching draws other samples than generate, so only this pair has the same.
    same = same_training(rows["hf_paged, generate"][0], rows["generate"][0])
    result["same_training"]["sampled: hf_paged, generate"] = same
    lengths = sorted(itertools.chain(*rows["generate"][0]["lengths"]))
    result["new_tokens"] = {"least": lengths[0], "mean": statistics.mean(lengths), "most": lengths[-1]}
    return result


def table(data: dict[str, Any]) -> dict[str, Any]:
    """What docs/benchmarks.md shows of it."""
    lines = []
    for model, result in data["results"].items():
        tokens = result["new_tokens"]
        for way in WAYS:
            rows = [r for r in data["rows"] if (r["model"], r["way"], r["sample"]) == (model, way, True)]
            seconds = statistics.median(row["seconds"] for row in rows)
            ratio = next(
                (r["median"] for name, r in result["ratios"].items() if name.startswith(f"{way} /")), None
            )
            against = next((b for a, b in TARGETS if a == way), "")
            done = statistics.mean(row["tokens"] for row in rows)
            cells = [f"{seconds:.2f}", f"{done / seconds:.0f}", f"{ratio:.2f}× {against}" if ratio else ""]
            lengths = f"{tokens['least']}–{tokens['most']}, {tokens['mean']:.0f}"
            lines.append([model, lengths, way, *cells, str(len(rows))])
    about = (
        f"TRL's `GRPOTrainer`, {data['steps']} steps of {data['completions']} sampled completions: seconds in its "
        "generation phase. New tokens: least–most, mean, of `generate`. Every pair was trained greedily as well; "
        + ("all losses and gradients" if _all_same(data) else "**not all** losses and gradients")
        + " were the same."
    )
    head = ["model", "new tokens", "way", "seconds", "tokens/s", "times as fast as", "runs"]
    return {"about": about, "head": head, "rows": lines}


def _all_same(data: dict[str, Any]) -> bool:
    return all(all(result["same_training"].values()) for result in data["results"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,gpt2,gpt2-5m")
    parser.add_argument(
        "--ends", type=int, default=24, help="ids that end a completion, spread over the vocabulary"
    )
    parser.add_argument("--micro-batch", type=int, default=16, help="rows a backward pass takes")
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    bench, missed = Bench(arguments), 0
    results = bench.rows.data.setdefault("results", {})
    for model in arguments.models.split(","):
        result = results[model] = compare(bench, model, arguments.repeats)
        bench.rows.data["table"] = table(bench.rows.data)
        bench.rows.keep()
        print(
            f"{model}: {result['new_tokens']} new tokens a completion; same training: {result['same_training']}"
        )
        for name, must in zip(result["ratios"], TARGETS.values(), strict=True):
            ratio = result["ratios"][name]["median"]
            missed += ratio < must
            print(f"  {name}: {ratio:.2f} (must be ≥ {must:g}){'' if ratio >= must else '  MISSED'}")
        missed += not all(result["same_training"].values())
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
