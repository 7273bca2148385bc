"""What `kv_cache_dtype="int8"` saves and costs: the same requests over int8 and over the model's own dtype, in turn.

GPT-2's 124M shape with random weights, prompts of one length, all at once. Times are those of decoding: from the moment
every request has its first token to the end. Bytes are what the pool holds per token, and how many tokens a pool of a
given size takes. Tokens are compared with those over the model's own dtype up to the first that differs: random weights
have nearly equal best tokens, so this is the least equality to expect.

    python benchmarks/int8_kv.py [--shape gpt2-124m] [--dtypes float32,bfloat16] [--requests 64] [--prompt 256]
    [--new 32] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json

#: Bytes of int8 over those of the model's dtype, at GPT-2's heads of 64 numbers: (64 + 4) / (64 * itemsize).
MAX_SHARE = {"float32": 0.27, "bfloat16": 0.54}
POOL_BYTES = 2**30


def run(model: Any, prompts: list[list[int]], new_tokens: int, cache_dtype: Any) -> dict[str, Any]:
    """One run on an empty cache, after a request of one token that loads the kernels."""
    with hf_paged.enabled(model, kv_cache_dtype=cache_dtype, prefix_caching=False):
        hf_paged.generate_many(model, [[1, 2, 3]], max_new_tokens=2, do_sample=False)
        engine = hf_paged.engine(model)
        handles = [engine.submit(p, max_new_tokens=new_tokens, do_sample=False) for p in prompts]
        for handle in handles:
            next(iter(handle))
        stats = hf_paged.stats(model)  # now, while there is something in the pool
        start = time.perf_counter()
        before = sum(len(handle.partial().token_ids) for handle in handles)
        tokens = [handle.result().token_ids for handle in handles]
        seconds = time.perf_counter() - start
    decoded = sum(map(len, tokens)) - before
    return {
        "tokens_per_s": decoded / seconds,
        "bytes_per_token": stats.kv_bytes / stats.kv_blocks_total / hf_paged.PagedConfig().block_size,
        "tokens": tokens,
    }


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of all tokens, those before the first other one of their row."""
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        count += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return count / sum(map(len, theirs))


def measure(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    model = build_random(arguments.shape, parse_dtype(dtype))
    source = random.Random(arguments.seed)
    vocab_size = model.config.vocab_size
    prompts = [
        [source.randrange(vocab_size) for _ in range(arguments.prompt)] for _ in range(arguments.requests)
    ]
    pairs = []
    for turn in range(arguments.repeats + 1):
        order = ("int8", "auto") if turn % 2 else ("auto", "int8")
        found = {name: run(model, prompts, arguments.new, name) for name in order}
        if turn:  # the first pair warms up
            pairs.append(found)
    ratios = [pair["int8"]["tokens_per_s"] / pair["auto"]["tokens_per_s"] for pair in pairs]
    held = {name: pairs[0][name]["bytes_per_token"] for name in ("int8", "auto")}
    return {
        "dtype": dtype,
        "speed": statistics.median(ratios),
        "speed_min": min(ratios),
        "speed_max": max(ratios),
        "tokens_per_s": [{name: pair[name]["tokens_per_s"] for name in pair} for pair in pairs],
        "bytes_per_token": held,
        "share": held["int8"] / held["auto"],
        "tokens_in_1_gib": {name: int(POOL_BYTES / count) for name, count in held.items()},
        "equal_tokens": equal_share(pairs[0]["int8"]["tokens"], pairs[0]["auto"]["tokens"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-124m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each")
    parser.add_argument("--new", type=int, default=32, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for dtype in arguments.dtypes.split(","):
        row = measure(arguments, dtype)
        rows.append(row)
        print(
            f"{arguments.shape} {dtype}: decoding with int8 at {row['speed']:.2f}x ({row['speed_min']:.2f} to "
            f"{row['speed_max']:.2f}) of the speed without, {row['share']:.3f} of the bytes "
            f"({row['bytes_per_token']['int8']:.0f} for {row['bytes_per_token']['auto']:.0f} a token), "
            f"{row['equal_tokens']:.0%} of tokens equal",
            flush=True,
        )
        if arguments.json:
            names = ("shape", "requests", "prompt", "new", "seed")
            facts = {name: getattr(arguments, name) for name in names} | {"environment": environment()}
            write_json(arguments.json, facts | {"rows": rows})
    # What is promised: the memory. What it does to speed is reported.
    if any(row["share"] > MAX_SHARE[row["dtype"]] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
