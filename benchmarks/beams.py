"""Beam search of many prompts: one continuous batch of forked beams against upstream's padded batches.

GPT-2 124M with random weights in float32, 32 ragged prompts (lengths "design"), 4 beams, 40 new tokens. The best
batch size of --sizes for upstream is found on a part of the prompts; then both arms run once a round, in turn, and
results are compared.

    python benchmarks/beams.py [--model gpt2-124m] [--requests 32] [--beams 4] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import workload_from_lengths

MIN_SPEEDUP = 2.0
Outputs = list[list[int]]


def run(model: Any, prompts: list[list[int]], size: int, options: dict[str, Any]) -> tuple[float, Outputs]:
    """Seconds and new tokens of `generate` in left-padded batches of `size`."""
    outputs: Outputs = []
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        result = model.generate(input_ids=ids, attention_mask=mask, **options)
        outputs += result[:, longest:].tolist()
    return time.perf_counter() - start, outputs


def run_paged(model: Any, prompts: list[list[int]], options: dict[str, Any]) -> tuple[float, Outputs]:
    with hf_paged.enabled(model, fallback="error"):
        return run(model, prompts, len(prompts), options)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = build_random(arguments.model, parse_dtype("float32"))
    workload = workload_from_lengths(
        "design",
        arguments.requests,
        vocab_size=model.config.vocab_size,
        max_positions=position_limit(model),
        seed=arguments.seed,
    )
    prompts = [list(r.prompt) for r in workload.requests]
    options = {
        "num_beams": arguments.beams,
        "max_new_tokens": arguments.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    run_paged(model, prompts[:2], options | {"max_new_tokens": 4})  # compiles what is compiled once a process
    run(model, prompts[:2], 2, options | {"max_new_tokens": 4})
    sizes = [int(s) for s in arguments.sizes.split(",")]
    part = prompts[: max(sizes)]
    trials = {size: run(model, part, size, options)[0] for size in sizes}
    size = min(sizes, key=lambda s: trials[s])
    print(f"upstream's batches: {', '.join(f'{s}: {t:.1f} s' for s, t in trials.items())}", flush=True)
    rounds = []
    for turn in range(arguments.repeats):
        seconds: dict[str, float] = {}
        for arm in ("upstream", "paged") if turn % 2 == 0 else ("paged", "upstream"):
            if arm == "paged":
                seconds[arm], ours = run_paged(model, prompts, options)
            else:
                seconds[arm], theirs = run(model, prompts, size, options)
        rounds.append(seconds)
        print("  ".join(f"{arm} {s:.1f} s" for arm, s in seconds.items()), flush=True)
    return {
        "workload": workload.describe() | options,
        "trials": trials,
        "batch_size": size,
        "rounds": rounds,
        "speedup": statistics.median(r["upstream"] / r["paged"] for r in rounds),
        "same_results": sum(a == b for a, b in zip(ours, theirs, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--sizes", default="1,4,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    speedup, same = result["speedup"], result["same_results"]
    print(
        f"paged / upstream (batch {result['batch_size']}): {speedup:.2f}x (must be ≥ {MIN_SPEEDUP}); "
        f"same results: {same} of {arguments.requests}"
    )
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), **result})
    raise SystemExit(1 if speedup < MIN_SPEEDUP else 0)


if __name__ == "__main__":
    main()
