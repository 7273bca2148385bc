"""What `deterministic=True` costs: the same work with it and without, in turn, and its promise checked on the way.

Shapes with random weights; requests of lengths "design". Work: all requests at once, one request alone, and one prompt
of 512 tokens for a single token. Times are ratios of paired runs, deterministic over not: 1.5 is the most aimed at.
Then log-probabilities of some requests, each alone on an empty cache, are compared with those of all at once, bit for
bit; without the option they should differ.

    python benchmarks/deterministic.py [--shapes gpt2-5m,gpt2-124m] [--dtypes float32,bfloat16] [--requests 64]
    [--repeats 3] [--checked 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Request, workload_from_lengths

MAX_COST = 1.5
LONG_PROMPT = 512


def seconds(model: Any, requests: list[Request], deterministic: bool) -> float:
    """Of one run, on an empty cache, after a request of one token that loads the kernels."""
    with hf_paged.enabled(model, deterministic=deterministic, prefix_caching=False):
        hf_paged.generate_many(model, [[1, 2, 3]], max_new_tokens=2, do_sample=False)
        engine = hf_paged.engine(model)
        start = time.perf_counter()
        handles = [
            engine.submit(list(r.prompt), max_new_tokens=r.max_new_tokens, do_sample=False) for r in requests
        ]
        for handle in handles:
            handle.result()
        return time.perf_counter() - start


def cost(model: Any, requests: list[Request], repeats: int) -> dict[str, Any]:
    pairs = []
    for turn in range(repeats + 1):
        order = (True, False) if turn % 2 else (False, True)
        taken = {deterministic: seconds(model, requests, deterministic) for deterministic in order}
        if turn:  # the first pair warms up
            pairs.append((taken[True], taken[False]))
    ratios = [ours / plain for ours, plain in pairs]
    return {
        "cost": statistics.median(ratios),
        "cost_min": min(ratios),
        "cost_max": max(ratios),
        "seconds": [{"deterministic": a, "plain": b} for a, b in pairs],
    }


def transcripts(model: Any, groups: list[list[Request]], deterministic: bool) -> list[Any]:
    """Tokens and log-probabilities of the requests of each group, which run together."""
    found = []
    for group in groups:
        with hf_paged.enabled(model, deterministic=deterministic, prefix_caching=False):
            hf_paged.generate_many(model, [[1, 2, 3]], max_new_tokens=2, do_sample=False)
            engine = hf_paged.engine(model)
            handles = [
                engine.submit(
                    list(r.prompt), max_new_tokens=min(8, r.max_new_tokens), do_sample=False, logprobs=2
                )
                for r in group
            ]
            results = [handle.result() for handle in handles]
        found.append([(r.token_ids, r.logprobs) for r in results])
    return found


def equal_bits(model: Any, requests: list[Request], checked: int, deterministic: bool) -> int:
    """How many of the first `checked` requests have the same bits alone as beside all others."""
    alone = transcripts(model, [[r] for r in requests[:checked]], deterministic)
    (together,) = transcripts(model, [requests], deterministic)
    return sum(one[0] == both for one, both in zip(alone, together, strict=False))


def measure(shape: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = build_random(shape, parse_dtype(dtype))
    limit = position_limit(model)
    workload = workload_from_lengths(
        "design",
        arguments.requests,
        vocab_size=model.config.vocab_size,
        max_positions=limit,
        seed=arguments.seed,
    )
    requests = list(workload.requests)
    long = Request(tuple(i % 997 for i in range(min(LONG_PROMPT, limit - 1))), 1)
    row: dict[str, Any] = {"shape": shape, "dtype": dtype}
    for name, work in (("all_at_once", requests), ("alone", requests[:1]), ("long_prompt", [long])):
        row[name] = cost(model, work, arguments.repeats)
    if arguments.checked:
        row["checked"] = min(arguments.checked, len(requests))
        for name, deterministic in (("equal", True), ("equal_without", False)):
            row[name] = equal_bits(model, requests, row["checked"], deterministic)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="gpt2-5m,gpt2-124m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checked", type=int, default=8, help="requests whose bits are compared; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        for dtype in arguments.dtypes.split(","):
            row = measure(shape, dtype, arguments)
            rows.append(row)
            for name in ("all_at_once", "alone", "long_prompt"):
                part = row[name]
                verdict = "ok" if part["cost"] <= MAX_COST else "ABOVE"
                print(
                    f"{shape:10s} {dtype:9s} {name:12s} {part['cost']:.2f}x ({part['cost_min']:.2f} to "
                    f"{part['cost_max']:.2f}), at most {MAX_COST}: {verdict}",
                    flush=True,
                )
            if arguments.checked:
                print(
                    f"{shape:10s} {dtype:9s} same bits alone as together: {row['equal']} of {row['checked']}; "
                    f"without the option {row['equal_without']}",
                    flush=True,
                )
            if arguments.json:
                facts = {"requests": arguments.requests, "environment": environment()}
                write_json(arguments.json, facts | {"rows": rows})
    # What is promised: the bits. What it costs is reported.
    if any(row.get("equal") != row.get("checked") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
