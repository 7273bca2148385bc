"""Speculation against the same engine without it: greedy requests, tokens compared.

On the trained demo LLaMA, with and without prompt_lookup_num_tokens=10:
  repetitive   a text of up to 60 tokens said four times, 128 new tokens: the model goes on repeating
  ordinary     the demo prompts, 128 new tokens at most
each for 1 (several texts, one after another), 8 and 32 requests at once. On a GPT-2 124M shape (random weights; the
last ten layers add a hundredth of what they would), with and without an assistant of its first two layers: the cost
of both is real, that they mostly agree is made so.

A ratio is plain time over speculative time of one pair, both in one process and in turn; medians are compared with the
targets. For one request also transformers' own prompt lookup is run, on the model as it was.

    python benchmarks/speculation.py [--repeats 7] [--skip-assistant] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.models import build_random, load_model, parse_dtype
from hf_paged.comparison.report import write_json

ROOT = Path(__file__).resolve().parent.parent
LOOKUP = {"prompt_lookup_num_tokens": 10}
NEW_TOKENS = 128
#: (text, requests at once) -> what plain time over speculative time must be.
TARGETS = {("repetitive", 1): 1.5, ("repetitive", 32): 0.95, ("ordinary", 32): 0.95}
_NUM_ALONE = 4
Outputs = list[list[int]]


def texts(tokenizer: Any) -> dict[str, Outputs]:
    """32 prompts of each kind, as token ids."""
    lines = (ROOT / "examples" / "prompts" / "mixed.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["prompt"].strip()]
    whole = [tokenizer(row["prompt"] + row["reference"] + "\n")["input_ids"][:60] for row in rows]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    found = {
        "repetitive": [ids * 4 for ids in whole if len(ids) >= 20][:32],
        "ordinary": [ids for ids in prompts if ids][:32],
    }
    assert all(len(prompts) == 32 for prompts in found.values())
    return found


def run(model: Any, calls: list[Outputs], **options: Any) -> tuple[float, Outputs]:
    """Seconds for `calls`, one after another, each of prompts at once; and all tokens."""
    start = time.perf_counter()
    outputs: Outputs = []
    for prompts in calls:
        results = hf_paged.generate_many(model, prompts, do_sample=False, **options)
        outputs += [result.token_ids for result in results]
    return time.perf_counter() - start, outputs


def paired(
    plain: Callable[[], tuple[float, Outputs]], drafted: Callable[[], tuple[float, Outputs]], repeats: int
) -> dict[str, Any]:
    """Both in turn, a pair to warm up first."""
    ratios, seconds, equal = [], [], True
    for turn in range(repeats + 1):
        order = (plain, drafted) if turn % 2 == 0 else (drafted, plain)
        done = {arm: arm() for arm in order}
        equal &= done[plain][1] == done[drafted][1]
        if turn:
            seconds.append((done[plain][0], done[drafted][0]))
            ratios.append(done[plain][0] / done[drafted][0])
    tokens = sum(map(len, done[plain][1]))
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_equal": equal,
    }


def measure(
    name: str, model: Any, calls: list[Outputs], drafts: dict[str, Any], repeats: int, **options: Any
) -> Any:
    """One row: `calls` with and without `drafts` on the engine."""
    with hf_paged.enabled(model, fallback="error", prefix_caching=False):
        row = paired(
            lambda: run(model, calls, **options),
            lambda: run(model, calls, **options, **drafts),
            repeats,
        )
        stats = hf_paged.stats(model)
    row |= {"name": name, "drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens}
    return row


def upstream_alone(model: Any, prompts: Outputs, repeats: int) -> dict[str, Any]:
    """transformers' own prompt lookup against its own greedy search."""

    def arm(**drafts: Any) -> tuple[float, Outputs]:
        start = time.perf_counter()
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **drafts)
            outputs.append(tokens[0, len(prompt) :].tolist())
        return time.perf_counter() - start, outputs

    return paired(arm, lambda: arm(**LOOKUP), repeats) | {"name": "transformers, repetitive, 1"}


def build_pair() -> tuple[Any, Any]:
    """A random GPT-2 124M whose last ten layers do little, and a model of its first two."""
    model = build_random("gpt2-124m", parse_dtype("float32"))
    with torch.no_grad():
        for layer in model.transformer.h[2:]:
            layer.attn.c_proj.weight *= 0.01
            layer.mlp.c_proj.weight *= 0.01
    config = copy.deepcopy(model.config)
    config.n_layer = 2
    assistant = type(model)(config).eval()
    assistant.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in assistant.state_dict()}
    )
    assistant.generation_config.num_assistant_tokens = 8
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return model, assistant


def show(row: dict[str, Any], target: float | None = None) -> bool:
    """Prints a row. Returns whether its target was met and its tokens were equal."""
    met = row["tokens_equal"] and (target is None or row["ratio"] >= target)
    line = f"{row['name']}: {row['ratio']:.2f} × ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
    if "drafted" in row:
        line += f", {row['accepted']} of {row['drafted']} drafts right"
    line += "" if target is None else f", must be ≥ {target:g}"
    line += "" if row["tokens_equal"] else ", TOKENS DIFFER"
    print(line + ("" if met else "  MISSED"), flush=True)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-assistant", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load_model(str(ROOT / "examples" / "models" / "llama"))
    model, rows, met = loaded.model, [], True
    for kind, prompts in texts(loaded.tokenizer).items():
        for number in (1, 8, 32):
            calls = [[prompt] for prompt in prompts[:_NUM_ALONE]] if number == 1 else [prompts[:number]]
            row = measure(
                f"{kind}, {number}", model, calls, LOOKUP, arguments.repeats, max_new_tokens=NEW_TOKENS
            )
            met &= show(row, TARGETS.get((kind, number)))
            rows.append(row)
        if kind == "repetitive":
            rows.append(upstream_alone(model, prompts[:_NUM_ALONE], arguments.repeats))
            show(rows[-1])
    if not arguments.skip_assistant:
        model, assistant = build_pair()
        source = random.Random(0)
        for number in (1, 8):
            calls = [[source.choices(range(50257), k=40) for _ in range(number)]]
            drafts = {"assistant_model": assistant}
            row = measure(
                f"assistant, {number}", model, calls, drafts, max(1, arguments.repeats // 2),
                max_new_tokens=48, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            met &= show(row)
            rows.append(row)
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "rows": rows})
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
