"""Requests with a common long prompt, all submitted at once: time to the first token with the prefix cache and without.

The cached arm runs twice: cold (nothing cached: the first request computes the prompt, the others wait for its blocks)
and warm (again, other endings). Arms alternate; a ratio is of one round. The tokens must be equal, else the exit
code is 1. Target: mean time to first token ≥ 5 times better, cold and warm.

    python benchmarks/prefix.py [--requests 64] [--prompt 512] [--ending 8] [--new-tokens 16] [--model gpt2-5m]
    [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json

TARGET = 5.0


def prompts_of(args: argparse.Namespace, vocab_size: int, round_number: int, run: int) -> list[list[int]]:
    """The common prompt, another one in each round, and an ending of each request's own, another one in each run."""
    common = random.Random(f"common:{round_number}").choices(range(vocab_size), k=args.prompt)
    endings = random.Random(f"endings:{round_number}:{run}")
    return [common + endings.choices(range(vocab_size), k=args.ending) for _ in range(args.requests)]


def run_arm(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Mean time to first token, time to the last answer (seconds), and the tokens."""
    client = hf_paged.engine(model)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    handles = [client.submit(prompt, **options) for prompt in prompts]
    results = [handle.result() for handle in handles]
    firsts = [r.metrics.time_to_first_token for r in results]
    return statistics.fmean(firsts), max(r.metrics.total for r in results), [r.token_ids for r in results]


def one_round(model: Any, args: argparse.Namespace, number: int) -> dict[str, Any]:
    cold, warm = (prompts_of(args, model.config.vocab_size, number, run) for run in range(2))
    seconds: dict[str, tuple[float, float]] = {}
    tokens: dict[str, list[list[int]]] = {}
    hits: dict[str, int] = {}

    def cached() -> None:
        with hf_paged.enabled(model):
            settle(model)
            for name, prompts in (("cold", cold), ("warm", warm)):
                hf_paged.reset_stats(model)
                *taken, tokens[name] = run_arm(model, prompts, args.new_tokens)
                seconds[name], hits[name] = (taken[0], taken[1]), hf_paged.stats(model).prefix_hit_tokens

    def uncached() -> None:
        with hf_paged.enabled(model, prefix_caching=False):
            settle(model)
            for name, prompts in (("cold", cold), ("warm", warm)):
                *taken, tokens[f"{name}, no cache"] = run_arm(model, prompts, args.new_tokens)
                seconds[f"{name}, no cache"] = (taken[0], taken[1])

    for arm in (cached, uncached) if number % 2 == 0 else (uncached, cached):
        arm()
    row: dict[str, Any] = {"prefix_hit_tokens": hits}
    for name in ("cold", "warm"):
        row[name] = {
            "first_token_seconds": seconds[name][0],
            "first_token_seconds_without": seconds[f"{name}, no cache"][0],
            "first_token_ratio": seconds[f"{name}, no cache"][0] / seconds[name][0],
            "total_ratio": seconds[f"{name}, no cache"][1] / seconds[name][1],
            "equal_tokens": tokens[name] == tokens[f"{name}, no cache"],
        }
    return row


def settle(model: Any) -> None:
    """One short request: kernels are loaded, memory is there."""
    hf_paged.engine(model).submit([1, 2, 3], max_new_tokens=4, eos_token_id=None).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    for name, default in (
        ("requests", 64),
        ("prompt", 512),
        ("ending", 8),
        ("new-tokens", 16),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="gpt2-5m")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = build_random(args.model, parse_dtype("float32"))
    one_round(model, args, -1)
    rows = [one_round(model, args, number) for number in range(args.repeats)]
    right = True
    for name in ("cold", "warm"):
        ratios = [row[name]["first_token_ratio"] for row in rows]
        equal = all(row[name]["equal_tokens"] for row in rows)
        median = statistics.median(ratios)
        right &= equal and median >= TARGET
        print(
            f"{name}: mean time to first token {median:.1f}× better (min {min(ratios):.1f}, max {max(ratios):.1f}), "
            f"all answers {statistics.median(row[name]['total_ratio'] for row in rows):.1f}× sooner, "
            f"{rows[-1]['prefix_hit_tokens'][name]} prompt tokens found, tokens {'equal' if equal else 'DIFFER'}"
        )
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, {"options": options, "rounds": rows, "environment": environment()})
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
