"""What sharing blocks saves, and what it is worth where memory is short.

Blocks: the demo LLaMA on its own kind of text, lengths of Alpaca and ShareGPT. Saved is the share of blocks that
sequences would hold without sharing, mean over steps: 6 beams (many prompts at once), and 6 samples
of a prompt (`num_return_sequences`, prompt after prompt).

Throughput: GPT-2 124M with random weights, 6 beams, a pool of `--groups` times what the longest prompt's beams may need
without sharing. The arm without sharing runs the same code, but every owner of a block counts as if it had its own: no
copies are made for it, so only the memory differs. Both arms once a round, in turn.

    python benchmarks/sharing.py [--part all|blocks|throughput] [--requests 16] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Request, workload_from_lengths
from hf_paged.engine import groups
from hf_paged.engine.block_manager import BlockManager

WIDTH = 6  # beams, or samples of a prompt
BLOCK = 16
#: (lengths, mode) -> share of blocks that must be saved: what vLLM's paper reports.
TARGETS = {
    ("alpaca", "beams"): 0.37,
    ("sharegpt", "beams"): 0.44,
    ("alpaca", "samples"): 0.06,
    ("sharegpt", "samples"): 0.16,
}
MIN_SPEEDUP, AIM_SPEEDUP = 1.5, 2.2
DEMO = Path(__file__).resolve().parent.parent / "examples" / "models" / "llama"


def draw(lengths: str, count: int, model: Any, tokenizer: Any = None) -> list[Request]:
    workload = workload_from_lengths(
        lengths,
        count,
        vocab_size=model.config.vocab_size,
        max_positions=position_limit(model),
        tokenizer=tokenizer,
    )
    return list(workload.requests)


def limited(request: Request, **options: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=request.max_new_tokens, eos_token_id=None, pad_token_id=0, **options
    )


def run_beams(model: Any, requests: list[Request]) -> list[list[int]]:
    configs = [limited(r, num_beams=WIDTH, do_sample=False) for r in requests]
    results = hf_paged.generate_many(model, [list(r.prompt) for r in requests], generation_config=configs)
    for result in results:
        if result.error is not None:
            raise result.error
    return [r.token_ids for r in results]


def run_samples(model: Any, requests: list[Request]) -> None:
    torch.manual_seed(0)
    for request in requests:
        options = {"do_sample": True, "num_return_sequences": WIDTH, "top_k": 0}
        model.generate(torch.tensor([request.prompt]), generation_config=limited(request, **options))


def measure_blocks(count: int) -> dict[str, Any]:
    """Saved shares by lengths and mode. The prefix cache is off: only beams and samples share."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = {}
    for lengths, mode in TARGETS:
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        requests = draw(lengths, count, model, tokenizer)
        with hf_paged.enabled(model, block_size=BLOCK, prefix_caching=False, fallback="error"):
            (run_beams if mode == "beams" else run_samples)(model, requests)
            stats = hf_paged.stats(model)
        found[f"{lengths} {mode}"] = {
            "saved": stats.kv_shared,
            "peak_blocks_used": stats.peak_blocks_used,
            "peak_blocks_if_unshared": stats.peak_blocks_if_unshared,
            "must": TARGETS[lengths, mode],
        }
        print(
            f"{lengths}, {mode}: {stats.kv_shared:.1%} saved (must be ≥ {TARGETS[lengths, mode]:.0%})",
            flush=True,
        )
    return found


@contextmanager
def unshared() -> Iterator[None]:
    """Every reference to a block counts as a block of its own."""
    available, to_start = BlockManager.num_available, groups.blocks_to_start

    def each_alone(group: Any, manager: BlockManager) -> int:
        return sum(manager.blocks_for(s.num_tokens) for s in group.active) + len(group.sequences)

    BlockManager.num_available = property(lambda self: self.max_blocks - sum(self._ref))  # type: ignore[assignment]
    groups.blocks_to_start = each_alone
    try:
        yield
    finally:
        BlockManager.num_available = available  # type: ignore[method-assign]
        groups.blocks_to_start = to_start


def measure_throughput(
    name: str, lengths: str, count: int, num_groups: float, repeats: int
) -> dict[str, Any]:
    model = build_random(name, parse_dtype("float32"))
    requests = draw(lengths, count, model)
    longest = max(-(-(len(r.prompt) + r.max_new_tokens) // BLOCK) for r in requests)
    config = model.config
    block_bytes = 2 * config.num_hidden_layers * config.hidden_size * 4 * BLOCK
    # One more for each beam: a copy-on-write asks for a block before it gives its share of the old one up.
    budget = (int(num_groups * WIDTH * longest) + WIDTH) * block_bytes

    def run() -> tuple[float, list[list[int]], dict[str, Any]]:
        options = {"prefix_caching": False, "fallback": "error", "kv_cache_memory": budget}
        with hf_paged.enabled(model, block_size=BLOCK, **options):
            start = time.perf_counter()
            tokens = run_beams(model, requests)
            return time.perf_counter() - start, tokens, hf_paged.stats(model).to_dict()

    with hf_paged.enabled(model, fallback="error"):
        run_beams(model, requests[:1])  # compiles what is compiled once a process
    rounds = []
    for turn in range(repeats):
        seconds: dict[str, float] = {}
        for arm in ("on", "off") if turn % 2 == 0 else ("off", "on"):
            if arm == "on":
                seconds["on"], shared_tokens, on = run()
            else:
                with unshared():
                    seconds["off"], unshared_tokens, off = run()
        rounds.append(seconds)
        print(f"sharing on {seconds['on']:.1f} s, off {seconds['off']:.1f} s", flush=True)
    same = sum(a == b for a, b in zip(shared_tokens, unshared_tokens, strict=True))
    return {
        "model": name, "lengths": lengths, "requests": count, "pool_bytes": budget, "rounds": rounds,
        "speedup": statistics.median(r["off"] / r["on"] for r in rounds),
        "mean_running": {"on": on["mean_running"], "off": off["mean_running"]},
        "preemptions": {"on": on["preemptions"], "off": off["preemptions"]},
        "same_results": f"{same} of {count}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "blocks", "throughput"), default="all")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--lengths", default="design")
    parser.add_argument("--groups", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment()}
    missed = 0
    if arguments.part != "throughput":
        result["blocks"] = measure_blocks(arguments.requests)
        missed += sum(line["saved"] < line["must"] for line in result["blocks"].values())
    if arguments.part != "blocks":
        throughput = measure_throughput(
            arguments.model, arguments.lengths, arguments.requests, arguments.groups, arguments.repeats
        )
        result["throughput"] = throughput
        missed += throughput["speedup"] < MIN_SPEEDUP
        print(
            f"sharing on / off: {throughput['speedup']:.2f}x (must be ≥ {MIN_SPEEDUP}, aim {AIM_SPEEDUP}); "
            f"running {throughput['mean_running']}, preemptions {throughput['preemptions']}, "
            f"same results: {throughput['same_results']}"
        )
    if arguments.json:
        write_json(arguments.json, result)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
